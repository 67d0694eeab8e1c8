"""The registry's backends as parameters of tests: one that is registered is tested, without a second list of names.

Where there is no GPU, Triton's kernels run on the CPU, interpreted. A backend that cannot run here is skipped with its
own reason.
"""

import importlib

import pytest
import torch

from dpop_kernels.backends import BACKENDS

CPU = torch.device("cpu")
DEVICES = [CPU, *([torch.device("cuda")] if torch.cuda.is_available() else [])]


def module_of(backend):
    return importlib.import_module(BACKENDS[backend].module, "dpop_kernels.backends")


def device_of(backend):
    """The first device here on which it runs, or None."""
    return next((device for device in DEVICES if BACKENDS[backend].why_not(device, torch.float32) is None), None)


def _where_possible(backends, devices):
    for backend in backends:
        reasons = [BACKENDS[backend].why_not(device, torch.float32) for device in devices]
        yield pytest.param(backend, marks=pytest.mark.skipif(None not in reasons, reason=f"{backend}: {reasons[-1]}"))


DEFINITION = "reference"
"""The one that is truth in fp64: of the others it knows nothing."""
EVERY = list(_where_possible(BACKENDS, DEVICES))
"""Each on a device of its own: with the fixture `on_its_device`, or `device_of`."""
CANDIDATES = list(_where_possible([name for name in BACKENDS if name != DEFINITION], DEVICES))
"""Those that are held against the definition; each on a device of its own."""
ON_CPU = list(_where_possible(BACKENDS, [CPU]))
"""Each with tensors on the CPU."""
TILED = [name for name in BACKENDS if module_of(name).TILES is not None]
"""Names of those by which `logps.tiling` walks a head."""
WITH_TILES = list(_where_possible(TILED, [CPU]))
"""The same, with tensors on the CPU."""
WITHOUT_TILES = list(_where_possible([name for name in BACKENDS if name not in TILED], DEVICES))
"""Those that compute a head's log-probs by themselves; each on a device of its own."""
IN_FP64 = [name for name in BACKENDS if BACKENDS[name].why_not(CPU, torch.float64) is None]
"""Those that take float64, with tensors on the CPU."""
