import datetime
import gc
import io
import json
import os
import random
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fastlm.train import Trainer, checkpoint, checkpoint_files, run_log
from fastlm.train.checkpoint import CheckpointError
from fastlm.train.metrics import MetricsLog, read_metrics
from fastlm.train.parallelize import CompilationError
from fastlm.train.progress import Sample
from fastlm.train.trainer import DivergedError
from tests.support.toy import ToyLoader, ToyModel, toy_batch, toy_config, toy_trainer
from tests.train.test_checkpoint import seal
from tests.train.test_update import Poisoned

pytestmark = pytest.mark.usefixtures("obeyed_signals")

HELD_OUT = [toy_batch(index, 4) for index in range(1000, 1003)]


def losses(run):
    """What each line of metrics.jsonl says but for timings; Adam alone would not notice gradients of another scale."""
    timed = {"tokens_per_second", "flops_per_second", "mfu", "memory", "seconds_left"}
    records = read_metrics(run / "metrics.jsonl")
    return [{key: value for key, value in record.items() if key not in timed} for record in records]


def everything(run):
    """All that a later step could depend on, in the newest checkpoint."""
    saved = checkpoint.read_newest(run)
    tensors = {f"{group} {name}": value for group, named in saved.tensors.items() for name, value in named.items()}
    keys = "step", "totals", "loss_scale", "early_stopping", "eval_loss"
    return tensors, {key: saved.state[key] for key in keys} | saved.rank_state


def assert_same_run(one, other):
    (tensors, state), (other_tensors, other_state) = everything(one), everything(other)
    assert tensors.keys() == other_tensors.keys()
    assert [name for name in tensors if not torch.equal(tensors[name], other_tensors[name])] == []
    assert state == other_state
    assert losses(one) == losses(other)


@pytest.mark.parametrize(
    ("precision", "more"),
    [
        ("fp32", {}),
        ("bf16", {}),
        ("fp16", {}),
        ("bf16-params", {"ema_decay": 0.75}),
        ("fp32", {"ema_decay": 0.75, "early_stopping_patience": 9}),
        ("fp32", {"optimizer": "sgd", "ema_decay": 0.75}),
        ("fp16", {"optimizer": "adagrad", "l1": 0.01}),
        ("bf16", {"optimizer": "muon", "schedule": "wsd"}),
        ("bf16-params", {"optimizer": "sgd"}),
        ("bf16-params", {"optimizer": "adagrad"}),
        ("bf16-params", {"optimizer": "muon", "ema_decay": 0.75}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_resumed_run_equals_a_straight_one_to_the_bit(tmp_path, precision, more):
    changes = {"steps": 10, "grad_accumulation_steps": 2, "log_interval": 2, "eval_interval": 4}
    changes |= more | {"precision": precision}

    def train(out, **more):
        return toy_trainer(out, model=ToyModel(dropout=0.2), eval_loader=HELD_OUT, **(changes | more)).fit()

    train(tmp_path / "straight")
    interrupt = {"on_step": lambda step: step == 4 and os.kill(os.getpid(), signal.SIGTERM)}
    result = train(tmp_path / "resumed", **interrupt)
    assert (result.step, result.stopped_by) == (5, "SIGTERM")
    torch.rand(7)  # what happened in between must not matter
    assert train(tmp_path / "resumed").step == 10
    assert_same_run(tmp_path / "straight", tmp_path / "resumed")


def with_weight(weight):
    """A toy model with another tensor as the weight of its hidden layer."""
    model = ToyModel()
    model.hidden.weight = nn.Parameter(weight)
    return model


def with_buffers(**buffers):
    model = ToyModel()
    for name, buffer in buffers.items():
        model.register_buffer(name, buffer)
    return model


class ExtraState(nn.Module):
    """Holds a value that is no tensor."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def get_extra_state(self):
        return self.value

    def set_extra_state(self, value):
        self.value = value


def with_extra_state(value):
    model = ToyModel()
    model.extra = ExtraState(value)
    return model


def part_of(whole):
    model = with_weight(whole[128:384].view(16, 16))
    model.register_buffer("whole", whole)
    return model


def flat(size):
    return torch.arange(size) / size


WHOLE = torch.linspace(-1, 1, 16 * 32)
MODELS = {
    "transposed weight": lambda: with_weight(WHOLE[:256].clone().view(16, 16).t()),
    "every other column of a matrix as weight": lambda: with_weight(WHOLE.clone().view(16, 32)[:, ::2]),
    "every other row of a matrix, transposed, as weight": lambda: with_weight(WHOLE.clone().view(32, 16)[::2].t()),
    "weight in the middle of a buffer": lambda: part_of(WHOLE.clone()),
    "overlapping buffers": lambda: with_buffers(**{"all": (whole := flat(9)), "some": whole[2:7], "steps": whole[::2]}),
    "expanded buffers": lambda: with_buffers(row=flat(3).expand(4, 3), column=flat(3)[:, None].expand(3, 5)),
    "sliding windows": lambda: with_buffers(windows=flat(9).unfold(0, 3, 1)),
    "dtypes that safetensors has not": lambda: with_buffers(
        doubles=torch.full((2,), 1 + 2j, dtype=torch.complex128), scale=torch.ones(3).to(torch.float8_e8m0fnu)
    ),
    "conjugate": lambda: with_buffers(conjugate=torch.full((2,), 1 + 2j).conj()),
    "sparse": lambda: with_buffers(sparse=torch.eye(3).to_sparse()),
}


@pytest.mark.parametrize("case", MODELS)
def test_run_of_any_memory_layout_resumes_to_the_bit(tmp_path, case):
    changes = {"schedule": "constant", "warmup_ratio": 0.0}
    toy_trainer(tmp_path / "straight", model=MODELS[case](), steps=6, **changes).fit()
    toy_trainer(tmp_path / "resumed", model=MODELS[case](), steps=3, **changes).fit()
    lines, model = [], MODELS[case]()
    toy_trainer(tmp_path / "resumed", model=model, steps=6, on_log=lines.append, **changes).fit()
    assert "step-00000003" in lines[1]
    straight, resumed = (checkpoint.read_newest(tmp_path / name) for name in ("straight", "resumed"))
    for ours, theirs in (
        (straight.tensors["model"], resumed.tensors["model"]),
        (straight.tensors["optimizer"], resumed.tensors["optimizer"]),
    ):
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not torch.equal(ours[name].to_dense(), theirs[name].to_dense())] == []
    own = model.state_dict()
    assert [
        name for name in own if not torch.equal(own[name].to_dense(), resumed.tensors["model"][name].to_dense())
    ] == []


def test_parameter_with_gaps_is_trained_as_the_same_numbers_without(tmp_path):
    whole = WHOLE.clone().view(16, 32)
    scattered, packed, gaps = with_weight(whole[:, ::2]), with_weight(whole[:, ::2].clone()), whole[:, 1::2].clone()
    for model in scattered, packed:
        toy_trainer(tmp_path / str(model is packed), model=model, steps=3).fit()
    assert torch.equal(scattered.hidden.weight, packed.hidden.weight)
    assert torch.equal(whole[:, 1::2], gaps)


@pytest.mark.parametrize(
    "value",
    [
        {"scale": 0.5, "history": [torch.ones(2), (3, None)]},
        None,
        7,
        "text",
        {1, 2},
        np.arange(3.0),
        np.float32(2),
        io.BytesIO(b"\x80bytes"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_extra_state_of_a_module_is_resumed(tmp_path, value):
    toy_trainer(tmp_path, model=with_extra_state(value), steps=2).fit()
    model = with_extra_state("nothing yet")
    toy_trainer(tmp_path, model=model, steps=3).fit()
    assert type(model.extra.value) is type(value)
    as_text = (lambda x: x.getvalue()) if isinstance(value, io.BytesIO) else repr
    assert as_text(model.extra.value) == as_text(value)


class Unloadable(ExtraState):
    """Gives a state that it cannot take."""

    set_extra_state = nn.Module.set_extra_state


def with_unloadable_state():
    model = ToyModel()
    model.extra = Unloadable(1)
    return model


@pytest.mark.parametrize(
    ("model", "more", "message"),
    [
        (
            lambda: with_extra_state({"of": datetime.date(2026, 1, 1)}),
            {},
            "hold 'extra._extra_state' of the model, a dict",
        ),
        (lambda: with_extra_state(lambda: 0), {}, "hold 'extra._extra_state' of the model, a function"),
        (
            lambda: with_buffers(bits=torch.zeros(3, dtype=torch.uint8).view(torch.uint1)),
            {},
            "hold 'bits' of the model, a tensor of torch.uint1",
        ),
        (with_unloadable_state, {}, "ToyModel cannot be saved and resumed: .*extra._extra_state"),
        (
            ToyModel,
            {"metadata": {"data": datetime.date(2026, 1, 1)}},
            "hold the metadata of this run: .*date is not JSON",
        ),
    ],
    ids=["date", "function", "uint1", "unloadable", "metadata"],
)
def test_what_no_checkpoint_can_hold_is_refused_before_the_first_step(tmp_path, model, more, message):
    loader = ToyLoader()
    with pytest.raises(CheckpointError, match=message) as caught:
        toy_trainer(tmp_path, model=model(), loader=loader, **more).fit()
    assert "\n" not in str(caught.value)
    assert loader.position == 0


@pytest.mark.parametrize("model", [nn.Linear(3, 3), nn.Module()])
def test_model_that_takes_no_batch_is_refused_with_the_way_to_wrap_it(tmp_path, model):
    with pytest.raises(TypeError, match=rf"{type(model).__name__} cannot be called .* train fastlm.CausalLM\(model\)"):
        toy_trainer(tmp_path, model=model)


def test_config_of_another_type_is_refused():
    with pytest.raises(TypeError, match=r"config is of type dict, expected fastlm\.TrainConfig"):
        Trainer(ToyModel(), {"steps": 2}, ToyLoader())


def test_loader_state_that_is_no_json_is_refused_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(ToyLoader, "state_dict", lambda loader: {"position": np.int64(loader.position)})
    with pytest.raises(CheckpointError, match=r"hold the loader of this run: .*int64 is not JSON"):
        toy_trainer(tmp_path).fit()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"])
def test_signal_finishes_the_step_saves_and_says_how_to_resume(tmp_path, name):
    lines = []
    stop = lambda step: step == 3 and os.kill(os.getpid(), getattr(signal, name))  # noqa: E731
    result = toy_trainer(tmp_path, on_log=lines.append, on_step=stop).fit()
    assert (result.stopped_by, result.step, result.checkpoint.name) == (name, 4, "step-00000004")
    assert lines[-1] == f"stopped by {name} after step 4; the same command resumes from there"


class Interrupting:
    """Held-out batches; a signal comes with the second of the first time."""

    def __init__(self):
        self.evaluations, self.batches = 0, 0

    def __iter__(self):
        self.evaluations += 1
        for index, batch in enumerate(HELD_OUT):
            if (self.evaluations, index) == (1, 1):
                os.kill(os.getpid(), signal.SIGTERM)
            self.batches += 1
            yield batch


@pytest.mark.parametrize("steps", [3, 6])
def test_signal_in_an_evaluation_ends_it_and_the_resumed_run_evaluates_first(tmp_path, steps):
    lines, held_out = [], Interrupting()
    command = {"steps": steps, "eval_interval": 3, "early_stopping_patience": 9}
    stopped = toy_trainer(tmp_path / "stopped", eval_loader=held_out, on_log=lines.append, **command).fit()
    assert (stopped.stopped_by, stopped.step, stopped.evaluation, held_out.batches) == ("SIGTERM", 3, None, 2)
    assert lines[-1].endswith("after step 3; the same command resumes from there, with the evaluation of that step")
    toy_trainer(tmp_path / "stopped", eval_loader=held_out, **command).fit()
    toy_trainer(tmp_path / "straight", eval_loader=HELD_OUT, **command).fit()
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")


def test_closed_pipe_stops_training_with_a_checkpoint(tmp_path):
    def on_log(line):
        if line.startswith("step  2"):
            raise BrokenPipeError

    result = toy_trainer(tmp_path, on_log=on_log).fit()
    assert (result.stopped_by, result.step, result.checkpoint.name) == ("a closed pipe", 3, "step-00000003")


def test_line_that_cannot_be_written_ends_no_training(tmp_path):
    def on_log(line):
        raise OSError(28, "No space left on device")

    assert toy_trainer(tmp_path, on_log=on_log).fit().step == 10


def broken_picture(metrics, picture):
    raise RuntimeError("this matplotlib\nis broken")


@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("unwritable", [False, True])
def test_picture_that_cannot_be_drawn_fails_no_run(tmp_path, monkeypatch, stop, unwritable):
    lines = []
    if unwritable:
        (tmp_path / "losses.png").mkdir()
    else:
        monkeypatch.setattr(run_log, "plot_losses", broken_picture)

    def on_step(step):
        if stop and step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    result = toy_trainer(tmp_path, on_log=lines.append, on_step=on_step).fit()
    assert (result.stopped_by, result.checkpoint.is_dir()) == ("SIGINT" if stop else None, True)
    assert lines[-1].startswith("losses.png was not drawn: ")
    assert "\n" not in lines[-1]


def test_metrics_that_cannot_be_written_end_no_training(tmp_path, monkeypatch):
    def full(log, record):
        raise OSError(28, "No space left on device", str(tmp_path / "metrics.jsonl"))

    monkeypatch.setattr(MetricsLog, "write", full)
    lines = []
    assert toy_trainer(tmp_path, on_log=lines.append).fit().checkpoint.name == "step-00000010"
    told = [line for line in lines if "ends here" in line]
    assert told == [
        f"metrics.jsonl ends here: {tmp_path}/metrics.jsonl: No space left on device; training goes on without it"
    ]


def test_old_checkpoint_that_cannot_be_deleted_ends_no_training(tmp_path, monkeypatch):
    def busy(path):
        raise OSError(16, "Device or resource busy", str(path))

    monkeypatch.setattr(checkpoint_files, "remove", lambda path: busy(path) if path.name.endswith(".deleted") else None)
    lines = []
    result = toy_trainer(tmp_path, on_log=lines.append, checkpoint_interval=1, keep_checkpoints=1, steps=3).fit()
    assert result.checkpoint.is_dir()
    assert any(line.startswith("an older checkpoint could not be deleted: ") for line in lines)


class Uncompilable(ToyModel):
    """As a model on a machine without a compiler: the first compiled step fails."""

    def compile(self):
        self.forward = self.fail

    def fail(self, *batch, **documents):
        raise torch._dynamo.exc.TorchDynamoException("No working C++ compiler found in\n(None, 'g++')")


def test_compiler_that_does_not_work_is_told_in_one_line(tmp_path):
    toy_trainer(tmp_path, steps=2).fit()
    with pytest.raises(CompilationError) as caught:
        toy_trainer(tmp_path, model=Uncompilable(), steps=4, compile=True).fit()
    assert str(caught.value) == (
        "torch.compile failed: No working C++ compiler found in (None, 'g++'); train without compile, or install what "
        "it asks for; the checkpoints are unharmed"
    )
    assert checkpoint.read_newest(tmp_path).state["step"] == 2


def test_fit_learns_what_can_be_learnt(tmp_path):
    result = toy_trainer(tmp_path, steps=200, learning_rate=3e-2, eval_loader=HELD_OUT, eval_bytes=400).fit()
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert records[0]["loss"] > 3 > 0.1 > result.evaluation.loss
    assert records[-1]["eval_loss"] == result.evaluation.loss
    assert result.loss == records[-2]["loss"]
    assert (tmp_path / "losses.png").exists()


def test_first_line_comes_before_the_first_step_and_the_next_right_after(tmp_path):
    told = []
    toy_trainer(tmp_path, on_log=told.append, on_step=told.append, log_interval=100).fit()
    assert told[0].startswith("training 736 parameters in fp32 on cpu with")
    told = [entry for entry in told if not str(entry).startswith("memory")]  # the estimate, and perhaps the peak
    assert told[1].startswith("step  1/10  loss ")
    assert told[2:] == [1, 2, 3, 4, 5, 6, 7, 8, 9, told[11], 10]


def test_log_line_is_the_token_mean_since_the_line_before(tmp_path):
    toy_trainer(tmp_path / "every", steps=4, log_interval=1).fit()
    toy_trainer(tmp_path / "second", steps=4, log_interval=4).fit()
    every, second = read_metrics(tmp_path / "every/metrics.jsonl"), read_metrics(tmp_path / "second/metrics.jsonl")
    counts = [int((batch.targets != -100).sum()) for batch in (toy_batch(index, 4) for index in range(4))]
    assert [record["num_tokens"] for record in every] == [sum(counts[: step + 1]) for step in range(4)]
    mean = sum(record["loss"] * n for record, n in zip(every[1:], counts[1:], strict=True)) / sum(counts[1:])
    assert torch.tensor(second[-1]["loss"]) == torch.tensor(mean)


def test_second_fit_of_a_finished_run_trains_no_further(tmp_path):
    lines = []
    toy_trainer(tmp_path).fit()
    before = everything(tmp_path)
    result = toy_trainer(tmp_path, on_log=lines.append).fit()
    assert (result.step, result.loss, result.checkpoint.name) == (10, None, "step-00000010")
    assert "which is all of the 10 steps asked for" in lines[-1]
    assert everything(tmp_path)[1] == before[1]


def test_changed_settings_and_threads_are_announced_at_resume(tmp_path):
    toy_trainer(tmp_path).fit()
    lines, threads = [], torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        toy_trainer(tmp_path, steps=11, learning_rate=0.5, on_log=lines.append).fit()
    finally:
        torch.set_num_threads(threads)
    assert (
        f"this run has {threads + 1} CPU threads and had {threads}: results are no longer equal to the last bit"
        in lines
    )
    assert "changed since then: learning_rate 0.01 -> 0.5, steps 10 -> 11" in lines


def test_precision_may_change_at_resume(tmp_path):
    toy_trainer(tmp_path, precision="fp32").fit()
    result = toy_trainer(tmp_path, precision="fp16", steps=14).fit()
    assert (result.step, result.skipped_steps) == (14, 0)
    assert toy_trainer(tmp_path, precision="bf16", steps=16).fit().loss < 5


class PartlyFrozen(ToyModel):
    def __init__(self):
        super().__init__()
        self.hidden.bias.requires_grad_(False).fill_(1 / 3)

    parameter_groups = None  # the default ones


def before_masters_were_weights(run):
    """Turn the newest checkpoint into one as bf16-params wrote it: bf16 copies, and masters among the optimizer's."""
    path = checkpoint.paths(run)[-1]
    weights, optimizer = (load_file(path / f"{group}.safetensors") for group in ("model", "optimizer"))
    names = {key.rpartition("/")[0] for key in optimizer}
    save_file({name: value.bfloat16() for name, value in weights.items()}, path / "model.safetensors")
    masters = {f"{name}/master": weights[name] for name in names}
    save_file(optimizer | masters, path / "optimizer.safetensors")
    state = json.loads((path / "state.json").read_text())
    state["groups"]["optimizer"]["num_tensors"] += len(masters)
    (path / "state.json").write_text(json.dumps(state))
    seal(path)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("bf16-params", "fp32"),
        ("fp32", "bf16-params"),
        ("bf16-params", "bf16-params"),
        ("older bf16-params", "fp32"),
        ("older bf16-params", "bf16-params"),
    ],
)
def test_run_goes_on_from_its_fp32_weights_in_any_precision(tmp_path, first, then):
    is_older, precision = first.startswith("older"), first.removeprefix("older ")
    toy_trainer(tmp_path, model=PartlyFrozen(), precision=precision, steps=3, ema_decay=0.5).fit()
    before = checkpoint.read_newest(tmp_path).tensors
    if is_older:
        before_masters_were_weights(tmp_path)
    resumed = toy_trainer(tmp_path, model=PartlyFrozen(), precision=then, steps=4, ema_decay=0.5)
    resumed._state.start()
    after = resumed._state.as_saved()["tensors"]
    assert {value.dtype for tensors in before.values() for value in tensors.values()} == {torch.float32}
    was_rounded = is_older or then == "bf16-params"  # the frozen parameter alone has no master
    frozen = before["model"]["hidden.bias"].bfloat16().float() if was_rounded else before["model"]["hidden.bias"]
    for group, tensors in before.items():
        expected = tensors if group == "optimizer" else tensors | {"hidden.bias": frozen}
        assert [name for name in tensors if not torch.equal(expected[name], after[group][name])] == []
    assert resumed.fit().step == 4


def test_mismatch_at_resume_names_both_values_and_overwrites_nothing(tmp_path):
    toy_trainer(tmp_path, metadata={"vocab_size": 29}).fit()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"step-00000010 was trained with vocab_size = 29, and this run has 31"):
        toy_trainer(tmp_path, metadata={"vocab_size": 31}, steps=20).fit()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_model_of_another_shape_is_refused_at_resume(tmp_path):
    toy_trainer(tmp_path).fit()
    model = ToyModel()
    model.hidden = torch.nn.Linear(16, 16, bias=False)
    model.parameter_groups = lambda: [{"params": list(model.parameters()), "weight_decay_scale": 1.0}]
    with pytest.raises(ValueError, match=r"step-00000010 does not fit this model: .*hidden.bias"):
        toy_trainer(tmp_path, model=model, steps=20).fit()


@pytest.mark.parametrize("missing", ["loader", "random"])
def test_checkpoint_of_another_trainer_is_refused_by_name(tmp_path, missing):
    toy_trainer(tmp_path).fit()
    path = checkpoint.path_of(tmp_path, 10)
    state = json.loads((path / "rank-00000.json").read_text())
    del state[missing]
    (path / "rank-00000.json").write_text(json.dumps(state))
    seal(path)
    with pytest.raises(CheckpointError, match=f"step-00000010 is not one that this trainer writes: '{missing}'"):
        toy_trainer(tmp_path, steps=20).fit()


RANK = "rank-00000.json"


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("state.json", "config", None),
        ("state.json", "totals", [1, 2]),
        ("state.json", "totals", {"loss_sum": "low", "num_tokens": 1, "skipped_steps": 0, "skipped_in_a_row": 0}),
        ("state.json", "logged", {"loss_sum": 1.0}),
        ("state.json", "loss_scale", {"scale": 2.0}),
        (RANK, "threads", "two"),
        (RANK, "loader", 3),
        (RANK, "loader", {}),
        (RANK, "random", {"python": [3, [1], None], "numpy": {}, "torch": "", "cuda": None}),
    ],
)
def test_state_of_another_kind_is_refused_by_file_and_key(tmp_path, file, key, value):
    toy_trainer(tmp_path, steps=1).fit()
    path = checkpoint.path_of(tmp_path, 1)
    state = json.loads((path / file).read_text())
    (path / file).write_text(json.dumps(state | {key: value}))
    seal(path)
    with pytest.raises(CheckpointError, match=rf"step-00000001 .*'{key}' in {file}") as caught:
        toy_trainer(tmp_path, steps=2).fit()
    assert "\n" not in str(caught.value)


def test_weights_of_another_dtype_are_refused(tmp_path):
    toy_trainer(tmp_path, steps=1).fit()
    with pytest.raises(
        CheckpointError, match=r"step-00000001 does not fit this model: .*is torch.float32, and the model's"
    ):
        toy_trainer(tmp_path, model=ToyModel().double(), steps=2).fit()


def test_damaged_newest_checkpoint_is_skipped_with_a_word_and_the_run_is_the_same(tmp_path):
    changes = {"steps": 9, "checkpoint_interval": 3, "keep_checkpoints": 3}
    toy_trainer(tmp_path / "straight", **changes).fit()
    toy_trainer(tmp_path / "damaged", **changes).fit()
    (checkpoint.path_of(tmp_path / "damaged", 9) / "model.safetensors").write_bytes(b"rotten")
    lines = []
    toy_trainer(tmp_path / "damaged", on_log=lines.append, **changes).fit()
    assert "skipped a damaged checkpoint" in lines[1]
    assert "step-00000006" in lines[2]
    assert_same_run(tmp_path / "straight", tmp_path / "damaged")


def test_checkpoint_that_cannot_be_written_costs_no_run_but_the_last_does(tmp_path, monkeypatch):
    free, lines = [10**9], []
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": free[0]}))

    def fill(step):
        free[0] = 10 if step in (3, 9) else 10**9

    trainer = toy_trainer(tmp_path, checkpoint_interval=2, on_log=lines.append, on_step=fill)
    with pytest.raises(OSError, match="free some space"):
        trainer.fit()
    told = [line for line in lines if "training goes on" in line]
    assert len(told) == 1
    assert "step-00000004" in told[0] or "free some space" in told[0]
    assert told[0].endswith("; training goes on, and saves again after 2 steps")
    assert [path.name for path in checkpoint.paths(tmp_path)] == ["step-00000006", "step-00000008"]


def test_resume_from_a_checkpoint_of_another_run_continues_its_steps_and_leaves_it(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    toy_trainer(one, steps=9, checkpoint_interval=3, keep_checkpoints=9).fit()
    before = {path: path.read_bytes() for path in one.rglob("*") if path.is_file()}
    command = {"steps": 9, "resume": str(checkpoint.path_of(one, 3)), "checkpoint_interval": 2}
    toy_trainer(other, on_step=lambda step: step == 6 and os.kill(os.getpid(), signal.SIGTERM), **command).fit()
    lines = []
    toy_trainer(other, on_log=lines.append, **command).fit()
    assert any(line.startswith(f"resumed from {other}/checkpoints/step-00000007") for line in lines)
    assert {path: path.read_bytes() for path in one.rglob("*") if path.is_file()} == before
    assert everything(other)[1] == everything(one)[1]
    assert all(torch.equal(value, everything(one)[0][name]) for name, value in everything(other)[0].items())
    assert losses(other) == losses(one)[3:]


@pytest.mark.parametrize("of", ["checkpoint", "file"])
def test_init_from_takes_the_weights_alone(tmp_path, of):
    toy_trainer(tmp_path / "one", steps=3).fit()
    source = checkpoint.path_of(tmp_path / "one", 3)
    source = source / "model.safetensors" if of == "file" else source
    trained = ToyModel()
    trained.load_state_dict(checkpoint.read_newest(tmp_path / "one").tensors["model"])
    toy_trainer(tmp_path / "expected", model=trained, steps=4).fit()
    lines = []
    for _ in range(2):  # the command given again continues
        toy_trainer(tmp_path / "ours", init_from=source, steps=4, on_log=lines.append).fit()
    assert f"weights from {source}" in lines
    assert_same_run(tmp_path / "expected", tmp_path / "ours")


def test_init_from_refuses_weights_of_another_model(tmp_path):
    save_file({"head.weight": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(
        CheckpointError, match=r"other.safetensors does not fit this model: 3 missing \(embedding.weight"
    ):
        toy_trainer(tmp_path / "run", init_from=tmp_path / "other.safetensors").fit()
    assert not checkpoint.paths(tmp_path / "run")


def test_resume_none_overwrites_no_run(tmp_path):
    toy_trainer(tmp_path, steps=2, resume="none").fit()
    with pytest.raises(CheckpointError, match="holds a run up to step-00000002: resume it with auto"):
        toy_trainer(tmp_path, steps=2, resume="none")


def test_unwritable_run_directory_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="cannot write to the run directory"):
        toy_trainer(tmp_path / "file" / "run")


def test_full_disk_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
    loader = ToyLoader()
    with pytest.raises(OSError, match="free some space"):
        toy_trainer(tmp_path, loader=loader).fit()
    assert loader.position == 0


def test_diverged_run_stops_with_a_reason_and_keeps_its_last_checkpoint(tmp_path):
    model = Poisoned()

    def poison(step):
        model.factor = float("nan") if step >= 4 else 1.0

    with pytest.raises(DivergedError, match=r"the last 3 steps up to step 7 .*lower learning_rate"):
        toy_trainer(tmp_path, model=model, on_step=poison, max_skipped_steps=3, checkpoint_interval=2).fit()
    assert all(value.isfinite().all() for value in checkpoint.read_newest(tmp_path).tensors["model"].values())
    kept = load_file(tmp_path / "diverged-step-7-rank-0.safetensors")
    assert {name: kept[f"0.{name}"].tolist() for name in ("tokens", "targets", "positions", "cu_seqlens")} == {
        name: value.tolist() for name, value in vars(toy_batch(6, 4)).items()
    }


def test_diverged_run_stops_before_the_next_log_line(tmp_path):
    model = Poisoned()

    def poison(step):
        model.factor = float("nan") if step >= 4 else 1.0

    with pytest.raises(DivergedError, match="the last 3 steps up to step 7 "):
        toy_trainer(tmp_path, model=model, on_step=poison, max_skipped_steps=3, log_interval=100, steps=20).fit()


def test_garbage_is_collected_at_log_lines_alone(tmp_path):
    collections = []

    def note(phase, info):
        collections.append(phase)

    seen = {}

    def on_step(step):
        gc.callbacks.append(note) if step == 1 else None
        seen[step] = len(collections) // 2, gc.isenabled()

    try:
        toy_trainer(tmp_path, steps=9, log_interval=4, on_step=on_step).fit()
    finally:
        gc.callbacks.remove(note)
    assert seen == {step: (sum(line <= step for line in (4, 8, 9)), False) for step in range(1, 10)}
    assert gc.isenabled()


def test_batch_without_a_valid_token_changes_nothing_but_the_counter(tmp_path):
    result = toy_trainer(tmp_path, loader=ToyLoader(broken=(3,))).fit()
    assert (result.step, result.skipped_steps) == (10, 1)
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[3])
    assert (line["step"], line["loss"], line["grad_norm"]) == (4, None, None)
    assert all(value.isfinite().all() for value in checkpoint.read_newest(tmp_path).tensors["model"].values())


def test_best_checkpoint_outlives_newer_ones(tmp_path):
    model = ToyModel()

    def spoil(step):
        if step == 4:
            torch.nn.init.constant_(model.hidden.bias, 50.0)

    changes = {"eval_interval": 2, "checkpoint_interval": 2, "keep_checkpoints": 1, "eval_loader": HELD_OUT}
    toy_trainer(tmp_path, model=model, on_step=spoil, **changes).fit()
    assert [path.name for path in checkpoint.paths(tmp_path)] == ["step-00000004", "step-00000010"]
    assert checkpoint.best(tmp_path).name == "step-00000004"


def test_capped_evaluation_takes_the_first_batches_and_knows_no_bytes(tmp_path):
    result = toy_trainer(tmp_path, eval_loader=HELD_OUT, eval_bytes=400, eval_batches=2).fit()
    assert result.evaluation.num_tokens == int(sum((batch.targets != -100).sum() for batch in HELD_OUT[:2]))
    assert result.evaluation.bits_per_byte is None


def drawing(sample):
    """An on_evaluate that draws from every generator."""

    def on_evaluate(step):
        torch.rand(3), np.random.rand(3), random.random()
        return sample and Sample("prompt", f"{sample} {step}")

    return on_evaluate


def test_samples_are_told_and_kept_and_training_goes_on_as_if_there_were_none(tmp_path):
    lines, changes = [], {"steps": 6, "eval_interval": 2, "eval_loader": HELD_OUT}
    plain = toy_trainer(tmp_path / "plain", model=ToyModel(dropout=0.2), **changes).fit()
    sampled = {"on_evaluate": drawing("text"), "on_log": lines.append}
    assert toy_trainer(tmp_path / "sampled", model=ToyModel(dropout=0.2), **sampled, **changes).fit().loss == plain.loss
    assert_same_run(tmp_path / "plain", tmp_path / "sampled")
    kept = read_metrics(tmp_path / "sampled" / "samples.jsonl")
    assert kept == [{"step": step, "prompt": "prompt", "text": f"text {step}"} for step in (2, 4, 6)]
    assert "step 4/6  sample: prompttext 4" in lines
    assert not (tmp_path / "plain" / "samples.jsonl").exists()


def test_samples_beyond_the_checkpoint_are_dropped_at_resume(tmp_path):
    changes = {"eval_interval": 1, "eval_loader": HELD_OUT}
    toy_trainer(tmp_path, steps=3, on_evaluate=drawing("old"), **changes).fit()
    (checkpoint.path_of(tmp_path, 3)).rename(checkpoint.path_of(tmp_path, 1))
    path = checkpoint.path_of(tmp_path, 1)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(state | {"step": 1}))
    seal(path)
    toy_trainer(tmp_path, steps=3, on_evaluate=drawing("new"), **changes).fit()
    texts = [record["text"] for record in read_metrics(tmp_path / "samples.jsonl")]
    assert texts == ["old 1", "new 2", "new 3"]


def test_sample_that_cannot_be_drawn_ends_no_training_and_leaves_the_model_as_it_was(tmp_path):
    modes, lines, model = [], [], ToyModel()

    def on_evaluate(step):
        modes.append(model.training)
        raise ValueError("the logits\nare not finite")

    steps = {"eval_interval": 2, "eval_loader": HELD_OUT, "on_step": lambda step: modes.append(model.training)}
    toy_trainer(tmp_path, model=model, steps=2, on_evaluate=on_evaluate, on_log=lines.append, **steps).fit()
    assert modes == [True, False, True]
    assert "no sample at step 2: the logits are not finite" in lines


def test_run_json_tells_what_the_run_is(tmp_path):
    loader = ToyLoader()
    loader.report = "29 documents in 4 rows"
    first = toy_trainer(tmp_path, steps=2, loader=loader, metadata={"vocab_size": 29}, baseline=4.5)
    first.fit()
    facts = json.loads((tmp_path / "run.json").read_text())
    assert facts["config"] == first.config.as_dict()
    assert (facts["metadata"], facts["world_size"]) == ({"vocab_size": 29}, 1)
    assert facts["model"] == {"class": "ToyModel", "num_parameters": 736}
    assert (facts["packing"], facts["baseline"], facts["first_step"]) == ("29 documents in 4 rows", 4.5, 0)
    assert facts["versions"]["torch"] == torch.__version__
    toy_trainer(tmp_path, steps=3, metadata={"vocab_size": 29}).fit()
    facts = json.loads((tmp_path / "run.json").read_text())
    assert (facts["first_step"], facts["config"]["steps"], facts["packing"]) == (2, 3, None)


def test_frozen_part_stays_in_its_mode_after_an_evaluation(tmp_path):
    def train(out, steps):
        model = ToyModel(dropout=0.5)
        model.dropout.eval()
        rate = {"schedule": "constant", "warmup_ratio": 0.0, "eval_interval": 2, "eval_loader": HELD_OUT}
        toy_trainer(out, model=model, steps=steps, on_evaluate=lambda step: None, **rate).fit()
        assert (model.training, model.dropout.training) == (True, False)

    train(tmp_path / "straight", 8)
    train(tmp_path / "resumed", 4)
    train(tmp_path / "resumed", 8)
    assert_same_run(tmp_path / "straight", tmp_path / "resumed")


class Failing:
    """Held-out batches that cannot be read."""

    def __iter__(self):
        raise OSError(5, "Input/output error", "held-out.bin")


class Ending(ToyLoader):
    def __next__(self):
        if self.position == 5:
            raise StopIteration
        return super().__next__()


class EndingInAThread(Ending):
    is_self_contained = True


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"eval_loader": Failing(), "eval_interval": 5}, OSError, "Input/output error"),
        ({"loader": Ending()}, ValueError, "the loader has no batch for step 6 of 10: expected one that never ends"),
        ({"loader": EndingInAThread()}, ValueError, "the loader has no batch for step 6 of 10"),
    ],
)
def test_failure_between_steps_loses_none_of_them(tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        toy_trainer(tmp_path, **change).fit()
    assert checkpoint.read_newest(tmp_path).state["step"] == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"eval_loader": iter(HELD_OUT)},
            "eval_loader is of type list_iterator, an iterator, which the first evaluation",
        ),
        ({"eval_loader": []}, "eval_loader holds no batch"),
        ({"model": ToyModel().requires_grad_(False)}, "ToyModel has no parameter that requires a gradient"),
        ({"model": ToyModel().to("meta")}, "embedding.weight of the model is on the meta device, without values"),
    ],
)
def test_what_cannot_be_trained_or_evaluated_is_refused_at_once(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        toy_trainer(tmp_path, **change)


@pytest.mark.parametrize("loader", [None, HELD_OUT, (batch for batch in HELD_OUT)], ids=["None", "list", "generator"])
def test_what_is_no_loader_is_refused_by_its_name_with_what_makes_one(tmp_path, loader):
    kind = "None" if loader is None else f"of type {type(loader).__name__}"
    with pytest.raises(TypeError, match=rf"train_loader is {kind} without .*PackedLoader makes one .*BatchLoader"):
        Trainer(ToyModel(), toy_config(tmp_path), loader)
    with pytest.raises(TypeError, match="eval_loader is of type int, expected batches"):
        toy_trainer(tmp_path, eval_loader=3)


def test_former_name_of_on_log_still_works_and_says_so(tmp_path):
    lines = []
    with pytest.warns(DeprecationWarning, match="on_line is called on_log now"):
        trainer = Trainer(ToyModel(), toy_config(tmp_path, steps=1), ToyLoader(), on_line=lines.append)
    trainer.fit()
    assert any(line.startswith("step 1/1") for line in lines)


def test_id_beyond_the_vocabulary_is_named(tmp_path):
    model = ToyModel()
    model.embedding = nn.Embedding(20, model.hidden.in_features)
    model.head.weight = model.embedding.weight
    with pytest.raises(
        ValueError, match=r"no row for .* out of range .*: the ids of the batch go up to 28 and its rows"
    ):
        toy_trainer(tmp_path, model=model).fit()


def test_resume_none_refuses_a_run_that_began_after_the_trainer_was_made(tmp_path):
    late = toy_trainer(tmp_path, resume="none", steps=6)
    toy_trainer(tmp_path, resume="none", steps=4).fit()
    with pytest.raises(CheckpointError, match="holds a run up to step-00000004"):
        late.fit()
    assert checkpoint.read_newest(tmp_path).state["step"] == 4
