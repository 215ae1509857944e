import pytest
import torch

from fastlm.models import GPT, GPTConfig
from fastlm.train import TrainConfig, precision
from fastlm.train.precision import choose_precision
from fastlm.wording import quantity
from tests.support.toy import ToyBatch, ToyLoader, toy_trainer


def test_choose_takes_fp32_on_a_cpu_and_says_why():
    precision = choose_precision(TrainConfig(device="cpu"))
    assert (precision.precision, str(precision.device)) == ("fp32", "cpu")
    assert str(precision).startswith(f"fp32 on cpu with {quantity(torch.get_num_threads(), 'thread')} (auto")


@pytest.mark.parametrize(
    ("features", "num_parameters", "chosen"),
    [
        ({"avx512_bf16"}, 500_000, "bf16"),
        ({"avx512_bf16"}, 499_999, "fp32"),
        ({"avx512_bf16", "amx_bf16"}, 10**9, "bf16"),
        ({"avx2"}, 10**9, "fp32"),
        ({"bf16"}, 10**9, "fp32"),  # of Arm, where nobody has measured
    ],
)
def test_choose_takes_bf16_on_a_cpu_where_it_pays(monkeypatch, features, num_parameters, chosen):
    monkeypatch.setattr(precision, "cpu_features", lambda: features)
    found = choose_precision(TrainConfig(device="cpu"), num_parameters=num_parameters)
    assert (found.precision, "bf16 hardware" in found.reason) == (chosen, True)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("fp32", torch.float32), ("bf16", torch.bfloat16), ("bf16-params", torch.bfloat16), ("fp16", torch.float16)],
)
def test_autocast_multiplies_in_the_precision_asked_for(precision, dtype):
    x = torch.ones(2, 2)
    with choose_precision(TrainConfig(device="cpu", precision=precision)).autocast():
        assert (x @ x).dtype == dtype


def test_only_fp16_scales_its_losses():
    scaled = {
        p: choose_precision(TrainConfig(device="cpu", precision=p)).loss_scale().enabled
        for p in ("fp32", "bf16", "bf16-params", "fp16")
    }
    assert scaled == {"fp32": False, "bf16": False, "bf16-params": False, "fp16": True}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": "gpu"}, "device is 'gpu', expected auto, cpu, cuda"),
        ({"device": "meta"}, "device is 'meta', expected auto, cpu, cuda"),
        ({"device": "cuda:99"}, "device is cuda:99, but this machine has"),
        ({"device": "cpu", "precision": "tf32"}, "tf32 needs a CUDA device"),
    ],
)
def test_choose_refuses_what_the_machine_cannot_do(change, message):
    with pytest.raises(ValueError, match=message):
        choose_precision(TrainConfig(**change))


V, T = 32, 16


def noisy_batch(index, rows=8):
    """Rows in which a token follows from the one before, but for a fifth that are drawn: there is a loss to reach."""
    generator = torch.Generator().manual_seed(index)
    rows_of = torch.randint(V, (rows, T + 1), generator=generator)
    drawn = torch.rand(rows, T + 1, generator=generator) < 0.2
    for t in range(1, T + 1):
        rows_of[:, t] = torch.where(drawn[:, t], rows_of[:, t], (rows_of[:, t - 1] * 5 + 3) % V)
    boundaries = torch.arange(0, rows * T + 1, T, dtype=torch.int32)
    return ToyBatch(
        rows_of[:, :-1].contiguous(), rows_of[:, 1:].contiguous(), torch.arange(T).expand(rows, T), boundaries
    )


class NoisyLoader(ToyLoader):
    def __next__(self):
        self.position += 1
        return noisy_batch(self.position)


def held_out_loss(out, precision):
    """Of a small GPT after training."""
    torch.manual_seed(3)
    shape = {"vocab_size": V, "sequence_length": T, "num_layers": 2, "num_heads": 2, "hidden_size": 32}
    model = GPT(GPTConfig.llama(**shape))
    held_out = [noisy_batch(index) for index in range(10_000, 10_008)]
    changes = {"steps": 80, "log_interval": 80, "precision": precision}
    return toy_trainer(out, model=model, loader=NoisyLoader(), eval_loader=held_out, **changes).fit().evaluation.loss


@pytest.fixture(scope="module")
def fp32_loss(tmp_path_factory):
    return held_out_loss(tmp_path_factory.mktemp("fp32"), "fp32")


@pytest.mark.parametrize("precision", ["bf16", "bf16-params", "fp16"])
def test_held_out_loss_in_low_precision_is_within_one_percent_of_fp32s(tmp_path, fp32_loss, precision):
    assert fp32_loss < 1.6  # of 3.47 at first
    assert held_out_loss(tmp_path, precision) == pytest.approx(fp32_loss, rel=0.01)
