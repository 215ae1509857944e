"""A pytest plugin, loaded by `-p tests.support.outcomes`: how each test ended, written as soon as it is known.

A run that is killed leaves all that ended before; and tests that passed in an earlier run can be spared.
"""

import json
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, help="append how each test ended to this file, a line of JSON each")
    parser.addoption("--spare", type=Path, help="leave out the tests that passed by this file")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if _path is not None and (report.when == "call" or report.outcome != "passed"):
        line = {"test": report.nodeid, "outcome": report.outcome, "text": report.longreprtext}
        with _path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    global _path
    is_worker = hasattr(config, "workerinput")  # of pytest-xdist, whose reports its controller writes
    _path = None if is_worker else config.getoption("outcomes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if path := config.getoption("spare"):
        done = passed(read(path))
        spared = [item for item in items if item.nodeid in done]
        if spared:
            config.hook.pytest_deselected(items=spared)
            items[:] = [item for item in items if item.nodeid not in done]


_path: Path | None = None


def read(path: Path) -> dict[str, dict[str, str]]:
    """By test, its last line; a killed run may have left half of one."""
    outcomes = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            outcome = json.loads(line)
        except ValueError:
            continue
        outcomes[outcome["test"]] = outcome
    return outcomes


def passed(outcomes: dict[str, dict[str, str]]) -> set[str]:
    return {test for test, outcome in outcomes.items() if outcome["outcome"] == "passed"}
