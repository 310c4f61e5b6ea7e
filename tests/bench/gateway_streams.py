"""What a token costs on its way into a stream, with event ids and without: tokens a CPU-second.

By hand: `python -m tests.bench.gateway_streams`. One process, no sockets: from requester's events to bytes.
"""

import tempfile
import time
from pathlib import Path

from pagebus.bus.messages import Sampling
from pagebus.gateway.chat import ChatShape
from pagebus.gateway.counters import Counters
from pagebus.gateway.event_ids import start
from pagebus.gateway.generation import Choice, Generation
from pagebus.gateway.generation_events import Finished, GenerationEvent, GenerationRequest, TextEvent
from pagebus.gateway.jobs import Job
from pagebus.gateway.logprob_shapes import LogprobWriter
from pagebus.gateway.sampling_params import TokenDetails
from pagebus.gateway.stream_answer import StreamAnswer
from pagebus.gateway.tokenizer import Tokenizer
from pagebus.gateway.tracing import NO_TRACE
from pagebus.requester.events import NewTokens
from tests.support.gateway import byte_model

NUM_TOKENS = 20_000
NUM_ROUNDS = 25


def tokens_a_second(tokenizer: Tokenizer, num_choices: int, has_ids: bool) -> float:
    """CPU time only."""
    request = GenerationRequest(
        request_id="r", prompt=[65], num_choices=num_choices, sampling=Sampling(), max_tokens=NUM_TOKENS
    )
    shape = ChatShape("m", "fp", TokenDetails(), LogprobWriter(tokenizer.texts))
    job = Job(requests=[request], shape=shape, is_stream=True)
    parts: list[bytes] = []
    answer = StreamAnswer(
        job, parts.append, lambda: None, lambda: None, start(num_choices) if has_ids else None
    )

    def take(event: GenerationEvent) -> None:
        if isinstance(event, TextEvent):
            answer.on_text(event)
        else:
            assert isinstance(event, Finished)

    choices = [Choice(tokenizer.stream()) for _ in range(num_choices)]
    generation = Generation(request, choices, frozenset(), Counters(), take, NO_TRACE)
    answer.open()
    began_s = time.process_time()
    for index in range(NUM_TOKENS // num_choices):
        for choice in range(num_choices):
            generation.take(NewTokens(choice, index, [65 + index % 26]))
    return NUM_TOKENS / (time.process_time() - began_s)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Tokenizer.load(byte_model(Path(folder)))
        for num_choices in (1, 4, 64):
            rates: dict[bool, list[float]] = {False: [], True: []}
            for _ in range(NUM_ROUNDS):
                for has_ids, found in rates.items():
                    found.append(tokens_a_second(tokenizer, num_choices, has_ids))
            without, with_ids = (max(rates[has_ids]) for has_ids in (False, True))
            print(
                f"n={num_choices:<3} without ids {without:10,.0f} tokens/s   with {with_ids:10,.0f}   "
                f"ratio {with_ids / without:.3f}"
            )


if __name__ == "__main__":
    main()
