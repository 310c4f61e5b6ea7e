"""The flags of `pagebus bench gpu`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from pagebus.cli.errors import CommandError, ExitCode

_SHAPES = ("qwen3-0.6b", "llama-3.1-8b", "qwen3-8b", "tiny")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pagebus bench gpu",
        description="Measures the executor with random weights beside what the device allows at best: alone, "
        "and over NATS with a scheduler. The results file is rewritten after every figure.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--out", type=Path, default=Path(), metavar="FOLDER", help="where gpu.json and gpu.log go"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="(default: %(default)s)")
    parser.add_argument(
        "--shapes", nargs="+", choices=_SHAPES, default=list(_SHAPES[:2]), help="(default: the first two)"
    )
    parser.add_argument("--quick", action="store_true", help="small and rough: whether it runs at all")
    parser.add_argument("--no-bus", action="store_true", help="the executor alone")
    parser.add_argument(
        "--budget-s", type=float, default=0.0, metavar="SECONDS", help="begin nothing that takes longer"
    )
    parser.add_argument("--resume", type=Path, metavar="FILE", help="go on with an earlier run's gpu.json")
    parser.add_argument("--only", default="", metavar="WORDS", help="only parts whose name has these in it")
    return parser


def bench_gpu(arguments: Sequence[str]) -> int:
    """`pagebus bench gpu`; exit code 1 when a measurement failed."""
    try:
        given = _parser().parse_args(list(arguments))
    except SystemExit as ended:
        return int(ended.code or 0)
    if not given.out.is_dir():
        raise CommandError(f"--out: {given.out} is no folder", ExitCode.USAGE)
    if given.resume is not None and not given.resume.is_file():
        raise CommandError(f"--resume: {given.resume} is no file", ExitCode.USAGE)
    if not 0 <= given.budget_s < float("inf"):
        raise CommandError(f"--budget-s is {given.budget_s}; 0 or more is needed", ExitCode.USAGE)
    import torch

    if given.device == "cuda" and not torch.cuda.is_available():
        raise CommandError("this machine has no CUDA device that torch can use; see --device", ExitCode.USAGE)
    import msgspec

    from pagebus.bench.gpu import GpuRequest, run

    request = GpuRequest(
        out=given.out,
        device=given.device,
        shapes=given.shapes,
        is_quick=given.quick,
        has_bus=not given.no_bus,
        budget_s=given.budget_s,
        resume=given.resume,
        only=given.only,
    )
    try:
        report = run(request)
    except msgspec.MsgspecError as error:
        raise CommandError(f"--resume: {given.resume}: {error}", ExitCode.USAGE) from error
    return 1 if report.failed else ExitCode.OK
