"""What a script brings along or reads: a collator, a function for metrics, attributes of TRL's trainer."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from dpop_trainer import DPOPTrainer
from dpop_trainer.batches.own_collator import batch_of_rows
from peft import LoraConfig
from tiny import tiny_llama, token_pairs, word_tokenizer
from trainers import answer_logp, config, logged

LORA = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")


def build(tmp_path, *, model=None, data_collator=None, compute_metrics=None, **options):
    data = Dataset.from_list(token_pairs())
    return DPOPTrainer(
        model or tiny_llama(),
        args=config(tmp_path, **options),
        data_collator=data_collator,
        train_dataset=data,
        eval_dataset=data,
        processing_class=word_tokenizer(),
        compute_metrics=compute_metrics,
        peft_config=LORA,
    )


def logps_by_hand(model, pairs):
    """Of the chosen answers, and of the rejected ones."""
    with torch.no_grad():
        return [
            [answer_logp(model.eval(), pair["prompt_ids"], pair[f"{name}_ids"]).item() for pair in pairs]
            for name in ("chosen", "rejected")
        ]


@pytest.mark.parametrize("layout", ["rows", "tree"])
def test_metrics_are_made_of_the_log_probs_of_all_pairs(tmp_path, layout):
    found = []

    def compute_metrics(given):
        found.append(given)
        chosen, rejected, _, _ = given.predictions
        return {"median_margin": np.median(chosen - rejected), "eval_own": torch.tensor(2.0)}

    options = {"include_for_metrics": ["loss"], "per_device_eval_batch_size": 2, "layout": layout}
    run = build(tmp_path, compute_metrics=compute_metrics, learning_rate=1e-2, loss_type="dpo", **options)
    run.train()
    metrics = run.evaluate()
    (given,) = found
    assert given.label_ids.tolist() == [0, 1, 2, 3, 4]
    expected = [values for model in (run.model, tiny_llama()) for values in logps_by_hand(model, token_pairs())]
    assert np.array(given.predictions).tolist() == [pytest.approx(values, rel=2e-6) for values in expected]
    assert given.losses.mean() == pytest.approx(metrics["eval_loss"], rel=1e-6)
    # a difference of two sums of up to 60 nats, each within 2e-6 of its value
    margins = np.array(expected[0]) - np.array(expected[1])
    assert metrics["eval_median_margin"] == pytest.approx(np.median(margins), abs=2 * 60 * 2e-6)
    assert metrics["eval_own"] == 2.0
    again = run.evaluate({"a": run.eval_dataset})
    assert again["eval_a_median_margin"] == metrics["eval_median_margin"]


def test_metrics_that_accumulate_are_asked_once_for_the_result(tmp_path):
    asked = []

    def compute_metrics(given, compute_result):
        asked.append((len(given.label_ids), given.losses, compute_result))
        return {"pairs": len(given.label_ids)}

    best = {"metric_for_best_model": "pairs", "eval_strategy": "steps", "eval_steps": 1, "max_steps": 1}
    run = build(tmp_path, compute_metrics=compute_metrics, batch_eval_metrics=True, **best)
    run.train()
    assert asked == [(5, None, True)]
    assert logged(run, "eval_pairs") == [5]


def trl_rows(records):
    """As TRL's collator lays pairs out, by hand: chosen rows, then rejected ones."""
    answers = [(record["prompt_ids"], record[key]) for key in ("chosen_ids", "rejected_ids") for record in records]
    length = max(len(prompt) + len(answer) for prompt, answer in answers)

    def padded(row):
        return row + [0] * (length - len(row))

    return {
        "input_ids": torch.tensor([padded(prompt + answer) for prompt, answer in answers]),
        "attention_mask": torch.tensor([padded([1] * len(prompt + answer)) for prompt, answer in answers]),
        "completion_mask": torch.tensor([padded([0] * len(prompt) + [1] * len(answer)) for prompt, answer in answers]),
    }


def test_rows_are_understood(tmp_path):
    # in fp64: AdamW's steps are of one length however small a gradient is, and in fp32 follow its rounding too
    runs = [
        build(tmp_path / str(i), model=tiny_llama().double(), data_collator=collator)
        for i, collator in enumerate((trl_rows, None))
    ]
    for run in runs:
        run.train()
    for key in ("loss", "num_tokens", "logps/chosen", "entropy"):
        assert logged(runs[0], key) == pytest.approx(logged(runs[1], key), rel=1e-5)


def test_a_batch_of_rows_by_hand():
    rows = {
        "input_ids": torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0], [5, 6, 11, 0], [9, 12, 13, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]]),
        "completion_mask": torch.tensor([[0, 0, 1, 1], [0, 1, 0, 0], [0, 0, 1, 0], [1, 1, 1, 0]]),
        "ref_chosen_logps": torch.tensor([-1.0, -2.0]),
        "ref_rejected_logps": torch.tensor([-3.0, -4.0]),
    }
    batch = batch_of_rows(rows, torch.tensor([4, 6]))
    # pair 4: 7 and 8 by 6 and 7, 11 by 6 in row 2; pair 6: 10 by 9 in row 1, 12 and 13 in row 3; nothing predicts its 9
    assert batch.target_ids.tolist() == [7, 8, 11, 10, 12, 13]
    assert batch.score_positions.tolist() == [1, 2, 9, 4, 12, 13]
    assert batch.cu_seqlens.tolist() == [0, 0, 2, 3, 3, 4, 6]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.ref_segment_logps.tolist() == [[0.0, -1.0, -3.0], [0.0, -2.0, -4.0]]
    assert batch.token_counts.tolist() == [12, 12]


@pytest.mark.parametrize(
    ("collator", "message"),
    [
        (lambda records: {"input_ids": torch.zeros(2, 2)}, r"data_collator: expected it to return .*, got input_ids\."),
        (lambda records: {**trl_rows(records), "pixel_values": 0}, r"data_collator: .*completion_mask, pixel_values\."),
        (
            lambda records: trl_rows(records[:1]),
            r"data_collator: expected a row for each answer of 3 pairs.*got 2 rows",
        ),
    ],
    ids=["one key", "one more", "too few rows"],
)
def test_what_a_collator_may_not_return(tmp_path, collator, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path, data_collator=collator).train()


def test_attributes_of_trl_s_trainer(tmp_path):
    run = build(tmp_path, loss_type=["dpo", "sft"], loss_weights=[1.0, 0.5], beta=0.2)
    assert (run.beta, run.loss_types, run.loss_weights) == (0.2, ["dpo", "sft"], [1.0, 0.5])
    assert (run.label_smoothing, run.use_weighting, run.ld_alpha) == (0.0, False, None)
    assert (run.precompute_ref_logps, run.padding_free, run.aux_loss_enabled) == (False, False, False)
    run.beta = 0.4  # as a callback that has it grow with the steps
    assert run.args.loss_options().beta == 0.4
    batch = run.data_collator([run.train_dataset[i] for i in range(2)])
    ours = [values.tolist() for values in run.compute_ref_log_probs(run.model, batch)]
    assert ours == [pytest.approx(values, rel=2e-6) for values in logps_by_hand(tiny_llama(), token_pairs()[:2])]
