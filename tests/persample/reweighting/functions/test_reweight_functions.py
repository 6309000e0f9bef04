"""reweight: attention, weights that functions are given, tied weights, and the axis of samples found by a trial."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from persample import LayerGrads
from persample import reweight as layers_only
from persample.reweighting.functions.interception import Watched

reweight = partial(layers_only, functions=True)

B = 4
FACTORS = torch.tensor([0.3, -1.2, 2.0, 0.7], dtype=torch.float64)

pytestmark = pytest.mark.usefixtures("double")


def rows_of(model: nn.Module, samples: Tensor, axis: int = 0) -> dict[str, Tensor]:
    """Gradients of Σ sin(output) for each sample alone: name -> [B, *shape]."""
    rows: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for sample in samples.split(1, axis):
        model.zero_grad()
        model(sample).sin().sum().backward()
        for name, parameter in model.named_parameters():
            rows[name].append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone())
    model.zero_grad()
    return {name: torch.stack(entries) for name, entries in rows.items()}


def check(model: nn.Module, x: Tensor, reweighted: dict[str, list[str]], **options: object) -> dict[str, str]:
    """Weighted gradients and Gram matrices by layer equal the loop's; `reweighted`: layer -> its parameters."""
    rows = rows_of(model, x)
    grams: dict[str, Tensor] = {}

    def policy(layer: str, grads: LayerGrads) -> Tensor:
        assert layer not in grams, "asked once a pass"
        grams[layer] = grads.gram()
        return FACTORS

    with reweight(model, policy, **options) as handle:
        for _ in range(2):
            grams.clear()
            model.zero_grad()
            model(x).sin().sum().backward()
        explained = handle.explain()
        for layer, names in reweighted.items():
            own = dict(model.named_parameters())
            assert [id(each) for each in handle.parameters(layer)] == [id(own[name]) for name in names]
    assert set(grams) == set(reweighted)
    weighted = {name for names in reweighted.values() for name in names}
    for name, parameter in model.named_parameters():
        assert type(parameter) is nn.Parameter
        assert not hasattr(parameter, "watcher")
        c = FACTORS if name in weighted else torch.ones(B)
        torch.testing.assert_close(parameter.grad, torch.tensordot(c, rows[name], 1), rtol=1e-10, atol=1e-10)
    for layer, names in reweighted.items():
        if all(sum(name in each for each in reweighted.values()) == 1 for name in names):  # else it has parts of them
            flat = torch.cat([rows[name].flatten(1) for name in names], 1)
            torch.testing.assert_close(grams[layer], flat @ flat.T)
    return explained


class Attending(nn.Module):
    """Self- or cross-attention between two linear layers."""

    def __init__(self, *, first: bool, cross: bool = False, **options: object) -> None:
        super().__init__()
        self.cross, self.first = cross, first
        self.inp = nn.Linear(3, 4)
        self.attn = nn.MultiheadAttention(4, 2, batch_first=first, **options)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.first else x.transpose(0, 1)
        y = self.inp(x).tanh()
        other = y.flip(0 if not self.first else 1) if self.cross else y
        if self.attn.kdim != 4:
            other = x
        out, _ = self.attn(y, other, other, need_weights=False)
        return out if self.first else out.transpose(0, 1)


IN, OUT = ["attn.in_proj_weight", "attn.in_proj_bias"], ["attn.out_proj.weight", "attn.out_proj.bias"]
SEPARATE = {f"attn.{each}_proj_weight": [f"attn.{each}_proj_weight", "attn.in_proj_bias"] for each in "qkv"}


@pytest.mark.parametrize("time", [5, B], ids=["T != B", "T == B"])
@pytest.mark.parametrize("first", [True, False], ids=["batch first", "time first"])
@pytest.mark.parametrize(
    ("options", "layers"),
    [
        ({}, {"attn.in_proj_weight": IN}),
        ({"bias": False}, {"attn.in_proj_weight": IN[:1]}),
        ({"cross": True}, {"attn.in_proj_weight[0:4]": IN, "attn.in_proj_weight[4:12]": IN}),
        ({"kdim": 3, "vdim": 3}, SEPARATE),
        ({"add_bias_kv": True}, {"attn.in_proj_weight": IN}),
    ],
    ids=["self", "no bias", "cross", "other width", "bias_kv"],
)
def test_the_projections_of_attention_are_linear_layers(
    options: dict, layers: dict[str, list[str]], first: bool, time: int
) -> None:
    model = Attending(first=first, **options)
    out = OUT if options.get("bias", True) else OUT[:1]
    explained = check(
        model, torch.randn(B, time, 3), {"inp": ["inp.weight", "inp.bias"], **layers, "attn.out_proj": out}
    )
    for layer in (*layers, "attn.out_proj"):
        assert explained[layer] == "reweighted, samples on axis 1 of its output"


@pytest.mark.parametrize("joint", [False, True])
def test_an_encoder_with_masks_and_dropout_random_numbers_are_the_same(joint: bool) -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.5, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.randn(B, B, 4)
    mask = nn.Transformer.generate_square_subsequent_mask(B)
    torch.manual_seed(1)
    model(x, mask=mask).sin().sum().backward()
    expected = [each.grad.clone() for each in model.parameters()]
    model.zero_grad()
    asked: list[str] = []

    def policy(*args: object) -> object:
        asked.extend(args[0] if joint else [args[0]])
        return {path: torch.ones(B) for path in args[0]} if joint else torch.ones(B)

    with reweight(model, policy, joint=joint):
        torch.manual_seed(1)
        model(x, mask=mask).sin().sum().backward()
    parts = ("self_attn.in_proj_weight", "self_attn.out_proj", "linear1", "linear2")
    assert sorted(asked) == sorted(f"layers.{number}.{part}" for number in (0, 1) for part in parts)
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


class Functional(nn.Module):
    """A linear function twice with one weight, a product, an embedding that is an output layer, a bare nn.Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(3))
        self.other = nn.Parameter(torch.randn(3, 3))
        self.table, self.unused = nn.Embedding(6, 3), nn.Linear(3, 3)
        self.frozen = nn.Parameter(torch.randn(3, 3), requires_grad=False)

    @property
    def through(self) -> Tensor:
        return self.unused.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = F.linear(F.linear(x, self.weight, self.bias).relu_(), self.weight, bias=self.bias)
        x = F.linear(x @ self.other.T, self.through)
        return F.linear(F.linear(x, self.frozen), self.table.weight)


@pytest.mark.parametrize("joint", [False, True])
def test_functions(joint: bool) -> None:
    model, x = Functional(), torch.randint(6, (B, 2))
    rows = rows_of(model, x)
    answers = {"weight": FACTORS, "unused.weight": 2 * FACTORS}
    grams = {}

    def policy(layer: str, grads: LayerGrads) -> Tensor | None:
        grams[layer] = grads.gram()
        return answers.get(layer)

    def jointly(grads: dict[str, LayerGrads]) -> dict:
        return {layer: policy(layer, each) for layer, each in grads.items()}

    with reweight(model, jointly if joint else policy, joint=joint) as handle:
        model(x).sin().sum().backward()
        explained = handle.explain()
    assert set(grams) == {"weight", "unused.weight", "table.weight", "other"}
    flat = torch.cat([rows["weight"].flatten(1), rows["bias"]], 1)
    torch.testing.assert_close(grams["weight"], flat @ flat.T)
    for name, parameter in model.named_parameters():
        if name in ("frozen", "unused.bias"):
            assert parameter.grad is None
            continue
        c = answers.get("weight" if name == "bias" else name, torch.ones(B))
        torch.testing.assert_close(parameter.grad, torch.tensordot(c, rows[name], 1))
    assert explained["other"] == "reweighted, samples on axis 0 of its output"
    assert explained["weight"] == "reweighted, samples on axis 0 of its output"
    assert explained["unused"].startswith("plain so far")
    assert "frozen" not in explained
    with pytest.raises(KeyError, match="no layer is called 'nothing'"):
        handle.parameters("nothing")


def test_the_part_of_a_tied_embedding_that_is_a_function_is_weighted() -> None:
    model, x = Functional(), torch.randint(6, (B, 2))
    model(x).sin().sum().backward()
    plain = model.table.weight.grad.clone()
    for c in (1.0, 2.0):
        model.zero_grad()
        with reweight(model, lambda layer, grads, c=c: torch.full((B,), c) if "table" in layer else None):
            model(x).sin().sum().backward()
        difference = model.table.weight.grad - plain
        assert torch.equal(difference, torch.zeros_like(plain)) or c == 2.0
    assert difference.abs().max() > 0


def test_tied_linear_layers_are_one_layer() -> None:
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Linear(3, 3)), torch.randn(B, 3)
    model[2].weight, model[2].bias = model[0].weight, model[0].bias
    explained = check(model, x, {"0": ["0.weight", "0.bias"], "3": ["3.weight", "3.bias"]})
    assert explained["2"] == "reweighted, samples on axis 0 of its output; one layer with '0'"


def test_one_weight_with_two_biases_is_two_layers() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 3))
            self.a, self.b = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.linear(x, self.weight, self.a), self.weight, self.b)

    check(Model(), torch.randn(B, 3), {"weight": ["weight", "a"], "weight (2)": ["weight", "b"]})


@pytest.mark.parametrize("reentrant", [False, True])
def test_attention_in_a_checkpoint(reentrant: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Attending(first=True)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    model, x = Model(), torch.randn(B, 5, 3, requires_grad=True)
    rows = rows_of(model.inner, x.detach())
    axes = {"inner.inp": 0, "inner.attn.in_proj_weight": 1, "inner.attn.out_proj": 1} if reentrant else None
    with reweight(model, lambda layer, grads: FACTORS, batch_axis=axes):
        for _ in range(2):
            model.zero_grad()
            model(x).sin().sum().backward()
            for name, parameter in model.inner.named_parameters():
                torch.testing.assert_close(parameter.grad, torch.tensordot(FACTORS, rows[name], 1))


def test_watched_parameters_are_ordinary_after_errors_and_in_copies() -> None:
    class Failing(Functional):
        fail = True

        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            assert type(self.weight) is Watched
            if self.fail:
                raise RuntimeError("on purpose")
            self.copied = copy.deepcopy(self.weight.detach())
            return out

    model, x = Failing(), torch.randint(6, (B, 2))
    with reweight(model, lambda layer, grads: None):
        with pytest.raises(RuntimeError, match="on purpose"):
            model(x)
        assert all(type(each) is nn.Parameter for each in model.parameters())
        model.fail = False
        model(x)
        assert type(model.copied) is Tensor
        with torch.no_grad():
            model.fail = True
            with pytest.raises(AssertionError):  # nothing is watched where there is no gradient
                model(x)
    assert all(type(each) is nn.Parameter for each in model.parameters())


# --- the axis of samples ------------------------------------------------------------------------------------


class TimeMajor(nn.Module):
    def __init__(self, norm: Callable[[], nn.Module] = nn.Identity) -> None:
        super().__init__()
        self.inp, self.norm, self.out = nn.Linear(3, 4), norm(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.inp(x.transpose(0, 1)).tanh())
        x = x.cumsum(0)  # later positions see earlier ones
        return self.out(x).transpose(0, 1)


BOTH = {"inp": ["inp.weight", "inp.bias"], "out": ["out.weight", "out.bias"]}


@given(size=st.integers(2, 5), seed=st.integers(0, 2**20))
def test_as_many_samples_as_positions(size: int, seed: int) -> None:
    torch.manual_seed(seed)
    model, x, factors = TimeMajor(), torch.randn(size, size, 3), torch.randn(size)
    rows = rows_of(model, x)
    with reweight(model, lambda layer, grads: factors) as handle:
        model(x).sin().sum().backward()
        assert all("axis 1" in line for line in handle.explain().values())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, torch.tensordot(factors, rows[name], 1))


def test_the_trial_leaves_random_numbers_and_buffers_as_they_were() -> None:
    class Norm(nn.BatchNorm1d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.movedim(2, 1)).movedim(1, 2)

    def build() -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(TimeMajor(lambda: nn.Sequential(Norm(4), nn.Dropout(0.5))))

    x, results = torch.randn(B, B, 3), []
    for axis in (None, 1):
        model = build()
        with reweight(model, lambda layer, grads: FACTORS, batch_axis=axis) as handle:
            for _ in range(2):
                model(x).sin().sum().backward()
            assert all("axis 1" in line for line in handle.explain().values())
        assert model.training
        assert all(module.training for module in model.modules())
        results.append([*(each.grad for each in model.parameters()), *model.buffers(), torch.rand(3)])
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)
