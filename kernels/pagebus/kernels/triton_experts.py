"""Experts' linears as one launch: rows sorted by expert, each tile the rows of one. Knows no router.

```
pairs (row, expert), sorted by expert    | expert 0     | expert 1 | (2: none) | expert 3            |
offsets [experts + 1]                    0              5          8           8                    14
tiles of BLOCK_M pairs                   |------|-----| |--------|             |------|------|----|
```

A tile finds its expert by binary search: nothing is planned on the host, the grid depends on shapes alone. A
row's sums do not depend on its place in a tile, nor on the other rows.
"""
# ruff: noqa: ANN001, ANN202, N803 - kernels: arguments without types, constants in capitals

from typing import no_type_check

import torch

from pagebus.kernels.jit import cdiv, compute_type, kernel, tl


@kernel
@no_type_check
def _grouped(
    inputs, rows, weight, bias, offsets, out, num_experts,
    in_stride, weight_se, weight_sr, weight_sk, bias_stride, out_stride,
    NUM_IN: tl.constexpr, NUM_OUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    # 1. Whose tile it is: expert e's begin at offsets[e] // BLOCK_M + e. Beyond the last: nobody's.
    tile, tile_n = tl.program_id(1), tl.program_id(0)
    low, high = tile * 0, num_experts
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(offsets + middle) // BLOCK_M + middle <= tile:
            low = middle
        else:
            high = middle - 1
    begin = tl.load(offsets + low)
    stop = tl.load(offsets + low + 1, mask=low < num_experts, other=0)
    first = begin + (tile - begin // BLOCK_M - low) * BLOCK_M
    if first >= stop:
        return

    # 2. The sum over all inputs, in their order.
    pairs = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
    is_pair = (pairs < stop)[:, None]
    row = pairs if rows is None else tl.load(rows + pairs, mask=pairs < stop, other=0).to(tl.int64)
    outs = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    is_out = (outs < NUM_OUT)[None, :]
    expert = low.to(tl.int64)
    in_at = inputs + row[:, None] * in_stride
    weight_at = weight + expert * weight_se + outs[None, :] * weight_sr
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, NUM_IN, BLOCK_K):
        at = start + tl.arange(0, BLOCK_K)
        is_in = at < NUM_IN
        left = tl.load(in_at + at[None, :], mask=is_pair & is_in[None, :], other=0.0)
        right = tl.load(weight_at + at[:, None] * weight_sk, mask=is_out & is_in[:, None], other=0.0)
        total = tl.dot(left.to(DOT), right.to(DOT), total, input_precision="ieee")

    # 3. Bias, and one rounding.
    if bias is not None:
        at_bias = bias + expert * bias_stride + outs
        total += tl.load(at_bias, mask=outs < NUM_OUT, other=0.0).to(tl.float32)[None, :]
    out_at = out + pairs[:, None] * out_stride + outs[None, :]
    tl.store(out_at, total.to(out.dtype.element_ty), mask=is_pair & is_out)


@kernel
@no_type_check
def _combine(
    pairs, places, weights, out,
    DIM: tl.constexpr, CHOSEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row's results times their weights, added in the order in which the router named the experts."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for chosen in range(CHOSEN):
        place = tl.load(places + row * CHOSEN + chosen).to(tl.int64)
        factor = tl.load(weights + row * CHOSEN + chosen).to(tl.float32)
        total += tl.load(pairs + place * DIM + at, mask=at < DIM, other=0.0).to(tl.float32) * factor
    tl.store(out + row * DIM + at, total.to(out.dtype.element_ty), mask=at < DIM)


def triton_grouped_linear(
    inputs: torch.Tensor,  # [rows, in]
    rows: torch.Tensor | None,  # [pairs], int64: each pair's row; None: pair i is row i
    weight: torch.Tensor,  # [experts, out, in]; any strides
    bias: torch.Tensor | None,  # [experts, out]
    offsets: torch.Tensor,  # [experts + 1], int32: where each expert's pairs begin; the last: their number
) -> torch.Tensor:  # [pairs, out]
    """Each pair's row through its expert's linear; pairs sorted by expert."""
    num_experts, num_out, num_in = weight.shape
    if inputs.shape[1] != num_in or len(offsets) != num_experts + 1:
        raise ValueError(f"{tuple(inputs.shape)} and {len(offsets)} offsets for {tuple(weight.shape)}")
    num_pairs = len(inputs) if rows is None else len(rows)
    inputs = inputs if inputs.stride(1) == 1 else inputs.contiguous()
    out = torch.empty(num_pairs, num_out, dtype=inputs.dtype, device=inputs.device)
    if not num_pairs:
        return out
    is_full = inputs.dtype == torch.float32
    block_m, block_n, block_k = (16, 32, 32) if is_full else (32, 128, 64)
    _grouped[(cdiv(num_out, block_n), num_pairs // block_m + num_experts)](
        inputs, rows, weight, bias, offsets, out, num_experts, inputs.stride(0), *weight.stride(),
        0 if bias is None else bias.stride(0), out.stride(0), NUM_IN=num_in, NUM_OUT=num_out,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, DOT=compute_type(inputs.dtype),
        num_warps=4, num_stages=3,
    )  # fmt: skip
    return out


def triton_combine(
    pairs: torch.Tensor,  # [pairs, dim], contiguous
    places: torch.Tensor,  # [rows, chosen], int64: where each choice's result lies
    weights: torch.Tensor,  # [rows, chosen], contiguous
) -> torch.Tensor:  # [rows, dim]
    """Each row's weighted sum, in float32, rounded once."""
    (num_rows, num_chosen), dim = places.shape, pairs.shape[1]
    out = torch.empty(num_rows, dim, dtype=pairs.dtype, device=pairs.device)
    if num_rows:
        block = 1024
        _combine[(num_rows, cdiv(dim, block))](
            pairs, places.contiguous(), weights.contiguous(), out,
            DIM=dim, CHOSEN=num_chosen, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return out


def reference_experts(
    inputs: torch.Tensor,  # [rows, in]
    experts: torch.Tensor,  # [rows, chosen]
    weights: torch.Tensor,  # [rows, chosen]
    weight: torch.Tensor,  # [experts, out, in]
    bias: torch.Tensor | None,
) -> torch.Tensor:  # [rows, out], float64
    """One linear of the experts, weighted and added, in float64."""
    made = torch.einsum("ri,rcoi->rco", inputs.double(), weight.double()[experts])
    if bias is not None:
        made = made + bias.double()[experts]
    return (made * weights.double()[..., None]).sum(1)
