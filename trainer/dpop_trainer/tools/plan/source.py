"""A model's configuration, without its weights: from a folder, the table of known models, or the hub."""

import json
import socket
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies

import huggingface_hub
from rapidfuzz import process
from transformers import AutoConfig, PreTrainedConfig

from dpop_trainer.data.source_path import expanded
from dpop_trainer.models.adapters import find_adapter_base
from dpop_trainer.settings.model_paths import check_model_path, is_adapter_folder
from dpop_trainer.tools.plan.known_models import HUB_IDS, SHAPES, known_config, known_name

HUB_SECONDS = 3.0
"""That the hub has to answer in."""
CLOSE = 3
"""Names that an error suggests."""


class ModelSource(NamedTuple):
    """Where a configuration came from."""

    config: PreTrainedConfig
    origin: str
    """In words, for the report."""


def find_config(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> ModelSource:
    """The configuration of a model, without a network where that is possible.

    Args:
        name: a folder with config.json or an adapter, that file itself, a name or hub id of `known_models`, or
            another hub id.
        revision: on the hub.
        trust_remote_code: run configuration code that comes with the weights.

    Raises:
        ValueError: there is no such model; names the close ones.
    """
    path = expanded(name)
    if path.is_file():
        return ModelSource(_from_file(path), f"{name}")
    if (path / "config.json").is_file():
        return ModelSource(_loaded(str(path), None, trust_remote_code), f"{name}/config.json")
    if is_adapter_folder(name):
        base = find_adapter_base(name)
        assert base is not None
        source = find_config(base, trust_remote_code=trust_remote_code)
        return ModelSource(source.config, f"the base under the adapter {name}: {source.origin}")
    shape = known_name(name)
    if shape is not None and revision is None:
        return ModelSource(known_config(shape), f"the table of known models, {shape}")
    check_model_path(name)
    return ModelSource(_from_hub(name, revision, trust_remote_code), f"config.json of {name} on the hub")


def close_names(name: str) -> list[str]:
    """Known models that are called alike."""
    known = {known.lower(): known for known in [*HUB_IDS, *SHAPES]}
    return [known[close] for close, _, _ in process.extract(name.lower(), list(known), limit=CLOSE)]


def _from_file(path: Path) -> PreTrainedConfig:
    try:
        values = json.loads(path.read_text())
        return AutoConfig.for_model(**values)
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"model: expected a config.json of transformers, got {str(path)!r}. {error}") from error


def _from_hub(name: str, revision: str | None, trust_remote_code: bool) -> PreTrainedConfig:
    """From its cache here where it is there, else over the network."""
    try:
        return AutoConfig.from_pretrained(
            name, revision=revision or "main", trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError):
        if not _hub_answers():
            raise _unknown(name, "it is not cached here, and the hub does not answer") from None
    return _loaded(name, revision, trust_remote_code)


def _loaded(name: str, revision: str | None, trust_remote_code: bool) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(name, revision=revision or "main", trust_remote_code=trust_remote_code)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise _unknown(name, f"{type(error).__name__}: {error}".splitlines()[0]) from error


def _hub_answers() -> bool:
    """Whether it is worth asking: its client would try five times, for half a minute. A proxy is left to the client."""
    address = urlsplit(huggingface_hub.constants.ENDPOINT)
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    if getproxies():
        return True
    try:
        with socket.create_connection((address.hostname, address.port or 443), timeout=HUB_SECONDS):
            return True
    except OSError:
        return False


def _unknown(name: str, why: str) -> ValueError:
    return ValueError(
        f"model: expected a folder with config.json, a hub id that can be reached, or a known model, got {name!r}: "
        f"{why}. Close to it are: {', '.join(close_names(name))}."
    )
