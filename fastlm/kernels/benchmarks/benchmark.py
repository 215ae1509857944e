"""What `kernels benchmark` runs: each layer's forward, timed and compared beside PyTorch's, in bfloat16.

    kernels benchmark "$(python -c 'import fastlm.kernels; print(fastlm.kernels.__path__[0])')"

Source of the form: https://huggingface.co/docs/kernels/cli-benchmark.
"""

from typing import Any

import torch
import torch.nn.functional as F
from kernels.benchmark import Benchmark
from torch import Tensor, nn

ROWS, C, V = 8192, 4096, 32768
B, T, H, HK, D = 2, 4096, 32, 8, 128


class Forward:
    """The one workload of each class below. A class of its own: the runner runs every subclass of Benchmark it sees."""

    seed = 0
    device: str
    kernel: Any
    layer: Any
    inputs: tuple[Any, ...]
    out: Any

    def drawn(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=torch.bfloat16)

    def reference(self, *inputs: Any) -> Any:
        raise NotImplementedError

    def benchmark_forward(self) -> None:
        self.out = self.layer(*self.inputs)

    def verify_forward(self) -> Any:
        return self.reference(*self.inputs)


class RMSNorm(Forward, Benchmark):
    def setup(self) -> None:
        self.layer, self.inputs = self.kernel.layers.RMSNorm(), (self.drawn(ROWS, C),)
        self.layer.weight = nn.Parameter(self.drawn(C) / 16)  # small: the runner allows an error of 0.01
        self.layer.variance_epsilon = 1e-6

    def reference(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (C,), self.layer.weight, 1e-6)


class LayerNorm(Forward, Benchmark):
    def setup(self) -> None:
        self.layer, self.inputs = self.kernel.layers.LayerNorm(), (self.drawn(ROWS, C),)
        self.layer.weight, self.layer.bias = (nn.Parameter(self.drawn(C) / 16) for _ in range(2))
        self.layer.normalized_shape, self.layer.eps = (C,), 1e-5

    def reference(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (C,), self.layer.weight, self.layer.bias, 1e-5)


class GeluTanh(Forward, Benchmark):
    def setup(self) -> None:
        self.layer, self.inputs = self.kernel.layers.GeluTanh(), (self.drawn(ROWS, C) / 4,)

    def reference(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")


class SiluAndMul(Forward, Benchmark):
    def setup(self) -> None:
        self.layer, self.inputs = self.kernel.layers.SiluAndMul(), (self.drawn(ROWS, 2 * C) / 4,)

    def reference(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up


class RotaryPosEmb(Forward, Benchmark):
    def setup(self) -> None:
        angles = torch.rand(1, T, D // 2, device=self.device).repeat(1, 1, 2)
        q, k = self.drawn(B, H, T, D) / 4, self.drawn(B, HK, T, D) / 4
        self.layer = self.kernel.layers.RotaryPosEmb()
        self.inputs = (q, k, angles.cos().bfloat16(), angles.sin().bfloat16())

    def benchmark_forward(self) -> None:
        self.out, _ = self.layer(*self.inputs)

    def reference(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        (q1, q2), (k1, k2) = q.chunk(2, -1), k.chunk(2, -1)
        rotated_q, _ = q * cos + torch.cat((-q2, q1), -1) * sin, k * cos + torch.cat((-k2, k1), -1) * sin
        return rotated_q


class ForCausalLMLoss(Forward, Benchmark):
    def setup(self) -> None:
        self.layer = self.kernel.layers.ForCausalLMLoss()
        self.inputs = (self.drawn(1, ROWS, V), torch.randint(V, (1, ROWS), device=self.device), V)

    def reference(self, logits: Tensor, labels: Tensor, vocab_size: int) -> Tensor:
        return F.cross_entropy(logits[0, :-1].float(), labels[0, 1:])
