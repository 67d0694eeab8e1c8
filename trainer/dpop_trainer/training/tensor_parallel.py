"""A Trainer whose model's layers are spread over all processes, by transformers' own tensor parallelism.

Every process runs every batch, so that losses, metrics and counts are one process's. transformers saves such a model
whole and does not go on from its checkpoints; here the optimizer's state is saved and taken whole as well.
"""

from pathlib import Path
from typing import Any

from accelerate.utils import DistributedType, ParallelismConfig
from peft import PeftModel

from dpop_trainer.models.tensor_parallel import (
    check_transformers,
    join_whole_state,
    keep_whole_state,
    lora_state,
    parallel_size,
    take_whole_weights,
)
from dpop_trainer.settings.config import HeadConfig
from dpop_trainer.training.hf_hooks import HfHooks

OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd")
"""Those whose every step is element by element, so that a part of a weight takes the step of the whole."""


class TensorParallel(HfHooks):
    """transformers.Trainer, of which all processes hold each layer between them where the model was loaded so."""

    args: HeadConfig  # type: ignore[assignment]

    _gathered: Any = None  # the optimizer whose state is saved whole

    def __init__(self, *, model: Any, args: HeadConfig, **kwargs: Any) -> None:
        self.tensor_parallel_size = parallel_size(model)
        saves_model_alone = args.save_only_model
        # transformers refuses what it has no way to save: an optimizer's state in parts
        args.save_only_model = saves_model_alone or self.tensor_parallel_size > 1
        try:
            super().__init__(model=model, args=args, **kwargs)
        finally:
            args.save_only_model = saves_model_alone
        if self.tensor_parallel_size > 1:
            take_whole_weights(model)
            self.reads_on_host = True  # an optimizer's state is whole there, and a device has its part

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.tensor_parallel_size > 1 and optimizer is not self._gathered:
            keep_whole_state(optimizer)
            self._gathered = optimizer
        return optimizer

    def state_to_save(self) -> dict[str, Any] | None:
        # peft would put the base together too, on every process
        is_adapter = self.tensor_parallel_size > 1 and isinstance(self.model, PeftModel)
        return lora_state(self.model) if is_adapter else super().state_to_save()  # type: ignore[arg-type]

    def model_written(self, checkpoint: Path) -> None:
        super().model_written(checkpoint)
        if self.tensor_parallel_size > 1 and not self.args.should_save:
            join_whole_state(self.optimizer)


def check_tensor_parallel(args: HeadConfig, model: Any, *, is_quantised: bool) -> None:
    """Before anything is loaded.

    Args:
        args: of the run.
        model: the policy, or its name.
        is_quantised: a base in 4 or 8 bits is asked for.

    Raises:
        ValueError: layers cannot be spread over so many processes, or a setting does not go together with it.
    """
    asked = args.tensor_parallel_size
    size = asked if isinstance(model, str) else parallel_size(model)
    if asked not in (1, size):
        raise ValueError(
            f"parallelism_config_tp_size: expected a model by name, or one loaded with "
            f"distributed_config=DistributedConfig(tp_size={asked}), got a {type(model).__name__} over {size} ranks."
        )
    if size == 1:
        return
    check_transformers()
    sizes: Any = args.parallelism_config or ParallelismConfig()
    names = {name: f"parallelism_config_{name}_size" for name in ("dp_replicate", "dp_shard", "cp", "sp")}
    beside = {key: getattr(sizes, f"{name}_size") for name, key in names.items() if getattr(sizes, f"{name}_size") > 1}
    if beside or args.world_size != size:
        found = f"{beside} beside it" if beside else f"{args.world_size} processes"
        raise ValueError(
            "parallelism_config_tp_size: expected all processes of the run to hold each layer between them (accelerate "
            f"has no plain data parallelism beside it), got {size} and {found}. Start {size} processes "
            "(--num_processes), or use FSDP2 (accelerate/fsdp2_8)."
        )
    processes: Any = args.distributed_state
    refused = {
        "sequence_parallel_size": args.sequence_parallel_size > 1,
        "DeepSpeed": args.deepspeed is not None or processes.distributed_type == DistributedType.DEEPSPEED,
        "FSDP": processes.distributed_type == DistributedType.FSDP or bool(args.fsdp),
        "a base in 4 or 8 bits": is_quantised or getattr(model, "is_quantized", False),
        "tiled_mlp": args.tiled_mlp is not None,
        "sync_ref_model": getattr(args, "sync_ref_model", False),
        f"optim {getattr(args.optim, 'value', args.optim)}": args.optim not in OPTIMIZERS,
        "ref_model_offload": getattr(args, "ref_model_offload", False),
    }
    for name, is_asked in refused.items():
        if is_asked:
            raise ValueError(
                f"parallelism_config_tp_size: expected 1 with {name}, which does not go together with layers that are "
                f"spread over processes, got {size}. Leave one of the two out."
            )
