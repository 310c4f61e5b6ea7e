"""What decides how a NATS client's request is read, before all of it is."""

from typing import Annotated

import msgspec
from msgspec import Meta

from pagebus.bus import subjects
from pagebus.gateway import errors
from pagebus.gateway.limits import MAX_CHOICES
from pagebus.gateway.openai_types import TokenCount

_NULL = b"null"


class ApiHead(msgspec.Struct, frozen=True, kw_only=True):
    """`have`: a running request is joined again by somebody who has so many tokens of each choice, and
    `have_prompt` places of the prompt's log-probabilities."""

    id: str
    messages: msgspec.Raw = msgspec.Raw(_NULL)
    prompt: msgspec.Raw = msgspec.Raw(_NULL)
    seed: msgspec.Raw = msgspec.Raw(_NULL)
    have: Annotated[list[TokenCount], Meta(min_length=1, max_length=MAX_CHOICES)] | None = None
    have_prompt: TokenCount = 0

    @property
    def has_prompt(self) -> bool:
        """Whether the request could begin."""
        return bytes(self.messages) != _NULL or bytes(self.prompt) != _NULL

    @property
    def has_seed(self) -> bool:
        """Whether the request gives the same tokens wherever, and however often, it begins."""
        return bytes(self.seed) != _NULL


def read_head(data: bytes, max_bytes: int) -> ApiHead:
    """The head of a request of at most `max_bytes`; raises `ApiError`."""
    if len(data) > max_bytes:
        raise errors.ApiError(413, f"the request exceeds {max_bytes} bytes")
    try:
        head = msgspec.json.decode(data, type=ApiHead)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise errors.from_decode_error(error) from None
    if not subjects.is_part(head.id):
        raise errors.invalid("id must match [A-Za-z0-9_-]{1,64}", "id")
    return head
