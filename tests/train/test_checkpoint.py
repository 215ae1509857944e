import contextlib
import functools
import hashlib
import io
import json
import os
import pickle
import random
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from fastlm.train import checkpoint, checkpoint_files, checkpoint_tensors, retention, run_start, shards
from fastlm.train.checkpoint import CheckpointError, CheckpointKnobs, DamagedCheckpointError, read, read_newest
from fastlm.train.distributed import Ranks
from tests.support.processes import start
from tests.support.toy import ToyModel, toy_trainer

FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "rank-00000.json", "SHA256SUMS"]


def write(run, step, eval_loss=None, size=8, *, tensors=None, finite=True, config=None):
    checkpoint.prepare(run)
    weight = torch.arange(size) + float(step)
    return checkpoint.write(
        run,
        step,
        tensors=tensors
        or {
            "model": {"weight": weight, "tied": weight, "view": weight[::2]},
            "optimizer": {"weight/step": torch.tensor(float(step))},
        },
        state={
            "metadata": {"vocab_size": 7, "model": {"bias": True}},
            "eval_loss": eval_loss,
            "loss_is_finite": finite,
            "config": config or {},
        },
        rank_state={"loader": step},
        ranks=Ranks(),
    )


def steps_of(run):
    return [int(path.name.split("-")[1]) for path in checkpoint.paths(run)]


@pytest.mark.parametrize("name", [b"run", b"run\xe9", b"[r]un*?", b"two\nlines", b"r" * 255])
def test_read_returns_what_was_written_in_a_run_of_any_name(tmp_path, name):
    run = tmp_path / os.fsdecode(name)
    saved = read(write(run, 3, eval_loss=0.1))
    assert read_newest(run).path == saved.path
    weight = torch.arange(8) + 3.0
    assert all(
        torch.equal(saved.tensors["model"][name], value)
        for name, value in {"weight": weight, "tied": weight, "view": weight[::2]}.items()
    )
    assert saved.tensors["optimizer"] == {"weight/step": torch.tensor(3.0)}
    assert (saved.state["step"], saved.state["eval_loss"], saved.rank_state) == (3, 0.1, {"loader": 3})
    assert saved.metadata == {"vocab_size": 7, "model": {"bias": True}}


def test_tied_weights_are_stored_once(tmp_path):
    assert load_file(write(tmp_path, 1) / "model.safetensors").keys() == {"weight", "view"}


def test_a_negated_view_is_not_taken_for_what_it_negates(tmp_path):
    z = torch.tensor([1 + 2j, 3 - 4j])
    assert checkpoint_tensors.without_aliases({"part": z.imag, "negated": z.conj().imag})[1] == {}


def test_checksums_are_those_of_sha256sum(tmp_path):
    path = write(tmp_path, 1)
    done = subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=path, capture_output=True, text=True)
    assert (done.returncode, sorted(done.stdout.split())) == (
        0,
        sorted([f"{name}:" for name in FILES[:-1]] + ["OK"] * 4),
    )


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_found_and_the_file_named(tmp_path, name, damage):
    path = write(tmp_path, 1)
    file = path / name
    content = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    elif damage == "truncate":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    with pytest.raises(DamagedCheckpointError, match=str(path)) as caught:
        read(path)
    assert name in str(caught.value)


def test_read_newest_skips_the_damaged_and_says_so(tmp_path):
    write(tmp_path, 1)
    (write(tmp_path, 2) / "state.json").write_text("{}")
    lines = []
    assert read_newest(tmp_path, on_log=lines.append).state["step"] == 1
    assert len(lines) == 1
    assert "step-00000002/state.json is damaged" in lines[0]


def seal(path):
    """Make the checksums those of the files, as one who tampers would."""
    (path / "SHA256SUMS").unlink()
    files = [file for file in path.rglob("*") if file.is_file()]
    sums = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.relative_to(path)}\n" for file in files]
    (path / "SHA256SUMS").write_text("".join(sums))


@pytest.mark.parametrize("name", FILES[:-1])
@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe",
        b"[1]",
        b'{"step": "x", "world_size": 1, "metadata": {}, "groups": {}}',
        b'{"step": 1, "world_size": 1, "metadata": {}, "groups": {}, "began_with": {"resume": 5}}',
    ],
)
def test_content_of_another_kind_is_damage_even_under_its_right_checksum(tmp_path, name, content):
    path = write(tmp_path, 1)
    if name == "rank-00000.json" and content.startswith(b"{"):
        content = b"{"  # any JSON object is the trainer's own affair
    (path / name).write_bytes(content)
    seal(path)
    with pytest.raises(DamagedCheckpointError, match=r"step-00000001.* that fastlm writes"):
        read(path)
    if name == "state.json":
        with pytest.raises(DamagedCheckpointError, match=r"state\.json is not one that fastlm writes"):
            run_start.check_metadata(tmp_path, {})
        assert checkpoint.best(tmp_path) is None


def test_metadata_that_no_resumed_run_could_have_is_refused_before_the_first_step(tmp_path):
    for metadata in {"loss": float("nan")}, {"data": {"loss": float("nan")}}:
        with pytest.raises(CheckpointError, match=r"the metadata's .*loss is nan: no resumed run could have the same"):
            toy_trainer(tmp_path, metadata=metadata, steps=1).fit()
    assert not checkpoint.paths(tmp_path)
    for _ in range(2):
        toy_trainer(tmp_path, metadata={"limit": float("inf"), 1: (2,)}, steps=1).fit()


def test_read_best_takes_the_newest_where_the_best_is_damaged(tmp_path):
    assert checkpoint.read_best(tmp_path) is None
    write(tmp_path, 1, eval_loss=2.0)
    best = write(tmp_path, 2, eval_loss=1.0)
    write(tmp_path, 3, eval_loss=3.0)
    assert checkpoint.read_best(tmp_path).state["step"] == 2
    (best / "model.safetensors").write_bytes(b"rotten")
    assert checkpoint.read_best(tmp_path).state["step"] == 3


def test_read_best_outlives_the_deletion_of_what_it_reads(tmp_path, monkeypatch):
    best = write(tmp_path, 1, eval_loss=1.0)
    write(tmp_path, 2, eval_loss=2.0)
    verify = checkpoint.verify

    def verified_then_deleted(path):
        verify(path)
        if path == best:
            checkpoint_files.delete(best)

    monkeypatch.setattr(checkpoint, "verify", verified_then_deleted)
    assert checkpoint.read_best(tmp_path).state["step"] == 2


def test_names_that_no_checkpoint_has_are_passed_over(tmp_path):
    write(tmp_path, 1)
    (tmp_path / "checkpoints" / "step-old").mkdir()
    assert steps_of(tmp_path) == [1]


def nothing(path):
    path.symlink_to("gone")


def file(path):
    path.write_text("a note")


def loop(path):
    path.symlink_to(path.name)


def empty(path):
    path.mkdir()


def of_another_run(path):
    path.symlink_to(write(path.parent.parent.parent / "other", 3))


STRAY = [
    ("step-00000009", nothing),
    ("step-00000009", file),
    ("step-00000009", loop),
    ("step-00000009", empty),
    ("step-00000009", of_another_run),
    ("step-9", empty),
    ("step-\u0660\u0660\u0660\u0660\u0660\u0660\u0660\u0669", empty),  # 9 in Arabic digits, which int() reads
    ("step-00000009.old", empty),
]


@pytest.mark.parametrize(("name", "make"), STRAY)
def test_stray_names_hide_no_sound_checkpoint(tmp_path, name, make):
    run = tmp_path / "run"
    write(run, 4, eval_loss=1.0)
    make(run / "checkpoints" / name)
    checkpoint.prepare(run)
    assert read_newest(run).state["step"] == checkpoint.read_best(run).state["step"] == 4
    with pytest.raises(CheckpointError, match="step-00000004 was trained with model"):
        run_start.check_metadata(run, {})
    write(run, 5)
    retention.retain(run, 1, last_step=5)
    write(run, 9)
    retention.retain(run, 1, last_step=9)
    assert read_newest(run).state["step"] == 9
    assert steps_of(run) == [4, 9]  # the best one, and the newest
    if make is of_another_run:
        assert read_newest(tmp_path / "other").state["step"] == 3


def test_checkpoint_behind_a_link_is_read_and_only_its_link_is_deleted(tmp_path):
    run, moved = tmp_path / "run", tmp_path / "elsewhere"
    write(run, 2).rename(moved)
    checkpoint.path_of(run, 2).symlink_to(moved)
    assert read_newest(run).state["step"] == 2
    write(run, 4)
    retention.retain(run, 1)
    assert steps_of(run) == [4]
    assert sorted(path.name for path in moved.iterdir()) == sorted(FILES)


def test_names_without_padding_and_beyond_eight_digits_are_ordered_as_numbers(tmp_path):
    for step in (99_999_999, 100_000_000):
        write(tmp_path, step)
    assert steps_of(tmp_path) == [99_999_999, 100_000_000]


@pytest.mark.parametrize("suffix", [".partial", ".deleted"])
@pytest.mark.parametrize("make", [nothing, file, empty])
def test_write_and_retain_replace_whatever_lies_aside(tmp_path, suffix, make):
    write(tmp_path, 1)
    make(tmp_path / "checkpoints" / f".step-00000001{suffix}")
    make(tmp_path / "checkpoints" / f".step-00000002{suffix}")
    write(tmp_path, 2)
    retention.retain(tmp_path, 1)
    assert steps_of(tmp_path) == [2]


def test_prepare_leaves_what_no_killed_process_left(tmp_path):
    write(tmp_path, 1)
    folder, target = tmp_path / "checkpoints", tmp_path / "target"
    (folder / ".step-00000001.swp").write_text("an editor's")
    (folder / ".step-notes").mkdir()
    write(target, 2)
    (folder / ".step-00000002.deleted").symlink_to(target)
    checkpoint.prepare(tmp_path)
    assert {path.name for path in folder.iterdir()} == {"step-00000001", ".step-00000001.swp", ".step-notes"}
    assert steps_of(target) == [2]


def test_prepare_goes_on_where_a_leftover_cannot_be_deleted(tmp_path, monkeypatch):
    write(tmp_path, 1)
    (tmp_path / "checkpoints" / ".step-00000002.deleted").mkdir()

    def busy(path):
        raise OSError(16, "Device or resource busy", str(path))

    monkeypatch.setattr("shutil.rmtree", busy)
    checkpoint.prepare(tmp_path)
    assert read_newest(tmp_path).state["step"] == 1


def test_file_that_cannot_be_read_is_damage(tmp_path, monkeypatch):
    write(tmp_path, 1)
    write(tmp_path, 2)
    digest = checkpoint_files._sha256

    def bad_sector(file):
        if "step-00000002" in str(file):
            raise OSError(5, "Input/output error")
        return digest(file)

    monkeypatch.setattr(checkpoint_files, "_sha256", bad_sector)
    lines = []
    assert read_newest(tmp_path, on_log=lines.append).state["step"] == 1
    assert "cannot be read: Input/output error" in lines[0]


def test_missing_optimizer_entry_is_damage(tmp_path):
    path = write(tmp_path, 1)
    save_file({}, path / "optimizer.safetensors")
    seal(path)
    with pytest.raises(DamagedCheckpointError, match="the group optimizer has 0 tensors of 1"):
        read(path)


def test_extra_values_run_no_code_when_they_are_read(tmp_path):
    path = write(tmp_path, 1)
    torch.save({"model": {"weight": os.system}, "optimizer": {}}, path / "extra.pt")
    seal(path)
    with pytest.raises(DamagedCheckpointError, match="is not a checkpoint that fastlm writes"):
        read(path)


@pytest.fixture
def mesh():
    """A process group of this process alone, which FSDP's tensors need."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def write_whole(run, step, mesh):
    return write(run, step)


def write_sharded(run, step, mesh):
    weight = distribute_tensor(torch.arange(6.0).view(3, 2), mesh, [Shard(0)])
    optimizer = {"weight/step": torch.tensor(1.0), "weight/exp_avg": weight + 1}
    return write(
        run,
        step,
        tensors={"model": {"weight": weight, "tied": weight, "buffer": torch.ones(2)}, "optimizer": optimizer},
    )


def test_sharded_tensors_are_read_whole_or_shared_out(tmp_path, mesh):
    path = write_sharded(tmp_path, 1, mesh)
    whole = read(path).tensors
    assert {type(value) for group in whole.values() for value in group.values()} == {torch.Tensor}
    assert torch.equal(whole["model"]["tied"], torch.arange(6.0).view(3, 2))
    like = distribute_tensor(torch.zeros(3, 2), mesh, [Shard(0)])
    shared = read(path, sharded={"weight": like}).tensors
    for group, name in ("model", "weight"), ("model", "tied"), ("optimizer", "weight/exp_avg"):
        assert shared[group][name].placements == (Shard(0),)
        assert torch.equal(shared[group][name].full_tensor(), whole[group][name])
    assert not shards.is_sharded(shared["optimizer"]["weight/step"])


def test_sharded_tensors_that_cannot_be_written_are_told_and_leave_nothing(tmp_path, mesh, monkeypatch):
    write_sharded(tmp_path, 1, mesh)

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save", full)
    with pytest.raises(OSError, match=r"cannot save the checkpoint .*step-00000002: rank 0: .*No space left on device"):
        write_sharded(tmp_path, 2, mesh)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_missing_part_of_a_sharded_tensor_is_damage(tmp_path, mesh):
    path = write_sharded(tmp_path, 1, mesh)
    (file,) = (path / "model").iterdir()
    offsets = {name: {"saved_offsets": [2, 0] if name == "weight" else [0]} for name in ("weight", "buffer")}
    save_file(load_file(file), file, metadata={"DCP_SHARDING_INFO": json.dumps(offsets)})
    seal(path)
    with pytest.raises(DamagedCheckpointError, match="a part of weight is missing in model"):
        read(path)


class Payload:
    """Unpickling it leaves a file behind."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (str(self.marker),))


def by_torch(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


WHOLE = [(write_whole, file) for file in [*FILES, "extra.pt", ".metadata"]]
SHARDED_FILES = ["state.json", "extra.pt", ".metadata", "model/.metadata"]
SHARDED_FILES += [f"{group}/shard-00001-model-00001-of-00001.safetensors" for group in ("model", "optimizer")]
HOSTILE = WHOLE + [(write_sharded, file) for file in SHARDED_FILES]


@pytest.mark.parametrize(("write", "file"), HOSTILE)
@pytest.mark.parametrize("pickled", [pickle.dumps, by_torch], ids=["pickle", "torch"])
@pytest.mark.parametrize("sealed", [True, False])
def test_pickle_in_any_file_of_a_checkpoint_runs_nothing(tmp_path, mesh, write, file, pickled, sealed):
    run, marker = tmp_path / "run", tmp_path / "marker"
    path = write(run, 1, mesh)
    (path / file).write_bytes(pickled(Payload(marker)))
    if sealed and file != "SHA256SUMS":
        seal(path)
    like = distribute_tensor(torch.zeros(3, 2), mesh, [Shard(0)])
    for attack in read, functools.partial(read, sharded={"weight": like}), run_start.read_weights:
        with contextlib.suppress(CheckpointError):
            attack(path)
    for attack in read_newest, checkpoint.read_best, checkpoint.best, functools.partial(retention.retain, newest=1):
        with contextlib.suppress(CheckpointError):
            attack(run)
    with contextlib.suppress(CheckpointError):
        run_start.check_metadata(run, {})
    assert not marker.exists()
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists()  # the payload is one


def test_link_to_a_folder_in_a_checkpoint_is_damage(tmp_path):
    path = write(tmp_path, 1)
    (path / "model").symlink_to(tmp_path)
    with pytest.raises(DamagedCheckpointError, match="does not list model"):
        read(path)


def test_interrupt_while_writing_leaves_nothing_half_done(tmp_path, monkeypatch):
    write(tmp_path, 1)

    def interrupted(path, value):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "write_json", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, 2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_read_newest_refuses_to_start_afresh_over_damage(tmp_path):
    assert read_newest(tmp_path) is None
    (write(tmp_path, 1) / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"all 1 checkpoints of .* are damaged"):
        read_newest(tmp_path)


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"vocab_size": 8, "model": {"bias": True}}, "vocab_size = 7, and this run has 8"),
        ({"vocab_size": 7, "model": {"bias": False}}, "model.bias = True, and this run has False"),
        ({"vocab_size": 7, "model": {"bias": True}, "hash": "a"}, "hash = None, and this run has 'a'"),
    ],
)
def test_check_metadata_names_both_values_of_a_mismatch(tmp_path, expected, message):
    write(tmp_path, 1)
    run_start.check_metadata(tmp_path, {"vocab_size": 7, "model": {"bias": True}})
    with pytest.raises(CheckpointError, match=message):
        run_start.check_metadata(tmp_path, expected)


def test_check_metadata_passes_over_the_damaged(tmp_path):
    run_start.check_metadata(tmp_path, {"vocab_size": 8})
    write(tmp_path, 1)
    state = write(tmp_path, 2) / "state.json"
    state.write_text(state.read_text().replace("7", "8"))
    with pytest.raises(CheckpointError, match="step-00000001 was trained with vocab_size = 7, and this run has 8"):
        run_start.check_metadata(tmp_path, {"vocab_size": 8, "model": {"bias": True}})


def test_metadata_is_compared_as_json_sees_it(tmp_path):
    assert not list(checkpoint_files.differences({"betas": [1, 2]}, {"betas": (1, 2)}))


def test_retain_keeps_the_newest_and_the_best(tmp_path):
    for step, loss in enumerate([3.0, 1.0, None, 2.0, 4.0], start=1):
        write(tmp_path, step, eval_loss=loss)
    assert checkpoint.best(tmp_path) == checkpoint.path_of(tmp_path, 2)
    retention.retain(tmp_path, 2)
    assert steps_of(tmp_path) == [2, 4, 5]


def test_retain_keeps_every_mth(tmp_path):
    for step in range(1, 9):
        write(tmp_path, step)
    retention.retain(tmp_path, 1, every=3)
    assert steps_of(tmp_path) == [3, 6, 8]


def test_retain_never_deletes_the_newest_of_a_finite_loss(tmp_path):
    for step in range(1, 7):
        write(tmp_path, step, finite=step < 3)
    retention.retain(tmp_path, 2)
    assert steps_of(tmp_path) == [2, 5, 6]
    write(tmp_path, 7)
    retention.retain(tmp_path, 1)
    assert steps_of(tmp_path) == [7]


def knobs(**changes):
    return CheckpointKnobs(**changes)


def test_check_start_lets_only_auto_continue_a_run_that_began_here(tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    metadata = {"vocab_size": 7, "model": {"bias": True}}
    elsewhere = write(other, 3)
    for resume in "auto", "none", str(elsewhere):
        run_start.check_start(run, knobs(resume=resume), metadata)
    with pytest.raises(CheckpointError, match="step-00000003 was trained with vocab_size = 7, and this run has 8"):
        run_start.check_start(run, knobs(resume=str(elsewhere)), metadata | {"vocab_size": 8})
    with pytest.raises(CheckpointError, match="there is no checkpoint ~nobody-of-this-name; resume"):
        run_start.check_start(run, knobs(resume="~nobody-of-this-name"), metadata)
    with pytest.raises(CheckpointError, match="there is no checkpoint nowhere; resume takes auto, none or its path"):
        run_start.check_start(run, knobs(resume="nowhere"), metadata)
    write(run, 5, config={"resume": str(elsewhere), "init_from": "weights.safetensors"})
    run_start.check_start(run, knobs(), metadata)
    run_start.check_start(run, knobs(resume=f"{elsewhere}/"), metadata)  # the same command again
    run_start.check_start(run, knobs(init_from=Path("weights.safetensors")), metadata)
    with pytest.raises(CheckpointError, match="run holds a run up to step-00000005: resume it with auto, or choose"):
        run_start.check_start(run, knobs(resume="none"), metadata)
    run_start.check_start(run, knobs(resume="none"), metadata, restarts=1)
    with pytest.raises(CheckpointError, match=r"that did not begin with resume .*step-00000004: leave resume away"):
        run_start.check_start(run, knobs(resume=str(other / "step-00000004")), metadata)
    with pytest.raises(CheckpointError, match="that did not begin with init_from other: leave init_from away"):
        run_start.check_start(run, knobs(init_from=Path("other")), metadata)


def test_check_start_knows_the_command_that_began_the_run_however_it_was_continued(tmp_path):
    run, elsewhere = tmp_path / "run", write(tmp_path / "other", 3)
    write(run, 4, config={"resume": str(elsewhere), "init_from": None})
    write(run, 5, config={"resume": "auto", "init_from": None})
    retention.retain(run, 1)
    run_start.check_start(run, knobs(resume=str(elsewhere)), {"vocab_size": 7, "model": {"bias": True}})
    with pytest.raises(CheckpointError, match="that did not begin with init_from"):
        run_start.check_start(run, knobs(init_from=elsewhere), {})


@pytest.mark.parametrize("name", ["resume", "init_from"])
@pytest.mark.parametrize("first", ["{}", "~/other/step-00000003", "other/step-00000003"])
@pytest.mark.parametrize("again", ["{}", "~/other/step-00000003", "./other/step-00000003"])
def test_check_start_knows_the_beginning_in_another_spelling(tmp_path, monkeypatch, name, first, again):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    config = {"resume": "auto", "init_from": None} | {name: first.format(tmp_path / "other" / "step-00000003")}
    write(tmp_path / "run", 4, config=config)
    asked = again.format(tmp_path / "other" / "step-00000003")
    run_start.check_start(tmp_path / "run", knobs(**{name: Path(asked) if name == "init_from" else asked}), {})
    monkeypatch.chdir("/")
    if not again.startswith("."):  # which is another file from here
        run_start.check_start(tmp_path / "run", knobs(**{name: Path(asked) if name == "init_from" else asked}), {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resume": ""}, "resume is '', expected auto, none or the path of a checkpoint"),
        ({"resume": "a", "init_from": Path("b")}, "resume is 'a' and init_from 'b': a run starts from one of them"),
        ({"keep_every": -1}, "keep_every is -1, expected an integer of at least 0"),
    ],
)
def test_knobs_refuse_what_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        knobs(**changes)


def test_fitted_weights_tells_of_each_kind_that_does_not_fit():
    own = ToyModel().state_dict()
    weights = {name: value for name, value in own.items() if name != "head.weight"}
    assert run_start.fitted_weights(weights, own).keys() == own.keys()  # it is tied to embedding.weight
    half = {name: value.half() for name, value in own.items()}
    assert {value.dtype for value in run_start.fitted_weights(half, own).values()} == {torch.float32}
    del weights["embedding.weight"]
    weights |= {"hidden.bias": torch.ones(3), "extra": torch.ones(1)}
    with pytest.raises(
        ValueError,
        match=r"2 missing \(embedding.weight, head.weight\); 1 unknown \(extra\); 1 of another shape "
        r"\(hidden.bias \(3,\), not \(16,\)\)",
    ):
        run_start.fitted_weights(weights, own)


def test_read_weights_names_what_is_no_checkpoint(tmp_path):
    (tmp_path / "text").write_text("no weights")
    write(tmp_path, 3)
    for name, message in (
        ("text", "text is neither a checkpoint nor a .safetensors file"),
        ("gone", "there is no checkpoint"),
        (".", "is a run: name one of its checkpoints, such as .*step-00000003"),
    ):
        with pytest.raises(CheckpointError, match=message):
            run_start.read_weights(tmp_path / name)


def test_write_replaces_a_damaged_checkpoint_of_the_same_step(tmp_path):
    (write(tmp_path, 1) / "state.json").write_text("{}")
    assert read(write(tmp_path, 1)).state["step"] == 1


def test_full_disk_is_told_and_leaves_the_earlier_checkpoint_intact(tmp_path):
    write(tmp_path, 1)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, limit[1]))  # no file may grow beyond: writing fails half-way
    try:
        with pytest.raises(
            OSError, match=r"cannot save the checkpoint .*step-00000002: .*earlier checkpoints are untouched"
        ):
            write(tmp_path, 2, size=2**14)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert read_newest(tmp_path).state["step"] == 1


def test_write_asks_for_space_before_it_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(OSError, match=r"10B free and a checkpoint takes \d+B: free some space"):
        write(tmp_path, 1)
    assert not steps_of(tmp_path)


def test_prepare_refuses_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"cannot write to the run directory .*file/run: Not a directory; choose another"):
        checkpoint.prepare(tmp_path / "file" / "run")


def train_for_ever(out):
    toy_trainer(
        out, steps=10**6, schedule="constant", warmup_ratio=0.0, checkpoint_interval=1, keep_checkpoints=2
    ).fit()


def test_kill_at_any_moment_loses_no_finished_checkpoint(tmp_path):
    out, moments, reached = tmp_path / "killed", random.Random(5), 0
    for _ in range(5):
        process = start(train_for_ever, out)
        while not any(step > reached for step in steps_of(out)):
            assert process.is_alive()
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.1))
        newest = max(steps_of(out))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        lines = []
        reached = read_newest(out, on_log=lines.append).state["step"]
        assert lines == []
        assert reached >= newest
    straight = ToyModel()
    toy_trainer(
        tmp_path / "straight", model=straight, steps=reached, schedule="constant", warmup_ratio=0.0, log_interval=10**6
    ).fit()
    weights = read_newest(out).tensors["model"]
    assert all(torch.equal(weights[name], value) for name, value in straight.state_dict().items())


def test_prepare_clears_what_a_killed_process_left(tmp_path):
    write(tmp_path, 1)
    leftover = tmp_path / "checkpoints" / ".step-00000002"
    leftover.mkdir()
    (leftover / "model.safetensors").write_text("half")
    checkpoint.prepare(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_state_is_plain_json(tmp_path):
    path = write(tmp_path, 1)
    assert json.loads((path / "state.json").read_text())["groups"]["model"]["aliases"] == {"tied": "weight"}
