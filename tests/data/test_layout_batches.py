"""Layouts as tensors: trees, packed and flat rows written out by hand, and which of them a batch takes."""

import pytest
import torch
from dpop_trainer import DPOPConfig
from dpop_trainer.batches import PairCollator, flat_row, packed_rows, tree_rows, trie_mask
from dpop_trainer.batches.flat_attention import Run, block_mask, runs
from dpop_trainer.batches.layouts import cheaper_layout, pack_pairs
from dpop_trainer.data import PairTree

PAD = 0
# answers that part after one token; one answer that is the beginning of the other
FORKED = PairTree([11, 12], [21], [31, 32], [41])
NESTED = PairTree([13], [22], [], [42])


def test_tree_rows_by_hand():
    batch = tree_rows([FORKED, NESTED], pad_token_id=PAD)
    expected = {
        "input_ids": [[11, 12, 21, 31, 32, 41], [13, 22, 42, PAD, PAD, PAD]],
        "attention_mask": [[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]],
        # 41 stands where 31 stands: right after 21
        "position_ids": [[0, 1, 2, 3, 4, 3], [0, 1, 2, 0, 0, 0]],
        # 31 and 32 are seen up to the column of 41, which does not follow from them
        "trie_ends": [[6, 6, 6, 5, 5, 6], [3, 3, 3, 6, 6, 6]],
        # 22 is the end of one answer, and within the other
        "num_sequences": [[2, 2, 2, 1, 1, 1], [2, 2, 1, 0, 0, 0]],
        # rows begin at 0 and 6. 21 is predicted by 12; 31 and 32 by 21 and 31; 41 by 21 again. 22 by 13, 42 by 22
        "score_positions": [1, 2, 3, 2, 6, 7],
        "target_ids": [21, 31, 32, 41, 22, 42],
        "cu_seqlens": [0, 1, 3, 4, 5, 5, 6],
        # 5 + 4 and 2 + 3 tokens in rows of their own; 6 and 3 here
        "token_counts": [14, 9],
    }
    assert {name: tensor.tolist() for name, tensor in batch.items()} == expected


def test_trie_mask_by_hand():
    ends = torch.tensor([[6, 6, 6, 5, 5, 6], [3, 3, 3, 6, 6, 6]])
    seen = trie_mask(ends)
    assert seen.shape == (2, 1, 6, 6)
    assert seen[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 0],
        [1, 1, 1, 0, 0, 1],  # 41 sees the prompt, 21 and itself, and not 31 32
    ]
    causal = torch.ones(3, 3).tril().bool()  # no chosen tail: plain causal, and so is the padding
    assert torch.equal(seen[1, 0], torch.block_diag(causal, causal).bool())
    added = trie_mask(ends, torch.bfloat16)
    assert added.dtype == torch.bfloat16
    assert torch.equal(added == 0, seen)
    assert (added[~seen] == torch.finfo(torch.bfloat16).min).all()


# pairs of one prompt: two that reject different answers to the same chosen one, and a pair of another prompt
SIBLINGS = [
    PairTree([11, 12], [21], [31], [41]),
    PairTree([11, 12], [21, 31], [], [51]),
    PairTree([13], [], [22], [23]),
]


def test_flat_row_by_hand():
    batch = flat_row(SIBLINGS, pad_token_id=PAD, pad_to_multiple_of=4)
    # sorted: 11 12 21 31 (twice), 11 12 21 31 51, 11 12 21 41, 13 22, 13 23
    expected = {
        "input_ids": [[11, 12, 21, 31, 51, 41, 13, 22, 23, PAD, PAD, PAD]],
        "attention_mask": [[1] * 9 + [0] * 3],
        "position_ids": [[0, 1, 2, 3, 4, 3, 0, 1, 1, 0, 0, 0]],
        "trie_ends": [[6, 6, 6, 5, 5, 6, 9, 8, 9, 12, 12, 12]],
        "num_sequences": [[4, 4, 4, 3, 1, 1, 2, 1, 1, 0, 0, 0]],
        # 21 by 12, 31 by 21, 41 by 21; 21 by 12 and 31 by 21 once more, 51 by 31; 22 and 23 by 13
        "score_positions": [1, 2, 2, 1, 2, 3, 6, 6],
        "target_ids": [21, 31, 41, 21, 31, 51, 22, 23],
        "cu_seqlens": [0, 1, 2, 3, 5, 5, 6, 6, 7, 8],
        # rows of their own: 4 + 4, 4 + 5, 2 + 2
        "token_counts": [21, 9],
    }
    assert {name: tensor.tolist() for name, tensor in batch.items()} == expected


def test_packed_rows_by_hand():
    # H = 1: T positions cost T + T²/6. The siblings' trie has 6 columns, the other's 3: two rows of 6 cost
    # 2 · 12 = 24, one of 9 costs 22.5
    packed = pack_pairs(SIBLINGS, hidden_size=1)
    assert packed.bins == [[0, 1, 2]]
    assert packed.cost == pytest.approx(22.5)
    # two pairs of 6 columns: two rows of 6 cost 24 again, and one of 12 costs 36
    apart = [PairTree([1], [2, 3, 4], [5], [6]), PairTree([7], [2, 3, 4], [5], [6])]
    packed = pack_pairs(apart, hidden_size=1)
    assert sorted(packed.bins) == [[0], [1]]
    assert packed.cost == pytest.approx(24.0)
    # pairs of 6, 3 and 3 columns: the short ones share a row, 2 rows of 6 against 3 of 6 (36) or 1 of 12 (36)
    batch = packed_rows(
        [apart[0], FORKED._replace(shared_ids=[], chosen_ids=[]), NESTED], pad_token_id=PAD, hidden_size=1
    )
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6], [11, 12, 41, 13, 22, 42]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 4], [0, 1, 2, 0, 1, 2]]
    assert batch["trie_ends"].tolist() == [[6, 6, 6, 6, 5, 6], [3, 3, 3, 6, 6, 6]]
    # pair by pair; the second row begins at 6
    assert batch["score_positions"].tolist() == [0, 1, 2, 3, 3, 7, 9, 10]
    assert batch["target_ids"].tolist() == [2, 3, 4, 5, 6, 41, 22, 42]


def test_runs_by_hand():
    batch = flat_row(SIBLINGS, pad_token_id=PAD, pad_to_multiple_of=4)
    assert runs(batch["trie_ends"][0].tolist()) == [
        Run(5, []),  # 11 12 21 31 51
        Run(1, [(0, 3)]),  # 41 after 11 12 21
        Run(2, []),  # 13 22
        Run(1, [(2, 1)]),  # 23 after 13
        Run(3, []),  # padding
    ]


def test_runs_are_the_mask():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        pairs = [
            PairTree.from_ids(
                *(torch.randint(1, 3, (5,), generator=generator).tolist() for _ in range(3)), share_prefix=True
            )
            for _ in range(6)
        ]
        ends = flat_row(pairs, pad_token_id=PAD, pad_to_multiple_of=8)["trie_ends"]
        found = runs(ends[0].tolist())
        starts = [sum(run.length for run in found[:i]) for i in range(len(found))]
        seen = torch.zeros(ends.shape[1], ends.shape[1], dtype=torch.bool)
        for start, run in zip(starts, found, strict=True):
            rows = range(start, start + run.length)
            for i in rows:
                seen[i, start : i + 1] = True
                for earlier, count in run.beginning:
                    seen[i, starts[earlier] : starts[earlier] + count] = True
        assert torch.equal(seen, trie_mask(ends)[0, 0])


def test_block_mask_keeps_what_the_mask_shows():
    ends = flat_row(SIBLINGS, pad_token_id=PAD, pad_to_multiple_of=128)["trie_ends"]
    mask = block_mask(ends, compiled=False)
    columns = torch.arange(128)
    seen = mask.mask_mod(torch.tensor(0), torch.tensor(0), columns[:, None], columns[None, :])
    assert torch.equal(seen, trie_mask(ends)[0, 0])


def test_tree_without_a_shared_prefix_shares_the_prompt():
    record = {"prompt_ids": [11, 12], "chosen_ids": [21, 31, 32], "rejected_ids": [21, 41], "pair_id": 0}
    batch = PairCollator(pad_token_id=PAD, layout="tree", prefix_sharing=False)([record])
    assert batch["input_ids"].tolist() == [[11, 12, 21, 31, 32, 21, 41]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 2, 3]]
    assert batch["score_positions"].tolist() == [1, 2, 3, 1, 5]
    assert batch["token_counts"].tolist() == [9, 7]


def test_tree_of_no_pairs():
    batch = tree_rows([], pad_token_id=PAD)
    assert batch["input_ids"].shape == batch["trie_ends"].shape == (0, 0)
    assert trie_mask(batch["trie_ends"]).shape == (0, 1, 0, 0)
    assert packed_rows([], pad_token_id=PAD)["input_ids"].shape == (0, 0)
    assert flat_row([], pad_token_id=PAD)["input_ids"].shape == (1, 0)


def test_unknown_layout_is_named():
    with pytest.raises(ValueError, match=r"layout: expected one of \('rows', 'tree', .*'auto'\), got 'forest'"):
        PairCollator(pad_token_id=PAD, layout="forest")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"layout: expected one of 'auto', 'rows', .*'flat', got 'forest'"):
        DPOPConfig(layout="forest")


@pytest.mark.parametrize(("prompt_length", "expected"), [(16, "rows"), (17, "tree")])
def test_cheaper_layout_breaks_even_where_derived(prompt_length, expected):
    # tails t = 100 each, H = 192: tree where 6 H m + m² >= 2 t², 1152 m + m² >= 20000: m = 17 gives 19873 and
    # 18 gives 21060, so that it needs one shared token besides a prompt of 17
    tree = PairTree([1] * prompt_length, [2], [3] * 100, [4] * 100)
    assert cheaper_layout([tree], hidden_size=192) == expected


def test_without_attention_every_shared_token_pays():
    assert cheaper_layout([PairTree([1], [], [3] * 100, [4] * 100)]) == "tree"


def test_padding_counts_in_the_cost():
    # H = 10: T positions cost T + T²/60. A tree of 1 + 10 + 10 costs 28.4, two rows of 11 cost 2 · 13.0
    long_tails = PairTree([1], [], [3] * 10, [4] * 10)
    assert cheaper_layout([long_tails], hidden_size=10) == "rows"
    # rounded up, a row is as long as a tree: 30.1 against 2 · 30.1
    assert cheaper_layout([long_tails], hidden_size=10, pad_to_multiple_of=22) == "tree"
    # beside a pair whose tree has 33 tokens and whose rows have 32: 51.2 against 2 · 49.1
    long_prompt = PairTree([1] * 31, [], [3], [4])
    assert cheaper_layout([long_tails, long_prompt], hidden_size=10) == "tree"


def test_sharing_more_never_costs_more():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        prompt, shared, chosen, rejected = torch.randint(0, 40, (4,), generator=generator).tolist()
        whole = PairTree([1] * (prompt + 1), [], [2] * (shared + chosen), [2] * (shared + rejected))
        split = PairTree([1] * (prompt + 1), [2] * shared, [2] * chosen, [2] * rejected)
        assert sum(map(len, split)) == sum(map(len, whole)) - shared
        assert cheaper_layout([whole]) == cheaper_layout([split]) == "tree"
        if cheaper_layout([whole], hidden_size=8) == "tree":
            assert cheaper_layout([split], hidden_size=8) == "tree"


def test_collator_takes_the_cheaper_layout_of_each_batch():
    collator = PairCollator(pad_token_id=PAD, layout="auto", hidden_size=2)
    low_edit = {"prompt_ids": [1] * 20, "chosen_ids": [5, 6], "rejected_ids": [5, 7], "pair_id": 0}
    # 12 m + m² = 13 against 2 · 10² = 200
    long_tails = {"prompt_ids": [1], "chosen_ids": [5] * 10, "rejected_ids": [6] * 10, "pair_id": 1}
    assert "trie_ends" in collator([low_edit])
    assert "trie_ends" not in collator([long_tails])


def test_packed_is_taken_where_it_is_cheaper_than_one_row_per_pair():
    # H = 2, T positions cost T + T²/12. Trees of 20, 10 and 10: three rows of 20 cost 160, two 106.7, one of 40 173.3
    long, short = PairTree([1] * 18, [], [3], [4]), PairTree([1] * 8, [], [3], [4])
    trees = [long, short, short._replace(prompt_ids=[2] * 8)]
    assert cheaper_layout(trees, hidden_size=2) == "packed"
    assert pack_pairs(trees, hidden_size=2).cost == pytest.approx(2 * (20 + 400 / 12))
    # as long as each other they stay apart: 3 · 53.3 against 3 rows' worth and more
    assert cheaper_layout([long, long._replace(prompt_ids=[2] * 18)], hidden_size=2) == "tree"
