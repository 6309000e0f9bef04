"""Random layers and models for hypothesis, with seeds instead of drawn numbers so that examples shrink well.

A drawn ``Example`` prints as the code that describes it: the plan of the model, its shapes and its seed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from persample.testing.cases.table import Built, shake, squared_at

seeds = st.integers(0, 2**16)
batches = st.integers(0, 4)
some_batch = st.integers(1, 4)


@dataclass(frozen=True)
class Example:
    """A model with a batch, as a case builds it; ``plan`` says what it consists of, ``axis`` where the batch
    is.
    """

    plan: tuple[str, ...]
    seed: int
    axis: int
    make: Callable[[], Built] = field(repr=False)

    def build(self) -> Built:
        """Model, loss, inputs and targets, the same each time; the global random state stays as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model, loss_fn, inputs, targets = self.make()
            return shake(model.double()), loss_fn, inputs, targets


def single(make: Callable[[], nn.Module], shape: tuple[int, ...], seed: int, ids: int = 0, **options: Any) -> Example:
    """One layer, batch first, on normal inputs of this shape or, where ``ids`` is given, on integers below
    it.
    """

    def build() -> Built:
        module = make().double()
        x = torch.randint(ids, shape) if ids else torch.randn(shape, dtype=torch.float64)
        with torch.no_grad():
            out = module(x)
        return module, squared_at(0), x, [torch.randn_like(out)]

    what = ", ".join(f"{k}={v}" for k, v in options.items())
    return Example((f"{what} @ {shape}",), seed, 0, build)


@st.composite
def linears(draw: st.DrawFn) -> Example:
    """Linear layers on inputs of 2 to 5 axes, some of length 0 or 1."""
    inner = draw(st.lists(st.integers(1, 4), max_size=3))
    inp, out, bias = draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(st.booleans())
    shape = (draw(batches), *inner, inp)
    return single(lambda: nn.Linear(inp, out, bias), shape, draw(seeds), linear=(inp, out), bias=bias)


@st.composite
def convolutions(draw: st.DrawFn, dims: int | None = None, transposed: bool | None = None) -> Example:
    """Convolutions of 1 to 3 dimensions, ordinary and transposed, with every option that torch has."""
    n = draw(st.integers(1, 3)) if dims is None else dims
    turned = draw(st.booleans()) if transposed is None else transposed
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    inp, out = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(n))

    kernel, stride, dilation = each(1, 3), each(1, 3 if n < 3 else 2), each(1, 2)
    options: dict[str, Any] = {
        "stride": stride,
        "dilation": dilation,
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    span = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    if turned:
        options["padding"] = tuple(draw(st.integers(0, (s - 1) // 2)) for s in span)
        limit = [max(s, d) - 1 for s, d in zip(stride, dilation, strict=True)]
        options["output_padding"] = tuple(draw(st.integers(0, m)) for m in limit)
        size = each(1, 3)
        kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[n - 1]
    else:
        modes = ["zeros", "zeros", "reflect", "replicate", "circular"]
        options["padding_mode"] = draw(st.sampled_from(modes))
        if all(s == 1 for s in stride) and draw(st.booleans()):
            options["padding"] = draw(st.sampled_from(["same", "valid"]))
        else:
            options["padding"] = each(0, 2)
        # reflect needs an image larger than its padding, and a kernel must fit into what it sees
        size = tuple(draw(st.integers(max(s, 3), max(s, 3) + 2)) for s in span)
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[n - 1]
    shape = (draw(some_batch), inp, *size)
    return single(
        lambda: kind(inp, out, kernel, **options),
        shape,
        draw(seeds),
        kind=kind.__name__,
        inp=inp,
        out=out,
        kernel=kernel,
        **options,
    )


@st.composite
def norms(draw: st.DrawFn) -> Example:
    """Normalisations that do not couple samples."""
    kind = draw(st.sampled_from(["LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm", "BatchNorm eval"]))
    batch, seed = draw(some_batch), draw(seeds)
    if kind in ("LayerNorm", "RMSNorm"):
        over = tuple(draw(st.lists(st.integers(2, 4), min_size=1, max_size=3)))
        before = tuple(draw(st.lists(st.integers(1, 3), max_size=2)))
        bias = draw(st.booleans())
        make = (lambda: nn.LayerNorm(over, bias=bias)) if kind == "LayerNorm" else (lambda: nn.RMSNorm(over))
        return single(make, (batch, *before, *over), seed, kind=kind, over=over, bias=bias)
    groups = draw(st.integers(1, 3))
    channels = groups * draw(st.integers(1, 2))
    n = draw(st.integers(1, 3))
    space = tuple(draw(st.integers(2, 3)) for _ in range(n))
    if kind == "GroupNorm":
        return single(lambda: nn.GroupNorm(groups, channels), (batch, channels, *space), seed, kind=kind, groups=groups)
    if kind == "InstanceNorm":
        made = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[n - 1]
        return single(lambda: made(channels, affine=True), (batch, channels, *space), seed, kind=made.__name__)
    evaluated = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[n - 1]
    return single(lambda: evaluated(channels).eval(), (batch, channels, *space), seed, kind=kind)


@st.composite
def embeddings(draw: st.DrawFn) -> Example:
    """Embeddings and bags of them, most with repeated ids."""
    rows, size, seed = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(seeds)
    padding = draw(st.none() | st.integers(0, rows - 1))
    if draw(st.booleans()):
        shape = (draw(batches), *draw(st.lists(st.integers(1, 3), max_size=2)))
        return single(lambda: nn.Embedding(rows, size, padding), shape, seed, rows, rows=rows, padding=padding)
    mode = draw(st.sampled_from(["sum", "mean", "max"]))
    shape = (draw(some_batch), draw(st.integers(1, 5)))
    return single(
        lambda: nn.EmbeddingBag(rows, size, mode=mode, padding_idx=padding),
        shape,
        seed,
        rows,
        bag=mode,
        padding=padding,
    )


def layers() -> st.SearchStrategy[Example]:
    """Any layer of the above."""
    return st.one_of(linears(), convolutions(), norms(), embeddings())


# Random models: a state of shape [B, T, D], its axes in any order, goes through random steps. Each step knows
# which axis is which, as the author of a model does; the library under test is not told.

STEPS = (
    *(
        "linear",
        "linear",
        "linear of another",
        "transposed weight",
        "norm",
        "bias",
        "scale",
        "activation in place",
    ),
    *(
        "activation",
        "permute",
        "permute",
        "fold",
        "convolve",
        "attend",
        "mix time",
        "residual",
        "expand token",
    ),
    *(
        "softmax",
        "dropped time",
        "lookup",
        "flip",
        "backwards",
        "gated",
        "loop",
        "recurrent",
        "reparametrised",
    ),
)

# Operations whose derivative is computed from their result.
KEEPING = ("activation", "activation in place", "softmax", "recurrent")


@dataclass
class _Plan:
    """The steps of one model and the lengths of its axes."""

    steps: list[tuple[str, Any]]
    batch: int
    time: int
    size: int


class Composed(nn.Module):
    """The model of a plan; parameters are plain attributes or children, as each step would have them."""

    def __init__(self, plan: _Plan) -> None:
        super().__init__()
        self.plan = plan
        d = plan.size
        for i, (step, what) in enumerate(plan.steps):
            if step in ("linear", "residual", "fold", "loop", "backwards"):
                setattr(self, f"step{i}", nn.Linear(d, d, bias=what))
            elif step == "norm":
                made = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}[what]
                setattr(self, f"step{i}", made(d))
            elif step in ("bias", "scale", "expand token"):
                setattr(self, f"step{i}", nn.Parameter(torch.randn(d if what else 1)))
            elif step == "convolve":
                setattr(self, f"step{i}", nn.Conv1d(d, d, 3, padding=1, groups=d if what else 1))
            elif step == "attend":
                setattr(self, f"step{i}", nn.MultiheadAttention(d, 1, batch_first=what))
            elif step == "recurrent":
                setattr(self, f"step{i}", nn.GRU(d, d, batch_first=what))
            elif step == "mix time":
                setattr(self, f"step{i}", nn.Linear(plan.time, plan.time))
            elif step == "lookup":
                setattr(self, f"step{i}", nn.Embedding(plan.time, d))
            elif step in ("gated", "reparametrised"):
                setattr(self, f"step{i}", nn.Parameter(torch.randn(2 * d, d)))

    def weight(self, which: int) -> Tensor:
        """The weight of some linear layer of the model, for use by another step; else a constant."""
        found = [m.weight for m in self.modules() if isinstance(m, nn.Linear) and m.weight.shape[0] == self.plan.size]
        found = [w for w in found if w.shape[1] == self.plan.size]
        return found[which % len(found)] if found else torch.eye(self.plan.size, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        order = "btd"  # the letters of the axes of x
        saved = False  # whether autograd needs x itself, so that it must not be written over
        for i, (step, what) in enumerate(self.plan.steps):
            if step == "activation in place":
                what = what and not saved
            x, order = self.apply_step(x, order, step, what, getattr(self, f"step{i}", None))
            saved = step in KEEPING or (saved and step == "permute")
        return self.to(x, order, "btd")

    @staticmethod
    def to(x: Tensor, order: str, wanted: str) -> Tensor:
        return x.permute(*(order.index(axis) for axis in wanted))

    def apply_step(self, x: Tensor, order: str, step: str, what: Any, part: Any) -> tuple[Tensor, str]:
        """One step; where an operation needs the features last they are put there, batch and time as they
        are.
        """
        if step == "permute":
            return self.to(x, order, what), what
        if step == "activation in place":
            x = x if what else x + 0.1
            return F.leaky_relu(x, 0.3, inplace=True), order
        if step == "activation":
            return torch.tanh(x), order
        if step == "flip":
            return x.flip(order.index("t")), order
        if step == "softmax":
            return x.softmax(order.index("t" if what else "d")), order
        if step == "dropped time":
            return x * (torch.arange(x.shape[order.index("t")]) > 0).view(
                [-1 if a == "t" else 1 for a in order]).to(x.dtype), order  # fmt: skip
        last = order.replace("d", "") + "d"
        x, order = self.to(x, order, last), last
        if step == "linear":
            x = part(x)
        elif step == "residual":
            x = x + part(x.tanh())
        elif step == "loop":
            x = torch.stack([part(row) for row in x.unbind(0)]) if len(x) else part(x)
        elif step == "linear of another":
            x = F.linear(x, self.weight(what))
        elif step == "transposed weight":
            x = x @ self.weight(what)
        elif step == "norm":
            x = part(x)
        elif step == "bias":
            x = x + part
        elif step == "scale":
            x = x * part.exp()
        elif step == "backwards":
            x = part(x.flip(order.index("b"))).flip(order.index("b"))
        elif step == "fold":
            x = part(x.reshape(-1, x.shape[-1])).view(x.shape)
        elif step == "gated":
            a, b = F.linear(x, part).chunk(2, -1)
            x = a * b.sigmoid()
        elif step == "reparametrised":
            a, b = part.split(part.shape[1])
            x = F.linear(x, a.tanh() / (1 + b.square().sum(1, keepdim=True)))
        else:
            return self.over_time(self.to(x, order, "btd"), step, what, part), "btd"
        return x, order

    def over_time(self, x: Tensor, step: str, what: Any, part: Any) -> Tensor:
        """Steps that read along time: x is [B, T, D]."""
        if step == "convolve":
            return part(x.mT).mT
        if step == "mix time":
            return part(x.mT).mT
        if step == "attend":
            y = x if what else x.transpose(0, 1)
            y = part(y, y, y, need_weights=False)[0]
            return x + (y if what else y.transpose(0, 1))
        if step == "recurrent":
            y = part(x if what else x.transpose(0, 1))[0]
            return y if what else y.transpose(0, 1)
        if step == "lookup":
            return x + part(torch.arange(x.shape[1])[None] if what else torch.arange(x.shape[1]))
        token = part.expand(len(x), 1, x.shape[2])
        return torch.cat([token, x], 1)[:, : x.shape[1]]


def _details(step: str) -> st.SearchStrategy[Any]:
    """What is left to choose about a step."""
    if step == "norm":
        return st.sampled_from(["layer", "rms"])
    if step == "permute":
        return st.sampled_from(["btd", "tbd", "dbt", "bdt", "tdb", "dtb"])
    if step in ("linear of another", "transposed weight"):
        return st.integers(0, 5)
    return st.booleans()


def _step(name: str) -> st.SearchStrategy[tuple[str, Any]]:
    return st.tuples(st.just(name), _details(name))


@st.composite
def models(draw: st.DrawFn, *, steps: int = 6, empty: bool = False) -> Example:
    """Random models of up to ``steps`` steps on [B, T, D] in a random order of axes; T = B = D is likely on
    purpose.

    Weights are shared, activations work in place, the batch moves from axis to axis, positions are looked up
    without it. ``empty`` allows B = 0.
    """
    batch = draw(st.integers(0 if empty else 1, 4))
    time = draw(st.sampled_from([max(batch, 1), max(batch, 1), 1, 2, 3, 5]))
    size = draw(st.sampled_from([max(batch, 2), 2, 3, 5]))
    chosen = draw(st.lists(st.sampled_from(sorted(set(STEPS), key=STEPS.index)).flatmap(_step), max_size=steps))
    # at least one use of a parameter that every plan has
    plan = _Plan([("linear", True), *chosen], batch, time, size)
    axes = draw(st.permutations("btd").map("".join))

    def make() -> Built:
        x = torch.randn(batch, time, size, dtype=torch.float64)
        model = Reordered(Composed(plan), axes).double()
        with torch.no_grad():
            out = model(Composed.to(x, "btd", axes))
        axis = axes.index("b")
        return model, squared_at(axis), Composed.to(x, "btd", axes), [torch.randn_like(out.movedim(axis, 0))]

    shown = [f"{name}({what})" for name, what in plan.steps]
    return Example((f"[{axes}] with b={batch}, t={time}, d={size}", *shown), draw(seeds), axes.index("b"), make)


class Reordered(nn.Module):
    """A model whose inputs and outputs have their axes in another order."""

    def __init__(self, body: nn.Module, axes: str) -> None:
        super().__init__()
        self.body = body
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        return Composed.to(self.body(Composed.to(x, self.axes, "btd")), "btd", self.axes)
