"""Peak memory of training with one optimiser, measured in a process of its own.

Memory of several optimisers in one process cannot be told apart, so each trains for a few batches in a fresh
process. The figure is the growth of the peak over what was in use before the first batch (libraries, data
and model). On the CPU it is the resident set as Linux counts it, on CUDA the allocator's maximum.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from fngd.training.data import CLASSES, Dataset, Split
from fngd.training.loop import Runner, batches
from fngd.training.models import build_model
from fngd.training.settings import Config

STEPS = 3


def measure(name: str, config: Config, *, channels: int, size: int, timeout: float = 600.0) -> float | None:
    """Returns the peak in MiB above the start, or None where it cannot be measured (no Linux, out of time).

    It depends on the shapes alone, so images of random numbers stand in for the data.
    """
    request = {"name": name, "config": config.to_json(), "channels": channels, "size": size}
    command = [sys.executable, "-m", "fngd.training.memory", json.dumps(request)]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=True)
        return json.loads(answer.stdout)
    except (OSError, subprocess.SubprocessError, json.JSONDecodeError):
        return None


def _resident(which: str) -> float | None:
    """MiB of VmRSS (now) or VmHWM (the peak); ru_maxrss would include the parent's."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    found = [int(line.split()[1]) / 1024 for line in lines if line.startswith(which + ":")]
    return found[0] if found else None


def _main(request: dict) -> float | None:
    config = Config.from_json(request["config"])
    shape = (STEPS * config.batch_size, request["channels"], request["size"], request["size"])
    split = Split(torch.randn(shape), torch.randint(CLASSES[config.data], shape[:1]))
    runner = Runner(request["name"], config, Dataset(split, split, CLASSES[config.data]), seed=0)
    if config.device.startswith("cuda"):
        before = torch.cuda.memory_allocated(config.device)
        torch.cuda.reset_peak_memory_stats(config.device)
    # One forward pass loads what the libraries load lazily.
    with torch.no_grad():
        spare = build_model(config.model, size=shape[-1], channels=shape[1], classes=CLASSES[config.data])
        spare(split.images[:1])
    start = _resident("VmRSS")
    for images, labels in batches(split, config, seed=0, epoch=0):
        runner.step(images, labels)
    if config.device.startswith("cuda"):
        return (torch.cuda.max_memory_allocated(config.device) - before) / 2**20
    peak = _resident("VmHWM")
    return None if start is None or peak is None else peak - start


if __name__ == "__main__":
    print(json.dumps(_main(json.loads(sys.argv[1]))))
