"""What a settings struct offers to set: one `Option` a field, with its flag, variable, key and bounds.

It knows neither argparse nor where values come from.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from pagebus.settings.structs import (
    CommonSettings,
    ExecutorSettings,
    GatewaySettings,
    SchedulerSettings,
    ServeSettings,
)

SERVICES: dict[str, type[CommonSettings]] = {
    "gateway": GatewaySettings,
    "scheduler": SchedulerSettings,
    "executor": ExecutorSettings,
    "serve": ServeSettings,
}
"""The settings of every command that takes them; also the names of TOML tables."""

_SECTIONS: dict[type, str] = {
    CommonSettings: "common",
    GatewaySettings: "gateway",
    SchedulerSettings: "scheduler",
    ExecutorSettings: "executor",
    ServeSettings: "processes",
}
_SECRETS = frozenset({"api_key"})


class SettingsError(Exception):
    """A setting is wrong. The text is one sentence that names the flag, variable or key and the value."""


@dataclass(frozen=True)
class Option:
    """One field of a settings struct."""

    key: str  # the field's name, which is the TOML key as well
    section: str  # the heading in the help under which it stands
    type: object  # the field's annotation, bounds included
    default: object
    description: str

    @property
    def flag(self) -> str:
        """`--max-model-len` for `max_model_len`."""
        return "--" + self.key.replace("_", "-")

    @property
    def variable(self) -> str:
        """`PAGEBUS_MAX_MODEL_LEN` for `max_model_len`."""
        return "PAGEBUS_" + self.key.upper()

    @property
    def is_list(self) -> bool:
        """Whether several values may be given."""
        return get_origin(_bare(self.type)) is tuple

    @property
    def is_switch(self) -> bool:
        """Whether the flag takes no value."""
        return _bare(self.type) is bool

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that are allowed; none: anything of the type."""
        bare = _bare(self.type)
        return tuple(str(choice) for choice in get_args(bare)) if get_origin(bare) is Literal else ()

    @property
    def is_secret(self) -> bool:
        """Whether values must not be shown, in errors or elsewhere."""
        return self.key in _SECRETS

    def convert(self, value: object, source: str, *, is_text: bool) -> object:
        """`value` as the field's type; `is_text`: it was written as text (flag, variable).

        Raises `SettingsError` naming `source` and the value.
        """
        if self.is_list and isinstance(value, str):
            value = [value]
        try:
            return msgspec.convert(value, self.type, strict=not is_text)
        except msgspec.ValidationError:
            shown = "the value" if self.is_secret else _shorten(repr(value))
            raise SettingsError(f"{source}: {shown} is not {self.expected()}") from None

    def expected(self) -> str:
        """The values that are allowed, in words."""
        bare = _bare(self.type)
        if self.choices:
            return self.choices[0] if len(self.choices) == 1 else "one of " + ", ".join(self.choices)
        if bare is bool:
            return "true or false"
        if bare is int or bare is float:
            return ("a whole number" if bare is int else "a number") + _bounds(self.type)
        return "text of at most 4,096 characters"


def options(settings: type[CommonSettings]) -> list[Option]:
    """The options of a settings struct, common ones first, each once."""
    hints = get_type_hints(settings, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(settings)}
    found: dict[str, Option] = {}
    for owner, section in _SECTIONS.items():
        for key in vars(owner).get("__annotations__", {}) if issubclass(settings, owner) else ():
            if key in fields and key not in found:
                description = next((m.description for m in _metas(hints[key]) if m.description), "")
                found[key] = Option(key, section, hints[key], fields[key].default, description)
    return list(found.values())


def _metas(annotation: object) -> Iterator[Meta]:
    """The `Meta`s around and inside an annotation, as far as `Annotated` nests."""
    if get_origin(annotation) is Annotated:
        inner, *rest = get_args(annotation)
        yield from (meta for meta in rest if isinstance(meta, Meta))
        yield from _metas(inner)


def _bare(annotation: object) -> object:
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    return annotation


def _bounds(annotation: object) -> str:
    least = next((m.ge for m in _metas(annotation) if m.ge is not None), None)
    above = next((m.gt for m in _metas(annotation) if m.gt is not None), None)
    most = next((m.le for m in _metas(annotation) if m.le is not None), None)
    words = ""
    if least is not None:
        words = f" from {least}"
    elif above is not None:
        words = f" above {above}"
    return words + (f" to {most}" if most is not None else "")


def _shorten(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."
