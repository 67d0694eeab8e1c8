"""Let a chat model answer the problems of a file of pairs, for `dpop pairs build from-samples` (docs/paper.md).

    python -m benchmarks.own_answers MODEL PAIRS.jsonl OUT.jsonl --num_problems 256

One greedy answer to each prompt of one user turn, written as {"question": ..., "sample": ...}. An answer that came to
no end is written as far as it came: it has no final answer, and `from-samples` counts it so.
"""

import argparse
import itertools
import json
from pathlib import Path

from dpop_trainer.measure.generation import generate_completions
from dpop_trainer.models.trained import load_trained


def main(argv: list[str] | None = None) -> None:
    """Write them as JSON lines."""
    parser = argparse.ArgumentParser("python -m benchmarks.own_answers", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="folder or hub id of a chat model")
    parser.add_argument("pairs", type=Path, help="JSONL with prompts as messages; those of several turns are left out")
    parser.add_argument("out", type=Path)
    parser.add_argument("--num_problems", type=int, default=256)
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=50)
    options = parser.parse_args(argv)
    trained = load_trained(options.model)
    with options.pairs.open(encoding="utf-8") as lines:
        prompts = (json.loads(line)["prompt"] for line in lines)
        turns = list(itertools.islice((prompt for prompt in prompts if len(prompt) == 1), options.num_problems))
    template = trained.tokenizer.apply_chat_template
    completions = generate_completions(
        trained.model,
        trained.tokenizer,
        [list(template(turn, add_generation_prompt=True, tokenize=True, return_dict=False)) for turn in turns],  # type: ignore[arg-type]
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        desc="Answers",
    )
    rows = [
        {"question": turn[0]["content"], "sample": completion.text.strip()}
        for turn, completion in zip(turns, completions, strict=True)
    ]
    options.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{options.out}: {len(rows):,} answers, {sum(one.has_ended for one in completions):,} came to an end")


if __name__ == "__main__":
    main()
