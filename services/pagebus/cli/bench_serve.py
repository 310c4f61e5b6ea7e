"""The flags of `pagebus bench serve`, named as other load generators name theirs."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from pagebus.cli.errors import CommandError, ExitCode

_SLO_NAMES = ("ttft", "tpot", "e2el")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pagebus bench serve",
        description="Puts a load on an OpenAI-compatible server and measures it: a Poisson process "
        "(--request-rate), a closed loop (--max-concurrency), or a trace.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--base-url", default="http://127.0.0.1:8000", metavar="URL", help="(default: %(default)s)")
    add("--model", default="", help="name to ask for (default: the first that the server lists)")
    add("--api-key", default="", help="key to send")
    add("--endpoint", default="completions", choices=("completions", "chat"), help="(default: %(default)s)")
    add("--text", action="store_true", help="prompts as words, for servers that take no token ids")
    add("--num-prompts", type=int, default=200, metavar="N", help="requests (default: %(default)s)")
    add(
        "--request-rate",
        type=float,
        default=float("inf"),
        metavar="R",
        help="mean requests a second of a Poisson process (default: all at once)",
    )
    add("--max-concurrency", type=int, default=0, metavar="N", help="most requests at once (default: any)")
    add("--static-batch", type=int, default=0, metavar="N", help="send N, then N more when all these ended")
    add("--input-len", type=int, default=128, metavar="N", help="prompt tokens (default: %(default)s)")
    add("--output-len", type=int, default=64, metavar="N", help="generated tokens (default: %(default)s)")
    add(
        "--range-ratio",
        type=float,
        default=0.0,
        metavar="X",
        help="draw lengths from 1 - X to 1 + X of these (default: %(default)s)",
    )
    add("--prefix-len", type=int, default=0, metavar="N", help="tokens that all prompts begin with")
    add(
        "--trace",
        type=Path,
        metavar="FILE",
        help="lengths and times from a CSV file with TIMESTAMP,ContextTokens,GeneratedTokens",
    )
    add("--rate-scale", type=float, default=1.0, metavar="X", help="times the trace's rate")
    add("--length-scale", type=float, default=1.0, metavar="X", help="times the trace's lengths")
    add("--no-ignore-eos", action="store_true", help="let answers end by themselves")
    add("--temperature", type=float, default=0.0, help="(default: %(default)s)")
    add("--timeout", type=float, default=600.0, metavar="S", help="of one request (default: %(default)s)")
    add(
        "--goodput",
        nargs="+",
        default=[],
        metavar="NAME:MS",
        help="count requests that keep all of these: ttft, tpot, e2el, e.g. ttft:500 tpot:50",
    )
    add("--seed", type=int, default=0, help="of prompts, lengths and arrivals (default: %(default)s)")
    add("--save-result", type=Path, metavar="FILE", help="write the figures as JSON")
    add("--plot", type=Path, metavar="FILE.svg", help="draw the run")
    add("--json", action="store_true", help="print JSON instead of a table")
    return parser


def bench_serve(arguments: Sequence[str]) -> int:
    """`pagebus bench serve`; exit code 1 when no request was completed."""
    try:
        given = _parser().parse_args(list(arguments))
    except SystemExit as ended:
        return int(ended.code or 0)
    _check(given)
    from pagebus.bench.load import LoadConfig, LoadError
    from pagebus.bench.load_figures import Slo
    from pagebus.bench.paper_trace import TraceError
    from pagebus.bench.serve import ServeRequest, run

    request = ServeRequest(
        load=LoadConfig(
            url=given.base_url,
            model=given.model,
            api_key=given.api_key,
            endpoint=given.endpoint,
            is_text=given.text,
            max_concurrency=given.max_concurrency,
            static_batch=given.static_batch,
            prefix_len=given.prefix_len,
            ignore_eos=not given.no_ignore_eos,
            temperature=given.temperature,
            timeout_s=given.timeout,
            seed=given.seed,
        ),
        num_requests=given.num_prompts,
        rate=given.request_rate,
        input_len=given.input_len,
        output_len=given.output_len,
        range_ratio=given.range_ratio,
        trace=given.trace,
        rate_scale=given.rate_scale,
        length_scale=given.length_scale,
        slo=Slo(**_goodput(given.goodput)),
        json_file=given.save_result,
        plot=given.plot,
        is_json=given.json,
    )
    try:
        found = run(request)
    except TraceError as error:
        raise CommandError(str(error), ExitCode.USAGE) from error
    except (LoadError, OSError) as error:
        raise CommandError(str(error)) from error
    return ExitCode.OK if found.num_completed else 1


def _check(given: argparse.Namespace) -> None:
    """Numbers that make no sense, each in one sentence. Raises `CommandError`."""
    positive = (
        "num_prompts",
        "request_rate",
        "input_len",
        "output_len",
        "rate_scale",
        "length_scale",
        "timeout",
    )
    for name in positive:
        if not getattr(given, name) > 0:
            flag = "--" + name.replace("_", "-")
            raise CommandError(
                f"{flag} is {getattr(given, name)}; a positive number is needed", ExitCode.USAGE
            )
    if given.max_concurrency < 0 or given.prefix_len < 0 or given.static_batch < 0:
        raise CommandError("--max-concurrency, --static-batch and --prefix-len are 0 or more", ExitCode.USAGE)
    if not 0 <= given.range_ratio <= 1:
        raise CommandError(f"--range-ratio is {given.range_ratio}; from 0 to 1 is possible", ExitCode.USAGE)
    if given.plot is not None and given.plot.suffix.lower() != ".svg":
        raise CommandError(f"--plot draws SVG: name the file {given.plot.stem}.svg", ExitCode.USAGE)
    for flag, path in (("--plot", given.plot), ("--save-result", given.save_result)):
        if path is not None and not path.parent.is_dir():
            raise CommandError(f"{flag}: {path.parent} is no folder", ExitCode.USAGE)


def _goodput(words: Sequence[str]) -> dict[str, float]:
    found = {}
    for word in words:
        name, _, number = word.partition(":")
        try:
            value = float(number)
        except ValueError:
            value = 0.0
        if name not in _SLO_NAMES or not value > 0:
            raise CommandError(
                f"--goodput {word!r}: NAME:MS with a name of {', '.join(_SLO_NAMES)} is wanted",
                ExitCode.USAGE,
            )
        found[name] = value
    return found
