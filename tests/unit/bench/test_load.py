"""The load generator: what it sends, how it reads answers, what it makes of them."""

import asyncio
import itertools
import json
import statistics

import pytest

from pagebus.bench.http_stream import Answer, HttpClient, Usage
from pagebus.bench.load import Load, LoadConfig, LoadError, Outcome, Wanted, arrivals
from pagebus.bench.load_figures import Slo, figures, is_good, spread, table
from pagebus.bench.load_plot import draw
from pagebus.bench.serve import ServeRequest, plan
from pagebus.cli.bench_serve import bench_serve
from pagebus.cli.errors import CommandError

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


def event(text, **more):
    data = json.dumps({"choices": [{"index": 0, "text": text}] if text is not None else [], **more}).encode()
    return b"data: " + data + b"\n\n"


def chunked(data):
    return b"%x\r\n%b\r\n" % (len(data), data)


class Server:
    """Answers every request with the same pieces, a pause before each, and keeps what was asked."""

    def __init__(self, *pieces, pause_s=0.0):
        self.pieces, self.pause_s = pieces, pause_s
        self.bodies, self.num_connections, self.most_at_once, self.at_once = [], 0, 0, 0

    async def __aenter__(self):
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_):
        self.server.close()

    async def _serve(self, reader, writer):
        self.num_connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                self.bodies.append(json.loads(await reader.readexactly(length)))
                self.at_once += 1
                self.most_at_once = max(self.most_at_once, self.at_once)
                for piece in self.pieces:
                    await asyncio.sleep(self.pause_s)
                    writer.write(piece)
                self.at_once -= 1
        except asyncio.IncompleteReadError:
            writer.close()


USAGE = event(None, usage={"prompt_tokens": 8, "completion_tokens": 3})
STREAM = (
    HEAD,
    chunked(event("a")),
    chunked(event("b")),
    chunked(event("c") + USAGE + b"data: [DONE]\n\n"),
    b"0\r\n\r\n",
)


async def test_a_stream_is_read_and_its_connection_used_again():
    async with Server(*STREAM, pause_s=0.01) as server:
        client = HttpClient(server.url, {"authorization": "Bearer k"})
        for _ in range(3):
            answer = await client.post("/v1/completions", b"{}", timeout_s=5)
            assert (answer.status, answer.error, answer.text) == (200, "", ["a", "b", "c"])
            assert answer.usage == Usage(8, 3)
            assert answer.sent_s < answer.text_times_s[0] < answer.text_times_s[2] <= answer.end_s
        assert server.num_connections == 1
        client.close()


async def test_events_cut_anywhere_are_the_same():
    whole = b"".join(STREAM)
    for size in (1, 7, 50):
        pieces = [whole[i : i + size] for i in range(0, len(whole), size)]
        async with Server(*pieces) as server:
            answer = await HttpClient(server.url, {}).post("/", b"{}", timeout_s=5)
            assert (answer.error, answer.text, answer.usage) == ("", ["a", "b", "c"], Usage(8, 3))


BROKEN = {
    "no DONE": ((HEAD, chunked(event("a")), b"0\r\n\r\n"), "without [DONE]"),
    "an error event": (
        (HEAD, chunked(event(None, error={"code": "x"}) + b"data: [DONE]\n\n"), b"0\r\n\r\n"), '"code"',
    ),
    "no JSON": ((HEAD, chunked(b"data: {nope\n\n"), b"0\r\n\r\n"), "cannot be read"),
    "no HTTP": ((b"hello\r\n\r\n",), "no HTTP"),
    "nothing": ((), "within"),
    "a refusal": ((b"HTTP/1.1 429 No\r\nretry-after: 4\r\ncontent-length: 2\r\n\r\nno",), "no"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
async def test_what_is_wrong_stands_in_the_answer(name):
    pieces, words = BROKEN[name]
    async with Server(*pieces) as server:
        answer = await HttpClient(server.url, {}).post("/", b"{}", timeout_s=0.5)
    assert words in answer.error
    assert (answer.retry_after == "4") == (name == "a refusal")


async def test_nobody_there():
    answer = await HttpClient("http://127.0.0.1:9", {}).post("/", b"{}", timeout_s=2)
    assert (answer.status, answer.error[:14]) == (0, "cannot connect")
    with pytest.raises(LoadError, match="no URL"):
        Load(LoadConfig(url="ftp://x"))
    with pytest.raises(LoadError, match="does not answer"):
        await Load(LoadConfig(url="http://127.0.0.1:9", timeout_s=2)).run([Wanted(0.0, 1, 1)])


async def test_a_closed_loop_keeps_its_limit_and_prompts_differ():
    async with Server(*STREAM, pause_s=0.005) as server:
        config = LoadConfig(url=server.url, model="m", max_concurrency=3, prefix_len=4)
        outcomes = await Load(config).run([Wanted(0.0, 20, 3)] * 12)
        assert server.most_at_once == 3
        assert [outcome.answer.error for outcome in outcomes] == [""] * 12
        prompts = [body["prompt"] for body in server.bodies[1:]]
        assert all(len(prompt) == 20 for prompt in prompts)
        assert len({tuple(prompt) for prompt in prompts}) == 12
        assert len({tuple(prompt[:4]) for prompt in prompts}) == 1
        assert server.bodies[1]["max_tokens"] == 3
        assert server.bodies[1]["stream_options"] == {"include_usage": True}


async def test_an_open_loop_sends_in_time():
    async with Server(*STREAM, pause_s=0.2) as server:
        config = LoadConfig(url=server.url, model="m", endpoint="chat")
        wanted = [Wanted(0.05 * i, 5, 3) for i in range(10)]
        outcomes = await Load(config).run(wanted)
        starts_s = [outcome.answer.sent_s - outcomes[0].answer.sent_s for outcome in outcomes]
        assert all(abs(start_s - one.at_s) < 0.1 for start_s, one in zip(starts_s, wanted, strict=True))
        assert server.most_at_once > 5
        assert server.bodies[-1]["messages"][0]["content"].count(" ") == 4


def test_poisson_arrivals():
    times_s = arrivals(4000, 20.0, 1)
    gaps_s = [later - one for one, later in itertools.pairwise(times_s)]
    assert statistics.mean(gaps_s) == pytest.approx(0.05, rel=0.06)
    assert statistics.stdev(gaps_s) == pytest.approx(0.05, rel=0.1)
    assert arrivals(3, float("inf"), 1) == [0.0] * 3
    assert arrivals(50, 20.0, 1) == times_s[:50]


def outcome(sent_s, *times_s, status=200, error="", delay_s=0.0, num_tokens=None, retry_after=""):
    usage = Usage(10, len(times_s) if num_tokens is None else num_tokens)
    answer = Answer(
        sent_s, times_s[-1] if times_s else sent_s + 0.01, status, error, retry_after, [*times_s], usage
    )
    return Outcome(Wanted(sent_s, 10, 3), answer, delay_s)


def test_figures():
    outcomes = [
        outcome(0.0, 0.1, 0.2, 0.3),
        outcome(1.0, 1.3, 1.5, 1.7),
        outcome(1.0, status=429, error="no", retry_after="1"),
        outcome(1.0, status=429, error="no"),
        outcome(1.0, 1.1, error="the stream ended"),
        outcome(1.0, status=0, error="cannot connect"),
    ]
    found = figures(outcomes, Slo(ttft=200))
    assert (found.num_completed, found.num_refused, found.num_failed) == (2, 2, 2)
    assert found.num_refused_without_retry_after == 1
    assert found.duration_s == pytest.approx(1.7)
    assert found.output_tokens_per_s == pytest.approx(6 / 1.7)
    assert found.num_good == 1
    assert found.ttft_ms.mean == pytest.approx(200)
    assert found.tpot_ms.mean == pytest.approx(150)
    assert found.itl_ms.highest == pytest.approx(200)
    assert found.refusal_ms.p50 == pytest.approx(10)
    assert found.errors == {"the stream ended": 1, "cannot connect": 1}
    words = table(found, Slo(ttft=200))
    assert "goodput" in words
    assert "1 x cannot connect" in words
    assert draw(outcomes, found).startswith("<svg")


def test_several_tokens_a_chunk_count_as_the_server_counts_them():
    found = figures([outcome(0.0, 0.1, 0.5, num_tokens=9)], Slo())
    assert found.num_output_tokens == 9
    assert found.tpot_ms.mean == pytest.approx(50)


def test_lateness_counts_against_the_slo():
    assert is_good(outcome(0.0, 0.1), Slo(ttft=150))
    assert not is_good(outcome(0.0, 0.1, delay_s=0.1), Slo(ttft=150))
    assert not is_good(outcome(0.0, 0.1, 0.4), Slo(tpot=200))
    assert not is_good(outcome(0.0, 0.1, 0.4), Slo(e2el=300))


def test_spread():
    assert spread([]) is None
    found = spread([i / 1000 for i in range(101)])
    assert (found.mean, found.p50, found.p99, found.highest) == pytest.approx((50, 50, 99, 100))


def test_lengths_and_traces(tmp_path):
    drawn = plan(ServeRequest(load=LoadConfig(url=""), num_requests=500, input_len=100, range_ratio=0.5))
    assert {one.num_output for one in drawn} == set(range(32, 97))
    assert min(one.num_prompt for one in drawn) >= 50
    trace = tmp_path / "trace.csv"
    trace.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,800,80\n2023-11-16 18:15:48,400,1\n"
    )
    request = ServeRequest(load=LoadConfig(url=""), trace=trace, rate_scale=0.5, length_scale=0.125)
    assert plan(request) == [Wanted(0.0, 100, 10), Wanted(4.0, 50, 1)]


async def test_a_static_batch_begins_when_the_one_before_has_ended_as_a_whole():
    async with Server(*STREAM, pause_s=0.01) as server:
        config = LoadConfig(url=server.url, model="m", static_batch=3)
        outcomes = await Load(config).run([Wanted(0.0, 5, 3 + at) for at in range(7)])
    assert [outcome.wanted.num_output for outcome in outcomes] == [3, 4, 5, 6, 7, 8, 9]
    assert server.most_at_once == 3
    spans = [(one.answer.sent_s, one.answer.end_s) for one in outcomes]
    for before, after in ((spans[:3], spans[3:6]), (spans[3:6], spans[6:])):
        assert max(end_s for _, end_s in before) <= min(sent_s for sent_s, _ in after)
    assert {outcome.delay_s for outcome in outcomes} == {0.0}


async def test_tokens_from_a_prefix_cache_are_counted():
    usage = event(None, usage={"prompt_tokens": 8, "prompt_tokens_details": {"cached_tokens": 5}})
    silent = event(None, usage={"prompt_tokens": 8, "prompt_tokens_details": None})
    for last, num in ((usage, 10), (silent, 0)):
        async with Server(HEAD, chunked(event("a") + last + b"data: [DONE]\n\n"), b"0\r\n\r\n") as server:
            load = Load(LoadConfig(url=server.url, model="m"))
            found = figures(await load.run([Wanted(0.0, 8, 1)] * 2), Slo())
        assert (found.num_completed, found.num_cached_tokens) == (2, num)


@pytest.mark.parametrize(
    "words",
    [
        ["--num-prompts", "0"],
        ["--static-batch", "-1"],
        ["--request-rate", "-1"],
        ["--range-ratio", "2"],
        ["--goodput", "ttft"],
        ["--goodput", "itl:3"],
        ["--plot", "x.png"],
        ["--save-result", "/nowhere/x.json"],
        ["--base-url", "http://127.0.0.1:9"],
        ["--base-url", "http://127.0.0.1:9", "--model", "m"],
    ],
)
def test_bad_flags_are_one_sentence(words):
    with pytest.raises(CommandError) as refused:
        bench_serve(words)
    assert "\n" not in str(refused.value)
