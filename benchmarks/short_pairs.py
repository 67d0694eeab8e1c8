"""Keep the pairs that fit in so many tokens, so that a comparison on a CPU ends within a day (docs/paper.md).

    python -m benchmarks.short_pairs PAIRS TOKENIZER NUM_TOKENS OUT.jsonl

Pairs are read in any form and written in the one that they came to: text or messages. How many there were is printed.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from dpop_trainer.data import load_pairs, tokenise_pairs
from dpop_trainer.data.convert import convert_pairs, row_pair
from transformers import AutoTokenizer


def short_pairs(source: str, tokenizer: Any, num_tokens: int) -> tuple[list[dict[str, Any]], int]:
    """-> those whose prompt and longer answer, with its end, have at most so many tokens; the number of all."""
    rows = convert_pairs(load_pairs(source))
    tokenised, _ = tokenise_pairs(rows, tokenizer, on_bad_record="skip")
    kept = []
    for pair in tokenised:
        ids: Any = pair
        if len(ids["prompt_ids"]) + max(len(ids["chosen_ids"]), len(ids["rejected_ids"])) <= num_tokens:
            row: Any = rows[ids["pair_id"]]
            kept.append(row_pair(row["kind"], row["pair"])._asdict())
    return [{key: value for key, value in pair.items() if value != {}} for pair in kept], len(rows)


def main(argv: list[str] | None = None) -> None:
    """Write them as JSON lines."""
    parser = argparse.ArgumentParser("python -m benchmarks.short_pairs", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pairs", help="a file of pairs")
    parser.add_argument("tokenizer", help="of the model that is to be trained: folder or hub id")
    parser.add_argument("num_tokens", type=int)
    parser.add_argument("out", type=Path)
    options = parser.parse_args(argv)
    kept, of = short_pairs(options.pairs, AutoTokenizer.from_pretrained(options.tokenizer), options.num_tokens)
    options.out.write_text("".join(json.dumps(pair) + "\n" for pair in kept), encoding="utf-8")
    print(f"{options.out}: {len(kept):,} of {of:,} pairs have at most {options.num_tokens} tokens")


if __name__ == "__main__":
    main()
