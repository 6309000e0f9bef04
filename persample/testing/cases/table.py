"""The case table: what a case is, how one is added, and the few helpers that keep each to a line or two.

A case builds a small float64 model, a loss with one value per sample, inputs and targets. Tests compare every
backend with the loop on every case, and ``python -m persample conformance`` prints one row for each.

Tags in use, besides the group (``layer``, ``usage``, ``architecture``):

============== ==============================================================================================
``peers``      a case at which at least one other library is silently wrong or fails
``random``     the forward pass draws random numbers: seed before each run
``stateful``   the forward pass changes buffers that change the result: build afresh before each run
``separable``  coupled, yet d loss_b / d theta splits by rows: a refusal and the loop's rows are both right
``empty``      a batch of no samples
``zero``       gradients of zero are right
``unused``     some trainable parameter takes no part in the loss
``complex``    some parameter is complex
``float32``    part of a float64 model computes in float32: compare to 1e-5
``routing``    which row belongs to which sample depends on the data
``time-major`` the batch is not on axis 0 of what some parameter meets
============== ==============================================================================================
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

LossFn = Callable[[Any, Any], Tensor]
Built = tuple[nn.Module, LossFn, Any, Any]
Axes = int | tuple | Mapping | Callable[[Any, int], Any] | None

TABLE: dict[str, Case] = {}


@dataclass(frozen=True)
class Case:
    """One model with a batch.

    ``coupled``: a sample's loss or gradient depends on the other samples, so a per-sample gradient in the
    sense of one sample alone does not exist and the right answer is a refusal (see the tag ``separable``).
    ``axes``: how to take one sample out of the inputs. A number is the batch axis of every tensor; a tuple or
    mapping (nested like the inputs) gives it per tensor, None there meaning shared by all samples; a function
    ``(inputs, b) -> inputs`` does anything else. None: a sample cannot be run alone, or not with the same
    result. Targets always have the batch on axis 0.
    """

    name: str
    build: Callable[[], Built]
    tags: frozenset[str] = frozenset()
    coupled: bool = False
    axes: Axes = 0
    note: str = ""

    @property
    def sliceable(self) -> bool:
        """Whether one sample can be run alone."""
        return self.axes is not None

    def isolate(self, inputs: Any, targets: Any, b: int) -> tuple[Any, Any]:
        """Inputs and targets of sample ``b`` alone, still with a batch axis, of length one."""
        if self.axes is None:
            raise ValueError(f"case {self.name!r}: samples cannot be run alone (axes=None)")
        alone = self.axes(inputs, b) if callable(self.axes) else _take(inputs, self.axes, b)
        return alone, _take(targets, 0, b)


def _take(tree: Any, axes: Any, b: int) -> Any:
    if axes is None or tree is None:
        return tree
    if isinstance(tree, Tensor):
        return tree.narrow(axes, b, 1)
    if isinstance(tree, Mapping):
        return {k: _take(v, axes[k] if isinstance(axes, Mapping) else axes, b) for k, v in tree.items()}
    if isinstance(tree, (tuple, list)):
        each = axes if isinstance(axes, (tuple, list)) else [axes] * len(tree)
        return type(tree)(_take(v, a, b) for v, a in zip(tree, each, strict=True))
    return tree


def call(model: Callable[..., Any], inputs: Any) -> Any:
    """Outputs of the model or function; a tuple is spread over positional arguments, a mapping over keywords."""
    if isinstance(inputs, tuple):
        return model(*inputs)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(inputs)


def add(
    name: str, make: Callable[[], Built], *tags: str, coupled: bool = False, axes: Axes = 0, note: str = ""
) -> None:
    """Put a case into the table; ``make`` runs seeded, and leaves the global random state as it was."""
    if name in TABLE:
        raise ValueError(f"case {name!r} is in the table already")

    def build() -> Built:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch announces lazy modules, slow paths and the like
            torch.manual_seed(0)
            model, loss_fn, inputs, targets = make()
            return shake(model.double()), loss_fn, inputs, targets

    TABLE[name] = Case(name, build, frozenset(tags), coupled, axes, " ".join(note.split()))


def group(prefix: str, *group_tags: str) -> Callable:
    """The decorator ``@case(*tags, name=, coupled=, axes=)`` of one file of the table.

    The case is named after the function and its docstring becomes the note.
    """

    def case(*tags: str, name: str | None = None, coupled: bool = False, axes: Axes = 0) -> Callable:
        def register(make: Callable[[], Built]) -> Callable[[], Built]:
            title = name or make.__name__.strip("_").replace("_", "-")
            add(
                f"{prefix}/{title}",
                make,
                *group_tags,
                *tags,
                coupled=coupled,
                axes=axes,
                note=make.__doc__ or "",
            )
            return make

        return register

    return case


@torch.no_grad()
def shake(model: nn.Module) -> nn.Module:
    """The model with every parameter off its initial value: a rule that forgets a scale of one would pass
    otherwise.
    """
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    for module in model.modules():
        mean, var = getattr(module, "running_mean", None), getattr(module, "running_var", None)
        if mean is not None and var is not None:
            mean.normal_()
            var.uniform_(0.5, 1.5)
    return model


class Net(nn.Module):
    """A model from a function and its parts: ``Net(lambda m, x: m.lin(x), lin=nn.Linear(3, 4))``.

    Plain tensors among the parts become parameters, anything that is no module is a constant.
    """

    def __init__(self, run: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                part = nn.Parameter(part)
            setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)

    if TYPE_CHECKING:  # the parts are whatever the case says

        def __getattr__(self, name: str) -> Any: ...


def randn(*shape: int) -> Tensor:
    """Normal float64 numbers."""
    return torch.randn(shape, dtype=torch.float64)


def ids(high: int, *shape: int) -> Tensor:
    """Uniform integers below ``high``."""
    return torch.randint(high, shape)


def squared(outputs: Any, targets: Any) -> Tensor:
    """Half the squared distance, summed over all outputs of a sample: [B]. Every output has the batch on axis
    0.
    """
    pairs = zip(tree_leaves(outputs), tree_leaves(targets), strict=True)
    return sum(
        (
            0.5 * (o - t).abs().square().flatten(1).sum(1) if o.dim() > 1 else 0.5 * (o - t).abs().square()
            for o, t in pairs
        ),
        start=torch.zeros((), dtype=torch.float64),
    )


def squared_at(*axes: int) -> LossFn:
    """``squared`` for outputs with the batch on these axes, one per output; the targets have it on axis 0."""
    return lambda outputs, targets: squared(batch_first(outputs, axes), targets)


def batch_first(outputs: Any, axes: tuple[int, ...]) -> list[Tensor]:
    """The tensors among the outputs with the batch moved to axis 0."""
    return [o.movedim(a, 0) for o, a in zip(tree_leaves(outputs), axes, strict=True)]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy summed over the positions of a sample: logits [B, ..., C], targets [B, ...], -100
    ignored.
    """
    each = nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
    return each.view(targets.shape[0], -1).sum(1) if targets.dim() > 1 else each


def regress(model: nn.Module, inputs: Any, *axes: int) -> Built:
    """A case with random targets shaped like the outputs, whose batch axes are given where they are not 0."""
    with torch.no_grad():
        outputs = tree_leaves(call(model.double(), inputs))
    axes = axes or (0,) * len(outputs)
    targets = tree_map(torch.randn_like, batch_first(outputs, axes))
    return (
        model,
        squared_at(*axes) if any(axes) else squared,
        inputs,
        targets if len(targets) > 1 else targets[0],
    )


def classify(model: nn.Module, inputs: Any) -> Built:
    """A case with random classes for every position of the logits [B, ..., C]."""
    with torch.no_grad():
        logits = call(model.double(), inputs)
    return model, cross_entropy, inputs, ids(logits.shape[-1], *logits.shape[:-1])
