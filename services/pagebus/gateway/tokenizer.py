"""A model's tokenizer: text and chats to ids, ids to text, with exactly transformers' ids, but without
transformers.

Owns the threads that long texts are encoded in. Knows nothing of requests.
"""

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from pagebus.gateway.backend import Backend, load_backend
from pagebus.gateway.chat_template import ChatTemplates
from pagebus.gateway.detokenizer import Detokenizer, DetokenizerFactory, clean_up_spaces
from pagebus.gateway.model_text import JsonObject, ModelText, eos_token_ids, logits_width, read_model_text
from pagebus.gateway.text_errors import InvalidTextError, TextError, TokenizerBusyError, TokenizerLoadError
from pagebus.gateway.text_stream import TextStream
from pagebus.gateway.token_texts import TokenTexts

LONG_TEXT = 2_000  # characters; below, encoding takes less than a millisecond and stays on the loop
MAX_WAITING = 64 << 20  # characters that may wait for a thread or be in one
NUM_THREADS = 2

_Result = TypeVar("_Result")
Messages = Sequence[Mapping[str, object]]


def check_text(text: str, what: str = "the text") -> None:
    """Raises InvalidTextError where text has no UTF-8 form, and so no tokens."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidTextError(
            f"{what} is not valid Unicode: a lone surrogate (U+{ord(text[error.start]):04X}) "
            f"at character {error.start}"
        ) from error


class Tokenizer:
    """One model's. `encode` and `decode` may be called from several threads."""

    def __init__(self, files: ModelText, backend: Backend) -> None:
        """From files that are read and a tokenizer that is built; most callers want `load`."""
        self._backend = backend.tokenizer
        self._special_tokens = dict(backend.special_tokens)
        self._has_space_cleanup = backend.has_space_cleanup
        self._templates = ChatTemplates(files.chat_templates)
        self.texts = TokenTexts(backend.tokenizer)
        """What single tokens stand for."""
        self.generation_config: JsonObject = files.generation_config
        """generation_config.json as it is."""
        self._detokenizers = DetokenizerFactory(backend.tokenizer, backend.has_space_cleanup)
        self._threads: ThreadPoolExecutor | None = None
        self._num_waiting = 0
        self.config: JsonObject = files.tokenizer_config
        """tokenizer_config.json as it is (GET /tokenizer_info shows it)."""
        self.chat_template_sources: Mapping[str, str] = files.chat_templates
        self.bos_token_id = self._named_id("bos_token")
        self.eos_token_ids = eos_token_ids(files, self._named_id("eos_token"))
        """Every id that ends a turn."""
        self.vocab_size = logits_width(files, self._backend.get_vocab_size(with_added_tokens=True))
        """Ids below this may be sent by clients: the logits' width, which can exceed what the tokenizer
        knows."""

    @classmethod
    def load(cls, path: Path, chat_template_file: Path | None = None) -> "Tokenizer":
        """From a Hugging Face directory; a given template file replaces the model's templates.

        Raises TokenizerLoadError (one line, with the file's name) for what is missing or broken."""
        files = read_model_text(path, chat_template_file)
        return cls(files, load_backend(files))

    def _named_id(self, name: str) -> int | None:
        token = self._special_tokens.get(name)
        return None if token is None else self._backend.token_to_id(token)

    @property
    def has_chat_template(self) -> bool:
        """Whether chats can be encoded."""
        return bool(self._templates)

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """Special tokens by name ("bos_token"), as chat templates see them."""
        return self._special_tokens

    def token(self, token_id: int) -> str | None:
        """The vocabulary's entry of an id (not its text); None where the tokenizer has none."""
        return self._backend.id_to_token(token_id) if 0 <= token_id < 1 << 31 else None

    # --- text to ids

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text, with BOS (and the like) where the model's tokenizer adds it. Raises
        InvalidTextError."""
        check_text(text)
        if len(text) < LONG_TEXT:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        # `encode` keeps the interpreter locked all the while; a batch of one does not, and leaves offsets out
        return self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def render_chat(
        self,
        messages: Messages,
        *,
        tools: Messages | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, object] | None = None,
    ) -> str:
        """The prompt text of a chat. Raises ChatTemplateError."""
        template = self._templates.choose(has_tools=tools is not None)
        return template.render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables={**self._special_tokens, **(template_kwargs or {})},
        )

    def encode_chat(
        self,
        messages: Messages,
        *,
        tools: Messages | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, object] | None = None,
    ) -> list[int]:
        """Ids of a chat: its prompt text, encoded without adding BOS, which templates write themselves.

        Special tokens spelled out in messages become special tokens, as in transformers. Raises
        ChatTemplateError and InvalidTextError."""
        text = self.render_chat(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_kwargs=template_kwargs,
        )
        return self.encode(text, add_special_tokens=False)

    async def encode_async(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """`encode`; a long text in a thread. Raises TokenizerBusyError where too much waits already."""
        if len(text) < LONG_TEXT:
            return self.encode(text, add_special_tokens)
        return await self._in_thread(len(text), lambda: self.encode(text, add_special_tokens))

    async def encode_chat_async(
        self,
        messages: Messages,
        *,
        tools: Messages | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, object] | None = None,
    ) -> list[int]:
        """`encode_chat`; a long chat in a thread. Raises TokenizerBusyError where too much waits already."""

        def work() -> list[int]:
            return self.encode_chat(
                messages,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                template_kwargs=template_kwargs,
            )

        num_characters = _num_characters([messages, tools or (), template_kwargs or {}])
        return work() if num_characters < LONG_TEXT else await self._in_thread(num_characters, work)

    async def _in_thread(self, num_characters: int, work: Callable[[], _Result]) -> _Result:
        if self._num_waiting and self._num_waiting + num_characters > MAX_WAITING:
            raise TokenizerBusyError(
                f"{self._num_waiting} characters wait to be tokenized already: try again soon"
            )
        if self._threads is None:
            self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="tokenize")
        future = self._threads.submit(work)
        self._num_waiting += num_characters
        loop = asyncio.get_running_loop()

        def done(_: object) -> None:
            # Counted down by the work's end, not the waiter's: a client that goes away does not free a thread
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody counts any more
                loop.call_soon_threadsafe(self._count_down, num_characters)

        wrapped = asyncio.wrap_future(future)
        future.add_done_callback(done)
        return await wrapped

    def _count_down(self, num_characters: int) -> None:
        self._num_waiting -= num_characters

    def close(self) -> None:
        """Ends the threads without waiting for texts that nobody waits for."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
            self._threads = None

    # --- ids to text

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ids, all at once; ids that the tokenizer does not know stand for nothing. Raises TextError
        for numbers that are no ids."""
        try:
            text = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        except (OverflowError, TypeError) as error:
            raise TextError(f"token ids are numbers from 0 to {self.vocab_size - 1}") from error
        return clean_up_spaces(text) if self._has_space_cleanup else text

    def detokenizer(self, skip_special_tokens: bool = True) -> Detokenizer:
        """A text that is decoded as its ids come."""
        return self._detokenizers.make(skip_special_tokens)

    def stream(
        self,
        stop: Sequence[str] = (),
        *,
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
        has_offsets: bool = False,
    ) -> TextStream:
        """The text of one choice as its ids come, cut at the first stop string (`TextStream`)."""
        detokenizer = self._detokenizers.make(skip_special_tokens)
        return TextStream(detokenizer, stop, include_stop, min_tokens, has_offsets)


def _num_characters(value: object, depth: int = 0) -> int:
    """Characters in a JSON value, roughly: what decides between loop and thread. Very deep values count as
    long."""
    if isinstance(value, str):
        return len(value)
    if depth > 50:
        return LONG_TEXT
    if isinstance(value, Mapping):
        return sum(len(str(key)) + 8 + _num_characters(item, depth + 1) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return sum(8 + _num_characters(item, depth + 1) for item in value)
    return 8


__all__ = ["Tokenizer", "TokenizerLoadError", "check_text"]
