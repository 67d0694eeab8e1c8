"""Training in one layout is training in any other: losses, metrics, counts of tokens."""

import pytest
from layout_models import build
from tiny import token_pairs, word_tokenizer
from trainers import trainer


def train(tmp_path, layout, *, model=None, **options):
    run = trainer(tmp_path / layout, word_tokenizer(), model, layout=layout, **options)
    run.train()
    return [line for line in run.state.log_history if "loss" in line]


@pytest.mark.parametrize("loss_type", ["dpo", "dpop"])
def test_training_is_the_same_in_any_layout(tmp_path, loss_type):
    rows = train(tmp_path, "rows", loss_type=loss_type)
    expected = [line["loss"] for line in rows]
    assert expected[-1] != pytest.approx(expected[0], rel=1e-2)  # it did train
    for layout in ("tree", "packed", "flat"):
        run = train(tmp_path, layout, loss_type=loss_type)
        assert [line["loss"] for line in run] == pytest.approx(expected, rel=1e-4), layout
        # policy and reference ran in the same layout: no log-ratio before the first update, no hinge active by rounding
        assert run[0]["dpop/step_0_max_logratio"] == run[0]["dpop/active_fraction"] == 0.0, layout
        for key in ("logps/chosen", "logps/rejected", "entropy", "mean_token_accuracy", "logits/chosen"):
            assert run[0][key] == pytest.approx(rows[0][key], rel=1e-5), (layout, key)


def test_auto_trains_as_it_should_in_either_case(tmp_path, caplog):
    # tiny_llama runs trees, here under gradient checkpointing; the same model in a window of 8 runs rows
    expected = [line["loss"] for line in train(tmp_path, "rows", max_steps=3)]
    auto = train(tmp_path, "auto", max_steps=3, gradient_checkpointing=True)
    assert [line["loss"] for line in auto] == pytest.approx(expected, rel=1e-4)
    assert auto[0]["tokens/computed_ratio"] < 1
    windowed = train(tmp_path, "auto", model=build("MistralConfig", {"sliding_window": 8}), max_steps=1)
    assert windowed[0]["tokens/computed_ratio"] == 1
    assert "Layout: two rows per pair, not a tree: mistral attends within a sliding window of 8" in caplog.text


def test_reference_columns_hold_for_any_layout(tmp_path):
    # a reference away from the policy, so that no pair is at the hinge's tie
    records = [{**record, "ref_chosen_logps": -20.0, "ref_rejected_logps": -21.0} for record in token_pairs()]
    rows, tree = (train(tmp_path, layout, records=records, max_steps=3) for layout in ("rows", "tree"))
    assert [line["loss"] for line in tree] == pytest.approx([line["loss"] for line in rows], rel=1e-4)


def test_tokens_are_counted(tmp_path):
    # pair 0: prompt 3, answers of 4 that part after 1, so 3 + 1 + 3 + 3 of 14; pair 1: 4, 6, 2: 4 + 2 + 4 + 4 of 20
    records = token_pairs(2)
    settings = {"records": records, "max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    tree, rows = (train(tmp_path, layout, **settings) for layout in ("tree", "rows"))
    assert [line["num_tokens"] for line in tree] == [line["num_tokens"] for line in rows] == [34, 68]
    assert [line["num_computed_tokens"] for line in tree] == [24, 48]
    assert tree[0]["tokens/computed_ratio"] == pytest.approx(24 / 34)
    assert tree[0]["tokens/padding_share"] == pytest.approx(4 / 28)  # two rows of 14
    assert rows[0]["tokens/computed_ratio"] == 1.0
    assert rows[0]["tokens/padding_share"] == pytest.approx(6 / 40)  # four rows of 10


def test_trainer_refuses_a_tree_by_name(tmp_path):
    windowed = build("MistralConfig", {"sliding_window": 8})  # max_length is 1024
    with pytest.raises(ValueError, match=r"layout: expected models that can run 'tree'.*sliding window of 8"):
        trainer(tmp_path, word_tokenizer(), windowed, layout="tree")
