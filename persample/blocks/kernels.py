"""Overriding the choice of kernels: by default each is chosen by a cost model, which `explain()` shows.

names                                                 what they compute
"fold", "rows", "unfold", "pointwise", "shift",       gradients of convolutions, sample by sample; see
"loop"                                                `persample.blocks.convolution.algorithms`
"materialise", "hadamard"                             norms and Gram matrices of linear and convolution layers: by way
                                                      of those gradients, or straight from inputs and output gradients
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from persample.blocks.convolution.algorithms import ALGORITHMS

FORMS = ("hadamard", "materialise")
_forced: list[str] = []


@contextmanager
def force_kernel(*names: str) -> Iterator[None]:
    """Returns a context within which every choice of a kernel, in the whole process, is one of `names`.

    One name may be of an algorithm for convolutions, one of a form of norms and Gram matrices (module docstring);
    what no name speaks of is chosen as ever. All kernels are exact, so only time and memory change.

    Raises:
        ValueError: there is no such name; later, an algorithm that cannot handle a convolution ("pointwise" with a
            kernel of several elements).

    >>> model, loss = nn.Linear(3, 2), nn.MSELoss(reduction="none")
    >>> captured = persample.per_sample(model, lambda out, y: loss(out, y).sum(1), torch.randn(4, 3), torch.zeros(4, 2))
    >>> with persample.force_kernel("materialise"):
    ...     captured.gram().shape
    torch.Size([4, 4])
    """
    for name in names:
        if name not in ALGORITHMS and name not in FORMS:
            raise ValueError(f"no kernel is called {name!r}; choose among {sorted([*ALGORITHMS, *FORMS])}")
    before = list(_forced)
    _forced.extend(names)
    try:
        yield
    finally:
        _forced[:] = before


def forced_among(names: Collection[str]) -> str | None:
    """Returns the innermost forced name among `names`, None if the choice is free."""
    return next((name for name in reversed(_forced) if name in names), None)
