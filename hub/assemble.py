"""Lay the kernels out as Hugging Face's `kernels` package loads them.

    python hub/assemble.py [build/hub]

    build.toml, torch-ext/dpop_kernels/    a project for kernel-builder, which builds and uploads
    build/torch-cpu, -cuda, -rocm          what `kernels.get_local_kernel` loads, one folder per backend

A kernel from the Hub is imported by path under a name of its own, so that two versions can live in one process, and may
import nothing but itself, torch and the standard library. Therefore the package's absolute imports become relative ones
here, and what needs more (TRL) or serves development (ahead-of-time compilation) is left out.
"""

import base64
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

import tomllib

ROOT = Path(__file__).parents[1]
PACKAGE = "dpop_kernels"
LEFT_OUT = ("aot.py", "integrations")


def assemble(out: Path) -> list[Path]:
    """Write the project and its variants below `out`, which is emptied first -> the variants' folders."""
    general = tomllib.loads((ROOT / "hub" / "build.toml").read_text())["general"]
    shutil.rmtree(out, ignore_errors=True)
    source = out / "torch-ext" / general["name"].replace("-", "_")
    source.mkdir(parents=True)
    for name in ("hub/build.toml", "LICENSE"):
        shutil.copy(ROOT / name, out)
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        relative = path.relative_to(ROOT / PACKAGE)
        if relative.parts[0] not in LEFT_OUT:
            target = source / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(with_relative_imports(path.read_text(encoding="utf-8"), relative), encoding="utf-8")
    return [_write_variant(out, source, backend, general) for backend in general["backends"]]


def with_relative_imports(text: str, relative: Path) -> str:
    """`from dpop_kernels.a import b` as seen from the module at `relative` in the package."""
    dots = "." * len(relative.parts)
    return re.sub(rf"^(\s*from ){PACKAGE}(?:\.(\S+))?( import )", rf"\1{dots}\2\3", text, flags=re.MULTILINE)


def _write_variant(out: Path, source: Path, backend: str, general: dict) -> Path:
    variant = out / "build" / f"torch-{backend}"
    shutil.copytree(source, variant)
    files = {
        path.relative_to(variant).as_posix(): base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
        for path in sorted(variant.rglob("*.py"))
    }
    contents = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    metadata = {
        "name": general["name"],
        # unlike a version or a tag, the contents' own hash cannot stand for two different kernels
        "id": f"_{source.name}_{backend}_{contents[:7]}",
        "version": general["version"],
        "license": general["license"],
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": files},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return variant


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "hub"
    for written in assemble(folder):
        print(written)
