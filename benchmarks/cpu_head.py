"""Measure the head on a CPU: ours, eager PyTorch, TRL's kernel and the bare matrix products, each in its own process.

    python -m benchmarks.cpu_head OUT.jsonl                    about three minutes on two cores
    python -m benchmarks.cpu_head OUT.jsonl --rehearse         tiny shapes, seconds

Hidden states [N, H] and weight [V, H] in fp32, forward and backward, minimum of three after a warm-up. Memory is the
peak of the resident set over what it was with the inputs made, torch loaded and one tiny call done. Each candidate's
log-probs and gradients are held against fp64 on a sample of rows first; one that is off is recorded and not timed.
TRL takes part where it is installed (its version is in the record).
"""

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.measure import peak_resident_bytes

NUM_RUNS = 3
WARM_UPS = 1
# what fp32 logits of size 40 allow, with room; beyond it a result is wrong and is not timed
LARGEST_ERROR = 1e-4


class Shape(NamedTuple):
    num_tokens: int
    hidden_size: int
    vocab_size: int


SHAPE = Shape(2048, 1024, 32000)
REHEARSAL = Shape(64, 32, 500)


class Inputs(NamedTuple):
    hidden_states: Tensor
    weight: Tensor
    target_ids: Tensor
    grad_logps: Tensor


def make_inputs(shape: Shape) -> Inputs:
    """Logits peaked as a language model's are: 1 - p from 1 to about 1e-6 over the tokens."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape.vocab_size, shape.hidden_size, generator=generator) / shape.hidden_size**0.5
    target_ids = torch.randint(shape.vocab_size, (shape.num_tokens,), generator=generator)
    hidden_states = torch.randn(shape.num_tokens, shape.hidden_size, generator=generator)
    hidden_states += weight[target_ids] * torch.linspace(0, 24, shape.num_tokens).unsqueeze(-1)
    return Inputs(hidden_states, weight, target_ids, torch.linspace(-1, 1, shape.num_tokens))


def ours(hidden_states: Tensor, weight: Tensor, target_ids: Tensor) -> Tensor:
    from dpop_kernels import linear_token_logps

    return linear_token_logps(hidden_states, weight, target_ids)


def eager(hidden_states: Tensor, weight: Tensor, target_ids: Tensor) -> Tensor:
    log_probs = (hidden_states @ weight.T).log_softmax(-1)
    return log_probs.gather(-1, target_ids.unsqueeze(-1)).squeeze(-1)


def trl(hidden_states: Tensor, weight: Tensor, target_ids: Tensor) -> Tensor:
    from benchmarks.peers import trl as peer

    return peer.linear_logps(hidden_states, weight, target_ids, None)


CANDIDATES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"ours": ours, "eager": eager, "trl": trl}


def products(inputs: Inputs, trainable: bool) -> None:
    """The floor: two products for a frozen head, four for a trainable one, into memory that is there already."""
    logits, grad_hidden, grad_weight = products.buffers  # type: ignore[attr-defined]
    torch.mm(inputs.hidden_states, inputs.weight.T, out=logits)
    if trainable:
        torch.mm(inputs.hidden_states, inputs.weight.T, out=logits)
        torch.mm(logits.T, inputs.hidden_states, out=grad_weight)
    torch.mm(logits, inputs.weight, out=grad_hidden)


def step(function: Callable[..., Tensor], inputs: Inputs, trainable: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    hidden_states = inputs.hidden_states.detach().requires_grad_()
    weight = inputs.weight.detach().requires_grad_(trainable)
    logps = function(hidden_states, weight, inputs.target_ids)
    logps.backward(inputs.grad_logps)
    assert hidden_states.grad is not None
    return logps.detach(), hidden_states.grad, weight.grad


def errors(function: Callable[..., Tensor], inputs: Inputs) -> dict[str, float]:
    """Against fp64 on every 32nd token: of log-probs in nats, of their sum, of the gradient in each row, relative."""
    sample = Inputs(inputs.hidden_states[::32], inputs.weight, inputs.target_ids[::32], inputs.grad_logps[::32])
    truth_inputs = Inputs(*(t.double() if t.is_floating_point() else t for t in sample))
    truth, true_grad, _ = step(eager, truth_inputs, trainable=False)
    logps, grad, _ = step(function, sample, trainable=False)
    scored = true_grad.norm(dim=1) > 0
    row_errors = (grad - true_grad).norm(dim=1)[scored] / true_grad.norm(dim=1)[scored]
    return {
        "logp_error_nats": float((logps - truth).abs().max()),
        "logp_relative_error": float(((logps - truth) / truth).abs().max()),
        "grad_hidden_row_error": float(row_errors.max()),
    }


def measure(candidate: str, trainable: bool, shape: Shape) -> dict[str, Any]:
    """One candidate in this process -> its record."""
    inputs = make_inputs(shape)
    record: dict[str, Any] = {"candidate": candidate, "head": "trainable" if trainable else "frozen"}
    function = CANDIDATES.get(candidate)
    if candidate == "products":
        sizes = [(shape.num_tokens, shape.vocab_size), (shape.num_tokens, shape.hidden_size)]
        products.buffers = [torch.empty(*size) for size in [*sizes, inputs.weight.shape]]  # type: ignore[attr-defined]

        def run() -> None:
            products(inputs, trainable)
    else:
        assert function is not None

        def run() -> None:
            step(function, inputs, trainable)

        step(function, make_inputs(REHEARSAL), trainable)  # libraries loaded, threads started
    before = peak_resident_bytes()
    times = []
    for _ in range(WARM_UPS + NUM_RUNS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    record |= {"seconds": min(times[WARM_UPS:]), "all_seconds": times[WARM_UPS:]}
    if function is not None:
        record["peak_mib"] = (peak_resident_bytes() - before) / 2**20
        record |= errors(function, inputs)
        if not record["logp_error_nats"] <= LARGEST_ERROR:
            record |= {"seconds": None, "all_seconds": None, "refused": "wrong result"}
    return record


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.cpu_head", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="JSON lines; records are appended as they come")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes")
    parser.add_argument("--one", nargs=2, metavar=("CANDIDATE", "HEAD"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    shape = REHEARSAL if options.rehearse else SHAPE
    if options.one:
        candidate, head = options.one
        print(json.dumps(measure(candidate, head == "trainable", shape)))
        return 0
    options.out.parent.mkdir(parents=True, exist_ok=True)
    common = {"benchmark": "cpu_head", "shape": shape._asdict(), "dtype": "float32", **machine()}
    for head in ("frozen", "trainable"):
        for candidate in ("products", *CANDIDATES):
            if candidate == "trl" and importlib.util.find_spec("trl") is None:
                print(f"{head:10} {candidate:10} skipped: TRL is not installed")
                continue
            if options.rehearse:  # nothing is timed: in this process, which has the libraries imported
                record = measure(candidate, head == "trainable", shape)
            else:
                command = [sys.executable, "-m", "benchmarks.cpu_head", str(options.out), "--one", candidate, head]
                result = subprocess.run(command, check=True, capture_output=True, text=True)
                record = json.loads(result.stdout.splitlines()[-1])
            with options.out.open("a") as file:
                file.write(json.dumps({**common, **record}) + "\n")
            seconds = record["seconds"]
            print(
                f"{head:10} {candidate:10} {'refused' if seconds is None else f'{seconds:6.2f} s'}"
                f"  {record.get('peak_mib', 0):7.0f} MiB  {record.get('logp_error_nats', 0):.1e} nat"
            )
    return 0


def machine() -> dict[str, Any]:
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    if importlib.util.find_spec("trl") is not None:
        versions["trl"] = importlib.metadata.version("trl")
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return {
        "device": f"CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "versions": versions,
        "commit": git.stdout.strip() or None,
        "date": time.strftime("%Y-%m-%d"),
    }


if __name__ == "__main__":
    sys.exit(main())
