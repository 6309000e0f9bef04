"""Where the samples are: batches on other axes, folded, windowed, permuted, routed, and parameters met before
any batch.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from persample.testing.cases.table import Built, Net, add, classify, group, ids, randn, regress

case = group("layout", "usage")
B, T, D = 3, 4, 5


def positions(t: int, shape: str) -> Built:
    """Learned positions by ids that every sample shares: the table meets the data only at the sum."""

    def run(m: Net, tokens: Tensor) -> Tensor:
        steps = torch.arange(tokens.shape[1])
        where = {"[T]": steps, "[1, T]": steps[None], "[B, T]": steps.expand(tokens.shape)}[shape]
        return m.head((m.words(tokens) + m.positions(where)).tanh())

    model = Net(run, words=nn.Embedding(7, D), positions=nn.Embedding(6, D), head=nn.Linear(D, 7))
    return classify(model, ids(7, B, t))


for shape in ("[T]", "[1, T]", "[B, T]"):
    for t in (T, B, 1):
        equal = {T: "T≠B", B: "T=B", 1: "T=1"}[t]
        add(f"layout/position ids {shape}, {equal}", partial(positions, t, shape), "usage", "peers")


def time_major_inside(t: int, repeats: int = 1) -> Built:
    """The model turns [B, T, D] to [T, B, D] between its layers."""

    def run(m: Net, x: Tensor) -> Tensor:
        return m.c(m.b(m.a(x).tanh().transpose(0, 1)).tanh().transpose(0, 1))

    return regress(Net(run, a=nn.Linear(D, D), b=nn.Linear(D, D), c=nn.Linear(D, D)), randn(B, t, D))


add("layout/batch on axis 1 inside, T≠B", lambda: time_major_inside(T), "usage", "peers", "time-major")
add("layout/batch on axis 1 inside, T=B", lambda: time_major_inside(B), "usage", "peers", "time-major")
add("layout/batch on axis 1 inside, T=1", lambda: time_major_inside(1), "usage", "peers", "time-major")


@case("time-major", axes=1)
def batch_second_input_and_output() -> Built:
    return regress(nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.LayerNorm(D), nn.Linear(D, 2)), randn(B, B, D), 1)


@case("time-major", axes=-1)
def batch_last() -> Built:
    """Columns are samples."""
    return regress(
        Net(lambda m, x: m.b @ (m.a @ x).tanh() + m.c, a=randn(D, D), b=randn(2, D), c=randn(2, 1)),
        randn(D, B),
        1,
    )


@case("time-major", axes=-1)
def batch_last_square() -> Built:
    """Columns are samples, and there are as many rows: no shape tells which is which."""
    return regress(Net(lambda m, x: m.a @ x, a=randn(B, B)), randn(B, B), 1)


@case("time-major")
def bias_along_the_batch_axis_in_shape_only() -> Built:
    """[T, B, D] plus a bias of shape [B, 1] with T = B: an axis of length B that has nothing to do with
    samples.
    """
    model = Net(lambda m, x: m.lin(x) + m.bias, lin=nn.Linear(D, D), bias=randn(B, 1))
    return regress(model, randn(B, B, D))


@case("time-major")
def mixed_in_three_orders() -> Built:
    """[B, T, D], [T, D, B] and [D, B, T] with T = D = B."""

    def run(m: Net, x: Tensor) -> Tensor:
        return m.c(m.b(m.a(x).tanh().permute(1, 2, 0).mT).tanh().permute(2, 1, 0)).permute(1, 2, 0)

    parts = {name: nn.Linear(B, B) for name in "abc"}
    model = Net(lambda m, x: run(m, x).permute(1, 2, 0), **parts)
    return regress(model, randn(B, B, B), _batch_axis_of(model, randn(B, B, B)))


def _batch_axis_of(model: nn.Module, x: Tensor) -> int:
    """The axis of the output along which it changes if only the first sample does."""
    with torch.no_grad():
        other = x.clone()
        other[0] += 1
        changed = model.double()(x) != model(other)
    counts = [int(changed.movedim(a, 0).flatten(1).any(1).sum()) for a in range(changed.dim())]
    return counts.index(1)


@case()
def frames_folded_into_the_batch() -> Built:
    """Video: [B, T, ...] to [B T, ...] for a convolution, and back for a mean over time."""

    def run(m: Net, x: Tensor) -> Tensor:
        return m.head(m.conv(x.flatten(0, 1)).relu().mean((2, 3)).unflatten(0, x.shape[:2]).mean(1))

    return regress(Net(run, conv=nn.Conv2d(2, 4, 3), head=nn.Linear(4, 3)), randn(B, 2, 2, 5, 6))


@case("time-major")
def frames_folded_time_major() -> Built:
    """[T B, ...]: the samples alternate along the rows."""

    def run(m: Net, x: Tensor) -> Tensor:
        rows = x.transpose(0, 1).flatten(0, 1)
        return m.head(m.conv(rows).relu().mean((2, 3))).unflatten(0, (x.shape[1], x.shape[0])).sum(0)

    return regress(Net(run, conv=nn.Conv2d(2, 4, 3), head=nn.Linear(4, 3)), randn(B, 2, 2, 5, 6))


@case()
def heads_folded_into_the_batch() -> Built:
    """A layer for one head applied to all: [B heads, T, d]."""

    def run(m: Net, x: Tensor) -> Tensor:
        return m.lin(x.unflatten(-1, (2, 3)).transpose(1, 2).flatten(0, 1)).unflatten(0, (len(x), 2)).sum(1)

    return regress(Net(run, lin=nn.Linear(3, 3)), randn(B, T, 6))


@case()
def windows() -> Built:
    """Windows of an image as rows: B · windows of them, each sample's together."""

    def run(m: Net, x: Tensor) -> Tensor:
        b, h, w, d = x.shape
        rows = x.view(b, h // 2, 2, w // 2, 2, d).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, d)
        rows = m.mix(rows.mT).mT + m.bias
        return rows.view(b, h // 2, w // 2, 2, 2, d).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, d)

    return regress(Net(run, mix=nn.Linear(4, 4), bias=randn(4, 1)), randn(B, 4, 6, D))


@case()
def windows_across_the_batch() -> Built:
    """Windows first, samples second: a dilated grid, as in MaxViT."""

    def run(m: Net, x: Tensor) -> Tensor:
        rows = x.unflatten(1, (2, 2)).permute(2, 0, 1, 3)
        return m.lin(rows).tanh().permute(1, 2, 0, 3).flatten(1, 2)

    return regress(Net(run, lin=nn.Linear(D, D)), randn(B, 4, D))


@case()
def interleaved_repeats() -> Built:
    """Beams or augmentations: every sample three times, next to each other."""

    def run(m: Net, x: Tensor, noise: Tensor) -> Tensor:
        rows = x.repeat_interleave(3, 0) + noise.flatten(0, 1)
        return m.b(m.a(rows).tanh()).unflatten(0, (len(x), 3)).mean(1)

    return regress(Net(run, a=nn.Linear(D, D), b=nn.Linear(D, 2)), (randn(B, D), randn(B, 3, D)))


@case(axes=(0, 1))
def tiled_repeats() -> Built:
    """Every sample three times, the whole batch after itself."""

    def run(m: Net, x: Tensor, noise: Tensor) -> Tensor:
        rows = x.repeat(3, 1) + noise.flatten(0, 1)
        return m.b(m.a(rows).tanh()).unflatten(0, (3, len(x))).mean(0)

    return regress(Net(run, a=nn.Linear(D, D), b=nn.Linear(D, 2)), (randn(B, D), randn(3, B, D)))


@case()
def flipped_batch() -> Built:
    """The rows run backwards inside the model."""

    def run(m: Net, x: Tensor) -> Tensor:
        return m.b(m.a(x.flip(0)).tanh().flip(0))

    return regress(Net(run, a=nn.Linear(D, D), b=nn.Linear(D, 2)), randn(B, D))


@case("routing")
def sorted_batch() -> Built:
    """Sorted by a value inside the model and put back, as bucketing by length does."""

    def run(m: Net, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        return m.b(m.a(x[order]).tanh()[order.argsort()])

    return regress(Net(run, a=nn.Linear(D, D), b=nn.Linear(D, 2)), randn(5, D))


@case("routing")
def only_valid_tokens() -> Built:
    """Padding is removed: x[mask] is one long list of tokens of all samples, of different lengths."""

    def run(m: Net, x: Tensor, mask: Tensor) -> Tensor:
        y = x.new_zeros(x.shape)
        y[mask] = m.lin(x[mask]).tanh()
        return m.head(y.sum(1))

    mask = torch.arange(T) < torch.tensor([[2], [4], [1]])
    return regress(Net(run, lin=nn.Linear(D, D), head=nn.Linear(D, 2)), (randn(B, T, D), mask))


@case("routing")
def scattered_by_index() -> Built:
    """Tokens reach their slots by scatter_add and leave by gather."""

    def run(m: Net, x: Tensor, slot: Tensor) -> Tensor:
        where = slot[..., None].expand_as(x)
        return m.b(x.new_zeros(len(x), 3, D).scatter_add(1, where, m.a(x).tanh())).gather(1, where)

    return regress(Net(run, a=nn.Linear(D, D), b=nn.Linear(D, D)), (randn(B, T, D), ids(3, B, T)))


@case()
def samples_in_a_loop() -> Built:
    """A Python loop over samples: as many uses of the layer as samples, each of one row."""
    model = Net(lambda m, x: torch.stack([m.b(m.a(s).tanh()) for s in x]), a=nn.Linear(D, D), b=nn.Linear(D, 2))
    return regress(model, randn(B, D))


@case()
def steps_in_a_loop() -> Built:
    """A Python loop over time steps."""
    model = Net(lambda m, x: torch.stack([m.a(s).tanh() for s in x.unbind(1)], 1), a=nn.Linear(D, D))
    return regress(model, randn(B, T, D))


@case()
def list_of_samples_of_different_length() -> Built:
    """Sequences cut to length, joined to one, and cut apart again."""

    def run(m: Net, x: Tensor, n: Tensor) -> Tensor:
        parts = m.lin(torch.cat([s[:k] for s, k in zip(x, n.tolist(), strict=True)])).tanh().split(n.tolist())
        return torch.stack([p.sum(0) for p in parts])

    return regress(Net(run, lin=nn.Linear(D, D)), (randn(B, T, D), torch.tensor([3, 1, 4])))


@case()
def halves_of_the_batch() -> Built:
    """Gradient accumulation inside the model: chunks of the batch, one after the other."""
    model = Net(
        lambda m, x: torch.cat([m.b(m.a(part).tanh()) for part in x.split(2)]),
        a=nn.Linear(D, D),
        b=nn.Linear(D, 2),
    )
    return regress(model, randn(5, D))


@case()
def unfold_and_product() -> Built:
    """A convolution by hand: patches [B, P, K] against a matrix."""
    model = Net(lambda m, x: m.w @ F.unfold(x, 3), w=randn(4, 18))
    return regress(model, randn(B, 2, 5, 4))


@case()
def channels_moved_last() -> Built:
    """A convolution in channels-first, a norm in channels-last between."""

    def run(m: Net, x: Tensor) -> Tensor:
        return m.b(m.norm(m.a(x).movedim(1, -1)).movedim(-1, 1))

    return regress(Net(run, a=nn.Conv2d(2, 4, 1), norm=nn.LayerNorm(4), b=nn.Conv2d(4, 2, 2)), randn(B, 2, 4, 3))


@case()
def one_channel_per_sample() -> Built:
    """The batch folded into the groups of a convolution with weights per sample (dynamic convolution)."""

    def run(m: Net, x: Tensor) -> Tensor:
        b, c, n = x.shape
        kernels = m.maker(x.mean(2)).view(b * 2, c, 3)
        return F.conv1d(x.reshape(1, b * c, n), kernels, groups=b).view(b, 2, -1)

    return regress(Net(run, maker=nn.Linear(3, 2 * 3 * 3)), randn(B, 3, 6))


@case()
def shared_weight_folded_into_groups() -> Built:
    """The same fold with one kernel repeated for every sample: the batch sits on the channel axis, B on axis
    0 is 1.
    """

    def run(m: Net, x: Tensor) -> Tensor:
        b, c, n = x.shape
        return F.conv1d(x.reshape(1, b * c, n), m.w.repeat(b, 1, 1), groups=b).view(b, 2, -1)

    return regress(Net(run, w=randn(2, 3, 3)), randn(B, 3, 6))


@case("time-major")
def parameter_made_batch_sized() -> Built:
    """A state [B, D] begun from a parameter, changed step by step, so early steps hold no data."""

    def run(m: Net, x: Tensor) -> Tensor:
        state = m.start.expand(len(x), -1)
        state = m.cell(state).tanh()  # nothing of the samples has come in yet
        for step in x.unbind(1):
            state = m.cell(state + step).tanh()
        return state

    return regress(Net(run, start=randn(D), cell=nn.Linear(D, D)), randn(B, T, D))


@case()
def layer_on_parameters_alone() -> Built:
    """A network applied to learned queries before they attend to the data (Perceiver, DETR)."""

    def run(m: Net, x: Tensor) -> Tensor:
        return m.out((m.q(m.queries) @ x.mT).softmax(-1) @ x)

    return regress(Net(run, queries=randn(B, D), q=nn.Linear(D, D), out=nn.Linear(D, 2)), randn(B, T, D))
