"""What the safetensors files of a directory hold, read from their headers alone. Knows no model.

Format: 8 bytes, the header's length, little-endian; the header, JSON that gives each tensor's type, shape
and byte range; then the bytes. (https://github.com/huggingface/safetensors)
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pagebus.executor.errors import ModelError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_MAX_HEADER_BYTES = 100_000_000  # what safetensors itself accepts
_FP8 = "F8_E4M3"
_TYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "BOOL": 1, _FP8: 1}
"""Bytes a number of each; others are quantized weights."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A directory's weights: whole files, every tensor where it should be."""

    num_tensors: int
    num_bytes: int
    num_files: int
    num_numbers: int  # in all tensors together
    files: tuple[Path, ...]


def check(path: Path, *, is_scaled: bool = False) -> Checkpoint:
    """Look at every file's header; `is_scaled`: fp8 is fine. Raises `ModelError` with what is wrong first."""
    if (path / INDEX).is_file():
        shards = _read_index(path)
    elif (path / SINGLE).is_file():
        shards = {SINGLE: []}
    else:
        raise ModelError(f"{path}: {_why_none(path)}")
    num_tensors = num_bytes = num_numbers = 0
    for position, (name, wanted) in enumerate(sorted(shards.items()), 1):
        file = path / name
        if not file.is_file():
            raise ModelError(f"{path}: shard {name} ({position} of {len(shards)} in {INDEX}) is missing")
        header = list(_read_header(file, is_scaled))
        sizes = {tensor: size for tensor, size, _ in header}
        absent = [tensor for tensor in wanted if tensor not in sizes]
        if absent:
            raise ModelError(
                f"{path}: {INDEX} says that {name} holds {absent[0]}, but it does not"
                + (f" ({len(absent)} such tensors)" if len(absent) > 1 else "")
            )
        num_tensors += len(sizes)
        num_bytes += sum(sizes.values())
        num_numbers += sum(size // _TYPES[kind] for _, size, kind in header)
    files = tuple(path / name for name in sorted(shards))
    return Checkpoint(num_tensors, num_bytes, len(shards), num_numbers, files)


def _why_none(path: Path) -> str:
    if any(True for pattern in _PICKLES for _ in path.glob(pattern)):
        return "it has only pickled weights, which are not safe to read; convert them to safetensors"
    other = sorted(file.name for file in path.glob("*.safetensors"))
    if other:
        return f"it has {other[0]}, but neither {SINGLE} nor {INDEX}"
    return "it has no safetensors"


def _read_index(path: Path) -> dict[str, list[str]]:
    """Shards, and the tensors that each must hold."""
    try:
        index = json.loads((path / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: {INDEX} is not JSON: {str(error)[:200]}") from None
    found = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
        raise ModelError(f"{path}: {INDEX} has no weight_map from tensors to files")
    shards: dict[str, list[str]] = {}
    for tensor, name in found.items():
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(f"{path}: {INDEX} names {name!r}, which is no safetensors file beside it")
        shards.setdefault(name, []).append(tensor)
    return shards


def _read_header(file: Path, is_scaled: bool) -> Iterator[tuple[str, int, str]]:
    """Each tensor's name, size in bytes, and type."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
            raise ModelError(f"{file}: not a safetensors file, or cut short ({size} bytes)")
        try:
            header = json.loads(stream.read(length))
        except (ValueError, RecursionError) as error:
            raise ModelError(f"{file}: its header is not JSON: {str(error)[:200]}") from None
    if not isinstance(header, dict):
        raise ModelError(f"{file}: its header is not a JSON object")
    header.pop("__metadata__", None)
    end = 0
    for name, entry in header.items():
        kind, start, stop = _entry(file, name, entry)
        if kind not in _TYPES or (kind == _FP8 and not is_scaled):
            raise ModelError(f"{file}: {name} is stored as {kind}, which is not supported")
        end = max(end, stop)
        yield name, stop - start, kind
    if 8 + length + end != size:
        what = "cut short" if 8 + length + end > size else "longer than it says"
        raise ModelError(f"{file}: {what}: {size} bytes where its header names {8 + length + end}")


def _entry(file: Path, name: str, entry: object) -> tuple[str, int, int]:
    """Type, start and end of a tensor."""
    match entry:
        case Mapping():
            match entry.get("dtype"), entry.get("data_offsets"):
                case str() as kind, [int() as start, int() as stop] if 0 <= start <= stop:
                    return kind, start, stop
    raise ModelError(f"{file}: its header does not say where {name} lies")
