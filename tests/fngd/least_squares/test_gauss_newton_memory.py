"""What memory chunks of rows leave to a Gauss–Newton step."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[3]


SCRIPT = """
import sys, torch
from pathlib import Path
from torch import nn
from fngd import GaussNewton

torch.set_num_threads(1)
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(4, 200), nn.Tanh(), nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, 1)).double()
x = torch.rand(1500, 4).double()
warm = x[:2]
GaussNewton(net, damping=1e-3).direction(lambda: net(warm).squeeze(1))
def resident(which):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which + ":"))

# the maximum that getrusage tells is inherited from the process that started this one
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
options = {"gram": "rows", "chunk_size": int(sys.argv[1]) or None}
GaussNewton(net, damping=1e-3, **options).direction(lambda: net(x).squeeze(1) - 1)
peak = resident("VmHWM")
print(sum(p.numel() for p in net.parameters()), (peak - before) * 1024)
"""


def test_chunks_bound_the_memory() -> None:
    """Documented: three chunks of J, the matrices of the solve, and the graph."""
    peaks = {}
    for chunk in (0, 100):
        ran = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(chunk)], capture_output=True, text=True, check=True, cwd=ROOT
        )
        size, peaks[chunk] = map(int, ran.stdout.split())
    batch, chunk = 1500, 100
    whole, matrices = batch * size * 8, 4 * batch**2 * 8
    activations = 40 * batch * 200 * 8  # of both passes, and factors
    print(
        f"J {whole / 2**20:.0f} MiB; peak {peaks[0] / 2**20:.0f} whole, {peaks[100] / 2**20:.0f} in chunks of {chunk}"
    )
    assert peaks[0] > whole
    assert peaks[100] > chunk * size * 8  # one chunk at least was seen
    assert peaks[100] <= 3 * chunk * size * 8 + matrices + activations < whole
