"""The notebooks run as they are committed: from top to bottom, offline, on a CPU; outputs are not kept."""

import os
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="notebooks are run with nbclient, of the development environment")
from jupyter_client.manager import AsyncKernelManager  # noqa: E402
from nbclient import NotebookClient  # noqa: E402

NOTEBOOKS = Path(__file__).parents[2] / "examples" / "notebooks"

# what each must have shown, checked in its own kernel after its last cell
CHECKS = {
    # The first loss is log 2 to the precision of the log-probs: ten tokens to 1e-5 nats in either pass, times the
    # steepest slope, σ(0) · β · (1 + λ). Both losses part the answers. Under DPO the chosen ones pay; for DPOP a
    # quarter of a nat would cost βλ/4 = 3.75 in the loss, and it does not go there.
    "loss_in_your_loop.ipynb": """
import math
for log in logs.values():
    assert math.isclose(log[0][1], math.log(2), abs_tol=0.5 * 0.3 * (51 + 1) * 2e-4), log[0]
    assert log[-1][2] > log[-1][3], log[-1]
lowest = {name: min(chosen_change for _, _, chosen_change, _ in log) for name, log in logs.items()}
assert lowest["DPO"] < -0.25 < lowest["DPOP"], lowest
""",
    # every pair was found to be low-edit, and the verdict is not that the chosen answers fell
    "pairs_to_report.ipynb": """
findings = json.loads((folder / "doctor" / "doctor.json").read_text())["findings"]
assert [(finding["name"], finding["count"]) for finding in findings] == [("low_edit", 500)], findings
inspection = json.loads((folder / "inspect" / "inspect.json").read_text())
assert inspection["num_pairs"] == 60
assert inspection["chosen_logratio"] > -2 * inspection["chosen_logratio_error"], inspection
assert (folder / "inspect" / "inspect.html").exists() and (folder / "dpop" / "adapter_model.safetensors").exists()
""",
}


def test_every_notebook_is_checked():
    assert {path.name for path in NOTEBOOKS.glob("*.ipynb")} == set(CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_notebooks_are_kept_without_outputs(name):
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs, cell.source
            assert cell.execution_count is None, cell.source
    assert notebook.metadata.kernelspec.name == "python3"


@pytest.mark.slow
def test_notebooks_run(tmp_path, monkeypatch):
    """Each from a clean namespace; in one process, which imports the libraries once."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([os.environ.get("PYTHONPATH", ""), *_package_folders()]))
    code_cell = nbformat.v4.new_code_cell
    cells = {
        name: [code_cell("%reset -f"), *nbformat.read(NOTEBOOKS / name, as_version=4).cells, code_cell(check)]
        for name, check in CHECKS.items()
    }
    notebook = nbformat.v4.new_notebook(cells=[cell for of_one in cells.values() for cell in of_one])
    kernel = AsyncKernelManager(kernel_name="python3", transport="ipc", ip=str(tmp_path / "kernel"))
    client = NotebookClient(notebook, km=kernel, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(cleanup_kc=True)
    for name, of_one in cells.items():
        shown = {kind for cell in of_one for output in cell.get("outputs", []) for kind in output.get("data", {})}
        assert shown & {"image/png", "image/svg+xml"}, name


def _package_folders():
    import dpop_trainer

    import dpop_kernels

    return [str(Path(module.__file__).parents[1]) for module in (dpop_kernels, dpop_trainer)]
