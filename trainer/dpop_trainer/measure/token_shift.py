"""What training did to the tokens of the chosen answers before, at and after the edit.

    change[t] = log π(y_w[t] | x, y_w[<t]) - log π_ref(y_w[t] | x, y_w[<t])         in nats

Plain DPO on low-edit pairs lowers the tokens after the edit, which both answers share. Means are over tokens, not
over answers: a long answer counts for more.

Source: Pal et al. 2024, arXiv:2402.13228, figure 4.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpop_trainer.data.edits import EditRegions


class RegionShift(NamedTuple):
    """The tokens of one region over all pairs. A mean over no tokens is NaN."""

    mean_change: float
    """Mean of log π - log π_ref, in nats per token."""
    policy_mean: float
    """Mean log-prob under the policy, in nats per token."""
    ref_mean: float
    """Mean log-prob under the reference, in nats per token."""
    num_tokens: int


class OffsetProfile(NamedTuple):
    """The change by distance from the edit. All [K], in order of offset."""

    offsets: NDArray[np.int64]
    """-1 is the token just before the edit, 0 every token of the edit, +1 the token just after it."""
    mean_change: NDArray[np.float64]
    """Mean of log π - log π_ref over the pairs that have such a token, in nats; NaN where none has."""
    counts: NDArray[np.int64]
    """How many tokens the mean is over."""


class TokenShift(NamedTuple):
    """Change of the chosen answers' token log-probs around the edit."""

    before: RegionShift
    at: RegionShift
    after: RegionShift
    profile: OffsetProfile


def token_shift(
    policy_logps: Sequence[Any],
    ref_logps: Sequence[Any],
    regions: Sequence[EditRegions],
    *,
    first_offset: int = -20,
    last_offset: int = 40,
) -> TokenShift:
    """Averages the change of the chosen answers' token log-probs by region and by distance from the edit.

    Args:
        policy_logps: per pair, [T] log-probs of the chosen answer's tokens under the policy, in nats: anything that
            `numpy.asarray` takes, CPU tensors without gradient among them. T differs from pair to pair.
        ref_logps: the same tokens under the reference model.
        regions: per pair, the bounds of the edit in the same tokens, from `edits.edit_regions`.
        first_offset: first offset of the profile, ≤ 0.
        last_offset: last offset of the profile, ≥ 0.

    Returns:
        `TokenShift`, computed in fp64.

    Raises:
        ValueError: the three sequences differ in length or are empty, a pair's arrays are not [T] and [T] of finite
            values, its region does not lie within them, or the offsets exclude 0.

    Source:
        Pal et al. 2024, arXiv:2402.13228, figure 4.
    """
    if not first_offset <= 0 <= last_offset:
        raise ValueError(f"offsets: expected first <= 0 <= last, got {first_offset} and {last_offset}.")
    if not len(policy_logps) == len(ref_logps) == len(regions) > 0:
        raise ValueError(
            "policy_logps, ref_logps, regions: expected the same number of pairs, at least one, "
            f"got {len(policy_logps)}, {len(ref_logps)} and {len(regions)}."
        )
    pairs = [_check_pair(index, *pair) for index, pair in enumerate(zip(policy_logps, ref_logps, regions, strict=True))]
    policy = np.concatenate([policy for policy, _, _ in pairs])
    ref = np.concatenate([ref for _, ref, _ in pairs])
    offsets = np.concatenate([_offsets(len(policy), region) for policy, _, region in pairs])
    return TokenShift(
        before=_region_shift(policy, ref, offsets < 0),
        at=_region_shift(policy, ref, offsets == 0),
        after=_region_shift(policy, ref, offsets > 0),
        profile=_offset_profile(policy - ref, offsets, first_offset, last_offset),
    )


def token_shift_as_dict(shift: TokenShift) -> dict[str, Any]:
    """Plain values, for JSON: NaN becomes None."""
    regions = {name: _without_nan(list(getattr(shift, name))) for name in ("before", "at", "after")}
    offsets, mean_change, counts = map(np.ndarray.tolist, shift.profile)
    return {**regions, "profile": [offsets, _without_nan(mean_change), counts]}


def token_shift_from_dict(values: dict[str, Any]) -> TokenShift:
    """Undo `token_shift_as_dict`."""

    def region(name: str) -> RegionShift:
        *means, num_tokens = values[name]
        change, policy, ref = (np.nan if mean is None else mean for mean in means)
        return RegionShift(change, policy, ref, num_tokens)

    offsets, mean_change, counts = values["profile"]
    mean_change = np.array([np.nan if change is None else change for change in mean_change])
    profile = OffsetProfile(np.array(offsets), mean_change, np.array(counts))
    return TokenShift(region("before"), region("at"), region("after"), profile)


def _without_nan(values: list[Any]) -> list[Any]:
    return [None if value != value else value for value in values]


def mean_token_shift(shifts: Sequence[TokenShift]) -> TokenShift:
    """The mean over runs, each counting the same; `num_tokens` and `counts` are sums.

    Raises:
        ValueError: there is none, or their profiles have other offsets.
    """
    if not shifts or any(not np.array_equal(shift.profile.offsets, shifts[0].profile.offsets) for shift in shifts):
        raise ValueError(f"shifts: expected at least one, all with the same offsets, got {len(shifts)}.")

    def region(name: str) -> RegionShift:
        parts = [getattr(shift, name) for shift in shifts]
        change, policy, ref = np.mean([part[:3] for part in parts], axis=0).tolist()
        return RegionShift(change, policy, ref, sum(part.num_tokens for part in parts))

    profiles = [shift.profile for shift in shifts]
    return TokenShift(
        before=region("before"),
        at=region("at"),
        after=region("after"),
        profile=OffsetProfile(
            offsets=profiles[0].offsets,
            mean_change=np.mean([profile.mean_change for profile in profiles], axis=0),
            counts=np.sum([profile.counts for profile in profiles], axis=0),
        ),
    )


def _offsets(num_tokens: int, region: EditRegions) -> NDArray[np.int64]:
    """Each token's distance from the edit: ..., -2, -1, 0 for the whole edit, 1, 2, ... -> [T]."""
    positions = np.arange(num_tokens)
    return np.minimum(positions - region.start, 0) + np.maximum(positions - region.end + 1, 0)


def _region_shift(policy: NDArray[np.float64], ref: NDArray[np.float64], mask: NDArray[np.bool_]) -> RegionShift:
    num_tokens = int(mask.sum())
    if num_tokens == 0:
        return RegionShift(np.nan, np.nan, np.nan, 0)
    policy, ref = policy[mask], ref[mask]
    return RegionShift(float((policy - ref).mean()), float(policy.mean()), float(ref.mean()), num_tokens)


def _offset_profile(changes: NDArray[np.float64], offsets: NDArray[np.int64], first: int, last: int) -> OffsetProfile:
    inside = (first <= offsets) & (offsets <= last)
    slots = offsets[inside] - first
    counts = np.bincount(slots, minlength=last - first + 1)
    sums = np.bincount(slots, weights=changes[inside], minlength=last - first + 1)
    mean_change = np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)
    return OffsetProfile(np.arange(first, last + 1), mean_change, counts)


def _check_pair(
    index: int, policy_logps: Any, ref_logps: Any, region: EditRegions
) -> tuple[NDArray[np.float64], NDArray[np.float64], EditRegions]:
    policy = np.asarray(policy_logps, dtype=np.float64)
    ref = np.asarray(ref_logps, dtype=np.float64)
    if policy.ndim != 1 or ref.shape != policy.shape:
        raise ValueError(
            f"pair {index}: expected policy and reference log-probs of shape [T], "
            f"got {list(policy.shape)} and {list(ref.shape)}. Score the same tokens with both models."
        )
    if not (np.isfinite(policy).all() and np.isfinite(ref).all()):
        raise ValueError(f"pair {index}: expected finite log-probs, got NaN or infinity.")
    if not 0 <= region.start <= region.end <= len(policy):
        raise ValueError(
            f"pair {index}: expected 0 <= start <= end <= {len(policy)}, got {region}. "
            "Take the region from the same tokens as the log-probs."
        )
    return policy, ref, region
