"""Keep the pairs that fit in so many tokens, so that a comparison on a CPU ends within a day (docs/paper.md).

    python -m benchmarks.short_pairs PAIRS.jsonl TOKENIZER NUM_TOKENS OUT.jsonl

The lines are written as they are; how many there were is printed.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer


def num_tokens(tokenizer: Any, pair: dict[str, Any]) -> int:
    """Of the prompt of a pair in messages, asked for an answer, and the longer answer with its end of turn."""
    lengths = [
        len(tokenizer.apply_chat_template(pair["prompt"] + pair[side], tokenize=True, return_dict=False))
        for side in ("chosen", "rejected")
    ]
    return max(lengths)


def main(argv: list[str] | None = None) -> None:
    """Write those lines of the file as they are."""
    parser = argparse.ArgumentParser("python -m benchmarks.short_pairs", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pairs", type=Path, help="pairs in messages")
    parser.add_argument("tokenizer", help="of a chat model: folder or hub id")
    parser.add_argument("num_tokens", type=int)
    parser.add_argument("out", type=Path)
    options = parser.parse_args(argv)
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    lines = options.pairs.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if num_tokens(tokenizer, json.loads(line)) <= options.num_tokens]
    options.out.write_text("".join(kept), encoding="utf-8")
    print(f"{options.out}: {len(kept):,} of {len(lines):,} pairs have at most {options.num_tokens} tokens")


if __name__ == "__main__":
    main()
