"""An adapter merged into its base, and a check that what was saved answers as the run did.

    W_merged = W + (alpha / r) · B A            in full precision, whatever precision the run kept W in

A run on a 4-bit base trained its adapter against rounded weights. Merging into those as they lie, in 4 bits, would
round the sum once more, and part of the update away. So the base is loaded anew from its name: rounded as training saw
it and then widened, which gives the very policy that was trained; or unquantised.
"""

import warnings
from functools import partial
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dpop_trainer.models.adapters import adapter_base
from dpop_trainer.models.trained import load_trained

# tokens of the probe on which the run and the saved model are held against each other
NUM_PROBE_TOKENS = 32


class Merged(NamedTuple):
    """A whole model, ready to be saved."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    base: str | None
    """What the adapter was merged into; None where the run was a whole model."""
    probe_logps: Tensor
    """Log-probs [T, V] of the probe under the run itself, before the merge. fp32, CPU."""


def merge_run(
    run: str,
    *,
    base: str | None,
    init_kwargs: dict[str, Any],
    device: str | None = None,
    quantization_config: Any = None,
) -> Merged:
    """Load a run and merge its adapter, if it is one.

    Args:
        run: folder or hub id of a model or an adapter.
        base: merge into this model instead of the one that the adapter names; for a base that was quantised for good.
        init_kwargs: for from_pretrained: dtype, revision, trust_remote_code.
        device: where to merge; by default the CPU, which holds larger models.
        quantization_config: round the base in this way, as training did, and merge into what that leaves.

    Raises:
        ValueError: the run cannot be loaded, the base is stored quantised, or the adapter is of a kind that peft cannot
            merge.
    """
    named_base = adapter_base(run)
    if named_base is None:
        if base is not None:
            raise ValueError(f"base: expected none for {run!r}, which is a whole model, got {base!r}.")
        _check_not_quantised(run, init_kwargs)
        trained = load_trained(run, init_kwargs=init_kwargs, device=device or "cpu")
        return Merged(trained.model, trained.tokenizer, None, probe_logps(trained.model))
    base = base or named_base
    _check_not_quantised(base, init_kwargs)
    load = partial(load_trained, run, init_kwargs=init_kwargs, device=device or "cpu", base=base)
    if quantization_config is None:
        trained = load()
        logps = probe_logps(trained.model)
    else:
        logps = probe_logps(load(quantization_config=quantization_config).model)
        trained = load(quantization_config=quantization_config, widen=True)
    model = trained.model
    assert isinstance(model, PeftModel)
    _untie_adapted_embeddings(model)
    try:
        with warnings.catch_warnings():
            # peft warns that tied weights are adapted, and of what was untied here for that reason
            warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
            warnings.filterwarnings("ignore", message="Model with `tie_word_embeddings=True`")
            merged: Any = model.merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError, AttributeError) as error:
        raise ValueError(f"run: expected an adapter that peft can merge, got {run!r}. {error}") from error
    _say_whether_tied(merged)
    return Merged(merged, trained.tokenizer, base, logps)


@torch.no_grad()
def probe_logps(model: Any) -> Tensor:
    """Log-probs [T, V] of a fixed run of tokens, fp32, on the CPU."""
    vocab_size = model.get_input_embeddings().weight.shape[0]
    # spread over the vocabulary, the same for every model of this size
    ids = (torch.arange(1, NUM_PROBE_TOKENS + 1) * 7919) % vocab_size
    logits = model(input_ids=ids[None].to(model.device)).logits[0]
    return logits.float().log_softmax(-1).cpu()


def largest_change(before: Tensor, after: Tensor) -> float:
    """The largest change of a probability, in [0, 1]: a log-prob of -50 may move freely, one near 0 may not."""
    return float((before.exp() - after.exp()).abs().max())


def _check_not_quantised(name: str, init_kwargs: dict[str, Any]) -> None:
    from transformers import AutoConfig

    kwargs = {key: value for key, value in init_kwargs.items() if key in ("trust_remote_code",)}
    try:
        config = AutoConfig.from_pretrained(name, **kwargs)
    except (OSError, ValueError) as error:
        raise ValueError(f"base: expected a hub id or a folder with a model, got {name!r}. {error}") from error
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
        raise ValueError(
            f"base: expected weights in full precision, got {name!r}, which is stored quantised ({method}). Name the "
            "model that it was made from: --base"
        )


def _untie_adapted_embeddings(model: PeftModel) -> None:
    """Give the head weights of its own where it shares the embedding's and only one of the two is adapted.

    A merge adds to weights in place; on shared ones it would change the other module too.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None:
        return
    inner = [getattr(module, "base_layer", module) for module in (embedding, head)]
    weights = [getattr(module, "weight", None) for module in inner]
    adapted = any(hasattr(module, "base_layer") for module in (embedding, head))
    shared = weights[1]
    if adapted and shared is not None and weights[0] is shared:
        inner[1].weight = nn.Parameter(shared.detach().clone(), requires_grad=False)


def _say_whether_tied(model: Any) -> None:
    """A model that says its head is tied is saved without one: its own would be lost."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or not model.config.get_text_config().tie_word_embeddings:
        return
    if embedding.weight is not head.weight and not torch.equal(embedding.weight, head.weight):
        for config in {id(config): config for config in (model.config, model.config.get_text_config())}.values():
            config.tie_word_embeddings = False
