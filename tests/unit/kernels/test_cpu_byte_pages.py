"""Pages of bytes (int8, fp8 e4m3) in the CPU's compiled kernels: what is stored, and attention over it."""

import numpy as np
import pytest
import torch

from pagebus.kernels import cpu_compile, fp8
from pagebus.kernels.cpu_library import CpuLibrary, LayerPages, library_for, pack_rows
from pagebus.kernels.kv_write import BLOCK_SIZE
from pagebus.kernels.paged_attention import RowSpan

pytestmark = pytest.mark.skipif(
    cpu_compile.find_compiler() is None or not cpu_compile.is_supported(), reason="needs a C++ compiler"
)

DTYPES = [torch.float32, torch.bfloat16]
KINDS = [torch.int8, torch.float8_e4m3fn]
NUM_BLOCKS = 40
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2}


@pytest.fixture(params=DTYPES, ids=["float32", "bfloat16"])
def library(request: pytest.FixtureRequest) -> CpuLibrary:
    found = library_for(request.param)
    assert found is not None, "there is a compiler, but there are no kernels"
    return found


class Bytes:
    """Pages of one layer, full of what nobody wrote: it must weigh nothing."""

    def __init__(
        self, library: CpuLibrary, kind: torch.dtype, heads: int, key_dim: int, value_dim: int
    ) -> None:
        self.library, self.group = library, 4 // library.dtype.itemsize
        made = [
            torch.randint(0, 256, (heads, NUM_BLOCKS, BLOCK_SIZE, dim), dtype=torch.uint8)
            for dim in (key_dim, value_dim)
        ]
        peaks = tuple(torch.full((heads, NUM_BLOCKS, BLOCK_SIZE), 1e4) for _ in made)
        self.pages = LayerPages(made[0].view(kind), made[1].view(kind), (peaks[0], peaks[1]))
        self.free = list(torch.randperm(NUM_BLOCKS - 1).tolist())

    def table(self, num_tokens: int) -> np.ndarray:
        return np.array([self.free.pop() for _ in range(-(-num_tokens // BLOCK_SIZE))])

    def attend(self, query, spans, new, **options) -> torch.Tensor:
        return self.library.attend(query, self.pages, pack_rows(spans), new=new, **options)

    def stored(self, table: np.ndarray, num_tokens: int) -> tuple[torch.Tensor, ...]:
        """A row's keys and values as they lie in the pages, [heads, tokens, dim], and their peaks."""
        keys, values = (part.view(torch.uint8)[:, table] for part in (self.pages.keys, self.pages.values))
        heads, num, _, key_dim = keys.shape
        keys = keys.reshape(heads, num, key_dim // self.group, BLOCK_SIZE, self.group).transpose(2, 3)
        values = values.reshape(heads, num, BLOCK_SIZE // self.group, -1, self.group).transpose(3, 4)
        assert self.pages.peaks is not None
        whole = [
            keys.reshape(heads, num * BLOCK_SIZE, -1)[:, :num_tokens].view(self.pages.keys.dtype),
            values.reshape(heads, num * BLOCK_SIZE, -1)[:, :num_tokens].view(self.pages.keys.dtype),
        ]
        peaks = [part[:, table].reshape(heads, -1)[:, :num_tokens] for part in self.pages.peaks]
        return (*whole, *peaks)


def most_of(kind: torch.dtype) -> float:
    return 127.0 if kind == torch.int8 else fp8.MOST


def plain(stored: torch.Tensor, peaks: torch.Tensor) -> torch.Tensor:
    return stored.double() * peaks.double()[..., None] / most_of(stored.dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [16, 48, 80])
def test_what_is_stored(library: CpuLibrary, kind: torch.dtype, dim: int) -> None:
    torch.manual_seed(dim)
    num = 37
    vectors = torch.randn(2, num, dim) * torch.logspace(-6, 6, num)[None, :, None]
    vectors[0, 3] = 0
    vectors[1, 5, 1:] = 0  # one number
    vectors = vectors.to(library.dtype)
    pages = Bytes(library, kind, 2, dim, dim)
    table = pages.table(num)
    pages.attend(
        torch.zeros(num, 2, dim, dtype=library.dtype),
        [RowSpan(0, num, 0, table)],
        (vectors, vectors),
        scale=1.0,
    )
    keys, values, key_peaks, value_peaks = pages.stored(table, num)
    peaks = vectors.float().abs().amax(-1)
    assert torch.equal(key_peaks, peaks)
    assert torch.equal(value_peaks, peaks)
    assert torch.equal(keys.view(torch.uint8), values.view(torch.uint8))
    if kind == torch.int8:
        error = (plain(keys, key_peaks) - vectors.double()).abs() / peaks.clamp(min=1e-30)[..., None]
        assert float(error.max()) <= 0.5001 / 127
    else:
        factors = torch.full_like(peaks, fp8.MOST) / peaks.clamp(min=1e-30)
        wanted = (vectors.float() * factors[..., None]).clamp(-fp8.MOST, fp8.MOST).to(kind)
        is_small = wanted.float().abs() <= 2**-6  # where e4m3 has fewer bits, and the kernels have zero
        assert torch.equal(keys.float()[~is_small], wanted.float()[~is_small])
        assert float(keys.float()[is_small].abs().max()) <= 2**-6


def reference(query, keys, values, scale, window=None, softcap=None, sinks=None) -> torch.Tensor:
    """float64 attention of a row's last queries [tokens, heads, dim] to keys [heads, tokens, dim]."""
    num, length, share = len(query), keys.shape[1], query.shape[1] // len(keys)
    keys, values = (part.repeat_interleave(share, 0) for part in (keys, values))
    scores = torch.einsum("qhd,hkd->hqk", query.double(), keys) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    at = torch.arange(length - num, length)[:, None] - torch.arange(length)[None]
    scores = scores.masked_fill((at < 0) | (at >= (window or length + 1)), float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(-1, num, 1)], -1)
    return torch.einsum("hqk,hkd->qhd", scores.softmax(-1)[..., :length], values)


CASES = {
    "plain": (4, 2, 64, 64, {}),
    "odd sizes": (9, 3, 34, 80, {}),
    "window": (4, 2, 32, 32, {"window": 21}),
    "soft cap and sinks": (4, 2, 32, 32, {"softcap": 3.0, "sinks": torch.tensor([0.5, -3.0, 9.0, 2.0])}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_attention(library: CpuLibrary, kind: torch.dtype, case: str) -> None:
    heads, kv_heads, key_dim, value_dim, options = CASES[case]
    torch.manual_seed(len(case))
    scale, dtype = key_dim**-0.5, library.dtype
    for length in (1, 16, 65, 150):
        query, keys, values = (
            (torch.randn(n, length, d) * 3).to(dtype)
            for n, d in ((heads, key_dim), (kv_heads, key_dim), (kv_heads, value_dim))
        )
        query = query.transpose(0, 1).contiguous()
        pages = Bytes(library, kind, kv_heads, key_dim, value_dim)
        table = pages.table(length)
        whole = pages.attend(query, [RowSpan(0, length, 0, table)], (keys, values), scale=scale, **options)
        stored = pages.stored(table, length)
        wanted = reference(query, plain(stored[0], stored[2]), plain(stored[1], stored[3]), scale, **options)
        assert float((whole.double() - wanted).abs().max() / wanted.std()) <= TOLERANCE[dtype]
        exact = reference(query, keys.double(), values.double(), scale, **options)
        apart = float((whole.double() - exact).std() / exact.std())
        assert apart <= (0.03 if kind == torch.int8 else 0.12), f"{apart} from unrounded keys and values"
        for step in (1, 7, 64):  # the same bits by chunks
            again, made = Bytes(library, kind, kv_heads, key_dim, value_dim), []
            other = again.table(length)
            for start in range(0, length, step):
                end = min(start + step, length)
                new = keys[:, start:end], values[:, start:end]
                span = RowSpan(0, end - start, start, other)
                made.append(again.attend(query[start:end], [span], new, scale=scale, **options))
            assert torch.equal(torch.cat(made), whole), f"steps of {step}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_shows_in_its_own_row(library: CpuLibrary, kind: torch.dtype, bad: float) -> None:
    torch.manual_seed(0)
    query = torch.randn(40, 2, 32).to(library.dtype)
    keys, values = (torch.randn(1, 40, 32).to(library.dtype) for _ in range(2))
    found = []
    for spoilt in (False, True):
        pages = Bytes(library, kind, 1, 32, 32)
        spans = [RowSpan(0, 20, 0, pages.table(20)), RowSpan(20, 20, 0, pages.table(20))]
        if spoilt:
            keys[0, 10, 3] = bad
            values[0, 12, 3] = bad
        found.append(pages.attend(query, spans, (keys, values), scale=0.2))
    assert torch.equal(found[0][20:], found[1][20:])
    assert not bool(torch.isfinite(found[1][10:20]).all(-1).any())


def test_pages_without_peaks_are_refused(library: CpuLibrary) -> None:
    pages = Bytes(library, torch.int8, 1, 32, 32).pages
    with pytest.raises(ValueError, match="without peaks"):
        LayerPages(pages.keys, pages.values).struct()
    with pytest.raises(ValueError, match="with peaks"):
        LayerPages(pages.keys.to(library.dtype), pages.values.to(library.dtype), pages.peaks).struct()


@pytest.mark.parametrize("kind", KINDS)
def test_freed_blocks_and_threads_do_not_matter(library: CpuLibrary, kind: torch.dtype) -> None:
    torch.manual_seed(0)
    query, keys, values = (torch.randn(heads, 80, 32).to(library.dtype) for heads in (4, 2, 2))
    query = query.transpose(0, 1).contiguous()
    pages = Bytes(library, kind, 2, 32, 32)
    table = pages.table(80)
    whole = pages.attend(query, [RowSpan(0, 80, 0, table)], (keys, values), scale=0.2, window=20)
    freed = table.copy()
    freed[:3] = -1  # positions 0..47; the last query sees 60..79
    before = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            last = pages.attend(query[79:], [RowSpan(0, 1, 79, freed)], None, scale=0.2, window=20)
            assert torch.equal(last[0], whole[79])
            every = pages.attend(query, [RowSpan(0, 80, 0, table)], None, scale=0.2, window=20)
            assert torch.equal(every, whole)
    finally:
        torch.set_num_threads(before)
