"""What a backend is: a module with the names of `Backend`. It knows no loss; arguments arrive validated.

A head is walked in tiles (`logps.tiling`) where the backend brings `TileOps`, the arithmetic within one tile; a backend
without computes a head's log-probs by itself (`WholeHead`). Log-probs, statistics and sums are fp32, or fp64 for fp64;
a gradient has the dtype of its input.
"""

from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from dpop_kernels.backends.bounds import TileBounds
from dpop_kernels.logps.head import Head, LogitTransform
from dpop_kernels.outputs import TokenStats


class RowSums(NamedTuple):
    """What a block of R rows carries over the tiles of the vocabulary. fp32, or fp64 for fp64.

    m is the maximum of the columns but the target's, which so far stay out of every sum: S = Σ exp(z - m) over the
    others gives 1 - p without a difference.
    """

    maxima: Tensor  # [R] m, from the lowest finite number
    sums: Tensor  # [R] S, from 0
    target_logits: Tensor  # [R] z_y, NaN until its tile has come
    moments: Tensor | None  # [R] Σ exp(z - m) (z - m), for statistics
    totals: Tensor | None  # [R] Σ z, the target's own too
    squares: Tensor | None  # [R] Σ exp(z - m)²

    @classmethod
    def empty(cls, num_rows: int, dtype: torch.dtype, device: torch.device, *, with_stats: bool = False) -> "RowSums":
        """Sums of nothing. A target logit that no tile fills in, for an id outside [0, V), stays NaN."""

        def full(value: float) -> Tensor:
            return torch.full((num_rows,), value, dtype=dtype, device=device)

        of_stats = (full(0.0) if with_stats else None for _ in range(3))
        return cls(full(torch.finfo(dtype).min), full(0.0), full(torch.nan), *of_stats)


class RowResults(NamedTuple):
    """What the tiles of a head yield; each is written a block of rows at a time."""

    logps: Tensor  # [N]
    lse: Tensor  # [N] fp64: at |z| = 1e4 fp32 would be off by 5e-4 nat
    stats: TokenStats | None  # [N] each
    other_mass: Tensor | None  # [N] 1 - p, if a gradient is wanted
    unit_grads: Tensor | None  # [N, H] d logp / d h / (1 - p), of W's own size however small 1 - p is
    largest: Tensor | None = None  # [N] the largest logit, for the statistics of a slice of the vocabulary

    @classmethod
    def empty(
        cls,
        hidden_states: Tensor,
        dtype: torch.dtype,
        *,
        with_stats: bool,
        with_gradient: bool,
        with_largest: bool = False,
    ) -> "RowResults":
        logps = hidden_states.new_empty(hidden_states.shape[0], dtype=dtype)
        stats = None
        if with_stats:
            dtypes = dict.fromkeys(TokenStats._fields, logps.dtype) | {"is_top1": torch.bool}
            stats = TokenStats(**{name: torch.empty_like(logps, dtype=dtype) for name, dtype in dtypes.items()})
        other_mass = unit_grads = None
        if with_gradient:
            other_mass = torch.empty_like(logps)
            unit_grads = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
        largest = torch.empty_like(logps) if with_largest else None
        return cls(logps, torch.empty_like(logps, dtype=torch.float64), stats, other_mass, unit_grads, largest)

    def rows(self, rows: slice) -> "RowResults":
        def part(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[rows]

        stats = None if self.stats is None else TokenStats(*(value[rows] for value in self.stats))
        optional = part(self.other_mass), part(self.unit_grads), part(self.largest)
        return RowResults(self.logps[rows], self.lse[rows], stats, *optional)


TrainsEntropy = Literal["never", "perhaps", "always"]
"""Whether the statistics' entropy has a gradient. "perhaps" forms a frozen head's gradient in the forward none the
less, and what the entropy's needs is kept beside it; "always" leaves that product out."""


class EntropyGrads(NamedTuple):
    """The rows' entropies and the loss's derivatives by them, where an entropy is trained on. [R] each."""

    entropies: Tensor
    grads: Tensor

    def rows(self, rows: slice) -> "EntropyGrads":
        return EntropyGrads(self.entropies[rows], self.grads[rows])


class TileOps(Protocol):
    """The arithmetic on tiles of raw logits, which are contiguous, in fp32 (fp64 for fp64 inputs)."""

    def tile_bounds(self, device: torch.device) -> TileBounds:
        """How large tiles are to be there."""
        ...

    def tile_forward(
        self,
        tile: Tensor,  # [R, C]: columns vocab_start and on
        target_ids: Tensor,  # [R], counted in the whole vocabulary
        sums: RowSums,  # in and out
        transform: LogitTransform,
        *,
        vocab_start: int,
        exps: Tensor | None = None,
        products: Tensor | None = None,
    ) -> None:
        """Take one tile into the sums. With `exps` [R, C], which may be the tile itself, it gets exp(z - m) · dz/du
        with 0 at the target, and `products` [R, H], of the tiles before, are rescaled to the new m."""
        ...

    def rows_forward(
        self,
        sums: RowSums,
        target_ids: Tensor,
        products: Tensor | None,
        head: Head,
        results: RowResults,
        *,
        vocab_size: int,
    ) -> None:
        """The rows' results from sums over all of the vocabulary, and from Σ exps · W where a gradient is wanted."""
        ...

    def rows_backward(self, unit_grads: Tensor, other_mass: Tensor, grad_logps: Tensor, out: Tensor) -> None:
        """grad_logps · (1 - p) · unit_grads [N, H]; a row of weight zero gets zeros, whatever its logits were."""
        ...

    def tile_backward(
        self,
        tile: Tensor,  # [R, C]
        target_ids: Tensor,  # [R]
        logps: Tensor,  # [R]
        lse: Tensor,  # [R] of the whole vocabulary
        grad_logps: Tensor,  # [R]
        transform: LogitTransform,
        *,
        vocab_start: int = ...,
        entropy: EntropyGrads | None = ...,
        out: Tensor,  # [R, C], any floating dtype; may be the tile
    ) -> Tensor:
        """grad_logps · d logps / d tile, and with `entropy` its grads · d entropies / d tile, written to `out` and
        returned."""
        ...


class Backend(Protocol):
    """One implementation of the way from logits, or hidden states and a head, to sums of log-probs."""

    RUNS_TRITON: bool
    """Whether a loss's own Triton kernel may run on the same tensors."""
    TILES: TileOps | None
    """The arithmetic of `logps.tiling`'s tiles; None for a backend with a `head_token_logps` of its own."""

    def token_logps(
        self, logits: Tensor, target_ids: Tensor, *, inplace_backward: bool = ..., with_stats: bool = ...
    ) -> tuple[Tensor, TokenStats | None]:
        """log softmax(logits)[n, target_ids[n]]: [N, V], [N] -> [N] differentiable, statistics (None without
        `with_stats`). `inplace_backward` permits the gradient to replace the logits, and may be ignored."""
        ...

    def segment_sums(self, token_logps: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Sums over [cu_seqlens[i], cu_seqlens[i + 1]): [N], [S + 1] -> [S] differentiable, in a fixed order."""
        ...


class WholeHead(Protocol):
    """What a backend without tiles has instead. `logps.linear` refuses a sliced head (`head.shard`) for it."""

    def head_token_logps(
        self,
        hidden_states: Tensor,
        head: Head,
        target_ids: Tensor,
        *,
        with_stats: bool = ...,
        trains_entropy: TrainsEntropy = ...,
    ) -> tuple[Tensor, TokenStats | None]:
        """`token_logps` of a head's logits: [N, H], [N] -> [N] differentiable by the states and all of
        `head.tensors()`; the statistics' entropy too, unless `trains_entropy` is "never"."""
        ...
