"""Language models built on fastlm's layers, and anyone's made ready to train."""

from fastlm.models.causal_lm import CausalLM
from fastlm.models.gpt import GPT, GPTConfig

__all__ = ["GPT", "CausalLM", "GPTConfig"]
