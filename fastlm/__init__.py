"""Faster drop-in layers for PyTorch, and a lean GPT trainer built on them, each proven equal to plain PyTorch.

`import fastlm` costs nothing: each name below is imported from its module when it is first used, so no Triton, no
device query and no build happens before a layer is asked for.
"""

import importlib

__version__ = "0.1.0"

_HOME = {
    "GPT": "fastlm.models.gpt",
    "GPTConfig": "fastlm.models.gpt",
    "Trainer": "fastlm.train",
    "TrainConfig": "fastlm.train",
    "generate": "fastlm.generate",
    "evaluate": "fastlm.evaluate",
}
_SUBPACKAGES = ("ops", "nn", "models", "data", "train")

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> object:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value  # without this `fastlm.generate` turns into the module once that is imported
        return value
    if name in _SUBPACKAGES:
        return importlib.import_module(f"fastlm.{name}")
    raise AttributeError(f"module 'fastlm' has no attribute {name!r}; it offers {', '.join(sorted(__all__))}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME, *_SUBPACKAGES])
