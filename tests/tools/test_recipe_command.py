"""`dpop recipes` and `--recipe`: what is listed, found by name, copied, refused, and carried by the wheel."""

import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from dpop_trainer.cli import main
from dpop_trainer.data import tokenise_pairs
from dpop_trainer.models.tokenizer_loading import load_chat_template
from dpop_trainer.settings.arguments import ComparisonArguments, parse_arguments, run_config
from dpop_trainer.settings.config import DPOPConfig, SFTConfig
from dpop_trainer.settings.recipes import FOLDER, STARTED_BY, list_recipes, recipe_file, recipe_files
from tiny import word_tokenizer

ROOT = Path(__file__).parents[2]
CONFIGS = {"dpop train": (DPOPConfig,), "dpop sft": (SFTConfig,), "dpop compare": (DPOPConfig, ComparisonArguments)}


def test_every_file_is_listed_under_what_starts_it_with_its_own_line(capsys):
    assert main(["recipes"]) == 0
    blocks = dict(block.split("\n", 1) for block in capsys.readouterr().out.split("\n\n")[:-1])
    for command, usage in STARTED_BY.items():
        listed = [line.split(maxsplit=1) for line in blocks.pop(usage).splitlines()]
        for name, title in listed:
            first = next(line for line in recipe_file(name).read_text().splitlines() if line.startswith("# "))
            assert first == f"# {command}: {title}"
            assert len(name) + len(title) < 110  # a line of a wide terminal
    assert not blocks
    files = [path.relative_to(FOLDER) for kind in ("*.yaml", "*.sbatch") for path in FOLDER.rglob(kind)]
    assert sorted(recipe.name for recipe in list_recipes()) == sorted(str(path).removesuffix(".yaml") for path in files)
    assert {"lora", "gsm8k/sft", "accelerate/ddp_8", "slurm/train.sbatch", "chatml.jinja"} < recipe_files().keys()


@pytest.mark.parametrize("recipe", [recipe for recipe in list_recipes() if recipe.command in CONFIGS], ids=str)
def test_a_name_means_its_file_to_the_command_that_it_is_for(recipe):
    config, *more = CONFIGS[recipe.command]
    flags = ["--output_dir", "o", "--bf16", "false"]
    by_name = parse_arguments(config, ["--recipe", recipe.name, *flags], recipe.command, *more)
    by_path = parse_arguments(config, ["--config", str(recipe_file(recipe.name)), *flags], recipe.command, *more)
    assert run_config(*by_name) == run_config(*by_path)


def test_flags_win_over_a_recipe():
    model, _, config = parse_arguments(DPOPConfig, ["--recipe=lora", "--dpop_lambda", "5"], "dpop train")
    assert (config.dpop_lambda, config.max_length, model.lora_r) == (5.0, 1024, 16)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--recipe", "mistral"], "got 'mistral'. Did you mean mistral-7b? `dpop recipes` lists them."),
        (["--recipe", "lora.yaml"], "got 'lora.yaml'. Did you mean lora?"),
        (["--recipe", "trainer/recipes/gsm8k/sft.yaml"], "Did you mean gsm8k/sft"),
        (["--recipe", "qwen"], "Did you mean qwen-72b or qwen2.5-7b?"),
        (["--recipe", "?"], "got '?'. `dpop recipes` lists them."),
        (["--recipe", str(FOLDER / "lora.yaml")], "which is a file. Give it with --config."),
        (["--recipe", "accelerate/ddp_8"], 'launch --config_file "$(dpop recipes --path accelerate/ddp_8)" -m'),
        (["--recipe", "chatml.jinja"], "expected a recipe's name, got 'chatml.jinja'"),
        (
            ["--recipe", "lora", "--config", "run.yaml"],
            "--recipe: expected it or --config, got both ('lora', 'run.yaml')",
        ),
        (["--config=run.yaml", "--recipe=lora"], "--recipe: expected it or --config, got both ('lora', 'run.yaml')"),
    ],
)
@pytest.mark.parametrize("command", ["train", "sft", "compare", "plan"])
def test_what_is_no_recipe_is_named(command, argv, message, capsys):
    assert main([command, *argv]) == 2
    assert message in capsys.readouterr().err


def test_a_name_is_needed_after_the_flag(capsys):
    assert main(["train", "--recipe"]) == 1
    assert "--recipe: expected a recipe's name after it, got nothing." in capsys.readouterr().err


def test_a_recipe_of_another_command_is_told(capsys):
    assert main(["train", "--recipe", "gsm8k/compare"]) == 1
    assert "got 'methods'. `dpop compare` takes it." in capsys.readouterr().err


def test_path(capsys):
    assert main(["recipes", "--path", "accelerate/fsdp2_8"]) == 0
    assert capsys.readouterr().out == f"{FOLDER / 'accelerate' / 'fsdp2_8.yaml'}\n"
    assert main(["recipes", "--path", "accelerate/fsdp_8"]) == 2
    assert "--path: expected a recipe's name, got 'accelerate/fsdp_8'. Did you mean acc" in capsys.readouterr().err


def test_copies_are_the_files_and_overwrite_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["recipes", "--copy", "mine/recipes"]) == 0
    assert "dpop train --config mine/recipes/lora.yaml" in capsys.readouterr().out
    copies = {path.relative_to("mine/recipes"): path for path in Path("mine/recipes").rglob("*") if path.is_file()}
    assert copies.keys() == {path.relative_to(FOLDER) for path in recipe_files().values()}
    assert not [path for path in copies if path.suffix == ".py"]
    for path, copy in copies.items():
        assert copy.read_bytes() == (FOLDER / path).read_bytes()

    edited = Path("mine/recipes/lora.yaml")
    edited.write_text("beta: 0.1\n")
    for path in [path for path in copies.values() if path != edited]:
        path.unlink()
    assert main(["recipes", "--copy", "mine/recipes"]) == 2
    assert "found mine/recipes/lora.yaml. Name another." in capsys.readouterr().err
    assert edited.read_text() == "beta: 0.1\n"
    assert [path for path in Path("mine").rglob("*") if path.is_file()] == [edited]
    assert main(["recipes", "--copy", str(edited)]) == 2
    assert "--copy: expected a folder, got 'mine/recipes/lora.yaml', which is a file." in capsys.readouterr().err


def test_a_recipes_chat_template_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, _, config = parse_arguments(DPOPConfig, ["--recipe", "qwen-72b", "--bf16", "false"], "dpop train")
    assert config.chat_template_path == "chatml"
    assert load_chat_template("chatml") == (FOLDER / "chatml.jinja").read_text()


def test_a_base_model_s_template_ends_turns_with_its_own_end():
    tokenizer = word_tokenizer()
    turns = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2 w3"}]
    pairs = Dataset.from_list([{"prompt": turns[:1], "chosen": turns[1:], "rejected": [{**turns[1], "content": "w4"}]}])
    for name, num_endless in (("zephyr", 0), ("chatml", 1)):
        tokenizer.chat_template = load_chat_template(name)
        _, counts = tokenise_pairs(pairs, tokenizer, stop_ids=[tokenizer.eos_token_id])
        assert counts.endless_answers == num_endless
    tokenizer.chat_template = load_chat_template("zephyr")
    asked = "<|user|>\nw1<eos>\n<|assistant|>\n"
    assert tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True) == asked
    assert tokenizer.apply_chat_template(turns, tokenize=False) == f"{asked}w2 w3<eos>\n"


def test_it_needs_the_standard_library_alone():
    code = """
import sys
for name in ("torch", "transformers", "datasets", "yaml", "numpy"):
    sys.modules[name] = None  # importing it raises ImportError
from dpop_trainer.cli import main
sys.exit(main(["recipes"]))
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def test_the_wheel_carries_every_file_and_the_packages_version():
    from hatchling.builders.wheel import WheelBuilder

    import dpop_kernels

    builder = WheelBuilder(str(ROOT))
    carried = {Path(file.distribution_path) for file in builder.recurse_included_files()}
    for path in recipe_files().values():
        assert Path("dpop_trainer", "recipes") / path.relative_to(FOLDER) in carried
    assert builder.metadata.version == dpop_kernels.__version__
    assert {path.parts[0] for path in carried} == {"dpop_kernels", "dpop_trainer"}
