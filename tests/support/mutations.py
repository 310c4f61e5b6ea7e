"""Services broken on purpose, each in one place: what the seeded simulation must find out."""

from dataclasses import replace

import msgspec

from pagebus.executor import launches
from pagebus.executor.lease import PlanState
from pagebus.executor.rows import Row as ExecutorRow
from pagebus.requester.client import Requester
from pagebus.requester.state import RequestState
from pagebus.scheduler import placing
from pagebus.scheduler.blocks import KvPool
from pagebus.scheduler.executors import ExecutorState
from pagebus.scheduler.journal import Journal
from pagebus.scheduler.requests import Row

MUTATIONS = {}


def mutation(function):
    """`function(patch)` breaks something by `patch(class, name, replacement)`."""
    MUTATIONS[function.__name__] = function
    return function


@mutation
def never_asks_again(patch):
    patch(RequestState, "on_leader", lambda self, epoch, now_s: None)
    patch(RequestState, "on_failed", lambda self, failed, now_s: None)
    patch(RequestState, "_patience_s", lambda self: float("inf"))


@mutation
def attempts_are_not_compared(patch):
    original = RequestState.on_row

    def on_row(self, row, epoch, now_s):
        return original(self, msgspec.structs.replace(row, attempt=self.attempt), epoch, now_s)

    patch(RequestState, "on_row", on_row)


@mutation
def deadline_is_forgotten(patch):
    original = Requester.submit

    def submit(self, spec, on_event):
        return original(self, msgspec.structs.replace(spec, timeout_s=3 * spec.timeout_s), on_event)

    patch(Requester, "submit", submit)


@mutation
def blocks_are_free_before_the_release_is_taken(patch):
    original = ExecutorState.remove
    patch(ExecutorState, "remove", lambda self, row, **_: original(self, row, is_finished=True))


@mutation
def release_is_not_told(patch):
    original = ExecutorState.make_plan

    def make_plan(self, epoch, steps, now_s):
        if len(self.released) > 1:
            self.released.pop()
        return original(self, epoch, steps, now_s)

    patch(ExecutorState, "make_plan", make_plan)


@mutation
def index_is_one_off_after_recovery(patch):
    original = Row.start_message

    def start_message(self):
        start = original(self)
        return msgspec.structs.replace(start, num_generated=start.num_generated + (start.num_generated > 0))

    patch(Row, "start_message", start_message)


@mutation
def prefix_is_found_before_it_is_computed(patch):
    original = ExecutorState.place

    def place(self, row, hit, copies, target, now_s):
        original(self, row, hit, copies, target, now_s)
        num = int(self.slots.position[row.slot])
        self.slots.position[row.slot] = len(row.ids) - 1
        self._journal._register(row.slot)
        self.slots.position[row.slot] = num

    patch(ExecutorState, "place", place)


@mutation
def fork_is_not_copied(patch):
    original = placing._fork

    def fork(executor, row):
        place = original(executor, row)
        return place and place._replace(copies=[])

    patch(placing, "_fork", fork)


@mutation
def fork_is_copied_twice(patch):
    original = PlanState.next_step

    def next_step(self):
        step = original(self)
        if step is not None and step.copies:
            self._copies = list(step.copies)
        return step

    patch(PlanState, "next_step", next_step)


@mutation
def preempted_row_comes_back_with_another_id(patch):
    original = Journal.complete_ids

    def complete_ids(self, slot):
        num = len(self._slots.rows[slot].ids) if self._slots.rows[slot] else 0
        original(self, slot)
        row = self._slots.rows[slot]
        if row is not None and row.ticket and len(row.ids) > num:
            row.ids[-1] ^= 1

    patch(Journal, "complete_ids", complete_ids)


@mutation
def old_plan_is_taken_again(patch):
    original = PlanState.take_plan

    def take_plan(self, plan):
        if plan.epoch == self._epoch and plan.sequence <= self._plan:
            self._plan = plan.sequence - 1
        return original(self, plan)

    patch(PlanState, "take_plan", take_plan)


@mutation
def gap_in_plans_is_not_seen(patch):
    original = PlanState.take_plan

    def take_plan(self, plan):
        if plan.epoch == self._epoch and plan.sequence > self._plan:
            self._plan = plan.sequence - 1
        return original(self, plan)

    patch(PlanState, "take_plan", take_plan)


@mutation
def snapshot_keeps_rows(patch):
    original = PlanState.take_plan

    def take_plan(self, plan):
        rows = dict(self._rows) if plan.epoch == self._epoch else {}
        outcome = original(self, plan)
        self._rows = {**rows, **self._rows} if plan.is_snapshot else self._rows
        return outcome

    patch(PlanState, "take_plan", take_plan)


@mutation
def new_epoch_keeps_rows(patch):
    original = PlanState._enter_epoch

    def enter(self, epoch):
        rows = self._rows
        original(self, epoch)
        self._rows = rows

    patch(PlanState, "_enter_epoch", enter)
    original_take = PlanState.take_plan

    def take_plan(self, plan):
        rows = self._rows
        outcome = original_take(self, plan)
        if plan.is_snapshot:
            self._rows = {**rows, **self._rows}
        return outcome

    patch(PlanState, "take_plan", take_plan)


@mutation
def window_is_a_block_too_short(patch):
    original = KvPool.__init__

    def init(self, groups, max_step_tokens):
        original(self, groups, max_step_tokens)
        self.windows = [window and max(1, window - 16) for window in self.windows]

    patch(KvPool, "__init__", init)


@mutation
def rows_of_dead_requesters_run_on(patch):
    patch(PlanState, "end_requesters", lambda self, lives: None)


@mutation
def chunk_starts_one_late(patch):
    original = ExecutorRow.prefill_input

    def prefill_input(self, chunk, prompt):
        made = original(self, chunk, prompt)
        if made is not None and made.start > 16 and len(made.ids) > 1:
            made.ids = [made.ids[0], *made.ids[:-1]]
        return made

    patch(ExecutorRow, "prefill_input", prefill_input)


@mutation
def slots_are_looked_up_for_what_was_collected(patch):
    original = ExecutorRow.has_slots

    def has_slots(self, end):
        return original(self, end - self.next_position + self.position)

    patch(ExecutorRow, "has_slots", has_slots)


@mutation
def row_that_ended_is_launched_on(patch):
    patch(ExecutorRow, "is_at_end", property(lambda self: False))


@mutation
def step_behind_one_that_raised_is_kept(patch):
    patch(launches.Ahead, "_drop_work", lambda self: None)


@mutation
def row_is_computed_anew_from_garbage(patch):
    def known_inputs(step):
        return [
            (number, replace(row_input, follows=None))
            for number, (row, row_input) in enumerate(zip(step.rows, step.inputs, strict=True))
            if not row.is_over
        ]

    patch(launches, "known_inputs", known_inputs)
