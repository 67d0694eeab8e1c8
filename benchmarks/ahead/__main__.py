"""Compile kernels for GPUs that are not here, and write down what that tells of them.

    python -m benchmarks.ahead OUT.jsonl                        this package's kernels and flat attention's
    python -m benchmarks.ahead OUT.jsonl --target sm_90 --only kernels

A record per kernel and target: what it takes of a multiprocessor, what its hot part is made of, and the times that
arithmetic gives. The same versions give the same record on every machine. It takes five minutes.
"""

import argparse
import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import records


def main(argv: list[str] | None = None) -> int:
    # the kernels of an interpreted run cannot be compiled; triton reads this when it is imported, below
    os.environ["TRITON_INTERPRET"] = "0"
    from benchmarks.ahead.inductor import DEVICES

    parser = argparse.ArgumentParser("python -m benchmarks.ahead", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="JSON lines; records are appended")
    parser.add_argument("--target", action="append", choices=DEVICES, help="may be repeated; all of them if absent")
    parser.add_argument("--only", choices=("kernels", "attention"))
    options = parser.parse_args(argv)
    versions = {name: records.version(name) for name in ("torch", "triton", "transformers")}
    for target in options.target or DEVICES:
        halves = {"kernels": of_kernels, "attention": of_attention}
        for record in itertools.chain.from_iterable(
            half(target) for name, half in halves.items() if options.only in (None, name)
        ):
            common = {"benchmark": "ahead", "target": target, "versions": versions, "commit": records.commit()}
            records.append(options.out, {**common, **record})
            print(f"{target}: {record['name']}: {record['registers']} registers, {record['spill_bytes']} B spilled")
    return 0


def of_kernels(target: str) -> Iterator[dict[str, Any]]:
    """Every launch that this package makes."""
    from benchmarks.ahead import work
    from benchmarks.ahead.sass import read
    from dpop_kernels import aot

    for name, launch in aot.all_launches().items():
        usage = aot.compile_launch(launch, target)
        code = read(usage.machine_code)
        record = {"name": name, "kernel": launch.kernel.__name__, **taken(usage), **counted(code)}
        hot, amount = work.hot_part(launch, code), work.elements_and_bytes(launch)
        if hot is not None:
            record["hot"] = described(hot)
            record["instructions_per_element"] = work.instructions_per_element(launch, hot)
            if amount is not None:
                elements, num_bytes = amount
                record["bytes_per_element"] = num_bytes / elements
                record["predicted_s"] = work.predicted_seconds(elements, num_bytes, record["instructions_per_element"])
        yield record


def of_attention(target: str) -> Iterator[dict[str, Any]]:
    """FlexAttention's own kernels for flat rows, for the first length of a process and for all that follow."""
    from dpop_trainer.batches.flat_attention import BLOCK_SIZE

    from benchmarks.ahead import flex, work
    from benchmarks.ahead.sass import read
    from dpop_kernels import aot

    rows = flex.rows()
    seen = flex.computed_blocks(rows[0])
    for model, heads in flex.SHAPES.items():
        for (direction, lengths), template in flex.written(target, heads, rows).items():
            usage = aot.compile_source(template.source, target)
            code = read(usage.machine_code)
            seconds = work.attention_seconds(
                code.loops,
                direction=direction,
                tiles=template.constants,
                num_warps=template.source.options["num_warps"],
                num_heads=heads.queries,
                head_size=heads.size,
                scores=[blocks * BLOCK_SIZE**2 for blocks in seen],
            )
            yield {
                "name": f"{model}, {direction}, {lengths}",
                "model": model,
                "direction": direction,
                "lengths": lengths,
                "positions": rows[0].shape[1],
                "blocks": seen,
                **taken(usage),
                **counted(code),
                "loops": [described(loop) for loop in code.loops],
                "predicted_s": seconds,
            }


def taken(usage: Any) -> dict[str, int]:
    """Of a multiprocessor."""
    return {
        "registers": usage.registers,
        "spill_bytes": usage.spill_stores + usage.spill_loads,
        "shared_memory": usage.shared_memory,
    }


def counted(code: Any) -> dict[str, Any]:
    return {"instructions": len(code.whole), "products": sorted(code.products)}


def described(part: Any) -> dict[str, int]:
    """What a part is made of, as far as it tells how fast it is."""
    from benchmarks.ahead import sass

    return {
        "instructions": len(part),
        "loads": part.number(*sass.LOADS),
        "wide_loads": part.number(*sass.LOADS, bits=128),
        "tile_loads": part.number(*sass.TILE_LOADS),
        "local": part.number(*sass.LOCAL),
        "products": part.number(*sass.PRODUCTS),
    }


if __name__ == "__main__":
    sys.exit(main())
