"""LayerNorm and RMSNorm are torch.nn's modules in everything but the code that runs."""

import pytest
import torch

from fastlm.nn.normalization import LayerNorm, RMSNorm

PAIRS = [(LayerNorm, torch.nn.LayerNorm), (RMSNorm, torch.nn.RMSNorm)]
ARGUMENTS = {
    LayerNorm: [{}, {"bias": False}, {"elementwise_affine": False}, {"eps": 0.1, "dtype": torch.bfloat16}],
    RMSNorm: [{}, {"elementwise_affine": False}, {"eps": 0.1, "dtype": torch.bfloat16}],
}
CASES = [(*pair, arguments) for pair in PAIRS for arguments in ARGUMENTS[pair[0]]]


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


@pytest.mark.parametrize(("ours", "torchs", "arguments"), CASES)
def test_norm_loads_the_state_of_torchs_and_gives_its_values(ours, torchs, arguments):
    theirs = randomised(torchs((3, 8), **arguments))
    mine = ours((3, 8), **arguments)
    mine.load_state_dict(theirs.state_dict())
    x = torch.randn(5, 3, 8, dtype=arguments.get("dtype"))
    assert repr(mine) == repr(theirs)
    assert torch.equal(mine(x), theirs(x))


@pytest.mark.parametrize(("ours", "torchs", "arguments"), CASES)
def test_norm_state_loads_into_torchs(ours, torchs, arguments):
    mine = randomised(ours(8, **arguments))
    theirs = torchs(8, **arguments)
    theirs.load_state_dict(mine.state_dict())
    assert all(torch.equal(*pair) for pair in zip(mine.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize(("ours", "torchs"), PAIRS)
def test_norm_starts_as_torchs_does(ours, torchs):
    for mine, theirs in zip(ours(8).parameters(), torchs(8).parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("module", [LayerNorm, RMSNorm])
def test_norm_module_runs_the_kernels(module, layer_device):
    norm = module(8, device=layer_device)
    assert type(norm(torch.randn(2, 8, device=layer_device)).grad_fn).__name__ == "NormFunctionBackward"
