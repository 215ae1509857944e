"""Two records of the same benchmarks: which of our figures changed by more than the noise of both.

A machine's speed drifts between two runs, so what is compared is a provider's time over that of the case's reference,
which was timed in the same rounds; where a case has none, the time itself. A median of n rounds whose quartiles are q1
and q3 has the standard error 0.93 (q3 - q1) / sqrt(n), that of normally distributed rounds.
"""

import math
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
    for (case, provider), (time, error) in now.items():
        if (case, provider) in then:
            time_before, error_before = then[case, provider]
            yield Change(case, provider, time / time_before, math.hypot(error, error_before))


def _ours(record: Mapping) -> dict[tuple[str, str], tuple[float, float]]:
    """{(case, provider): (time over the reference's, the relative standard error of its median)}"""
    found = {}
    for result in record["results"]:
        for provider in result["providers"]:
            if provider["role"] != "ours":
                continue
            value, (low, high) = provider["speedup"], provider["speedup_quartiles"] or (0, 0)
            time = 1 / value if value else provider["median_ms"]
            if not value:
                value, (low, high) = provider["median_ms"], provider["quartiles_ms"]
            error = 0.93 * (high - low) / value / math.sqrt(provider["rounds"])
            found[f"{result['benchmark']}: {result['case']}", provider["name"]] = time, error
    return found


def text(before: Mapping, after: Mapping) -> str:
    """Both origins, then a line for every figure, those that changed first."""
    found = sorted(changes(before, after), key=lambda change: (not change.is_real, change.case))
    rows = [["case", "ours", "of the time before", "noise", ""]]
    for change in found:
        noise = max(SMALLEST, SURE * change.error)
        rows.append([change.case, change.provider, f"{change.times:.2f}", f"{noise:.0%}", change.verdict])
    verdicts = [change.verdict for change in found]
    summary = f"{verdicts.count('slower')} slower, {verdicts.count('faster')} faster, of {len(found)} in both records"
    lines = [f"before  {origin_of(before)}", f"after   {origin_of(after)}"]
    if before["machine"]["device"] != after["machine"]["device"]:
        lines.append("the machines differ: a change may be the machine's")
    return "\n".join([*lines, summary, *aligned(rows)])
