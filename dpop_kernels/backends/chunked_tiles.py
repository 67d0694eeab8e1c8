"""`TileOps` in torch.

A tile's rows are handled in groups of about one megabyte, so that the element-wise passes of a softmax find their data
in the cache and the temporaries stay small. The target's own term is kept out of the sum: with S the sum of the other
exponentials, 1 - p = S / (S + e_y) and log p = -log1p(S / e_y) keep their relative accuracy at any p.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from dpop_kernels.backends.bounds import GROUP_ELEMENTS, TileBounds, torch_bounds
from dpop_kernels.backends.protocol import EntropyGrads, RowResults, RowSums
from dpop_kernels.logps.head import Head, LogitTransform

# exp(-200) is 0 in fp32; distances are cut there before they multiply a sum: 0 * 200 is 0 where 0 * inf is NaN
_FAR = 200.0


def tile_bounds(device: torch.device) -> TileBounds:
    return torch_bounds(device)


def tile_forward(
    tile: Tensor,  # [R, C]
    target_ids: Tensor,  # [R], counted in the whole vocabulary
    sums: RowSums,  # in and out
    transform: LogitTransform,
    *,
    vocab_start: int = 0,
    exps: Tensor | None = None,  # [R, C] out
    products: Tensor | None = None,  # [R, H] in and out
) -> None:
    num_columns = tile.shape[1]
    local_ids = target_ids - vocab_start
    inside = ((local_ids >= 0) & (local_ids < num_columns)).unsqueeze(-1)
    targets = local_ids.clamp(0, num_columns - 1).unsqueeze(-1)
    rescale = torch.empty_like(sums.maxima)
    for rows in groups(*tile.shape):
        group = RowSums(*(None if values is None else values[rows] for values in sums))  # type: ignore[arg-type]
        group_exps = None if exps is None else exps[rows]
        _group_forward(tile[rows], targets[rows], inside[rows], group, transform, rescale[rows], group_exps)
    if products is not None and vocab_start > 0:
        products.mul_(rescale.unsqueeze(-1))


def _group_forward(
    tile: Tensor,  # [G, C]
    targets: Tensor,  # [G, 1], any column where the target is not here
    inside: Tensor,  # [G, 1] whether it is
    sums: RowSums,  # [G] in and out
    transform: LogitTransform,
    rescale: Tensor,  # [G] out: what earlier sums are multiplied by
    exps: Tensor | None,  # [G, C] out
) -> None:
    """A call of its own, so that its temporaries are gone when the next group begins; `bounds` counts them."""
    z = transform(tile)
    if sums.totals is not None:
        sums.totals.add_(z.sum(dim=-1))
    own = z.gather(-1, targets)
    z.scatter_(-1, targets, torch.where(inside, -torch.inf, own))
    maxima = torch.maximum(sums.maxima, z.amax(dim=-1))
    shift = sums.maxima - maxima
    torch.exp(shift, out=rescale)
    own_exps = None if exps is None or exps.dtype != z.dtype else exps
    distances = torch.sub(z, maxima.unsqueeze(-1), out=own_exps)
    far_ones = distances.clamp(min=-_FAR) if sums.moments is not None else None
    terms = distances.exp_()
    if sums.squares is not None:
        sums.squares.mul_(rescale.square()).add_(torch.einsum("rc,rc->r", terms, terms))
    if sums.moments is not None and far_ones is not None:
        earlier = rescale * (sums.moments + shift.clamp(min=-_FAR) * sums.sums)
        sums.moments.copy_(earlier + torch.einsum("rc,rc->r", terms, far_ones))
    del far_ones
    sums.sums.mul_(rescale).add_(terms.sum(dim=-1))
    sums.maxima.copy_(maxima)
    if own_exps is None or not transform.is_identity:
        z.scatter_(-1, targets, own)  # the tile, or z, as it was
    sums.target_logits.copy_(torch.where(inside.squeeze(-1), own.squeeze(-1), sums.target_logits))
    if exps is not None:
        transform.times_slope(terms, z)
        if own_exps is None:
            exps.copy_(terms)


def rows_forward(
    sums: RowSums,  # [R]
    target_ids: Tensor,  # [R]
    products: Tensor | None,  # [R, H]
    head: Head | None,  # as there are products or not
    results: RowResults,  # [R] out
    *,
    vocab_size: int,
) -> None:
    """With d = |z_y - m|, the target the row's maximum: logp = -log1p(S exp(-d)), without cancellation at any 1 - p.
    Elsewhere S >= 1 has the maximum's own term, and logp = z_y - m - log1p(S - 1 + exp(-d))."""
    z_target, maxima, total = sums.target_logits, sums.maxima, sums.sums
    is_top1 = z_target >= maxima
    near = torch.exp(-(z_target - maxima).abs())
    log_sum = torch.log1p(torch.where(is_top1, total * near, (total - 1.0) + near))
    # a target of +inf leaves no trace in S; the other columns' +inf and NaN have made it NaN
    log_sum = torch.where(z_target == torch.inf, torch.nan, log_sum)
    torch.sub(torch.where(is_top1, 0.0, z_target - maxima), log_sum, out=results.logps)
    results.lse.copy_(torch.where(is_top1, z_target, maxima).double() + log_sum.double())
    if results.stats is not None:
        assert sums.moments is not None
        assert sums.totals is not None
        assert sums.squares is not None
        # lse - Σ p z, both about the row's maximum
        distance = (z_target - maxima).abs().clamp(max=_FAR)
        m_shift, target_shift = torch.where(is_top1, -distance, 0.0), torch.where(is_top1, 0.0, -distance)
        moment = m_shift.exp() * (sums.moments + m_shift * total) + target_shift.exp() * target_shift
        results.stats.entropy.copy_(log_sum - moment / (m_shift.exp() * total + target_shift.exp()))
        results.stats.mean_logit.copy_(sums.totals / vocab_size)
        results.stats.is_top1.copy_(is_top1)
        near_square = near.square()
        others = torch.where(is_top1, sums.squares * near_square, (sums.squares - 1.0) + near_square)
        results.stats.log_sum_sq_probs.copy_(torch.log1p(others) - 2.0 * log_sum)
    if products is not None and head is not None and results.unit_grads is not None:
        assert results.other_mass is not None
        results.other_mass.copy_(-torch.expm1(results.logps))
        inside = ((target_ids >= 0) & (target_ids < vocab_size)).unsqueeze(-1)
        own = head.weight[target_ids.clamp(0, vocab_size - 1)].to(products.dtype).masked_fill_(~inside, 0.0)
        own = head.transform.times_slope(own, z_target.unsqueeze(-1))
        # nobody but the target has any mass: the products are zero, and so is 1 - p
        inverse = torch.where(total == 0, 1.0, total).reciprocal()
        results.unit_grads.copy_(own.sub_(products.mul_(inverse.unsqueeze(-1))))


def rows_backward(unit_grads: Tensor, other_mass: Tensor, grad_logps: Tensor, out: Tensor) -> None:
    for rows in groups(*unit_grads.shape):
        weights = grad_logps[rows].unsqueeze(-1)
        grads = unit_grads[rows] * (weights * other_mass[rows].unsqueeze(-1))
        out[rows] = grads.masked_fill_(weights == 0, 0.0)


def tile_backward(
    tile: Tensor,  # [R, C] raw logits, columns vocab_start and on of the vocabulary
    target_ids: Tensor,  # [R], counted in the whole vocabulary
    logps: Tensor,  # [R]
    lse: Tensor,  # [R] of the whole vocabulary, fp64
    grad_logps: Tensor,  # [R]
    transform: LogitTransform,
    *,
    vocab_start: int = 0,
    entropy: EntropyGrads | None = None,
    out: Tensor,  # [R, C]; may be the tile
) -> Tensor:
    local_ids, weights = target_ids - vocab_start, grad_logps.unsqueeze(-1)
    for rows in groups(*tile.shape):
        row_values = local_ids[rows], logps[rows], lse[rows]
        group_entropy = None if entropy is None else entropy.rows(rows)
        out[rows] = _group_backward(tile[rows], *row_values, weights[rows], transform, group_entropy)
    return out


def _group_backward(
    tile: Tensor,
    local_ids: Tensor,
    logps: Tensor,
    lse: Tensor,
    weights: Tensor,
    transform: LogitTransform,
    entropy: EntropyGrads | None,
) -> Tensor:
    z = transform(tile)
    grads = softmax_gradient(z, local_ids, logps, lse, weights)
    if entropy is not None:
        grads.add_(_entropy_gradient(z, local_ids, logps, lse, entropy))
    return transform.times_slope(grads, z)


def groups(num_rows: int, num_columns: int) -> Iterator[slice]:
    size = max(1, GROUP_ELEMENTS // max(1, num_columns))
    return (slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size))


def softmax_gradient(z: Tensor, target_ids: Tensor, logps: Tensor, lse: Tensor, grad_logps: Tensor) -> Tensor:
    """grad_logps · (onehot - exp(z - lse)) [R, C]; a target outside [0, C) has no column here."""
    grads = _log_probs(z, lse).exp_().mul_(-grad_logps)
    own = -torch.expm1(logps).unsqueeze(-1) * grad_logps  # (1 - p) without a difference
    return _with_targets(grads, target_ids, own)


def _entropy_gradient(z: Tensor, target_ids: Tensor, logps: Tensor, lse: Tensor, entropy: EntropyGrads) -> Tensor:
    """-grads · p (log p + entropy) [R, C]; p = 0 gives 0, also where log p is -inf."""
    log_probs = _with_targets(_log_probs(z, lse), target_ids, logps.unsqueeze(-1))
    probs = log_probs.exp()
    distances = log_probs.clamp_(min=-_FAR).add_(entropy.entropies.unsqueeze(-1))
    return probs.mul_(distances).mul_(-entropy.grads.unsqueeze(-1))


def _log_probs(z: Tensor, lse: Tensor) -> Tensor:
    """z - lse, which is fp64: in two parts of z's precision."""
    lse_high = lse.to(z.dtype)
    lse_low = (lse - lse_high).to(z.dtype)
    return (z - lse_high.unsqueeze(-1)).sub_(lse_low.unsqueeze(-1))


def _with_targets(values: Tensor, target_ids: Tensor, own: Tensor) -> Tensor:
    """`own` [R, 1] in the targets' columns of `values` [R, C], in place; a target outside [0, C) has none here."""
    num_columns = values.shape[-1]
    inside = ((target_ids >= 0) & (target_ids < num_columns)).unsqueeze(-1)
    targets = target_ids.clamp(0, num_columns - 1).unsqueeze(-1)
    return values.scatter_(-1, targets, torch.where(inside, own, values.gather(-1, targets)))
