"""Data in containers: mappings, dataclasses, objects; packed, nested and sparse tensors; batches of no sample."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import loop_grads, rel_err
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import persample
from persample.graph.containers import mapped
from persample.result.holding.cutting import part_of
from persample.testing.cases import CASES, Case

pytestmark = pytest.mark.usefixtures("double")
OPTIONS: list[dict[str, Any]] = [
    {}, {"hold": "graph"}, {"chunk_size": 2}, {"chunk_size": 2, "hold": "graph"}, {"chunk_size": 2, "check": False},
    {"backend": "hooks"}, {"backend": "vmap"},
]  # fmt: skip
every_option = pytest.mark.parametrize("options", OPTIONS, ids=str)


@dataclass
class Batch:
    x: Tensor
    name: str = "of words"


@dataclass(frozen=True)
class Frozen:
    x: Tensor


class Encoding(UserDict):
    """As tokenizers return it: a mapping that is no dict, made from one."""

    def __init__(self, data: dict[str, Tensor] | None = None, kind: str | None = None) -> None:
        super().__init__(data)
        self.kind = kind


class Slotted:
    __slots__ = ("x",)

    def __init__(self, x: Tensor) -> None:
        self.x = x


Point = namedtuple("Point", "x label")
CONTAINERS: dict[str, Callable[[Tensor], Any]] = {
    "dict": lambda x: {"x": x},
    "UserDict": lambda x: UserDict(x=x),
    "Encoding": lambda x: Encoding({"x": x}, "ids"),
    "OrderedDict": lambda x: OrderedDict(x=x),
    "dataclass": Batch,
    "frozen": Frozen,
    "namedtuple": lambda x: Point(x, 2),
    "namespace": lambda x: SimpleNamespace(x=x, other={"deep": [UserDict(a=x)]}),
    "inside": lambda x: UserDict(x=Frozen(UserDict(x=x))),
}


def read(data: Any) -> Tensor:
    while not isinstance(data, Tensor):
        data = data["x"] if hasattr(data, "keys") else data.x
    return data


class Reading(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 3)

    def forward(self, first: Any, second: Any) -> Tensor:
        return self.lin(read(first) - read(second))


def losses(outputs: Tensor, targets: Any) -> Tensor:
    return nn.functional.cross_entropy(outputs, read(targets), reduction="none")


@every_option
@pytest.mark.parametrize("container", CONTAINERS)
def test_containers_are_cut_where_they_hold_samples(container: str, options: dict[str, Any]) -> None:
    make, model, x, y = CONTAINERS[container], Reading(), torch.randn(5, 4), torch.randint(3, (5,))
    inputs = (make(x), make(2 * x))
    found = persample.per_sample(model, losses, inputs, make(y), **options)
    assert rel_err(found.grads(), loop_grads(model, losses, (x, 2 * x), y)) < 1e-12
    assert read(inputs[0]) is x  # what the caller gave is left as it was


def test_a_container_that_cannot_be_copied_is_named() -> None:
    model, x, y = Reading(), torch.randn(5, 4), torch.randint(3, (5,))
    inputs = (MappingProxyType({"x": x}), x)
    persample.per_sample(model, losses, inputs, y).norms()
    with pytest.raises(persample.UnsupportedError, match=r"a mappingproxy among the inputs.*Give a dict"):
        persample.per_sample(model, losses, inputs, y, chunk_size=2)


def one_more(inner: st.SearchStrategy) -> st.SearchStrategy:
    made = [st.builds(Frozen, inner), st.builds(lambda a: UserDict(a=a), inner), st.builds(SimpleNamespace, a=inner)]
    return st.one_of(st.lists(inner, max_size=3), st.tuples(inner, inner), *made)


@given(st.recursive(st.integers(0, 9) | st.text(max_size=2), one_more, max_leaves=8))
def test_trees_are_mapped_leaf_by_leaf(tree: Any) -> None:
    seen: list[Any] = []
    changed = mapped(lambda leaf: (seen.append(leaf), leaf * 2)[1], tree)
    again: list[Any] = []
    assert mapped(lambda leaf: (again.append(leaf), leaf)[1], changed) == changed
    assert again == [each * 2 for each in seen]


def test_an_object_that_holds_itself() -> None:
    node = SimpleNamespace(x=torch.ones(4))
    node.itself = [node]
    part = part_of((node,), slice(1, 3), 4)[0]
    assert part.x.shape == (2,)
    assert part.itself[0] is node


# --- other tensors ----------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 3)

    def forward(self, packed: PackedSequence) -> Tensor:
        return self.lstm(packed)[1][0][0]


def squares(y: Tensor, _: Any) -> Tensor:
    return y.square().flatten(1).sum(1)


@pytest.mark.parametrize("lengths", [[2, 5, 1, 5, 3], [5, 4, 4, 2, 1]])  # as many steps as samples, too
@pytest.mark.parametrize(
    "options", [{}, {"chunk_size": 2}, {"chunk_size": 2, "check": False}, {"hold": "graph"}], ids=str
)
def test_packed_sequences(lengths: list[int], options: dict[str, Any]) -> None:
    ordered = lengths == sorted(lengths, reverse=True)
    model, packed = Recurrent(), pack_sequence([torch.randn(n, 4) for n in lengths], enforce_sorted=ordered)
    expected = loop_grads(model, squares, (packed,), None)
    for inputs in (packed, (packed,)):
        assert rel_err(persample.per_sample(model, squares, inputs, **options).grads(), expected) < 1e-12


class OfNested(nn.Module):
    """A layer on every sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.lin(each).mean(0) for each in x.unbind()])


class OnNested(OfNested):
    """A layer on the nested tensor itself."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([each.mean(0) for each in self.lin(x).unbind()])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@every_option
def test_nested_tensors(layout: torch.layout, options: dict[str, Any]) -> None:
    parts = [torch.randn(n, 4) for n in (2, 5, 1)]
    nested = torch.nested.nested_tensor(parts, layout=layout)
    with pytest.raises(persample.UnsupportedError, match="nested tensors"):
        persample.per_sample(OnNested(), squares, nested, **options)
    model = OfNested()
    if options.get("backend") == "vmap":
        with pytest.raises(persample.UnsupportedError, match=r"cannot batch nested tensors.*backend='outputs'"):
            persample.per_sample(model, squares, nested, **options)
        return
    expected = loop_grads(model, squares, (nested,), None)
    assert rel_err(persample.per_sample(model, squares, nested, **options).grads(), expected) < 1e-12
    both = persample.per_sample(nn.Linear(4, 2), lambda y, _: squares(y, _), torch.randn(3, 4), nested, **options)
    assert both.norms().shape == (3,)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
def test_nested_tensors_in_losses_alone() -> None:
    model, nested = OnNested(), torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(5, 4)])
    with pytest.raises(persample.UnsupportedError, match="computes with nested tensors"):
        persample.grad(squares(model(nested), None), model.parameters())


@pytest.mark.parametrize("options", OPTIONS[:6], ids=str)
def test_sparse_inputs_of_a_linear_layer(options: dict[str, Any]) -> None:
    model, x = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(5, 6) * (torch.rand(5, 6) < 0.3)
    expected = loop_grads(model, squares, x, None)
    assert rel_err(persample.per_sample(model, squares, x.to_sparse(), **options).grads(), expected) < 1e-12


# --- no samples -------------------------------------------------------------------------------------------


class Appended(nn.Module):
    """Time first, with one more step that is a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.row = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.row.expand(1, x.shape[1], 5)])


EMPTY = [case for case in CASES if case.name.startswith(("usage/", "attention/")) and "checkpoint" not in case.name]


@pytest.mark.parametrize("options", [{}, {"hold": "graph"}, {"coupled": "rows"}], ids=str)
def test_an_empty_batch_time_first(options: dict[str, Any]) -> None:
    found = persample.per_sample(Appended(), lambda y, _: y.square().sum((0, 2)), (torch.randn(3, 0, 5),), **options)
    assert found.norms().shape == (0,)
    assert found.grads()["row"].shape == (0, 5)
    assert not found.weighted_sum(torch.ones(0))["row"].any()


@pytest.mark.parametrize("case", EMPTY, ids=lambda case: case.name)
def test_an_empty_batch_with_the_graph_as_with_factors(case: Case) -> None:
    model, loss_fn, inputs, targets = case.build()
    batch = persample.per_sample(model, loss_fn, inputs, targets).batch if not case.coupled else 0
    inputs, targets = part_of((inputs, targets), slice(0, 0), batch)
    try:
        plain = loss_fn(model(*inputs) if isinstance(inputs, tuple) else model(inputs), targets)
    except Exception:
        pytest.skip("the model does not take an empty batch")
    if plain.shape != (0,):
        pytest.skip("the batch is not dimension 0 of all inputs")
    for hold in ("factors", "graph"):
        found = persample.per_sample(model, loss_fn, inputs, targets, hold=hold)
        assert found.norms().shape == (0,)
        assert not any(total.any() for total in found.clipped_sum(1.0).values())
