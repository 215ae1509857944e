"""accelerate swaps layers in place and changes nothing else; restore takes it back; what cannot be swapped says why."""

import copy
import functools
import io
import pickle
import threading
import time
import types

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize

import fastlm
import fastlm.nn
from fastlm.ops import _dispatch

C = 32


class Block(nn.Module):
    """A block of torch.nn's layers, with a norm of its own kind."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(C), nn.RMSNorm(C)
        self.attention = nn.MultiheadAttention(C, 4, batch_first=True)
        self.feed_forward = nn.Sequential(nn.Linear(C, 2 * C), nn.GELU(), nn.Linear(2 * C, C))

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.feed_forward(self.norm2(x))


def blocks(count=2):
    return nn.Sequential(*(Block() for _ in range(count)))


def result_and_gradients(model, x):
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters())]


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_accelerate_swaps_in_place_and_returns_the_model():
    model = blocks()
    parameters, names = list(model.parameters()), list(model.state_dict())
    x = torch.randn(2, 5, C)
    before = result_and_gradients(model, x)
    assert fastlm.accelerate(model) is model
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == names
    assert isinstance(model[0].norm1, fastlm.nn.LayerNorm)
    assert isinstance(model[0].norm1, nn.LayerNorm)
    assert isinstance(model[0].feed_forward[1], fastlm.nn.GELU)
    assert_same(result_and_gradients(model, x), before)


def test_accelerated_lists_what_was_swapped_and_what_was_not():
    model = fastlm.accelerate(blocks(), norms=False)
    report = fastlm.accelerated(model)
    assert {(row.family, row.module) for row in report.swapped} == {
        ("attention", "MultiheadAttention"),
        ("activations", "GELU"),
    }
    assert {(row.name, row.detail) for row in report.skipped if row.name.startswith("0.")} == {
        ("0.norm1", "norms=False"),
        ("0.norm2", "norms=False"),
    }
    assert "4 of 8 layers swapped" in str(report)
    assert "0.attention and 1 more" in str(report)


@pytest.mark.parametrize("family", ["attention", "norms", "activations", "loss"])
def test_each_family_has_a_switch(family):
    model = nn.Sequential(Block(), nn.CrossEntropyLoss())
    swapped = {row.family for row in fastlm.accelerated(fastlm.accelerate(model, **{family: False})).swapped}
    assert swapped == {"attention", "norms", "activations", "loss"} - {family}


def test_a_second_call_swaps_only_what_is_new():
    model = fastlm.accelerate(blocks(), norms=False)
    classes = [type(module) for module in model.modules()]
    fastlm.accelerate(model, norms=False)
    assert [type(module) for module in model.modules()] == classes
    fastlm.accelerate(model)
    assert not fastlm.accelerated(model).skipped
    assert len(fastlm.accelerated(model).swapped) == 8


def test_restore_leaves_the_model_as_it_was():
    model = blocks().eval()
    calls = []
    model[0].norm1.register_forward_hook(lambda *_: calls.append("hook"))
    attributes = [{**vars(module)} for module in model.modules()]
    classes, text = [type(module) for module in model.modules()], repr(model)
    x = torch.randn(2, 5, C)
    before = model(x)
    fastlm.accelerate(model)
    assert repr(model) == text
    model(x)
    assert fastlm.restore(model) is model
    assert [type(module) for module in model.modules()] == classes
    assert [vars(module) for module in model.modules()] == attributes
    assert repr(model) == text
    assert not fastlm.accelerated(model).rows
    assert torch.equal(model(x), before)
    assert calls == ["hook"] * 3


def test_layers_of_fastlm_that_the_user_chose_stay_when_the_model_is_restored():
    model = nn.Sequential(fastlm.nn.LayerNorm(C), nn.LayerNorm(C))
    fastlm.restore(fastlm.accelerate(model))
    assert [type(module) for module in model] == [fastlm.nn.LayerNorm, nn.LayerNorm]


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies_are_accelerated_and_can_be_restored(copied):
    model = fastlm.accelerate(blocks())
    x = torch.randn(2, 5, C)
    twin = copied(model)
    assert [type(module) for module in twin.modules()] == [type(module) for module in model.modules()]
    assert fastlm.accelerated(twin) == fastlm.accelerated(model)
    assert torch.equal(twin(x), model(x))
    fastlm.restore(twin)
    assert type(twin[0].norm1) is nn.LayerNorm
    assert isinstance(model[0].norm1, fastlm.nn.LayerNorm)


def test_casts_moves_and_optimisers_go_on():
    model = blocks()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fastlm.accelerate(model).to(torch.bfloat16).double().float()
    before = model[0].norm1.weight.detach().clone()
    model(torch.randn(2, 5, C)).sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].norm1.weight, before)


@pytest.mark.parametrize("compiled_first", [True, False])
def test_compilation_before_and_after(compiled_first):
    torch._dynamo.reset()
    model = blocks()
    x = torch.randn(2, 5, C)
    before = result_and_gradients(model, x)
    if compiled_first:
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_same(result_and_gradients(compiled, x), before)
        assert fastlm.accelerate(compiled) is compiled
    else:
        compiled = torch.compile(fastlm.accelerate(model), fullgraph=True, backend="aot_eager")
    assert fastlm.accelerated(compiled) == fastlm.accelerated(model)
    assert len(fastlm.accelerated(model).swapped) == 8
    assert_same(result_and_gradients(compiled, x), before)


def test_subclasses_with_a_forward_of_their_own_are_left_alone():
    class Doubled(nn.LayerNorm):
        def forward(self, input):
            return 2 * super().forward(input)

    class Named(nn.LayerNorm):
        """Of another name, but computed by PyTorch's code."""

    model = fastlm.accelerate(nn.Sequential(Doubled(C), Named(C)))
    assert type(model[0]) is Doubled
    assert isinstance(model[1], (Named, fastlm.nn.LayerNorm))
    assert type(model[1]).__name__ == "Named"


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda norm: norm.to("meta"), "meta device"),
        (lambda norm: vars(norm).update(forward=norm.forward), "replaced on the instance"),
    ],
    ids=["meta", "instance forward"],
)
def test_modules_that_cannot_be_swapped_say_why(spoil, reason):
    norm = nn.LayerNorm(C)
    spoil(norm)
    model = fastlm.accelerate(nn.Sequential(norm))
    assert type(norm) is nn.LayerNorm
    assert reason in fastlm.accelerated(model).skipped[0].detail


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_fully_shard_works_after_accelerate_and_is_named_where_it_came_before():
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    x = torch.randn(2, 5, C)
    model = blocks(1)
    before = result_and_gradients(model, x)
    sharded = fully_shard(fastlm.accelerate(copy.deepcopy(model)), mesh=mesh)
    found = result_and_gradients(sharded, x)
    assert_same([found[0], *(gradient.full_tensor() for gradient in found[1:])], before)
    each = fastlm.accelerate(nn.Sequential(fully_shard(nn.LayerNorm(C), mesh=mesh)))
    assert "sharded by fully_shard" in fastlm.accelerated(each).skipped[0].detail
    inner = fully_shard(fastlm.accelerate(nn.Sequential(nn.LayerNorm(C)))[0], mesh=mesh)
    with pytest.raises(RuntimeError, match="fully_shard"):
        fastlm.restore(nn.Sequential(inner))


def test_generators_and_training_flags_are_untouched():
    class NoisyNorm(nn.Module):
        def forward(self, x):
            return x + torch.randn_like(x)

    model = nn.Sequential(Block(), nn.Dropout(), NoisyNorm()).train()
    state = torch.get_rng_state()
    fastlm.accelerate(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())


def test_hundred_layers_take_under_two_seconds():
    model = blocks(100)
    start = time.process_time()
    fastlm.accelerate(model)
    assert time.process_time() - start < 2.0
    assert len(fastlm.accelerated(model).swapped) == 400


def test_threads_may_accelerate_and_restore_at_once():
    model = blocks()
    threads = [
        threading.Thread(target=step, args=(model,)) for _ in range(20) for step in (fastlm.accelerate, fastlm.restore)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    fastlm.restore(model)
    assert type(model[0].norm1) is nn.LayerNorm


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
        fastlm.accelerate([nn.LayerNorm(C)])


class Keeps(nn.Module):
    """A gated block of whatever it is given."""

    def __init__(self, **kept):
        super().__init__()
        self.__dict__.update(kept)
        self.gate, self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

    def act(self, x):
        if callable(self.__dict__.get("function")):
            return self.function(x)
        kept = self.__dict__.get("_kind", self.__dict__.get("config", self.__dict__.get("mode")))
        if isinstance(kept, types.SimpleNamespace):
            kept = kept.kind
        return F.silu(x) if kept is True or kept == "silu" else F.relu(x)

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


DIFFERENT = {
    "functions": ({"function": F.silu}, {"function": F.relu}),
    "private words": ({"_kind": "silu"}, {"_kind": "relu"}),
    "configurations": tuple({"config": types.SimpleNamespace(kind=kind)} for kind in ("silu", "relu")),
    "a number and a claim": ({"mode": True}, {"mode": 1}),
}


@pytest.mark.parametrize("kept", DIFFERENT.values(), ids=DIFFERENT)
def test_blocks_of_one_class_that_keep_different_things_are_tried_each(kept):
    model, x = nn.Sequential(*(Keeps(**each) for each in kept)), torch.randn(2, 3, 8)
    expected = model(x)
    fastlm.accelerate(model)
    assert [row.name for row in fastlm.accelerated(model).swapped] == ["0"]
    torch.testing.assert_close(model(x), expected)


def with_parent():
    child = Keeps(_kind="silu")
    parent = nn.Sequential(child, nn.LayerNorm(8))
    child.__dict__["_modules"]["parent"] = parent
    return parent


class Registered(nn.LayerNorm):
    def __init_subclass__(cls, **kwargs):
        raise ValueError("only one")


HARMLESS = {
    "a list in a tuple": lambda: nn.Sequential(Keeps(sizes=([1, 2],)), nn.LayerNorm(8)),
    "a lazy layer": lambda: nn.Sequential(nn.LazyLinear(8), nn.LayerNorm(8)),
    "its own parent": with_parent,
    "a class that may not be derived from": lambda: nn.Sequential(Registered(8), nn.LayerNorm(8)),
}


@pytest.mark.parametrize("make", HARMLESS.values(), ids=HARMLESS)
def test_modules_that_cannot_be_swapped_do_not_stop_the_others(make):
    model, x = make(), torch.randn(2, 8)
    fastlm.accelerate(model)
    assert "1" in [row.name for row in fastlm.accelerated(model).swapped]
    if "parent" not in model[0]._modules:
        assert model(x).shape == (2, 8)


def test_a_parametrized_module_is_left_alone():
    class Double(nn.Module):
        def forward(self, x):
            return 2 * x

    model = nn.Sequential(nn.LayerNorm(8))
    parametrize.register_parametrization(model[0], "weight", Double())
    fastlm.accelerate(model)
    assert "parametrized" in fastlm.accelerated(model).skipped[0].detail
    parametrize.remove_parametrizations(model[0], "weight")
    assert type(model[0]) is nn.LayerNorm


@pytest.mark.parametrize("switch", ["attention", "norms", "activations", "loss", "verbose"])
def test_a_switch_that_is_no_bool_is_refused(switch):
    with pytest.raises(TypeError, match=f"accelerate: {switch} is 'no', expected True or False"):
        fastlm.accelerate(blocks(1), **{switch: "no"})


def test_reports_stay_true_of_parts_that_are_restored_moved_or_replaced():
    model = fastlm.accelerate(blocks(3))
    fastlm.restore(model[0])
    model[1] = nn.Identity()
    rows = fastlm.accelerated(model).rows
    assert len(rows) == 4
    assert all(row.swapped and row.name.startswith("2.") for row in rows)
    assert fastlm.accelerated(model[2]).rows == tuple(row._replace(name=row.name[2:]) for row in rows)
    fastlm.accelerate(model)
    assert len(fastlm.accelerated(model).swapped) == 8


class DropsByFunction(nn.Module):
    """A gated block whose rate of dropout is a number."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
        self.dropout_p, self.act = 0.0, F.silu

    def forward(self, x):
        return self.down(F.dropout(self.act(self.gate(x)) * self.up(x), self.dropout_p, self.training))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda block: pickle.loads(pickle.dumps(block))])
def test_what_a_block_keeps_may_change_afterwards(copied):
    block, x = DropsByFunction(), torch.randn(3, 8)
    expected = block(x)
    fastlm.accelerate(block)
    assert fastlm.accelerated(block).swapped
    block = copied(block)
    block.dropout_p = 1.0
    assert torch.equal(block(x), block.down.bias.expand(3, 8))
    block.dropout_p = 0.0
    torch.testing.assert_close(block(x), expected)
    block.act = F.relu
    torch.testing.assert_close(block(x), block.down(F.relu(block.gate(x)) * block.up(x)))


class KeepsItsResult(DropsByFunction):
    def forward(self, x):
        self.last = super().forward(x)
        return self.last


class Counts(DropsByFunction):
    def __init__(self):
        super().__init__()
        self.counted = {"calls": 0}

    def forward(self, x):
        self.counted["calls"] += 1
        return super().forward(x)


class RemembersNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(x)
        return F.layer_norm(x, x.shape[-1:])


@pytest.mark.parametrize("make", [KeepsItsResult, Counts, RemembersNorm])
def test_modules_whose_forward_changes_them_are_left_alone_and_unchanged(make):
    module = make()
    before = copy.deepcopy(vars(module))
    model = fastlm.accelerate(nn.Sequential(module))
    assert not fastlm.accelerated(model).swapped
    kept = [name for name in vars(module) if not name.startswith("_")]
    assert {name: vars(module)[name] for name in kept} == {name: before[name] for name in kept}
    if make is RemembersNorm:
        assert fastlm.accelerated(model).rows[0].detail == "its forward changes its attribute seen"


@pytest.mark.parametrize("theirs", [nn.LayerNorm, nn.GELU, nn.MultiheadAttention])
def test_a_forward_put_on_a_class_of_torch_is_kept(theirs, monkeypatch):
    monkeypatch.setattr(theirs, "forward", functools.wraps(theirs.forward)(lambda self, x: 2 * x))
    module = theirs(*{nn.LayerNorm: (C,), nn.GELU: (), nn.MultiheadAttention: (C, 4)}[theirs])
    x = torch.randn(2, C)
    assert torch.equal(fastlm.accelerate(module)(x), 2 * x)
    assert "is not PyTorch's" in fastlm.accelerated(module).rows[0].detail


class OwnRms(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(C))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


def traceable():
    layer = nn.TransformerEncoderLayer(C, 4, 2 * C, 0.0, batch_first=True)
    into, out = nn.Linear(C, 8), nn.Linear(8, C)
    return nn.Sequential(nn.LayerNorm(C), nn.RMSNorm(C), OwnRms(), layer, into, DropsByFunction(), nn.GELU(), out)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_trace_gives_values_and_gradients_at_other_shapes_and_can_be_saved(monkeypatch):
    monkeypatch.setattr(_dispatch, "CPU_MIN_NUMEL", dict.fromkeys(_dispatch.CPU_MIN_NUMEL, 0))
    model = fastlm.accelerate(traceable())
    assert len(fastlm.accelerated(model).swapped) == 9
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, torch.randn(2, 5, C)), file)
    file.seek(0)
    traced, x = torch.jit.load(file), torch.randn(3, 7, C)
    assert_same(result_and_gradients(traced, x), result_and_gradients(model, x))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_scripting_says_to_restore_first():
    model = fastlm.accelerate(traceable())
    classes = [type(module) for module in model.modules()]
    with pytest.raises(RuntimeError, match=r"call fastlm.restore\(model\) first"):
        torch.jit.script(model)
    assert [type(module) for module in model.modules()] == classes


class NamesOfOurs(nn.Module):
    """A gated block whose layers have names that swapped layers use."""

    def __init__(self):
        super().__init__()
        self.form, self.layer, self.original = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return self.original(F.silu(self.form(x)) * self.layer(x))


class ForFewClasses(nn.CrossEntropyLoss):
    def __init__(self):
        super().__init__()
        self.num_classes = 3


class Described(nn.CrossEntropyLoss):
    def extra_repr(self):
        return "described"


class ForTraining(OwnRms):
    def forward(self, x):
        return super().forward(x) if torch.is_grad_enabled() else x


OF_THEIR_OWN = {
    "names of ours": (NamesOfOurs, "an attribute named"),
    "an attribute that ours reads": (ForFewClasses, "num_classes of its own"),
    "a method that ours replaces": (Described, "extra_repr of its own"),
    "other code without gradients": (ForTraining, None),
    "a graph": (lambda: torch.fx.symbolic_trace(DropsByFunction()), "a graph of torch.fx"),
}


@pytest.mark.parametrize(("make", "reason"), OF_THEIR_OWN.values(), ids=OF_THEIR_OWN)
def test_modules_with_something_of_their_own_keep_it(make, reason):
    module = make()
    text, own = repr(module), type(module)
    fastlm.accelerate(module)
    assert type(module) is own
    assert repr(module) == text
    assert [reason in row.detail for row in fastlm.accelerated(module).rows] == ([True] if reason else [])


def test_an_activation_whose_attributes_change_afterwards_counts():
    block, x = DropsByFunction(), torch.randn(3, 8)
    block.act = nn.GELU()
    fastlm.accelerate(block)
    assert len(fastlm.accelerated(block).swapped) == 2
    block.act.approximate = "tanh"
    torch.testing.assert_close(block(x), block.down(F.gelu(block.gate(x), approximate="tanh") * block.up(x)))


def test_layers_of_one_class_are_asked_each_for_what_they_keep():
    losses = nn.ModuleList([nn.CrossEntropyLoss(), nn.CrossEntropyLoss()])
    losses[1].softcap = 3.0
    assert [row.name for row in fastlm.accelerated(fastlm.accelerate(losses)).swapped] == ["0"]


def test_a_forward_put_on_a_swapped_layer_is_named_by_restore():
    model, x = nn.Sequential(OwnRms(), nn.LayerNorm(C)), torch.randn(2, C)
    expected = model(x)
    fastlm.accelerate(model)
    model[0].forward = functools.partial(model[0].forward)
    with pytest.raises(RuntimeError, match="restore: 0: its forward was replaced on the instance after accelerate"):
        fastlm.restore(model)
    torch.testing.assert_close(model(x), expected)
    del model[0].forward
    assert torch.equal(fastlm.restore(model)(x), expected)
