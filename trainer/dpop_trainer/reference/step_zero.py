"""How far policy and reference are apart before the first update, and, where that is not ~0, why.

DPOP's penalty multiplies every nat that a chosen answer is below its reference by βλ = 15 and more: what differs at the
start for no good reason is trained on. So it is measured over all pairs of the first step, and causes are looked for.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from dpop_trainer.batches.scoring import attention_of
from dpop_trainer.models.adapters import base_model
from dpop_trainer.reference.adapters import adapter_changes_nothing

logger = logging.getLogger(__name__)

# nats per answer; what fp32 sums over a long answer may differ by when policy and reference are the same weights
TOLERANCE = 1e-2

Columns = Literal["given", "computed"]


class Setting(NamedTuple):
    """What is compared at step 0."""

    policy: nn.Module
    reference: nn.Module | None
    """A second model; None where the reference is the policy in another state, or columns."""
    is_start_of_policy: bool
    """The reference is meant to be the policy as it was when the trainer was built."""
    columns: Columns | None
    """Reference log-probs come with the data set, or were computed once before training."""
    mixed_precision: str
    """accelerate's name of the policy's autocast."""
    cached_attention: str | None = None
    """The attention implementation that a cache was computed with."""


class StepZero(TrainerCallback):
    """Collects |Δw| and |Δl| of the first step's pairs; before the first update looks at them, and warns.

    Args:
        accelerator: to take all processes' pairs together.
        setting: called where the two are apart, for `probable_causes`.
    """

    def __init__(self, accelerator: Accelerator, setting: Callable[[], Setting]) -> None:
        self._accelerator, self._setting = accelerator, setting
        self._sums: Tensor | None = None  # [3]: |Δw|, |Δl|, pairs
        self._largest: Tensor | None = None  # [2]: |Δw|, |Δl|
        self._metrics: dict[str, float] = {}

    def add(self, chosen_logratios: Tensor, rejected_logratios: Tensor, *, is_filler: bool = False) -> None:
        """Take a micro-batch of the first step in: Δw and Δl [B]. A filler counts for nothing. No sync."""
        apart = torch.stack([chosen_logratios, rejected_logratios]).detach().double().abs()
        if is_filler:
            apart = torch.zeros_like(apart)
        sums = torch.cat([apart.sum(-1), apart.new_full((1,), 0 if is_filler else apart.shape[1])])
        largest = apart.amax(-1)
        self._sums = sums if self._sums is None else self._sums + sums
        self._largest = largest if self._largest is None else torch.maximum(self._largest, largest)

    def pop_metrics(self) -> dict[str, float]:
        """What was measured, once."""
        metrics, self._metrics = self._metrics, {}
        return metrics

    def state(self) -> dict[str, Tensor]:
        """What waits for the next log line, for a checkpoint."""
        return {key: torch.tensor(value, dtype=torch.float64) for key, value in self._metrics.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """The counterpart of `state`."""
        self._metrics = {key: value.item() for key, value in state.items()}

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step or self._sums is None or self._largest is None:
            return
        gathered: Any = self._accelerator.gather(torch.cat([self._sums, self._largest]).unsqueeze(0))
        chosen_sum, rejected_sum, num_pairs = gathered[:, :3].sum(0).tolist()
        chosen, rejected = gathered[:, 3:].amax(0).tolist()
        self._sums = self._largest = None
        self._metrics = {
            "dpop/step_0_max_logratio": max(chosen, rejected),
            "dpop/step_0_max_chosen_logratio": chosen,
            "dpop/step_0_mean_chosen_logratio": chosen_sum / num_pairs,
            "dpop/step_0_max_rejected_logratio": rejected,
            "dpop/step_0_mean_rejected_logratio": rejected_sum / num_pairs,
        }
        if max(chosen, rejected) > TOLERANCE:
            logger.warning(
                "Policy and reference differ before the first update: |Δ| of chosen answers up to %.3g nats (mean "
                "%.3g), of rejected ones up to %.3g (mean %.3g). %s",
                chosen,
                chosen_sum / num_pairs,
                rejected,
                rejected_sum / num_pairs,
                explanation(self._setting()),
            )


def explanation(setting: Setting) -> str:
    """The probable causes in one line."""
    causes = list(probable_causes(setting))
    if not causes:
        return "No cause was found: weights, dtypes, attention and dropout agree."
    return "Probable cause: " + "; ".join(causes) + "."


def probable_causes(setting: Setting) -> Iterator[str]:
    """What makes the two differ, as far as looking at both can tell: each cause with its remedy."""
    policy = base_model(setting.policy)
    dropout = active_dropout(setting.policy)
    if dropout is not None:
        yield f"dropout is on in the policy ({dropout}); set disable_dropout"
    noise = embedding_noise(setting.policy)
    if noise:
        yield (
            f"NEFTune's noise is on the policy's embeddings (neftune_noise_alpha={noise:g}) and not on the "
            "reference's, which is how it works; leave it out for Δ to be 0 at the start"
        )
    is_held_against_another = not setting.is_start_of_policy and setting.columns is None
    if is_held_against_another and _has_trained_adapter(setting.policy):
        yield (
            "the policy's adapter is not zero at the start and the reference is another model; leave ref_model out to "
            "start from the adapter"
        )
    if setting.reference is not None:
        yield from _differences(policy, base_model(setting.reference))
    if setting.columns == "given":
        yield (
            "the data set's own ref_chosen_logps and ref_rejected_logps are another model's, or stale: made with "
            "another template, truncation or dtype; remove them and set precompute_ref_log_probs"
        )
    if setting.columns == "computed":
        attention = attention_of(policy)
        if setting.cached_attention not in (None, attention):
            yield (
                f"attn_implementation is {attention!r}, and the cached reference log-probs were computed with "
                f"{setting.cached_attention!r}; use the same, or another ref_cache_dir"
            )
        if setting.mixed_precision in ("bf16", "fp16") or policy.dtype in (torch.bfloat16, torch.float16):
            yield (
                "16-bit rounding, which depends on the batch that a pair is in, and after the first update decides "
                "which pairs DPOP penalises; leave precompute_ref_log_probs out, so that both are computed in the same "
                "batch"
            )


def active_dropout(model: nn.Module) -> str | None:
    """The first module in training mode that drops anything, and how; None where there is none."""
    for path, module in model.named_modules():
        if not module.training:
            continue
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            return f"{path}: {type(module).__name__}({module.p:g})"
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float) and value > 0:
                return f"{path}.{name} = {value:g}"
    return None


def embedding_noise(model: Any) -> float:
    """NEFTune's alpha, 0 without."""
    return getattr(model.get_input_embeddings(), "neftune_noise_alpha", None) or 0.0


def _differences(policy: Any, reference: Any) -> Iterator[str]:
    """What sets two models apart. Names of layers are compared as they are without peft."""
    is_policy_quantised, is_reference_quantised = (_is_quantised(model) for model in (policy, reference))
    if is_policy_quantised != is_reference_quantised:
        quantised, whole = ("policy", "reference") if is_policy_quantised else ("reference", "policy")
        yield f"the {quantised} is quantised, the {whole} is not; quantise both alike, or leave ref_model out"
    elif policy.dtype != reference.dtype:
        yield (
            f"the reference's weights are {_name(reference.dtype)}, the policy's {_name(policy.dtype)}; load both in "
            "one dtype (ref_model_init_kwargs)"
        )
    if attention_of(policy) != attention_of(reference):
        yield (
            f"attn_implementation is {attention_of(policy)!r} in the policy and {attention_of(reference)!r} in the "
            "reference; load both with one"
        )
    odd = None if is_policy_quantised or is_reference_quantised else _first_other_weight(policy, reference)
    if odd is not None:
        names = [model.config._name_or_path or "a model without a name" for model in (policy, reference)]
        yield (
            f"the reference is another model ({names[1]!r}, the policy is {names[0]!r}; first weight that differs: "
            f"{odd}), which is right where it is meant"
        )


def _first_other_weight(policy: nn.Module, reference: nn.Module) -> str | None:
    """The name of a weight that one model has and the other has not, or has with other values. Weights that cannot be
    read (offloaded) are passed over, and another dtype is not another value."""
    ours = {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): parameter
        for name, parameter in policy.named_parameters()
    }
    for name, theirs in reference.named_parameters():
        own = ours.get(name)
        if own is None or own.shape != theirs.shape:
            return name
        if own.is_meta or theirs.is_meta:
            continue
        # a part on each rank; all of them are here, having seen the same differences
        own, theirs = (value.full_tensor() if isinstance(value, DTensor) else value for value in (own, theirs))
        narrow = min(own.dtype, theirs.dtype, key=lambda dtype: dtype.itemsize)
        if not torch.equal(own.to(narrow), theirs.to(device=own.device, dtype=narrow)):
            return name
    return None


def _has_trained_adapter(model: nn.Module) -> bool:
    return isinstance(model, PeftModel) and not adapter_changes_nothing(model)


def _is_quantised(model: Any) -> bool:
    return getattr(model, "hf_quantizer", None) is not None or bool(getattr(model, "is_quantized", False))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
