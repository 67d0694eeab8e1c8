"""`dpop demo`: a tiny Llama learns word problems, DPO and DPOP train it on low-edit pairs, and the two are compared.

Everything is generated, trained and measured here, offline. DPO and DPOP start from the same weights, see the same
pairs in the same order, and are measured on the same held-out pairs.
"""

import json
import logging
import random
import time
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback, set_seed

from dpop_kernels.losses.weights import has_penalty
from dpop_trainer.data import tokenise_pairs
from dpop_trainer.measure.generation import generate_completions
from dpop_trainer.measure.pairs_under_model import PairEvaluation, evaluate_pairs, pair_token_logps
from dpop_trainer.report.plots import logratio_panels, token_shift_panels
from dpop_trainer.report.svg import write_svg
from dpop_trainer.run_folder.files import write_atomically
from dpop_trainer.run_folder.versions import versions
from dpop_trainer.settings.config import DPOPConfig, SFTConfig
from dpop_trainer.settings.terminal import say
from dpop_trainer.settings.wording import counted
from dpop_trainer.tools.demo.report import format_table, write_report
from dpop_trainer.tools.demo.word_problems import Problem, build_tokenizer, final_answer, generate
from dpop_trainer.tools.pairs.metamath import build_pairs
from dpop_trainer.training.progress import RunProgress
from dpop_trainer.training.sft import SFTTrainer
from dpop_trainer.training.trainer import DPOPTrainer


@dataclass(frozen=True)
class DemoSettings:
    """Sizes of the demo. The defaults end within six minutes on two CPU cores."""

    num_train_problems: int = 6000
    num_eval_problems: int = 200
    """Held out from both trainings: their pairs are what the two methods are measured on."""
    num_exact_match: int = 128
    """How many of them are answered by generation."""
    num_pairs: int = 2000

    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 4

    sft_steps: int = 500
    sft_batch_size: int = 32
    sft_learning_rate: float = 3e-3

    preference_steps: int = 120
    preference_batch_size: int = 16
    preference_learning_rate: float = 2e-4
    beta: float = 0.3
    dpop_lambda: float = 50.0


class Method(NamedTuple):
    """One preference training: its trajectory and how it ended."""

    history: dict[str, list[float]]
    evaluation: PairEvaluation
    answers: list[str]
    """To the first held-out problems."""
    train_seconds: float


def run_demo(
    output_dir: str | Path = "runs/demo", *, seed: int = 0, settings: DemoSettings | None = None
) -> dict[str, Any]:
    """Run the demo, print its table, write summary.json, figures and report.html -> the summary.

    Args:
        output_dir: folder for everything it writes.
        seed: of the problems, the weights, the data order, the pairs.
        settings: sizes; see `DemoSettings`.
    """
    settings = settings or DemoSettings()
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    _quiet()
    start = time.perf_counter()
    say(f"DPO and DPOP on generated low-edit pairs (seed {seed}, {device}, results in {folder}/)")

    problems = generate(settings.num_train_problems + settings.num_eval_problems, seed)
    train_problems, eval_problems = problems[: settings.num_train_problems], problems[settings.num_train_problems :]
    tokenizer = build_tokenizer()
    train_pairs = _pairs(train_problems[: settings.num_pairs], seed)
    test_pairs = _pairs(eval_problems, seed + 1)
    for pairs, name in ((train_pairs, "train_pairs.jsonl"), (test_pairs, "test_pairs.jsonl")):
        (folder / name).write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    eval_pairs, _ = tokenise_pairs(test_pairs, tokenizer)

    sft_folder = folder / "sft"
    _supervised(train_problems, tokenizer, sft_folder, seed, settings)
    sft_model = LlamaForCausalLM.from_pretrained(sft_folder).to(device)  # type: ignore[arg-type]
    pad_token_id = tokenizer.pad_token_id
    assert isinstance(pad_token_id, int)
    ref_logps = pair_token_logps(sft_model, eval_pairs, pad_token_id=pad_token_id, desc="Scoring")
    asked = eval_problems[: settings.num_exact_match]
    sft_answers = _answers(sft_model, tokenizer, asked)

    methods: dict[str, Method] = {}
    for loss_type in ("dpo", "dpop"):
        began = time.perf_counter()
        trainer = _preference(loss_type, sft_folder, train_pairs, tokenizer, folder / loss_type, seed, settings)
        seconds = time.perf_counter() - began
        model: Any = trainer.accelerator.unwrap_model(trainer.model)
        trainer.head.remove()
        logps = pair_token_logps(model, eval_pairs, pad_token_id=pad_token_id, desc="Scoring")
        methods[loss_type] = Method(
            history=_history(trainer),
            evaluation=evaluate_pairs(logps, ref_logps, eval_pairs),
            answers=_answers(model, tokenizer, asked),
            train_seconds=seconds,
        )

    answers = {"sft": sft_answers, **{key: method.answers for key, method in methods.items()}}
    summary = _summary(settings, seed, device, train_pairs, eval_pairs, tokenizer, methods)
    summary["methods"] = {
        key: {"exact_match": _exact_match(answers[key], asked), **summary["methods"].get(key, {})} for key in answers
    }
    summary["answers"] = _one_problem(answers, asked)
    names = {"dpo": "DPO", "dpop": "DPOP"}
    summary["histories"] = {names[key]: method.history for key, method in methods.items()}
    summary["seconds"] = time.perf_counter() - start
    write_atomically(folder / "summary.json", json.dumps(summary, indent=2))
    panels = {
        "Over training": logratio_panels(summary["histories"]),
        "Token by token": token_shift_panels({names[key]: m.evaluation.shift for key, m in methods.items()}),
    }
    for panel in chain.from_iterable(panels.values()):
        write_svg(panel, folder / "figures")
    write_report(summary, panels, folder / "report.html")
    say(format_table(summary))
    say(
        f"{summary['seconds']:.0f} s. Written to {folder}/: report.html (open it), its figures, summary.json; "
        "the pairs (train_pairs.jsonl, test_pairs.jsonl) and the SFT model (sft), to go on with: dpop compare --help"
    )
    return summary


def _pairs(problems: list[Problem], seed: int) -> Dataset:
    records = [problem._asdict() for problem in problems]
    return Dataset.from_list(list(build_pairs(records, seed)))


def _supervised(
    problems: list[Problem], tokenizer: PreTrainedTokenizerFast, folder: Path, seed: int, settings: DemoSettings
) -> None:
    set_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=settings.hidden_size,
            intermediate_size=3 * settings.hidden_size,
            num_hidden_layers=settings.num_layers,
            num_attention_heads=settings.num_heads,
            num_key_value_heads=settings.num_heads,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,  # type: ignore[arg-type]
            eos_token_id=tokenizer.eos_token_id,  # type: ignore[arg-type]
            pad_token_id=tokenizer.pad_token_id,  # type: ignore[arg-type]
        )
    )
    config = SFTConfig(
        **_common(folder, seed),
        max_steps=settings.sft_steps,
        per_device_train_batch_size=settings.sft_batch_size,
        learning_rate=settings.sft_learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=20,
    )
    dataset = Dataset.from_list([{"prompt": problem.prompt, "completion": problem.completion} for problem in problems])
    trainer = SFTTrainer(
        model, config, dataset, processing_class=tokenizer, callbacks=[RunProgress("Learning to solve (SFT)")]
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model()


def _preference(
    loss_type: str,
    sft_folder: Path,
    pairs: Dataset,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    seed: int,
    settings: DemoSettings,
) -> DPOPTrainer:
    config = DPOPConfig(
        **_common(folder, seed),
        loss_type=loss_type,
        beta=settings.beta,
        dpop_lambda=settings.dpop_lambda if has_penalty(loss_type) else DPOPConfig.dpop_lambda,
        max_steps=settings.preference_steps,
        per_device_train_batch_size=settings.preference_batch_size,
        learning_rate=settings.preference_learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=5,
    )
    trainer = DPOPTrainer(
        str(sft_folder),
        args=config,
        train_dataset=pairs,
        processing_class=tokenizer,
        callbacks=[RunProgress(f"Preference training ({loss_type.upper()})")],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def _common(folder: Path, seed: int) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "seed": seed,
        "logging_steps": 4,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def _answers(model: Any, tokenizer: PreTrainedTokenizerFast, problems: list[Problem]) -> list[str]:
    prompts = [problem.prompt for problem in problems]
    written = generate_completions(model, tokenizer, prompts, max_new_tokens=128, batch_size=128, desc="Answering")
    return [completion.text for completion in written]


def _is_right(text: str, problem: Problem) -> bool:
    return final_answer(text) == final_answer(problem.answer)


def _exact_match(answers: list[str], problems: list[Problem]) -> float:
    return sum(map(_is_right, answers, problems)) / len(problems)


def _one_problem(answers: dict[str, list[str]], problems: list[Problem]) -> dict[str, Any]:
    """The first problem that the models answer in different words, else the first."""
    different = (place for place, texts in enumerate(zip(*answers.values(), strict=True)) if len(set(texts)) > 1)
    place = next(different, 0)
    problem = problems[place]
    return {
        "number": place + 1,
        "num_problems": len(problems),
        "question": problem.question,
        "right": final_answer(problem.answer),
        "texts": {key: texts[place].strip() for key, texts in answers.items()},
        "is_right": {key: _is_right(texts[place], problem) for key, texts in answers.items()},
    }


def _history(trainer: DPOPTrainer) -> dict[str, list[float]]:
    """Steps and mean log-ratios in nats, from the training batches; step 0 is the reference itself."""
    lines = [line for line in trainer.state.log_history if "dpop/chosen_logratio" in line]
    return {
        "step": [0, *(line["step"] for line in lines)],
        "chosen": [0.0, *(line["dpop/chosen_logratio"] for line in lines)],
        "rejected": [0.0, *(line["dpop/rejected_logratio"] for line in lines)],
    }


def _summary(
    settings: DemoSettings,
    seed: int,
    device: str,
    train_pairs: Dataset,
    eval_pairs: Dataset,
    tokenizer: PreTrainedTokenizerFast,
    methods: dict[str, Method],
) -> dict[str, Any]:
    example = train_pairs[random.Random(seed).randrange(len(train_pairs))]
    return {
        "config": {"seed": seed, **asdict(settings)},
        "versions": versions(),
        "device": f"CPU, {counted(torch.get_num_threads(), 'thread')}"
        if device == "cpu"
        else torch.cuda.get_device_name(),
        "data": {
            "num_train_problems": settings.num_train_problems,
            "num_pairs": len(train_pairs),
            "num_eval_pairs": len(eval_pairs),
            "vocab_size": len(tokenizer),
            "mean_answer_tokens": sum(map(len, eval_pairs["chosen_ids"])) / len(eval_pairs),
        },
        "example": {key: example[key] for key in ("prompt", "chosen", "rejected")},
        "methods": {
            key: {
                "chosen_logratio": method.evaluation.chosen_logratio,
                "rejected_logratio": method.evaluation.rejected_logratio,
                "before_edit_per_token": method.evaluation.shift.before.mean_change,
                "at_edit_per_token": method.evaluation.shift.at.mean_change,
                "after_edit_per_token": method.evaluation.shift.after.mean_change,
                "reward_accuracy": method.evaluation.reward_accuracy,
                "train_seconds": method.train_seconds,
            }
            for key, method in methods.items()
        },
    }


def _quiet() -> None:
    """Only our own progress bars: the libraries' messages about saving and loading tiny files say nothing here."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    import datasets

    datasets.disable_progress_bars()
    logging.getLogger("dpop_trainer").setLevel(logging.ERROR)
