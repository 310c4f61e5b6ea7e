"""Measures sampling on a CPU: microseconds of CPU time a row, from the head's logits to ids.

`python -m pagebus.bench.sampling [--rows 1 8 32] [--vocabularies 32000 152064] [--dtype float32] [--flat]`

Logits are normal ones of deviation 2.5 with a few dozen likely ids on top, as language models make them, or
(`--flat`) normal ones of deviation 3 alone, whose nuclei hold thousands of ids. The median of `--repeats`.
"""

import pagebus.executor.openmp  # noqa: F401  # isort: skip  (before torch)

import argparse
import statistics
import time

import torch

from pagebus.bus.messages import Sampling
from pagebus.executor.batch import RowInput
from pagebus.executor.logprobs import describe
from pagebus.executor.memory import keep_freed_memory
from pagebus.executor.sampling import sample
from pagebus.executor.scan import scan

KINDS = {
    "greedy": Sampling(temperature=0),
    "temperature": Sampling(),
    "top_k 50": Sampling(top_k=50),
    "top_p 0.9": Sampling(top_p=0.9),
    "both": Sampling(top_k=50, top_p=0.9),
    "min_p 0.05": Sampling(min_p=0.05),
    "penalties": Sampling(temperature=0, repetition_penalty=1.2, frequency_penalty=0.3),
    "logprobs 5": Sampling(temperature=0, num_logprobs=5),
}


def main() -> None:
    """Print a table: a line for each number of rows and vocabulary, a column for each kind."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32000, 152064])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--flat", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    print("us a row  vocabulary  rows" + "".join(f"{kind:>13}" for kind in KINDS))
    for vocabulary in arguments.vocabularies:
        for num_rows in arguments.rows:
            logits = _logits(num_rows, vocabulary, arguments.flat).to(
                torch.bfloat16 if arguments.dtype == "bfloat16" else torch.float32
            )
            times = [_measure(logits, sampling, arguments.repeats) for sampling in KINDS.values()]
            print(f"{vocabulary:>20}{num_rows:>6}" + "".join(f"{us:>13.0f}" for us in times), flush=True)


def _logits(num_rows: int, vocabulary: int, is_flat: bool) -> torch.Tensor:
    torch.manual_seed(0)
    if is_flat:
        return torch.randn(num_rows, vocabulary) * 3
    logits = torch.randn(num_rows, vocabulary) * 2.5
    likely = torch.randint(vocabulary, (num_rows, 40))
    return logits.scatter_(1, likely, 8 + torch.rand(num_rows, 40) * 12)


@torch.inference_mode()
def _measure(logits: torch.Tensor, sampling: Sampling, repeats: int) -> float:
    """Median time of a batch of rows that all ask for the same, in microseconds a row."""
    num_rows, vocabulary = logits.shape
    history = torch.randint(vocabulary, (num_rows, 1000)).tolist() if sampling.needs_history else []
    times = []
    for repeat in range(repeats + 3):
        rows = [
            RowInput((), 0, (), sampling, n, repeat, num_prompt=500, history=history[n] if history else ())
            for n in range(num_rows)
        ]
        begin = time.process_time()
        scanned = scan(logits.float())
        made = sample(scanned, rows)
        if sampling.num_logprobs is not None:
            describe(scanned, made.ids, sampling.num_logprobs)
        times.append(time.process_time() - begin)
    return statistics.median(times[3:]) * 1e6 / num_rows


if __name__ == "__main__":
    main()
