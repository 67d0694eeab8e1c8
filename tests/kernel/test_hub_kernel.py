"""The kernels as Hugging Face's `kernels` loads them: the rules of its requirements page, and its own loader."""

import ast
import json
import os
import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("tomllib", reason="hub/assemble.py reads build.toml; Python 3.10 has no TOML reader")
ROOT = Path(__file__).parents[2]
ASSEMBLE = runpy.run_path(str(ROOT / "hub" / "assemble.py"))


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    out = tmp_path_factory.mktemp("hub") / "project"
    assert [variant.name for variant in ASSEMBLE["assemble"](out)] == ["torch-cpu", "torch-cuda", "torch-rocm"]
    return out


def run(code, *arguments):
    """Where no `dpop_kernels` can be imported, as on the machine of someone who has the kernel alone."""
    prelude = "import sys; sys.modules['dpop_kernels'] = None\n"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", prelude + code, *map(str, arguments)], check=True, env=environment)


# logits of zero hidden states are zero: log p = -log V, on either backend. The loss is the worked example of
# `dpop_loss`: z = 0.1 · (1 - 5 · 1), loss = log(1 + exp(0.4))
CHECK = """
import math, torch
def check(kernel):
    for backend in ("fused", "chunked"):
        hidden, weight = torch.zeros(3, 8, requires_grad=True), torch.randn(50, 8)
        logps = kernel.linear_token_logps(hidden, weight, torch.tensor([1, 49, 0]), backend=backend)
        assert torch.allclose(logps, torch.full((3,), -math.log(50)), atol=1e-5, rtol=0), (backend, logps)
        logps.sum().backward()
        # d log p / d h = W[y] - mean of W, where every token is equally likely
        expected = weight[[1, 49, 0]] - weight.mean(0)
        assert torch.allclose(hidden.grad, expected, atol=1e-5, rtol=0), backend
    of = lambda value: torch.tensor([value])
    loss = kernel.dpop_loss(of(-11.0), of(-14.0), of(-10.0), of(-12.0), beta=0.1, dpop_lambda=5.0)
    assert math.isclose(loss.item(), math.log1p(math.exp(0.4)), rel_tol=1e-6), loss
"""


def test_a_variant_runs_by_path_and_twice_in_one_process(project):
    code = (
        CHECK
        + """
import importlib.util, sys
def load(name):
    spec = importlib.util.spec_from_file_location(name, sys.argv[1])
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
first, second = load("_kernel_a"), load("_kernel_b")
check(first); check(second)
assert first.PairLosses is not second.PairLosses
assert {m.partition(".")[0] for m in sys.modules if m.endswith("backends.chunked")} == {"_kernel_a", "_kernel_b"}
"""
    )
    run(code, project / "build" / "torch-cpu" / "__init__.py")


def test_a_variant_imports_itself_torch_and_the_standard_library(project):
    files = sorted((project / "build" / "torch-cuda").rglob("*.py"))
    package = ROOT / "dpop_kernels"
    kept = {path.relative_to(package) for path in package.rglob("*.py")} - {Path("aot.py")}
    assert {path.relative_to(project / "build" / "torch-cuda") for path in files} == {
        path for path in kept if path.parts[0] != "integrations"
    }
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            else:
                continue
            roots = {name.partition(".")[0] for name in names}
            assert roots <= {"torch", "triton", *sys.stdlib_module_names}, (path.name, roots)


def test_imports_become_relative_at_every_depth():
    text = "from dpop_kernels.a.b import (\n    c,\n)\n    from dpop_kernels import d\n>>> from dpop_kernels import e\n"
    relative = ASSEMBLE["with_relative_imports"]
    expected = "from {0}a.b import (\n    c,\n)\n    from {0} import d\n>>> from dpop_kernels import e\n"
    assert relative(text, Path("top.py")) == expected.format(".")
    assert relative(text, Path("backends/deep.py")) == expected.format("..")


def test_metadata_has_what_is_required_and_an_id_of_its_own(project):
    ids = set()
    for backend in ("cpu", "cuda", "rocm"):
        metadata = json.loads((project / "build" / f"torch-{backend}" / "metadata.json").read_text())
        assert (metadata["name"], metadata["backend"]) == ("dpop-kernels", {"type": backend})
        assert metadata["license"] == "Apache-2.0"
        assert re.fullmatch(rf"_dpop_kernels_{backend}_[0-9a-f]{{7}}", metadata["id"])
        ids.add(metadata["id"])
    assert len(ids) == 3


def test_the_kernels_package_takes_build_file_digest_and_kernel(project):
    if find_spec("kernels") is None:
        # with it installed, transformers and bitsandbytes look for kernels of their own on the hub
        pytest.skip("the package kernels is no part of the development environment; docs/kernels.md says how to add it")
    code = (
        CHECK
        + """
from pathlib import Path
import kernels
from kernels._rust import Build, Digest, DigestAlgorithm, Metadata
out = Path(sys.argv[1])
assert [str(backend) for backend in Build.open(out).general.backends] == ["cpu", "cuda", "rocm"]
for variant in (out / "build").iterdir():
    actual = Digest.hash_variant(DigestAlgorithm.SHA256, variant)
    Metadata.read_from_file(variant / "metadata.json").digest.validate(actual)
check(kernels.get_local_kernel(out))
"""
    )
    run(code, project)
