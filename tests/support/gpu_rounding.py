"""Makes Triton's interpreter round as the approximate instructions of a GPU do.

The interpreter computes with NumPy, which rounds correctly. Triton 3.6 compiles float32 arithmetic, alike for sm_80, 90
and 100, to less:

    x / y                 div.full.f32                    2 ulp
    tl.exp2(x)            ex2.approx.ftz.f32              2 ulp
    tl.exp(x)             mul.f32 and ex2.approx.f32      2 ulp of 2^(x * log2(e)), whose exponent is rounded first
    tl.sqrt(x)            sqrt.approx.ftz.f32             2^-23 of the result
    tl.rsqrt(x)           rsqrt.approx.ftz.f32            2^-22.9 of the result
    tl.log(x), log2(x)    a polynomial of libdevice       1 ulp
    tl.erf(x)             a polynomial, ex2.approx.ftz    2 ulp
    tl.div_rn, sqrt_rn    div.rn.f32, sqrt.rn.f32         correctly rounded: left as they are

Inside `gpu_rounding` each result has an error that its bits alone decide, up to these bounds. As on a GPU it is none
where the result is a power of two, or the divisor: div.full is x times an approximate 1 / y, so x / x need not be 1.
`.ftz` flushes subnormal operands and results to zero. test_gpu_rounding.py holds all this, and the instructions.

Emulated are neither FMA contraction nor the order in which threads and tensor cores add.

Source: PTX ISA 9.0, 9.7.3 (div, sqrt, rsqrt, ex2); CUDA C++ Programming Guide, mathematical functions (libdevice).
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

Array = np.ndarray
HALF_ULP = 2.0**-24  # of the smallest float32 of a binade; the rounding to float32 takes so much of every bound


@contextlib.contextmanager
def gpu_rounding() -> Iterator[None]:
    """Float32 arithmetic of interpreted kernels is that of the table above."""
    with contextlib.ExitStack() as patches:
        for name, approximation in APPROXIMATIONS.items():
            method = of_float32(approximation, getattr(InterpreterBuilder, name))
            patches.enter_context(mock.patch.object(InterpreterBuilder, name, method))
        yield


def of_float32(approximation: Callable[..., Array], method: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    """The builder's method, with an approximation in its place where all operands are float32."""

    @functools.wraps(method)
    def arithmetic(self: InterpreterBuilder, *operands: TensorHandle) -> TensorHandle:
        if any(operand.data.dtype != np.float32 for operand in operands):
            return method(self, *operands)
        with np.errstate(all="ignore"):
            return TensorHandle(approximation(*(operand.data for operand in operands)), operands[0].dtype.scalar)

    return arithmetic


def share_of_bound(x: Array) -> Array:
    """From -1 to 1 by the bits of x but its sign; 0 for a power of two, zero and infinity."""
    bits = np.asarray(x).view(np.uint32) & np.uint32(0x7FFFFFFF)
    mixed = (bits * np.uint32(0x9E3779B1)) >> np.uint32(8)  # a multiplicative hash, of which 24 bits are kept
    return np.where(bits & np.uint32(0x7FFFFF), mixed * 2.0**-23 - 1.0, 0.0)


def approximate(exact: Array, reach: Array) -> Array:
    """The float32 of a float64 array, after an error of up to reach. No sign changes, not even of a subnormal."""
    reach = np.minimum(reach, np.abs(exact))
    share = share_of_bound(exact.astype(np.float32))
    return np.where(share, exact + np.sign(exact) * share * reach, exact).astype(np.float32)


def within_ulps(count: float, exact: Array) -> Array:
    return approximate(exact, (count - 0.5) * np.spacing(np.abs(exact.astype(np.float32))))


def within_share(share: float, exact: Array) -> Array:
    return approximate(exact, (share - HALF_ULP) * np.abs(exact))


def flushed(x: Array) -> Array:
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def divide(x: Array, y: Array) -> Array:
    # 1.5 * 2^-24 of a quotient that nearly fills its binade are 1.5 ulp, and the rounding is the rest of 2.
    return (np.divide(x, y, dtype=np.float64) * (1.0 + 1.5 * HALF_ULP * share_of_bound(y))).astype(np.float32)


def exp2(x: Array) -> Array:
    return within_ulps(2.0, np.exp2(x, dtype=np.float64))


def exp(x: Array) -> Array:
    return exp2(x * np.float32(math.log2(math.e)))


def sqrt(x: Array) -> Array:
    return within_share(2.0**-23, np.sqrt(flushed(x), dtype=np.float64))


def rsqrt(x: Array) -> Array:
    return within_share(2.0**-22.9, 1.0 / np.sqrt(flushed(x), dtype=np.float64))


def log(x: Array) -> Array:
    return within_ulps(1.0, np.log(x, dtype=np.float64))


def log2(x: Array) -> Array:
    return within_ulps(1.0, np.log2(x, dtype=np.float64))


def erf(x: Array) -> Array:
    return within_ulps(2.0, np.vectorize(math.erf, otypes=[np.float64])(x))


APPROXIMATIONS: dict[str, Callable[..., Any]] = {  # by the names of the builder's methods
    "create_fdiv": divide,
    "create_exp": exp,
    "create_exp2": lambda x: flushed(exp2(flushed(x))),
    "create_sqrt": sqrt,
    "create_rsqrt": rsqrt,
    "create_log": log,
    "create_log2": log2,
    "create_erf": erf,
}
