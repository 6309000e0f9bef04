"""reweight: every way to write a linear layer or a convolution with a parameter is one, and follows its samples."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from persample import LayerGrads, reweight
from persample.reweighting.functions.interception import WatchedView

B, T = 5, 3
pytestmark = pytest.mark.usefixtures("double")


class Model(nn.Module):
    """A layer, one linear function of what it returns, and something after it."""

    def __init__(self, shape: tuple[int, ...], function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.function = nn.Linear(4, 4), function
        self.weight, self.bias = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.first(x).tanh(), self.weight, self.bias).sin()


def conv(function: Callable[..., Tensor], **options: object) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda x, w, b: function(x.view(len(x), 4, *(T,) * (w.dim() - 2)), w, b, **options)


TABLE: dict[str, tuple[tuple[int, ...], tuple[int, ...], Callable[[Tensor, Tensor, Tensor], Tensor], bool]] = {
    # name: shape of the weight, of a sample, what is called, whether it has the bias
    "x @ w + b": ((4, 3), (4,), lambda x, w, b: x @ w + b, False),
    "x @ w.T of tokens": ((3, 4), (T, 4), lambda x, w, b: x @ w.T + b, False),
    "addmm": ((4, 3), (4,), lambda x, w, b: torch.addmm(b, x, w), True),
    "Conv1D of tokens": (
        (4, 3), (T, 4), lambda x, w, b: torch.addmm(b, x.view(-1, 4), w).view(*x.shape[:-1], 3), True,
    ),
    "transpose(0, 1)": ((4, 3), (T, 4), lambda x, w, b: F.linear(x, w.transpose(0, 1), b), True),
    "einsum": ((4, 3), (T, 4), lambda x, w, b: torch.einsum("bti,io->bot", x, w) + b[:, None], False),
    "einsum over positions": ((4, 3), (T, 4), lambda x, w, b: torch.einsum("bti,io->bo", x, w) + b, False),
    "w @ x.mT": ((3, 4), (T, 4), lambda x, w, b: w @ x.mT + b[:, None], False),
    "w @ x.T": ((3, 4), (4,), lambda x, w, b: (w @ x.T).T + b, False),
    "bmm": ((4, 3), (T, 4), lambda x, w, b: torch.bmm(x, w.expand(len(x), -1, -1)) + b, False),
    "baddbmm": ((4, 3), (T, 4), lambda x, w, b: torch.baddbmm(b, x, w[None].expand(len(x), -1, -1)), True),
    "tensordot": ((4, 3), (T, 4), lambda x, w, b: torch.tensordot(x, w, dims=1) + b, False),
    "conv1d": ((3, 4, 2), (T, 4), conv(F.conv1d, padding=1), True),
    "conv1d of kernel 1": ((3, 4, 1), (T, 4), lambda x, w, b: F.conv1d(x.mT, w, b), True),
    "conv2d in groups": ((3, 4, 2, 2), (T * T, 4), conv(F.conv2d, stride=2, padding="valid"), True),
    "conv_transpose1d": ((4, 3, 2), (T, 4), conv(F.conv_transpose1d, stride=2), True),
}  # fmt: skip


def rows(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Each sample's gradients of Σ output², by parameter."""
    wanted = {name: each for name, each in model.named_parameters() if each.requires_grad}
    found = [torch.autograd.grad(model(one).square().sum(), list(wanted.values())) for one in x.split(1)]
    return {name: torch.stack([row[number] for row in found]) for number, name in enumerate(wanted)}


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("name", TABLE)
def test_a_linear_function_of_the_batch_is_a_layer(name: str, joint: bool) -> None:
    shape, sample, function, biased = TABLE[name]
    model, x, c = Model(shape, function), torch.randn(B, *sample), torch.randn(B)
    expected, grams = rows(model, x), {}

    def policy(layer: str, grads: LayerGrads) -> Tensor:
        grams[layer] = grads.gram()
        torch.testing.assert_close(grads.norms().square(), grams[layer].diag())
        return c

    def jointly(asked: dict[str, LayerGrads]) -> dict[str, Tensor]:
        return {layer: policy(layer, grads) for layer, grads in asked.items()}

    with reweight(model, jointly if joint else policy, joint=joint, functions=True) as handle:
        for _ in range(2):
            model.zero_grad()
            model(x).square().sum().backward()
        weight, bias = handle.parts("weight")
        assert weight.whole
        assert handle.explain()["weight"].startswith("reweighted")
    assert set(grams) == {"first", "weight"}
    assert weight.param is model.weight
    assert (bias is not None) == biased
    for key, parameter in model.named_parameters():
        plain = key == "bias" and not biased
        torch.testing.assert_close(parameter.grad, torch.tensordot(torch.ones(B) if plain else c, expected[key], 1))
    flat = torch.cat([expected["weight"].flatten(1), *([expected["bias"]] if biased else [])], 1)
    torch.testing.assert_close(grams["weight"], flat @ flat.T)


def test_columns_of_one_matrix_are_layers_of_their_own() -> None:
    def forward(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        queries, keys = w.split(2, dim=1)
        return x @ queries + 2 * (x + 1) @ keys + b[:2]

    model, x = Model((4, 4), forward), torch.randn(B, 4)
    expected, c = rows(model, x)["weight"], torch.randn(B)
    with reweight(model, lambda layer, grads: c if layer == "weight[:, 2:4]" else None, functions=True) as handle:
        model(x).square().sum().backward()
        assert handle.functions == ("weight[:, 0:2]", "weight[:, 2:4]")
        part = handle.parts("weight[:, 2:4]")[0]
        assert (part.axis, part.start, part.stop, part.whole) == (1, 2, 4, False)
        assert torch.equal(part.of(model.weight), model.weight[:, 2:].T)
        assert part.meets(handle.parts("weight[:, 2:4]")[0])
        assert not part.meets(handle.parts("weight[:, 0:2]")[0])
    torch.testing.assert_close(model.weight.grad[:, 2:], torch.tensordot(c, expected, 1)[:, 2:])
    torch.testing.assert_close(model.weight.grad[:, :2], expected.sum(0)[:, :2])


@pytest.mark.parametrize("joint", [False, True])
def test_a_matrix_and_its_transpose_are_two_layers(joint: bool) -> None:
    def forward(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return (((x @ w).sin() @ w.T + x) @ w).tanh() @ w.mT

    model, x, c, asked = Model((4, 4), forward), torch.randn(B, 4), torch.randn(B), []
    model.bias.requires_grad_(False)
    expected = rows(model, x)

    def policy(layers: object, *_: object) -> object:
        asked.extend([layers] if isinstance(layers, str) else layers)
        return c if isinstance(layers, str) else dict.fromkeys(layers, c)

    with reweight(model, policy, joint=joint, functions=True):
        model(x).square().sum().backward()
    assert sorted(asked) == ["first", "weight", "weight (2)"]
    torch.testing.assert_close(model.weight.grad, torch.tensordot(c, expected["weight"], 1))


def test_a_tied_head_is_reweighted_and_the_table_is_not() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(7, 4)

        def forward(self, ids: Tensor) -> Tensor:
            return self.table(ids).tanh() @ self.table.weight.t()

    model, ids = Tied(), torch.randint(7, (B, T))
    model(ids).square().sum().backward()
    plain = model.table.weight.grad.clone()
    model.zero_grad()
    head = torch.autograd.grad(
        (model.table(ids).tanh().detach() @ model.table.weight.T).square().sum(), model.table.weight
    )
    with reweight(model, lambda layer, grads: torch.full((B,), 3.0), functions=True) as handle:
        model(ids).square().sum().backward()
        assert handle.explain() == {
            "table.weight": "reweighted, samples on axis 0 of its output, for its calls alone: EmbeddingBackward0 uses "
            "its weight, too"
        }
    torch.testing.assert_close(model.table.weight.grad, plain + 2 * head[0])


def test_adapters_of_low_rank() -> None:
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4), requires_grad=False)
            self.a, self.b = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(3, 2))
            self.merged = False

        def forward(self, x: Tensor) -> Tensor:
            if self.merged:
                return F.linear(x, self.weight + self.b @ self.a)
            return F.linear(x, self.weight) + x @ self.a.T @ self.b.T

    model, x, c = Adapted(), torch.randn(B, 4), torch.randn(B)
    expected = {name: torch.tensordot(c, each, 1) for name, each in rows(model, x).items()}
    with reweight(model, lambda layer, grads: c, functions=True) as handle:
        model(x).square().sum().backward()
        assert set(handle.layers) == {"a", "b"}
    torch.testing.assert_close({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, expected)
    model.merged = True
    with reweight(model, lambda layer, grads: pytest.fail("no layer"), functions=True) as handle:
        model(x).square().sum().backward()
        assert all(handle.explain()[name].startswith("plain: it was given to 'matmul', and not as") for name in "ab")


@pytest.mark.parametrize("reentrant", [False, True])
def test_in_a_checkpoint(reentrant: bool) -> None:
    model, x, c = Model((3, 4, 2), conv(F.conv1d)), torch.randn(B, T, 4, requires_grad=True), torch.randn(B)
    outer = nn.Sequential()
    outer.inner = model
    outer.forward = lambda x: checkpoint(model, x, use_reentrant=reentrant)
    expected = rows(model, x.detach())
    with reweight(outer, lambda layer, grads: c, functions=True):
        outer(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, torch.tensordot(c, expected[name], 1))


def test_views_are_ordinary_tensors_after_the_pass() -> None:
    kept: list[Tensor] = []

    def forward(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        kept.append(w.T)
        assert type(kept[-1]) is WatchedView
        return x @ kept[-1].T + b

    model = Model((4, 3), forward)
    with reweight(model, lambda layer, grads: None, functions=True):
        model(torch.randn(B, 4)).sum().backward()
        assert type(kept[0]) is Tensor
    assert type(model.weight) is nn.Parameter
