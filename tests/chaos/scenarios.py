"""The table's scenarios: what runs, which fault strikes, which bars count. Faults stand in `faults_*.py`."""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from tests.chaos import faults_bus, faults_cluster, faults_executor, faults_gateway, faults_scheduler
from tests.chaos.bed import Layout
from tests.chaos.beds import Beds
from tests.chaos.load import Fault, HealError, Shape, repeat
from tests.chaos.report import COMPLETE, Bar, Row
from tests.chaos.specs import POISON_ID, RAISING_ID, StreamSpec, poison_spec
from tests.support.proxy import TcpProxy

_MOST_BROKEN = 2

MakeExtra = Callable[[random.Random], Sequence[StreamSpec]]


def no_extra(rng: random.Random) -> Sequence[StreamSpec]:
    """No streams beside the load's."""
    return ()


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One line of the table."""

    name: str
    words: str  # the fault, as the table says it
    layout: Layout
    fault: Fault
    shape: Shape = field(default_factory=Shape)
    bars: tuple[Bar, ...] = COMPLETE
    extra: MakeExtra = no_extra
    is_quick: bool = True  # part of the short form
    num_quick: int = 1  # repetitions there


def _poison(rng: random.Random) -> Sequence[StreamSpec]:
    return (poison_spec(rng, f"poison-{rng.randrange(1 << 40):x}"),)


def _raising(rng: random.Random) -> Sequence[StreamSpec]:
    return (poison_spec(rng, f"poison-{rng.randrange(1 << 40):x}", RAISING_ID),)


_PATHS = Layout(executors=2, schedulers=2, gateways=2, has_paths=True)
_BUNDLED = Layout(executors=2, schedulers=2, is_bundled=True)
_FEW = Shape(num_streams=24, num_tokens=(60, 150), moment_s=(0.5, 2.0))
_CLUSTER = Layout(executors=2, schedulers=2, gateways=2, servers=3, has_routes=True)
_ALL = Layout(executors=2, schedulers=2, gateways=2, poison=f"{POISON_ID}=exit,{RAISING_ID}=raise")

QUICK_SHAPE = Shape(num_tokens=(60, 150), spread_s=0.6, moment_s=(0.2, 1.2))
"""For the short form, where a scenario asks for nothing else."""
_LONG = Shape(num_tokens=(250, 500), moment_s=(0.3, 2.0))

SCENARIOS: tuple[Scenario, ...] = (
    Scenario(
        name="executor-kill",
        words="executor SIGKILL at a random step, two up",
        layout=_ALL,
        fault=faults_executor.kill_one,
        bars=(*COMPLETE, Bar("stall_p99_s", 1.5)),
        num_quick=3,
    ),
    Scenario(
        name="only-executor",
        words="the only executor dies and is started again",
        layout=Layout(executors=1),
        fault=faults_executor.kill_one,
    ),
    Scenario(
        name="ten-kills",
        words="ten random executor SIGKILLs in a row",
        layout=_ALL,
        fault=faults_executor.kill_ten,
        shape=Shape(num_tokens=(250, 500), timeout_s=120.0),
        bars=(*COMPLETE, Bar("quarantined", 1)),
    ),
    Scenario(
        name="poison",
        words="a poison request among 31 others",
        layout=_ALL,
        fault=faults_executor.poison,
        shape=Shape(num_streams=31, timeout_s=120.0),
        bars=(*COMPLETE, Bar("poison_not_alone", 0, is_exact=True)),
        extra=_poison,
    ),
    Scenario(
        name="poison-raise",
        words="a request whose forward raises each time, among 31 others",
        layout=_ALL,
        fault=faults_executor.raising,
        shape=Shape(num_streams=31),
        bars=(*COMPLETE, Bar("poison_not_alone", 0, is_exact=True), Bar("stall_p99_s", 1.5)),
        extra=_raising,
    ),
    Scenario(
        name="executor-stop",
        words="executor SIGSTOP, then SIGCONT",
        layout=_ALL,
        fault=faults_executor.stop_one,
        shape=_LONG,
        bars=(*COMPLETE, Bar("stall_max_s", 3.0)),
    ),
    Scenario(
        name="executor-hang",
        words="a forward that never returns",
        layout=_ALL,
        fault=faults_executor.trouble("hang"),
        shape=_LONG,
    ),
    Scenario(
        name="executor-raise",
        words="a forward that raises",
        layout=_ALL,
        fault=faults_executor.trouble("raise"),
        bars=(*COMPLETE, Bar("stall_p99_s", 1.5)),
    ),
    Scenario(
        name="executor-memory",
        words="a forward that is out of memory",
        layout=_ALL,
        fault=faults_executor.trouble("memory"),
        bars=(*COMPLETE, Bar("stall_p99_s", 1.5)),
        is_quick=False,
    ),
    Scenario(
        name="scheduler-kill",
        words="scheduler leader SIGKILL",
        layout=_ALL,
        fault=faults_scheduler.kill_leader,
        bars=(*COMPLETE, Bar("take_over_max_s", 3.0)),
        num_quick=2,
    ),
    Scenario(
        name="scheduler-stop",
        words="scheduler leader SIGSTOP, then SIGCONT",
        layout=_ALL,
        fault=faults_scheduler.stop_leader,
        shape=Shape(num_tokens=(400, 600)),
        bars=(*COMPLETE, Bar("take_over_max_s", 3.0), Bar("late_plans_obeyed", 0, is_exact=True)),
    ),
    Scenario(
        name="gateway-kill",
        words="gateway SIGKILL, two up; its readers resume at the other one",
        layout=_ALL,
        fault=faults_gateway.kill_one,
        bars=(*COMPLETE, Bar("wrongly_dropped", 0, is_exact=True), Bar("others_stall_p99_max_s", 1.0)),
        num_quick=1,
    ),
    Scenario(
        name="gateway-orphans",
        words="gateway SIGKILL; its readers never come back",
        layout=_ALL,
        fault=faults_gateway.orphan_all,
        shape=Shape(num_tokens=(2000, 3000), paths=("http",), moment_s=(1.0, 2.0), resumes=False),
        bars=(Bar("violations", 0, is_exact=True), Bar("blocks_free_after_max_s", 2.0)),
    ),
    Scenario(
        name="bus-away",
        words="all NATS servers SIGKILL for 3 s",
        layout=_ALL,
        fault=faults_bus.server_away,
        bars=(*COMPLETE, Bar("back_after_max_s", 3.0)),
    ),
    Scenario(
        name="one-server",
        words="one of three NATS servers SIGKILL",
        layout=_CLUSTER,
        fault=faults_cluster.kill_one,
        bars=(*COMPLETE, Bar("stall_p99_s", 1.0)),
    ),
    Scenario(
        name="all-servers",
        words="all three NATS servers SIGKILL for 3 s",
        layout=_CLUSTER,
        fault=faults_bus.server_away,
        bars=(*COMPLETE, Bar("back_after_max_s", 3.0)),
        is_quick=False,
    ),
    Scenario(
        name="jetstream-leader",
        words="JetStream's leader SIGKILL: the scheduler leads on",
        layout=_CLUSTER,
        fault=faults_cluster.kill_jetstream_leader,
        bars=(*COMPLETE, Bar("terms_begun", 0, is_exact=True), Bar("stall_p99_s", 1.0)),
    ),
    Scenario(
        name="no-quorum",
        words="two of three NATS servers SIGKILL: JetStream cannot write, the scheduler leads on",
        layout=_CLUSTER,
        fault=faults_cluster.without_quorum,
        bars=(*COMPLETE, Bar("terms_while_away", 0, is_exact=True)),
    ),
    Scenario(
        name="take-over-waits",
        words="... and the leading scheduler SIGKILL: the take-over waits for JetStream",
        layout=_CLUSTER,
        fault=faults_cluster.take_over_waits,
        bars=(*COMPLETE, Bar("terms_while_away", 0, is_exact=True)),
        is_quick=False,
    ),
    Scenario(
        name="servers-apart",
        words="each bus server cut off from the others, one way too",
        layout=_CLUSTER,
        fault=faults_cluster.cut_off,
        num_quick=2,
    ),
    Scenario(
        name="all-but-bus",
        words="everything but the NATS server SIGKILL",
        layout=_ALL,
        fault=faults_bus.all_but_the_bus,
    ),
    Scenario(
        name="path-cut",
        words="each service cut off from the bus",
        layout=_PATHS,
        fault=faults_bus.path_trouble(TcpProxy.cut, (1.0, 5.0), first=0),
        num_quick=3,
    ),
    Scenario(
        name="path-cut-up",
        words="... its own messages alone are lost",
        layout=_PATHS,
        fault=faults_bus.path_trouble(lambda proxy: proxy.cut_one_way("up"), (1.0, 5.0), first=1),
    ),
    Scenario(
        name="path-cut-down",
        words="... messages to it alone are lost",
        layout=_PATHS,
        fault=faults_bus.path_trouble(lambda proxy: proxy.cut_one_way("down"), (1.0, 5.0), first=2),
    ),
    Scenario(
        name="path-resets",
        words="resets of a service's connections",
        layout=_PATHS,
        fault=faults_bus.path_trouble(lambda proxy: proxy.reset_at_random(0.3), (1.0, 3.0), first=2),
    ),
    Scenario(
        name="path-delay",
        words="delay 200 ms each way on every path",
        layout=_PATHS,
        fault=faults_bus.delay_all(0.2),
    ),
    Scenario(
        name="rolling-restart",
        words="rolling restart of every service under load",
        layout=Layout(executors=2, schedulers=2, gateways=2, is_served=True),
        fault=faults_bus.rolling_restart,
        shape=Shape(num_streams=250, spread_s=20.0, timeout_s=90.0),
        bars=(*COMPLETE, Bar("refused", 0, is_exact=True)),
        is_quick=False,  # tests/integration/test_rolling_restart.py does the same with fewer services
    ),
    Scenario(
        name="bundled-kill",
        words="the bundled model: executor SIGKILL",
        layout=_BUNDLED,
        fault=faults_executor.kill_one,
        shape=_FEW,
    ),
    Scenario(
        name="bundled-stop",
        words="the bundled model: executor SIGSTOP, then SIGCONT",
        layout=_BUNDLED,
        fault=faults_executor.stop_one,
        shape=_FEW,
        bars=(*COMPLETE, Bar("stall_max_s", 3.0)),
    ),
    Scenario(
        name="bundled-scheduler-kill",
        words="the bundled model: scheduler leader SIGKILL",
        layout=_BUNDLED,
        fault=faults_scheduler.kill_leader,
        shape=_FEW,
        bars=(*COMPLETE, Bar("take_over_max_s", 3.0)),
        is_quick=False,
    ),
    Scenario(
        name="bundled-poison",
        words="the bundled model: a request whose executors are killed",
        layout=_BUNDLED,
        fault=faults_executor.poison_by_hand,
        shape=replace(_FEW, timeout_s=120.0, moment_s=(0.0, 0.1)),
        bars=(*COMPLETE, Bar("poison_not_alone", 0, is_exact=True)),
        extra=_poison,
        is_quick=False,
    ),
)


async def run(
    scenario: Scenario,
    row: Row,
    beds: Beds,
    *,
    repetitions: int,
    num_streams: int,
    seed: int,
    on_repetition: Callable[[], None] = lambda: None,
    is_short: bool = False,
) -> None:
    """Run into `row`. Services live over all repetitions, unless one leaves them broken.

    Raises `NotReachedError` where services do not start, `HealError` where two repetitions in a row leave
    them broken.
    """
    began_s = time.monotonic()
    num_broken = 0
    shape = QUICK_SHAPE if is_short and scenario.shape == Shape() else scenario.shape
    for number in range(1, repetitions + 1):
        rep_seed = f"{seed}/{scenario.name}/{number}"
        extra = scenario.extra(random.Random(rep_seed))
        try:
            bed = await beds.get(scenario.layout)
            row.repetitions.append(await repeat(bed, rep_seed, shape, scenario.fault, num_streams, extra))
            num_broken = 0
        except HealError as error:  # what it found is counted; the next one gets fresh services
            row.repetitions.append(error.result)
            await beds.close()
            num_broken += 1
            if num_broken == _MOST_BROKEN:
                raise
        except BaseException:
            await beds.close()
            raise
        finally:
            row.seconds = time.monotonic() - began_s
            on_repetition()
