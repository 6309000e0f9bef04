"""What a caller meets: errors that say what to do, unused and frozen parameters, sums, other=, grad, explain."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import clipped_sum, expected, gram, loop_grads, norms, rel_err, weighted_sum
from torch import Tensor, nn
from torch.nn import functional as F

import persample
from persample.result.holding.chunked import ChunkedPerSampleGrads

CHEAP = ("outputs", "hooks", "vmap")
every_backend = pytest.mark.parametrize("backend", CHEAP)


class Net(nn.Module):
    """Two layers, one of them nested, and a parameter that takes no part."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
        self.head = nn.Linear(6, 3)
        self.idle = nn.Linear(2, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def batch(size: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 4, generator=random, dtype=torch.float64)
    return x, torch.randint(3, (size,), generator=random)


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none")


@pytest.fixture
def model() -> Net:
    return Net().double()


# --- what is asked of the loss ----------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (lambda out, t: F.cross_entropy(out, t), ValueError, r"got \(\): it is already reduced.*reduction='none'"),
        (lambda out, t: out, ValueError, r"got \(5, 3\): reduce every dimension but the first.*flatten\(1\)"),
        (lambda out, t: out.argmax(1), ValueError, "real floating-point numbers; got dtype torch.int64"),
        # in the tests, the checker of annotations may look first
        (
            lambda out, t: [1.0],
            TypeError,
            r"one loss per sample, \[B\]; got list|violates type hint <class 'torch.Tensor'>",
        ),
    ],
    ids=["scalar", "matrix", "integers", "list"],
)
def test_losses_of_another_kind(
    model: Net, backend: str, loss: Callable[..., Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        persample.per_sample(model, loss, *batch(), backend=backend)


def test_options_are_checked(model: Net) -> None:
    known = ", ".join(map(repr, persample.backends()))
    with pytest.raises(ValueError, match=f"backend must be 'auto' or one of {known}; got 'loop'"):
        persample.per_sample(model, cross_entropy, *batch(), backend="loop")
    with pytest.raises(ValueError, match="coupled must be 'error' or 'rows'; got 'yes'"):
        persample.per_sample(model, cross_entropy, *batch(), coupled="yes")
    with pytest.raises(ValueError, match="chunk_size must be a positive number of samples, or None; got 0"):
        persample.per_sample(model, cross_entropy, *batch(), chunk_size=0)


def test_a_function_is_no_model() -> None:
    with pytest.raises(Exception, match=r"persample\.grad|nn\.modules\.module\.Module"):  # jaxtyping looks first here
        persample.per_sample(lambda x: x, cross_entropy, *batch())  # type: ignore[arg-type]


@every_backend
def test_errors_of_the_model_are_the_callers(model: Net, backend: str) -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        persample.per_sample(model, cross_entropy, torch.zeros(5, 7).double(), batch()[1], backend=backend)


# --- which parameters -------------------------------------------------------------------------------------


@every_backend
def test_unused_parameters_are_reported_and_zero(model: Net, backend: str) -> None:
    x, t = batch()
    psg = persample.per_sample(model, cross_entropy, x, t, backend=backend)
    assert psg.unused == ("idle.weight",)
    assert psg.grads()["idle.weight"].shape == (5, 2, 2)
    assert not psg.grads()["idle.weight"].any()
    assert not psg.norms("layer")["idle"].any()
    assert not psg.gram("param")["idle.weight"].any()
    assert not psg.weighted_sum(torch.ones(5).double())["idle.weight"].any()
    assert rel_err(psg.grads(), loop_grads(model, cross_entropy, x, t)) < 1e-12


class Scaled(nn.Module):
    """With a number that this loss does not use: a logit scale, a temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.scale = nn.Linear(4, 3), nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x)


@pytest.mark.parametrize(
    "options",
    [{}, {"backend": "vmap"}, {"hold": "graph"}, {"chunk_size": 2}, {"coupled": "rows"}],
    ids=str,
)
def test_an_unused_number_has_zeros(options: dict[str, Any]) -> None:
    model, (x, t) = Scaled().double(), batch()
    psg, zero = persample.per_sample(model, cross_entropy, x, t, **options), torch.zeros((), dtype=torch.float64)
    torch.testing.assert_close(psg.grads()["scale"], torch.zeros(5, dtype=torch.float64))
    torch.testing.assert_close(psg.weighted_sum(torch.ones(5).double())["scale"], zero)
    torch.testing.assert_close(psg.clipped_sum(1.0)["scale"], zero)
    torch.testing.assert_close(psg.clipped_sum(dict.fromkeys(psg.layers, 1.0))["scale"], zero)
    for per in ("total", "layer", "param"):
        assert rel_err(psg.norms(per), expected(loop_grads(model, cross_entropy, x, t))["norms", per]) < 1e-12
        assert rel_err(psg.gram(per), expected(loop_grads(model, cross_entropy, x, t))["gram", per]) < 1e-12
    torch.testing.assert_close(psg.dot({"scale": zero + 1}), torch.zeros(5, dtype=torch.float64))


@every_backend
@pytest.mark.parametrize("frozen", [["body.0.weight"], ["head.bias"], ["body.0.weight", "body.0.bias"]])
def test_frozen_parameters_are_left_out(model: Net, backend: str, frozen: list[str]) -> None:
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    psg = persample.per_sample(model, cross_entropy, *batch(), backend=backend)
    assert not psg.grads().keys() & set(frozen)
    assert rel_err(psg.grads(), loop_grads(model, cross_entropy, *batch())) < 1e-12


@every_backend
def test_tied_parameters_once_under_their_first_name(backend: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    model[2].weight = model[0].weight
    psg = persample.per_sample(model, lambda out, t: out.square().sum(1), *batch(), backend=backend)
    assert list(psg.grads()) == ["0.weight", "0.bias", "2.bias"]


# --- inputs -----------------------------------------------------------------------------------------------


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.lin(left - right)


@every_backend
def test_tuples_are_positional_and_dicts_keywords(backend: str) -> None:
    model, (x, t) = Pair().double(), batch()
    as_tuple = persample.per_sample(model, cross_entropy, (x, 2 * x), t, backend=backend).grads()
    as_dict = persample.per_sample(model, cross_entropy, {"right": 2 * x, "left": x}, t, backend=backend).grads()
    assert rel_err(as_tuple, as_dict) == 0
    assert rel_err(as_tuple, loop_grads(model, cross_entropy, (x, 2 * x), t)) < 1e-12


class Encoding(dict):
    """As the outputs of models in Hugging Face's transformers."""


@pytest.mark.parametrize("kind", [UserDict, Encoding])  # a tokenizer's batch is a UserDict
@pytest.mark.parametrize("options", [{}, {"chunk_size": 2}, {"backend": "hooks"}, {"backend": "vmap"}])
def test_batches_of_tokenizers_are_keywords(kind: type, options: dict[str, Any]) -> None:
    model, (x, t) = Pair().double(), batch()
    as_dict = persample.per_sample(model, cross_entropy, {"left": x, "right": 2 * x}, t).grads()
    found = persample.per_sample(model, cross_entropy, kind({"left": x, "right": 2 * x}), t, **options)
    assert rel_err(found.grads(), as_dict) < 1e-12
    assert isinstance(found, ChunkedPerSampleGrads) == ("chunk_size" in options)


# --- what is computed -------------------------------------------------------------------------------------


@every_backend
def test_weighted_sum_with_coefficients_for_each_layer(model: Net, backend: str) -> None:
    psg = persample.per_sample(model, cross_entropy, *batch(), backend=backend)
    want = loop_grads(model, cross_entropy, *batch())
    assert psg.layers == {
        "body.0": ("body.0.weight", "body.0.bias"),
        "head": ("head.weight", "head.bias"),
        "idle": ("idle.weight",),
    }
    c = {layer: torch.randn(5, dtype=torch.float64) for layer in psg.layers}
    assert rel_err(psg.weighted_sum(c), weighted_sum(want, c)) < 1e-12
    with pytest.raises(ValueError, match=r"c names layers \['tail'\] that are not there and misses \['idle'\]"):
        psg.weighted_sum({"body.0": c["idle"], "head": c["idle"], "tail": c["idle"]})
    with pytest.raises(ValueError, match=r"shape \[B\] = \[5\].*got \(4,\)"):
        psg.weighted_sum(torch.ones(4))


@every_backend
def test_dot_takes_some_of_the_parameters(model: Net, backend: str) -> None:
    psg = persample.per_sample(model, cross_entropy, *batch(), backend=backend)
    v = torch.randn(3, 6, dtype=torch.float64)
    want = (loop_grads(model, cross_entropy, *batch())["head.weight"] * v).sum((1, 2))
    assert rel_err(psg.dot({"head.weight": v}), want) < 1e-12
    with pytest.raises(ValueError, match=r"\['tail'\], which are no trainable parameters"):
        psg.dot({"tail": v})
    with pytest.raises(ValueError, match=r"'head.weight'.* parameter's shape \(3, 6\), or .*; got \(6, 3\)"):
        psg.dot({"head.weight": v.T})


@every_backend
def test_clipped_sum(model: Net, backend: str) -> None:
    x, t = batch()
    psg = persample.per_sample(model, cross_entropy, x, t, backend=backend)
    want = loop_grads(model, cross_entropy, x, t)
    bound = float(norms(want).median())
    assert rel_err(psg.clipped_sum(bound), clipped_sum(want, bound)) < 1e-12
    assert rel_err(psg.clipped_sum(1e9), weighted_sum(want, torch.ones(5))) < 1e-12
    with pytest.raises(ValueError, match="max_norm must be positive; got 0"):
        psg.clipped_sum(0)


def test_clipped_sum_by_layer(model: Net) -> None:
    psg = persample.per_sample(model, cross_entropy, *batch())
    want = loop_grads(model, cross_entropy, *batch())
    each = norms(want, "layer")
    bounds = {layer: 0.5 * float(value.max()) + 0.1 for layer, value in each.items()}
    factors = {layer: (bounds[layer] / each[layer]).clamp(max=1) for layer in each}
    assert rel_err(psg.clipped_sum(bounds), weighted_sum(want, factors)) < 1e-12
    with pytest.raises(ValueError, match=r"name every layer once; layers are \['body.0', 'head', 'idle'\]"):
        psg.clipped_sum({"head": 1.0})


def test_zero_gradients_are_not_divided_by(model: Net) -> None:
    psg = persample.per_sample(model, lambda out, t: 0 * out.sum(1), *batch())
    assert all(not value.any() for value in psg.clipped_sum(1.0).values())


@every_backend
def test_gram_against_a_second_batch(model: Net, backend: str) -> None:
    first = persample.per_sample(model, cross_entropy, *batch(), backend=backend)
    second = persample.per_sample(model, cross_entropy, *batch(3, seed=1), backend=backend)
    want, other = loop_grads(model, cross_entropy, *batch()), loop_grads(model, cross_entropy, *batch(3, seed=1))
    for per in ("total", "layer", "param"):
        assert rel_err(first.gram(per, second), gram(want, per, other)) < 1e-12
    assert first.gram(other=second).shape == (5, 3)
    assert rel_err(second.gram(other=first), first.gram(other=second).T) < 1e-12


def test_gram_with_another_backends_rows(model: Net) -> None:
    first = persample.per_sample(model, cross_entropy, *batch(), backend="hooks")
    second = persample.per_sample(model, cross_entropy, *batch(), backend="vmap")
    assert rel_err(first.gram(other=second), gram(loop_grads(model, cross_entropy, *batch()))) < 1e-12


KINDS: list[dict[str, Any]] = [{}, {"hold": "graph"}, {"chunk_size": 2}, {"chunk_size": 2, "hold": "graph"}]


@pytest.mark.parametrize("left", KINDS, ids=str)
@pytest.mark.parametrize("right", KINDS, ids=str)
def test_gram_of_every_kind_with_every_other(model: Net, left: dict[str, Any], right: dict[str, Any]) -> None:
    one = persample.per_sample(model, cross_entropy, *batch(), **left)
    two = persample.per_sample(model, cross_entropy, *batch(3, seed=1), **right)
    want, other = loop_grads(model, cross_entropy, *batch()), loop_grads(model, cross_entropy, *batch(3, seed=1))
    for per in ("total", "layer", "param"):
        assert rel_err(one.gram(per, two), gram(want, per, other)) < 1e-12


def test_gram_needs_the_same_parameters(model: Net) -> None:
    psg = persample.per_sample(model, cross_entropy, *batch())
    model.head.bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"same parameters.*differing names \['head.bias'\]"):
        psg.gram(other=persample.per_sample(model, cross_entropy, *batch()))


def test_per_is_checked(model: Net) -> None:
    psg = persample.per_sample(model, cross_entropy, *batch())
    with pytest.raises(Exception, match=r"total.*layer.*param"):  # beartype sees the literal first here
        psg.norms("module")  # type: ignore[arg-type]


def test_results_carry_no_graph(model: Net) -> None:
    psg = persample.per_sample(model, cross_entropy, *batch())
    made = [psg.losses, psg.norms(), psg.gram(), *psg.grads().values(), *psg.clipped_sum(1.0).values()]
    assert not any(tensor.requires_grad for tensor in made)


def test_everything_by_name(model: Net) -> None:
    """Every reduction of the oracle, by the names of the public API."""
    psg = persample.per_sample(model, cross_entropy, *batch())
    want = expected(loop_grads(model, cross_entropy, *batch()))
    for per in ("total", "layer", "param"):
        assert rel_err(psg.norms(per), want["norms", per]) < 1e-12
        assert rel_err(psg.gram(per), want["gram", per]) < 1e-12


# --- grad -------------------------------------------------------------------------------------------------


def test_grad_is_like_autograds(model: Net) -> None:
    x, t = batch()
    losses = cross_entropy(model(x), t)
    got = persample.grad(losses, model.parameters())
    want = loop_grads(model, cross_entropy, x, t)
    assert isinstance(got, tuple)
    assert rel_err(dict(zip(want, got, strict=True)), want) < 1e-12
    assert len(torch.autograd.grad(losses.sum(), [model.head.bias])) == 1  # the graph is still there


def test_grad_of_one_tensor_and_of_an_unused_one() -> None:
    w, idle = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    rows, zeros = persample.grad((torch.tensor([[1.0, 2.0], [3.0, 4.0]]) * w).sum(1), [w, idle])
    torch.testing.assert_close(rows, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    torch.testing.assert_close(zeros, torch.zeros(2, 3))
    assert len(persample.grad((torch.ones(2, 2) * w).sum(1), w)) == 1


def test_grad_refuses_what_is_no_parameter() -> None:
    w = torch.ones(2, requires_grad=True)
    losses = (torch.ones(3, 2) * w).sum(1)
    for wrong in (w * 2, torch.ones(2)):
        with pytest.raises(ValueError, match=r"params\[1\] must be a leaf tensor that requires a gradient"):
            persample.grad(losses, [w, wrong])
    with pytest.raises(Exception, match=r"already reduced over the batch|has 0 dimensions|violates type hint"):
        persample.grad(losses.sum(), w)


# --- explain ----------------------------------------------------------------------------------------------


@every_backend
def test_explain(model: Net, backend: str) -> None:
    psg = persample.per_sample(model, cross_entropy, *batch(), backend=backend)
    lines = {line.parameter: line for line in psg.explain()}
    assert lines.keys() == {name for name, _ in model.named_parameters()}
    used = lines["head.weight"]
    assert used.block == ("Dense" if backend == "vmap" else "Outer")
    assert used.operation == {"outputs": "Addmm", "hooks": "Linear", "vmap": "vmap"}[backend]
    assert used.nbytes > 0
    assert "unused" in f"{lines['idle.weight'].operation} {lines['idle.weight'].rule} {lines['idle.weight'].algorithm}"
    assert f"batch=5, parameters=5, backend={backend!r}" in repr(psg)


def test_automatic_choice_keeps_what_the_others_said() -> None:
    psg = persample.per_sample(Net().double(), cross_entropy, *batch(), backend="auto")
    assert psg.backend == "outputs"
