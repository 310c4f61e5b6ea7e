"""Finds a model's directory: the bundled one, a local one, or one from the Hugging Face hub.

It knows file names and JSON, no architecture and no tensors. Only safetensors are taken, never pickles.
"""

import importlib.util
import json
import os
import re
from pathlib import Path
from typing import NoReturn

from pagebus.settings.structs import CommonSettings, ExecutorSettings

TEXT_FILES = ["*.json", "*.jinja", "tokenizer.model", "*.txt"]
WEIGHT_FILES = ["*.safetensors"]
"""Files that are fetched from the hub; never *.bin, *.pt or *.py."""

_MAX_HEADER_BYTES = 100 << 20
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class ModelFilesError(Exception):
    """A model's files cannot be used. The text is one sentence for the user."""


def resolve_model(settings: CommonSettings) -> Path:
    """The directory of the settings' model, fetched from the hub where it is a hub id.

    Weights are asked for where the settings are an executor's that loads some. Raises `ModelFilesError`.
    """
    needs_weights = (
        isinstance(settings, ExecutorSettings) and not settings.fake and settings.load_format != "dummy"
    )
    model = settings.model
    if not model:
        path = bundled_model()
    elif Path(model).expanduser().is_dir():
        path = Path(model).expanduser().resolve()
    elif Path(model).expanduser().exists():
        raise ModelFilesError(f"{model}: MODEL is a directory or a hub id, and this is a file")
    elif _is_path(model):
        raise ModelFilesError(f"{model}: there is no such model directory")
    else:
        path = fetch(model, settings.revision, has_weights=needs_weights)
    check_model_dir(path, model or "the bundled model", needs_weights=needs_weights)
    return path


def bundled_model() -> Path:
    """Where the model that comes with pagebus is; raises `ModelFilesError` when it is not installed."""
    spec = importlib.util.find_spec("pagebus")
    for root in (spec.submodule_search_locations or []) if spec else []:
        if (Path(root) / "bundled" / "config.json").is_file():
            return Path(root) / "bundled"
    raise ModelFilesError("the bundled model is not installed with this pagebus; name a MODEL")


def check_model_dir(path: Path, name: str, *, needs_weights: bool) -> None:
    """Raise `ModelFilesError` unless `path` looks like a model: config.json, and whole safetensors."""
    config = path / "config.json"
    if not config.is_file():
        raise ModelFilesError(f"{name}: not a model directory, it has no config.json")
    try:
        content = json.loads(config.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ModelFilesError(f"{name}: its config.json is not JSON: {error}") from None
    except OSError as error:
        raise ModelFilesError(f"{name}: cannot read its config.json: {error.strerror}") from None
    if not isinstance(content, dict):
        raise ModelFilesError(f"{name}: its config.json is not a JSON object")
    if not needs_weights:
        return
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        others = sorted({file.suffix for file in path.iterdir()} & {".bin", ".pt", ".pth", ".gguf"})
        found = f", only {' and '.join(others)}, which pagebus does not read" if others else ""
        raise ModelFilesError(f"{name}: it has no .safetensors files{found}")
    for file in weights:
        _check_safetensors(file, name)
    _check_index(path, name)


def _check_safetensors(file: Path, name: str) -> None:
    """The header's offsets must end where the file ends, else the file was cut or overwritten."""
    try:
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            if not 0 < size <= _MAX_HEADER_BYTES:
                raise ValueError("the header's length is wrong")
            tensors: dict[str, dict[str, list[int]]] = json.loads(opened.read(size))
            tensors.pop("__metadata__", None)
            end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
            if os.fstat(opened.fileno()).st_size != 8 + size + end:
                raise ValueError("the file does not end where its header says")
    except OSError as error:
        raise ModelFilesError(f"{name}: cannot read {file.name}: {error.strerror}") from None
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise ModelFilesError(f"{name}: {file.name} is broken: {error}") from None


def _check_index(path: Path, name: str) -> None:
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        return
    try:
        files = {str(file) for file in json.loads(index.read_bytes())["weight_map"].values()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelFilesError(f"{name}: its {index.name} is broken: {error}") from None
    missing = sorted(file for file in files if not (path / file).is_file())
    if missing:
        raise ModelFilesError(
            f"{name}: {len(missing)} of {len(files)} weight files are missing: {missing[0]}"
        )


def _is_path(model: str) -> bool:
    """Whether `model` cannot be a hub id, and so was meant as a directory."""
    return model.startswith((".", "~", os.sep)) or not _HUB_ID.fullmatch(model)


def fetch(model: str, revision: str, *, has_weights: bool) -> Path:
    """The local snapshot of a hub id, downloaded with a progress bar where it is not cached.

    HF_HUB_OFFLINE, HF_TOKEN, HF_HOME and HF_ENDPOINT are respected. Raises `ModelFilesError`.
    """
    from huggingface_hub import snapshot_download

    patterns = TEXT_FILES + (WEIGHT_FILES if has_weights else [])
    try:
        return Path(snapshot_download(model, revision=revision or None, allow_patterns=patterns))
    except Exception as error:
        _explain(error, model, revision)


def _explain(error: Exception, model: str, revision: str) -> NoReturn:
    """Raise what the hub's client raised as a `ModelFilesError` in one sentence."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    hub = constants.ENDPOINT
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, HfHubHTTPError):
        error = error.__cause__  # "not cached" follows from what the hub answered
    match error:
        case GatedRepoError():
            reason = f"{hub} gives it only to those who accepted its terms; do so there and set HF_TOKEN"
        case RepositoryNotFoundError():
            reason = f"neither a directory here nor a model at {hub} (a private one needs HF_TOKEN)"
        case RevisionNotFoundError():
            reason = f"{hub} has no revision {revision!r} of it"
        case LocalEntryNotFoundError() | OfflineModeIsEnabled():
            why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{hub} cannot be reached"
            reason = f"no directory here, not in the local cache, and {why}"
        case HFValidationError():
            reason = "neither a directory here nor a valid hub id"
        case HfHubHTTPError() if error.response is not None:
            status = error.response.status_code
            hint = "; check HF_TOKEN" if status in (401, 403) else ""
            reason = f"{hub} answered HTTP {status}{hint}"
        case OSError() if error.strerror:
            reason = f"the download failed: {error.strerror}"
        case _:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            reason = f"the download failed: {lines[0][:300]}"
    raise ModelFilesError(f"{model}: {reason}") from error
