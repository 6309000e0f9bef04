"""Dense oracles of the optimisers, written from their equations: explicit rows, matrices and inverses, in float64."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn
from torch.nn import functional as F

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d)


class Twin:
    """A copy of the model that is trained by dense mathematics. `direction(passes)` is the method's."""

    def __init__(self, model, losses, options):
        self.model, self.losses, self.o = copy.deepcopy(model), losses, options
        self.velocity, self.steps = {}, 0
        self.layers = {n: m for n, m in self.model.named_modules() if isinstance(m, LAYERS)}

    def names(self, path):
        """Full names of a layer's parameters."""
        prefix = f"{path}." if path else ""
        return [prefix + n for n, p in self.layers[path].named_parameters() if p.requires_grad]

    def plain(self, batches):
        """Gradients of the training loss: the mean over all batches of a step (of one size), or the sum."""
        self.model.zero_grad()
        for x, t in batches:
            losses = self.losses(self.model(x), t)
            (losses.mean() / len(batches) if self.o.get("reduction", "mean") == "mean" else losses.sum()).backward()
        found = {n: p.grad for n, p in self.model.named_parameters() if p.requires_grad}
        return {n: torch.zeros_like(self.model.get_parameter(n)) if g is None else g.clone() for n, g in found.items()}

    def rows(self, x, t):
        """Gradients of each sample's own loss, by the loop: name -> [B, *shape]."""
        found = []
        for b in range(len(x)):
            self.model.zero_grad()
            self.losses(self.model(x[b : b + 1]), t[b : b + 1])[0].backward()
            found.append(
                {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in self.model.named_parameters()}
            )
        return {n: torch.stack([row[n] for row in found]) for n in found[0]}

    def step(self, batches):
        """One step: the direction, the KL clip, then SGD by hand."""
        o, lr = self.o, self.o["lr"]
        plain = self.plain(batches)
        directions, layers = self.direction(batches, plain)
        if o.get("kl_clip") is not None:
            each = [lr**2 * sum((directions[n] * plain[n]).sum() for n in names) for names in layers]
            inner = self.joined(each)
            nu = min(1.0, math.sqrt(o["kl_clip"] / inner)) if inner > 0 else 1.0
            for n in sum(layers, []):
                directions[n] = nu * directions[n]
        decay, momentum = o.get("weight_decay", 0.0), o.get("momentum", 0.9)
        with torch.no_grad():
            for n, p in self.model.named_parameters():
                if not p.requires_grad:
                    continue
                d = directions.get(n, plain[n])
                if o.get("decoupled_weight_decay"):
                    p.mul_(1 - lr * decay)
                else:
                    d = d + decay * p
                v = self.velocity.get(n)
                v = self.velocity[n] = d.clone() if v is None else momentum * v + d
                p.sub_(lr * (d + momentum * v if o.get("nesterov") else v))
        self.steps += 1


    def joined(self, each):
        """Σ_l lr²|⟨d_l, g_l⟩|."""
        return sum(abs(one) for one in each)


class Natural(Twin):
    """NGD, and FNGD with its table by position or sample."""

    table: dict

    def joined(self, each):
        """Σ_l lr²⟨d_l, g_l⟩, which stale coefficients can make negative."""
        return max(sum(each), 0.0)

    def __init__(self, model, losses, options, steps_per_epoch=None):
        super().__init__(model, losses, options)
        self.table, self.steps_per_epoch = {}, steps_per_epoch

    def coefficients(self, gram, s):
        """B·c_b times λ where that is absorbed: the factors of the samples' shares of the plain gradient."""
        o, batch = self.o, len(gram)
        damping = o["damping"] if o.get("alpha", 0.01) is None else o.get("alpha", 0.01) * gram.norm()
        c = torch.linalg.solve(gram + damping * batch * torch.eye(batch, dtype=gram.dtype), s)
        return batch * c * (damping if o.get("scale", "absorb") == "absorb" else 1)

    def direction(self, batches, plain):
        """Σ_b factor_b · (share of the training loss) for every layer."""
        o = self.o
        names = {path: self.names(path) for path in self.layers if self.names(path)}
        total = {n: torch.zeros_like(plain[n]) for group in names.values() for n in group}
        solved = [batches]
        if o.get("accumulate") != "joint":
            solved = [[batch] for batch in batches]
        for index, passes in enumerate(solved):
            x, t = (torch.cat(parts) for parts in zip(*passes, strict=True))
            rows, mean = self.rows(x, t), o.get("reduction", "mean") == "mean"
            if mean and len(solved) > 1:  # each pass is a batch of its own, whose loss is divided by the passes
                rows = {n: r / len(batches) for n, r in rows.items()}
            flat = {path: torch.cat([rows[n].flatten(1) for n in group], 1) for path, group in names.items()}
            grams = {path: u @ u.T for path, u in flat.items()}
            if o.get("gram") == "network":
                grams = dict.fromkeys(grams, sum(grams.values()))
            s = torch.ones(len(x), dtype=torch.float64)
            if o.get("fisher") == "improved":
                outputs = self.model(x).detach().requires_grad_()
                s = torch.autograd.grad(self.losses(outputs, t).sum(), outputs)[0].flatten(1).square().sum(1)
                s = s / len(solved) ** 2 if mean else s
            share = 1 / len(x) if mean else 1.0
            for path, group in names.items():
                factors = self.factors(path, index, lambda p=path: self.coefficients(grams[p], s), x)
                here = {n: share * torch.einsum("b,b...->...", factors, rows[n]) for n in group}
                own = {n: share * rows[n].sum(0) for n in group}
                for n in group:
                    total[n] += here[n]
                if o.get("scale") == "graft" and o.get("gram") != "network":
                    ratio = norm(own.values()) / norm(here.values())
                    for n in group:
                        total[n] += (ratio - 1) * here[n]
        if o.get("scale") == "graft" and o.get("gram") == "network":
            ratio = norm([plain[n] for n in total]) / norm(total.values())
            total = {n: ratio * d for n, d in total.items()}
        return total, list(names.values())

    def factors(self, path, index, compute, x):
        """Fresh factors; or, with a table, those of the first epoch (or the last one that refreshed)."""
        if self.steps_per_epoch is None:
            return compute()
        epoch, place = divmod(self.steps, self.steps_per_epoch)
        every = self.o.get("refresh_epochs")
        fresh = epoch == 0 if every is None else epoch % every == 0
        if self.o.get("control") == "constant":
            return torch.ones(len(x), dtype=torch.float64)
        if self.o.get("share") == "sample":
            if fresh:
                for i, factor in zip(self.ids, compute(), strict=True):
                    self.table[path, i] = factor
            return torch.stack([self.table[path, i] for i in self.ids])
        if fresh:
            self.table[path, index, place] = compute()
        return self.table[path, index, place]


def norm(tensors):
    """The length of several tensors together."""
    return torch.stack([t.square().sum() for t in tensors]).sum().sqrt()


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
                m.register_forward_hook(lambda m, i, y, p=path: calls.append((p, m, i[0], y)))
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
                        new if old is None else [decay * a + add * b for a, b in zip(old, new)]
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
        (slice(a, min(a + size, shape[0])), *rest)
        for a in range(0, shape[0], size)
        for rest in blocks(shape[1:], size)
    ]
