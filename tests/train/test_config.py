import types
import typing
from pathlib import Path

import pytest

from fastlm.train import TrainConfig


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps is 0, expected an integer of at least 1"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0, expected a number above 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"warmup_ratio": 1.5}, "warmup_ratio is 1.5, expected a share from 0 to 1"),
        ({"betas": (0.9, 1.0)}, "betas is 1.0, expected two numbers from 0 to below 1"),
        ({"betas": (0.9,)}, "expected two numbers"),
        ({"schedule": "cosin"}, r"schedule is 'cosin', .*[(]did you mean cosine[?]"),
        ({"precision": "float8"}, "precision is 'float8', expected one of auto, fp32, tf32, bf16, bf16-params, fp16"),
        ({"optimizer": "adam"}, r"optimizer is 'adam', .*[(]did you mean adamw[?]"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0, expected a share from 0 to below 1"),
        ({"momentum": 1.0}, "momentum is 1.0, expected a number from 0 to below 1"),
        ({"early_stopping_patience": -1}, "early_stopping_patience is -1, expected an integer of at least 0"),
        ({"eval_batches": 0}, "eval_batches is 0"),
        ({"out": "a\0b"}, r"out is 'a\\x00b', expected a path of at least a character, none of them NUL"),
        ({"out": ""}, "out is '', expected a path"),
        ({"init_from": ""}, "init_from is '', expected a path"),
        ({"init_from": "~nobody-of-this-name/x"}, "expected a path in a home directory that there is"),
        ({"log_to": ["tensorbord"]}, r"log_to is 'tensorbord', .*[(]did you mean tensorboard[?]"),
    ],
)
def test_config_refuses_a_value_out_of_range(change, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**change)


WRONG = {  # values by what a field may hold: each is one that its type excludes
    bool: ["no", 1, None],
    int: [2.5, True, "3", None],
    float: ["3e-4", True, None],
    str: [5, None],
    Path: [5, None],
    tuple: [5, None, "tensorboard"],
    typing.Literal: [5, None, ["auto"]],
}


def wrong_values():
    """(field, value) of every knob and each of the values that its type excludes."""
    for name, kind in typing.get_type_hints(TrainConfig).items():
        members = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
        kinds = {typing.get_origin(member) or member for member in members}
        for value in WRONG[(kinds - {types.NoneType}).pop()]:
            if value is not None or types.NoneType not in kinds:
                yield name, value


@pytest.mark.parametrize(("name", "value"), list(wrong_values()))
def test_config_refuses_a_value_of_the_wrong_type(name, value):
    with pytest.raises((TypeError, ValueError), match=f"^TrainConfig: {name} is "):
        TrainConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "hint"), [("stepz", r" \(did you mean steps\?\)"), ("lr", r" \(did you mean learning_rate\?\)"), ("x", "")]
)
def test_config_names_the_nearest_field(name, hint):
    with pytest.raises(TypeError, match=rf"^TrainConfig: unknown field '{name}'{hint}; help\(TrainConfig\) lists all$"):
        TrainConfig(**{name: 2})


def test_config_survives_json_types():
    config = TrainConfig(out="runs/x", betas=[0.8, 0.9])
    assert (config.out, config.betas) == (Path("runs/x"), (0.8, 0.9))
    assert TrainConfig(**config.as_dict()) == config


def test_config_takes_paths_as_text_and_as_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = TrainConfig(out="~/run", init_from="~/weights.safetensors")
    assert (config.out, config.init_from) == (Path("/home/me/run"), Path("/home/me/weights.safetensors"))
    assert TrainConfig(resume=Path("runs/x")) == TrainConfig(resume="runs/x")
