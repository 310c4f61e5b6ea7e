"""How soon the bundled model is ready and answers: the best of three starts after a first one."""

import time
from pathlib import Path

from tests.support.serve import serving

READY_S = 8.0
FIRST_ANSWER_S = 1.0


def test_ready_and_first_answer(tmp_path: Path) -> None:
    measured = []
    for attempt in range(4):
        with serving(tmp_path / str(attempt)) as serve:
            start = time.monotonic()
            status, _ = serve.post(
                "/v1/chat/completions",
                {"model": "pagebus-mini", "messages": [{"role": "user", "content": "What is 127 + 245?"}]},
            )
            assert status == 200
            measured.append((serve.seconds_to_ready, time.monotonic() - start))
        if attempt and measured[-1][0] <= READY_S and measured[-1][1] <= FIRST_ANSWER_S:
            return
    raise AssertionError(f"(ready, first answer) in seconds: {measured}")
