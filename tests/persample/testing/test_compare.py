"""The commands: comparing backends on a model, and the conformance matrix, with peers that are made up."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import persample
from persample.__main__ import MODELS, main, parser
from persample.testing import compare, conformance, measure, peers, start
from persample.testing.cases import CASES, find
from persample.testing.loop import deviation, loop_grads

# --- measuring --------------------------------------------------------------------------------------------


def test_ratios_are_to_the_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that only what is timed moves on; for a while all is twice as slow, as on a busy machine."""
    now, rounds = 0.0, 0.0

    def lasting(seconds: float) -> Any:
        def run() -> None:
            nonlocal now
            now += seconds * (2 if rounds == 2 else 1)

        return run

    def baseline() -> None:
        nonlocal rounds
        rounds += 0.5  # it runs before each of two candidates
        lasting(0.25)()

    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: now))
    candidates = {"same": lasting(0.25), "slow": lasting(0.75)}
    ratios = measure.paired_ratios(baseline, candidates, rounds=5, warmup=0)
    assert list(ratios) == ["same", "slow"]
    assert ratios["same"].median == 1
    assert ratios["slow"].median == 3
    assert ratios["slow"].low <= ratios["slow"].median <= ratios["slow"].high
    assert ratios["slow"].rounds == 5
    with pytest.raises(ValueError, match="rounds must be at least 1; got 0"):
        measure.paired_ratios(lambda: None, {}, rounds=0)


def test_rounds_take_turns() -> None:
    calls: list[str] = []
    measure.paired_ratios(
        lambda: calls.append("-"), {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2, warmup=0
    )
    assert "".join(calls) == "-a-b-b-a"


def fill(megabytes: int) -> Any:
    """What the measuring process runs."""
    return lambda: bytearray(b"x" * (megabytes << 20))


def test_peak_memory_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{Path(persample.__file__).parent.parent}")
    taken = measure.peak_memory("test_compare:fill", megabytes=64)
    assert 64 << 20 <= taken < 256 << 20
    with pytest.raises(RuntimeError, match=r"measuring test_compare:missing .* failed: AttributeError"):
        measure.peak_memory("test_compare:missing")


# --- compare ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", list(compare.MODELS))
@pytest.mark.filterwarnings("ignore::DeprecationWarning:opacus")
def test_models_are_small_and_exact(model: str) -> None:
    network, loss_fn, inputs, targets = compare.problem(model, 2)
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    want = loop_grads(network.double(), loss_fn, inputs, targets)
    got = persample.per_sample(network, loss_fn, inputs, targets).grads()
    assert deviation(got, want) < 1e-9
    again = compare.problem(model, 2)
    assert all(map(torch.equal, again[0].float().parameters(), compare.problem(model, 2)[0].parameters()))


def test_unknown_model() -> None:
    with pytest.raises(ValueError, match="model must be one of 'mlp', 'cnn', 'transformer'; got 'gpt'"):
        compare.problem("gpt", 2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:opacus")
def test_compare_prints_a_table_and_draws_a_chart(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Memory takes a process for each bar, so it is made up here; `test_compare_in_full` measures it."""
    monkeypatch.setattr(compare, "peak_memory", lambda target, **arguments: 1000 if arguments["backend"] else 500)
    out = tmp_path / "charts" / "transformer.png"
    assert main(["compare", "--model", "transformer", "--batch", "2", "--repeats", "1", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert out.read_bytes().startswith(b"\x89PNG")
    assert "2.00" in text
    assert "hooks refused: backend 'hooks' has no rule for layer 'body.layers.0.self_attn'" in " ".join(text.split())
    for backend in persample.backends():
        assert backend in text


def test_refusals_are_printed_as_they_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shapes such as [B] look like markup to rich, which eats it."""
    refusal = "losses must have the shape [B]; pip install '.[opacus]' [/red] :x:"
    monkeypatch.setattr(compare, "measure", lambda *_: [compare.Row("outputs", refusal=refusal)])
    compare.run("mlp", 2, tmp_path / "mlp.png", 1)
    assert f"outputs refused: {refusal}" in " ".join(capsys.readouterr().out.split())
    refused = conformance.Cell("crash", refusal)
    monkeypatch.setattr(conformance, "matrix", lambda *_: {"case [B]": dict.fromkeys(persample.backends(), refused)})
    assert conformance.run(peers=False, out=None) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert f"crash outputs on case [B]: {refusal}" in printed
    assert "case [B] ‼" in printed


def test_conformance_does_without_matplotlib(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(start, "find_spec", lambda name: None if name == "matplotlib" else name)
    monkeypatch.setattr(conformance, "run", lambda **_: 0)
    assert main(["conformance"]) == 0
    assert main(["compare"]) == 2
    assert "matplotlib: not installed, and needed here: pip install matplotlib" in capsys.readouterr().err


def test_models_that_are_read_without_torch_are_those_that_there_are() -> None:
    assert list(MODELS) == list(compare.MODELS)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:opacus")
def test_compare_in_full(tmp_path: Path) -> None:
    rows = compare.run("cnn", 4, tmp_path / "cnn.png", 1)
    assert [row.backend for row in rows] == list(persample.backends())
    assert all(row.deviation < 1e-9 and not row.refusal for row in rows)
    assert all(row.memory is not None and row.memory["grads"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["compare", "--out", "chart.xyz"], "the name must end in one of"),
        (["compare", "--out", "file/chart.png"], "cannot be written"),
        (["conformance", "--out", "file/matrix.md"], "cannot be written"),
        (["conformance", "--out", "."], "cannot be written (Is a directory)"),
    ],
)
def test_what_cannot_be_written_is_told_before_measuring(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    monkeypatch.setattr(compare, "run", lambda *_: pytest.fail("it measured first"))
    monkeypatch.setattr(conformance, "run", lambda **_: pytest.fail("it measured first"))
    assert main(options) == 2
    assert told in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_command_line() -> None:
    assert parser().parse_args(["compare"]).batch == 32
    for wrong in (
        ["compare", "--batch", "0"],
        ["compare", "--batch", "x"],
        ["compare", "--model", "gpt"],
        ["train"],
        [],
    ):
        with pytest.raises(SystemExit):
            parser().parse_args(wrong)


# --- the loop ---------------------------------------------------------------------------------------------


def test_deviation() -> None:
    want = {"a": torch.tensor([1.0, 2.0]), "b": torch.zeros(2)}
    assert deviation(want, want) == 0
    assert deviation({"a": torch.tensor([1.0, 2.2]), "b": torch.zeros(2)}, want) == pytest.approx(0.1)
    assert deviation({"a": want["a"]}, want) == float("inf")
    assert deviation({"a": torch.tensor([1.0, torch.nan]), "b": torch.zeros(2)}, want) == float("inf")
    assert deviation({"a": torch.zeros(1), "b": torch.zeros(2)}, want) == float("inf")


# --- conformance ------------------------------------------------------------------------------------------


def made_up(run: Any, offers: str = "grads") -> peers.Peer:
    return peers.Peer("Made up", "torch", "torch", offers, run)


CASE = find("usage/tied-weights")


def verdict(run: Any, offers: str = "grads") -> str:
    want = conformance.expected(CASE)
    return conformance.try_peer(CASE, made_up(lambda built, batch: run(want), offers), want).verdict


def raises(want: Any) -> Any:
    raise AssertionError("internal")


def test_verdicts_on_peers() -> None:
    assert verdict(lambda want: want) == "exact"
    assert verdict(lambda want: {n: 1.01 * g for n, g in want.items()}) == "wrong"
    assert verdict(lambda want: {n: g.flip(0) for n, g in want.items()}) == "wrong"
    assert verdict(lambda want: {}) == "refused"
    assert verdict(raises) == "refused"
    assert verdict(lambda want: {n: g.flatten(1).norm(dim=1) for n, g in want.items()}, "norms") == "exact"
    assert verdict(lambda want: {n: g.flatten(1).sum(1) for n, g in want.items()}, "norms") == "wrong"
    rows = torch.cat([g.flatten(1) for g in conformance.expected(CASE).values()], 1)
    assert verdict(lambda want: rows @ rows.T, "gram") == "exact"
    assert verdict(lambda want: rows @ rows.T + 1, "gram") == "wrong"


def test_crashes_of_ours_are_no_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(error: Exception) -> Any:
        def failing(*_: Any, **__: Any) -> Any:
            raise error

        return failing

    want = conformance.expected(CASE)
    for error, expected in ((persample.UnsupportedError("no"), "refused"), (RuntimeError("torch's"), "crash")):
        monkeypatch.setattr(conformance, "per_sample", capture(error))
        assert conformance.try_backend(CASE, "outputs", want).verdict == expected


def test_value_errors_count_as_ours_where_we_raise_them() -> None:
    with pytest.raises(ValueError) as ours:
        persample.per_sample(torch.nn.Linear(2, 2), lambda o, t: o.sum(), torch.ones(2, 2), backend="hooks")
    assert conformance.is_ours(ours.value)
    with pytest.raises(ValueError) as theirs:
        int("foreign")
    assert not conformance.is_ours(theirs.value)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:opacus")
def test_conformance_prints_and_writes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def swapped(built: Any, batch: int) -> dict[str, Tensor]:
        return {n: g.flip(0) for n, g in loop_grads(*built).items()}

    monkeypatch.setattr(peers, "PEERS", {})
    monkeypatch.setattr(conformance, "PEERS", {"Swapped": peers.Peer("Swapped", "torch", "torch", "grads", swapped)})
    out = tmp_path / "matrix.md"
    assert conformance.run(peers=True, out=out, containing="usage/module-called") == 0
    shown = capsys.readouterr().out
    assert "✗" in shown
    assert "case outputs hooks vmap opacus Swapped" in " ".join(shown.split())
    text = out.read_text(encoding="utf-8")
    assert "| case | outputs | hooks | vmap | opacus | Swapped |" in text
    assert "| `module-called-twice` | ✓ | ✓ | ✓ | ✓ | **✗** |" in text
    assert "| Swapped | 0 | 0 | **1** |" in text
    assert "| `outputs` | 1 | 0 | 0 |" in text


def test_totals_go_between_the_marks_of_a_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n")
    found = {"a": {"outputs": conformance.Cell("exact")}, "b": {"outputs": conformance.Cell("refused")}}
    with pytest.raises(ValueError, match="must hold the lines"):
        conformance.put_totals(found, page)
    page.write_text(f"before\n{conformance.BEGIN}\nstale\n{conformance.END}\nafter\n")
    conformance.put_totals(found, page)
    text = page.read_text()
    assert "| of 2 cases | exact | refused | wrong |" in text
    assert "| `outputs` | 1 | 1 | 0 |" in text
    assert "stale" not in text
    assert text.endswith("after\n")


def test_conformance_fails_where_we_are_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(conformance, "deviation", lambda got, want: 1.0)
    assert conformance.run(peers=False, out=None, containing="usage/module-called") == 1
    assert "wrong outputs on usage/module-called-twice" in " ".join(capsys.readouterr().out.split())
    assert conformance.run(peers=False, out=None, containing="no such case") == 2
    assert f"there are {len(CASES)} cases" in " ".join(capsys.readouterr().out.split())


def test_coupled_cases_are_marked() -> None:
    found = {"coupling/batch-norm-train": {"outputs": conformance.Cell("refused")}}
    assert "| `batch-norm-train` ◦ | · |" in conformance.markdown(found)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_whole_table_with_peers() -> None:
    """None of ours is wrong or crashes; `outputs` refuses coupled cases alone."""
    found = conformance.matrix(CASES, True, lambda name: None)
    total = conformance.counts(found)
    for backend in persample.backends():
        assert total[backend]["wrong"] == total[backend]["crash"] == 0
    coupled = {case.name for case in CASES if case.coupled}
    assert {name for name, row in found.items() if row["outputs"].verdict == "refused"} <= coupled
