"""The notebooks run as they are committed: from top to bottom, offline, on a CPU; outputs are not kept."""

import os
from pathlib import Path

import pytest
from ranks import run_alone

nbformat = pytest.importorskip("nbformat", reason="notebooks are run with IPython, of the development environment")
from IPython.core.interactiveshell import InteractiveShell  # noqa: E402
from IPython.utils.capture import capture_output  # noqa: E402

NOTEBOOKS = Path(__file__).parents[2] / "examples" / "notebooks"

# what each must have shown, checked in its own namespace after its last cell
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


@pytest.mark.forked
@pytest.mark.slow
def test_notebooks_run(tmp_path):
    """In the shell that a kernel gives cells to, each in a clean namespace; in a process that has the libraries."""
    code, output = run_alone(run_notebooks, tmp_path)
    assert code == 0, output


class Shell(InteractiveShell):
    def enable_gui(self, gui=None):
        """There is none."""


def run_notebooks(folder):
    os.chdir(folder)
    shell = Shell.instance()  # the one that `display` asks
    shell.run_line_magic("matplotlib", "inline")
    for name, check in CHECKS.items():
        shell.reset(new_session=False)
        shown = set()
        cells = nbformat.read(NOTEBOOKS / name, as_version=4).cells
        for source in (*(cell.source for cell in cells if cell.cell_type == "code"), check):
            with capture_output() as captured:
                result = shell.run_cell(source)
            print(captured.stdout, captured.stderr)
            result.raise_error()
            shown |= {kind for output in captured.outputs for kind in output.data}
        assert shown & {"image/png", "image/svg+xml"}, name
