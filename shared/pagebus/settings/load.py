"""Reads settings: a flag wins over its environment variable, that over the TOML file, that over the default.

Flags come from the structs by argparse, not by typer: measured, `--help` through typer took 0.18 to 0.32 s
and through argparse 0.03 s, and a command that answers at once is worth more than colours.
"""

import argparse
import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

import msgspec

from pagebus.settings.options import SERVICES, Option, SettingsError, options
from pagebus.settings.structs import CommonSettings

S = TypeVar("S", bound=CommonSettings)

CONFIG_VARIABLE = "PAGEBUS_CONFIG"
_TITLES = {
    "common": "all services",
    "gateway": "gateway: HTTP and text",
    "scheduler": "scheduler: batches and KV blocks",
    "executor": "executor: tensors",
    "processes": "processes",
}
_EPILOG = """Every flag has an environment twin (PAGEBUS_MAX_MODEL_LEN for --max-model-len) and a key of the
same name in the TOML file (max_model_len). A flag wins over the variable, the variable over the file."""


class HelpWanted(Exception):  # noqa: N818 - no error
    """--help was given; the text is the help."""


def read_settings(settings: type[S], arguments: Sequence[str], environ: Mapping[str, str]) -> S:
    """The settings of a struct in `SERVICES`, from flags, environment and file.

    Raises `SettingsError` for anything that is wrong, and `HelpWanted` for --help.
    """
    service = next(name for name, struct in SERVICES.items() if struct is settings)
    offered = {option.key: option for option in options(settings)}
    flags, config = _from_flags(service, list(offered.values()), arguments)
    config = config or environ.get(CONFIG_VARIABLE, "")
    values = from_file(service, Path(config)) if config else {}
    values |= from_environment(offered, environ)
    values |= flags
    return settings(**values)  # type: ignore[arg-type]  # each value was converted to its field's type


def from_environment(offered: Mapping[str, Option], environ: Mapping[str, str]) -> dict[str, object]:
    """Values of the PAGEBUS_ variables that are set and not empty.

    A list is separated by commas, or is a JSON list. Raises `SettingsError`.
    """
    values: dict[str, object] = {}
    for key, option in offered.items():
        text = environ.get(option.variable, "")
        if text:
            value: object = _split(text, option) if option.is_list else text
            values[key] = option.convert(value, option.variable, is_text=True)
    return values


def to_environment(settings: CommonSettings) -> dict[str, str]:
    """The variables that make `from_environment` give these settings; defaults are left out."""
    variables: dict[str, str] = {}
    for option in options(type(settings)):
        value = vars(settings)[option.key]
        if value != option.default:
            is_text = isinstance(value, str)
            variables[option.variable] = value if is_text else msgspec.json.encode(value).decode()
    return variables


def from_file(service: str, path: Path) -> dict[str, object]:
    """Values that a TOML file gives to `service`: keys at the top for all, tables for one service.

    `serve` takes every table. Keys that no service knows are refused; `SettingsError` names them.
    """
    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise SettingsError(f"{path}: cannot read the settings file: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: not a TOML file: {error}") from None
    offered = {option.key: option for option in options(SERVICES[service])}
    known = {option.key: option for settings in SERVICES.values() for option in options(settings)}
    values: dict[str, object] = {}
    tables: dict[str, Mapping[str, object]] = {}
    for key, value in content.items():
        if key in SERVICES:
            if not isinstance(value, dict):
                raise SettingsError(f"{path}: {key} must be a table, [{key}]")
            tables[key] = value
        else:
            converted = _file_value(known, key, value, f"{path}: {key}")
            if key in offered:
                values[key] = converted
    own: dict[str, object] = {}
    for table, items in tables.items():
        allowed = {option.key: option for option in options(SERVICES[table])}
        for key, value in items.items():
            converted = _file_value(allowed, key, value, f"{path}: {table}.{key}")
            if service not in (table, "serve"):
                continue
            if own.setdefault(key, converted) != converted:
                raise SettingsError(f"{path}: {table}.{key}: {value!r} differs from another table's value")
    return values | own


def _file_value(allowed: Mapping[str, Option], key: str, value: object, source: str) -> object:
    if key not in allowed:
        raise SettingsError(f"{source}: no such setting{_suggestion(key, allowed)}")
    return allowed[key].convert(value, source, is_text=False)


def _split(text: str, option: Option) -> list[str]:
    if not text.startswith("["):
        return [part.strip() for part in text.split(",") if part.strip()]
    try:
        return msgspec.json.decode(text, type=list[str])
    except msgspec.MsgspecError:
        raise SettingsError(f"{option.variable}: starts with [ but is no JSON list of texts") from None


class _Parser(argparse.ArgumentParser):
    """argparse that raises instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise SettingsError(message.removeprefix("argument "))


class _Help(argparse.Action):
    """--help as an exception, so that the caller decides what to do with the text."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        raise HelpWanted(parser.format_help())


def make_parser(service: str, offered: Sequence[Option]) -> argparse.ArgumentParser:
    """The parser of a service's command; every value stays text until `Option.convert`."""
    parser = _Parser(
        prog=f"pagebus {service}",
        usage=f"pagebus {service} [MODEL] [flags]",
        epilog=_EPILOG,
        allow_abbrev=False,
        add_help=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "positional_model", nargs="?", metavar="MODEL", help="Hugging Face directory or hub id; none: bundled"
    )
    general = parser.add_argument_group("general")
    general.add_argument("-h", "--help", action=_Help, nargs=0, help="show this and end")
    general.add_argument("--config", metavar="FILE", help=f"TOML file with settings (or {CONFIG_VARIABLE})")
    groups: dict[str, argparse._ArgumentGroup] = {}
    for option in offered:
        if option.section not in groups:
            groups[option.section] = parser.add_argument_group(_TITLES[option.section])
        _add(groups[option.section], option)
    return parser


def _add(group: argparse._ArgumentGroup, option: Option) -> None:
    text = option.description.replace("%", "%%")
    if option.default not in ("", (), None, False):
        text += f" (default: {option.default})"
    if option.is_switch:
        group.add_argument(
            option.flag, dest=option.key, action=argparse.BooleanOptionalAction, help=text.replace("%%", "%")
        )
    elif option.is_list:
        group.add_argument(
            option.flag,
            dest=option.key,
            action="append",
            metavar="TEXT",
            help=text + "; repeat the flag for several",
        )
    else:
        metavar = "{" + ",".join(option.choices) + "}" if option.choices else _metavar(option)
        group.add_argument(option.flag, dest=option.key, metavar=metavar, help=text)


def _metavar(option: Option) -> str:
    return "N" if isinstance(option.default, int | float) else "TEXT"


def _from_flags(
    service: str, offered: Sequence[Option], arguments: Sequence[str]
) -> tuple[dict[str, object], str]:
    """What the command line gives, and the settings file that it names ("" for none)."""
    parser = make_parser(service, offered)
    by_flag = {option.flag: option.key for option in offered} | {"--config": "config", "--help": "help"}
    given, rest = parser.parse_known_args([_with_dashes(argument) for argument in arguments])
    if rest:
        flag = rest[0].split("=")[0]
        if flag.startswith("-"):
            raise SettingsError(f"{flag}: no such flag{_suggestion(flag, by_flag)}")
        raise SettingsError(f"{rest[0]!r}: one MODEL is enough; flags that take a list are repeated")
    values: dict[str, object] = dict(vars(given))
    config = str(values.pop("config", ""))
    model = values.pop("positional_model", None)
    if model is not None:
        if values.get("model", model) != model:
            raise SettingsError(f"--model: {values['model']!r} and the argument {model!r} differ; give one")
        values["model"] = model
    by_key = {option.key: option for option in offered}
    converted = {k: by_key[k].convert(v, by_key[k].flag, is_text=True) for k, v in values.items()}
    return converted, config


def _with_dashes(argument: str) -> str:
    """`--max_model_len=5` as `--max-model-len=5`; anything but a long flag as it is."""
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument.partition("=")
    return flag.replace("_", "-") + equals + value


def _suggestion(word: str, known: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""
