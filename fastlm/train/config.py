"""Every knob of training, its default, its help and its check: the one home of each."""

import dataclasses
import difflib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

Precision = Literal["auto", "fp32", "tf32", "bf16", "fp16"]
Schedule = Literal["cosine", "linear", "constant"]


@dataclasses.dataclass
class TrainConfig:
    """How to train. A step is one optimiser update on batch_size * accumulation * world size rows of tokens."""

    # ValueError if a value is out of its range, TypeError if it is of the wrong type; here because the docstring above
    # is what --help shows.

    out: Path = Path("runs/train")
    """Run directory: checkpoints, metrics.jsonl and losses.png. Training resumes from a checkpoint found there."""
    steps: int = 500
    """Optimiser updates in the whole run, counted from the very start."""
    batch_size: int = 8
    """Rows per device in one forward pass."""
    accumulation: int = 1
    """Forward passes per device before each update; the loss is the mean over all their tokens."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    schedule: Schedule = "cosine"
    """Shape of the learning rate after warmup."""
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises linearly to its peak."""
    final_learning_rate: float = 0.1
    """Where the schedule ends, as a share of the peak."""
    weight_decay: float = 0.1
    """Decoupled weight decay of the matrices; the model's parameter groups exempt biases and norms."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the mean and of the squared gradient."""
    eps: float = 1e-8
    """AdamW's guard against division by zero."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    precision: Precision = "auto"
    """Arithmetic of matrix products; parameters and optimiser state are always fp32."""
    device: str = "auto"
    """Where to train: auto, cpu, cuda, cuda:1, ..."""
    compile: bool = False
    """Compile the model with torch.compile before the first step."""
    seed: int = 0
    """Seeds Python, NumPy and PyTorch on every rank."""
    log_interval: int = 10
    """Steps between log lines."""
    eval_interval: int = 100
    """Steps between evaluations on held-out data; 0 evaluates after the last step alone."""
    eval_batches: int | None = None
    """Batches per evaluation, always the same ones; None for the whole held-out set."""
    checkpoint_interval: int = 100
    """Steps between checkpoints; 0 saves after the last step alone."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep; the one with the lowest held-out loss is kept besides."""
    max_skipped_steps: int = 20
    """Stop after this many steps in a row whose loss or gradient is not finite (such a step changes nothing)."""

    def __post_init__(self) -> None:
        if not str(self.out):
            raise ValueError("TrainConfig: out is empty, expected the directory of the run")
        self.out = Path(self.out)
        if "\0" in str(self.out):
            raise ValueError(f"TrainConfig: out is {str(self.out)!r}, expected a path without a NUL character")
        if len(self.betas) != 2:
            raise ValueError(f"TrainConfig: betas is {self.betas!r}, expected two numbers")
        self.betas = (self.betas[0], self.betas[1])
        for name in ("steps", "batch_size", "accumulation", "log_interval", "keep_checkpoints", "max_skipped_steps"):
            _check(name, getattr(self, name), int, "an integer of at least 1", lambda value: value >= 1)
        for name in ("eval_interval", "checkpoint_interval"):
            _check(name, getattr(self, name), int, "an integer of at least 0", lambda value: value >= 0)
        _check("seed", self.seed, int, "an integer from 0 to below 2^63", lambda value: 0 <= value < 2**63)
        for name in ("learning_rate", "eps"):
            _check(name, getattr(self, name), float, "a number above 0", lambda value: value > 0)
        for name in ("weight_decay", "grad_clip"):
            _check(name, getattr(self, name), float, "a number of at least 0", lambda value: value >= 0)
        for name in ("warmup", "final_learning_rate"):
            _check(name, getattr(self, name), float, "a share from 0 to 1", lambda value: 0 <= value <= 1)
        for beta in self.betas:
            _check("betas", beta, float, "two numbers from 0 to below 1", lambda value: 0 <= value < 1)
        if self.eval_batches is not None:
            _check("eval_batches", self.eval_batches, int, "None or at least 1", lambda value: value >= 1)
        _check_choice("precision", self.precision, get_args(Precision))
        _check_choice("schedule", self.schedule, get_args(Schedule))

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them."""
        return dataclasses.asdict(self) | {"out": str(self.out), "betas": list(self.betas)}


def _check(name: str, value: Any, kind: type, expected: str, holds: Callable[[Any], bool]) -> None:
    number = isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
    if not number:
        raise TypeError(f"TrainConfig: {name} is {value!r}, expected {expected}")
    if not (math.isfinite(value) and holds(value)):
        raise ValueError(f"TrainConfig: {name} is {value!r}, expected {expected}")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        close = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"TrainConfig: {name} is {value!r}, expected one of {', '.join(choices)}{hint}")
