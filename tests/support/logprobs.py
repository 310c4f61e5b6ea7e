"""Log-probabilities for tests: packed from plain tuples, and made up so that a place alone decides them."""

import struct
from collections.abc import Sequence

from pagebus.bus.messages import Logprobs, pack_ids
from pagebus.requester.packed_logprobs import TokenLogprob


def pack(tokens: Sequence[TokenLogprob], num_top: int) -> Logprobs:
    ids = [one for token in tokens for one in (token.token_id, *(top_id for top_id, _ in token.top))]
    values = [one for token in tokens for one in (token.logprob, *(value for _, value in token.top))]
    assert len(ids) == len(tokens) * (1 + num_top)
    return Logprobs(
        num_top=num_top,
        ids=pack_ids(ids),
        values=struct.pack(f"<{len(values)}f", *values),
        ranks=pack_ids([token.rank for token in tokens]),
    )


def made_up(token_id: int, place: int, num_top: int, vocab_size: int = 256) -> TokenLogprob:
    """A token's log-probabilities, exact in float32. The id is the best, the second best, or worse than all
    shown, by turns."""
    others = [(token_id + 1 + place + number) % vocab_size for number in range(num_top + 2)]
    others = [other for other in others if other != token_id][: num_top + 1]
    rank = (1, 2, num_top + 2)[place % 3]
    order = others[:]
    order.insert(rank - 1, token_id)
    values = [-0.25 * (1 + place % 7) - 0.5 * number for number in range(len(order))]
    top = list(zip(order, values, strict=True))[:num_top]
    at = order.index(token_id)
    return TokenLogprob(token_id, values[at], at + 1, top)


def made_up_all(ids: Sequence[int], first_place: int, num_top: int, vocab_size: int = 256) -> Logprobs:
    """`made_up` of consecutive ids."""
    return pack([made_up(one, first_place + at, num_top, vocab_size) for at, one in enumerate(ids)], num_top)
