"""A weight that `reweight` reweights: a module's own, or one that a function is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from persample import prepared
from persample.layer_sum import Parameters, layer_sum
from persample.layers import LayerGrads
from persample.taps import Pass, Uses


@dataclass(eq=False)
class Layer:
    """A layer by its path; the state that its calls in training share.

    For a function `module` is None, `source` returns its (weight, bias), which may be parts of parameters, and
    `owners` are the parameters themselves.
    """

    path: str
    module: nn.Module | None
    axis: int | None
    source: Callable[[], Parameters] | None = None
    owners: tuple[Tensor, ...] = ()
    off: list[nn.Parameter] = field(default_factory=list)
    called: bool = False
    shared: str | None = None
    """Why its gradient has no rows, whatever the shapes say; None where it has."""
    _prepared: tuple[Any, Any] = None, None
    _found: bool = False
    """Whether the axis was told by its size, in a backward pass; not by the user, nor by a trial."""
    besides: str = ""
    """What else uses its weight or bias in the first batch, by autograd's names; empty where nothing does."""
    opaque: bool = False
    """Not to be traced by torch.compile: called several times, or in another graph than the model's entry."""

    @property
    def linear(self) -> bool:
        """Whether it is linear, so that any axis but the last may count samples."""
        return self.module is None or isinstance(self.module, nn.Linear)

    def parameters(self) -> list[Any]:
        """[weight, bias or None], or an empty list where the layer is to take the plain gradient."""
        if self.why_plain() is not None:
            return []
        weight, bias = self._own()
        return [weight, bias if bias is not None and bias.requires_grad else None]

    def _own(self) -> Parameters:
        if self.module is None:
            assert self.source is not None, "a function's layer is made with one"
            return self.source()
        return self.module._parameters.get("weight"), self.module._parameters.get("bias")

    def members(self) -> list[Tensor]:
        """The parameters that the layer's gradient belongs to, frozen ones included."""
        return list(self.owners) if self.module is None else [each for each in self._own() if each is not None]

    def why_plain(self) -> str | None:
        """Why the layer takes the plain gradient, None if it does not."""
        if self.shared is not None:
            return self.shared
        own = self._own()[0]
        if own is None or (self.module is not None and not own.is_leaf):
            return "its weight is computed from other parameters (parametrised)"
        if own.is_complex():
            return "its weight is complex"
        if not own.requires_grad and all(own is not parameter for parameter in self.off):
            return "its weight is frozen"
        return None

    def explain(self) -> str:
        """What happens to its gradient, and why."""
        plain = self.why_plain()
        if plain is not None:
            return f"plain: {plain}"
        if not self.called:
            return "plain so far: its forward has not been called (another module may use its weight)"
        axis = "" if self.axis is None else f", samples on axis {self.axis} of its output"
        alone = f", for its calls alone: {self.besides} uses its weight, too" if self.besides else ""
        return f"reweighted{axis}{alone}"

    def switch_off(self) -> None:
        """While the layer's module runs, its parameters need no gradient."""
        if self.off:
            self.switch_on()  # left over from a forward pass that Ctrl-C ended
        self.off = [each for each in self.parameters() if each is not None]
        for parameter in self.off:
            parameter.requires_grad = False

    def switch_on(self) -> None:
        """Ends `switch_off`."""
        for parameter in self.off:
            parameter.requires_grad = True
        self.off = []

    def candidates(self, shape: tuple[int, ...], batch: int) -> list[int]:
        """The axes of an output of that shape that may count samples."""
        if self.module is None or isinstance(self.module, nn.Linear):
            return [axis for axis, size in enumerate(shape[:-1]) if size == batch]
        spatial: Any = self.module.kernel_size
        return [0] if len(shape) == len(spatial) + 2 and shape[0] == batch else []

    def check(self, uses: Uses) -> list[tuple[Tensor, Tensor]]:
        """Returns the uses, emptied, when it is certain which of their axes counts samples."""
        found, uses.found = uses.found, []
        if self.axis is None:
            self.axis, self._found = self._find_axis(tuple(found[-1][1].shape), uses.forward), True
        for _, z in found:
            if self.linear and self.axis > z.dim() - 2:
                raise ValueError(
                    f"layer '{self.path}' has its samples on axis {self.axis}, but a call of it an output of shape "
                    f"{list(z.shape)}, whose last axis counts features. Give all of its calls the same axes, or call "
                    "two layers that share a weight and have biases of their own."
                )
        sizes = {z.shape[self.axis] for _, z in found} if len(found) > 1 else ()
        if len(sizes) > 1:
            raise ValueError(
                f"layer '{self.path}' was called with batches of {sorted(sizes)} samples in one forward; "
                "its calls make one gradient per sample only if each has the same samples. Call the model "
                "once per batch."
            )
        shape, batch = found[-1][1].shape, uses.forward.batch
        if self._found and batch is not None and shape[self.axis] != batch:
            raise ValueError(
                f"layer '{self.path}' had as many rows as samples on axis {self.axis} of its output in an earlier "
                f"batch, but now its output has shape {list(shape)} for {batch} samples: its rows are no samples "
                "(tokens that were selected, a layer called apart from the model). Leave the layer out by reweighting "
                f"the other parts of the model, or give reweight(..., batch_axis={{'{self.path}': {self.axis}}}): each "
                "row is a sample then."
            )
        return found

    def sum(self, found: Sequence[tuple[Tensor, Tensor]], needed: Sequence[bool], c: Tensor) -> Parameters:
        """Returns the (weight, bias) parts of Σ_b c_b g_b."""
        assert self.axis is not None, "check() has found it"
        if len(found) > 1:
            return layer_sum(self.module, found, needed, self.axis, c)
        [(x, z)] = found
        key = prepared.signature(self.module, x, z, needed, self.axis)
        if key != self._prepared[0]:
            self._prepared = key, prepared.prepare(self.module, x, z, needed, self.axis)
        return self._prepared[1](x, z, c)

    def plain(self, uses: Uses, needed: Sequence[bool]) -> Parameters:
        """Returns the (weight, bias) gradients of the sum over everything."""
        found, uses.found = uses.found, []
        return layer_sum(self.module, found, needed, 0)

    def _find_axis(self, shape: tuple[int, ...], forward: Pass) -> int:
        """The axis of the output that counts samples; raises ValueError where that is not certain."""
        batch, remedy = forward.batch, f"give reweight(..., batch_axis={{'{self.path}': axis}})"
        if batch is None:
            raise ValueError(
                f"the batch size is unknown at layer '{self.path}' (output of shape {list(shape)}): the model's own "
                f"forward was not called with a tensor. Call the model itself, or {remedy}."
            )
        found = self.candidates(shape, batch)
        if len(found) == 1:
            return found[0]
        if not self.linear:
            raise ValueError(
                f"layer '{self.path}' has an output of shape {list(shape)}, but the model's input {batch} samples, "
                f"and axis 0 must count samples. If each of its {shape[0]} rows is to be a sample of its own, "
                f"{remedy.replace('axis}', '0}')}."
            )
        what = "no axis before the last has that size"
        if found:
            what = f"axes {found} all have that size, and a trial with other samples did not tell them apart"
        raise ValueError(
            f"cannot tell which axis of layer '{self.path}' counts samples: its output has shape {list(shape)}, the "
            f"model's input has {batch} samples, and {what}. Please {remedy}, or batch_axis=axis for all linear "
            "layers."
        )

    def combine(self, grads: LayerGrads, answer: Any) -> Parameters:
        """Returns the (weight, bias) gradients that the policy's answer stands for."""
        if answer is None:
            return grads.weighted_sum()
        if isinstance(answer, tuple) and len(answer) == 2:
            return answer
        self.check_factors(answer, grads.batch_size)
        return grads.weighted_sum(answer)

    def check_factors(self, answer: Any, batch: int) -> None:
        """Raises ValueError unless the answer is a tensor [B]."""
        if not isinstance(answer, Tensor) or answer.shape != (batch,):
            returned = f"shape {list(answer.shape)}" if isinstance(answer, Tensor) else type(answer).__name__
            raise ValueError(
                f"the policy returned {returned} for layer '{self.path}'; allowed are None (the plain "
                f"gradient), a tensor of shape [{batch}], one factor per sample, and a pair of "
                "the gradients of weight and bias themselves."
            )
