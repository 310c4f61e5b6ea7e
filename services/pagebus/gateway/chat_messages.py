"""Chat messages as clients send them, made into what templates expect: text parts, empty fields, names of
reasoning.

Knows a little of how templates look at a message's content, nothing of rendering.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from jinja2 import nodes

from pagebus.gateway.text_errors import ChatTemplateError

JsonMap = dict[str, object]

ContentForm = Literal["text", "parts", "both"]
"""What a template takes as a message's content: a string, a list of parts, or either."""

_TYPE_TESTS = frozenset(("string", "iterable", "sequence", "mapping"))
_TEXT_TYPES = frozenset(("text", "input_text", "output_text"))


def content_form(tree: nodes.Template) -> ContentForm:
    """Whether a template walks over the parts of a content, and whether it looks if it has to."""
    names = {"content"}
    for assign in tree.find_all(nodes.Assign):
        if isinstance(assign.target, nodes.Name) and _is_content(assign.node, names):
            names.add(assign.target.name)
    if not any(_is_content(loop.iter, names) for loop in tree.find_all(nodes.For)):
        return "text"
    tests = tree.find_all(nodes.Test)
    has_test = any(test.name in _TYPE_TESTS and _is_content(test.node, names) for test in tests)
    return "both" if has_test else "parts"


def _is_content(node: nodes.Node, names: set[str]) -> bool:
    """`message.content`, `message['content']`, a name for it, or one of these through a filter."""
    while isinstance(node, nodes.Filter) and node.node is not None:
        node = node.node
    if isinstance(node, nodes.Name):
        return node.name in names
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    return (
        isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) and node.arg.value == "content"
    )


def prepare_messages(messages: Sequence[Mapping[str, object]], form: ContentForm) -> list[JsonMap]:
    """Fresh messages for a template of this form: fields that are null left out, as transformers does, since
    many templates show them as "None"; reasoning under both its usual names. Raises ChatTemplateError."""
    if not messages:
        raise ChatTemplateError("messages is empty: at least one is needed")
    prepared: list[JsonMap] = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ChatTemplateError(f"messages[{index}] is not an object")
        fresh = {key: value for key, value in message.items() if value is not None}
        if "content" in fresh:
            fresh["content"] = _content(fresh["content"], form, index)
        reasoning = next(
            (fresh[key] for key in ("reasoning_content", "thinking", "reasoning") if key in fresh), None
        )
        if reasoning is not None:
            fresh = {"thinking": reasoning, **fresh, "reasoning_content": reasoning}
        prepared.append(fresh)
    return prepared


def _content(content: object, form: ContentForm, index: int) -> object:
    """A string stays one unless the template would not see it; parts are checked, and joined with line ends
    for templates that take a string."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if form == "parts" else content
    if not isinstance(content, list):
        raise ChatTemplateError(f"messages[{index}].content is neither a string nor a list of parts")
    texts = [_part_text(part, f"messages[{index}].content[{number}]") for number, part in enumerate(content)]
    if form == "text":
        return "\n".join(texts)
    return [{"type": "text", "text": text} for text in texts]


def _part_text(part: object, where: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise ChatTemplateError(f"{where} is neither a string nor an object")
    text = part.get("text")
    kind = part.get("type", "text")
    if kind in _TEXT_TYPES and isinstance(text, str):
        return text
    if kind == "refusal" and isinstance(part.get("refusal"), str):
        return str(part["refusal"])
    if kind in _TEXT_TYPES:
        raise ChatTemplateError(f"{where}.text is not a string")
    raise ChatTemplateError(
        f"{where}: parts of type {kind!r:.80} are not supported, this model takes text only"
    )


def final_text(message: JsonMap) -> tuple[str, Callable[[str], None]]:
    """The text that a final message ends with, and how to put another in its place."""
    content = message.get("content")
    if isinstance(content, str):
        return content, lambda text: message.update(content=text)
    if isinstance(content, list) and content:
        part = content[-1]
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            return part["text"], lambda text: part.update(text=text)
    raise ChatTemplateError("continue_final_message: the final message has no text to go on from")
