"""A Trainer whose processes run batches in groups: every batch is a group's, and its columns are spread over it.

To transformers and accelerate all processes are data-parallel ones, and so wrappers reduce gradients over all of them;
a group's processes are given the same batches here, and count them once.
"""

from typing import Any

import torch
from accelerate.utils import DistributedType, ParallelismConfig

from dpop_trainer.batches.batch import Batch, as_batch
from dpop_trainer.batches.scoring import ScoredModel, forward_inputs
from dpop_trainer.batches.sequence_group import SequenceGroup, join_group
from dpop_trainer.batches.sequence_obstacles import check_shared_model, shared_difference
from dpop_trainer.batches.sequence_shares import share_out, to_run_together
from dpop_trainer.batches.shared_attention import share_attention
from dpop_trainer.batches.tolerance import tolerance_of
from dpop_trainer.data.records import TOKEN_COLUMNS
from dpop_trainer.data.stream import first_records
from dpop_trainer.models.adapters import base_model
from dpop_trainer.reference.choose import data_parts
from dpop_trainer.reference.source import eval_mode
from dpop_trainer.settings.config import HeadConfig
from dpop_trainer.training.tensor_parallel import TensorParallel

_NUM_LOOKED_AT, _NUM_PROBED = 64, 2  # of a data set's first pairs; the shortest of them are run


class SequenceParallel(TensorParallel):
    """transformers.Trainer, of which groups of `args.sequence_parallel_size` processes run each batch together."""

    args: HeadConfig  # type: ignore[assignment]
    head: Any
    sequence_group: SequenceGroup | None = None
    """Which this process belongs to; None where each runs batches of its own."""

    _is_shared_forward_checked = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sequence_group = join_group(self.args.sequence_parallel_size)

    @property
    def ranks_per_batch(self) -> int:
        """How many neighbouring processes run each batch, with the same results."""
        return self.args.sequence_parallel_size * self.tensor_parallel_size

    @property
    def num_data_ranks(self) -> int:
        """How many batches are run at a time: processes, or groups of them."""
        return self.accelerator.num_processes // self.ranks_per_batch

    @property
    def counts_batches(self) -> bool:
        """Whether this process is the one of its group that sums over processes count batches by."""
        return self.args.process_index % self.ranks_per_batch == 0

    def shared_out(self, collated: Any) -> Batch:
        """A collator's result, on the CPU, with the share of it that is this process's."""
        batch = as_batch(collated)
        return batch if self.sequence_group is None else share_out(batch, self.sequence_group)

    def placed(self, collated):
        batch = super().placed(collated)
        if self.sequence_group is None:
            return batch
        if batch.own_tokens is None:
            raise ValueError(
                "sequence_parallel_size: expected batches of this trainer's own loaders, which share them out, got one "
                "of another. Leave get_train_dataloader and get_eval_dataloader as they are, or set it to 1."
            )
        return to_run_together(batch, self.sequence_group)

    def share_model(self, model: Any) -> None:
        """Have a model run batches that are shared out; alone it goes on as before.

        Raises:
            ValueError: it is of a kind that cannot.
        """
        if self.sequence_group is not None:
            longest, multiple = self.args.max_length, self.args.row_multiple or 1
            check_shared_model(
                model,
                self.sequence_group.size,
                longest=None if longest is None else longest + -longest % multiple,
            )
            share_attention(base_model(model))

    def check_shared_forward(self) -> None:
        """Before the first batch that is run together: run two of the data's shortest pairs both ways.

        Raises:
            ValueError: on all processes: the policy's log-probs are others when its columns are spread out.
        """
        if self.sequence_group is None or self._is_shared_forward_checked:
            return
        wrapped: Any = self.model_wrapped
        if next(wrapped.parameters()).device.type != self.args.device.type:  # until a wrapper places it
            return
        self._is_shared_forward_checked = True
        (dataset, *_) = data_parts(self.train_dataset, self.eval_dataset)
        records = first_records(dataset, _NUM_LOOKED_AT)
        records.sort(key=lambda record: sum(len(record.get(column, ())) for column in TOKEN_COLUMNS))
        batch = self.placed(self.shared_out(self.data_collator(records[:_NUM_PROBED])))
        policy: Any = self.accelerator.unwrap_model(self.model)  # type: ignore[arg-type]
        with eval_mode(wrapped), self.accelerator.autocast():
            apart = shared_difference(ScoredModel(wrapped, self.head), batch, forward_inputs(batch, policy))
        gathered: Any = self.accelerator.gather(apart.unsqueeze(0))
        difference, rounding = float(gathered.max()), tolerance_of(policy)
        if not difference <= rounding:
            raise ValueError(
                f"sequence_parallel_size: expected log-probs that do not depend on which process runs a token, got "
                f"ones of {type(base_model(policy)).__name__} that differ by {difference:.2g} nats per token where "
                f"rounding explains {rounding:g}: something other than its attention looks at neighbouring tokens. "
                "Set it to 1."
            )

    def tokens_seen(self, batch):
        if self.ranks_per_batch == 1:
            return None
        only_tokens = self.args.include_num_input_tokens_seen == "non_padding"
        counted = batch.attention_mask if only_tokens else torch.ones_like(batch.attention_mask)
        return counted.sum().view(1) * self.counts_batches

    def get_total_train_batch_size(self, args: Any) -> int:
        return super().get_total_train_batch_size(args) // self.args.sequence_parallel_size

    def floating_point_ops(self, inputs: Any) -> int:
        return super().floating_point_ops(inputs) if self.counts_batches else 0


def check_sequence_parallel(args: HeadConfig) -> None:
    """Before anything is loaded.

    Raises:
        ValueError: groups of so many processes cannot be made, or a setting does not go together with them.
    """
    size = args.sequence_parallel_size
    if size == 1:
        return
    if args.world_size % size:
        divisors = [str(one) for one in range(1, args.world_size + 1) if args.world_size % one == 0]
        raise ValueError(
            f"sequence_parallel_size: expected a divisor of the {args.world_size} processes of this run, got {size}. "
            f"Use {' or '.join(divisors)}, or start a multiple of {size} processes (accelerate launch --num_processes)."
        )
    processes: Any = args.distributed_state
    if args.deepspeed is not None or processes.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError(
            f"sequence_parallel_size: expected 1 with DeepSpeed, whose own groups of processes know nothing of it, got "
            f"{size}. Use FSDP2 (accelerate/fsdp2_8), or set it to 1."
        )
    others = args.parallelism_config or ParallelismConfig()
    taken = {f"{name}_size": getattr(others, f"{name}_size") for name in ("tp", "cp", "sp")}
    taken = {name: other for name, other in taken.items() if other > 1}
    if taken:
        raise ValueError(
            f"sequence_parallel_size: expected 1 with accelerate's ParallelismConfig of {taken}, which spreads batches "
            f"over processes in a way of its own, got {size}. Leave one of the two out."
        )
    if args.accelerator_config.split_batches:  # type: ignore[union-attr]
        raise ValueError(
            f"sequence_parallel_size: expected 1 with accelerator_config.split_batches, which splits batches by rows, "
            f"got {size}. Leave one of the two out."
        )
    if args.neftune_noise_alpha:
        raise ValueError(
            f"sequence_parallel_size: expected 1 with neftune_noise_alpha, whose noise is divided by the root of a "
            f"row's whole length, got {size}. Leave one of the two out."
        )
