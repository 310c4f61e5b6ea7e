"""The CPU's compiled kernels against float64, on odd sizes, and row by row bit for bit."""

import numpy as np
import pytest
import torch

from pagebus.executor.cpu_linears import CpuLinear
from pagebus.kernels import cpu_compile
from pagebus.kernels.cpu_library import CpuLibrary, LayerPages, library_for, pack_rows
from pagebus.kernels.kv_write import BLOCK_SIZE
from pagebus.kernels.paged_attention import RowSpan

pytestmark = pytest.mark.skipif(
    cpu_compile.find_compiler() is None or not cpu_compile.is_supported(), reason="needs a C++ compiler"
)

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2}
NUM_BLOCKS = 60


@pytest.fixture(params=DTYPES, ids=["float32", "bfloat16"])
def library(request: pytest.FixtureRequest) -> CpuLibrary:
    found = library_for(request.param)
    assert found is not None, "there is a compiler, but there are no kernels"
    return found


def check(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    assert found.shape == wanted.shape
    difference = (found.double() - wanted).abs().max() / wanted.std()
    assert float(difference) <= TOLERANCE[dtype]


@pytest.mark.parametrize(("num_in", "num_out"), [(2, 1), (34, 31), (64, 33), (130, 96), (576, 100)])
def test_linear(library: CpuLibrary, num_in: int, num_out: int) -> None:
    torch.manual_seed(num_in)
    weight, bias = torch.randn(num_out, num_in).to(library.dtype), torch.randn(num_out).to(library.dtype)
    linear = CpuLinear(library, weight, bias)
    inputs = torch.randn(43, num_in).to(library.dtype)
    wanted = inputs.double() @ weight.double().T + bias.double()
    whole = linear(inputs)
    check(whole, wanted, library.dtype)
    check(library.linear(inputs, linear.struct, is_wide=True), wanted, library.dtype)
    for num in (1, 2, 3, 13, 14, 15, 16, 29, 43):
        assert torch.equal(linear(inputs[:num]), whole[:num]), f"{num} rows have other bits"
        assert torch.equal(linear(inputs[43 - num :]), whole[43 - num :])
    assert linear(inputs[:0]).shape == (0, num_out)


def test_what_a_weight_does_not_take_is_refused(library: CpuLibrary) -> None:
    with pytest.raises(ValueError, match="packs"):
        library.pack(torch.zeros(4, 3, dtype=library.dtype))
    with pytest.raises(ValueError, match="packs"):
        library.pack(torch.zeros(4, 4, dtype=torch.float64))
    linear = CpuLinear(library, torch.zeros(4, 4, dtype=library.dtype))
    with pytest.raises(ValueError, match="fit"):
        library.linear(torch.zeros(2, 6, dtype=library.dtype), linear.struct)


class Pages:
    """Keys and values in pages of one layer, and the same as plain rows."""

    def __init__(self, library: CpuLibrary, heads: int, key_dim: int, value_dim: int) -> None:
        self.library, dtype = library, library.dtype
        # Numbers that no row wrote must weigh nothing; they are finite, as the executor keeps them.
        self.keys = torch.full((heads, NUM_BLOCKS, BLOCK_SIZE, key_dim), 1e4).to(dtype)
        self.values = torch.full((heads, NUM_BLOCKS, BLOCK_SIZE, value_dim), -1e4).to(dtype)
        self.free = list(torch.randperm(NUM_BLOCKS - 1).tolist())

    def table(self, num_tokens: int) -> np.ndarray:
        return np.array([self.free.pop() for _ in range(-(-num_tokens // BLOCK_SIZE))])

    def attend(self, query, spans, new, **options) -> torch.Tensor:
        pages = LayerPages(self.keys, self.values)
        return self.library.attend(query, pages, pack_rows(spans), new=new, **options)


def reference(query, keys, values, scale, window=None, softcap=None, sinks=None) -> torch.Tensor:
    """float64 attention of the last queries of one row; [tokens, heads, dim] each."""
    num, length, share = len(query), len(keys), query.shape[1] // keys.shape[1]
    keys, values = (part.double().repeat_interleave(share, 1) for part in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", query.double(), keys) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    at = torch.arange(length - num, length)[:, None] - torch.arange(length)[None]
    scores = scores.masked_fill((at < 0) | (at >= (window or length + 1)), float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(-1, num, 1)], -1)
    weights = scores.softmax(-1)[..., :length]
    return torch.einsum("hqk,khd->qhd", weights, values)


CASES = {
    "plain": (4, 2, 64, 64, {}),
    "three heads a KV head": (9, 3, 64, 64, {}),
    "one KV head, many heads": (28, 1, 32, 48, {}),
    "values of another size": (4, 4, 34, 80, {}),
    "window": (4, 2, 32, 32, {"window": 21}),
    "wide window": (2, 2, 128, 128, {"window": 130}),
    "soft cap": (4, 2, 32, 32, {"softcap": 3.0}),
    "sinks": (4, 2, 32, 32, {"sinks": torch.tensor([0.5, -3.0, 9.0, 2.0])}),
}


@pytest.mark.parametrize("case", CASES)
def test_attention(library: CpuLibrary, case: str) -> None:
    heads, kv_heads, key_dim, value_dim, options = CASES[case]
    torch.manual_seed(len(case))
    lengths, scale, dtype = [1, 16, 65, 150, 7], key_dim**-0.5, library.dtype
    rows = [
        tuple(
            torch.randn(n, h, d).to(dtype)
            for h, d in ((heads, key_dim), (kv_heads, key_dim), (kv_heads, value_dim))
        )
        for n in lengths
    ]
    pages = Pages(library, kv_heads, key_dim, value_dim)
    spans = [
        RowSpan(first, num, 0, pages.table(num))
        for first, num in zip(np.cumsum([0, *lengths]), lengths, strict=False)
    ]
    query, keys, values = (torch.cat([row[part] for row in rows]) for part in range(3))
    new = keys.transpose(0, 1), values.transpose(0, 1)
    whole = pages.attend(query, spans, new, scale=scale, **options)
    for span, (q, k, v) in zip(spans, rows, strict=True):
        found = whole[span.token : span.token + span.num_tokens]
        check(found, reference(q, k, v, scale, **options), dtype)

    # The same bits by chunks, by decoding, and in other company.
    for span, (q, k, v) in zip(spans, rows, strict=True):
        for step in (1, 5, 64):
            again = Pages(library, kv_heads, key_dim, value_dim)
            table = again.table(span.num_tokens)
            made = []
            for start in range(0, span.num_tokens, step):
                end = min(start + step, span.num_tokens)
                some = [part[start:end].transpose(0, 1) for part in (k, v)]
                made.append(
                    again.attend(
                        q[start:end],
                        [RowSpan(0, end - start, start, table)],
                        tuple(some),
                        scale=scale,
                        **options,
                    )
                )
            assert torch.equal(torch.cat(made), whole[span.token : span.token + span.num_tokens]), (
                f"steps of {step}"
            )


def test_freed_blocks_of_a_window_are_never_read(library: CpuLibrary) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(80, heads, 32).to(library.dtype) for heads in (4, 2, 2))
    pages = Pages(library, 2, 32, 32)
    table = pages.table(80)
    new = k.transpose(0, 1), v.transpose(0, 1)
    whole = pages.attend(q, [RowSpan(0, 80, 0, table)], new, scale=0.2, window=20)
    freed = table.copy()
    freed[:3] = -1  # positions 0..47; the last query sees 60..79
    pages.keys[:, -1], pages.values[:, -1] = 0, 0
    last = pages.attend(q[79:], [RowSpan(0, 1, 79, freed)], None, scale=0.2, window=20)
    assert torch.equal(last[0], whole[79])


def test_tokens_of_no_row_come_out_as_zeros(library: CpuLibrary) -> None:
    pages = Pages(library, 1, 32, 32)
    q, k, v = (torch.randn(4, 1, 32).to(library.dtype) for _ in range(3))
    new = k.transpose(0, 1), v.transpose(0, 1)
    found = pages.attend(q, [RowSpan(0, 2, 0, pages.table(2))], new, scale=1.0)
    assert bool((found[2:] == 0).all())
    assert bool((found[:2] != 0).any())


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_any_number_of_threads(library: CpuLibrary, num_threads: int) -> None:
    torch.manual_seed(0)
    weight, inputs = torch.randn(200, 64).to(library.dtype), torch.randn(9, 64).to(library.dtype)
    before = torch.get_num_threads()
    wanted = CpuLinear(library, weight)(inputs)
    try:
        torch.set_num_threads(num_threads)
        linear = CpuLinear(library, weight)
        assert all(torch.equal(linear(inputs), wanted) for _ in range(50))
    finally:
        torch.set_num_threads(before)
