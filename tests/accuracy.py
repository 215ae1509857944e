"""The only tolerance rule of the test-suite and of the benchmarks.

    max|ours - truth| <= 2 * max|torch - truth| + one rounding

truth is the reference run in float64, torch is PyTorch's own code at the dtype under test, and one rounding is half a
unit in the last place of that dtype at the largest magnitude of truth. No test carries a tolerance of its own.
"""

import torch
from torch import Tensor


def assert_accurate(ours: Tensor, torch_result: Tensor, truth: Tensor, name: str = "result") -> None:
    """Fail unless the error of ours against the float64 truth is at most twice PyTorch's plus one rounding."""
    assert truth.dtype == torch.float64, f"{name}: truth must be float64, is {truth.dtype}"
    assert ours.shape == torch_result.shape, (
        f"{name}: shape {tuple(ours.shape)}, torch gives {tuple(torch_result.shape)}"
    )
    assert ours.shape == truth.shape, f"{name}: shape {tuple(ours.shape)}, truth has {tuple(truth.shape)}"
    assert ours.dtype == torch_result.dtype, f"{name}: dtype {ours.dtype}, torch gives {torch_result.dtype}"
    if truth.numel() == 0:
        return
    error, allowed = error_and_allowance(ours, torch_result, truth, name)
    assert error <= allowed, (
        f"{name}: error {error:.3e} against float64, allowed {allowed:.3e} (2x torch's + one rounding)"
    )


def error_and_allowance(ours: Tensor, torch_result: Tensor, truth: Tensor, name: str = "result") -> tuple[float, float]:
    """(max|ours - truth|, 2 * max|torch - truth| + one rounding) over the elements where truth is finite.

    Where truth is NaN or infinite, ours must hold the very same value.
    """
    ours64, torch64 = ours.detach().double().cpu(), torch_result.detach().double().cpu()
    truth = truth.detach().cpu()
    finite = truth.isfinite()
    same = (ours64 == truth) | (ours64.isnan() & truth.isnan())
    assert bool((finite | same).all()), f"{name}: NaN or infinity differs from the truth"
    ours64, torch64, truth = ours64[finite], torch64[finite], truth[finite]
    if truth.numel() == 0:
        return 0.0, 0.0
    assert not bool(ours64.isnan().any()), f"{name}: NaN where the truth is finite"
    rounding = torch.finfo(ours.dtype).eps / 2 * truth.abs().max().item()
    torch_error = torch64.sub(truth).abs().max().item()
    assert torch_error == torch_error, f"{name}: PyTorch's own result is NaN, it cannot serve as the measure"
    return ours64.sub(truth).abs().max().item(), 2 * torch_error + rounding
