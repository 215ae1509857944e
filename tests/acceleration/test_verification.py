"""verify judges every swapped layer on the inputs that it meets, and finds one that is wrong."""

import pytest
import torch
from torch import nn

import fastlm
from fastlm.acceleration import norms
from tests.acceleration.test_norms import C as WIDTH
from tests.acceleration.test_norms import Rms


def model():
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.GELU(), Rms())


def test_every_swapped_layer_is_judged():
    given = model()
    report = fastlm.verify(given, torch.randn(4, WIDTH))
    assert [(check.name, check.module) for check in report.checks] == [("1", "LayerNorm"), ("2", "GELU"), ("3", "Rms")]
    assert report.holds
    assert "TOO LARGE" not in str(report)
    assert not fastlm.accelerated(given).rows, "the model itself is left alone"
    assert type(given[1]) is nn.LayerNorm


def test_a_wrong_layer_is_found(monkeypatch):
    exact = norms.norm_of
    monkeypatch.setattr(norms, "norm_of", lambda *args, **named: exact(*args, **named) * (1 + 5e-5))
    report = fastlm.verify(model(), torch.randn(4, WIDTH))
    assert [check.name for check in report.checks if not check.holds] == ["3"]
    assert str(report).count("TOO LARGE") == 1


def test_a_batch_is_a_tensor_a_sequence_or_keywords():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(WIDTH)

        def forward(self, x, scale=1.0):
            return self.norm(x) * scale

    x = torch.randn(4, WIDTH)
    for batch in (x, [x, 2.0], {"x": x}):
        assert [check.name for check in fastlm.verify(Named(), batch).checks] == ["norm"]


@pytest.mark.parametrize(
    ("batch", "error", "said"),
    [
        (torch.randn(0, WIDTH), ValueError, r"holds a tensor of shape \(0, 48\)"),
        ({}, ValueError, "batch is empty"),
        (None, TypeError, "batch is of type NoneType"),
    ],
)
def test_a_batch_that_judges_nothing_is_refused(batch, error, said):
    with pytest.raises(error, match=f"verify: .*{said}"):
        fastlm.verify(model(), batch)


def test_a_layer_that_gets_no_rows_is_left_out():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

        def forward(self, x):
            return torch.cat([self.first(x), self.second(x[:0])])

    assert [check.name for check in fastlm.verify(Experts(), torch.randn(4, WIDTH)).checks] == ["first"]


def test_layers_with_dropout_are_judged_without_it():
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, dropout=0.5, batch_first=True)
    report = fastlm.verify(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), torch.randn(2, 4, WIDTH))
    assert "TransformerEncoderLayer" in {check.module for check in report.checks}
    assert report.holds
    assert all(check.allowed < 1e-3 for check in report.checks), "what dropout changes would allow any error"


def test_attention_and_loss_of_torch_are_judged_with_the_masks_that_they_meet():
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, 0.0, batch_first=True)
            self.encoder, self.loss = nn.TransformerEncoder(layer, 1), nn.CrossEntropyLoss()
            self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

        def forward(self, x, target, padding):
            x = self.attention(x, key=x, value=x, need_weights=False)[0]
            return self.loss(self.encoder(x, src_key_padding_mask=padding).flatten(0, 1), target)

    x, target = torch.randn(2, 5, WIDTH), torch.randint(WIDTH, (10,))
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    for given in (Classifier(), Classifier().eval()):  # in evaluation PyTorch's encoder would make a nested tensor
        report = fastlm.verify(given, (x, target, padding))
        classes = {check.module for check in report.checks}
        assert {"TransformerEncoderLayer", "MultiheadAttention", "CrossEntropyLoss"} <= classes
        assert report.holds


def test_bfloat16_models_of_hugging_face_are_judged():
    pytest.importorskip("transformers")
    from tests.support.hugging_face import VOCABULARY, made

    report = fastlm.verify(made("llama", torch.bfloat16).eval(), {"input_ids": torch.randint(3, VOCABULARY, (2, 9))})
    assert {check.module for check in report.checks} == {"LlamaRMSNorm", "LlamaMLP", "Linear"}
    assert report.holds
