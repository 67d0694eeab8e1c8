"""From the arguments of a run to what is planned: its model, its pairs, and the setting that was asked for."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig

from dpop_kernels import needs_reference
from dpop_trainer.data import read_pairs, tokenise_pairs
from dpop_trainer.data.mixture import mix_pairs, parse_sources
from dpop_trainer.models.adapters import find_adapter_base
from dpop_trainer.models.model_setup import check_bits, lora_config
from dpop_trainer.models.tokenizer_loading import (
    load_chat_template,
    load_tokenizer,
    load_trained_tokenizer,
    prepare_tokenizer,
)
from dpop_trainer.settings.arguments import DataArguments, ModelArguments
from dpop_trainer.settings.model_paths import adapter_on_adapter, is_adapter_folder
from dpop_trainer.tools.plan.arguments import PlanArguments
from dpop_trainer.tools.plan.batches import Pairs, of_statistics, worst_case
from dpop_trainer.tools.plan.devices import find_device
from dpop_trainer.tools.plan.memory import compute_dtype, optimizer_named
from dpop_trainer.tools.plan.options import PlanConfig
from dpop_trainer.tools.plan.paper_model import ModelSetting
from dpop_trainer.tools.plan.planner import Choice, Planner, Run
from dpop_trainer.tools.plan.source import find_config

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
    pairs = _pairs(model, data, config, plan)
    optimizer = str(getattr(config.planned["optim"], "value", config.planned["optim"]))
    run = Run(
        config=source.config,
        model=setting,
        pairs=pairs,
        device=device,
        autocast=compute_dtype(bool(bf16), bool(fp16)),
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
    if obstacle is not None:
        raise ValueError(f"layout: expected one that the model can run, got {config.layout!r}: {obstacle}. Use auto.")
    choice = Choice(
        layout=config.layout,
        num_pairs=config.per_device_train_batch_size,
        accumulation=config.gradient_accumulation_steps,
        checkpointing=config.gradient_checkpointing,
        bits=bits,
        sharding=_sharding(plan),
        num_devices=plan.devices,
    )
    return planner, choice, _notes(planner, source.origin, config, plan)


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


def _sharding(plan: PlanArguments) -> Any:
    if plan.sharding != "auto":
        return plan.sharding
    return "none" if plan.devices == 1 else "ddp"


def _dtype(model: ModelArguments, config: PlanConfig, source: Any) -> torch.dtype:
    init_kwargs: Any = config.model_init_kwargs or {}
    name = init_kwargs.get("dtype", model.dtype) or "float32"
    if name == "auto":
        return getattr(source, "dtype", None) or torch.float32
    dtype = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype: expected 'float32', 'bfloat16', 'float16' or 'auto', got {name!r}.")
    return dtype


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
    name = data.dataset_name
    is_local = name is not None and Path(name).expanduser().exists()
    mixture = data.dataset_mixture if data.dataset_mixture and plan.data is None else None
    if mixture and all(Path(source.path).expanduser().exists() for source in parse_sources(mixture, "dataset_mixture")):
        dataset = mix_pairs(parse_sources(mixture, "dataset_mixture"), seed=config.seed, num_proc=None)
    elif name is not None and (is_local or plan.data is not None):
        dataset = read_pairs(name, data.dataset_train_split, name=data.dataset_config)
    else:
        return worst_case(config.max_length or DEFAULT_LENGTH, num_pairs=plan.num_pairs)
    if data.max_train_pairs is not None:
        dataset = dataset.select(range(min(data.max_train_pairs, len(dataset))))
    num_pairs = len(dataset)
    own: Any = {"trust_remote_code": config.trust_remote_code}
    if plan.tokenizer is None and is_adapter_folder(str(model.model_name_or_path)):
        adapter = str(model.model_name_or_path)
        tokenizer = load_trained_tokenizer(adapter, find_adapter_base(adapter), **own)
    else:
        revision = None if plan.tokenizer else model.model_revision
        tokenizer = load_tokenizer(plan.tokenizer or model.model_name_or_path, revision=revision, **own)
    prepare_tokenizer(tokenizer, config.pad_token)
    if config.chat_template_path is not None:
        tokenizer.chat_template = load_chat_template(config.chat_template_path)
    tokenised, counts = tokenise_pairs(
        dataset.select(range(min(NUM_READ, num_pairs))),
        tokenizer,
        max_length=config.max_length,
        truncation_mode=config.truncation_mode,  # type: ignore[arg-type]
        keep_identical=config.keep_identical,
        on_bad_record=config.on_bad_record,  # type: ignore[arg-type]
    )
    if not len(tokenised):
        raise ValueError(f"data: expected pairs to take lengths from, got none that can be used. {counts.summary()}")
    read = min(NUM_READ, num_pairs)
    left = round(num_pairs * len(tokenised) / read)
    some = "" if read == num_pairs else f"the first {read} of "
    origin = f"{some}{num_pairs} pairs of {name or 'the mixture'} ({' '.join(counts.summary().split()).rstrip('.')})"
    return Pairs([dict(record) for record in tokenised], plan.num_pairs or left, origin, is_assumed=False)


def _notes(planner: Planner, origin: str, config: PlanConfig, plan: PlanArguments) -> list[str]:
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
    if plan.devices > 1:
        notes.append("Assumed: what devices send each other hides behind arithmetic.")
    if not optimizer_named(run.optimizer, on_gpu=device.is_gpu).is_known:
        notes.append(f"Assumed: {run.optimizer} keeps what AdamW keeps.")
    if run.optimizer.startswith("paged_"):
        notes.append("A paged optimizer's states are counted on the device; they may leave it.")
    if config.planned["activation_offloading"]:
        notes.append("activation_offloading is not counted: it needs less memory than this.")
    if run.model.lora is not None and run.model.dtype == torch.float32 and device.is_gpu:
        notes.append("The frozen weights are in float32, the default; dtype: bfloat16 halves them.")
    sizes = planner.sizes(run.model.bits)
    if run.model.bits is not None and sizes.num_packed < sizes.num_parameters / 2:
        packed = sizes.num_packed / sizes.num_parameters
        notes.append(f"bitsandbytes packs linear layers, {packed:.0%} of this model: stacked experts stay in dtype.")
    if getattr(run.config, "quantization_config", None) is not None:
        notes.append("The checkpoint's own quantisation is not counted: weights are taken in dtype.")
    return notes
