"""The tables of docs/configuration.md, made from the dataclasses and the presets."""

import itertools
import typing
from collections.abc import Iterable

from fastlm.cli import FileOptions
from fastlm.configuration import Option, described, options_of
from fastlm.depth import num_parameters
from fastlm.models import GPTConfig
from fastlm.presets import PRESETS, StartOptions
from fastlm.pretrain import PretrainOptions
from fastlm.train import TrainConfig


def tables() -> dict[str, str]:
    """Each table by the name that its marks on the page have."""
    options = [option for kind in (FileOptions, StartOptions, PretrainOptions) for option in options_of(kind)]
    return {"flags": flags(options), "presets": presets(), "defaults": defaults()}


def flags(options: Iterable[Option]) -> str:
    lines = []
    for group_help, members in itertools.groupby(options, key=lambda option: option.group_help):
        lines += [group_help, "", "| flag | default | meaning |", "|---|---|---|"]
        lines += [f"| `{option.flag}` | `{option.default_text}` | {meaning(option)} |" for option in members]
        lines += [""]
    return "\n".join(lines)


def meaning(option: Option) -> str:
    is_choice = typing.Literal in map(typing.get_origin, (option.kind, *typing.get_args(option.kind)))
    choices = f" ({described(option.kind)})" if is_choice else ""
    return f"{option.help.rstrip('.')}{choices}.".replace("|", "\\|")


def defaults() -> str:
    """Where the defaults of fastlm train are others than those of the dataclasses."""
    lines = ["| field | of the dataclass | of `fastlm train` |", "|---|---|---|"]
    for kind in (TrainConfig, GPTConfig):
        alone = {option.name: option.default_text for option in options_of(kind)}
        lines += [
            f"| `{kind.__name__}.{option.name}` | `{alone[option.name]}` | `{option.default_text}` |"
            for option in options_of(PretrainOptions)
            if alone.get(option.name, option.default_text) != option.default_text
        ]
    return "\n".join(lines) + "\n"


def presets() -> str:
    defaults = PretrainOptions()
    training = {"steps": defaults.training.steps, "learning_rate": defaults.training.learning_rate}
    tokens = defaults.training.batch_size * defaults.model.sequence_length
    lines = ["| preset | parameters | layers, width, heads | vocabulary, row | tokens a step | learning rate | steps |"]
    lines += ["|---|---|---|---|---|---|---|", row("tiny", defaults.model, tokens, training)]
    lines += [row(name, preset.model, preset.batch_tokens, preset.training) for name, preset in PRESETS.items()]
    return "\n".join(lines) + "\n"


def row(name: str, model: GPTConfig, tokens: int, training: dict) -> str:
    shape = f"{model.num_layers}, {model.hidden_size}, {model.num_heads}"
    text = f"{model.vocab_size:,}, {model.sequence_length:,}"
    numbers = f"{tokens:,} | {training['learning_rate']:g} | {training['steps']:,}"
    return f"| `{name}` | {num_parameters(model):,} | {shape} | {text} | {numbers} |"
