"""The container file, compose.yaml, .ci/run and the README say what they must; no engine is needed."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from pagebus.cli.main import COMMANDS
from pagebus.settings.options import SERVICES, options
from pagebus.settings.structs import ServeSettings

ROOT = Path(__file__).resolve().parents[3]
SCRIPTS = Path(sys.executable).parent


def text(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def instructions() -> list[tuple[str, str]]:
    """(instruction, argument) of the container file, continuation lines joined."""
    lines = [line for line in text("deploy/Containerfile").splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in joined.splitlines() if line.strip()]  # type: ignore[misc]


def values(instruction: str) -> list[str]:
    return [argument for name, argument in instructions() if name == instruction]


@pytest.mark.needs("check-jsonschema")
def test_compose_is_valid() -> None:
    command = [SCRIPTS / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", ROOT / "compose.yaml"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.needs("check-jsonschema")
def test_a_wrong_compose_file_is_found(tmp_path: Path) -> None:
    wrong = tmp_path / "compose.yaml"
    wrong.write_text(text("compose.yaml").replace("condition: service_healthy", "condition: whenever"))
    command = [SCRIPTS / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", wrong]
    assert subprocess.run(command, capture_output=True, check=False, timeout=60).returncode != 0


def test_compose_variables_are_settings_that_exist() -> None:
    known = {option.variable for settings in SERVICES.values() for option in options(settings)}
    known |= {"PAGEBUS_ALIVE_FILE"}
    conf = text("deploy/nats-server.conf")
    for variable in re.findall(r"^\s+(PAGEBUS_\w+):", text("compose.yaml"), re.MULTILINE):
        assert variable in known or f"${variable}" in conf, variable


def test_compose_gives_the_bus_every_variable_of_its_configuration() -> None:
    compose = text("compose.yaml")
    lines = [
        line for line in text("deploy/nats-server.conf").splitlines() if not line.strip().startswith("#")
    ]
    wanted = set(re.findall(r"\$(PAGEBUS_\w+)", "\n".join(lines)))
    assert len(wanted) >= 8
    assert not [variable for variable in wanted if f"      {variable}: " not in compose]


def test_no_password_is_written_down() -> None:
    for line in text("compose.yaml").splitlines():
        if "PASSWORD" in line or "nats://" in line:
            assert "${" in line, line
            assert ":?" in line, line


def test_the_nats_server_takes_compose_s_configuration(tmp_path: Path) -> None:
    from pagebus.cli.nats_server import find_server

    compose = text("compose.yaml")
    environment = {"PATH": os.environ["PATH"]}
    for variable, value in re.findall(r"^\s+(PAGEBUS_NATS_\w+): (.*)$", compose, re.MULTILINE):
        value = re.sub(r"\$\{\w+:\?[^}]*\}", "12345e6", value)  # a password that looks like a number
        environment[variable] = value.strip("'") if value.startswith("'") else value.strip('"')
    environment["PAGEBUS_NATS_STORE"] = f'"{tmp_path}"'
    ended = subprocess.run(
        [find_server(), "--config", ROOT / "deploy/nats-server.conf", "-t"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=30,
    )
    assert ended.returncode == 0, ended.stderr


def test_the_image_runs_as_any_user_with_serve_s_flags_as_arguments() -> None:
    assert values("USER")[-1] == "1001:0"
    assert json.loads(values("ENTRYPOINT")[-1]) == ["pagebus", "serve", "--host", "0.0.0.0"]
    assert "CMD" not in [name for name, _ in instructions()]
    assert values("EXPOSE") == ["8000"]
    assert any("chmod -R g=u" in run and "chown -R 1001:0" in run for run in values("RUN"))
    home = re.search(r"HOME=(\S+)", " ".join(values("ENV")))
    assert home
    assert any(home[1] in run for run in values("RUN"))


def test_the_image_has_stages_labels_a_base_to_choose_and_a_health_check() -> None:
    assert [one.split()[0] for one in values("FROM")] == ["${BASE_IMAGE}", "${BASE_IMAGE}"]
    assert any(argument.startswith("BASE_IMAGE=") for argument in values("ARG"))
    assert "org.opencontainers.image.licenses" in " ".join(values("LABEL"))
    (check,) = values("HEALTHCHECK")
    code = json.loads(check[check.index("CMD") + 3 :])
    compile(code[-1], "health check", "exec")


def test_what_the_image_copies_exists() -> None:
    for argument in values("COPY"):
        *sources, _ = shlex.split(argument)
        if not sources[0].startswith("--from"):
            assert all((ROOT / source).exists() for source in sources), argument


def test_ci_runs_the_readme_s_own_command() -> None:
    command = "pip install -e '.[test]' && pytest"
    assert f"```sh\n{command}\n```" in text("README.md")
    assert re.search(rf"^  {re.escape(command)}$", text(".ci/run"), re.MULTILINE)
    assert "```sh\npip install . && pagebus serve\n```" in text("README.md")
    assert subprocess.run(["bash", "-n", ROOT / ".ci/run"], check=False, timeout=10).returncode == 0
    assert os.access(ROOT / ".ci/run", os.X_OK)


def test_the_readme_s_flag_table_is_the_structs() -> None:
    table = text("README.md").split("<!-- flags: begin -->")[1].split("<!-- flags: end -->")[0]
    rows = re.findall(r"^\| `(--[a-z-]+)` \|([^|]*)\|([^|]*)\|([^|]*)\|$", table, re.MULTILINE)
    offered = options(ServeSettings)
    assert [flag for flag, *_ in rows] == [option.flag for option in offered]
    for (_, _, default, description), option in zip(rows, offered, strict=True):
        assert option.description in description
        shown = "" if option.default in ("", ()) else f"`{option.default}`"
        assert default.strip() == {"`True`": "on", "`False`": "off"}.get(shown, shown)


def test_the_readme_names_every_command_and_real_folders() -> None:
    readme = text("README.md")
    assert not [command for command in COMMANDS if f"`pagebus {command}" not in readme]
    layout = readme.split("## Layout")[1].split("```")[1]
    for line in layout.strip().splitlines():
        assert (ROOT / line.split()[0]).is_dir(), line


def test_the_readme_s_python_compiles() -> None:
    blocks = re.findall(r"```python\n(.*?)```", text("README.md"), re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        compile(block, "README.md", "exec")


def test_the_wheel_has_the_configuration_of_the_bus() -> None:
    build = tomllib.loads(text("pyproject.toml"))["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert build["force-include"] == {"deploy/nats-server.conf": "pagebus/cli/nats-server.conf"}
    assert build["packages"] == ["services/pagebus", "shared/pagebus", "kernels/pagebus"]
