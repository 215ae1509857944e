"""The loss of a Hugging Face model from its hidden states, by linear_cross_entropy: no logits are built in training.

    hidden = model(...)      logits = f(hidden @ head.weight.T + head.bias)      loss = cross_entropy(logits, labels)

The forward of the model stays its own, and so does its loss. While a thread trains it, the head returns logits that
nobody has computed (unbuilt_logits.py), from which cross_entropy takes what it needs. Whether a model comes to its loss
without reading them is found by trying: its forward runs on a copy with stubs for backbone and head.
"""

import copy
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from fastlm.acceleration.matching import Match, Refusal, is_watched
from fastlm.acceleration.swapped_module import Swapped, original_class
from fastlm.acceleration.unbuilt_logits import UnbuiltLogits, built

LOSSES = (ForCausalLMLoss, ForMaskedLMLoss)


class LossForm(NamedTuple):
    """What has to stay as it was found."""

    loss: Callable[..., Tensor]  # of transformers, whether the model calls it or not
    is_called: bool  # or else the model makes its loss itself
    around: tuple[str, ...]  # the modules that hold the head


class Head(nn.Module):
    """The forward of the head: while its model trains without logits, it computes none."""

    form: None
    weight: Tensor
    bias: Tensor | None

    def forward(self, input: Tensor) -> Any:
        if not self.__dict__.get(of_this_thread()):
            return super().forward(input)
        return UnbuiltLogits(input, self.weight, self.bias)


def of_this_thread() -> str:
    """The attribute of a head that says to compute nothing; a compiled program is traced in one thread for all."""
    return "skips" if torch.compiler.is_compiling() else f"skips_{threading.get_ident()}"


class LossWithoutLogits(nn.Module):
    """The forward of the model. In training, with labels, output.logits is None; `skip_logits=False` brings them back.

    Logits are built as ever in evaluation (but with skip_logits=True), without labels, where a tuple is asked for,
    where the head or what holds it has hooks, where it is wrapped (by an adapter, say) or sharded, and where the loss
    function was replaced.
    """

    form: LossForm
    config: Any
    get_output_embeddings: Callable[[], Any]

    def forward(self, *args: Any, skip_logits: bool | None = None, **kwargs: Any) -> Any:
        wanted = self.training if skip_logits is None else skip_logits
        head, skips = self.get_output_embeddings(), of_this_thread()
        is_wanted = wanted and kwargs.get("labels") is not None and self._can_skip(head, kwargs.get("return_dict"))
        before = getattr(head, "__dict__", {}).get(skips)  # of a call of this model that calls it again
        if not (is_wanted or before):
            return super().forward(*args, **kwargs)
        setattr(head, skips, is_wanted)
        try:
            output = super().forward(*args, **kwargs)
        finally:
            setattr(head, skips, before) if before else delattr(head, skips)
        return without_unbuilt(output) if is_wanted else output

    @property
    def loss_function(self) -> Any:
        """What the model's own would find: some look for it with a warning, which no compiled program can give."""
        return self.__dict__.get("_loss_function", self.form.loss)

    @loss_function.setter
    def loss_function(self, value: Any) -> None:
        self._loss_function = value

    def _can_skip(self, head: Any, return_dict: bool | None) -> bool:
        return (
            (self.config.return_dict if return_dict is None else return_dict)
            and isinstance(head, Swapped)
            and head.layer is Head
            and type(head.weight) is nn.Parameter
            and not any(map(is_watched, (head, *map(self.get_submodule, self.form.around))))
            and self.__dict__.get("_loss_function") in (None, self.form.loss)
            and F.cross_entropy.__module__ == F.__name__  # not a function that somebody put in its place
            # What Dynamo puts in the place of torch.nn.CrossEntropyLoss takes tensors only.
            and (self.form.is_called or not torch.compiler.is_compiling())
        )


def without_unbuilt(output: Any) -> Any:
    """What a forward gave without logits that nobody has computed: left out beside a loss by name, else built."""
    if not isinstance(output, dict):
        return tree_map_only(UnbuiltLogits, built, output)
    has_loss = output.get("loss") is not None
    kept = {name: x for name, x in output.items() if not (has_loss and isinstance(x, UnbuiltLogits))}
    return type(output)(**tree_map_only(UnbuiltLogits, built, kept))


def match_loss(model: Any) -> Match | Refusal | None:
    """Whether a model with labels makes its loss of logits alone; None for a module that has no output embeddings."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None or not hasattr(type(model), "loss_function"):
        return None
    if original_class(head) is not nn.Linear:
        return Refusal(f"its head is a {type(head).__name__}, not a torch.nn.Linear")
    around = [name for name, module in model.named_modules() if name and module is not head and holds(module, head)]
    if any(isinstance(model.get_submodule(name), PreTrainedModel) for name in around):
        return Refusal("its head is that of a model inside")
    if model.loss_function not in LOSSES:
        return Refusal(f"its loss is {getattr(model.loss_function, '__name__', 'a function of its own')}")
    try:
        forward_on_stubs(model, head)
    except _LossReached as reached:
        form = LossForm(model.loss_function, reached.by_loss_function, tuple(around))
        return Match(LossWithoutLogits, form, "ops.linear_cross_entropy, no logits in training", parts=((head, Head),))
    except _LogitsRead:
        return Refusal("it changes or reads its logits before the loss by more than a bias, a scale and a softcap")
    except Exception as error:  # the model is anybody's code, and stubs are not its backbone
        return Refusal(f"its forward does not run on stand-ins for backbone and head ({type(error).__name__})")
    return Refusal("it makes its loss by a module that it keeps, or by another function than cross_entropy")


def holds(module: nn.Module, head: nn.Module) -> bool:
    return any(part is head for part in module.modules())


class _LossReached(Exception):  # noqa: N818 (no error)
    """Ends a trial at the loss."""

    def __init__(self, by_loss_function: bool) -> None:
        self.by_loss_function = by_loss_function


class _LogitsRead(Exception):  # noqa: N818 (no error)
    """Ends a trial where logits would be built."""


class _TriedLogits(UnbuiltLogits):
    def loss(self, target: Tensor, **options: Any) -> Tensor:
        raise _LossReached(by_loss_function=False)

    def built(self) -> Tensor:
        raise _LogitsRead


class _StubBackbone(nn.Module):
    """Gives hidden states whatever it is asked."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=torch.zeros(1, 3, 8))

    def __getattr__(self, name: str) -> Any:
        return self  # as a part of its own, which OPT calls


class _StubHead(nn.Module):
    """Gives logits of num_classes that show what is done to them."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.weight = torch.zeros(1, 1).expand(num_classes, 8)

    def forward(self, input: Tensor) -> UnbuiltLogits:
        return _TriedLogits(torch.zeros(1, 3, 8), self.weight, None)


def forward_on_stubs(model: Any, head: Any) -> None:
    """Run model with labels, and stubs in the place of its children; what holds the head runs its own code."""
    stub = _StubHead(head.out_features)

    def see(logits: Tensor | UnbuiltLogits, *_: Any, **__: Any) -> None:
        raise _LossReached(by_loss_function=True) if isinstance(logits, UnbuiltLogits) else _LogitsRead

    trial = copy.copy(model)
    children = {name: stubbed(child, head, stub) for name, child in model._modules.items()}
    trial.__dict__.update(_modules=children, _loss_function=see, training=True)
    labels = torch.zeros(1, 3, dtype=torch.long)
    with torch.no_grad():
        type(model).forward(trial, input_ids=labels, labels=labels)


def stubbed(child: nn.Module, head: nn.Module, stub: nn.Module) -> nn.Module:
    if not holds(child, head):
        return _StubBackbone()
    copied = {id(part): nn.Identity() for part in child.modules() if not part._modules}
    return copy.deepcopy(child, {**copied, id(head): stub})
