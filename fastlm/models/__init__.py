"""Language models built on fastlm's layers."""

from fastlm.models.gpt import GPT, GPTConfig

__all__ = ["GPT", "GPTConfig"]
