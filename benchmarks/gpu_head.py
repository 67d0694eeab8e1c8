"""Measure the head on a GPU: every way to its log-probs against the floors measured in the same run, in minutes.

    python -m benchmarks.gpu_head OUT               on an H100, under eight minutes; 24 GiB of memory
    python -m benchmarks.gpu_head OUT --rehearse    tiny shapes through the same code on a CPU, in Triton's interpreter

Appends one JSON record per case to OUT/gpu_head.jsonl as soon as it is there: interrupt it at any time. A case is first
compared with fp64, on rows (and rows of W's gradient) of the shape that is timed. Missing the precision contract is
recorded; a result off by more than ten times the contract is wrong and not timed, and the command exits with 1.

Logits are peaked as a language model's are: 1 - p runs from 1 to about 1e-7 over the tokens.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.truth import grad_weight_truth, head_truth, largest, logits_truth, relative, sample_rows, worst_row

CONTRACT_NATS = 1e-5
"""Largest error of a token's log-prob against fp64 on the same inputs."""
CONTRACT_GRAD = 3e-3
"""Relative error of a gradient in bf16, of grad_hidden in every row."""
WRONG = 10
"""Times the contract: beyond that it is not rounding, and the case is not timed."""


@dataclass(frozen=True)
class HeadShape:
    """One head's sizes."""

    num_tokens: int
    hidden_size: int
    vocab_size: int


@dataclass(frozen=True)
class Plan:
    """What is measured, and for how long."""

    frozen: HeadShape = HeadShape(16384, 4096, 131072)
    """Reference pass, and policy forward and backward, of a head without gradient."""
    trainable: HeadShape = HeadShape(4096, 4096, 128256)
    logits_rows: int = 8192
    logits_columns: int = 128256
    copy_bytes: int = 2 << 30
    gemm: tuple[int, int, int] = (8192, 4096, 16384)
    """M, K, N of the product whose rate is the floor."""
    other_tiles: tuple[tuple[int, int], ...] = ((2048, 4096), (1024, 4096), (2048, 8192))
    """Rows and columns of the tile of logits, which the frozen head is measured with besides those of `LAUNCH`."""
    num_checked: int = 64
    """Rows, and rows of W's gradient, that are compared with fp64."""
    repeats: int = 5
    """At least, and as many as fit in `seconds_per_case`."""
    seconds_per_case: float = 4.0
    deadline: float = 450.0
    """No case is begun later than this many seconds after the start."""


REHEARSAL = Plan(
    frozen=HeadShape(6, 32, 8300),  # two tiles of columns, so that both variants make exponentials
    trainable=HeadShape(5, 32, 8300),
    logits_rows=4,
    logits_columns=300,
    copy_bytes=1 << 16,
    gemm=(64, 32, 64),
    other_tiles=((4, 4096),),
    num_checked=4,
    repeats=2,
    seconds_per_case=0.0,
)


class Bench:
    """Runs cases and writes their records."""

    def __init__(self, plan: Plan, folder: Path, device: torch.device) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.plan, self.device = plan, device
        # a CPU has no 16-bit product with fp32 logits worth rehearsing
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.any_wrong = False
        self._path = folder / "gpu_head.jsonl"
        self._start = time.monotonic()
        self._run = environment(device)

    def is_late(self) -> bool:
        return time.monotonic() - self._start > self.plan.deadline

    def record(self, case: str, **fields: Any) -> None:
        line = json.dumps({"case": case, **fields, **self._run})
        with self._path.open("a") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(line, flush=True)

    def measure(self, function: Callable[[], object]) -> dict[str, Any]:
        """Times in ms (median, p20, p80) and the peak of memory over what was allocated before."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            function()
            torch.cuda.synchronize()
            workspace = (torch.cuda.max_memory_allocated() - before) / 2**20
        else:
            function()
            workspace = None
        times: list[float] = []
        start = time.monotonic()
        while len(times) < self.plan.repeats or (
            time.monotonic() - start < self.plan.seconds_per_case and len(times) < 200
        ):
            times.append(self._time(function))
        p20, *_, p80 = statistics.quantiles(times, n=5, method="inclusive")
        return {
            "median_ms": statistics.median(times),
            "p20_ms": p20,
            "p80_ms": p80,
            "repeats": len(times),
            "workspace_mib": workspace,
        }

    def _time(self, function: Callable[[], object]) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            function()
            return (time.perf_counter() - start) * 1e3
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


@dataclass(frozen=True)
class Floors:
    """What this device does in this run."""

    bytes_per_ms: float
    flop_per_ms: float


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_head", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="for gpu_head.jsonl")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU, in Triton's interpreter")
    parser.add_argument("--deadline", type=float, help="begin no case later than this many seconds after the start")
    options = parser.parse_args(arguments)
    if options.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported, below
    elif not torch.cuda.is_available():
        parser.error("no CUDA device here. Pass --rehearse to run tiny shapes on the CPU.")
    device = torch.device("cpu" if options.rehearse else "cuda")
    plan = REHEARSAL if options.rehearse else Plan()
    if options.deadline is not None:
        plan = replace(plan, deadline=options.deadline)
    bench = Bench(plan, options.folder, device)

    floors = measure_floors(bench)
    measure_head(bench, floors, "reference_pass", bench.plan.frozen, num_products=1)
    measure_head(bench, floors, "frozen_forward_backward", bench.plan.frozen, num_products=2)
    for tile in bench.plan.other_tiles:
        with tile_of(*tile):
            measure_head(
                bench, floors, "frozen_forward_backward", bench.plan.frozen, num_products=2, variants=("tiles",)
            )
    measure_head(bench, floors, "trainable_forward_backward", bench.plan.trainable, num_products=4, variants=("tiles",))
    measure_logits(bench, floors)
    return int(bench.any_wrong)


def measure_floors(bench: Bench) -> Floors:
    """Bandwidth of a copy, and rates of the matrix products: bf16 as torch gives it, and into our fp32 tile."""
    from dpop_kernels.kernels.launch import LAUNCH

    times = measure_copy(bench)
    bytes_per_ms = 2 * bench.plan.copy_bytes / times["median_ms"]
    bench.record("floor_copy", **times, gb_per_s=bytes_per_ms / 1e6)

    m, k, n = bench.plan.gemm
    left, right = gaussian(bench, m, k), gaussian(bench, n, k)
    out = torch.empty(m, n, device=bench.device, dtype=bench.dtype)
    times = bench.measure(lambda: torch.mm(left, right.T, out=out))
    flop_per_ms = 2 * m * k * n / times["median_ms"]
    bench.record("floor_gemm", shape=[m, k, n], **times, tflop_per_s=flop_per_ms / 1e9)
    rows, columns = min(LAUNCH.head_rows, m), min(LAUNCH.head_columns, n)
    if bench.device.type == "cuda":
        tile = torch.empty(rows, columns, device=bench.device)
        times = bench.measure(lambda: torch.mm(left[:rows], right[:columns].T, out_dtype=torch.float32, out=tile))
        rate = 2 * rows * k * columns / times["median_ms"]
        bench.record("gemm_into_fp32_tile", shape=[rows, k, columns], **times, tflop_per_s=rate / 1e9)
    return Floors(bytes_per_ms, flop_per_ms)


def measure_copy(bench: Bench) -> dict[str, Any]:
    source = torch.randn(bench.plan.copy_bytes // 4, device=bench.device)
    target = torch.empty_like(source)
    return bench.measure(lambda: target.copy_(source))


@contextmanager
def tile_of(rows: int, columns: int) -> Iterator[None]:
    """The head works in tiles of rows x columns while this lasts."""
    from dpop_kernels.backends import bounds, fused_tiles

    chosen = bounds.LAUNCH
    bounds.LAUNCH = fused_tiles.LAUNCH = replace(chosen, head_rows=rows, head_columns=columns)
    try:
        yield
    finally:
        bounds.LAUNCH = fused_tiles.LAUNCH = chosen


def measure_head(
    bench: Bench,
    floors: Floors,
    case: str,
    shape: HeadShape,
    *,
    num_products: int,
    variants: tuple[str, ...] = ("tiles", "gemm"),
) -> None:
    """One case of the head in some variants: checked, then timed."""
    from benchmarks import gemm_head
    from dpop_kernels.backends import bounds, fused_tiles
    from dpop_kernels.logps import tiling
    from dpop_kernels.logps.head import Head

    ways: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "tiles": lambda states, weight, ids: tiling.tiled_token_logps(fused_tiles, states, Head(weight), ids)[0],
        "gemm": lambda states, weight, ids: gemm_head.gemm_token_logps(states, weight, ids),
    }
    hidden_states, weight, target_ids = head_inputs(bench, shape)
    grad_logps = torch.linspace(0.5, 1.5, shape.num_tokens, device=bench.device)
    hidden_states.requires_grad_(case != "reference_pass")
    weight.requires_grad_(case == "trainable_forward_backward")
    leaves = [tensor for tensor in (hidden_states, weight) if tensor.requires_grad]
    floor_ms = num_products * 2 * shape.num_tokens * shape.hidden_size * shape.vocab_size / floors.flop_per_ms
    tile = [bounds.LAUNCH.head_rows, bounds.LAUNCH.head_columns]
    for variant in variants:
        fields = {
            "variant": variant,
            "tile": tile,
            "shape": asdict(shape),
            "dtype": str(bench.dtype),
            "products": num_products,
        }
        if bench.is_late():
            bench.record(case, **fields, skipped="past the deadline")
            continue

        def step(way: Any = ways[variant]) -> tuple[Tensor, tuple[Tensor, ...]]:
            logps = way(hidden_states, weight, target_ids)
            return logps.detach(), torch.autograd.grad(logps, leaves, grad_logps) if leaves else ()

        try:
            errors = head_errors(step(), hidden_states, weight, target_ids, grad_logps, bench.plan.num_checked)
            times = None if is_wrong(errors) else bench.measure(step)
        except Exception as error:  # one variant that fails to run must not cost the others their figures
            bench.any_wrong = True
            bench.record(case, **fields, failed=f"{type(error).__name__}: {error}"[:2000])
            continue
        if times is None:
            bench.any_wrong = True
            bench.record(case, **fields, **errors, skipped="wrong result")
            continue
        bench.record(case, **fields, **errors, **times, floor_ms=floor_ms, times_floor=times["median_ms"] / floor_ms)


@torch.no_grad()
def head_errors(
    result: tuple[Tensor, tuple[Tensor, ...]],
    hidden_states: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    target_ids: Tensor,  # [N]
    grad_logps: Tensor,  # [N]
    num_checked: int,
) -> dict[str, Any]:
    """Errors against fp64 on the same inputs, on rows spread over all tokens; NaN counts as infinitely wrong."""
    logps, grads = result
    checked = sample_rows(hidden_states.shape[0], num_checked, weight.device)
    truth = head_truth(hidden_states[checked], weight, target_ids[checked])
    errors = {"max_error_nats": largest((logps[checked].double() - truth.logps).abs())}
    if grads:
        true_grad = truth.grad_hidden * grad_logps[checked].double().unsqueeze(-1)
        errors["grad_hidden_relative"] = worst_row(grads[0][checked], true_grad)
    if len(grads) == 2:
        columns = target_ids[checked[:: max(1, len(checked) // 8)]].unique()
        true_grad = grad_weight_truth(hidden_states, weight, target_ids, grad_logps, columns)
        errors["grad_weight_relative"] = relative(grads[1][columns], true_grad)
    errors["meets_contract"] = not is_wrong(errors, times=1)
    errors["num_checked"] = len(checked)
    return errors


def is_wrong(errors: dict[str, Any], times: float = WRONG) -> bool:
    """Whether any error is above `times` its bound."""
    bounds = {
        "max_error_nats": CONTRACT_NATS,
        "grad_hidden_relative": CONTRACT_GRAD,
        "grad_weight_relative": CONTRACT_GRAD,
        "max_grad_error": CONTRACT_GRAD,
    }
    return any(errors[name] > times * bound for name, bound in bounds.items() if name in errors)


def measure_logits(bench: Bench, floors: Floors) -> None:
    """Logits that exist: forward, and backward written over them. Floors are their bytes at the copy's bandwidth."""
    from dpop_kernels.backends import fused_logits, fused_tiles
    from dpop_kernels.logps.head import PLAIN

    shape = [bench.plan.logits_rows, bench.plan.logits_columns]
    if bench.is_late():
        bench.record("logits", shape=shape, skipped="past the deadline")
        return
    logits = gaussian(bench, *shape) * 3
    target_ids = torch.randint(shape[1], (shape[0],), device=bench.device)
    rows = torch.arange(shape[0], device=bench.device)
    logits[rows, target_ids] += torch.linspace(0, 28, shape[0], device=bench.device).to(bench.dtype)
    checked = rows[:: max(1, shape[0] // bench.plan.num_checked)]
    results = fused_logits.row_results(logits, target_ids)
    true_logps, true_grad = logits_truth(logits[checked], target_ids[checked])
    errors = {"max_error_nats": largest((results.logps[checked].double() - true_logps).abs())}
    grad_logps = torch.ones_like(results.logps)
    num_bytes = logits.numel() * logits.itemsize

    times = bench.measure(lambda: fused_logits.row_results(logits, target_ids))
    finish_logits(bench, floors, "logits_forward", shape, errors, times, num_bytes)

    def backward() -> None:
        fused_tiles.tile_backward(logits, target_ids, results.logps, results.lse, grad_logps, PLAIN, out=logits)

    # over the logits: after the first run the values are gradients, which take as long
    backward()
    errors = {"max_grad_error": largest((logits[checked].double() - true_grad).abs().amax(dim=1))}
    times = bench.measure(backward)
    finish_logits(bench, floors, "logits_backward_in_place", shape, errors, times, 2 * num_bytes)


def finish_logits(
    bench: Bench,
    floors: Floors,
    case: str,
    shape: list[int],
    errors: dict[str, Any],
    times: dict[str, Any],
    num_bytes: int,
) -> None:
    """Record a case that is bound by its bytes, as a fraction of the copy's bandwidth; a wrong one without times."""
    if is_wrong(errors):
        bench.any_wrong = True
        bench.record(case, shape=shape, **errors, skipped="wrong result")
        return
    rate = num_bytes / times["median_ms"]
    bench.record(
        case, shape=shape, **errors, **times, gb_per_s=rate / 1e6, of_copy_bandwidth=rate / floors.bytes_per_ms
    )


def head_inputs(bench: Bench, shape: HeadShape) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight, targets: logits of deviation 3, and targets lifted by 0 to 32 nats over the tokens."""
    weight = gaussian(bench, shape.vocab_size, shape.hidden_size) / shape.hidden_size**0.5
    target_ids = torch.randint(shape.vocab_size, (shape.num_tokens,), device=bench.device)
    direction = weight[target_ids] / weight[target_ids].float().square().sum(-1, keepdim=True).to(bench.dtype)
    lift = torch.linspace(0, 32, shape.num_tokens, device=bench.device, dtype=bench.dtype).unsqueeze(-1)
    return 3 * gaussian(bench, shape.num_tokens, shape.hidden_size) + lift * direction, weight, target_ids


def gaussian(bench: Bench, *shape: int) -> Tensor:
    return torch.randn(*shape, device=bench.device, dtype=bench.dtype)


def environment(device: torch.device) -> dict[str, Any]:
    """Device, versions and commit, the same in every record of a run."""
    import triton

    try:
        command = ["git", "rev-parse", "HEAD"]
        run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
        commit = run.stdout.strip() or None
    except OSError:  # a machine without git
        commit = None
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu, interpreted",
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda},
        "commit": commit,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


if __name__ == "__main__":
    torch.manual_seed(0)
    sys.exit(main())
