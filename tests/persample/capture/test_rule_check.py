"""The check of one use: a wrong rule is caught by as little as rounding allows, a right one is never refused."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import persample
from persample.blocks.types import Block, Dense, Outer
from persample.capture import plans, rule_check
from persample.rules import RULES, Site, build

ADDMM, CONVOLUTION, GROUP_NORM = "AddmmBackward0", "ConvolutionBackward0", "NativeGroupNormBackward0"
LAYER_NORM = "NativeLayerNormBackward0"


class Image(nn.Module):
    """Convolution, normalisation of every channel by itself, and a head: the convolution's bias has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.scale = nn.Conv2d(2, 3, 3), nn.GroupNorm(3, 3), nn.Parameter(torch.tensor(1.5))
        self.final, self.head = nn.LayerNorm(12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.final(self.scale * self.norm(self.conv(x)).tanh().flatten(1)))


def squares(outputs: Tensor, _: Any) -> Tensor:
    return outputs.square().flatten(1).sum(1)


def batch(dtype: torch.dtype) -> Tensor:
    return torch.randn(5, 2, 4, 4, dtype=dtype)


def rows_of(block: Block, change: Callable[[Tensor], Tensor]) -> Block:
    """The block with the factor changed that its rows are proportional to."""
    if isinstance(block, Dense):
        return Dense(change(block.values))
    assert isinstance(block, Outer)
    return replace(block, z=change(block.z))


def dropped(rows: Tensor) -> Tensor:
    rows = rows.clone()
    rows[1] = 0
    return rows


def swapped(rows: Tensor) -> Tensor:
    return rows[[2, 1, 0, *range(3, len(rows))]]


def scaled(rows: Tensor, factor: float = 1 + 1e-4) -> Tensor:
    rows = rows.clone()
    rows[3] *= factor
    return rows


def slightly_scaled(rows: Tensor) -> Tensor:
    """By a factor that the check misses if its tolerance is ten times as wide."""
    return scaled(rows, 1 + 250 * torch.finfo(rows.dtype).eps)


FAULTS = [dropped, swapped, scaled, slightly_scaled]
PLACES = [
    pytest.param(CONVOLUTION, 2, id="cancelling bias"),
    pytest.param(GROUP_NORM, 1, id="group norm weight"),
    pytest.param(GROUP_NORM, 2, id="group norm bias"),
    pytest.param(LAYER_NORM, 1, id="layer norm weight"),
    pytest.param(ADDMM, 0, id="linear bias"),
    pytest.param(ADDMM, 2, id="linear weight"),
]


def plant(monkeypatch: pytest.MonkeyPatch, kind: str, slot: int, change: Callable[[Tensor], Tensor]) -> list[bool]:
    """A rule that is wrong at one slot while the returned list is not empty: later than the first, full check."""
    right, armed = RULES[kind], list[bool]()

    def rule(site: Site) -> Block | None:
        block = right(site)
        return rows_of(block, change) if armed and block is not None and site.slot == slot else block

    monkeypatch.setitem(RULES, kind, rule)
    return armed


@pytest.mark.parametrize(
    ("change", "dtype"),
    [*product(FAULTS, [torch.float32, torch.float64]), *product([dropped, swapped], [torch.float16])]
    + [(dropped, torch.bfloat16)],
    ids=lambda value: getattr(value, "__name__", None),
)
@pytest.mark.parametrize(("kind", "slot"), PLACES)
def test_a_wrong_rule_is_caught(
    monkeypatch: pytest.MonkeyPatch, kind: str, slot: int, change: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    """Of the bias that cancels, too: its rows are rounding, and those of z with random signs are not."""
    armed = plant(monkeypatch, kind, slot, change)
    found = [s for s in sites(Image().to(dtype), batch(dtype)) if (s.node.name(), s.slot) == (kind, slot)]
    assert found
    for site in found:
        rule_check.check_site(site, build(site)[0])
        armed.append(True)
        with pytest.raises(persample.CheckError, match=f"the rule for {kind} gives rows that do not add up"):
            rule_check.check_site(site, build(site)[0])
        armed.clear()


@pytest.mark.parametrize("way", ["factors", "graph", "checkpoint"])
def test_every_way_of_following_a_plan_checks(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """A rule that turns wrong after the first batch, by as little as is seen at all."""

    class Checkpointed(Image):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=False)

    model = Checkpointed().double() if way == "checkpoint" else Image().double()
    monkeypatch.setattr(plans, "CHECK_EVERY", 1)  # uses are verified in turn, here one in every batch
    armed = plant(monkeypatch, LAYER_NORM, 1, slightly_scaled)

    def nine_batches() -> None:  # as many as there are uses
        for _ in range(9):
            x = batch(torch.float64)
            persample.per_sample(model, squares, x, hold="graph" if way == "graph" else "factors").norms()

    nine_batches()
    armed.append(True)
    with pytest.raises(persample.CheckError, match=LAYER_NORM):
        nine_batches()


# --- right rules are not refused ----------------------------------------------------------------------------


def test_cancelling_gradients_need_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a normalisation behind takes back, a bias and a scale: nothing but rounding is left of them."""
    model, second = Image(), list[str]()
    original = rule_check.with_signs

    def counted(site: Site) -> list[tuple[Tensor | None, ...]]:
        second.append(f"{site.node.name()} {site.slot}")
        return original(site)

    monkeypatch.setattr(rule_check, "with_signs", counted)
    for site in sites(model, batch(torch.float32)):
        rule_check.check_site(site, build(site)[0])
    assert sorted(second) == [f"{CONVOLUTION} 2", "MulBackward0 0"]


def sites(model: nn.Module, x: Tensor) -> list[Site]:
    """Every use of every parameter in the model."""
    outputs = importlib.import_module("persample.backends.outputs")
    reading = outputs.read(squares(model(x), None), dict(model.named_parameters()))
    return [outputs.site_of(use, reading.known, len(x)) for uses in reading.uses.values() for use in uses]


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "image": (Image, (5, 2, 4, 4)),
    "attention": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),  # the bias of its keys cancels
        (4, 7, 8),
    ),
    "long sums": (lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(4, 4), nn.Conv2d(4, 2, 1)), (6, 1, 66, 66)),
    "many rows": (lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 2)), (4, 4096, 4)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_right_rules_pass(name: str, dtype: torch.dtype) -> None:
    make, shape = MODELS[name]
    for site in sites(make().to(dtype), torch.randn(shape, dtype=dtype)):
        before = torch.get_rng_state()
        rule_check.check_site(site, build(site)[0])
        assert torch.equal(torch.get_rng_state(), before), "the user's random numbers"
        assert rule_check.rounding(site) < 0.13  # in half precision, too


def test_a_sample_that_is_not_finite_is_no_fault() -> None:
    x = batch(torch.float64)
    x[2, 0, 0, 0] = torch.nan
    for site in sites(Image().double(), x):
        rule_check.check_site(site, build(site)[0])


def test_rounding_grows_with_the_sum_and_falls_with_the_precision() -> None:
    def of(dtype: torch.dtype, *shape: int) -> float:
        model = nn.Linear(3, 2).to(dtype)
        return max(map(rule_check.rounding, sites(model, torch.randn(*shape, 3).to(dtype))))

    assert of(torch.float64, 4) < 1e-14 < of(torch.float32, 4) < 2e-6 < of(torch.float32, 4, 4096) < 1e-5
    assert of(torch.bfloat16, 4, 4096) == of(torch.bfloat16, 4, 65536)


NORMALISATIONS: dict[str, Callable[[], nn.Module]] = {
    "layer, one feature": lambda: nn.Sequential(nn.Linear(6, 1), nn.LayerNorm(1), nn.Linear(1, 1)),
    "group": lambda: nn.Sequential(nn.GroupNorm(1, 2), nn.Flatten()),
    "channels": lambda: nn.Sequential(nn.GroupNorm(2, 2), nn.Flatten()),
    "instance": lambda: nn.InstanceNorm1d(2, affine=True),
    "batch, running statistics": lambda: nn.BatchNorm1d(2).eval(),
}


@pytest.mark.parametrize("name", NORMALISATIONS)
@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6])
def test_a_normalised_input_of_nothing_but_rounding_is_no_fault(name: str, offset: float) -> None:
    """Where x̂ is a difference of equal numbers, rule and operation round it in their own ways."""
    model = NORMALISATIONS[name]().double()
    for seed in range(5):
        torch.manual_seed(seed)
        x = offset * torch.randn(4, 2, 1).double() + 1e-3 * (seed % 3) * torch.randn(4, 2, 6).double()
        for site in sites(model, x):
            rule_check.check_site(site, build(site)[0])


def test_statistics_of_one_channel() -> None:
    """They are one number for all samples, and expanded lie in memory as one."""
    model, x = nn.BatchNorm2d(1).double().eval(), torch.randn(3, 1, 2, 2, dtype=torch.float64)
    got = persample.per_sample(model, squares, x, check=False).grads()["weight"]
    want = [torch.autograd.grad(squares(model(one[None]), None).sum(), model.weight)[0] for one in x]
    torch.testing.assert_close(got, torch.stack(want))
