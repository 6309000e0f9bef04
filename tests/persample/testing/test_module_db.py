"""Every module and input of torch's own table against the loop: exact, or refused where samples interact."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from module_db import available, module_db_cases
from oracle import loop_grads

import persample
from persample.testing.cases import Case

pytestmark = pytest.mark.skipif(not available(), reason="torch's table of modules imports expecttest, not installed")


def verdict(case: Case) -> str:
    """exact, refused, or what is wrong."""
    model, loss_fn, inputs, targets = case.build()
    torch.manual_seed(0)
    expected = loop_grads(model, loss_fn, inputs, targets)
    model, loss_fn, inputs, targets = case.build()  # some change their buffers in the forward pass
    torch.manual_seed(0)
    try:
        found = persample.per_sample(model, loss_fn, inputs, targets).grads()
    except persample.CoupledSamplesError:
        return "refused" if case.coupled else "refused although its samples are apart"
    largest = max((float(rows.abs().max()) for rows in expected.values() if rows.numel()), default=0.0)
    for name, rows in expected.items():
        if rows.numel():
            scale = max(float(rows.abs().max()), 1e-6 * largest)
            if float((found[name] - rows).abs().max()) > 1e-8 * scale:
                return f"wrong: {name}"
    return "exact"


def check(step: int) -> Counter[str]:
    """Verdicts of every `step`-th case, counted; fails on the first that is neither exact nor rightly refused."""
    counts: Counter[str] = Counter()
    for number, case in enumerate(module_db_cases()):
        if number % step == 0:
            found = verdict(case)
            assert found in ("exact", "refused"), f"{case.name}: {found}"
            counts[found] += 1
    return counts


@pytest.mark.filterwarnings("ignore")  # of the modules' own: lazy ones, even kernels, deprecated options
def test_a_part_of_the_table() -> None:
    counts = check(11)
    assert counts["exact"] > 150


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_whole_table(capsys: pytest.CaptureFixture[str]) -> None:
    counts = check(1)
    with capsys.disabled():
        print(f" torch's module table: {dict(counts)}")
    assert counts["exact"] > 1900
