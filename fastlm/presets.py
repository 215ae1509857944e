"""Where a configuration may start: a published recipe by name, or one that `depth.py` makes from the number of layers.

A recipe gives its batch in tokens. Here they are shared out:

    rows per device   = batch tokens / (sequence_length * devices), rounded up
    batch_size        = the largest power of two up to that for which the run fits into 0.8 of a device's memory
    accumulated       = rows per device / batch_size, rounded up

    bytes of a run    = 16 N + 68 L C per token

16 bytes are the fp32 weight, gradient and AdamW's two averages. Activations are 34 C bytes per token and block in 16
bits without the attention matrix (Korthikanti et al. 2022, arXiv 2205.05198, equation 1), here in 32: autocast and
activation checkpointing leave room, which a larger --batch-size may take.
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import torch

from fastlm import depth as dial
from fastlm.data.loader import memory
from fastlm.models import GPTConfig
from fastlm.train.distributed import connect
from fastlm.train.precision import PrecisionKnobs, choose_precision

PresetName = Literal["tiny", "gpt2-124m", "gpt2-350m", "gpt2-774m", "gpt2-1.5b", "llama-135m", "llama-1b"]

USABLE = 0.8  # of the memory: the rest is the allocator's, the libraries' and the logits'
STATE_BYTES = 16  # per parameter
ACTIVATION_BYTES = 68  # per token, block and feature


@dataclasses.dataclass
class StartOptions:
    """Where to start from, instead of the defaults: whatever else is given goes over it."""

    heading = "starting point"

    preset: PresetName | None = None
    """A published model and its recipe; tiny is the defaults."""
    depth: int | None = None
    """Layers, from which width, heads, batch, learning rate and steps follow by published rules."""

    def __post_init__(self) -> None:
        if self.preset is not None and self.depth is not None:
            raise ValueError("preset and depth both choose where to start: give one of them")
        if self.depth is not None:
            dial.shape(self.depth)

    def __str__(self) -> str:
        return f"preset {self.preset}" if self.preset else f"depth {self.depth}"


class Devices(NamedTuple):
    """What there is to train on."""

    world_size: int  # over all machines
    memory: float  # bytes of each


@dataclasses.dataclass(frozen=True)
class Preset:
    """A published model, and how it or its like was trained."""

    model: GPTConfig
    batch_tokens: int
    training: dict[str, Any]  # fields of TrainConfig


def _gpt2(num_layers: int, num_heads: int, hidden_size: int) -> GPTConfig:
    """Radford et al. 2019, table 2; heads from the configurations that Hugging Face publishes with the weights."""
    return GPTConfig(num_layers=num_layers, num_heads=num_heads, hidden_size=hidden_size)


def _recipe(learning_rate: float, steps: int, warmup_steps: int, **fields: Any) -> dict[str, Any]:
    """What all these recipes share: AdamW with betas 0.9 and 0.95, gradients clipped to norm 1."""
    common = {"betas": (0.9, 0.95), "eps": 1e-8, "grad_clip": 1.0, "weight_decay": 0.1, "schedule": "cosine"}
    schedule = {"learning_rate": learning_rate, "steps": steps, "warmup_ratio": warmup_steps / steps}
    return common | schedule | fields


# The GPT-2 paper tells no learning rates. These are of llm.c's reproductions, scripts/run_gpt2_*.sh. But for the last
# learning rate they are those of GPT-3's models of about that size (Brown et al. 2020, arXiv 2005.14165, table 2.1).
PRESETS: dict[PresetName, Preset] = {
    "gpt2-124m": Preset(_gpt2(12, 12, 768), 1 << 19, _recipe(6e-4, 18_865, 700, final_lr_ratio=0.0)),
    "gpt2-350m": Preset(_gpt2(24, 16, 1024), 1 << 19, _recipe(3e-4, 60_000, 700, final_lr_ratio=0.0)),
    "gpt2-774m": Preset(_gpt2(36, 20, 1280), 1 << 19, _recipe(2.5e-4, 286_102, 700, final_lr_ratio=0.0)),
    "gpt2-1.5b": Preset(_gpt2(48, 25, 1600), 1 << 20, _recipe(6e-4, 32_000, 700, final_lr_ratio=0.1)),
    # SmolLM-135M (Ben Allal et al. 2024): github.com/huggingface/smollm, config_smollm1_135M.yaml; 600 billion tokens.
    "llama-135m": Preset(
        GPTConfig.llama(
            vocab_size=49152,
            sequence_length=2048,
            num_layers=30,
            num_heads=9,
            num_kv_heads=3,
            hidden_size=576,
            intermediate_size=1536,
            tie_embeddings=True,
        ),
        1 << 20,
        _recipe(
            3e-3,
            572_205,
            2000,
            weight_decay=0.01,
            final_lr_ratio=0.0,
            schedule="wsd",
            decay_ratio=0.2,
            decay_shape="linear",
        ),
    ),
    # Shape: Llama-3.2-1B's config.json. That model was pruned and distilled from larger ones, so how to train its like
    # from nothing is from TinyLlama-1.1B (Zhang et al. 2024, arXiv 2401.02385): 3 trillion tokens, 2 million a step.
    "llama-1b": Preset(
        GPTConfig.llama(
            vocab_size=128256,
            sequence_length=8192,
            num_layers=16,
            num_heads=32,
            num_kv_heads=8,
            hidden_size=2048,
            intermediate_size=8192,
            rope_base=500000.0,
            tie_embeddings=True,
        ),
        1 << 21,
        _recipe(4e-4, 1_430_512, 2000, final_lr_ratio=0.1),
    ),
}


def starting_values(
    start: StartOptions, given: dict[str, Any], defaults: dict[str, Any], devices: Devices
) -> dict[str, Any]:
    """What a start sets, by the names of options. What is given goes over it, and the rest is reckoned from that."""
    if start.preset in PRESETS:
        preset = PRESETS[start.preset]
        values = dataclasses.asdict(preset.model) | preset.training
        config = _model(defaults | values | given)
        rows = round(preset.batch_tokens / config.sequence_length)
        return values | batch(rows, config, devices, given)
    if start.depth is None:
        return {}
    values = dial.shape(start.depth)
    config = _model(defaults | values | given)
    tokens, rows, learning_rate = dial.budget(config)
    values |= batch(rows, config, devices, given) | {"learning_rate": learning_rate}
    settled = values | given
    rows_per_step = settled["batch_size"] * settled["grad_accumulation_steps"] * devices.world_size
    return values | {"steps": math.ceil(tokens / (rows_per_step * config.sequence_length))}


def _model(values: dict[str, Any]) -> GPTConfig:
    return GPTConfig(**{field.name: values[field.name] for field in dataclasses.fields(GPTConfig)})


def batch(rows: int, config: GPTConfig, devices: Devices, given: dict[str, Any]) -> dict[str, int]:
    """batch_size and grad_accumulation_steps that make rows over all devices, as the module's docstring says."""
    per_device = max(1, math.ceil(rows / devices.world_size))
    row_bytes = ACTIVATION_BYTES * config.num_layers * config.hidden_size * config.sequence_length
    free = USABLE * devices.memory - STATE_BYTES * dial.num_parameters(config)
    fitting = max(1.0, min(per_device, free / row_bytes))
    batch_size = given.get("batch_size", 1 << int(math.log2(fitting)))
    return {"batch_size": batch_size, "grad_accumulation_steps": math.ceil(per_device / batch_size)}


def devices_here(device: str) -> Devices:
    """All ranks of this run, each with the memory that rank 0 has: ranks that reckoned with other sizes would part.

    Raises ValueError if the device is not to be had.
    """
    ranks = connect()
    chosen = choose_precision(PrecisionKnobs(device=device), ranks.local_rank).device
    if chosen.type == "cuda":
        size = float(torch.cuda.get_device_properties(chosen).total_memory)
    else:
        size = memory() / ranks.world_size
    return Devices(ranks.world_size, float(ranks.sum(torch.tensor(size if ranks.is_main else 0.0))))
