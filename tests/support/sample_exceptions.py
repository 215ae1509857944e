"""Where a call by one of PyTorch's own samples is not held against PyTorch's result for that very call, and why.

There are no other such exceptions. A row that excuses nothing any more fails the test that reads it.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

FLOATS = torch.float32, torch.float64, torch.float16, torch.bfloat16
SIXTEEN_BITS = torch.float16, torch.bfloat16
IMPLEMENTATIONS = "default", "interpreted", "compiled", "portable"
NOTHING, WITHOUT_CHUNKS = "nothing", "torch's op without chunks"


class Excuse(NamedTuple):
    """The calls of an op or module whose difference from PyTorch has one cause, by checks, samples and dtypes."""

    names: tuple[str, ...]
    checks: tuple[str, ...]
    applies: Callable[[str], bool]  # to the sample in words
    reason: str
    instead: str = NOTHING  # what the call is held against
    dtypes: tuple[torch.dtype, ...] = FLOATS
    implementations: tuple[str, ...] = IMPLEMENTATIONS


def excuses_of(name: str, dtype: torch.dtype, implementation: str) -> list[Excuse]:
    return [
        row for row in EXCUSES if name in row.names and dtype in row.dtypes and implementation in row.implementations
    ]


LINEAR_CROSS_ENTROPY = "nn.functional.linear_cross_entropy", "nn.LinearCrossEntropyLoss"


WRONG = "wrong calls"


def is_chunked(sample: str) -> bool:
    return "LinearCrossEntropyOptions" in sample


def has_other_dtype(sample: str) -> bool:
    return sample.endswith(("of torch.float32", "of torch.float64"))


EXCUSES = [
    Excuse(
        ("nn.functional.layer_norm", "nn.LayerNorm"),
        (WRONG,),
        has_other_dtype,
        "ours takes weight and bias of any dtype beside the input's, torch on a CPU only float32 beside 16 bits",
    ),
    Excuse(
        ("nn.functional.cross_entropy", "nn.CrossEntropyLoss"),
        (WRONG,),
        has_other_dtype,
        "our kernels, which by default take 16 bits alone of so few logits, take class weights of any dtype",
        dtypes=SIXTEEN_BITS,
        implementations=("default",),
    ),
    Excuse(
        ("nn.functional.cross_entropy",),
        (WRONG,),
        has_other_dtype,
        "our kernels take class weights of any dtype",
        implementations=("compiled", "portable"),
    ),
    Excuse(
        LINEAR_CROSS_ENTROPY,
        (WRONG,),
        has_other_dtype,
        "ours takes linear_bias and class weights of any dtype; torch's chunked op a linear_weight of any",
    ),
    Excuse(
        ("nn.CrossEntropyLoss", *LINEAR_CROSS_ENTROPY),
        (WRONG,),
        lambda sample: sample.endswith("['weight'] of a dimension more"),
        "torch takes class weights (1, V) for a loss of K dimensions; ours refuses what is not (V,)",
    ),
    Excuse(
        LINEAR_CROSS_ENTROPY,
        (WRONG,),
        lambda sample: "int64()" in sample and sample.endswith("[1][1] of a dimension more"),
        "torch takes a target (1,) beside an input (C,), ours only ()",
    ),
    Excuse(
        LINEAR_CROSS_ENTROPY,
        (WRONG,),
        lambda sample: is_chunked(sample) and not has_other_dtype(sample),
        "torch's chunked op does not check that the sizes agree, and computes; its plain one and ours refuse",
        WITHOUT_CHUNKS,
    ),
    Excuse(
        LINEAR_CROSS_ENTROPY,
        ("forward mode",),
        is_chunked,
        "torch's chunked op has no forward mode: where it does not refuse it, its tangent is zero",
        WITHOUT_CHUNKS,
    ),
    Excuse(
        LINEAR_CROSS_ENTROPY,
        ("autocast to bfloat16", "autocast to float16"),
        is_chunked,
        "torch's chunked op does not take part in autocast, torch's plain one and ours do",
        WITHOUT_CHUNKS,
        dtypes=(torch.float32, *SIXTEEN_BITS),
    ),
    Excuse(
        LINEAR_CROSS_ENTROPY,
        ("vmap of one tensor",),
        is_chunked,
        "torch's chunked op holds logits in float32; its plain one, and ours under vmap, round them to 16 bits",
        WITHOUT_CHUNKS,
        dtypes=SIXTEEN_BITS,
    ),
    Excuse(
        ("attention",),
        ("forward mode",),
        lambda sample: True,
        "attention is then PyTorch's fused kernel, which refuses it; only PyTorch's slow code does not",
    ),
    Excuse(
        ("attention",),
        ("double backward",),
        lambda sample: True,
        "on a CPU attention is PyTorch's fused kernel, which refuses it; only PyTorch's slow code does not",
        implementations=("default", "compiled", "portable"),
    ),
    Excuse(
        ("nn.functional.scaled_dot_product_attention",),
        (
            "backward",
            "double backward",
            "batched gradients",
            "not contiguous",
            "no_grad",
            "inference mode",
            "autocast to bfloat16",
            "autocast to float16",
        ),
        lambda sample: "'dropout_p': 0.5" in sample,
        "the kernels draw their dropout from a seed, and so drop other elements than torch's generator does",
        dtypes=(torch.float32, *SIXTEEN_BITS),
    ),
    Excuse(
        ("nn.functional.layer_norm",),
        ("double backward",),
        lambda sample: sample.startswith("('float16(1,)'"),
        "in torch rstd^3 of a row of one element overflows float16 and makes NaN; ours is finite, as the truth",
        dtypes=(torch.float16,),
        implementations=("interpreted", "compiled", "portable"),
    ),
]
