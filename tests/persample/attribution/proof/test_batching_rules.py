"""What the batching rules claim, against Jacobians: every kind of operation, along every axis, in every input."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.nn import functional as F

from persample.attribution.proof.batching_rules import BATCHING_RULES, AxisLayout, Step
from persample.graph.nodes import edge_shape, shape_of

Operation = Callable[..., Tensor | tuple[Tensor, ...]]
CUBE = (4, 4, 4)
PAIR, PAIR_AND_ROW = (CUBE, CUBE), (CUBE, (4,))


def positive(x: Tensor) -> Tensor:
    """Positive definite matrices."""
    return x @ x.mT + 4 * torch.eye(4, dtype=x.dtype)


OPERATIONS: dict[str, tuple[Operation, tuple[tuple[int, ...], ...]]] = {
    "add": (torch.add, PAIR_AND_ROW),
    "mul": (torch.mul, (CUBE, (4, 1))),
    "where": (lambda x, y: torch.where(torch.eye(4) > 0, x, y), PAIR),
    "atan2": (torch.atan2, PAIR_AND_ROW),
    "hypot": (torch.hypot, PAIR),
    "logaddexp": (torch.logaddexp, PAIR_AND_ROW),
    "fmax": (torch.fmax, PAIR_AND_ROW),
    "complex": (torch.complex, PAIR),
    "expand": (lambda x: x.expand(4, 4, 4, 4), (CUBE,)),
    "repeat": (lambda x: x.repeat(4, 1, 2, 1), (CUBE,)),
    "tril": (torch.tril, (CUBE,)),
    "triu": (lambda x: torch.triu(x, 1), (CUBE,)),
    "tan": (torch.tan, (CUBE,)),
    "sinc": (torch.sinc, (CUBE,)),
    "nan_to_num": (torch.nan_to_num, (CUBE,)),
    "softshrink": (F.softshrink, (CUBE,)),
    "smooth l1": (lambda x, y: F.smooth_l1_loss(x, y, reduction="none"), PAIR),
    "mean squares": (F.mse_loss, PAIR),
    "transpose": (lambda x: x.transpose(0, 2), (CUBE,)),
    "t": (lambda x: x.t(), ((4, 4),)),
    "permute": (lambda x: x.permute(2, 0, 1), (CUBE,)),
    "sum": (lambda x: x.sum(1), (CUBE,)),
    "sums": (lambda x: x.sum((0, 2), keepdim=True), (CUBE,)),
    "prod": (lambda x: x.prod(0), (CUBE,)),
    "product of all": (torch.prod, (CUBE,)),
    "nansum": (lambda x: x.nansum(1), (CUBE,)),
    "var_mean": (lambda x: torch.var_mean(x, 1), (CUBE,)),
    "std_mean": (lambda x: torch.std_mean(x, 0), (CUBE,)),
    "amax": (lambda x: x.amax(0), (CUBE,)),
    "max": (lambda x: x.max(0).values, (CUBE,)),
    "aminmax": (lambda x: torch.aminmax(x, dim=1), (CUBE,)),
    "kthvalue": (lambda x: x.kthvalue(2, 0).values, (CUBE,)),
    "kthvalue of the last": (lambda x: x.kthvalue(2, 2, keepdim=True).values, (CUBE,)),
    "median": (lambda x: x.median(0).values, (CUBE,)),
    "nanmedian": (lambda x: x.nanmedian(1).values, (CUBE,)),
    "mode": (lambda x: x.mode(0).values, (CUBE,)),
    "select": (lambda x: x.select(0, 1), (CUBE,)),
    "unbind": (lambda x: x.unbind(1), (CUBE,)),
    "stack": (lambda x, y: torch.stack([x, y], 1), PAIR),
    "softmax": (lambda x: x.softmax(1), (CUBE,)),
    "cat": (lambda x, y: torch.cat([x, y], 1), PAIR),
    "slice": (lambda x: x[:, 1:3], (CUBE,)),
    "split": (lambda x: x.split(2, 1), (CUBE,)),
    "gather": (lambda x: x.gather(1, torch.zeros(4, 4, 4, dtype=torch.long)), (CUBE,)),
    "index_select": (lambda x: x.index_select(2, torch.tensor([3, 0, 1, 1])), (CUBE,)),
    "glu": (lambda x: F.glu(x, 1), (CUBE,)),
    "cumsum": (lambda x: x.cumsum(0), (CUBE,)),
    "cummax": (lambda x: x.cummax(1).values, (CUBE,)),
    "logcumsumexp": (lambda x: x.logcumsumexp(2), (CUBE,)),
    "flip": (lambda x: x.flip(0, 2), (CUBE,)),
    "sort": (lambda x: x.sort(0).values, (CUBE,)),
    "topk": (lambda x: x.topk(4, 1).values, (CUBE,)),
    "fft": (lambda x: torch.fft.fft(x + 0j, dim=1), (CUBE,)),
    "rfft": (lambda x: torch.fft.rfft(x, dim=0), (CUBE,)),
    "fftn": (lambda x: torch.fft.fftn(x, dim=(0, 2)), (CUBE,)),
    "index_fill": (lambda x: x.index_fill(1, torch.tensor([2]), 0.0), (CUBE,)),
    "slice_scatter": (lambda x, y: torch.slice_scatter(x, y, 1, 0, 2), (CUBE, (4, 2, 4))),
    "cross": (lambda x, y: torch.linalg.cross(x, y, dim=1), ((4, 3, 4), (4, 3, 4))),
    "roll": (lambda x: x.roll(1, 1), (CUBE,)),
    "roll of all": (lambda x: x.roll(1), (CUBE,)),
    "unfold": (lambda x: x.unfold(1, 1, 1), (CUBE,)),
    "unfold of the last": (lambda x: x.unfold(-1, 4, 1), (CUBE,)),
    "unfold in fours": (lambda x: x.unfold(0, 4, 1), ((7, 4, 4),)),
    "diagonal": (lambda x: x.diagonal(0, 0, 1), (CUBE,)),
    "diagonal of others": (lambda x: x.diagonal(1, 2, 0), (CUBE,)),
    "view_as_real": (lambda x: torch.view_as_real(torch.complex(x, x)), (CUBE,)),
    "view_as_complex": (torch.view_as_complex, ((4, 4, 2),)),
    "mm": (torch.mm, ((4, 4), (4, 4))),
    "addmm": (torch.addmm, ((4,), (4, 4), (4, 4))),
    "mv": (torch.mv, ((4, 4), (4,))),
    "bmm": (torch.bmm, PAIR),
    "baddbmm": (torch.baddbmm, ((4, 1, 4), CUBE, CUBE)),
    "det": (torch.linalg.det, (CUBE,)),
    "slogdet": (lambda x: torch.linalg.slogdet(positive(x))[1], (CUBE,)),
    "inverse": (torch.linalg.inv, (CUBE,)),
    "cholesky": (lambda x: torch.linalg.cholesky(positive(x)), (CUBE,)),
    "eigh": (lambda x: torch.linalg.eigh(positive(x))[0], (CUBE,)),
    "solve": (torch.linalg.solve, PAIR),
    "solve for vectors": (torch.linalg.solve, (CUBE, (4, 4))),
    "solve by one matrix": (torch.linalg.solve, ((4, 4), CUBE)),
    "solve_triangular": (lambda x, y: torch.linalg.solve_triangular(x.triu(), y, upper=True), PAIR),
    "matrix_exp": (torch.linalg.matrix_exp, (CUBE,)),
    "convolution": (F.conv1d, (CUBE, (4, 4, 1))),
    "max_pool": (lambda x: F.max_pool2d(x, 2), ((4, 4, 4, 4),)),
    "max_pool of one image": (lambda x: F.max_pool2d(x, 2), (CUBE,)),
    "avg_pool": (lambda x: F.avg_pool2d(x, 2), ((4, 4, 4, 4),)),
    "upsample": (lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest-exact"), (CUBE,)),
    "trilinear": (lambda x: F.interpolate(x, scale_factor=2.0, mode="trilinear"), ((4, 1, 2, 2, 2),)),
    "antialiased": (lambda x: F.interpolate(x, scale_factor=0.5, mode="bilinear", antialias=True), ((4, 2, 4, 4),)),
    "im2col": (lambda x: F.unfold(x, 2), ((4, 4, 4, 4),)),
    "im2col of one image": (lambda x: F.unfold(x, 1), (CUBE,)),
    "col2im": (lambda x: F.fold(x, (4, 4), 2, stride=2), ((4, 4, 4),)),
    "grid_sample": (lambda x, y: F.grid_sample(x, y.tanh(), align_corners=True), ((4, 2, 3, 3), (4, 3, 3, 2))),
    "affine_grid": (lambda x: F.affine_grid(x, [4, 1, 2, 2], align_corners=True), ((4, 2, 3),)),
    "channel_shuffle": (lambda x: F.channel_shuffle(x, 2), ((4, 4, 2, 2),)),
    "pad": (lambda x: F.pad(x, (1, 1)), (CUBE,)),
    "pad of the second axis": (lambda x: F.pad(x, (0, 0, 1, -1, 0, 0)), (CUBE,)),
    "group_norm": (lambda x: F.group_norm(x, 2), (CUBE,)),
    "layer_norm": (lambda x: F.layer_norm(x, (4,)), (CUBE,)),
    "batch_norm": (lambda x: F.batch_norm(x, None, None, training=True), (CUBE,)),
    "multi_margin": (lambda x: F.multi_margin_loss(x, torch.tensor([0, 1, 2, 3]), reduction="none"), ((4, 4),)),
    "nll": (lambda x: F.nll_loss(x, torch.tensor([0, 1, 2, 3]), reduction="none"), ((4, 4),)),
}


def sample_of(at: AxisLayout, shape: tuple[int, ...], batch: int) -> Tensor:
    """The sample of every entry, row by row."""
    along = torch.arange(shape[at.axis]) // at.inner % batch
    return along.view([-1 if axis == at.axis else 1 for axis in range(len(shape))]).expand(shape).flatten()


def depends_on(output: Tensor, edge: GradientEdge) -> Tensor:
    """Whether entries of the output depend on entries of what enters an operation, [output, input]."""
    parts = torch.view_as_real(output) if output.is_complex() else output[..., None]
    rows = [
        sum(torch.autograd.grad(part, edge, retain_graph=True)[0].abs() for part in entry).flatten()
        for entry in parts.reshape(-1, parts.shape[-1])
    ]
    return torch.stack(rows) > 1e-12


@dataclass(frozen=True)
class Claim:
    """Samples that lie so in the output lie so in the input."""

    batch: int
    at: AxisLayout
    there: AxisLayout
    shape: tuple[int, ...]
    entering: tuple[int, ...]
    depends: Tensor


def claims(name: str) -> Iterator[Claim]:
    """Every claim about the last operation of a function: about each of its outputs, inputs and axes."""
    function, shapes = OPERATIONS[name]
    torch.manual_seed(0)
    outputs = function(*(torch.rand(shape, dtype=torch.float64).add(0.1).requires_grad_() for shape in shapes))
    for output in (outputs if isinstance(outputs, tuple) else (outputs,))[:2]:
        node, number = output.grad_fn, output.output_nr
        assert node is not None
        batching_rule, shape = BATCHING_RULES[node.name()], shape_of(node._input_metadata[number])
        for slot, (source, of_source) in enumerate(node.next_functions):
            if source is None:
                continue
            depends, entering = depends_on(output, GradientEdge(source, of_source)), edge_shape((source, of_source))
            for axis, size in enumerate(shape):
                for batch, inner in ((size, 1), (size // 2, 1), (size // 2, 2)):
                    if batch < 2 or size % (batch * inner):
                        continue
                    at = AxisLayout(axis, inner)
                    there = batching_rule(Step(node, slot, at, shape, entering, number))
                    if there is not None:
                        yield Claim(batch, at, there, shape, entering, depends)


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_a_rule_claims_is_so(name: str) -> None:
    for claim in claims(name):
        assert claim.entering[claim.there.axis] % (claim.batch * claim.there.inner) == 0, claim
        after, before = (
            sample_of(at, shape, claim.batch) for at, shape in ((claim.at, claim.shape), (claim.there, claim.entering))
        )
        assert claim.depends.shape == (len(after), len(before))
        assert not bool((claim.depends & (after[:, None] != before[None])).any()), claim


NEVER_ALONG_AN_AXIS = {"product of all", "roll of all", "mean squares"}


@pytest.mark.parametrize("name", sorted(OPERATIONS.keys() - NEVER_ALONG_AN_AXIS))
def test_a_rule_claims_something(name: str) -> None:
    assert list(claims(name))
