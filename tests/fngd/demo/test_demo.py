"""The first minute: verdicts are those of conformance, times and errors are of what they say, conclusions follow."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch

import persample
from fngd.__main__ import main
from fngd.demo import command, conclusions, cost, race, verdicts
from fngd.demo.verdicts import MODELS, OURS, THEIRS, Verdict
from persample.testing.conformance import SIGNS
from persample.testing.measure import Ratio
from persample.testing.peers import Peer

ROOT = Path(__file__).parents[3]


def test_ours_are_exact_and_those_of_vmap_are_found_here() -> None:
    found = verdicts.verdicts()
    assert {(v.model, v.verdict) for v in found if v.library == OURS} == {(model, "exact") for model in MODELS}
    vmapped = [(v.verdict, v.detail) for v in found if v.library == "vmap"]
    assert [verdict for verdict, _ in vmapped] == ["exact"] * 4 + ["refused"], vmapped
    assert all(v.live for v in found if v.library in (OURS, "vmap"))


def test_what_is_not_installed_is_as_recorded_and_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Peer, "installed", False)
    found = verdicts.verdicts()
    recorded = verdicts.recorded()
    assert {v.library for v in found if not v.live} == set(THEIRS)
    for verdict in found:
        if not verdict.live:
            assert verdict.verdict == recorded["verdicts"][verdict.model][verdict.library]
    words = verdicts.source(found)
    assert words.startswith(f"Opacus, BackPACK, TorchJD, vmap: not installed here; as recorded on {recorded['date']} ")
    assert f"opacus {recorded['versions']['opacus']}" in words
    with pytest.raises(ValueError, match="not installed, so nothing was recorded"):
        verdicts.record()


def test_nothing_is_said_of_records_where_all_is_found_here() -> None:
    assert verdicts.source([Verdict("tied weights", library, "exact", True) for library in THEIRS]) == ""


def test_records_are_those_of_the_conformance_page() -> None:
    heading: list[str] = []
    rows = {}
    family = ""
    for line in (ROOT / "docs" / "conformance.md").read_text().splitlines():
        cells = line.strip("| ").split(" | ")
        if line.startswith("## "):
            family = line[3:].partition(":")[0].lower()
        elif cells[0] == "case":
            heading = cells
        elif family and len(cells) == len(heading):
            rows[f"{family}/{cells[0].partition('`')[2].partition('`')[0]}"] = dict(zip(heading, cells, strict=True))
    for model, case in MODELS.items():
        for library, key in THEIRS.items():
            verdict = verdicts.recorded()["verdicts"][model][library]
            assert SIGNS[verdict] == rows[case][key], (model, library)


@pytest.mark.parametrize("name", cost.MODELS)
def test_the_loop_that_is_timed_gives_the_norms(name: str) -> None:
    torch.manual_seed(0)
    model = cost.MODELS[name]().double()
    images, labels = cost.digits(4)
    images = images.double()
    norms = persample.per_sample(model, cost.losses, images, labels).norms()
    parameters = list(model.parameters())
    alone = [
        cost.norm(torch.autograd.grad(cost.losses(model(images[b : b + 1]), labels[b : b + 1])[0], parameters))
        for b in range(4)
    ]
    torch.testing.assert_close(norms, torch.stack(alone), rtol=1e-9, atol=0)


def test_all_methods_begin_alike_and_have_the_same_seconds() -> None:
    curves = race.race(0.05)
    assert [curve.method for curve in curves] == list(race.METHODS)
    assert len({curve.error[0] for curve in curves}) == 1
    for curve in curves:
        assert curve.seconds[-1] >= 0.05
        assert curve.seconds == sorted(curve.seconds)
        assert curve.steps == sorted(curve.steps)
        assert curve.error[-1] != curve.error[0]


# --- conclusions ------------------------------------------------------------------------------------------------


def test_conclusions_follow() -> None:
    found = [Verdict("a", OURS, "exact", True), Verdict("b", OURS, "wrong", True), Verdict("a", "X", "refused", True)]
    assert conclusions.of_verdicts(found) == f"{OURS} is exact on 1 of 2 models. Wrong, without an error: {OURS} 1."
    assert conclusions.of_verdicts(found[:1]) == f"{OURS} is exact on 1 of 1 models. Nobody is wrong."
    costs = [
        cost.Cost(name, 1.0, {"norms()": Ratio.of([value]), cost.LOOP: Ratio.of([80.0])})
        for name, value in (("a", 1.5), ("b", 0.5))
    ]
    assert conclusions.of_costs(costs) == (
        "In plain training steps: norms() 0.5 to 1.5. Norms, one sample at a time: 80."
    )
    curves = [
        race.Curve("P", [6.0], [1e-6], [9]),
        race.Curve("Q", [6.0], [1e-3], [9]),
        race.Curve("R", [6.0], [1.0], [9]),
    ]
    assert (
        conclusions.of_race(curves) == "After 6 s P's error is 1e-06, that of the next best, Q, 1,000 times as large."
    )
    assert conclusions.of_race(curves[::-1]).startswith("R is not ahead after 6 s: P's error is 1e-06 of it.")


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "costs", partial(cost.costs, batch=4, rounds=1))
    threads = torch.get_num_threads()
    assert main(["demo", "--seconds", "0.01", "--out", str(tmp_path)]) == 0
    assert torch.get_num_threads() == threads
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "demo.json").read_text())
    assert (tmp_path / "demo.png").stat().st_size > 20_000
    for sentence in written["conclusions"].values():
        assert sentence in " ".join(printed.split())
    assert re.search(r"tied weights +exact", printed)
    assert "one sample at a time" in printed
    assert len(written["verdicts"]) == 25
    assert [curve["method"] for curve in written["poisson"]["curves"]] == list(race.METHODS)
    # the metadata of some builds lack the local part
    assert written["environment"]["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]


def test_where_nothing_can_be_written_nothing_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        main(["demo", "--out", str(tmp_path / "file")])
    assert "no file can be written there" in capsys.readouterr().err
