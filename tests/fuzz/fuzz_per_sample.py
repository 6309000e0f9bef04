"""Judges `persample.per_sample` on a drawn model against the loop, each sample alone through the model."""

from __future__ import annotations

import random
import traceback
import warnings
from dataclasses import dataclass

import torch

import persample

EPS = 1e-9  # of a sample's largest entry in the parameter, in float64


@dataclass(frozen=True)
class Finding:
    """What one evaluation came to: "exact", "refused" (as documented), "wrong", "foreign" or "needless"."""

    verdict: str
    seed: int
    way: str
    what: str = ""


class Truth:
    """Rows of every parameter by the loop, with what rounding may explain of each row."""

    def __init__(self, drawn):
        self.parameters = {n: p for n, p in drawn.model.named_parameters() if p.requires_grad}
        rows, losses, noise = [], [], []
        for b in range(drawn.batch):
            inputs, targets = drawn.alone(b)
            loss = drawn.losses(inputs, targets)
            losses.append(loss.detach()[0])
            rows.append(self.gradient(loss[0]))
            twice, same = self.repeated(inputs), self.repeated(targets)
            noise.append(self.gradient(drawn.losses(twice, same)[0]))  # other rounding, the same mathematics
        self.losses = torch.stack(losses)
        self.rows = {n: torch.stack([row[n] for row in rows]) for n in self.parameters}
        other = {n: torch.stack([row[n] for row in noise]) for n in self.parameters}
        biggest = torch.stack([largest(rows) for rows in self.rows.values()]).amax(0)
        self.tolerance = {
            n: EPS * largest(rows) + 1e-13 * biggest + 100 * largest(rows - other[n]) for n, rows in self.rows.items()
        }
        self.spread = torch.stack(
            [t * rows[0].numel() ** 0.5 for t, rows in zip(self.tolerance.values(), self.rows.values(), strict=True)]
        ).square().sum(0).sqrt()  # fmt: skip
        self.finite = torch.stack([rows.reshape(len(rows), -1).isfinite().all(1) for rows in self.rows.values()]).all(0)

    def gradient(self, loss):
        """Name -> gradient of a loss, zeros where it does not depend on the parameter."""
        for parameter in self.parameters.values():
            parameter.grad = None
        if loss.requires_grad:
            loss.backward()  # not autograd.grad, which reentrant checkpoints refuse
        found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in self.parameters.items()}
        for parameter in self.parameters.values():
            parameter.grad = None
        return found

    def repeated(self, value):
        """A batch of one sample, twice."""
        if isinstance(value, tuple):
            return tuple(self.repeated(v) for v in value)
        if isinstance(value, dict):
            return {n: self.repeated(v) for n, v in value.items()}
        return torch.cat([value, value], 0 if value.ndim != 3 or len(value) == 1 else 1)

    def flat(self, names=None):
        """[B, N] of some parameters; real numbers, complex ones as two."""
        chosen = [self.rows[n] for n in (self.rows if names is None else names)]
        return torch.cat([real(rows).reshape(len(rows), -1) for rows in chosen], 1)


def real(tensor):
    """Complex numbers as pairs."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def largest(rows):
    """The largest magnitude in each row among its finite entries, [B]."""
    rows = real(rows).reshape(len(rows), -1)
    return rows.abs().nan_to_num(0, 0, 0).amax(1)


def norms_of(flat):
    """Euclidean norms that do not overflow."""
    scale = flat.abs().amax(1).clamp(min=1e-300)
    return (flat / scale[:, None]).square().sum(1).sqrt() * scale


def differs(ours, theirs, tolerance):
    """Whether results differ by more than the tolerance, or in where they are finite; says how."""
    ours, theirs = real(ours.detach()), real(theirs)
    if ours.shape != theirs.shape:
        return f"shape {tuple(ours.shape)} instead of {tuple(theirs.shape)}"
    if ours.dtype != theirs.dtype:
        return f"dtype {ours.dtype} instead of {theirs.dtype}"
    wrong = ours.isfinite() != theirs.isfinite()
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        return f"{ours[at].item():.3g} instead of {theirs[at].item():.3g} at {list(at)}, {int(wrong.sum())} such"
    error = (ours - theirs).nan_to_num(0, 0, 0).abs()
    excess = error - tolerance.reshape(tolerance.shape + (1,) * (error.ndim - tolerance.ndim))
    if excess.numel() and excess.max() > 0:
        at = tuple((excess == excess.max()).nonzero()[0].tolist())
        return f"{ours[at].item():.12g} instead of {theirs[at].item():.12g} at {list(at)}"
    return ""


def ways(r, drawn):
    """Draws ways to ask: options of `per_sample`."""
    chunk = r.randint(1, max(1, drawn.batch))
    first, *others = (
        {"hold": "factors"}, {"hold": "graph"}, {"chunk_size": chunk}, {"chunk_size": chunk, "hold": "graph"},
        {"backend": "hooks"}, {"backend": "vmap"}, {"backend": "auto"}, {"check": False}, {"grad": True},
    )  # fmt: skip
    return [first, {"hold": "graph"}, *r.sample(others, 2)]


def may_refuse(error, way, drawn):
    """Whether a refusal is documented: other backends, and chunks of what is not cut along dimension 0."""
    if way.get("backend") in ("hooks", "vmap") and isinstance(error, persample.PerSampleError):
        return True
    checkpointed = any("checkpointed" in family for family in drawn.families)
    if way.get("hold") == "graph" and checkpointed and isinstance(error, persample.UnsupportedError):
        return True
    if "use_reentrant=False" in str(error) and "checkpointed" in drawn.families:  # hides parameters from every graph
        return isinstance(error, persample.UnsupportedError)
    return "chunk_size" in way and drawn.axis != 0 and isinstance(error, (persample.PerSampleError, ValueError))


def foreign(error):
    """Whether an exception is not the library's own: persample did not raise it by a statement of its own."""
    if isinstance(error, persample.PerSampleError):
        return False
    last = traceback.extract_tb(error.__traceback__)[-1]
    ours = "/persample/" in last.filename and (last.line or "").startswith("raise")
    return not (ours and isinstance(error, (ValueError, TypeError, RuntimeError)))


def evaluate(drawn, truth, way):
    """Returns the finding for one way: every reduction against the loop."""
    name = ",".join(f"{k}={v}" for k, v in way.items())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            if "grad" in way:
                faults = jacobian(truth, drawn.losses(drawn.inputs, drawn.targets))
            else:
                psg = persample.per_sample(drawn.model, drawn.loss_fn, drawn.inputs, drawn.targets, **way)
                faults = compare(psg, truth, drawn, random.Random(drawn.seed + 1))
    except Exception as error:
        said = f"{type(error).__name__}: {str(error)[:300]}"
        if foreign(error):
            last = traceback.extract_tb(error.__traceback__)[-1]
            return Finding("foreign", drawn.seed, name, f"{said} ({last.filename.split('/')[-1]}:{last.lineno})")
        return Finding("refused" if may_refuse(error, way, drawn) else "needless", drawn.seed, name, said)
    if faults:
        return Finding("wrong", drawn.seed, name, "; ".join(faults[:3]))
    return Finding("exact", drawn.seed, name)


def jacobian(truth, losses):
    """Returns what is wrong with `persample.grad`.

    Its rows are those of one loss after another on the graph of the batch, in which a NaN may reach other samples' rows
    (0 · NaN within one operation): there they may be as torch gives them, or as the sample alone does.
    """
    wanted = list(truth.parameters.values())
    rows = persample.grad(losses, wanted)
    faults = []
    for (name, theirs), ours in zip(truth.rows.items(), rows, strict=True):
        said = differs(ours, theirs, truth.tolerance[name])
        if said and not ours.isfinite().all():
            alone = [
                torch.autograd.grad(
                    loss, truth.parameters[name], retain_graph=True, allow_unused=True, materialize_grads=True
                )[0]
                for loss in losses
            ]
            spoilt = ~torch.stack(alone).isfinite() & ~ours.isfinite()
            said = differs(ours.masked_fill(spoilt, 0), theirs.masked_fill(spoilt, 0), truth.tolerance[name])
        faults += [f"grad {name}: {said}"] if said else []
    return faults


def compare(psg, truth, drawn, r):
    """Returns what is wrong with the reductions, a list of sentences."""
    faults = []

    def expect(what, ours, theirs, tolerance):
        said = differs(ours, theirs, tolerance)
        if said:
            faults.append(f"{what}: {said}")

    expect("losses", psg.losses, truth.losses, 1e-9 * truth.losses.abs().nan_to_num(0, 0, 0) + 1e-13)
    if set(truth.rows) != set(psg.grads()):
        return [f"names {sorted(psg.grads())}"]
    for name, rows in psg.grads().items():
        expect(f"grads {name}", rows, truth.rows[name], truth.tolerance[name])
    flat, spread = truth.flat(), truth.spread
    norms = norms_of(flat)
    squares = flat.square().sum(1)  # may overflow
    clear = (squares < 1e300) | ~truth.finite
    expect("norms", psg.norms()[clear], norms[clear], spread[clear] + 1e-9 * norms[clear].nan_to_num(0, 0, 0))
    for per, groups in (("param", {n: [n] for n in truth.rows}), ("layer", psg.layers)):
        for key, ours in psg.norms(per=per).items():
            part = norms_of(truth.flat(groups[key]))
            expect(
                f"norms {per} {key}", ours[clear], part[clear], spread[clear] + 1e-9 * part[clear].nan_to_num(0, 0, 0)
            )
    if bool(clear.all()):

        def expect_gram(what, ours, part):
            sure = norms_of(part.nan_to_num(0, 0, 0))
            room = sure[:, None] * spread
            expect(what, ours, part @ part.T, room + room.T + spread[:, None] * spread + 1e-9 * sure[:, None] * sure)

        name, layer = r.choice(list(truth.rows)), r.choice(list(psg.layers))
        expect_gram("gram", psg.gram(), flat)
        expect_gram("gram other", psg.gram(other=psg), flat)
        expect_gram(f"gram param {name}", psg.gram(per="param")[name], truth.flat([name]))
        expect_gram(f"gram layer {layer}", psg.gram(per="layer")[layer], truth.flat(psg.layers[layer]))
    c = torch.randn(drawn.batch, dtype=truth.losses.dtype)
    for name, ours in psg.weighted_sum(c).items():
        expect(f"weighted_sum {name}", ours, total(truth.rows[name], c), over(truth, name, c))
    vectors = {n: torch.randn_like(p) for n, p in truth.parameters.items()}
    want = flat @ torch.cat([real(v).flatten() for v in vectors.values()])
    length = norms_of(torch.cat([real(v).flatten() for v in vectors.values()])[None])[0]
    expect("dot", psg.dot(vectors), want, length * (spread + 1e-10 * norms.nan_to_num(0, 0, 0)))
    clip(psg, truth, norms, clear, expect, faults)
    return faults


def total(rows, c):
    """Σ_b c_b g_b; what is not finite stays so."""
    return (rows * c.reshape(-1, *[1] * (rows.ndim - 1)).to(rows.dtype)).sum(0)


def over(truth, name, c):
    """What rounding may explain of a weighted sum, one number."""
    c = c.abs().nan_to_num(0, 0, 0)
    return (c * (truth.tolerance[name] + 1e-12 * largest(truth.rows[name]))).sum()


def clip(psg, truth, norms, clear, expect, faults):
    """Compares the clipped sum, with the median norm for a bound."""
    known = norms[norms.isfinite() & (norms > 0)]
    bound = known.median().item() if len(known) else 1.0
    ours = psg.clipped_sum(bound)
    if not bool(truth.finite.all()):  # a sample whose norm is not finite must be heard
        if all(bool(t.isfinite().all()) for t in ours.values()):
            faults.append("clipped_sum: finite, though a sample is not")
        return
    if not bool(clear.all()):
        return
    c = (bound / norms.clamp(min=1e-300)).clamp(max=1)
    for name, value in ours.items():
        loose = 2 * truth.spread / norms.clamp(min=1e-300)  # the norms' own part
        slack = (c * loose.clamp(max=1) * largest(truth.rows[name])).sum()
        expect(f"clipped_sum {name}", value, total(truth.rows[name], c), over(truth, name, c) + slack)


def findings(draw, seeds):
    """Yields a finding for every way of every seed."""
    for seed in seeds:
        drawn = draw(seed)
        truth = Truth(drawn)
        room = 1e-9 * truth.losses.abs().nan_to_num(0, 0, 0) + 1e-12
        alone = differs(drawn.losses(drawn.inputs, drawn.targets).detach(), truth.losses, room)
        if alone:
            yield Finding("coupled", seed, "", alone)
            continue
        for way in ways(random.Random(seed), drawn):
            yield evaluate(drawn, truth, way)
