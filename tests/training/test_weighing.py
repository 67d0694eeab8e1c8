"""Tokens and pairs that count by a weight, in the trainer: against sums and means by hand."""

import pytest
from datasets import Dataset
from rounding import SUM
from tiny import tiny_llama, token_pairs, word_tokenizer
from trainers import answer_logp, trainer


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


def ragged(num_pairs=3):
    """Pairs whose rejected answers go on for one token more, or for two."""
    return [
        {**pair, "rejected_ids": pair["rejected_ids"] + [7, 8][: 1 + i % 2]}
        for i, pair in enumerate(token_pairs(num_pairs))
    ]


def test_reference_of_weighted_tokens_is_kept_for_its_alpha(tmp_path, tokenizer):
    """The second run finds the first one's folder beside its own, and takes nothing from it."""
    model, records = tiny_llama(), ragged()
    options = {"precompute_ref_log_probs": True, "ref_cache_dir": str(tmp_path / "cache"), "prefix_sharing": False}
    for num_folders, alpha in ((1, None), (2, 0.25), (2, 1.0)):
        run = trainer(tmp_path, tokenizer, records=records, ld_alpha=alpha, **options)
        for record, columns in zip(records, run.train_dataset, strict=True):
            prompt, rejected = record["prompt_ids"], record["rejected_ids"]
            whole = answer_logp(model, prompt, rejected).item()
            start = answer_logp(model, prompt, rejected[: len(record["chosen_ids"])]).item()
            weight = 1.0 if alpha is None else alpha
            assert columns["ref_rejected_logps"] == pytest.approx(start + weight * (whole - start), abs=SUM)
            chosen = answer_logp(model, prompt, record["chosen_ids"]).item()
            assert columns["ref_chosen_logps"] == pytest.approx(chosen, abs=SUM)
        assert len(list((tmp_path / "cache").iterdir())) == num_folders


def test_columns_of_whole_sums_do_not_go_with_weighted_tokens(tmp_path, tokenizer):
    given = [{**pair, "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0} for pair in ragged()]
    message = (
        "ld_alpha: expected pairs without the columns ref_chosen_logps and ref_rejected_logps, since they are sums"
    )
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, tokenizer, records=given, ld_alpha=0.5)
    run = trainer(tmp_path, tokenizer, records=ragged(), ld_alpha=0.5)
    with pytest.raises(ValueError, match=message):
        run.evaluate(Dataset.from_list(given))
    trainer(tmp_path, tokenizer, records=given, ld_alpha=1.0)
