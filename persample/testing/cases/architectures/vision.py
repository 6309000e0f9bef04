"""Small vision models made of patches, each with what its family does differently."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from persample.testing.cases.parts import attend, heads, mlp
from persample.testing.cases.table import Built, Net, classify, group, randn, regress

case = group("vision", "architecture")
B, D = 3, 8


def self_attention(m: Net, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention with one projection for queries, keys and values."""
    q, k, v = (heads(t) for t in m.qkv(x).chunk(3, -1))
    return m.out(attend(q, k, v, bias))


def attention() -> Net:
    """Its parts."""
    return Net(self_attention, qkv=nn.Linear(D, 3 * D), out=nn.Linear(D, D))


def _vit_block(m: Net, x: Tensor) -> Tensor:
    x = x + m.scale1 * m.attention(m.norm1(x))
    return x + m.scale2 * m.mlp(m.norm2(x))


def vit_block() -> Net:
    """Norms before the residual, layer scale."""
    return Net(
        _vit_block,
        attention=attention(),
        mlp=mlp(D),
        norm1=nn.LayerNorm(D),
        norm2=nn.LayerNorm(D),
        scale1=randn(D),
        scale2=randn(D),
    )


@case("peers")
def vit() -> Built:
    """Patches by a strided convolution, a class token, a position table, layer scale."""

    def run(m: Net, x: Tensor) -> Tensor:
        x = m.patch(x).flatten(2).mT
        x = torch.cat([m.token.expand(len(x), -1, -1), x], 1) + m.position
        return m.head(m.norm(m.blocks(x))[:, 0])

    model = Net(
        run,
        patch=nn.Conv2d(3, D, 4, stride=4),
        token=randn(1, 1, D),
        position=randn(1, 7, D),
        blocks=nn.Sequential(vit_block(), vit_block()),
        norm=nn.LayerNorm(D),
        head=nn.Linear(D, 3),
    )
    return classify(model, randn(B, 3, 8, 12))


@case("peers")
def vit_interpolated_positions() -> Built:
    """The position table, made for another size, is interpolated before it meets the image."""

    def run(m: Net, x: Tensor) -> Tensor:
        x = m.patch(x)
        where = F.interpolate(m.position, size=x.shape[2:], mode="bilinear", align_corners=False)
        return m.head(m.block((x + where).flatten(2).mT).mean(1))

    model = Net(
        run,
        patch=nn.Conv2d(3, D, 4, stride=4),
        position=randn(1, D, 3, 3),
        block=vit_block(),
        head=nn.Linear(D, 3),
    )
    return classify(model, randn(B, 3, 8, 12))


@case(axes=(0, 0))
def masked_autoencoder() -> Built:
    """A random part of the patches is kept by gather, the rest replaced by a mask token, order restored by
    gather.
    """

    def run(m: Net, x: Tensor, noise: Tensor) -> Tensor:
        order = noise.argsort(1)
        keep = order[:, :2, None].expand(-1, -1, D)
        kept = m.encoder((m.patch(x).flatten(2).mT + m.position).gather(1, keep))
        rest = m.mask.expand(len(x), 4, -1)
        full = torch.cat([kept, rest], 1).gather(1, order.argsort(1)[..., None].expand(-1, -1, D))
        return m.decoder(full + m.position)

    model = Net(
        run,
        patch=nn.Conv2d(3, D, 4, stride=4),
        position=randn(1, 6, D),
        mask=randn(1, 1, D),
        encoder=vit_block(),
        decoder=vit_block(),
    )
    return regress(model, (randn(B, 3, 8, 12), randn(B, 6)))


@case("peers")
def swin() -> Built:
    """Shifted windows as rows of the batch, a table of relative biases, merging of patches."""
    size = 2
    grid = torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")).flatten(1)
    away = grid[:, :, None] - grid[:, None] + size - 1
    index = away[0] * (2 * size - 1) + away[1]

    def block(m: Net, x: Tensor) -> Tensor:
        b, h, w, d = x.shape
        y = m.norm1(x).roll((-m.shift, -m.shift), (1, 2))
        y = y.view(b, h // size, size, w // size, size, d).transpose(2, 3).reshape(-1, size * size, d)
        y = m.attention(y, m.table[index.flatten()].view(size**2, size**2, -1).permute(2, 0, 1)[None])
        y = y.view(b, h // size, w // size, size, size, d).transpose(2, 3).reshape(b, h, w, d)
        x = x + y.roll((m.shift, m.shift), (1, 2))
        return x + m.mlp(m.norm2(x))

    def parts(shift: int) -> Net:
        return Net(
            block,
            attention=attention(),
            mlp=mlp(D),
            norm1=nn.LayerNorm(D),
            norm2=nn.LayerNorm(D),
            table=randn((2 * size - 1) ** 2, 2),
            shift=shift,
        )

    def merge(m: Net, x: Tensor) -> Tensor:
        return m.lin(m.norm(torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)))

    layers = nn.Sequential(
        parts(0),
        parts(1),
        Net(merge, norm=nn.LayerNorm(4 * D), lin=nn.Linear(4 * D, D, bias=False)),
        parts(0),
    )
    model = Net(
        lambda m, x: m.head(m.layers(m.patch(x).movedim(1, -1)).mean((1, 2))),
        layers=layers,
        patch=nn.Conv2d(3, D, 2, stride=2),
        head=nn.Linear(D, 3),
    )
    return classify(model, randn(B, 3, 8, 16))


@case("time-major")
def mlp_mixer() -> Built:
    """Linear layers over channels and, transposed, over patches."""

    def block(m: Net, x: Tensor) -> Tensor:
        x = x + m.across(m.norm1(x).mT).mT
        return x + m.within(m.norm2(x))

    blocks = [
        Net(block, across=mlp(6, 5), within=mlp(D, 12), norm1=nn.LayerNorm(D), norm2=nn.LayerNorm(D)) for _ in range(2)
    ]
    model = Net(
        lambda m, x: m.head(m.blocks(m.patch(x).flatten(2).mT).mean(1)),
        blocks=nn.Sequential(*blocks),
        patch=nn.Conv2d(3, D, 4, stride=4),
        head=nn.Linear(D, 3),
    )
    return classify(model, randn(B, 3, 8, 12))


@case()
def detection_with_queries() -> Built:
    """DETR: learned queries, expanded over the batch, attend to the image."""

    def run(m: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        memory = m.patch(x).flatten(2).mT + m.position
        found = m.decoder(m.queries.weight[None].repeat(len(x), 1, 1), memory)
        return m.boxes(found).sigmoid(), m.classes(found)

    model = Net(
        run,
        patch=nn.Conv2d(3, D, 4, stride=4),
        position=randn(6, D),
        queries=nn.Embedding(B, D),
        decoder=nn.TransformerDecoderLayer(D, 2, 12, 0.0, batch_first=True),
        boxes=nn.Linear(D, 4),
        classes=nn.Linear(D, 3),
    )
    return regress(model, randn(B, 3, 8, 12))
