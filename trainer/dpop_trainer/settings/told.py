"""What the command line says of an error: what was being done, with what, the cause's own words, and what to do."""

import os
import shutil
import sys
from collections.abc import Sequence

from dpop_trainer.data.no_room import is_full_disk, is_out_of_memory
from dpop_trainer.data.source_path import expanded
from dpop_trainer.run_folder.private import text_without_secrets
from dpop_trainer.settings.errors import folder_written_to, what_was_done

FAULT = (
    "Check what is named here. If it is sound, this is a fault of dpop-kernels: report it with what the same command "
    "shows under DPOP_DEBUG=1."
)
_NO_MEMORY = "Take a smaller batch, a shorter max_length or a smaller model: `dpop plan` says beforehand what fits."
_NO_FILE = "Check that it is there, whole, and yours to read and write, and give the command again."
_NO_LIBRARY = "Install it where this command runs: pip install 'dpop-kernels[trainer]' brings what is needed."
_OTHER_PROCESS = (
    "another process of this run has ended or does not answer; its own last lines say why. Then give the same command "
    "again: a run goes on from its last checkpoint."
)
# of gloo, NCCL and torch.distributed itself, where the other side of a connection is gone
_OF_OTHERS = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "store->", "tcpstore")
_MOST_WORDS = 2000


def told(argv: Sequence[str], error: Exception) -> str:
    """
    Args:
        argv: the command line, from the command's name.
        error: what ended it.

    Returns:
        Lines for a person, without the secrets that a value may hold. What this package raised is told as it is: it
        says by itself what was expected.
    """
    if is_full_disk(error):
        words = f"{_while(argv, error)}no space left on a disk ({error}). {_free_space(folder_written_to(error))}"
    elif is_ours(error):
        words = str(error)
    elif is_of_another_process(error):
        words = f"{_while(argv, error)}{_OTHER_PROCESS} ({str(error).strip().splitlines()[0][:200]})"
    else:
        cause = str(error).strip()[:_MOST_WORDS] or "without a word"
        words = f"{_while(argv, error)}{type(error).__name__}: {cause}\n{_remedy(error)}"
    return text_without_secrets(f"dpop {argv[0]}: {words}")


def is_ours(error: Exception) -> bool:
    """Whether this package raised it, in its own words, or a library did."""
    if not isinstance(error, (ValueError, FileNotFoundError)) or isinstance(error, UnicodeError):
        return False
    if isinstance(error, OSError) and error.errno is not None:  # the system's own words
        return False
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    name = last.tb_frame.f_globals.get("__name__", "") if last is not None else ""
    return name.partition(".")[0] in ("dpop_kernels", "dpop_trainer")


def is_of_another_process(error: Exception) -> bool:
    """Whether what this process waited for from another one of its run will never come."""
    words = str(error).lower()
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return several and isinstance(error, RuntimeError) and any(part in words for part in _OF_OTHERS)


def _while(argv: Sequence[str], error: Exception) -> str:
    doing = what_was_done(error)
    if doing is None:  # words that are files, and so no secrets
        named = list(dict.fromkeys(word for word in argv[1:] if os.path.exists(word)))
        doing = f"running `dpop {argv[0]}`" + (f" with {', '.join(named)}" if named else "")
    return f"while {doing}: "


def _remedy(error: Exception) -> str:
    words = str(error).lower()
    if is_out_of_memory(error) or "can't allocate" in words:
        return _NO_MEMORY
    if isinstance(error, ImportError):
        return _NO_LIBRARY
    return _NO_FILE if isinstance(error, OSError) else FAULT


def _free_space(folder: str | os.PathLike | None) -> str:
    """Where a run writes, and how much room there is: the error itself seldom says which file it was."""
    places = {} if folder is None else {"the folder written to": folder}
    places |= {"the working directory": ".", "TMPDIR": os.environ.get("TMPDIR", "/tmp")}
    if "datasets" in sys.modules:
        places["HF_DATASETS_CACHE"] = str(sys.modules["datasets"].config.HF_DATASETS_CACHE)
    told = []
    for name, place in places.items():
        path = expanded(place).absolute()
        existing = next((there for there in (path, *path.parents) if there.is_dir()), None)
        if existing is not None:
            told.append(f"{shutil.disk_usage(existing).free / 2**30:.1f} GiB in {name} ({path})")
    return f"Free: {', '.join(told)}. Make room where this command writes, and give it again."
