"""Batches: the tensors of small pairs written out by hand, and the scores of a real model through them."""

import itertools

import pytest
import torch
from dpop_trainer.batches import PairCollator, padded_rows
from dpop_trainer.data import PairTree
from dpop_trainer.data.edits import common_prefix_length
from transformers import LlamaConfig, LlamaForCausalLM

PAD = 0
# two pairs: answers that part after one token; one answer that is the beginning of the other
FORKED = {"prompt_ids": [11, 12], "chosen_ids": [21, 31, 32], "rejected_ids": [21, 41], "pair_id": 5}
NESTED = {"prompt_ids": [13], "chosen_ids": [22], "rejected_ids": [22, 42], "pair_id": 3}


def collate(*records, **options):
    return PairCollator(pad_token_id=PAD, **options)(list(records))


def assert_tensor(tensor: torch.Tensor, values: list, dtype: torch.dtype) -> None:
    assert tensor.dtype == dtype
    assert tensor.tolist() == values


@pytest.mark.parametrize(
    ("chosen", "rejected", "shared", "tails"),
    [
        pytest.param([1, 2, 3], [1, 4], [1], ([2, 3], [4]), id="part after one"),
        pytest.param([1, 2], [3, 2], [], ([1, 2], [3, 2]), id="part at once"),
        pytest.param([1, 2], [1], [1], ([2], []), id="rejected begins chosen"),
        pytest.param([1], [1, 2], [1], ([], [2]), id="chosen begins rejected"),
        pytest.param([1, 2], [1, 2], [1, 2], ([], []), id="identical"),
        pytest.param([1, 2, 9], [1, 3, 9], [1], ([2, 9], [3, 9]), id="equal again later"),
    ],
)
def test_tree(chosen, rejected, shared, tails):
    assert PairTree.from_ids([7, 8], chosen, rejected, share_prefix=True) == ([7, 8], shared, *tails)
    assert PairTree.from_ids([7, 8], chosen, rejected, share_prefix=False) == ([7, 8], [], chosen, rejected)
    assert common_prefix_length(chosen, rejected) == len(shared)


def test_rows_with_shared_prefix():
    batch = collate(FORKED, NESTED)
    expected = {
        "input_ids": (
            [[11, 12, 21, 31, 32], [13, 22, PAD, PAD, PAD], [11, 12, 21, 41, PAD], [13, 22, 42, PAD, PAD]],
            torch.int64,
        ),
        "attention_mask": ([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 0, 0]], torch.int64),
        # rows begin at 0, 5, 10, 15: 21 is predicted by row 0's 12, 31 and 32 by 21 and 31, 41 by row 2's 21;
        # 22 by row 1's 13, 42 by row 3's 22
        "score_positions": ([1, 2, 3, 12, 5, 16], torch.int64),
        "target_ids": ([21, 31, 32, 41, 22, 42], torch.int64),
        # shared, chosen, rejected: 1, 2, 1 tokens, then 1, 0, 1
        "cu_seqlens": ([0, 1, 3, 4, 5, 5, 6], torch.int32),
        "pair_ids": ([5, 3], torch.int64),
        # (2 + 3) + (2 + 2) tokens of the first pair's rows and (1 + 1) + (1 + 2) of the second's, all computed
        "token_counts": ([14, 14], torch.int64),
    }
    assert batch.keys() == expected.keys()
    for name, (values, dtype) in expected.items():
        assert_tensor(batch[name], values, dtype)


def test_rows_without_shared_prefix():
    shared, apart = collate(FORKED, NESTED), collate(FORKED, NESTED, prefix_sharing=False)
    for name in ("input_ids", "attention_mask", "pair_ids"):
        assert torch.equal(apart[name], shared[name])
    assert_tensor(apart["score_positions"], [1, 2, 3, 11, 12, 5, 15, 16], torch.int64)
    assert_tensor(apart["target_ids"], [21, 31, 32, 21, 41, 22, 22, 42], torch.int64)
    assert_tensor(apart["cu_seqlens"], [0, 0, 3, 5, 5, 6, 8], torch.int32)


def test_identical_answers_are_scored_once():
    batch = collate({**FORKED, "rejected_ids": FORKED["chosen_ids"]})
    assert_tensor(batch["target_ids"], [21, 31, 32], torch.int64)
    assert_tensor(batch["score_positions"], [1, 2, 3], torch.int64)
    assert_tensor(batch["cu_seqlens"], [0, 3, 3, 3], torch.int32)


def test_length_is_rounded_up_to_a_multiple():
    batch = collate(FORKED, NESTED, pad_to_multiple_of=4)
    assert batch["input_ids"].shape == (4, 8)
    # row 2 now begins at 16 and row 3 at 24
    assert batch["score_positions"].tolist() == [1, 2, 3, 18, 8, 25]
    assert collate(FORKED, pad_to_multiple_of=5)["input_ids"].shape == (2, 5)


def test_a_pad_token_in_the_text_is_not_padding():
    batch = collate({**FORKED, "chosen_ids": [PAD, 31]})
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 1]]
    assert batch["target_ids"].tolist() == [PAD, 31, 21, 41]


def test_no_pairs():
    batch = padded_rows([], pad_token_id=PAD)
    assert batch["input_ids"].shape == (0, 0)
    assert_tensor(batch["cu_seqlens"], [0], torch.int32)
    assert_tensor(batch["target_ids"], [], torch.int64)


def test_reference_log_probs():
    batch = collate(
        {**FORKED, "ref_chosen_logps": -1.5, "ref_rejected_logps": -2.25},
        {**NESTED, "ref_chosen_logps": -0.5, "ref_rejected_logps": -4},
    )
    assert_tensor(batch["ref_segment_logps"], [[0.0, -1.5, -2.25], [0.0, -0.5, -4.0]], torch.float32)


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_reference_log_probs_that_are_not_finite(bad):
    good = {**FORKED, "ref_chosen_logps": -1.0, "ref_rejected_logps": -1.0}
    with pytest.raises(ValueError, match=r"expected finite values, got \[-1\.0, (nan|-inf)\] for pair 3"):
        collate(good, {**NESTED, "ref_chosen_logps": -1.0, "ref_rejected_logps": bad})


def test_reference_log_probs_of_half_a_batch():
    with pytest.raises(ValueError, match="expected both in every record of a batch or in none, got pair 3 without"):
        collate({**FORKED, "ref_chosen_logps": -1.0, "ref_rejected_logps": -1.0}, NESTED)
    with pytest.raises(ValueError, match="got pair 5 without"):
        collate({**FORKED, "ref_chosen_logps": -1.0})


@pytest.mark.parametrize(
    ("record", "options", "message"),
    [
        pytest.param({**FORKED, "prompt_ids": []}, {}, "prompt_ids: expected at least one token.* pair 5", id="prompt"),
        pytest.param({"prompt_ids": [1]}, {}, "got a record without chosen_ids, rejected_ids, pair_id", id="columns"),
        pytest.param(FORKED, {"vocab_size": 41}, r"expected ids in \[0, 41\), got 41 for pair 5", id="beyond"),
        pytest.param({**FORKED, "chosen_ids": [-100]}, {}, "expected ids >= 0, got -100 for pair 5", id="label mask"),
        pytest.param(FORKED, {"pad_token_id": None}, "pad_token_id: expected a token id, got None", id="no pad token"),
        pytest.param(FORKED, {"pad_to_multiple_of": 0}, "pad_to_multiple_of: expected at least 1", id="multiple"),
    ],
)
def test_unusable_input(record, options, message):
    with pytest.raises(ValueError, match=message):
        PairCollator(**{"pad_token_id": PAD, **options})([record])


def test_the_pad_token_needs_an_embedding_only_where_it_is_used():
    nested_beyond = {"pad_token_id": 50, "vocab_size": 50}
    with pytest.raises(ValueError, match=r"in \[0, 50\), got 50 for pair 3.*a pad token that the model has"):
        PairCollator(**nested_beyond)([FORKED, NESTED])
    equally_long = {**FORKED, "rejected_ids": [21, 41, 42]}
    assert PairCollator(**nested_beyond)([equally_long])["attention_mask"].all()


VOCAB = 29


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,  # far from uniform predictions
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=PAD,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).double().eval()


def random_pairs(num_pairs: int) -> list[dict]:
    """Prompts of 1 to 6 tokens, answers of 1 to 9 that share a beginning of any length."""
    pairs = []
    for pair_id in range(num_pairs):
        prompt, shared, chosen, rejected = (
            torch.randint(VOCAB, (int(torch.randint(low, high, ())),)).tolist()
            for low, high in ((1, 7), (0, 5), (0, 5), (1, 5))
        )
        chosen = shared + chosen or [3]
        pairs.append(
            {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": shared + rejected, "pair_id": pair_id}
        )
    return pairs


@torch.no_grad()
def answer_logp(model: LlamaForCausalLM, prompt_ids: list[int], answer_ids: list[int]) -> float:
    """log π(answer | prompt) of one unpadded row, by definition."""
    log_probs = model(torch.tensor([prompt_ids + answer_ids])).logits[0].log_softmax(-1)
    return sum(float(log_probs[len(prompt_ids) + i - 1, token]) for i, token in enumerate(answer_ids))


@pytest.mark.parametrize("prefix_sharing", [True, False])
@pytest.mark.parametrize("pad_to_multiple_of", [None, 8])
def test_a_models_scores_through_the_batch(model, prefix_sharing, pad_to_multiple_of):
    """Segment sums at score_positions are the answers' log-probs, each row run alone; differences are rounding."""
    pairs = random_pairs(12)
    assert any(pair["chosen_ids"][0] == pair["rejected_ids"][0] for pair in pairs)
    collator = PairCollator(
        pad_token_id=PAD, prefix_sharing=prefix_sharing, pad_to_multiple_of=pad_to_multiple_of, vocab_size=VOCAB
    )
    batch = collator(pairs)
    with torch.no_grad():
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    scored = logits.reshape(-1, VOCAB)[batch["score_positions"]].log_softmax(-1)
    token_logps = scored.gather(-1, batch["target_ids"].unsqueeze(-1)).squeeze(-1)
    bounds = batch["cu_seqlens"].tolist()
    assert bounds[-1] == len(token_logps)
    sums = [token_logps[start:end].sum().item() for start, end in itertools.pairwise(bounds)]
    for pair, (shared, chosen, rejected) in zip(pairs, zip(*[iter(sums)] * 3, strict=True), strict=True):
        assert shared + chosen == pytest.approx(answer_logp(model, pair["prompt_ids"], pair["chosen_ids"]), abs=1e-10)
        assert shared + rejected == pytest.approx(
            answer_logp(model, pair["prompt_ids"], pair["rejected_ids"]), abs=1e-10
        )
        if not prefix_sharing:
            assert shared == 0
