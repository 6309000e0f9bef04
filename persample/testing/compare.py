"""`python -m persample compare`: every backend on the same batch, beside plain training."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from persample.errors import PerSampleError
from persample.result.api import backends, per_sample
from persample.testing.command_line import console
from persample.testing.loop import deviation, loop_grads
from persample.testing.measure import Ratio, paired_ratios, peak_memory

Problem = tuple[nn.Module, Callable[[Any, Any], Tensor], Tensor, Tensor]

QUANTITIES = ("grads", "norms")


class Transformer(nn.Module):
    """A language model of two layers, from torch's own parts: 64 tokens, 512 words, 128 features."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(512, 128)
        self.positions = nn.Embedding(64, 128)
        layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(128, 512)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, 512, T] of tokens [B, T]."""
        steps = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.body(self.words(tokens) + self.positions(steps))).transpose(1, 2)


def mlp() -> nn.Module:
    """784-512-512-10, as for images of digits."""
    return nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))


def cnn() -> nn.Module:
    """Four convolutions with group normalisation on 32 × 32 colour images."""
    widths = [(3, 32, 1), (32, 32, 1), (32, 64, 2), (64, 64, 1)]
    blocks = [
        nn.Sequential(nn.Conv2d(i, o, 3, stride, padding=1, bias=False), nn.GroupNorm(8, o), nn.ReLU())
        for i, o, stride in widths
    ]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def mean_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each sample, the mean over its positions: [B]."""
    each = F.cross_entropy(logits, targets, reduction="none")
    return each.flatten(1).mean(1) if each.ndim > 1 else each


MODELS: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "cnn": cnn, "transformer": Transformer}


def problem(model: str, batch: int) -> Problem:
    """The model of that name, in float32, with a random batch."""
    if model not in MODELS:
        raise ValueError(f"model must be one of {', '.join(map(repr, MODELS))}; got {model!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = MODELS[model]()
        if model == "transformer":
            inputs, targets = torch.randint(512, (batch, 64)), torch.randint(512, (batch, 64))
        else:
            inputs = torch.randn(batch, 784) if model == "mlp" else torch.randn(batch, 3, 32, 32)
            targets = torch.randint(10, (batch,))
    return network, mean_cross_entropy, inputs, targets


def plain(model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], inputs: Tensor, targets: Tensor) -> None:
    """Forward and backward pass of ordinary training."""
    model.zero_grad()
    loss_fn(model(inputs), targets).mean().backward()


def prepare(model: str, batch: int, backend: str | None, quantity: str, threads: int) -> Callable[[], object]:
    """What `peak_memory` measures: one call, after another on a batch of two that fills the libraries' caches."""
    torch.set_num_threads(threads)

    def run(built: Problem) -> object:
        if backend is not None:
            return getattr(per_sample(*built, backend=backend), quantity)()
        plain(*built)
        return None

    network, loss_fn, inputs, targets = problem(model, batch)
    run((network, loss_fn, inputs[:2], targets[:2]))
    network.zero_grad(set_to_none=True)
    return lambda: run((network, loss_fn, inputs, targets))


@dataclass(frozen=True)
class Row:
    """One backend: what was measured, or why it refused."""

    backend: str
    deviation: float = math.nan
    times: dict[str, Ratio] | None = None
    memory: dict[str, float] | None = None
    refusal: str = ""


def measure(model: str, batch: int, repeats: int, progress: Callable[[str], None]) -> list[Row]:
    """Returns a row for each backend, in order of preference.

    Args:
        model: a name of `MODELS`.
        batch: number of samples.
        repeats: rounds of timing.
        progress: called with what comes next, `2 * len(backends()) + 2` times at most.
    """
    progress("one sample at a time")
    network, loss_fn, inputs, targets = problem(model, batch)
    exact: Problem = (network.double(), loss_fn, _double(inputs), targets)
    want = loop_grads(*exact)
    deviations, refusals = {}, {}
    for backend in backends():
        progress(f"{backend}: exactness")
        try:
            deviations[backend] = deviation(per_sample(*exact, backend=backend).grads(), want)
        except PerSampleError as error:
            refusals[backend] = str(error)
    del want, exact
    built = problem(model, batch)

    def run(backend: str, quantity: str) -> Callable[[], object]:
        return lambda: getattr(per_sample(*built, backend=backend), quantity)()

    progress("time")
    candidates = {f"{backend} {q}": run(backend, q) for backend in deviations for q in QUANTITIES}
    ratios = paired_ratios(lambda: plain(*built), candidates, rounds=repeats)
    rows = []
    threads = torch.get_num_threads()
    base = _peak(model, batch, None, "grads", threads)
    for backend in backends():
        progress(f"{backend}: memory")
        if backend in refusals:
            rows.append(Row(backend, refusal=refusals[backend]))
            continue
        memory = {q: _peak(model, batch, backend, q, threads) / base for q in QUANTITIES}
        times = {q: ratios[f"{backend} {q}"] for q in QUANTITIES}
        rows.append(Row(backend, deviations[backend], times, memory))
    return rows


def _double(inputs: Tensor) -> Tensor:
    return inputs.double() if inputs.is_floating_point() else inputs


def _peak(model: str, batch: int, backend: str | None, quantity: str, threads: int) -> int:
    return max(
        1,
        peak_memory(
            "persample.testing.compare:prepare",
            model=model,
            batch=batch,
            backend=backend,
            quantity=quantity,
            threads=threads,
        ),
    )


def table(rows: list[Row], title: str) -> Any:
    """The rows as a rich table."""
    from rich import box
    from rich.table import Table

    caption = (
        "time and memory as ratios to plain forward + backward, after a first call: median (quartiles); "
        "deviation from one sample at a time in float64"
    )
    result = Table(title=title, caption=caption, box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    result.add_column("backend", no_wrap=True, min_width=7)
    for heading in ("deviation", "time\ngradients", "time\nnorms", "memory\ngradients", "memory\nnorms"):
        result.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        if row.times is None or row.memory is None:
            result.add_row(row.backend, "refused", *[""] * 4)
            continue
        times = [f"{row.times[quantity]}" for quantity in QUANTITIES]
        memory = [f"{ratio:.2f}" if ratio < 100 else f"{ratio:.0f}" for ratio in (row.memory[q] for q in QUANTITIES)]
        result.add_row(row.backend, f"{row.deviation:.1e}", *times, *memory)
    return result


def draw(rows: list[Row], title: str, path: Path) -> None:
    """Writes a bar chart of time and memory, one group of bars for each backend."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    names = [row.backend for row in rows]
    for axis, what in zip(axes, ("time", "peak memory"), strict=True):
        for k, quantity in enumerate(QUANTITIES):
            heights = [_height(row, what, quantity) for row in rows]
            places = [n + (k - 0.5) * 0.38 for n in range(len(rows))]
            label = {"grads": "all gradients", "norms": "norms alone"}[quantity]
            bars = axis.bar(places, [h or 0.0 for h in heights], 0.36, label=label, color=("#4477aa", "#ddaa33")[k])
            axis.bar_label(bars, [f"{h:.1f}" if h else "" for h in heights], padding=2, fontsize=9)
        for n, row in enumerate(rows):
            if row.refusal:
                axis.text(n, 0.15, "refused", rotation=90, ha="center", va="bottom", color="0.4")
        axis.axhline(1, color="0.3", linewidth=1, linestyle="--")
        axis.text(len(rows) - 0.45, 1, " plain", ha="left", va="center", fontsize=9, color="0.3")
        axis.set_xticks(range(len(rows)), names)
        axis.set_xlim(-0.6, len(rows) - 0.4)
        axis.margins(y=0.12)
        axis.set_ylabel(f"{what} / forward + backward")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _height(row: Row, what: str, quantity: str) -> float | None:
    if row.times is None or row.memory is None:
        return None
    return row.times[quantity].median if what == "time" else row.memory[quantity]


def run(model: str, batch: int, out: Path, repeats: int) -> list[Row]:
    """Measures, prints the table and the refusals, writes the chart; returns the rows."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

    shown = console()
    columns = (SpinnerColumn(), BarColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=shown, transient=True) as bar:
        task = bar.add_task("", total=2 * len(backends()) + 2)

        def progress(text: str) -> None:
            bar.update(task, description=text)
            bar.advance(task)

        rows = measure(model, batch, repeats, progress)
    title = f"{model}, batch of {batch}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    shown.print(table(rows, title))
    for row in rows:
        if row.refusal:
            shown.print(f"{row.backend} refused: {row.refusal}")
    draw(rows, title, out)
    shown.print(f"chart: {out}")
    return rows
