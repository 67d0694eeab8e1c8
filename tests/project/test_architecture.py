"""The house stays as drawn: imports go one way, and the kernels' package needs torch alone to be imported."""

import ast
import functools
import inspect
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Every file of the kernels, from the bottom up: each imports those above it in this list alone.
LAYERS = [
    "outputs.py",
    "validate.py",
    "precision.py",
    "kernels/launch.py",
    "kernels/elementary.py",
    "kernels/softmax.py",
    "kernels/log_softmax_gather.py",
    "kernels/linear_logps.py",
    "kernels/segments.py",
    "kernels/pair_dpop.py",
    "logps/head.py",
    "backends/bounds.py",
    "backends/protocol.py",
    "backends/products.py",
    "backends/reference.py",
    "backends/chunked_tiles.py",
    "backends/chunked.py",
    "backends/fused_tiles.py",
    "backends/fused_logits.py",
    "backends/fused.py",
    "backends/__init__.py",
    "logps/logits.py",
    "logps/slices.py",
    "logps/tiling.py",
    "logps/pair_tiles.py",
    "logps/linear.py",
    "logps/lora.py",
    "logps/vocab_parallel.py",
    "losses/divergences.py",
    "losses/options.py",
    "losses/formulas.py",
    "losses/weights.py",
    "losses/weighing.py",
    "losses/on_sums.py",
    "losses/unpaired.py",
    "losses/fused.py",
    "losses/pair_loss.py",
    "padded.py",
    "model_head/transforms.py",
    "model_head/layers.py",
    "model_head/head.py",
    "integrations/trl/version.py",
    "integrations/trl/head.py",
    "integrations/trl/trainer.py",
    "integrations/trl/__init__.py",
    "__init__.py",
    "aot.py",
]
# registers what it does not import, by a decorator's own function
LATE = {("losses/formulas.py", "losses/fused.py")}

# The trainer's rooms: each imports those above it in this list and itself, never one below. "" is the package's root.
TRAINER_ROOMS = [
    "data",
    "run_folder",
    "settings",
    "models",
    "inputs",
    "batches",
    "reference",
    "measure",
    "report",
    "training",
    "tools",
    "",
]
PLAN = "dpop_trainer.tools.plan"
# whose functions are given what calls them, and name its type
CALLED_BY = {
    ("settings/config_checks.py", "settings/config.py"),
    ("settings/loss_fields.py", "settings/config.py"),
    ("reference/pair_reference.py", "training/trainer.py"),
}
# tools that are made of others; any other tool imports no other
MADE_OF_OTHERS = {("pairs", "doctor"), ("demo", "pairs"), ("demo", "compare"), ("delivery", "evaluation")}


@functools.cache
def imported_modules(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            modules.add(node.module or "")
    return modules


def imports_of(package: Path, *, with_types: bool = True):
    """Every import between files of a package, also in functions -> (importing, imported).

    Args:
        package: its folder.
        with_types: also imports under TYPE_CHECKING.
    """
    return [(user, used) for user, used, is_for_types in _imports_of(package) if with_types or not is_for_types]


@functools.cache
def _imports_of(package: Path) -> list[tuple[str, str, bool]]:
    found = []
    for path in sorted(package.rglob("*.py")):
        tree = ast.parse(path.read_text())
        for_types = {id(inner) for node in ast.walk(tree) if _is_type_checking(node) for inner in ast.walk(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == package.name:
                base = package.joinpath(*str(node.module).split(".")[1:])
                for alias in node.names:  # a module or a package in a package, or a name of a module
                    inside = base / alias.name
                    named = [inside.with_suffix(".py"), inside / "__init__.py", base.with_suffix(".py")]
                    used = next(file for file in [*named, base / "__init__.py"] if file.is_file())
                    names = (file.relative_to(package).as_posix() for file in (path, used))
                    found.append((*names, id(node) in for_types))
    return found


def kernel_imports():
    return imports_of(ROOT / "dpop_kernels")


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def kernel_ranks(files: set[str]) -> dict[str, float]:
    """Each file's place in LAYERS. A backend's module need not be listed: it stands on those that are, and under the
    registry."""
    ranks = {name: float(rank) for rank, name in enumerate(LAYERS)}
    unlisted = {name for name in files if name.startswith("backends/")} - set(LAYERS)
    return ranks | dict.fromkeys(unlisted, ranks["backends/__init__.py"] - 0.5)


def test_kernels_import_downwards_alone():
    files = {path.relative_to(ROOT / "dpop_kernels").as_posix() for path in (ROOT / "dpop_kernels").rglob("*.py")}
    ranks = kernel_ranks(files)
    for importing, imported in set(kernel_imports()) - LATE:
        if importing in ranks:
            assert imported in ranks, f"{importing} imports {imported}, a package's docstring. Import its module."
            assert ranks[imported] < ranks[importing], (
                f"{importing} imports {imported}, which LAYERS has above it. Put what both need into a file below."
            )
    docstrings_alone = {name for name in files if name.endswith("/__init__.py")} - set(LAYERS)
    unknown, gone = files - docstrings_alone - set(ranks), set(LAYERS) - files
    assert not unknown, f"{unknown}: add them to LAYERS in this file, above all that they import"
    assert not gone, f"{gone}: take them out of LAYERS in this file"


def test_a_backend_of_a_new_name_stands_under_the_registry():
    ranks = kernel_ranks({*LAYERS, "backends/own.py"})
    others = [name for name in LAYERS if name.startswith("backends/") and name != "backends/__init__.py"]
    assert max(ranks[name] for name in others) < ranks["backends/own.py"] < ranks["backends/__init__.py"]
    assert set(kernel_ranks({*LAYERS, "losses/own.py"})) == set(LAYERS)


def test_losses_and_log_probs_know_nothing_of_each_other():
    """But for the dispatch of a loss to the backend that sums its segments."""
    left = ("logps/", "backends/")
    for importing, imported in kernel_imports():
        assert not (importing.startswith(left) and imported.startswith("losses/")), (importing, imported)
        is_dispatch = importing == "losses/pair_loss.py"
        assert is_dispatch or not (importing.startswith("losses/") and imported.startswith(left)), (importing, imported)


def test_kernels_need_neither_the_trainer_nor_its_libraries():
    for path in (ROOT / "dpop_kernels").rglob("*.py"):
        for module in imported_modules(path):
            assert not module.startswith(("dpop_trainer", "transformers", "datasets", "peft")), (path, module)


def test_triton_is_imported_by_kernels_and_fused_alone():
    for path in (ROOT / "dpop_kernels").rglob("*.py"):
        relative = path.relative_to(ROOT / "dpop_kernels")
        if relative.parts[0] == "kernels" or relative.name.startswith("fused") or relative.name == "aot.py":
            continue
        uses = {module for module in imported_modules(path) if module.startswith(("triton", "dpop_kernels.kernels"))}
        uses -= {"dpop_kernels.kernels.launch"}  # torch alone
        assert not uses, (
            f"{relative} imports {uses}. Triton is for kernels/, and for backends whose file begins with 'fused'."
        )


# where a name of a loss or a backend is written out, beside the registries: what is of that one loss by purpose
NAMED_ON_PURPOSE = {
    "dpop_kernels/integrations/trl/trainer.py": "it brings DPOP, and no other, into TRL",
    "trainer/dpop_trainer/tools/demo/run.py": "the demo shows DPO beside DPOP",
    "trainer/dpop_trainer/tools/demo/chat.py": "the demo shows DPO beside DPOP",
    "trainer/dpop_trainer/tools/demo/report.py": "the demo shows DPO beside DPOP",
    "trainer/dpop_trainer/report/palette.py": "what is shown most has a colour of its own; other losses take the next",
}
OTHER_MEANINGS = {"sft", "reference"}  # a command, a column of a report: not to be told from the names by a test
COMMAND = {"trainer/dpop_trainer/settings/arguments.py", "trainer/dpop_trainer/tools/delivery/card.py"}
COMMAND |= {"trainer/dpop_trainer/settings/own_process.py"}  # "dpop" is the program's name there


def test_losses_and_backends_are_named_in_their_registries_alone():
    """Whoever asks what a loss has asks its registration: a new one is then known everywhere."""
    from dpop_kernels.backends import BACKENDS
    from dpop_kernels.losses.formulas import LOSSES, TRL_NAMES

    names = {*LOSSES, *TRL_NAMES, *BACKENDS} - OTHER_MEANINGS
    registries = {
        "dpop_kernels/losses/formulas.py",
        "dpop_kernels/losses/weights.py",
        "dpop_kernels/backends/__init__.py",
    }
    wrong = []
    for package in ("dpop_kernels", "trainer/dpop_trainer"):
        for path in (ROOT / package).rglob("*.py"):
            place = path.relative_to(ROOT).as_posix()
            constants = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
            texts = {value for value in constants if isinstance(value, str)}
            # in a docstring a backend's name is told from a word by its quotes
            said = texts & names | {name for text in texts for name in re.findall(r'"(\w+)"', text) if name in BACKENDS}
            if said and place not in registries | COMMAND | set(NAMED_ON_PURPOSE):
                wrong.append(f"{place} names {sorted(said)}")
    remedy = (
        "Ask the registration for what it has, or list LOSSES or BACKENDS. Where a place is of that one on purpose, "
        "name it in NAMED_ON_PURPOSE of this file; where the word has another meaning, in OTHER_MEANINGS."
    )
    assert not wrong, "\n".join([*wrong, remedy])


def test_tests_take_their_backends_from_the_registry():
    """A second list would leave out the next one."""
    from dpop_kernels.backends import BACKENDS

    for path in set((ROOT / "tests").rglob("*.py")) - {Path(__file__)}:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.List | ast.Tuple | ast.Set):
                constants = {inner.value for inner in ast.walk(node) if isinstance(inner, ast.Constant)}
                place = f"{path.relative_to(ROOT)}, line {node.lineno}"
                assert len(constants & set(BACKENDS)) < 2, (
                    f"{place} lists backends. Take a list of helpers/backends.py."
                )


def test_what_estimates_rounding_is_run_under_other_arithmetic():
    from tests.portability import NUMERIC

    tests = ROOT / "tests"
    estimates = {path for path in tests.glob("*/test_*.py") if "rounding" in imported_modules(path)}
    unlisted = {path.relative_to(tests).as_posix() for path in estimates} - set(NUMERIC)
    assert not unlisted, (
        f"tests/portability.py: expected all of these in NUMERIC, which `make portability` runs: {unlisted}"
    )
    assert all((tests / name).is_file() for name in NUMERIC)


def test_trl_is_imported_by_its_integration_alone():
    for package in ("dpop_kernels", "trainer/dpop_trainer"):
        for path in (ROOT / package).rglob("*.py"):
            uses = {module for module in imported_modules(path) if module.split(".")[0] == "trl"}
            assert not uses or path.parent == ROOT / "dpop_kernels/integrations/trl", (path, uses)


def trainer_imports():
    """Every import between files of the trainer that happens when it runs, as paths -> (importing, imported)."""
    for importing, imported in imports_of(ROOT / "trainer" / "dpop_trainer", with_types=False):
        yield Path(importing), Path(imported)


def test_the_trainer_s_files_stand_in_an_order():
    """No file imports, over others, itself: so every file has a place, and each room can be read from the bottom up.

    What is imported for its type alone counts as well.
    """
    imported_by: dict[str, set[str]] = {}
    for importing, imported in set(imports_of(ROOT / "trainer" / "dpop_trainer")) - CALLED_BY:
        imported_by.setdefault(importing, set()).add(imported)
    assert len(list(TopologicalSorter(imported_by).static_order())) > 150  # raises CycleError


def test_the_trainer_s_rooms_import_upwards_alone():
    ranks = {room: rank for rank, room in enumerate(TRAINER_ROOMS)}
    seen = set()
    for path, imported in trainer_imports():
        room = path.parts[0] if len(path.parts) > 1 else ""
        other = imported.parts[0] if imported.parts and imported.parts[0] in ranks else ""
        assert ranks[other] <= ranks[room], f"{path} imports {imported}"
        seen |= {room, other}
    folders = {path.parent.name for path in (ROOT / "trainer" / "dpop_trainer").glob("*/__init__.py")}
    assert seen == set(TRAINER_ROOMS)
    assert folders - {"recipes"} == set(TRAINER_ROOMS) - {""}


def test_a_tool_imports_no_other_tool():
    pairs = {
        (path.parts[1], imported.parts[1])
        for path, imported in trainer_imports()
        if path.parts[0] == "tools" and len(imported.parts) > 1 and imported.parts[0] == "tools"
    }
    assert {(tool, other) for tool, other in pairs if tool != other} == MADE_OF_OTHERS


def test_the_trainer_s_root_holds_the_way_in_alone():
    names = {path.name for path in (ROOT / "trainer" / "dpop_trainer").glob("*.py")}
    assert names == {"__init__.py", "__main__.py", "cli.py"}


def test_what_reaches_the_terminal_goes_through_one_function():
    """Names and texts of others cannot steer it; a line that is wiped again is our own, and drawn."""
    printing = {
        path.relative_to(ROOT / "trainer/dpop_trainer").as_posix()
        for path in (ROOT / "trainer/dpop_trainer").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    }
    assert printing == {"settings/terminal.py", "settings/under_way.py"}


def test_every_room_says_what_lives_there():
    for path in (ROOT / "trainer" / "dpop_trainer").glob("*/__init__.py"):
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        assert len(text.split()) > 20, f"{path.relative_to(ROOT)}: what lives there, what it may import, what to change"


def test_data_knows_no_model_and_no_kernel():
    for path in (ROOT / "trainer" / "dpop_trainer" / "data").rglob("*.py"):
        for module in imported_modules(path):
            assert not module.startswith(("dpop_kernels", "peft")), (path, module)


def test_the_scale_model_is_arithmetic_alone():
    modules = imported_modules(ROOT / "benchmarks" / "scale.py")
    assert modules == {"dataclasses", "typing"}


def test_a_plan_is_made_without_training():
    """It reads the run's configuration, data and batches."""
    for path, imported in trainer_imports():
        assert path.parts[:2] != ("tools", "plan") or imported.parts[:1] != ("training",), (path, imported)


def imported_at_once(module: str) -> set[str]:
    """Every module that importing one of the trainer imports, but for what other packages import in turn."""
    found, waiting = set(), [module]
    while waiting:
        name = waiting.pop()
        path = ROOT / "trainer" / Path(*name.split("."))
        file = next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)
        if name in found or file is None:
            found.add(name)
            continue
        found.add(name)
        for node in ast.parse(file.read_text()).body:  # neither in functions nor under TYPE_CHECKING
            if isinstance(node, ast.Import):
                waiting += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                waiting += [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


def test_a_plan_without_pairs_reads_no_data_sets():
    """`datasets` and the pandas that it brings take a second and a half to import."""
    planning = {
        found for name in ("options", "report", "search", "setup") for found in imported_at_once(f"{PLAN}.{name}")
    }
    assert {"dpop_trainer.models.loading", "dpop_trainer.batches.budget", "peft"} <= planning
    assert not [name for name in planning if name.partition(".")[0] in ("datasets", "pandas", "pyarrow")]


def test_transformers_private_names_stand_in_one_file():
    """Also no method or attribute of a trainer has by accident a private name of transformers' Trainer."""
    from transformers import Trainer

    private = {name for name in dir(Trainer) if name.startswith("_") and not name.startswith("__")}
    private |= set(re.findall(r"\bself\.(_(?!_)\w+)", inspect.getsource(Trainer)))
    assert "_tr_loss" in private
    package = ROOT / "trainer" / "dpop_trainer"
    for path in sorted(package.rglob("*.py")):
        if path == package / "training" / "hf_hooks.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            name = ""
            if isinstance(node, ast.Attribute) and _is_a_trainer(node.value, path):
                name = node.attr
            elif isinstance(node, ast.FunctionDef) and path.parent.name == "training":
                name = node.name
            assert name not in private, f"{path.relative_to(ROOT)}, line {node.lineno}: {name}"  # type: ignore[attr-defined]


def _is_a_trainer(node: ast.AST, path: Path) -> bool:
    """Whether an expression may be one, by what it is called."""
    if isinstance(node, ast.Attribute):
        return node.attr in ("trainer", "_trainer")
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id == "super"
    return isinstance(node, ast.Name) and (
        node.id in ("trainer", "run") or (node.id == "self" and path.parent.name == "training")
    )


def test_benchmarks_reach_the_house_from_outside():
    """What is measured knows nothing of the benchmarks; peers are imported when they run, not before."""
    for package in (ROOT / "dpop_kernels", ROOT / "trainer" / "dpop_trainer"):
        for path in package.rglob("*.py"):
            assert not any(module.startswith("benchmarks") for module in imported_modules(path)), path
    for path in (ROOT / "benchmarks" / "peers").glob("*.py"):
        top = {node for node in ast.parse(path.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))}
        roots = {(node.module or "") if isinstance(node, ast.ImportFrom) else node.names[0].name for node in top}
        allowed = (
            "torch",
            "benchmarks",
            "dpop_kernels",
            "collections",
            "dataclasses",
            "functools",
            "importlib",
            "typing",
        )
        assert all(root.partition(".")[0] in allowed for root in roots), (path, roots)


def test_pairs_are_built_and_examined_without_the_kernels():
    """Building pairs needs no torch: it runs where the data is. Only the model's view of pairs needs the kernels."""
    for tool in ("pairs", "doctor"):
        for path in (ROOT / "trainer" / "dpop_trainer" / "tools" / tool).glob("*.py"):
            wrong = ("dpop_kernels",) if tool == "doctor" else ("torch", "transformers", "dpop_kernels")
            for module in imported_modules(path):
                assert path.name == "ches.py" or not module.startswith(wrong), (path, module)


def test_import_needs_neither_triton_nor_transformers():
    code = """
import sys
for name in ("triton", "transformers", "datasets", "peft", "accelerate"):
    sys.modules[name] = None  # importing it raises ImportError
import dpop_kernels
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_pairs_are_built_without_torch(tmp_path):
    """Where only the data is; numpy alone looks at what was built."""
    (tmp_path / "a.jsonl").write_text('{"question": "How many?", "answer": "1+1 = 2 and 2+2 = 4"}')
    code = f"""
import sys
for name in ("torch", "transformers", "datasets", "pyarrow"):
    sys.modules[name] = None  # importing it raises ImportError
from dpop_trainer.cli import main
source, out = {str(tmp_path / "a.jsonl")!r}, {str(tmp_path / "b.jsonl")!r}
sys.exit(main(["pairs", "build", "metamath", "--source", source, "--out", out]))
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert "1+1 = " in (tmp_path / "b.jsonl").read_text()


def test_every_public_name_is_documented():
    import dpop_kernels

    for name in dpop_kernels.__all__:
        doc = getattr(dpop_kernels, name).__doc__ or ""
        assert len(doc.splitlines()[0]) > 20, name


def tree_of(page: Path) -> set[str]:
    """The paths of the tree that a page draws: indented names, several beside one another, what they are behind two
    blanks."""
    (tree,) = (block for block in page.read_text().split("```") if block.lstrip("\n").startswith("dpop_kernels/"))
    paths, top = set(), ""
    for line in tree.strip("\n").splitlines():
        names = line.strip().split("  ")[0].split()
        if line.startswith(" " * 8):
            continue  # a line that goes on
        for name in names:
            paths.add(name if not line.startswith(" ") else top + name)
        top = top if line.startswith(" ") else names[0]
    return paths


@pytest.mark.parametrize("name", ["README.md", "ARCHITECTURE.md"])
def test_the_tree_of_a_page_is_the_disk(name):
    paths = tree_of(ROOT / name)
    assert len(paths) > 15
    for path in paths:
        assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file(), path


def test_the_architecture_leaves_no_room_out():
    rooms = {
        f"{package}/{path.name}/"
        for package in ("dpop_kernels", "trainer/dpop_trainer")
        for path in (ROOT / package).iterdir()
        if path.is_dir() and path.name != "__pycache__"
    }
    assert rooms <= tree_of(ROOT / "ARCHITECTURE.md")
