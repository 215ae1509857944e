"""Faster drop-in layers for PyTorch, and a lean GPT trainer built on them, tested against plain PyTorch in float64.

`import fastlm` costs nothing: each name below is imported from its module when it is first used, so no Triton, no
device query and no build happens before a layer is asked for.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastlm.acceleration import accelerate as accelerate
    from fastlm.acceleration import accelerated as accelerated
    from fastlm.acceleration import restore as restore
    from fastlm.acceleration.verification import verify as verify
    from fastlm.evaluation import evaluate as evaluate
    from fastlm.generation import generate as generate
    from fastlm.models.causal_lm import CausalLM as CausalLM
    from fastlm.models.gpt import GPT as GPT
    from fastlm.models.gpt import GPTConfig as GPTConfig
    from fastlm.train import TrainConfig as TrainConfig
    from fastlm.train import Trainer as Trainer

__version__ = "0.1.0"

_HOME = {
    "accelerate": "fastlm.acceleration",
    "accelerated": "fastlm.acceleration",
    "restore": "fastlm.acceleration",
    "verify": "fastlm.acceleration.verification",
    "CausalLM": "fastlm.models.causal_lm",
    "GPT": "fastlm.models.gpt",
    "GPTConfig": "fastlm.models.gpt",
    "Trainer": "fastlm.train",
    "TrainConfig": "fastlm.train",
    "generate": "fastlm.generation",
    "evaluate": "fastlm.evaluation",
}
_SUBPACKAGES = ("ops", "nn", "models", "data", "train", "losses")

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in _SUBPACKAGES:
        return importlib.import_module(f"fastlm.{name}")
    raise AttributeError(f"module 'fastlm' has no attribute {name!r}; it offers {', '.join(sorted(__all__))}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME, *_SUBPACKAGES])
