"""The streams of a chaos run and what each must give: every id is known before it starts.

Knows the fake model and the bundled tokenizer (for texts), nothing of processes or of how streams are read.
"""

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pagebus.bus.messages import FinishReason, Sampling
from pagebus.executor.fake import fake_sequence
from pagebus.gateway.tokenizer import Tokenizer
from pagebus.settings.model_files import bundled_model

Path = Literal["requester", "client", "http"]
PATHS: tuple[Path, ...] = ("requester", "client", "http")
POISON_ID = 600
"""What a poison prompt holds that ends its executor; the fake model makes ids below 512 only."""
RAISING_ID = 601
"""The same for one whose forward raises, each time."""

_FIRST_ID, _LAST_ID = 3, 511


@dataclass(frozen=True, kw_only=True)
class StreamSpec:
    """One stream: how it is asked for, and how long after the load's start."""

    name: str  # unique in a run; the request id where the path lets the client choose one
    path: Path
    prompt: tuple[int, ...]
    num_choices: int
    sampling: Sampling
    max_tokens: int
    stop_ids: tuple[int, ...] = ()
    stop_text: str = ""
    start_s: float = 0.0
    gateway: int = 0  # where an HTTP stream starts
    resumes: bool = True  # an HTTP reader whose connection is lost asks for the rest
    is_poison: bool = False
    known: "tuple[ExpectedChoice, ...]" = ()  # what a quiet run gave, where the model is not the fake one

    @functools.cached_property
    def expected(self) -> "tuple[ExpectedChoice, ...]":
        """What each choice gives where nothing goes wrong."""
        if self.known:
            return self.known
        return tuple(_expected(self, choice) for choice in range(self.num_choices))


@dataclass(frozen=True)
class ExpectedChoice:
    """`text` is None where the path tells none. With a stop string `ids` end where it is complete; some more
    of `run`, what is made without it, may be told."""

    run: tuple[int, ...]
    ids: tuple[int, ...]
    finish_reason: FinishReason
    text: str | None


@functools.cache
def tokenizer() -> Tokenizer:
    """The bundled model's, which the gateways serve the fake model with."""
    return Tokenizer.load(bundled_model())


def _expected(spec: StreamSpec, choice: int) -> ExpectedChoice:
    ids = fake_sequence(
        spec.prompt, spec.max_tokens, sampling=spec.sampling, choice=choice, stop_token_ids=spec.stop_ids
    )
    reason: FinishReason = "stop" if ids[-1] in spec.stop_ids else "length"
    if spec.path == "requester":
        return ExpectedChoice(tuple(ids), tuple(ids), reason, None)
    # A stop id is not part of the text.
    detokenizer = tokenizer().detokenizer()
    text = ""
    for number, token in enumerate(ids):
        text += detokenizer.push([token]) if token not in spec.stop_ids else ""
        if spec.stop_text and spec.stop_text in text:
            told = text[: text.index(spec.stop_text)]
            return ExpectedChoice(tuple(ids), tuple(ids[: number + 1]), "stop", told)
    text += detokenizer.finish()
    return ExpectedChoice(tuple(ids), tuple(ids), reason, text)


def random_specs(
    rng: random.Random,
    num_streams: int,
    *,
    run: str,
    num_gateways: int,
    num_tokens: tuple[int, int],
    paths: Sequence[Path] = PATHS,
    spread_s: float = 1.0,
    resumes: bool = True,
    is_fake: bool = True,
) -> list[StreamSpec]:
    """`num_streams` streams of all kinds, of `num_tokens` (least, most) tokens a choice, started within
    `spread_s`; some share the beginning of their prompts."""
    shared = [_ids(rng, 64) for _ in range(3)]
    specs = []
    for number in range(num_streams):
        path = paths[number % len(paths)]
        spec = _random_spec(rng, f"{run}-{number}", path, shared, num_tokens)
        if is_fake:
            spec = _with_stop(rng, spec)
        start_s, gateway = rng.uniform(0.0, spread_s), rng.randrange(max(num_gateways, 1))
        specs.append(replace(spec, start_s=start_s, gateway=gateway, resumes=resumes))
    return specs


def _ids(rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple(rng.randint(_FIRST_ID, _LAST_ID) for _ in range(count))


def _random_spec(
    rng: random.Random,
    name: str,
    path: Path,
    shared: Sequence[tuple[int, ...]],
    num_tokens: tuple[int, int],
) -> StreamSpec:
    head = rng.choice(shared)[: rng.randint(0, 64)] if rng.random() < 0.4 else ()
    is_greedy = rng.random() < 0.4
    has_penalties = rng.random() < 0.25
    return StreamSpec(
        name=name,
        path=path,
        prompt=(*head, *_ids(rng, rng.randint(1, 120))),
        num_choices=rng.choice((1, 1, 1, 1, 2, 3)),
        sampling=Sampling(
            temperature=0.0 if is_greedy else 1.0,
            seed=rng.randrange(1 << 32),
            presence_penalty=0.5 if has_penalties else 0.0,
            repetition_penalty=1.2 if has_penalties and rng.random() < 0.5 else 1.0,
        ),
        max_tokens=rng.randint(*num_tokens),
    )


def _with_stop(rng: random.Random, spec: StreamSpec) -> StreamSpec:
    """Some end early, by an id or a text that is known to come."""
    kind = rng.random()
    if kind < 0.15:  # an id that comes late in some choice
        ids = spec.expected[0].ids
        return replace(spec, stop_ids=(ids[rng.randrange(len(ids) // 2, len(ids))],))
    if kind < 0.3 and spec.path != "requester":
        text = spec.expected[0].text or ""
        middle = len(text) // 2
        stop = text[middle : middle + 4]
        return replace(spec, stop_text=stop) if stop.isascii() and stop.isprintable() and stop else spec
    return spec


def poison_spec(rng: random.Random, name: str, poison: int = POISON_ID) -> StreamSpec:
    """A request whose prompt ends the executor that computes it (the fake one, or by the test's hand)."""
    return StreamSpec(
        name=name,
        path="requester",
        prompt=(*_ids(rng, 20), poison, *_ids(rng, 5)),
        num_choices=1,
        sampling=Sampling(temperature=0.0),
        max_tokens=20,
        start_s=0.2,
        is_poison=True,
    )
