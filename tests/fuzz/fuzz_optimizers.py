"""Dense oracles of the optimisers, written from their equations: explicit rows, matrices and inverses, in float64."""

from __future__ import annotations

import copy
import itertools
import math

import torch
from torch import nn

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d)


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
            for n in itertools.chain(*layers):
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
                factors = self.factors(path, index, lambda k=grams[path], s=s: self.coefficients(k, s), x)
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
