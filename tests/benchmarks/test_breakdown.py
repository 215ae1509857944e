"""The breakdown of a training step: every op's time in one part, and the parts the whole step."""

import json

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import breakdown, harness, report
from benchmarks.bench_training import Shape

TINY = Shape(1, 2, 32, 65, 2, 16)
ALIKE = harness.Provider("alike", lambda: lambda given: {"y": given["x"]})


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("breakdown") / "here.json"


@pytest.fixture(scope="module")
def record(path):
    x = torch.ones(8)
    case = harness.Case(
        "copied", torch.device("cpu"), lambda: {"x": x}, lambda given: {"y": x.double()}, [ALIKE], "alike"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(breakdown, "cases", lambda: [("any", case)])
        return breakdown.run(1.0, path, (TINY,))


def test_parts_are_the_whole_step(record):
    for result in record["steps"]:
        for name, parts in result["parts_ms"].items():
            assert tuple(parts) == breakdown.PARTS
            assert sum(parts.values()) == pytest.approx(result["ms"][name])


def test_every_part_of_a_step_takes_time(record):
    for result in record["steps"]:
        assert all(ms > 0 for ms in result["floor_ms"].values())
        for parts in result["parts_ms"].values():
            assert all(ms > 0 for ms in parts.values()), parts


def test_ops_are_counted_where_they_belong():
    class Event:
        def __init__(self, name, parent=None):
            self.name, self.cpu_parent = name, parent

    backward = Event("autograd::engine::evaluate_function: AddmmBackward0")
    loss = Event("fastlm::linear_cross_entropy", Event("SummedLossFunction"))
    assert breakdown.part_of(Event("aten::mm", backward)) == "linear layers"
    assert breakdown.part_of(Event("aten::copy_", loss)) == "head and loss"
    assert breakdown.part_of(Event("aten::copy_", Event("aten::to"))) == "casts and copies"
    assert breakdown.part_of(Event("aten::sum", Event("fastlm::attention_backward"))) == "attention"
    assert breakdown.part_of(Event("aten::view")) == breakdown.REST


def test_breakdown_is_written_and_read_again(record, path):
    assert json.loads(path.read_text()) == json.loads(json.dumps(record))
    written = path.with_suffix(".txt").read_text()
    assert all(breakdown.table(step) in written for step in record["steps"])
    assert report.table(record["results"][0]) in written
    assert "any: copied" in written


def test_breakdown_compares_packed_with_padded_documents_and_what_checkpointing_keeps():
    packed, checkpointed = (case for _, case in breakdown.cases())
    assert [provider.name for provider in packed.providers if provider.role == "ours"] == [
        "fastlm, packed",
        "fastlm, padded",
    ]
    assert {"none", "selective (budget 0.5)", "full"} <= {provider.name for provider in checkpointed.providers}


def test_a_record_that_its_text_would_overwrite_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.main(["training", "--breakdown", "--json", str(tmp_path / "here.txt")])
    assert "here.txt does not end in .json" in capsys.readouterr().err


@pytest.mark.parametrize("names", [[], ["softmax"], ["training", "softmax"]])
def test_breakdown_is_of_training_alone(names, capsys):
    with pytest.raises(SystemExit):
        command.main([*names, "--breakdown"])
    assert "--breakdown is of training on a CPU" in capsys.readouterr().err
