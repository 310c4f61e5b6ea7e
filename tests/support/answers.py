"""Checks of answers against the OpenAI SDK's own types, and streams as events."""

import json


def strictly(kind, body: dict) -> None:
    """Validate against the SDK's type, and refuse keys that it does not declare."""
    kind.model_validate(body, strict=True)
    assert no_extras(kind.model_validate(body)) == []


def no_extras(value, path: str = "") -> list[str]:
    """Paths of keys that no declared field took."""
    if isinstance(value, list):
        return [found for index, item in enumerate(value) for found in no_extras(item, f"{path}[{index}]")]
    if not hasattr(value, "model_extra"):
        return []
    found = [f"{path}.{key}" for key in (value.model_extra or {})]
    for name in type(value).model_fields:
        found += no_extras(getattr(value, name), f"{path}.{name}")
    return found


def events(text: str) -> list[dict]:
    """The JSON events of a stream that must end with [DONE]."""
    blocks = [block for block in text.split("\n\n") if block and not block.startswith(":")]
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    assert blocks[-1] == "data: [DONE]"
    return [json.loads(block[6:]) for block in blocks[:-1]]
