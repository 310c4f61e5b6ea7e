"""Gateway and requester on a bus that loses, doubles and reorders: answers have every token and every
log-probability once. In virtual time."""

import asyncio
import contextlib
import random

import httpx
import pytest

from pagebus.bus.faults import SeededFaults
from pagebus.bus.memory import MemoryBroker
from pagebus.gateway.app import build_app
from pagebus.gateway.server import make_context
from pagebus.gateway.tokenizer import Tokenizer
from pagebus.requester.client import Requester
from pagebus.settings.structs import GatewaySettings
from pagebus.sim import virtual_time
from tests.support.answers import events
from tests.support.fake_server import FakeServer, token
from tests.support.gateway import MODEL, byte_model, ids
from tests.support.logprobs import made_up

NUM_BYTES = 128  # tokens are ASCII characters
PROMPT = "Some prompt"
MAX_TOKENS = 12


@contextlib.asynccontextmanager
async def serving(path, seed: int, loss: float):
    broker = MemoryBroker()
    server = FakeServer(broker.connect("server"), model=MODEL, vocab_size=NUM_BYTES, max_model_len=512)
    await server.start()
    bus = broker.connect("gateway")
    requester = Requester(bus, model=MODEL, instance="gw", rng=random.Random(seed))
    await requester.start()
    await server.beat()
    await asyncio.sleep(0.1)
    context = make_context(GatewaySettings(model=MODEL), bus, requester, Tokenizer.load(byte_model(path)))
    broker.faults = SeededFaults(seed, loss=loss, duplication=0.1, delay=0.2, max_delay_s=0.05)
    transport = httpx.ASGITransport(build_app(context))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway", timeout=600) as client:
        yield client, server
    await requester.close()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("loss", [0.0, 0.05, 0.3])
def test_every_log_probability_once(tmp_path, seed, loss):
    virtual_time.run(ask(tmp_path, seed, loss))


async def ask(tmp_path, seed: int, loss: float) -> None:
    async with serving(tmp_path, seed, loss) as (client, server):

        async def one(number: int) -> None:
            body = {
                "prompt": PROMPT, "max_tokens": MAX_TOKENS, "n": 2, "logprobs": 2, "echo": True,
                "ignore_eos": True, "prompt_logprobs": None if number % 2 else 1, "stream": bool(number % 2),
                "cache_salt": str(number),
            }  # fmt: skip
            answer = await client.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            request_id = next(
                asked.request_id for asked in server.generates if asked.cache_salt == str(number)
            )
            given = ids(PROMPT)
            for choice in (0, 1):
                made = [token(request_id, choice, index, NUM_BYTES) for index in range(MAX_TOKENS)]
                want = [made_up(one, at, 2, NUM_BYTES) for at, one in enumerate(given)][1:]
                want += [made_up(one, at, 2, NUM_BYTES) for at, one in enumerate(made)]
                parts = events(answer.text) if body["stream"] else [answer.json()]
                mine = [c for part in parts for c in part["choices"] if c["index"] == choice]
                assert "".join(part["text"] for part in mine) == PROMPT + bytes(made).decode()
                told = [part["logprobs"] for part in mine if part["logprobs"]]
                values = [value for part in told for value in part["token_logprobs"]]
                assert values == [None, *(one.logprob for one in want)]
                places = [place for part in told for place in part["text_offset"]]
                assert places == list(range(len(given) + MAX_TOKENS))
                if not body["stream"]:
                    listed = mine[0]["prompt_logprobs"]
                    assert [
                        entry and entry[str(given[at])]["logprob"] for at, entry in enumerate(listed)
                    ] == (values[: len(given)])
                    assert answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 1

        await asyncio.gather(*(one(number) for number in range(8)))
        assert loss == 0.0 or max(asked.attempt for asked in server.generates) > 1
