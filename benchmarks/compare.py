"""Two records of the same benchmarks: which of our figures changed by more than the noise of both.

A machine's speed drifts between two runs, and within one, so what is compared is a provider's time over that of the
case's reference in the same round; where a case has none, the time itself. The record has the quartiles q1 and q3 of n
rounds. Of normally distributed rounds their middle has the standard error 0.82 (q3 - q1) / sqrt(n), less than the
median. Few rounds may lie together by luck, so no error counts as less than the median of all.
"""

import math
import statistics
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from benchmarks.report import aligned, origin_of

SMALLEST = 0.05  # relative: below this, where code and data lie in memory decides
SURE = 4.0  # standard errors: of a hundred figures one in a hundred thousand runs of the same code lies beyond


class Change(NamedTuple):
    """Of one provider in one case, from the first record to the second."""

    case: str
    provider: str
    times: float  # as long as before
    error: float  # the standard error of its logarithm

    @property
    def is_real(self) -> bool:
        return abs(math.log(self.times)) > max(math.log1p(SMALLEST), SURE * self.error)

    @property
    def verdict(self) -> str:
        if not self.is_real:
            return ""
        return "slower" if self.times > 1 else "faster"


def changes(before: Mapping, after: Mapping) -> Iterator[Change]:
    """Of all of our providers that were timed in both."""
    then, now = _ours(before), _ours(after)
    both = [name for name in now if name in then and then[name].reference == now[name].reference]
    errors = [math.hypot(then[name].error, now[name].error) for name in both]
    usual = statistics.median(errors) if errors else 0.0
    for (case, provider), error in zip(both, errors, strict=True):
        times = now[case, provider].time / then[case, provider].time
        yield Change(case, provider, times, max(error, usual))


class Timing(NamedTuple):
    """Of one provider: its time, over that of the reference where one was timed, and the relative standard error."""

    time: float
    error: float
    reference: str | None


def _ours(record: Mapping) -> dict[tuple[str, str], Timing]:
    """By case and provider."""
    found = {}
    for result in record["results"]:
        for provider in result["providers"]:
            if provider["role"] != "ours":
                continue
            low, high = provider["speedup_quartiles"] or provider["quartiles_ms"]
            middle = (low + high) / 2
            error = 0.82 * (high - low) / middle / math.sqrt(provider["rounds"])
            has_reference = provider["speedup_quartiles"] is not None
            time, reference = (1 / middle, result["reference"]) if has_reference else (middle, None)
            found[f"{result['benchmark']}: {result['case']}", provider["name"]] = Timing(time, error, reference)
    return found


def text(before: Mapping, after: Mapping) -> str:
    """Both origins, then a line for every figure, those that changed first."""
    found = sorted(changes(before, after), key=lambda change: (not change.is_real, change.case))
    rows = [["case", "ours", "time / before", "noise", ""]]
    for change in found:
        noise = max(SMALLEST, SURE * change.error)
        rows.append([change.case, change.provider, f"{change.times:.2f}", f"{noise:.0%}", change.verdict])
    verdicts = [change.verdict for change in found]
    summary = f"{verdicts.count('slower')} slower, {verdicts.count('faster')} faster, of {len(found)} in both records"
    lines = [f"before  {origin_of(before)}", f"after   {origin_of(after)}"]
    if not found:
        lines.append("the records have no case in common that ours were timed in")
    if before["machine"]["device"] != after["machine"]["device"]:
        lines.append("the machines differ: a change may be the machine's")
    return "\n".join([*lines, summary, *aligned(rows)])
