"""Shared by all tests: kernels interpreted where there is no GPU, one thread per worker, NaN-poisoned allocations."""

import atexit
import gc
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import third_party

third_party.drop_deprecations_between_libraries()  # before the libraries take `warn` by name
if "PYTEST_XDIST_WORKER" in os.environ:
    # of this process and of all that it starts: threads of two workers would wait for one another's cores
    os.environ["OMP_NUM_THREADS"] = os.environ.get("DPOP_TEST_THREADS", "1")

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # must be set before triton is imported
os.environ["HF_HUB_OFFLINE"] = "1"
# `with torch.device(...)` lists torch's allocating functions at its first use: now, while they are not poisoned yet
with torch.device("meta"):
    torch.empty(0)
# what an earlier run of the tests has computed must not stand in for what this one is to compute
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="dpop-tests-")
atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

gc.disable()  # until the tests are collected: what is imported until then is no garbage, and there is much of it

SHARED = Path(__file__).parents[2] / "shared"
HAS_SHARED = all((SHARED / name).is_dir() for name in ("data", "tokenizers", "models/stories260K"))


_seen_modules: set[str] = set()


def _keep_what_is_imported():
    """It stays until the end: transformers collects garbage after every training, and need not look through all objects
    of all libraries each time."""
    _seen_modules.update(sys.modules)
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items):
    """What forks comes first, and so on one worker: the process to fork from takes ten seconds to start."""
    items.sort(key=lambda item: item.get_closest_marker("forked") is None)


def pytest_collection_finish():
    if "triton.runtime.interpreter" in sys.modules:
        import interpreter

        interpreter.save_time()
    _keep_what_is_imported()


def pytest_runtest_logfinish():
    """Tests import libraries too; and xdist's own process, which collects none, hears of them here."""
    if len(sys.modules) > len(_seen_modules):
        _keep_what_is_imported()


@pytest.fixture(autouse=True)
def _seed():
    # where there is no GPU, `torch.manual_seed` would keep three stack traces for the day that one is there
    (torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed)(0)


@pytest.fixture
def on_its_device(request):
    """A test of a `backend` has its tensors where that runs: on a GPU what needs one, everything else on the CPU."""
    from backends import device_of  # here: most tests need no kernels

    callspec = getattr(request.node, "callspec", None)
    backend = callspec.params.get("backend") if callspec else None
    torch.set_default_device(device_of(backend) if backend else None)
    yield
    torch.set_default_device(None)


@pytest.fixture(autouse=True)
def _poison_empty(monkeypatch):
    """Every uninitialised allocation made from Python holds NaN (or the largest integer): an unwritten output shows."""

    def poisoned(allocate):
        def wrapper(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            if tensor.is_floating_point():
                tensor.detach().fill_(float("nan"))
            elif tensor.dtype in (torch.int32, torch.int64):
                tensor.detach().fill_(torch.iinfo(tensor.dtype).max)
            return tensor

        return wrapper

    for owner, name in [(torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")]:
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture
def flex_without_compiler(monkeypatch):
    """FlexAttention as torch defines it, in eager: no backward, and slow, but the same arithmetic."""
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(
        "transformers.integrations.flex_attention.compile_friendly_flex_attention",
        lambda query, key, value, training, **options: flex_attention(query, key, value, **options),
    )


@pytest.fixture(scope="session")
def generated(tmp_path_factory) -> Path:
    """Stand-ins for the files of `../shared`."""
    folder = tmp_path_factory.mktemp("stand-ins")
    from stand_ins import write_stand_ins  # here: transformers is slow to import, and the kernels' tests need none

    write_stand_ins(folder)
    return folder


@pytest.fixture(scope="module", params=["generated", *(["real"] if HAS_SHARED else [])])
def shared(request) -> Path:
    """Folder of `data/`, `tokenizers/` and `models/`: the generated files, and the real ones where they are as well."""
    return SHARED if request.param == "real" else request.getfixturevalue("generated")


@pytest.fixture(scope="session")
def shared_once(request) -> Path:
    """The same folder for tests that take seconds and learn nothing from the second kind: real files where they are."""
    return SHARED if HAS_SHARED else request.getfixturevalue("generated")


@pytest.fixture(scope="module")
def shared_data(shared) -> Path:
    """Data sets, in turn the generated and the real ones."""
    return shared / "data"


@pytest.fixture(scope="session")
def tiny_llama(shared_once) -> Path:
    """A Llama of some hundred thousand parameters that has learned to write stories: the real one where it is."""
    folder = shared_once / "models" / "stories260K"
    if not HAS_SHARED:
        from stand_ins import write_weights

        write_weights(folder)
    return folder
