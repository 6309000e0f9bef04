"""Dense oracles of KFAC, SKFAC, Eva and Shampoo: explicit factors, Kronecker products and roots, in float64."""

from __future__ import annotations

import math

import torch
from fuzz_optimizers import Twin
from torch import nn
from torch.nn import functional as F

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d)


class Factored(Twin):
    """What KFAC, SKFAC and Eva share: inputs (as patches) and output gradients of layers that are not transposed."""

    def __init__(self, model, losses, options):
        super().__init__(model, losses, options)
        self.layers = {n: m for n, m in self.layers.items() if not isinstance(m, TRANSPOSED)}
        self.kept, self.inverted = {}, {}

    def seen(self, batches):
        """path -> (x [N, T, groups, inp], z [N, T, groups, out] of the samples' own losses)."""
        found = {}
        for x, t in batches:
            calls = []
            handles = [
                m.register_forward_hook(lambda m, i, y, p=path, calls=calls: calls.append((p, m, i[0], y)))
                for path, m in self.layers.items()
            ]
            losses = self.losses(self.model(x), t)
            for handle in handles:
                handle.remove()
            zs = torch.autograd.grad(losses.sum(), [call[3] for call in calls])
            here = {}
            for (path, m, inputs, _), z in zip(calls, zs, strict=True):
                here.setdefault(path, []).append(positions(m, inputs.detach(), z, len(x)))
            for path, each in here.items():  # calls are positions, passes are samples
                found.setdefault(path, []).append([torch.cat(parts, 1) for parts in zip(*each, strict=True)])
        return {path: [torch.cat(parts) for parts in zip(*each, strict=True)] for path, each in found.items()}

    def matrix(self, path, values):
        """[groups, out/groups, inp] of weight and bias of a layer, out of a dict by name."""
        m = self.layers[path]
        groups = getattr(m, "groups", 1)
        w, *bias = [values[n] for n in self.names(path)]
        w = w.reshape(groups, w.shape[0] // groups, -1)
        return torch.cat([w, bias[0].reshape(groups, -1, 1)], 2) if bias else w

    def back(self, path, matrix):
        """The inverse of `matrix`."""
        names = self.names(path)
        shapes = [self.model.get_parameter(n).shape for n in names]
        w = matrix[..., :-1] if len(names) > 1 else matrix
        parts = [w.reshape(shapes[0])] + ([matrix[..., -1].reshape(shapes[1])] if len(names) > 1 else [])
        return dict(zip(names, parts, strict=True))

    def direction(self, batches, plain):
        """Statistics and inverses when it is their turn, then the method's own direction."""
        seen = self.seen(batches)
        every = self.o.get("statistics_every", self.o.get("every", 1))
        if self.steps % every == 0:
            for path, (x, z) in seen.items():
                self.kept[path] = self.update(self.kept.get(path), *self.statistics(path, x, z))
        if self.steps % self.o.get("inverse_every", every) == 0:
            self.inverted = dict(self.kept)
        directions = {}
        for path in seen:
            directions.update(self.back(path, self.precondition(path, self.matrix(path, plain))))
        return directions, [self.names(path) for path in seen]

    def update(self, old, *new):
        """The moving average of statistics: (k, values)."""
        if old is None:
            return (1, *new)
        k, *values = old
        weight = min(1 - 1 / (k + 1), self.o.get("average", 0.95))
        return (k + 1, *[weight * a + (1 - weight) * b for a, b in zip(values, new, strict=True)])


def positions(m, x, z, batch):
    """Inputs or patches with 1 appended for a bias, and gradients of own losses: [N, T, groups, features]."""
    if isinstance(m, nn.Linear):
        x, z = x.reshape(batch, -1, 1, x.shape[-1]), z.reshape(batch, -1, 1, z.shape[-1])
    else:
        if isinstance(m, nn.Conv1d):
            x, z = x.unsqueeze(2), z.unsqueeze(2)
        two = [(1, v[0]) if len(v) == 1 else v for v in (m.kernel_size, m.dilation, m.stride)]
        pad = (0, m.padding[0]) if len(m.padding) == 1 else m.padding
        x = F.unfold(x, two[0], two[1], pad, two[2]).transpose(1, 2)  # [N, T, channels · kernel]
        x, z = x.unflatten(2, (m.groups, -1)), z.flatten(2).transpose(1, 2).unflatten(2, (m.groups, -1))
    if m.bias is not None:
        x = torch.cat([x, torch.ones_like(x[..., :1])], 3)
    return x, z


class KFAC(Factored):
    """A, G, and eigenvectors or the damped inverses of both."""

    def statistics(self, path, x, z):
        n, t = x.shape[:2]
        return torch.einsum("btgi,btgj->gij", x, x) / n, torch.einsum("btgi,btgj->gij", z, z) / (n * t)

    def precondition(self, path, g):
        _, a, b = self.inverted[path]
        damping, out = self.o["damping"], []
        for k in range(len(g)):
            i, o = a.shape[-1], b.shape[-1]
            if self.o.get("inverse", "eigen") == "eigen":  # the Kronecker product itself
                whole = torch.kron(b[k], a[k]) + damping * torch.eye(i * o, dtype=g.dtype)
                out.append(torch.linalg.solve(whole, g[k].flatten()).view(o, i))
            else:
                pi, root = math.sqrt((a[k].trace() / i) / (b[k].trace() / o)), math.sqrt(damping)
                left = torch.linalg.inv(b[k] + root / pi * torch.eye(o, dtype=g.dtype))
                out.append(left @ g[k] @ torch.linalg.inv(a[k] + root * pi * torch.eye(i, dtype=g.dtype)))
        return torch.stack(out)


class SKFAC(Factored):
    """The factors of one batch, each damped by √γ."""

    def statistics(self, path, x, z):
        n, t = x.shape[:2]
        if isinstance(self.layers[path], nn.Linear) or self.o.get("positions") == "subsample":
            return torch.einsum("btgi,btgj->gij", x, x) / n, torch.einsum("btgi,btgj->gij", z, z) / (n * t)
        scale = 1 / t if self.o.get("positions") == "mean" else 1.0
        x, z = scale * x.sum(1), scale * z.sum(1)
        return torch.einsum("bgi,bgj->gij", x, x) / n, torch.einsum("bgi,bgj->gij", z, z) / n

    def update(self, old, *new):
        return (1, *new)

    def precondition(self, path, g):
        _, a, b = self.inverted[path]
        root = math.sqrt(self.o["damping"])
        a, b = (torch.linalg.inv(f + root * torch.eye(f.shape[-1], dtype=g.dtype)) for f in (a, b))
        return b @ g @ a


class Eva(Factored):
    """Mean inputs, and sums of output gradients over positions."""

    def statistics(self, path, x, z):
        return x.mean((0, 1)), z.sum(1).mean(0)

    def precondition(self, path, g):
        _, a, b = self.inverted[path]
        damping, out = self.o["damping"], []
        for k in range(len(g)):
            f = torch.outer(b[k], a[k]).flatten()
            whole = torch.outer(f, f) + damping * torch.eye(len(f), dtype=g.dtype)
            out.append(torch.linalg.solve(whole, g[k].flatten()).view_as(g[k]))
        return torch.stack(out)


class Shampoo(Twin):
    """Explicit roots of the second moments, block by block."""

    def __init__(self, model, losses, options):
        super().__init__(model, losses, options)
        self.moments, self.roots = {}, {}

    def direction(self, batches, plain):
        out, o = {}, self.o
        for name, g in plain.items():
            if g.ndim < 2:
                continue
            v = torch.zeros_like(g)
            for block in blocks(g.shape, o["block"]):
                part, key = g[block], (name, str(block))
                k = part.ndim
                if self.steps % o["statistics_every"] == 0:
                    new = [unfolded(part, i) @ unfolded(part, i).T for i in range(k)]
                    old = self.moments.get(key)
                    decay = o["decay"]
                    add = 1.0 if decay == 1 else 1 - decay
                    self.moments[key] = (
                        new if old is None else [decay * a + add * b for a, b in zip(old, new, strict=True)]
                    )
                if self.steps % o["inverse_every"] == 0:
                    self.roots[key] = [root(m, o["epsilon"], 2 * k) for m in self.moments[key]]
                for i, r in enumerate(self.roots[key]):
                    part = torch.tensordot(r, part, ([1], [i])).movedim(0, i)
                v[block] = part
            out[name] = v * (g.norm() / v.norm()) if o.get("graft", True) and v.norm() > 0 else v
        return out, []


def unfolded(g, i):
    """g with dimension i first and the others flattened."""
    return g.movedim(i, 0).flatten(1)


def root(matrix, epsilon, power):
    """(L + ελ_max I)^(−1/power)."""
    values, vectors = torch.linalg.eigh(matrix)
    values = (values.clamp(min=0) + epsilon * values.max()).pow(-1 / power)
    return vectors * values @ vectors.T


def blocks(shape, size):
    """Tuples of slices that cut a shape into blocks of at most `size` along each dimension."""
    if not shape:
        return [()]
    return [
        (slice(a, min(a + size, shape[0])), *rest) for a in range(0, shape[0], size) for rest in blocks(shape[1:], size)
    ]
