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
        ({"schedule": "cosin"}, "schedule is 'cosin', .* did you mean 'cosine'?"),
        ({"precision": "float8"}, "precision is 'float8', expected one of auto, fp32, tf32, bf16, bf16-params, fp16"),
        ({"optimizer": "adam"}, "optimizer is 'adam', .* did you mean 'adamw'?"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0, expected a share from 0 to below 1"),
        ({"momentum": 1.0}, "momentum is 1.0, expected a number from 0 to below 1"),
        ({"early_stopping_patience": -1}, "early_stopping_patience is -1, expected an integer of at least 0"),
        ({"eval_batches": 0}, "eval_batches is 0"),
        ({"out": "a\0b"}, "expected a path without a NUL character"),
    ],
)
def test_config_refuses_a_value_out_of_range(change, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**change)


@pytest.mark.parametrize("change", [{"steps": 2.5}, {"steps": True}, {"learning_rate": "3e-4"}])
def test_config_refuses_a_value_of_the_wrong_type(change):
    with pytest.raises(TypeError, match="TrainConfig: "):
        TrainConfig(**change)


def test_config_survives_json_types():
    config = TrainConfig(out="runs/x", betas=[0.8, 0.9])
    assert (config.out, config.betas) == (Path("runs/x"), (0.8, 0.9))
    assert TrainConfig(**config.as_dict()) == config
