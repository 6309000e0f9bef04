"""Every method, killed at any moment of its training and resumed, ends bit for bit where it would have."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from loops import METHODS, STEPS_PER_EPOCH, build_model, data, same_leaves
from torch.nn import functional as F

STEPS, SAVE_EVERY = 23, 3
ACCUMULATED = ("ngd true", "ngd adaptive", "fngd joint")
"""Methods whose batches come in several backward passes."""


def train(method: str, path: Path, *, kill_at: tuple[int, int] | None = None) -> None:
    """Trains from the checkpoint in `path`, if there is one, to the last step; dies at (step, moment) on the way."""
    model = build_model()
    opt = METHODS[method](model)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, STEPS)
    start = 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        opt.load_state_dict(saved["opt"])
        schedule.load_state_dict(saved["schedule"])
        start = saved["step"]
    x, y = data(36)

    def moment(number: int) -> None:
        if kill_at == (step, number):
            os.kill(os.getpid(), signal.SIGKILL)

    for step in range(start, STEPS):
        epoch, index = divmod(step, STEPS_PER_EPOCH)
        order = torch.randperm(36, generator=torch.Generator().manual_seed(epoch))
        chosen = order.split(8)[index]  # the last of 4
        if method == "fngd by sample":
            opt.next_batch(chosen)
        opt.zero_grad()
        # two backward passes of unequal size where they are one step's; of equal size where coefficients are kept
        parts = chosen.split(3 if method == "ngd true" else 4) if method in ACCUMULATED else (chosen,)
        before = 0.0
        for part in parts:
            outputs = model(x[part])
            loss = F.cross_entropy(outputs, y[part]) * len(part) / len(chosen)
            if method == "ngd true":
                opt.sample(outputs)
            moment(0)
            loss.backward()
            before += loss.detach()
        moment(1)
        opt.step()
        if getattr(opt, "measuring", False):
            opt.adapt(before, F.cross_entropy(model(x[chosen]), y[chosen]))
        schedule.step()
        moment(2)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == STEPS:
            state = {"model": model.state_dict(), "opt": opt.state_dict(), "schedule": schedule.state_dict()}
            torch.save({**state, "step": step + 1}, path.with_suffix(".partial"))
            moment(3)
            os.replace(path.with_suffix(".partial"), path)


def forked(function: Callable[[], None]) -> int:
    """Runs a function in a child process; returns its status as os.waitpid does."""
    child = os.fork()
    if not child:
        status = 1
        try:
            function()
            status = 0
        finally:
            sys.stderr.flush()
            os._exit(status)
    return os.waitpid(child, 0)[1]


def kill_and_resume(method: str, kills: int, seed: int, folder: Path) -> None:
    """Runs once whole and once killed again and again; raises unless both end in the same parameters.

    Each attempt is a process of its own that starts from the file alone. They are forked from one that has imported
    torch and done nothing with it, as an import takes longer than the training.
    """
    import torch._dynamo  # optimisers import it when first used, which takes seconds in every child

    torch.set_num_threads(1)
    whole, broken = folder / "whole.pt", folder / "broken.pt"
    assert forked(lambda: train(method, whole)) == 0
    chance, deaths, restarts = random.Random(seed), 0, 0
    while deaths < kills:
        first = torch.load(broken, weights_only=True)["step"] if broken.exists() else 0
        if first == STEPS:
            broken.unlink()  # on to another life, with other deaths
            restarts += 1
            first = 0
        at = chance.randrange(first, min(first + 7, STEPS)), chance.randrange(4)
        status = forked(lambda at=at: train(method, broken, kill_at=at))
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            deaths += 1
        else:
            assert status == 0, f"attempt ended with {status}"
            _compare(whole, broken)
    assert forked(lambda: train(method, broken)) == 0
    _compare(whole, broken)
    print(f"{method}: {deaths} deaths, {restarts} restarts, bit for bit")


def _compare(first: Path, second: Path) -> None:
    one, two = (torch.load(path, weights_only=True) for path in (first, second))
    assert one["step"] == two["step"] == STEPS
    for name, value in one["model"].items():
        assert torch.equal(value, two["model"][name]), f"{name} differs"
    same_leaves(one["opt"], two["opt"])
    assert one["opt"].get("adaptive", {}).get("factor") != 1.0, "the damping never moved"


def _kill_all(kills: int, folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[3]), *sys.path])}
    command = [sys.executable, __file__, str(kills), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork and SIGKILL, which this system has not")
@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_any_moment_and_resumed_bit_for_bit(kills: int, tmp_path: Path) -> None:
    assert _kill_all(kills, tmp_path).count(f"{kills} deaths") == len(METHODS)


if __name__ == "__main__":
    for number, name in enumerate(METHODS):
        place = Path(sys.argv[2]) / str(number)
        place.mkdir()
        kill_and_resume(name, int(sys.argv[1]), number, place)
