"""The two forms in which pairs are written: plain text with a scaffold around it, or messages for a chat template."""

from typing import Any, Literal

from dpop_trainer.tools.pairs.recipe import BuiltPair, Scaffold

OutputForm = Literal["text", "messages"]


def format_prompt(question: str) -> str:
    """The prompt of a problem. It ends with a colon, so no tokenizer merges it with the completion's first word."""
    return f"Question: {question}\nAnswer:"


def format_completion(answer: str) -> str:
    """The completion that belongs to `format_prompt`: the answer behind one space."""
    return f" {answer}"


def pair_fields(pair: BuiltPair, scaffold: Scaffold, form: OutputForm) -> dict[str, Any]:
    """prompt, chosen and rejected as `load_pairs` reads them, and what was edited.

    edit_start and edit_end count characters of the chosen answer as it is written here: of the text, or of the
    message's content.
    """
    edit = pair.edit
    shift = 0
    if form == "messages":
        fields: dict[str, Any] = {
            "prompt": [{"role": "user", "content": pair.prompt}],
            "chosen": [{"role": "assistant", "content": pair.chosen}],
            "rejected": [{"role": "assistant", "content": pair.rejected}],
        }
    else:
        prompt, chosen, rejected = text_fields(pair, scaffold)
        fields = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        shift = len(chosen) - len(pair.chosen)
    return fields | {
        "edit_original": edit.original,
        "edit_replacement": edit.replacement,
        "edit_start": edit.start + shift,
        "edit_end": edit.end + shift,
    }


def text_fields(pair: BuiltPair, scaffold: Scaffold) -> tuple[str, str, str]:
    """Prompt and answers as text.

    "question" writes "Question: ...\\nAnswer:" and " answer", "continuation" the prompt and " answer", "verbatim" all
    three as they are.
    """
    if scaffold == "verbatim":
        return pair.prompt, pair.chosen, pair.rejected
    prompt = format_prompt(pair.prompt) if scaffold == "question" else pair.prompt
    return prompt, format_completion(pair.chosen), format_completion(pair.rejected)
