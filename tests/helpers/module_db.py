"""Cases out of torch's own table of modules and inputs, ``torch.testing._internal.common_modules.module_db``.

No one here wrote those inputs, which is their worth. Every input of a module with parameters becomes a case,
in training and in evaluation mode. Where it has a batch, the case is tagged ``batched``. Most inputs of
attention and recurrent modules have none (they are there to test just that): such a one becomes two cases,
``given a batch`` of copies with noise, on the axis that the module's layout asks for, and ``one sample``, as
it is. Left out, and counted by ``report``: modules without parameters, and criterions that reduce to a
scalar, which has no samples.

Importing torch's table takes the package ``expecttest``; see ``available``.
"""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map

from persample.testing.cases import Case
from persample.testing.cases.table import batch_first, shake, squared, squared_at

COPIES = 3  # samples in a batch made from one unbatched input
# Axes of a sample alone, of the first argument; the classes not named here know no unbatched input.
SINGLE = {
    **dict.fromkeys(("Linear", "Bilinear", "RNNCell", "GRUCell", "LSTMCell", "LinearCrossEntropyLoss"), 1),
    **dict.fromkeys(("RNN", "LSTM", "GRU", "MultiheadAttention", "Transformer"), 2),
    **{f"Transformer{part}{layer}": 2 for part in ("Encoder", "Decoder") for layer in ("", "Layer")},
    **{f"{lazy}Conv{t}{d}d": d + 1 for lazy in ("", "Lazy") for t in ("", "Transpose") for d in (1, 2, 3)},
}


def available() -> bool:
    """Whether torch's table can be imported."""
    return find_spec("expecttest") is not None


def axis_of(module: nn.Module) -> int:
    """The batch axis of inputs and outputs, by the module's own flag or that of the attention inside it."""
    flags = [m.batch_first for m in module.modules() if hasattr(m, "batch_first")]
    return 0 if not flags or flags[0] else 1


def is_attention_mask(name: str) -> bool:
    """Whether the argument masks pairs of positions, not positions of samples."""
    return name.endswith("mask") and not name.endswith("padding_mask")


def argument_axis(module: nn.Module, name: str, value: Tensor) -> int | None:
    """The batch axis of one argument, None if it has none."""
    if is_attention_mask(name):
        return 0 if value.dim() == 3 else None  # [B · heads, T, S] or [T, S]
    if name.endswith("mask"):
        return 0
    if name == "hx":
        return 1 if isinstance(module, nn.RNNBase) else 0
    return axis_of(module)


def output_axes(module: nn.Module, outputs: list[Tensor]) -> tuple[int, ...]:
    """The batch axes of the outputs: final states have it on axis 1, attention weights on axis 0."""
    rest = 1 if isinstance(module, nn.RNNBase) else 0
    return (axis_of(module), *(rest for _ in outputs[1:]))


def give_batch(module: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Unbatched arguments with a batch axis: the sample and copies with noise."""
    out = {}
    for name, value in inputs.items():

        def stack(one: Tensor, name: str = name) -> Tensor:
            if is_attention_mask(name):
                return one.repeat(COPIES, 1, 1) if one.dim() == 3 else one
            axis = argument_axis(module, name, one)
            noisy = [
                one,
                *(one + 0.1 * torch.randn_like(one) if one.is_floating_point() else one for _ in range(2)),
            ]
            return torch.stack(noisy, axis or 0)

        out[name] = tree_map(lambda v, f=stack: f(v) if isinstance(v, Tensor) else v, value)
    return out


def summed(outputs: Tensor, _: Tensor) -> Tensor:
    """The losses that a criterion returns, summed over the positions of a sample."""
    return outputs.flatten(1).sum(1) if outputs.dim() > 1 else outputs


class OneSample(nn.Module):
    """A module without batch axis; its outputs get one of length one."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **inputs: Any) -> Any:
        return tree_map(lambda o: o[None] if isinstance(o, Tensor) else o, self.module(**inputs))


def take(module_axis: Mapping[str, Any], inputs: dict[str, Any], b: int) -> dict[str, Any]:
    """One sample's arguments; masks of all heads are cut into the sample's heads."""
    out = {}
    for name, value in inputs.items():
        axis, parts = module_axis[name]
        out[name] = (
            value
            if axis is None
            else tree_map(lambda v, a=axis, n=parts: v.narrow(a, b * n, n) if isinstance(v, Tensor) else v, value)
        )
    return out


def make(info: Any, entry: Any, training: bool, form: str) -> tuple[nn.Module, Any, Any, Any]:
    """Model, loss, inputs and targets of one input of the table."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        args, kwargs = entry.constructor_input.args, entry.constructor_input.kwargs
        module = info.module_cls(*args, **kwargs).double().train(training)
        inputs = arguments(module, entry)
        if form == "given a batch":
            inputs = give_batch(module, inputs)
        outputs = tree_leaves(module(**inputs))  # with a graph: without one, attention takes another path
        model = OneSample(shake(module)) if form == "one sample" else shake(module)
        if isinstance(module, nn.modules.loss._Loss):
            return model, summed, inputs, torch.zeros(outputs[0].shape[:1] or 1)
        if form == "one sample":
            targets = [torch.randn_like(o)[None] for o in outputs]
            return model, squared, inputs, targets
        axes = output_axes(module, outputs)
        return model, squared_at(*axes), inputs, [torch.randn_like(o) for o in batch_first(outputs, axes)]


def arguments(module: nn.Module, entry: Any) -> dict[str, Any]:
    """The arguments of the forward pass by name, copied: the table's own tensors stay as they are."""
    forward = entry.forward_input
    bound = inspect.signature(module.forward).bind(*forward.args, **forward.kwargs).arguments
    return tree_map(lambda v: v.detach().clone() if isinstance(v, Tensor) else v, dict(bound))


def entries() -> Iterator[tuple[str, Any, Any, bool]]:
    """Name, table row, input and mode of everything in the table."""
    from torch.testing._internal.common_modules import module_db

    for info in module_db:
        for training in (True, False):
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.manual_seed(0)
                found = info.module_inputs_func(
                    info, device="cpu", dtype=torch.float64, requires_grad=False, training=training
                )
                for i, entry in enumerate(found):
                    mode = "train" if training else "eval"
                    yield f"module_db/{info.name.removeprefix('nn.')}-{i}-{mode}", info, entry, training


def _says(module: nn.Module, inputs: dict[str, Any], words: str) -> bool:
    """Whether a criterion warns in these words."""
    if type(module).__name__ != "LinearCrossEntropyLoss":  # from torch 2.13 on
        return False
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        module(**inputs)
    return any(words in str(w.message) for w in seen)


@cache
def _collect() -> tuple[tuple[Case, ...], Counter]:
    cases, counts = [], Counter()
    for name, info, entry, training in entries():
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = info.module_cls(*entry.constructor_input.args, **entry.constructor_input.kwargs).train(training)
        if not any(p.requires_grad for p in module.parameters()):
            counts["left out: no parameters"] += 1
            continue
        if getattr(module, "reduction", "none") != "none":
            counts["left out: reduced to a scalar"] += 1
            continue
        inputs = arguments(module, entry)
        if _says(module, inputs, "``options`` ignored"):
            counts["left out: options that torch ignores, so the same as another"] += 1
            continue
        kind = info.module_cls.__name__
        first = tree_leaves(inputs)[0]
        alone = first.dim() == SINGLE.get(kind, -1) or (kind == "PReLU" and first.dim() < 2)
        for form in ("given a batch", "one sample") if alone else ("batched",):
            if form == "given a batch" and kind == "PReLU" and first.dim() == 0:
                continue  # a batch of numbers is what torch calls no_batch_dim
            cases.append(_case(name, info, entry, training, form, module, inputs))
            counts[form] += 1
    return tuple(cases), counts


def _case(name: str, info: Any, entry: Any, training: bool, form: str, module: nn.Module, inputs: dict) -> Case:
    batch_norm = isinstance(module, _BatchNorm) and (training or module.running_mean is None)
    tags = {"module_db", form}
    if batch_norm:
        tags.add("separable")  # only its own scale and shift are there to learn
    if tree_leaves(inputs)[0].numel() == 0:
        tags.add("empty")
    ignored = getattr(module, "ignore_index", None)
    if ignored is not None and (inputs["target"] == ignored).all():
        tags.add("zero")
    if form != "one sample" and axis_of(module) == 1:
        tags.add("time-major")
    axes: Any = None
    if form != "one sample":
        heads = next((m.num_heads for m in module.modules() if isinstance(m, nn.MultiheadAttention)), 1)
        each = {}
        for arg, value in inputs.items():
            leaf = next((v for v in tree_leaves(value) if isinstance(v, Tensor)), None)
            axis = None if leaf is None else argument_axis(module, arg, leaf)
            each[arg] = (axis, heads if is_attention_mask(arg) else 1)
        axes = partial(take, each)
    note = f"{entry.desc} {entry.constructor_input.args} {entry.constructor_input.kwargs}".strip()
    build = partial(make, info, entry, training, form)
    title = name if form == "batched" else f"{name} ({form})"
    return Case(title, build, frozenset(tags), batch_norm, axes, " ".join(note.split())[:200])


def module_db_cases() -> tuple[Case, ...]:
    """All cases, computed once; empty where ``available`` is false."""
    return _collect()[0] if available() else ()


def report() -> dict[str, int]:
    """How many inputs became cases of which form, and how many were left out why."""
    return dict(_collect()[1]) if available() else {}
