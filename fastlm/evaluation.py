"""Loss, perplexity and bits per byte of a model on held-out tokens."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Nats per token, perplexity = exp(loss), bits per byte of text (None if the bytes are not known)."""

    loss: float
    perplexity: float
    bits_per_byte: float | None
    num_tokens: int


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    num_bytes: int | None = None,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Evaluation:
    """Evaluate model on batches, each with tokens, targets, cu_seqlens and positions.

        loss           sum of token losses / number of valid tokens
        bits_per_byte  sum of token losses / (ln 2 * num_bytes)

    model      model(tokens, targets, cu_seqlens=..., positions=...) gives (summed loss, number of valid tokens)
    num_bytes  UTF-8 bytes of the text that all batches (of all ranks) together hold
    reduce     sums a tensor over ranks in place, where each rank has its own batches

    Sums over tokens, so neither batch size, padding nor packing matters. Leaves every module in the mode it was in.
    Raises ValueError if there is no valid token at all.
    """
    sums, counts = [torch.zeros(())], [torch.zeros((), dtype=torch.int64)]
    device = next(model.parameters()).device
    with in_eval_mode(model):
        for batch in batches:
            batch = batch.to(device, non_blocking=True)
            loss_sum, num_valid = model(
                batch.tokens, batch.targets, cu_seqlens=batch.cu_seqlens, positions=batch.positions
            )
            sums.append(loss_sum)
            counts.append(num_valid)
    totals = torch.stack([_total(sums), _total(counts)])
    loss_sum, num_tokens = (reduce(totals) if reduce else totals).tolist()
    return _summary(loss_sum, int(num_tokens), num_bytes)


@contextlib.contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Run a block with the model in evaluation mode; each module then has its own mode back, a frozen part's too."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _total(parts: list[Tensor]) -> Tensor:
    """Sum in float64 on the CPU; reading the results only now keeps the device busy until the last batch."""
    return torch.stack([part.to(parts[-1].device) for part in parts]).cpu().double().sum()


def _summary(total: float, num_tokens: int, num_bytes: int | None) -> Evaluation:
    if num_tokens == 0:
        raise ValueError("evaluate: the batches hold no valid token: expected at least one target other than -100")
    loss = total / num_tokens
    perplexity = math.exp(loss) if loss < 700 else math.inf  # exp overflows beyond
    return Evaluation(loss, perplexity, total / (math.log(2) * num_bytes) if num_bytes else None, num_tokens)
