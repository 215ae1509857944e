"""What is wrong with the start of a run, told before its data are prepared or its model is made; and what may be.

Only small files are read here: state.json and a rank's of a checkpoint, the header of a .safetensors file. The trainer
checks all of it again, and the checksums too.
"""

import contextlib
import dataclasses
import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastlm.data import Prepared
from fastlm.models import GPT, GPTConfig
from fastlm.train import TrainConfig, checkpoint, run_start
from fastlm.train.checkpoint_files import CheckpointError, rank_file, read_json, read_state

CONFIG_FILE = "config.toml"  # of a run: the options as they were resolved
DECIDE_THE_TOKENS = ("data", "text_field", "held_out", "tokenizer", "vocab_size")  # options
LARGER_RATES = {"sgd": 10, "adagrad": 5}  # times AdamW's: what these optimisers usually take (docs/optimizers.md)


class Saved(NamedTuple):
    """A checkpoint without its tensors."""

    path: Path
    metadata: dict[str, Any]
    loader: dict[str, Any]  # its place in the data

    @property
    def run(self) -> Path:
        return self.path.parent.parent


def saved(training: TrainConfig) -> Saved | None:
    """What the run would continue from; None for a new run, or if nothing that is there can be read."""
    try:
        found = checkpoint.newest_state(training.out)
        if found is None and training.resume_from:
            found = training.resume_from, read_state(training.resume_from)
    except CheckpointError:
        return None
    if found is None:
        return None
    path, state = found
    loader: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        loader = dict(read_json(path / rank_file(0))["loader"])
    return Saved(path, state["metadata"], loader)


def check_start(training: TrainConfig, model: GPTConfig, *, restarts: int = 0) -> None:
    """Raise CheckpointError if training.out, resume or init_from do not go together, or hold another model than this.

    restarts  of all ranks by torchrun

    The vocabulary is left out: its size is known once there is a tokenizer.
    """
    is_new = not checkpoint.paths(training.out)
    for path in filter(None, (training.resume_from, training.init_from)) if is_new else ():
        if path.is_dir() and not (path / "state.json").exists() and not checkpoint.paths(path):
            if (path / "config.json").exists():
                raise CheckpointError(
                    f"{path} is a model of Hugging Face, no checkpoint: fastlm train cannot begin with it; in Python, "
                    "Trainer takes GPT.from_pretrained of it"
                )
            raise CheckpointError(
                f"{path} is no checkpoint: expected a directory such as RUN/checkpoints/step-00000100"
            )
    found = saved(training)
    metadata = found.metadata if found else {}
    if isinstance(was := metadata.get("model"), dict):
        ours = {key: value for key, value in dataclasses.asdict(model).items() if key != "vocab_size"}
        metadata = metadata | {"model": was | ours}
    run_start.check_metadata(training.out, metadata)
    run_start.check_start(training.out, training, metadata, restarts=restarts)
    if training.init_from and is_new:
        check_weights(training.init_from, model)


def check_weights(source: Path, model: GPTConfig) -> None:
    """Raise CheckpointError if a checkpoint or .safetensors file is neither, or has not the shapes of the model."""
    if (source / "model").is_dir():
        return  # shards, of which each tells a part of the shapes
    weights = header(source / "model.safetensors" if source.is_dir() else source)
    if weights is None:
        run_start.read_weights(source)  # says what is wrong with it
        return
    own = GPT.on_meta(model).state_dict()
    for name in own.keys() & weights.keys() & {"token_embedding.weight", "head.weight"}:
        own[name] = own[name].new_empty(*weights[name].shape[:1], own[name].shape[1])
    try:
        run_start.fitted_weights(weights, own)
    except ValueError as error:
        raise CheckpointError(f"{source} does not fit this model: {error}") from error


def header(file: Path) -> dict[str, Tensor] | None:
    """Tensors without values, as a .safetensors file describes its own; None if it is no such file."""
    try:
        with safe_open(file, "pt") as opened:
            names = opened.keys()
            return {name: torch.empty(opened.get_slice(name).get_shape(), device="meta") for name in names}
    except (OSError, SafetensorError):
        return None


def check_data(training: TrainConfig, options: Mapping[str, Any], data: Prepared) -> None:
    """Raise CheckpointError if the run to be continued was trained on other tokens, and say which.

    options  those that DECIDE_THE_TOKENS
    """
    found = saved(training)
    if found is None:
        return
    tokenizer, text = found.metadata.get("tokenizer"), found.loader.get("dataset")
    if tokenizer in (None, data.tokenizer.hash) and text in (None, data.train.fingerprint):
        return
    was = options_of_run(found.run)
    changed = [
        f"{name} was {was[name]} and is {now}"
        for name in DECIDE_THE_TOKENS
        if name in was and comparable(name, was[name]) != comparable(name, now := options[name])
    ]
    what = ", ".join(changed) or f"the text of {options['data']} is not what it was then"
    way_out = "give the same again to continue that run" if changed else "put it back to continue that run"
    raise CheckpointError(
        f"{found.path} was trained on other data: {what}; {way_out}, or begin a new one with another out"
    )


def comparable(name: str, value: Any) -> Any:
    """A value as it stands in a run's config.toml, paths in their one form."""
    if value is None or value == "None":
        return None
    return os.path.realpath(value) if name in ("data", "tokenizer") else value


def options_of_run(run: Path) -> dict[str, Any]:
    """What config.toml of a run sets, in one table; nothing where there is none."""
    try:
        tables = tomllib.loads((run / CONFIG_FILE).read_text())
    except (OSError, ValueError):
        return {}
    inner = [table for table in tables.values() if isinstance(table, dict)]
    return {name: value for table in [tables, *inner] for name, value in table.items()}


def advice(training: TrainConfig, default: TrainConfig, data: Prepared, world_size: int) -> Iterator[str]:
    """Lines on settings that work and are perhaps not what was meant.

    default  the settings where none are given
    """
    if world_size == 1 and training.data_parallel != "auto":
        yield (
            f"data_parallel {training.data_parallel} changes nothing, as this is one process: start several with "
            "torchrun --nproc-per-node N -m fastlm train"
        )
    factor = LARGER_RATES.get(training.optimizer)
    if factor and training.learning_rate == default.learning_rate:
        yield (
            f"learning_rate {training.learning_rate:g} is the default, made for adamw: {training.optimizer} usually "
            f"takes a larger one; try {factor * training.learning_rate:g}"
        )
    if training.init_from and not checkpoint.paths(training.out):
        with contextlib.suppress(CheckpointError):
            if read_state(training.init_from)["metadata"].get("tokenizer", data.tokenizer.hash) != data.tokenizer.hash:
                yield (
                    f"the weights of {training.init_from} belong to another tokenizer, so most of what they know of "
                    f"tokens is lost: take that of its run with tokenizer, perhaps "
                    f"{training.init_from.parent.parent / 'tokenizer.json'}"
                )
