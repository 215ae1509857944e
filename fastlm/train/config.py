"""Every knob of training in one flat dataclass, put together from those of the modules that read them."""

import dataclasses
from pathlib import Path
from typing import Any

from fastlm.train.checkpoint import CheckpointKnobs
from fastlm.train.early_stopping import EarlyStoppingKnobs
from fastlm.train.ema import EmaKnobs
from fastlm.train.kept_memory import KeptMemoryKnobs
from fastlm.train.knobs import Knobs
from fastlm.train.layer_statistics import LayerStatisticsKnobs
from fastlm.train.optimizers import OptimizerKnobs
from fastlm.train.parallelize import ParallelKnobs
from fastlm.train.precision import PrecisionKnobs
from fastlm.train.profiling import ProfileKnobs
from fastlm.train.run_log import LogKnobs
from fastlm.train.schedule import ScheduleKnobs
from fastlm.train.update import UpdateKnobs


@dataclasses.dataclass
class LoopKnobs(Knobs):
    """Where a run goes, what a step takes, and how often it is evaluated."""

    heading = "training loop"

    out: Path = Path("runs/train")
    """Run directory: checkpoints, metrics.jsonl and more. Training resumes from a checkpoint found there."""
    batch_size: int = 8
    """Rows per device in one forward pass."""
    grad_accumulation_steps: int = 1
    """Forward passes per device before each update; the loss is the mean over all their tokens."""
    prefetch: int = 2
    """Batches that a thread prepares ahead, if the loader allows it; 0 prepares each when its step begins."""
    seed: int = 0
    """Seeds Python, NumPy and PyTorch on every rank."""
    eval_interval: int = 100
    """Steps between evaluations on held-out data; 0 evaluates after the last step alone."""
    eval_batches: int | None = None
    """Batches per evaluation, always the same ones; None for the whole held-out set."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_path("out")
        self.check_integers("batch_size", "grad_accumulation_steps", minimum=1)
        self.check_integers("eval_interval", "prefetch", minimum=0)
        self.check_value("seed", self.seed, int, "an integer from 0 to below 2^63", lambda value: 0 <= value < 2**63)
        if self.eval_batches is not None:
            self.check_value("eval_batches", self.eval_batches, int, "None or at least 1", lambda value: value >= 1)


# Help and as_dict list the fields of the last base first.
@dataclasses.dataclass
class TrainConfig(
    ProfileKnobs,
    LayerStatisticsKnobs,
    LogKnobs,
    CheckpointKnobs,
    ParallelKnobs,
    KeptMemoryKnobs,
    PrecisionKnobs,
    EarlyStoppingKnobs,
    EmaKnobs,
    UpdateKnobs,
    OptimizerKnobs,
    ScheduleKnobs,
    LoopKnobs,
):
    """How to train. A step is one update on batch_size * grad_accumulation_steps * world size rows of tokens."""

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them."""
        values = dataclasses.asdict(self)
        return {
            name: str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
        }
