"""Whole models against plain PyTorch: 50 steps of training, and packed rows against their documents run alone."""

import pytest
import torch
from torch import Tensor, nn

from fastlm.models import GPT, GPTConfig
from tests.support.accuracy import assert_accurate
from tests.support.packed_batch import STYLES, PackedBatch, packed_batch
from tests.support.plain_gpt import PlainGPT

pytestmark = pytest.mark.usefixtures("kernels_of_few_logits")
STEPS = 50


def summed_loss(model: nn.Module, batch: PackedBatch) -> tuple[Tensor, Tensor]:
    return model(batch.tokens, batch.targets, cu_seqlens=batch.cu_seqlens, positions=batch.positions)


def trained(model: nn.Module, batches: list[PackedBatch]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of every step, and the parameters at the end."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    losses = []
    for step in range(STEPS):
        loss, num_valid = summed_loss(model, batches[step % len(batches)])
        loss = loss / num_valid
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses), {name: x.detach() for name, x in model.named_parameters()}


def models_of(config: GPTConfig, masked: bool = True) -> tuple[GPT, PlainGPT, PlainGPT]:
    """fastlm's, PyTorch's and the float64 model with the same weights."""
    torch.manual_seed(0)
    ours, plain, truth = GPT(config), PlainGPT(config, masked), PlainGPT(config, masked)
    plain.load_state_dict(ours.state_dict())
    truth.load_state_dict(ours.state_dict())
    return ours, plain, truth.double()


@pytest.mark.parametrize("style", STYLES)
def test_fifty_steps_stay_as_close_to_float64_as_plain_pytorch(style):
    config = STYLES[style]
    batches = [packed_batch(config, seed) for seed in range(5)]
    (losses, weights), (plain_losses, plain), (true_losses, truth) = (
        trained(model, batches) for model in models_of(config)
    )
    assert true_losses[-1] < true_losses[0] - 0.1, "the run must learn, or the comparison says nothing"
    assert_no_further(losses, plain_losses, true_losses, "losses")
    everything = [torch.cat([found[name].flatten() for name in truth]) for found in (weights, plain, truth)]
    assert_no_further(*everything, "parameters")


def assert_no_further(ours: Tensor, plain: Tensor, truth: Tensor, name: str) -> None:
    """The Euclidean distance of ours from the float64 run is at most twice that of the plain run.

    Not the largest error, which 50 steps of AdamW amplify most in some weight whose gradient is all but zero.
    """
    distance, allowed = (ours - truth).norm().item(), 2 * (plain - truth).norm().item()
    assert distance <= allowed, (
        f"{name}: {distance:.3e} away from float64, allowed {allowed:.3e} (twice plain PyTorch's)"
    )


def gradients_of(model: nn.Module, batches: list[PackedBatch]) -> dict[str, Tensor]:
    """Summed loss of the batches and the gradient of every parameter."""
    model.zero_grad()
    loss = sum(summed_loss(model, batch)[0] for batch in batches)
    loss.backward()
    return {"loss": loss.detach()} | {name: x.grad.clone() for name, x in model.named_parameters()}


@pytest.mark.parametrize("style", STYLES)
def test_packed_loss_and_every_gradient_equal_documents_run_alone(style):
    config = STYLES[style]
    ours, plain, truth = models_of(config)
    results = []
    for batch in (packed_batch(config, seed) for seed in range(8)):
        apart = batch.documents()
        results.append((gradients_of(ours, [batch]), gradients_of(plain, apart), gradients_of(truth, apart)))
    for name in results[0][0]:
        packed, apart, true = (torch.stack([found[i][name] for found in results]) for i in range(3))
        assert_accurate(packed, apart, true, name)


@pytest.mark.parametrize("style", STYLES)
def test_a_plain_causal_mask_fails_the_packed_comparison(style):
    config = STYLES[style]
    batch = packed_batch(config)
    _, leaking, _ = models_of(config, masked=False)
    _, plain, truth = models_of(config)
    packed, apart = gradients_of(leaking, [batch]), gradients_of(plain, batch.documents())
    true = gradients_of(truth, batch.documents())
    for name in ("loss", "blocks.0.attention.qkv.weight"):
        with pytest.raises(AssertionError, match="error"):
            assert_accurate(packed[name], apart[name], true[name], name)


@pytest.mark.parametrize("style", STYLES)
def test_changing_a_document_leaves_the_logits_of_others_bit_identical(style):
    config = STYLES[style]
    ours, _, _ = models_of(config)
    batch = packed_batch(config)
    changed = batch.tokens.clone()
    changed[0, 6:16] = (changed[0, 6:16] + 1) % config.vocab_size
    others = torch.ones(2, 16, dtype=torch.bool)
    others[0, 6:16] = False

    def unchanged(**documents):
        return torch.equal(ours(batch.tokens, **documents)[others], ours(changed, **documents)[others])

    assert unchanged(cu_seqlens=batch.cu_seqlens)
    changed[0, 3] = (changed[0, 3] + 1) % config.vocab_size
    others[0, :5] = False
    assert unchanged(cu_seqlens=batch.cu_seqlens)
    assert not unchanged(), "rows of one document each must see the change"


def test_positions_restart_in_each_document_by_themselves():
    for config in STYLES.values():
        model, _, _ = models_of(config)
        batch = packed_batch(config)
        given = model(batch.tokens, cu_seqlens=batch.cu_seqlens, positions=batch.positions)
        assert torch.equal(model(batch.tokens, cu_seqlens=batch.cu_seqlens), given)
