"""What a run may start from: a run directory that agrees with the command, or the weights of another run."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from torch import Tensor

from fastlm.train import shards
from fastlm.train.checkpoint import CheckpointKnobs, beginning, newest_state, paths, read, spellings
from fastlm.train.checkpoint_files import CheckpointError, differences, read_state, verify_state
from fastlm.train.checkpoint_tensors import Group, read_tensors
from fastlm.wording import first_few

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# Of which run it is


def check_metadata(run: Path, metadata: dict[str, Any]) -> None:
    """Raise CheckpointError, naming both values, at the first fact in which metadata differs from that of the run.

    Reads but one small file, so that a mistake is told before a model is loaded or anything is written.
    """
    if found := newest_state(run):
        _compare_metadata(*found, metadata)


def check_start(run: Path, knobs: CheckpointKnobs, metadata: dict[str, Any], *, restarts: int = 0) -> None:
    """Raise CheckpointError where knobs.resume and knobs.init_from do not agree with what the run directory holds.

    A run there is never overwritten, and never taken for one that began elsewhere; the command that began it may be
    given again. Where torchrun has restarted all ranks, resume none goes on too.
    """
    found = paths(run)
    if not found and knobs.resume_from is not None:
        if not knobs.resume_from.is_dir():
            raise CheckpointError(f"there is no checkpoint {knobs.resume_from}; resume takes auto, none or its path")
        if inside := paths(knobs.resume_from):
            raise CheckpointError(f"{knobs.resume_from} is a run: name one of its checkpoints, such as {inside[-1]}")
        verify_state(knobs.resume_from)
        _compare_metadata(knobs.resume_from, read_state(knobs.resume_from), metadata)
    if not found:
        return
    if knobs.resume == "none" and not restarts:
        raise CheckpointError(f"{run} holds a run up to {found[-1].name}: resume it with auto, or choose another out")
    _, state = newest_state(run) or (None, {})
    for name, asked in ("resume", knobs.resume_from), ("init_from", knobs.init_from):
        if asked is not None and not any(spelling in beginning(state)[name] for spelling in spellings(asked)):
            raise CheckpointError(
                f"{run} holds a run up to {found[-1].name} that did not begin with {name} {asked}: leave {name} away "
                "to continue it, or choose another out"
            )


def _compare_metadata(path: Path, state: dict[str, Any], metadata: dict[str, Any]) -> None:
    for key, was, now in differences(state["metadata"], metadata):
        if was is None and now is False:  # a setting that came after the checkpoint, and is off
            continue
        raise CheckpointError(
            f"{path} was trained with {key} = {was!r}, and this run has {now!r}: use the same, or another run directory"
        )


# Weights of another run


def read_weights(path: Path, *, sharded: Mapping[str, "DTensor"] | None = None) -> dict[str, Any]:
    """The weights of a checkpoint, or of a .safetensors file, which has no checksums.

    Raises CheckpointError if it is neither, or damaged.
    """
    if path.is_dir():
        if found := paths(path):
            raise CheckpointError(f"{path} is a run: name one of its checkpoints, such as {found[-1]}")
        return read(path, sharded=sharded).tensors["model"]
    if not path.exists():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        return {name: shards.shared_out(name, tensor, sharded or {}) for name, tensor in read_tensors(path).items()}
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} is neither a checkpoint nor a .safetensors file: {reason}") from error


def fitted_weights(weights: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Weights as a model's own state_dict has them: the same names and shapes; dtypes become the model's.

    A name that is left out because its tensor is saved under another, as tied weights are, is no difference.
    Raises ValueError that names the first of those that do not fit, and tells how many there are.
    """
    aliases = Group.of(dict(own)).aliases
    whole = dict(weights) | {
        alias: weights[name] for alias, name in aliases.items() if alias not in weights and name in weights
    }
    missing = sorted(own.keys() - whole.keys())
    unknown = sorted(whole.keys() - own.keys())
    shapes = {name: [_shape(values[name]) for values in (whole, own)] for name in own if name in whole}
    wrong = [f"{name} {was}, not {expected}" for name, (was, expected) in shapes.items() if was != expected]
    kinds = [("missing", missing), ("unknown", unknown), ("of another shape", wrong)]
    told = [f"{len(names)} {kind} ({first_few(names)})" for kind, names in kinds if names]
    if told:
        raise ValueError("; ".join(told))
    return {
        name: value.to(own[name].dtype) if isinstance(value, Tensor) and isinstance(own[name], Tensor) else value
        for name, value in whole.items()
    }


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, Tensor) else None
