"""The chaos suite's short form: every scenario a few times. In full: `python -m tests.chaos`."""

import asyncio
from collections.abc import Iterator

import pytest

from tests.chaos.beds import Beds
from tests.chaos.report import Row, reached
from tests.chaos.scenarios import SCENARIOS, Scenario, run
from tests.chaos.speed import tokens_a_second

NUM_STREAMS = 50
SEED = 4
SLACK = 2.0
"""The machine may be twice as slow as a quiet one of two cores; the full run allows for nothing."""
MORE = 5
"""Repetitions that judge a 99th percentile where the first ones alone, whose worst stream it is, missed it.
Nothing else gets a second try, and what was slow counts."""


def _layout(scenario: Scenario) -> str:
    return repr(scenario.layout)


# Those with the same services one after the other: they are started once.
_QUICK = sorted((one for one in SCENARIOS if one.is_quick), key=_layout)


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    """One loop for all tests here, so that services live on from one scenario to the next."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def beds(runner: asyncio.Runner) -> Iterator[Beds]:
    beds = Beds()
    yield beds
    runner.run(beds.close())


def test_the_fake_model_is_fast_enough(runner: asyncio.Runner) -> None:
    """A slow load would prove little; half of what is asked for is left to a slower machine."""
    rate = runner.run(tokens_a_second())
    print(f"{rate:.0f} tokens a second through the whole path")
    assert rate > 10_000


@pytest.mark.parametrize("scenario", _QUICK, ids=[one.name for one in _QUICK])
def test_nothing_is_lost(scenario: Scenario, runner: asyncio.Runner, beds: Beds) -> None:
    row = Row(scenario.name, scenario.words, scenario.bars, slack=SLACK)
    for seed, repetitions in ((SEED, scenario.num_quick), (SEED + 1, MORE)):
        work = run(
            scenario,
            row,
            beds,
            repetitions=repetitions,
            num_streams=NUM_STREAMS,
            seed=seed,
            is_short=True,
        )
        runner.run(work)
        if not row.missed or not all(missed.split()[0].endswith("_p99_s") for missed in row.missed):
            break
    print(reached(row))
    assert not row.missed, "\n".join((*row.missed, reached(row), *row.details[:20]))
