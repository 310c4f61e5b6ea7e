"""Writes new keys, values or latents into their slots of a layer's pages. Knows neither tables nor rows."""

import torch

BLOCK_SIZE = 16
"""Tokens a block."""


def write_kv(
    pages: torch.Tensor,  # [kv_heads, blocks, BLOCK_SIZE, dim]
    new: torch.Tensor,  # [kv_heads, tokens, dim]: keys, values, or latents
    slots: torch.Tensor,  # [tokens], int64: block * BLOCK_SIZE + position % BLOCK_SIZE
) -> None:
    """Store token i in slot `slots[i]`, in the pages' data type.

    The pages are head-major, so that gathering the blocks of a row gives one matrix a head:

        head 0 | block 0: slot 0 .. 15 | block 1: slot 0 .. 15 | ...
        head 1 | block 0: slot 0 .. 15 | ...
    """
    pages.flatten(1, 2).index_copy_(1, slots, new.to(pages.dtype))
