"""The figures of the PagedAttention paper that ours are printed beside (Kwon et al., SOSP 2023)."""

from typing import NamedTuple

PAGING = "pagebus (paging)"
MACHINE = "opt-13b"
"""All figures here but the ratios of rates are of this model."""


class Split(NamedTuple):
    """Shares of KV memory in percent (figure 2); None: not told."""

    token_state: float
    reserved: float | None
    internal: float | None
    external: float | None


MEMORY = {
    "Orca (Max)": Split(20.4, 13.3, 57.3, 8.9),
    "Orca (Pow2)": Split(26.8, 17.9, 13.6, 41.6),
    "Orca (Oracle)": Split(38.2, 25.2, 0.0, 36.6),
    PAGING: Split(96.3, None, None, None),
}
"""Of OPT-13B; we put them beside the ShareGPT lengths."""

RATES = {"ShareGPT": 2.0, "Alpaca": 30.0}
"""Requests a second at which figure 13 counts batched requests."""

BATCHES = {
    "ShareGPT": {"Orca (Max)": 7.00, "Orca (Pow2)": 9.81, "Orca (Oracle)": 13.62, PAGING: 30.42},
    "Alpaca": {"Orca (Max)": 7.00, "Orca (Pow2)": 43.24, "Orca (Oracle)": 72.75, PAGING: 132.44},
}

RATE_RATIOS = {"Orca (Max)": (2.7, 8.0), "Orca (Oracle)": (1.7, 2.7)}
"""Request rate of paging over theirs at similar latency, ShareGPT, over all models."""

BEST_BLOCK_SIZES = {"ShareGPT": (16, 128), "Alpaca": (16, 32)}

SHARING = {"ShareGPT": (16.2, 30.5), "Alpaca": (6.1, 9.8)}
"""Percent of blocks saved by parallel sampling, from two choices to six."""
