"""What SECURITY.md promises of the code: nothing read is run, nothing is sent or trusted unasked."""

import ast
import functools
import pickle
import re
import shutil
from pathlib import Path

import pytest
from datasets import Dataset
from dpop_trainer import DPOPConfig, DPOPTrainer
from tiny import tiny_llama, token_pairs, word_tokenizer

ROOT = Path(__file__).parents[2]
FILES = [path for package in ("dpop_kernels", "trainer/dpop_trainer") for path in (ROOT / package).rglob("*.py")]

CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "yaml.load", "yaml.full_load"}
CALLS |= {"yaml.unsafe_load", "yaml.load_all", "numpy.load", "np.load"}
MODULES = {
    "pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "subprocess",
    "socket",
    "requests",
}
MODULES |= {"urllib.request", "httpx", "httpx2", "aiohttp", "ftplib", "smtplib"}
ALLOWED = {
    ("trainer/dpop_trainer/tools/mtbench/endpoint.py", "httpx2"),  # the judge, where one is named
    # pip, which is asked for one package of a known version and digest where `demo --chat` is given no model
    ("trainer/dpop_trainer/tools/demo/chat_model.py", "subprocess"),
    # is the hub, or a proxy, there? before a model's configuration is asked for
    ("trainer/dpop_trainer/tools/plan/source.py", "socket"),
    ("trainer/dpop_trainer/tools/plan/source.py", "urllib.request"),
}

# statements of the installed packages' own source, which importing them would run as well: nothing of a user's files
ALLOWED_CALLS = {("trainer/dpop_trainer/settings/source_classes.py", name) for name in ("compile", "eval", "exec")}


@functools.cache
def _nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def _name(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def test_nothing_is_run_or_sent():
    used = set()
    for path in FILES:
        place = path.relative_to(ROOT).as_posix()
        for node in _nodes(path):
            if isinstance(node, ast.Call):
                name = _name(node.func)
                assert name not in CALLS or (place, name) in ALLOWED_CALLS, f"{place}:{node.lineno} calls {name}"
                assert not any(keyword.arg == "shell" for keyword in node.keywords), f"{place}:{node.lineno}: a shell"
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            used |= {(place, name) for name in names if name in MODULES or name.partition(".")[0] in MODULES}
    assert used == ALLOWED


# who writes to a file of its own name, and why no reader meets a part of it
WRITERS = {
    "data/skipped.py": "a list for people, line by line",
    "data/sound_cache.py": "to a partial file",
    "data/write.py": "to a partial file",
    "reference/cache.py": "to a partial file",
    "reference/weight_files.py": "to a partial file",
    "run_folder/files.py": "this is how",
    "tools/delivery/export.py": "into a folder that moves into its place",
    "tools/demo/chat_model.py": "to a partial file",
    "tools/demo/run.py": "pairs, made anew at each start",
    "training/non_finite.py": "a batch for people",
    "training/run_progress.py": "into a checkpoint that moves into its place",
}


def test_state_is_written_whole_or_not_at_all():
    """`write_atomically` and its like, but for these."""
    found = set()
    for path in FILES:
        for node in _nodes(path):
            name = _name(node.func).rpartition(".")[2] if isinstance(node, ast.Call) else ""
            modes = [word.value for word in ast.walk(node) if isinstance(word, ast.Constant)] if name == "open" else []
            writes = any(isinstance(mode, str) and re.fullmatch(r"[wax][bt+]*|r[bt]?\+[bt]?", mode) for mode in modes)
            if writes or name in ("write_text", "write_bytes", "save_file", "dump"):
                found.add(path.relative_to(ROOT / "trainer" / "dpop_trainer").as_posix())
    assert found == WRITERS.keys()


def test_remote_code_is_off_wherever_it_can_be_asked_for():
    found = 0
    for path in FILES:
        for node in _nodes(path):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                arguments = [*node.args.posonlyargs, *node.args.args]
                defaults = dict(zip([a.arg for a in arguments][::-1], node.args.defaults[::-1], strict=False))
                defaults |= {a.arg: d for a, d in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)}
                names = {a.arg for a in [*arguments, *node.args.kwonlyargs]}
                # a private function is handed what its caller was asked for
                if "trust_remote_code" in names and not node.name.startswith("_"):
                    found += 1
                    default = defaults.get("trust_remote_code")
                    assert isinstance(default, ast.Constant), (path, node.name)
                    assert default.value is False, (path, node.name)
    assert found >= 3
    settings = DPOPConfig(output_dir="unused")
    assert (settings.trust_remote_code, settings.push_to_hub, settings.report_to) == (False, False, [])


class _Payload:
    """Unpickled, it would leave a file."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def _trainer(folder: Path) -> DPOPTrainer:
    settings = DPOPConfig(
        output_dir=str(folder),
        max_steps=2,
        save_steps=1,
        per_device_train_batch_size=2,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    pairs = Dataset.from_list(token_pairs(4))
    return DPOPTrainer(tiny_llama(), args=settings, train_dataset=pairs, processing_class=word_tokenizer())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("security") / "run"
    _trainer(folder).train()
    shutil.rmtree(folder / "checkpoint-2")
    return folder


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_that_holds_code_is_refused(name, run, tmp_path):
    folder, mark = tmp_path / "run", tmp_path / "mark"
    shutil.copytree(run, folder)
    with open(folder / "checkpoint-1" / name, "wb") as file:
        pickle.dump(_Payload(mark), file)
    (folder / "checkpoint-1" / "checkpoint.json").unlink()  # the list of sizes, which would tell first
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        _trainer(folder).train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    assert not mark.exists()
    # and it is a payload: whoever unpickles it runs it
    pickle.loads((folder / "checkpoint-1" / name).read_bytes()).close()
    assert mark.exists()
