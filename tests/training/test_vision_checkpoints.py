"""Text runs on checkpoints of vision-language classes, by name: all of the checkpoint is loaded, saved and adapted."""

import pytest
import torch
import transformers
from datasets import Dataset
from dpop_trainer import DPOPTrainer
from dpop_trainer.models.auto_class import auto_class
from dpop_trainer.tools.plan.paper_model import ModelSetting, build, count
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from tiny import VOCAB_SIZE, text_pairs, word_tokenizer
from trainers import config
from transformers import LlamaConfig, MistralConfig, Qwen3_5Config, T5Config

TEXT = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# special tokens of images, which no text holds
IMAGE_IDS = {"image_token_id": 58, "video_token_id": 59, "vision_start_token_id": 56, "vision_end_token_id": 57}
MROPE = {"rope_type": "default", "rope_theta": 1e4}
CLIP = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
CLIP |= {"image_size": 8, "patch_size": 4}
QWEN_VISION = {"depth": 1, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}


def qwen3_5():
    text = {**TEXT, "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 2}
    text |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
    text |= {"layer_types": ["linear_attention", "full_attention"]}
    text |= {"rope_parameters": {**MROPE, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.25}}
    vision = {**QWEN_VISION, "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32}
    vision |= {"num_position_embeddings": 4}
    return transformers.Qwen3_5ForConditionalGeneration(
        Qwen3_5Config(text_config=text, vision_config=vision, **IMAGE_IDS)
    )


def qwen2_5_vl():
    text = {**TEXT, "rope_parameters": {**MROPE, "mrope_section": [2, 3, 3]}}
    vision = {**QWEN_VISION, "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32, "window_size": 16}
    vision |= {"fullatt_block_indexes": [0]}
    return transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **IMAGE_IDS)
    )


def mistral3():
    vision = transformers.PixtralVisionConfig(**CLIP, head_dim=8)
    return transformers.Mistral3ForConditionalGeneration(
        transformers.Mistral3Config(
            text_config=MistralConfig(**TEXT, head_dim=16), vision_config=vision, image_token_index=58
        )
    )


def llava():
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            text_config=LlamaConfig(**TEXT), vision_config=transformers.CLIPVisionConfig(**CLIP), image_token_index=58
        )
    )


def saved(make, folder):
    torch.manual_seed(0)
    model = make()
    model.save_pretrained(folder)
    return model, str(folder)


def tensors(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def train(name, tmp_path, **more):
    trainer = DPOPTrainer(
        name,
        args=config(tmp_path, max_steps=2),
        train_dataset=Dataset.from_list(text_pairs()),
        processing_class=word_tokenizer(),  # Qwen's own would be made of these words otherwise
        **more,
    )
    trainer.train()
    trainer.save_model()
    return tmp_path / "run"


@pytest.mark.parametrize("make", [qwen3_5, qwen2_5_vl, mistral3, llava], ids=lambda make: make.__name__)
def test_a_run_by_name_saves_the_whole_checkpoint_in_its_class(make, tmp_path):
    model, name = saved(make, tmp_path / "model")
    run = train(name, tmp_path)
    before, after = tensors(tmp_path / "model"), tensors(run)
    assert after.keys() == before.keys()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved
    assert not [key for key in moved if "vis" in key]  # no picture was seen
    assert transformers.AutoConfig.from_pretrained(run).architectures == [type(model).__name__]
    _, report = type(model).from_pretrained(run, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]


def test_an_adapter_trained_by_name_goes_on_the_whole_checkpoint(tmp_path):
    model, name = saved(qwen3_5, tmp_path / "model")
    run = train(name, tmp_path, peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        before = model.eval()(input_ids=ids).logits
        after = PeftModel.from_pretrained(model, run).eval()(input_ids=ids).logits
    assert (after - before).abs().max() > 1e-4


def test_what_writes_no_text_by_itself_is_refused():
    with pytest.raises(ValueError, match=r"model: expected a causal LM, .*got a checkpoint of T5For\w+ \(.* t5\)"):
        auto_class(T5Config(architectures=["T5ForConditionalGeneration"]))
    with pytest.raises(ValueError, match=r"got a checkpoint of no class \(model type clip\)\. "):
        auto_class(transformers.CLIPConfig())


def test_a_text_checkpoint_is_loaded_as_ever():
    assert auto_class(LlamaConfig(architectures=["LlamaForCausalLM"])) is transformers.AutoModelForCausalLM
    assert auto_class(LlamaConfig()) is transformers.AutoModelForCausalLM
    text_of_qwen = Qwen3_5Config(architectures=["Qwen3_5ForCausalLM"])
    assert auto_class(text_of_qwen) is transformers.AutoModelForCausalLM


@pytest.mark.parametrize("make", [qwen3_5, llava], ids=lambda make: make.__name__)
def test_a_plan_counts_the_vision_tower(make):
    model = make()
    model.config.architectures = [type(model).__name__]
    planned = count(build(model.config, ModelSetting(dtype=torch.float32)))
    assert planned.num_parameters == sum(parameter.numel() for parameter in model.parameters())
