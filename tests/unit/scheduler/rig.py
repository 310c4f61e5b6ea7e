"""A core with model executors and requesters around it, driven by hand, message by message."""

from collections import Counter
from itertools import pairwise

from pagebus.bus.messages import (
    Accepted,
    Cancel,
    ChoiceState,
    Failed,
    Generate,
    Hello,
    Rejected,
    Tokens,
    pack_ids,
)
from pagebus.scheduler.actions import Ended, SendPlan, SendReply
from pagebus.scheduler.book import CoreConfig
from pagebus.scheduler.core import SchedulerCore
from tests.unit.scheduler.model_executor import ModelExecutor

STOPPED_HERE = "stopped here"
"""A choice that its requester has cancelled: what still comes for it is ignored."""
REPLY, LIFE = "pagebus.out.r1", "pagebus.life.r1"


def generate(request_id="a", prompt=(1, 2, 3), max_tokens=4, **fields):
    return Generate(
        **{
            "request_id": request_id,
            "model": "m",
            "prompt": pack_ids(prompt),
            "max_tokens": max_tokens,
            "reply": REPLY,
            "life": LIFE,
            **fields,
        }
    )


class Rig:
    """`results[id][choice]` are the ids delivered, `ends[id]` how often and how a request ended."""

    def __init__(self, executors=(), *, epoch=1, **config):
        self.now = 100.0
        self.core = SchedulerCore(CoreConfig(model="m", **config))
        self.executors = {executor.name: executor for executor in executors}
        self.to_executors = []  # plans under way
        self.to_core = []  # Hello and StepDone under way
        self.specs = {}
        self.results = {}
        self.attempts = {}
        self.finishes = {}
        self.ends = {}
        self.replies = []
        self.ended = []
        self.num_plans = Counter()
        self.is_lazy = False  # whether nothing is settled before the core itself needs it
        self.last_repeat = self.last_hello = self.now
        self.core.become_leader(epoch, self.now)
        for executor in executors:
            self.to_core.append(executor.hello())

    # -- requester -----------------------------------------------------------------------------------------

    def ask(self, request_id, prompt, max_tokens, num_choices=1, **fields):
        self.specs[request_id] = (prompt, max_tokens, fields)
        self.results[request_id] = {choice: [] for choice in range(num_choices)}
        self.finishes[request_id] = {}
        self.attempts[request_id] = 1
        self._send(request_id)

    def ask_again(self, request_id):
        self.attempts[request_id] += 1
        self._send(request_id)

    def _send(self, request_id):
        prompt, max_tokens, fields = self.specs[request_id]
        choices = tuple(
            ChoiceState(index=choice, ids=pack_ids(ids), finish_reason=self.finishes[request_id].get(choice))
            for choice, ids in self.results[request_id].items()
        )
        message = generate(
            request_id, prompt, max_tokens, attempt=self.attempts[request_id], choices=choices, **fields
        )
        self.core.on_generate(message, self.now, {})

    def cancel(self, request_id):
        self.ends[request_id] = "cancelled"
        self.core.on_cancel(Cancel(request_id=request_id, attempt=self.attempts[request_id]), self.now)

    def receive(self, request_id, attempt, choice, index, ids, finish):
        if request_id in self.ends or attempt != self.attempts.get(request_id):
            return
        if self.finishes[request_id].get(choice) == STOPPED_HERE:
            return
        have = self.results[request_id][choice]
        assert index <= len(have), f"{request_id} misses an id before index {index}"
        for offset, token in enumerate(ids):
            if index + offset < len(have):
                assert have[index + offset] == token, "a delivered id changed"
            else:
                assert choice not in self.finishes[request_id], "an id after the end"
                have.append(token)
        if finish is not None:
            self.finishes[request_id][choice] = finish
            if len(self.finishes[request_id]) == len(self.results[request_id]):
                self.ends[request_id] = "finished"

    def _reply(self, message):
        self.replies.append(message)
        match message:
            case Tokens():
                for row in message.rows:
                    self.receive(row.request_id, row.attempt, row.choice, row.index, [], row.finish_reason)
            case Failed() if message.attempt == self.attempts.get(message.request_id):
                if message.request_id in self.ends:
                    return
                if message.is_retryable:
                    self.ask_again(message.request_id)
                else:
                    self.ends[message.request_id] = message.code
            case Rejected() if message.request_id in self.attempts:
                self.ends[message.request_id] = message.code
            case Accepted() | Failed() | Rejected():
                pass

    # -- parts of a turn ------------------------------------------------------------------------------------

    def plan(self):
        sent = []
        for action in self.core.plan(self.now):
            match action:
                case SendPlan(executor, plan):
                    self.num_plans[executor] += 1
                    self.to_executors.append(plan)
                    sent.append(plan)
                case SendReply(_, message):
                    self._reply(message)
                case Ended():
                    self.ended.append(action)
        if not self.is_lazy:
            self.core.settle()
        return sent

    def deliver_plan(self, index=0):
        plan = self.to_executors.pop(index)
        if plan.executor in self.executors:
            self.to_core.extend(self.executors[plan.executor].take(plan))

    def deliver_to_core(self, index=0):
        message = self.to_core.pop(index)
        if isinstance(message, Hello):
            self.core.on_hello(message, self.now)
        else:
            self.core.on_step_done(message, self.now)

    def step(self, name):
        """Complete the step in flight, if any, and launch the next."""
        executor = self.executors[name]
        if executor.in_flight:
            done = executor.complete()
            if done:
                self.to_core.append(done)
            self._deliver_made(executor)
            if not executor.launch() and done and done.plan != executor.plan:
                self.to_core.append(executor.acknowledgement())
        else:
            executor.launch()

    def _deliver_made(self, executor):
        made, executor.made = executor.made, []
        for request_id, attempt, choice, index, token, finish in made:
            if request_id in self.attempts:
                self.receive(request_id, attempt, choice, index, [token], finish)

    def pass_time(self, seconds):
        self.now += seconds
        if self.now - self.last_repeat >= 0.2:
            self.last_repeat = self.now
            for executor in self.executors.values():
                self.to_core.extend(executor.outbox)
        if self.now - self.last_hello >= 1.0:
            self.last_hello = self.now
            self.to_core.extend(executor.hello() for executor in self.executors.values())
        self.core.on_tick(self.now)

    def turn(self, seconds=0.01):
        """Everything that is under way arrives, once; every executor completes a step."""
        self.plan()
        while self.to_executors:
            self.deliver_plan()
        for name in list(self.executors):
            self.step(name)
        while self.to_core:
            self.deliver_to_core()
        self.pass_time(seconds)

    def run(self, max_turns=20_000):
        """Until every request ended and the executors let go of everything."""
        for _ in range(max_turns):
            self.turn()
            is_over = len(self.ends) == len(self.attempts) and not self.core._book.num_requests
            # A plan that was lost at the very end is still to be repeated.
            is_over &= not any(e.unacknowledged for e in self.core._executors.values() if not e.is_lost)
            if is_over and not any(e.rows or e.in_flight or e.outbox for e in self.executors.values()):
                return
        raise AssertionError(f"not over: {sorted(set(self.attempts) - set(self.ends))}")

    # -- what must hold -------------------------------------------------------------------------------------

    def check_blocks(self):
        """Free, used and cached blocks are all blocks, and every reference is counted."""
        for executor in self.core._executors.values():
            slots = executor.slots
            live = [row for row in slots.rows if row is not None]
            for g, pool in enumerate(executor.kv.pools):
                used = Counter(block for row in live for block in slots.held(row.slot)[g].tolist())
                assert sorted([*used, *pool._free, *pool._cached]) == list(range(pool.num_blocks))
                assert all(pool.count(block) == num for block, num in used.items())
                assert set(pool._cached) <= set(pool._digests)
                assert pool._blocks == {digest: block for block, digest in pool._digests.items()}
            for row in executor.rows.values():
                slot = row.slot
                assert slots.rows[slot] is row
                for g, size in enumerate(executor.kv.sizes):
                    assert slots.capacity[slot] <= slots.num_entries[g, slot] * size
                    assert len(set(slots.held(slot)[g].tolist())) == len(slots.held(slot)[g])
            leaving = {entry.row.handle for entry in executor.returning}
            leaving |= {row.handle for row in executor._ended}
            assert {row.handle for row in live} == set(executor.rows) | leaving
            assert executor.slots.top <= executor.slots.num_slots
            sequences = [entry.sequence for entry in executor.returning]
            assert all(a <= b for a, b in pairwise(sequences))

    def check_all_free(self):
        self.check_blocks()
        for executor in self.core._executors.values():
            assert not executor.rows
            assert not executor.returning
            assert not executor.has_unsettled
            assert executor.slots.top == 0
            assert all(pool.num_free == pool.num_blocks for pool in executor.kv.pools)

    def check_results(self, expected):
        """`expected(request id)` gives the ids of every choice of a request that finished."""
        for request_id, end in self.ends.items():
            if end == "finished":
                for ids in self.results[request_id].values():
                    assert ids == expected(request_id)


def executor(name="e1", **fields):
    return ModelExecutor(name=name, **fields)
