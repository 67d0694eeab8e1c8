"""The reference of a run: chosen once, then asked batch by batch; columns of the data set go before any model.

Which it is, cheapest first, where no second model is given: the policy is its own reference, as it was at the start.

    new adapter                 the base: adapter off
    adapter trained before      the adapter as it was, switched in
    all weights                 a frozen copy; with precompute_ref_log_probs the policy before training, and no copy
"""

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.hooks import remove_hook_from_submodules
from accelerate.utils import DistributedType
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from dpop_kernels import ScoringHead
from dpop_kernels.losses.weights import has_penalty
from dpop_trainer.batches import Batch, PairCollator
from dpop_trainer.batches.batch import as_batch
from dpop_trainer.batches.scoring import forward_inputs
from dpop_trainer.data.records import REF_COLUMNS
from dpop_trainer.reference.adapters import adapter_changes_nothing
from dpop_trainer.reference.cache import ReferenceCache, cache_root
from dpop_trainer.reference.keys import describe_reference, weights_digest
from dpop_trainer.reference.precompute import precompute_reference
from dpop_trainer.reference.second_model import offload_reference
from dpop_trainer.reference.source import FrozenModel, PolicyAsReference, Reference, adapter_off, eval_mode
from dpop_trainer.reference.start_weights import ReferenceRecord, StartWeights
from dpop_trainer.reference.step_zero import Columns, Setting, StepZero, attention_of
from dpop_trainer.run_folder.versions import versions

if TYPE_CHECKING:
    from dpop_trainer.training.trainer import DPOPTrainer

logger = logging.getLogger(__name__)

# of each end of a weight: enough to tell a model from the same model trained further
_FINGERPRINT_BYTES = 1 << 14


class PairReference:
    """Gives a trainer the reference log-probs of its pairs.

    Args:
        trainer: built as far as transformers' Trainer builds it; the policy is what training starts from.
        model: a second model, frozen; None where the policy is its own reference.
        head: on that model.
        is_needed: some loss has a reference at all.
        is_missing: some data set has no reference log-probs of its own.
        is_copy: the second model is a copy of the policy.
        is_new_adapter: the trainer has just put the adapter on.

    Raises:
        ValueError: such a reference cannot be had in the way that weights are distributed.
    """

    def __init__(
        self,
        trainer: "DPOPTrainer",
        model: Any,
        head: ScoringHead | None,
        *,
        is_needed: bool,
        is_missing: bool,
        is_copy: bool,
        is_new_adapter: bool,
    ) -> None:
        self._trainer, self._accelerator = trainer, trainer.accelerator
        self.is_needed = is_needed
        self._is_precomputed = is_needed and is_missing and trainer.args.precompute_ref_log_probs
        self._is_start_of_policy = model is None or is_copy
        self._has_own_columns = is_needed and has_reference_columns(trainer.train_dataset)
        self._start_weights: StartWeights | None = None
        self._source: Reference | None = None
        self._cache: ReferenceCache | None = None
        self.step_zero = StepZero(self._accelerator, self._setting)
        trainer.add_callback(self.step_zero)
        if not (is_needed and is_missing):
            return
        model_of_weights, with_adapter = model, True
        if model is None:
            model_of_weights, with_adapter = trainer.model, not self._choose_state_of_policy(is_new_adapter)
        else:
            assert head is not None
            kind = "a copy of the model as it was at the start" if is_copy else "a second model"
            self._source = FrozenModel(model, head, self._accelerator, trainer.args.kernel_backend, kind)
        fingerprint = _fingerprint(model_of_weights, with_adapter)
        trainer.add_callback(ReferenceRecord(self._source.kind, fingerprint, self._start_weights))  # type: ignore[union-attr]
        if self._is_precomputed and self._accelerator.is_main_process:
            self._cache = self._open_cache(model_of_weights, with_adapter)
        if model is not None:
            self._home = _device(model)
            self._place(model)

    @property
    def has_model(self) -> bool:
        """Whether there is a model that gives the log-probs of pairs that bring none."""
        return self._source is not None

    def segment_logps(self, batch: Batch, model_inputs: dict[str, Any]) -> Tensor:
        """The reference's sums of a batch's segments [B, 3]; zeros where no loss has a reference.

        Raises:
            ValueError: the batch has no reference log-probs and the model that they would be of is gone.
        """
        if not self.is_needed:
            return torch.zeros(self._trainer.num_items(batch), 3, device=batch.cu_seqlens.device)
        if batch.ref_segment_logps is not None:
            return batch.ref_segment_logps
        if self._source is None:
            raise ValueError(
                "ref_chosen_logps: expected pairs with reference log-probs, got pairs without, and no reference model "
                "is kept: this run takes its reference from columns. Give these pairs to the trainer's constructor, or "
                "pass a ref_model without precompute_ref_log_probs."
            )
        return self._source.segment_logps(batch, model_inputs)

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
            batch = as_batch(collator(records)).to(self._accelerator.device)
            return source.segment_logps(batch, forward_inputs(batch, self._accelerator.unwrap_model(trainer.model)))

        return precompute_reference(
            segment_logps,
            dataset,
            name=name,
            batch_size=trainer.args.precompute_ref_batch_size or batch_size,
            accelerator=self._accelerator,
            cache=self._cache if isinstance(collator, PairCollator) else None,
            show_progress=not trainer.args.disable_tqdm,
        )

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
        elif source is not None and source.kind == _ADAPTER_OFF:
            self._source = source  # costs nothing, and can tell of pairs that come later

    def _choose_state_of_policy(self, is_new_adapter: bool) -> bool:
        """Which state of the policy is the reference -> whether its adapter is off in it."""
        trainer = self._trainer
        policy: Any = trainer.model
        is_off = isinstance(policy, PeftModel) and adapter_changes_nothing(policy, is_new=is_new_adapter)
        if is_off:
            kind, state = _ADAPTER_OFF, adapter_off
        elif self._is_precomputed:
            kind, state = "the model as it was at the start", eval_mode
        else:
            _check_not_sharded(self._accelerator)
            self._start_weights = StartWeights(policy)
            kind, state = "the adapter as it was at the start", self._start_weights.switched_in
        self._source = PolicyAsReference(
            kind,
            trainer.head,
            lambda: trainer.model_wrapped,
            lambda: state(self._accelerator.unwrap_model(trainer.model)),
            self._accelerator,
            trainer.args.kernel_backend,
        )
        return is_off

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

    def _open_cache(self, model: Any, with_adapter: bool) -> ReferenceCache | None:
        root = cache_root(self._trainer.args.ref_cache_dir)
        if root is None:
            return None
        try:
            description = describe_reference(
                model, with_adapter=with_adapter, mixed_precision=str(self._accelerator.mixed_precision)
            )
        except ValueError as error:
            logger.warning("Reference log-probs are computed and not kept: %s", error)
            return None
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
        if self._has_own_columns:
            columns = "given"
        elif self._is_precomputed:
            columns = "computed"
        return Setting(
            policy=self._accelerator.unwrap_model(self._trainer.model),  # type: ignore[arg-type]
            reference=self._source.model if isinstance(self._source, FrozenModel) and columns is None else None,
            is_start_of_policy=self._is_start_of_policy,
            columns=columns,
            mixed_precision=str(self._accelerator.mixed_precision),
            has_hinge=has_penalty(self._trainer.args.loss_type) and not self._trainer.args.dpop_dead_zone,
            cached_attention=self._cache.notes().get("attn_implementation") if self._cache is not None else None,
        )


_ADAPTER_OFF = "the base under the adapter"


def has_reference_columns(dataset: Any) -> bool:
    """Whether a data set brings the reference's log-probs."""
    return set(REF_COLUMNS) <= set(getattr(dataset, "column_names", None) or ())


def _check_not_sharded(accelerator: Accelerator) -> None:
    if accelerator.distributed_type == DistributedType.FSDP or is_deepspeed_zero3_enabled():
        raise ValueError(
            "ref_model: expected one, or precompute_ref_log_probs, since weights are sharded (FSDP, ZeRO-3) and the "
            "policy is an adapter that was trained before, whose start cannot be switched in there. Set "
            "precompute_ref_log_probs=True."
        )


def _fingerprint(model: Any, with_adapter: bool) -> str | None:
    try:
        return weights_digest(model, with_adapter=with_adapter, sample_bytes=_FINGERPRINT_BYTES)
    except ValueError:
        return None


def _device(model: Any) -> torch.device:
    return next(model.parameters()).device
