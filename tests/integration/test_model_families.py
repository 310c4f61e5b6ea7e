"""Every family gives transformers' own greedy tokens: ragged, in chunks, after hits, forks and preemption.

And the tests of that test: without its window, soft cap, sinks, scaling or norms, or with one block zeroed,
the very same comparison fails.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from pagebus.executor.model_runner import ModelRunner, build_runner
from pagebus.settings.structs import ExecutorSettings
from tests.support import reference
from tests.support.models import FAMILIES, VOCAB_SIZE, make_model
from tests.support.rows import BLOCK_SIZE, Blocks, Row, prefill, run_rows

NUM_TOKENS = 64
FEW_TOKENS = 20  # where the comparison must fail, as many show it
LENGTHS = (1, 16, 31, 70)
DONOR = 150  # a prompt that the hit and the fork share blocks with; it ends inside a block
NUM_SHARED = 5  # blocks of the hit


@dataclass(frozen=True)
class Case:
    """A family's model, the prompts of a run, and what transformers makes of them."""

    path: Path
    model: PreTrainedModel
    prompts: list[list[int]]  # ragged ones, then the donor's, the hit's and the fork's
    expected: list[list[int]]


CASES: dict[str, Case] = {}


@pytest.fixture
def case(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Case:
    if kind not in CASES:
        path = make_model(kind, tmp_path_factory.mktemp(kind), has_tokenizer=False)
        model = reference.load(path)
        rng = random.Random(1)
        shortest = FAMILIES[kind].min_prompt

        def ids(length: int) -> list[int]:
            return [rng.randrange(VOCAB_SIZE) for _ in range(length)]

        ragged = [ids(max(length, shortest + length % 7)) for length in LENGTHS]
        donor = ids(DONOR)
        prompts = [
            *ragged,
            donor,
            donor[: NUM_SHARED * BLOCK_SIZE] + ids(20),
            [*donor, rng.randrange(VOCAB_SIZE)],
        ]
        expected = reference.greedy_batch(model, prompts, NUM_TOKENS)
        CASES[kind] = Case(path, model, prompts, expected)
    return CASES[kind]


def build(path: Path, kind: str) -> ModelRunner:
    torch.manual_seed(0)
    settings = ExecutorSettings(
        dtype="float32", device="cpu", kv_cache_memory="32MiB", num_threads=1,
        max_model_len=FAMILIES[kind].max_model_len,
    )  # fmt: skip
    return build_runner(settings, path)


Spoil = Callable[[ModelRunner, Row], None]


def play(
    runner: ModelRunner, case: Case, spoil: Spoil | None = None, num_tokens: int = NUM_TOKENS
) -> list[Row]:
    """One run with everything in it; `spoil` is called when the donor's prompt lies in the pages."""
    blocks, rng = Blocks(runner), random.Random(2)

    def row(prompt: list[int]) -> Row:
        return Row(prompt, blocks.tables(len(prompt) + num_tokens), num_tokens)

    *ragged, donor_ids, hit_ids, fork_ids = case.prompts
    donor = row(donor_ids)
    prefill(runner, donor, chunk=37)
    if spoil is not None:
        spoil(runner, donor)
    hit = Row(hit_ids, blocks.after_hit(donor, NUM_SHARED, len(hit_ids) + num_tokens), num_tokens)
    hit.position = NUM_SHARED * BLOCK_SIZE
    tables, copies = blocks.after_fork(donor, len(fork_ids) + num_tokens)
    fork = Row(fork_ids, tables, num_tokens, position=donor.position)
    runner.copy_blocks(copies)
    donor.position -= 1  # its prefill has sampled nothing yet
    rows = [*map(row, ragged), donor, hit, fork]
    run_rows(runner, rows, rng, preempting=blocks)
    return rows


def compare(case: Case, rows: list[Row]) -> None:
    for row, expected in zip(rows, case.expected, strict=True):
        reference.assert_same(case.model, row.prompt, row.made, expected[: row.num_tokens])


@pytest.mark.parametrize("kind", FAMILIES)
def test_greedy_tokens_are_those_of_transformers(kind: str, case: Case) -> None:
    rows = play(build(case.path, kind), case)
    compare(case, rows)
    assert all(len(row.made) == NUM_TOKENS for row in rows)
    assert all(len(set(row.made)) >= 20 for row in rows), (
        "the model repeats itself: the test would see little"
    )


@pytest.mark.parametrize("kind", FAMILIES)
def test_logits_are_those_of_transformers(kind: str, case: Case) -> None:
    """Closer than tokens can tell, and what greedy tokens cannot show: the cap of the last logits."""
    check_logits(build(case.path, kind), case)


def check_logits(runner: ModelRunner, case: Case) -> None:
    prompt = case.prompts[-1]
    found = runner.logits([Row(prompt, Blocks(runner).tables(len(prompt)), 1).input(len(prompt))])[0]
    with torch.inference_mode():
        wanted = case.model(torch.tensor([prompt])).logits[0, -1]
    torch.testing.assert_close(found.log_softmax(-1), wanted.log_softmax(-1), rtol=0, atol=1e-4)


# --- tests of the test ---


def without_modules(*names: str) -> Callable[[ModelRunner], None]:
    """Norms that do nothing."""

    def mutate(runner: ModelRunner) -> None:
        runner._program = None  # it no longer asks the modules
        found = 0
        for module in list(runner._loaded.model.modules()):
            for name in names:
                if name in dict(module.named_children()):
                    module.add_module(name, nn.Identity())
                    found += 1
        assert found, f"the model has no {names}"

    return mutate


def without_argument(**changes: None) -> Callable[[ModelRunner], None]:
    """Attention that does not see an argument."""

    def mutate(runner: ModelRunner) -> None:
        runner._program = None  # it no longer asks the modules
        answer = runner._cache.answer

        def answer_less(spans, num_tokens):
            attend = answer(spans, num_tokens)
            return lambda call: attend(replace(call, **changes))

        runner._cache.answer = answer_less

    return mutate


def with_config(**changes: object) -> dict[str, object]:
    return changes


ROPE = {"rope_type": "default", "rope_theta": 1e4}
FULL = with_config(layer_types=["full_attention"] * 3)
ONES = [1.0] * 16
Mutation = Callable[[ModelRunner], None] | dict[str, object]
NORMS: dict[str, Mutation] = {
    "q norm": without_modules("q_norm"),
    "k norm": without_modules("k_norm"),
}
MUTATIONS: dict[str, dict[str, Mutation]] = {
    "llama": {"rope scaling": with_config(rope_parameters=ROPE)},
    "qwen3": NORMS,
    "mistral": {"window": with_config(sliding_window=None)},
    "gemma2": {"soft cap": without_argument(softcap=None), "window": FULL},
    "gemma3": {**NORMS, "window": FULL},
    "phi3": {"short factors": {"short_factor": ONES}},
    "phi3_long": {"long factors": {"long_factor": ONES}},
    "granite": {"attention multiplier": with_config(attention_multiplier=0.1)},
    "olmo2": NORMS,
    "deepseek_v2": {
        "rope scaling": with_config(rope_parameters=ROPE),
        "latent norm": without_modules("kv_a_layernorm"),
        "query norm": without_modules("q_a_layernorm"),
        "routing groups": with_config(topk_method="greedy"),
    },
    "deepseek_v2_lite": {"latent norm": without_modules("kv_a_layernorm")},
    "deepseek_v3": {
        "rope scaling": with_config(rope_parameters=ROPE),
        "latent norm": without_modules("kv_a_layernorm"),
        "query norm": without_modules("q_a_layernorm"),
        "routing groups": with_config(n_group=1, topk_group=1),
    },
    "qwen3_moe": NORMS,
    "gpt_oss": {
        "sinks": without_argument(sinks=None),
        "window": FULL,
        "rope scaling": with_config(rope_parameters=ROPE),
    },
}  # fmt: skip


def build_mutated(case: Case, kind: str, mutation: Mutation, tmp_path: Path) -> ModelRunner:
    if not isinstance(mutation, dict):
        runner = build(case.path, kind)
        mutation(runner)
        return runner
    config = json.loads((case.path / "config.json").read_text())
    changed = config if not any("factor" in key for key in mutation) else config["rope_parameters"]
    assert set(mutation) <= set(changed), "the config has no such field"
    changed.update(mutation)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(case.path / "model.safetensors")
    return build(tmp_path, kind)


@pytest.mark.parametrize(
    ("kind", "what"), [(kind, what) for kind, found in MUTATIONS.items() for what in found]
)
def test_what_is_left_out_is_noticed(kind: str, what: str, case: Case, tmp_path: Path) -> None:
    runner = build_mutated(case, kind, MUTATIONS[kind][what], tmp_path)
    with pytest.raises(AssertionError, match="where there is no tie"):
        compare(case, play(runner, case, num_tokens=FEW_TOKENS))


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_zeroed_block_is_noticed(kind: str, case: Case) -> None:
    """One block of one group, the last that the donor has filled."""
    runner = build(case.path, kind)
    for group in range(len(runner.pool)):

        def spoil(runner: ModelRunner, donor: Row, group: int = group) -> None:
            wanted: list[list[int]] = [[] for _ in runner.pool]
            wanted[group] = [donor.tables[group][donor.position // BLOCK_SIZE - 1]]
            runner._cache.clear(wanted)

        with pytest.raises(AssertionError, match="where there is no tie"):
            compare(case, play(runner, case, spoil, FEW_TOKENS))


@pytest.mark.parametrize("kind", ["gemma2"])
def test_the_cap_of_the_last_logits_is_noticed(kind: str, case: Case, tmp_path: Path) -> None:
    runner = build_mutated(case, kind, with_config(final_logit_softcapping=None), tmp_path)
    with pytest.raises(AssertionError, match="not close"):
        check_logits(runner, case)


@pytest.mark.parametrize("kind", ["mistral", "gemma2", "gemma3", "gpt_oss"])
def test_blocks_that_a_window_has_freed_are_never_read(kind: str, case: Case) -> None:
    """They hold NaN from then on: 0 times NaN is NaN, so even a masked read would show."""
    runner = build(case.path, kind)
    windows, blocks = [group.window for group in runner.pool], Blocks(runner)
    row, num_freed = Row(case.prompts[4], blocks.tables(DONOR + NUM_TOKENS), NUM_TOKENS), 0
    while not row.is_done:
        given = row.input(23)
        row.take(given, runner.step([given])[0].id)
        held = [list(table) for table in row.tables]
        row.free_unseen(windows)
        freed = [sorted(set(old) - set(new)) for old, new in zip(held, row.tables, strict=True)]
        num_freed += sum(map(len, freed))
        for layer, group in runner._cache.group_of.items():
            for pages in runner._cache._layer_pages(layer):
                pages[:, freed[group]] = float("nan")
    assert num_freed >= (DONOR + NUM_TOKENS - 40) // BLOCK_SIZE
    reference.assert_same(case.model, row.prompt, row.made, case.expected[4])
