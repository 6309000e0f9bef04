"""Models that fold windows, frames, patches, heads, views or positions into the batch, and what is expected of them."""

from __future__ import annotations

from typing import Any

import torch
from oracle import loop_grads_of
from torch import Tensor, nn
from torch.nn import functional as F

from persample import LayerGrads, reweight
from persample.reweighting import Reweighting


def losses_of(output: Tensor) -> Tensor:
    return output.sin().flatten(1).sum(1)


def rows_by_layer(model: nn.Module, *inputs: Any) -> dict[str, dict[str, Tensor]]:
    """Layer → parameter → the gradients of each sample's own loss, by a loop; the model must not be reweighted."""
    rows = loop_grads_of(losses_of(model(*inputs)), dict(model.named_parameters()))
    result: dict[str, dict[str, Tensor]] = {}
    for name, row in rows.items():
        result.setdefault(name.rpartition(".")[0], {})[name] = row
    return result


def matrix(rows: dict[str, Tensor]) -> Tensor:
    return torch.cat([row.flatten(1) for row in rows.values()], 1)


def factors_of(gram: Tensor) -> Tensor:
    return torch.linalg.solve(gram / gram.diagonal().mean() + torch.eye(len(gram)), torch.ones(len(gram)))


def assert_exact(model: nn.Module, *inputs: Any, plain: tuple[str, ...] = (), **options: Any) -> dict[str, str]:
    """Everything that `reweight` says of each layer is the loop's; returns what it explains.

    plain: layers (of parameters) that it leaves alone, normalisations say.
    """
    expected = rows_by_layer(model, *inputs)
    seen: dict[str, tuple[Tensor, Tensor, int]] = {}

    def asked(layer: str, grads: LayerGrads) -> Tensor:
        seen[layer] = grads.norms(), grads.gram(), grads.batch_size
        return factors_of(seen[layer][1])

    def known(layer: str, batch: int, device: torch.device) -> Tensor:
        return factors_of(seen[layer][1])

    joint = options.pop("joint", False)
    with reweight(model, (lambda all: {k: asked(k, g) for k, g in all.items()}) if joint else asked, joint=joint,
                  **options) as handle:  # fmt: skip
        _assert_step(model, inputs, expected, seen, plain, handle)
        explained = handle.explain()
    if not joint:  # factors that are known beforehand
        with reweight(model, asked, known=known, **options) as handle:
            _assert_step(model, inputs, expected, seen, plain, handle)
    return explained


def _assert_step(
    model: nn.Module, inputs: Any, expected: dict, seen: dict, plain: tuple[str, ...], handle: Reweighting
) -> None:
    model.zero_grad()
    losses_of(model(*inputs)).sum().backward()
    layers = {(handle.explain().get(path) and path) or f"{path}.weight" for path in expected}
    assert len(layers) == len(expected)
    for path, rows in expected.items():
        if path in plain:
            c = torch.ones(len(next(iter(rows.values()))))
        else:
            norms, gram, size = seen[path]
            whole = matrix(rows)
            assert size == len(whole)
            torch.testing.assert_close(norms, whole.norm(dim=1), rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(gram, whole @ whole.T, rtol=1e-9, atol=1e-12)
            c = factors_of(whole @ whole.T)
        for name, row in rows.items():
            got = model.get_parameter(name).grad
            torch.testing.assert_close(got, torch.tensordot(c, row, 1), rtol=1e-8, atol=1e-10, msg=name)


class Fold(nn.Module):
    """A layer on rows that lie as [before, batch, after] on axis 0 (or as told), and one on samples."""

    def __init__(self, layer: nn.Module, before: int, after: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.layer, self.sizes = layer, (before, after)
        with torch.no_grad():
            self.width = layer(torch.zeros(1, *shape)).numel()
        self.head = nn.Linear(self.width, 2)

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, before, after, *shape]"""
        batch = len(x)
        rows = self.layer(x.transpose(0, 1).flatten(0, 2)).tanh()
        rows = rows.unflatten(0, (self.sizes[0], batch, self.sizes[1])).transpose(0, 1)
        return self.head(rows.flatten(3)).tanh().mean((1, 2))


class Swin(nn.Module):
    """Two blocks of attention in windows of 2 × 2, the second of shifted ones, with a mask; maps of even size."""

    def __init__(self, functions: bool = False, width: int = 4) -> None:
        super().__init__()
        self.embed = nn.Conv2d(2, width, 1)
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(2))
        self.proj = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.mlp = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x).permute(0, 2, 3, 1)
        for shift, qkv, proj, mlp in zip((0, 1), self.qkv, self.proj, self.mlp, strict=True):
            h = h + self.attend(h, shift, qkv, proj)
            h = h + mlp(h).tanh()
        return self.head(h.mean((1, 2)))

    def attend(self, h: Tensor, shift: int, qkv: nn.Module, proj: nn.Module) -> Tensor:
        batch, height, width, _ = h.shape
        regions = torch.zeros(1, height, width, 1)
        if shift:
            h = h.roll((-shift, -shift), (1, 2))
            for place in (slice(0, -2), slice(-2, -1), slice(-1, None)):
                regions[:, place] += 3 * (place.start or 0)
                regions[:, :, place] += place.start or 0

        def windows(t: Tensor) -> Tensor:
            t = t.unflatten(1, (-1, 2)).unflatten(3, (-1, 2))
            return t.transpose(2, 3).flatten(0, 2).flatten(1, 2)  # [B·windows, 4, channels]

        q, k, v = qkv(windows(h)).chunk(3, 2)
        region = windows(regions)
        mask = torch.where(region == region.mT, 0.0, -100.0).repeat(batch, 1, 1)
        out = proj((q @ k.mT + mask).softmax(2) @ v)
        out = out.unflatten(1, (2, 2)).unflatten(0, (batch, height // 2, width // 2)).transpose(2, 3)
        out = out.flatten(3, 4).flatten(1, 2)
        return out.roll((shift, shift), (1, 2)) if shift else out


class Frames(nn.Module):
    """A small convolutional network on each frame of [B, F, C, H, W], and means over frames."""

    def __init__(self, normalise: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1, stride=2)
        self.norm = nn.BatchNorm2d(3) if normalise else nn.Identity()
        self.up, self.mix = nn.ConvTranspose2d(3, 2, 2, stride=2), nn.Conv2d(2, 2, 2, bias=False, groups=2)
        self.project = nn.Linear(2, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        batch, frames = x.shape[:2]
        h = self.norm(self.conv(x.flatten(0, 1))).tanh()
        h = self.mix(self.up(h)).tanh().mean((2, 3))
        return self.head(self.project(h).tanh().unflatten(0, (batch, frames)).mean(1))


class Axial(nn.Module):
    """Attention along rows, then along columns, of [B, C, H, W]."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.rows = nn.MultiheadAttention(4, 2, batch_first=batch_first)
        self.columns = nn.MultiheadAttention(4, 2, batch_first=batch_first)
        self.first, self.head = batch_first, nn.Linear(4, 2)

    def along(self, attention: nn.MultiheadAttention, h: Tensor) -> Tensor:
        """h [B, lines, positions, C]"""
        lines = h.flatten(0, 1) if self.first else h.flatten(0, 1).transpose(0, 1)
        out = attention(lines, lines, lines, need_weights=False)[0]
        return (out if self.first else out.transpose(0, 1)).unflatten(0, h.shape[:2])

    def forward(self, x: Tensor) -> Tensor:
        h = x.permute(0, 2, 3, 1)
        h = h + self.along(self.rows, h)
        h = h.transpose(1, 2)
        return self.head((h + self.along(self.columns, h)).mean((1, 2)))


class Siamese(nn.Module):
    """Two views of each sample, one after the other in one batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.body = nn.Conv1d(1, 2, 2), nn.Linear(6, 5)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        h = self.body(self.conv(torch.cat([first, second])).tanh().flatten(1)).tanh()
        one, two = h.chunk(2)
        return one * two


class Channels(nn.Module):
    """PatchTST: each channel of [B, C, L] on its own, in overlapping patches, with a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.cls = nn.Linear(4, 6), nn.Parameter(torch.randn(6))
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        series = x.flatten(0, 1)
        h = self.embed(series.unfold(1, 4, 2))
        h = torch.cat([self.cls.expand(len(h), 1, -1), h], 1)
        h = self.layer(h.tanh()).tanh()
        return self.head(h[:, 0] + h.mean(1)).unflatten(0, x.shape[:2])


class Tokens(nn.Module):
    """Positions of [B, T] numbers as rows: [B·T, C], or time first, [T·B, C]."""

    def __init__(self, time_first: bool) -> None:
        super().__init__()
        self.table, self.time_first = nn.Embedding(7, 4), time_first
        self.inner, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.table(tokens)
        h = (h.transpose(0, 1) if self.time_first else h).flatten(0, 1)
        h = self.head(self.inner(h).tanh())
        shape = tokens.shape[::-1] if self.time_first else tokens.shape
        return h.unflatten(0, shape).mean(0 if self.time_first else 1)


class Vit(nn.Module):
    """Patches and a class token: positions, nothing folded."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.cls = nn.Conv2d(1, 4, 2, stride=2), nn.Parameter(torch.randn(4))
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x).flatten(2).mT
        h = torch.cat([self.cls.expand(len(h), 1, -1), h], 1)
        h = h + F.scaled_dot_product_attention(h, h, self.layer(h))
        return self.head(h[:, 0])
