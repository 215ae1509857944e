"""The ground every test stands on: which kernels run where, poisoned memory, a fixed seed.

Kernels.  Without a GPU, Triton's interpreter runs the very kernels on CPU tensors. It takes milliseconds per launch, so
an op takes that road only in tests marked `interpreted`; all others see PyTorch's code, as a user's CPU does. A test of
a kernel asks for `kernel_device` and so becomes two: one interpreted here, one compiled and marked `gpu`. With
`--gpu-rounding` the interpreter has the errors of a GPU's instructions (tests/support/gpu_rounding.py).

An op that also has compiled CPU code is tested with `layer_device`: the same tests then run that code too.

Memory.  Whatever torch.empty returns is NaN, or the largest integer: a kernel that reads what nobody wrote, or leaves
part of an output unwritten, cannot pass by luck.

Accuracy.  A test whose draw of numbers misses the rule of tests/support/accuracy.py is judged by many draws, and a
warning says so.
"""

import contextlib
import functools
import importlib
import os
import pkgutil
import signal
import sys
from collections.abc import Generator, Iterator

import pytest
import torch

from benchmarks import machine
from benchmarks.report import origin_of
from tests.support.accuracy import InaccurateError, redraw


def runs_on_gpu(config: pytest.Config) -> bool:
    """Whether this session's kernels are compiled: a GPU is there, and `-m` asks for the gpu tests."""
    wanted = config.getoption("markexpr")
    return torch.cuda.is_available() and "gpu" in wanted and "not gpu" not in wanted


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--gpu-rounding", action="store_true", help="interpreted kernels round as a GPU's approximate instructions do"
    )


def pytest_configure(config: pytest.Config) -> None:
    # The interpreter of triton 3.6 turns loop bounds into integers in a way that NumPy warns of, at every loop.
    config.addinivalue_line("filterwarnings", "ignore:Conversion of an array with ndim > 0:DeprecationWarning:triton")
    if runs_on_gpu(config):
        return
    # A kernel is made interpretable when it is imported, and so are Triton's own functions: one imported before, or
    # after the knob is off again, would not be.
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError("a conftest.py imports Triton, expected none to: import fastlm.train in its fixtures")
    os.environ["TRITON_INTERPRET"] = "1"
    import fastlm.ops
    from fastlm.ops._triton import HAS_TRITON, triton

    for module in pkgutil.iter_modules(fastlm.ops.__path__, "fastlm.ops."):
        with contextlib.suppress(ImportError):  # an op that cannot be imported fails its own tests, not everyone's
            importlib.import_module(module.name)
    if HAS_TRITON:
        from tests.support.interpreter import repair_bfloat16, repair_fma, spare_repeated_work

        repair_fma()
        repair_bfloat16()
        spare_repeated_work()
        triton.knobs.runtime.interpret = False  # this also changes the environment, so that subprocesses are ordinary


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    on_gpu = runs_on_gpu(config)
    for item in items:
        if item.get_closest_marker("gpu") and not on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device: this machine has none"))
        if item.get_closest_marker("interpreted") and on_gpu:
            item.add_marker(pytest.mark.skip(reason="the kernels of this session are compiled for the GPU"))


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    before = torch.get_rng_state()
    try:
        return (yield)
    except InaccurateError as missed:
        arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
        redraw(missed, functools.partial(pyfuncitem.obj, **arguments), before)
        return True


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    without_gpu = sum("needs a CUDA device" in str(report.longrepr) for report in skipped)
    if without_gpu:
        terminalreporter.write_line(f"{without_gpu} tests need a CUDA device and did NOT run: this machine has none")
    done = terminalreporter.stats.get("passed", []) + terminalreporter.stats.get("failed", [])
    counted = [report for report in done if report.when == "call" and report.user_properties]
    if counted:
        terminalreporter.section("counted")
        machine_and_commit = {
            "machine": machine.describe(torch.device("cpu")),
            "versions": machine.versions(),
            "run": machine.provenance(),
        }
        terminalreporter.write_line(origin_of(machine_and_commit))
    for report in sorted(counted, key=lambda report: report.nodeid):
        counts = ", ".join(f"{count} {what}" for what, count in report.user_properties)
        terminalreporter.write_line(f"{report.nodeid}: {report.outcome}, {counts}")


@pytest.fixture(autouse=True)
def interpreter_only_where_asked(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.node.get_closest_marker("interpreted") is None:
        yield
        return
    from fastlm.ops._triton import HAS_TRITON, triton

    if not HAS_TRITON:
        pytest.skip("triton is not installed: there is no interpreter")
    with triton.knobs.runtime.scope(), contextlib.ExitStack() as stack:
        triton.knobs.runtime.interpret = True
        if request.config.getoption("gpu_rounding"):
            from tests.support.gpu_rounding import gpu_rounding

            stack.enter_context(gpu_rounding())
        yield


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Makes at::empty, in Python and in C++, return NaN; deterministic mode is what switches that filling on."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def obeyed_signals() -> Iterator[None]:
    """For tests that send them: a run in the background, or under nohup, starts with these ignored, as its children."""
    defaults = {"SIGINT": signal.default_int_handler, "SIGHUP": signal.SIG_DFL}
    numbers = {getattr(signal, name): handler for name, handler in defaults.items() if hasattr(signal, name)}
    before = {number: signal.signal(number, handler) for number, handler in numbers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def kernels_of_few_logits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs cross entropy's kernels at the small shapes of tests, but in those that ask for small_is_usual."""
    from fastlm.ops import _dispatch

    if "small_is_usual" not in request.fixturenames:
        monkeypatch.setattr(_dispatch, "CROSS_ENTROPY_FEW_LOGITS", -1)


@pytest.fixture
def compiled_small_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the compiled CPU code of every layer at the small shapes of tests, where a user's CPU runs PyTorch's."""
    from fastlm.ops import _dispatch
    from tests.support import small_calls

    for name, value in small_calls.of_compiled_code().items():
        monkeypatch.setattr(_dispatch, name, value)


@pytest.fixture
def small_is_usual() -> None:
    """Leaves small calls to PyTorch's code, as outside the tests."""


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.interpreted, id="interpreted"),
        pytest.param("cuda", marks=pytest.mark.gpu, id="gpu"),
    ]
)
def kernel_device(request: pytest.FixtureRequest) -> torch.device:
    """The device whose tensors the Triton kernels take: a test that asks for it runs them, interpreted or compiled."""
    return torch.device(request.param)


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.interpreted, id="interpreted"),
        pytest.param("cuda", marks=pytest.mark.gpu, id="gpu"),
        "compiled",
        "portable",
    ]
)
def layer_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """As kernel_device, or a CPU whose tensors the compiled code takes, even small ones: with AVX, say, or without."""
    if request.param not in ("compiled", "portable"):
        yield torch.device(request.param)
        return
    from fastlm.ops import _dispatch, _library

    if not _library.is_loaded("cpu"):
        pytest.skip("the compiled CPU code is not built")
    monkeypatch.setattr(_dispatch, "CPU_MIN_NUMEL", dict.fromkeys(_dispatch.CPU_MIN_NUMEL, 0))
    monkeypatch.setattr(_dispatch, "LOG_SOFTMAX_MIN_COLUMNS", 0)
    best = torch.ops.fastlm.cpu_instruction_set(-1)
    torch.ops.fastlm.cpu_instruction_set(best if request.param == "compiled" else 0)
    yield torch.device("cpu")
    torch.ops.fastlm.cpu_instruction_set(best)
