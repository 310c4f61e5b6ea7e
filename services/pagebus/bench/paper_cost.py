"""What a step costs on a GPU, by a model of memory traffic, arithmetic and host work. Knows no requests.

```
step = host + rows x host per row                                Python, for every sequence
     + max(weights / bandwidth, 2 x parameters x tokens / FLOPs)     linears: read once, computed per token
     + KV bytes read x (1 + 4 / block size) / bandwidth              attention; the factor only where paged
```
"""

from dataclasses import dataclass

BLOCK_OVERHEAD_TOKENS = 4
"""Reading a block costs as much as this many tokens more: looking it up, and lanes that have nothing to do.

With blocks of 16 a paged kernel is then 25 % slower than a contiguous one; the paper measured 20 to 26 %.
"""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A model on its GPUs: figures of all of them together; 16-bit weights and KV."""

    name: str
    num_parameters: float
    kv_bytes_per_token: int
    num_slots: int  # tokens that the KV memory holds, as the paper's table 1 says
    bandwidth: float  # bytes/s
    flops: float  # a second


MACHINES = {
    machine.name: machine
    for machine in (
        Machine(
            name="opt-13b",  # one A100 with 40 GB; 40 layers, hidden size 5,120
            num_parameters=13e9,
            kv_bytes_per_token=2 * 2 * 40 * 5120,
            num_slots=15_728,
            bandwidth=1.555e12,
            flops=312e12,
        ),
        Machine(
            name="opt-66b",  # four A100 with 40 GB; 64 layers, hidden size 9,216
            num_parameters=66e9,
            kv_bytes_per_token=2 * 2 * 64 * 9216,
            num_slots=9_696,
            bandwidth=4 * 1.555e12,
            flops=4 * 312e12,
        ),
        Machine(
            name="opt-175b",  # eight A100 with 80 GB; 96 layers, hidden size 12,288
            num_parameters=175e9,
            kv_bytes_per_token=2 * 2 * 96 * 12288,
            num_slots=60_064,
            bandwidth=8 * 2.039e12,
            flops=8 * 312e12,
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """Seconds of a step. The defaults fit two points of the paper, see the README of this folder."""

    machine: Machine
    bandwidth_share: float = 0.7  # of the data sheet's, as eager kernels attain it
    flops_share: float = 0.5
    host_s: float = 0.002
    host_s_per_row: float = 0.00025

    def step_s(
        self, num_tokens: int, num_rows: int, num_kv_tokens: int, block_size: int | None = None
    ) -> float:
        """Duration of a step that computes `num_tokens` positions of `num_rows` rows.

        `num_kv_tokens` positions are read from the KV cache; `block_size` None: it is contiguous.
        """
        machine = self.machine
        bandwidth = machine.bandwidth * self.bandwidth_share
        weights_s = 2 * machine.num_parameters / bandwidth
        compute_s = 2 * machine.num_parameters * num_tokens / (machine.flops * self.flops_share)
        kv_s = num_kv_tokens * machine.kv_bytes_per_token / bandwidth
        if block_size is not None:
            kv_s *= 1 + BLOCK_OVERHEAD_TOKENS / block_size
        return self.host_s + num_rows * self.host_s_per_row + max(weights_s, compute_s) + kv_s
