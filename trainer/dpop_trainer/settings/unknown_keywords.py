"""A keyword that a class does not have, answered in Python as the command line answers a flag."""

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any, TypeVar

from dpop_trainer.settings.trl_fields import FORMER_NAMES, name_hint

Class = TypeVar("Class", bound=type)


def answers_unknown_keywords(config: type | None = None) -> Callable[[Class], Class]:
    """Decorate a class so that its constructor says which keyword was meant by one that it does not have.

    Args:
        config: the dataclass of what else could have been meant, which is given as `args`.
    """
    elsewhere = [] if config is None else [item.name for item in fields(config)]

    def decorate(owner: Class) -> Class:
        own: Any = owner.__init__
        known = [name for name in inspect.signature(own).parameters if name != "self"]

        @functools.wraps(own)
        def constructor(self: Any, *args: Any, **values: Any) -> None:
            for name in values:
                if name not in known:
                    raise TypeError(
                        f"{name}: expected a keyword of {owner.__name__}, got an unknown one. "
                        f"{_hint(name, known, elsewhere)}"
                    )
            own(self, *args, **values)

        owner.__init__ = constructor  # type: ignore[misc]
        return owner

    return decorate


def _hint(name: str, known: list[str], elsewhere: Iterable[str]) -> str:
    if name in elsewhere:
        return "It is a field of the configuration, args."
    if (former := FORMER_NAMES.get(name)) in known:
        return f"It is called {former} now."
    return name_hint(name, [*known, *elsewhere], f"It has {', '.join(known[:8])} ...")
