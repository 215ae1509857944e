"""A Hugging Face model's loss without logits equals its own, and the logits are there whenever somebody wants them."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("transformers")

import transformers
from transformers.loss.loss_utils import ForCausalLMLoss

import fastlm
from fastlm.acceleration.loss_without_logits import match_loss
from fastlm.acceleration.matching import Refusal
from fastlm.acceleration.unbuilt_logits import UnbuiltLogits
from fastlm.acceleration.verification import InFloat64
from tests.support.accuracy import assert_accurate
from tests.support.hugging_face import SIZES, VOCABULARY, loss_and_gradients, made, relative

pytestmark = pytest.mark.usefixtures("kernels_of_few_logits")
T = 11


@pytest.fixture
def pair():
    model = made("llama")
    return model, fastlm.accelerate(copy.deepcopy(model))


def batch():
    tokens = torch.randint(3, VOCABULARY, (2, T))
    labels = tokens.clone()
    labels[0, :4] = -100
    return {"input_ids": tokens, "labels": labels}


def test_training_builds_no_logits(pair):
    given = batch()
    output = pair[1](**given)
    assert output.logits is None
    assert "logits" not in output
    torch.testing.assert_close(output.loss, pair[0](**given).loss)


@pytest.mark.parametrize(
    "change",
    [
        lambda model, given: model.eval(),
        lambda model, given: given.pop("labels"),
        lambda model, given: given.update(skip_logits=False),
        lambda model, given: model.lm_head.register_forward_hook(lambda *_: None),
        lambda model, given: given.update(return_dict=False),
        lambda model, given: setattr(model, "loss_function", lambda logits, labels, **_: logits.sum()),
    ],
    ids=["evaluation", "no labels", "skip_logits=False", "a hook", "a tuple", "a loss of the user"],
)
def test_logits_are_there_whenever_somebody_wants_them(pair, change):
    model, ours = pair
    given = batch()
    theirs_given = {**given}
    change(ours, given)
    change(model, theirs_given)
    theirs_given.pop("skip_logits", None)
    found, expected = ours(**given), model(**theirs_given)
    if isinstance(found, tuple):
        torch.testing.assert_close(found[:2], expected[:2])
    else:
        torch.testing.assert_close(found.logits, expected.logits)
        assert (found.loss is None) == (expected.loss is None)
        if found.loss is not None:
            torch.testing.assert_close(found.loss, expected.loss)


def test_skip_logits_works_in_evaluation(pair):
    given = batch()
    with torch.no_grad():
        output = pair[1].eval()(**given, skip_logits=True)
        torch.testing.assert_close(output.loss, pair[0].eval()(**given).loss)
    assert output.logits is None


@pytest.mark.parametrize("count", [7, torch.tensor(9)], ids=["int", "tensor"])
def test_num_items_in_batch_divides_the_sum(pair, count):
    given = batch()
    for model in pair:
        model.zero_grad()
    found, expected = (model(**given, num_items_in_batch=count).loss for model in reversed(pair))
    torch.testing.assert_close(found, expected)


def test_shift_labels_are_taken_as_they_are(pair):
    given = batch()
    given["shift_labels"] = torch.randint(3, VOCABULARY, (2, T))
    torch.testing.assert_close(pair[1](**given).loss, pair[0](**given).loss)


def test_logits_to_keep_is_the_original_s_with_shift_labels(pair):
    given = batch()
    given |= {"logits_to_keep": 5, "shift_labels": torch.randint(3, VOCABULARY, (2, 5))}
    torch.testing.assert_close(pair[1](**given).loss, pair[0](**given).loss)
    with pytest.raises(ValueError, match=r"target has shape \(22,\), expected \(10,\)"):
        pair[1](**batch(), logits_to_keep=5)


def test_nothing_is_left_behind_by_a_forward_that_fails(pair):
    model = pair[1]
    attributes = {**vars(model)}, {**vars(model.lm_head)}
    with pytest.raises(ValueError, match="target has shape"):
        model(**batch(), logits_to_keep=5)
    assert ({**vars(model)}, {**vars(model.lm_head)}) == attributes


def test_a_head_that_an_adapter_wraps_gives_logits(pair):
    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base_layer = base

        def forward(self, x):
            return self.base_layer(x) * 2

    ours = pair[1]
    ours.lm_head = Adapter(ours.lm_head)
    assert ours(**batch()).logits.shape == (2, T, VOCABULARY)


RETURNED = {
    "a tuple": lambda output: (output.loss, output.logits),
    "a mapping in a mapping": lambda output: {"loss": output.loss, "more": {"logits": output.logits}},
    "the loss alone": lambda output: output.loss,
    "a term of the logits": lambda output: output.loss + (output.logits**2).mean(),
}


@pytest.mark.parametrize("finish", RETURNED.values(), ids=RETURNED)
def test_a_forward_may_return_what_it_likes(finish):
    class Derived(transformers.LlamaForCausalLM):
        def forward(self, input_ids, labels):
            return finish(super().forward(input_ids, labels=labels))

    model = made("llama", torch.float32)
    model.__class__ = Derived
    ours = fastlm.accelerate(copy.deepcopy(model), attention=False, norms=False, activations=False)
    assert fastlm.accelerated(ours).swapped
    given = batch()
    torch.testing.assert_close(ours(**given), model(**given))


def test_a_forward_may_call_its_model_again():
    class OneByOne(transformers.LlamaForCausalLM):
        def forward(self, input_ids, labels=None):
            if labels is None or len(input_ids) == 1:
                return super().forward(input_ids, labels=labels)
            first = self(input_ids[:1], labels=labels[:1])
            assert isinstance(self(input_ids).logits, torch.Tensor)
            output = super().forward(input_ids, labels=labels)
            return first.loss + output.loss

    model = made("llama", torch.float32)
    model.__class__ = OneByOne
    ours, given = fastlm.accelerate(copy.deepcopy(model), attention=False, norms=False, activations=False), batch()
    torch.testing.assert_close(ours(**given), model(**given))
    assert ours(**{name: x[:1] for name, x in given.items()}).logits is None


def test_tied_weights_stay_tied_and_get_both_gradients():
    model = made("gpt2")
    ours = fastlm.accelerate(copy.deepcopy(model))
    given = batch()
    for each in (model, ours):
        each(**given).loss.backward()
    assert ours.lm_head.weight is ours.transformer.wte.weight
    torch.testing.assert_close(ours.lm_head.weight.grad, model.lm_head.weight.grad)


SOFTCAP = 5.0
DONE_TO_LOGITS = {
    "nothing": lambda logits: logits,
    "a scale": lambda logits: logits * 0.25,
    "a divisor, in float32": lambda logits: 2.0 * logits.float() / 3,
    "a softcap": lambda logits: SOFTCAP * torch.tanh(logits * 3.0 / SOFTCAP),
    "a bias": lambda logits: logits + torch.linspace(-1, 1, VOCABULARY)[None],
    "a slice": lambda logits: logits[..., 1:, :].contiguous(),
}
NOT_KNOWN = {
    "another sign": lambda logits: logits * -2.0,
    "a bound": lambda logits: logits.clamp(-1, 1),
    "a bias after a scale": lambda logits: logits * 2.0 + torch.linspace(-1, 1, VOCABULARY),
    "a number": lambda logits: logits + 1.0,
    "a mask": lambda logits: torch.where(torch.arange(VOCABULARY) < 50, logits, -1e4),
    "another dtype": lambda logits: logits.to(torch.float64),
    "some classes": lambda logits: logits[..., :70],
    "a softcap twice": lambda logits: logits.tanh().tanh(),
}


@pytest.mark.parametrize("change", [*DONE_TO_LOGITS, *NOT_KNOWN])
def test_unbuilt_logits_give_the_loss_and_gradients_of_built_ones(change):
    do = {**DONE_TO_LOGITS, **NOT_KNOWN}[change]
    leaves = [torch.randn(*shape, requires_grad=True) for shape in ((2, T, 8), (VOCABULARY, 8), (VOCABULARY,))]
    results = []
    for logits in (UnbuiltLogits(*leaves), F.linear(*leaves)):
        done = do(logits)
        assert isinstance(done, UnbuiltLogits) == (isinstance(logits, UnbuiltLogits) and change in DONE_TO_LOGITS)
        V, target = done.size(-1), torch.arange(done.shape[:-1].numel()) % 60
        target[::3] = -100
        loss = nn.CrossEntropyLoss(label_smoothing=0.1)(done.view(-1, V), target)
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    torch.testing.assert_close(*results)


def test_what_reads_unbuilt_logits_reads_built_ones():
    leaves = torch.randn(2, T, 8), torch.randn(VOCABULARY, 8), torch.randn(VOCABULARY)
    unbuilt, logits = UnbuiltLogits(*leaves) * 3.0, F.linear(*leaves) * 3.0
    for read in (torch.log_softmax, torch.argmax):
        torch.testing.assert_close(read(unbuilt, dim=-1), read(logits, dim=-1))
    torch.testing.assert_close(unbuilt.exp(), logits.exp())
    torch.testing.assert_close(unbuilt.view(2, -1), logits.view(2, -1))
    probabilities = torch.rand(2 * T, VOCABULARY).softmax(-1)
    found, expected = (F.cross_entropy(x.view(-1, VOCABULARY), probabilities) for x in (unbuilt, logits))
    torch.testing.assert_close(found, expected)


ASKED = {
    "arithmetic": lambda x: abs(1 - -(x**2) - x) + 1 / (x * x + 1) + x % 2.0,
    "comparisons": lambda x: torch.where((x > 0) & ~(x == 1) & (x != 2), x, 0.0),
    "its length and parts": lambda x: sum(part.sum() for part in x) * len(x),
    "a list": lambda x: torch.cat([x, torch.stack([x, x]).sum(0)]),
    "keywords": lambda x: x.view(size=(-1, VOCABULARY)).float(memory_format=torch.preserve_format).reshape((-1,)),
    "a factor without end": lambda x: (x * float("inf")).nan_to_num(),
    "a bias of more dimensions": lambda x: x + torch.ones(1, 1, 1, VOCABULARY),
    "its text": lambda x: torch.tensor(len(repr(x.detach()))),
    "a copy": lambda x: copy.deepcopy(x.detach()),
}


@pytest.mark.parametrize("ask", ASKED.values(), ids=ASKED)
def test_whatever_is_asked_of_unbuilt_logits_is_asked_of_built_ones(ask):
    leaves = torch.randn(2, T, 8), torch.randn(VOCABULARY, 8), torch.randn(VOCABULARY)
    torch.testing.assert_close(ask(UnbuiltLogits(*leaves)), ask(F.linear(*leaves)))


def set_items(x):
    x[:, 0] = 1.0


CHANGED_IN_PLACE = {
    "a method": lambda x, rows: x.mul_(2),
    "a method of a view": lambda x, rows: rows.mul_(2),
    "items": lambda x, rows: set_items(x),
    "items of a view": lambda x, rows: set_items(rows),
    "a function": lambda x, rows: F.relu(x, inplace=True),
}


@pytest.mark.parametrize("change", CHANGED_IN_PLACE.values(), ids=CHANGED_IN_PLACE)
def test_a_change_in_place_of_unbuilt_logits_reaches_every_loss(change):
    leaves = [torch.randn(*shape, requires_grad=True) for shape in ((2, T, 8), (VOCABULARY, 8))]
    target, results = torch.arange(2 * T), []
    for logits in (UnbuiltLogits(*leaves, None), F.linear(*leaves)):
        rows, scaled = logits.view(-1, VOCABULARY), logits * 3.0  # a product is a tensor of its own
        change(logits, rows)
        loss = sum(F.cross_entropy(x.view(-1, VOCABULARY), target) for x in (rows, logits, scaled))
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("autocast", [True, False], ids=["of the head alone", "of the loss alone"])
def test_unbuilt_logits_are_those_of_the_autocast_of_their_head(autocast):
    leaves = [torch.randn(*shape, requires_grad=True) for shape in ((T, 8), (VOCABULARY, 8))]
    results = []
    for head in (lambda *leaves: UnbuiltLogits(*leaves, None), F.linear):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = head(*leaves)
        assert logits.dtype == (torch.bfloat16 if autocast else torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=not autocast):
            loss = F.cross_entropy(logits, torch.arange(T))
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_a_bias_of_another_dtype_makes_unbuilt_logits_of_the_wider_one():
    leaves = torch.randn(T, 8).bfloat16(), torch.randn(VOCABULARY, 8).bfloat16()
    found, expected = (x + torch.ones(VOCABULARY) for x in (UnbuiltLogits(*leaves, None), F.linear(*leaves)))
    assert isinstance(found, UnbuiltLogits)
    torch.testing.assert_close(found.built(), expected)
    assert F.cross_entropy(found, torch.arange(T)).dtype == torch.float32


def opt():
    sizes = {"ffn_dim": 96, "word_embed_proj_dim": 48, "dropout": 0.0}
    return transformers.OPTForCausalLM(transformers.OPTConfig(**{**SIZES, **sizes})).train()


def roberta():
    config = transformers.RobertaConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return transformers.RobertaForMaskedLM(config).train()


def bart():
    model = made("bart")
    model.final_logits_bias.normal_()
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [opt, roberta, bart])
def test_heads_of_other_makes_train_without_logits(make, dtype):
    model = make().to(dtype)
    ours, given = fastlm.accelerate(copy.deepcopy(model), attention=False, norms=False, activations=False), batch()
    assert ours(**given).logits is None
    with InFloat64():
        truth = loss_and_gradients(copy.deepcopy(model).double(), given)
    found, expected = loss_and_gradients(ours, given), loss_and_gradients(model, given)
    assert found["loss"].dtype == expected["loss"].dtype
    results = [torch.cat([x.flatten() for x in relative(each, truth).values()]) for each in (found, expected, truth)]
    assert_accurate(results[0].to(dtype), results[1].to(dtype), results[2], make.__name__)


def test_a_head_that_another_module_holds_builds_logits_for_a_hook_on_it():
    model = fastlm.accelerate(made("bert"))
    assert model(**batch()).logits is None
    handle = model.cls.register_forward_hook(lambda module, given, logits: logits * 2)
    assert model(**batch()).logits.shape == (2, T, VOCABULARY)
    handle.remove()
    assert model(**batch()).logits is None


def test_a_compiled_model_that_makes_its_loss_itself_builds_logits(monkeypatch):
    """torch.compile replaces torch.nn.CrossEntropyLoss by what takes tensors only."""
    models = [fastlm.accelerate(made(name, torch.float32)) for name in ("t5", "llama")]
    assert [model(**batch()).logits is None for model in models] == [True, True]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert [model(**batch()).logits is None for model in models] == [False, True]


def test_a_function_of_the_user_in_place_of_cross_entropy_gets_logits(pair, monkeypatch):
    def squares(input, target, **options):
        assert isinstance(input, torch.Tensor)
        return input.square().mean()

    monkeypatch.setattr(F, "cross_entropy", squares)
    given = batch()
    found, expected = (model(**given) for model in pair)
    torch.testing.assert_close(found.loss, expected.loss)


class ReadsLogits(type(made("llama"))):
    def forward(self, input_ids, labels):
        logits = self.lm_head(self.model(input_ids)[0])
        return self.loss_function(logits.clamp(-5, 5), labels, VOCABULARY)


class NoCrossEntropy(ReadsLogits):
    def forward(self, input_ids, labels):
        return self.lm_head(self.model(input_ids)[0]).shape[0] * self.model(input_ids)[0].sum()


@pytest.mark.parametrize(
    ("kind", "reason"), [(ReadsLogits, "changes or reads its logits"), (NoCrossEntropy, "another function")]
)
def test_models_whose_loss_takes_more_than_logits_are_refused_with_the_reason(kind, reason):
    model = made("llama")
    model.__class__ = kind
    refusal = match_loss(model)
    assert isinstance(refusal, Refusal)
    assert reason in refusal.reason


def test_a_loss_set_by_the_user_is_refused_and_taken_up_once_it_is_gone():
    model = made("llama")
    model.loss_function = lambda logits, labels, **_: logits.sum()
    fastlm.accelerate(model)
    assert [row.family for row in fastlm.accelerated(model).skipped] == ["loss"]
    model.loss_function = ForCausalLMLoss
    assert model(**batch()).logits is not None
    assert not fastlm.accelerated(fastlm.accelerate(model)).skipped
    assert model(**batch()).logits is None


def test_threads_train_and_evaluate_one_model_at_once(pair):
    model, ours = pair
    given = batch()
    expected, wrong = model(**given), []

    def repeat(check):
        for _ in range(20):
            try:
                check()
            except Exception as error:
                wrong.append(error)

    def train():
        torch.testing.assert_close(ours(**given).loss, expected.loss)

    def evaluate():
        torch.testing.assert_close(ours(input_ids=given["input_ids"]).logits, expected.logits)
        torch.testing.assert_close(ours(**given, skip_logits=False).loss, expected.loss)

    threads = [threading.Thread(target=repeat, args=(check,)) for check in (train, train, evaluate)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_loss_function_set_by_the_user_is_the_one_that_runs(pair):
    ours, given = pair[1], batch()
    ours.loss_function = lambda logits, labels, **_: logits.square().mean()
    output = ours(**given)
    torch.testing.assert_close(output.loss, output.logits.square().mean())
