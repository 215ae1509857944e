"""Which checkpoints of a run stay."""

from pathlib import Path

from fastlm.train.checkpoint import best, paths
from fastlm.train.checkpoint_files import DamagedCheckpointError, delete, read_state, step_of


def retain(run: Path, newest: int, *, every: int = 0, last_step: int | None = None) -> None:
    """Delete all checkpoints but the newest ones, those of steps that are multiples of every, and two besides.

    These are the one with the lowest held-out loss, and the newest whose loss was finite: a run whose loss is NaN for
    many checkpoints keeps the last good one. A checkpoint was verified when it was written or resumed from, and those
    of this run that are older than it are deleted only then.

    last_step  where training is; a checkpoint beyond it was damaged when the run was resumed: it stays, and does not
               count, or the sound ones before it would be deleted for its sake
    """
    found = [path for path in paths(run) if last_step is None or step_of(path) <= last_step]
    keep = {*found[-newest:], best(run), next(filter(_loss_was_finite, reversed(found)), None)}
    for path in found:
        if path not in keep and not (every and step_of(path) % every == 0):
            delete(path)


def _loss_was_finite(path: Path) -> bool:
    """Whether the step before the checkpoint had a finite loss and gradient."""
    try:
        return read_state(path)["loss_is_finite"] is True
    except (DamagedCheckpointError, KeyError):
        return False
