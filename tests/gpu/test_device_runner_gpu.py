"""CUDA graphs, state on the device, and sampling there: against eager steps and against the CPU's runner."""

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from pagebus.bus.messages import Sampling
from pagebus.executor.batch import RowInput
from pagebus.executor.device_runner import DeviceRunner
from pagebus.executor.loader import load_model
from pagebus.executor.model_runner import ModelRunner, on_device
from tests.support.device_tests import DrivenRow, ahead, in_turn
from tests.support.models import VOCAB_SIZE, make_model
from tests.support.rows import GREEDY, Blocks, Row

pytestmark = pytest.mark.gpu

NUM_BLOCKS = 400
MIXED = (
    GREEDY,
    Sampling(temperature=1.0, seed=3),
    Sampling(temperature=0.7, top_k=20, seed=4),
    Sampling(temperature=1.3, top_p=0.8, seed=5),
    Sampling(temperature=0.9, min_p=0.05, top_k=40, top_p=0.9, seed=6),
    Sampling(temperature=0.0, frequency_penalty=1.5, presence_penalty=0.5),
    Sampling(temperature=0.8, repetition_penalty=1.7, seed=9),
    Sampling(temperature=0.0, logit_bias={7: 3.0, 9: -5.0}, num_logprobs=3),
)


def on_gpu(path: Path, kind: str = "llama", *, is_eager: bool = False) -> DeviceRunner:
    loaded = load_model(
        make_model(kind, path / kind, has_tokenizer=False), dtype="float32", device="cuda", max_model_len=512
    )
    num_blocks = [NUM_BLOCKS] * len({spec.window for spec in loaded.specs})
    runner = on_device(loaded, num_blocks, max_rows=16, is_eager=is_eager)
    assert isinstance(runner, DeviceRunner)
    return runner


def rows_of(blocks: Blocks, samplings: Sequence[Sampling], num_tokens: int) -> list[DrivenRow]:
    rng = random.Random(1)
    rows = []
    for key, sampling in enumerate(samplings):
        prompt = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 60))]
        row = Row(prompt, blocks.tables(len(prompt) + num_tokens + 2), num_tokens, sampling, choice=key)
        rows.append(DrivenRow(row, 100 + key, joins=rng.randint(0, 6)))
    return rows


def next_of(inputs: Sequence[RowInput]) -> list[RowInput]:
    return [
        RowInput((0,), row.start + len(row.ids), row.tables, row.sampling, row.choice, row.index + 1,
                 key=row.key, follows=number)
        for number, row in enumerate(inputs)
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["llama", "gemma2", "deepseek_v3"])
def test_graphs_and_eager_steps_make_the_same(tmp_path: Path, kind: str) -> None:
    made = []
    for is_eager in (False, True):
        runner = on_gpu(tmp_path / str(is_eager), kind, is_eager=is_eager)
        assert (runner.num_graphs == 0) is is_eager or kind == "deepseek_v3"  # some experts wait for the host
        rows = rows_of(Blocks(runner), MIXED, 24)
        ahead(runner, rows, random.Random(3))
        made.append([each.row.made[:24] for each in rows])
    assert made[0] == made[1]


def test_ids_are_those_of_the_cpu(tmp_path: Path) -> None:
    """In float32, where logits differ in their last bits and ids nearly never."""
    runner = on_gpu(tmp_path)
    path = make_model("llama", tmp_path / "cpu", has_tokenizer=False)
    plain = ModelRunner(load_model(path, dtype="float32", max_model_len=512), [NUM_BLOCKS])
    wanted, found = rows_of(Blocks(plain), MIXED, 16), rows_of(Blocks(runner), MIXED, 16)
    in_turn(plain, wanted)
    ahead(runner, found, random.Random(4))
    for one, other in zip(wanted, found, strict=True):
        assert other.row.made[:16] == one.row.made, one.row.sampling


def test_a_launch_waits_for_nothing(tmp_path: Path) -> None:
    """Neither of rows that go on by themselves nor of those that change their logits or join."""
    runner = on_gpu(tmp_path)
    samplings = (*MIXED[:5], MIXED[7])  # the others need their ids on the host
    blocks = Blocks(runner)
    rows = [each.input(100) for each in rows_of(blocks, samplings, 40)]
    late = [each.input(100) for each in rows_of(blocks, (GREEDY,), 40)]
    late[0].key = 7
    runner.step(rows)  # compiles
    runner.step([*rows, *late])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        waiting = [runner.launch(rows)]
        for _ in range(4):
            rows = next_of(rows)
            waiting.append(runner.launch(rows))
            torch.cuda.set_sync_debug_mode("default")
            assert all(output.error is None for output in runner.collect(waiting.pop(0)))
            torch.cuda.set_sync_debug_mode("error")
        waiting.append(runner.launch([*next_of(rows), *late]))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for launched in waiting:
        assert all(output.error is None for output in runner.collect(launched))


def test_padding_does_not_matter(tmp_path: Path) -> None:
    runner = on_gpu(tmp_path)
    for pages in (pages for layer in runner._pages.of_layer.values() for pages in layer if pages is not None):
        pages[-1] = float("nan")
    rows = rows_of(Blocks(runner), [GREEDY] * 5, 20)  # padded to eight
    ahead(runner, rows, random.Random(5))
    assert all(len(each.row.made) >= 20 for each in rows)
