"""What `dpop plan` is asked, from YAML and flags: the fields of `dpop train`, and those of `PlanArguments`."""

from dataclasses import dataclass
from typing import Any

from dpop_trainer.settings.arguments import DataArguments, ModelArguments, parse_arguments
from dpop_trainer.settings.config import DPOPConfig
from dpop_trainer.tools.plan.arguments import QUANTISATIONS, PlanArguments


@dataclass
class PlanConfig(DPOPConfig):
    """A run's configuration that is read and not run: the device it is for need not be here."""

    def __post_init__(self) -> None:
        names = ("bf16", "optim", "activation_offloading", "use_cpu", "fp16", "kernel_backend")
        planned = {name: getattr(self, name) for name in names}
        self.bf16, self.optim, self.activation_offloading, self.use_cpu = False, "adamw_torch", False, True
        self.fp16, self.kernel_backend = False, "auto"
        super().__post_init__()
        self.planned: dict[str, Any] = planned
        """What was asked for, of what this machine may not be able to do."""


def parse_plan(argv: list[str]) -> tuple[ModelArguments, DataArguments, PlanConfig, PlanArguments]:
    """
    Raises:
        UsageError: a flag does not exist, or lacks a value that it can take.
        ValueError: a value that its field cannot take.
    """
    model, data, config, plan = parse_arguments(PlanConfig, argv, "dpop plan", PlanArguments)
    if plan.model is not None:
        model.model_name_or_path = plan.model
    if plan.data is not None:
        data.dataset_name, data.dataset_mixture = plan.data, None
    if plan.ranks_per_batch > 1:
        given = config.sequence_parallel_size
        if given not in (1, plan.ranks_per_batch):
            raise ValueError(f"sharding: expected sp{given}, the run's sequence_parallel_size, got {plan.sharding!r}.")
        config.sequence_parallel_size = plan.ranks_per_batch
    if plan.quantization is not None:
        bits = QUANTISATIONS[plan.quantization]
        model.load_in_4bit, model.load_in_8bit = bits == 4, bits == 8
        model.use_bnb_nested_quant = bits == 4
        model.use_peft = model.use_peft or bits is not None
    return model, data, config, plan
