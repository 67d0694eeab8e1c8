"""The head's logits made and used up inside one matrix product: an alternative to the tiles, here to be measured.

A persistent kernel on tensor-memory loads, for NVIDIA's devices (on an MI300 it spills scalar registers). Each program
walks over tiles [BLOCK_R, BLOCK_V] of z = scale * (h Wᵀ + bias); the accumulator never leaves the registers. Of a tile
remain a maximum and a sum per row and half, and on demand the exponentials. No softcap: its tanh would spill. With a
frozen head a row becomes NaN whose logits exceed those of the first 8192 columns by over 70 (10 in fp16). Until a
record shows it winning it is no part of the package.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpop_kernels.backends import fused_tiles
from dpop_kernels.backends.products import chunks, matmul_add, product_dtype, raw_logits, row_blocks
from dpop_kernels.backends.protocol import RowResults, RowSums
from dpop_kernels.kernels.launch import Launch, meta
from dpop_kernels.kernels.softmax import LOWEST
from dpop_kernels.logps.head import PLAIN, Head, LogitTransform

# exp(70) times 2**18 columns is 7e35, within bf16 and fp32; exp(10) is 2e4, within fp16's 65504.
_EXP_RANGE = {torch.float32: 70.0, torch.bfloat16: 70.0, torch.float16: 10.0}


@dataclass(frozen=True)
class GemmConstants:
    """Chosen by the arithmetic given under each; no GPU has been timed."""

    block_r: int = 128
    block_v: int = 256
    """Two warpgroups of 64 x 256 accumulators: wgmma's widest instruction, 128 registers of a thread's 255."""
    block_v_with_exps: int = 128
    """Half of that where the exponentials are written too: at 256, Triton 3.9 spills 32 bytes of them."""
    block_h: int = 64
    """128 bytes of bf16: the width of one swizzled row of shared memory."""
    warps: int = 8
    stages: int = 3
    """Loads in flight, 48 KiB each: 144 KiB of 227 on an H100 and of 163 on an A100."""
    group_r: int = 16
    """Row blocks that run together: at H = 4096 their hidden states are 16 MiB of L2, and W is read once per 2048
    rows."""
    rows: int = 16384
    """Rows per launch, which bounds the [rows, V / 128] maxima and sums: 128 MiB for both at V = 131072."""


GEMM = GemmConstants()


class Parts(NamedTuple):
    """Maxima and sums of P parts of the vocabulary."""

    maxima: Tensor  # [R, P]
    sums: Tensor  # [R, P]
    target_logits: Tensor  # [R]

    def together(self) -> RowSums:
        maxima = self.maxima.amax(dim=1)
        sums = (self.sums * (self.maxima - maxima.unsqueeze(1)).exp()).sum(dim=1)
        return RowSums(maxima, sums, self.target_logits, moments=None, totals=None, squares=None)


def gemm_token_logps(
    hidden_states: Tensor,  # [N, H]
    weight: Tensor,  # [V, H], frozen
    target_ids: Tensor,  # [N]
    *,
    bias: Tensor | None = None,  # [V]
    transform: LogitTransform = PLAIN,
) -> Tensor:
    """Log-probs [N] in fp32, differentiable in the hidden states. Rows of both factors are contiguous, in steps of a
    multiple of 16 bytes."""
    assert transform.softcap is None, "the product that uses up its logits knows no softcap"
    head = Head(weight, bias, transform)
    return _GemmTokenLogps.apply(hidden_states, target_ids.long().contiguous(), head, torch.is_grad_enabled())


class _GemmTokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states, target_ids, head, grad_enabled):
        with_gradient = grad_enabled and ctx.needs_input_grad[0]
        results = RowResults.empty(hidden_states, torch.float32, with_stats=False, with_gradient=with_gradient)
        _forward(hidden_states, head, target_ids, results)
        ctx.save_for_backward(results.unit_grads, results.other_mass)
        return results.logps

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps):
        unit_grads, other_mass = ctx.saved_tensors
        grad_hidden = torch.empty_like(unit_grads)
        fused_tiles.rows_backward(unit_grads, other_mass, grad_logps, out=grad_hidden)
        return grad_hidden, None, None, None


def _forward(hidden_states: Tensor, head: Head, target_ids: Tensor, results: RowResults) -> None:
    """With a gradient the first columns go through a tile, which gives each row the maximum that all other exponentials
    are relative to: products need no rescaling."""
    if hidden_states.is_cuda:
        triton.set_allocator(_allocate_descriptors)
    bounds, dtype = fused_tiles.tile_bounds(hidden_states.device), product_dtype(hidden_states)
    vocab_size, has_gradient = head.weight.shape[0], results.unit_grads is not None
    start = min(vocab_size, bounds.columns) if has_gradient else 0
    half = _block_v(has_gradient) // 2
    assert not has_gradient or bounds.columns % (2 * half) == 0, "a launch's parts begin with its first column"
    num_parts = int(has_gradient) + 2 * -(-(vocab_size - start) // (2 * half))
    for rows in row_blocks(hidden_states.shape[0], bounds.rows if has_gradient else GEMM.rows):
        hidden_rows, ids = hidden_states[rows].to(dtype), target_ids[rows]
        num_rows = hidden_rows.shape[0]
        sums = RowSums.empty(num_rows, torch.float32, hidden_rows.device)
        parts = Parts(
            sums.maxima.unsqueeze(1).repeat(1, num_parts),
            torch.zeros(num_rows, num_parts, device=hidden_rows.device),
            sums.target_logits,
        )
        products = hidden_rows.new_zeros(hidden_rows.shape, dtype=torch.float32) if has_gradient else None
        if products is not None:
            block = head.columns(slice(0, start), dtype)
            tile = hidden_rows.new_empty(num_rows, start, dtype=torch.float32)
            raw_logits(hidden_rows, block, out=tile)
            exps = tile.new_empty(tile.shape, dtype=dtype)
            fused_tiles.tile_forward(tile, ids, sums, head.transform, exps=exps, products=products)
            matmul_add(products, exps, block.weight)
            parts.maxima[:, 0], parts.sums[:, 0] = sums.maxima, sums.sums
        for piece in chunks(vocab_size - start, bounds.columns if has_gradient else max(1, vocab_size)):
            columns = slice(start + piece.start, start + piece.stop)
            block = head.columns(columns, dtype)
            exps = hidden_rows.new_empty(num_rows, block.weight.shape[0], dtype=dtype) if has_gradient else None
            gemm_launch(
                hidden_rows,
                block.weight,
                block.bias,
                ids,
                sums.maxima if has_gradient else None,
                parts,
                exps,
                part_start=int(has_gradient) + piece.start // half,
                vocab_start=columns.start,
                transform=head.transform,
            ).run()
            if products is not None and exps is not None:
                matmul_add(products, exps, block.weight)
        fused_tiles.rows_forward(parts.together(), ids, products, head, results.rows(rows), vocab_size=vocab_size)


def _block_v(writes_exps: bool) -> int:
    return GEMM.block_v_with_exps if writes_exps else GEMM.block_v


def _allocate_descriptors(size: int, alignment: int, stream: int | None) -> Tensor:
    """Where a kernel puts the tensor-memory descriptors that it makes; torch's blocks start at 512 bytes' steps."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _num_multiprocessors(device: torch.device) -> int:
    """An H100's where there is no device to ask."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def gemm_launch(
    hidden_rows: Tensor,  # [R, H]
    weight: Tensor,  # [C, H]
    bias: Tensor | None,  # [C]
    target_ids: Tensor,  # [R]
    offsets: Tensor | None,  # [R, 1]
    parts: Parts,  # out
    exps: Tensor | None,  # [R, C] out
    *,
    part_start: int,
    vocab_start: int,
    transform: LogitTransform,
) -> Launch:
    (num_rows, hidden_size), num_columns = hidden_rows.shape, weight.shape[0]
    for name, tensor in (("hidden_states", hidden_rows), ("weight", weight)):
        assert tensor.stride(1) == 1, f"{name}: tensor-memory loads take contiguous rows"
        assert tensor.stride(0) * tensor.itemsize % 16 == 0, f"{name}: tensor-memory loads take rows of 16 bytes' step"
    block_v = _block_v(exps is not None)
    num_tiles = -(-num_rows // GEMM.block_r) * -(-num_columns // block_v)
    num_programs = min(num_tiles, _num_multiprocessors(weight.device))
    return Launch(
        kernel=head_gemm_fwd_kernel,
        num_programs=num_programs,
        arguments={
            "hidden_ptr": hidden_rows,
            "weight_ptr": weight,
            "bias_ptr": bias,
            "target_ids_ptr": target_ids,
            "offsets_ptr": offsets,
            "maxima_ptr": parts.maxima,
            "sums_ptr": parts.sums,
            "target_logits_ptr": parts.target_logits,
            "exps_ptr": exps,
            "R": num_rows,
            "C": num_columns,
            "H": hidden_size,
            "P": parts.maxima.shape[1],
            "part_start": part_start,
            "vocab_start": vocab_start,
            "stride_hidden_r": hidden_rows.stride(0),
            "stride_weight_c": weight.stride(0),
            "logit_scale": float(transform.scale),
            "HAS_SCALE": transform.scale != 1.0,
            "HAS_BIAS": bias is not None,
            "HAS_EXPS": exps is not None,
            "EXP_RANGE": _EXP_RANGE[hidden_rows.dtype],
            "NUM_PROGRAMS": num_programs,
            "GROUP_R": GEMM.group_r,
            "BLOCK_R": GEMM.block_r,
            "BLOCK_V": block_v,
            "BLOCK_H": GEMM.block_h,
        },
        num_warps=GEMM.warps,
        num_stages=GEMM.stages,
    )


def aot_launches() -> dict[str, Launch]:
    """For `dpop_kernels.aot.compile_launch`, at the sizes of Llama 3's head."""
    return {"gemm, bf16": _aot_launch(with_exps=False), "gemm -> bf16": _aot_launch(with_exps=True)}


def _aot_launch(*, with_exps: bool) -> Launch:
    bf16, num_rows, hidden_size = torch.bfloat16, 1024, 4096
    num_columns = 8192 if with_exps else 128256
    return gemm_launch(
        meta(num_rows, hidden_size, dtype=bf16),
        meta(num_columns, hidden_size, dtype=bf16),
        None,
        meta(num_rows, dtype=torch.int64),
        meta(num_rows) if with_exps else None,
        Parts(meta(num_rows, 1002), meta(num_rows, 1002), meta(num_rows)),
        meta(num_rows, num_columns, dtype=bf16) if with_exps else None,
        part_start=0,
        vocab_start=0,
        transform=PLAIN,
    )


@triton.jit
def head_gemm_fwd_kernel(
    hidden_ptr,  # [R, H] in, rows contiguous and aligned to 16 bytes
    weight_ptr,  # [C, H] in, likewise: rows vocab_start .. vocab_start + C of W
    bias_ptr,  # [C] in, if HAS_BIAS
    target_ids_ptr,  # [R] in, int64, counted in the whole vocabulary
    offsets_ptr,  # [R] in, if HAS_EXPS: m is given, E = exp(z - m)
    maxima_ptr,  # [R, P] out, columns part_start and on: m of each BLOCK_V / 2 columns, the target's left out
    sums_ptr,  # [R, P] out, likewise: S relative to that m
    target_logits_ptr,  # [R] out where the target's column is among these: z_y
    exps_ptr,  # [R, C] out, if HAS_EXPS: E * dz/du
    R,
    C,
    H,
    P,
    part_start,
    vocab_start,
    stride_hidden_r,
    stride_weight_c,
    logit_scale,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_EXPS: tl.constexpr,
    EXP_RANGE: tl.constexpr,  # z further than this above a given m makes the row NaN
    NUM_PROGRAMS: tl.constexpr,
    GROUP_R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    hidden = tl.make_tensor_descriptor(hidden_ptr, [R, H], [stride_hidden_r, 1], [BLOCK_R, BLOCK_H])
    weight = tl.make_tensor_descriptor(weight_ptr, [C, H], [stride_weight_c, 1], [BLOCK_V, BLOCK_H])
    num_r = tl.cdiv(R, BLOCK_R)
    num_v = tl.cdiv(C, BLOCK_V)
    for tile in range(tl.program_id(0), num_r * num_v, NUM_PROGRAMS):
        # programs that run at the same time share GROUP_R blocks of rows and a few of W, which so stay in L2
        first_r = tile // (GROUP_R * num_v) * GROUP_R
        rows_in_group = tl.minimum(num_r - first_r, GROUP_R)
        tile_in_group = tile % (GROUP_R * num_v)
        r_start = (first_r + tile_in_group % rows_in_group) * BLOCK_R
        part = tile_in_group // rows_in_group
        c_start = part * BLOCK_V

        u = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
        for h_start in range(0, H, BLOCK_H):
            hidden_block = hidden.load([r_start, h_start])
            weight_block = weight.load([c_start, h_start])
            # "ieee": fp32 operands are not cut to tf32
            u = tl.dot(hidden_block, weight_block.T, u, input_precision="ieee")

        # by halves: the exponentials of all columns at once would not fit in the registers beside the accumulator
        left, right = u.reshape(BLOCK_R, 2, BLOCK_V // 2).permute(0, 2, 1).split()
        for half in tl.static_range(2):
            _use_up(
                left if half == 0 else right,
                bias_ptr,
                target_ids_ptr,
                offsets_ptr,
                maxima_ptr,
                sums_ptr,
                target_logits_ptr,
                exps_ptr,
                r_start,
                c_start + half * (BLOCK_V // 2),
                R,
                C,
                P,
                part_start + 2 * part + half,
                vocab_start,
                logit_scale,
                HAS_BIAS,
                HAS_SCALE,
                HAS_EXPS,
                EXP_RANGE,
                BLOCK_R,
                BLOCK_V // 2,
            )


@triton.jit
def _use_up(
    u,  # [BLOCK_R, BLOCK_C]
    bias_ptr,
    target_ids_ptr,
    offsets_ptr,
    maxima_ptr,
    sums_ptr,
    target_logits_ptr,
    exps_ptr,
    r_start,
    c_start,
    R,
    C,
    P,
    part,
    vocab_start,
    logit_scale,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_EXPS: tl.constexpr,
    EXP_RANGE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Part `part` of the rows' sums from its raw logits; the pointers are the kernel's."""
    r = (r_start + tl.arange(0, BLOCK_R)).to(tl.int64)
    c = c_start + tl.arange(0, BLOCK_C)
    if HAS_BIAS:
        u += tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    z = u * logit_scale if HAS_SCALE else u
    target = tl.load(target_ids_ptr + r, mask=r < R, other=-1) - vocab_start
    # asked as int64: a bad id of 2**32 must not wrap round to a column
    has_target = (target >= c_start) & (target < tl.minimum(c_start + BLOCK_C, C)) & (r < R)
    target_c = tl.where(has_target, target, -1).to(tl.int32)
    is_target = c[None, :] == target_c[:, None]
    tl.store(target_logits_ptr + r, tl.sum(tl.where(is_target, z, 0.0), axis=1), mask=has_target)

    others = tl.where(is_target | (c >= C)[None, :], float("-inf"), z)
    if HAS_EXPS:
        m = tl.load(offsets_ptr + r, mask=r < R, other=0.0)
        distances = others - m[:, None]
        exps = tl.where(distances > EXP_RANGE, float("nan"), tl.exp(distances))
        weighted = exps * logit_scale if HAS_SCALE else exps
        out_ptr = exps_ptr + r[:, None] * C + c[None, :]
        tl.store(out_ptr, weighted.to(exps_ptr.dtype.element_ty), mask=(r < R)[:, None] & (c < C)[None, :])
    else:
        m = tl.maximum(tl.max(others, axis=1), LOWEST)
        exps = tl.exp(others - m[:, None])
    tl.store(maxima_ptr + r * P + part, m, mask=r < R)
    tl.store(sums_ptr + r * P + part, tl.sum(exps, axis=1), mask=r < R)
