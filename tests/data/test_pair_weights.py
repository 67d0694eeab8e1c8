"""What a pair counts for: read from records of any form, refused by record, dropped where it is nothing."""

import math

import pytest
from datasets import Dataset
from dpop_trainer.batches import PairCollator
from dpop_trainer.data import TokenisedStream, tokenise_pairs
from dpop_trainer.data.stream import as_stream
from tiny import text_pairs, token_pairs, word_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


def weighted(weights, pairs=None):
    """Pairs with a column `weight`; none where it is to be absent."""
    pairs = pairs if pairs is not None else text_pairs(len(weights))
    return [pair if w is None else {**pair, "weight": w} for pair, w in zip(pairs, weights, strict=True)]


def by_whole(records, tokenizer, **options):
    dataset, counts = tokenise_pairs(Dataset.from_list(records), tokenizer, **options)
    return list(dataset), counts


def by_stream(records, tokenizer, **options):
    dataset = Dataset.from_list(records).to_iterable_dataset()
    stream = TokenisedStream(as_stream(dataset), tokenizer, name="train", **options)
    return list(stream), stream.counts


@pytest.mark.parametrize("road", [by_whole, by_stream])
def test_weights_reach_the_batch_and_zero_is_dropped(road, tokenizer):
    pairs, counts = road(weighted([1.0, 2.0, 0.0, None, 0.5]), tokenizer, pair_weight="weight")
    assert [(pair["pair_id"], pair["weight"]) for pair in pairs] == [(0, 1.0), (1, 2.0), (3, 1.0), (4, 0.5)]
    assert (counts.num_pairs_in, counts.num_pairs, counts.dropped_zero_weight, counts.weighted) == (5, 4, 1, 2)
    assert "1 of weight zero" in counts.summary()
    assert "2 pairs have a weight other than 1 in the loss." in counts.summary()
    batch = PairCollator(pad_token_id=0)(pairs)
    assert batch.pair_weights.tolist() == [1.0, 2.0, 1.0, 0.5]
    assert batch.weight_sum == 4.5


@pytest.mark.parametrize("road", [by_whole, by_stream])
def test_weights_of_one_are_none(road, tokenizer):
    for rule, weights in (("weight", [1.0, None, 1.0]), ("none", [0.0, 3.0, -1.0])):
        pairs, counts = road(weighted(weights), tokenizer, pair_weight=rule)
        assert len(pairs) == counts.num_pairs == 3
        assert all("weight" not in pair for pair in pairs)
        assert PairCollator(pad_token_id=0)(pairs).pair_weights is None


@pytest.mark.parametrize("road", [by_whole, by_stream])
@pytest.mark.parametrize("weight", [-0.5, math.nan, math.inf])
def test_a_weight_that_is_none_is_a_bad_record(road, weight, tokenizer):
    records = weighted([1.0, weight, 2.0])
    shown = "no number" if math.isnan(weight) else str(weight)
    with pytest.raises(ValueError, match=rf"record 1: weight: expected a finite number >= 0, got {shown}\. Correct"):
        road(records, tokenizer, pair_weight="weight")
    pairs, counts = road(records, tokenizer, pair_weight="weight", on_bad_record="skip")
    assert [pair["weight"] for pair in pairs] == [1.0, 2.0]
    assert counts.skipped_bad == 1


def test_margins_of_scores_are_weights(tokenizer):
    scored = [
        {**pair, "score_chosen": chosen, "score_rejected": 2.0}
        for pair, chosen in zip(text_pairs(3), (5.0, 2.0, 2.5), strict=True)
    ]
    pairs, counts = by_whole(scored, tokenizer, pair_weight="score_margin")
    assert [pair["weight"] for pair in pairs] == [3.0, 0.5]
    assert counts.dropped_zero_weight == 1
    given = [{**pair, "score_margin": margin} for pair, margin in zip(token_pairs(2), (4.0, 0.25), strict=True)]
    assert [pair["weight"] for pair in by_whole(given, tokenizer, pair_weight="score_margin")[0]] == [4.0, 0.25]
    for records, message in (
        (
            [*given, {**given[0], "score_margin": -1.0}],
            "expected the chosen answer to be judged the better one, got -1",
        ),
        (token_pairs(2), "expected a finite margin, or scores of both answers, got none"),
    ):
        with pytest.raises(ValueError, match=f"score_margin: {message}"):
            by_whole(records, tokenizer, pair_weight="score_margin")
    with pytest.raises(ValueError, match="pair_weight: expected one of weight, score_margin, none, got 'margin'"):
        by_whole(given, tokenizer, pair_weight="margin")
