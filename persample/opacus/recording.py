"""Forward and backward passes of a model inside Opacus: what arrives at its outputs becomes per-sample gradients.

    model ─▶ f ─▶ `_Boundary` ─▶ criterion ─▶ loss          the graph of the model ends at the boundary
                      ▲
    v = ∂loss/∂f ─────┘  ℓ_b = n ⟨v_b, f_b⟩, a loss of each sample with the gradient of its own ─▶ capture

n is the size of the batch where the loss is a mean over it, else 1. The model's own graph is read by the capture, and
by nothing else: no gradient of the batch is formed. In Opacus' ghost form a second backward pass arrives with c_b v_b,
and gets Σ_b c_b g_b from the factors of the first.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from persample.backends.outputs import captured_by
from persample.blocks.sums import add
from persample.capture.analysis import Reading, find, read
from persample.capture.plans import plans_of
from persample.capture.replay import MISSES, ModelState, mode_of, replayable
from persample.capture.types import Capture, Problem
from persample.errors import CheckError, PerSampleError
from persample.graph.batch_size import batch_shape
from persample.graph.calls import outside
from persample.graph.provenance import Provenance, tensors_of
from persample.result.per_sample_grads import PerSampleGrads

ACCUMULATED = (
    "a second backward pass has met gradients that no step has used. Poisson sampling allows for one a step: call "
    "optimizer.step() and optimizer.zero_grad() after each, or take Opacus' BatchMemoryManager"
)

CALLERS = 8
"""Frames up to Opacus' loss; there are more than one where calls are checked."""
CLIPPED = 1e-2
"""Part of a gradient by which Opacus' clipped one may differ from ours, in the precision of outputs."""


class Recorder:
    """Stands for the forward pass of Opacus' module; remembers passes until gradients of their outputs have come."""

    def __init__(self, wrapper: Any, *, output_axis: int | None, check: bool) -> None:
        self.wrapper, self.output_axis, self.check = wrapper, output_axis, check
        self.ghost = hasattr(wrapper, "max_grad_norm")
        self.names = [name for name, p in wrapper._module.named_parameters() if p.requires_grad]
        """Of the parameters that are trained."""
        self.axes: dict[tuple[int, int], int] = {}
        """Which axis counts samples, by place among the outputs and their axes, as unequal lengths have told."""
        self.begin()

    def begin(self) -> None:
        """Forgets passes: those whose backward pass is waited for, and those that the present one has met."""
        self.waiting: WeakSet[_Pass] = WeakSet()
        self.met: list[_Pass] = []

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Those that are trained, by name."""
        there = dict(self.wrapper._module.named_parameters())
        return {name: there[name] for name in self.names}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "waiting": None, "met": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.begin()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs of the model, recorded in training mode where a graph is."""
        wrapper = self.wrapper
        if not (wrapper.training and wrapper.hooks_enabled and torch.is_grad_enabled()):
            return wrapper._module(*args, **kwargs)
        trained = [name for name, p in wrapper._module.named_parameters() if p.requires_grad]
        if trained != self.names:
            changed = sorted({*trained} ^ {*self.names})[:5]
            raise PerSampleError(
                f"parameters were frozen or freed after GradSampleModule was made: {changed}. Which are trained is "
                "settled then; make a new one"
            )
        this = _Pass(self, args, kwargs)
        if not this.outputs:
            return this.returned
        outputs = _Boundary.apply(this, *this.inputs, *this.problem.parameters.values())
        self.waiting.add(this)
        return this.with_outputs(outputs)

    def clipping_coef(self) -> Tensor:
        """Opacus' own factors, once the bound is known to be the one that the noise is made for.

        `make_private` hands its bound to the optimizer, and not to a module that is there already; the two meet where
        Opacus' loss, which has both, asks for the factors. Nothing is to be found elsewhere, so it is looked for there.

        Raises:
            ValueError: two bounds.
        """
        wrapper, frame = self.wrapper, inspect.currentframe()
        for _ in range(CALLERS):
            frame = None if frame is None else frame.f_back
            if frame is None or getattr(frame.f_locals.get("self"), "module", None) is not wrapper:
                continue
            ours, noise = self.wrapper.max_grad_norm, frame.f_locals["self"].optimizer.max_grad_norm
            if noise != ours:
                raise ValueError(
                    f"GradSampleModule clips to max_grad_norm={ours}, and the noise is made for {noise}: the step "
                    "would not be as private as the accountant says. Give both the same"
                )
        factors: Tensor = type(wrapper).get_clipping_coef(wrapper)
        return factors

    def arrived(self, this: _Pass) -> None:
        """Takes a pass that is captured; where it is the last one, hands over what Opacus expects after a backward."""
        self.waiting.discard(this)
        self.met.append(this)
        if self.waiting:
            return
        met, self.met = self.met, []
        parameters: dict[str, Any] = dict(this.problem.parameters)
        found = PerSampleGrads(_together([each.capture for each in met]), parameters, "outputs")
        if self.ghost:
            for name, norm in found._norms("param").items():
                parameters[name]._norm_sample = norm
            for each in met:
                each.found = found if len(met) == 1 else PerSampleGrads(each.capture, parameters, "outputs")
                each.found._apart, each.capture = found._apart, None
            return
        for name, rows in found.grads().items():
            before = getattr(parameters[name], "grad_sample", None)
            if before is not None and not self.wrapper.grad_accumulation_allowed:
                raise ValueError(ACCUMULATED)
            several = before if isinstance(before, list) else [before]
            parameters[name].grad_sample = rows if before is None else [*several, rows]
        for each in met:
            each.capture = None


def _together(captures: Sequence[Capture]) -> Capture:
    """One capture of several forward passes, on views of the same samples."""
    first, *others = captures
    if any(len(other.losses) != len(first.losses) for other in others):
        raise PerSampleError(
            f"forward passes with {[len(each.losses) for each in captures]} samples met in one backward pass: which of "
            "them belong together is not known. Call the model on as many samples each time, or once on all"
        )
    uses = {name: tuple(use for each in captures for use in each.uses[name]) for name in first.uses}
    return Capture(first.losses, uses, first.notes)


class _Pass:
    """One forward pass of the model, and what came of it."""

    def __init__(self, recorder: Recorder, args: tuple, kwargs: dict) -> None:
        self.recorder, model = recorder, recorder.wrapper._module
        self.problem = Problem(model, _no_loss, (args, kwargs), None, recorder.parameters, check=recorder.check)
        self.plans, self.mode = plans_of(model), mode_of(self.problem)
        trusted = self.mode in self.plans.trust.modes and not _autocast()
        self.before = ModelState(self.problem, values=not trusted and self.plans.trust.misses < MISSES)
        self.random = torch.get_rng_state() if trusted else None
        """Of a pass that was not watched: it runs again where its graph is a new one."""
        returned, self.provenance = self.run(watch=not trusted)
        self.left = self.provenance is not None and (self.provenance.wrote or self.before.written())
        self.returned, self.form = tree_flatten(returned)
        self.places = [k for k, each in enumerate(self.returned) if isinstance(each, Tensor) and each.requires_grad]
        self.outputs: list[Tensor] = [self.returned[k] for k in self.places]
        self.axes, self.batch = self._axes(args, kwargs) if self.outputs else ([], 0)
        self.inputs = [each for each in tensors_of((args, kwargs)) if each.requires_grad]
        self.returned = self.returned if self.outputs else returned
        self.capture: Any = None
        self.found: PerSampleGrads | None = None
        """What the capture holds, for the second backward pass of Opacus' ghost form."""
        self.arrived: list[Tensor | None] = []

    def run(self, *, watch: bool) -> tuple[Any, Provenance | None]:
        """What the model returns, and what its operations have read."""
        model, (args, kwargs) = self.problem.model, self.problem.inputs
        if not watch:
            return model(*args, **kwargs), None
        provenance = Provenance(model)
        provenance.follow((args, kwargs))
        with provenance.named(model), provenance:
            return model(*args, **kwargs), provenance

    def with_outputs(self, outputs: Sequence[Tensor]) -> Any:
        """What the model has returned, with others for its outputs."""
        leaves = list(self.returned)
        for k, output in zip(self.places, outputs, strict=True):
            leaves[k] = output
        self.returned = []
        return tree_unflatten(leaves, self.form)

    def backward(self, vs: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Takes the gradients at the outputs; returns those of the inputs and the parameters."""
        recorder, wrapper = self.recorder, self.recorder.wrapper
        if recorder.ghost and not wrapper.hooks_enabled:
            return self._weighted(vs)
        if not self.outputs:
            raise RuntimeError("this forward pass has been through a backward pass before: run the model again")
        scale = self.batch if wrapper.loss_reduction == "mean" else 1
        self.arrived = [None if v is None else v.detach() * scale for v in vs]
        # On a CPU in another thread: within a backward pass nodes are called one thread each. On an accelerator the
        # thread of the device is the one that waits here, so that no other could run a backward pass.
        alone = all(each.is_cpu for each in (*self.outputs, *self.problem.parameters.values()))
        of_inputs = outside(self._capture) if alone else self._capture()
        return [None if v is None else v / scale for v in of_inputs] + [None] * len(self.problem.parameters)

    def _capture(self) -> list[Tensor | None]:
        of_inputs: list[Tensor | None] = []
        with torch.enable_grad():
            if self.inputs:
                pairs = [(f, v) for f, v in zip(self.outputs, self.arrived, strict=True) if v is not None]
                ends, gradients = zip(*pairs, strict=True)
                of_inputs += torch.autograd.grad(ends, self.inputs, gradients, retain_graph=True, allow_unused=True)
            reading = self._reading()
            self.capture = self._captured(reading)
        self.outputs, self.provenance = [], None
        with torch.no_grad():
            self.recorder.arrived(self)
        return of_inputs

    def _reading(self) -> Reading:
        losses, problem, plans = self._losses(self.outputs), self.problem, self.plans
        followed = find(losses, problem.parameters, plans, "error").followed()
        if followed is None and self.provenance is None:
            plans.trust.missed()
            losses = self._again()
        reading = followed or read(losses, problem.parameters, provenance=self.provenance, plans=plans, keep=False)
        trust = plans.trust
        if reading.known is None and trust.misses < MISSES and not self.left and replayable(problem):
            trust.modes.add(self.mode)
        return reading

    def _captured(self, reading: Reading) -> Capture:
        parameters, check = self.problem.parameters, self.recorder.check
        try:
            return captured_by(reading, parameters, self.plans, "error", check=check)
        except CheckError as error:
            if self.random is None:
                raise
            missed = error
        reading = read(self._again(), parameters, provenance=self.provenance)
        try:
            return captured_by(reading, parameters, None, "error", check=check)
        except CheckError:
            raise missed from None

    def _again(self) -> Tensor:
        """The losses of a second run, watched, from the random numbers and attributes of the first."""
        self.before.restore()
        with torch.random.fork_rng(devices=[]):
            if self.random is not None:
                torch.set_rng_state(self.random)
            returned, self.provenance = self.run(watch=True)
        leaves = tree_flatten(returned)[0]
        return self._losses([leaves[k] for k in self.places])

    def _losses(self, outputs: Sequence[Tensor]) -> Tensor:
        """ℓ_b = ⟨v_b, f_b⟩, [B]."""
        parts = []
        for output, axis, v in zip(outputs, self.axes, self.arrived, strict=True):
            if v is not None:
                product = (output * v).movedim(axis, 0)
                parts.append(product.reshape(self.batch, product[:1].numel()).sum(1))
        return add(parts)

    def _weighted(self, vs: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients of a loss with weights: those by which Opacus clips, as a look at v confirms."""
        if self.found is None:
            raise RuntimeError("Opacus' second backward pass came without a first one")
        recorder = self.recorder
        c = recorder.wrapper.get_clipping_coef()
        for v, before, axis in zip(vs, self.arrived, self.axes, strict=True):
            if v is None and before is None:
                continue
            if v is not None and before is not None:
                each = before * c.to(before).view([-1 if k == axis else 1 for k in range(before.ndim)])
                if torch.allclose(v, each, CLIPPED, equal_nan=True):
                    continue
            raise RuntimeError("the second backward pass is not the first one with its samples clipped")
        parameters = self.problem.parameters
        sums = self.found.weighted_sum(c)
        self.found = None
        return [None] * len(self.inputs) + [sums[name].to(parameter) for name, parameter in parameters.items()]

    def _axes(self, args: tuple, kwargs: dict) -> tuple[list[int], int]:
        """Of each output the axis that counts samples, and how many there are."""
        recorder, shape = self.recorder, batch_shape(args, kwargs)
        first = recorder.wrapper.batch_first
        if recorder.output_axis is not None:
            axes = [recorder.output_axis] * len(self.outputs)
            return axes, self.outputs[0].shape[recorder.output_axis]
        if shape is None or (not first and len(shape) < 2):
            raise PerSampleError("no tensor among the inputs says how many samples there are; give output_axis=")
        batch = shape[0 if first else 1]
        return [self._axis(k, output, batch, first) for k, output in enumerate(self.outputs)], batch

    def _axis(self, place: int, output: Tensor, batch: int, first: bool) -> int:
        known = self.recorder.axes
        where = [axis for axis, size in enumerate(output.shape) if size == batch]
        if len(where) == 1:
            return known.setdefault((place, output.ndim), where[0])
        if known.get((place, output.ndim)) in where:
            return known[place, output.ndim]
        if first and 0 in where:
            return 0
        raise PerSampleError(
            f"output {place} of the model, {tuple(output.shape)}, has {len(where)} axes of {batch} samples"
            + (
                "; give output_axis="
                if where
                else ". Return what is of each sample, and reduce it outside of the model"
            )
        )


class _Boundary(torch.autograd.Function):
    """The outputs, cut off from their graph; gradients that arrive go to the pass."""

    @staticmethod
    def forward(ctx: Any, this: _Pass, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.this = this
        ctx.set_materialize_grads(False)
        return tuple(output.detach() for output in this.outputs)

    @staticmethod
    def backward(ctx: Any, *vs: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *ctx.this.backward(vs)


def _autocast() -> bool:
    return any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))


def _no_loss(outputs: Any, targets: Any) -> Tensor:
    raise NotImplementedError("the loss is outside of the model")
