"""Every recipe is run: its own YAML, its architecture shrunk, data of the same form on disk, and two steps."""

import json
from pathlib import Path

import pytest
import yaml
from dpop_trainer.cli import main
from dpop_trainer.settings.arguments import parse_arguments
from dpop_trainer.settings.config import DPOPConfig
from dpop_trainer.settings.recipes import FOLDER, list_recipes, recipe_file, run_recipe
from peft import PeftConfig
from tiny import text_pairs, word_tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen2Tokenizer,
)

PREFERENCE = [recipe.name for recipe in list_recipes() if recipe.command == "dpop train"]
SFT = [recipe.name for recipe in list_recipes() if recipe.command == "dpop sft"]
DOCS = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()

# the models' own architecture, and what of it matters to the head and the layouts
ARCHITECTURES = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": LlamaConfig(tie_word_embeddings=True),
    "Qwen/Qwen2.5-1.5B-Instruct": Qwen2Config(tie_word_embeddings=True),
    "Qwen/Qwen2.5-7B-Instruct": Qwen2Config(tie_word_embeddings=False),
    "jondurbin/bagel-34b-v0.2": LlamaConfig(),
    "meta-llama/Llama-2-7b-chat-hf": LlamaConfig(num_key_value_heads=4),
    "meta-llama/Llama-3.2-1B-Instruct": LlamaConfig(tie_word_embeddings=True),
    "meta-llama/Meta-Llama-3-8B-Instruct": LlamaConfig(),
    "mistralai/Mistral-7B-v0.1": MistralConfig(sliding_window=4096),
    "moreh/MoMo-72B-lora-1.8.7-DPO": LlamaConfig(num_key_value_heads=4),
    "runs/gsm8k/sft": LlamaConfig(),
    "runs/smollm2/base": LlamaConfig(tie_word_embeddings=True),
    "stories260K": LlamaConfig(),
}

# data sets whose answers are whole conversations beside the prompt as text; all others are text
CONVERSATIONS = ("allenai/ultrafeedback_binarized_cleaned",)
QUESTIONS = ("Intel/orca_dpo_pairs",)  # system, question, chosen, rejected

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ ' w50 ' if m.role == 'user' else ' w51 ' }}{{ m.content }} w52{% endfor %}"
    "{{ ' w51' if add_generation_prompt else '' }}"
)

# what needs a GPU, a hub or time
HERE = [
    "--use_cpu", "true", "--bf16", "false", "--load_in_4bit", "false", "--dtype", "float32", "--max_steps", "2",
    "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2", "--eval_strategy", "no",
    "--save_strategy", "no", "--logging_steps", "1", "--disable_tqdm", "true",
]  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Model id -> folder of the shrunk model with a tokenizer, made when first asked for."""
    folder, made = tmp_path_factory.mktemp("models"), {}
    # transformers takes Qwen2's own tokenizer for its models, whatever the folder holds; here with bytes as its tokens
    qwen2_tokenizer = Qwen2Tokenizer(vocab={char: i for i, char in enumerate(sorted(ByteLevel.alphabet()))}, merges=[])

    def model(name):
        if name not in made:
            config = ARCHITECTURES[name].to_dict() | {
                "vocab_size": 300,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": min(ARCHITECTURES[name].num_key_value_heads or 4, 2),
                "head_dim": 8,
                "layer_types": None,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "pad_token_id": 0,
            }
            made[name] = folder / name.replace("/", "--")
            AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).save_pretrained(made[name])
            tokenizer = qwen2_tokenizer if isinstance(ARCHITECTURES[name], Qwen2Config) else word_tokenizer()
            tokenizer.chat_template = CHAT_TEMPLATE
            tokenizer.save_pretrained(made[name])
        return str(made[name])

    return model


def local_data(name, folder):
    """A file of pairs in the form of the named data set's."""
    records = text_pairs(8)
    if name in CONVERSATIONS:
        records = [
            {
                "prompt": pair["prompt"],
                **{
                    side: [
                        {"role": "user", "content": pair["prompt"]},
                        {"role": "assistant", "content": pair[side].strip()},
                    ]
                    for side in ("chosen", "rejected")
                },
            }
            for pair in records
        ]
    if name in QUESTIONS:
        records = [{"system": "w9", "question": pair["prompt"], **pair} for pair in records]
        for record in records:
            del record["prompt"]
    path = folder / f"{name.replace('/', '--')}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def run(command, name, models, folder):
    values = yaml.safe_load(run_recipe(name).read_text())
    argv = [command, "--recipe", name, *HERE]
    argv += ["--model_name_or_path", models(values["model_name_or_path"]), "--output_dir", str(folder / "run")]
    if "dataset_mixture" in values:
        paths = [local_data(part["path"], folder) for part in values["dataset_mixture"]]
        argv += ["--dataset_mixture", *paths, "--eval_datasets", paths[0]]
    else:
        argv += ["--dataset_name", local_data(values.get("dataset_name", "pairs.jsonl"), folder)]
    assert main(argv) == 0
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    return values


@pytest.mark.parametrize("name", PREFERENCE)
def test_recipe_runs(name, models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # what a recipe mentions is found from anywhere
    values = run("train", name, models, tmp_path)
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    for field in ("beta", "dpop_lambda", "learning_rate", "max_length"):
        assert written[field] == values[field], field
    if "chat_template_path" in values:
        saved = AutoTokenizer.from_pretrained(tmp_path / "run").chat_template
        assert saved == recipe_file("chatml.jinja").read_text()
    if values.get("use_peft"):
        assert PeftConfig.from_pretrained(tmp_path / "run").r == values["lora_r"]


@pytest.mark.parametrize("name", SFT)
def test_sft_recipe_runs(name, models, tmp_path):
    run("sft", name, models, tmp_path)


@pytest.mark.parametrize("name", ["llama-2-7b-chat", "mistral-7b", "yi-34b", "qwen-72b"])
def test_the_papers_settings_are_the_papers(name):
    # arXiv:2402.13228: β = 0.3, λ = 50, learning rate 5e-5, AdamW
    _, _, config = parse_arguments(DPOPConfig, ["--recipe", name, "--bf16", "false"], "dpop")
    assert (config.beta, config.dpop_lambda, config.learning_rate, config.optim) == (0.3, 50.0, 5e-5, "adamw_torch")


def test_the_page_lists_every_recipe():
    for recipe in FOLDER.glob("*.yaml"):
        values = yaml.safe_load(recipe.read_text())
        row = next((line for line in DOCS.splitlines() if f"[{recipe.name}]" in line), "")
        assert values["model_name_or_path"] in row, recipe.name
        for source in values.get("dataset_mixture", [{"path": values.get("dataset_name")}]):
            assert source["path"].removeprefix("abacusai/") in row, recipe.name
