"""Log-probabilities in the shapes of OpenAI's chat and text answers, of vLLM's `prompt_logprobs`, and of our
own events on NATS.

Pure. It knows tokens' texts, not when anything is sent.
"""

from collections.abc import Iterable, Sequence

import msgspec

from pagebus.bus.messages import ApiTokenLogprob, ApiTopLogprob, Logprobs
from pagebus.gateway.token_texts import TokenTexts
from pagebus.requester.packed_logprobs import TokenLogprob, unpack

LOWEST = -9999.0
"""Minus infinity is no JSON: nothing is told to be less probable than this."""


class TopLogprob(msgspec.Struct, frozen=True):
    """One of the best tokens at a place."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(msgspec.Struct, frozen=True):
    """A token of a chat's answer."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    """`choices[].logprobs` of a chat, of a whole answer or of a chunk."""

    content: list[ChatTokenLogprob]
    refusal: None = None


class TextLogprobs(msgspec.Struct, frozen=True):
    """`choices[].logprobs` of a text completion: arrays of one length. Offsets count characters of the
    choice's text, the echoed prompt included; a token that begins within a character has that one's."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class PromptLogprob(msgspec.Struct, frozen=True):
    """A token in vLLM's `prompt_logprobs`; rank 1 is the most probable."""

    logprob: float
    rank: int
    decoded_token: str


LogprobsBody = ChatLogprobs | TextLogprobs


class LogprobWriter:
    """Fills the shapes. `as_ids`: tokens are shown as `token_id:7` (vLLM's `return_tokens_as_token_ids`)."""

    def __init__(self, texts: TokenTexts, as_ids: bool = False) -> None:
        self._texts = texts
        self._as_ids = as_ids

    def name(self, token_id: int) -> str:
        """How a token is shown."""
        return _id_name(token_id) if self._as_ids else self._texts.text(token_id)

    def chat(self, logprobs: Logprobs, num_top: int) -> ChatLogprobs:
        """A chat's tokens, with the `num_top` best beside each."""
        return ChatLogprobs(
            [
                ChatTokenLogprob(
                    self.name(token.token_id),
                    _bounded(token.logprob),
                    self._bytes(token.token_id),
                    [
                        TopLogprob(self.name(top_id), _bounded(value), self._bytes(top_id))
                        for top_id, value in token.top[:num_top]
                    ],
                )
                for token in unpack(logprobs)
            ]
        )

    def text(self, logprobs: Logprobs, num_top: int, offsets: Sequence[int]) -> TextLogprobs:
        """A text's tokens; the token itself stands in its dictionary beside the `num_top` best."""
        tokens = unpack(logprobs)
        return TextLogprobs(
            list(offsets),
            [_bounded(token.logprob) for token in tokens],
            [self.name(token.token_id) for token in tokens],
            [self._top(token, num_top) for token in tokens],
        )

    def first_of_text(self, token_id: int) -> TextLogprobs:
        """An echoed prompt's first token, which nothing has predicted."""
        return TextLogprobs([0], [None], [self.name(token_id)], [None])

    def prompt(self, logprobs: Logprobs, num_top: int) -> bytes:
        """Elements of vLLM's `prompt_logprobs` as JSON, without the list's brackets. A prompt is long, so it
        is not kept as objects."""
        return msgspec.json.encode([self._prompt_element(token, num_top) for token in unpack(logprobs)])[1:-1]

    def _prompt_element(self, token: TokenLogprob, num_top: int) -> dict[int, PromptLogprob]:
        text = self._texts.text
        own = PromptLogprob(_bounded(token.logprob), token.rank, text(token.token_id))
        element = {token.token_id: own}
        for place, (top_id, value) in enumerate(token.top[:num_top], 1):
            if top_id != token.token_id:
                element[top_id] = PromptLogprob(_bounded(value), place, text(top_id))
        return element

    def api(self, logprobs: Logprobs, num_top: int) -> list[ApiTokenLogprob]:
        """Tokens in our own events on NATS."""
        return [
            ApiTokenLogprob(
                token=self.name(token.token_id),
                token_id=token.token_id,
                logprob=_bounded(token.logprob),
                rank=token.rank,
                bytes=self._bytes(token.token_id),
                top_logprobs=[
                    ApiTopLogprob(
                        token=self.name(top_id),
                        token_id=top_id,
                        logprob=_bounded(value),
                        bytes=self._bytes(top_id),
                    )
                    for top_id, value in token.top[:num_top]
                ],
            )
            for token in unpack(logprobs)
        ]

    def _bytes(self, token_id: int) -> list[int]:
        return list(self._texts.data(token_id))

    def _top(self, token: TokenLogprob, num_top: int) -> dict[str, float]:
        """Different tokens that look the same (two halves of characters, say) do not hide each other: the
        less probable ones go by their ids."""
        best: dict[str, float] = {}
        has_itself = False
        for token_id, value in token.top[:num_top]:
            has_itself = has_itself or token_id == token.token_id
            self._add(best, token_id, value)
        if not has_itself:
            self._add(best, token.token_id, token.logprob)
        return best

    def _add(self, best: dict[str, float], token_id: int, value: float) -> None:
        name = self.name(token_id)
        best[_id_name(token_id) if name in best else name] = _bounded(value)


def joined_chat(bodies: Iterable[LogprobsBody]) -> ChatLogprobs:
    """A chat's, one after the other."""
    parts = [body for body in bodies if isinstance(body, ChatLogprobs)]
    return ChatLogprobs([token for part in parts for token in part.content])


def joined_text(bodies: Iterable[LogprobsBody]) -> TextLogprobs:
    """A text's, one after the other; offsets are those of the same text already."""
    parts = [body for body in bodies if isinstance(body, TextLogprobs)]
    return TextLogprobs(
        [offset for part in parts for offset in part.text_offset],
        [value for part in parts for value in part.token_logprobs],
        [token for part in parts for token in part.tokens],
        [best for part in parts for best in part.top_logprobs],
    )


def _bounded(logprob: float) -> float:
    return logprob if logprob > LOWEST else LOWEST  # NaN too


def _id_name(token_id: int) -> str:
    return f"token_id:{token_id}"
