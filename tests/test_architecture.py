"""The house stays as drawn: imports go one way, and the kernels' package needs torch alone to be imported."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

# file or folder -> what of the project it may import; anything else of the project is a wrong direction
KERNEL_RULES = {
    "outputs.py": [],
    "loss_options.py": [],
    "loss_formulas.py": ["loss_options"],
    "loss_weights.py": ["loss_formulas", "loss_options"],
    "losses.py": ["loss_formulas", "loss_options", "outputs"],
    "validate.py": [],
    "backends/__init__.py": [],
    "backends/reference.py": ["losses", "outputs"],
    "backends/products.py": [],
    "backends/linear_tiles.py": ["backends", "outputs"],
    "backends/chunked.py": ["backends", "losses", "outputs"],
    "backends/fused.py": ["backends", "kernels", "loss_options", "outputs"],
    "backends/linear_parts.py": ["backends", "outputs"],
    "backends/fused_launches.py": ["backends", "kernels", "outputs"],
    "backends/linear_pairs.py": ["backends", "losses"],
    "backends/fused_linear.py": ["backends", "kernels", "outputs"],
    "backends/fused_logits.py": ["backends", "kernels", "outputs"],
    "kernels": ["kernels"],
    "token_logps.py": ["backends", "outputs", "validate"],
    "linear_logps.py": ["backends", "outputs", "validate"],
    "pair_loss.py": ["backends", "loss_formulas", "loss_options", "loss_weights", "losses", "outputs", "validate"],
    "dpop_losses.py": ["backends", "linear_logps", "loss_options", "losses", "pair_loss", "token_logps", "validate"],
    "lora_logps.py": ["backends", "linear_logps", "losses", "outputs", "validate"],
    "vocab_parallel.py": ["backends", "linear_logps", "validate"],
    "head_transforms.py": [],
    "head_layers.py": ["linear_logps", "lora_logps", "outputs", "vocab_parallel"],
    "head.py": ["head_layers", "head_transforms", "outputs"],
    "integrations": ["loss_formulas", "loss_options", "losses"],
}


def imported_modules(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            modules.add(node.module or "")
    return modules


def test_kernels_import_one_way():
    package = ROOT / "dpop_kernels"
    for place, allowed in KERNEL_RULES.items():
        target = package / place
        for path in [target] if target.is_file() else target.rglob("*.py"):
            for module in imported_modules(path):
                assert not module.startswith(("dpop_trainer", "transformers", "datasets", "peft")), (path, module)
                if module.startswith("dpop_kernels."):
                    assert module.split(".")[1] in allowed, f"{path.relative_to(ROOT)} imports {module}"


def test_triton_is_imported_by_kernels_and_fused_alone():
    for path in (ROOT / "dpop_kernels").rglob("*.py"):
        relative = path.relative_to(ROOT / "dpop_kernels")
        if relative.parts[0] == "kernels" or relative.name.startswith("fused") or relative.name == "aot.py":
            continue
        uses = {module for module in imported_modules(path) if module.startswith(("triton", "dpop_kernels.kernels"))}
        assert not uses, f"{relative} imports {uses}"


def test_trl_is_imported_by_its_integration_alone():
    for package in ("dpop_kernels", "trainer/dpop_trainer"):
        for path in (ROOT / package).rglob("*.py"):
            uses = {module for module in imported_modules(path) if module.split(".")[0] == "trl"}
            assert not uses or path == ROOT / "dpop_kernels/integrations/trl.py", (path, uses)


def test_data_path_knows_no_model_and_no_kernel():
    for path in (ROOT / "trainer" / "dpop_trainer" / "data").rglob("*.py"):
        for module in imported_modules(path):
            assert not module.startswith("dpop_kernels"), (path, module)
            assert not module.startswith("dpop_trainer") or module.startswith(
                ("dpop_trainer.data", "dpop_trainer.edits")
            ), (
                path,
                module,
            )


def test_the_reference_is_asked_by_the_trainer_and_asks_no_trainer():
    for path in (ROOT / "trainer" / "dpop_trainer" / "reference").rglob("*.py"):
        tree = ast.parse(path.read_text())
        checked_only = {id(inner) for node in ast.walk(tree) if _is_type_checking(node) for inner in ast.walk(node)}
        imported = {
            node.module
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and id(node) not in checked_only and node.module is not None
        }
        wrong = {"dpop_trainer.trainer", "dpop_trainer.config", "dpop_trainer.runs", "dpop_trainer.cli"}
        assert not imported & wrong, (path, imported & wrong)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def test_the_scale_model_is_arithmetic_alone():
    modules = imported_modules(ROOT / "trainer" / "dpop_trainer" / "scale.py")
    assert modules == {"dataclasses", "typing"}


def test_a_plan_is_made_without_training():
    """It reads the run's configuration, data and batches; nothing imports it but the command line."""
    package = ROOT / "trainer" / "dpop_trainer"
    for path in package.rglob("*.py"):
        is_plan = path.relative_to(package).parts[0] == "plan"
        for module in imported_modules(path):
            if is_plan:
                wrong = ("dpop_trainer.trainer", "dpop_trainer.runs", "dpop_trainer.base", "benchmarks")
                assert not module.startswith(wrong), (path, module)
            elif module.startswith("dpop_trainer.plan"):
                assert path.name == "cli.py", (path, module)


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


def test_recipes_know_nothing_of_training():
    """Building pairs needs no torch: it runs where the data is. `datasets` is asked for the hub alone."""
    allowed = ("dpop_trainer.pairs", "dpop_trainer.doctor.commands", "dpop_trainer.command_parser")
    for path in (ROOT / "trainer" / "dpop_trainer" / "pairs").glob("*.py"):
        for module in imported_modules(path):
            assert not module.startswith(("torch", "transformers", "dpop_kernels")), (path, module)
            assert not module.startswith("dpop_trainer") or module.startswith(allowed), (path, module)


def test_doctor_trains_nothing():
    """Pairs are examined without the trainer; only the model's view of them needs the kernels."""
    allowed = ("command_parser", "data", "doctor", "edits", "graphemes", "loading", "model_paths", "pairs.write")
    allowed += ("token_text", "tokenizer_loading", "versions")
    for path in (ROOT / "trainer" / "dpop_trainer" / "doctor").glob("*.py"):
        for module in imported_modules(path):
            if path.name != "ches.py":
                assert not module.startswith("dpop_kernels"), (path, module)
                assert not module.startswith("dpop_trainer.") or module.split(".", 1)[1].startswith(allowed), module


def test_what_comes_after_training_is_known_to_the_command_line_alone():
    package = ROOT / "trainer" / "dpop_trainer"
    after = ("evaluation", "mtbench", "delivery")
    for path in package.rglob("*.py"):
        relative = path.relative_to(package)
        for module in imported_modules(path):
            part = module.removeprefix("dpop_trainer.").partition(".")[0]
            if module.startswith("dpop_trainer.") and part in after:
                # the card shows an evaluation's table
                allowed = relative.parts[0] == part or (relative.parts[0], part) == ("delivery", "evaluation")
                assert allowed or relative.name == "cli.py", f"{relative} imports {module}"


def test_import_needs_neither_triton_nor_transformers():
    code = """
import sys
for name in ("triton", "transformers", "datasets", "peft", "accelerate"):
    sys.modules[name] = None  # importing it raises ImportError
import dpop_kernels
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_pairs_are_built_without_torch(tmp_path):
    """The command starts in a moment, and where only the data is."""
    (tmp_path / "a.jsonl").write_text('{"question": "How many?", "answer": "1+1 = 2 and 2+2 = 4"}')
    code = f"""
import sys
for name in ("torch", "transformers", "datasets", "pyarrow", "numpy"):
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
