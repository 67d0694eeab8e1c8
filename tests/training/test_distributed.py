"""DPOPTrainer on several ranks is DPOPTrainer on one: the same losses, weights and evaluation, whatever the wrapper.

And whether a rank runs batches of its own, or some tokens of batches that others run too.
"""

import pytest
import torch
from datasets import Dataset
from dpop_trainer import KTOConfig, KTOTrainer
from dpop_trainer.models.tensor_parallel import knows_tensor_parallelism
from dpop_trainer.run_folder.checkpoints import CheckpointError
from dpop_trainer.training.non_finite import NonFiniteError
from rank_runs import (
    CASES,
    IN_TWO,
    TENSOR_PARALLEL,
    Engine,
    build,
    check_equal,
    check_saved,
    run_here,
    run_on,
    summary,
    train,
    train_in_two,
)
from ranks import launch, launcher_environment
from rounding import sum_of
from tiny import text_pairs, tiny_llama, word_tokenizer

# The grid of engines and cases is `tests/engines.py`; here is each engine with some, and each kind of case under one:
# pairs of unequal weight on four ranks, FSDP2 with checkpointing on two that run their batches together.
ON_TWO_RANKS = {
    "ddp": (None, ["accumulated", "lora"]),
    # which needs a rank that has no pair at every forward
    "fsdp2": ("fsdp2_8.yaml", ["moving", "precomputed", "idle_rank"]),
}
# three ranks have one, two and two of an epoch's last five pairs
THIRDS = {"layout": "rows", "pairs_per_step": 6}
# two groups have pairs of unequal weight, and shares of unequal size in each third step
SPREAD = {**CASES["weighted"], "precompute_ref_log_probs": True, "loss_type": "dpo", "dpop_lambda": 50.0}
ON_MORE_RANKS = {
    Engine(3): ["thirds"],
    Engine(2, 2, "fsdp2_8.yaml"): ["checkpointed in two"],
    Engine(3, 3): ["tree"],
    Engine(4, 2): ["spread"],
    Engine(2, 2, TENSOR_PARALLEL): ["rows in two"],
}
# transformers spreads a model over the accelerators that there are, which gloo does not know; an older one is refused
if torch.accelerator.is_available() or not knows_tensor_parallelism():
    del ON_MORE_RANKS[Engine(2, 2, TENSOR_PARALLEL)]


def run_on_two(rank, folder, names):
    """On each rank: cases, a run that stops and resumes, and one that meets a NaN. Results go to `folder`."""
    results = {name: summary(train(folder / name, num_ranks=2, **CASES[name])) for name in names}

    trainer = train_in_two(folder / "resumed", num_ranks=2, layout="rows")
    results["rows"] = summary(trainer)
    trainer.save_model()

    with pytest.raises(NonFiniteError) as raised:
        train(folder / "bad", num_ranks=2, layout="rows", bad_pair=3)
    (folder / f"error{rank}.txt").write_text(str(raised.value))
    with pytest.raises(CheckpointError) as raised:  # before the first step
        train(folder / "other", num_ranks=2, layout="rows", seed=3 + rank, num_pairs=11 - rank, max_steps=5 + rank)
    (folder / f"other{rank}.txt").write_text(str(raised.value))
    if rank == 0:
        torch.save(results, folder / "results.pt")


@pytest.mark.forked
@pytest.mark.slow
def test_two_ranks_equal_one_process(tmp_path):
    for wrapper, (recipe, names) in ON_TWO_RANKS.items():
        folder = tmp_path / wrapper
        folder.mkdir()
        launch(run_on_two, folder, names, env=launcher_environment(recipe) if recipe else None)
        results = torch.load(folder / "results.pt")
        cases = {name: CASES[name] for name in results}
        for name, expected in run_here(tmp_path / f"{wrapper}-alone", cases).items():
            check_equal(results[name], expected)
        check_folders(folder, results)


@pytest.mark.forked
@pytest.mark.slow
def test_more_ranks_and_ranks_on_one_batch_equal_one_process(tmp_path):
    cases = {**CASES, "thirds": THIRDS, "spread": SPREAD}
    names = [name.removesuffix(IN_TWO) for found in ON_MORE_RANKS.values() for name in found]
    alone = run_here(tmp_path / "alone", {name: cases[name] for name in names})
    for i, (engine, found) in enumerate(ON_MORE_RANKS.items()):
        results = run_on(engine, tmp_path / str(i), {name: cases[name.removesuffix(IN_TWO)] for name in found})
        for name in found:
            check_equal(results[name], alone[name.removesuffix(IN_TWO)])
        if engine.recipe == TENSOR_PARALLEL:
            for folder in (tmp_path / str(i) / "rows in two", tmp_path / str(i) / "rows in two" / "checkpoint-10"):
                check_saved(folder, results["rows in two"])


def check_folders(tmp_path, results):
    resumed = tmp_path / "resumed"
    assert [path.name for path in resumed.glob("*checkpoint-*")] == ["checkpoint-10"]
    for folder in (resumed, resumed / "checkpoint-10"):
        check_saved(folder, results["rows"])

    # both ranks stop at the same step; the one that had the pair says so and saves the batch
    errors = [(tmp_path / f"error{rank}.txt").read_text() for rank in range(2)]
    assert errors[0].split(":")[0] == errors[1].split(":")[0]
    (report,) = (tmp_path / "bad").glob("nonfinite_step_*/report_rank*.json")
    with_pair = int(report.stem.removeprefix("report_rank"))
    assert "pair ids [3]" in errors[with_pair]
    assert "no pair of this rank" in errors[1 - with_pair]
    # and neither trains on what the other has not
    one, other = [(tmp_path / f"other{rank}.txt").read_text() for rank in range(2)]
    assert one == other
    assert one.startswith("process 1: expected the configuration, data and model of process 0, got another ")
    for told in ("max_steps: 5 there, 6 here", "seed: 3 there, 4 here", "training data (digest): "):
        assert told in one
    assert not (tmp_path / "other" / "metrics.jsonl").exists()


def run_others_together(rank, folder, expected):
    """Answers with a label, whose KL term is of a second batch; other loaders; a model that looks at neighbours."""
    found = train_others(folder, sequence_parallel_size=2)
    # as in `check_equal`: log-ratios are differences of sums
    assert found == {key: pytest.approx(value, rel=1e-5, abs=sum_of(16, 32)) for key, value in expected.items()}
    trainer = build(folder / "stranger", sequence_parallel_size=2)
    mlp = trainer.model.model.layers[0].mlp
    mlp.register_forward_pre_hook(lambda module, args: (args[0] + args[0].roll(1, dims=1),))
    with pytest.raises(
        ValueError, match=r"sequence_parallel_size: expected log-probs that do not depend .* Set it to 1"
    ):
        trainer.train()
    assert trainer.state.global_step == 0


def train_others(folder, **options):
    """Of three steps with answers, with a stream, and with a budget of positions: step and key -> value."""
    short = {"max_steps": 3, "eval_strategy": "no", **options}
    runs = {
        "answers": train_kto(folder / "answers", **options),
        "stream": train(folder / "stream", streamed=True, layout="auto", **short),
        "budget": train(folder / "budget", max_tokens_per_batch=96, pad_to_multiple_of=2, layout="tree", **short),
    }
    runs["budget"].compute_metrics = lambda predictions: {"pairs": len(predictions.label_ids)}
    assert runs["budget"].evaluate()["eval_pairs"] == 5  # each counted once, whoever ran it
    lines = [(name, line) for name, run in runs.items() for line in summary(run)["lines"]]
    return {f"{name}, {key}, step {line['step']}": value for name, line in lines for key, value in line.items()}


def train_kto(folder, **options):
    """What three steps log."""
    records = [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for pair in text_pairs(6)
        for side in ("chosen", "rejected")
    ]
    args = KTOConfig(
        str(folder),
        per_device_train_batch_size=4,
        max_steps=3,
        learning_rate=2e-4,
        logging_steps=1,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    trainer = KTOTrainer(
        tiny_llama(), args=args, train_dataset=Dataset.from_list(records), processing_class=word_tokenizer()
    )
    trainer.train()
    return trainer


@pytest.mark.forked
def test_answers_other_loaders_and_a_stranger(tmp_path):
    expected = train_others(tmp_path / "alone")
    assert len([key for key in expected if ", loss, " in key]) == 9
    launch(run_others_together, tmp_path, expected)
