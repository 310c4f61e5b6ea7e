"""Checkpoints of all shapes load right, say how far they are, and take little more than their weights."""

import io
import logging
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PreTrainedConfig

from pagebus.executor.loader import load_model
from pagebus.executor.model_runner import build_runner
from pagebus.executor.progress import Progress
from pagebus.settings.structs import Dtype, ExecutorSettings
from tests.support.models import CONFIGS, VOCAB_SIZE, random_model
from tests.support.rows import Blocks, Row

PROMPT = [7 * i % VOCAB_SIZE for i in range(40)]


def tied_llama() -> PreTrainedConfig:
    config = CONFIGS["llama"]()
    config.tie_word_embeddings = True
    return config


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "tied", "mixtral", "deepseek_v3"])
@pytest.mark.parametrize("is_sharded", [False, True])
def test_logits_are_those_of_transformers(
    tmp_path: Path, stored: torch.dtype, kind: str, is_sharded: bool
) -> None:
    config = tied_llama() if kind == "tied" else CONFIGS[kind]()
    random_model(config).to(stored).save_pretrained(tmp_path, max_shard_size="300KB" if is_sharded else "1GB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 2) == is_sharded
    wanted_model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.inference_mode():
        wanted = wanted_model(torch.tensor([PROMPT])).logits[0, -1]
    targets: list[tuple[Dtype, float]] = [("float32", 1e-4)]
    if not is_sharded and kind != "mixtral":  # a rounded router sends rows elsewhere
        targets += [("bfloat16", 0.5), ("float16", 0.1)]
    for dtype, tolerance in targets:
        settings = ExecutorSettings(dtype=dtype, device="cpu", kv_cache_memory="4MiB", num_threads=1)
        runner = build_runner(settings, tmp_path)
        found = runner.logits([Row(PROMPT, Blocks(runner).tables(len(PROMPT)), 1).input(len(PROMPT))])[
            0
        ].float()
        torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * float(wanted.std()))
        assert runner._loaded.dtype == getattr(torch, dtype)


def test_auto_takes_the_stored_type_where_the_cpu_computes_it(tmp_path: Path) -> None:
    random_model(CONFIGS["llama"]()).to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.dtype in (torch.bfloat16, torch.float32)
    assert loaded.model.get_input_embeddings().weight.dtype == loaded.dtype


def test_a_second_copy_is_named_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    random_model(tied_llama()).save_pretrained(tmp_path / "tied")
    random_model(CONFIGS["llama"]()).save_pretrained(tmp_path / "untied")
    with caplog.at_level(logging.INFO, "pagebus"):
        load_model(tmp_path / "untied", dtype="float32")
        assert "second copy" not in caplog.text
        load_model(tmp_path / "tied", dtype="float32")
    mib = VOCAB_SIZE * 128 * 4 / 2**20
    assert (
        f"lm_head is kept twice, packed and as the embedding: a second copy of {mib:.1f} MiB" in caplog.text
    )
    assert re.search(r"loading \d+ tensors, \d+\.\d MiB in 1 files", caplog.text)
    assert re.search(r"loading weights: \d+ in \d+\.\d s", caplog.text)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def ticking(step_s: float) -> Callable[[], float]:
    now = [0.0]

    def clock() -> float:
        now[0] += step_s
        return now[0]

    return clock


def test_a_bar_on_a_terminal_and_lines_elsewhere(caplog: pytest.LogCaptureFixture) -> None:
    terminal, pipe = Terminal(), io.StringIO()
    with caplog.at_level(logging.INFO, "pagebus"):
        assert list(Progress(range(10), "loading", stream=terminal, clock=ticking(0.06))) == list(range(10))
        assert len(caplog.records) == 1
        assert list(Progress(range(10), "reading", stream=pipe, clock=ticking(2.0))) == list(range(10))
    drawn = terminal.getvalue().split("\r")
    assert "50 % (5/10)" in terminal.getvalue() or len(drawn) >= 4
    assert drawn[-1] == "loading [##############################] 100 % (10/10)\n"
    assert pipe.getvalue() == ""
    assert [record.getMessage() for record in caplog.records[1:3]] == ["reading: 3 of 10", "reading: 6 of 10"]
    assert list(Progress([], "nothing", stream=terminal)) == []


LARGE = {
    "vocab_size": 8000, "hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 16,
    "max_position_embeddings": 1024,
}  # fmt: skip
CHECKPOINTS = {
    "dense": lambda: LlamaConfig(**LARGE, intermediate_size=4096, num_hidden_layers=5),
    "tied": lambda: LlamaConfig(
        **LARGE, intermediate_size=4096, num_hidden_layers=5, tie_word_embeddings=True
    ),
    "experts": lambda: MixtralConfig(
        **{**LARGE, "hidden_size": 512}, intermediate_size=512, num_hidden_layers=12, num_local_experts=8
    ),
}
WATCHED = """
import gc, logging, re, sys, threading
from pathlib import Path
from pagebus.executor.loader import load_model

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10

load_model(Path(sys.argv[1]), dtype=sys.argv[3])  # what the libraries keep once
gc.collect()
start = peak = anonymous()
done = threading.Event()

def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, anonymous())

watcher = threading.Thread(target=watch)
watcher.start()
loaded = load_model(Path(sys.argv[2]), dtype=sys.argv[3])
done.set()
watcher.join()
print(peak - start)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    ("kind", "stored", "dtype"),
    [
        ("dense", torch.bfloat16, "bfloat16"),
        ("dense", torch.bfloat16, "float32"),
        ("tied", torch.float16, "bfloat16"),
        ("experts", torch.bfloat16, "float32"),
    ],
)
def test_peak_memory_is_the_weights_and_a_tenth(
    tmp_path: Path, kind: str, stored: torch.dtype, dtype: str
) -> None:
    config = CHECKPOINTS[kind]()
    with torch.device("meta"):
        shell = AutoModelForCausalLM.from_config(config)
    model = shell.to_empty(device="cpu").to(stored)
    with torch.no_grad():
        for number, weight in enumerate(model.parameters()):
            weight.fill_(0.01 * (number % 7))  # fast; what the values are does not matter here
    model.save_pretrained(tmp_path / "large", max_shard_size="60MB")
    random_model(CONFIGS["mixtral"]()).save_pretrained(tmp_path / "tiny")
    weights = sum(weight.numel() for weight in model.parameters()) * getattr(torch, dtype).itemsize
    second_copy = (
        config.vocab_size * config.hidden_size * getattr(torch, dtype).itemsize if kind == "tied" else 0
    )
    del model, shell
    arguments = [sys.executable, "-c", WATCHED, str(tmp_path / "tiny"), str(tmp_path / "large"), dtype]
    ended = subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=120)
    peak = int(ended.stdout)
    assert weights > 100 << 20
    assert peak <= 1.1 * weights + second_copy, (peak >> 20, weights >> 20)
    assert peak > 0.5 * weights, "nothing was measured"
