"""Arithmetic of Triton kernels whose float32 results would show the errors of a GPU's approximate instructions.

Both functions take the dtype of the result: 16 bits hide these errors, so there they are one instruction or two. For
float32 they take more, in kernels that wait for memory. tests/support/gpu_rounding.py lists the errors.
"""

# mypy: disallow-untyped-defs=False
# (only the kernels have none: Triton gives their arguments types at each launch)

from fastlm.ops._triton import tl, triton

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp_nonpositive(x, dtype: tl.constexpr):
    """exp(x) for x <= 0 and a result of this dtype. On a GPU what is below 2^-126.5 is 0.

    tl.exp takes ex2.approx, 2 ulp off, of x * log2(e), whose rounding costs another bit at -3. 16 bits hide that.
    For float32 exp(x) is 2^n, which ex2.approx has exactly, times the Taylor series of exp(x - n ln 2).
    """
    if dtype != tl.float32:
        return tl.exp(x)
    # exp is 0 there, and infinity minus infinity would be NaN. Without PropagateNan exp of NaN would be 0 too.
    x = tl.maximum(x, -110.0, propagate_nan=tl.PropagateNan.ALL)
    n = (x * LOG2E + 12582912.0) - 12582912.0  # 1.5 * 2^23: the sum is rounded to an integer
    rest = (x - n * 0.693359375) + n * 2.1219444005469057e-4  # ln 2 in two parts; the product with the first is exact
    series = 1.0 / 720 + rest * (1.0 / 5040)
    series = 1.0 / 24 + rest * (1.0 / 120 + rest * series)
    series = 1.0 + rest * (1.0 + rest * (0.5 + rest * (1.0 / 6 + rest * series)))
    return series * tl.exp2(n)


@triton.jit
def quotient(x, y, dtype: tl.constexpr):
    """x / y for a result of this dtype: up to 2 ulp off as a GPU divides, which for float32 the remainder corrects."""
    approximate = x / y
    if dtype != tl.float32:
        return approximate
    return tl.fma(tl.fma(-approximate, y, x), 1.0 / y, approximate)
