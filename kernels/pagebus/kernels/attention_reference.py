"""Attention over pages in plain torch, in float64: what the GPU's kernels are compared with."""

import torch

from pagebus.kernels.fp8 import MOST


def reference_attention(
    query: torch.Tensor,  # [tokens, heads, key_dim]
    key_pages: torch.Tensor,  # [blocks, kv_heads, BLOCK_SIZE, key_dim]
    value_pages: torch.Tensor,  # [blocks, kv_heads, BLOCK_SIZE, value_dim]
    tables: torch.Tensor,  # [rows, max_blocks], int32
    contexts: torch.Tensor,  # [rows], int32
    cu_seqlens: torch.Tensor | None,  # [rows + 1], int32; None: token r is row r's
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,  # [heads]
    key_scale: torch.Tensor | None = None,
    value_scale: torch.Tensor | None = None,
    key_peaks: torch.Tensor | None = None,  # [blocks, kv_heads, BLOCK_SIZE]: key = stored * peak / 448
    value_peaks: torch.Tensor | None = None,
) -> torch.Tensor:  # [tokens, heads, value_dim], float64
    """As `triton_paged_attention`; reads the lengths on the host and only the slots that a query sees."""
    num_rows, page = len(contexts), key_pages.shape[2]
    share = query.shape[1] // key_pages.shape[1]
    bounds = list(range(num_rows + 1)) if cu_seqlens is None else cu_seqlens.tolist()
    out = query.new_zeros(*query.shape[:2], value_pages.shape[3], dtype=torch.float64)
    for row, context in enumerate(contexts.tolist()):
        for token in range(bounds[row], bounds[row + 1]) if context else ():
            position = context - bounds[row + 1] + token
            first = 0 if window is None else max(0, position - window + 1)
            places = torch.arange(first, position + 1, device=query.device)
            blocks, slots = tables[row, places // page].long(), places % page
            keys = key_pages[blocks, :, slots].double() * (1.0 if key_scale is None else key_scale.double())
            values = value_pages[blocks, :, slots].double()
            values = values * (1.0 if value_scale is None else value_scale.double())
            if key_peaks is not None and value_peaks is not None:
                keys = keys * (key_peaks[blocks, :, slots].double() / MOST)[..., None]
                values = values * (value_peaks[blocks, :, slots].double() / MOST)[..., None]
            keys, values = keys.repeat_interleave(share, 1), values.repeat_interleave(share, 1)
            logits = torch.einsum("hd,nhd->hn", query[token].double(), keys) * scale
            if softcap is not None:
                logits = torch.tanh(logits / softcap) * softcap
            if sinks is not None:
                logits = torch.cat((logits, sinks.double()[:, None]), 1)
            weights = logits.softmax(-1)[:, : len(places)]
            out[token] = torch.einsum("hn,nhd->hd", weights, values)
    return out
