"""Whether an executor's computing gets on, from what is heard of it. Pure: judges nobody."""

from pagebus.bus.messages import ExecutorPhase, Hello


class Computing:
    """What one executor is at, and when it was seen to get on. Times are monotonic seconds."""

    def __init__(self, hello: Hello, now_s: float) -> None:
        self.phase: ExecutorPhase = hello.state
        self.slowest_s = 0.0  # the longest that a part of a step took there
        self.progress_s = now_s  # when it got on, or began to owe something
        self.moved_s = now_s  # the same, but not begun anew each time that it is given up
        self._count = -1
        self.note(hello, now_s)

    def note(self, hello: Hello, now_s: float) -> None:
        """What a `Hello` says."""
        self.phase, self.slowest_s = hello.state, hello.slowest_ms / 1000
        if hello.progress != self._count:
            self._count = hello.progress
            self.step(now_s)

    def step(self, now_s: float) -> None:
        """It got on."""
        self.progress_s = self.moved_s = now_s

    def follow(self, before: "Computing | None") -> None:
        """The executor is met anew: if it has computed nothing since, it has not got on for that long."""
        if before is not None and self._count == before._count:
            self.moved_s = before.moved_s
