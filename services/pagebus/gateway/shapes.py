"""What the answers of all routes share: one id, one time and one name for the whole and for every chunk."""

import time
from typing import ClassVar

from pagebus.gateway.request_ids import new_request_id
from pagebus.gateway.sse import ChunkTemplate


class AnswerShape:
    """Base of one answer's bodies."""

    is_chat: ClassVar[bool]
    id_prefix: ClassVar[str]
    chunk_kind: ClassVar[str]

    def __init__(self, model: str, fingerprint: str) -> None:
        self._id = self.id_prefix + new_request_id()
        self._created = int(time.time())
        self._model = model
        self._fingerprint = fingerprint

    def chunks(self, has_usage: bool) -> ChunkTemplate:
        """The template of a stream's chunks."""
        return ChunkTemplate(
            answer_id=self._id,
            kind=self.chunk_kind,
            created=self._created,
            model=self._model,
            fingerprint=self._fingerprint,
            is_chat=self.is_chat,
            usage=has_usage,
        )
