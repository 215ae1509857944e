"""fastlm.kernels: the form that Hugging Face's `kernels` asks of layers, their values, and models that load them."""

import copy
import inspect
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastlm.kernels
from fastlm.kernels import LAYERS, can_replace, kernel_mapping, layers
from tests.support.accuracy import assert_accurate

pytest.importorskip("transformers", minversion="5")

import transformers
from transformers import activations
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.llama import modeling_llama
from transformers.models.phi3 import modeling_phi3
from transformers.utils import is_kernels_available

from fastlm.acceleration.verification import InFloat64
from tests.support.hugging_face import SIZES, batches, loss_and_gradients, made

DIRECTORY = Path(fastlm.kernels.__file__).parent
REPOSITORY = DIRECTORY.parents[1]
TRANSFORMERS = Path(transformers.__file__).parent
C, HIDDEN = 48, 80
FLOATS = [torch.float32, torch.bfloat16]


# The form


@pytest.mark.parametrize("layer", sorted({*LAYERS.values()}, key=lambda layer: layer.__name__))
def test_layers_are_pure(layer):
    """What `kernels` checks before it takes a layer, in its layer/layer.py."""
    assert layer.__init__ is nn.Module.__init__
    members, those_of_a_module = ({name for name, _ in inspect.getmembers(cls)} for cls in (layer, nn.Module))
    assert members - those_of_a_module == {"has_backward", "can_torch_compile"}
    assert layer.has_backward is True
    assert layer.can_torch_compile is True
    assert getattr(layers, layer.__name__) is layer, "`kernels` looks a layer up by its name in the module `layers`"


def test_builder_and_loader_are_told_the_same():
    general = tomllib.loads((DIRECTORY / "build.toml").read_text())["general"]
    metadata = json.loads((DIRECTORY / "metadata.json").read_text())
    assert metadata["id"].isidentifier()
    assert general["backends"] == [metadata["backend"]["type"]]
    for key in ("name", "version", "license"):
        assert general[key] == metadata[key]


def test_the_files_that_loader_builder_and_benchmark_read_are_there_and_in_the_wheel():
    packaged = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"][
        "fastlm"
    ]
    for name in ("kernels/build.toml", "kernels/metadata.json"):
        assert (DIRECTORY.parent / name).exists()
        assert name in packaged
    scripts = list((DIRECTORY / "benchmarks").glob("benchmark*.py"))
    assert scripts, "`kernels benchmark` runs these"
    classes = re.findall(r"^class (\w+)\(Forward, Benchmark\)", scripts[0].read_text(), re.MULTILINE)
    assert {*classes} <= {layer.__name__ for layer in LAYERS.values()}


def test_the_page_imports_what_is_there():
    page = (REPOSITORY / "docs" / "kernels-layout.md").read_text()
    imports = re.findall(r"^from fastlm.*", page, re.MULTILINE)
    assert len(imports) == 2
    for line in imports:
        exec(line)
    named = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| `[^|]*\|", page, re.MULTILINE)))
    assert {*named} == {*LAYERS}


# Names and arguments

ORIGINALS = {
    "RMSNorm": modeling_llama.LlamaRMSNorm,
    "LayerNorm": nn.LayerNorm,
    "GeLU": activations.GELUActivation,
    "GeluTanh": activations.GELUTanh,
    "NewGELU": activations.NewGELUActivation,
    "FastGELU": activations.FastGELUActivation,
    "SwiGLUMLP": modeling_llama.LlamaMLP,
    "GeGLUMLP": modeling_gemma3.Gemma3MLP,
}
NOT_OF_TRANSFORMERS = {"LayerNorm", "SiluAndMul"}  # names that other libraries and the documentation of `kernels` use


def test_the_names_are_those_of_transformers():
    hub = (TRANSFORMERS / "integrations" / "hub_kernels.py").read_text()
    models = [TRANSFORMERS / "models" / name / f"modeling_{name}.py" for name in ("llama", "qwen3_5")]
    decorated = "".join(path.read_text() for path in (*models, TRANSFORMERS / "activations.py") if path.exists())
    for name in LAYERS.keys() - NOT_OF_TRANSFORMERS:
        assert f'            "{name}": {{' in hub or f'use_kernel_forward_from_hub("{name}")' in decorated, name


@pytest.mark.parametrize("name", ORIGINALS)
def test_forwards_take_the_arguments_of_those_they_replace(name):
    ours, theirs = (inspect.signature(cls.forward).parameters.values() for cls in (LAYERS[name], ORIGINALS[name]))
    assert [(p.name, p.kind) for p in ours] == [(p.name, p.kind) for p in theirs]


def test_functions_take_the_arguments_of_those_they_replace():
    for name, function in (
        ("rotary_pos_emb", modeling_llama.apply_rotary_pos_emb),
        ("ForCausalLMLoss", ForCausalLMLoss),
    ):
        _, *ours = inspect.signature(LAYERS[name].forward).parameters.values()
        theirs = inspect.signature(original_of(function)).parameters.values()
        assert [(p.name, p.kind, p.default) for p in ours] == [(p.name, p.kind, p.default) for p in theirs]


def original_of(function):
    """The function itself: with `kernels` installed transformers makes a module of it."""
    return (
        inspect.getclosurevars(type(function).forward).nonlocals["func"]
        if isinstance(function, nn.Module)
        else function
    )


# Values and gradients


class ZeroCentered(nn.Module):
    """As Qwen3_5RMSNorm."""

    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(C)), 1e-5

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return (y * (1.0 + self.weight.float())).type_as(x)


class Halves(nn.Module):
    def forward(self, input):
        gate, up = input.chunk(2, dim=-1)
        return F.silu(gate) * up


def original(name):
    mlp = {"hidden_size": C, "intermediate_size": HIDDEN}
    if name == "SwiGLUMLP":
        return modeling_llama.LlamaMLP(transformers.LlamaConfig(**SIZES | mlp))
    if name == "GeGLUMLP":
        return modeling_gemma3.Gemma3MLP(transformers.Gemma3TextConfig(**SIZES | mlp))
    if name in ("RMSNormZeroCentered", "SiluAndMul"):
        return {"RMSNormZeroCentered": ZeroCentered, "SiluAndMul": Halves}[name]()
    return ORIGINALS[name](C) if "Norm" in name else ORIGINALS[name]()


def replaced(module, layer):
    """A copy of module with the forward of ours, put there as `kernels` does."""
    module = copy.deepcopy(module)
    module.forward = MethodType(layer.forward, module)
    return module


def run(module, x, upstream):
    module.zero_grad()
    x = x.detach().requires_grad_()
    y = module(x)
    y.backward(upstream.to(y.dtype))
    return {"y": y.detach(), "dx": x.grad, **{name: p.grad.clone() for name, p in module.named_parameters()}}


@pytest.mark.parametrize("dtypes", [*zip(FLOATS, FLOATS, strict=True), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("name", sorted(LAYERS.keys() - {"rotary_pos_emb", "ForCausalLMLoss"}))
def test_layers_give_values_gradients_and_dtype_of_the_original(kernel_device, name, dtypes):
    dtype, weight_dtype = dtypes
    if "MLP" in name and dtype != weight_dtype:
        pytest.skip("torch.nn.Linear takes one dtype")
    theirs = original(name).to(kernel_device, weight_dtype)
    for parameter in theirs.parameters():
        parameter.data.copy_(torch.randn(parameter.shape))
    x = torch.randn(2, 3, C, device=kernel_device).to(dtype)
    upstream = torch.randn(2, 3, C // 2 if name == "SiluAndMul" else C, device=kernel_device)
    expected, found = run(theirs, x, upstream), run(replaced(theirs, LAYERS[name]), x, upstream)
    with InFloat64():
        truth = run(copy.deepcopy(theirs).double(), x.double(), upstream)
    for part in truth:
        assert_accurate(found[part], expected[part], truth[part], part)


def angles(B, T, D, dtype, columns):
    turns = torch.outer(torch.arange(float(T)), 100.0 ** (-torch.arange(D // 2) / D)) + torch.arange(B)[:, None, None]
    turns = torch.cat((turns, turns), -1)[..., :columns]
    return turns.cos().to(dtype), turns.sin().to(dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("unsqueeze_dim", [1, 2])
def test_rotary_gives_values_and_gradients_of_the_original(kernel_device, dtype, rows, unsqueeze_dim):
    B, T, H, Hk, D = 2, 7, 4, 2, 16
    function, ours = original_of(modeling_llama.apply_rotary_pos_emb), layers.RotaryPosEmb()
    shapes = [(B, n, T, D) if unsqueeze_dim == 1 else (B, T, n, D) for n in (H, Hk)]
    q, k, *upstream = (torch.randn(shape).to(kernel_device, dtype) for shape in shapes * 2)
    cos, sin = (x.to(kernel_device) for x in angles(rows, T, D, dtype, D))

    def values_and_gradients(function, dtype):
        tensors = [x.detach().to(dtype).requires_grad_() for x in (q, k)]
        results = function(*tensors, cos.to(dtype), sin.to(dtype), unsqueeze_dim=unsqueeze_dim)
        return [*results, *torch.autograd.grad(results, tensors, [dy.to(dtype) for dy in upstream])]

    parts = (values_and_gradients(*of) for of in ((ours, dtype), (function, dtype), (function, torch.float64)))
    for results in zip(*parts, strict=True):
        assert_accurate(*results)


def test_rotary_takes_angles_of_pairs_alone():
    q, k = torch.randn(2, 4, 7, 16), torch.randn(2, 2, 7, 16)
    whole, pairs = (layers.RotaryPosEmb()(q, k, *angles(1, 7, 16, torch.float32, columns)) for columns in (16, 8))
    assert torch.equal(whole[0], pairs[0])
    assert torch.equal(whole[1], pairs[1])


def test_rotary_names_a_dimension_that_it_does_not_take():
    q = torch.randn(2, 4, 7, 16)
    with pytest.raises(ValueError, match="RotaryPosEmb: unsqueeze_dim is 0, expected 1 or 2"):
        layers.RotaryPosEmb()(q, q, *angles(1, 7, 16, torch.float32, 16), unsqueeze_dim=0)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("options", [{}, {"num_items_in_batch": torch.tensor(5)}, {"num_items_in_batch": 4}, "shifted"])
def test_the_loss_of_a_causal_model_gives_value_and_gradient_of_the_original(dtype, options):
    logits, labels = torch.randn(2, 9, 31).to(dtype), torch.randint(31, (2, 9))
    labels[0, :4] = -100
    arguments = {"labels": labels, "vocab_size": 31, **({} if options == "shifted" else options)}
    if options == "shifted":
        arguments.update(labels=None, shift_labels=labels)

    def value_and_gradient(function, dtype):
        given = logits.detach().to(dtype).requires_grad_()
        before = given.detach().clone()
        loss = function(given, **arguments)
        (gradient,) = torch.autograd.grad(loss, given)
        assert torch.equal(given, before), "the logits are the caller's"
        return loss.detach(), gradient

    function = original_of(ForCausalLMLoss)
    with InFloat64():
        truth = value_and_gradient(function, torch.float64)
    parts = (value_and_gradient(run, dtype) for run in (layers.ForCausalLMLoss(), function))
    for results in zip(*parts, truth, strict=True):
        assert_accurate(*results)


# What kernel_mapping finds


def registered(function_or_class, name):
    """As `kernels` registers it: a function becomes a module that calls it."""
    if not inspect.isclass(function_or_class):
        function = function_or_class

        class Func(nn.Module):
            def forward(self, *args, **named):
                return function(*args, **named)

        of_self = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        parameters = [of_self, *inspect.signature(function).parameters.values()]
        Func.forward.__signature__ = inspect.Signature(parameters)
        function_or_class = Func
    function_or_class.kernel_layer_name = name
    return function_or_class()


def neighbours(q, k, cos, sin, unsqueeze_dim=1):
    """As in openai_privacy_filter, under the same name: a pair is (x_2i, x_2i+1)."""

    def turned(x):
        x1, x2 = x[..., ::2], x[..., 1::2]
        c, s = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return torch.stack((x1 * c - x2 * s, x2 * c + x1 * s), -1).flatten(-2)

    return turned(q), turned(k)


def test_mapping_names_what_can_be_replaced_and_nothing_else():
    class Gelu(nn.Module):
        def forward(self, input):
            return F.gelu(input)

    class GeluOfTwo(nn.Module):
        def forward(self, input, scale):
            return scale * F.gelu(input, approximate="tanh")

    class Other(nn.Module):
        def forward(self, x):
            return x

    model = nn.Sequential(registered(Gelu, "GeLU"), registered(GeluOfTwo, "GeluTanh"), registered(Other, "Other"))
    assert kernel_mapping(model) == {"GeLU": f"{DIRECTORY}:GeLU"}
    with pytest.raises(
        ValueError, match="kernel_mapping: Linear has no layer of ours registered by name, expected one"
    ):
        kernel_mapping(nn.Linear(2, 2))


def of_pairs(q, k, cos, sin, unsqueeze_dim=1):
    """As in gpt_oss: cos and sin have a column for every pair."""
    whole = (torch.cat((x, x), -1) for x in (cos, sin))
    return original_of(modeling_llama.apply_rotary_pos_emb)(q, k, *whole, unsqueeze_dim=unsqueeze_dim)


def test_mapping_leaves_out_rotary_embeddings_that_pair_neighbours_or_turn_a_part():
    rotary, part = (original_of(file.apply_rotary_pos_emb) for file in (modeling_llama, modeling_phi3))
    found = {of: can_replace(layers.RotaryPosEmb, registered(of, "rotary_pos_emb")) for of in (rotary, of_pairs)}
    assert all(found.values())
    assert not can_replace(layers.RotaryPosEmb, registered(neighbours, "rotary_pos_emb"))
    assert not can_replace(layers.RotaryPosEmb, registered(part, "rotary_pos_emb"))


def test_rotary_refuses_angles_of_a_part_of_the_features():
    q = torch.randn(2, 4, 7, 16)
    with pytest.raises(ValueError, match="RotaryPosEmb: cos has 12 columns, expected 16, the features of a head, or 8"):
        layers.RotaryPosEmb()(q, q, *angles(1, 7, 16, torch.float32, 12))


def llama_mlp(activation):
    sizes = SIZES | {"hidden_size": C, "intermediate_size": HIDDEN, "hidden_act": activation}
    return modeling_llama.LlamaMLP(transformers.LlamaConfig(**sizes))


class RoundedFirst(modeling_llama.LlamaRMSNorm):
    """As in Olmo2: the result has the dtype of the input, whatever that of the weight."""

    def forward(self, hidden_states):
        return super().forward(hidden_states).to(hidden_states.dtype)


class PlusOne(modeling_llama.LlamaRMSNorm):
    def forward(self, hidden_states):
        return super().forward(hidden_states) / self.weight * (1 + self.weight)


@pytest.mark.parametrize(
    ("ours", "make", "expected"),
    [
        ("SwiGLUMLP", lambda: llama_mlp("silu"), True),
        ("SwiGLUMLP", lambda: llama_mlp("gelu_pytorch_tanh"), False),
        ("GeGLUMLP", lambda: llama_mlp("gelu_pytorch_tanh"), True),
        ("GeGLUMLP", lambda: llama_mlp("gelu"), False),
        ("RMSNorm", lambda: modeling_llama.LlamaRMSNorm(C), True),
        ("RMSNorm", lambda: RoundedFirst(C), False),
        ("RMSNorm", lambda: PlusOne(C), False),
        ("LayerNorm", lambda: nn.LayerNorm(C), True),
        ("LayerNorm", lambda: nn.LayerNorm(C, bias=False), True),
        ("GeLU", nn.GELU, True),
        ("GeLU", lambda: nn.GELU(approximate="tanh"), False),
        ("SiluAndMul", Halves, True),
    ],
)
def test_a_layer_is_replaced_if_it_computes_the_same(ours, make, expected):
    theirs = make().to("meta")
    assert can_replace(LAYERS[ours], theirs) is expected


# Models that load the layers by `kernels`


@pytest.fixture
def kernelized(monkeypatch):
    """Replaces layers of a model by `kernels`, from the directory, in training on a CPU.

    transformers registers its layers only beside the version of `kernels` that it asks for; here the test does.
    """
    kernels = pytest.importorskip("kernels")
    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "kernel_layer_name", "RMSNorm", raising=False)
    monkeypatch.setattr(modeling_llama.LlamaMLP, "kernel_layer_name", "SwiGLUMLP", raising=False)
    monkeypatch.setattr(modeling_gemma3.Gemma3MLP, "kernel_layer_name", "GeGLUMLP", raising=False)

    def replace(model, mode=kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE):
        mapping = {}
        for name, location in kernel_mapping(model).items():
            path, layer = location.split(":")
            mapping[name] = {"cpu": {mode: kernels.LocalLayerRepository(repo_path=Path(path), layer_name=layer)}}
        with kernels.use_kernel_mapping(mapping, inherit_mapping=False):
            return kernels.kernelize(model, mode=mode, device="cpu", use_fallback=True)

    return replace


def forwards(model):
    """The functions that run as the forward of the modules of model."""
    return {getattr(module.forward, "__func__", None) for module in model.modules()}


@pytest.mark.parametrize(("name", "expected"), [("llama", {"RMSNorm", "SwiGLUMLP"}), ("gemma3", {"GeGLUMLP"})])
def test_a_model_with_these_layers_gives_loss_and_gradients_of_its_own(kernelized, name, expected):
    model = made(name)
    ours, truth = kernelized(copy.deepcopy(model)), copy.deepcopy(model).double()
    assert {LAYERS[name].forward for name in expected} <= forwards(ours)
    assert not {layer.forward for layer in LAYERS.values()} & forwards(model)
    _, batch = next(batches(name))
    with InFloat64():
        exact = loss_and_gradients(truth, batch)
    theirs, found = loss_and_gradients(model, batch), loss_and_gradients(ours, batch)
    for part in exact:
        assert_accurate(found[part], theirs[part], exact[part], part)


def test_a_model_with_these_layers_compiles_whole(kernelized):
    model = made("llama")
    ours = kernelized(copy.deepcopy(model))
    _, batch = next(batches("llama"))
    compiled = loss_and_gradients(torch.compile(ours, fullgraph=True, backend="aot_eager"), batch)
    eager = loss_and_gradients(ours, batch)
    assert torch.allclose(compiled["loss"], eager["loss"])
    assert {name.removeprefix("_orig_mod.") for name in compiled} == {*eager}


def test_the_rust_parsers_of_kernels_take_both_files():
    rust = pytest.importorskip("kernels._rust")
    if not hasattr(rust, "Build"):
        pytest.skip("this version of `kernels` has no parser of build.toml")
    assert [str(backend) for backend in rust.Build.open(DIRECTORY).general.backends] == ["cuda"]
    assert rust.Metadata.read_from_file(DIRECTORY / "metadata.json").id == "fastlm_kernels"


@pytest.fixture
def by_transformers(monkeypatch):
    """Replaces layers of a model by KernelConfig, on a CPU."""
    from transformers.utils import kernel_config

    if not is_kernels_available():
        pytest.skip("another version of `kernels` than transformers asks for: the last test here runs this one")
    # transformers' list has every device but this one; `kernels` takes it.
    monkeypatch.setattr(kernel_config, "KERNELS_SUPPORTED_DEVICE_TYPES", ["cpu"])

    def replace(model):
        model.set_use_kernels(True, transformers.KernelConfig(kernel_mapping(model), use_local_kernel=True))
        return model

    yield replace
    rotary = made("qwen3").model.layers[0].self_attn._kernel_funcs["rotary_pos_emb"]
    rotary.forward = MethodType(type(rotary).forward, rotary)  # all models of one file share it


def test_transformers_loads_the_layers_by_its_kernel_config(by_transformers):
    model = made("qwen3")
    _, batch = next(batches("qwen3"))
    theirs = loss_and_gradients(model, batch)
    with InFloat64():
        exact = loss_and_gradients(copy.deepcopy(model).double(), batch)
    ours = by_transformers(copy.deepcopy(model))
    assert LAYERS["RMSNorm"].forward in forwards(ours)
    rotary = ours.model.layers[0].self_attn._kernel_funcs["rotary_pos_emb"]
    assert rotary.forward.__func__ is LAYERS["rotary_pos_emb"].forward
    found = loss_and_gradients(ours, batch)
    for part in exact:
        assert_accurate(found[part], theirs[part], exact[part], part)


def test_layers_loaded_in_training_stay_in_evaluation_and_those_loaded_there_do_not_train(by_transformers):
    assert LAYERS["RMSNorm"].forward in forwards(by_transformers(made("qwen3").train()).eval())
    in_evaluation = by_transformers(made("qwen3").eval())
    assert LAYERS["RMSNorm"].forward in forwards(in_evaluation)
    assert LAYERS["RMSNorm"].forward not in forwards(in_evaluation.train())


def test_transformers_loads_the_layers_beside_the_kernels_that_is_installed():
    """The two tests above in a process of its own, for transformers registers its layers when it is imported."""
    pytest.importorskip("kernels")
    if is_kernels_available():
        pytest.skip("the tests above ran")
    options = ["-o", "addopts=", "-p", "tests.support.installed_kernels", "-p", "no:cacheprovider"]
    chosen = ["-k", "by_its_kernel_config or loaded_in_training", "-W", "ignore", __file__]
    found = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *chosen], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert "2 passed" in found.stdout, found.stdout
