"""Dropout without a stored mask: Philox turns a seed and an element's place into the element's fate, again in backward.

Sources: Salmon et al. 2011, Parallel Random Numbers: As Easy as 1, 2, 3.
"""

# mypy: disallow-untyped-defs=False
# (only the kernels have none: Triton gives their arguments types at each launch)

import torch
from torch import Tensor

from fastlm.ops._triton import tl, triton

MASK = 0xFFFFFFFF
PHILOX_ROUNDS = tl.constexpr(7)  # the fewest that pass every test of randomness, by the paper


def philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> Tensor:
    """The four 32-bit words (..., 4) of Philox-4x32 for these counters, bit for bit those of Triton's tl.philox."""
    k0, k1 = seed & MASK, seed >> 32 & MASK
    for _ in range(PHILOX_ROUNDS):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2  # 64 bits each, of which the sign is one
        c0, c1, c2, c3 = (b >> 32 & MASK) ^ c1 ^ k0, b & MASK, (a >> 32 & MASK) ^ c3 ^ k1, a & MASK
        k0, k1 = k0 + 0x9E3779B9 & MASK, k1 + 0xBB67AE85 & MASK
    return torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), -1)


def uniform(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> Tensor:
    """Numbers in [0, 1), four for each element of c0, its last dimension: (..., 4 * columns)."""
    return (philox(seed, c0, c1, c2, c3) >> 8).flatten(-2).float() * 2.0**-24


@triton.jit
def kernel_uniform(seed, c0, c1, c2, c3, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The same inside a kernel, (ROWS, COLS), for counters that broadcast to (ROWS, COLS / 4)."""
    a, b, c, d = tl.philox(seed, c0, c1, c2, c3, PHILOX_ROUNDS)
    drawn = tl.join(tl.join(a, c), tl.join(b, d)).reshape(ROWS, COLS)
    return (drawn >> 8).to(tl.float32) * 5.9604644775390625e-08  # 2^-24
