"""A step on paper against steps that were run: what torch's allocator handed out, to two parts in a hundred."""

import copy
import random
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from dpop_trainer import DPOPConfig, DPOPTrainer
from dpop_trainer.batches import PairCollator
from dpop_trainer.tools.plan.devices import Device
from dpop_trainer.tools.plan.known_models import SHAPES, known_config
from dpop_trainer.tools.plan.memory import Optimizer, device_memory, optimizer_named
from dpop_trainer.tools.plan.paper_model import ModelSetting, build, count, layer_kinds, sizes_of
from dpop_trainer.tools.plan.stand_ins import packed_bytes
from dpop_trainer.tools.plan.step import StepCost, StepSetting, step_cost
from dpop_trainer.tools.plan.tape import Moment
from peft import LoraConfig
from tiny import word_tokenizer
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
    TrainerCallback,
)

from benchmarks import scale

VOCAB_SIZE = 1000
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "gemma2": Gemma2Config(**SIZES, head_dim=32, sliding_window=512),  # two kinds of layers, a softcap, tied
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4),
}
LORA = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
ON_ATTENTION = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def records(count, prompt, seed=0):
    """Pairs of ragged lengths; a quarter of the prompt's length is shared, a half and a third are the tails."""
    generator = random.Random(seed)

    def ids(length):
        return [generator.randrange(3, VOCAB_SIZE) for _ in range(length)]

    made = []
    for i in range(count):
        shared, chosen, rejected = ids(prompt // 4), ids(prompt // 2), ids(prompt // 3)
        rejected[0] = (chosen[0] - 2) % (VOCAB_SIZE - 3) + 3
        made.append(
            {"prompt_ids": ids(prompt + 7 * (i % 3)), "chosen_ids": shared + chosen, "rejected_ids": shared + rejected}
        )
    return made


class SecondStep(TrainerCallback):
    """Bytes of the second optimizer step over what was there before it; the first makes the optimizer's states."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)
            self.profiler.__enter__()
            # torch's tree of all calls takes longer than the step
            self.profiler.profiler._parse_kineto_results = lambda *args, **kwargs: []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.profiler.__exit__(None, None, None)
            events = [e for e in self.profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
            held = self.peak = 0
            for event in sorted(events, key=lambda event: event.start_ns()):
                held += event.nbytes()
                self.peak = max(self.peak, held)


def storages(tensors):
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def measured(config, lora, folder, prompt, pairs, **settings):
    """Two steps of the trainer -> bytes at the second one's peak, and the batches that it took."""
    torch.manual_seed(0)
    accumulation = settings.get("gradient_accumulation_steps", 1)
    peak = SecondStep()
    trainer = DPOPTrainer(
        AutoModelForCausalLM.from_config(config, dtype=torch.float32),
        args=DPOPConfig(
            output_dir=str(folder),
            use_cpu=True,
            per_device_train_batch_size=pairs,
            max_steps=2,
            report_to="none",
            save_strategy="no",
            logging_steps=1000,
            disable_tqdm=True,
            optim="adamw_torch",
            max_length=4096,
            **settings,
        ),
        train_dataset=Dataset.from_list(records(2 * pairs * accumulation, prompt)),
        processing_class=word_tokenizer(),
        peft_config=lora,
        callbacks=[peak],
    )
    taken, collate = [], trainer.data_collator
    trainer.data_collator = lambda rows: taken.append(collate(rows)) or taken[-1]
    trainer.train()
    states = [value for state in trainer.optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    models = [trainer.model, *([trainer.ref_model] if trainer.ref_model is not None else [])]
    held = storages([t for model in models for t in (*model.parameters(), *model.buffers())] + states)
    return held + peak.peak, taken[accumulation : 2 * accumulation], collate.layout


def planned(config, lora, batch, *, is_flat, checkpointing, autocast=None, accumulates=False, tiled_mlp=None):
    model = ModelSetting(torch.float32, lora=lora)
    sizes = count(build(config, model))
    setting = StepSetting(
        on_gpu=False,
        checkpointing=checkpointing,
        autocast=autocast,
        reference="adapter off" if lora else "copy",
        accumulates=accumulates,
        optimizer_temporaries=False,
        tiled_mlp=tiled_mlp,
    )
    cost = step_cost(config, sizes, model, setting, batch, is_flat=is_flat)
    device = Device("cpu", 16.0, 1.0, 1.0, 1.0, "", is_gpu=False)
    memory = device_memory(
        sizes,
        model,
        cost,
        device,
        sharding="none",
        num_devices=1,
        optimizer=optimizer_named("adamw_torch", on_gpu=False),
        accumulates=accumulates,
        reference_bytes=0 if lora else sizes.weight_bytes,
    )
    return sum(part.num_bytes for part in memory.parts if not part.is_assumed)


@pytest.mark.parametrize(
    ("name", "lora", "checkpointing", "layout", "prompt", "more"),
    [
        ("llama", LORA, False, "rows", 60, {}),
        ("llama", LORA, False, "tree", 150, {}),
        ("llama", LORA, True, "flat", 60, {}),
        ("llama", None, True, "rows", 150, {}),
        ("llama", None, False, "flat", 150, {"gradient_accumulation_steps": 2}),
        ("llama", LORA, True, "tree", 60, {"bf16": True}),
        ("qwen2", LORA, False, "flat", 150, {}),
        ("qwen2", None, True, "tree", 60, {"tiled_mlp": 128}),
        ("gemma2", LORA, False, "rows", 60, {"tiled_mlp": 256}),
        ("gemma2", None, True, "rows", 150, {"gradient_accumulation_steps": 2}),
        ("mixtral", ON_ATTENTION, False, "tree", 60, {}),
        ("mixtral", ON_ATTENTION, True, "flat", 150, {"tiled_mlp": 256}),
    ],
)
def test_peak_is_what_a_step_of_the_trainer_took(tmp_path, name, lora, checkpointing, layout, prompt, more):
    config = CONFIGS[name]
    total, batches, used = measured(
        config, lora, tmp_path, prompt, 3, gradient_checkpointing=checkpointing, layout=layout, **more
    )
    assert used == layout
    batch = max(batches, key=lambda batch: batch["input_ids"].numel())
    expected = planned(
        config,
        lora,
        batch,
        is_flat=layout == "flat",
        checkpointing=checkpointing,
        autocast=torch.bfloat16 if more.get("bf16") else None,
        accumulates="gradient_accumulation_steps" in more,
        tiled_mlp=more.get("tiled_mlp"),
    )
    assert expected == pytest.approx(total, rel=0.02)


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_flop_are_those_of_the_formula(lora, checkpointing):
    """`scale` counts a Llama's products by formula, which torch's counter confirms; here they are seen as they happen,
    in five layers and carried on to nine."""
    config = LlamaConfig(**(SIZES | {"num_hidden_layers": 9}))
    size = scale.ModelSize(VOCAB_SIZE, 128, 320, num_layers=9, num_heads=4, num_kv_heads=2)
    model = ModelSetting(torch.float32, lora=LORA if lora else None)
    batch = PairCollator(pad_token_id=0, layout="rows")(
        [{**record, "pair_id": i} for i, record in enumerate(records(3, 60))]
    )
    sizes = count(build(config, model))
    setting = StepSetting(False, checkpointing, None, "adapter off" if lora else "copy", False, False)
    cost = step_cost(config, sizes, model, setting, batch, is_flat=False)
    shape = batch["input_ids"].shape
    expected = scale.step_flop(
        size,
        scale.Training(lora_rank=8 if lora else None, checkpointing=checkpointing),
        scale.Batch(shape[0], shape[1], batch["target_ids"].shape[0]),
    )
    assert cost.flop["layers"] == pytest.approx(expected.layers, rel=1e-3)
    assert cost.flop["head"] == expected.head
    forwards = 2 + checkpointing
    # a kernel that keeps no scores makes them once more in its backward: five products where the formula has four
    assert cost.flop["attention"] == pytest.approx(expected.attention * (forwards + 2.5) / (forwards + 2), rel=1e-6)


def test_flash_attention_by_hand():
    """Of T positions in a window of W each sees W, the first ones fewer; no mask of T x T is made. Forward, forward
    again, and in the backward five products for two."""
    config = CONFIGS["gemma2"]  # layers in turn with a window and without
    long = PairCollator(pad_token_id=0, layout="rows")([{**record, "pair_id": 0} for record in records(1, 2000)])
    setting = StepSetting(True, True, None, "none", False, False)
    masked, cost = (
        step_cost(config, count(build(config, model)), model, setting, long, is_flat=False)
        for model in (ModelSetting(torch.float32, lora=LORA, attention=name) for name in (None, "flash_attention_2"))
    )
    rows, length = long["input_ids"].shape
    whole, windowed = length * (length + 1) // 2, 512 * length - 512 * 511 // 2
    assert cost.flop["attention"] == pytest.approx(4.5 * 4 * rows * 4 * 32 * (2 * whole + 3 * windowed))
    assert masked.peak.total - cost.peak.total >= rows * length**2  # a byte for each pair of positions


def test_checkpoints_in_the_host_s_memory_by_hand():
    """Each of nine layers has its input sent, and fetched once. When the backward begins, that of the last has been
    fetched, and that of the first is there, which is a leaf of the graph: the adapter asks for its gradient."""
    config = LlamaConfig(**(SIZES | {"num_hidden_layers": 9}))
    model = ModelSetting(torch.float32, lora=LORA)
    sizes = count(build(config, model))
    batch = PairCollator(pad_token_id=0, layout="rows")([{**record, "pair_id": 0} for record in records(1, 60)])
    kept, sent = (
        step_cost(
            config,
            sizes,
            model,
            StepSetting(True, True, None, "none", False, False, offloading=flag),
            batch,
            is_flat=False,
        )
        for flag in (False, True)
    )
    states = batch["input_ids"].numel() * 128 * 4
    assert (kept.moved_bytes, sent.moved_bytes) == (0, 2 * 9 * states)
    saved = kept.moments["backward begins"].total - sent.moments["backward begins"].total
    assert saved == (9 - 2) * states
    assert sent.flop == kept.flop


@pytest.mark.parametrize(
    ("name", "num_layers", "model", "checkpointing", "autocast", "reference", "layout"),
    [  # kinds of layers in turn; products' inputs kept for a layer, an adapter's casts kept until the forward ends
        ("gemma2", 12, ModelSetting(torch.float32), True, None, "copy", "rows"),
        ("llama", 5, ModelSetting(torch.float32, bits=4, lora=LORA), True, torch.bfloat16, "adapter off", "flat"),
        ("llama", 5, ModelSetting(torch.float32, bits=4, lora=LORA), False, torch.bfloat16, "adapter off", "flat"),
        ("mixtral", 5, ModelSetting(torch.float32, lora=ON_ATTENTION), False, None, "none", "rows"),
    ],
)
def test_carrying_layers_on_is_running_them(name, num_layers, model, checkpointing, autocast, reference, layout):
    """Three periods of a model's layers, and the same without the middle one, say what all of its layers take."""
    config = copy.deepcopy(CONFIGS[name])
    values = config.to_dict() | {"num_hidden_layers": num_layers, "layer_types": None}
    config = type(config)(**values)
    sizes = count(build(config, model))
    batch = PairCollator(pad_token_id=0, layout=layout)([{**record, "pair_id": 0} for record in records(1, 60)])
    setting = StepSetting(True, checkpointing, autocast, reference, False, True)
    carried = step_cost(config, sizes, model, setting, batch, is_flat=layout == "flat")
    at_once = replace(sizes, num_leading=num_layers)  # no model of fewer layers would show such a pattern
    whole = step_cost(config, at_once, model, setting, batch, is_flat=layout == "flat")
    assert carried.peak.total == whole.peak.total
    assert carried.flop == whole.flop
    for phase in ("reference", "forward", "optimizer"):
        assert carried.moments.get(phase) == whole.moments.get(phase)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [  # as the models' safetensors say
        ("SmolLM2-135M", 134_515_008),
        ("Llama-3.2-1B", 1_235_814_400),
        ("Qwen2.5-1.5B", 1_543_714_304),
        ("Llama-2-7b", 6_738_415_616),
        ("Mistral-7B-v0.1", 7_241_732_096),
        ("Qwen2.5-7B", 7_615_616_512),
        ("Llama-3-8B", 8_030_261_248),
        ("gemma-2-9b", 9_241_705_984),
        ("Yi-34B", 34_388_917_248),
        ("Mixtral-8x7B", 46_702_792_704),
        ("Qwen2.5-72B", 72_706_203_648),
    ],
)
def test_known_models_have_their_published_parameters(name, parameters):
    sizes = count(build(known_config(name), ModelSetting(torch.bfloat16)))
    assert sizes.num_parameters == parameters
    assert sizes.weight_bytes - sizes.buffer_bytes == 2 * parameters


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("bits", [None, 4])
def test_sizes_from_a_few_layers_are_those_of_all(name, bits):
    """11 layers: five times two and one of the two kinds, where there are two."""
    config = copy.deepcopy(CONFIGS[name])
    kinds = getattr(config, "layer_types", None)
    config.num_hidden_layers = 11
    if kinds:
        config.layer_types = [kinds[i % 2] for i in range(11)]
    lora = ON_ATTENTION if name == "mixtral" else LORA  # peft warns of experts that are stacked
    setting = ModelSetting(torch.bfloat16, bits=bits, nested=True, lora=lora)
    alike = layer_kinds(build(config, ModelSetting(torch.bfloat16)))
    assert sizes_of(config, setting, alike) == count(build(config, setting))


@pytest.mark.parametrize(
    "numbered",
    [
        {"layers_to_transform": [0, 7], "target_modules": ["q_proj"]},
        {"rank_pattern": {"layers.8.self_attn.q_proj": 32}, "target_modules": ["q_proj"]},
        {"target_modules": ["layers.3.self_attn.q_proj", "v_proj"]},
        {"target_modules": r".*layers\.[89]\..*q_proj"},
    ],
)
def test_an_adapter_that_names_layers_is_counted_whole(numbered):
    config = LlamaConfig(**(SIZES | {"num_hidden_layers": 11}))
    setting = ModelSetting(torch.bfloat16, lora=LoraConfig(r=8, task_type="CAUSAL_LM", **numbered))
    alike = layer_kinds(build(config, ModelSetting(torch.bfloat16)))
    assert sizes_of(config, setting, alike) == count(build(config, setting))


def test_active_parameters_of_a_mixture():
    sizes = count(build(known_config("Mixtral-8x7B"), ModelSetting(torch.bfloat16)))
    expert = 3 * 4096 * 14336
    assert sizes.num_active == sizes.num_parameters - 32 * 6 * expert  # six of eight experts stay idle


def test_packed_weights_by_hand():
    # 64 weights share a scale of four bytes; nested, of one byte, and 256 of those one of four
    assert packed_bytes(128, 512, bits=4, nested=False) == 32768 + 1024 * 4
    assert packed_bytes(128, 512, bits=4, nested=True) == 32768 + 1024 + 4 * 4
    assert packed_bytes(128, 512, bits=8, nested=False) == 65536 + 128 * 4
    config = LlamaConfig(**SIZES)
    plain, packed = (count(build(config, ModelSetting(torch.bfloat16, bits=bits, lora=LORA))) for bits in (None, 4))
    assert packed.num_parameters == plain.num_parameters
    assert packed.num_trained == plain.num_trained
    linear = 5 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 320)
    norms_and_embeddings = plain.num_parameters - linear
    weights = packed.frozen_bytes - 2 * norms_and_embeddings
    assert weights == linear // 2 + 4 * linear // 64
    assert (packed.num_packed, plain.num_packed) == (linear, 0)


def test_sharding_by_hand():
    """Four devices; 1000 trained parameters in fp32 and 8000 bytes of frozen weights in bf16."""
    config = LlamaConfig(**SIZES)
    lora = ModelSetting(torch.bfloat16, lora=LORA)
    sizes = count(build(config, lora))
    cost = StepCost({"forward": Moment(5000.0, {"activations": 4000.0, "gradients": 1000.0})}, {})
    device = Device("gpu", 1.0, 1.0, 1.0, 1.0, "", is_gpu=True)

    def parts(sharding):
        memory = device_memory(
            sizes,
            lora,
            cost,
            device,
            sharding=sharding,
            num_devices=4,
            optimizer=Optimizer(8.0, False),
            accumulates=False,
            reference_bytes=0,
        )
        return {part.name: part.num_bytes for part in memory.parts}

    trained, frozen = sizes.num_trained, sizes.frozen_bytes + sizes.buffer_bytes
    ddp, fsdp, zero2, zero3 = map(parts, ("ddp", "fsdp2", "zero2", "zero3"))
    assert (ddp["weights"], ddp["trained weights"], ddp["optimizer"]) == (frozen, 4 * trained, 8 * trained)
    assert (ddp["gradients"], ddp["gradient buckets"]) == (1000, 4 * trained)
    assert (fsdp["weights"], fsdp["optimizer"], fsdp["gradients"]) == (frozen / 4, 2 * trained, trained)
    layer = 2 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 320 + 2 * 128)
    adapter = 8 * (2 * (128 + 128) + 2 * (128 + 64) + 3 * (128 + 320))
    assert fsdp["gathered layers"] == 2 * (layer + 2 * adapter)
    assert fsdp["gathered embeddings and head"] == 2 * (2 * VOCAB_SIZE * 128 + 128)
    assert (zero2["weights"], zero2["trained weights"], zero2["optimizer"]) == (frozen, 2 * trained, 12 * trained / 4)
    assert (zero3["weights"], zero3["trained weights"], zero3["gradients"]) == (frozen / 4, trained / 2, trained / 2)
    assert all(plan["activations"] == 4000 for plan in (ddp, fsdp, zero2, zero3))


def test_every_known_shape_is_a_model():
    for name in SHAPES:
        assert known_config(name).get_text_config().num_hidden_layers > 0
