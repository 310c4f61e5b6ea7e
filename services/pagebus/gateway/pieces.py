"""What one token adds to a text: a decoder of tokenizer.json, read as a plan that a stream can follow id by
id.

Knows the decoders of language models (byte-level, byte fallback, Metaspace); for others there is no plan.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from tokenizers import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>", re.ASCII)


@dataclass(frozen=True)
class DecodePlan:
    """How tokens become text.

    "bytes": every token stands for bytes, all together are UTF-8 (broken parts become U+FFFD).
    "text": every token stands for text; with byte fallback, runs of tokens like `<0x0A>` stand for bytes.
    "other": only the tokenizers library knows.
    """

    kind: Literal["bytes", "text", "other"]
    replacements: tuple[tuple[str, str], ...] = ()  # in each token
    dropped_in_first: str = ""  # this character is left out of the first token (Metaspace's prefix space)
    separator: str = ""  # between tokens
    has_byte_fallback: bool = False
    left_strips: tuple[
        tuple[str, int], ...
    ] = ()  # (character, how many at most) off the start of the whole text


def decode_plan(tokenizer: Tokenizer) -> DecodePlan:
    """Reads the tokenizer's decoder."""
    if tokenizer.decoder is None:
        return DecodePlan("text", separator=" ")
    state = json.loads(tokenizer.decoder.__getstate__())
    steps = list(_flat_steps(state))
    if [step["type"] for step in steps if step["type"] != "Fuse"] == ["ByteLevel"]:
        return DecodePlan("bytes")
    replacements: list[tuple[str, str]] = []
    strips: list[tuple[str, int]] = []
    dropped = ""
    has_bytes = is_fused = False
    for step in steps:
        match step:
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if (
                old and not has_bytes
            ):
                if is_fused:
                    return DecodePlan("other")
                replacements.append((old, new))
            case {"type": "Metaspace", "replacement": str(mark)} if not (
                replacements or has_bytes or is_fused
            ):
                if step.get("prepend_scheme", "always") != "never":
                    dropped = mark
                replacements.append((mark, " "))
            case {"type": "ByteFallback"} if not is_fused:
                has_bytes = True
            case {"type": "Fuse"}:
                is_fused = True
            case {"type": "Strip", "content": str(character), "start": int(start), "stop": 0} if is_fused:
                strips.append((character, start))
            case _:
                return DecodePlan("other")
    return DecodePlan("text", tuple(replacements), dropped, "", has_bytes, tuple(strips))


def _flat_steps(state: dict[str, object]) -> Iterator[dict[str, object]]:
    inner = state.get("decoders")
    if state.get("type") != "Sequence" or not isinstance(inner, list):
        yield state
        return
    for step in inner:
        yield from _flat_steps(step)


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 characters stand for their own byte, the rest for those from U+0100
    on."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(own))
    return {chr(byte): byte for byte in own} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_ALPHABET = _byte_of_character()


class BytePieces(dict[int, bytes]):
    """Id -> bytes, filled as ids come (`pieces[id]`). Ids without a token, and skipped ones, are empty."""

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[str]) -> None:
        super().__init__()
        self._tokenizer, self._skipped = tokenizer, skipped

    def __missing__(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        piece = b""
        if token is not None and token not in self._skipped:
            values = [_ALPHABET.get(character, -1) for character in token]
            piece = (
                token.encode() if -1 in values else bytes(values)
            )  # an added token outside the alphabet: as it is
        self[token_id] = piece
        return piece


class TextPieces(dict[int, "str | int | None"]):
    """Id -> text, or a byte's value (byte fallback), or None for ids without a token and skipped ones."""

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[str], plan: DecodePlan) -> None:
        super().__init__()
        self._tokenizer, self._skipped, self._plan = tokenizer, skipped, plan

    def __missing__(self, token_id: int) -> str | int | None:
        token = self._tokenizer.id_to_token(token_id)
        piece: str | int | None = None
        if token is not None and token not in self._skipped:
            piece = self._read(token)
        self[token_id] = piece
        return piece

    def first(self, token_id: int) -> str | int | None:
        """The piece of the first token that is not skipped; Metaspace leaves its prefix space out."""
        piece = self[token_id]
        token = self._tokenizer.id_to_token(token_id)
        if not self._plan.dropped_in_first or piece is None or token is None:
            return piece
        return self._read(token.replace(self._plan.dropped_in_first, ""))

    def _read(self, token: str) -> str | int:
        for old, new in self._plan.replacements:
            token = token.replace(old, new)
        match = _BYTE_TOKEN.fullmatch(token) if self._plan.has_byte_fallback else None
        return int(match[1], 16) if match else token
