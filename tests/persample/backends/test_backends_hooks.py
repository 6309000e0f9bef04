"""The `hooks` backend: which layers it covers, whose hooks come first, and what it refuses by name."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from capturing import Broken, X, captured, captured_or_refused, network, squares, truth
from oracle import loop_grads, rel_err
from torch import Tensor, nn
from torch.nn import functional as F

import persample
from persample.backends import hooks, module_rules
from persample.testing.cases import Case, select

COVERED_BY_HOOKS = [
    case
    for case in select(having=["layer"], coupled=False)
    if any(kind.__name__ + "(" in case.name for kind in module_rules.MODULE_RULES)
    and not any(part in case.name for part in ("mode=max", "Multihead", "Transformer", "LazyLinear"))
]


@pytest.mark.parametrize("case", COVERED_BY_HOOKS, ids=lambda c: c.name)
def test_hooks_cover_their_layers(case: Case) -> None:
    assert rel_err(captured(case.build(), "hooks").grads(), truth(case.name)[0]) < 1e-9


@pytest.mark.parametrize("case", select(having=["time-major"]), ids=lambda c: c.name)
def test_hooks_follow_the_samples_wherever_they_lie(case: Case) -> None:
    """What hooks refuse in time-major models are parameters without a module, never a layout."""
    psg = captured_or_refused(case, "hooks")
    if isinstance(psg, persample.PerSampleError):
        assert "has no rule" in str(psg)
        return
    assert rel_err(psg.grads(), truth(case.name)[0]) < 1e-9


def test_hooks_refuse_by_name_before_the_forward_pass() -> None:
    model = nn.Sequential(Broken(), nn.Sequential(nn.PReLU()))
    with pytest.raises(persample.UnsupportedError, match=r"layer '1\.0', of type PReLU.*'weight'.*Linear, Conv1d") as e:
        persample.per_sample(model, squares, X, backend="hooks")
    assert all(kind.__name__ in str(e.value) for kind in module_rules.MODULE_RULES)


class Renamed(nn.Linear):
    """Computes what its base computes."""

    def __init__(self, inp: int, out: int) -> None:
        super().__init__(inp, out)

    def extra_repr(self) -> str:
        return "renamed"


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class DoubledKernel(nn.Conv1d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return 2 * super()._conv_forward(input, weight, bias)


def test_hooks_cover_subclasses_that_leave_the_computation_alone() -> None:
    model = Renamed(4, 3).double()
    got = persample.per_sample(model, squares, X, backend="hooks").grads()
    assert rel_err(got, loop_grads(model, squares, X, None)) < 1e-12


def test_hooks_refuse_subclasses_that_compute_something_else() -> None:
    for model, x in ((Doubled(4, 3), X), (DoubledKernel(2, 3, 2), X.view(3, 2, 4))):
        with pytest.raises(persample.UnsupportedError, match="has no rule for the model itself, of type Doubled"):
            persample.per_sample(model.double(), squares, x, backend="hooks")
    model = nn.Linear(4, 3).double()
    model.forward = lambda x: 2 * F.linear(x, model.weight)  # type: ignore[method-assign]
    with pytest.raises(persample.UnsupportedError, match="has no rule"):
        persample.per_sample(model, squares, X, backend="hooks")


def test_hooks_notice_weights_used_outside_of_their_module() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False)).double()
    with pytest.raises(persample.CheckError, match=r"'0\.weight'.*outputs"):
        persample.per_sample(model, lambda out, _: (out @ model[0].weight).sum(1), X, backend="hooks")


class Overwrites(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        y = self.lin(x)
        x.zero_()
        return x + y


def test_hooks_notice_a_modified_input() -> None:
    model = Overwrites().double()
    with pytest.raises(persample.UnsupportedError, match=r"input of layer 'lin' was modified in place.*out of place"):
        persample.per_sample(model, squares, X, backend="hooks")
    model.lin.weight.requires_grad_(False)  # the bias does not need the input
    got = persample.per_sample(model, squares, X, backend="hooks").grads()
    assert rel_err(got, loop_grads(model, squares, X, None)) < 1e-12


@pytest.mark.parametrize("tokens", [1, 3])
def test_hooks_with_in_place_operations_on_outputs(tokens: int) -> None:
    """Also where the output is a view of what the operation made, as a linear layer's is on 3-D input."""
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 2), nn.Hardtanh(inplace=True)).double()
    x = X.view(6, 1, 4).repeat(1, tokens, 1)
    got = persample.per_sample(model, squares, x, backend="hooks").grads()
    assert rel_err(got, loop_grads(model, squares, x, None)) < 1e-12


def test_hooks_come_before_those_of_the_user() -> None:
    model = network()
    handle = model[0].register_forward_hook(lambda module, args, out: 3 * out)
    got = persample.per_sample(model, squares, X, backend="hooks").grads()
    assert rel_err(got, loop_grads(model, squares, X, None)) < 1e-12
    handle.remove()


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Conv2d(2, 3, 2), (2, 4, 5)),
        (lambda: nn.ConvTranspose1d(2, 3, 2, stride=2), (2, 5)),
        (lambda: nn.InstanceNorm2d(2, affine=True), (2, 4, 5)),
        (lambda: nn.LayerNorm(4), (4,)),
        (lambda: nn.RMSNorm((2, 3)), (2, 3)),
        (lambda: nn.Linear(4, 3), (4,)),
    ],
    ids=["conv", "transposed", "instance", "layer", "rms", "linear"],
)
def test_hooks_on_single_samples_in_a_loop(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    """Without a batch dimension every entry of the output belongs to one sample."""
    module = make().double()

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([self.module(sample) for sample in x])

    x = torch.randn(3, *shape, dtype=torch.float64)
    loss = lambda out, _: out.pow(3).flatten(1).sum(1)  # noqa: E731
    got = persample.per_sample(Loop(), loss, x, backend="hooks").grads()
    assert rel_err(got, loop_grads(Loop(), loss, x, None)) < 1e-10


def test_hooks_read_rows_on_request() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 2)).double()
    x = torch.randn(5, 2, 4, 4, dtype=torch.float64)
    with pytest.raises(persample.CoupledSamplesError, match=r"layer '1' \(BatchNorm2d\).*eval mode"):
        persample.per_sample(model, squares, x, backend="hooks")
    rows = persample.per_sample(model, squares, x, backend="hooks", coupled="rows").grads()
    assert rel_err(rows, persample.per_sample(model, squares, x, coupled="rows").grads()) < 1e-9


def test_hooks_name_the_layer_where_frozen_normalisation_couples() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5).requires_grad_(False), nn.Linear(5, 2)).double()
    with pytest.raises(persample.CoupledSamplesError, match="layer '1'"):
        persample.per_sample(model, squares, X, backend="hooks")


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.positions(torch.arange(3))).tanh()


@pytest.mark.parametrize("coupled", ["error", "rows"])
def test_hooks_do_not_take_positions_for_samples(coupled: str) -> None:
    """Three positions, three samples: the rows of the table's output have the batch's size and are not the batch."""
    x = torch.randn(3, 3, 4, dtype=torch.float64)
    with pytest.raises(persample.UnsupportedError, match=r"layer 'positions'.*belongs to no single sample.*'outputs'"):
        persample.per_sample(Positions().double(), squares, x, backend="hooks", coupled=coupled)


def test_hooks_record_their_own_thread_alone() -> None:
    model, results = network(), {}
    other = torch.randn(9, 4, dtype=torch.float64)
    start = threading.Barrier(2)

    def work(name: str, x: Tensor) -> None:
        start.wait()
        for _ in range(20):
            results[name] = persample.per_sample(model, squares, x, backend="hooks").grads()

    threads = [threading.Thread(target=work, args=pair) for pair in (("a", X), ("b", other))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, x in (("a", X), ("b", other)):
        assert rel_err(results[name], loop_grads(model, squares, x, None)) < 1e-12


def test_hooks_in_mixed_precision() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3))
    with torch.autocast("cpu", torch.bfloat16):
        got = persample.per_sample(model, squares, X.float(), backend="hooks").grads()
        want = loop_grads(model, squares, X.float(), None)
    assert all(g.dtype == torch.float32 for g in got.values())
    assert rel_err(got, want) < 0.05


def test_covered_types_come_from_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "MODULE_RULES", {nn.Linear: module_rules.linear})
    assert hooks.covered_types() == "Linear"


def test_a_type_that_is_called_like_a_covered_one_is_told_apart() -> None:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 2))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    with pytest.raises(persample.UnsupportedError, match=rf"of type {__name__}\.Linear, .*covers the types Linear"):
        persample.per_sample(Linear(), squares, torch.randn(3, 4), backend="hooks")
