"""Shared by all tests: kernels interpreted where there is no GPU, one thread per worker, NaN-poisoned allocations."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import third_party

third_party.drop_deprecations_between_libraries()  # before the libraries take `warn` by name

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # must be set before triton is imported
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(int(os.environ.get("DPOP_TEST_THREADS", "1")))
os.environ["HF_HUB_OFFLINE"] = "1"
# `with torch.device(...)` lists torch's allocating functions at its first use: now, while they are not poisoned yet
with torch.device("meta"):
    torch.empty(0)
# what an earlier run of the tests has computed must not stand in for what this one is to compute
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="dpop-tests-")
atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

with torch.device("meta"):  # torch remembers which functions it moves there: before they are wrapped below
    torch.empty(0)

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poison_empty(monkeypatch):
    """Every uninitialised allocation made from Python holds NaN (or the largest integer): an unwritten output shows."""

    def poisoned(allocate):
        def wrapper(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
            elif tensor.dtype in (torch.int32, torch.int64):
                tensor.fill_(torch.iinfo(tensor.dtype).max)
            return tensor

        return wrapper

    for owner, name in [(torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")]:
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Public data sets beside the checkout."""
    return _present(SHARED / "data")


@pytest.fixture(scope="session")
def tiny_llama() -> Path:
    """A pretrained Llama of 260 thousand parameters, beside the checkout."""
    return _present(SHARED / "models" / "stories260K")


def _present(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"{path.relative_to(SHARED.parent)} is not beside this checkout")
    return path
