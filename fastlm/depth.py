"""One dial: from the number of layers to a whole recipe, by published rules.

    width           C = 64 L, rounded up to whole heads of 128         nanochat (Karpathy 2025), scripts/base_train.py
    tokens          D = 20 N, N all parameters                         Hoffmann et al. 2022, arXiv 2203.15556, table 3
    compute         F = (72 L C^2 + 12 L C T) D                        Bi et al. 2024, arXiv 2401.02954, equation 2
    batch           B = 0.2920 F^0.3271 tokens                         the same, equation 1
    learning rate   0.3118 F^-0.1250                                   the same, equation 1

That the loss is nearly flat in the ratio of width to depth is from Kaplan et al. 2020, arXiv 2001.08361, figure 5; that
N must count the embedding from Pearce and Song 2024, arXiv 2406.12907. Batch and learning rate were fitted on runs of
1e17 to 2e19 FLOPs of AdamW; beyond these the rules are an extrapolation. Vocabulary and row length belong to the data
and are left alone.
"""

import functools
import math
from typing import Any, NamedTuple

from fastlm.models import GPT, GPTConfig

ASPECT_RATIO = 64
HEAD_SIZE = 128
TOKENS_PER_PARAMETER = 20
DEEPEST = 128  # 8192 wide, some 100 billion parameters: nobody's rules were tried beyond


class Budget(NamedTuple):
    """How long to train a model, and how."""

    tokens: int
    batch_rows: int  # of the model's sequence_length, over all devices and accumulated batches; a power of two
    learning_rate: float  # to two digits


def shape(depth: int) -> dict[str, Any]:
    """Fields of GPTConfig for a model of so many layers. Raises ValueError for a depth out of range."""
    if not 1 <= depth <= DEEPEST:
        raise ValueError(f"depth is {depth}, expected an integer from 1 to {DEEPEST}")
    num_heads = math.ceil(ASPECT_RATIO * depth / HEAD_SIZE)
    return {"num_layers": depth, "hidden_size": num_heads * HEAD_SIZE, "num_heads": num_heads}


def budget(config: GPTConfig) -> Budget:
    """What the rules say for a model, whatever its shape."""
    L, C, T = config.num_layers, config.hidden_size, config.sequence_length
    tokens = TOKENS_PER_PARAMETER * num_parameters(config)
    flops = float((72 * L * C**2 + 12 * L * C * T) * tokens)
    rows = 0.2920 * flops**0.3271 / T
    return Budget(
        tokens=tokens,
        batch_rows=2 ** max(0, round(math.log2(rows))),
        learning_rate=float(f"{0.3118 * flops**-0.1250:.2g}"),
    )


@functools.cache
def num_parameters(config: GPTConfig) -> int:
    """Parameters of the model as published counts have them: without the rows that pad the vocabulary."""
    model = GPT.on_meta(config)
    padding = (config.padded_vocab_size - config.vocab_size) * config.hidden_size
    heads = 1 if config.tie_embeddings else 2
    return sum(parameter.numel() for parameter in model.parameters()) - heads * padding
