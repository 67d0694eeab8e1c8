"""Which reference a run has: decided once, before anything is loaded or copied for it, and asked from then on.

Columns of the data set go before any model. Where no second model is given, the policy is its own reference, as it was
at the start; cheapest first:

    new adapter                 the base: adapter off
    adapter trained before      the adapter as it was, switched in
    all weights                 a frozen copy
    with precompute_ref_log_probs, whatever else than a new adapter: the policy before training, and no copy

With sync_ref_model the weights of that reference, or of a second model, follow the policy; an adapter's are a second
set, which starts as the adapter does.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from datasets import Dataset
from peft import PeftModel

from dpop_kernels import needs_reference
from dpop_trainer.data.records import REF_COLUMNS
from dpop_trainer.models.loading import Policy, disable_dropout
from dpop_trainer.models.positions import check_positions
from dpop_trainer.models.quantised import make_trainable
from dpop_trainer.models.tensor_parallel import parallel_size
from dpop_trainer.reference.adapters import adapter_changes_nothing
from dpop_trainer.reference.moving import check_can_follow
from dpop_trainer.reference.recall import Origin, fingerprint
from dpop_trainer.reference.second_model import check_reference, load_reference
from dpop_trainer.reference.source import frozen_copy
from dpop_trainer.settings.config import DPOPConfig

logger = logging.getLogger(__name__)


class Kind(Enum):
    """Of a reference; the value is what log lines and reference.json call it."""

    NONE = "no reference"
    COLUMNS = "columns of the data sets"
    SECOND_MODEL = "a second model"
    COPY = "a copy of the model as it was at the start"
    ADAPTER_OFF = "the base under the adapter"
    BEFORE_TRAINING = "the model as it was at the start"
    START_WEIGHTS = "the adapter as it was at the start"


@dataclass(frozen=True)
class ReferencePlan:
    """The reference of a run."""

    kind: Kind
    is_precomputed: bool = False
    """One pass before training gives the data sets their columns, and then no model is kept for it."""
    trains_on_given_columns: bool = False
    """The training pairs bring the reference's log-probs, also where other pairs do not."""
    moves: bool = False
    """Its weights follow the policy's (sync_ref_model)."""

    @property
    def is_needed(self) -> bool:
        """Some loss has a reference at all."""
        return self.kind is not Kind.NONE

    @property
    def is_a_model(self) -> bool:
        """Log-probs come from a model, the policy or another, and not from columns alone."""
        return self.kind not in (Kind.NONE, Kind.COLUMNS)

    @property
    def is_the_policy(self) -> bool:
        """In another state, so that there is no second model in memory."""
        return self.is_a_model and self.kind not in (Kind.SECOND_MODEL, Kind.COPY)

    @property
    def is_start_of_policy(self) -> bool:
        """The same weights as the policy's when the trainer was built."""
        return self.kind is not Kind.SECOND_MODEL


def plan_reference(
    policy: Any,
    ref_model: Any,
    args: DPOPConfig,
    *,
    train_dataset: Any,
    eval_dataset: Any,
    is_new_adapter: bool,
) -> ReferencePlan:
    """
    Args:
        policy: the model that is trained, an adapter on it where there is to be one.
        ref_model: what the user gave as the reference: a model, a name or path, or None.
        args: the configuration.
        train_dataset, eval_dataset: tokenised; of the latter several by name.
        is_new_adapter: the adapter has just been put on.

    Raises:
        ValueError: the reference is to follow the policy, and there are no weights of it that could; or data sets bring
            log-probs that cannot be the reference's.
    """
    parts = data_parts(train_dataset, eval_dataset)
    check_columns(args, parts)
    kind = _kind(policy, ref_model, args, parts, is_new_adapter)
    plan = ReferencePlan(kind, trains_on_given_columns=kind is not Kind.NONE and has_reference_columns(train_dataset))
    if plan.is_a_model:
        return ReferencePlan(kind, args.precompute_ref_log_probs, plan.trains_on_given_columns, args.sync_ref_model)
    if ref_model is not None:
        logger.warning("ref_model is not used: no loss needs a reference, or all pairs bring their own columns.")
    return plan


def reference_model(plan: ReferencePlan, policy: Policy, ref_model: Any, args: DPOPConfig, parts: list[Any]) -> Any:
    """The model beside the policy that a plan asks for, loaded or copied, frozen; None where it asks for none.

    Args:
        plan: from `plan_reference`, of the same policy, ref_model and args.
        policy: the model that is trained, with its tokenizer.
        ref_model, args: see there.
        parts: all tokenised data sets.

    Raises:
        ValueError: it cannot be loaded, training would change it too, it does not know all tokens, or a pair is longer
            than it has positions.
    """
    if plan.is_the_policy or not plan.is_a_model:
        return None
    model = ref_model
    if plan.kind is Kind.COPY:
        model = frozen_copy(policy.model) if parallel_size(policy.model) == 1 else _loaded_again(policy.model, args)
    elif isinstance(ref_model, str):
        own: Any = args.ref_model_init_kwargs
        init_kwargs = {"trust_remote_code": True, **(own or {})} if args.trust_remote_code else own
        model = load_reference(ref_model, policy.model, init_kwargs)
    if plan.kind is Kind.SECOND_MODEL:
        check_reference(model, policy.model, num_tokens=len(policy.tokenizer))
        if plan.moves:
            check_can_follow(model, policy.model)
    for part in parts:
        if isinstance(part, Dataset):
            check_positions(model, part, "ref_model")
    model.eval().requires_grad_(False)
    make_trainable(model)
    if args.disable_dropout:
        disable_dropout(model)
    return model


def _loaded_again(policy: Any, args: DPOPConfig) -> Any:
    """A copy of a model whose layers are spread over ranks, from where it came: one in memory would run the original's
    layers, to which its forwards are bound.

    Raises:
        ValueError: where it came from is not known, or has other weights.
    """
    init_kwargs: Any = args.model_init_kwargs or {}
    try:
        return Origin.of(policy, fingerprint(policy, True)).load(policy, dict(init_kwargs)).requires_grad_(False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"ref_model: expected one, or a policy that can be loaded a second time, since tensor-parallel weights are "
            f"not copied, and {error}. Pass the model by name, or set precompute_ref_log_probs=True."
        ) from error


def check_columns(args: DPOPConfig, parts: list[Any]) -> None:
    """
    Raises:
        ValueError: a data set brings reference log-probs, and the reference is to change or to count tokens otherwise.
    """
    why = {
        "sync_ref_model": (args.sync_ref_model, "the reference changes as training goes on"),
        "ld_alpha": (args.ld_alpha not in (None, 1), "they are sums over whole answers, in which all tokens count"),
    }
    for name, (is_set, reason) in why.items():
        if is_set and any(map(has_reference_columns, parts)):
            raise ValueError(
                f"{name}: expected pairs without the columns ref_chosen_logps and ref_rejected_logps, since {reason}, "
                f"got pairs with them. Remove the columns, or leave {name} out."
            )


def has_reference_columns(dataset: Any) -> bool:
    """Whether a data set brings the reference's log-probs."""
    return set(REF_COLUMNS) <= set(getattr(dataset, "column_names", None) or ())


def data_parts(train_dataset: Any, eval_dataset: Any) -> list[Any]:
    """All data sets of a run, that of training first."""
    evaluated = list(eval_dataset.values()) if isinstance(eval_dataset, Mapping) else [eval_dataset]
    return [part for part in (train_dataset, *evaluated) if part is not None]


def _kind(policy: Any, ref_model: Any, args: DPOPConfig, parts: list[Any], is_new_adapter: bool) -> Kind:
    if not needs_reference(args.loss_type):
        return Kind.NONE
    if all(map(has_reference_columns, parts)):
        return Kind.COLUMNS
    if ref_model is not None:
        return Kind.SECOND_MODEL
    if isinstance(policy, PeftModel) and adapter_changes_nothing(policy, is_new=is_new_adapter):
        return Kind.ADAPTER_OFF
    if args.precompute_ref_log_probs:
        return Kind.BEFORE_TRAINING
    return Kind.START_WEIGHTS if isinstance(policy, PeftModel) else Kind.COPY
