"""Faults of a cluster of three NATS servers: one killed, JetStream without leader or quorum, partitions."""

import asyncio
import random
import time
from collections.abc import Sequence

from tests.chaos.bed import Bed
from tests.chaos.history import StreamHistory
from tests.chaos.load import Afterwards, Marks
from tests.chaos.servers import ThreeServers
from tests.support.cluster import NatsCluster

LEADERSHIP = "KV_pagebus"
"""JetStream's own name of the bucket that holds leadership."""


def cluster_of(bed: Bed) -> NatsCluster:
    """The cluster of a bed that has one."""
    if not isinstance(bed.servers, ThreeServers):
        raise TypeError("this scenario needs three servers")
    return bed.servers.cluster


async def kill_one(bed: Bed, rng: random.Random, marks: Marks) -> None:
    """SIGKILL of a random server, which is started again after the load is over, or in its middle."""
    bed.servers.kill(rng.randrange(bed.servers.count))
    if rng.random() < 0.5:
        await asyncio.sleep(rng.uniform(0.5, 3.0))
        await bed.servers.start()


async def kill_jetstream_leader(bed: Bed, rng: random.Random, marks: Marks) -> None:
    """SIGKILL of the server that leads the leadership bucket: nobody can write there for some seconds."""
    num_terms = len(bed.epochs)
    bed.servers.kill(await cluster_of(bed).stream_leader(LEADERSHIP))
    marks.struck_s = time.monotonic()
    marks.afterwards.append(_same_term(bed, num_terms, marks))


async def without_quorum(bed: Bed, rng: random.Random, marks: Marks) -> None:
    """SIGKILL of two servers: JetStream can write nothing, the leader leads on over the third."""
    num_terms = len(bed.epochs)
    for number in rng.sample(range(bed.servers.count), 2):
        bed.servers.kill(number)
    await asyncio.sleep(rng.uniform(2.5, 5.0))
    marks.counts["terms_while_away"] += len(bed.epochs) - num_terms
    await bed.servers.start()
    marks.afterwards.append(_same_term(bed, num_terms, marks))


def _same_term(bed: Bed, num_terms: int, marks: Marks) -> Afterwards:
    async def after(histories: Sequence[StreamHistory]) -> None:
        marks.counts["terms_begun"] += len(bed.epochs) - num_terms

    return after


async def take_over_waits(bed: Bed, rng: random.Random, marks: Marks) -> None:
    """SIGKILL of two servers and of the leading scheduler: the take-over waits until JetStream can write."""
    num_terms = len(bed.epochs)
    leader = bed.leader()
    for number in rng.sample(range(bed.servers.count), 2):
        bed.servers.kill(number)
    leader.kill()
    await asyncio.sleep(rng.uniform(2.5, 4.0))
    marks.counts["terms_while_away"] += len(bed.epochs) - num_terms
    began_s = time.monotonic()
    await bed.servers.start()
    await bed.until(lambda: len(bed.epochs) > num_terms, "another scheduler leads", 30)
    marks.times_s["take_over_once_back"] = time.monotonic() - began_s


async def cut_off(bed: Bed, rng: random.Random, marks: Marks) -> None:
    """One server cut off from the others, whole or one way; its clients still reach it."""
    cluster = cluster_of(bed)
    number = rng.randrange(bed.servers.count)
    cluster.cut_off(number, (None, "up", "down")[marks.number % 3])
    await asyncio.sleep(rng.uniform(1.0, 6.0))
    cluster.heal()
