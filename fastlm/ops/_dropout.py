"""Dropout without a stored mask: Philox of the seed and an element's index, drawn again in backward.

Sources: Salmon et al. 2011, Parallel Random Numbers: As Easy as 1, 2, 3.
"""

# mypy: disallow-untyped-defs=False
# (only the kernels have none: Triton gives their arguments types at each launch)

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlm.ops._triton import tl, triton

MASK = 0xFFFFFFFF
SEEDS = 2**62  # drawn seeds are below: a compiler subtracts the ends of the range as signed 64-bit integers
PHILOX_ROUNDS = tl.constexpr(7)  # the fewest that pass every test of randomness, by the paper


class Dropout(NamedTuple):
    """Which elements a kernel zeroes; seed_ptr is None for none."""

    seed_ptr: Any  # one int64
    p: Any
    kept_factor: Any  # multiplies the others


def check_dropout(op: str, name: str, x: Tensor, dropout_p: float, seed: Tensor | int | None) -> None:
    """Raises what is wrong with the dropout of an op on x; name is that of x in the op's signature."""
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{op}: dropout_p is {dropout_p}, expected a probability between 0 and 1")
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"{op}: seed is a tensor of {seed.dtype}, expected torch.int64")
        if seed.numel() != 1:
            raise ValueError(f"{op}: seed has shape {tuple(seed.shape)}, expected one element")
        if seed.device != x.device:
            raise ValueError(f"{op}: seed is on {seed.device}, expected {x.device}, where {name} is; move it there")
    elif not isinstance(seed, int | None):
        raise TypeError(f"{op}: seed is a {type(seed).__name__}, expected an int, a tensor or None")
    elif seed is not None and not -(2**63) <= seed < 2**63:
        raise ValueError(f"{op}: seed is {seed}, expected a signed number of 64 bits")


def seed_tensor(seed: Tensor | int | None, device: torch.device) -> Tensor:
    """The seed on that device; None draws one from PyTorch's generator.

    Filled in there: a copy from the host would wait for the device, and could not be captured in a CUDA graph.
    """
    if seed is None:
        return torch.randint(SEEDS, (), device=device)
    return seed if isinstance(seed, Tensor) else torch.full((), seed, dtype=torch.int64, device=device)


def kept_factor(dropout_p: float) -> float:
    """The factor of the elements that dropout keeps."""
    return 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0


def philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> Tensor:
    """The four 32-bit words (..., 4) of Philox-4x32 for these counters, bit for bit those of Triton's tl.philox."""
    k0, k1 = seed & MASK, seed >> 32 & MASK
    for _ in range(PHILOX_ROUNDS):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2  # 64-bit products; & MASK drops the sign's copies
        c0, c1, c2, c3 = (b >> 32 & MASK) ^ c1 ^ k0, b & MASK, (a >> 32 & MASK) ^ c3 ^ k1, a & MASK
        k0, k1 = k0 + 0x9E3779B9 & MASK, k1 + 0xBB67AE85 & MASK
    return torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), -1)


def uniform(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> Tensor:
    """Numbers in [0, 1), four for each element of c0, its last dimension: (..., 4 * columns)."""
    return (philox(seed, c0, c1, c2, c3) >> 8).flatten(-2).float() * 2.0**-24


@triton.jit
def kernel_is_kept(dropout, seed, c0, c1, c2, c3, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Whether uniform >= p, (ROWS, COLS), for counters that broadcast to (ROWS, COLS / 4).

    Words are compared as integers, before they change threads: (word >> 8) * 2^-24 >= p where word >> 8 is at least
    2^24 p rounded up. For p = 1 that number times 2^8 is 0, and all are kept, by a factor of 0.
    """
    fewest = tl.ceil(dropout.p * 16777216.0).to(tl.uint32) << 8
    a, b, c, d = tl.philox(seed, c0, c1, c2, c3, PHILOX_ROUNDS)
    return tl.join(tl.join(a >= fewest, c >= fewest), tl.join(b >= fewest, d >= fewest)).reshape(ROWS, COLS)
