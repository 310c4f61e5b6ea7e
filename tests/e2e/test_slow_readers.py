"""Clients that read nothing: cut off in time, and nobody else notices."""

import contextlib
import json
import re
import socket
import time

from pagebus.bench.load import LoadConfig, Wanted
from pagebus.bench.load_figures import Slo, figures
from pagebus.bench.serve import measure
from tests.support.serve import serving

NUM_STUCK = 40
TIMEOUT_S = 3.0


def stuck_client(port, path="/v1/completions", **fields):
    """Asks for a long stream and never reads."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    client.connect(("127.0.0.1", port))
    body = {"prompt": [7, 8, 9], "max_tokens": 30_000, "ignore_eos": True, "stream": True, **fields}
    data = json.dumps(body).encode()
    client.sendall(
        b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (path.encode(), len(data)) + data
    )
    return client


def running(serve):
    return json.loads(serve.get("/ready")[1])["num_running"]


def token_ms(serve, num_readers=0):
    """Median ms a token of four streams, beside others that read what they get."""
    wanted = [Wanted(0.0, 20, 3000)] * num_readers + [Wanted(0.0, 20, 200)] * 4
    outcomes = measure(LoadConfig(url=serve.url), wanted)
    return figures(outcomes[num_readers:], Slo()).tpot_ms.p50


def stuck_and_aborted(serve):
    """Rows that run, and choices that ended because their client was gone."""
    metrics = serve.get("/metrics")[1].decode()
    found = re.search(r'request_success_total{.*finished_reason="abort".*} (\S+)', metrics)
    return running(serve), float(found[1]) if found else 0.0


def test_readers_that_never_read(tmp_path):
    flags = ["--fake", "--slow-reader-timeout-s", str(TIMEOUT_S), "--max-model-len", "32768"]
    with serving(tmp_path, *flags) as serve, contextlib.ExitStack() as stack:
        beside_others_ms = token_ms(serve, NUM_STUCK)
        for i in range(NUM_STUCK):
            stack.callback(stuck_client(serve.port, seed=i, return_token_ids=True).close)
        deadline_s = time.monotonic() + 60
        while running(serve) < NUM_STUCK:
            assert time.monotonic() < deadline_s, "the stuck clients' requests did not start"
            time.sleep(0.05)
        beside_ms = token_ms(serve)
        while (counts := stuck_and_aborted(serve)) != (0, NUM_STUCK):
            assert time.monotonic() < deadline_s, f"rows that run, and aborted: {counts}"
            time.sleep(0.1)
        after_ms = token_ms(serve)
    print(
        f"{beside_ms:.2f} ms a token beside {NUM_STUCK} readers that read nothing, {beside_others_ms:.2f} "
        f"beside {NUM_STUCK} that read, {after_ms:.2f} after they were cut off"
    )
    assert beside_ms < 1.2 * beside_others_ms + 2.0
