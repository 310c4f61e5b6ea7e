"""Any sequence of requests, cancels, losses, doublings and delays: no block is lost, all ends once."""

from collections import Counter

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pagebus.bus.messages import Cancel, Failed, PoolGroup, Rejected
from tests.unit.scheduler.model_executor import expected_ids
from tests.unit.scheduler.rig import STOPPED_HERE, Rig, executor, generate


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        horizon=st.integers(1, 16),
        num_blocks=st.integers(4, 10),
        window=st.sampled_from([None, None, 20]),
        num_executors=st.sampled_from([1, 1, 2]),
        max_tokens_a_step=st.sampled_from([3, 17, 64]),
        max_num_seqs=st.sampled_from([2, 5, 256]),
        patience_s=st.sampled_from([0.03, 5.0]),
        is_caching=st.sampled_from([True, True, False]),
        is_lazy=st.booleans(),
    )
    def start(
        self,
        horizon,
        num_blocks,
        window,
        num_executors,
        max_tokens_a_step,
        max_num_seqs,
        patience_s,
        is_caching,
        is_lazy,
    ):
        pool = (PoolGroup(num_blocks=num_blocks),)
        if window:
            pool += (PoolGroup(num_blocks=max(4, num_blocks - 2), window=window),)
        self.rig = Rig(
            [executor(f"e{i}", pool=pool) for i in range(num_executors)],
            horizon=horizon,
            max_num_batched_tokens=max_tokens_a_step,
            max_num_seqs=max_num_seqs,
            patience_s=patience_s,
            enable_prefix_caching=is_caching,
            tenant_weights={"b": 3.0},
        )
        self.rig.is_lazy = is_lazy
        self.longest = num_blocks * 16
        self.num = 0

    # -- requesters ----------------------------------------------------------------------------------------

    @rule(
        length=st.integers(1, 60),
        num_common=st.integers(0, 60),
        max_tokens=st.integers(1, 60),
        num_choices=st.sampled_from([1, 1, 1, 3]),
        priority=st.sampled_from([0, 0, 0, 1, -1]),
        tenant=st.sampled_from(["", "", "b"]),
    )
    def ask(self, length, num_common, max_tokens, num_choices, priority, tenant):
        if len(self.rig.attempts) - len(self.rig.ends) < 8:
            self.num += 1
            prompt = [i if i < num_common else self.num * 1000 + i for i in range(length)]
            self.rig.ask(f"r{self.num}", prompt, max_tokens, num_choices, priority=priority, tenant=tenant)

    @rule(pick=st.integers(0, 100))
    def cancel(self, pick):
        live = sorted(set(self.rig.attempts) - set(self.rig.ends))
        if live:
            self.rig.cancel(live[pick % len(live)])

    @rule(pick=st.integers(0, 100))
    def cancel_one_choice(self, pick):
        live = sorted(set(self.rig.attempts) - set(self.rig.ends))
        if not live:
            return
        request_id = live[pick % len(live)]
        open_choices = sorted(set(self.rig.results[request_id]) - set(self.rig.finishes[request_id]))
        choice = open_choices[pick % len(open_choices)]
        attempt = self.rig.attempts[request_id]
        self.rig.finishes[request_id][choice] = STOPPED_HERE
        self.rig.core.on_cancel(
            Cancel(request_id=request_id, attempt=attempt, choices=(choice,)), self.rig.now
        )
        if len(open_choices) == 1:
            self.rig.ends[request_id] = "cancelled"

    @rule(pick=st.integers(0, 100))
    def ask_again(self, pick):
        live = sorted(set(self.rig.attempts) - set(self.rig.ends))
        if live:
            self.rig.ask_again(live[pick % len(live)])

    @rule(pick=st.integers(1, 100))
    def replay_an_old_generate(self, pick):
        if self.num:
            request_id = f"r{1 + pick % self.num}"
            prompt, max_tokens, _ = self.rig.specs[request_id]
            self.rig.core.on_generate(generate(request_id, prompt, max_tokens), self.rig.now, {})

    # -- bus and executors -----------------------------------------------------------------------------------

    @rule()
    def plan(self):
        self.rig.plan()

    @rule(data=st.data())
    def deliver_plan(self, data):
        if self.rig.to_executors:
            self.rig.deliver_plan(data.draw(st.integers(0, len(self.rig.to_executors) - 1)))

    @rule(index=st.integers(0, 3), doubled=st.booleans())
    def lose_or_double_plan(self, index, doubled):
        if index < len(self.rig.to_executors):
            plan = self.rig.to_executors[index]
            if doubled:
                self.rig.to_executors.append(plan)
            else:
                self.rig.to_executors.pop(index)

    @rule(data=st.data())
    def deliver_to_core(self, data):
        if self.rig.to_core:
            self.rig.deliver_to_core(data.draw(st.integers(0, len(self.rig.to_core) - 1)))

    @rule(index=st.integers(0, 3), doubled=st.booleans())
    def lose_or_double_report(self, index, doubled):
        if index < len(self.rig.to_core):
            message = self.rig.to_core[index]
            if doubled:
                self.rig.to_core.append(message)
            else:
                self.rig.to_core.pop(index)

    @rule(pick=st.integers(0, 1), num_steps=st.integers(1, 6))
    def run_ahead(self, pick, num_steps):
        names = sorted(self.rig.executors)
        for _ in range(num_steps):
            self.rig.step(names[pick % len(names)])

    @rule(num_turns=st.integers(1, 4))
    def healthy_turns(self, num_turns):
        for _ in range(num_turns):
            self.rig.turn()

    @rule(seconds=st.sampled_from([0.01, 0.25, 1.1]))
    def pass_time(self, seconds):
        self.rig.pass_time(seconds)

    # -- what must hold --------------------------------------------------------------------------------------

    @invariant()
    def blocks_are_accounted_for(self):
        if hasattr(self, "rig"):
            self.rig.check_blocks()

    def teardown(self):
        if not hasattr(self, "rig"):
            return
        rig = self.rig
        rig.run(3000)
        rig.check_blocks()
        rig.check_all_free()
        for request_id, end in rig.ends.items():
            prompt, max_tokens, _ = rig.specs[request_id]
            if len(prompt) + 1 > self.longest:
                assert end in ("context_length_exceeded", "cancelled")
                continue
            assert end in ("finished", "cancelled")
            expected = expected_ids(prompt, min(max_tokens, self.longest - len(prompt)))
            for choice, ids in rig.results[request_id].items():
                is_whole = rig.finishes[request_id].get(choice) == "length"
                assert ids == expected if is_whole else ids == expected[: len(ids)]
        once = Counter((ended.request_id, ended.attempt) for ended in rig.ended)
        assert all(count == 1 for count in once.values())
        fatal = Counter(
            reply.request_id for reply in rig.replies if isinstance(reply, Failed) and not reply.is_retryable
        )
        assert all(count == 1 for count in fatal.values())
        told = {reply.request_id for reply in rig.replies if isinstance(reply, Rejected)}
        assert not told & set(fatal)


SchedulerMachine.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TestScheduler = SchedulerMachine.TestCase
