"""Pages that our own CPU kernels attend to. Knows no sampling and no bus."""

from collections.abc import Sequence

import torch

from pagebus.executor.attention import Attend, AttentionCall, FusedCall
from pagebus.executor.kv_cache import LayerSpec, Pages
from pagebus.kernels.cpu_library import MAX_DIM, CpuLibrary, LayerPages, pack_rows
from pagebus.kernels.paged_attention import RowSpan

_VALUE_STEP = 16  # numbers that a kernel's vector holds


class CpuCache(Pages):
    """Head-major pages; inside a block numbers lie as the kernels read them (see `cpu/attention.h`)."""

    def __init__(
        self,
        specs: Sequence[LayerSpec],
        num_blocks: Sequence[int],
        library: CpuLibrary,
        page_dtype: torch.dtype | None = None,  # the library's, int8 or float8_e4m3fn
    ) -> None:
        super().__init__(specs, num_blocks, page_dtype or library.dtype, torch.device("cpu"), block_dim=1)
        self.library = library
        self._sinks: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def answer(self, spans: Sequence[Sequence[RowSpan]], num_tokens: int) -> Attend:
        """What answers the layers in a step of `num_tokens` flat tokens, padding included."""
        rows = [pack_rows(list(of_group)) for of_group in spans]

        def attend(call: AttentionCall | FusedCall) -> torch.Tensor:
            if isinstance(call, FusedCall):
                raise TypeError("these pages take no fused calls")
            group = self.group_of[call.layer]
            return self.library.attend(
                call.query.transpose(0, 1),
                self.layer_pages(call.layer),
                rows[group],
                scale=call.scale,
                window=self.windows[group],
                softcap=call.softcap,
                sinks=None if call.sinks is None else self.wide_sinks(call.layer, call.sinks),
                new=(call.key, call.value),
            )

        return attend

    def layer_pages(self, layer: int) -> LayerPages:
        """A layer's pages as the kernels take them."""
        keys, values = self.of_layer[layer]
        if values is None:
            raise TypeError("these pages hold no latents")
        return LayerPages(keys, values, self.peaks_of_layer.get(layer))

    def wide_sinks(self, layer: int, sinks: torch.Tensor) -> torch.Tensor:
        """A layer's sinks in float32, kept."""
        kept = self._sinks.get(layer)
        if kept is None or kept[0] is not sinks:
            kept = self._sinks[layer] = sinks, sinks.detach().float().contiguous()
        return kept[1]


def can_hold(specs: Sequence[LayerSpec]) -> bool:
    """Whether the kernels attend to such layers."""
    return all(
        not spec.is_latent
        and spec.key_dim % 2 == 0
        and spec.value_dim % _VALUE_STEP == 0
        and max(spec.key_dim, spec.value_dim) <= MAX_DIM
        and spec.num_heads % spec.num_kv_heads == 0
        for spec in specs
    )


def why_no_bytes(specs: Sequence[LayerSpec], page_dtype: torch.dtype, device: torch.device) -> str:
    """What keeps keys and values from lying in pages of bytes."""
    flag = "--kv-cache-dtype " + ("int8" if page_dtype == torch.int8 else "fp8")
    if device.type == "cuda":
        return f"{flag} needs Triton"
    if not can_hold(specs):
        return f"{flag}: the CPU's kernels do not hold what this model's attention stores; use auto"
    return f"{flag} needs the CPU's compiled kernels, and so a C++ compiler (g++)"
