"""The loss of a Hugging Face model from its hidden states, by linear_cross_entropy: no logits are built in training.

    hidden = model(...)      logits = scale * (hidden @ head.weight.T + head.bias), softcapped      loss(logits, labels)

The forward of the model stays its own. While a thread runs it, the head keeps that thread's hidden states and returns
one column in place of the logits, and the model's loss function makes the loss from what the head kept. What a model
does to its logits between the two, a scale, a softcap or nothing, is found by trying: its forward runs on a copy with
stubs for backbone and head.
"""

import copy
import functools
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from fastlm.acceleration.matching import Match, Refusal
from fastlm.acceleration.swapped_module import Swapped
from fastlm.ops import linear_cross_entropy

LOSSES = (ForCausalLMLoss, ForMaskedLMLoss)


class LogitsForm(NamedTuple):
    """What a model makes of its head's output before the loss: softcap * tanh(scale * logits / softcap)."""

    loss: Callable[..., Tensor]  # of transformers
    scale: float
    softcap: float | None


class Head(nn.Module):
    """The forward of the head: while its model trains without logits, it keeps its input and returns one column."""

    form: None

    def forward(self, input: Tensor) -> Tensor:
        kept = self.__dict__.get(kept_by_this_thread())
        if kept is None:
            return super().forward(input)
        kept.append(input)
        return input.new_zeros((*input.shape[:-1], 1))


def kept_by_this_thread() -> str:
    """The attribute of a head that holds what it keeps; a compiled program is traced in one thread for all."""
    return "kept_input" if torch.compiler.is_compiling() else f"kept_input_{threading.get_ident()}"


class LossWithoutLogits(nn.Module):
    """The forward of the model. In training, with labels, output.logits is None; `skip_logits=False` brings them back.

    Logits are built as ever in evaluation (but with skip_logits=True), without labels, where a tuple is asked for,
    where the head has hooks, is wrapped (by an adapter, say) or sharded, and where the loss function was replaced.
    """

    form: LogitsForm
    config: Any
    get_output_embeddings: Callable[[], Any]

    def forward(self, *args: Any, skip_logits: bool | None = None, **kwargs: Any) -> Any:
        wanted = self.training if skip_logits is None else skip_logits
        head = self.get_output_embeddings()
        if not wanted or kwargs.get("labels") is None or not self._can_skip(head, kwargs.get("return_dict")):
            return super().forward(*args, **kwargs)
        kept = kept_by_this_thread()
        setattr(head, kept, [])
        try:
            output = super().forward(*args, **kwargs)
        finally:
            delattr(head, kept)
        return type(output)(**{name: value for name, value in output.items() if name != "logits"})

    @property
    def loss_function(self) -> Any:
        """The model's own, or while this thread's head keeps its input the one that needs no logits."""
        head = self.get_output_embeddings()
        kept = head.__dict__.get(kept_by_this_thread())
        if kept is None:
            return PreTrainedModel.loss_function.fget(self)  # type: ignore[attr-defined]
        return functools.partial(loss_of_kept, kept, head, self.form)

    @loss_function.setter
    def loss_function(self, value: Any) -> None:
        self._loss_function = value

    def _can_skip(self, head: Any, return_dict: bool | None) -> bool:
        return (
            (self.config.return_dict if return_dict is None else return_dict)
            and isinstance(head, Swapped)
            and head.layer is Head
            and type(head.weight) is nn.Parameter
            and not head._forward_hooks
            and not head._forward_pre_hooks
            and self.__dict__.get("_loss_function") in (None, self.form.loss)
        )


def loss_of_kept(
    kept: list[Tensor],
    head: Any,
    form: LogitsForm,
    logits: Tensor,
    labels: Tensor,
    vocab_size: int | None = None,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """What transformers' loss gives for the logits that head did not build, float32 (); logits are not looked at."""
    (features,) = kept
    target = labels
    if form.loss is ForCausalLMLoss:
        target = F.pad(labels, (0, 1), value=ignore_index)[..., 1:] if shift_labels is None else shift_labels
    if target.shape != features.shape[:-1]:
        raise ValueError(
            f"fastlm: labels have shape {tuple(target.shape)}, expected {tuple(features.shape[:-1])}, "
            "one for each position whose logits are kept"
        )
    loss = linear_cross_entropy(
        features,
        head.weight,
        target.to(features.device),
        linear_bias=head.bias,
        ignore_index=ignore_index,
        logit_scale=form.scale,
        softcap=form.softcap,
        reduction="mean" if num_items_in_batch is None else "sum",
        dtype=torch.float32,
    )
    if num_items_in_batch is None:
        return loss
    return loss / (num_items_in_batch.to(loss.device) if isinstance(num_items_in_batch, Tensor) else num_items_in_batch)


def match_loss(model: Any) -> Match | Refusal | None:
    """What a model with labels makes of its logits; None for a module that has no output embeddings."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None or not hasattr(type(model), "loss_function"):
        return None
    if type(head) is not nn.Linear and not (isinstance(head, Swapped) and head.original is nn.Linear):
        return Refusal(f"its head is a {type(head).__name__}, not a torch.nn.Linear")
    if not any(head is child for child in model.children()):
        return Refusal("its head lies inside another module, which may change what the head gives")
    if model.loss_function not in LOSSES:
        return Refusal(f"its loss is {getattr(model.loss_function, '__name__', 'a function of its own')}")
    try:
        found = logits_form(model, head)
    except Exception as error:  # the model is anybody's code, and stubs are not its backbone
        return Refusal(f"its forward does not run on stand-ins for backbone and head ({type(error).__name__})")
    if isinstance(found, Refusal):
        return found
    return Match(LossWithoutLogits, found, "ops.linear_cross_entropy, no logits in training", parts=((head, Head),))


TRIED_LOGITS = torch.tensor([-1e6, -80.0, -3.0, -0.5, 0.0, 1e-3, 0.7, 20.0, 1e6])


class _StubBackbone(nn.Module):
    """Gives hidden states whatever it is asked."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=torch.zeros(1, 3, 8))


class _StubHead(nn.Module):
    """Gives logits that show what comes after it."""

    def forward(self, input: Tensor) -> Tensor:
        return TRIED_LOGITS.expand(1, 3, -1)


class _LossReached(Exception):  # noqa: N818 (no error)
    """Ends a trial at the loss."""

    def __init__(self, logits: Tensor, labels: Tensor) -> None:
        self.logits, self.labels = logits, labels


def logits_form(model: Any, head: nn.Module) -> LogitsForm | Refusal:
    """The form of what the model hands to its loss, found on stubs."""

    def see(logits: Tensor, labels: Tensor, *_: Any, **__: Any) -> None:
        raise _LossReached(logits, labels)

    trial = copy.copy(model)
    children = {name: _StubHead() if child is head else _StubBackbone() for name, child in model._modules.items()}
    trial.__dict__.update(_modules=children, _loss_function=see, training=True)
    labels = torch.zeros(1, 3, dtype=torch.long)
    try:
        with torch.no_grad():
            type(model).forward(trial, input_ids=labels, labels=labels)
    except _LossReached as seen:
        if seen.labels is not labels:
            return Refusal("it changes its labels before the loss")
        found = form_of(seen.logits)
        if found is None:
            return Refusal("it changes its logits before the loss by more than a scale and a softcap")
        return LogitsForm(model.loss_function, *found)
    return Refusal("it makes its loss itself, not by its loss_function")


def form_of(logits: Tensor) -> tuple[float, float | None] | None:
    """Which scale and softcap turn TRIED_LOGITS into these."""
    if logits.shape[-1:] != TRIED_LOGITS.shape:
        return None
    given, seen = TRIED_LOGITS.double(), logits[0, 0].double()
    slope = float(seen[5] / given[5])
    largest = float(seen[-1])
    if slope <= 0:
        return None
    for softcap in (None, largest):
        scaled = given * slope
        expected = scaled if softcap is None else softcap * torch.tanh(scaled / softcap)
        if torch.allclose(expected, seen, rtol=1e-4):
            return 1.0 if abs(slope - 1) < 1e-6 else slope, softcap
    return None
