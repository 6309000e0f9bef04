"""Backend `hooks`: forward hooks keep the inputs of known types of modules, gradients arrive at their outputs.

Data flow, with x a module's input and z the gradient of the summed losses at its output:

    forward pass ─▶ calls (module, x, edge of the output) ─▶ z and probed z at all edges ─▶ owner of each entry of z
                                                                        │
                          blocks ◀─ `persample.backends.module_rules` ◀─┘

Edges are taken inside the hook, so that in-place operations on the output come after them. Only parameters that
belong to a module with a rule are covered; every other owner is refused by name, before the forward pass.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from persample.attribution import probing
from persample.attribution.coupling import not_finite_error, row_owner
from persample.attribution.owner import Output, Owner
from persample.attribution.silent import Zeros
from persample.attribution.stand_ins import LEVELS, stand_ins
from persample.attribution.support import supported_by
from persample.backends import outputs, register
from persample.backends.module_rules import MODULE_RULES, Call, ModuleRule, by_batch_statistics, place, rule_of
from persample.backends.shared import ADVICE, buffers_kept
from persample.blocks.precision import coarsest
from persample.blocks.types import Block
from persample.capture.plans import REGULAR
from persample.capture.sum_check import check_graph, check_losses, check_sum
from persample.capture.types import Capture, Captured, Problem
from persample.errors import CoupledSamplesError, PerSampleError, UnsupportedError
from persample.graph.nodes import shape_of, trace
from persample.graph.provenance import Provenance

COVERED_PARAMETERS = frozenset({"weight", "bias"})
"""Names of the parameters that rules build blocks for."""


@dataclass(frozen=True)
class Hooked:
    """A module that owns trainable parameters, and its rule."""

    path: str
    module: nn.Module
    rule: ModuleRule
    names: Mapping[str, str]
    """Own name of a parameter -> its name in the model."""


@dataclass(frozen=True)
class Record:
    """One call of a hooked module: its arguments by name, their versions, and where the output's gradient arrives."""

    hooked: Hooked
    arguments: Mapping[str, Any]
    versions: tuple[tuple[Tensor, int], ...]
    edge: GradientEdge
    shape: tuple[int, ...]
    used_batch_statistics: bool


def covered_types() -> str:
    """Names of the covered module types, from the table."""
    return ", ".join(kind.__name__ for kind in MODULE_RULES)


def hooked_modules(problem: Problem) -> list[Hooked]:
    """Returns the modules that own trainable parameters.

    Raises:
        UnsupportedError: one of them has no rule.
    """
    names = {id(parameter): name for name, parameter in problem.parameters.items()}
    found = []
    for path, module in problem.model.named_modules():
        own = {n: names[id(p)] for n, p in module._parameters.items() if p is not None and id(p) in names}
        if not own:
            continue
        rule = rule_of(module)
        if rule is None or not own.keys() <= COVERED_PARAMETERS:
            raise UnsupportedError(
                f"backend 'hooks' has no rule for {place(path)}, of type {_kind(module)}, which owns the "
                f"trainable parameters {', '.join(map(repr, own))}; it covers the types {covered_types()}, "
                f"and subclasses that compute the same. {ADVICE}"
            )
        found.append(Hooked(path, module, rule, own))
    return found


def _kind(module: nn.Module) -> str:
    """The name of the module's type, with where it comes from if a covered type is called the same."""
    name = type(module).__name__
    return f"{type(module).__module__}.{name}" if any(kind.__name__ == name for kind in MODULE_RULES) else name


@contextmanager
def recording(modules: Sequence[Hooked]) -> Iterator[list[Record]]:
    """Records the calls of the modules in this thread; the hooks are gone afterwards, whatever happened."""
    records: list[Record] = []
    thread = threading.get_ident()
    handles = []

    def hook_of(hooked: Hooked) -> Any:
        signature = inspect.signature(hooked.module.forward)

        def hook(module: nn.Module, args: tuple, *rest: Any) -> None:
            # another thread may run the module before torch knows that this hook takes keyword arguments
            if threading.get_ident() != thread:
                return
            kwargs, output = rest
            if not isinstance(output, Tensor) or not output.requires_grad:
                return
            bound = {name: _detached(value) for name, value in signature.bind(*args, **kwargs).arguments.items()}
            versions = tuple(
                (value, value._version)
                for value in bound.values()
                if isinstance(value, Tensor) and not value.is_inference()
            )
            records.append(
                Record(hooked, bound, versions, _edge(output), shape_of(output), by_batch_statistics(module))
            )

        return hook

    try:
        for hooked in modules:
            # in front of the user's own hooks, which may return another output
            handles.append(hooked.module.register_forward_hook(hook_of(hooked), with_kwargs=True, prepend=True))
        yield records
    finally:
        for handle in handles:
            handle.remove()


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _edge(output: Tensor) -> GradientEdge:
    """Where the output's gradient arrives. An in-place operation on a view rewrites the view's own history, so
    for a module that ends in a reshape (linear layers on 3-D input) it is the reshaped tensor's edge."""
    base = output._base
    if (
        base is not None and base.requires_grad and base.numel() == output.numel()
        and base.is_contiguous() and output.is_contiguous()
    ):  # fmt: skip
        return get_gradient_edge(base)
    return get_gradient_edge(output)


def refuse_modified(records: Sequence[Record]) -> None:
    """Raises where an input that a rule needs was modified in place after the call."""
    for record in records:
        if "weight" in record.hooked.names and any(value._version != version for value, version in record.versions):
            raise UnsupportedError(
                f"an input of {place(record.hooked.path)} was modified in place after the layer had read it, so "
                "the gradient of its weight cannot be had; make the operation that follows out of place"
            )


@register(
    "hooks",
    covers=f"parameters of {covered_types()}, wherever the samples lie in their outputs",
)
def capture(problem: Problem) -> Capture:
    """Runs the model with hooks on its modules."""
    with torch.inference_mode(False), torch.enable_grad():
        return _capture(problem)


def _capture(problem: Problem) -> Capture:
    modules = hooked_modules(problem)
    provenance = Provenance() if problem.coupled == "rows" else None
    with recording(modules) as records:
        if provenance is not None:
            provenance.follow(problem.inputs)
        with provenance or nullcontext():
            losses = check_losses(problem.losses())
    check_graph(losses, problem.parameters)
    if problem.coupled == "error":
        _refuse_batch_statistics(records)
    refuse_modified(records)
    if not problem.parameters:
        return Capture(losses.detach(), dict.fromkeys(problem.parameters, ()))
    zs, owners, batch_gradient = attribute(losses, records, problem)
    captured: dict[str, list[Captured]] = {name: [] for name in problem.parameters}
    with torch.no_grad():
        for record, z, owner in zip(records, zs, owners, strict=True):
            if z is None:
                continue
            if owner is None:
                owner = mixed(record, z, problem, provenance, losses.shape[0])
            z = z.view(record.shape)
            for name, block in blocks_of(record, z, owner).items():
                use = Captured(block, type(record.hooked.module).__name__, record.hooked.rule.__name__)
                captured[record.hooked.names[name]].append(use)
    result = Capture(losses.detach(), {name: outputs.merged(uses) for name, uses in captured.items()})
    if problem.check:
        precision = coarsest(losses, *problem.parameters.values())
        check_sum(result.blocks, batch_gradient, precision=precision, backend="hooks")
    return result


def attribute(
    losses: Tensor, records: Sequence[Record], problem: Problem
) -> tuple[list[Tensor | None], list[Owner | None], dict[str, Tensor | None]]:
    """z and owner at each record's output, and the batch gradient, which the first backward pass yields as well."""
    edges = [record.edge for record in records]
    parameters = problem.parameters if problem.check else {}

    def finite(run: Callable[[], object], level: int = 1) -> AbstractContextManager[None]:
        return stand_ins(trace(losses).order, run, level=level)

    gradient: dict[str, Tensor | None] = {}

    def backward(weights: Tensor) -> Sequence[Any]:
        more = list(parameters.values()) if not gradient else []
        wanted: Any = [*edges, *more]  # torch takes edges and tensors together; its annotation does not
        if not wanted:
            return ()
        found = torch.autograd.grad(losses, wanted, weights, retain_graph=True, allow_unused=True)
        if more:
            gradient.update(zip(parameters, found[len(edges) :], strict=True))
        return found[: len(edges)]

    shapes = [record.shape for record in records]
    z, owners = probing.attribute(backward, losses, shapes, finite=finite)
    if losses.shape[0] > 1 and any(here is not None and in_doubt(owner) for here, owner in zip(z, owners, strict=True)):
        outputs_at = [None if here is None else Output.of(here) for here in z]
        again = supported_by(backward, losses, outputs_at, finite, owners)
        owners = [new if in_doubt(old) else old for old, new in zip(owners, again, strict=True)]
    if losses.shape[0] > 1:
        claim(losses, records, z, owners, partial(probing.attribute, backward, losses, shapes))
    return z, owners, gradient


def claim(
    losses: Tensor,
    records: Sequence[Record],
    zs: Sequence[Tensor | None],
    owners: list[Owner | None],
    again: Callable[[], tuple[Sequence[Tensor | None], Sequence[Owner | None]]],
) -> None:
    """Finds whose zeros of z are, where a layer's input is not finite, see `persample.attribution.silent`; changes
    `owners`."""
    zeros = {
        at: Zeros(z, owner)
        for at, (z, owner, record) in enumerate(zip(zs, owners, records, strict=True))
        if z is not None and owner is not None and not bool((z != 0).all()) and not _finite(record)
    }
    if not zeros:
        return
    for level in LEVELS:
        with stand_ins(trace(losses).order, level=level):
            found, others = again()
        for at, zero in zeros.items():
            zero.add(found[at], others[at])
    for at, zero in zeros.items():
        owner = owners[at] = zero.owner()
        if zero.left_by(owner):
            raise not_finite_error(f"the parameters of {records[at].hooked.path!r}")


def _finite(record: Record) -> bool:
    """Whether the arguments of a call are finite."""
    numbers = [each for each in record.arguments.values() if isinstance(each, Tensor) and each.is_floating_point()]
    return all(bool(each.isfinite().all()) for each in numbers)


def in_doubt(owner: Owner | None) -> bool:
    """Whether samples seem to mix, or to be apart in a way that rounding could imitate where one is far larger."""
    return owner is None or owner.layout not in REGULAR


def blocks_of(record: Record, z: Tensor, owner: Owner) -> dict[str, Block]:
    """The blocks of the parameters of one call."""
    hooked = record.hooked
    return hooked.rule(Call(hooked.path, hooked.module, record.arguments, z, owner, frozenset(hooked.names)))


def _refuse_batch_statistics(records: Sequence[Record]) -> None:
    for record in records:
        if record.used_batch_statistics:
            raise CoupledSamplesError(
                f"{place(record.hooked.path)} ({type(record.hooked.module).__name__}) normalises by the statistics of "
                "the batch, so that samples influence each other and have no gradient of their own. Put it in eval "
                "mode or use GroupNorm; coupled='rows' reads the rows of each layer instead, as the FNGD paper does."
            )


def mixed(record: Record, z: Tensor, problem: Problem, provenance: Provenance | None, batch: int) -> Owner:
    """The owner in the row reading, where it was asked for and the layer has seen data.

    Raises:
        CoupledSamplesError: samples influence each other.
        UnsupportedError: the layer works on no sample's data, such as a table of positions.
    """
    hooked = record.hooked
    if provenance is None:
        _refuse_coupled(problem)
    elif provenance.saw_data(record.edge.node, batch):
        owner = row_owner(z.view(record.shape), batch)
        if owner is not None:
            return owner
        raise CoupledSamplesError(
            f"samples influence each other at the output of {place(hooked.path)}, and it has no rows to read: "
            f"dimension 0 of {tuple(record.shape)} is not the batch of {batch}"
        )
    raise UnsupportedError(
        f"the output of {place(hooked.path)} ({type(hooked.module).__name__}) belongs to no single sample: it is "
        "shared by the samples, like positions looked up once for all of them, or a head on parameters alone. A hook "
        "cannot follow it to where it meets the samples. Use backend='outputs', which does."
    )


def _refuse_coupled(problem: Problem) -> None:
    """Runs the model once more under backend `outputs`, which knows where samples couple, and lets it say so."""
    with buffers_kept(problem.model), torch.random.fork_rng(devices=[]):
        try:
            outputs.capture(replace(problem, check=False))
        except CoupledSamplesError:
            raise
        except PerSampleError:
            return
