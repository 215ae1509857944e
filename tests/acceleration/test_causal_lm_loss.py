"""A Hugging Face model's loss without logits equals its own, and the logits are there whenever somebody wants them."""

import copy
import threading

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from transformers.loss.loss_utils import ForCausalLMLoss

import fastlm
from fastlm.acceleration.causal_lm_loss import TRIED_LOGITS, form_of, match_loss
from fastlm.acceleration.matching import Match, Refusal
from tests.support.hugging_face import VOCABULARY, made

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
    with pytest.raises(ValueError, match=r"labels have shape \(2, 11\), expected \(2, 5\)"):
        pair[1](**batch(), logits_to_keep=5)


def test_nothing_is_left_behind_by_a_forward_that_fails(pair):
    model = pair[1]
    attributes = {**vars(model)}, {**vars(model.lm_head)}
    with pytest.raises(ValueError, match="labels have shape"):
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


def test_tied_weights_stay_tied_and_get_both_gradients():
    model = made("gpt2")
    ours = fastlm.accelerate(copy.deepcopy(model))
    given = batch()
    for each in (model, ours):
        each(**given).loss.backward()
    assert ours.lm_head.weight is ours.transformer.wte.weight
    torch.testing.assert_close(ours.lm_head.weight.grad, model.lm_head.weight.grad)


@pytest.mark.parametrize(
    ("family", "changes", "form"),
    [
        ("llama", {}, (1.0, None)),
        ("gemma3", {}, (1.0, 30.0)),
        ("gemma2", {"final_logit_softcapping": 5.0}, (1.0, 5.0)),
        ("modernbert", {}, (1.0, None)),
    ],
)
def test_what_comes_between_head_and_loss_is_found(family, changes, form):
    match = match_loss(made(family, **changes))
    assert isinstance(match, Match)
    assert match.form[1:] == pytest.approx(form)


def test_scales_and_softcaps_are_told_from_anything_else():
    logits = TRIED_LOGITS.expand(1, 3, -1)
    assert form_of(logits * 0.25) == (0.25, None)
    scale, softcap = form_of(5.0 * torch.tanh(logits * 2.0 / 5.0))
    assert scale == pytest.approx(2.0, rel=1e-6)
    assert softcap == pytest.approx(5.0)
    assert form_of(logits + 1.0) is None
    assert form_of(logits * 0.0) is None
    assert form_of(-logits) is None
    assert form_of(logits.clamp(-50, 50)) is None
    assert form_of(logits[..., :-1]) is None


def test_models_that_make_their_loss_themselves_are_refused_with_the_reason():
    refusal = match_loss(made("t5"))
    assert isinstance(refusal, Refusal)
    assert "makes its loss itself" in refusal.reason


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
