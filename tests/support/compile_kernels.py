"""Compiles each kernel for Hopper down to machine code, as its launcher would, on a machine without a GPU.

Run as a program (`python -m tests.support.compile_kernels`): the interpreter must be off, and launches are
replaced by compilations in this process. Prints a line a kernel; exits with 1 where one does not compile.
"""

import inspect
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from pagebus.kernels.triton_attention import triton_paged_attention
from pagebus.kernels.triton_experts import triton_combine, triton_grouped_linear
from pagebus.kernels.triton_few_rows import configs_for, triton_few_rows
from pagebus.kernels.triton_filters import triton_limits
from pagebus.kernels.triton_fp8 import triton_quantize
from pagebus.kernels.triton_gated import triton_gated
from pagebus.kernels.triton_linear import triton_linear
from pagebus.kernels.triton_norm import triton_add_rms_norm
from pagebus.kernels.triton_penalties import triton_penalize
from pagebus.kernels.triton_rope_kv import HeadNorm, triton_rope_kv
from pagebus.kernels.triton_sampling import triton_sample, triton_scan
from pagebus.kernels.triton_steps import Layout, StepBuffers, triton_finish, triton_keep, triton_prepare

TARGET = GPUTarget("cuda", 90, 32)
_TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64",
    torch.float8_e4m3fn: "fp8e4nv", torch.int8: "i8", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
_OPTIONS = {"num_warps", "num_stages", "grid", "warmup"}
TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
SHARED_MEMORY = 227 * 1024
seen: set[str] = set()
case = ""


def compile_launch(self, *args, **kwargs) -> None:
    options = {name: kwargs.pop(name) for name in list(kwargs) if name in _OPTIONS}
    bound = inspect.signature(self.fn).bind(*args, **kwargs).arguments
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(self.params):
        value = bound[parameter.name]
        is_one = type(value) is int and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or is_one:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + _TYPES[value.dtype]
            if not parameter.do_not_specialize_on_alignment:
                attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(self, signature, constants, attributes)
    made = triton.compile(
        source, target=TARGET, options={n: v for n, v in options.items() if n.startswith("num_")}
    )
    shared = made.metadata.shared
    assert shared <= SHARED_MEMORY, f"{self.fn.__name__} wants {shared} bytes of shared memory"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        used = subprocess.run(
            [TOOL, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, spilled = re.findall(r"REG:(\d+) STACK:(\d+)", used)[-1]
    seen.add(self.fn.__name__)
    print(
        f"{case:44} {self.fn.__name__:12} shared {shared:7}  registers {registers:3}  stack {spilled:5}",
        flush=True,
    )


def attention(dtype, k_dim, v_dim, heads, kv_heads, *, is_decode, page_dtype=None, has_peaks=False, **more):
    global case
    how = "decode" if is_decode else "mixed"
    case = f"{str(dtype)[6:]} {k_dim}/{v_dim} {heads}/{kv_heads} {how} {' '.join(more)}"
    rows, tokens = 3, 3 if is_decode else 40
    scale = torch.ones(1) if page_dtype and not has_peaks else None
    peaks = torch.empty(16, kv_heads, 16) if has_peaks else None
    case += " peaks" if has_peaks else ""
    triton_paged_attention(
        torch.empty(tokens, heads, k_dim, dtype=dtype),
        torch.empty(16, kv_heads, 16, k_dim, dtype=page_dtype or dtype),
        torch.empty(16, kv_heads, 16, v_dim, dtype=page_dtype or dtype),
        torch.zeros(rows, 64, dtype=torch.int32), torch.zeros(rows, dtype=torch.int32),
        None if is_decode else torch.zeros(rows + 1, dtype=torch.int32),
        scale=0.1, key_scale=scale, value_scale=scale, key_peaks=peaks, value_peaks=peaks, **more,
    )  # fmt: skip


def all_attention() -> None:
    bf16, fp8 = torch.bfloat16, torch.float8_e4m3fn
    for is_decode in (False, True):
        split = {"segments": 8} if is_decode else {}
        attention(bf16, 128, 128, 32, 8, is_decode=is_decode, **split)
        attention(bf16, 128, 128, 32, 8, is_decode=is_decode, page_dtype=fp8, **split)
        attention(bf16, 128, 128, 32, 8, is_decode=is_decode, page_dtype=fp8, has_peaks=True, **split)
        attention(bf16, 576, 512, 16, 1, is_decode=is_decode, page_dtype=fp8, has_peaks=True)
        attention(bf16, 64, 64, 64, 8, is_decode=is_decode, window=128, sinks=torch.ones(64, dtype=bf16))
        attention(bf16, 256, 256, 8, 4, is_decode=is_decode, window=4096, softcap=50.0, **split)
        attention(bf16, 192, 128, 16, 16, is_decode=is_decode)
        attention(bf16, 576, 512, 16, 1, is_decode=is_decode)
        attention(torch.float16, 80, 80, 32, 32, is_decode=is_decode)
        attention(torch.float32, 96, 96, 14, 2, is_decode=is_decode)
        attention(torch.float32, 256, 256, 8, 4, is_decode=is_decode)


def layers() -> None:
    global case
    case = "layer"
    bf16, positions = torch.bfloat16, torch.zeros(3, dtype=torch.int64)
    weights = torch.empty(128, dtype=bf16)
    for page_dtype, scale, norm, is_interleaved in (
        (bf16, None, None, False),
        (torch.float8_e4m3fn, torch.ones(1), HeadNorm(weights, weights, 1e-6), False),
        (bf16, None, HeadNorm(weights, weights, 1e-6, is_offset=True), True),
    ):
        pages = torch.empty(4, 8, 16, 128, dtype=page_dtype)
        triton_rope_kv(
            torch.empty(3, 48 * 128, dtype=bf16), pages, pages, positions, positions.int(),
            torch.empty(9, 64), torch.empty(9, 64), num_heads=32,
            is_interleaved=is_interleaved, norm=norm, key_scale=scale,
            value_scale=scale,
        )  # fmt: skip
    pages = torch.empty(4, 8, 16, 128, dtype=torch.float8_e4m3fn)
    peaks = torch.empty(4, 8, 16)
    triton_rope_kv(
        torch.empty(3, 48 * 128, dtype=bf16), pages, pages, positions, positions.int(),
        torch.empty(9, 64), torch.empty(9, 64), num_heads=32, key_peaks=peaks, value_peaks=peaks,
    )  # fmt: skip
    x, weight = torch.empty(3, 4096, dtype=bf16), torch.empty(4096, dtype=bf16)
    triton_add_rms_norm(x, x, weight, 1e-6)
    triton_add_rms_norm(x, None, weight, 1e-6, is_offset=True)
    fp8_weight = torch.empty(2048, 4096, dtype=torch.float8_e4m3fn)
    for inputs in (x, x.float()):
        triton_linear(inputs, torch.empty(2048, 4096, dtype=inputs.dtype), weight.to(inputs.dtype)[:2048])
    triton_linear(x.view(1, 3, 4096), torch.empty(1, 4096, 96, dtype=bf16).transpose(1, 2))
    peaks = torch.empty(3), torch.empty(2048)
    triton_linear(x.to(torch.float8_e4m3fn), fp8_weight, peaks=peaks, dtype=bf16)
    triton_quantize(x)
    pairs, offsets = torch.zeros(6, dtype=torch.int64), torch.zeros(9, dtype=torch.int32)
    made = triton_grouped_linear(x, pairs, torch.empty(8, 768, 4096, dtype=bf16), None, offsets)
    triton_combine(made, pairs.view(3, 2), torch.empty(3, 2, dtype=bf16))
    triton_gated(x, "silu")
    triton_gated(x, "gelu_tanh")


def few_rows() -> None:
    global case
    bf16 = torch.bfloat16
    for num_rows in (1, 8):
        for config in configs_for(num_rows):
            for num_in, num_out, activation in ((4096, 6144, None), (3072, 1024, None), (1024, 6144, "silu")):
                case = f"{num_rows} rows, {num_in} to {num_out} {activation or ''} {config.block_n}"
                inputs, weight = (
                    torch.empty(num_rows, num_in, dtype=bf16),
                    torch.empty(num_out, num_in, dtype=bf16),
                )
                triton_few_rows(inputs, weight, None, config, activation)


def sampling() -> None:
    global case
    rows = 3
    numbers, heat = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows)
    for logits in (torch.empty(rows, 151_936, dtype=torch.bfloat16), torch.empty(rows, 128_256)):
        case = f"sampling {str(logits.dtype)[6:]}"
        scanned = triton_scan(logits)
        limits = triton_limits(logits, scanned.tops, heat, heat, numbers.int(), heat.double())
        triton_sample(logits, scanned, heat, limits, numbers, numbers)
    short = numbers.int()
    triton_penalize(
        logits, torch.zeros(4, dtype=torch.int32), short, heat, short, short.to(torch.int8), heat, heat, heat
    )


def steps() -> None:
    """A step's first and last kernels, where every row decodes and where prompts are among them."""
    global case
    layout, cpu = Layout(num_slots=16, num_groups=2, width=256, num_rows=8), torch.device("cpu")
    state, longs = torch.zeros(layout.size, dtype=torch.int64), torch.zeros(9, dtype=torch.int64)
    for num_tokens, given in ((8, None), (40, torch.zeros(40, dtype=torch.int64))):
        case = f"step of {num_tokens} tokens"
        buffers = StepBuffers.make(8, num_tokens, layout, cpu)
        triton_prepare(state, layout, longs[:8], longs, given, buffers, 16)
    rows = torch.zeros(8)
    triton_finish(
        state, layout, longs[:8], longs, longs[:8], longs[:8], rows, rows, rows.double()[:, None].expand(8, 4)
    )
    for dtype in (torch.bfloat16, torch.float32):
        triton_keep(
            state, longs[:8], torch.empty(8, 128_256, dtype=dtype), torch.empty(8, 128_256, dtype=dtype)
        )


def main() -> None:
    JITFunction.run = compile_launch
    steps()
    layers()
    few_rows()
    sampling()
    all_attention()
    kernels = {
        "_attend",
        "_reduce",
        "_rope_kv",
        "_rms_norm",
        "_linear",
        "_grouped",
        "_combine",
        "_quantize",
        "_gated",
        "_scan",
        "_choose",
        "_draw",
        "_pick",
        "_limits",
        "_prepare",
        "_finish",
        "_keep",
        "_few_rows",
    }
    sys.exit(0 if seen >= kernels | {"_penalize"} else f"never launched: {kernels - seen}")


if __name__ == "__main__":
    main()
