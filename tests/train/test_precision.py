import pytest
import torch

from fastlm.train import TrainConfig
from fastlm.train.precision import choose_precision


def test_choose_takes_fp32_on_a_cpu_and_says_why():
    precision = choose_precision(TrainConfig(device="cpu"))
    assert (precision.precision, str(precision.device)) == ("fp32", "cpu")
    assert str(precision).startswith(f"fp32 on cpu with {torch.get_num_threads()} threads (auto")


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_autocast_multiplies_in_the_precision_asked_for(precision, dtype):
    x = torch.ones(2, 2)
    with choose_precision(TrainConfig(device="cpu", precision=precision)).autocast():
        assert (x @ x).dtype == dtype


def test_only_fp16_scales_its_losses():
    scaled = {
        p: choose_precision(TrainConfig(device="cpu", precision=p)).loss_scale().enabled
        for p in ("fp32", "bf16", "fp16")
    }
    assert scaled == {"fp32": False, "bf16": False, "fp16": True}


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
