"""From the arguments of a run to what is planned: its model, its pairs, and the setting that was asked for."""

from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig, PeftConfig

from dpop_kernels import needs_reference
from dpop_trainer.batches.sequence_obstacles import check_shared_model
from dpop_trainer.data.source_path import expanded
from dpop_trainer.inputs.model_setup import init_kwargs, lora_config
from dpop_trainer.models.adapters import find_adapter_base
from dpop_trainer.models.dtypes import autocast_dtype, named_dtype
from dpop_trainer.models.tiled_mlp import check_tiles
from dpop_trainer.models.tokenizer_loading import load_tokenizer, prepare_tokenizer
from dpop_trainer.settings.arguments import DataArguments, ModelArguments
from dpop_trainer.settings.errors import doing
from dpop_trainer.settings.model_paths import adapter_on_adapter, is_adapter_folder
from dpop_trainer.settings.run_inputs import check_bits, train_paths
from dpop_trainer.tools.plan.arguments import PlanArguments
from dpop_trainer.tools.plan.batches import Pairs, of_statistics, worst_case
from dpop_trainer.tools.plan.devices import Device, find_device, with_products
from dpop_trainer.tools.plan.memory import optimizer_named
from dpop_trainer.tools.plan.options import PlanConfig
from dpop_trainer.tools.plan.paper_model import ModelSetting
from dpop_trainer.tools.plan.planner import Choice, Planner, Run
from dpop_trainer.tools.plan.source import find_config
from dpop_trainer.tools.plan.timing import HOST_LINK

NUM_READ = 2000
"""Pairs that lengths are taken from."""
DEFAULT_LENGTH = 2048
"""Of pairs of which nothing is known, where max_length does not bound them."""


def make_planner(
    model: ModelArguments, data: DataArguments, config: PlanConfig, plan: PlanArguments
) -> tuple[Planner, Choice, list[str]]:
    """-> the planner, the setting as it was asked for, and where things came from or what was assumed, in words.

    Raises:
        ValueError: the model, the device or the data cannot be found, or a setting cannot be run.
    """
    device = find_device(
        plan.device if plan.device is not None or not config.planned["use_cpu"] else "cpu",
        memory=plan.memory,
        tflops=plan.tflops,
        bandwidth=plan.bandwidth,
        utilisation=plan.mfu,
    )
    if not model.model_name_or_path:
        raise ValueError("model: expected a hub id, a folder, a config.json or a known model's name, got none.")
    source = find_config(
        model.model_name_or_path, revision=model.model_revision, trust_remote_code=config.trust_remote_code
    )
    reference_name = model.ref_model_name_or_path
    reference_config = find_config(reference_name).config if reference_name else None
    lora = _lora(model)
    bits = 4 if model.load_in_4bit else 8 if model.load_in_8bit else None
    check_bits(model, has_adapter=lora is not None, has_gpu=device.is_gpu)
    bf16, fp16 = config.planned["bf16"], config.planned["fp16"]
    if bf16 is None:
        bf16 = device.is_gpu and not fp16
    setting = ModelSetting(
        dtype=_dtype(model, config, source.config),
        bits=bits,
        nested=model.use_bnb_nested_quant or bits is None,  # where a search quantises, with nested scales
        lora=lora,
        attention=model.attn_implementation,
    )
    if not device.is_gpu and plan.tflops is None:
        device = _at_own_products(device, source.config, autocast_dtype(bf16, fp16) or setting.dtype, plan.mfu)
    pairs = _pairs(model, data, config, plan)
    optimizer = str(getattr(config.planned["optim"], "value", config.planned["optim"]))
    run = Run(
        config=source.config,
        model=setting,
        pairs=pairs,
        device=device,
        autocast=autocast_dtype(bf16, fp16),
        optimizer=optimizer,
        reference=_reference(config, has_adapter=lora is not None, has_second=reference_name is not None),
        reference_config=reference_config,
        max_length=config.max_length,
        prefix_sharing=config.prefix_sharing,
        budget=config.max_tokens_per_batch,
        group_by_prompt=config.group_by_prompt,
        pad_to_multiple_of=config.pad_to_multiple_of,  # type: ignore[arg-type]
        seed=config.seed,
        price=plan.price,
        num_epochs=config.num_train_epochs,
        max_steps=config.max_steps,
    )
    planner = Planner(run)
    obstacle = planner.obstacle(config.layout)
    if config.tiled_mlp is not None:
        check_tiles(planner.bare)
        if plan.engine == "zero3":
            raise ValueError("tiled_mlp: expected 'none' with zero3, which gathers weights for each tile. Use fsdp2.")
    if config.planned["activation_offloading"] and not device.is_gpu:
        raise ValueError(f"activation_offloading: expected a GPU, got {device.name}. Leave it off here.")
    if obstacle is not None:
        raise ValueError(f"layout: expected one that the model can run, got {config.layout!r}: {obstacle}. Use auto.")
    num_devices = plan.devices or config.sequence_parallel_size
    _check_together(planner, config, plan, num_devices)
    choice = Choice(
        layout=config.layout,
        num_pairs=config.per_device_train_batch_size,
        accumulation=config.gradient_accumulation_steps,
        checkpointing=config.gradient_checkpointing or config.planned["activation_offloading"],
        bits=bits,
        sharding=_sharding(plan, num_devices),
        num_devices=num_devices,
        tiled_mlp=config.tiled_mlp,
        offloading=config.planned["activation_offloading"],
        ranks_per_batch=config.sequence_parallel_size,
    )
    return planner, choice, _notes(planner, source.origin, config, plan, num_devices)


def _at_own_products(device: Device, config: Any, dtype: torch.dtype, mfu: float | None) -> Device:
    """A CPU at the rate of this model's products, as far as its configuration names their sizes."""
    text = config.get_text_config()
    width = getattr(text, "hidden_size", None)
    if not isinstance(width, int):
        return device
    inner_width = getattr(text, "intermediate_size", None)
    return with_products(device, width, inner_width if isinstance(inner_width, int) else 4 * width, dtype, mfu)


def _lora(model: ModelArguments) -> LoraConfig | None:
    """The adapter that is trained: a new one, or the one that is named as the model.

    Raises:
        ValueError: both, or one of another kind.
    """
    name = str(model.model_name_or_path)
    new = lora_config(model)
    if not is_adapter_folder(name):
        return new
    if new is not None:
        raise ValueError(adapter_on_adapter(name))
    found = PeftConfig.from_pretrained(name)
    if not isinstance(found, LoraConfig):
        raise ValueError(f"model: expected an adapter of peft's LoRA to plan with, got {found.peft_type} in {name!r}.")
    found.inference_mode, found.init_lora_weights = False, True  # its values are not looked at
    return found


def _sharding(plan: PlanArguments, num_devices: int) -> Any:
    if plan.engine != "auto":
        return plan.engine
    return "none" if num_devices == 1 else "ddp"


def _check_together(planner: Planner, config: PlanConfig, plan: PlanArguments, num_devices: int) -> None:
    """What `sequence_parallel_size` asks of the run.

    Raises:
        ValueError: groups of so many devices cannot be made, or cannot run the model.
    """
    size = config.sequence_parallel_size
    if size == 1:
        return
    if num_devices % size:
        raise ValueError(
            f"devices: expected a multiple of the {size} that run a batch together, got {num_devices}. Use "
            f"{num_devices + -num_devices % size}."
        )
    if plan.engine in ("zero2", "zero3"):
        raise ValueError(
            f"sharding: expected sp{size} without {plan.engine}, whose groups of processes know nothing of "
            f"it. Use sp{size},fsdp2."
        )
    if planner.run.model.attention not in (None, "sdpa"):
        raise ValueError(
            f"attn_implementation: expected 'sdpa' beside sequence_parallel_size {size}, got "
            f"{planner.run.model.attention!r}. Leave it out."
        )
    longest, multiple = config.max_length, config.row_multiple or 1
    check_shared_model(planner.bare, size, longest=None if longest is None else longest + -longest % multiple)


def _dtype(model: ModelArguments, config: PlanConfig, source: Any) -> torch.dtype:
    dtype = named_dtype(init_kwargs(model, config).get("dtype", torch.float32))
    return (getattr(source, "dtype", None) or torch.float32) if dtype == "auto" else dtype


def _reference(config: PlanConfig, *, has_adapter: bool, has_second: bool) -> str:
    if config.precompute_ref_log_probs or not needs_reference(config.loss_type):
        return "none"
    if has_second or not has_adapter:
        return "copy"
    return "adapter off"


def _pairs(model: ModelArguments, data: DataArguments, config: PlanConfig, plan: PlanArguments) -> Pairs:
    if plan.prompt_tokens is not None and plan.answer_tokens is not None:
        return of_statistics(
            plan.prompt_tokens,
            plan.answer_tokens,
            plan.shared_tokens,
            max_length=config.max_length,
            num_pairs=plan.num_pairs,
        )
    if not _is_at_hand(data) and plan.data is None:
        return worst_case(config.max_length or DEFAULT_LENGTH, num_pairs=plan.num_pairs)
    # planning without pairs needs nothing of this
    from dpop_trainer.data import tokenise_pairs
    from dpop_trainer.inputs.data_sets import load_train_data

    with doing(f"reading the pairs {', '.join(train_paths(data))}"):
        dataset = load_train_data(replace(data, streaming=False), config)
    num_pairs = len(dataset)
    tokenizer_name = plan.tokenizer or str(model.model_name_or_path)
    tokenizer = load_tokenizer(
        tokenizer_name,
        find_adapter_base(tokenizer_name) if is_adapter_folder(tokenizer_name) else None,
        revision=None if plan.tokenizer else model.model_revision,
        trust_remote_code=config.trust_remote_code,
    )
    prepare_tokenizer(tokenizer, config.pad_token, config.chat_template_path)
    tokenised, counts = tokenise_pairs(
        dataset.select(range(min(NUM_READ, num_pairs))),
        tokenizer,
        max_length=config.max_length,
        truncation_mode=config.truncation_mode,  # type: ignore[arg-type]
        keep_identical=config.keep_identical,
        on_bad_record=config.on_bad_record,  # type: ignore[arg-type]
        pair_weight=config.pair_weight,  # type: ignore[arg-type]
    )
    if not len(tokenised):
        raise ValueError(f"data: expected pairs to take lengths from, got none that can be used. {counts.summary()}")
    read = min(NUM_READ, num_pairs)
    left = round(num_pairs * len(tokenised) / read)
    some = "" if read == num_pairs else f"the first {read} of "
    became = " ".join(counts.summary().split()).rstrip(".")
    origin = f"{some}{num_pairs} pairs of {data.dataset_name or 'the mixture'} ({became})"
    return Pairs([dict(record) for record in tokenised], plan.num_pairs or left, origin, is_assumed=False)


def _is_at_hand(data: DataArguments) -> bool:
    """Whether pairs are named, all of them on this machine: from the hub they are fetched where --data asks for it."""
    names = train_paths(data)
    return bool(names) and all(expanded(name).exists() for name in names)


def _notes(planner: Planner, origin: str, config: PlanConfig, plan: PlanArguments, num_devices: int) -> list[str]:
    run = planner.run
    device = run.device
    notes = [
        f"Model: {origin}.",
        f"Lengths: {'assumed: ' if run.pairs.is_assumed else ''}{run.pairs.origin}.",
        f"Device: {device.memory_gib:.1f} GiB, {device.tflops:.4g} TFLOP/s, {device.bandwidth_gb:.4g} GB/s "
        f"({device.origin}).",
    ]
    whose = "given" if plan.mfu is not None else "assumed; --mfu changes it" if device.is_gpu else "of our CPU records"
    notes.append(f"A step reaches {device.utilisation:.0%} of the device's products ({whose}).")
    if num_devices > 1:
        notes.append("Assumed: what devices send each other hides behind arithmetic.")
    if not optimizer_named(run.optimizer, on_gpu=device.is_gpu).is_known:
        notes.append(f"Assumed: {run.optimizer} keeps what AdamW keeps.")
    if run.optimizer.startswith("paged_"):
        notes.append("A paged optimizer's states are counted on the device; they may leave it.")
    if (backend := config.planned["kernel_backend"]) != "auto":
        notes.append(f"The kernels' workspace is counted as with kernel_backend auto, not {backend}.")
    if config.planned["activation_offloading"]:
        notes.append(f"Assumed: activations go to the host and back at {HOST_LINK / 1e9:.0f} GB/s, beside no product.")
    if run.model.lora is not None and run.model.dtype == torch.float32 and device.is_gpu:
        notes.append("The frozen weights are in float32, the default; dtype: bfloat16 halves them.")
    sizes = planner.sizes(run.model.bits)
    if run.model.bits is not None and sizes.num_packed < sizes.num_parameters / 2:
        packed = sizes.num_packed / sizes.num_parameters
        notes.append(f"bitsandbytes packs linear layers, {packed:.0%} of this model: stacked experts stay in dtype.")
    if getattr(run.config, "quantization_config", None) is not None:
        notes.append("The checkpoint's own quantisation is not counted: weights are taken in dtype.")
    return notes
