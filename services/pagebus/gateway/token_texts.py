"""What a single token stands for: its true bytes, and the text that shows it beside a log-probability.

Knows nothing of the text around a token; that is the detokenizer's.
"""

from tokenizers import Tokenizer

from pagebus.gateway.pieces import BytePieces, TextPieces, decode_plan

_NOTHING_SKIPPED: frozenset[str] = frozenset()


class TokenTexts:
    """One tokenizer's. Ids without a token are empty; special tokens are shown as they are spelled."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        plan = decode_plan(tokenizer)
        self._byte_pieces = BytePieces(tokenizer, _NOTHING_SKIPPED) if plan.kind == "bytes" else None
        self._text_pieces = TextPieces(tokenizer, _NOTHING_SKIPPED, plan) if plan.kind == "text" else None
        self._texts: dict[int, str] = {}

    def data(self, token_id: int) -> bytes:
        """The bytes that the token adds to a text, also where these are no complete character."""
        if self._byte_pieces is not None:
            return self._byte_pieces[token_id]
        if self._text_pieces is None:
            return self._tokenizer.decode([token_id], skip_special_tokens=False).encode()
        piece = self._text_pieces[token_id]
        if isinstance(piece, int):
            return bytes((piece,))
        return (piece or "").encode()

    def text(self, token_id: int) -> str:
        """The same as text; bytes that are no complete character are U+FFFD."""
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self.data(token_id).decode(errors="replace")
        return text
