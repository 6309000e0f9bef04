"""What reductions are made of: every parameter's gradient in turn, however gradients are held, and sums over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from persample.blocks.cancellation import lengths
from persample.blocks.precision import full_precision
from persample.blocks.sums import add, overflowed
from persample.result.gradient import Gradient
from persample.result.grouping import Per, grouped, layer_of, layers_of, total

Method = TypeVar("Method", bound=Callable[..., Any])
T = TypeVar("T")


def reduction(method: Method) -> Method:
    """Marks a method that consumes the factors: no graph is recorded, and factors must be as they were captured."""

    @torch.compiler.disable
    @wraps(method)
    def guarded(self: Gradients, *args: Any, **kwargs: Any) -> Any:
        self._require()
        with torch.no_grad():
            return method(self, *args, **kwargs)

    return guarded


class Gradients:
    """The gradients g_b of one batch; results say how they are held, `Quantities` what is formed of them."""

    losses: Float[Tensor, " batch"]
    _parameters: dict[str, Tensor]
    _apart: dict[str, Tensor]
    """Samples of which rows were formed for the norm of a parameter's gradient, as they will be for sums."""

    _copied = False
    _condensed: frozenset[str] = frozenset()
    """Parameters of which rows are held in the place of factors."""

    # --- how the gradients are held -------------------------------------------------------------------------

    def _each(self, form: Callable[[str, Gradient], T]) -> dict[str, T]:
        """`form` of every parameter's gradient, by name."""
        raise NotImplementedError(f"{type(self).__name__} defines _each")

    def _held(self) -> Mapping[str, Gradient]:
        """Every parameter's gradient, all at once."""
        raise NotImplementedError(f"{type(self).__name__} defines _held")

    @property
    def unused(self) -> tuple[str, ...]:
        """Names of trainable parameters that no loss depends on; their gradients are zero."""
        raise NotImplementedError(f"{type(self).__name__} defines unused")

    def _condense(self) -> None:
        """Holds rows in place of larger factors, for a reduction that forms the rows and for those to come."""

    def _require(self) -> None:
        """Raises `RuntimeError` unless what is held is as it was captured."""

    @property
    def batch(self) -> int:
        """Number of samples B.

        >>> x = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
        >>> psg = persample.per_sample(nn.Linear(2, 1, bias=False), lambda y, _: y.sum(1), x)
        >>> psg.batch
        2
        """
        return self.losses.shape[0]

    @property
    def layers(self) -> dict[str, tuple[str, ...]]:
        """Names of the parameters of each layer, by the path of the module that owns them; "" is the model.

        >>> model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1, bias=False))
        >>> persample.per_sample(model, lambda y, _: y.sum(1), torch.randn(5, 3)).layers
        {'0': ('0.weight', '0.bias'), '2': ('2.weight',)}
        """
        return layers_of(self._parameters)

    # --- all parameters -------------------------------------------------------------------------------------

    def _norms(self, per: Per) -> dict[str, Tensor]:
        self._condense()
        self._apart = {}

        def squares_of(name: str, gradient: Gradient) -> Tensor:
            squares, apart = gradient.squared_norms()
            if apart is not None:
                self._apart[name] = apart
            return squares

        squares = self._grouped(self._each(squares_of), per, (self.batch,))
        # cross terms of several uses may leave a rounding error below zero
        norms = {key: value.clamp(min=0).sqrt() for key, value in squares.items()}
        beyond = overflowed(add([norm.to(self.losses.device) for norm in norms.values()])) if norms else None
        return norms if beyond is None else self._lengths(per, norms, beyond)

    def _lengths(self, per: Per, norms: Mapping[str, Tensor], samples: Tensor) -> dict[str, Tensor]:
        """Norms in which those of some samples are found from their rows, whose squares may be no numbers."""
        found = self._each(lambda _, gradient: gradient.lengths_of(samples))
        for name in found:
            before = self._apart.get(name)
            self._apart[name] = samples if before is None else torch.cat([before, samples]).unique()
        grouped = self._grouped(found, per, samples.shape, lambda parts: lengths(torch.stack(parts, 1)))
        return {key: norm.index_copy(0, samples, grouped[key]) for key, norm in norms.items()}

    def _weighted_sum(self, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        apart = self._apart
        return self._each(lambda name, gradient: gradient.weighted_sum(factors[layer_of(name)], apart.get(name)))

    def _gram_around(self, per: Per, right: Gradients, centers: Mapping[str, Tensor]) -> Tensor | dict[str, Tensor]:
        """Gram matrices of rows without their centers, [groups, *shape]: row r has number r modulo groups."""
        right._require()
        theirs = {} if right is self else right._held()
        found = self._each(lambda name, each: each.gram_around(theirs.get(name, each), centers[name]))
        return total(self._grouped(found, per, (self.batch, right.batch)), per)

    def _by_position(
        self, form: Callable[[str, Gradient], Tensor | None], other: Gradients | None = None
    ) -> dict[str, Tensor]:
        """What is formed of the parameters that have positions.

        Raises:
            RuntimeError: rows were put in the place of factors that had some.
        """
        condensed = sorted(self._condensed | (other._condensed if other is not None else frozenset()))
        if condensed:
            raise RuntimeError(
                f"the factors of {condensed[:3]} were replaced by rows, which are smaller, when norms or a Gram matrix "
                "were formed. Ask for per='position' before, or capture the batch anew"
            )
        return {name: each for name, each in self._each(form).items() if each is not None}

    def _grouped(
        self, values: Mapping[str, Tensor], per: Per, shape: Sequence[int], together: Callable[..., Tensor] = add
    ) -> dict[str, Tensor]:
        if per == "total" and not values:
            return {"": self.losses.new_zeros(shape, dtype=full_precision(self.losses).dtype)}
        return grouped(values, per, self.losses.device, together)
