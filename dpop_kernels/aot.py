"""Compile every kernel ahead of time, without a GPU, and show what each one takes of a multiprocessor.

    python -m dpop_kernels.aot [--target sm_90 --target gfx942]

Prints one row per launch and target: registers per thread, bytes of spill stores and loads, bytes of shared memory. For
NVIDIA these come from the ptxas inside the triton wheel, for AMD from the metadata of the assembly, which counts
spilled registers and not bytes. Exits with 1 if any kernel spills.
"""

import argparse
import io
import os
import re
import sys
from contextlib import redirect_stdout
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpop_kernels.kernels.launch import Launch

TARGETS: dict[str, tuple[str, Any, int]] = {
    "sm_80": ("cuda", 80, 32),  # A100
    "sm_90": ("cuda", 90, 32),  # H100, H200
    "sm_100": ("cuda", 100, 32),  # B200
    "gfx942": ("hip", "gfx942", 64),  # MI300
}

_TRITON_DTYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
}


class Usage(NamedTuple):
    """What one compiled kernel takes."""

    registers: int
    """32-bit registers per thread."""
    spill_stores: int
    """Bytes that ptxas spills per thread; for AMD the number of spilled registers."""
    spill_loads: int
    """Bytes read back; for AMD the number of spilled registers."""
    shared_memory: int
    """Bytes per program."""
    assembly: str
    """PTX or AMD's, to look for an instruction in."""
    machine_code: bytes = b""
    """What the device would load."""


class Source(NamedTuple):
    """A kernel and all that its compilation depends on."""

    kernel: Any
    """The function under `triton.jit`."""
    signature: dict[str, str]
    """Type of each parameter by name, "constexpr" for a constant."""
    constants: dict[str, Any]
    """Value of each constant by name."""
    attributes: dict[tuple[int], list]
    """What is known of a parameter by its place: that 16 divides it."""
    options: dict[str, Any]
    """Of the compiler: warps, stages."""


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m dpop_kernels.aot", description="Compile every kernel ahead of time, without a GPU."
    )
    parser.add_argument("--target", action="append", choices=TARGETS, help="may be repeated; all of them if absent")
    targets = parser.parse_args(arguments).target or list(TARGETS)
    # the kernels of an interpreted run cannot be compiled; triton reads this when it is imported, below
    os.environ["TRITON_INTERPRET"] = "0"
    spilled = False
    print(f"{'kernel':32}{'launch':30}{'target':8}{'registers':>10}{'spill st':>10}{'spill ld':>10}{'shared':>8}")
    for name, launch in all_launches().items():
        for target in targets:
            usage = compile_launch(launch, target)
            spilled |= usage.spill_stores > 0 or usage.spill_loads > 0
            print(
                f"{launch.kernel.__name__:31} {name:29} {target:8}{usage.registers:10}{usage.spill_stores:10}"
                f"{usage.spill_loads:10}{usage.shared_memory:8}"
            )
    return int(spilled)


def all_launches() -> dict[str, Launch]:
    """Every kind of launch that the package makes, by a name that tells what is special about it.

    Tensors without data go through the functions that make the real launches, so that what is compiled ahead of time
    cannot drift from what runs.
    """
    from dpop_kernels.backends import fused
    from dpop_kernels.losses import fused as fused_losses

    return {**fused.aot_launches(), **fused_losses.aot_launches()}


def compile_launch(launch: Launch, target: str) -> Usage:
    """Compile one launch for one of `TARGETS`, to machine code."""
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    return compile_source(Source(launch.kernel, *_specialise(launch), options), target)


def compile_source(source: Source, target: str) -> Usage:
    """Compile a kernel, of whomever it is, for one of `TARGETS`, to machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tree = ASTSource(source.kernel, source.signature, source.constants, source.attributes)
    if TARGETS[target][0] == "cuda":
        compiled, report = _compile_aloud(tree, target, source.options)
        assembly, machine_code = compiled.asm["ptx"], compiled.asm["cubin"]
        registers, spill_stores, spill_loads = _ptxas_usage(report)
    else:
        compiled = triton.compile(tree, target=GPUTarget(*TARGETS[target]), options=source.options)
        assembly, machine_code = compiled.asm["amdgcn"], compiled.asm["hsaco"]
        registers, spill_stores, spill_loads = _amdgcn_usage(assembly)
    return Usage(registers, spill_stores, spill_loads, compiled.metadata.shared, assembly, machine_code)


def _compile_aloud(source: Any, target: str, options: dict[str, Any]) -> tuple[Any, str]:
    """The compiled kernel and what the one run of ptxas reports, which Triton keeps to itself unless asked, and does
    not have where it finds a kernel in its cache."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget

    with knobs.nvidia.scope(), knobs.compilation.scope(), redirect_stdout(io.StringIO()) as report:
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True
        compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
    return compiled, report.getvalue()


def _specialise(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list]]:
    """The launch's arguments as `triton.jit` would see them -> types, constants, known divisibility.

    A pointer counts as aligned to 16 bytes and an integer as divisible by 16 where they are; 1 becomes a constant.
    """
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        is_specialised = not parameter.do_not_specialize
        is_one = type(value) is int and value == 1 and is_specialised
        is_divisible = False
        if parameter.is_constexpr or value is None or is_one:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, Tensor):
            signature[parameter.name] = "*" + _TRITON_DTYPES[value.dtype]
            is_divisible = True
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            is_divisible = value % 16 == 0
        if is_divisible and is_specialised:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _ptxas_usage(report: str) -> tuple[int, int, int]:
    """-> registers, bytes of spill stores, bytes of spill loads, as `ptxas -v` reports them."""
    return (
        _number(r"Used (\d+) registers", report),
        _number(r"(\d+) bytes spill stores", report),
        _number(r"(\d+) bytes spill loads", report),
    )


def _amdgcn_usage(assembly: str) -> tuple[int, int, int]:
    """-> vector registers, spilled registers twice (they are stored and loaded)."""
    spilled = _number(r"\.vgpr_spill_count:\s*(\d+)", assembly) + _number(r"\.sgpr_spill_count:\s*(\d+)", assembly)
    return _number(r"\.vgpr_count:\s*(\d+)", assembly), spilled, spilled


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    assert match, f"the compiler's report has changed: no {pattern!r} in\n{text[-2000:]}"
    return int(match.group(1))


if __name__ == "__main__":
    sys.exit(main())
