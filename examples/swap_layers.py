"""Swap the layers of a model you have for fastlm's: same constructors, same parameters, same results."""

import torch
from torch import nn

import fastlm.nn
import fastlm.ops

torch.manual_seed(0)
width, vocab_size = 256, 1000
model = nn.Sequential(nn.Embedding(vocab_size, width), nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
head = nn.Linear(width, vocab_size, bias=False)
tokens, targets = torch.randint(0, vocab_size, (2, 4, 512))
before = nn.functional.cross_entropy(head(model(tokens)).flatten(0, 1), targets.flatten())

# A module of torch.nn becomes fastlm's by its class: its parameters, hooks and state_dict keys stay as they are.
for module in model:
    if type(module) in (nn.LayerNorm, nn.GELU):
        module.__class__ = getattr(fastlm.nn, type(module).__name__)
# The loss takes the head's weight, and the logits of all tokens are never in memory at once.
after = fastlm.ops.linear_cross_entropy(model(tokens), head.weight, targets)

print(f"loss {before:.6f} with torch.nn, {after:.6f} with fastlm.nn")
print(fastlm.ops.explain(lambda: fastlm.ops.linear_cross_entropy(model(tokens), head.weight, targets)))
