"""The fused kernels of a layer against float64, in Triton's interpreter."""

import pytest

pytest.importorskip("triton")

import torch

from pagebus.kernels.jit import IS_INTERPRETED
from tests.support.kernel_checks import poison_empty
from tests.support.layer_checks import RopeCase, check_gated, check_norm, check_rope

pytestmark = pytest.mark.skipif(
    not IS_INTERPRETED, reason="triton was imported before TRITON_INTERPRET was set"
)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    poison_empty(monkeypatch)


@pytest.mark.parametrize("is_interleaved", [False, True])
@pytest.mark.parametrize("norm", [None, "plain", "offset"])
@pytest.mark.parametrize(
    ("k_dim", "v_dim", "rotary"), [(32, 32, 32), (80, 80, 80), (96, 24, 24), (16, 16, 8), (24, 64, 2)]
)
def test_rope_kv(is_interleaved, norm, k_dim, v_dim, rotary) -> None:
    check_rope(RopeCase(5, 2, k_dim, v_dim, rotary, is_interleaved=is_interleaved, norm=norm))


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (14, 2), (9, 9), (20, 10), (8, 1)])
def test_rope_kv_heads(heads, kv_heads) -> None:
    check_rope(RopeCase(heads, kv_heads, 16, 16, 16, norm="plain", num_tokens=3))


@pytest.mark.parametrize("slot_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_rope_kv_types(slot_dtype, dtype) -> None:
    check_rope(
        RopeCase(
            4, 2, 32, 16, 16, dtype=dtype, slot_dtype=slot_dtype, is_head_major=True, scales=(0.5, 3.0),
            tolerance=2e-3 if dtype == torch.float16 else 1e-5,
        )
    )  # fmt: skip


@pytest.mark.parametrize("is_head_major", [False, True])
@pytest.mark.parametrize(("k_dim", "v_dim"), [(32, 32), (24, 40)])
def test_rope_kv_in_fp8_with_a_peak_for_each_vector(is_head_major, k_dim, v_dim) -> None:
    check_rope(
        RopeCase(5, 3, k_dim, v_dim, 16, norm="plain", page_dtype=torch.float8_e4m3fn, has_peaks=True,
                 is_head_major=is_head_major)
    )  # fmt: skip


def test_a_value_that_is_no_number_shows_in_its_peak() -> None:
    check_rope(RopeCase(2, 2, 16, 16, 16, page_dtype=torch.float8_e4m3fn, has_peaks=True, has_nan=True))


def test_rope_kv_of_no_tokens() -> None:
    check_rope(RopeCase(4, 2, 16, 16, 16, num_tokens=0))


def test_rope_kv_refuses_other_widths() -> None:
    with pytest.raises(ValueError, match="columns"):
        check_rope(RopeCase(4, 2, 16, 16, 16, num_extra_columns=1))


@pytest.mark.parametrize("dim", [1, 7, 64, 100, 576, 1025])
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("is_offset", [False, True])
def test_norm(dim, has_residual, is_offset) -> None:
    check_norm(3, dim, has_residual=has_residual, is_offset=is_offset)


def test_norm_rounds_the_sum_to_the_residuals_type() -> None:
    check_norm(5, 96, has_residual=True, is_offset=False, dtype=torch.float16, tolerance=2e-3)


@pytest.mark.parametrize("width", [1, 5, 1024, 1030, 2050])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_gated(width, activation, dtype) -> None:
    check_gated(3, width, activation, dtype=dtype, tolerance=2e-3 if dtype == torch.float16 else 1e-5)
