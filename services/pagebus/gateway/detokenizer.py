"""Ids in, text out, a few at a time: all that comes out equals one decode of all that went in.

Text is given out once no later token can change it, so never half a character and never a U+FFFD that would
have been repaired. Knows nothing of stop strings or of streams to clients.
"""

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from pagebus.gateway.pieces import BytePieces, DecodePlan, TextPieces, decode_plan

SPACE_CLEANUP = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"),
    (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip
"""What transformers' clean_up_tokenization_spaces replaces, in this order."""


class _Source(Protocol):
    """The part that depends on the decoder."""

    def push(self, ids: Sequence[int]) -> str: ...

    def pending(self) -> str:
        """Text that would come next if nothing followed, without broken characters."""
        ...

    def finish(self) -> str: ...


class _Stage(Protocol):
    """A change of the whole text, made as it passes."""

    def push(self, text: str) -> str: ...

    def peek(self, text: str) -> str:
        """What would come out if `text` were the last to come; nothing changes."""
        ...

    def finish(self) -> str: ...


class _ByteSource:
    """Byte-level tokens: one incremental UTF-8 decoder, which holds an incomplete character back."""

    def __init__(self, pieces: BytePieces) -> None:
        self._pieces = pieces
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._is_between = True  # characters

    def push(self, ids: Sequence[int]) -> str:
        pieces = self._pieces
        data = pieces[ids[0]] if len(ids) == 1 else b"".join([pieces[token_id] for token_id in ids])
        if self._is_between and data.isascii():
            return data.decode("ascii")
        text = self._utf8.decode(data)
        self._is_between = not self._utf8.getstate()[0]
        return text

    def pending(self) -> str:
        return ""

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class _TextSource:
    """Text tokens, with runs of byte tokens between them.

    A run counts as a whole: one bad byte turns each of its bytes into U+FFFD, so it is held until it ends."""

    def __init__(self, pieces: TextPieces, separator: str) -> None:
        self._pieces, self._separator = pieces, separator
        self._is_first = True
        self._run = bytearray()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("strict")
        self._run_text: str | None = ""  # the run's complete characters; None: the run is not UTF-8

    def push(self, ids: Sequence[int]) -> str:
        out: list[str] = []
        for token_id in ids:
            piece = self._pieces.first(token_id) if self._is_first else self._pieces[token_id]
            if piece is None:
                continue
            if isinstance(piece, int):
                self._push_byte(piece)
            else:
                if self._run:
                    out.append(self._end_run())
                if self._separator and not self._is_first:
                    out.append(self._separator)
                out.append(piece)
            self._is_first = False
        return "".join(out)

    def _push_byte(self, value: int) -> None:
        self._run.append(value)
        if self._run_text is not None:
            try:
                self._run_text += self._utf8.decode(bytes((value,)))
            except UnicodeDecodeError:
                self._run_text = None

    def _end_run(self) -> str:
        try:
            text = self._run.decode()
        except UnicodeDecodeError:
            text = "\ufffd" * len(self._run)
        self._run.clear()
        self._utf8.reset()
        self._run_text = ""
        return text

    def pending(self) -> str:
        return self._run_text or ""

    def finish(self) -> str:
        return self._end_run()


class _LibrarySource:
    """Decoders without a plan: the tokenizers library's own stream. Where that gives up (a decoder that
    changes text already given out), the rest comes at the end, from one decode of all ids."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer, self._skip_special_tokens = tokenizer, skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._ids: list[int] = []
        self._num_given = 0
        self._is_broken = False

    def push(self, ids: Sequence[int]) -> str:
        self._ids.extend(ids)
        parts: list[str] = []
        for token_id in ids if not self._is_broken else ():
            try:
                parts.append(self._stream.step(self._tokenizer, token_id) or "")
            except Exception:  # the library raises nothing more special
                self._is_broken = True
                break
        text = "".join(parts)
        self._num_given += len(text)
        return text

    def pending(self) -> str:
        return ""

    def finish(self) -> str:
        whole = self._tokenizer.decode(self._ids, skip_special_tokens=self._skip_special_tokens)
        return whole[self._num_given :]


class _StripLeft:
    """Takes up to `count` of one character off the start of the text."""

    def __init__(self, character: str, count: int) -> None:
        self._character, self._count = character, count

    def peek(self, text: str) -> str:
        num_off = 0
        while num_off < min(self._count, len(text)) and text[num_off] == self._character:
            num_off += 1
        return text[num_off:]

    def push(self, text: str) -> str:
        if not self._count or not text:
            return text
        rest = self.peek(text)
        self._count = 0 if rest else self._count - len(text)
        return rest

    def finish(self) -> str:
        return ""


class _Replace:
    """str.replace on a text that comes in parts: what may be the beginning of `old` is held back."""

    def __init__(self, old: str, new: str) -> None:
        self._old, self._new = old, new
        self._held = ""

    def peek(self, text: str) -> str:
        return (self._held + text).replace(self._old, self._new)

    def push(self, text: str) -> str:
        *done, rest = (self._held + text).split(self._old)
        num_held = min(len(self._old) - 1, len(rest))
        while num_held and not self._old.startswith(rest[len(rest) - num_held :]):
            num_held -= 1
        self._held = rest[len(rest) - num_held :]
        return self._new.join([*done, rest[: len(rest) - num_held]])

    def finish(self) -> str:
        held, self._held = self._held, ""
        return held


class Detokenizer:
    """One text on its way out. Not for two threads at once."""

    def __init__(self, source: _Source, stages: Sequence[_Stage]) -> None:
        self._source, self._stages = source, stages
        self.push: Callable[[Sequence[int]], str] = self._push if stages else source.push
        """The text that the next ids settle (often one token's, sometimes none, sometimes more)."""

    def _push(self, ids: Sequence[int]) -> str:
        text = self._source.push(ids)
        for stage in self._stages:
            text = stage.push(text)
        return text

    def tail(self) -> str:
        """Text held back that would follow if no id came any more, without broken characters; changes
        nothing."""
        text = self._source.pending()
        for stage in self._stages:
            text = stage.peek(text)
        return text

    def finish(self) -> str:
        """The rest of the text; a character that stays incomplete is U+FFFD."""
        text = self._source.finish()
        for stage in self._stages:
            text = stage.push(text) + stage.finish()
        return text


class DetokenizerFactory:
    """Makes detokenizers of one tokenizer; they share what each id stands for."""

    def __init__(self, tokenizer: Tokenizer, has_space_cleanup: bool) -> None:
        self._tokenizer = tokenizer
        self._has_space_cleanup = has_space_cleanup
        self._plan: DecodePlan = decode_plan(tokenizer)
        special = frozenset(
            token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special
        )
        self._skipped = {True: special, False: frozenset[str]()}
        self._byte_pieces = {skip: BytePieces(tokenizer, self._skipped[skip]) for skip in (True, False)}
        self._text_pieces = {
            skip: TextPieces(tokenizer, self._skipped[skip], self._plan) for skip in (True, False)
        }

    def make(self, skip_special_tokens: bool = True) -> Detokenizer:
        """A detokenizer at the start of a text."""
        source: _Source
        if self._plan.kind == "bytes":
            source = _ByteSource(self._byte_pieces[skip_special_tokens])
        elif self._plan.kind == "text":
            source = _TextSource(self._text_pieces[skip_special_tokens], self._plan.separator)
        else:
            source = _LibrarySource(self._tokenizer, skip_special_tokens)
        stages: list[_Stage] = [_StripLeft(character, count) for character, count in self._plan.left_strips]
        if self._has_space_cleanup:
            stages.extend(_Replace(old, new) for old, new in SPACE_CLEANUP)
        return Detokenizer(source, stages)


def clean_up_spaces(text: str) -> str:
    """The same clean-up of a whole text."""
    for old, new in SPACE_CLEANUP:
        text = text.replace(old, new)
    return text
