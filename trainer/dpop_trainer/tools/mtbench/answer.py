"""A model's answers to MT-Bench's conversations, turn after turn, through its chat template."""

import json
import time
import uuid
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, set_seed

from dpop_trainer.data.source_path import expanded
from dpop_trainer.data.templates import TEMPLATE_ERRORS, render_within
from dpop_trainer.measure.stop_tokens import stop_token_ids, until_stop
from dpop_trainer.models.adapters import adapter_base
from dpop_trainer.models.trained import TrainedModel, fingerprint, load_trained, load_trained_tokenizer
from dpop_trainer.run_folder.contents import read_record
from dpop_trainer.run_folder.files import write_atomically
from dpop_trainer.settings.errors import doing
from dpop_trainer.settings.terminal import printable, say
from dpop_trainer.tools.mtbench.files import Question, append_records, read_answers, read_questions, write_records

# FastChat's sampling temperature for each category
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
OTHER_TEMPERATURE = 0.7


@dataclass(frozen=True)
class AnswerSettings:
    """How answers are generated. FastChat's values are the defaults."""

    max_new_tokens: int = 1024
    """Per turn."""
    num_choices: int = 1
    """Answers to each question, each with a seed of its own."""
    batch_size: int = 8
    """Conversations generated together: those of one temperature."""
    chat_template: str | None = None
    """A Jinja file, in place of the tokenizer's own template."""
    dtype: str | None = None
    device: str | None = None
    device_map: str | None = None
    trust_remote_code: bool = False


class Generator:
    """Continues conversations with one model.

    Args:
        trained: the model, and a tokenizer with a chat template.
        max_new_tokens: per turn.
    """

    def __init__(self, trained: TrainedModel, max_new_tokens: int) -> None:
        self._model: Any = trained.model
        self._tokenizer: Any = trained.tokenizer
        self._max_new_tokens = max_new_tokens
        context = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        self._context_length: int | None = context
        self.counts: Counter[str] = Counter()
        """What did not go as asked, by its description."""

    @torch.no_grad()
    def reply(self, conversations: list[list[dict[str, str]]], temperature: float) -> list[str]:
        """The assistant's next message in each conversation. A temperature of 0 is greedy."""
        rows = [self._rendered(messages) for messages in conversations]
        replies = [""] * len(rows)
        fitting = [i for i, row in enumerate(rows) if self._context_length is None or len(row) < self._context_length]
        self.counts["answers left empty: the conversation fills the model's context"] += len(rows) - len(fitting)
        if fitting:
            for i, reply in zip(fitting, self._generate([rows[i] for i in fitting], temperature), strict=True):
                replies[i] = reply
        return replies

    def _rendered(self, messages: list[dict[str, str]]) -> list[int]:
        """
        Raises:
            ValueError: the chat template refuses the conversation, or takes more than it may.
        """
        options: dict[str, Any] = {"add_generation_prompt": True, "tokenize": False}
        try:
            text = render_within(lambda: str(self._tokenizer.apply_chat_template(messages, **options)))
        except TEMPLATE_ERRORS as error:
            raise ValueError(
                f"chat_template: expected one that renders a conversation of {len(messages)} turns, got its error: "
                f"{error}. Name another with --chat_template."
            ) from error
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ValueError(
                "chat_template: expected one that renders a conversation, got nothing of it. Name another with "
                "--chat_template."
            )
        return ids

    def _generate(self, rows: list[list[int]], temperature: float) -> list[str]:
        length = max(len(row) for row in rows)
        room = self._max_new_tokens
        if self._context_length is not None:
            room = min(room, self._context_length - length)
        pad_token_id = self._tokenizer.pad_token_id
        device = self._model.device
        input_ids = torch.tensor([[pad_token_id] * (length - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=device)
        stops = stop_token_ids(self._model, self._tokenizer)
        config = self._config(temperature, room, stops)
        output = self._model.generate(input_ids, attention_mask=mask, generation_config=config)[:, length:].tolist()
        answers = [until_stop(ids, stops) for ids in output]
        num_cut = sum(len(answer) == len(ids) for answer, ids in zip(answers, output, strict=True))
        self.counts["answers cut at their longest allowed length"] += num_cut
        return [self._tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers]

    def _config(self, temperature: float, max_new_tokens: int, stops: list[int]) -> GenerationConfig:
        """The model's own sampling settings, as in FastChat, but for the temperature and the length."""
        own: GenerationConfig | None = getattr(self._model, "generation_config", None)
        values = {
            "max_new_tokens": max_new_tokens,
            "eos_token_id": stops or None,
            "pad_token_id": self._tokenizer.pad_token_id,
        }
        if temperature < 1e-4:
            return GenerationConfig(do_sample=False, **values)
        sampling = {name: getattr(own, name, None) for name in ("top_k", "top_p", "min_p", "repetition_penalty")}
        values |= {name: value for name, value in sampling.items() if value is not None}
        return GenerationConfig(do_sample=True, temperature=temperature, **values)


def run_answer(
    *, model: str, questions: str, out: str, model_id: str | None, settings: AnswerSettings, limit: int | None = None
) -> Path:
    """Answer every question that has no answer yet; the file is in the questions' order in the end.

    Args:
        model: folder or hub id of a model or an adapter.
        questions: FastChat's question.jsonl.
        out: the answers are written to OUT/model_answer/MODEL_ID.jsonl.
        model_id: the model's name there; by default the last part of its path.
        settings: how answers are generated.
        limit: the first so many questions.

    Returns:
        The file of answers.

    Raises:
        ValueError: the questions, the model or a chat template cannot be had, or the file holds the answers of other
            weights or settings.
    """
    asked = read_questions(questions)[:limit]
    if settings.max_new_tokens < 1 or settings.num_choices < 1 or settings.batch_size < 1:
        raise ValueError(f"max_new_tokens, num_choices, batch_size: expected at least 1, got {settings}.")
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected at least 1 question, got {limit}.")
    model_id = model_id or Path(model.rstrip("/\\")).name
    if "/" in model_id or "\0" in model_id or not model_id.strip("."):
        raise ValueError(f"model_id: expected the name of a file, got {model_id!r}. Give one with --model_id.")
    path = Path(out) / "model_answer" / f"{model_id}.jsonl"
    base = adapter_base(model)
    _with_chat_template(load_trained_tokenizer(model, base), settings)
    _check_made_with(path, {"model": fingerprint(model), **_deciding(settings)})
    known = read_answers(path) if path.exists() else {}
    missing = [question for question in asked if question.question_id not in known]
    say(f"{model_id}: {len(asked)} questions, {len(asked) - len(missing)} answered before.")
    if missing:
        init_kwargs = {
            "dtype": settings.dtype,
            "device_map": settings.device_map,
            "trust_remote_code": settings.trust_remote_code or None,
        }
        with doing(f"loading {model}"):
            trained = load_trained(
                model,
                init_kwargs={name: value for name, value in init_kwargs.items() if value is not None},
                device=settings.device,
            )
        _with_chat_template(trained.tokenizer, settings)
        generator = Generator(trained, settings.max_new_tokens)
        num_done = len(asked) - len(missing)
        with (
            doing(f"answering with {model}", path.parent),
            tqdm(total=len(asked), initial=num_done, desc=printable(model_id), unit="question") as bar,
        ):
            # batches are made of all questions, so that a resumed run draws the same samples
            for batch in _batches(asked, settings.batch_size):
                batch = [question for question in batch if question.question_id not in known]
                if not batch:
                    continue
                append_records(path, answer_batch(generator, batch, model_id, settings.num_choices))
                bar.update(len(batch))
        answers = read_answers(path)
        order = [question.question_id for question in asked]
        others = [question_id for question_id in answers if question_id not in set(order)]
        write_records(path, [answers[question_id] for question_id in order + others])
        for what, count in generator.counts.items():
            if count:
                say(f"{count} {what}.")
    say(f"Written: {path}")
    return path


def answer_batch(
    generator: Generator, questions: list[Question], model_id: str, num_choices: int
) -> list[dict[str, Any]]:
    """Hold the conversations of questions that share a temperature -> FastChat's records."""
    temperature = temperature_of(questions[0])
    choices: list[list[dict[str, Any]]] = [[] for _ in questions]
    for index in range(num_choices):
        set_seed(index)
        conversations: list[list[dict[str, str]]] = [[] for _ in questions]
        for turn in range(max(len(question.turns) for question in questions)):
            going_on = [i for i, question in enumerate(questions) if turn < len(question.turns)]
            for i in going_on:
                conversations[i].append({"role": "user", "content": questions[i].turns[turn]})
            replies = generator.reply([conversations[i] for i in going_on], temperature)
            for i, reply in zip(going_on, replies, strict=True):
                conversations[i].append({"role": "assistant", "content": reply})
        for i, messages in enumerate(conversations):
            said = [message["content"] for message in messages if message["role"] == "assistant"]
            choices[i].append({"index": index, "turns": said})
    return [
        {
            "question_id": question.question_id,
            "answer_id": uuid.uuid4().hex,
            "model_id": model_id,
            "choices": choices[i],
            "tstamp": time.time(),
        }
        for i, question in enumerate(questions)
    ]


def temperature_of(question: Question) -> float:
    """FastChat's sampling temperature for the question's category."""
    return TEMPERATURES.get(question.category, OTHER_TEMPERATURE)


def _batches(questions: list[Question], batch_size: int) -> list[list[Question]]:
    by_temperature: dict[float, list[Question]] = {}
    for question in questions:
        by_temperature.setdefault(temperature_of(question), []).append(question)
    return [
        group[start : start + batch_size]
        for group in by_temperature.values()
        for start in range(0, len(group), batch_size)
    ]


def _with_chat_template(tokenizer: Any, settings: AnswerSettings) -> None:
    if settings.chat_template is not None:
        file = expanded(settings.chat_template)
        if not file.is_file():
            raise ValueError(f"chat_template: expected a Jinja file, found none at {settings.chat_template!r}.")
        tokenizer.chat_template = _template_of(file)
    if tokenizer.chat_template is None:
        raise ValueError(
            "chat_template: expected a tokenizer with a chat template, got one without: MT-Bench is a conversation. "
            "Name a Jinja file with --chat_template, the one that the model was trained with."
        )


def _deciding(settings: AnswerSettings) -> dict[str, Any]:
    values = {name: asdict(settings)[name] for name in ("max_new_tokens", "num_choices", "dtype")}
    template = settings.chat_template
    return {**values, "chat_template": None if template is None else _template_of(expanded(template))}


def _template_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"chat_template: expected a Jinja file in UTF-8, got {str(file)!r} ({error}).") from error


def _check_made_with(path: Path, key: dict[str, Any]) -> None:
    """Beside the answers lies what they were made with, so that a file never mixes two models."""
    note = path.with_suffix(".made_with.json")
    if path.exists():
        found = read_record(note) or {}
        different = sorted(name for name in key if name not in found or found[name] != key[name])
        if different:
            raise ValueError(
                f"model_id: expected answers of the same weights and settings in {str(path)!r}, which holds those of "
                f"others (different: {', '.join(different)}). Give another --model_id, or remove the file."
            )
    write_atomically(note, json.dumps(key, indent=1))
