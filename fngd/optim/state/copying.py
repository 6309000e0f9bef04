"""Copying and pickling of optimisers: constructed anew on the copied model, with the state of the original.

torch copies an optimiser's groups and state and forgets the rest. Here the rest is hooks on a model, which a copy of
the model has not. So a copy calls the constructor with the copied arguments and loads the state.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from fngd.optim.checks import Checked


class Copied(Checked):
    """Part of an optimiser whose constructor takes `params`: `copy.deepcopy` and `pickle`, best with the model.

    >>> import copy
    >>> model = nn.Linear(3, 1)
    >>> other, opt = copy.deepcopy((model, fngd.NGD(model, lr=0.1)))
    >>> other(torch.randn(8, 3)).square().mean().backward()
    >>> opt.step()
    """

    _given: tuple[tuple, dict[str, Any]]
    param_groups: list[dict[str, Any]]
    state_dict: Callable[[], dict[str, Any]]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Checks and keeps what the constructor is given."""
        self = super().__new__(cls, *args, **kwargs)
        self._given = args, kwargs
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        args, kwargs = self._given
        signature = inspect.signature(type(self))
        if "params" not in signature.parameters:
            raise TypeError(
                f"{type(self).__name__} cannot be copied or pickled, as its constructor takes no params=. Give it one, "
                "or construct another on the copied model and load the state_dict()"
            )
        arguments = signature.bind(*args, **kwargs).arguments
        arguments["params"] = [dict(group) for group in self.param_groups]
        arguments.pop("other", None)  # its groups are among them
        arguments.pop("other_options", None)
        removed = getattr(self, "handle", None) is not None and self.handle.removed  # type: ignore[attr-defined]
        return _copied, (type(self), dict(arguments), self.state_dict(), removed)


def _copied(kind: type, arguments: dict[str, Any], state: dict[str, Any], removed: bool) -> Any:
    optimizer = kind(**arguments)
    optimizer.load_state_dict(state)
    if removed:
        optimizer.remove()
    return optimizer
