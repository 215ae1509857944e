"""Swap the layers of a model that you have for fastlm's: same parameters, same results."""

import torch
from torch import nn

import fastlm
import fastlm.ops

torch.manual_seed(0)
width, vocab_size = 256, 1000
model = nn.Sequential(nn.Embedding(vocab_size, width), nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
head = nn.Linear(width, vocab_size, bias=False)
tokens, targets = torch.randint(0, vocab_size, (2, 4, 512))
before = nn.functional.cross_entropy(head(model(tokens)).flatten(0, 1), targets.flatten())

fastlm.accelerate(model)  # in place: parameters, hooks and state_dict keys stay as they are
print(fastlm.accelerated(model))
# The loss takes the head's weight, and the logits of all tokens are never in memory at once.
after = fastlm.ops.linear_cross_entropy(model(tokens), head.weight, targets)

print(f"loss {before:.6f} with torch.nn, {after:.6f} with fastlm")
print(fastlm.ops.explain(lambda: fastlm.ops.linear_cross_entropy(model(tokens), head.weight, targets)))
