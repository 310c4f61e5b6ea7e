"""Inputs and comparisons for the GPU's kernels; the interpreter's tests and the GPU's use the same."""

from dataclasses import dataclass, field

import pytest
import torch

from pagebus.kernels.attention_reference import reference_attention
from pagebus.kernels.fp8 import quantize
from pagebus.kernels.triton_attention import TileConfig, triton_paged_attention

PAGE = 16


@dataclass
class AttentionCase:
    """A mixed batch: (queries, keys) of each row; queries of 0 and contexts of 0 are padding."""

    rows: list[tuple[int, int]]
    heads: int = 4
    kv_heads: int = 2
    k_dim: int = 32
    v_dim: int = 32
    dtype: torch.dtype = torch.float32
    page_dtype: torch.dtype | None = None
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False
    segments: int | None = None
    config: TileConfig | None = None
    num_tail_tokens: int = 0
    is_decode: bool = False
    is_head_major: bool = False
    seed: int = 0
    device: str = "cpu"
    scales: tuple[float, float] | None = None
    has_peaks: bool = False  # pages in fp8, each vector with its peak
    tolerance: float = field(default=3e-5)


def poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor that a launcher allocates is full of NaN."""
    real = torch.empty

    def poisoned(*args, **kwargs):
        made = real(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made.fill_(-7)

    monkeypatch.setattr(torch, "empty", poisoned)


def check_attention(case: AttentionCase) -> torch.Tensor:
    generator = torch.Generator().manual_seed(case.seed)
    page_dtype = case.page_dtype or case.dtype
    tokens = sum(queries for queries, _ in case.rows) + case.num_tail_tokens
    needed = [-(-context // PAGE) for _, context in case.rows]
    num_blocks = sum(needed) + 3
    order = torch.randperm(num_blocks, generator=generator).tolist()

    # Pages are NaN wherever no row has written; tables are -1 wherever no query may look.
    pages = []
    for dim in (case.k_dim, case.v_dim):
        shape = (num_blocks, case.kv_heads, PAGE, dim)
        if case.is_head_major:
            pages.append(torch.full((shape[1], shape[0], *shape[2:]), float("nan")).transpose(0, 1))
        else:
            pages.append(torch.full(shape, float("nan")))
    tables = torch.full((len(case.rows), max([1, *needed]) + 2), -1, dtype=torch.int32)
    for row, (queries, context) in enumerate(case.rows):
        first = 0 if case.window is None else max(0, context - queries - case.window + 1)
        for place in range(first, context):
            if tables[row, place // PAGE] < 0:
                tables[row, place // PAGE] = order.pop()
            for page, dim in zip(pages, (case.k_dim, case.v_dim), strict=True):
                block = int(tables[row, place // PAGE])
                page[block, :, place % PAGE] = torch.randn(case.kv_heads, dim, generator=generator)
    query = torch.randn(tokens, case.heads + 1, case.k_dim, generator=generator)
    sinks = torch.randn(case.heads, generator=generator) if case.has_sinks else None
    bounds = torch.tensor([0, *(queries for queries, _ in case.rows)]).cumsum(0).int()
    device = torch.device(case.device)
    query = query.to(device, case.dtype)[:, : case.heads]  # not contiguous
    if case.has_peaks:
        pages = [page * 10.0 ** torch.randint(-3, 3, page.shape[:3], generator=generator)[..., None]
                 for page in pages]  # fmt: skip
        (key_pages, key_peaks), (value_pages, value_peaks) = (quantize(page.to(device)) for page in pages)
    else:
        key_pages, value_pages = (page.to(device).to(page_dtype) for page in pages)
        key_peaks = value_peaks = None
    scales = [
        None if case.scales is None else torch.tensor([s], device=device) for s in case.scales or (1, 1)
    ]
    arguments = (
        query, key_pages, value_pages, tables.to(device),
        torch.tensor([context for _, context in case.rows], dtype=torch.int32, device=device),
        None if case.is_decode else bounds.to(device),
    )  # fmt: skip
    options = {
        "scale": case.k_dim**-0.5, "window": case.window, "softcap": case.softcap,
        "sinks": None if sinks is None else sinks.to(device),
        "key_scale": scales[0], "value_scale": scales[1],
        "key_peaks": key_peaks, "value_peaks": value_peaks,
    }  # fmt: skip
    out = triton_paged_attention(*arguments, **options, segments=case.segments, config=case.config)
    expected = reference_attention(*arguments, **options)
    torch.testing.assert_close(out.double(), expected, atol=case.tolerance, rtol=case.tolerance)
    return out
