"""`dpop eval` on lm-eval: figures against plain forwards, prompts against the published ones, resumption."""

import importlib.util
import json

import pytest
import torch
from datasets import Dataset
from dpop_trainer.cli import main
from dpop_trainer.models.trained import load_trained
from dpop_trainer.tools.evaluation import run as eval_run
from dpop_trainer.tools.evaluation import tasks
from dpop_trainer.tools.evaluation.harness import harness_model, run_task
from dpop_trainer.tools.evaluation.records import read_result
from dpop_trainer.tools.evaluation.tasks import LEADERBOARD, TaskRequest, load_tasks, parse_tasks
from peft import LoraConfig, get_peft_model

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed (extra `eval`)"),
    # lm-eval and what it imports warn of their own deprecations
    pytest.mark.filterwarnings("default"),
]

LIMIT = 4


@pytest.fixture(scope="module")
def eval_data(shared_once):
    return shared_once / "data"


@pytest.fixture(scope="module")
def run_folder(tiny_llama, tmp_path_factory):
    """An adapter that changes the model's answers."""
    folder = tmp_path_factory.mktemp("adapter") / "run"
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False, lora_alpha=64)
    get_peft_model(load_trained(str(tiny_llama)).model, config).save_pretrained(folder)
    return folder


def local_tasks(eval_data):
    return [
        f"arc={eval_data / 'arc' / 'ARC-Challenge_validation.jsonl'}",
        f"hellaswag={eval_data / 'hellaswag' / 'hellaswag_val_1000.jsonl'}",
        f"gsm8k={eval_data / 'gsm8k' / 'test.jsonl'}",
        f"gsm8k.examples={eval_data / 'gsm8k' / 'train.jsonl'}",
    ]


def records(path, count):
    return [json.loads(line) for line in path.read_text().splitlines()[:count]]


@pytest.fixture(scope="module")
def evaluated(tiny_llama, eval_data, run_folder, tmp_path_factory):
    """The three local tasks, base and adapter, through the command line."""
    out = tmp_path_factory.mktemp("eval")
    argv = ["eval", "--models", str(tiny_llama), str(run_folder), "--out", str(out), "--limit", str(LIMIT)]
    argv += ["--local", *local_tasks(eval_data), "--num_fewshot", "0", "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patch:
        # GSM8K generates up to 256 tokens; the harness's path is the same for a few
        from lm_eval.models.huggingface import HFLM

        patch.setattr(HFLM, "max_gen_toks", property(lambda self: 8))
        assert main(argv) == 0
    return argv, out


@torch.no_grad()
def best_choice(trained, context, choices):
    """By log-prob of the continuation per character: what the harness calls acc_norm."""
    scores = []
    for choice in choices:
        tokenizer = trained.tokenizer
        num_context = len(tokenizer(context)["input_ids"])
        ids = torch.tensor([tokenizer(f"{context} {choice}")["input_ids"]])
        logps = trained.model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        scores.append(float(logps[num_context - 1 :].sum()) / len(choice))
    return max(range(len(choices)), key=scores.__getitem__)


def test_figures_are_those_of_plain_forwards(evaluated, tiny_llama, run_folder, eval_data):
    results = json.loads((evaluated[1] / "results.json").read_text())
    rows = {row["task"]: row for row in results["rows"]}
    assert rows["arc_challenge"]["metric"] == rows["hellaswag"]["metric"] == "acc_norm"
    assert rows["gsm8k"]["metric"] == "exact_match,strict-match"
    for label, folder in [(tiny_llama.name, tiny_llama), ("run", run_folder)]:
        trained = load_trained(str(folder), device="cpu")
        right = []
        for record in records(eval_data / "arc" / "ARC-Challenge_validation.jsonl", LIMIT):
            best = best_choice(trained, f"Question: {record['question']}\nAnswer:", record["choices"]["text"])
            right.append(record["choices"]["label"][best] == record["answerKey"])
        assert rows["arc_challenge"]["figures"][label]["value"] == sum(right) / LIMIT
        stored = json.loads((evaluated[1] / label / "arc_challenge.json").read_text())
        assert list(stored["metrics"]["acc_norm"]["by_question"].values()) == right
        right = []
        for record in records(eval_data / "hellaswag" / "hellaswag_val_1000.jsonl", LIMIT):
            ids = trained.tokenizer(record["query"] + max(record["choices"], key=len))["input_ids"]
            assert len(ids) < 512  # else the harness would cut the beginning, and this test not
            right.append(best_choice(trained, record["query"], record["choices"]) == record["gold"])
        assert rows["hellaswag"]["figures"][label]["value"] == sum(right) / LIMIT


def test_table_has_both_models_and_the_paired_difference(evaluated):
    results = json.loads((evaluated[1] / "results.json").read_text())
    before, after = results["models"]
    for row in results["rows"]:
        change = row["differences"][after]
        assert change["paired"]
        assert change["value"] == pytest.approx(row["figures"][after]["value"] - row["figures"][before]["value"])
        assert change["stderr"] is not None
    table = (evaluated[1] / "results.md").read_text()
    assert f"{after} − {before}" in table
    assert f"the first {LIMIT} questions" in table


def test_finished_results_are_not_run_again(evaluated, monkeypatch, capsys):
    argv, out = evaluated
    before = (out / "results.md").read_text()
    monkeypatch.setattr(eval_run, "load_trained", None)
    assert main(argv) == 0
    assert (out / "results.md").read_text() == before
    assert capsys.readouterr().out.count("3 of 3 done before: nothing to do.") == 2


def test_only_the_missing_task_is_run(evaluated, tiny_llama, monkeypatch, capsys):
    argv, out = evaluated
    path = out / tiny_llama.name / "arc_challenge.json"
    text = path.read_text()
    path.unlink()
    assert main(argv) == 0
    assert "arc_challenge (3 of 3)" in capsys.readouterr().out
    key = json.loads(text)["key"]
    again, first = read_result(path, key), json.loads(text)
    assert again is not None
    assert again.metrics["acc_norm"].by_question == first["metrics"]["acc_norm"]["by_question"]


@pytest.fixture
def no_hub(monkeypatch):
    """Neither the hub nor what a developer's cache may hold."""

    def refuse(*args, **kwargs):
        raise ConnectionError("the hub cannot be reached")

    monkeypatch.setattr("datasets.load_dataset", refuse)


@pytest.mark.parametrize("name", LEADERBOARD)
def test_the_leaderboards_tasks_are_found_in_their_folders(name, no_hub):
    """Their data is the hub's; a name that lm-eval does not know would be said first."""
    with pytest.raises(ValueError, match=f"expected the data of '{name}' from the hub or its local cache"):
        load_tasks(parse_tasks([name], None, None))


def contexts(task, **kwargs):
    task.set_config("num_fewshot", kwargs.pop("num_fewshot"))
    task.set_fewshot_seed(1234)
    task.build_all_requests(limit=LIMIT, rank=0, world_size=1, **kwargs)
    return list(dict.fromkeys(instance.args[0] for instance in task.instances))


def test_prompts_are_the_published_ones(eval_data):
    requests = parse_tasks(None, local_tasks(eval_data), None)
    tasks = load_tasks(requests)
    arc, hellaswag, gsm8k = (tasks[request.name]["tasks"][request.name] for request in requests)
    questions = records(eval_data / "arc" / "ARC-Challenge_validation.jsonl", LIMIT)
    asked = contexts(arc, num_fewshot=2)
    for question, context in zip(questions, asked, strict=True):
        examples = context.split("\n\n")
        assert len(examples) == 3
        assert examples[2] == f"Question: {question['question']}\nAnswer:"
        assert all(example.startswith("Question: ") for example in examples)
        assert question["question"] not in "".join(examples[:2])  # which come from the same file
    assert contexts(arc, num_fewshot=2) == asked  # the next model is asked the same
    (first,) = contexts(hellaswag, num_fewshot=0)[:1]
    assert first == records(eval_data / "hellaswag" / "hellaswag_val_1000.jsonl", 1)[0]["query"]
    (first,) = contexts(gsm8k, num_fewshot=1)[:1]
    example, question = first.split("\n\n")
    assert question == f"Question: {records(eval_data / 'gsm8k' / 'test.jsonl', 1)[0]['question']}\nAnswer:"
    train = {record["question"]: record["answer"] for record in records(eval_data / "gsm8k" / "train.jsonl", None)}
    asked, _, answer = example.removeprefix("Question: ").partition("\nAnswer: ")
    assert train[asked] == answer


def test_a_group_is_the_mean_over_all_questions_of_its_tasks(tiny_llama, eval_data):
    """As MMLU is: its 57 subjects weigh as much as they have questions."""
    from lm_eval.tasks import TaskManager

    requests = parse_tasks(None, local_tasks(eval_data)[:2], None)
    members = [task for loaded in load_tasks(requests).values() for task in loaded["tasks"].values()]
    manager = TaskManager(include_defaults=False)
    group = manager.load(
        {"group": "two", "task": [], "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}
    )["groups"]["two"]
    for member in members:
        group.add(member)
    lm = harness_model(load_trained(str(tiny_llama), device="cpu"), batch_size="8", max_length=None)
    settings = {"limit": LIMIT, "apply_chat_template": False, "key": {}}
    whole = run_task(lm, manager.load([group]), TaskRequest("two", 0), **settings)
    parts = [run_task(lm, manager.load([task]), TaskRequest(task.task_name, 0), **settings) for task in members]
    assert whole.num_questions == 2 * LIMIT
    apart = manager.load({"group": "apart", "task": []})["groups"]["apart"]  # lm-eval makes no figure of this one
    for member in members:
        apart.add(member)
    figures = run_task(lm, manager.load([apart]), TaskRequest("apart", 0), **settings).metrics
    assert {name: figures[f"{name} acc"] for name in ("arc_challenge", "hellaswag")} == {
        part.task: part.metrics["acc"] for part in parts
    }
    metric = whole.metrics["acc"]
    assert metric.by_question == {**parts[0].metrics["acc"].by_question, **parts[1].metrics["acc"].by_question}
    assert metric.value == pytest.approx(sum(part.metrics["acc"].value for part in parts) / 2)


def test_tasks_without_data_are_named_before_a_model_is_loaded(tiny_llama, no_hub, monkeypatch, capsys):
    monkeypatch.setattr(eval_run, "load_trained", None)
    assert main(["eval", "--models", str(tiny_llama), "--tasks", "winogrande"]) == 1
    error = capsys.readouterr().err
    assert "expected the data of 'winogrande' from the hub or its local cache" in error
    assert "ConnectionError: the hub cannot be reached" in error
    assert "--local winogrande=FILE" in error


def test_a_file_of_the_wrong_fields_is_named(tiny_llama, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(eval_run, "load_trained", None)
    path = tmp_path / "arc.jsonl"
    path.write_text('{"problem": "1 + 1?"}\n')
    assert main(["eval", "--models", str(tiny_llama), "--local", f"arc={path}"]) == 1
    told = f"for arc_challenge with the columns question, choices, answerKey, got {str(path)!r} with problem."
    assert told in capsys.readouterr().err
    path.write_text('{"question": \n')
    assert main(["eval", "--models", str(tiny_llama), "--local", f"arc={path}"]) == 1
    assert "line 1" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["winogrande", "truthfulqa_mc2", "gsm8k"])
def test_known_columns_are_what_a_task_reads(name):
    """A question of them alone is asked, answered and, without any one of them, refused by name."""
    values = {
        "sentence": "a _ b",
        "option1": "x",
        "option2": "y",
        "answer": "1",
        "question": "q?",
        "mc2_targets": {"choices": ["c", "d"], "labels": [1, 0]},
    }
    columns = LEADERBOARD[name].columns
    dataset = Dataset.from_list([{column: values[column] for column in columns}])
    request = TaskRequest(name, 0, "questions.jsonl")
    manager = importlib.import_module("lm_eval.tasks").TaskManager(**tasks._where_to_look([request]))
    (task,) = manager.load([tasks._local_spec(request, {tasks.QUESTIONS: dataset})])["tasks"].values()
    document = next(iter(task.test_docs()))
    assert task.doc_to_text(document) is not None
    assert task.doc_to_target(document) is not None
    if task.OUTPUT_TYPE == "multiple_choice":
        assert len(task.doc_to_choice(document)) == 2
    tasks._check_columns(name, "f", [*columns, "other"])
    for absent in columns:
        found = [column for column in columns if column != absent]
        with pytest.raises(ValueError, match=f"for {name} with the columns {', '.join(columns)}, got 'f' with"):
            tasks._check_columns(name, "f", found)


def test_unknown_task_names_the_close_ones(tiny_llama, monkeypatch, capsys):
    """Of all that lm-eval has, whose reading takes a quarter of a minute: here of one folder."""
    look = tasks._where_to_look
    assert look(parse_tasks(["arc_challange"], None, None)) == {}
    monkeypatch.setattr(tasks, "_where_to_look", lambda requests: look(parse_tasks(["arc_challenge"], None, None)))
    assert main(["eval", "--models", str(tiny_llama), "--tasks", "arc_challange"]) == 1
    assert "Did you mean arc_challenge" in capsys.readouterr().err
