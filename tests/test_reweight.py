"""reweight: `.grad` is Σ_b c_b g_b, whatever the layer and however the model is used."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import loop_grads
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from persample.layers import LayerGrads
from persample.reweight import reweight

B = 4
FACTORS = torch.tensor([0.3, -1.2, 2.0, 0.7], dtype=torch.float64)

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 3), (5,)),
    "linear, no bias": (lambda: nn.Linear(5, 3, bias=False), (5,)),
    "linear, positions": (lambda: nn.Linear(5, 3), (6, 5)),
    "linear, many positions": (lambda: nn.Linear(2, 3), (9, 2)),
    "linear, two axes of positions": (lambda: nn.Linear(5, 3), (2, 3, 5)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 2, stride=2), (2, 7)),
    "conv2d": (lambda: nn.Conv2d(2, 3, 3, padding=1, bias=False), (2, 5, 6)),
    "conv2d groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=2), (4, 7, 7)),
    "conv2d few positions": (lambda: nn.Conv2d(8, 9, 2), (8, 2, 2)),
    "conv2d same": (lambda: nn.Conv2d(2, 3, (2, 3), padding="same"), (2, 5, 6)),
    "conv2d valid": (lambda: nn.Conv2d(2, 3, 3, padding="valid"), (2, 5, 6)),
    "conv2d circular": (lambda: nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="circular"), (2, 5, 6)),
    "conv2d reflect": (lambda: nn.Conv2d(2, 3, 4, padding="same", padding_mode="reflect"), (2, 5, 6)),
    "conv3d": (lambda: nn.Conv3d(1, 2, 2), (1, 3, 3, 4)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(2, 3, 3, stride=2, output_padding=1), (2, 4)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(4, 2, 3, stride=2, padding=1, groups=2), (4, 3, 3)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(2, 1, 2, dilation=2), (2, 2, 2, 2)),
}


def rows_of(model: nn.Module, samples: Tensor) -> dict[str, Tensor]:
    """Gradients of Σ sin(output) for each sample alone: name -> [B, *shape]."""
    rows: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for sample in samples:
        model.zero_grad()
        model(sample[None]).sin().sum().backward()
        for name, parameter in model.named_parameters():
            rows[name].append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone())
    model.zero_grad()
    return {name: torch.stack(entries) for name, entries in rows.items()}


def weighted(rows: dict[str, Tensor], factors: Tensor) -> dict[str, Tensor]:
    return {name: torch.tensordot(factors, row, 1) for name, row in rows.items()}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert set(got) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(
            got[name], value, rtol=tolerance, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )


def fixed(layer: str, grads: LayerGrads) -> Tensor:
    return FACTORS


@pytest.fixture(autouse=True)
def _double() -> object:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")  # says how torch pads
@pytest.mark.parametrize("needs_grad", [False, True], ids=["input without", "input with gradient"])
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_type(name: str, needs_grad: bool) -> None:
    build, shape = LAYERS[name]
    model, x = nn.Sequential(build()), torch.randn(B, *shape)
    rows = rows_of(model, x)
    flat = torch.cat([row.flatten(1) for row in rows.values()], 1)
    seen = {}

    def policy(layer: str, grads: LayerGrads) -> Tensor:
        seen.update(
            path=layer, norms=grads.norms(), gram=grads.gram(), norms_after=grads.norms(), size=grads.batch_size
        )
        assert "weight" in grads.explain()
        return FACTORS

    for use in (policy, fixed):  # with and without forming anything for the Gram matrix
        model.zero_grad()
        with reweight(model, use):
            model(x.clone().requires_grad_(needs_grad)).sin().sum().backward()
        assert_same(gradients(model), weighted(rows, FACTORS))
    assert seen["path"] == "0"
    assert seen["size"] == B
    torch.testing.assert_close(seen["gram"], flat @ flat.T)
    torch.testing.assert_close(seen["norms"], flat.norm(dim=1))
    torch.testing.assert_close(seen["norms_after"], flat.norm(dim=1))


def test_input_gradient_is_the_ordinary_one() -> None:
    model, x = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(27, 2)), torch.randn(B, 2, 5, 5)
    x.requires_grad_()
    (expected,) = torch.autograd.grad(model(x).sin().sum(), x)
    with reweight(model, fixed):
        loss = model(x).sin().sum()
        (got,) = torch.autograd.grad(loss, x, retain_graph=True)
        assert all(parameter.grad is None for parameter in model.parameters())
        loss.backward()  # what autograd.grad passed by leaves nothing behind
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(x.grad, expected)
    assert_same(gradients(model), weighted(rows_of(model, x.detach()), FACTORS))


def test_none_is_the_plain_gradient_and_other_parameters_always_get_it() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)), torch.randn(B, 3)
    rows = rows_of(model, x)
    with reweight(model, lambda layer, grads: None if layer == "0" else FACTORS):
        model(x).sin().sum().backward()
    ones = torch.ones(B)
    expected = {name: weighted(rows, FACTORS if name.startswith("2") else ones)[name] for name in rows}
    assert_same(gradients(model), expected)


class Shared(nn.Module):
    """Calls each of its layers twice, convolutions with different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear, self.relu = nn.Conv2d(2, 2, 2), nn.Linear(2, 2), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv(self.relu(self.conv(x))))
        x = x.flatten(2).transpose(1, 2)
        return self.linear(self.relu(self.linear(x)))


def test_a_layer_called_twice_is_one_layer_with_one_gram_matrix() -> None:
    model, x = Shared(), torch.randn(B, 2, 5, 5)
    rows = rows_of(model, x)
    grams: dict[str, Tensor] = {}

    def policy(layer: str, grads: LayerGrads) -> Tensor:
        assert layer not in grams, "asked once"
        grams[layer] = grads.gram()
        return FACTORS

    with reweight(model, policy):
        model(x).sin().sum().backward()
    assert_same(gradients(model), weighted(rows, FACTORS))
    for layer, gram in grams.items():
        flat = torch.cat([row.flatten(1) for name, row in rows.items() if name.startswith(layer)], 1)
        torch.testing.assert_close(gram, flat @ flat.T)


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    inner = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    x = torch.randn(B, 3, requires_grad=True)
    model = Checkpointed(inner, reentrant)
    expected = weighted(rows_of(inner, x.detach()), FACTORS)
    axes = {"inner.0": 0, "inner.2": 0} if reentrant else None
    with reweight(model, fixed, batch_axis=axes):
        for _ in range(2):
            inner.zero_grad()
            model(x).sin().sum().backward()
            assert_same(gradients(inner), expected)


def test_accumulation_and_repeated_backward() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(2 * B, 3)
    expected = [weighted(rows_of(model, part), FACTORS) for part in x.split(B)]
    with reweight(model, fixed):
        losses = [model(part).sin().sum() for part in x.split(B)]  # both forward passes before either backward
        sum(losses).backward(retain_graph=True)
        assert_same(gradients(model), {name: expected[0][name] + expected[1][name] for name in expected[0]})
        model.zero_grad()
        losses[0].backward()
        assert_same(gradients(model), expected[0])


def test_no_grad_eval_and_unused_forward_passes_leave_nothing() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), torch.randn(B, 3)
    asked: list[str] = []
    with reweight(model, lambda layer, grads: asked.append(layer)):
        with torch.no_grad():
            assert not model(x).requires_grad
        with torch.inference_mode():
            model(x)
        model.eval()
        model(x[:1])
        model(x[:3])
        assert not asked
        assert all(parameter.requires_grad for parameter in model.parameters())
        model(x).sum().backward()
    assert asked == ["2", "0"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_model(dtype: torch.dtype) -> None:
    model, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Linear(16, 3)), torch.randn(B, 8)
    low = copy.deepcopy(model).to(dtype)
    x = x.to(dtype).double()
    model.load_state_dict(low.state_dict())
    with reweight(low, lambda layer, grads: grads.gram().diagonal() * 0 + FACTORS.float()):
        low(x.to(dtype)).float().sin().sum().backward()
    assert all(parameter.grad.dtype == dtype for parameter in low.parameters())
    got = {name: grad.double() for name, grad in gradients(low).items()}
    assert_same(got, weighted(rows_of(model, x), FACTORS), tolerance=5e-2)


@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside autocast"])
def test_autocast(inside: bool) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(36, 3)).float()
    x = torch.randn(B, 1, 5, 5).bfloat16().float()
    expected = weighted(rows_of(model, x), FACTORS.float())
    grams = []

    def policy(layer: str, grads: LayerGrads) -> Tensor:
        grams.append(grads.gram())
        return FACTORS.float()

    with reweight(model, policy):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x).float().sin().sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
    assert all(gram.dtype == torch.float32 for gram in grams)
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    assert_same(gradients(model), expected, tolerance=5e-2)


class Careless(nn.Linear):
    """A subclass with a forward of its own is left alone: what it does with its weight is unknown."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 2, self.bias)


def test_what_stays_plain_is_listed() -> None:
    parts = [nn.Linear(3, 3) for _ in range(4)]
    parts[1].requires_grad_(False)
    nn.utils.parametrizations.weight_norm(parts[2])
    model, x = nn.Sequential(*parts, Careless(3, 3), nn.Linear(3, 3)), torch.randn(B, 3)
    rows = rows_of(model, x)
    with reweight(model, fixed) as handle:
        before = handle.explain()
        model(x).sin().sum().backward()
        after = handle.explain()
    assert "not been called" in before["0"]
    assert after["0"].startswith("reweighted, samples on axis 0")
    assert "frozen" in after["1"]
    assert "parametrised" in after["2"]
    assert "4" not in after
    assert handle.layers == ("0", "3", "5")
    assert not parts[1].weight.requires_grad
    got = gradients(model)
    ones = torch.ones(B)
    expected = {name: weighted(rows, FACTORS if name.split(".")[0] in handle.layers else ones)[name] for name in got}
    assert_same(got, expected)
    assert any(name.startswith("2.parametrizations") for name in got)


def test_a_frozen_bias_stays_frozen() -> None:
    model, x = nn.Sequential(nn.Linear(3, 2)), torch.randn(B, 3)
    model[0].bias.requires_grad_(False)
    with reweight(model, fixed):
        model(x).sin().sum().backward()
    assert model[0].bias.grad is None
    assert not model[0].bias.requires_grad
    model[0].bias.requires_grad_(True)
    assert_same({"0.weight": model[0].weight.grad}, {"0.weight": weighted(rows_of(model, x), FACTORS)["0.weight"]})


def test_an_exception_in_the_forward_pass_restores_the_parameters() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    with reweight(model, fixed):
        with pytest.raises(RuntimeError, match="shapes"):
            model(torch.randn(B, 7))
        assert all(parameter.requires_grad for parameter in model.parameters())
        # Ctrl-C runs no hooks; the next call, or the end, puts it right.
        before = next(iter(model[0]._forward_pre_hooks.values()))
        before(model[0], (), {})
        assert not model[0].weight.requires_grad
        model(torch.randn(B, 3)).sum().backward()
        assert model[0].weight.requires_grad
        before(model[0], (), {})
    assert model[0].weight.requires_grad


def test_copies_and_pickles_are_inert() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(B, 3)
    asked: list[str] = []
    with reweight(model, lambda layer, grads: asked.append(layer)):
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        for other in copies:
            other(x).sum().backward()
        assert not asked
        model(x).sum().backward()
        assert asked
        for other in copies:
            assert_same(gradients(other), gradients(model))
            reweight(other, fixed).remove()  # and they can be reweighted on their own


def test_remove() -> None:
    model, x = nn.Sequential(nn.Linear(3, 2)), torch.randn(B, 3)
    model(x).sin().sum().backward()
    expected = gradients(model)
    handle = reweight(model, fixed)
    handle.remove()
    handle.remove()
    model.zero_grad()
    model(x).sin().sum().backward()
    assert_same(gradients(model), expected)
    assert not model._forward_hooks
    assert not model[0]._forward_pre_hooks


def test_the_model_may_be_a_layer_and_be_called_by_keyword() -> None:
    model, x = nn.Linear(3, 2), torch.randn(B, 3)
    with reweight(model, fixed):
        model(input=x).sin().sum().backward()
    assert_same(gradients(model), weighted(rows_of(model, x), FACTORS))


class TimeMajor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.inp(x.transpose(0, 1)).tanh()).transpose(0, 1)


def test_the_batch_axis_is_found_once() -> None:
    model, x = TimeMajor(), torch.randn(B, 5, 3)
    expected, factors = weighted(rows_of(model, x), FACTORS), FACTORS
    with reweight(model, lambda layer, grads: factors) as handle:
        model(x).sin().sum().backward()
        assert_same(gradients(model), expected)
        assert "axis 1" in handle.explain()["inp"]
        # A shorter batch of as many samples as positions would be ambiguous, had it not been decided.
        factors = torch.rand(5)
        x = torch.randn(5, 5, 3)
        model.zero_grad()
        model(x).sin().sum().backward()
        got = gradients(model)
    assert_same(got, weighted(rows_of(model, x), factors))


@pytest.mark.parametrize("axis", [1, {"inp": 1, "out": 1}])
def test_the_batch_axis_can_be_given(axis: int | dict[str, int]) -> None:
    model, x = TimeMajor(), torch.randn(B, B, 3)
    with reweight(model, fixed, batch_axis=axis):
        model(x).sin().sum().backward()
    assert_same(gradients(model), weighted(rows_of(model, x), FACTORS))


def test_rows_as_samples_where_asked_for() -> None:
    """Frames folded into the batch: with the axis given, each frame is a sample."""
    model = nn.Sequential(nn.Flatten(0, 1), nn.Conv1d(1, 2, 2))
    x = torch.randn(2, 2, 1, 3)
    with reweight(model, fixed), pytest.raises(ValueError, match=r"layer '1'.*2 samples.*batch_axis=\{'1': 0\}"):
        model(x).sin().sum().backward()
    model.zero_grad()
    with reweight(model, fixed, batch_axis={"1": 0}):
        model(x).sin().sum().backward()
    inner = nn.Sequential(model[1])
    got = {name.replace("1.", "0."): grad for name, grad in gradients(model).items()}
    assert_same(got, weighted(rows_of(inner, x.flatten(0, 1)), FACTORS))


class Coupled(TimeMajor):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0))


@pytest.mark.parametrize(
    ("build", "shape", "message"),
    [
        (Coupled, (B, B, 3), r"layer 'out' counts samples: its output has shape \[4, 4, 2\].*\[0, 1\] all have"),
        (lambda: nn.Sequential(nn.Flatten(0, 1), nn.Linear(3, 2)), (B, 5, 3), "no axis before the last has that size"),
    ],
)
def test_an_uncertain_batch_axis_is_an_error(build: Callable, shape: tuple, message: str) -> None:
    model = build()
    with reweight(model, fixed), pytest.raises(ValueError, match=message):
        model(torch.randn(shape)).sum().backward()


def test_misuse_is_met_with_a_sentence() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Unflatten(1, (1, 2)), nn.Conv1d(1, 1, 1))
    with reweight(model, fixed):
        with pytest.raises(ValueError, match=r"reweighted already.*remove"):
            reweight(model, fixed)
        with pytest.raises(ValueError, match="its module '0' carries hooks"):
            reweight(nn.Sequential(model[0]), fixed)
        with pytest.raises(ValueError, match=r"layer '0'.*forward was not called with a tensor.*Call the model itself"):
            model[0](torch.randn(B, 3)).sum().backward()
    with pytest.raises(ValueError, match=r"names \['1'\].*\['0', '2'\]"):
        reweight(model, fixed, batch_axis={"1": 0})
    with pytest.raises(ValueError, match="has its samples on axis 0"):
        reweight(model, fixed, batch_axis={"2": 1})
    with pytest.raises(ValueError, match="count axes from the front"):
        reweight(model, fixed, batch_axis=-1)
    for wrong, name in ((torch.ones(B + 1), r"shape \[5\]"), (2.0, "float")):
        with reweight(model, lambda layer, grads, c=wrong: c), pytest.raises(ValueError, match=f"{name} for layer '2'"):
            model(torch.randn(B, 3)).sum().backward()


def test_a_layer_called_with_other_samples_is_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).sum() + self.layer(x[1:]).sum()

    model = Twice()
    with reweight(model, fixed), pytest.raises(ValueError, match=r"batches of \[3, 4\] samples"):
        model(torch.randn(B, 3)).backward()


def test_batch_norm_rows_add_up_to_the_batch_gradient() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(27, 2))
    x = torch.randn(B, 1, 5, 5)
    model(x).sin().sum().backward()
    expected = gradients(model)
    model.zero_grad()
    with reweight(model, lambda layer, grads: torch.ones(B)):
        model(x).sin().sum().backward()
    assert_same(gradients(model), expected)


def test_functorch_inside_is_left_alone() -> None:
    model, x = nn.Sequential(nn.Linear(3, 2)), torch.randn(B, 3)
    params = dict(model.named_parameters())

    def loss(values: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(model, values, (sample[None],)).sin().sum()

    rows = rows_of(model, x)
    with reweight(model, fixed):
        got = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, x)
    assert_same(got, rows)


@pytest.mark.filterwarnings("ignore")  # Dynamo warns about the shape checks that only tests install
def test_torch_compile() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(B, 3)
    expected = weighted(rows_of(model, x), FACTORS)
    with reweight(model, fixed):
        compiled = torch.compile(model, backend="eager")
        for _ in range(2):
            model.zero_grad()
            compiled(x).sin().sum().backward()
            assert_same(gradients(model), expected)


def test_a_stored_step_asks_for_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """With given factors neither Gram matrix nor rows are formed, and no weight gradient is computed twice."""
    from persample import convolution, layer_sum, reductions

    model, x = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(18, 2)), torch.randn(B, 1, 5, 5)
    calls: list[str] = []
    for name in ("gram", "squared_norms", "materialise", "weighted_sum"):
        monkeypatch.setattr(reductions, name, lambda *args, name=name: pytest.fail(f"{name} was called"))
    conv, linear = convolution.weight_gradient, layer_sum.weight_product
    monkeypatch.setattr(convolution, "weight_gradient", lambda *args: calls.append("conv") or conv(*args))
    monkeypatch.setattr(layer_sum, "weight_product", lambda *args: calls.append("linear") or linear(*args))
    with reweight(model, fixed):
        loss = model(x).sin().sum()
        nodes, todo = set(), [loss.grad_fn]
        while todo:
            node = todo.pop()
            if node is not None and node not in nodes:
                nodes.add(node)
                todo += [parent for parent, _ in node.next_functions]
        # The operations themselves are not connected to their weights.
        assert not {"AddmmBackward0", "ConvolutionBackward0"} & {
            node.name() for node in nodes if any("AccumulateGrad" in str(parent) for parent, _ in node.next_functions)
        }
        loss.backward()
    assert sorted(calls) == ["conv", "linear"]


def test_the_rows_formed_for_a_convolutions_gram_matrix_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from persample import reductions

    formed, original = [], reductions.materialise

    def materialise(block: object) -> Tensor:
        formed.append(type(block).__name__)
        return original(block)

    def policy(layer: str, grads: LayerGrads) -> Tensor:
        grads.gram()
        assert "weight: Dense" in grads.explain()
        return FACTORS

    monkeypatch.setattr(reductions, "materialise", materialise)
    build, shape = LAYERS["conv2d"]
    model = nn.Sequential(build())
    with reweight(model, policy):
        model(torch.randn(B, *shape)).sin().sum().backward()
    assert [kind for kind in formed if kind != "Dense"] == ["Conv"]


@given(sizes=st.lists(st.integers(1, 5), min_size=2, max_size=4), batch=st.integers(1, 6), data=st.data())
def test_property_mlp(sizes: list[int], batch: int, data: st.DataObject) -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in pairwise(sizes)))
    x, factors = torch.randn(batch, sizes[0]), torch.randn(batch)
    with reweight(model, lambda layer, grads: factors):
        model(x).sin().sum().backward()
    assert_same(gradients(model), weighted(rows_of(model, x), factors))


class Queries(nn.Module):
    """Attention of as many learnt queries as there are samples, with a table of positions, also as long."""

    def __init__(self, samples: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(samples, 3))
        self.asks, self.key, self.places, self.head = (nn.Linear(3, 3) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        places = self.places(torch.arange(3.0 * x.shape[1]).view(-1, 3).to(x))
        keys = self.key(x) + places
        return self.head(torch.einsum("qd,btd->bqt", self.asks(self.queries), keys).softmax(2) @ keys)


def test_what_all_samples_share_has_no_rows() -> None:
    """A layer whose output has as many rows as there are samples, but works on none of them, stays plain."""
    model, x = Queries(4).double(), torch.randn(4, 4, 3).double()
    expected = loop_grads(model, lambda out, _: out.square().flatten(1).sum(1), x, None)
    c = torch.randn(4)
    with reweight(model, lambda layer, grads: c, batch_axis={"key": 0, "head": 0}) as handle:
        for _ in range(2):
            model.zero_grad()
            model(x).square().sum().backward()
            plain = {path for path, why in handle.explain().items() if why.startswith("plain: it works on what all")}
            assert plain == {"asks", "places"}
            for name, parameter in model.named_parameters():
                weights = torch.ones(4) if name.partition(".")[0] in {*plain, "queries"} else c
                want = torch.einsum("b,b...->...", weights.double(), expected[name])
                torch.testing.assert_close(parameter.grad, want)


def test_shared_after_a_call_on_samples() -> None:
    """The same layer first on the batch, then on what all samples share: one plain gradient."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.anchor = nn.Linear(3, 2), nn.Parameter(torch.randn(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * self.layer(self.anchor).sum(0)

    model, x = Both().double(), torch.randn(4, 3).double()
    model(x).square().sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    with reweight(model, lambda layer, grads: torch.zeros(4)):
        for _ in range(2):
            model.zero_grad()
            model(x).square().sum().backward()
            for name, parameter in model.named_parameters():
                torch.testing.assert_close(parameter.grad, expected[name])
