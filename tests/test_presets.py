"""Presets have the published numbers of parameters and tokens, and what is given goes over what they set."""

import math
import typing
from typing import Any

import pytest

from fastlm.configuration import build, options_of
from fastlm.depth import num_parameters
from fastlm.presets import PRESETS, Devices, PresetName, StartOptions, devices_here, starting_values
from fastlm.pretrain import PretrainOptions

# Of the weights that Hugging Face publishes: openai-community/gpt2, -medium, -large, -xl, HuggingFaceTB/SmolLM-135M,
# meta-llama/Llama-3.2-1B.
PUBLISHED = {
    "gpt2-124m": 124_439_808,
    "gpt2-350m": 354_823_168,
    "gpt2-774m": 774_030_080,
    "gpt2-1.5b": 1_557_611_200,
    "llama-135m": 134_515_008,
    "llama-1b": 1_235_814_400,
}
DEFAULTS = {option.name: option.default for option in options_of(PretrainOptions)}
BIG, SMALL = Devices(1, 80e9), Devices(1, 16e9)


def values(devices: Devices = BIG, given: dict[str, Any] | None = None, **start: Any) -> dict[str, Any]:
    return starting_values(StartOptions(**start), given or {}, DEFAULTS, devices)


def tokens_per_step(values: dict[str, Any], devices: Devices) -> int:
    settled = DEFAULTS | values
    rows = settled["batch_size"] * settled["grad_accumulation_steps"] * devices.world_size
    return rows * settled["sequence_length"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_has_the_published_number_of_parameters(name):
    assert num_parameters(PRESETS[name].model) == PUBLISHED[name]


def test_presets_are_those_that_the_flag_takes():
    assert set(typing.get_args(PresetName)) == {"tiny", *PRESETS} == {"tiny", *PUBLISHED}


def test_tiny_is_the_defaults():
    assert values(preset="tiny") == {}


@pytest.mark.parametrize("devices", [BIG, SMALL, Devices(8, 80e9), Devices(64, 80e9)])
@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_makes_options_of_its_batch_on_any_devices(name, devices):
    chosen = values(devices, preset=name)
    assert tokens_per_step(chosen, devices) == PRESETS[name].batch_tokens
    options = build(PretrainOptions, chosen)
    assert options.model == PRESETS[name].model
    assert options.training.learning_rate == PRESETS[name].training["learning_rate"]


def test_batches_are_as_computed_by_hand():
    # 16 * 124,439,808 bytes of state; a row takes 68 * 12 * 768 * 1024 = 642 MB, so 0.8 * 80 GB hold 96 and
    # 0.8 * 16 GB hold 16.8
    assert (values(BIG, preset="gpt2-124m")["batch_size"], values(SMALL, preset="gpt2-124m")["batch_size"]) == (64, 16)
    assert values(SMALL, preset="gpt2-124m")["grad_accumulation_steps"] == 512 // 16
    assert values(Devices(1, 1e9), preset="gpt2-1.5b")["batch_size"] == 1


def test_batch_on_devices_that_do_not_divide_it_is_larger_by_less_than_a_batch_of_each():
    devices = Devices(6, 80e9)
    chosen = values(devices, preset="gpt2-124m")
    assert 0 <= tokens_per_step(chosen, devices) - (1 << 19) < 6 * chosen["batch_size"] * 1024
    assert tokens_per_step(values(Devices(1000, 80e9), preset="gpt2-124m"), Devices(1000, 80e9)) == 1000 * 1024


def test_given_values_change_what_is_reckoned():
    chosen = values(preset="gpt2-124m", given={"batch_size": 8, "sequence_length": 2048})
    assert chosen["grad_accumulation_steps"] == (1 << 19) // 2048 // 8
    wide, narrow = values(depth=8), values(depth=8, given={"hidden_size": 256, "num_heads": 2})
    assert wide["learning_rate"] < narrow["learning_rate"]
    one = values(depth=8, given={"batch_size": 1, "grad_accumulation_steps": 1})
    assert one["steps"] == math.ceil(20 * num_parameters(model_of(one)) / 256)


def model_of(values: dict[str, Any]) -> Any:
    return build(PretrainOptions, values).model


def test_depth_makes_a_whole_recipe():
    chosen = values(depth=4)  # tests/test_depth.py has the numbers computed by hand
    assert chosen == {
        "num_layers": 4,
        "hidden_size": 256,
        "num_heads": 2,
        "batch_size": 128,
        "grad_accumulation_steps": 1,
        "learning_rate": 0.0039,
        "steps": math.ceil(74_757_120 / (128 * 256)),
    }


def test_depth_spreads_the_same_batch_over_devices():
    for devices in (SMALL, Devices(4, 16e9)):
        chosen = values(devices, depth=12)
        assert tokens_per_step(chosen, devices) == 1024 * 256
        assert chosen["steps"] == 6602


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ({"preset": "tiny", "depth": 4}, "preset and depth both choose where to start: give one of them"),
        ({"depth": 0}, "depth is 0, expected an integer from 1 to 128"),
    ],
)
def test_start_is_refused(start, message):
    with pytest.raises(ValueError, match=message):
        StartOptions(**start)


def test_devices_here_have_memory():
    devices = devices_here("cpu")
    assert devices.world_size == 1
    assert devices.memory > 1e8
    with pytest.raises(ValueError, match="device is 'gpu'"):
        devices_here("gpu")
