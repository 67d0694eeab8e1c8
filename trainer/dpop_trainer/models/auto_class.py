"""Which of transformers' Auto classes a checkpoint is of: the one that gives the class that saved it, whole."""

from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
)
from transformers.models.auto import modeling_auto

from dpop_trainer.settings.model_folder import not_a_decoder

# a text model first: a configuration without a class's name is one of these
_CLASSES = (
    (AutoModelForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    (AutoModelForImageTextToText, modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
    (AutoModelForMultimodalLM, modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES),
)


def auto_class(config: PreTrainedConfig) -> Any:
    """The Auto class for a checkpoint with this configuration.

    A vision-language checkpoint is loaded with its vision tower, also where transformers has a causal LM for its text
    part alone: of that part, what is trained and saved would not be the checkpoint, nor would an adapter go on it.

    Raises:
        ValueError: none gives a decoder that writes text.
    """
    remote = getattr(config, "auto_map", None) or {}
    saved_by = (config.architectures or [""])[0]
    if not config.is_encoder_decoder:
        of_its_type = [(auto, names[config.model_type]) for auto, names in _CLASSES if config.model_type in names]
        for auto, name in of_its_type:
            if saved_by == name:
                return auto
        for auto, _ in _CLASSES:
            if auto.__name__ in remote:
                return auto
        if of_its_type:
            return of_its_type[0][0]
    raise ValueError(not_a_decoder(saved_by, config.model_type))
