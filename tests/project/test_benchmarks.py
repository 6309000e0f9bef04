"""python -m benchmarks: every variant runs, results have their form, reports and checks are made from them."""

from __future__ import annotations

import json
import math
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from benchmarks import check, growth, memory, peers, processes, report, results, timing
from benchmarks.__main__ import main
from benchmarks.models import MODELS, Problem
from benchmarks.options import WHATS
from benchmarks.timing import Times
from benchmarks.variants import OURS, VARIANTS, Step, Variant
from persample.testing.measure import Ratio

assert peers  # its import registers variants
EAGER = [what for what in WHATS if what != "compiled"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run of the command on two models, without memory; only the first in processes of its own."""
    path = tmp_path_factory.mktemp("benchmarks") / "speed.json"
    arguments = ["--size", "tiny", "--repeats", "1", "--processes", "2", "--no-memory", "--threads", "1"]
    arguments += ["--out", str(path)]
    assert main([*arguments, "--models", "mlp"]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "ProcessPoolExecutor", lambda number, mp_context: ThreadPoolExecutor(number))
        assert main([*arguments, "--models", "resnet20_bn", "--what", ",".join(EAGER)]) == 0
    return path


@pytest.mark.parametrize("name", MODELS)
def test_every_variant_runs_on_every_model(name: str) -> None:
    problem = Problem(name, "tiny")
    times = timing.measure(problem, timing.wanted(problem, EAGER, peers=True), repeats=1)
    assert {"plain", "stored", "coefficient", "ngd"} <= times.keys()
    assert problem.spec.couples or {"grads", "grads_out", "norms", "gram", "clipped_sum", "write"} <= times.keys()
    for key, entry in times.items():
        if VARIANTS[key].library == OURS:
            assert entry.status == "ok", key
        assert entry.status == "ok" or entry.status.partition(":")[0] in ("refused", "wrong", "not installed"), key
        assert (entry.status == "ok") == bool(entry.wall)


def test_torch_s_own_ways_agree_with_ours() -> None:
    problem = Problem("mlp", "tiny")
    times = timing.measure(problem, timing.wanted(problem, ["grads"], peers=True), repeats=1)
    for key in ("grads_expanded", "grads_vmap"):
        assert times[key].status == "ok"
        assert times[key].difference is not None
        assert times[key].difference < 1e-5


def _variant(run: Step, what: str = "norms", library: str = "another") -> Variant:
    return Variant("other", what, "another", lambda task: run, library=library)


def test_a_peer_that_is_wrong_is_told_apart() -> None:
    wrong = _variant(Step(lambda: torch.zeros(4)))
    times = timing.measure(Problem("mlp", "tiny"), [VARIANTS["plain"], VARIANTS["norms"], wrong], repeats=1)
    assert times["other"].status == "wrong: relative difference 1"
    assert not times["other"].wall


def test_a_peer_that_raises_is_refused_and_ours_is_not() -> None:
    def fail() -> None:
        raise RuntimeError("no such\nlayer")

    variants = [VARIANTS["plain"], _variant(Step(fail))]
    times = timing.measure(Problem("mlp", "tiny"), variants, repeats=1)
    assert times["other"].status == "refused: RuntimeError: no such layer"
    with pytest.raises(RuntimeError, match="no such"):
        timing.measure(Problem("mlp", "tiny"), [_variant(Step(fail), library=OURS)], repeats=1)


def test_processes_join_what_they_found() -> None:
    one, two = Times("ok", 1e-6, 3, [0], [0.5], [1.0]), Times("ok", 1e-5, 4, [1], [0.7], [1.4])
    assert processes.joined(one, two) == Times("ok", 1e-5, 3, [0, 1], [0.5, 0.7], [1.0, 1.4])
    wrong = Times("wrong: relative difference 1", 1.0)
    assert processes.joined(one, wrong) == processes.joined(wrong, one) == wrong


def test_a_library_that_is_not_there_is_not_installed() -> None:
    absent = Variant("other", "norms", "another", lambda task: Step(list), "another", "some-package", "no_such_module")
    times = timing.measure(Problem("mlp", "tiny"), [VARIANTS["plain"], absent], repeats=1)
    assert times["other"].status == "not installed: some-package"


def test_samples_that_couple_are_measured_in_optimiser_steps_alone() -> None:
    keys = {variant.key for variant in timing.wanted(Problem("resnet20_bn", "tiny"), list(WHATS), peers=True)}
    assert keys == {"plain", "stored", "coefficient", "ngd", "plain_compiled", "stored_compiled"}


def test_references_and_limits_are_measured_too() -> None:
    keys = {variant.key for variant in timing.wanted(Problem("mlp", "tiny"), ["grads"], peers=False)}
    assert keys == {"plain", "grads", "grads_out", "write", "write_fresh"}


def test_json_has_the_documented_form(measured: Path) -> None:
    found = json.loads(measured.read_text())
    assert found.keys() == {"format", "settings", "environment", "models"}
    assert found["settings"] == {
        "kind": "speed", "seed": 0, "device": "cpu", "threads": 1, "processes": 2, "repeats": 1,
        "size": "tiny",
    }  # fmt: skip
    assert {"python", "processor", "cores", "versions"} <= found["environment"].keys()
    assert list(found["models"]) == ["mlp", "resnet20_bn"]
    for model in found["models"].values():
        described = {"date", "help", "batch", "parameter_bytes", "grads_bytes", "load_before", "load_after", "fill"}
        assert model.keys() == described | {"variants"}
        for entry in model["variants"].values():
            assert entry.keys() == vars(Times()).keys()
            assert len(entry["rounds"]) == len(entry["wall"]) == len(entry["process"])
            assert entry["rounds"] == ([0, 1] if entry["status"] == "ok" else [])  # one round of each process
    assert str(Path.home()) not in measured.read_text()


def test_memory_may_follow_times(measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(shutil.copy(measured, tmp_path))
    before = json.loads(measured.read_text())["models"]["mlp"]["variants"]
    monkeypatch.setattr(memory, "measure", lambda problem, key, **options: memory.Peak(len(key), 1))
    arguments = ["--size", "tiny", "--repeats", "1", "--processes", "2", "--memory", "--threads", "1"]
    arguments += ["--out", str(path)]
    assert main([*arguments, "--models", "mlp", "--what", "stored"]) == 0
    after = json.loads(path.read_text())["models"]["mlp"]["variants"]
    weighed = {key: entry["memory"] for key, entry in after.items() if "memory" in entry}
    assert weighed == {"plain": 5, "stored": 6}
    assert {key: entry["wall"] for key, entry in after.items()} == {key: v["wall"] for key, v in before.items()}


def test_a_run_goes_on_where_it_stopped(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = json.loads(measured.read_text())["models"]["mlp"]
    arguments = ["--size", "tiny", "--repeats", "1", "--processes", "2", "--no-memory", "--threads", "1"]
    arguments += ["--out", str(measured)]
    assert main([*arguments, "--models", "mlp", "--what", "stored,norms"]) == 0
    assert "mlp is measured already" in capsys.readouterr().err
    assert json.loads(measured.read_text())["models"]["mlp"] == before


def test_results_of_other_settings_are_not_mixed(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--size", "tiny", "--repeats", "3", "--processes", "2", "--threads", "1", "--out", str(measured)])
    assert "measured with other repeats; give another --out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "mlp,vgg"], "vgg: choose from mlp, resnet20"),
        (["--what", "speed"], "speed: choose from plain, stored"),
        (["--repeats", "0"], "'0' is no whole number of at least 1"),
        (["check", "nothing.json"], "there is no file nothing.json; `python -m benchmarks --out"),
    ],
)
def test_mistakes_are_explained(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_file_of_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text("[]")
    with pytest.raises(ValueError, match="does not hold results of format 1; measure again with another --out"):
        results.load(path)


def test_report_is_made_from_the_json(measured: Path) -> None:
    measured.with_suffix(".md").unlink(missing_ok=True)
    assert main(["report", str(measured)]) == 0
    text = measured.with_suffix(".md").read_text()
    assert "| **norms()** |" in text
    assert "## resnet20_bn" in text
    assert "(speed.png)" in text
    assert measured.with_suffix(".png").stat().st_size > 10_000


def _model(**walls: list[float]) -> dict:
    variants = {
        key: {"status": "ok", "rounds": list(range(len(wall))), "wall": wall, "process": wall, "memory": 100.0}
        for key, wall in walls.items()
    }
    return {"variants": variants}


def test_ratios_are_taken_round_by_round() -> None:
    model = _model(plain=[1.0, 10.0, 100.0], norms=[2.0, 20.0], write=[1.0, 10.0, 100.0])
    assert results.ratio(model, "norms") == Ratio(2.0, 2.0, 2.0, 2)
    assert results.ratio(model, "norms", plus="write") == Ratio(1.0, 1.0, 1.0, 2)
    assert results.ratio(model, "gram") is None


def test_check_says_what_is_met_and_what_is_missed(capsys: pytest.CaptureFixture[str]) -> None:
    model = _model(
        plain=[1.0] * 3,
        stored=[1.03] * 3,
        coefficient=[1.5] * 3,
        norms=[1.2] * 3,
        gram=[1.2] * 3,
        norms_ghost=[1.1] * 3,
    )
    found = {"models": {"mlp": model}}
    verdicts = {cell.label: cell for cell in check.verdicts(found)}
    assert verdicts["FNGD step, stored coefficients"].met is True
    assert verdicts["FNGD step, computing coefficients"].met is False
    assert verdicts["clipped_sum()"].met is None
    assert verdicts["memory, norms and Gram"].value == 1.0
    assert verdicts["FNGD over 100 epochs"].value == pytest.approx((1.5 + 99 * 1.03) / 100)
    assert check.show(found) is False
    shown = capsys.readouterr().out
    assert "mlp, norms: norms() takes 1.09 (1.09–1.09) × Opacus ghost" in shown


def test_peak_memory_is_that_of_the_variant() -> None:
    # 2 MB of gradients for each of 64 samples; the plain step needs those of the batch alone
    problem = Problem("mlp", "tiny", changes={"batch": 64, "width": 512})
    rows = timing.about(problem)["grads_bytes"]
    peak = memory.measure(problem, "write", threads=1)
    assert (peak.whole, peak.later) == pytest.approx((rows, rows), rel=0.1)
    assert memory.measure(problem, "stored", threads=1).whole < rows / 2


def test_memory_of_what_fails_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = tmp_path / "python"
    failing.write_text("#!/bin/sh\necho Traceback >&2\necho 'RuntimeError: negative dimension -1' >&2\nexit 1\n")
    failing.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(failing))
    with pytest.raises(RuntimeError, match=r"memory of norms on mlp failed: RuntimeError: negative dimension -1$"):
        memory.measure(Problem("mlp", "tiny"), "norms", threads=1)


def test_growth_is_measured_and_drawn(tmp_path: Path) -> None:
    path = tmp_path / "growth.json"
    assert main(["growth", "--size", "tiny", "--repeats", "1", "--threads", "1", "--out", str(path)]) == 0
    assert json.loads(path.read_text())["models"].keys() == {f"{axis}={value}" for axis, value in growth.points("tiny")}
    assert path.with_suffix(".png").stat().st_size > 10_000


def test_overview_leaves_out_peers_where_asked(measured: Path) -> None:
    found = results.load(measured)
    assert "vmap(grad)" in report.overview(found)
    assert "vmap(grad)" not in report.overview(found, peers=False)


def test_difference_is_relative_and_infinite_for_other_shapes() -> None:
    assert timing.difference(torch.tensor([1.1, 0.0]), torch.tensor([1.0, 0.0])) == pytest.approx(0.1, rel=1e-5)
    assert timing.difference({"a": torch.ones(2)}, {"a": torch.ones(3)}) == math.inf
