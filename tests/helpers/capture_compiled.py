"""per_sample and torch.compile: compiled models run as plain ones, calls in a compiled function break its graph.

Run by `test_compiled` in a process of its own: Dynamo cannot trace the shape checks of the other tests.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import persample
from persample.capture.eagerly import eagerly
from persample.capture.plans import plans_of

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.compile warns about things of its own
OPTIONS = (
    {"backend": "outputs"},
    {"backend": "outputs", "hold": "graph"},
    {"backend": "hooks"},
    {"backend": "vmap"},
    {"backend": "hooks", "chunk_size": 2},
)


def losses_of(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, targets, reduction="none")


def example() -> tuple[nn.Module, Tensor, Tensor]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    return model, torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1])


def loop(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The norm of every sample's gradient, one pass each."""
    rows = [
        torch.autograd.grad(losses_of(model(x[b : b + 1]), y[b : b + 1]).sum(), model.parameters()) for b in range(5)
    ]
    return torch.stack([torch.cat([each.flatten() for each in row]).norm() for row in rows])


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_compiled_model(options: dict[str, Any], trained: bool) -> None:
    """Also one whose graph for training is there: its backward pass would run only once."""
    model, x, y = example()
    compiled = torch.compile(model, backend="aot_eager")
    if trained:
        losses_of(compiled(x), y).mean().backward()
    found = persample.per_sample(compiled, losses_of, x, y, **options).norms()
    torch.testing.assert_close(found, loop(model, x, y), rtol=1e-9, atol=0)


def test_threads_that_overlap_leave_compiling_as_it_was() -> None:
    """How torch.compile stands is the process's: a thread that ends later must not put back what another had set."""
    entered, left = threading.Event(), threading.Event()

    @eagerly
    def second() -> None:
        entered.set()
        assert left.wait(60)

    @eagerly
    def first() -> threading.Thread:
        thread = threading.Thread(target=second)
        thread.start()
        assert entered.wait(60)
        return thread

    thread = first()
    left.set()
    thread.join()
    graphs = []

    def counting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    torch.compile(lambda x: x.sin() + 1, backend=counting)(torch.randn(3))
    assert len(graphs) == 1


def test_jacobian_of_a_compiled_model() -> None:
    model, x, y = example()
    compiled = torch.compile(model, backend="aot_eager")
    losses_of(compiled(x), y).mean().backward()
    for _ in range(4):  # the first batch is watched, later ones are not
        found = persample.jacobian(compiled, x).rows()
        for name, rows in persample.jacobian(model, x).rows().items():
            torch.testing.assert_close(found[f"_orig_mod.{name}"], rows, rtol=1e-9, atol=0)
    assert plans_of(compiled).trust.misses == 0, "every run has the operations of the first"


@pytest.mark.parametrize(
    "norms",
    [
        lambda model, x, y: persample.per_sample(model, losses_of, x, y).norms(),
        lambda model, x, y: persample.from_losses(losses_of(model(x), y), model.parameters()).norms(),
        lambda model, x, y: torch.cat(
            [rows.flatten(1) for rows in persample.grad(losses_of(model(x), y), model.parameters())], 1
        ).norm(dim=1),
        lambda model, x, y: persample.jacobian(
            model, x, output_fn=lambda outputs: losses_of(outputs, y)[:, None], check=False
        ).norms()[:, 0],
    ],
)
def test_inside_a_compiled_function(norms: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> None:
    model, x, y = example()
    want = loop(model, x, y)

    @torch.compile(backend="aot_eager")
    def doubled(x: Tensor, y: Tensor) -> Tensor:
        return 2 * norms(model, x * 1, y)

    for _ in range(2):
        torch.testing.assert_close(doubled(x, y), 2 * want, rtol=1e-9, atol=0)
