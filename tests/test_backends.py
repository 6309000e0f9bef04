"""Every backend on every case with every reduction: exact, or refused in words; never wrong."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from oracle import expected, loop_grads, rel_err
from oracle import norms as oracle_norms
from torch import Tensor, nn
from torch.nn import functional as F

import persample
from persample.backends import hooks, module_rules, vmap
from persample.blocks import Block, Dense, Outer
from persample.cases import CASES, Case, find, select
from persample.rules import RULES, Site

BACKENDS = persample.backends()
needs_opacus = pytest.mark.filterwarnings("ignore::DeprecationWarning:opacus")
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def squares(outputs: Tensor, targets: Any) -> Tensor:
    return outputs.square().flatten(1).sum(1)


# --- every case -------------------------------------------------------------------------------------------


def moved(case: Case) -> tuple[nn.Module, Any, Any, Any]:
    """The case at another point: its parameters a little off."""
    model, loss_fn, inputs, targets = case.build()
    random = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=random, dtype=parameter.dtype))
    return model, loss_fn, inputs, targets


@cache
def truth(name: str) -> tuple[dict[str, Tensor], dict[Any, Any]]:
    """The loop's gradients of a case, and every reduction of them; "cross_gram" with the case at another point."""
    case = find(name)
    torch.manual_seed(1)
    want = loop_grads(*case.build())
    torch.manual_seed(1)
    other = loop_grads(*moved(case))
    return want, expected(want, other=other)


def captured(built: tuple[nn.Module, Any, Any, Any], backend: str) -> Any:
    torch.manual_seed(1)
    return persample.per_sample(*built, backend=backend)


def captured_or_refused(case: Case, backend: str) -> Any:
    """The result, or the error that refuses it."""
    try:
        return captured(case.build(), backend)
    except persample.PerSampleError as error:
        return error


def in_words(error: Exception) -> bool:
    """Whether an error says what to do."""
    return any(word in str(error) for word in ("backend=", "coupled=", "eval", "out of place", "randomness="))


@needs_opacus
@every_backend
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_exact_or_refused(case: Case, backend: str) -> None:
    if case.coupled and "separable" not in case.tags:
        with pytest.raises(persample.PerSampleError) as refusal:
            captured(case.build(), backend)
        assert in_words(refusal.value)
        return
    psg = captured_or_refused(case, backend)
    if isinstance(psg, persample.PerSampleError):
        assert in_words(psg)
        assert backend != "outputs" or case.coupled, f"refused by outputs: {psg}"
        return
    want, sums = truth(case.name)
    tolerance = 1e-5 if "float32" in case.tags else 1e-9
    close = {
        "grads": (psg.grads(), want),
        "dot": (psg.dot(sums["vectors"]), sums["dot"]),
        "weighted_sum": (psg.weighted_sum(sums["c"]), sums["weighted_sum"]),
        "weighted_sum by layer": (psg.weighted_sum(sums["layer_c"]), sums["layer_weighted_sum"]),
    }
    other = captured(moved(case), backend)
    for per in ("total", "layer", "param"):
        close[f"gram {per}"] = psg.gram(per), sums["gram", per]
        close[f"cross gram {per}"] = psg.gram(per, other), sums["cross_gram", per]
    for what, (got, right) in close.items():
        assert rel_err(got, right) < tolerance, what
    # a norm is the root of a sum, and the root of rounding is coarser: measured by the largest norm of the batch
    scale = float(sums["norms", "total"].max()) if psg.batch else 1.0
    for per in ("total", "layer", "param"):
        assert rel_err(psg.norms(per), sums["norms", per], floor=max(scale, 1e-12)) < tolerance, per


@needs_opacus
@every_backend
@pytest.mark.parametrize("name", ["usage/tied-weights", "layer/Conv2d(3,2,2)@3,3,7,7", "layer/Embedding(3,5)@4,2,2"])
def test_clipped_sum(name: str, backend: str) -> None:
    want = loop_grads(*find(name).build())
    bound = float(oracle_norms(want).median())
    right = expected(want, max_norm=bound)["clipped_sum"]
    assert rel_err(captured(find(name).build(), backend).clipped_sum(bound), right) < 1e-9


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


# --- errors planted by hand -------------------------------------------------------------------------------


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


X = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def test_a_wrong_rule_of_outputs_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = RULES["AddmmBackward0"]

    def wrong(site: Site) -> Block | None:
        block = right(site)
        return Outer(block.x, 1.001 * block.z) if isinstance(block, Outer) else block

    monkeypatch.setitem(RULES, "AddmmBackward0", wrong)
    with pytest.raises(persample.CheckError, match="do not add up"):
        persample.per_sample(network(), squares, X)


@pytest.mark.parametrize("kind", [nn.Linear, nn.LayerNorm, nn.Conv1d])
def test_a_wrong_rule_of_hooks_is_caught(monkeypatch: pytest.MonkeyPatch, kind: type[nn.Module]) -> None:
    right = module_rules.MODULE_RULES[kind]

    def wrong(call: module_rules.Call) -> dict[str, Block]:
        return right(module_rules.replace(call, z=1.001 * call.z))

    monkeypatch.setitem(module_rules.MODULE_RULES, kind, wrong)
    made = {
        nn.Linear: (network(), X),
        nn.LayerNorm: (nn.LayerNorm(4).double(), X),
        nn.Conv1d: (nn.Conv1d(2, 3, 2).double(), X.view(3, 2, 4)),
    }
    with pytest.raises(persample.CheckError, match=r"hooks.*do not add up"):
        persample.per_sample(made[kind][0], squares, made[kind][1], backend="hooks")


@pytest.mark.parametrize("spoil", [lambda g: 1.001 * g, lambda g: g.flip(0)], ids=["scaled", "rows exchanged"])
def test_wrong_rows_of_vmap_are_caught(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Tensor], Tensor]) -> None:
    """Exchanged rows add up, so the plain sum would not find them."""
    right = vmap.differentiate

    def wrong(*arguments: Any) -> Any:
        gradients, losses = right(*arguments)
        return {name: spoil(g) for name, g in gradients.items()}, losses

    monkeypatch.setattr(vmap, "differentiate", wrong)
    with pytest.raises(persample.CheckError, match="vmap"):
        persample.per_sample(network(), squares, X, backend="vmap")
    persample.per_sample(network(), squares, X, backend="vmap", check=False)  # at the caller's own risk


@needs_opacus
def test_wrong_rows_of_opacus_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from opacus.grad_sample import GradSampleModule

    right = GradSampleModule.GRAD_SAMPLERS[nn.Linear]

    def wrong(*arguments: Any) -> Any:
        return {parameter: g.flip(0) for parameter, g in right(*arguments).items()}

    monkeypatch.setitem(GradSampleModule.GRAD_SAMPLERS, nn.Linear, wrong)
    with pytest.raises(persample.CheckError, match="opacus"):
        persample.per_sample(network(), squares, X, backend="opacus")


# --- nothing stays behind ---------------------------------------------------------------------------------


class Broken(nn.Module):
    def __init__(self, kind: type[BaseException] = ArithmeticError) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        raise self.kind("in the middle")


def state(model: nn.Module) -> list[Any]:
    """Hooks, attributes, modes, gradients and values of a model."""
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    found: list[Any] = []
    for module in model.modules():
        found += [module.training, sorted(vars(module)), *(len(getattr(module, table)) for table in tables)]
    for parameter in model.parameters():
        found += [sorted(vars(parameter)), None if parameter.grad is None else parameter.grad.tolist()]
        found += [parameter.tolist(), parameter.requires_grad]
    return found + [buffer.tolist() for buffer in model.buffers()]


@needs_opacus
@every_backend
@pytest.mark.parametrize("where", ["nowhere", "loss", "model"])
def test_nothing_stays_behind(backend: str, where: str) -> None:
    model = nn.Sequential(network(), Broken()) if where == "model" else network()
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, number)
    before = state(model)

    def loss(outputs: Tensor, targets: Any) -> Tensor:
        if where == "loss":
            raise ArithmeticError("in the middle")
        return squares(outputs, targets)

    if where == "nowhere":
        persample.per_sample(model, loss, X, backend=backend).norms()
    else:
        with pytest.raises(ArithmeticError, match="in the middle"):
            persample.per_sample(model, loss, X, backend=backend)
    assert state(model) == before


@needs_opacus
@every_backend
def test_refusals_leave_nothing_behind(backend: str) -> None:
    """Batch normalisation in training mode: refused by every backend, but the statistics follow one forward pass."""
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).double()
    before = state(model)
    with pytest.raises(persample.PerSampleError):
        persample.per_sample(model, squares, X, backend=backend)
    buffers = len(list(model.buffers()))
    assert state(model)[:-buffers] == before[:-buffers]


@needs_opacus
@every_backend
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inside_no_grad(backend: str, mode: Callable[[], Any]) -> None:
    model = network()
    right = persample.per_sample(model, squares, X, backend=backend).norms()
    with mode():
        inside = persample.per_sample(model, squares, X, backend=backend).norms()
    torch.testing.assert_close(inside, right)


# --- hooks ------------------------------------------------------------------------------------------------


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


# --- vmap -------------------------------------------------------------------------------------------------


def test_vmap_randomness() -> None:
    model = nn.Sequential(nn.Linear(4, 50), nn.Dropout(0.5), nn.Linear(50, 2)).double()
    same = X[:1].repeat(6, 1)
    with pytest.raises(persample.UnsupportedError, match=r"randomness='different'.*'same'") as refusal:
        persample.per_sample(model, squares, same, backend="vmap")
    assert isinstance(refusal.value.__cause__, RuntimeError)
    spread = {}
    for randomness in ("same", "different"):
        psg = persample.per_sample(model, squares, same, backend="vmap", randomness=randomness)
        assert any("check skipped" in note for note in psg.notes)
        spread[randomness] = float(psg.grads()["0.weight"].std(0).max())
    assert spread["same"] < 1e-12 < spread["different"]
    with pytest.raises(ValueError, match="randomness must be one of 'error', 'same', 'different'; got 'maybe'"):
        persample.per_sample(model, squares, same, backend="vmap", randomness="maybe")


def test_vmap_checks_models_without_dropout_whatever_the_option() -> None:
    assert not persample.per_sample(network(), squares, X, backend="vmap", randomness="different").notes


def test_vmap_refuses_changes_of_buffers_and_undoes_them() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)).double()
    before = state(model)
    with pytest.raises(persample.UnsupportedError, match=r"changes buffers \('1\.running_mean'.*eval"):
        persample.per_sample(model, squares, X, backend="vmap")
    assert state(model) == before


def test_vmap_refuses_losses_that_depend_on_the_batch() -> None:
    with pytest.raises(persample.UnsupportedError, match=r"sample 0 alone has the loss.*influence each other"):
        persample.per_sample(network(), lambda out, _: squares(out, _) / len(out), X, backend="vmap")


def test_vmap_refuses_another_layout() -> None:
    loss = lambda out, _: out.square().sum((0, 2))  # noqa: E731
    with pytest.raises(persample.UnsupportedError, match="outputs"):
        persample.per_sample(network(), loss, X.view(2, 3, 4), backend="vmap")
    with pytest.raises(persample.UnsupportedError, match=r"no tensor with 3 samples"):
        persample.per_sample(network(), loss, X.view(2, 3, 4)[:1], backend="vmap")


def test_vmap_keeps_the_cause() -> None:
    with pytest.raises(persample.UnsupportedError, match="functorch cannot batch") as refusal:
        persample.per_sample(network(), lambda out, _: squares(out, _) * float(out.detach()[0, 0] > -1e9), X,
                             backend="vmap")  # fmt: skip
    assert refusal.value.__cause__ is not None


def test_vmap_reports_unused_parameters() -> None:
    model = nn.ModuleDict({"used": nn.Linear(4, 3), "idle": nn.Linear(2, 2)}).double()
    model.forward = lambda x: model["used"](x)  # type: ignore[method-assign]
    psg = persample.per_sample(model, squares, X, backend="vmap")
    assert psg.unused == ("idle.weight", "idle.bias")


# --- opacus -----------------------------------------------------------------------------------------------


def test_opacus_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("opacus", "opacus.grad_sample"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(persample.UnsupportedError, match=r"pip install 'persample\[opacus\]'"):
        persample.per_sample(network(), squares, X, backend="opacus")


@needs_opacus
def test_opacus_refusals() -> None:
    with pytest.raises(persample.UnsupportedError, match=r"training mode alone.*layer '0'"):
        persample.per_sample(network().eval(), squares, X, backend="opacus")
    normed = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)).double()
    with pytest.raises(persample.UnsupportedError, match=r"Opacus refuses this model: .*buffers"):
        persample.per_sample(normed, squares, X, backend="opacus")


@needs_opacus
def test_opacus_with_the_batch_second_is_caught() -> None:
    """As many positions as samples: its rows have the right shape and the right sum, and belong to nobody."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    x = torch.randn(3, 3, 4, dtype=torch.float64)
    with pytest.raises(persample.CheckError, match="opacus"):
        persample.per_sample(model, lambda out, _: out.square().sum((0, 2)), x, backend="opacus")


# --- registry ---------------------------------------------------------------------------------------------


def test_order_of_preference() -> None:
    assert BACKENDS == ("outputs", "hooks", "vmap", "opacus")


@needs_opacus
@every_backend
def test_blocks_and_losses(backend: str) -> None:
    """Losses are those of the batch, without graph, whatever the backend."""
    model = network()
    psg = persample.per_sample(model, squares, X, backend=backend)
    torch.testing.assert_close(psg.losses, squares(model(X), None).detach())
    assert not psg.losses.requires_grad
    assert {row.parameter for row in psg.explain()} == {name for name, _ in model.named_parameters()}
    assert psg.backend == backend
    assert all(isinstance(block, Dense | Outer) for blocks in psg.blocks.values() for block in blocks)
