"""The emulated errors are those that the PTX ISA allows, and the kernels keep to the error rule with them."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from fastlm.ops._triton import HAS_TRITON, tl, triton

if not HAS_TRITON:
    pytest.skip("triton is not installed", allow_module_level=True)

from triton.backends.compiler import GPUTarget
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from tests.support.gpu_rounding import gpu_rounding

ROOT = Path(__file__).resolve().parents[2]
BLOCK = 4096


def kernel(x_ptr, y_ptr, out_ptr, OPERATION: tl.constexpr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + cols), tl.load(y_ptr + cols)
    if OPERATION == "divide":
        out = x / y
    elif OPERATION == "div_rn":
        out = tl.div_rn(x, y)
    elif OPERATION == "exp":
        out = tl.exp(x)
    elif OPERATION == "exp2":
        out = tl.exp2(x)
    elif OPERATION == "sqrt":
        out = tl.sqrt(x)
    elif OPERATION == "sqrt_rn":
        out = tl.sqrt_rn(x)
    elif OPERATION == "rsqrt":
        out = tl.rsqrt(x)
    elif OPERATION == "log":
        out = tl.log(x)
    elif OPERATION == "log2":
        out = tl.log2(x)
    elif OPERATION == "erf":
        out = tl.erf(x)
    tl.store(out_ptr + cols, out)


def in_ulps(error: Tensor, exact: Tensor) -> Tensor:
    return error / torch.from_numpy(np.spacing(exact.float().numpy())).double()


def in_shares(error: Tensor, exact: Tensor) -> Tensor:
    return error / exact


class Operation(NamedTuple):
    """What an operation computes, what it compiles to, and the bound of its error in ulps or as a share."""

    exact: Callable[[Tensor, Tensor], Tensor]  # of float64
    instruction: str
    unit: Callable[[Tensor, Tensor], Tensor]
    bound: float
    shift: float = 0.5  # of the x drawn, which are uniform in this and 8 more


def exp_of_rounded_exponent(x: Tensor, y: Tensor) -> Tensor:
    return ((x.float() * np.float32(np.log2(np.e))).double()).exp2()


OPERATIONS = {
    "divide": Operation(torch.div, "div.full.f32", in_ulps, 2),
    "div_rn": Operation(torch.div, "div.rn.f32", in_ulps, 0.5),
    "exp": Operation(exp_of_rounded_exponent, "ex2.approx.f32", in_ulps, 2, -8),
    "exp2": Operation(lambda x, y: x.exp2(), "ex2.approx.ftz.f32", in_ulps, 2, -8),
    "sqrt": Operation(lambda x, y: x.sqrt(), "sqrt.approx.ftz.f32", in_shares, 2**-23),
    "sqrt_rn": Operation(lambda x, y: x.sqrt(), "sqrt.rn.f32", in_ulps, 0.5),
    "rsqrt": Operation(lambda x, y: x.rsqrt(), "rsqrt.approx.ftz.f32", in_shares, 2**-22.9),
    "log": Operation(lambda x, y: x.log(), "fma.rn.ftz.f32", in_ulps, 1),
    "log2": Operation(lambda x, y: x.log2(), "fma.rn.ftz.f32", in_ulps, 1),
    "erf": Operation(lambda x, y: x.erf(), "ex2.approx.ftz.f32", in_ulps, 2, 0),
}
APPROXIMATE = [name for name, operation in OPERATIONS.items() if not name.endswith("_rn")]
each_operation = pytest.mark.parametrize("name", OPERATIONS)


def result_of(name: str, x: Tensor, y: Tensor | None = None) -> Tensor:
    """Of the interpreted kernel."""
    y = torch.ones_like(x) if y is None else y
    out = torch.empty_like(x)
    InterpretedFunction(kernel)[(1,)](x, y, out, OPERATION=name, BLOCK=len(x))
    return out


def print_ptx() -> None:
    """Of each operation for sm_90, as JSON; in a process that does not interpret."""
    pointers, constants = ("x_ptr", "y_ptr", "out_ptr"), ("OPERATION", "BLOCK")
    signature = dict.fromkeys(pointers, "*fp32") | dict.fromkeys(constants, "constexpr")
    sources = {
        name: triton.compiler.ASTSource(JITFunction(kernel), signature, {"OPERATION": name, "BLOCK": 128})
        for name in OPERATIONS
    }
    target = GPUTarget("cuda", 90, 32)
    print(json.dumps({name: triton.compile(source, target=target).asm["ptx"] for name, source in sources.items()}))


@pytest.fixture(scope="module")
def ptx(tmp_path_factory) -> dict[str, str]:
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    command = [sys.executable, "-c", "from tests.support.test_gpu_rounding import print_ptx; print_ptx()"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@each_operation
def test_triton_compiles_to_the_instruction_that_is_emulated(name, ptx):
    assert re.search(rf"\b{re.escape(OPERATIONS[name].instruction)}\s", ptx[name])
    multiplies_by_log2e = re.search(r"\bmul\.f32\s+%r\d+, %r\d+, 0f3FB8AA3B;", ptx[name]) is not None
    assert multiplies_by_log2e == (name == "exp")


@pytest.mark.interpreted
@each_operation
def test_errors_are_within_the_bound_and_reach_it(name):
    operation = OPERATIONS[name]
    x, y = 8 * torch.rand(2, BLOCK) + torch.tensor([[operation.shift], [0.5]])
    exact = operation.exact(x.double(), y.double())
    with gpu_rounding():
        result = result_of(name, x, y)
    error = operation.unit(result.double() - exact, exact).abs().max()
    assert 0.9 * operation.bound < error <= operation.bound


@pytest.mark.interpreted
@pytest.mark.parametrize("name", APPROXIMATE)
def test_errors_are_those_of_the_bits_alone_and_end_with_the_emulation(name):
    x, y = 8 * torch.rand(2, BLOCK) + 0.5
    before = result_of(name, x, y)
    with gpu_rounding():
        once, again = result_of(name, x, y), result_of(name, x.flip(0), y.flip(0)).flip(0)
    assert torch.equal(once, again)
    assert not torch.equal(once, before)
    assert torch.equal(result_of(name, x, y), before)


@pytest.mark.interpreted
def test_powers_of_two_are_exact():
    exponents = torch.arange(-32.0, 32.0)
    powers = exponents.exp2()
    x = torch.randn(64)
    with gpu_rounding():
        assert torch.equal(result_of("exp2", exponents), powers)
        assert torch.equal(result_of("sqrt", powers * powers), powers)
        assert torch.equal(result_of("rsqrt", powers * powers), 1 / powers)
        assert torch.equal(result_of("divide", x, powers), x / powers)
        assert not torch.equal(result_of("divide", x, x), torch.ones(64))


ZERO, INF, NAN, SUBNORMAL = 0.0, float("inf"), float("nan"), 1e-40
SPECIALS = {  # (x, expected) of each; y is 1
    "divide": [(ZERO, ZERO), (-ZERO, -ZERO), (INF, INF), (-INF, -INF), (NAN, NAN), (SUBNORMAL, SUBNORMAL)],
    "exp": [(ZERO, 1), (-INF, 0), (INF, INF), (NAN, NAN), (SUBNORMAL, 1), (-104, 0), (89, INF)],
    "exp2": [(ZERO, 1), (-INF, 0), (INF, INF), (NAN, NAN), (SUBNORMAL, 1), (-126.5, 0), (-126, 2.0**-126), (128, INF)],
    "sqrt": [(ZERO, ZERO), (-ZERO, -ZERO), (INF, INF), (NAN, NAN), (-1, NAN), (SUBNORMAL, 0)],
    "rsqrt": [(ZERO, INF), (-ZERO, -INF), (INF, 0), (NAN, NAN), (-1, NAN), (SUBNORMAL, INF)],
    "log": [(ZERO, -INF), (1, 0), (INF, INF), (NAN, NAN), (-1, NAN)],
    "log2": [(ZERO, -INF), (1, 0), (INF, INF), (NAN, NAN), (-1, NAN)],
    "erf": [(ZERO, ZERO), (-ZERO, -ZERO), (INF, 1), (-INF, -1), (NAN, NAN)],
}


@pytest.mark.interpreted
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", APPROXIMATE)
def test_zero_infinity_nan_and_subnormals_are_those_of_the_instruction(name):
    given, expected = torch.tensor(SPECIALS[name] * 8)[:32].T
    with gpu_rounding():
        result = result_of(name, given.contiguous())
    assert torch.equal(result.isnan(), expected.isnan())
    assert torch.equal(result.nan_to_num(0, INF, -INF), expected.nan_to_num(0, INF, -INF))
    assert torch.equal(result.signbit() & ~result.isnan(), expected.signbit() & ~expected.isnan())


@pytest.mark.interpreted
def test_a_subnormal_exponential_keeps_its_sign_and_only_exp2_flushes_it():
    x = torch.linspace(-103, -87.5, 256)
    with gpu_rounding():
        assert (result_of("exp", x) > 0).float().mean() > 0.9
        assert (result_of("exp", x) >= 0).all()
        assert (result_of("exp2", x * 1.4427) == 0).all()


@pytest.mark.interpreted
def test_float64_is_left_as_it_is():
    x = torch.rand(64, dtype=torch.float64) + 0.5
    expected = result_of("divide", x, x + 1), result_of("exp", x)
    with gpu_rounding():
        results = result_of("divide", x, x + 1), result_of("exp", x)
    assert all(map(torch.equal, results, expected))


def run_with_gpu_rounding(*tests: str) -> subprocess.CompletedProcess[str]:
    options = ["-p", "no:cacheprovider", "--gpu-rounding", "-m", "interpreted and not gpu", "--tb=short"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", *options, *tests]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


ONCE_MISSED = (  # the rule, with these errors
    "test_contract.py::test_op_and_its_gradients_equal_plain_pytorch",
    "test_activations.py::test_activations_match_float64_where_the_gate_closes[interpreted-torch.float32-swiglu]",
    "test_softmax.py::test_causal_softmax_matches_float64[interpreted-None-(2, 4, 33)-log_softmax]",
    "test_scaled_dot_product_attention.py::test_sdpa_and_gradients_match_float64[interpreted-more queries]",
)


def test_kernels_that_once_missed_the_error_rule_keep_to_it():
    done = run_with_gpu_rounding(*(f"tests/ops/{test}" for test in ONCE_MISSED))
    assert done.returncode == 0, done.stdout


@pytest.mark.soak
@pytest.mark.parametrize("file", sorted(ROOT.glob("tests/[mno]*/test_*.py")), ids=lambda file: file.stem)
def test_all_interpreted_tests_pass(file):
    done = run_with_gpu_rounding(str(file))
    assert done.returncode in (0, pytest.ExitCode.NO_TESTS_COLLECTED), done.stdout
