"""Rows as sampling sees them, and what their distributions must be, written out in plain Python."""

import math
from collections.abc import Iterable, Sequence

import torch

from pagebus.bus.messages import Logprobs, Sampling, pack_ids
from pagebus.executor.batch import RowInput
from pagebus.executor.sampling import sample
from pagebus.executor.scan import scan


def draw(
    sampling: Sampling,
    choice: int = 0,
    index: int = 0,
    *,
    history: Sequence[int] = (),
    num_prompt: int = 0,
    banned_ids: Sequence[int] = (),
) -> RowInput:
    """A row of which only sampling matters."""
    return RowInput(
        ids=(),
        start=0,
        tables=(),
        sampling=sampling,
        choice=choice,
        index=index,
        history=history,
        num_prompt=num_prompt,
        banned_ids=banned_ids,
    )


def ids_of(logits: torch.Tensor, rows: Sequence[RowInput]) -> list[int]:
    """The ids chosen; every row must get one."""
    made = sample(scan(logits), rows)
    assert not made.flaws, made.flaws
    return made.ids


def words(*bad: Iterable[int]) -> tuple[bytes, ...]:
    """`Sampling.bad_words`."""
    return tuple(pack_ids(word) for word in bad)


def read(told: Logprobs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids and values [n, 1 + num_top], ranks [n]."""
    width = 1 + told.num_top
    ids = torch.frombuffer(bytearray(told.ids), dtype=torch.int32).view(-1, width)
    values = torch.frombuffer(bytearray(told.values), dtype=torch.float32).view(-1, width)
    ranks = torch.frombuffer(bytearray(told.ranks), dtype=torch.int32)
    assert len(ids) == len(values) == len(ranks)
    return ids.long(), values, ranks.long()


def changed_logits(logits: Sequence[float], row: RowInput) -> list[float]:
    """One row's logits after allowed ids, bad words, banned ids, bias and penalties."""
    sampling, history = row.sampling, list(row.history)
    changed = list(logits)
    if sampling.allowed_token_ids:
        allowed = {
            _int(sampling.allowed_token_ids, at) for at in range(0, len(sampling.allowed_token_ids), 4)
        }
        changed = [x if id in allowed else -math.inf for id, x in enumerate(changed)]
    for word in sampling.bad_words:
        ids = [_int(word, at) for at in range(0, len(word), 4)]
        before = ids[:-1]
        is_matched = not before or (len(history) >= len(before) and history[-len(before) :] == before)
        if is_matched and ids[-1] < len(changed):
            changed[ids[-1]] = -math.inf
    for id in row.banned_ids:
        if 0 <= id < len(changed):
            changed[id] = -math.inf
    for id, bias in sampling.logit_bias.items():
        if 0 <= id < len(changed):
            changed[id] += bias
    for id in set(history):
        penalty = sampling.repetition_penalty
        changed[id] = changed[id] / penalty if changed[id] > 0 else changed[id] * penalty
    for id in set(history[row.num_prompt :]):
        changed[id] -= sampling.frequency_penalty * history[row.num_prompt :].count(id)
        changed[id] -= sampling.presence_penalty
    return changed


def probabilities(logits: Sequence[float], sampling: Sampling) -> list[float]:
    """What a draw's distribution must be: temperature, min-p, top-k, top-p. No logit occurs twice."""
    top = max(logits)
    weights = [math.exp((x - top) / sampling.temperature) for x in logits]
    kept = sorted(range(len(weights)), key=lambda i: -weights[i])
    kept = [i for i in kept if weights[i] >= sampling.min_p]
    if sampling.top_k:
        kept = kept[: sampling.top_k]
    total, held, nucleus = sum(weights[i] for i in kept), 0.0, list[int]()
    for i in kept:
        if nucleus and held >= sampling.top_p * total and sampling.top_p < 1:
            break
        nucleus.append(i)
        held += weights[i]
    chances = [0.0] * len(weights)
    for i in nucleus:
        chances[i] = weights[i] / held
    return chances


def assert_drawn_from(counts: torch.Tensor, expected: torch.Tensor) -> None:
    """Chi-square: the counts are those of the probabilities `expected`. Wrong in 3 of 100,000 cases."""
    num_draws = counts.sum()
    assert counts[expected == 0].sum() == 0
    used = expected > 0
    wanted = num_draws * expected[used].double()
    chi = float(((counts[used] - wanted) ** 2 / wanted).sum())
    freedom = int(used.sum()) - 1
    if freedom:  # Wilson and Hilferty's approximation of the distribution, at 4 standard deviations
        bound = freedom * (1 - 2 / (9 * freedom) + 4 * math.sqrt(2 / (9 * freedom))) ** 3
        assert chi < bound, (chi, freedom)


def _int(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 4], "little", signed=True)
