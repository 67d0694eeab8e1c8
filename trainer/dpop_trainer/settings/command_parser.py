"""The parser of commands whose options are their own: errors are exceptions of one sentence."""

import argparse
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from dpop_trainer.settings.errors import UsageError
from dpop_trainer.settings.hints import closest


class CommandParser(argparse.ArgumentParser):
    """Names a flag that does not exist, and the one that was meant, before it misses others."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """
        Raises:
            UsageError: what argparse would print its usage for.
        """
        words = list(sys.argv[1:] if args is None else args)
        if not any(isinstance(action, argparse._SubParsersAction) for action in self._actions):
            self._check_flags(words)
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        end = "" if message.endswith((".", "?")) else "."
        raise UsageError(f"{message}{end} `{self.prog} --help` lists the options.")

    def _check_flags(self, words: Iterable[str]) -> None:
        known = [flag for action in self._actions for flag in action.option_strings]
        for word in words:
            flag = word.partition("=")[0]
            if flag == "--":
                return
            if flag.startswith("--") and not any(option.startswith(flag) for option in known):
                self.error(f"{flag}: expected an option, got an unknown one.{did_you_mean(flag, known)}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence that names the closest, after a space; nothing where none is close."""
    close = closest(name, known)
    return f" Did you mean {close!r}?" if close else ""
