"""The losses of post-training against the formulas of their papers, and TRL's own code where it is installed."""

import inspect
import types

import pytest
import torch
import torch.nn.functional as F

from fastlm import losses
from fastlm.losses import distillation_loss, dpo_loss, grpo_loss, kto_loss, orpo_loss, simpo_loss
from fastlm.ops import _chunks, linear_logprobs
from fastlm.ops._library import is_loaded
from tests.support.accuracy import assert_accurate

B, T = 6, 11


def responses(*names, scale=10.0):
    """Log-probabilities (B,) by name."""
    return {name: -scale * torch.rand(B) - 0.1 for name in names}


def evaluated(function, tensors, dtype, **options):
    """The loss, and the gradients of all tensors that have one."""
    inputs = {name: x.to(dtype).requires_grad_() if x.is_floating_point() else x for name, x in tensors.items()}
    loss = function(**inputs, **options)
    upstream = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
    wanted = [x for x in inputs.values() if x.requires_grad]
    gradients = torch.autograd.grad(loss, wanted, upstream, allow_unused=True)
    return [loss.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip(wanted, gradients, strict=True))]


def assert_equals(ours, plain, tensors, **options):
    found, theirs = (evaluated(function, tensors, torch.float32, **options) for function in (ours, plain))
    truth = evaluated(plain, tensors, torch.float64, **options)
    for results in zip(found, theirs, truth, strict=True):
        assert_accurate(*results)


# The papers' formulas, written out


def reduced(losses, reduction):
    return {"none": lambda x: x, "mean": torch.mean, "sum": torch.sum}[reduction](losses)


def plain_dpo(chosen, rejected, ref_chosen, ref_rejected, beta=0.1, label_smoothing=0.0, reduction="mean"):
    chance = torch.sigmoid(beta * (chosen - rejected) - beta * (ref_chosen - ref_rejected))
    return reduced(-(1 - label_smoothing) * chance.log() - label_smoothing * (1 - chance).log(), reduction)


def plain_simpo(chosen, rejected, beta=2.0, gamma=1.0, label_smoothing=0.0, reduction="mean"):
    chance = torch.sigmoid(beta * chosen - beta * rejected - gamma)
    return reduced(-(1 - label_smoothing) * chance.log() - label_smoothing * (1 - chance).log(), reduction)


def plain_orpo(chosen, rejected, nll=None, beta=0.1, reduction="mean"):
    odds = [x.exp() / (1 - x.exp()) for x in (chosen, rejected)]
    return reduced((-chosen if nll is None else nll) - beta * torch.sigmoid((odds[0] / odds[1]).log()).log(), reduction)


def plain_kto(
    logprobs, ref_logprobs, desirable, kl=0.0, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0, reduction="mean"
):
    kl = kl.detach() if torch.is_tensor(kl) else kl
    r = logprobs - ref_logprobs
    value = torch.where(desirable, torch.sigmoid(beta * (r - kl)), torch.sigmoid(beta * (kl - r)))
    weight = torch.where(desirable, desirable_weight, undesirable_weight).to(r.dtype)
    return reduced(weight - weight * value, reduction)


REDUCTIONS = pytest.mark.parametrize("reduction", ["none", "mean", "sum"])


@REDUCTIONS
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_dpo_loss_is_the_papers(beta, label_smoothing, reduction):
    tensors = responses("chosen", "rejected", "ref_chosen", "ref_rejected")
    options = {"beta": beta, "label_smoothing": label_smoothing, "reduction": reduction}
    assert_equals(dpo_loss, plain_dpo, tensors, **options)


@REDUCTIONS
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("gamma", [0.0, 1.6])
def test_simpo_loss_is_the_papers(gamma, label_smoothing, reduction):
    options = {"gamma": gamma, "label_smoothing": label_smoothing, "reduction": reduction}
    assert_equals(simpo_loss, plain_simpo, responses("chosen", "rejected", scale=3.0), **options)


@REDUCTIONS
@pytest.mark.parametrize("names", [("chosen", "rejected"), ("chosen", "rejected", "nll")], ids=len)
def test_orpo_loss_is_the_papers(names, reduction):
    assert_equals(orpo_loss, plain_orpo, responses(*names, scale=3.0), beta=0.2, reduction=reduction)


@REDUCTIONS
@pytest.mark.parametrize("kl", [0.0, torch.tensor(0.7)], ids=str)
def test_kto_loss_is_the_papers(kl, reduction):
    tensors = responses("logprobs", "ref_logprobs") | {
        "desirable": torch.tensor([True, False, False, True, True, False])
    }
    options = {"kl": kl, "desirable_weight": 1.3, "undesirable_weight": 0.8, "reduction": reduction}
    assert_equals(kto_loss, plain_kto, tensors, **options)


def test_kto_loss_gives_the_divergence_no_gradient():
    kl = torch.tensor(0.5, requires_grad=True)
    assert not kto_loss(-torch.ones(2), -torch.ones(2), torch.tensor([True, False]), kl).requires_grad


def test_preference_losses_stay_finite_where_one_response_is_far_likelier():
    far = torch.tensor([-1e-6, -900.0])
    for loss in (simpo_loss(far, far.flip(0)), orpo_loss(far, far.flip(0)), dpo_loss(far, far.flip(0), far, -far)):
        assert loss.isfinite()


def completions():
    mask = torch.ones(B, T)
    mask[0, 3:] = mask[1, 10:] = mask[4] = 0
    old = -3 * torch.rand(B, T)
    return {
        "logprobs": old + 0.3 * torch.randn(B, T),
        "advantages": torch.randn(B),
        "mask": mask.bool(),
        "old_logprobs": old,
        "ref_logprobs": old + 0.3 * torch.randn(B, T),
    }


def plain_grpo(
    logprobs, advantages, mask, old_logprobs, ref_logprobs, *, beta=0.0, epsilon=0.2, epsilon_high=None,
    loss_type="dapo", num_tokens=None, max_completion_length=None, sequence_level=False,
):  # fmt: skip
    """A sequence at a time."""
    of_sequences, counts = [], []
    for lp, a, m, old, ref in zip(logprobs, advantages, mask, old_logprobs, ref_logprobs, strict=True):
        lp, old, ref, a = (x[m] for x in (lp, old, ref, a.expand(m.shape)))
        if not len(lp):
            continue
        ratio = torch.exp(lp - old)
        if sequence_level:
            ratio = torch.exp((lp - old).mean()).expand(len(lp))
        clipped = ratio.clip(1 - epsilon, 1 + (epsilon_high or epsilon))
        kl = torch.exp(ref - lp) - (ref - lp) - 1
        of_sequences.append((-torch.minimum(ratio * a, clipped * a) + beta * kl).sum())
        counts.append(len(lp))
    if loss_type == "grpo":
        return sum(x / n for x, n in zip(of_sequences, counts, strict=True)) / B
    return (
        sum(of_sequences) / {"dapo": num_tokens or sum(counts), "dr_grpo": B * (max_completion_length or T)}[loss_type]
    )


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize(
    "options",
    [{}, {"beta": 0.04}, {"epsilon_high": 0.28, "beta": 0.1}, {"sequence_level": True, "epsilon": 0.05}],
    ids=str,
)
def test_grpo_loss_is_the_papers(options, loss_type):
    assert_equals(grpo_loss, plain_grpo, completions(), loss_type=loss_type, **options)


def test_grpo_loss_divides_by_what_is_given():
    given = completions()
    assert_equals(grpo_loss, plain_grpo, given, num_tokens=100)
    assert_equals(grpo_loss, plain_grpo, given, loss_type="dr_grpo", max_completion_length=40)


def test_grpo_loss_takes_an_advantage_of_each_token():
    given = completions()
    of_tokens = given | {"advantages": given["advantages"][:, None].expand(B, T)}
    assert torch.equal(grpo_loss(**given), grpo_loss(**of_tokens))


def test_grpo_loss_of_the_sampling_policy_is_the_policy_gradient():
    given = completions()
    logprobs = given["logprobs"].requires_grad_()
    loss = grpo_loss(logprobs, given["advantages"], given["mask"])
    (gradient,) = torch.autograd.grad(loss, logprobs)
    expected = -given["advantages"][:, None] * given["mask"] / given["mask"].sum()
    torch.testing.assert_close(gradient, expected)


# TRL's own


def trl_method(module, name, **attributes):
    """A loss of one of TRL's trainers, on a stand-in for the trainer."""
    trainer = getattr(pytest.importorskip(f"trl.{module}"), name.split(".")[0])
    self = types.SimpleNamespace(accelerator=types.SimpleNamespace(device="cpu"), **attributes)
    return lambda *args: getattr(trainer, name.split(".")[1])(self, *args)


def test_orpo_loss_equals_trls():
    given = responses("chosen", "rejected", scale=3.0)
    theirs = trl_method("experimental.orpo", "ORPOTrainer.odds_ratio_loss", beta=0.2)
    nll = torch.tensor(1.5)
    expected = nll - theirs(given["chosen"], given["rejected"])[0].mean()
    torch.testing.assert_close(orpo_loss(**given, nll=nll, beta=0.2), expected)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_simpo_loss_equals_trls(label_smoothing):
    given = responses("chosen", "rejected", scale=3.0)
    theirs = trl_method(
        "experimental.cpo", "CPOTrainer.cpo_loss", alpha=0.0, loss_type="simpo", beta=2.0, simpo_gamma=1.2,
        label_smoothing=label_smoothing,
    )  # fmt: skip
    ours = simpo_loss(**given, gamma=1.2, label_smoothing=label_smoothing, reduction="none")
    torch.testing.assert_close(ours, theirs(given["chosen"], given["rejected"])[0])


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("sequence_level", [False, True])
def test_grpo_loss_equals_trls(sequence_level, loss_type):
    trl = pytest.importorskip("trl.trainer.grpo_trainer")
    given = completions()
    nothing = types.SimpleNamespace()
    trainer = types.SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (given["logprobs"], torch.zeros(B, T), None),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        importance_sampling_level="sequence" if sequence_level else "token", beta=0.04, epsilon_low=0.2,
        epsilon_high=0.28, loss_type=loss_type, use_vllm=False, max_completion_length=40,
        args=types.SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        accelerator=types.SimpleNamespace(
            num_processes=1, device="cpu", gather=lambda x: x, reduce=lambda x, reduction: x, sync_gradients=True
        ), _entropy_bonus_enabled=False,
        model=types.SimpleNamespace(training=True), current_gradient_accumulation_steps=1, _metrics=Metrics(),
    )  # fmt: skip
    mask = given["mask"].long()
    inputs = {
        "prompt_ids": torch.zeros(B, 2).long(), "prompt_mask": torch.ones(B, 2).long(),
        "completion_ids": torch.zeros(B, T).long(), "completion_mask": mask,
        "advantages": given["advantages"], "old_per_token_logps": given["old_logprobs"],
        "ref_per_token_logps": given["ref_logprobs"], "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    expected = trl.GRPOTrainer._compute_loss(trainer, nothing, inputs)
    options = {"loss_type": loss_type, "max_completion_length": 40, "sequence_level": sequence_level}
    torch.testing.assert_close(grpo_loss(**given, beta=0.04, epsilon_high=0.28, **options), expected)


class Metrics(dict):
    """Takes whatever a trainer notes."""

    def __missing__(self, key):
        self[key] = Metrics() if key in ("train", "eval") else []
        return self[key]


# Distillation

C, V, N = 12, 43, 17


def heads(dtype=torch.float32):
    return {
        "input": torch.randn(N, C).to(dtype),
        "linear_weight": (torch.randn(V, C) / C**0.5).to(dtype),
        "linear_bias": torch.randn(V).to(dtype),
    }, {
        "teacher_input": torch.randn(N, 2 * C).to(dtype),
        "teacher_weight": (torch.randn(V, 2 * C) / C**0.5).to(dtype),
        "teacher_bias": torch.randn(V).to(dtype),
    }


def plain_distillation(
    input, linear_weight, linear_bias, teacher_input, teacher_weight, teacher_bias, mask, temperature=1.0,
    reverse=False, reduction="mean",
):  # fmt: skip
    wide = torch.promote_types(input.dtype, torch.float32)
    dtype = torch.float64 if input.dtype == torch.float64 else teacher_input.dtype
    z = F.linear(input, linear_weight, linear_bias).to(wide) / temperature
    y = F.linear(*(x.to(dtype) for x in (teacher_input, teacher_weight, teacher_bias))).to(wide) / temperature
    p, q = (y.log_softmax(-1), z.log_softmax(-1))[:: -1 if reverse else 1]
    total = (p.exp() * (p - q)).sum(-1)[mask].sum()
    return total / mask.sum() if reduction == "mean" else total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 5, 512])
@pytest.mark.parametrize("options", [{}, {"temperature": 2.0}, {"reduction": "sum"}], ids=str)
@pytest.mark.parametrize("reverse", [False, True])
def test_distillation_loss_and_gradients_match_pytorch(reverse, options, rows, dtype, monkeypatch):
    monkeypatch.setattr(_chunks, "has_bf16_units", lambda: is_loaded("cpu"))
    student, teacher = heads(dtype)
    options = options | {"reverse": reverse, "mask": torch.rand(N) < 0.7, **teacher}
    found = evaluated(distillation_loss, student, dtype, memory_budget=4 * V * rows, **options)
    theirs, truth = (evaluated(plain_distillation, student, of, **options) for of in (dtype, torch.float64))
    for name, *results in zip(("loss", "dinput", "dweight", "dbias"), found, theirs, truth, strict=True):
        assert_accurate(*results, name)


@pytest.mark.parametrize("reverse", [False, True])
def test_distillation_loss_equals_trls(reverse):
    trl = pytest.importorskip("trl.experimental.gkd")
    (student, teacher), labels = heads(), torch.randint(V, (1, N))
    labels[0, ::3] = -100
    z, y = F.linear(*student.values()), F.linear(*teacher.values())
    expected = trl.GKDTrainer.generalized_jsd_loss(z[None], y[None], labels, beta=float(reverse), temperature=1.5)
    ours = distillation_loss(**student, **teacher, mask=labels[0] != -100, reverse=reverse, temperature=1.5)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("reverse", [False, True])
def test_distillation_from_itself_costs_nothing(reverse):
    student, _ = heads()
    same = {"teacher_input": student["input"], "teacher_weight": student["linear_weight"]}
    same |= {"teacher_bias": student["linear_bias"]}
    loss, *gradients = evaluated(distillation_loss, student, torch.float32, reverse=reverse, **same)
    assert abs(float(loss)) < 1e-6
    assert all(x.abs().max() < 1e-6 for x in gradients)


@pytest.mark.parametrize("reverse", [False, True])
def test_distillation_leaves_out_what_neither_gives_a_chance(reverse):
    student, teacher = heads()
    student["linear_bias"][40:] = teacher["teacher_bias"][40:] = -torch.inf
    loss, *gradients = evaluated(distillation_loss, student, torch.float32, reverse=reverse, **teacher)
    short = {name: x[:40] if len(x) == V else x for name, x in (student | teacher).items()}
    few = {name: short.pop(name) for name in list(student)}
    expected, *_ = evaluated(distillation_loss, few, torch.float32, reverse=reverse, **short)
    torch.testing.assert_close(loss, expected)
    assert not any(x.isnan().any() for x in gradients)


def test_distillation_loss_compiles_in_one_graph_and_has_second_derivatives():
    student, teacher = heads()
    torch.compiler.reset()
    compiled = torch.compile(distillation_loss, fullgraph=True, backend="aot_eager")
    found = [evaluated(function, student, torch.float32, **teacher) for function in (distillation_loss, compiled)]
    assert all(map(torch.equal, *found))

    def second(function, dtype):
        given = [x.to(dtype).requires_grad_() for x in student.values()]
        first = torch.autograd.grad(function(*given), given, create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in first), given)

    def plain(*given):
        return plain_distillation(*given, *teacher.values(), torch.ones(N, dtype=torch.bool))

    def ours(input, linear_weight, linear_bias):
        return distillation_loss(input, linear_weight, linear_bias=linear_bias, **teacher)

    results = second(ours, torch.float32), second(plain, torch.float32), second(plain, torch.float64)
    for three in zip(*results, strict=True):
        assert_accurate(*three)


def test_distillation_op_passes_opcheck():
    student, teacher = heads()
    given = (*student.values(), *teacher.values(), torch.rand(N) < 0.5, 1.5, True, 4, True, True, True)
    torch.library.opcheck(losses.divergence_op.overload, given)


def test_distillation_loss_of_no_positions_is_zero():
    student, teacher = heads()
    found = evaluated(distillation_loss, student, torch.float32, mask=torch.zeros(N, dtype=torch.bool), **teacher)
    assert not any(x.any() for x in found)


def test_dpo_loss_over_linear_logprobs_has_the_gradients_of_the_logits():
    """The example at the top of fastlm/losses.py."""
    labels, is_prompt = torch.randint(V, (4, 9)), torch.arange(9).expand(4, 9) < torch.tensor([[3], [4], [3], [4]])
    tokens, refs = labels.masked_fill(is_prompt, -100), -30 * torch.rand(2, 2)

    def by_ours(hidden, head):
        chosen, rejected = linear_logprobs(hidden, head, tokens, shift=True).logprobs.sum(-1).chunk(2)
        return dpo_loss(chosen, rejected, *refs)

    def by_logits(hidden, head):
        logp = F.linear(hidden, head)[:, :-1].log_softmax(-1)
        of_tokens = logp.gather(-1, labels[:, 1:, None])[..., 0].masked_fill(is_prompt[:, 1:], 0)
        return plain_dpo(*of_tokens.sum(-1).chunk(2), *refs.to(hidden.dtype))

    assert_equals(by_ours, by_logits, {"hidden": torch.randn(4, 9, C), "head": torch.randn(V, C) / C**0.5})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: dpo_loss(x, x, x, x, label_smoothing=0.7), "dpo_loss: label_smoothing is 0.7, expected 0 to 0.5"),
        (lambda x: simpo_loss(x, x, reduction="max"), "simpo_loss: reduction is 'max', expected"),
        (lambda x: grpo_loss(x, x, x, loss_type="ppo"), "grpo_loss: loss_type is 'ppo', expected one of grpo, dapo"),
        (lambda x: grpo_loss(x, x, x, beta=0.1), "grpo_loss: beta is 0.1 and ref_logprobs is None"),
        (lambda x: distillation_loss(x, x, x, x, temperature=0), "distillation_loss: temperature is 0, expected"),
        (lambda x: distillation_loss(x, x, x, x[:1]), r"distillation_loss: teacher_weight \(1, 2\)"),
        (lambda x: distillation_loss(x, x, x, x, reduction="none"), "distillation_loss: reduction is 'none', expected"),
    ],
)
def test_losses_say_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(3, 2))


def test_every_loss_names_its_source():
    for name in losses.__all__:
        assert "arXiv" in inspect.getdoc(getattr(losses, name))
