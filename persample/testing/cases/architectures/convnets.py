"""Small convolutional networks, each with what its family does differently."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from persample.testing.cases.parts import mlp
from persample.testing.cases.table import Built, Net, classify, group, ids, randn, regress

case = group("vision", "architecture")
B, D = 3, 8


def conv(inp: int, out: int, size: int = 3, **options: Any) -> nn.Conv2d:
    """A convolution that keeps the size of the image, without bias."""
    return nn.Conv2d(inp, out, size, padding=size // 2, bias=False, **options)


@case()
def convnext() -> Built:
    """Depthwise 7 × 7, a channels-last norm and pointwise linear layers, layer scale."""

    def block(m: Net, x: Tensor) -> Tensor:
        return x + (m.scale * m.mlp(m.norm(m.depth(x).permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)

    blocks = [
        Net(
            block,
            depth=nn.Conv2d(D, D, 7, padding=3, groups=D),
            norm=nn.LayerNorm(D),
            mlp=mlp(D),
            scale=randn(D),
        )
        for _ in range(2)
    ]
    layers = nn.Sequential(
        nn.Conv2d(3, D, 2, stride=2),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.LayerNorm(D),
        nn.Linear(D, 3),
    )
    return classify(layers, randn(B, 3, 8, 10))


def resnet(norm: type[nn.Module], train: bool = True, **squeeze: bool) -> Built:
    """Two residual blocks, the second with a strided shortcut; in-place ReLU as torchvision has it."""

    def normed(width: int) -> nn.Module:
        return nn.GroupNorm(2, width) if norm is nn.GroupNorm else norm(width)

    def block(m: Net, x: Tensor) -> Tensor:
        y = m.norm2(m.conv2(F.relu(m.norm1(m.conv1(x)), inplace=True)))
        if squeeze:
            y = y * m.gate(y.mean((2, 3)))[..., None, None]
        return F.relu(m.short(x) + y, inplace=True)

    def parts(inp: int, out: int, stride: int) -> Net:
        short = nn.Sequential(nn.Conv2d(inp, out, 1, stride, bias=False), normed(out)) if stride > 1 else nn.Identity()
        more = {"gate": nn.Sequential(nn.Linear(out, 2), nn.ReLU(), nn.Linear(2, out), nn.Sigmoid())} if squeeze else {}
        return Net(
            block,
            conv1=conv(inp, out, stride=stride),
            norm1=normed(out),
            conv2=conv(out, out),
            norm2=normed(out),
            short=short,
            **more,
        )

    model = nn.Sequential(
        conv(3, 4),
        normed(4),
        nn.ReLU(inplace=True),
        parts(4, 4, 1),
        parts(4, 8, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )
    return classify(model.train(train), randn(B, 3, 8, 8))


@case("peers")
def resnet_group_norm() -> Built:
    return resnet(nn.GroupNorm)


@case("peers")
def resnet_batch_norm_eval() -> Built:
    return resnet(nn.BatchNorm2d, train=False)


@case("peers", coupled=True)
def resnet_batch_norm_train() -> Built:
    return resnet(nn.BatchNorm2d)


@case()
def squeeze_excite() -> Built:
    """Channels weighted by a network on their means."""
    return resnet(nn.GroupNorm, squeeze=True)


@case()
def inverted_residual() -> Built:
    """MobileNet: expand, depthwise, project; BatchNorm in evaluation mode, ReLU6, hard-swish."""
    layers = nn.Sequential(
        nn.Conv2d(3, 4, 3, 2, 1),
        nn.Hardswish(),
        nn.Conv2d(4, 12, 1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU6(inplace=True),
        conv(12, 12, groups=12),
        nn.BatchNorm2d(12),
        nn.Conv2d(12, 4, 1),
        nn.Flatten(),
        nn.Linear(64, 3),
    )
    return classify(layers.eval(), randn(B, 3, 8, 8))


@case()
def densenet() -> Built:
    """Every layer sees all earlier ones, concatenated; norm and activation come before the convolution."""

    def run(m: Net, x: Tensor) -> Tensor:
        seen = [m.stem(x)]
        for part in m.parts:
            seen.append(part(torch.cat(seen, 1)))
        return m.head(torch.cat(seen, 1).mean((2, 3)))

    parts = [nn.Sequential(nn.GroupNorm(1, 4 + 2 * i), nn.ReLU(), conv(4 + 2 * i, 2)) for i in range(3)]
    model = Net(run, stem=conv(3, 4), parts=nn.ModuleList(parts), head=nn.Linear(10, 3))
    return classify(model, randn(B, 3, 6, 7))


@case()
def vgg_with_dropout_eval() -> Built:
    """Max pooling, and dropout that is switched off."""
    layers = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(True),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(24, 8),
        nn.ReLU(True),
        nn.Dropout(),
        nn.Linear(8, 3),
    )
    return classify(layers.eval(), randn(B, 3, 8, 8))


@case("random", axes=None)
def stochastic_depth() -> Built:
    """Whole branches dropped per sample, so that some rows get no gradient."""

    def block(m: Net, x: Tensor) -> Tensor:
        keep = torch.rand(len(x), 1, 1, 1) < 0.5
        return x + keep * m.body(x) / 0.5

    blocks = [Net(block, body=nn.Sequential(conv(4, 4), nn.GroupNorm(2, 4), nn.ReLU())) for _ in range(2)]
    return classify(nn.Sequential(conv(3, 4), *blocks, nn.Flatten(), nn.Linear(4 * 36, 3)), randn(4, 3, 6, 6))


@case()
def unet() -> Built:
    """Down by pooling, up by transposed convolutions, skips concatenated, a class for every pixel."""

    def run(m: Net, x: Tensor) -> Tensor:
        wide = m.down1(x)
        deep = m.down2(F.max_pool2d(wide, 2))
        low = m.bottom(F.max_pool2d(deep, 2))
        y = m.mid(torch.cat([m.up1(low), deep], 1))
        return m.out(torch.cat([m.up2(y), wide], 1)).movedim(1, -1)

    def double(inp: int, out: int) -> nn.Sequential:
        return nn.Sequential(conv(inp, out), nn.GroupNorm(2, out), nn.ReLU(True), nn.Conv2d(out, out, 3, padding=1))

    model = Net(
        run,
        down1=double(3, 4),
        down2=double(4, 6),
        bottom=double(6, 8),
        mid=double(12, 6),
        up1=nn.ConvTranspose2d(8, 6, 2, stride=2),
        up2=nn.ConvTranspose2d(6, 4, 3, 2, 1, output_padding=1),
        out=nn.Conv2d(8, 3, 1),
    )
    return classify(model, randn(B, 3, 8, 12))


@case()
def super_resolution() -> Built:
    """Sub-pixel convolution and a bilinear shortcut."""
    model = Net(
        lambda m, x: m.body(x) + F.interpolate(x, scale_factor=2, mode="bilinear"),
        body=nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.PReLU(8), nn.PixelShuffle(2)),
    )
    return regress(model, randn(B, 2, 5, 4))


@case()
def generator() -> Built:
    """Noise through transposed convolutions, each sample modulated by its own style (AdaIN)."""

    def run(m: Net, z: Tensor) -> Tensor:
        x = m.start.expand(len(z), -1, -1, -1)
        for up, style in zip(m.ups, m.styles, strict=True):
            scale, shift = style(z)[..., None, None].chunk(2, 1)
            x = F.leaky_relu(F.instance_norm(up(x)) * (1 + scale) + shift, 0.2)
        return x.tanh()

    model = Net(
        run,
        start=randn(1, 4, 2, 2),
        ups=nn.ModuleList(nn.ConvTranspose2d(4, 4, 4, 2, 1) for _ in range(2)),
        styles=nn.ModuleList(nn.Linear(5, 8) for _ in range(2)),
    )
    return regress(model, randn(B, 5))


@case()
def region_crops() -> Built:
    """Crops of each image, two for each, become rows of the batch."""

    def run(m: Net, x: Tensor, corner: Tensor) -> Tensor:
        features = m.conv(x).relu()
        crops = torch.stack(
            [features[b, :, i : i + 3, j : j + 3] for b, two in enumerate(corner.tolist()) for i, j in two]
        )
        return m.head(crops.flatten(1)).unflatten(0, (len(x), 2))

    model = Net(run, conv=conv(3, 4), head=nn.Linear(36, 3))
    return classify(model, (randn(B, 3, 6, 7), ids(4, B, 2, 2)))


@case()
def spatial_transformer() -> Built:
    """Each image is warped by an affine map that a network finds in it."""

    def run(m: Net, x: Tensor) -> Tensor:
        theta = m.locate(x.flatten(1)).view(-1, 2, 3)
        warped = F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)
        return m.head(warped.flatten(1))

    return classify(Net(run, locate=nn.Linear(50, 6), head=nn.Linear(50, 3)), randn(B, 2, 5, 5))


@case()
def video_convolutions() -> Built:
    """3-D convolutions, factored in space and time."""
    layers = nn.Sequential(
        nn.Conv3d(2, 4, (1, 3, 3), padding=(0, 1, 1)),
        nn.ReLU(),
        nn.Conv3d(4, 4, (3, 1, 1)),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )
    return classify(layers, randn(B, 2, 4, 5, 6))
