"""What NGD and FNGD answer in each backward pass: the natural-gradient direction of a layer, or of the network.

Symbols: `fngd.natural.solve.directions`. A policy in the sense of `persample.reweight`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fngd.natural.adaptive_damping import Model
from fngd.natural.diagnostics import Recorder, Solve
from fngd.natural.sharing.table import CoefficientTable
from fngd.natural.solve.accumulation import Passes, joined_gradients
from fngd.natural.solve.directions import Pair, coefficient_factors, dot, relative_damping, scaled, squared_lengths
from fngd.natural.solve.history import History
from fngd.natural.solve.meeting import Joint, Meeting
from fngd.natural.solve.method import Method
from fngd.natural.true_fisher.drawn import Drawn
from fngd.optim.discarded_passes import FirstPass, UnderWay, accumulates, nothing_left
from fngd.optim.distributed import Exchange
from fngd.optim.groups import first_parameter
from fngd.optim.guards import warn_of_skipped
from fngd.optim.layers import members
from fngd.optim.loss_scale import FirstScale
from persample import LayerGrads
from persample.reweighting import Reweighting

NETWORK = "(network)"
"""The key of coefficients that hold for all layers."""


class Policy:
    """Answers by layer; keeps what the step wants to know about the backward passes since the last one.

    Arguments:
        method: the options.
        table: shared coefficients; None computes them in every pass.
        chosen: whether a layer, by path, is to be preconditioned.
        groups: returns the parameter groups.
        scaler: the GradScaler of the loop, or None.
        process_group: of gram="global".
        diagnostics: whether to record figures.
    """

    handle: Reweighting

    def __init__(
        self,
        method: Method,
        table: CoefficientTable | None,
        *,
        chosen: Callable[[str], bool],
        groups: Callable[[], list[dict[str, Any]]],
        scaler: Any,
        process_group: Any,
        diagnostics: bool,
    ) -> None:
        self._method, self._table, self._chosen, self._scaler = method, table, chosen, scaler
        self.exchange = Exchange(process_group)
        self.meeting = Meeting(self.exchange, trains=self._trains, chosen=chosen, place=self._place)
        self.recorder = Recorder() if diagnostics else None
        self.damping_factor = 1.0
        self.measuring = False  # whether to keep quadratic models of the loss
        self.models: dict[str, Model] = {}
        self.inner: dict[str, list[Tensor]] = {}  # ⟨d, g⟩ of each backward pass since the last step
        self.met_batch = False
        self._under_way = UnderWay()
        self._first, self._groups, self._warned = FirstPass(), groups, False
        if table is not None:
            table.restarts = self._restarts
            if method.gram == "global":
                table.agree = self.meeting.total
        self._first_scale: FirstScale | None = FirstScale(method.reduction, scaler)
        self._drawing = False
        self._passes, self._drawn = Passes(), Drawn(method)
        self.history: History | None = None
        self._reused: dict[str, bool] = {}  # with accumulate="joint": whether this step's coefficients are stored ones

    def look_at_scale(self, name: str) -> None:
        """In the first step of the optimiser of that name: warns where the loss has another scale than it was told."""
        if self._first_scale is not None:
            self._first_scale.look(self._groups(), name)
            self._first_scale = None

    def end_batch(self) -> None:
        """Ends a batch: a step was made, or skipped."""
        if self.history is not None:
            self.history.commit()
        self.clear()
        self._under_way.clear()
        if self._table is not None:
            self._table.advance()

    def clear(self) -> None:
        """Forgets the backward passes since the last step."""
        self.met_batch = False
        for kept in (self.inner, self.models, self._passes, self._drawn, self._reused):
            kept.clear()
        if self.history is not None:
            self.history.forget()

    def _begin(self, layer: str) -> None:
        self.met_batch = True
        self._first.begin(self._weight(layer))

    def _restarts(self, layer: str) -> bool:
        """Whether a layer's pass is the first one after all: the gradients of those before it were thrown away."""
        if not self._first.discarded(self._weight(layer), self._groups()):
            return False
        self._restart()
        self._begin(layer)
        return True

    def _restart(self) -> None:
        self.clear()
        if self._table is not None:
            self._table.restart()

    def end_unstepped(self) -> bool:
        """Forgets passes that no step follows; returns whether they were a batch's.

        They were none if their gradients are gone, or if one has raised: the batch is then to be run again.
        """
        if self._under_way or nothing_left(self._groups()):
            self._restart()
            self._under_way.clear()
            return False
        if self._table is not None and not self._warned:
            self._warned = warn_of_skipped(self._groups())
        return True

    def _trains(self) -> bool:
        return any(accumulates(param) for group in self._groups() for param in group["params"])

    def _place(self) -> tuple[torch.device, bool]:
        param = first_parameter(self._groups())
        return param.device, hasattr(param, "to_local")

    def _weight(self, layer: str) -> Tensor | None:
        weight = members(self.handle, layer)[0]
        return None if weight is None else weight.param

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Within it, backward passes are those of sampled labels: they are kept, and give no gradients."""
        self._drawing = True
        try:
            yield
        finally:
            self._drawing = False

    def loss_scale(self) -> Tensor | None:
        """Returns the GradScaler's scale; None where there is none, or it is switched off (enabled=False)."""
        if self._scaler is None or not self._scaler.is_enabled():
            return None
        return self._scaler._get_scale_async()  # the public get_scale() waits for the device

    def known(self, layer: str, batch: int, device: torch.device) -> Tensor | None:
        """Returns stored factors, where they are all that the step needs."""
        table = self._table
        if table is None or self._drawing or self.measuring:
            return None
        self._under_way.hear()
        if self.met_batch:
            ready = table.ready(layer, batch)
            if ready is not None:
                return ready
        if self._method.accumulate == "joint" or self._compares():
            return None
        if not table.has(layer) or table.probing(layer) or not self._chosen(layer):
            return None
        factors = table.lookup(layer, batch, device)
        if not self.met_batch:
            self._begin(layer)
        table.make_ready(self._chosen)
        return factors

    def of_layer(self, layer: str, grads: LayerGrads) -> Any:
        """The policy where layers are asked one by one."""
        return self.of_all({layer: grads}).get(layer)

    def of_all(self, grads: dict[str, LayerGrads]) -> dict[str, Any]:
        """The policy where layers are asked together."""
        method = self._method
        self._under_way.hear()
        if grads and not self.met_batch:
            self._begin(next(iter(grads)))
        elif grads:
            self._restarts(next(iter(grads)))
        grads = {path: each for path, each in grads.items() if self._chosen(path)}
        if not grads or (method.gram != "global" and not any(each.batch_size for each in grads.values())):
            return {}  # nothing to do, or no samples
        # One layer alone: a function, too, that was not known when the forward pass began. The others come without it.
        key = NETWORK if method.gram == "network" and len(grads) > 1 else next(iter(grads))
        sizes = {path: each.batch_size for path, each in grads.items()}
        batch = next(iter(sizes.values()))
        if len(set(sizes.values())) > 1:
            raise ValueError(f"gram='network' needs the same samples in every layer, but batches are {sizes}")
        if self._drawing:
            self._drawn.keep(key, batch, grads, self.handle)
            return dict.fromkeys(grads, (None, None))
        if self._first_scale is not None and (method.needs_scale or self.measuring):
            self._first_scale.see(next(iter(grads.values())), self._groups())
        factors: Tensor | None = None
        solve: Solve | None
        if method.fisher == "true":
            pairs, solve, curvature = self._drawn.directions(
                key, batch, grads, self._passes, loss_scale=self.loss_scale(), **self._damping()
            )
        elif self.history is not None:
            scale = self.loss_scale()
            pairs, solve = self.history.directions(key, batch, grads, self.handle, loss_scale=scale, **self._damping())
            curvature = grads
        else:
            factors, solve, grads = self._factors(key, batch, grads)
            if not self._compares():
                if method.accumulate == "separate" or self._reused[key]:
                    return dict.fromkeys(grads, factors)
                return self._answer({path: each.weighted_sum(factors) for path, each in grads.items()})
            ones = torch.ones_like(factors)
            pairs = {path: (each.weighted_sum(factors), each.weighted_sum(ones)) for path, each in grads.items()}
            curvature = grads
        if self.measuring and solve is not None:
            self._keep_model(key, {path: plain for path, (_, plain) in pairs.items()}, curvature, solve)
        return self._answer(self._finished(pairs, factors, solve))

    def _compares(self) -> bool:
        """Whether the direction is to be formed beside the plain gradient."""
        method = self._method
        return method.scale == "graft" or method.kl_clip is not None or self.recorder is not None or self.measuring

    def _answer(self, directions: dict[str, Pair]) -> dict[str, Any]:
        if self._method.accumulate == "separate":
            return dict(directions)
        return {path: self._passes.difference(path, direction) for path, direction in directions.items()}

    def _factors(
        self, key: str, batch: int, grads: dict[str, LayerGrads]
    ) -> tuple[Tensor, Solve | None, dict[str, LayerGrads]]:
        """Returns the factors, what is known of their Gram matrix, and the gradients that they are for."""
        table, joint = self._table, self._method.accumulate == "joint"
        stored = None if table is None else table.lookup(key, batch, next(iter(grads.values())).device)
        if joint and self._reused.setdefault(key, stored is not None) != (stored is not None):
            raise ValueError(
                f"some backward passes of this step have stored coefficients at '{key}' and others have not, but with "
                "accumulate='joint' they are those of the whole step. Make the same number of backward passes in "
                "each step of every epoch, or use accumulate='separate'"
            )
        if stored is not None:
            assert table is not None, "it has just answered"
            if table.probing(key):
                fresh = self._solve(grads, self._right_hand_side(batch), [batch], probing=True)[0]
                table.probe(stored, fresh)
            if joint and self._compares():
                grads = joined_gradients(self._passes, key, batch, grads, self.handle)
                stored = self._passes.vector(key, stored)
            return stored, None, grads
        if table is not None:
            table.look_for_more(key)
        rhs = self._right_hand_side(batch)
        sizes = [batch]
        if joint:
            grads = joined_gradients(self._passes, key, batch, grads, self.handle)
            rhs = None if rhs is None else self._passes.vector(key, rhs)
            sizes = self._passes.sizes[key]
        factors, good, solve = self._solve(grads, rhs, sizes)
        return factors if table is None else table.store(key, factors, good, sizes), solve, grads

    def _damping(self) -> dict[str, float | None]:
        given = {"alpha": self._method.alpha, "damping": self._method.damping}
        return {name: None if value is None else value * self.damping_factor for name, value in given.items()}

    def _solve(
        self, grads: dict[str, LayerGrads], rhs: Tensor | None, passes: list[int], *, probing: bool = False
    ) -> tuple[Tensor, Tensor, Solve]:
        method = self._method
        batch, mean = sum(passes), method.reduction == "mean"
        sizes, mine, share = [batch], slice(None), 1.0
        joint: Joint | None = None
        if method.gram == "global" and self.exchange.world > 1:
            joint = self.meeting.ask(next(iter(grads)), rhs, probing=probing)
        if joint is not None:
            gram, sizes, mine, rhs = joint.gram, joint.sizes, joint.mine, joint.rhs
            share = len(sizes) * batch / sum(sizes) if mean else 1.0  # DDP and FSDP average means of batches
        else:
            one, *others = (each.gram() for each in grads.values())
            gram = sum(others, one)
        if mean:  # the samples' own gradients are B times their shares, B the size of the batch they were in
            own = torch.cat([gram.new_full((size,), size) for size in sizes])
            gram, rhs = gram * (own[:, None] * own), None if rhs is None else rhs * own**2
        scale = self.loss_scale()
        if scale is not None:
            gram = gram / scale**2
            rhs = None if rhs is None else rhs / scale**2
        damping = self._damping()
        factors, good = coefficient_factors(gram, scale=method.solved_scale, reduction="sum", rhs=rhs, **damping)
        return factors[mine] * share, good, Solve(gram, **damping)

    def _right_hand_side(self, batch: int) -> Tensor | None:
        """Of each sample; None for 1."""
        if self._method.fisher != "improved":
            return None
        return squared_lengths(self.handle.output_grad, self._method.output_axis, batch)

    def _keep_model(self, key: str, plain: dict[str, Pair], curvature: dict[str, LayerGrads], solve: Solve) -> None:
        """Keeps the quadratic model of the loss until the step is known."""
        method = self._method
        if key in self.models and method.accumulate == "separate":
            raise ValueError(
                "adapt_damping measures the step of one backward pass, and this is the second since the last step. "
                "With gradient accumulation give accumulate='joint'"
            )
        scale = self.loss_scale()
        unit = torch.ones((), device=solve.gram.device) if scale is None else 1 / scale
        batch = solve.gram.shape[-1]
        own = batch if method.reduction == "mean" and method.fisher != "true" else 1
        self.models[key] = Model(
            plain={path: scaled(pair, unit) for path, pair in plain.items()},
            grads=curvature,
            multiple=own * unit,
            damping=relative_damping(solve.gram, solve.alpha, solve.damping),
            weight=1.0 if method.reduction == "mean" else float(batch),
        )

    def _finished(
        self, pairs: dict[str, tuple[Pair, Pair]], factors: Tensor | None, solve: Solve | None
    ) -> dict[str, Pair]:
        """Returns the directions, grafted if that is wanted; notes what the KL clip and diagnostics want to know."""
        graft = self._method.scale == "graft"
        products = {path: (dot(d, d), dot(d, g), dot(g, g)) for path, (d, g) in pairs.items()}
        ratio = torch.ones_like(next(iter(products.values()))[0])
        if graft:  # the layer, or with gram="network" all of them together
            dd, gg = (torch.stack([each[i] for each in products.values()]).sum() for i in (0, 2))
            ratio = torch.where(dd > 0, (gg / torch.where(dd > 0, dd, 1)).sqrt(), 1)
        scale = self.loss_scale()
        for path, (dd, dg, gg) in products.items():
            true = ratio * dg if scale is None else ratio * dg / scale**2
            if self._method.kl_clip is not None:
                if self._method.accumulate == "joint":
                    self.inner[path] = []  # d and g are those of all passes
                self.inner.setdefault(path, []).append(true)
            if self.recorder is not None:
                used = None if factors is None else factors * ratio
                self.recorder.add(path, used, solve, ratio**2 * dd, ratio * dg, gg)
        return {path: scaled(d, ratio) if graft else d for path, (d, _) in pairs.items()}
