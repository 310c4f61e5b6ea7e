"""pagebus beside other OpenAI-compatible servers, on one checkpoint, with one load, interleaved.

```
python -m tests.bench.compare_peers make smollm2-135m /tmp/smollm2        # a checkpoint with random weights
python -m tests.bench.compare_peers run /tmp/smollm2 --peer vllm=http://127.0.0.1:8100 --streams 1 8 16
```

`run` starts `pagebus serve` on the checkpoint; peers run already, on the same one. Tokens come first: what a
server makes is read by transformers, teacher-forced, before its speed counts for anything. Then each round
measures pagebus, every peer, and pagebus again. Figures are medians over rounds, ratios of what lay side by
side. One results file, rewritten after every round.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import msgspec
import torch

from pagebus.bench.gpu_shapes import CONFIGS, write_config
from pagebus.bench.load import LoadConfig, LoadError, Wanted
from pagebus.bench.load_figures import LoadFigures, Slo, figures
from pagebus.bench.serve import measure
from tests.bench.peer_tokens import TokenCheck, check_tokens
from tests.support.serve import serving

OURS = "pagebus"
_SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
_LEAST_REQUESTS = 3


class Cell(msgspec.Struct, kw_only=True):
    """One server with so many streams: what each run measured, in the order of the runs."""

    server: str
    num_streams: int
    output_tokens_per_s: list[float] = []
    tpot_ms: list[float] = []
    ttft_ms: list[float] = []

    def add(self, found: LoadFigures) -> None:
        """Note one run. Raises `LoadError` where a request failed: such a run measures nothing."""
        if found.num_completed < found.num_requests or found.ttft_ms is None or found.tpot_ms is None:
            raise LoadError(f"{self.server}: {found.num_completed} of {found.num_requests}: {found.errors}")
        self.output_tokens_per_s.append(found.output_tokens_per_s)
        self.tpot_ms.append(found.tpot_ms.p50)
        self.ttft_ms.append(found.ttft_ms.p50)


class Results(msgspec.Struct, kw_only=True):
    """All that one comparison found. `ratios`: pagebus over the peer, by "peer/streams", one a round."""

    machine: dict[str, str]
    model: dict[str, object]
    num_input: int
    num_output: int
    ready_after_s: float
    tokens: dict[str, TokenCheck]
    cells: list[Cell]
    ratios: dict[str, list[float]]
    load_averages: list[float]


def make(shape: str, folder: Path, seed: int = 0) -> Path:
    """A checkpoint of a well-known shape: random weights, sharp enough that tokens can be told apart."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests.support.models import sharpen

    folder.mkdir(parents=True, exist_ok=True)
    if shape == "smollm2-135m":
        (folder / "config.json").write_text(json.dumps(_SMOLLM2), encoding="utf-8")
        source = folder
    else:
        source = write_config(shape, folder)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source), dtype=torch.bfloat16)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            sharpen(name, weight)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    _write_tokenizer(folder, int(model.config.vocab_size))
    return folder


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Every id is a word of its own: a server sends text for each token, which so can be timed."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(f"Ġw{number}" for number in range(vocab_size - len(letters)))]
    tokenizer = Tokenizer(models.BPE(vocab={word: at for at, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def machine() -> dict[str, str]:
    """What the figures depend on, without naming the machine."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if line.startswith("model name")
    ]
    packages = {name: version(name) for name in ("torch", "transformers")}
    return {"cpu": names[0] if names else "", "num_cores": str(os.cpu_count()),
            "python": platform.python_version(), "date": time.strftime("%Y-%m-%d"), **packages}  # fmt: skip


def compare(options: argparse.Namespace, ours_url: str, ready_after_s: float) -> Results:
    """Tokens, then rounds. Raises `LoadError`."""
    servers = {OURS: ours_url, **dict(peer.split("=", 1) for peer in options.peer)}
    config = json.loads((options.model / "config.json").read_text(encoding="utf-8"))
    results = Results(
        machine=machine(), model=config, num_input=options.input_len, num_output=options.output_len,
        ready_after_s=ready_after_s, tokens=check_tokens(options.model, servers), cells=[], ratios={},
        load_averages=[],
    )  # fmt: skip
    cells = {(name, num): Cell(server=name, num_streams=num) for num in options.streams for name in servers}
    results.cells = list(cells.values())
    order = [OURS, *(name for name in servers if name != OURS)]
    for at in range(options.rounds):
        for num_streams in options.streams:
            rates = {name: _run(servers[name], cells[name, num_streams], options, seed=at) for name in order}
            if len(order) > 1:
                again = _run(servers[OURS], cells[OURS, num_streams], options, seed=at)
                ours = (rates[OURS] + again) / 2
                for name in order[1:]:
                    results.ratios.setdefault(f"{name}/{num_streams}", []).append(ours / rates[name])
            results.load_averages.append(os.getloadavg()[0])
        if options.out is not None:
            options.out.write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=2) + b"\n")
        print(f"round {at + 1} of {options.rounds}\n{table(results)}\n", flush=True)
    return results


def _run(url: str, cell: Cell, options: argparse.Namespace, seed: int) -> float:
    num_requests = max(_LEAST_REQUESTS, 2 * cell.num_streams)
    load = LoadConfig(url=url, max_concurrency=cell.num_streams, seed=seed)
    wanted = [Wanted(0.0, options.input_len, options.output_len)] * num_requests
    cell.add(figures(measure(load, wanted), Slo()))
    return cell.output_tokens_per_s[-1]


def table(results: Results) -> str:
    """Medians so far, a line for each server and number of streams."""
    lines = ["server     streams    tok/s  ms a token  ms to first  pagebus is"]
    for cell in results.cells:
        if not cell.output_tokens_per_s:
            continue
        ratios = results.ratios.get(f"{cell.server}/{cell.num_streams}")
        ratio = f"{statistics.median(ratios):.2f} x" if ratios else ""
        middle = [statistics.median(each) for each in (cell.output_tokens_per_s, cell.tpot_ms, cell.ttft_ms)]
        lines.append(
            f"{cell.server:10s} {cell.num_streams:7d} {middle[0]:8.1f} {middle[1]:11.1f} {middle[2]:12.1f}"
            f"  {ratio}"
        )
    for name, check in results.tokens.items():
        lines.append(f"{name}: {check.words()}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module's words."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.compare_peers", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="write a checkpoint with random weights")
    making.add_argument("shape", choices=["smollm2-135m", *CONFIGS])
    making.add_argument("folder", type=Path)
    running = commands.add_parser("run", help="compare")
    running.add_argument("model", type=Path, help="the checkpoint that all servers serve")
    running.add_argument("--peer", action="append", default=[], metavar="NAME=URL")
    running.add_argument("--streams", type=int, nargs="+", default=[1, 8, 16])
    running.add_argument("--input-len", type=int, default=128)
    running.add_argument("--output-len", type=int, default=64)
    running.add_argument("--rounds", type=int, default=3)
    running.add_argument("--out", type=Path, help="results file, e.g. in tests/bench/results")
    running.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="more flags of pagebus serve")
    options = parser.parse_args(arguments)
    if options.command == "make":
        print(make(options.shape, options.folder))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        name = options.model.resolve()
        with serving(Path(folder), str(name), *options.serve) as serve:
            try:
                results = compare(options, serve.url, serve.seconds_to_ready)
            except LoadError as error:
                print(error, file=sys.stderr)
                return 1
    return 0 if all(check.is_right for check in results.tokens.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
