"""Settings come from flags, environment and file, in this order, and what is wrong is named."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagebus.settings.load import HelpWanted, from_environment, read_settings, to_environment
from pagebus.settings.options import SERVICES, SettingsError, options
from pagebus.settings.structs import (
    CommonSettings,
    ExecutorSettings,
    GatewaySettings,
    SchedulerSettings,
    ServeSettings,
)

ALL = list(SERVICES.values())


def serve(*arguments: str, environ: Mapping[str, str] | None = None) -> ServeSettings:
    return read_settings(ServeSettings, arguments, environ or {})


def config(tmp_path: Path, text: str) -> str:
    path = tmp_path / "pagebus.toml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("settings", ALL)
def test_nothing_given_means_the_defaults(settings: type[CommonSettings]) -> None:
    assert read_settings(settings, [], {}) == settings()


@pytest.mark.parametrize("settings", ALL)
def test_every_field_is_an_option_with_a_description(settings: type[CommonSettings]) -> None:
    offered = options(settings)
    assert {option.key for option in offered} == {field.name for field in dataclasses.fields(settings)}
    assert all(option.description for option in offered)


def test_a_flag_wins_over_the_variable_over_the_file_over_the_default(tmp_path: Path) -> None:
    environ = {"PAGEBUS_CONFIG": config(tmp_path, "port = 1\nhorizon = 2\nmax_num_seqs = 3\n")}
    assert serve(environ=environ).port == 1
    environ |= {"PAGEBUS_PORT": "11", "PAGEBUS_HORIZON": "12"}
    found = serve("--port", "21", environ=environ)
    assert (found.port, found.horizon, found.max_num_seqs) == (21, 12, 3)
    assert found.max_num_batched_tokens == ServeSettings().max_num_batched_tokens


def test_the_config_flag_wins_over_its_variable(tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    other.write_text("port = 2")
    assert serve("--config", str(other), environ={"PAGEBUS_CONFIG": config(tmp_path, "port = 1")}).port == 2


def test_underscores_serve_as_dashes() -> None:
    assert serve("--max_model_len", "64").max_model_len == serve("--max-model-len=64").max_model_len == 64
    assert serve("--served_model_name=a_b").served_model_name == ("a_b",)


def test_the_model_is_an_argument_or_a_flag() -> None:
    assert serve("org/model").model == serve("--model", "org/model").model == "org/model"
    assert serve("--port", "1", "org/model", "--horizon", "2").model == "org/model"
    assert serve("x", "--model", "x").model == "x"
    with pytest.raises(SettingsError, match=r"'a'.*'b'"):
        serve("b", "--model", "a")


def test_lists(tmp_path: Path) -> None:
    assert serve("--api-key", "a", "--api-key", "b").api_key == ("a", "b")
    assert serve(environ={"PAGEBUS_API_KEY": "a, b"}).api_key == ("a", "b")
    assert serve(environ={"PAGEBUS_API_KEY": '["a,b"]'}).api_key == ("a,b",)
    assert serve("--config", config(tmp_path, 'api_key = "one"')).api_key == ("one",)
    assert serve("--config", config(tmp_path, 'api_key = ["a", "b"]')).api_key == ("a", "b")


def test_switches() -> None:
    assert serve("--fake").fake
    assert not serve("--no-fake", environ={"PAGEBUS_FAKE": "1"}).fake
    assert serve(environ={"PAGEBUS_FAKE": "true"}).fake


def test_an_empty_variable_is_not_set() -> None:
    assert serve(environ={"PAGEBUS_PORT": "", "PAGEBUS_MODEL": ""}) == ServeSettings()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--port", "abc"], ["--port", "'abc'", "0 to 65535"]),
        (["--port", "70000"], ["--port", "'70000'"]),
        (["--port", "-1"], ["--port"]),
        (["--port"], ["--port"]),
        (["--horizon", "-1"], ["--horizon", "'-1'", "0 to 64"]),
        (["--dtype", "int8"], ["--dtype", "'int8'", "bfloat16"]),
        (["--block-size", "32"], ["--block-size", "'32'", "16"]),
        (["--gpu-memory-utilization", "nan"], ["--gpu-memory-utilization", "'nan'"]),
        (["--request-timeout-s", "inf"], ["--request-timeout-s", "'inf'"]),
        (["--max-num-seqs", "9" * 30], ["--max-num-seqs"]),
        (["--prot", "1"], ["--prot", "--port"]),
        (["--max-model", "1"], ["--max-model", "--max-model-len"]),
        (["a", "b"], ["'b'"]),
        (["--model", "x" * 5000], ["--model"]),
        (["--config", "/no/such/file.toml"], ["/no/such/file.toml"]),
    ],
)
def test_what_is_wrong_is_named_in_one_line(arguments: list[str], words: list[str]) -> None:
    with pytest.raises(SettingsError) as raised:
        serve(*arguments)
    sentence = str(raised.value)
    assert all(word in sentence for word in words), sentence
    assert "\n" not in sentence
    assert len(sentence) < 300


@pytest.mark.parametrize(
    ("variable", "value"),
    [("PAGEBUS_PORT", "x"), ("PAGEBUS_FAKE", "maybe"), ("PAGEBUS_DTYPE", "fp8"), ("PAGEBUS_API_KEY", "[1")],
)
def test_a_wrong_variable_is_named(variable: str, value: str) -> None:
    with pytest.raises(SettingsError, match=variable):
        serve(environ={variable: value})


def test_a_key_is_never_shown(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as raised:
        serve("--api-key", "s3cret" + "x" * 5000)
    assert "s3cret" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prot = 1", ["prot", "port"]),
        ('port = "8000"', ["port", "'8000'"]),
        ("fake = 1", ["fake", "true or false"]),
        ("[gateway]\nhorizon = 1", ["gateway.horizon"]),
        ("[gatway]\nport = 1", ["gatway", "gateway"]),
        ("gateway = 1", ["gateway", "table"]),
        ("port = ", ["not a TOML file"]),
        ("[scheduler]\nmax_num_seqs = 1\n[executor]\nmax_num_seqs = 2", ["max_num_seqs", "differs"]),
    ],
)
def test_a_wrong_key_is_named_with_the_file(tmp_path: Path, text: str, words: list[str]) -> None:
    path = config(tmp_path, text)
    with pytest.raises(SettingsError) as raised:
        serve("--config", path)
    assert all(word in str(raised.value) for word in [path, *words]), str(raised.value)


def test_tables_belong_to_their_service(tmp_path: Path) -> None:
    path = config(tmp_path, 'log_level = "debug"\nport = 5\n[gateway]\nport = 6\n[scheduler]\nhorizon = 3\n')
    environ = {"PAGEBUS_CONFIG": path}
    assert read_settings(GatewaySettings, [], environ) == GatewaySettings(log_level="debug", port=6)
    assert read_settings(SchedulerSettings, [], environ) == SchedulerSettings(log_level="debug", horizon=3)
    assert read_settings(ExecutorSettings, [], environ) == ExecutorSettings(log_level="debug")
    assert read_settings(ServeSettings, [], environ) == ServeSettings(log_level="debug", port=6, horizon=3)


@pytest.mark.parametrize("settings", ALL)
def test_help_shows_every_flag(settings: type[CommonSettings]) -> None:
    with pytest.raises(HelpWanted) as raised:
        read_settings(settings, ["--help"], {})
    for option in options(settings):
        assert option.flag + " " in str(raised.value).replace("\n", " ").replace(",", " ")


texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=40)


@given(
    st.builds(
        ServeSettings,
        model=texts,
        served_model_name=st.lists(texts, max_size=3).map(tuple),
        api_key=st.lists(texts, max_size=3).map(tuple),
        port=st.integers(0, 65535),
        gpu_memory_utilization=st.floats(0.01, 1.0),
        fake=st.booleans(),
        dtype=st.sampled_from(["auto", "float32", "bfloat16"]),
        seed=st.integers(-(2**40), 2**40),
    )
)
def test_settings_survive_the_environment(settings: ServeSettings) -> None:
    """What the launcher hands to its processes is what they read."""
    variables = to_environment(settings)
    offered = {option.key: option for option in options(ServeSettings)}
    assert ServeSettings(**from_environment(offered, variables)) == settings  # type: ignore[arg-type]
