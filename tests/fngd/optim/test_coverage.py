"""An optimiser that would be plain SGD says so once, at its first step, with the largest parameters and the reason."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import fngd

MODELS = ("NGD", "FNGD", "KFAC", "EKFAC", "MBF", "HyLo", "SKFAC", "Eva")
B = 6


def build(name: str, model: nn.Module, params: Any = None, **options: Any) -> Any:
    needed = {"steps_per_epoch": 3} if name in ("FNGD", "HyLo") else {}
    return getattr(fngd, name)(model, params, lr=0.01, **needed, **options)


def told(model: nn.Module, opt: torch.optim.Optimizer, x: Tensor, steps: int = 3) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(steps):
            model(x).square().mean().backward()
            opt.step()
            opt.zero_grad()
    return [str(each.message) for each in found if issubclass(each.category, UserWarning)]


class Uses(nn.Module):
    """A parameter that some function uses, beside a small layer."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.first, self.weight = nn.Linear(4, 4), nn.Parameter(torch.randn(*shape) * 0.1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.first(x).tanh(), self.weight)


def tied(x: Tensor, w: Tensor) -> Tensor:
    return (x + F.embedding(x.argmax(1), w)) @ w.mT


LEFT: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    # name: model, parameter, part of the reason
    "product by entries": (lambda: Uses(lambda x, w: (x[:, None] * w).sum(2), 9, 4), "weight", "given to 'mul'"),
    "computed": (lambda: Uses(lambda x, w: F.linear(x, w.tanh()), 9, 4), "weight", "given to 'tanh'"),
    "adapters": (lambda: Uses(lambda x, w: F.linear(x, w @ w.mT), 4, 9), "weight", "given to 'matmul'"),
    "experts": (
        lambda: Uses(lambda x, w: torch.einsum("bi,eio->bo", x, w), 3, 4, 5), "weight", "given to 'einsum'",
    ),
    "table": (lambda: Uses(lambda x, w: x + F.embedding(x.argmax(1), w), 30, 4), "weight", "no layer is recognised"),
    "module table": (lambda: nn.Sequential(nn.Embedding(30, 4), nn.Linear(4, 2)), "0.weight", "an embedding's table"),
    "weight_norm": (
        lambda: nn.Sequential(nn.Linear(4, 2), parametrizations.weight_norm(nn.Linear(2, 9))),
        "1.parametrizations.weight.original1", "parametrised",
    ),
    "spectral_norm": (
        lambda: nn.Sequential(nn.Linear(4, 2), parametrizations.spectral_norm(nn.Linear(2, 9))),
        "1.parametrizations.weight.original", "parametrised",
    ),
    "the whole model is parametrised": (
        lambda: parametrizations.weight_norm(nn.Linear(4, 9)), "parametrizations.weight.original1", "parametrised",
    ),
    "recurrent": (lambda: Recurrent(), "rnn.weight_ih_l0", "given to 'lstm'"),
}  # fmt: skip


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.last = nn.LSTM(4, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.rnn(x[:, None])[0][:, 0])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("what", LEFT)
def test_most_of_a_model_left_plain_is_told_once(what: str, name: str) -> None:
    make, parameter, why = LEFT[what]
    torch.manual_seed(0)
    model = make()
    x = torch.randint(30, (B,)) if what == "module table" else torch.randn(B, 4)
    opt = build(name, model)
    (sentence,) = told(model, opt, x)
    shape = list(model.get_parameter(parameter).shape)
    assert sentence.startswith(f"{name} preconditions ")
    assert f"{parameter} {shape} (" in sentence
    assert why in sentence
    assert "precondition=False" in sentence

    left = [each for key, each in model.named_parameters() if key.split(".")[0] == parameter.split(".")[0]]
    rest = [each for each in model.parameters() if all(each is not own for own in left)]
    opt.remove()
    groups = [{"params": left, "precondition": False}, *([{"params": rest}] if rest else [])]
    assert told(model, build(name, model, groups), x) == [], "what the user has chosen is not told"


ORDINARY: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)),
    "product": lambda: Uses(lambda x, w: x @ w, 4, 9),
    "Conv1D": lambda: Uses(lambda x, w: torch.addmm(x.new_zeros(9), x, w), 4, 9),
    "convolution": lambda: Uses(lambda x, w: F.conv1d(x[:, None], w), 9, 1, 2),
    "adapters": lambda: Uses(lambda x, w: x @ w @ w.T, 4, 9),
    "attention": lambda: Attending(),
    "frozen": lambda: nn.Sequential(nn.Linear(4, 50).requires_grad_(False), nn.Linear(50, 2)),
    "frozen but for biases": lambda: frozen_weights(nn.Sequential(nn.Linear(4, 50), nn.Linear(50, 2))),
    "small table": lambda: Uses(lambda x, w: x[:, :2] + F.embedding(x.argmax(1), w), 4, 2),
    "checkpoint of a branch": lambda: nn.Sequential(nn.Linear(4, 2), Unused()),
}


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x[:, None], x[:, None], x[:, None])[0]


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(50, 50))

    def forward(self, x: Tensor) -> Tensor:
        return x


def frozen_weights(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.dim() < 2)
    return model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("what", ORDINARY)
def test_an_ordinary_model_is_not_told_of(what: str, name: str) -> None:
    torch.manual_seed(0)
    model, x = ORDINARY[what](), torch.randn(B, 4)
    if what == "adapters" and name in ("KFAC", "EKFAC", "MBF", "HyLo", "SKFAC", "Eva"):
        assert "used by several layers" in told(model, build(name, model), x)[0]
        return
    assert told(model, build(name, model), x) == []


@pytest.mark.parametrize("name", MODELS)
def test_functions_false_is_a_choice_but_not_of_plain_sgd(name: str) -> None:
    model, x = Uses(lambda x, w: x @ w, 4, 90), torch.randn(B, 4)
    assert told(model, build(name, model, functions=False), x) == []
    model = nn.Sequential(Attending())
    (sentence,) = told(model, build(name, model, functions=False), x)
    assert "preconditions nothing" in sentence
    assert "functions=False" in sentence


@pytest.mark.parametrize("name", MODELS)
def test_a_tied_head(name: str) -> None:
    model, x = Uses(tied, 30, 4), torch.randn(B, 4)
    found = told(model, build(name, model), x)
    if name in ("NGD", "FNGD"):
        assert found == [], "the head's part is preconditioned"
    else:
        assert "weight [30, 4] (its weight is used besides calling it, by EmbeddingBackward0" in found[0]


@pytest.mark.parametrize("name", MODELS)
def test_other_rules_are_a_choice(name: str) -> None:
    model, x = nn.Sequential(nn.Embedding(30, 4), nn.Linear(4, 2)), torch.randint(30, (B,))
    assert told(model, build(name, model, other="adamw"), x) == []


@pytest.mark.parametrize("name", MODELS)
def test_functions_that_another_rule_has_taken(name: str) -> None:
    model, x = Uses(lambda x, w: x @ w, 4, 90), torch.randn(B, 4)
    opt = build(name, model, other="adamw")
    (sentence,) = told(model, opt, x)
    assert "weight [4, 90] (other= has taken it before the function that uses it was known" in sentence
    opt.remove()
    groups = [{"params": model.parameters(), "rule": "sgd"}]
    assert told(model, build(name, model, groups, other="adamw"), x) == []
    model = Uses(lambda x, w: x[:, :2] + F.embedding(x.argmax(1), w), 40, 2)
    assert told(model, build(name, model, other="adamw"), x) == []


@pytest.mark.parametrize("name", [*MODELS, "Shampoo"])
def test_no_matrix_at_all_is_told_by_the_constructor(name: str) -> None:
    model = nn.LayerNorm(4)
    with pytest.warns(UserWarning, match=f"^{name} preconditions nothing; .*it is no matrix"):
        opt = fngd.Shampoo(model.parameters()) if name == "Shampoo" else build(name, model)
    assert told(model, opt, torch.randn(B, 4)) == []


@pytest.mark.parametrize("name", MODELS)
def test_a_head_that_is_added_later(name: str) -> None:
    body, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(B, 4)
    head = nn.Linear(4, 30)
    opt = build(name, body)
    assert told(body, opt, x) == []
    opt.add_param_group({"params": head.parameters()})
    both = nn.Sequential(body, head)
    (sentence,) = told(both, opt, x)
    assert "one [30, 4] (it is not in the model" in sentence
    body.append(extra := nn.Linear(4, 50))
    opt.add_param_group({"params": extra.parameters()})
    (sentence,) = told(body, opt, x)
    assert "1.weight [50, 4] (it was added after the model was reweighted)" in sentence
    opt.add_param_group({"params": nn.Linear(4, 60).parameters(), "precondition": False})
    assert told(body, opt, x) == []


def test_shampoo_is_told_of_gradients_that_it_leaves() -> None:
    table = nn.Embedding(9, 3, sparse=True)
    opt = fngd.Shampoo(table.parameters(), momentum=0.0)
    assert "one [9, 3] (its gradient is sparse)" in told(table, opt, torch.arange(3))[0]
    small = nn.Linear(3, 3)
    opt = fngd.Shampoo(small.parameters(), preset="shampoo-pytorch")
    assert "block=128 merges it" in told(small, opt, torch.randn(B, 3))[0]
    assert told(small, fngd.Shampoo(small.parameters()), torch.randn(B, 3)) == []


def test_copies_and_steps_without_gradients() -> None:
    model = Uses(lambda x, w: (x[:, None] * w).sum(2), 9, 4)
    opt = fngd.NGD(model, lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step()
    assert len(told(model, opt, torch.randn(B, 4))) == 1
