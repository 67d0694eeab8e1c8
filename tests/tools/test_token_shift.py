"""Edit regions and the change of token log-probs around them, against values worked out by hand."""

import numpy as np
import pytest
import torch
from dpop_trainer.data.edits import (
    EditRegions,
    common_prefix_length,
    common_suffix_length,
    edit_regions,
    first_difference,
)
from dpop_trainer.measure.token_shift import RegionShift, token_shift


@pytest.mark.parametrize(
    ("chosen", "rejected", "start", "end"),
    [
        ([1, 2, 3, 4, 5], [1, 2, 9, 4, 5], 2, 3),  # one token replaced
        ([1, 2, 3, 4, 5], [1, 2, 8, 9, 4, 5], 2, 3),  # by two
        ([1, 2, 3, 4, 5], [1, 9, 5], 1, 4),  # three by one
        ([1, 2, 3], [1, 2, 9, 3], 2, 2),  # inserted: nothing of the chosen answer differs
        ([1, 2, 3], [1, 3], 1, 2),  # removed
        ([1, 2, 3], [9, 2, 3], 0, 1),  # at the beginning
        ([1, 2, 3], [1, 2, 9], 2, 3),  # at the end
        ([1, 2], [1, 2, 3], 2, 2),  # appended
        ([1, 2, 3], [1, 2], 2, 3),  # cut off
        ([1, 2], [3, 4, 5], 0, 2),  # nothing in common
        ([7, 7], [7, 7, 7], 2, 2),  # prefix and suffix overlap: the prefix takes what it can
        ([7, 7, 7], [7, 7], 2, 3),
        ([], [1], 0, 0),
        ([1], [], 0, 1),
        ([1, 5, 2, 5, 3], [1, 6, 2, 6, 3], 1, 4),  # two edits: one region around both
    ],
)
def test_edit_regions(chosen, rejected, start, end):
    assert edit_regions(chosen, rejected) == EditRegions(start, end)
    assert first_difference(chosen, rejected) == start
    # the definition: what lies outside the region is in both
    inside = len(rejected) - (len(chosen) - end)
    assert chosen[:start] + rejected[start:inside] + chosen[end:] == rejected


def test_prefix_and_suffix():
    assert common_prefix_length([1, 2, 3], [1, 2, 4]) == 2
    assert common_prefix_length([1, 2], [1, 2]) == 2
    assert common_prefix_length([], [1]) == 0
    assert common_suffix_length([1, 2, 3], [4, 2, 3]) == 2
    assert common_suffix_length([1, 2], [1, 2]) == 2
    assert common_suffix_length([7, 7], [7, 7, 7], 2) == 0
    assert common_suffix_length([7, 8, 7], [7, 7], 1) == 1


@pytest.mark.parametrize("ids", [[], [1, 2]])
def test_equal_answers_have_no_edit(ids):
    with pytest.raises(ValueError, match="rejected_ids: expected an answer other than chosen_ids"):
        first_difference(ids, list(ids))
    with pytest.raises(ValueError, match="rejected_ids"):
        edit_regions(ids, tuple(ids))


# Two pairs, the edit of the second two tokens long:
#   offset      -2     -1      0      0     +1     +2
#   pair 0           -0.5   -0.25         -1.0   -2.0     reference all -1.0
#   pair 1    -3.0   -2.0   -1.0   -4.0   -2.5            reference all -2.0
# Changes:
#   pair 0           +0.5   +0.75          0.0   -1.0
#   pair 1    -1.0    0.0   +1.0   -2.0   -0.5
POLICY = [[-0.5, -0.25, -1.0, -2.0], [-3.0, -2.0, -1.0, -4.0, -2.5]]
REF = [[-1.0] * 4, [-2.0] * 5]
REGIONS = [EditRegions(1, 2), EditRegions(2, 4)]


@pytest.mark.parametrize("make", [list, np.array, lambda row: torch.tensor(row, dtype=torch.float32)])
def test_regions_by_hand(make):
    shift = token_shift([make(row) for row in POLICY], [make(row) for row in REF], REGIONS)
    # before: +0.5, -1.0, 0.0 over three tokens
    assert shift.before == RegionShift(pytest.approx(-0.5 / 3), pytest.approx(-5.5 / 3), pytest.approx(-5 / 3), 3)
    # at: +0.75, +1.0, -2.0
    assert shift.at == RegionShift(pytest.approx(-0.25 / 3), pytest.approx(-5.25 / 3), pytest.approx(-5 / 3), 3)
    # after: 0.0, -1.0, -0.5
    assert shift.after == RegionShift(pytest.approx(-0.5), pytest.approx(-5.5 / 3), pytest.approx(-4 / 3), 3)


def test_profile_by_hand():
    profile = token_shift(POLICY, REF, REGIONS, first_offset=-3, last_offset=3).profile
    assert profile.offsets.tolist() == [-3, -2, -1, 0, 1, 2, 3]
    assert profile.counts.tolist() == [0, 1, 2, 3, 2, 1, 0]
    expected = [np.nan, -1.0, 0.25, -0.25 / 3, -0.25, -1.0, np.nan]
    np.testing.assert_allclose(profile.mean_change, expected)


def test_profile_leaves_out_what_lies_beyond_it():
    profile = token_shift(POLICY, REF, REGIONS, first_offset=0, last_offset=1).profile
    assert profile.offsets.tolist() == [0, 1]
    assert profile.counts.tolist() == [3, 2]
    default = token_shift(POLICY, REF, REGIONS).profile
    assert (default.offsets[0], default.offsets[-1]) == (-20, 40)


def test_an_edit_without_tokens_of_its_own():
    # the rejected answer inserts between the two tokens: one before, one after, none at
    shift = token_shift([[-1.0, -3.0]], [[-2.0, -2.0]], [EditRegions(1, 1)], first_offset=-1, last_offset=1)
    assert shift.before == RegionShift(1.0, -1.0, -2.0, 1)
    assert shift.after == RegionShift(-1.0, -3.0, -2.0, 1)
    assert shift.at.num_tokens == 0
    assert np.isnan([shift.at.mean_change, shift.at.policy_mean, shift.at.ref_mean]).all()
    np.testing.assert_array_equal(shift.profile.mean_change, [1.0, np.nan, -1.0])


def test_no_change_is_zero_everywhere():
    shift = token_shift(REF, REF, REGIONS)
    assert [shift.before.mean_change, shift.at.mean_change, shift.after.mean_change] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("policy", "ref", "regions", "message"),
    [
        ([], [], [], "same number of pairs, at least one, got 0, 0 and 0"),
        (POLICY, REF, REGIONS[:1], "same number of pairs, at least one, got 2, 2 and 1"),
        (POLICY, [REF[0], REF[0]], REGIONS, r"pair 1: expected .* shape \[T\], got \[5\] and \[4\]"),
        ([[[-1.0]]], [[[-1.0]]], [EditRegions(0, 1)], r"pair 0: expected .* got \[1, 1\] and \[1, 1\]"),
        ([[-1.0]], [[-1.0]], [EditRegions(0, 2)], "pair 0: expected 0 <= start <= end <= 1"),
        ([[-1.0]], [[-1.0]], [EditRegions(1, 0)], "pair 0: expected 0 <= start <= end <= 1"),
        ([[-np.inf]], [[-np.inf]], [EditRegions(0, 1)], "pair 0: expected finite log-probs"),
        ([[-1.0]], [[np.nan]], [EditRegions(0, 1)], "pair 0: expected finite log-probs"),
    ],
)
def test_wrong_input_is_named(policy, ref, regions, message):
    with pytest.raises(ValueError, match=message):
        token_shift(policy, ref, regions)


def test_the_profile_must_hold_the_edit():
    with pytest.raises(ValueError, match="offsets: expected first <= 0 <= last, got 1 and 40"):
        token_shift(POLICY, REF, REGIONS, first_offset=1)
