"""The card of a model that was trained here: transformers', by the arguments that TRL's trainers take."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from dpop_trainer.training.hf_hooks import HfHooks

_LIBRARY = "dpop-kernels"


class NamedCard(HfHooks):
    """A trainer whose card names the data set, also where that is known by name alone."""

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | list[str] | None = None,
        tags: str | list[str] | None = None,
        **more: Any,
    ) -> None:
        """Write README.md beside the model; `push_to_hub` does, and hands its further arguments on to here.

        Args:
            model_name: by default that of the output folder.
            dataset_name: hub id of the training data, or several.
            tags: for the hub, besides the model's own.
            more: further arguments of `transformers.Trainer.create_model_card`: license, language, ...
        """
        tags = [tags] if isinstance(tags, str) else list(tags or [])
        own = getattr(self.model, "model_tags", None) or []
        # without a name transformers would ask the tokenised data set for one, which has none
        more.setdefault("dataset_tags", dataset_name or [])
        super().create_model_card(model_name=model_name, tags=list(dict.fromkeys([*tags, *own])), **more)


def tag_model(model: nn.Module, losses: Iterable[str]) -> None:
    """Have a model say on the hub what it was trained with; for one that is not of transformers there is no place."""
    add_tags: Any = getattr(model, "add_model_tags", None)
    if add_tags is not None:
        add_tags([_LIBRARY, *losses])
