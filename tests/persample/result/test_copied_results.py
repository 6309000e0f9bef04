"""Results that are pickled, copied or saved go on being usable, without the model, the graph or more than their own."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing  # makes tensors travel by shared memory
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import persample
from persample import memory

pytestmark = pytest.mark.usefixtures("double")


def saved(found: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(found, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


WAYS: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda found: pickle.loads(pickle.dumps(found)),
    "pickle, first protocol": lambda found: pickle.loads(pickle.dumps(found, protocol=0)),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "torch.save": saved,
    "to another process": lambda found: pickle.loads(ForkingPickler.dumps(found)),
}
every_way = pytest.mark.parametrize("way", WAYS)


class Spare(nn.Sequential):
    """With a layer and a number that take no part."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.spare, self.scale = nn.Linear(2, 2), nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        for each in list(self)[:-1]:
            x = each(x)
        return x


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "linear": lambda: (Spare(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(4, 3)),
    "positions": lambda: (nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), torch.randn(4, 5, 3)),
    "convolution": lambda: (nn.Conv2d(2, 3, 3), torch.randn(4, 2, 6, 6)),
    "table": lambda: (nn.Embedding(7, 3), torch.randint(7, (4, 5))),
    "computed": lambda: (weight_norm(nn.Linear(3, 2)), torch.randn(4, 3)),
    "computed convolution": lambda: (weight_norm(nn.Conv1d(2, 3, 2)), torch.randn(4, 2, 5)),
    "empty": lambda: (nn.Linear(3, 2), torch.randn(0, 3)),
}


OTHERS = [({"hold": "graph"}, "hold='factors'"), ({"chunk_size": 3}, "Leave chunk_size out")]


def squares(y: Tensor, _: Any) -> Tensor:
    return y.square().flatten(1).sum(1)


def same(found: Any, expected: Any) -> None:
    c = torch.linspace(0.5, 2, expected.batch)
    assert (found.batch, found.backend, found.unused) == (expected.batch, expected.backend, expected.unused)
    assert (found.layers, found.notes) == (expected.layers, expected.notes)
    torch.testing.assert_close(found.losses, expected.losses)
    for name in ("norms", "gram", "grads"):
        torch.testing.assert_close(getattr(found, name)(), getattr(expected, name)())
    torch.testing.assert_close(found.gram("param", expected), expected.gram("param"))
    torch.testing.assert_close(expected.gram("layer", found), expected.gram("layer"))
    torch.testing.assert_close(found.clipped_sum(0.5), expected.clipped_sum(0.5))
    v = expected.weighted_sum(c)
    torch.testing.assert_close(found.weighted_sum(c), v)
    torch.testing.assert_close(found.dot(v), expected.dot(v))
    torch.testing.assert_close(found.dot(expected.grads()), expected.gram())


@every_way
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("backend", ["outputs", "vmap"])
def test_a_copy_is_as_good(model: str, way: str, backend: str) -> None:
    module, x = MODELS[model]()
    expected = persample.per_sample(module, squares, x, backend=backend)
    found = WAYS[way](expected)
    same(found, expected)
    same(WAYS[way](found), expected)  # and so is a copy of the copy
    assert len(found.explain()) == len(expected.explain())


@every_way
def test_what_happens_to_the_original_does_not_reach_the_copy(way: str) -> None:
    module, x = weight_norm(nn.Linear(3, 2)), torch.randn(4, 3)
    expected = persample.per_sample(module, squares, x)
    norms, found = expected.norms(), WAYS[way](expected)
    x.zero_()
    for parameter in module.parameters():
        parameter.data.fill_(9)
    torch.testing.assert_close(found.norms(), norms)


@every_way
def test_a_result_that_cannot_be_formed_any_more_is_not_copied(way: str) -> None:
    x = torch.randn(4, 3)
    found = persample.per_sample(nn.Linear(3, 2), squares, x)
    found.blocks["weight"][0].x.zero_()
    with pytest.raises(RuntimeError, match="modified in place after they were captured"):
        WAYS[way](found)


def test_a_pickle_holds_the_factors_and_nothing_beside_them() -> None:
    """Neither the data set that the batch is a part of, nor the parameters."""
    data, model = torch.randn(10_000, 50), nn.Linear(50, 200)
    found = persample.per_sample(model, squares, data[5:9])
    held = sum(block.nbytes for blocks in found.blocks.values() for block in blocks)
    assert held < 20_000
    assert len(pickle.dumps(found)) < held + 8_000


class Heads(nn.Module):
    """Two layers that read the same input."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(400, 2, bias=False), nn.Linear(400, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.other(x)], 1)


def test_factors_of_several_layers_are_stored_once() -> None:
    x = torch.randn(5, 400)
    found = pickle.loads(pickle.dumps(persample.per_sample(Heads(), squares, x)))
    (one,), (other,) = found.blocks.values()
    assert one.x is other.x
    assert len(pickle.dumps(found)) < x.nbytes + 8_000


@every_way
@pytest.mark.parametrize(("options", "word"), OTHERS)
def test_what_holds_no_factors_says_so(options: dict[str, Any], word: str, way: str) -> None:
    found = persample.per_sample(nn.Linear(3, 2), squares, torch.randn(4, 3), **options)
    with pytest.raises(TypeError, match=rf"cannot be copied, pickled or saved.*{word}.*what the reductions return"):
        WAYS[way](found)


def test_another_process_reads_it(tmp_path: Path) -> None:
    found = persample.per_sample(*[MODELS["linear"]()[0], squares, torch.randn(4, 3)])
    torch.save(found, tmp_path / "found.pt")
    code = (
        "import sys, torch, persample; found = torch.load(sys.argv[1], weights_only=False); "
        "torch.save((found.norms(), found.grads()), sys.argv[2])"
    )
    root = Path(__file__).parents[3]
    command = [sys.executable, "-c", code, str(tmp_path / "found.pt"), str(tmp_path / "formed.pt")]
    subprocess.run(command, cwd=root, check=True, timeout=300)
    norms, rows = torch.load(tmp_path / "formed.pt")
    torch.testing.assert_close(norms, found.norms())
    torch.testing.assert_close(rows, found.grads())


@every_way
def test_rows_in_memory_that_is_used_again(way: str) -> None:
    """A copy has memory of its own, and the next rows are not written over it."""
    model, copies, expected = nn.Linear(512, 256), [], []
    before = memory.reuse(True)
    try:
        for _ in range(4):
            x = torch.randn(8, 512)
            rows = persample.per_sample(model, squares, x).grads()
            copies.append(WAYS[way](rows))
            expected.append({name: each.clone() for name, each in rows.items()})
            if way == "copy":  # of the dict alone: the rows are the same tensors, and stay lent
                assert copies[-1]["weight"] is rows["weight"]
            del rows
        for found, each in zip(copies, expected, strict=True):
            torch.testing.assert_close(found, each, rtol=0, atol=0)
    finally:
        memory.reuse(before)
