"""Anyone's causal language model in the trainer's protocol: a module that gives logits becomes one that gives a loss.

    logits = module(tokens)        loss = sum over targets other than -100 of cross_entropy(logits, target)

Documents. Attention never crosses a document of a packed row, whatever the module. One that takes cu_seqlens gets them;
of any other one the documents become rows of their own, padded on the right. That is exact for every causal model: a
token sees nothing to its right, and positions start at 0 in each row. So the loss and every gradient equal those of the
documents run alone.

The head. Where the module returns what a linear layer of its own gave, the very same tensor and not written to since,
that layer hands its input on instead, and linear_cross_entropy makes the loss without building the logits. Anything
that comes after the layer, such as Gemma's softcap or Cohere's scale, makes another tensor or changes this one in
place: then the loss is that of the logits themselves. Each call looks at what came of the tensors that were handed on,
since a module may do otherwise later; only compiled code that begins later to change logits in place goes unseen.
Tensors of inference mode do not tell whether they were written to: there the logits are built.
"""

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fastlm.module_state import unchanged
from fastlm.ops import cross_entropy, linear_cross_entropy
from fastlm.ops._dispatch import is_autocast

IGNORED = -100  # the target of a token that does not count
DOCUMENTS = ("apart", "joined")


class CausalLM(nn.Module):
    """A module that maps tokens (B, T) to logits (B, T, V), or a causal model of Hugging Face, made ready to train.

    module     takes the tokens first, or as `input_ids`, and gives the logits alone, as `.logits` or first of a tuple
    documents  "apart": attention stays within each document. "joined": a row is one stream and attention crosses its
               documents, in positions that run on, as in trainers that do not mask

    Parameters stay the same objects under the names that they have in module, also in the state_dict: a checkpoint of
    the wrapper loads into the bare module. Attributes that the wrapper lacks are the module's (parameter_groups,
    flops_per_token, blocks, config, ...).

    Where documents are apart and the module takes no cu_seqlens, the boundaries are read on the host: on a GPU it waits
    for the device once per batch. The rows of the documents then have at most 2 B T + T cells, in sub-batches of
    documents of similar length.

    Raises TypeError if module is no torch.nn.Module, ValueError if documents is neither word.
    """

    def __init__(self, module: nn.Module, *, documents: str = DOCUMENTS[0]) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"CausalLM: module is of type {type(module).__name__}, expected a torch.nn.Module")
        if documents not in DOCUMENTS:
            raise ValueError(f"CausalLM: documents is {documents!r}, expected {' or '.join(map(repr, DOCUMENTS))}")
        self.module, self.documents = module, documents
        self._arguments = frozenset(inspect.signature(module.forward).parameters)
        self._heads: dict[tuple[bool, bool], nn.Linear | None] = {}  # by mode
        self.register_load_state_dict_pre_hook(_add_prefix)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits of every token, or the summed loss against targets and how many targets count.

        tokens      (B, T) int64
        targets     (B, T) int64; -100 does not count
        cu_seqlens  int32 (documents + 1,) boundaries of the documents over the B * T tokens; may repeat at the end.
                    None: every row is one document
        positions   (B, T) int64 within the document, for a module that takes cu_seqlens
        returns     logits (B, T, V), or (float32 sum of token losses, int64 number of valid targets)

        Raises ValueError for shapes that disagree and where the module gives no logits for some token, TypeError where
        it gives no tensor.
        """
        if targets is not None and targets.shape != tokens.shape:
            raise ValueError(f"CausalLM: targets have shape {tuple(targets.shape)}, tokens {tuple(tokens.shape)}")
        if cu_seqlens is None or self.documents == "joined" or "cu_seqlens" in self._arguments:
            boundaries = self._boundaries(cu_seqlens, positions)
            if targets is None:
                return self._call(tokens, boundaries)
            loss = self._loss([Rows(tokens, targets, None)], boundaries)
        else:
            if targets is None:
                return self._logits_of_documents(tokens, cu_seqlens)
            loss = self._loss(self._rows_of_documents(tokens, targets, cu_seqlens), {})
        return loss.float(), (targets != IGNORED).sum()

    def _boundaries(self, cu_seqlens: Tensor | None, positions: Tensor | None) -> dict[str, Tensor]:
        """What the module is told of the documents."""
        if cu_seqlens is None or self.documents == "joined":
            return {}
        named = {"cu_seqlens": cu_seqlens, "positions": positions, "position_ids": positions}
        return {name: value for name, value in named.items() if name in self._arguments and value is not None}

    def _call(self, tokens: Tensor, boundaries: dict[str, Tensor]) -> Tensor:
        """What the module gives for tokens (n, L): logits (n, L, V)."""
        options: dict[str, Any] = dict(boundaries)
        if "use_cache" in self._arguments:
            options["use_cache"] = False  # else keys and values of the whole batch are kept for a generation
        by_name = "input_ids" in self._arguments
        output = self.module(input_ids=tokens, **options) if by_name else self.module(tokens, **options)
        logits = _logits_in(output)
        if logits.dim() != 3 or logits.shape[:2] != tokens.shape:
            raise ValueError(
                f"CausalLM: {type(self.module).__name__} gave {tuple(logits.shape)} for tokens {tuple(tokens.shape)}, "
                "expected logits for every token, (B, T, V): make its forward return all of them"
            )
        return logits

    # The loss

    def _loss(self, batches: "Sequence[Rows]", boundaries: dict[str, Tensor]) -> Tensor:
        """Sum of the token losses of all sub-batches."""
        head = self._head(batches[0].tokens, boundaries)
        if head is not None:
            with _handing_on(head) as handed:
                features = [self._call(rows.tokens, boundaries) for rows in batches]
            if len(handed) == len(batches) and all(map(Seen.is_still, handed, features)):
                return _loss_of_features(features, head, batches)
            self._heads.clear()  # by now the module does something else: the next call looks again
        return torch.stack([_loss_of_logits(self._call(rows.tokens, boundaries), rows) for rows in batches]).sum()

    def _head(self, tokens: Tensor, boundaries: dict[str, Tensor]) -> nn.Linear | None:
        """The linear layer whose very output the module returns; looked for once in each mode."""
        if torch.is_inference_mode_enabled():
            return None
        mode = self.training, is_autocast(tokens)
        if mode not in self._heads:
            self._heads[mode] = self._find_head(tokens, boundaries)
        return self._heads[mode]

    def _find_head(self, tokens: Tensor, boundaries: dict[str, Tensor]) -> nn.Linear | None:
        """Run the module once to see, without a trace: a resumed run looks again, and would differ.

        As it was written, not compiled: a compiled module gives the same tensor whether or not it wrote to it.
        """
        given: list[tuple[nn.Module, Seen]] = []
        hooks = [
            module.register_forward_hook(lambda module, _, output: given.append((module, Seen.now(output))))
            for module in self.module.modules()
            if _is_plain_linear(module)
        ]
        try:
            drawn_on = [tokens.device] if tokens.device.type == "cuda" else []
            with unchanged(self.module), torch.random.fork_rng(devices=drawn_on):
                _uncompile(self.module)
                logits = self._call(tokens, boundaries)
        finally:
            for hook in hooks:
                hook.remove()
        heads = [module for module, output in given if output.is_still(logits)]
        calls = [module for module, _ in given]
        return heads[0] if heads and calls.count(heads[0]) == 1 else None  # type: ignore[return-value]

    # Documents as rows of their own

    def _rows_of_documents(self, tokens: Tensor, targets: Tensor, cu_seqlens: Tensor) -> "list[Rows]":
        """Sub-batches of the documents that hold a target that counts."""
        ends = cu_seqlens.long()
        counted = F.pad((targets.flatten() != IGNORED).cumsum(0), (1, 0))[ends.clamp(0, targets.numel())]
        bounds, counts = torch.stack([ends, counted]).tolist()
        _check_bounds(bounds, tokens)
        documents = [
            (start, end - start)
            for (start, end), (before, after) in zip(pairwise(bounds), pairwise(counts), strict=True)
            if after > before
        ]
        groups = similar_lengths(documents, tokens.shape[1])
        groups += [[(0, 0)]] * (self._num_runs(len(groups)) - len(groups))
        return [_rows(group, tokens, targets) for group in groups]

    def _logits_of_documents(self, tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Logits (B, T, V), each document run in a row of its own."""
        bounds = cu_seqlens.tolist()
        _check_bounds(bounds, tokens)
        documents = [(start, end - start) for start, end in pairwise(bounds) if end > start]
        places = torch.arange(tokens.numel(), device=tokens.device).view_as(tokens)
        batches = [_rows(group, tokens, places) for group in similar_lengths(documents, tokens.shape[1])]
        logits = torch.cat([rows.real(self._call(rows.tokens, {})) for rows in batches])
        order = torch.cat([rows.real(rows.targets) for rows in batches]).argsort()
        return logits[order].unflatten(0, tokens.shape)

    def _num_runs(self, wanted: int) -> int:
        """Sub-batches to run, at least one: of a sharded module as many on all ranks, since each gathers weights."""
        wanted = max(wanted, 1)
        if not _is_sharded(self.module):
            return wanted
        most = torch.tensor(wanted, device=next(self.module.parameters()).device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return int(most)

    # The wrapper shows the module's own names

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the module; what stands round it reads boundaries on the host."""
        self.module.compile(*args, **kwargs)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        if recurse:
            yield from self.module.named_parameters(prefix, True, remove_duplicate)

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        if recurse:
            yield from self.module.named_buffers(prefix, True, remove_duplicate)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.state_dict(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__"):  # Python asks for these before there is a module, as in copying
                raise
            return getattr(super().__getattr__("module"), name)


class Rows(NamedTuple):
    """Tokens to run, each row independent of the others."""

    tokens: Tensor  # (n, L)
    targets: Tensor  # (n, L), -100 in padding
    cells: Tensor | None  # (tokens,) places of what is no padding in the flattened rows; None: there is none

    def real(self, values: Tensor) -> Tensor:
        """Values (n, L, ...) without those of padding: (tokens, ...)."""
        return values.flatten(0, 1) if self.cells is None else values.flatten(0, 1)[self.cells]


def _rows(documents: list[tuple[int, int]], tokens: Tensor, targets: Tensor) -> Rows:
    """Documents, each (start, length), as rows padded on the right with their last token; at least one cell each."""
    starts, lengths = torch.tensor(documents).t()[..., None]
    columns = torch.arange(max(1, int(lengths.max())))
    real = columns < lengths
    places = (starts + torch.minimum(columns, (lengths - 1).clamp(min=0))).to(tokens.device)
    cells = real.flatten().nonzero().flatten().to(tokens.device)
    own_targets = targets.flatten()[places].masked_fill(~real.to(tokens.device), IGNORED)
    return Rows(tokens.flatten()[places], own_targets, cells)


def similar_lengths(documents: list[tuple[int, int]], row_size: int) -> list[list[tuple[int, int]]]:
    """Documents, each (start, length), in sub-batches, longest first.

    A sub-batch ends before a document of at most half its longest's length, unless all that remain, padded to that
    length, take a row at most: fewer than 2 N + row_size cells hold N tokens, in at most 1 + log2(longest) sub-batches.
    """
    ordered = sorted(documents, key=lambda document: -document[1])
    groups: list[list[tuple[int, int]]] = []
    for done, document in enumerate(ordered):
        longest = groups[-1][0][1] if groups else 0
        wasteful = 2 * document[1] <= longest and (len(ordered) - done) * longest > row_size
        if wasteful or not groups:
            groups.append([])
        groups[-1].append(document)
    return groups


def _check_bounds(bounds: list[int], tokens: Tensor) -> None:
    if bounds[0] != 0 or bounds[-1] != tokens.numel() or any(start > end for start, end in pairwise(bounds)):
        raise ValueError(
            f"CausalLM: cu_seqlens runs from {bounds[0]} to {bounds[-1]}, expected boundaries that grow from 0 to the "
            f"{tokens.numel()} tokens"
        )


class Seen(NamedTuple):
    """A tensor as it was at one time."""

    tensor: Tensor
    version: int | None  # PyTorch's count of the writes into it, through views too; inference mode counts none

    @classmethod
    def now(cls, tensor: Tensor) -> "Seen":
        traced = torch.compiler.is_compiling()  # torch.compile would break its graph at is_inference
        return cls(tensor, None if not traced and tensor.is_inference() else tensor._version)

    def is_still(self, tensor: Tensor) -> bool:
        """Whether the other is this very tensor, and surely nothing wrote to it since."""
        return tensor is self.tensor and self.version is not None and tensor._version == self.version


def _loss_of_features(features: list[Tensor], head: nn.Linear, batches: Sequence[Rows]) -> Tensor:
    """Sum over all sub-batches, of what went into the head (n, L, C)."""
    return linear_cross_entropy(
        torch.cat([rows.real(x) for x, rows in zip(features, batches, strict=True)]),
        head.weight,
        torch.cat([rows.real(rows.targets) for rows in batches]),
        linear_bias=head.bias,
        reduction="sum",
        ignore_index=IGNORED,
    )


def _loss_of_logits(logits: Tensor, rows: Rows) -> Tensor:
    """Sum in float32. A copy that was made for that is overwritten with its gradient: nobody else holds it."""
    exact = logits if logits.dtype == torch.float64 else logits.float()
    return cross_entropy(
        exact.flatten(0, 1),
        rows.targets.flatten(),
        ignore_index=IGNORED,
        reduction="sum",
        inplace=exact is not logits,
    )


def _logits_in(output: Any) -> Tensor:
    """The logits in what a module returned."""
    if isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    output = getattr(output, "logits", output)
    if isinstance(output, tuple | list) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise TypeError(
            f"CausalLM: the module gave {type(output).__name__}, expected logits: a tensor, .logits or first in a tuple"
        )
    return output


def _is_plain_linear(module: nn.Module) -> bool:
    """Whether its result is input @ weight.T + bias and nothing else: no subclass, no hook, no replaced forward."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return type(module) is nn.Linear and not hooks and "forward" not in vars(module)


@contextlib.contextmanager
def _handing_on(head: nn.Linear) -> Iterator[list[Seen]]:
    """While it lasts, the head gives its input back; the list holds what it was given."""
    handed: list[Seen] = []

    def forward(input: Tensor) -> Tensor:
        handed.append(Seen.now(input))
        return input

    vars(head)["forward"] = forward
    try:
        yield handed
    finally:
        del vars(head)["forward"]


def _uncompile(module: nn.Module) -> None:
    """Take from all parts what compile() or torch.compile put before their forward."""
    for part in module.modules():
        vars(part)["_compiled_call_impl"] = None
        if "_orig_mod" in part._modules:  # torch.compile's wrapper
            vars(part)["forward"] = part._modules["_orig_mod"]


def _is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 shards any part of the module."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(part, FSDPModule) for part in module.modules())


def _add_prefix(wrapper: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Turn the module's own names, under which state_dict gives its tensors, into those of the wrapper's part."""
    for name in [name for name in state_dict if name.startswith(prefix)]:
        state_dict[f"{prefix}module.{name[len(prefix) :]}"] = state_dict.pop(name)
