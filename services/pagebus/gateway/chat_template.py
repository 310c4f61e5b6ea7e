"""A model's chat template: messages in, prompt text out, as transformers' apply_chat_template renders it.

Templates come with the model, messages from anybody: rendering happens in a sandbox, within a size and a
time. Knows nothing of tokens.
"""

import json
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import cast

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from pagebus.gateway.chat_messages import ContentForm, JsonMap, content_form, final_text, prepare_messages
from pagebus.gateway.text_errors import ChatTemplateError, TokenizerLoadError

MAX_CHARACTERS = 8 << 20
MAX_RENDER_S = 5.0
_CHECK_EVERY = 512  # attribute look-ups between two looks at the clock

_CONTINUE_MARK = (
    "PAGEBUS_CONTINUES_HERE "  # ends in a space: where a template trims it, the text is trimmed too
)
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


class _RenderLimit(Exception):  # noqa: N818 - not an error of anybody's code
    pass


class _Deadline(threading.local):
    """When the render of this thread must be done (monotonic seconds), and its look-ups so far."""

    at_s = float("inf")
    num_lookups = 0

    def check(self) -> None:
        self.num_lookups += 1
        if self.num_lookups % _CHECK_EVERY == 0 and time.monotonic() > self.at_s:
            raise _RenderLimit("it takes too long")


class _Sandbox(ImmutableSandboxedEnvironment):
    """Looks at the clock now and then, and refuses to multiply strings into huge ones."""

    intercepted_binops = frozenset(("*", "**"))
    deadline = _Deadline()

    def getattr(self, obj: object, attribute: str) -> object:
        self.deadline.check()
        return super().getattr(obj, attribute)

    def getitem(self, obj: object, argument: object) -> object:
        self.deadline.check()
        return super().getitem(obj, cast("str", argument))

    def call(self, context: Context, obj: object, /, *args: object, **kwargs: object) -> object:
        self.deadline.check()
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: object, right: object) -> object:
        length = max(_product_length(left, right), _product_length(right, left))
        if operator == "*" and length > MAX_CHARACTERS:
            raise _RenderLimit("it makes too long a text")
        if operator == "**" and isinstance(left, int) and isinstance(right, int) and right > 1024:
            raise _RenderLimit("it makes too large a number")
        return super().call_binop(context, operator, left, right)


def _product_length(sequence: object, count: object) -> int:
    if isinstance(sequence, (str, list, tuple)) and isinstance(count, int):
        return len(sequence) * count
    return 0


class _GenerationTag(Extension):
    """`{% generation %} ... {% endgeneration %}` marks what the assistant wrote, for training: it renders as
    it is."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_render", []), [], [], body).set_lineno(line)

    def _render(self, caller: Macro) -> str:
        return str(caller())


class _TemplateDict:
    """`dict(...)` in templates, without the class behind it."""

    def __call__(self, *args: object, **kwargs: object) -> dict[object, object]:
        return cast("Callable[..., dict[object, object]]", dict)(*args, **kwargs)

    def fromkeys(self, keys: Sequence[object], value: object = None) -> dict[object, object]:
        return dict.fromkeys(keys, value)


class _TemplateNamespace(Namespace):
    """`namespace(...)` in templates; names that begin with an underscore could reach into the interpreter."""

    def __init__(*args: object, **kwargs: object) -> None:  # `self` is a name that templates may use
        first, *rest = args
        own = cast("_TemplateNamespace", first)
        for name in cast("Callable[..., dict[object, object]]", dict)(*rest, **kwargs):
            _TemplateNamespace._check(name)
        Namespace.__init__(own, *rest, **kwargs)

    def __setitem__(self, name: str, value: object) -> None:
        _TemplateNamespace._check(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"namespace attribute {name!r} begins with an underscore")


def _raise_exception(message: object) -> str:
    raise jinja2.exceptions.TemplateError(str(message))


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@lru_cache(maxsize=1)
def _sandbox() -> _Sandbox:
    sandbox = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
    sandbox.filters["tojson"] = _tojson
    sandbox.globals.update(
        raise_exception=_raise_exception,
        strftime_now=_strftime_now,
        dict=_TemplateDict(),
        namespace=_TemplateNamespace,
    )
    return sandbox


class ChatTemplate:
    """One template, compiled once; `render` may be called from several threads."""

    def __init__(self, source: str, name: str = "chat template") -> None:
        """Raises TokenizerLoadError with the line for a template that does not compile."""
        self.source = source
        try:
            tree = _sandbox().parse(source)
            self._template = _sandbox().from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise TokenizerLoadError(f"{name}: not a Jinja template ({_one_line(error)})") from error
        self.content_form: ContentForm = content_form(tree)

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, object] | None = None,
    ) -> str:
        """The prompt. `variables`: special tokens and what the client passes (chat_template_kwargs).

        Raises ChatTemplateError where the messages or the template's answer to them are at fault."""
        if continue_final_message and add_generation_prompt:
            raise ChatTemplateError("continue_final_message and add_generation_prompt exclude each other")
        chat = prepare_messages(messages, self.content_form)
        final = self._mark_end(chat) if continue_final_message else ""
        context: dict[str, object] = {
            **(variables or {}),
            "messages": chat,
            "tools": tools,
            "documents": (variables or {}).get("documents"),
            "add_generation_prompt": add_generation_prompt,
        }
        text = self._render(context)
        return _cut_at_mark(text, final) if continue_final_message else text

    def _mark_end(self, chat: list[JsonMap]) -> str:
        """Appends a mark to the last message's text; returns the text without it."""
        final = chat[-1]
        text, put_back = final_text(final)
        if not re.search(r"\bcontent\b", self.source):
            raise ChatTemplateError(
                "continue_final_message: the chat template does not show the message's content"
            )
        put_back(text + _CONTINUE_MARK)
        for field in _REASONING_FIELDS:  # a copy under another name goes on as well
            if final.get(field) == text:
                final[field] = text + _CONTINUE_MARK
        return text

    def _render(self, context: dict[str, object]) -> str:
        deadline = _Sandbox.deadline
        deadline.at_s = time.monotonic() + MAX_RENDER_S
        parts: list[str] = []
        num_characters = 0
        try:
            for part in self._template.generate(context):
                num_characters += len(part)
                if num_characters > MAX_CHARACTERS:
                    raise _RenderLimit(f"it makes more than {MAX_CHARACTERS} characters")
                if time.monotonic() > deadline.at_s:
                    raise _RenderLimit("it takes too long")
                parts.append(part)
        except _RenderLimit as error:
            raise ChatTemplateError(
                f"the chat template cannot be rendered for these messages: {error}"
            ) from error
        except RecursionError as error:
            raise ChatTemplateError(
                "the chat template cannot be rendered: the messages are nested too deep"
            ) from error
        except Exception as error:  # templates run on whatever the client sent: any exception can come out
            raise ChatTemplateError(
                f"the chat template refuses these messages: {_one_line(error)}"
            ) from error
        finally:
            deadline.at_s = float("inf")
        return "".join(parts)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())[:500]
    return text or type(error).__name__


def _cut_at_mark(rendered: str, final: str) -> str:
    """Ends the prompt where the final message ends; trims it there where the template trimmed the message."""
    mark = _CONTINUE_MARK.strip()
    at = rendered.rfind(mark)
    if at < 0 or final.strip() not in rendered:
        raise ChatTemplateError(
            "continue_final_message: the chat template does not show the final message as it is"
        )
    if rendered.startswith(_CONTINUE_MARK, at):
        return rendered[:at]
    return rendered[:at].rstrip()


class ChatTemplates:
    """A model's templates by name."""

    def __init__(self, sources: Mapping[str, str]) -> None:
        """Compiles them all; raises TokenizerLoadError for one that does not compile."""
        self._templates = {
            name: ChatTemplate(source, f"chat template {name!r}") for name, source in sources.items()
        }

    def __bool__(self) -> bool:
        return bool(self._templates)

    def choose(self, has_tools: bool) -> ChatTemplate:
        """ "tool_use" for chats with tools where there is one, else "default"."""
        if has_tools and "tool_use" in self._templates:
            return self._templates["tool_use"]
        if "default" in self._templates:
            return self._templates["default"]
        raise ChatTemplateError(
            "this model has no chat template: use /v1/completions, or start the gateway with --chat-template"
        )
