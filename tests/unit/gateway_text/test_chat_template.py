"""Chat templates: what they get, what comes out, and what is the client's fault."""

import time

import pytest

from pagebus.gateway import chat_template
from pagebus.gateway.chat_template import ChatTemplate, ChatTemplates
from pagebus.gateway.text_errors import ChatTemplateError, TokenizerLoadError
from tests.support.tokenizers import CHATML, INSTRUCT

HELLO = [{"role": "user", "content": "hello"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
LOOP = (
    "{% for m in messages %}"
    "{% for part in m['content'] %}[{{ part['type'] }}:{{ part['text'] }}]{% endfor %}{% endfor %}"
)
EITHER = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}<{{ part.text }}>{% endfor %}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("source", "rendered"),
    [
        ("{{ messages[0].content }}", "hello"),
        ("{% if true %}\n  x\n{% endif %}\n", "  x\n"),  # trim_blocks and lstrip_blocks
        ("{{ {'a': '<é>'} | tojson }}", '{"a": "<é>"}'),  # not escaped for HTML
        ("{{ {'b': 1, 'a': [1]} | tojson(indent=1, sort_keys=true) }}", '{\n "a": [\n  1\n ],\n "b": 1\n}'),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("a{% generation %}b{% endgeneration %}c", "abc"),
        ("{% set ns = namespace(n=1) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ dict(a=1).a }}", "21"),
        ("{{ strftime_now('%%') }}", "%"),
        ("{{ bos_token }}{{ missing }}{{ add_generation_prompt }}{{ tools }}", "<s>TrueNone"),
        ("{{ 'ab' * 3 }}{{ 2 ** 3 }}", "ababab8"),
    ],
)
def test_rendering(source: str, rendered: str) -> None:
    assert ChatTemplate(source).render(HELLO, variables={"bos_token": "<s>"}) == rendered


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must\nalternate') }}", "roles must alternate"),
        ("{{ messages[0]['nothing']['x'] }}", "nothing"),
        ("{{ messages[0].content + 1 }}", "str"),
        ("{{ messages[0].__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% set ns = namespace(_x=1) %}", "underscore"),
        ("{{ 'aaaaaaaaaaaaaaaa' * 1000000 }}", "too long a text"),
        ("{% for i in range(100000) %}{{ 'a' * 100 }}{% endfor %}", "more than"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "nested too deep"),
        ("{{ 9 ** 9999999 }}", "too large a number"),
    ],
)
def test_faults(source: str, message: str) -> None:
    with pytest.raises(ChatTemplateError, match=message):
        ChatTemplate(source).render(HELLO)


def test_time_is_bounded_without_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_RENDER_S", 0.2)
    source = (
        "{% for a in range(99999) %}{% for b in range(99999) %}"
        "{% if messages[0].role == 'x' %}{{ a }}{% endif %}"
        "{% endfor %}{% endfor %}"
    )
    start = time.monotonic()
    with pytest.raises(ChatTemplateError, match="too long"):
        ChatTemplate(source).render(HELLO)
    assert time.monotonic() - start < 2
    assert ChatTemplate("{{ messages[0].role }}").render(HELLO) == "user"  # the next one has its own time


def test_a_template_that_does_not_compile_is_our_fault() -> None:
    with pytest.raises(TokenizerLoadError, match="'default'"):
        ChatTemplates({"default": "{% for %}"})


@pytest.mark.parametrize(
    ("source", "messages", "rendered"),
    [
        ("{{ messages[0].content }}", PARTS, "a\nb"),
        (LOOP, PARTS, "[text:a][text:b]"),
        (LOOP, HELLO, "[text:hello]"),  # a template that knows parts only would lose a string
        (EITHER, PARTS, "<a><b>"),
        (EITHER, HELLO, "hello"),
        ("{% set c = messages[0]['content'] %}{% for p in c %}{{ p.text }};{% endfor %}", HELLO, "hello;"),
    ],
)
def test_text_parts(source: str, messages: list[dict[str, object]], rendered: str) -> None:
    assert ChatTemplate(source).render(messages) == rendered


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is empty"),
        (["hi"], r"messages\[0\] is not an object"),
        ([{"role": "user", "content": 5}], r"messages\[0\].content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "image_url"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], "not a string"),
        ([{"role": "user", "content": [3]}], r"content\[0\]"),
    ],
)
def test_messages_that_are_refused(messages: list[dict[str, object]], message: str) -> None:
    with pytest.raises(ChatTemplateError, match=message):
        ChatTemplate(CHATML).render(messages)


def test_null_fields_count_as_absent_and_reasoning_has_both_names() -> None:
    source = (
        "{{ messages[0].content is defined }} {{ messages[0].reasoning_content }} {{ messages[0].thinking }}"
    )
    message = {"role": "assistant", "content": None, "reasoning": "hm"}
    assert ChatTemplate(source).render([message]) == "False hm hm"
    assert message == {"role": "assistant", "content": None, "reasoning": "hm"}  # the caller's stays as it is


def test_continue_final_message() -> None:
    chat = [*HELLO, {"role": "assistant", "content": "It is "}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    chatml = ChatTemplate(CHATML).render(chat, **options)
    assert chatml.endswith("<|im_start|>assistant\nIt is")  # this template trims
    instruct = ChatTemplate(INSTRUCT).render(
        chat, **options, variables={"bos_token": "", "eos_token": "</s>"}
    )
    assert instruct == "[INST] hello [/INST] It is "
    with pytest.raises(ChatTemplateError, match="exclude each other"):
        ChatTemplate(CHATML).render(chat, continue_final_message=True)
    with pytest.raises(ChatTemplateError, match="does not show"):
        ChatTemplate("no content here").render(chat, **options)
    with pytest.raises(ChatTemplateError, match="no text"):
        ChatTemplate(CHATML).render([{"role": "assistant"}], **options)


def test_named_templates() -> None:
    templates = ChatTemplates({"default": "d", "tool_use": "t"})
    assert templates.choose(has_tools=False).render(HELLO) == "d"
    assert templates.choose(has_tools=True).render(HELLO) == "t"
    with pytest.raises(ChatTemplateError, match="no chat template"):
        ChatTemplates({}).choose(has_tools=False)
