"""reweight, whatever passes come and go: layers called another number of times, graphs used again, errors half-way."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from oracle import loop_grads_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from persample.layers import LayerGrads
from persample.reweight import Reweighting, reweight

pytestmark = pytest.mark.usefixtures("double")
B = 4
FACTORS = torch.tensor([0.3, -1.2, 2.0, 0.7], dtype=torch.float64)
KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d)

Losses = Callable[[], Tensor]
Groups = dict[str, list[str]]
"""Layer → its parameters."""


def solved(gram: Tensor) -> Tensor:
    """Factors from a Gram matrix, scaled so that the matrix matters."""
    return torch.linalg.solve(gram / gram.diagonal().mean().clamp_min(1e-30) + torch.eye(len(gram)), torch.ones(B))


def modules_of(model: nn.Module) -> Groups:
    return {
        path: [f"{path}.{name}" if path else name for name, _ in module.named_parameters()]
        for path, module in model.named_modules()
        if isinstance(module, KINDS)
    }


class Mode:
    """How reweighting is asked for: layer by layer or jointly, with fixed factors or those of a Gram matrix."""

    def __init__(self, joint: bool, gram: bool) -> None:
        self.joint, self.gram = joint, gram
        self.asked: list[tuple[str, ...]] = []

    def factors(self, grads: LayerGrads) -> Tensor:
        return solved(grads.gram()) if self.gram else FACTORS

    def policy(self, *args: Any) -> Any:
        if self.joint:
            self.asked.append(tuple(args[0]))
            return {path: self.factors(grads) for path, grads in args[0].items()}
        self.asked.append((args[0],))
        return self.factors(args[1])

    def on(self, model: nn.Module, **options: Any) -> Reweighting:
        self.asked.clear()
        return reweight(model, self.policy, joint=self.joint, **options)

    def expected(self, model: nn.Module, losses: Tensor, groups: Groups | None = None) -> dict[str, Tensor]:
        """Σ_b c_b g_b from one backward pass for each sample; to be called while the model is not reweighted."""
        groups = modules_of(model) if groups is None else groups
        rows = loop_grads_of(losses, dict(model.named_parameters()))
        total = {name: row.sum(0) for name, row in rows.items()}
        for names in groups.values():
            flat = torch.cat([rows[name].flatten(1) for name in names], 1)
            c = solved(flat @ flat.T) if self.gram else FACTORS
            total.update({name: torch.tensordot(c, rows[name], 1) for name in names})
        return total


MODES = [Mode(joint, gram) for joint in (False, True) for gram in (False, True)]
every_mode = pytest.mark.parametrize(
    "mode", MODES, ids=[f"{'joint' if m.joint else 'apart'}-{'gram' if m.gram else 'fixed'}" for m in MODES]
)
each_asking = pytest.mark.parametrize("mode", MODES[::2], ids=["apart", "joint"])


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Zeros where there is none."""
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def same(got: dict[str, Tensor], *expected: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    for name, value in got.items():
        total = sum(each[name] for each in expected)
        torch.testing.assert_close(
            value, total, rtol=tolerance, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )


def step(model: nn.Module, losses: Losses) -> dict[str, Tensor]:
    model.zero_grad()
    losses().sum().backward()
    return gradients(model)


def squares(output: Tensor) -> Tensor:
    return output.sin().flatten(1).sum(1)


# --- as often as it pleases ---------------------------------------------------------------------------------


class Loop(nn.Module):
    """Applies one layer any number of times."""

    def __init__(self, cell: nn.Module, head: nn.Module | None = None) -> None:
        super().__init__()
        self.inp, self.cell, self.head = nn.Linear(6, 6), cell, head or nn.Linear(6, 2)

    def forward(self, x: Tensor, times: int = 1) -> Tensor:
        h = self.inp(x).tanh()
        for _ in range(times):
            h = self.cell(h).tanh()
        return self.head(h)


class Function(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x, need_weights=False)[0]


class Folded(nn.Module):
    """A convolution over [batch, positions, features], as channels and space."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        space = (6,) if isinstance(self.conv, nn.Conv1d | nn.ConvTranspose1d) else (2, 3)
        return self.conv(x.unflatten(-1, space)).flatten(2)


CELLS: dict[str, tuple[Callable[[], nn.Module], Groups]] = {
    "linear": (lambda: nn.Linear(6, 6), {}),
    "linear, no bias": (lambda: nn.Linear(6, 6, bias=False), {}),
    "function": (Function, {"cell.weight": ["cell.weight", "cell.bias"]}),
    "attention": (
        Attention,
        {
            "cell.attn.in_proj_weight": ["cell.attn.in_proj_weight", "cell.attn.in_proj_bias"],
            "cell.attn.out_proj": ["cell.attn.out_proj.weight", "cell.attn.out_proj.bias"],
        },
    ),
    "conv1d": (lambda: Folded(nn.Conv1d(5, 5, 3, padding=1)), {}),
    "conv1d groups": (lambda: Folded(nn.Conv1d(5, 5, 2, padding="same", groups=5, padding_mode="circular")), {}),
    "conv2d": (lambda: Folded(nn.Conv2d(5, 5, (1, 2), padding="same", bias=False)), {}),
    "conv2d reflect": (lambda: Folded(nn.Conv2d(5, 5, 3, padding=1, padding_mode="reflect")), {}),
    "transposed": (lambda: Folded(nn.ConvTranspose1d(5, 5, 2, padding=2, output_padding=1, dilation=3)), {}),
    "transposed 2d": (lambda: Folded(nn.ConvTranspose2d(5, 5, 3, padding=1)), {}),
}


def groups_of(model: nn.Module, functions: Groups) -> Groups:
    inside = {name for names in functions.values() for name in names}
    return {path: names for path, names in modules_of(model).items() if not set(names) & inside} | functions


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")
@every_mode
@pytest.mark.parametrize("name", CELLS)
def test_a_layer_is_called_another_number_of_times_in_each_pass(name: str, mode: Mode) -> None:
    build, functions = CELLS[name]
    model, x = Loop(build()), torch.randn(B, 5, 6)
    groups, counts = groups_of(model, functions), (1, 1, 2, 0, 5, 1)
    expected = {n: mode.expected(model, squares(model(x, n)), groups) for n in set(counts)}
    with mode.on(model, functions=bool(functions)):
        for n in counts:
            mode.asked.clear()
            same(step(model, lambda n=n: squares(model(x, n))), expected[n])
            paths = [path for asked in mode.asked for path in asked]
            assert len(paths) == len(set(paths)), "each layer is asked about once"
            assert all(p.grad is None for p in model.cell.parameters()) or n


class Ways(nn.Module):
    """Calls of one layer that do and do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        first = self.layer(x)
        self.layer(2 * x)  # never used
        with torch.no_grad():
            constant = self.layer(3 * x)
        dropped = self.layer(4 * x).detach()
        again = self.layer((first.tanh() + constant).detach())
        kept = self.layer(x.clone().requires_grad_())
        self.unused = kept
        return self.head(first.tanh() + again * dropped + self.layer(torch.zeros_like(x)))


@every_mode
def test_calls_that_do_not_reach_the_loss(mode: Mode) -> None:
    model, x = Ways(), torch.randn(B, 3)
    expected = mode.expected(model, squares(model(x)))
    with mode.on(model):
        for _ in range(3):
            same(step(model, lambda: squares(model(x))), expected)
            assert len(mode.asked) == (1 if mode.joint else 2)
            mode.asked.clear()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.b.weight, self.b.bias = self.a.weight, self.a.bias
        self.c.weight = self.a.weight  # with a bias of its own: another layer

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.c(self.a(x).relu_()).relu_())


@each_asking
def test_tied_layers_with_fixed_factors(mode: Mode) -> None:
    model, x = Tied(), torch.randn(B, 3)
    expected = mode.expected(model, squares(model(x)), {"all": [name for name, _ in model.named_parameters()]})
    with mode.on(model):
        for _ in range(2):
            same(step(model, lambda: squares(model(x))), expected)


# --- graphs that are used again -------------------------------------------------------------------------------


class Branches(nn.Module):
    """A trunk that is called twice, two heads on it, and one on the side."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.left, self.right, self.side = (nn.Linear(3, 3) for _ in range(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.middle = self.trunk(x).tanh()
        h = self.trunk(self.middle).tanh()
        return self.left(h), self.right(h), self.side(x)


def branch(model: Branches, x: Tensor, place: int) -> Tensor:
    return squares(model(x)[place])


@every_mode
def test_two_backward_passes_through_one_graph(mode: Mode) -> None:
    model, x = Branches(), torch.randn(B, 3)
    expected = mode.expected(model, branch(model, x, 0))
    with mode.on(model):
        loss = branch(model, x, 0).sum()
        loss.backward(retain_graph=True)
        same(gradients(model), expected)
        loss.backward()
    same(gradients(model), expected, expected)


@every_mode
def test_losses_with_shared_parts_one_after_the_other(mode: Mode) -> None:
    model, x = Branches(), torch.randn(B, 3)
    expected = [mode.expected(model, branch(model, x, place)) for place in range(3)]
    with mode.on(model):
        outputs = model(x)
        for place in range(3):
            squares(outputs[place]).sum().backward(retain_graph=place < 2)
            same(gradients(model), *expected[: place + 1])


@every_mode
def test_two_losses_at_once_and_two_forward_passes(mode: Mode) -> None:
    model, x, y = Branches(), torch.randn(B, 3), torch.randn(B, 3)
    outputs = model(x)
    together = mode.expected(model, squares(outputs[0]) + squares(outputs[1]))
    other = mode.expected(model, branch(model, y, 1))
    with mode.on(model):
        outputs = model(x)
        losses = [squares(outputs[0]).sum(), squares(outputs[1]).sum(), branch(model, y, 1).sum()]
        torch.autograd.backward(losses)
    same(gradients(model), together, other)


@every_mode
@pytest.mark.parametrize("chosen", ["trunk.weight", "trunk.bias", "left.weight", "left.bias", "weights", "biases", "x"])
@pytest.mark.parametrize("by_grad", [True, False], ids=["autograd.grad", "backward(inputs=)"])
def test_gradients_of_some_and_then_of_all(by_grad: bool, chosen: str, mode: Mode) -> None:
    model, x = Branches(), torch.randn(B, 3, requires_grad=True)
    expected = mode.expected(model, branch(model, x, 0))
    (of_x,) = torch.autograd.grad(branch(model, x, 0).sum(), x)
    used = {name: p for name, p in model.named_parameters() if name.split(".")[0] in ("trunk", "left")}
    some: dict[str, Tensor]
    if chosen == "x":
        some = {"x": x}
    elif chosen == "weights":
        some = {name: p for name, p in used.items() if name.endswith("weight")}
    elif chosen == "biases":
        some = {name: p for name, p in used.items() if name.endswith("bias")}
    else:
        some = {chosen: used[chosen]}
    with mode.on(model):
        loss = branch(model, x, 0).sum()
        if by_grad:
            found = torch.autograd.grad(loss, list(some.values()), retain_graph=True)
            got = dict(zip(some, found, strict=True))
            assert all(p.grad is None for p in (x, *model.parameters()))
        else:
            loss.backward(inputs=list(some.values()), retain_graph=True)
            got = {name: p.grad.clone() for name, p in some.items()}
            assert all(p.grad is None for p in model.parameters() if all(p is not each for each in some.values()))
        assert (chosen == "x") == (not mode.asked)
        same(got, {**expected, "x": of_x})
        model.zero_grad()
        x.grad = None
        loss.backward()
    same({**gradients(model), "x": x.grad}, {**expected, "x": of_x})


@each_asking
def test_create_graph(mode: Mode) -> None:
    """The gradients themselves are as always; to differentiate them is refused, not wrong."""
    model, x = Branches(), torch.randn(B, 3, requires_grad=True)
    expected = mode.expected(model, branch(model, x, 0))
    with mode.on(model):
        names = ["trunk.weight", "trunk.bias", "left.weight", "left.bias"]
        found = torch.autograd.grad(
            branch(model, x, 0).sum(), [model.get_parameter(name) for name in names], create_graph=True
        )
        same(dict(zip(names, found, strict=True)), expected)
        (slope,) = torch.autograd.grad(branch(model, x, 0).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            slope.square().sum().backward()


@each_asking
@pytest.mark.parametrize("output", ["curved", "linear"])
def test_second_derivatives_by_weights_are_refused(output: str, mode: Mode, request: pytest.FixtureRequest) -> None:
    """Though nothing that reaches a Tap or a Gate may have a gradient itself: z of a sum is ones."""
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)), torch.randn(B, 3)
    with mode.on(model):
        out = model(x)
        loss = (out.sin() if output == "curved" else out).sum()
        (slope,) = torch.autograd.grad(loss, model[2].weight, create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            (slope.square().sum() + loss).backward()


class BackwardInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x).tanh()
        squares(self.head(h)).sum().backward()
        h = self.layer(h.detach()).tanh()
        squares(self.head(h)).sum().backward(retain_graph=True)
        return self.head(self.layer(h.detach()))


@every_mode
def test_backward_inside_of_forward(mode: Mode) -> None:
    model, x = BackwardInside(), torch.randn(B, 3)
    h = model.layer(x).tanh()
    again = model.layer(h.detach()).tanh()
    expected = [
        mode.expected(model, squares(output))
        for output in (model.head(h), model.head(again), model.head(model.layer(again.detach())))
    ]
    with mode.on(model):
        for _ in range(2):
            same(step(model, lambda: squares(model(x))), *expected)


class Reentrant(nn.Module):
    """A checkpoint that uses a layer which is used outside of it, too."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.layer, self.reentrant = nn.Linear(3, 3), reentrant

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x).tanh()
        h = checkpoint(lambda h: self.layer(self.layer(h).relu_()), h, use_reentrant=self.reentrant)
        return self.layer(h)


@pytest.mark.parametrize("reentrant", [False, True])
@each_asking
def test_a_layer_inside_and_outside_of_a_checkpoint(mode: Mode, reentrant: bool) -> None:
    model, x = Reentrant(reentrant), torch.randn(B, 3, requires_grad=True)
    expected = mode.expected(model, squares(model(x))) if not reentrant else None
    if expected is None:
        expected = mode.expected(model, squares(_plain_reentrant(model, x)))
    with mode.on(model):
        for _ in range(3):
            same(step(model, lambda: squares(model(x))), expected)


def _plain_reentrant(model: Reentrant, x: Tensor) -> Tensor:
    h = model.layer(x).tanh()
    return model.layer(model.layer(model.layer(h).relu()))


@pytest.mark.parametrize("gram", [False, True])
def test_a_checkpoint_around_the_whole_model(gram: bool) -> None:
    for mode in (mode for mode in MODES if mode.gram == gram):
        model, x = Branches(), torch.randn(B, 3, requires_grad=True)
        expected = mode.expected(model, branch(model, x, 0))
        with mode.on(model):
            for reentrant in (False, True):
                run = partial(checkpoint, model, x, use_reentrant=reentrant)
                same(step(model, lambda run=run: squares(run()[0])), expected)


# --- layouts ----------------------------------------------------------------------------------------------------


class Layouts(nn.Module):
    """In-place operations on outputs and on views of them, memory in other orders, a time-first part, 4 axes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.more = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 2, stride=2, dilation=2, groups=2)
        self.up = nn.ConvTranspose2d(4, 3, 2, stride=2, output_padding=1)
        self.four, self.time = nn.Linear(3, 5), nn.Linear(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x.contiguous(memory_format=torch.channels_last))
        h[:, 0].mul_(2)
        h = self.more(h.relu_()[:, :, 1:].contiguous(memory_format=torch.channels_last))
        h[:, ::3].zero_()
        h = self.four(self.up(h).permute(0, 2, 3, 1))
        return self.time(h.transpose(0, 1).flatten(2).unflatten(2, (-1, 5)).tanh_()).transpose(0, 1)


@every_mode
@pytest.mark.parametrize("expanded", [False, True])
def test_layouts(expanded: bool, mode: Mode) -> None:
    model, x = Layouts(), torch.randn(B, 2, 7, 7)

    def losses() -> Tensor:
        output = model(x)
        return output.flatten(1).sum(1) if expanded else squares(output)

    expected = mode.expected(model, losses())
    with mode.on(model):
        for _ in range(2):
            same(step(model, losses), expected)


@each_asking
@pytest.mark.parametrize("size", [0, 1])
def test_batches_of_none_and_of_one(size: int, mode: Mode) -> None:
    model, c = nn.Sequential(nn.Conv1d(2, 3, 2), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(9, 2)), torch.ones(size)
    x = torch.randn(size, 2, 4)
    policy: Any = (lambda grads: dict.fromkeys(grads, 3 * c)) if mode.joint else (lambda layer, grads: 3 * c)
    plain = step(model, lambda: squares(model(x)))
    with reweight(model, policy, joint=mode.joint):
        same(step(model, lambda: squares(model(x))), {name: 3 * grad for name, grad in plain.items()})


def test_a_layer_on_positions_time_first_and_on_samples_alone() -> None:
    """Axis 1 of [T, B, D] counts samples; of [B, D] it does not, and with D = B no size tells."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(B, B)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x.transpose(0, 1)).tanh()[-1])

    model, x = Model(), torch.randn(B, 3, B)
    with MODES[0].on(model), pytest.raises(ValueError, match=r"samples on axis 1.*output of shape \[4, 4\]"):
        squares(model(x)).sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_known_factors_are_not_rounded_to_half_precision(dtype: torch.dtype) -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(dtype), torch.randn(B, 3, dtype=dtype)
    c = torch.tensor([1.001, -1.001, 1.003, -0.9987], dtype=torch.float32)
    seen: dict[str, list[Tensor]] = {"policy": [], "known": []}
    for way, options in (("policy", {}), ("known", {"known": lambda layer, batch, device: c})):
        with reweight(model, lambda layer, grads: c, **options):
            model.zero_grad()
            model(x).float().sin().sum().backward()
        seen[way] = [parameter.grad.clone() for parameter in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(seen["policy"], seen["known"], strict=True))


# --- errors half-way --------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


def stop(*_: Any) -> None:
    raise Stop


@every_mode
def test_an_exception_in_a_hook_in_the_middle_of_a_backward_pass(mode: Mode) -> None:
    model, x = Branches(), torch.randn(B, 3)
    expected = mode.expected(model, branch(model, x, 0))
    with mode.on(model):
        loss = branch(model, x, 0).sum()
        hook = model.middle.register_hook(stop)
        with pytest.raises(Stop):
            loss.backward(retain_graph=True)
        hook.remove()
        model.zero_grad()
        loss.backward()
        same(gradients(model), expected)
        same(step(model, lambda: branch(model, x, 0)), expected)


@every_mode
def test_what_an_exception_left_is_no_part_of_another_loss(mode: Mode) -> None:
    model, x = Branches(), torch.randn(B, 3)
    expected = mode.expected(model, branch(model, x, 2))
    with mode.on(model):
        outputs = model(x)
        hook = model.middle.register_hook(stop)
        with pytest.raises(Stop):
            squares(outputs[0]).sum().backward(retain_graph=True)
        hook.remove()
        model.zero_grad()
        squares(outputs[2]).sum().backward()
    same(gradients(model), expected)


@every_mode
@pytest.mark.parametrize("at", range(3))
def test_an_exception_in_the_policy(at: int, mode: Mode) -> None:
    model, x, left = Loop(nn.Linear(6, 6)), torch.randn(B, 6), [at]
    expected = mode.expected(model, squares(model(x, 2)))

    def policy(*args: Any) -> Any:
        left[0] -= 1
        if left[0] == -1:
            raise Stop
        return mode.policy(*args)

    with reweight(model, policy, joint=mode.joint):
        loss = squares(model(x, 2)).sum()
        if mode.joint:
            left[0] = 0
        with pytest.raises(Stop):
            loss.backward(retain_graph=True)
        assert all(p.requires_grad for p in model.parameters())
        model.zero_grad()
        loss.backward()
        same(gradients(model), expected)
        same(step(model, lambda: squares(model(x, 2))), expected)


@pytest.mark.parametrize("kind", [Stop, KeyboardInterrupt])
@pytest.mark.parametrize("functions", [False, True])
@every_mode
def test_a_forward_pass_that_ends_early(mode: Mode, functions: bool, kind: type[BaseException]) -> None:
    model, x = Loop(Function() if functions else nn.Linear(6, 6)), torch.randn(B, 6)
    groups = groups_of(model, CELLS["function"][1] if functions else {})
    expected = mode.expected(model, squares(model(x, 2)), groups)

    def raises(*_: Any) -> None:
        raise kind

    with mode.on(model, functions=functions):
        for trained in (False, True):
            for where in (model, model.inp, model.head, *([] if functions else [model.cell])):
                hook = where.register_forward_pre_hook(raises)
                with pytest.raises(kind):
                    model(x, 2)
                hook.remove()
                if kind is Stop:
                    assert all(p.requires_grad and type(p) is nn.Parameter for p in model.parameters())
            if trained:
                same(step(model, lambda: squares(model(x, 2))), expected)
    assert all(p.requires_grad and type(p) is nn.Parameter for p in model.parameters())


@each_asking
def test_a_backward_pass_inside_another_through_one_graph(mode: Mode) -> None:
    model, x = Branches(), torch.randn(B, 3)
    expected = mode.expected(model, branch(model, x, 0))
    with mode.on(model):
        losses, runs = branch(model, x, 0), list[int]()
        inner = model.middle.square().sum()

        def differentiate(_: Tensor) -> None:
            runs.append(1)
            if len(runs) == 1:  # it passes by here, too
                torch.autograd.grad(inner, model.trunk.weight, retain_graph=True)

        model.middle.register_hook(differentiate)
        losses.sum().backward()
    same(gradients(model), expected)


class Twice(nn.Module):
    """Ends with a layer that it has called before."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).tanh())


@every_mode
def test_a_backward_pass_that_starts_at_the_layer_itself(mode: Mode) -> None:
    """The engine does not count the node it starts at among those that it runs."""
    model, x, z = Twice(), torch.randn(B, 3), torch.randn(B, 3)
    expected = mode.expected(model, (model(x) * z).sum(1))
    with mode.on(model):
        for _ in range(2):
            model.zero_grad()
            model(x).backward(z)
            same(gradients(model), expected)


# --- models in models ---------------------------------------------------------------------------------------------


class Nested(nn.Module):
    """A model with layers of its own that calls another model twice."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.before, self.inner, self.after = nn.Linear(6, 6), inner, nn.Linear(2, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.after(self.inner(self.before(x), 2)), 1)


@every_mode
def test_nested_models(mode: Mode) -> None:
    """Reweighting the outer one; then the inner one alone, of which each call is a pass of its own."""
    model, x = Nested(Loop(nn.Linear(6, 6))), torch.randn(B, 6)
    expected = mode.expected(model, squares(model(x)))
    with mode.on(model):
        same(step(model, lambda: squares(model(x))), expected)
    inner = {f"inner.{path}": names for path, names in modules_of(model.inner).items()}
    inner = {path: [f"inner.{name}" for name in names] for path, names in inner.items()}
    fixed = Mode(mode.joint, False)
    expected = fixed.expected(model, squares(model(x)), inner)
    with fixed.on(model.inner):
        for _ in range(2):
            same(step(model, lambda: squares(model(x))), expected)


class Recursive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.weight = nn.Linear(3, 3), nn.Parameter(torch.randn(3, 3))

    def forward(self, x: Tensor, depth: int = 2) -> Tensor:
        h = self(x, depth - 1) if depth else x
        return F.linear(self.layer(h).tanh(), self.weight)


@each_asking
def test_a_model_that_calls_itself(mode: Mode) -> None:
    model, x = Recursive(), torch.randn(B, 3)
    expected = mode.expected(model, squares(model(x)))
    with mode.on(model):
        for _ in range(2):
            same(step(model, lambda: squares(model(x))), expected)


@each_asking
def test_functions_of_a_model_that_calls_itself_are_refused(mode: Mode) -> None:
    model, x = Recursive(), torch.randn(B, 3)
    with mode.on(model, functions=True), pytest.raises(RuntimeError, match="called itself in its own forward"):
        model(x)
    with mode.on(model):  # nothing of that is left
        model(x).sum().backward()


# --- nothing is left behind ---------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """A function's biases that are computed anew in each pass, two of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))
        self.first, self.second = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.weight, self.first * self.second)
        return F.linear(h.tanh(), self.weight, self.second.exp())


@each_asking
def test_computed_biases_are_no_new_layers_in_each_pass(mode: Mode) -> None:
    model, x = Scaled(), torch.randn(B, 3)
    expected = mode.expected(model, squares(model(x)), {"all": ["weight", "first", "second"]})
    with mode.on(model, functions=True) as handle:
        for _ in range(4):
            same(step(model, lambda: squares(model(x))), expected)
            assert sorted(path for paths in mode.asked for path in paths) == ["weight", "weight (2)"]
            assert list(handle.explain()) == ["weight", "weight (2)"]
            mode.asked.clear()


@pytest.fixture
def _no_collection() -> Any:
    gc.disable()
    yield
    gc.enable()


class Held:
    """A tensor that a graph holds for its backward pass."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def watched_loss(model: nn.Module, x: Tensor) -> tuple[Tensor, list[weakref.ref]]:
    """The loss, and what its graph holds."""
    held: list[weakref.ref] = []

    def pack(tensor: Tensor) -> Held:
        kept = Held(tensor.detach())  # an output with its graph would be a cycle
        held.append(weakref.ref(kept))
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        return squares(model(x, 2)).sum(), held


@every_mode
@pytest.mark.parametrize("end", ["dropped", "backward", "grad of x", "hook raises", "policy raises"])
@pytest.mark.usefixtures("_no_collection")
def test_no_reference_cycle_keeps_activations(end: str, mode: Mode) -> None:
    model, x = Loop(nn.Sequential(nn.Linear(6, 6), nn.Tanh())), torch.randn(B, 6, requires_grad=True)
    raising = [False]

    def policy(*args: Any) -> Any:
        if raising[0]:
            raise Stop
        return mode.policy(*args)

    with reweight(model, policy, joint=mode.joint, outputs=True):
        step(model, lambda: squares(model(x, 2)))
        loss, held = watched_loss(model, x)
        assert all(ref() is not None for ref in held)
        assert len(held) > 6
        raising[0] = end == "policy raises"
        if end == "backward":
            loss.backward()
        elif end == "grad of x":
            torch.autograd.grad(loss, x)
        elif end == "policy raises":
            try:
                loss.backward()
            except Stop as error:
                error.__traceback__ = None
        elif end == "hook raises":
            x.register_hook(stop)
            try:
                loss.backward(retain_graph=True)
            except Stop as error:
                error.__traceback__ = None
        del loss
        assert [ref for ref in held if ref() is not None] == []


@each_asking
def test_nothing_grows_over_many_steps(mode: Mode) -> None:
    """Neither tensors nor other objects, whichever number of times layers are called."""
    model, x = Loop(Function()), torch.randn(B, 6)
    counts: list[tuple[int, int]] = []
    with mode.on(model, functions=True) as handle:
        for number in range(63):
            step(model, lambda n=number: squares(model(x, n % 3)))
            mode.asked.clear()
            if number % 21 == 20:
                gc.collect()
                objects = gc.get_objects()
                counts.append((len(objects), sum(type(each) is Tensor for each in objects)))
                del objects
        assert len(handle.explain()) == 3
    assert counts[2][1] == counts[1][1]
    assert abs(counts[2][0] - counts[1][0]) <= 20


def test_two_models_in_two_threads() -> None:
    """They come out as one after the other, whatever the kind of pass."""
    modes, errors = MODES, []
    models = [Loop(build()) for build, _ in list(CELLS.values())[:4]]
    xs = [torch.randn(B, 5, 6) for _ in models]
    groups = [groups_of(model, functions) for model, (_, functions) in zip(models, CELLS.values(), strict=False)]
    expected = [
        mode.expected(model, squares(model(x, 2)), group)
        for mode, model, x, group in zip(modes, models, xs, groups, strict=True)
    ]

    def run(place: int) -> None:
        torch.set_num_threads(1)
        try:
            mode = Mode(modes[place].joint, modes[place].gram)
            with mode.on(models[place], functions=True):
                for _ in range(10):
                    got = step(models[place], lambda: squares(models[place](xs[place], 2)))
                    same(got, expected[place])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


@each_asking
def test_complex_weights_stay_plain(mode: Mode) -> None:
    model, x = Loop(nn.Linear(6, 6), nn.Linear(6, 2, dtype=torch.complex128)), torch.randn(B, 6)
    model.head.register_forward_pre_hook(lambda module, args: args[0].to(torch.complex128))

    def losses() -> Tensor:
        return model(x).abs().square().sum(1)

    groups = {path: names for path, names in modules_of(model).items() if path != "head"}
    expected = mode.expected(model, losses(), groups)
    with mode.on(model) as handle:
        same(step(model, losses), expected)
        assert handle.explain()["head"] == "plain: its weight is complex"


def chain(sizes: Sequence[int]) -> nn.Sequential:
    return nn.Sequential(*(nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in pairwise(sizes)))


@each_asking
def test_other_leaves_by_functional_call(mode: Mode) -> None:
    """They are reweighted, and nothing is left behind."""
    model, x = chain((3, 4, 2)), torch.randn(B, 3)
    values = {name: (2 * p.detach()).requires_grad_() for name, p in model.named_parameters()}
    losses = squares(torch.func.functional_call(model, values, (x,)))
    rows = loop_grads_of(losses, values)
    with mode.on(model):
        squares(torch.func.functional_call(model, values, (x,))).sum().backward()
        same({n: v.grad for n, v in values.items()}, {n: torch.tensordot(FACTORS, row, 1) for n, row in rows.items()})
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
