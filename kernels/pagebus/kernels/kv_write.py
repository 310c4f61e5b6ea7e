"""Writes new keys and values into their slots of a layer's pages. Knows neither tables nor rows."""

import torch

BLOCK_SIZE = 16
"""Tokens a block."""


def write_kv(
    key_pages: torch.Tensor,  # [kv_heads, blocks, BLOCK_SIZE, key_dim]
    value_pages: torch.Tensor,  # [kv_heads, blocks, BLOCK_SIZE, value_dim]
    key: torch.Tensor,  # [kv_heads, tokens, key_dim]
    value: torch.Tensor,  # [kv_heads, tokens, value_dim]
    slots: torch.Tensor,  # [tokens], int64: block * BLOCK_SIZE + position % BLOCK_SIZE
) -> None:
    """Store token i's key and value in slot `slots[i]`, in the pages' data type.

    The pages are head-major, so that gathering the blocks of a row gives one matrix a head:

        head 0 | block 0: slot 0 .. 15 | block 1: slot 0 .. 15 | ...
        head 1 | block 0: slot 0 .. 15 | ...
    """
    key_pages.flatten(1, 2).index_copy_(1, slots, key.to(key_pages.dtype))
    value_pages.flatten(1, 2).index_copy_(1, slots, value.to(value_pages.dtype))
