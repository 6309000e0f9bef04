"""A weight that `reweight` reweights: a module's own, or one that a function is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from persample.reweighting import specialised
from persample.reweighting.autograd import Uses
from persample.reweighting.batch_axis.axis import SampleAxis
from persample.reweighting.batch_axis.folded import Folded, Reading  # noqa: F401 of fields that are inherited
from persample.reweighting.batch_axis.segments import Segment  # noqa: F401
from persample.reweighting.layer_grads import LayerGrads
from persample.reweighting.weighted_sum import Parameters, layer_sum


@dataclass(eq=False, kw_only=True)
class Layer(SampleAxis):
    """A layer by its path; the state that its calls in training share.

    For a function `module` is None, `source` returns its (weight, bias), which may be parts of parameters, and
    `owners` are the parameters themselves.
    """

    module: nn.Module | None
    source: Callable[[], Parameters] | None = None
    owners: tuple[Tensor, ...] = ()
    geometry: nn.Module | None = None
    """Of a function that is a convolution: a module with its geometry
    (`persample.reweighting.functions.linear_calls`)."""
    off: list[nn.Parameter] = field(default_factory=list)
    called: bool = False
    _prepared: tuple[Any, Any] = None, None
    besides: str = ""
    """What else uses its weight or bias in the first batch, by autograd's names; empty where nothing does."""
    opaque: bool = False
    """Not to be traced by torch.compile: called several times, or in another graph than the model's entry."""

    @property
    def operation(self) -> nn.Module | None:
        """A module that does what the layer does, with weights that may be others; None: a linear function."""
        return self.geometry if self.module is None else self.module

    @property
    def linear(self) -> bool:
        """Whether it is linear, so that any axis but the last may count samples."""
        return self.operation is None or isinstance(self.operation, nn.Linear)

    def parameters(self) -> list[Any]:
        """[weight, bias or None], or an empty list where the layer is to take the plain gradient."""
        weight, bias = self._own()
        if self._why_plain(weight) is not None:
            return []
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
        return self._why_plain(self._own()[0])

    def _why_plain(self, own: Tensor | None) -> str | None:
        if self.shared is not None:
            return self.shared
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
        last = self._last if self.axis is None else Reading(1, 1, self.axis)
        axis = "" if last is None else f", {last.explain()}"
        if self.segments:
            axis = ", called on parts of the batch"
        if self.routed:
            axis = ", its rows where data place them"
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

    @property
    def space(self) -> int | None:
        """How many axes of space a convolution has; None for a linear layer."""
        module: Any = self.operation
        return None if self.linear else len(module.kernel_size)

    def sum(self, found: Sequence[tuple[Tensor, Tensor]], needed: Sequence[bool], axis: int, c: Tensor) -> Parameters:
        """Returns the (weight, bias) parts of Σ_b c_b g_b, of what `check` has returned."""
        if len(found) > 1 or axis != self.axis or self.segments or self.routed:
            return layer_sum(self.operation, found, needed, axis, c)
        [(x, z)] = found
        key = specialised.signature(self.operation, x, z, needed, axis)
        if key != self._prepared[0]:
            self._prepared = key, specialised.prepare(self.operation, x, z, needed, axis)
        return self._prepared[1](x, z, c)

    def plain(self, uses: Uses, needed: Sequence[bool]) -> Parameters:
        """Returns the (weight, bias) gradients of the sum over everything."""
        found, uses.found = uses.found, []
        return layer_sum(self.operation, found, needed, 0)

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
