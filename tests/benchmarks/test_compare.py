"""python -m benchmarks --compare: what it finds in records whose noise is known."""

import copy
import itertools
import json
import random
import statistics

import pytest

from benchmarks import compare
from benchmarks.__main__ import main
from benchmarks.harness import Case, Proven, Provider, _record

CASES, ROUNDS = 40, 15


def record(seed, slower=(), times=1.1):
    """A record of rounds that vary by 2%, on a machine that drifts by 30%; cases in slower are `times` slower."""
    draw = random.Random(seed)
    results = []
    for number in range(CASES):
        samples = {"fastlm": [], "torch eager": []}
        for _ in range(ROUNDS):
            machine = 1 + 0.3 * draw.random()
            for name, rounds in samples.items():
                factor = times if name == "fastlm" and number in slower else 1.0
                rounds.append(1e-3 * machine * factor * draw.gauss(1, 0.02))
        proven = Proven(runs=dict.fromkeys(samples), memory=dict.fromkeys(samples))
        providers = [Provider("fastlm", lambda: None, "ours"), Provider("torch eager", lambda: None)]
        case = Case(f"case {number}", None, dict, dict, providers, "torch eager")
        results.append({"benchmark": "op", **_record(case, proven, samples, [], [])})
    run = {"commit": str(seed), "dirty": False, "date": "2026-01-01"}
    machine = {"device": "a processor", "threads": 2, "cpu_capability": "AVX2"}
    return {"machine": machine, "versions": {"torch": "2"}, "run": run, "results": results}


def test_ten_runs_of_the_same_code_have_no_difference():
    runs = [record(seed) for seed in range(11)]
    for before, after in itertools.pairwise(runs):
        assert [change for change in compare.changes(before, after) if change.is_real] == []


def test_a_regression_of_ten_percent_is_found():
    before, after = record(1), record(2, slower=(3, 17))
    found = {change.case: change for change in compare.changes(before, after) if change.is_real}
    assert found.keys() == {"op: case 3", "op: case 17"}
    assert all(change.verdict == "slower" for change in found.values())
    assert statistics.mean(change.times for change in found.values()) == pytest.approx(1.1, abs=0.05)
    back = [change.verdict for change in compare.changes(after, before) if change.is_real]
    assert back == ["faster", "faster"]


def test_a_case_without_a_reference_is_compared_by_its_time():
    before = record(1)
    for result in before["results"]:
        for provider in result["providers"]:
            provider["speedup"] = provider["speedup_quartiles"] = None
    after = copy.deepcopy(before)
    after["results"][5]["providers"][0]["median_ms"] *= 1.5
    after["results"][5]["providers"][0]["quartiles_ms"] = [1.4, 1.6]
    assert [change.case for change in compare.changes(before, after) if change.is_real] == ["op: case 5"]


def test_small_differences_of_steady_rounds_are_none():
    before = record(1)
    for result in before["results"]:
        result["providers"][0]["speedup_quartiles"] = [1.0, 1.0]
    after = copy.deepcopy(before)
    for number, result in enumerate(after["results"]):
        result["providers"][0]["speedup_quartiles"] = [1 / (1.03 + 0.04 * (number == 7))] * 2
    assert [change.case for change in compare.changes(before, after) if change.is_real] == ["op: case 7"]


def test_figures_of_different_kinds_are_not_compared():
    before = record(1)
    for change in ({"reference": "another"}, {"speedup_quartiles": None}):
        after = copy.deepcopy(before)
        for result in after["results"]:
            result |= change
            result["providers"][0] |= change
        assert list(compare.changes(before, after)) == []


def test_the_command_names_what_is_slower_and_fails(tmp_path, capsys):
    paths = [tmp_path / "before.json", tmp_path / "after.json"]
    for path, content in zip(paths, (record(1), record(2, slower=(3,))), strict=True):
        path.write_text(json.dumps(content))
    assert main(["--compare", *map(str, paths)]) == 1
    printed = capsys.readouterr().out
    assert "1 slower, 0 faster, of 40 in both records" in printed
    assert printed.splitlines()[4].split()[:3] == ["op:", "case", "3"]
    assert main(["--compare", str(paths[0]), str(paths[0])]) == 0


NO_RECORDS = [None, "{", "[]", "{}", *(json.dumps(record(1) | {"results": results}) for results in ([1], None))]


@pytest.mark.parametrize("content", NO_RECORDS)
def test_what_is_no_record_is_refused_by_name(content, tmp_path, capsys):
    path = tmp_path / "odd.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as ended:
        main(["--compare", str(path), str(path)])
    assert ended.value.code == 2
    assert "odd.json" in capsys.readouterr().err
