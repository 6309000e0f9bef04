"""Families of pieces of models that take an image or a volume for each sample; see `fuzz_models`."""

from __future__ import annotations

import torch
from fuzz_families import Fn, family, same, weights
from torch import nn
from torch.nn import functional as F


@family(3)
def conv2d(r, shape):
    c, out = shape[0], 2 * r.randint(1, 2)
    groups = c if out % c == 0 and r.random() < 0.4 else 1
    options = {"padding": r.randint(1, 2), "stride": r.randint(1, 2), "dilation": 1, "groups": groups}
    if min(shape[1:]) > 3 and r.random() < 0.3:
        options["dilation"] = 2
        options["padding"] = 2
    if r.random() < 0.2 and min(shape[1:]) > 2:
        options["padding_mode"] = r.choice(["reflect", "circular", "replicate"])
    return sized(nn.Conv2d(c, out, r.choice([(3, 3), (1, 1), (1, 3)]), bias=r.random() < 0.6, **options), shape)


def sized(module, shape):
    """The module with the shape of its output."""
    with torch.no_grad():
        return module, tuple(module(torch.zeros(1, *shape)).shape[1:])


@family(3)
def transposed_2d(r, shape):
    groups = 2 if shape[0] % 2 == 0 and r.random() < 0.4 else 1
    conv = nn.ConvTranspose2d(shape[0], 2, 3, stride=r.randint(1, 2), padding=1, groups=groups)
    return sized(conv, shape)


@family(3)
def image_norm(r, shape):
    kind = r.choice(["group", "instance", "batch", "layer", "local"])
    c = shape[0]
    if kind == "batch":
        module = nn.BatchNorm2d(c).eval()
        module.running_var.uniform_(0.5, 2)
    elif kind == "instance" and shape[1] * shape[2] > 1:
        module = nn.InstanceNorm2d(c, affine=True)
    elif kind == "layer":
        module = nn.LayerNorm(shape)
    else:
        module = nn.GroupNorm(c if r.random() < 0.5 and shape[1] * shape[2] > 1 else 1, c)
    return module, shape


@family(3)
def channels_scaled(r, shape):
    return same(shape, lambda m, x: x * m.p[:, None, None] + m.q, p=weights(shape[0]), q=weights(1, *shape[1:]))


@family(3)
def squeezed(r, shape):
    def forward(m, x):
        return x * m.l(x.mean((2, 3))).sigmoid()[:, :, None, None]

    return same(shape, forward, l=nn.Linear(shape[0], shape[0]))


@family(3)
def pool(r, shape):
    if min(shape[1:]) < 2:
        return channels_scaled(r, shape)
    kind = r.choice([nn.MaxPool2d, nn.AvgPool2d])
    size = tuple(s // 2 for s in shape[1:])
    return Fn(lambda m, x: m.pool(x * m.p), pool=kind(2), p=weights(1) + 1), (shape[0], *size)


@family(3)
def interpolated(r, shape):
    size, mode = (r.randint(2, 5), r.randint(2, 5)), r.choice(["nearest", "bilinear"])
    corners = None if mode == "nearest" else False

    def forward(m, x):
        return F.interpolate(x + F.interpolate(m.p, shape[1:], mode=mode), size, mode=mode, align_corners=corners)

    return Fn(forward, p=weights(1, shape[0], 2, 2)), (shape[0], *size)


@family(3)
def padded_image(r, shape):
    mode = r.choice(["constant", "replicate", "circular"])
    return Fn(lambda m, x: F.pad(x * m.p, (1, 1, 1, 0), mode=mode), p=weights(1) + 1), (
        shape[0],
        shape[1] + 1,
        shape[2] + 2,
    )


@family(3)
def shuffled_channels(r, shape):
    def forward(m, x):
        return m.c(x)[:, torch.arange(shape[0] - 1, -1, -1)].roll(1, 2)

    return same(shape, forward, c=nn.Conv2d(shape[0], shape[0], 3, padding=1))


@family(3)
def unfolded(r, shape):
    def forward(m, x):
        return m.l(F.unfold(x, 2, padding=1).transpose(1, 2))

    positions = (shape[1] + 1) * (shape[2] + 1)
    return Fn(forward, l=nn.Linear(4 * shape[0], 2)), (positions, 2)


@family(3)
def sampled_grid(r, shape):
    def forward(m, x):
        flow = torch.tanh(m.theta).expand(len(x), 2, 3)
        return F.grid_sample(x, F.affine_grid(flow, [len(x), shape[0], 3, 3], align_corners=False), align_corners=False)

    return Fn(forward, theta=weights(2, 3)), (shape[0], 3, 3)


@family(3)
def twice_convolved(r, shape):
    conv = nn.Conv2d(shape[0], shape[0], 3, padding=1)
    return same(shape, lambda m, x: m.c(torch.relu(m.c(x))) - x, c=conv)


@family(3)
def tied_convolution(r, shape):
    def forward(m, x):
        return F.conv_transpose2d(F.conv2d(x, m.w, stride=1), m.w)

    return same(shape, forward, w=weights(2, shape[0], 1, 1))


@family(3)
def own_kernels(r, shape):
    def forward(m, x):  # the batch folded into the groups of one convolution
        kernels = m.l(x.mean((2, 3))).view(len(x) * 2, shape[0], 1, 1)
        return F.conv2d(x.reshape(1, -1, *shape[1:]), kernels, groups=len(x)).view(len(x), 2, *shape[1:])

    return Fn(forward, l=nn.Linear(shape[0], 2 * shape[0])), (2, *shape[1:])


@family(3)
def frames_folded(r, shape):
    conv = nn.Conv2d(1, 2, 3, padding=1)

    def forward(m, x):
        return m.c(x.flatten(0, 1).unsqueeze(1)).unflatten(0, (-1, shape[0])).flatten(1, 2)

    return Fn(forward, c=conv), (2 * shape[0], *shape[1:])


@family(3)
def patches(r, shape):
    conv = nn.Conv2d(shape[0], 3, 2, stride=2)
    if min(shape[1:]) < 2:
        return flat_image(r, shape)
    size = (shape[1] // 2) * (shape[2] // 2)
    return Fn(lambda m, x: m.c(x).flatten(2).transpose(1, 2), c=conv), (size, 3)


@family(3)
def image_mean(r, shape):
    return Fn(lambda m, x: F.adaptive_avg_pool2d(x * m.p, 1).flatten(1), p=weights(1) + 1), shape[:1]


@family(3)
def flat_image(r, shape):
    return Fn(lambda m, x: m.l(x.flatten(1)), l=nn.Linear(shape[0] * shape[1] * shape[2], 3)), (3,)


@family(3)
def as_volume(r, shape):
    return Fn(lambda m, x: torch.stack([x, x * m.p], 2), p=weights(*shape[1:])), (shape[0], 2, *shape[1:])


@family(4)
def conv3d(r, shape):
    conv = nn.Conv3d(shape[0], 2, (1, 3, 3), padding=(0, 1, 1), groups=1)
    return sized(conv, shape)


@family(4)
def transposed_3d(r, shape):
    return sized(nn.ConvTranspose3d(shape[0], 2, (2, 1, 1)), shape)


@family(4)
def volume_norm(r, shape):
    return nn.GroupNorm(1, shape[0]), shape


@family(4)
def projected_volume(r, shape):
    return Fn(lambda m, x: m.n(x.amax(2)), n=nn.GroupNorm(1, shape[0])), (shape[0], *shape[2:])


@family(4)
def mean_volume(r, shape):
    return Fn(lambda m, x: m.l(x.flatten(2).mean(2)), l=nn.Linear(shape[0], 2)), (2,)
