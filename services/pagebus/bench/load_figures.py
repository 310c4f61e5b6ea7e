"""What the outcomes of a load amount to: throughput, latencies, goodput. Pure."""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import msgspec

from pagebus.bench.http_stream import Answer
from pagebus.bench.load import Outcome

REFUSED = (429, 503)


class Spread(msgspec.Struct, frozen=True):
    """A quantity's distribution, in milliseconds."""

    mean: float
    p50: float
    p90: float
    p99: float
    highest: float


class Slo(msgspec.Struct, frozen=True):
    """What a request must keep to count as good, in milliseconds; None: anything."""

    ttft: float | None = None
    tpot: float | None = None
    e2el: float | None = None


class LoadFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One run. `ttft`: to the first text; `tpot`: mean time a further token of a request; `itl`: between two
    chunks with text; `e2el`: to the end. A rate counts from the first request's sending to the last end."""

    duration_s: float
    num_requests: int
    num_completed: int
    num_refused: int  # 429 or 503, told at once what to do
    num_failed: int
    num_refused_without_retry_after: int
    num_input_tokens: int
    num_output_tokens: int
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    goodput: float  # completed requests a second that kept the SLO
    num_good: int
    ttft_ms: Spread | None
    tpot_ms: Spread | None
    itl_ms: Spread | None
    e2el_ms: Spread | None
    refusal_ms: Spread | None  # how long a refusal took
    delay_ms: Spread | None  # sent later than wanted
    errors: dict[str, int]
    num_cached_tokens: int = 0  # prompt tokens found in a prefix cache, where the server tells


def spread(values_s: Sequence[float]) -> Spread | None:
    """Of values in seconds; None without any."""
    if not values_s:
        return None
    ordered = sorted(values_s)

    def at(share: float) -> float:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1e3

    return Spread(sum(ordered) / len(ordered) * 1e3, at(0.5), at(0.9), at(0.99), ordered[-1] * 1e3)


def num_output(answer: Answer) -> int:
    """Tokens made, as the server counts them; without that, one a chunk."""
    return answer.usage.completion_tokens if answer.usage is not None else len(answer.text_times_s)


def _num_cached(answer: Answer) -> int:
    details = answer.usage.prompt_tokens_details if answer.usage is not None else None
    return (details.cached_tokens or 0) if details is not None else 0


def _tpot_s(answer: Answer) -> float | None:
    num_further = num_output(answer) - 1
    if num_further < 1 or not answer.text_times_s:
        return None
    return (answer.text_times_s[-1] - answer.text_times_s[0]) / num_further


def is_good(outcome: Outcome, slo: Slo) -> bool:
    """Whether a completed request kept the SLO, counted from when it was wanted."""
    answer, late_s = outcome.answer, outcome.delay_s
    first_s = answer.text_times_s[0] if answer.text_times_s else answer.end_s
    tpot_s = _tpot_s(answer)
    return (
        (slo.ttft is None or (first_s - answer.sent_s + late_s) * 1e3 <= slo.ttft)
        and (slo.tpot is None or tpot_s is None or tpot_s * 1e3 <= slo.tpot)
        and (slo.e2el is None or (answer.end_s - answer.sent_s + late_s) * 1e3 <= slo.e2el)
    )


def figures(outcomes: Sequence[Outcome], slo: Slo) -> LoadFigures:
    """All figures of a run with at least one outcome."""
    completed = [outcome for outcome in outcomes if outcome.answer.status == 200 and not outcome.answer.error]
    refused = [outcome.answer for outcome in outcomes if outcome.answer.status in REFUSED]
    answers = [outcome.answer for outcome in completed]
    failed = len(outcomes) - len(completed) - len(refused)
    duration_s = max(
        max(outcome.answer.end_s for outcome in outcomes)
        - min(outcome.answer.sent_s for outcome in outcomes),
        1e-9,
    )
    num_out = sum(num_output(answer) for answer in answers)
    num_in = sum(
        outcome.answer.usage.prompt_tokens if outcome.answer.usage is not None else outcome.wanted.num_prompt
        for outcome in completed
    )
    good = sum(is_good(outcome, slo) for outcome in completed)
    errors = Counter(
        outcome.answer.error[:120] or f"status {outcome.answer.status}"
        for outcome in outcomes
        if outcome.answer.status not in REFUSED and (outcome.answer.error or outcome.answer.status != 200)
    )
    tpots = [tpot_s for answer in answers if (tpot_s := _tpot_s(answer)) is not None]
    return LoadFigures(
        duration_s=duration_s,
        num_requests=len(outcomes),
        num_completed=len(completed),
        num_refused=len(refused),
        num_failed=failed,
        num_refused_without_retry_after=sum(not answer.retry_after for answer in refused),
        num_input_tokens=num_in,
        num_output_tokens=num_out,
        requests_per_s=len(completed) / duration_s,
        output_tokens_per_s=num_out / duration_s,
        total_tokens_per_s=(num_in + num_out) / duration_s,
        goodput=good / duration_s,
        num_good=good,
        ttft_ms=spread([a.text_times_s[0] - a.sent_s for a in answers if a.text_times_s]),
        tpot_ms=spread(tpots),
        itl_ms=spread([later - one for a in answers for one, later in pairwise(a.text_times_s)]),
        e2el_ms=spread([answer.end_s - answer.sent_s for answer in answers]),
        refusal_ms=spread([answer.end_s - answer.sent_s for answer in refused]),
        delay_ms=spread([outcome.delay_s for outcome in outcomes]),
        errors=dict(errors.most_common(10)),
        num_cached_tokens=sum(_num_cached(answer) for answer in answers),
    )


def table(run: LoadFigures, slo: Slo) -> str:
    """For a person to read."""
    lines = [
        f"{'requests':<34}{run.num_requests:>12,}",
        f"{'  completed':<34}{run.num_completed:>12,}",
        f"{'  refused (429, 503)':<34}{run.num_refused:>12,}",
        f"{'  failed':<34}{run.num_failed:>12,}",
        f"{'duration (s)':<34}{run.duration_s:>12.2f}",
        f"{'input tokens':<34}{run.num_input_tokens:>12,}",
        f"{'output tokens':<34}{run.num_output_tokens:>12,}",
        f"{'requests/s':<34}{run.requests_per_s:>12.2f}",
        f"{'output tokens/s':<34}{run.output_tokens_per_s:>12.1f}",
        f"{'total tokens/s':<34}{run.total_tokens_per_s:>12.1f}",
    ]
    if slo != Slo():
        wanted = ", ".join(
            f"{name} {value:g} ms" for name, value in msgspec.structs.asdict(slo).items() if value
        )
        lines.append(f"{'goodput (requests/s)':<34}{run.goodput:>12.2f}  ({wanted})")
    lines += ["", f"{'ms':<34}{'mean':>10}{'p50':>10}{'p90':>10}{'p99':>10}{'max':>10}"]
    for name, values in (
        ("time to first token", run.ttft_ms),
        ("time per output token", run.tpot_ms),
        ("between two chunks", run.itl_ms),
        ("end to end", run.e2el_ms),
        ("a refusal", run.refusal_ms),
        ("sent later than wanted", run.delay_ms),
    ):
        if values is not None:
            numbers = "".join(f"{value:>10.2f}" for value in msgspec.structs.astuple(values))
            lines.append(f"{name:<34}{numbers}")
    lines += [f"  {count} x {error}" for error, count in run.errors.items()]
    return "\n".join(lines)
