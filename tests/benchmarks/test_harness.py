"""The harness gives no time to a wrong provider, takes turns, keeps to its budget, and measures memory truly."""

import dataclasses
import importlib
import json
import time
import types
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks import __main__ as command
from benchmarks import harness, machine, report
from benchmarks.harness import Budget, Case, Provider, UnavailableError, Work

CPU = torch.device("cpu")
N = 1000


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def doubled(x: Tensor) -> Tensor:
    return 2 * x


def provider(name: str, function: Callable[[Tensor], Tensor], role: str = "peer", **options) -> Provider:
    return Provider(name, lambda: lambda given: {"y": function(given["x"])}, role, **options)


def case_of(*providers: Provider) -> Case:
    return Case(
        name="doubling",
        device=CPU,
        inputs=lambda: {"x": torch.randn(N)},
        truth=lambda given: {"y": 2 * given["x"].double()},
        providers=[provider("torch", doubled), *providers],
        reference="torch",
        sample=lambda outputs: {"y": outputs["y"]},
        work=(Work("byte", 8.0 * N, "8 N bytes: read, written"),),
    )


def measured(*providers: Provider) -> dict:
    return harness.measure(case_of(*providers), Budget(60))


@pytest.fixture(autouse=True)
def small_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real one copies 256 MiB."""
    source, destination = torch.randn(N), torch.empty(N)
    ceiling = machine.Ceiling("copy", "byte", 2.0 * source.nbytes, lambda: destination.copy_(source))
    monkeypatch.setattr(machine, "copy_ceiling", lambda device: ceiling)


@pytest.fixture(autouse=True)
def memory_as_users_have_it() -> None:
    """Filling fresh memory with NaN would count as the provider's own use of it."""
    torch.utils.deterministic.fill_uninitialized_memory = False


def timed(record: dict) -> list[str]:
    return [entry["name"] for entry in record["providers"]]


def test_measure_times_every_right_provider_in_the_order_of_the_case() -> None:
    record = measured(provider("ours", lambda x: x + x, "ours"), provider("peer", lambda x: x * 2.0))
    assert timed(record) == ["torch", "ours", "peer"]
    assert (record["rejected"], record["wrong"], record["left_out"]) == ({}, [], [])


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("value", lambda x: 2.001 * x),
        ("last_element", lambda x: torch.cat([2 * x[:-1], x[-1:]])),
        ("nan", lambda x: torch.where(x == x[7], float("nan"), 2 * x)),
        ("shape", lambda x: 2 * x[:-1]),
        ("dtype", lambda x: 2 * x.double()),
    ],
)
def test_measure_gives_no_time_to_a_wrong_provider(name: str, function: Callable[[Tensor], Tensor]) -> None:
    record = measured(provider(f"wrong {name}", function, "ours"))
    assert timed(record) == ["torch"]
    assert record["wrong"] == [f"wrong {name}"]
    assert "wrong, so not timed" in record["rejected"][f"wrong {name}"]


def test_measure_judges_one_number_by_the_error_that_the_case_names() -> None:
    """The reference hits the mean exactly, its neighbour in float32 is as right as PyTorch's rows are."""

    def mean_of(name: str, value: Tensor) -> Provider:
        return Provider(name, lambda: lambda given: {"mean": value})

    mean = torch.tensor(11.3)
    after = torch.nextafter(mean, torch.tensor(12.0))
    case = Case(
        "mean", CPU, lambda: {"x": torch.randn(N)}, lambda given: {"mean": mean.double()},
        [mean_of("exact", mean), mean_of("next", after), mean_of("far", mean + 1e-4)], reference="exact",
    )  # fmt: skip
    assert harness.measure(case, Budget(60))["wrong"] == ["next", "far"]
    judged_by_rows = dataclasses.replace(case, torch_error=lambda given: {"mean": 1e-6})
    assert harness.measure(judged_by_rows, Budget(60))["wrong"] == ["far"]


def test_measure_gives_no_time_to_a_provider_that_overwrites_its_input_unannounced() -> None:
    record = measured(provider("sly", lambda x: x.mul_(2).clone()), provider("after", doubled))
    assert timed(record) == ["torch", "after"]
    assert "overwrites its input 'x'" in record["rejected"]["sly"]


def test_measure_restores_an_input_that_a_provider_says_it_overwrites() -> None:
    seen = []

    def in_place(x: Tensor) -> Tensor:
        seen.append(x.sum().item())
        return x.mul_(2)

    record = measured(provider("in place", in_place, "ours", mutates=("x",)), provider("after", doubled))
    assert timed(record) == ["torch", "in place", "after"]
    assert len(seen) > 2 * harness.MAX_ROUNDS
    assert set(seen) == {seen[0]}


def test_measure_judges_integers_by_equality() -> None:
    def counting(count: int) -> Provider:
        return Provider(f"counts {count}", lambda: lambda given: {"n": torch.tensor(count)})

    case = Case(
        "counting", CPU, lambda: {"x": torch.randn(N)}, lambda given: {"n": torch.tensor(N)},
        [counting(N), counting(N + 1)], reference=f"counts {N}",
    )  # fmt: skip
    record = harness.measure(case, Budget(60))
    assert timed(record) == [f"counts {N}"]
    assert record["wrong"] == [f"counts {N + 1}"]


def test_measure_names_why_a_provider_is_missing_and_times_the_others() -> None:
    def absent() -> harness.Run:
        raise UnavailableError("not timed: it is not installed")

    def broken(x: Tensor) -> Tensor:
        raise RuntimeError("no such kernel\nand a long trace")

    record = measured(Provider("absent", absent), provider("broken", broken), provider("fine", doubled))
    assert timed(record) == ["torch", "fine"]
    assert record["wrong"] == []
    assert record["rejected"] == {
        "absent": "not timed: it is not installed",
        "broken": "failed: RuntimeError: no such kernel",
    }


def test_import_peer_says_why_a_peer_is_not_timed() -> None:
    assert harness.import_peer("torch.nn", "torch") is torch.nn
    with pytest.raises(UnavailableError, match="not timed: no-such cannot be imported: No module named 'no_such'"):
        harness.import_peer("no_such.module", "no-such")
    with pytest.raises(UnavailableError, match="not timed: its kernels need a GPU"):
        harness.import_peer("torch.nn", "torch", CPU)


def test_measure_does_not_compare_a_floor_with_the_truth() -> None:
    record = measured(provider("ours", doubled, "ours"), Provider("floor", lambda: lambda given: {}, "floor"))
    assert timed(record) == ["torch", "ours", "floor"]
    entry = next(entry for entry in record["providers"] if entry["name"] == "ours")
    assert list(entry["times_floor"]) == ["floor"]


def test_interleave_takes_turns_in_rounds_of_different_orders() -> None:
    order: list[str] = []

    def sampler(name: str) -> Callable[[], float]:
        return lambda: order.append(name) or 1.0

    samples = harness.interleave({name: sampler(name) for name in "ABC"}, Budget(60))
    rounds = ["".join(order[start : start + 3]) for start in range(0, len(order), 3)]
    assert len(rounds) == harness.MAX_ROUNDS
    assert {"".join(sorted(one)) for one in rounds} == {"ABC"}
    assert len(set(rounds)) > 3
    assert samples == {name: [1.0] * harness.MAX_ROUNDS for name in "ABC"}


def test_interleave_stops_before_a_round_that_would_not_fit_the_budget() -> None:
    clock = Clock()

    def sample() -> float:
        clock.now += 2.0
        return 2.0

    samples = harness.interleave({"A": sample, "B": sample}, Budget(19.0, clock))
    assert {name: len(seconds) for name, seconds in samples.items()} == {"A": 4, "B": 4}  # rounds of 4 s
    assert clock.now == 16.0


def test_measure_says_what_the_budget_left_out() -> None:
    record = harness.measure(case_of(provider("ours", doubled, "ours"), provider("peer", doubled)), Budget(0.0))
    assert timed(record) == []
    assert record["left_out"][0] == "peer: the time was used up before its check"
    assert record["left_out"][1].startswith("timing: 3 rounds of all need")


def slow(x: Tensor) -> Tensor:
    time.sleep(0.2)
    return 2 * x


def test_measure_leaves_out_the_slowest_peer_rather_than_all() -> None:
    record = harness.measure(case_of(provider("ours", doubled, "ours"), provider("slow", slow)), Budget(1.0))
    assert timed(record) == ["torch", "ours"]
    assert [what.partition(" need")[0] for what in record["left_out"]] == ["slow: 3 rounds of all"]


def test_measure_leaves_out_timing_that_cannot_fit() -> None:
    record = harness.measure(case_of(provider("slow", slow, "ours")), Budget(1.0))
    assert timed(record) == []
    assert [what.partition(" need")[0] for what in record["left_out"]] == ["timing: 3 rounds of all"]


def test_measure_takes_the_least_that_a_timing_needs_from_the_whole_run() -> None:
    case = case_of(provider("slow", slow, "ours"), provider("slow too", slow))
    record = harness.measure(case, Budget(1.0), Budget(60))
    assert timed(record) == ["torch", "slow"]
    assert {entry["rounds"] for entry in record["providers"]} == {harness.MIN_ROUNDS}
    assert [what.partition(" need")[0] for what in record["left_out"]] == ["slow too: 3 rounds of all"]


def test_measure_charges_no_compilation_to_the_timings() -> None:
    def compiling() -> harness.Run:
        time.sleep(1.0)
        return lambda given: {"y": doubled(given["x"])}

    record = harness.measure(case_of(Provider("compiling", compiling), provider("after", doubled)), Budget(0.5))
    assert timed(record) == ["torch", "compiling"]
    assert record["left_out"] == ["after: the time was used up before its check"]


@pytest.mark.parametrize("seconds", [0.5, 1e-4])
def test_host_timer_gives_the_time_of_one_call_whether_or_not_it_repeats(monkeypatch, seconds: float) -> None:
    clock = Clock()
    monkeypatch.setattr(harness, "time", types.SimpleNamespace(perf_counter=clock))

    def run() -> None:
        clock.now += seconds
        calls.append(clock.now)

    calls: list[float] = []
    sample = harness.HostTimer(CPU).sampler(run, None, seconds)
    assert round(sample(), 9) == seconds
    assert len(calls) == 1 + max(1, round(harness.MIN_SAMPLE_SECONDS / seconds))  # the first is not timed


def test_ratios_are_those_of_the_same_rounds() -> None:
    entry = harness._ratio([1.0, 2.0, 4.0], [3.0, 6.0, 12.0])
    assert entry == {"speedup": 3.0, "speedup_quartiles": [3.0, 3.0]}


# Resident memory is the whole process's: some other page of it may be given back while a run is measured.
SLACK_MIB = 1


def memory_mib(run: Callable[[], object]) -> tuple[float, float]:
    memory = machine.memory_of(CPU, run)
    if memory is None:
        pytest.skip("this system keeps no resettable high-water mark")
    return memory.peak / 2**20, memory.working / 2**20


@pytest.mark.parametrize("mib", [8, 64])
def test_peak_memory_sees_a_known_allocation(mib: int) -> None:
    torch.ones(2**25)  # a higher mark from before does not count
    peak, _ = memory_mib(lambda: torch.ones(mib * 2**18))
    assert mib - SLACK_MIB <= peak < mib + 4


def test_peak_memory_sees_what_was_freed_again() -> None:
    def run() -> torch.Tensor:
        return torch.ones(2**24).exp().sum()  # two tensors of 64 MiB, then a scalar

    run()  # the pages of PyTorch's code that a first call touches would count
    peak, _ = memory_mib(run)
    assert 128 - SLACK_MIB <= peak < 136


@pytest.mark.parametrize("mib", [8, 64])
def test_working_memory_leaves_out_the_results_and_nothing_else(mib: int) -> None:
    def run() -> torch.Tensor:
        return torch.ones(mib * 2**18).exp()  # one tensor of so many MiB is scratch, the other the result

    run()
    peak, working = memory_mib(run)
    assert 2 * mib - SLACK_MIB <= peak < 2 * mib + 4
    assert mib - SLACK_MIB <= working < mib + 4


def test_working_memory_counts_what_is_kept_for_a_backward_pass() -> None:
    class Hoarding(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            ctx.hoard = torch.ones(2**24)  # 64 MiB that live as long as the graph
            return 2 * x

    case = dataclasses.replace(case_of(), inputs=lambda: {"x": torch.randn(N, requires_grad=True)})
    case = dataclasses.replace(case, providers=[*case.providers, provider("hoarding", Hoarding.apply)])
    entry = next(e for e in harness.measure(case, Budget(60))["providers"] if e["name"] == "hoarding")
    if entry["working_bytes"] is None:
        pytest.skip("this system keeps no resettable high-water mark")
    assert (64 - SLACK_MIB) * 2**20 <= entry["working_bytes"] < 72 * 2**20


def test_matmul_ceiling_counts_two_flops_per_multiply_add() -> None:
    ceiling = machine.matmul_ceiling(CPU, torch.float32)
    n = ceiling.run().shape[0]
    assert ceiling.amount == 2.0 * n**3


@pytest.mark.parametrize(
    ("device_type", "name", "expected"),
    [
        ("cuda", "NVIDIA H200", "nvidia-h200"),
        ("cpu", "Intel(R) Xeon(R) Processor @ 2.10GHz", "cpu-intel-xeon-processor-2-10ghz"),
    ],
)
def test_slug_is_a_plain_file_name(device_type: str, name: str, expected: str) -> None:
    assert machine.slug(device_type, name) == expected


@pytest.fixture
def one_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command with one small benchmark instead of those in the folder."""

    class Doubling:
        @staticmethod
        def cases(device: torch.device) -> list[Case]:
            return [case_of(provider("ours", lambda x: x + x, "ours"), provider("wrong", lambda x: 3 * x))]

    monkeypatch.setattr(command, "importlib", types.SimpleNamespace(import_module=lambda name: Doubling))
    monkeypatch.setattr(machine, "matmul_ceiling", lambda device, dtype: machine.copy_ceiling(device))


@pytest.mark.usefixtures("one_case")
def test_command_writes_a_record_that_says_where_when_and_how(tmp_path, capsys) -> None:
    path = tmp_path / "out.json"
    exit_code = command.main(["layer_norm", "--json", str(path), "--device", "cpu", "--seconds", "60"])
    record = json.loads(path.read_text())
    assert exit_code == 1, "a wrong provider is a failure of the run"
    assert {"device", "cpu", "cpu_capability", "cores", "threads", "driver", "platform"} <= record["machine"].keys()
    assert {"python", "torch", "triton", "numpy", "cuda"} <= record["versions"].keys()
    assert {"date", "commit", "dirty", "command", "seconds", "budget_seconds"} <= record["run"].keys()
    assert len(record["run"]["commit"]) == 40
    assert record["versions"]["torch"] == torch.__version__
    (result,) = record["results"]
    for entry in result["providers"]:
        assert min(entry["median_ms"], entry["rates"]["byte"], entry["shares"]["byte"]) > 0
        assert entry["quartiles_ms"][0] <= entry["median_ms"] <= entry["quartiles_ms"][1]
    printed = capsys.readouterr().out
    assert report.table(result) in printed
    written = path.with_suffix(".txt").read_text()
    assert report.table(result) in written
    assert record["run"]["commit"][:10] in written
    assert "wrong: wrong, so not timed" in printed


@pytest.mark.usefixtures("one_case")
def test_command_names_what_it_left_out(tmp_path, capsys) -> None:
    path = tmp_path / "out.json"
    command.main(["layer_norm", "--json", str(path), "--device", "cpu", "--seconds", "0"])
    assert json.loads(path.read_text())["left_out"] == ["layer_norm: doubling"]
    assert "left out" in capsys.readouterr().out


@pytest.mark.usefixtures("one_case")
def test_command_goes_on_with_a_record_and_names_the_case_that_ended_it(tmp_path, capsys, monkeypatch) -> None:
    """The one case is measured; of two others, one had been measured before, one was running when the process ended."""
    path = tmp_path / "out.json"
    arguments = ["layer_norm", "--json", str(path), "--device", "cpu", "--seconds", "60", "--continue"]
    command.main(arguments)
    before = json.loads(path.read_text())
    monkeypatch.setattr(harness, "measure", lambda *case: pytest.fail("it was measured already"))
    command.main(arguments)
    assert json.loads(path.read_text())["results"] == before["results"]
    path.write_text(json.dumps(before | {"results": [], "running": "layer_norm: doubling"}))
    command.main(arguments)
    record = json.loads(path.read_text())
    assert record["ended_in"] == {"layer_norm: doubling": "it hung, or an error ended it"}
    assert "not measured, layer_norm: doubling: it hung" in path.with_suffix(".txt").read_text()


@pytest.mark.parametrize("content", ["", "[]", '{"results": []}'])
def test_command_refuses_to_go_on_with_what_is_no_record(content, tmp_path, capsys) -> None:
    path = tmp_path / "odd.json"
    path.write_text(content)
    with pytest.raises(SystemExit) as ended:
        command.main(["layer_norm", "--device", "cpu", "--continue", "--json", str(path)])
    assert ended.value.code == 2
    assert "odd.json is no record" in capsys.readouterr().err
    assert path.read_text() == content


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--continue"], "name it by --json"),
        *((["--seconds", seconds], f"{seconds} is no time") for seconds in ("nan", "inf", "-1")),
        (["--seconds", "soon"], "invalid seconds value"),
    ],
)
def test_command_refuses_options_that_mean_nothing(arguments, message, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(["layer_norm", "--device", "cpu", *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_quick_takes_the_seconds_that_are_given(monkeypatch, capsys) -> None:
    monkeypatch.setattr(command, "_cases", lambda chosen, device: [])
    taken, nothing = [], {"results": [], "lost_device": False}
    monkeypatch.setattr(command, "run", lambda cases, device, budget, *_: taken.append(budget.seconds) or nothing)
    for arguments in ([], ["--seconds", "7"]):
        command.main(["softmax", "--device", "cpu", "--quick", *arguments])
    assert taken == [command.QUICK_SECONDS, 7.0]


@pytest.mark.usefixtures("one_case")
def test_command_measures_again_what_had_no_time(tmp_path) -> None:
    path = tmp_path / "out.json"
    arguments = ["layer_norm", "--json", str(path), "--device", "cpu", "--seconds", "60", "--continue"]
    command.main(arguments)
    record = json.loads(path.read_text())
    (result,) = record["results"]
    path.write_text(json.dumps(record | {"results": [result | {"left_out": ["peer: no time"], "providers": []}]}))
    command.main(arguments)
    (again,) = json.loads(path.read_text())["results"]
    assert again["left_out"] == []
    assert again["providers"]


@pytest.mark.usefixtures("one_case")
def test_command_ends_where_the_device_is_lost(tmp_path, monkeypatch) -> None:
    path = tmp_path / "out.json"
    monkeypatch.setattr(machine, "answers", lambda device: False)
    arguments = ["layer_norm", "--json", str(path), "--device", "cpu", "--seconds", "60"]
    assert command.main(arguments) == command.LOST_DEVICE
    record = json.loads(path.read_text())
    assert (record["results"], list(record["ended_in"])) == ([], ["layer_norm: doubling"])


def test_command_compiles_by_running_each_provider_once(monkeypatch, capsys) -> None:
    calls: list[str] = []

    def noted(name: str) -> Provider:
        return provider(name, lambda x: calls.append(name) or doubled(x))

    def fails(x: Tensor) -> Tensor:
        raise RuntimeError("no such kernel here")

    monkeypatch.setattr(
        command, "_cases", lambda chosen, device: [("any", case_of(noted("a"), provider("b", fails), noted("c")))]
    )
    assert command.main(["layer_norm", "--device", "cpu", "--compile-only"]) == 0
    assert calls == ["a", "c"]
    assert capsys.readouterr().out == "compiled any: doubling\n"


def test_op_chooses_the_cases_that_name_it(monkeypatch, capsys) -> None:
    cases = [
        ("norms", dataclasses.replace(case_of(), name=name)) for name in ("rms_norm, 8 x 8", "add_rms_norm, 8 x 8")
    ]
    monkeypatch.setattr(command, "_cases", lambda chosen, device: cases)
    assert command.main(["--op", "rms_norm", "--device", "cpu", "--compile-only"]) == 0
    assert capsys.readouterr().out == "compiled norms: rms_norm, 8 x 8\n"
    with pytest.raises(SystemExit):
        command.main(["norms", "--op", "norm", "--device", "cpu", "--compile-only"])
    assert "no case of norms names the op 'norm'" in capsys.readouterr().err


def test_quick_measures_the_first_case_of_each_without_compilation(monkeypatch, capsys, tmp_path) -> None:
    first = case_of(provider("ours", doubled, "ours"), provider("torch compiled", doubled))
    second = dataclasses.replace(case_of(), name="another")
    alone = dataclasses.replace(case_of(), name="alone", providers=[provider("torch", doubled, "ours")])
    monkeypatch.setattr(
        command, "_cases", lambda chosen, device: [(name, x) for name in chosen for x in (alone, first, second)]
    )
    monkeypatch.setattr(command, "QUICK_SECONDS", 2.0)
    written = ["--json", str(tmp_path / "quick.json")]
    assert command.main(["softmax", "training", "--device", "cpu", "--quick", *written]) == 0
    printed = capsys.readouterr().out
    assert "another" not in printed
    assert "alone" not in printed
    assert "torch compiled" not in printed
    *_, head, one, other = printed.rstrip().splitlines()
    assert "speed of the fastest peer" in head
    assert [line.split(":")[0] for line in (one, other)] == ["training", "softmax"]
    for line in (one, other):
        _, _, speed, peer, *_ = line.split()
        assert (speed[-1], peer) == ("x", "torch")
    assert (tmp_path / "quick.html").exists()


def test_command_divides_its_time_by_the_weights_of_the_cases(monkeypatch) -> None:
    cases = [dataclasses.replace(case_of(), name=f"weight {weight}", weight=weight) for weight in (1.0, 3.0)]
    monkeypatch.setattr(machine, "matmul_ceiling", lambda device, dtype: machine.copy_ceiling(device))
    given = []

    def note(case: Case, budget: Budget, whole: Budget) -> dict:
        given.append(round(budget.remaining() / 100, 1))
        return {"case": case.name, "wrong": [], "left_out": [], "providers": []}

    monkeypatch.setattr(harness, "measure", note)
    monkeypatch.setattr(report, "table", lambda result: "")
    command.run([("any", case) for case in cases], CPU, Budget(1000.0), None)
    assert given == [2.5, 10.0]  # the second may use what the first left over


@pytest.mark.parametrize(("taken", "measured"), [(1.0, ["first", "second", "first"]), (4.0, ["first", "second"])])
def test_command_begins_a_case_again_only_with_more_time(monkeypatch, taken: float, measured: list[str]) -> None:
    cases = [dataclasses.replace(case_of(), name=name) for name in ("first", "second")]
    clock, names = Clock(), []

    def lacks_time(case: Case, budget: Budget, whole: Budget) -> dict:
        names.append(case.name)
        clock.now += taken
        what = ["a peer: no time"] if case.name == "first" else []
        return {"benchmark": "any", "case": case.name, "wrong": [], "left_out": what, "providers": []}

    monkeypatch.setattr(machine, "matmul_ceiling", lambda device, dtype: machine.copy_ceiling(device))
    monkeypatch.setattr(harness, "measure", lacks_time)
    monkeypatch.setattr(report, "table", lambda result: "")
    record = command.run([("any", case) for case in cases], CPU, Budget(10.0, clock), None)
    assert names == measured
    assert record["running"] is None


def test_table_shows_formula_ceiling_share_and_ratio() -> None:
    text = report.table({"benchmark": "doubling", **measured(provider("ours", doubled, "ours"))})
    assert "8 N bytes: read, written" in text
    assert "GB/s in the same rounds" in text
    header = next(line for line in text.splitlines() if "median" in line)
    assert all(column in header for column in ("of copy", "peak memory", "working memory", "vs torch")), header
    assert any(line.strip().startswith("ours") and "x (" in line and "%" in line for line in text.splitlines())


def test_every_benchmark_lists_cases_with_work_that_the_report_can_print() -> None:
    names = (
        "activations",
        "cross_entropy",
        "layer_norm",
        "linear_cross_entropy",
        "linear_logprobs",
        "norms",
        "packing",
        "rotary",
        "softmax",
    )
    for name in names:
        for case in importlib.import_module(f"benchmarks.bench_{name}").cases(CPU):
            assert case.reference in {provider.name for provider in case.providers}, case.name
            assert all(work.unit in report.UNITS for work in case.work), case.name
