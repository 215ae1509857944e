"""Sampling from a language model, one token at a time with a cache of keys and values.

The model is any module with `next_token_logits(tokens (B, T), cache) -> (B, V)`, `new_cache(B)` and
`config.sequence_length`. Where a row would grow past that length, its older half is forgotten and the rest read anew.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor


class Generator(Protocol):
    """What sampling asks of a model."""

    config: Any

    def new_cache(self, batch_size: int) -> Any: ...

    def next_token_logits(self, tokens: Tensor, cache: Any) -> Tensor: ...


def sampling_probabilities(
    logits: Tensor, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Probabilities (B, V) to draw from: softmax of logits / temperature over the tokens that top_k and top_p leave.

    top_k keeps the k most likely tokens, top_p the fewest most likely ones that together reach probability p
    (Holtzman et al. 2020, arXiv 1904.09751). Temperature 0 puts everything on the most likely token.
    """
    logits = logits.float()
    if temperature < torch.finfo(logits.dtype).tiny:  # 0 once it is rounded to float32
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    logits = logits - logits.amax(-1, keepdim=True)  # else a low temperature makes the largest infinite, and all NaN
    ordered, order = (logits / temperature).sort(dim=-1, descending=True, stable=True)
    dropped = torch.zeros_like(ordered, dtype=torch.bool)
    if top_k is not None:
        dropped[:, top_k:] = True
    if top_p is not None:
        p = ordered.masked_fill(dropped, -torch.inf).softmax(-1)
        dropped |= p.cumsum(-1) - p >= top_p  # the first token always stays: nothing comes before it
    p = ordered.masked_fill(dropped, -torch.inf).softmax(-1)
    return torch.empty_like(p).scatter_(-1, order, p)


def stream(
    model: Generator,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop_token: int | None = None,
) -> Iterator[Tensor]:
    """Yield the next token (B,) of every row, max_new_tokens times or until every row has met stop_token.

    A row that has met stop_token goes on with stop_token. Arguments as for generate.
    """
    _check(tokens, max_new_tokens, temperature, top_k, top_p)
    if seed is not None and not -(2**63) <= seed < 2**63:
        raise ValueError(f"generate: seed is {seed}, expected a 64-bit integer")
    limit = model.config.sequence_length
    generator = None if seed is None else torch.Generator(tokens.device).manual_seed(seed)
    cache, unread, row = model.new_cache(len(tokens)), tokens[:, -limit:], tokens[:, -limit:]
    done = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    for _ in range(max_new_tokens):
        if row.shape[1] > limit:
            row = unread = row[:, -(limit // 2 + 1) :]
            cache = model.new_cache(len(tokens))
        with torch.no_grad():
            logits = model.next_token_logits(unread, cache)
            p = sampling_probabilities(logits, temperature=temperature, top_k=top_k, top_p=top_p)
            if bool(p.isnan().any()):
                raise ValueError("generate: the model's logits are not finite; was it trained until it diverged?")
            drawn = torch.multinomial(p, 1, generator=generator)
        if stop_token is not None:
            drawn = drawn.masked_fill(done[:, None], stop_token)
            done |= drawn[:, 0] == stop_token
        yield drawn[:, 0]
        if stop_token is not None and bool(done.all()):
            return
        row, unread = torch.cat([row, drawn], dim=1), drawn


def generate(
    model: Generator,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop_token: int | None = None,
    on_token: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Continue every row of tokens by sampling.

    tokens       (B, T) int64, T at least 1; of a longer row than the model takes only the end is read
    temperature  below 1 is more careful, above 1 more varied, 0 takes the most likely token
    top_k        sample among the k most likely tokens;  top_p among the most likely that reach probability p
    seed         makes the sample repeatable; None draws from torch's generator
    stop_token   ends a row, such as the end of a document; the whole ends once every row has met it
    on_token     called with each new token (B,) as soon as it is known
    returns      (B, T + new) int64: tokens and their continuation

    Raises ValueError for a wrong option. The model samples in the mode it is in: call eval() to turn dropout off.
    """
    drawn = [tokens]
    options: dict[str, Any] = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
        "stop_token": stop_token,
    }
    for token in stream(model, tokens, max_new_tokens, **options):
        drawn.append(token[:, None])
        if on_token is not None:
            on_token(token)
    return torch.cat(drawn, dim=1)


def _check(tokens: Tensor, max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    if tokens.dim() != 2 or tokens.shape[1] < 1:
        raise ValueError(f"generate: tokens have shape {tuple(tokens.shape)}, expected (B, T) with T at least 1")
    if max_new_tokens < 0:
        raise ValueError(f"generate: max_new_tokens is {max_new_tokens}, expected 0 or more")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"generate: temperature is {temperature}, expected 0 or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"generate: top_k is {top_k}, expected 1 or more, or None for all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"generate: top_p is {top_p}, expected a number above 0 and at most 1")
