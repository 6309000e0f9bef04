"""reweight under torch.compile: one graph, the same gradients, nothing compiled anew between kinds of steps.

Run by `test_reweight_compile` in a process of its own: Dynamo cannot trace the shape checks of the other tests.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from persample import Folded, LayerGrads, reweight
from persample.reweighting.compile.operators import Target

B = 4
FACTORS = torch.tensor([0.3, -1.2, 2.0, 0.7], dtype=torch.float64)
pytestmark = pytest.mark.filterwarnings("ignore")  # torch.compile warns about things of its own


@pytest.fixture(autouse=True)
def _double() -> object:
    torch.set_default_dtype(torch.float64)
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def mlp() -> tuple[nn.Module, Tensor]:
    layers = nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 2)
    return nn.Sequential(*layers), torch.randn(B, 3)


def frozen() -> tuple[nn.Module, Tensor]:
    model, x = mlp()
    model[0].bias.requires_grad_(False)
    model[2].requires_grad_(False)
    return model, x


def convolutions() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, padding="same", groups=2), nn.ConvTranspose2d(4, 2, 2, stride=2), nn.Flatten(),
        nn.Linear(72, 2),
    )  # fmt: skip
    return model, torch.randn(B, 2, 5, 5)


def positions() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)), torch.randn(B, 5, 3)


class Counting:
    """A backend that counts the graphs it is given."""

    def __init__(self, backend: str) -> None:
        self.backend, self.graphs = backend, 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        self.graphs += 1
        return torch._dynamo.lookup_backend(self.backend)(graph, inputs)


class Changing:
    """Computes its factors from the Gram matrix in the first two passes, then returns what it has stored."""

    def __init__(self) -> None:
        self.stored: dict[str, Tensor] = {}
        self.grams: list[Tensor] = []
        self.passes = 0

    def __call__(self, layer: str, grads: LayerGrads) -> Tensor:
        if self.passes >= 2:
            return self.stored[layer]
        self.grams.append(grads.gram())
        self.stored[layer] = FACTORS + self.grams[-1].diagonal().tanh()
        return self.stored[layer]


def train(model: nn.Module, x: Tensor, call: Callable[[Tensor], Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of four passes, with a step in between, and the Gram matrices."""
    policy, result = Changing(), []
    with reweight(model, policy):
        for _ in range(4):
            model.zero_grad()
            call(x).sin().sum().backward()
            policy.passes += 1
            grads = [each.grad.clone() for each in model.parameters() if each.grad is not None]
            result += grads
            with torch.no_grad():
                for each in model.parameters():
                    if each.grad is not None:
                        each.sub_(0.01 * each.grad)  # larger ones run away, and rounding with them
    return result, policy.grams


def assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("build", [mlp, frozen, convolutions, positions])
def test_one_graph_for_every_kind_of_step(build: Callable, backend: str) -> None:
    model, x = build()
    other, counting = copy.deepcopy(model), Counting(backend)
    expected = train(model, x, model)
    got = train(other, x, torch.compile(other, backend=counting, fullgraph=True))
    assert counting.graphs == 1
    for one, two in zip(got, expected, strict=True):
        assert_same(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("build", [mlp, convolutions, positions])
def test_inductor(build: Callable) -> None:
    model, x = build()
    other = copy.deepcopy(model)
    expected = train(model, x, model)
    for one, two in zip(train(other, x, torch.compile(other, fullgraph=True)), expected, strict=True):
        assert_same(one, two)


def test_no_graph_break_and_other_batch_sizes() -> None:
    model, x = mlp()
    with reweight(model, lambda layer, grads: torch.arange(grads.batch_size) + 1.0):
        assert torch._dynamo.explain(model)(x).graph_break_count == 0
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for size in (B, 7, 5, 3):
            grads = []
            for call in (compiled, model):
                model.zero_grad()
                call(torch.linspace(-1, 1, 3 * size).view(size, 3)).sin().sum().backward()
                grads.append([each.grad.clone() for each in model.parameters()])
            assert_same(*grads)
        with torch.no_grad():
            assert_same([compiled(x)], [model(x)])
    model.zero_grad()
    compiled(x).sin().sum().backward()  # after remove(): the plain gradient
    plain = [each.grad.clone() for each in model.parameters()]
    model.zero_grad()
    model(x).sin().sum().backward()
    assert_same(plain, [each.grad for each in model.parameters()])


def test_the_gradient_at_the_output() -> None:
    seen: list[Tensor] = []

    def policy(layer: str, grads: LayerGrads) -> Tensor:
        seen.append(handle.output_grad)
        return FACTORS

    model, x = mlp()
    with reweight(model, policy, outputs=True) as handle:
        output = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
        output.sin().sum().backward()
    assert len(seen) == 3
    assert_same(seen, [output.detach().cos()] * 3)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.last = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.linear(self.linear(x).tanh()))


def test_a_layer_called_twice_leaves_the_graph() -> None:
    model, x = Shared(), torch.randn(B, 3)
    other, third = copy.deepcopy(model), copy.deepcopy(model)
    expected = train(model, x, model)
    for one, two in zip(train(other, x, torch.compile(other, backend="aot_eager")), expected, strict=True):
        assert_same(one, two)
    torch._dynamo.reset()
    with (
        reweight(third, lambda layer, grads: FACTORS),
        pytest.raises(torch._dynamo.exc.Unsupported, match=r"leave fullgraph=True out"),
    ):
        torch.compile(third, backend="aot_eager", fullgraph=True)(x)


class Blocks(nn.Module):
    """Its block is compiled by itself, and called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(3, 3), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(x))


def test_a_part_of_a_model_may_be_compiled() -> None:
    model, x = Blocks(), torch.randn(B, 3)
    other = copy.deepcopy(model)
    expected = train(model, x, model)
    other.block.compile(backend="aot_eager")
    for one, two in zip(train(other, x, other), expected, strict=True):
        assert_same(one, two)


def test_a_graph_break_inside_a_model() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            torch._dynamo.graph_break()
            return self.b(x)

    model, x = Broken(), torch.randn(B, 3)
    other = copy.deepcopy(model)
    expected = train(model, x, model)
    for one, two in zip(train(other, x, torch.compile(other, backend="aot_eager")), expected, strict=True):
        assert_same(one, two)


@pytest.mark.parametrize("joint", [False, True])
def test_attention_and_functions(joint: bool) -> None:
    model, x = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True), torch.randn(B, 5, 4)
    other, asked = copy.deepcopy(model), []

    def policy(*args: object) -> object:
        asked.append(sorted(args[0]) if joint else args[0])
        return dict.fromkeys(args[0], FACTORS) if joint else FACTORS

    for each, call in ((model, model), (other, torch.compile(other, backend="aot_eager"))):
        with reweight(each, policy, joint=joint, functions=True):
            call(x).sin().sum().backward()
    half = len(asked) // 2
    assert half == (1 if joint else 4)
    assert sorted(asked[:half]) == sorted(asked[half:])
    assert_same([each.grad for each in other.parameters()], [each.grad for each in model.parameters()])


@pytest.mark.parametrize("same", [True, False])
def test_a_graph_made_without_hooks_is_not_taken(same: bool) -> None:
    """torch.compile by default takes the graph of a plain model for every other of its class."""
    torch._dynamo.config.skip_nnmodule_hook_guards = True
    model, x = mlp()
    plain = copy.deepcopy(model)
    other = plain if same else copy.deepcopy(model)
    before = torch.compile(plain, backend="aot_eager")
    before(x).square().sum().backward()
    plain.zero_grad()
    expected = train(model, x, model)
    for one, two in zip(train(other, x, torch.compile(other, backend="aot_eager")), expected, strict=True):
        assert_same(one, two)


def test_a_graph_whose_handle_is_gone() -> None:
    with pytest.raises(RuntimeError, match=r"made for a persample\.reweight handle that is gone"):
        Target.get(-1)


def changed(**values: object) -> nn.Module:
    """A layer whose geometry is another than that it was made with."""
    layer = nn.ConvTranspose2d(2, 3, 3, stride=2) if "output_padding" in values else nn.Conv2d(2, 3, 3, padding=1)
    for name, value in values.items():
        setattr(layer, name, value)
    return layer


@pytest.mark.parametrize(
    "layer",
    [changed(padding=(0, 2)), changed(padding="same"), changed(padding_mode="circular"),
     changed(output_padding=(1, 0), padding=(1, 1))],
)  # fmt: skip
def test_a_geometry_is_read_as_the_layer_reads_it(layer: nn.Module) -> None:
    layer, x = layer.double(), torch.randn(B, 2, 5, 6)
    rows = torch.stack([torch.autograd.grad(each.sin().sum(), layer.weight)[0] for each in map(layer, x.split(1))])
    with reweight(layer, lambda path, grads: FACTORS):
        torch.compile(layer, backend="aot_eager")(x).sin().sum().backward()
    assert_same([layer.weight.grad], [torch.einsum("b,b...->...", FACTORS, rows)])


class Queries(nn.Module):
    """As many learnt queries as samples, [Q, 3]: a layer works on them that all samples share."""

    def __init__(self, queries: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(queries, 3))
        self.key, self.value, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        weights = (x @ self.key(self.queries).T).softmax(1)
        return self.head(weights.sum(1, keepdim=True) * self.value(x) * weights[:, :1])


@pytest.mark.parametrize("how", ["function", "method"])
@pytest.mark.parametrize("queries", [B, B + 1])
def test_layers_that_all_samples_share_are_told_in_models_of_a_class_of_ones_own(queries: int, how: str) -> None:
    model, x = Queries(queries), torch.randn(B, 3)
    other = copy.deepcopy(model)
    expected = train(model, x, model)
    if how == "method":
        other.compile(backend="aot_eager")
    call = torch.compile(other, backend="aot_eager") if how == "function" else other
    for one, two in zip(train(other, x, call), expected, strict=True):
        assert_same(one, two)
    with reweight(other, lambda layer, grads: FACTORS) as handle:
        call(x).sin().sum().backward()
        assert handle.explain()["key"].startswith("plain: it works on what all samples share")
        assert not handle._eager._passes, "the pass has been left as it was entered"
        assert handle._eager._seen is None


def test_folded_rows_must_be_given() -> None:
    """Nothing is tried out in a graph."""
    model, x, c = nn.Sequential(nn.Flatten(0, 1), nn.Linear(3, 2)), torch.randn(B, 5, 3), FACTORS
    parameters = list(model.parameters())
    rows = [torch.autograd.grad(model(each[None]).sin().sum(), parameters) for each in x]
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with reweight(model, lambda layer, grads: c), pytest.raises(ValueError, match=r"nothing is tried .*Folded\(\)"):
        compiled(x).sin().sum().backward()
    torch._dynamo.reset()
    with reweight(model, lambda layer, grads: c, batch_axis={"1": Folded(after=5)}) as handle:
        compiled(x).sin().sum().backward()
        assert handle.explain()["1"] == "reweighted, samples of 5 consecutive rows each on axis 0 of its output"
    for parameter, *own in zip(parameters, *rows, strict=True):
        torch.testing.assert_close(parameter.grad, torch.tensordot(c, torch.stack(own), 1))
