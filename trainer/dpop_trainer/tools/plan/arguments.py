"""What `dpop plan` is asked beside the fields of `dpop train`. Needs no torch."""

import re
from dataclasses import dataclass, field

from dpop_trainer.tools.plan.devices import DEVICE_NAMES, SHARDINGS

QUANTISATIONS = {"none": None, "4bit": 4, "8bit": 8}


@dataclass
class PlanArguments:
    """The plan: device, lengths, price. All below these are the run's own, as for `dpop train`."""

    device: str | None = field(
        default=None,
        metadata={"help": f"What it is to run on: {', '.join(DEVICE_NAMES)}; the beginning of one will do."},
    )
    devices: int | None = field(
        default=None, metadata={"help": "How many of them. Default: 1, or as many as sharding runs a batch on."}
    )
    memory: float | None = field(default=None, metadata={"help": "GiB of a device, for one that is not listed."})
    tflops: float | None = field(default=None, metadata={"help": "Its peak in dense bf16 products."})
    bandwidth: float | None = field(default=None, metadata={"help": "Of its memory, in GB/s."})
    mfu: float | None = field(
        default=None, metadata={"help": "The part of that peak that a step reaches, such as 0.4."}
    )
    price: float | None = field(default=None, metadata={"help": "Of one device for an hour, in any currency."})
    sharding: str = field(
        default="auto",
        metadata={
            "help": "How several devices share the model: ddp, fsdp2, zero2 or zero3; auto: ddp, or fsdp2 where that "
            "does not fit. With sp8 in front (sp8, or sp8,fsdp2) eight of them run each batch together: "
            "sequence_parallel_size.",
        },
    )
    model: str | None = field(
        default=None, metadata={"help": "The same as model_name_or_path; also a config.json, or a known model's name."}
    )
    quantization: str | None = field(
        default=None,
        metadata={"help": "4bit (with nested scales), 8bit or none, instead of load_in_4bit, load_in_8bit."},
    )
    data: str | None = field(
        default=None,
        metadata={"help": "Pairs to take lengths from, a file or hub id. Default: dataset_name, if a file."},
    )
    tokenizer: str | None = field(default=None, metadata={"help": "Folder or hub id; default: the model's."})
    prompt_tokens: list[float] | None = field(
        default=None, metadata={"help": "Lengths where there are no data: mean, 95th percentile, maximum; or the mean."}
    )
    answer_tokens: list[float] | None = field(default=None, metadata={"help": "The same of an answer."})
    shared_tokens: list[float] | None = field(
        default=None, metadata={"help": "The same of what both answers begin with."}
    )
    num_pairs: int | None = field(default=None, metadata={"help": "Pairs in an epoch; default: the data's."})
    search: bool = field(default=True, metadata={"help": "Look for the longest pair and the cheapest setting, too."})
    json: bool = field(default=False, metadata={"help": "Print JSON."})

    def __post_init__(self) -> None:
        if self.devices is not None and self.devices < 1:
            raise ValueError(f"devices: expected at least 1, got {self.devices}.")
        if self.num_pairs is not None and self.num_pairs < 1:
            raise ValueError(f"num_pairs: expected at least 1, got {self.num_pairs}.")
        if self.price is not None and not self.price >= 0:
            raise ValueError(f"price: expected a number >= 0, got {self.price}.")
        engine, num_devices = self.engine, self.num_devices
        if engine not in ("auto", "none") and num_devices == 1:
            raise ValueError(f"sharding: expected none on one device, got {engine!r}. Set devices.")
        if engine == "none" and num_devices > 1:
            raise ValueError(f"sharding: expected another than none on {num_devices} devices. ddp copies the model.")
        if self.quantization is not None and self.quantization not in QUANTISATIONS:
            raise ValueError(f"quantization: expected one of {', '.join(QUANTISATIONS)}, got {self.quantization!r}.")
        if (self.prompt_tokens is None) != (self.answer_tokens is None):
            raise ValueError("answer_tokens: expected it together with prompt_tokens, got one of them.")

    @property
    def engine(self) -> str:
        """How devices share the model: "auto", or one of `SHARDINGS`."""
        return _engines(self.sharding)[0]

    @property
    def ranks_per_batch(self) -> int:
        """Devices that run a batch together."""
        return _engines(self.sharding)[1]

    @property
    def num_devices(self) -> int:
        """How many, by default those of one batch."""
        return self.ranks_per_batch if self.devices is None else self.devices


def _engines(sharding: str) -> tuple[str, int]:
    """ "sp8,fsdp2" -> "fsdp2", 8.

    Raises:
        ValueError: one of them is not known, or they exclude each other.
    """
    names = [name.strip() for name in sharding.split(",")]
    sizes = [int(found[1]) for name in names if (found := re.fullmatch(r"sp([1-9][0-9]*)", name))]
    engines = [name for name in names if name in ("auto", *SHARDINGS)]
    if any(re.fullmatch(r"tp[0-9]*", name) for name in names):
        raise ValueError(
            f"sharding: expected an engine whose memory can be counted, got {sharding!r}. Tensor parallelism is not "
            "planned: its weights take what those of fsdp2 take, its activations nearly what those of one device do."
        )
    if len(sizes) + len(engines) < len(names):
        raise ValueError(
            f"sharding: expected one of auto, {', '.join(SHARDINGS)}, or devices to a batch such as sp8, or both with "
            f"a comma between, got {sharding!r}."
        )
    if len(sizes) > 1 or len(engines) > 1:
        twice = engines if len(engines) > 1 else [name for name in names if name not in engines]
        raise ValueError(f"sharding: expected one of {' and '.join(twice)}, which exclude each other. Leave one out.")
    return (engines or ["auto"])[0], (sizes or [1])[0]
