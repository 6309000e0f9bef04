"""The Jacobian of outputs: rows, kernel, Gauss–Newton quantities and sums, exact for every model of the table."""

from __future__ import annotations

import pickle
from collections import UserDict
from collections.abc import Callable
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import loop_grads_of, rel_err, trainable
from strategies import Example, layers, models
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.utils.checkpoint import checkpoint

import persample
from persample.testing.cases import CASES, Case, call

pytestmark = pytest.mark.usefixtures("double")
Outputs = Callable[[Any], Tensor]


def several(loss_fn: Callable, targets: Any, *, entries: bool) -> Outputs:
    """Several numbers of each sample: functions of its loss, and entries of the model's output."""

    def outputs(returned: Any) -> Tensor:
        losses = loss_fn(returned, targets)
        found = [losses, losses.sin()]
        if entries and isinstance(returned, Tensor) and returned.ndim > 1 and len(returned) == len(losses):
            found += [*returned.real.flatten(1).unbind(1)[:3]]
        return torch.stack([each.to(losses.dtype) for each in found], 1)

    return outputs


def loop(outputs: Tensor, params: dict[str, Tensor]) -> dict[str, Tensor]:
    """∂f_bc/∂θ, one pass for each number: name -> [B, C, *shape]."""
    rows = loop_grads_of(outputs.flatten(), params)
    return {name: each.view(*outputs.shape, *each.shape[1:]) for name, each in rows.items()}


def flat(rows: dict[str, Tensor], axes: int = 2) -> Tensor:
    """Rows of all parameters as real numbers, [B·C, N]."""
    real = [torch.view_as_real(r) if r.is_complex() else r for r in rows.values()]
    return torch.cat([r.reshape(prod(r.shape[:axes]), prod(r.shape[axes:])) for r in real], 1)


def compare(jac: persample.Jacobian, want: dict[str, Tensor], tolerance: float) -> None:
    """Every quantity against that of rows."""
    batch, count = jac.outputs.shape
    lines = flat(want)
    random = torch.Generator().manual_seed(0)
    weights = torch.randn(batch, count, generator=random)
    vectors = {n: torch.randn(3, *r.shape[2:], generator=random, dtype=r.dtype) for n, r in want.items()}
    square = torch.randn(batch, count, count, generator=random)
    hessian = square @ square.mT
    assert rel_err(jac.rows(), want) < tolerance
    assert rel_err(jac.norms().flatten(), lines.norm(dim=1)) < tolerance
    assert rel_err(jac.gram().reshape(batch * count, batch * count), lines @ lines.T) < tolerance
    assert rel_err(
        jac.weighted_sum(weights), {n: torch.einsum("bc,bc...->...", weights.to(r), r) for n, r in want.items()}
    ) < tolerance  # fmt: skip
    directions = torch.cat([flat({n: v}, 1) for n, v in vectors.items()], 1)
    assert rel_err(jac.dot(vectors).flatten(0, 1), lines @ directions.T) < tolerance
    assert rel_err(jac.sum_of_squares(), {n: r.abs().square().sum((0, 1)) for n, r in want.items()}) < tolerance
    kernel = (lines @ lines.T).view(batch, count, batch, count)
    trace = torch.einsum("bcd,bcbd->b", hessian, kernel)
    weighted = jac.ggn(hessian)
    assert rel_err(weighted.norms().square().sum(1), trace) < tolerance
    root = torch.linalg.eigh(hessian)
    roots = root.eigenvectors @ root.eigenvalues.clamp(min=0).sqrt().diag_embed() @ root.eigenvectors.mT
    expected = torch.einsum("acd,adbe,bfe->acbf", roots, kernel, roots)
    assert rel_err(weighted.gram(), expected) < max(tolerance, 1e-7)  # a root has half of the digits near zero


@pytest.mark.parametrize("case", [case for case in CASES if not case.coupled], ids=lambda case: case.name)
def test_every_case_as_the_loop(case: Case) -> None:
    model, loss_fn, inputs, targets = case.build()
    chosen = several(loss_fn, targets, entries="time-major" not in case.tags and case.axes == 0)
    params = trainable(model)
    torch.manual_seed(1)
    outputs = chosen(call(model, inputs))
    if not outputs.requires_grad or not params:
        with pytest.raises(persample.PerSampleError):
            persample.jacobian(model, inputs, output_fn=chosen)
        return
    want = loop(outputs, params)
    model, loss_fn, inputs, targets = case.build()
    torch.manual_seed(1)
    jac = persample.jacobian(model, inputs, output_fn=chosen)
    torch.testing.assert_close(jac.outputs, outputs.detach())
    compare(jac, want, 1e-5 if "float32" in case.tags else 1e-9)


@given(st.one_of(layers(), models()))
def test_drawn_models_as_the_loop(example: Example) -> None:
    model, loss_fn, inputs, targets = example.build()
    chosen = several(loss_fn, targets, entries=example.axis == 0)
    outputs = chosen(call(model, inputs))
    want = loop(outputs, trainable(model))
    compare(persample.jacobian(model, inputs, output_fn=chosen), want, 1e-9)


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 3, groups=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 6)
    )  # fmt: skip


def test_as_functorch_and_outputs_of_several_axes() -> None:
    model, x = network().append(nn.Unflatten(1, (2, 3))), torch.randn(5, 1, 8, 8)
    params = dict(model.named_parameters())
    want = vmap(jacrev(lambda p, x: functional_call(model, p, (x[None],))[0]), (None, 0))(params, x)
    jac = persample.jacobian(model, x)
    rows = jac.rows()
    assert jac.outputs.shape == jac.norms().shape == (5, 2, 3)
    assert all(rows[name].shape == (5, 2, 3, *p.shape) for name, p in params.items())
    want = {name: each.detach() for name, each in want.items()}
    assert rel_err(rows, want) < 1e-12
    lines = flat(want, 3)
    assert rel_err(jac.gram().flatten(0, 1).flatten(1), lines @ lines.T) < 1e-12
    w = torch.randn(5, 2, 3)
    assert rel_err(jac.weighted_sum(w), {n: torch.einsum("bcd,bcd...->...", w, r) for n, r in want.items()}) < 1e-12
    assert jac.dot({n: p.detach() for n, p in params.items()}).shape == (5, 2, 3)
    assert jac.project(persample.projections.Rademacher(7)).shape == (5, 2, 3, 7)


@pytest.mark.parametrize("check", [True, False])
def test_in_chunks_as_at_once(check: bool) -> None:
    model, x, y = network(), torch.randn(5, 1, 8, 8), torch.randn(4, 1, 8, 8)
    model.append(nn.Dropout(0.3))
    torch.manual_seed(2)
    jac = persample.jacobian(model.eval() if check else model, x, chunk_size=2, check=check)
    torch.manual_seed(2)
    outputs = torch.cat([model(part) for part in x.split(2)]) if not check else model(x)
    torch.testing.assert_close(jac.outputs, outputs.detach())
    want = loop(outputs, trainable(model))
    compare(jac, want, 1e-9)
    at_once = persample.jacobian(model.eval(), x)
    if check:
        assert rel_err(jac.gram(centred=True), at_once.gram(centred=True)) < 1e-9
        other = persample.jacobian(model, y, chunk_size=3)
        expected = at_once.gram(other=persample.jacobian(model, y))
        assert rel_err(jac.gram(other=other), expected) < 1e-9
        assert rel_err(at_once.gram(other=other), expected) < 1e-9
        assert rel_err(jac.gram(other=persample.jacobian(model, y)), expected) < 1e-9


def test_chunks_that_are_no_samples_are_refused() -> None:
    class Padded(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - x.mean(0).detach())

    with pytest.raises(persample.CheckError, match="Or leave chunk_size out"):
        persample.jacobian(Padded(3, 2), torch.randn(6, 3), chunk_size=2)
    with pytest.raises(ValueError, match="chunk_size must be a positive number"):
        persample.jacobian(nn.Linear(3, 2), torch.randn(6, 3), chunk_size=0)


def test_two_batches_layers_and_parameters() -> None:
    model = network()
    x, y = torch.randn(5, 1, 8, 8), torch.randn(3, 1, 8, 8)
    params = trainable(model)
    ours, theirs = (loop(model(each), params) for each in (x, y))
    left, right = (persample.jacobian(model, each) for each in (x, y))
    want = (flat(ours) @ flat(theirs).T).view(5, 6, 3, 6)
    assert rel_err(left.gram(other=right), want) < 1e-12
    by_layer = left.gram("layer", right)
    assert list(by_layer) == ["0", "2", "5"]
    assert rel_err(torch.stack([*by_layer.values()]).sum(0), want) < 1e-12
    last = persample.jacobian(model, x, params=["5.weight", model[5].bias])
    assert rel_err(last.rows(), {n: ours[n] for n in ("5.weight", "5.bias")}) < 1e-12
    weights = {layer: torch.randn(5, 6) for layer in left.layers}
    found = left.weighted_sum(weights)
    assert rel_err(found["0.weight"], torch.einsum("bc,bc...->...", weights["0"], ours["0.weight"])) < 1e-12


def test_projections_are_those_of_rows() -> None:
    model, x = network(), torch.randn(5, 1, 8, 8)
    jac = persample.jacobian(model, x)
    for projection in (persample.projections.Kronecker(2, 2), persample.projections.Rademacher(5)):
        found = jac.project(projection)
        for c in range(6):
            one = persample.per_sample(model, lambda out, _, c=c: out[:, c], x)
            assert rel_err(found[:, c], one.project(projection)) < 1e-12


def test_what_operations_have_saved_is_held_once() -> None:
    """Of an input that is large beside its outputs ten Jacobians' worth would be ten times as much."""
    model, x = nn.Sequential(nn.Linear(1000, 3), nn.Tanh(), nn.Linear(3, 10)), torch.randn(4, 1000)
    held = {use.parameter: use.nbytes for use in persample.jacobian(model, x).explain()}
    assert held["0.weight"] == 8 * (4 * 1000 + 10 * 4 * 3)


@pytest.mark.parametrize("positions", [1, 7])
def test_a_kernel_needs_no_rows(positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries are cut so that those of all samples fit into what may be taken."""
    model, x = nn.Linear(30, 40), torch.randn(6, positions, 30)
    jac = persample.jacobian(model, x, output_fn=lambda out: out.sin().sum(1)[:, :5])
    monkeypatch.setattr("persample.blocks.chunking.CHUNK_BYTES", 30 * 30 * 8 * 3)
    lines = flat(loop(model(x).sin().sum(1)[:, :5], trainable(model)))
    assert rel_err(jac.gram().reshape(30, 30), lines @ lines.T) < 1e-12


def test_gauss_newton_of_cross_entropy() -> None:
    model, x = network(), torch.randn(5, 1, 8, 8)
    jac = persample.jacobian(model, x)
    p = jac.outputs.softmax(1)
    hessian = p.diag_embed() - p[:, :, None] * p[:, None]  # singular
    lines = flat(jac.rows()).view(5, 6, -1)
    matrix = torch.einsum("bcn,bcd,bdm->nm", lines, hessian, lines)
    weighted = jac.ggn(hessian)
    assert rel_err(torch.cat([d.flatten() for d in weighted.sum_of_squares().values()]), matrix.diagonal()) < 1e-12
    eigenvalues = torch.linalg.eigvalsh(weighted.gram().reshape(30, 30))
    assert rel_err(eigenvalues, torch.linalg.eigvalsh(matrix)[-30:]) < 1e-12
    traces = torch.einsum("bcn,bcd,bdn->b", lines, hessian, lines)
    assert rel_err(weighted.norms().square().sum(1), traces) < 1e-12


def test_probabilities_add_up_to_a_constant() -> None:
    """The sum of all outputs has no gradient."""
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Softmax(1)), torch.randn(5, 4)
    assert rel_err(persample.jacobian(model, x).rows(), loop(model(x), trainable(model))) < 1e-12


class Shared(nn.Module):
    """Outputs that are parameters, and one that depends on nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.spare = nn.Parameter(torch.randn(5, 2)), nn.Parameter(torch.randn(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.table


def test_an_output_that_is_a_parameter() -> None:
    jac = persample.jacobian(Shared(), torch.randn(5, 3))
    assert jac.unused == ("spare",)
    assert torch.equal(jac.rows()["table"].flatten(0, 1).flatten(1), torch.eye(10))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.runs = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), 0

    def segment(self, x: Tensor) -> Tensor:
        self.runs += 1
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.segment, x, use_reentrant=False)


def test_checkpoints() -> None:
    model, x = Checkpointed(), torch.randn(5, 4)
    want = loop(model(x), trainable(model))
    for _ in range(3):
        assert rel_err(persample.jacobian(model, x).rows(), want) < 1e-12


def test_one_forward_pass_and_later_batches_by_the_plan() -> None:
    model, runs = network(), []
    model.register_forward_hook(lambda *_: runs.append(1))
    for _ in range(4):
        x = torch.randn(5, 1, 8, 8)
        jac = persample.jacobian(model, x)
    assert len(runs) == 4
    assert rel_err(jac.rows(), loop(model(x), trainable(model))) < 1e-12


def test_a_result_is_pickled_with_its_numbers() -> None:
    model, x = network(), torch.randn(5, 1, 8, 8)
    jac = persample.jacobian(model, x)
    copy = pickle.loads(pickle.dumps(jac))
    torch.testing.assert_close(copy.rows(), jac.rows(), rtol=0, atol=0)


def test_samples_that_couple_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    with pytest.raises(persample.CoupledSamplesError, match="BatchNorm"):
        persample.jacobian(model, torch.randn(5, 4))


def test_a_wrong_rule_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from persample.rules import RULES

    right = RULES["AddmmBackward0"]
    monkeypatch.setitem(RULES, "AddmmBackward0", lambda site: right(site) if site.slot == 0 else None)
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), torch.randn(5, 4)
    assert rel_err(persample.jacobian(model, x).rows(), loop(model(x), trainable(model))) < 1e-12

    def wrong(site: Any) -> Any:
        block = right(site)
        return block if site.slot == 0 or block is None else type(block)(block.x * 2, block.z)

    monkeypatch.setitem(RULES, "AddmmBackward0", wrong)
    with pytest.raises(persample.CheckError, match="do not add up"):
        persample.jacobian(model, x)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"params": ["5.wight"]}, "'5.wight', which is no parameter"),
        ({"params": "5.weight"}, r"params must be several names of parameters.*\[params\]"),
        ({"params": []}, "params holds no parameter"),
        ({"output_fn": lambda out: (out, out)}, "output_fn must return one tensor, .*got tuple"),
        ({"output_fn": lambda out: out.argmax(1)}, "must be real numbers; got torch.int64"),
        ({"output_fn": lambda out: out[:, :0]}, "an output or more for each sample"),
        ({"output_fn": lambda out: out * 1j}, "real and imaginary parts as two outputs"),
        ({"output_fn": lambda out: out.detach()}, "do not require a gradient"),
    ],
)
def test_what_makes_no_sense_is_told(options: dict, words: str) -> None:
    with pytest.raises((ValueError, TypeError, persample.PerSampleError), match=words):
        persample.jacobian(network(), torch.randn(5, 1, 8, 8), **options)


def test_what_reductions_are_given_is_told() -> None:
    jac = persample.jacobian(nn.Linear(3, 2), torch.randn(5, 3))
    eye = torch.eye(2).expand(5, 2, 2)
    for hessian, words in [
        (eye[0], r"\[B, \*out, \*out\] = \(5, 2, 2\); got \(2, 2\)"),
        (-eye, "no negative eigenvalue; got -1"),
        (eye + torch.tensor([[0.0, 1.0], [0.0, 0.0]]), "must be symmetric"),
        (eye * torch.nan, "finite"),
    ]:
        with pytest.raises(ValueError, match=words):
            jac.ggn(hessian)
    with pytest.raises(ValueError, match=r"shape of the outputs, .*\(5, 2\); got \(5,\)"):
        jac.weighted_sum(torch.ones(5))
    with pytest.raises(TypeError, match="jacobian"):
        jac.gram(other=torch.ones(3))
    with pytest.raises(TypeError, match="Module"):
        persample.jacobian(torch.sin, torch.ones(3))
    with pytest.raises(persample.PerSampleError, match="all 2 are frozen"):
        persample.jacobian(nn.Linear(3, 2).requires_grad_(False), torch.randn(5, 3))


class Packed(nn.Module):
    """An LSTM on sequences of several lengths; the last state of each, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 2)

    def forward(self, sequences: Any) -> dict[str, Tensor]:
        return {"last": self.rnn(sequences)[1][0][-1]}


def test_inputs_of_every_form() -> None:
    lengths = [5, 3, 2]
    packed = nn.utils.rnn.pack_sequence([torch.randn(n, 3) for n in lengths])
    model, chosen = Packed(), lambda out: out["last"]
    want = loop(model(packed)["last"], trainable(model))
    for inputs in (packed, (packed,), {"sequences": packed}, UserDict(sequences=packed)):
        assert rel_err(persample.jacobian(model, inputs, output_fn=chosen).rows(), want) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_lower_precision(dtype: torch.dtype) -> None:
    model, x = network().to(dtype), torch.randn(5, 1, 8, 8).to(dtype)
    want = {name: each.double() for name, each in loop(model(x), trainable(model)).items()}
    jac = persample.jacobian(model, x)
    rows = jac.rows()
    assert all(r.dtype == torch.float32 for r in rows.values())
    tolerance = 5e-2 if dtype == torch.bfloat16 else 1e-5
    assert rel_err({name: r.double() for name, r in rows.items()}, want) < tolerance
    assert jac.gram().dtype == torch.float32
    p = jac.outputs.softmax(1)
    assert jac.ggn(p.diag_embed() - p[:, :, None] * p[:, None]).norms().dtype == torch.float32
