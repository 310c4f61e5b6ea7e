"""A linear that our own kernels compute on the CPU. Knows no family, and not where it goes."""

import torch
from torch import nn

from pagebus.kernels.cpu_library import CpuLibrary, LinearStruct


class CpuLinear(nn.Module):
    """A linear whose weight lies in our kernels' layout: row-invariant for any number of rows."""

    def __init__(self, library: CpuLibrary, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        # Plain attributes: an opaque tensor is no state that could be moved or saved.
        self._library = library
        self._packed = library.pack(weight)
        self._wide_bias = None if bias is None else bias.detach().float().contiguous()
        # Models ask their weights for the data type; this one has the type and no memory.
        self.weight = weight.detach().new_empty(0)
        self.bias = None
        self.struct = LinearStruct(
            self._packed.data_ptr(),
            None if self._wide_bias is None else self._wide_bias.data_ptr(),
            self.in_features,
            self.out_features,
        )

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:  # [..., in] -> [..., out]
        out = self._library.linear(inputs.reshape(-1, self.in_features), self.struct)
        return out.view(*inputs.shape[:-1], self.out_features)
