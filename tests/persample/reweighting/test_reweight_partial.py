"""reweight: weights that a model uses besides calling their layers are told, and nothing else is."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import loop_grads_of
from passes import FACTORS, B, Loop, Mode, each_asking, gradients, same, squares, step
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fngd
from persample.reweighting import reweight

pytestmark = pytest.mark.usefixtures("double")


class Autoencoder(nn.Module):
    """What `decode` makes of the code and the encoder's weight is the output."""

    def __init__(self, decode: Callable[[Tensor, Tensor], Tensor] = lambda h, w: F.linear(h, w.t())) -> None:
        super().__init__()
        self.enc, self.last, self.decode = nn.Linear(5, 3), nn.Linear(5, 5), decode

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.decode(self.enc(x).tanh(), self.enc.weight).tanh())


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enc, self.last = nn.Conv1d(1, 3, 3, padding=1), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.enc(x[:, None]).tanh()
        return self.last(F.conv_transpose1d(h, self.enc.weight, padding=1)[:, 0])


class Language(nn.Module):
    """A head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.enc = nn.Embedding(7, 3), nn.Linear(3, 7)
        self.enc.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.enc(self.table(x.argmax(1)))


PARTIAL: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "transposed": (Autoencoder, {}, "TBackward0"),
    "twice": (lambda: Autoencoder(lambda h, w: F.linear(F.linear(h, w.T), w) @ w), {}, "PermuteBackward0, TBack"),
    "product": (lambda: Autoencoder(lambda h, w: h @ w), {}, "MmBackward0"),
    "scaled, functions": (lambda: Autoencoder(lambda h, w: h @ (2 * w)), {"functions": True}, "MulBackward0"),
    "einsum": (lambda: Autoencoder(lambda h, w: torch.einsum("bi,io->bo", h, w)), {}, "Backward0"),
    "checkpoint": (
        lambda: Autoencoder(lambda h, w: checkpoint(torch.mm, h, w, use_reentrant=False)), {}, "MmBackward0",
    ),
    "convolution": (Convolutions, {}, "ConvolutionBackward0"),
}  # fmt: skip


@each_asking
@pytest.mark.parametrize("name", PARTIAL)
def test_another_use_of_a_weight_is_told_once(mode: Mode, name: str) -> None:
    build, options, by = PARTIAL[name]
    model, x = build(), torch.randn(B, 5)
    with mode.on(model, **options) as handle:
        loss = squares(model(x)).sum()
        with pytest.warns(UserWarning, match=rf"'enc' is used besides calling the layer \(by .*({by})") as told:
            loss.backward()
        assert len(told) == 1
        for _ in range(2):
            step(model, lambda: squares(model(x)))
        why = handle.explain()
    assert why["enc"].startswith("reweighted, samples on axis 0 of its output, for its calls alone: ")
    assert why["enc"].endswith(" uses its weight, too")
    assert all("alone" not in reason for path, reason in why.items() if path != "enc")


@each_asking
@pytest.mark.parametrize("decode", [lambda h, w: F.linear(h, w.t()), lambda h, w: h @ w, lambda h, w: (w.T @ h.T).T])
def test_a_tied_product_is_a_layer_with_functions(mode: Mode, decode: Callable[[Tensor, Tensor], Tensor]) -> None:
    model, x = Autoencoder(decode), torch.randn(B, 5)
    rows = loop_grads_of(squares(model(x)), {"enc.weight": model.enc.weight})
    with mode.on(model, functions=True) as handle:
        got = step(model, lambda: squares(model(x)))
        assert handle.functions == ("enc.weight",)
        assert all(reason.startswith("reweighted, samples on axis 0") for reason in handle.explain().values())
    torch.testing.assert_close(got["enc.weight"], torch.tensordot(FACTORS, rows["enc.weight"], 1))


def test_a_tied_embedding_is_explained_without_a_warning() -> None:
    model, x = Language(), torch.randn(B, 5)
    with reweight(model, lambda layer, grads: FACTORS) as handle:
        step(model, lambda: squares(model(x)))
        why = handle.explain()
    told = "reweighted, samples on axis 0 of its output, for its calls alone: EmbeddingBackward0 uses its weight, too"
    assert why["enc"] == told


def test_what_is_told_is_what_happens() -> None:
    """Calls with c, the other use without: the message's own words, against one backward pass for each sample."""
    model, x = Autoencoder(), torch.randn(B, 5)
    copied = nn.Parameter(model.enc.weight.detach().clone())
    losses = squares(model.last(F.linear(model.enc(x).tanh(), copied.t()).tanh()))
    rows = loop_grads_of(losses, {"called": model.enc.weight, "other": copied})
    expected = torch.tensordot(FACTORS, rows["called"], 1) + rows["other"].sum(0)
    with reweight(model, lambda layer, grads: FACTORS), pytest.warns(UserWarning, match="besides"):
        got = step(model, lambda: squares(model(x)))
    torch.testing.assert_close(got["enc.weight"], expected)


def test_known_factors_are_told_of_and_layers_left_out_are_not() -> None:
    model, x = Autoencoder(), torch.randn(B, 5)
    left_out = {"enc": None, "last": FACTORS}
    with reweight(model, lambda layer, grads: left_out[layer], known=lambda layer, batch, device: None) as handle:
        step(model, lambda: squares(model(x)))
        assert "TBackward0" in handle.explain()["enc"]
        left_out["enc"] = FACTORS
        with pytest.warns(UserWarning, match="'enc'"):
            step(model, lambda: squares(model(x)))
    with reweight(model, lambda layer, grads: None, known=lambda layer, batch, device: FACTORS):
        with pytest.warns(UserWarning, match="'enc'"):
            step(model, lambda: squares(model(x)))
        step(model, lambda: squares(model(x)))


def test_fngd_tells_and_a_group_without_preconditioning_does_not() -> None:
    model, x = Autoencoder(lambda h, w: h @ w.exp()), torch.randn(B, 5)
    opt = fngd.NGD(model, lr=0.1)
    with pytest.warns(UserWarning, match="'enc'"):
        squares(model(x)).mean().backward()
    opt.step()
    assert "ExpBackward0" in opt.explain()["enc"]
    opt.remove()
    groups = [{"params": [*model.last.parameters()]}, {"params": [*model.enc.parameters()], "precondition": False}]
    opt = fngd.NGD(model, groups, lr=0.1)
    squares(model(x)).mean().backward()
    assert opt.explain()["enc"].startswith("plain: its weight is in a group with precondition=False")
    opt.remove()


class Ordinary(nn.Module):
    """A layer called twice, one tied to it, one with its weight and another bias; a checkpoint; a side output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(5, 5) for _ in range(4))
        self.b.weight, self.b.bias, self.c.weight = self.a.weight, self.a.bias, self.a.weight
        self.conv, self.table = nn.Conv1d(1, 2, 3, padding="same", padding_mode="circular"), nn.Embedding(3, 5)

    def forward(self, x: Tensor) -> dict[str, Any]:
        h = self.c(self.b(self.a(self.a(x).tanh())).relu_())
        h = checkpoint(self.d, h, use_reentrant=False) + self.table(x.argmax(1) % 3)
        return {"y": self.conv(h[:, None]).flatten(1), "hidden": [h, None]}


class Attention(nn.Module):
    """Queries that all samples share: their rows of the projection are plain, as `explain` says, the others not."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.attn = nn.Parameter(torch.randn(3, 1, 6)), nn.MultiheadAttention(6, 2)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :1] * torch.ones(6)
        query = self.query.expand(-1, len(x), -1)
        return self.head(self.attn(query, x[None], x[None])[0].transpose(0, 1).sum(1))


UNSUSPICIOUS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "sequential": (lambda: nn.Sequential(nn.Linear(5, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)), {}),
    "a layer alone": (lambda: nn.Linear(5, 2), {}),
    "ordinary": (Ordinary, {}),
    "ordinary, functions": (Ordinary, {"functions": True}),
    "attention": (Attention, {}),
    "attention, functions": (Attention, {"functions": True}),
    "called many times": (lambda: Loop(nn.Linear(6, 6), nn.Linear(6, 2)), {}),
    "called and a function's": (lambda: Autoencoder(lambda h, w: F.linear(F.pad(h, (0, 2)), w) @ torch.ones(3, 5)),
                                {"functions": True}),
    "normed": (lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 4)), nn.Linear(4, 2)), {}),
}  # fmt: skip


@each_asking
@pytest.mark.parametrize("name", UNSUSPICIOUS)
def test_nothing_is_told_of_other_models(mode: Mode, name: str) -> None:
    """Nor of a penalty on the weights, of hooks that change gradients, of two micro-batches, of parts of a graph."""
    build, options = UNSUSPICIOUS[name]
    model, x = build(), torch.randn(B, 6 if name == "called many times" else 5)
    for parameter in list(model.parameters())[:2]:
        parameter.register_hook(lambda grad: 2 * grad)

    def losses() -> Tensor:
        output = model(x)
        return squares(output["y"] if isinstance(output, dict) else output)

    with warnings.catch_warnings(), mode.on(model, **options) as handle:
        warnings.simplefilter("error")
        (losses().sum() + sum(each.square().sum() for each in model.parameters())).backward()
        losses().sum().backward()  # accumulated
        torch.autograd.grad(losses().sum() + losses().sum(), list(model.parameters()), allow_unused=True)
        why = handle.explain()
    assert any(reason.startswith("reweighted") for reason in why.values())
    assert all("alone" not in reason for reason in why.values())


@each_asking
def test_what_is_behind_the_inputs_is_not_looked_at(mode: Mode) -> None:
    """A recurrent model that gets its own state back, from before it was reweighted, too."""
    model, x = nn.Linear(3, 3), torch.randn(B, 3)
    state = model(x).tanh()
    with mode.on(model) as handle:
        model(state).sum().backward()
        assert handle.explain() == {"": "reweighted, samples on axis 0 of its output"}


def test_the_gradients_of_an_ordinary_model_are_as_before() -> None:
    model, x = Ordinary(), torch.randn(B, 5)
    mode = Mode(joint=False, gram=False)
    called = ["a.weight", "a.bias", "c.bias"]
    expected = mode.expected(
        model,
        squares(model(x)["y"]),
        {"shared": called, "d": ["d.weight", "d.bias"], "conv": ["conv.weight", "conv.bias"]},
    )
    with mode.on(model):
        for _ in range(2):
            same(step(model, lambda: squares(model(x)["y"])), expected)
        assert set(gradients(model)) == set(expected)


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, by a category that differs from torch to torch
        return torch.jit.script(nn.Sequential(nn.Linear(3, 2), nn.Tanh()))


def traced() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, by a category that differs from torch to torch
        return torch.jit.trace(nn.Sequential(nn.Linear(3, 2), nn.Tanh()), torch.randn(B, 3))


@pytest.mark.parametrize("build", [scripted, traced])
@pytest.mark.parametrize("within", [False, True])
def test_programs_of_torchscript_are_refused_in_words(build: Callable[[], nn.Module], within: bool) -> None:
    model = nn.Sequential(build(), nn.Linear(2, 2)) if within else build()
    what = "the module '0'" if within else "the model"
    with pytest.raises(ValueError, match=rf"^{what} is a \w+, made by torch\.jit.*Give the eager model"):
        reweight(model, lambda layer, grads: None)
