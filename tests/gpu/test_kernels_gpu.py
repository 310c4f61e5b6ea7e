"""The kernels on a real GPU: bfloat16, fp8 pages, CUDA graphs."""

import math

import pytest
import torch

if (
    not torch.cuda.is_available()
):  # before triton is imported: the interpreter's tests are in this session too
    pytest.skip("gpu: no CUDA device", allow_module_level=True)
pytest.importorskip("triton")

from pagebus.kernels import fp8
from pagebus.kernels.jit import IS_INTERPRETED
from pagebus.kernels.triton_attention import tile_config, triton_paged_attention
from pagebus.kernels.triton_few_rows import configs_for, triton_few_rows
from pagebus.kernels.triton_fp8 import fp8_linear, reference_fp8_linear, triton_quantize
from pagebus.kernels.triton_gated import reference_gated
from pagebus.kernels.triton_linear import reference_linear, triton_linear
from tests.support.kernel_checks import AttentionCase, check_attention, poison_empty
from tests.support.layer_checks import RopeCase, check_gated, check_norm, check_rope
from tests.support.sampling_checks import check_draws, check_limits, check_penalties, check_scan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(IS_INTERPRETED, reason="TRITON_INTERPRET is set"),
]

MIXED = [(1, 400), (190, 190), (70, 530), (1, 1), (33, 70), (0, 0), (1, 16), (129, 1000)]
DECODE = [(1, 400), (1, 1), (1, 0), (1, 1700), (1, 16), (1, 17)]
CLOSE = {torch.float32: 3e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
FP8 = torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    poison_empty(monkeypatch)


@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize("is_decode", [False, True])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "k_dim", "v_dim"),
    [(32, 8, 128, 128), (16, 8, 128, 128), (14, 2, 64, 64), (8, 4, 256, 256), (4, 4, 80, 80),
     (16, 16, 192, 128), (6, 2, 96, 96), (16, 1, 576, 512)],
)  # fmt: skip
def test_attention(dtype, is_decode, window, heads, kv_heads, k_dim, v_dim) -> None:
    rows = DECODE if is_decode else MIXED
    check_attention(
        AttentionCase(
            rows, heads, kv_heads, k_dim, v_dim, dtype, window=window, is_decode=is_decode, device="cuda",
            num_tail_tokens=0 if is_decode else 9, tolerance=CLOSE[dtype],
        )
    )  # fmt: skip


@pytest.mark.parametrize("is_decode", [False, True])
@pytest.mark.parametrize("page_dtype", [torch.bfloat16, FP8])
@pytest.mark.parametrize("segments", [1, 4, 32])
def test_attention_with_everything(is_decode, page_dtype, segments) -> None:
    check_attention(
        AttentionCase(
            DECODE if is_decode else MIXED, 64, 8, 64, 64, torch.bfloat16, page_dtype, softcap=20.0,
            has_sinks=True, segments=segments if is_decode else 1, is_decode=is_decode,
            device="cuda", window=128, scales=(0.7, 1.3), is_head_major=True, tolerance=4e-2,
        )
    )  # fmt: skip


def test_a_row_has_the_same_bits_in_any_batch_with_one_cut() -> None:
    config = tile_config(128, 128, torch.bfloat16, 4, is_decode=False)
    case = {"heads": 32, "kv_heads": 8, "k_dim": 128, "v_dim": 128, "dtype": torch.bfloat16, "device": "cuda",
            "config": config, "tolerance": 3e-2}  # fmt: skip
    alone = check_attention(AttentionCase([(77, 610)], **case))
    padded = check_attention(AttentionCase([(0, 0), (77, 610), (0, 0)], **case))
    assert torch.equal(alone, padded)


@pytest.mark.parametrize("page_dtype", [torch.bfloat16, FP8])
@pytest.mark.parametrize("norm", [None, "plain", "offset"])
@pytest.mark.parametrize(("k_dim", "rotary"), [(128, 128), (80, 32), (64, 64)])
def test_rope_kv(page_dtype, norm, k_dim, rotary) -> None:
    scales = (0.05, 0.2) if page_dtype == FP8 else None
    check_rope(
        RopeCase(32, 8, k_dim, k_dim, rotary, norm=norm, dtype=torch.bfloat16, page_dtype=page_dtype,
                 scales=scales, device="cuda", tolerance=4e-2)
    )  # fmt: skip


@pytest.mark.parametrize("dim", [100, 1024, 4096, 5376])
@pytest.mark.parametrize("has_residual", [False, True])
def test_norm(dim, has_residual) -> None:
    options = {"dtype": torch.bfloat16, "tolerance": 4e-2, "device": "cuda"}
    check_norm(65, dim, has_residual=has_residual, is_offset=False, **options)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated(activation) -> None:
    check_gated(65, 3072 + 5, activation, dtype=torch.bfloat16, tolerance=4e-2, device="cuda")


@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize("vocabulary", [1000, 128_256, 151_936])
def test_sampling(dtype, vocabulary) -> None:
    logits = (torch.randn(4, vocabulary, device="cuda") * 3).to(dtype)
    check_scan(logits)
    check_draws(logits, [0.7, 0.0, 1.0, 2.5], [-math.inf, -1.0, -2.0, -3.0], 99)
    check_limits(logits, [1.0, 0.5, 2.0, 1.0], [0, 50, 900, 0], [0.9, 0.8, 1.0, 0.5], [0.0, 0.0, 0.0, 0.05])


def test_penalties() -> None:
    check_penalties(50, 900, 3, device="cuda")


def test_decoding_can_be_captured_and_replayed_with_other_lengths() -> None:
    pages = torch.randn(64, 8, 16, 128, device="cuda", dtype=torch.bfloat16)
    query = torch.randn(4, 32, 128, device="cuda", dtype=torch.bfloat16)
    tables = torch.arange(64, device="cuda", dtype=torch.int32).view(4, 16)
    contexts = torch.tensor([5, 0, 100, 256], device="cuda", dtype=torch.int32)

    def launch() -> torch.Tensor:
        return triton_paged_attention(query, pages, pages, tables, contexts, None, scale=0.1, segments=4)

    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = launch()
    contexts.copy_(torch.tensor([77, 16, 0, 3], dtype=torch.int32))
    graph.replay()
    assert torch.equal(out, launch())
    assert not out[2].any()


@pytest.mark.parametrize("is_decode", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "k_dim", "v_dim"), [(32, 8, 128, 128), (16, 1, 576, 512)])
def test_attention_to_fp8_pages_with_peaks(is_decode, heads, kv_heads, k_dim, v_dim) -> None:
    check_attention(
        AttentionCase(
            DECODE if is_decode else MIXED, heads, kv_heads, k_dim, v_dim, torch.bfloat16, has_peaks=True,
            is_decode=is_decode, softcap=20.0, device="cuda", tolerance=1.0,
        )
    )  # fmt: skip


@pytest.mark.parametrize("norm", [None, "plain"])
def test_rope_kv_writes_peaks(norm) -> None:
    check_rope(
        RopeCase(32, 8, 128, 128, 128, norm=norm, dtype=torch.bfloat16, page_dtype=FP8, has_peaks=True,
                 device="cuda", tolerance=4e-2)
    )  # fmt: skip


@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize(("rows", "num_in", "num_out"), [(1, 1024, 3072), (77, 100, 130), (300, 4096, 9000)])
def test_fixed_linear(dtype, rows, num_in, num_out) -> None:
    inputs = torch.randn(rows, num_in, device="cuda").to(dtype)
    weight = (torch.randn(num_out, num_in, device="cuda") / num_in**0.5).to(dtype)
    out = triton_linear(inputs, weight)
    expected = reference_linear(inputs, weight)
    torch.testing.assert_close(out.double(), expected, atol=CLOSE[dtype], rtol=CLOSE[dtype])
    for count in (1, 2, 63, 64, 65):
        assert torch.equal(triton_linear(inputs[:count], weight), out[:count])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 7, 16])
@pytest.mark.parametrize(("num_in", "num_out"), [(1024, 6144), (3072, 1024), (4096, 1111)])
def test_products_of_few_rows(dtype, rows, num_in, num_out) -> None:
    inputs = torch.randn(rows, num_in, device="cuda").to(dtype)
    weight = (torch.randn(num_out, num_in, device="cuda") / num_in**0.5).to(dtype)
    expected = reference_linear(inputs, weight)
    for config in configs_for(rows):
        out = triton_few_rows(inputs, weight, None, config)
        torch.testing.assert_close(out.double(), expected, atol=CLOSE[dtype], rtol=CLOSE[dtype])
        if num_out % 2 == 0:
            gated = triton_few_rows(inputs, weight, None, config, "silu")
            wanted = reference_gated(expected, "silu")
            torch.testing.assert_close(gated.double(), wanted, atol=2 * CLOSE[dtype], rtol=CLOSE[dtype])


@pytest.mark.parametrize("rows", [1, 17, 300])
@pytest.mark.parametrize("has_bias", [False, True])
def test_fp8_linear(rows, has_bias) -> None:
    inputs = torch.randn(rows, 1024, device="cuda", dtype=torch.bfloat16)
    weight, weight_peaks = fp8.quantize(torch.randn(3072, 1024, device="cuda"))
    bias = torch.randn(3072, device="cuda", dtype=torch.bfloat16) if has_bias else None
    stored, peaks = triton_quantize(inputs)
    wanted, wanted_peaks = fp8.quantize(inputs)
    assert torch.equal(peaks, wanted_peaks)
    assert float((stored.float() != wanted.float()).float().mean()) < 1e-3, "ties alone may differ"
    expected = reference_fp8_linear(stored, peaks, weight, weight_peaks, bias)
    room = {"atol": 0.02 * float(expected.std()), "rtol": 2e-2}
    out = fp8_linear(inputs, weight, weight_peaks, bias)
    torch.testing.assert_close(out.double(), expected, **room)
    fixed = triton_linear(stored, weight, bias, peaks=(peaks, weight_peaks), dtype=torch.bfloat16)
    torch.testing.assert_close(fixed.double(), expected, **room)
