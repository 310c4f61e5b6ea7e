"""Rotary factors from a table, fixed per model. Knows positions, not which family turns what.

transformers computes the factors anew in each step, and lets long-context variants choose them by the
largest position in the batch, so that a row's keys would depend on its neighbours. Here each position's
factors are computed once, always together with the last position that the model may serve.
"""

import torch
from torch import nn

_CHUNK = 2048

Factors = tuple[torch.Tensor, ...]


class RotaryTable(nn.Module):
    """Stands in for a model's rotary embedding: same call, factors looked up, [1, tokens, ...] each."""

    def __init__(self, rotary: nn.Module, max_model_len: int) -> None:
        super().__init__()
        self._rotary = rotary
        self._max_model_len = max_model_len
        self._tables: dict[tuple[str | None, torch.dtype], tuple[bool, Factors]] = {}

    def forward(
        self, hidden: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None
    ) -> torch.Tensor | Factors:
        # position_ids: [1, tokens]
        is_tuple, table = self._table(hidden, layer_type, self._length(hidden, position_ids))
        found = tuple(part.index_select(1, position_ids[0]) for part in table)
        return found if is_tuple else found[0]

    def _length(self, hidden: torch.Tensor, position_ids: torch.Tensor) -> int:
        """On a GPU all at once: asking for the largest position would wait for the device in every step."""
        return self._max_model_len if hidden.is_cuda else int(position_ids.max()) + 1

    def factors(self, hidden: torch.Tensor, layer_type: str | None, length: int) -> Factors:
        """The factors of the first `length` positions or more, [1, positions, ...] each, in hidden's type."""
        return self._table(hidden, layer_type, length)[1]

    def _table(self, hidden: torch.Tensor, layer_type: str | None, length: int) -> tuple[bool, Factors]:
        key = (layer_type, hidden.dtype)
        is_tuple, table = self._tables.get(key, (True, ()))
        have = table[0].shape[1] if table else 0
        while have < length:
            # Chunks begin at multiples of _CHUNK, so a factor does not depend on what was asked for first.
            # Nothing beyond the last position is asked about: it would count as a longer context.
            last = self._max_model_len - 1
            positions = torch.arange(have, have + _CHUNK + 1, device=hidden.device).clamp_(max=last)
            positions[-1] = last
            made = self._call(hidden, positions[None], layer_type)
            is_tuple = isinstance(made, tuple)
            parts = tuple(part[:, :_CHUNK] for part in (made if isinstance(made, tuple) else (made,)))
            table = tuple(torch.cat(pair, 1) for pair in zip(table, parts, strict=True)) if table else parts
            have += _CHUNK
        self._tables[key] = (is_tuple, table)
        return is_tuple, table

    def _call(
        self, hidden: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None
    ) -> torch.Tensor | Factors:
        arguments = () if layer_type is None else (layer_type,)
        made: torch.Tensor | Factors = self._rotary(hidden, position_ids, *arguments)
        return made


def fix_rotary(model: nn.Module, max_model_len: int) -> None:
    """Swap the model's rotary embeddings (children called `rotary_emb`) for tables, in place."""
    for parent in list(model.modules()):
        child = dict(parent.named_children()).get("rotary_emb")
        if child is not None and not isinstance(child, RotaryTable):
            parent.add_module("rotary_emb", RotaryTable(child, max_model_len))
