"""Machine code of NVIDIA's read: its instructions, its loops, what they load, multiply and keep in local memory."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

LINE = re.compile(r"^\s*(?:(?P<label>\.L_x_\d+):|/\*(?P<place>[0-9a-f]{4,})\*/\s+(?P<text>[^;]*);)", re.MULTILINE)
"""A label, or an instruction with its place in bytes."""
INSTRUCTION = re.compile(r"(?:@!?U?P[0-9T]+\s+)?(?P<operation>[A-Z0-9_.]+)(?P<operands>.*)", re.DOTALL)
LOADS = ("LDG", "LDGSTS")
"""From global memory, to registers or to shared memory; a tensor-memory load (`UTMALDG`) takes whole tiles."""
TILE_LOADS, LOCAL = ("UTMALDG",), ("LDL", "STL")
PRODUCTS = {"HMMA": "mma", "HGMMA": "wgmma", "UTCHMMA": "tcgen05"}
"""The tensor cores' instructions: Ampere's, Hopper's, Blackwell's."""


class Part(tuple[str, ...]):
    """Instructions that are executed together, each by its operation with all that modifies it: `LDG.E.128`."""

    __slots__ = ()

    def number(self, *names: str, bits: int | None = None) -> int:
        """Of the instructions of these names; of those only that move so many bits at once."""
        split = [operation.split(".") for operation in self]
        return sum(parts[0] in names and (bits is None or str(bits) in parts[1:]) for parts in split)


class Code(NamedTuple):
    """A kernel's machine code."""

    loops: list[Part]
    """Those with no loop inside, in the order in which they stand."""
    straight: Part
    """What is in no loop."""
    whole: Part
    """All of it, without what fills it up at its end."""

    @property
    def products(self) -> set[str]:
        """By which of the tensor cores' instructions it multiplies."""
        return {name for operation, name in PRODUCTS.items() if self.whole.number(operation)}


def read(machine_code: bytes) -> Code:
    """A cubin with one kernel -> its code."""
    return parse(disassembled(machine_code))


def disassembled(machine_code: bytes) -> str:
    """By the nvdisasm that comes with triton."""
    from triton.backends import nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(machine_code)
        file.flush()
        run = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True)
    return run.stdout


def parse(text: str) -> Code:
    """nvdisasm's listing -> the code, without what fills it up at its end."""
    labels: dict[str, int] = {}
    operations: list[str] = []
    jumps: list[tuple[int, str]] = []
    for found in LINE.finditer(text):
        if found["label"]:
            labels[found["label"]] = len(operations)
            continue
        instruction = INSTRUCTION.match(found["text"].strip())
        assert instruction, f"the disassembler's listing has changed: {found[0]!r}"
        operation = instruction["operation"]
        if operation.startswith("BRA"):
            target = re.search(r"\.L_x_\d+", instruction["operands"])
            assert target, found[0]
            jumps.append((len(operations), target[0]))
        operations.append(operation)
    # a loop ends where it jumps back
    loops = [(labels[label], place) for place, label in jumps if labels[label] < place]
    innermost = sorted((first, last) for first, last in loops if not any(first < f and t < last for f, t in loops))
    in_loops = {place for first, last in loops for place in range(first, last + 1)}
    # behind the last exit stand a jump to itself and what fills the code up
    exits = [place for place, operation in enumerate(operations) if operation == "EXIT"]
    end = max([*exits, *in_loops], default=-1)
    straight = Part(operations[place] for place in range(end + 1) if place not in in_loops)
    return Code(
        [Part(operations[first : last + 1]) for first, last in innermost], straight, Part(operations[: end + 1])
    )
