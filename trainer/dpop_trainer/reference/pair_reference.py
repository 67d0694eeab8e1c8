"""The reference of a run at work: asked batch by batch, or once for whole data sets before training."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.hooks import remove_hook_from_submodules
from accelerate.utils import DistributedType
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import TrainerCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from dpop_kernels import ScoringHead
from dpop_trainer.batches import Batch, PairCollator
from dpop_trainer.batches.scoring import ScoredModel, attention_of, forward_inputs
from dpop_trainer.models.tensor_parallel import parallel_size
from dpop_trainer.models.tiled_mlp import tile_mlps
from dpop_trainer.reference.cache import ReferenceCache, cache_root
from dpop_trainer.reference.choose import Kind, ReferencePlan, has_reference_columns
from dpop_trainer.reference.keys import describe_reference
from dpop_trainer.reference.moving import MovingReference
from dpop_trainer.reference.precompute import precompute_reference
from dpop_trainer.reference.recall import Origin, fingerprint
from dpop_trainer.reference.second_model import offload_reference
from dpop_trainer.reference.source import (
    FrozenModel,
    PolicyAsReference,
    Reference,
    adapter_off,
    eval_mode,
    segments_of,
)
from dpop_trainer.reference.start_weights import ReferenceRecord, StartWeights
from dpop_trainer.reference.step_zero import Columns, Setting, StepZero
from dpop_trainer.reference.tie import Tie
from dpop_trainer.run_folder.versions import versions

if TYPE_CHECKING:
    from dpop_trainer.training.trainer import DPOPTrainer

logger = logging.getLogger(__name__)


class PairReference:
    """Gives a trainer the reference log-probs of its pairs.

    Args:
        trainer: built as far as transformers' Trainer builds it; the policy is what training starts from.
        plan: which reference it is.
        model: the one beside the policy, frozen, with its head, where the plan asks for one.

    Raises:
        ValueError: such a reference cannot be had in the way that weights are distributed.
    """

    def __init__(self, trainer: "DPOPTrainer", plan: ReferencePlan, model: ScoredModel | None) -> None:
        self._trainer, self._accelerator, self.plan = trainer, trainer.accelerator, plan
        self._start_weights: StartWeights | None = None
        self._moving: MovingReference | None = None
        self._source: Reference | None = None
        self._cache: ReferenceCache | None = None
        self._origin: Origin | None = None
        self.step_zero = StepZero(self._accelerator, self._setting)
        trainer.add_callback(self.step_zero)
        self.tie: Tie | None = None
        if plan.is_precomputed and plan.is_start_of_policy and not plan.trains_on_given_columns:
            self.tie = Tie(lambda: self._accelerator.unwrap_model(trainer.model))  # type: ignore[arg-type]
            trainer.add_callback(self.tie)
        if not plan.is_a_model:
            return
        described: Any = trainer.model if model is None else model.model
        with_adapter = plan.kind is not Kind.ADAPTER_OFF
        weights = fingerprint(described, True) if with_adapter else trainer.base_fingerprint
        self._origin = Origin.of(described, weights)
        if model is None:
            self._source = self._policy_as_reference()
        recorded = self._start_weights if plan.kind is Kind.START_WEIGHTS else None
        trainer.add_callback(ReferenceRecord(plan.kind.value, self._origin.fingerprint, recorded))
        if plan.moves:
            self._moving = self._follow(model)
            trainer.add_callback(self._moving)  # after the record, which puts a resumed run's start weights back
        if plan.is_precomputed and self._accelerator.is_main_process:
            self._cache = self._open_cache(described, weights, with_adapter)
        if model is not None:
            self._take(model)
        elif plan.kind is Kind.BEFORE_TRAINING and self._start_weights is None:
            trainer.add_callback(_AtTrainBegin(self._forget))

    @property
    def has_model(self) -> bool:
        """Whether there is a model that gives the log-probs of pairs that bring none."""
        return self._source is not None

    def segment_logps(self, batch: Batch, model_inputs: dict[str, Any]) -> Tensor:
        """The reference's sums of a batch's segments [B, 3]; zeros where no loss has a reference.

        Raises:
            ValueError: the batch has no reference log-probs and the model that they would be of is gone.
        """
        if not self.plan.is_needed:
            return torch.zeros(batch.pair_ids.shape[0], 3, device=batch.cu_seqlens.device)
        if batch.ref_segment_logps is not None:
            return batch.ref_segment_logps
        if self._source is None:
            raise ValueError(
                "ref_chosen_logps: expected pairs with reference log-probs, got pairs without, and no reference model "
                "is kept: this run takes its reference from columns. Give these pairs to the trainer's constructor."
            )
        return self._source.segment_logps(batch, model_inputs)

    def as_policy(self, logps: Tensor, batch: Batch) -> Tensor | None:
        """The policy's own sums of a batch's segments [B, 3], where it still is the model that its reference was
        computed from; else None.

        Args:
            logps: [N] the policy's.
            batch: of which they are.
        """
        if self.tie is None or not self.tie.holds(self._trainer.state.global_step):
            return None
        return segments_of(logps.detach(), batch, self._trainer.args.kernel_backend, ld_alpha=self._ld_alpha)

    def precompute(self, dataset: Any, name: str, batch_size: int) -> Dataset:
        """The data set with reference columns; its own if it has them.

        Raises:
            ValueError: a streamed data set, or a log-prob that is not finite.
        """
        if has_reference_columns(dataset):
            return dataset
        if not isinstance(dataset, Dataset):
            raise ValueError(
                f"precompute_ref_log_probs: expected a data set with a length, got a {type(dataset).__name__} "
                f"({name}). Leave precompute_ref_log_probs out where data are streamed."
            )
        trainer, source = self._trainer, self._source
        assert source is not None
        collator: Any = trainer.data_collator
        if isinstance(collator, PairCollator):
            collator = replace(collator, prefix_sharing=True)  # what is kept are the segments, whoever reads them

        def segment_logps(records: list[dict[str, Any]]) -> Tensor:
            batch = trainer.placed(trainer.shared_out(collator(records)))
            return source.segment_logps(batch, forward_inputs(batch, self._accelerator.unwrap_model(trainer.model)))

        return precompute_reference(
            segment_logps,
            dataset,
            name=name,
            batch_size=trainer.args.precompute_ref_batch_size or batch_size,
            accelerator=self._accelerator,
            cache=self._cache if isinstance(collator, PairCollator) else None,
            show_progress=not trainer.args.disable_tqdm,
            processes_per_batch=trainer.ranks_per_batch,
        )

    @contextmanager
    def at_hand(self) -> Iterator[None]:
        """Have the reference of pairs that bring no log-probs, loaded anew where the run has let it go.

        Raises:
            ValueError: it cannot be had again.
        """
        if self._source is not None or not self.plan.is_needed:
            yield
            return
        remedy = "Give these pairs to the trainer's constructor as eval_dataset: what it needs is run there."
        if self._origin is None:
            raise ValueError(
                "eval_dataset: expected the columns ref_chosen_logps and ref_rejected_logps, since all data sets of "
                f"this run brought them and it has no reference model, got none. {remedy}"
            )
        args: Any = self._trainer.args
        own = args.ref_model_init_kwargs if self.plan.kind is Kind.SECOND_MODEL else args.model_init_kwargs
        init_kwargs = {"trust_remote_code": True, **(own or {})} if args.trust_remote_code else dict(own or {})
        try:
            model = self._origin.load(self._trainer.model, init_kwargs)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"eval_dataset: expected the columns ref_chosen_logps and ref_rejected_logps, or a reference that can "
                f"be loaded again: precompute_ref_log_probs let {self.plan.kind.value} go, and {error}. {remedy}"
            ) from error
        self._take(ScoredModel(model, ScoringHead(model, backend=args.kernel_backend)))
        try:
            yield
        finally:
            self.release()

    def save_place(self, checkpoint: Path) -> None:
        """Put into a checkpoint where a reference that moves has come to; nothing of one that does not."""
        if self._moving is not None:
            self._moving.save(checkpoint)

    def release(self) -> None:
        """After the pass over all data sets: let a second model go, and the policy be anything but itself."""
        source, self._source = self._source, None
        if isinstance(source, FrozenModel):
            source.head.remove()
            if self._trainer.args.ref_model_offload:
                remove_hook_from_submodules(source.model)
            elif self._home != _device(source.model):
                source.model.to(self._home)
            clear_device_cache(garbage_collection=True)
        else:  # the policy in another state: costs nothing, and can tell of pairs that come later
            self._source = source

    def _forget(self) -> None:
        """When training begins: the policy is no longer what it was, and nothing of that was kept."""
        self._source = None

    def _policy_as_reference(self) -> PolicyAsReference:
        trainer = self._trainer
        if self.plan.kind is Kind.ADAPTER_OFF and not self.plan.moves:
            state: Any = adapter_off
        elif self.plan.kind is Kind.BEFORE_TRAINING and not (
            isinstance(trainer.model, PeftModel) and not _is_sharded(self._accelerator, trainer.model)
        ):
            state = eval_mode
        else:
            if self.plan.kind is not Kind.BEFORE_TRAINING:
                _check_not_sharded(self._accelerator, trainer.model, self.plan)
            self._start_weights = StartWeights(trainer.model)  # type: ignore[arg-type]
            state = self._start_weights.switched_in
        return PolicyAsReference(
            self.plan.kind.value,
            trainer.head,
            lambda: trainer.model_wrapped,
            lambda: state(self._accelerator.unwrap_model(trainer.model)),
            self._accelerator,
            trainer.args.kernel_backend,
            self._ld_alpha,
        )

    def _follow(self, model: ScoredModel | None) -> MovingReference:
        """What moves the reference: a model of its own, or the weights that are switched into the policy."""
        trainer, start = self._trainer, self._start_weights
        if model is not None and is_deepspeed_zero3_enabled():
            raise ValueError(
                "sync_ref_model: expected weights that are whole or sharded by FSDP2, got ZeRO-3, whose shards are not "
                "gathered here. Use ZeRO-2, DDP or FSDP2."
            )

        def followed() -> Iterator[Tensor]:
            policy: Any = self._accelerator.unwrap_model(trainer.model)  # type: ignore[arg-type]
            return (p for p in policy.parameters() if start is None or p.requires_grad)

        return MovingReference(
            lambda: start.values if start is not None else dict(model.model.named_parameters()),  # type: ignore[union-attr]
            followed,
            mixup_alpha=trainer.args.ref_model_mixup_alpha,
            sync_steps=trainer.args.ref_model_sync_steps,
            resumed_from=lambda: trainer.resumed_from,
        )

    @property
    def _ld_alpha(self) -> float | None:
        """By which tokens count; of pairs alone, whose answers have a shorter one."""
        return getattr(self._trainer.args, "ld_alpha", None)

    def _take(self, model: ScoredModel) -> None:
        """Make a model beside the policy the source of log-probs, where it is to run."""
        args, kind = self._trainer.args, self.plan.kind.value
        tile_mlps(model.model, args.tiled_mlp)  # type: ignore[arg-type]
        self._source = FrozenModel(
            model.model, model.head, self._accelerator, args.kernel_backend, kind, self._ld_alpha
        )
        self._home = _device(model.model)
        self._trainer.share_model(model.model)
        self._place(model.model)

    def _place(self, model: Any) -> None:
        if self._trainer.args.ref_model_offload:
            if getattr(model, "is_loaded_in_4bit", False):
                raise ValueError(
                    "ref_model_offload: expected a reference whose weights can be sent layer by layer, got one in 4 "
                    "bits, whose scales stay behind. Leave the offloading out, or load it in 8 or 16 bits."
                )
            offload_reference(model, self._accelerator.device)
        elif getattr(model, "hf_device_map", None) is None:
            model.to(self._accelerator.device)

    def _open_cache(self, model: Any, weights: str | None, with_adapter: bool) -> ReferenceCache | None:
        root = cache_root(self._trainer.args.ref_cache_dir)
        if root is None:
            return None
        if weights is None:
            logger.warning(
                "Reference log-probs are computed and not kept: weights that are sharded or on no device are not known "
                "again."
            )
            return None
        description = describe_reference(
            model, weights, with_adapter=with_adapter, mixed_precision=str(self._accelerator.mixed_precision)
        )
        if self._trainer.args.ld_alpha not in (None, 1):  # what is kept are sums of weighted tokens
            description["ld_alpha"] = self._trainer.args.ld_alpha
        notes = {
            "attn_implementation": attention_of(model),
            "layout": getattr(self._trainer.data_collator, "layout", None),
            "device": self._accelerator.device.type,
            **versions(),
        }
        return ReferenceCache(root, description, notes)

    def _setting(self) -> Setting:
        """For the step-0 report."""
        columns: Columns | None = None
        if self.plan.trains_on_given_columns:
            columns = "given"
        elif self.plan.is_precomputed:
            columns = "computed"
        return Setting(
            policy=self._accelerator.unwrap_model(self._trainer.model),  # type: ignore[arg-type]
            reference=self._source.model if isinstance(self._source, FrozenModel) and columns is None else None,
            is_start_of_policy=self.plan.is_start_of_policy,
            columns=columns,
            mixed_precision=str(self._accelerator.mixed_precision),
            cached_attention=self._cache.notes().get("attn_implementation") if self._cache is not None else None,
        )


class _AtTrainBegin(TrainerCallback):
    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call

    def on_train_begin(self, args, state, control, **kwargs):
        self._call()


def _is_sharded(accelerator: Accelerator, model: Any) -> bool:
    is_gathered = accelerator.distributed_type == DistributedType.FSDP or is_deepspeed_zero3_enabled()
    return is_gathered or parallel_size(model) > 1


def _check_not_sharded(accelerator: Accelerator, model: Any, plan: ReferencePlan) -> None:
    if not _is_sharded(accelerator, model):
        return
    if plan.moves:
        raise ValueError(
            "sync_ref_model: expected an adapter on weights that every process has whole (DDP, ZeRO-2), got sharded "
            "ones (FSDP, ZeRO-3, tensor parallelism), into which a second set of adapter weights cannot be switched. "
            "Use DDP or ZeRO-2, or leave sync_ref_model out."
        )
    raise ValueError(
        "ref_model: expected one, or precompute_ref_log_probs, since weights are sharded (FSDP, ZeRO-3, tensor "
        "parallelism) and the policy is an adapter that was trained before, whose start cannot be switched in there. "
        "Set precompute_ref_log_probs=True."
    )


def _device(model: Any) -> torch.device:
    return next(model.parameters()).device
