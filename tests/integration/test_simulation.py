"""Seeded runs of the real services on a bad bus, in virtual time: each request ends once, with its ids."""

import logging
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import pytest

from pagebus.sim.many import Summary, run_many, run_seeds
from pagebus.sim.scenario import TROUBLES
from pagebus.sim.world import run
from tests.support.mutations import MUTATIONS

NUM_SEEDS = 2_000
NUM_JOBS = 2


@pytest.mark.slow
def test_seeds():
    total = Summary()
    for summary in run_many(range(NUM_SEEDS), num_jobs=NUM_JOBS):
        total.add(summary)
    assert total.failed == []
    assert total.num_seeds == NUM_SEEDS
    assert set(total.faults) == set(TROUBLES), "every kind of fault strikes"
    kinds = {"finished", "cancelled", "timeout", "row_failed", "poison_request", "queue_full", "orphan"}
    assert kinds <= set(total.ends), "requests end in every way"
    assert total.num_moved > 500
    assert total.num_preemptions > 500
    assert total.num_terms > NUM_SEEDS


def test_the_same_seed_is_the_same_run():
    assert run(7) == run(7)
    assert run(7).digest != run(8).digest


def test_the_same_seed_is_the_same_run_in_another_process():
    """Nothing depends on how Python orders sets, or on where objects lie."""
    script = (
        "import logging; logging.disable(logging.CRITICAL)\n"
        "from pagebus.sim.world import run\n"
        "print(*[run(seed).digest for seed in range(12)])"
    )
    digests = [
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    ]
    assert digests[0] == digests[1]
    assert len(set(digests[0].split())) == 12


def _first_found(name, num_seeds):
    """The first seed that finds something wrong in services that are broken as `name` says."""
    logging.disable(logging.CRITICAL)
    with pytest.MonkeyPatch.context() as patch:
        MUTATIONS[name](partial(patch.setattr))
        return next((seed for seed in range(num_seeds) if run_seeds([seed]).failed), None)


@pytest.mark.parametrize("name", sorted(MUTATIONS))
def test_a_broken_service_is_found(name):
    """The test of the test. In a process of its own: what is broken must not stay so."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert pool.submit(_first_found, name, 150).result(timeout=300) is not None
