"""gram="global": how processes meet in a backward pass, whatever layers each of them runs.

Who asks for a layer's Gram matrix first tells the others which layer it is, by a hash of its path and of the shapes of
x and z, and how many samples it has: 16 bytes. Where all say the same, x and z follow at once. Where they do not (task
heads, layer drop, experts, sequences of other lengths), each says in full what it asks for and what its pass still
runs, and those layers are answered of which every process either asks for them too, or has not run them and will not.
Samples of the latter have a gradient of zero there. A process whose pass has ended takes part until all have ended.

What has no answer (`agreed`) is the same error in every process; all of them are in the meeting, so none waits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from zlib import crc32

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fngd.optim.distributed import Exchange
from persample import LayerGrads
from persample.reweighting import Reweighting

Shape = tuple[int, ...]
Use = tuple[Tensor, Tensor]
"""x and z of a call of a layer, samples on axis 0."""


@dataclass(frozen=True)
class Said:
    """What one process tells the others.

    `asked` and `coming` count layers that its pass has asked for, and those that it runs and has not asked for.
    """

    layer: str | None
    """The layer that it asks for; None: its pass has ended."""
    batch: int = 0
    samples: int | None = None
    """Of the batch that the model was called with."""
    uses: tuple[tuple[Shape, Shape], ...] = ()
    dtype: torch.dtype = torch.float32
    asked: Mapping[str, int] = field(default_factory=dict)
    coming: Mapping[str, int] = field(default_factory=dict)
    synchronises: bool | None = None
    """Whether DistributedDataParallel averages gradients in this pass; None: there is none."""
    nested: bool = False
    sharded: bool = False
    probing: bool = False
    """Whether it has coefficients of the layer, and asks to compare them."""

    @property
    def signature(self) -> int:
        """A number that is the same for processes of which each can take the other's x and z."""
        shapes = [(x[1:], z[1:]) for x, z in self.uses]
        number = 0 if self.layer is None else self.asked.get(self.layer, 0)
        others = self.dtype, self.synchronises, self.nested, self.probing
        return crc32(repr((self.layer, number, shapes, *others)).encode())


@dataclass
class _Pass:
    samples: int | None
    synchronises: bool | None
    nested: bool
    running: Counter[str]
    asked: Counter[str] = field(default_factory=Counter)
    batch: int = 0
    refused: ValueError | None = None
    """What all processes have been told; to be raised when the pass has ended."""

    @property
    def coming(self) -> dict[str, int]:
        return dict(self.running - self.asked)


@dataclass(frozen=True)
class Joint:
    """The Gram matrix of a layer over the samples of all processes, with the right-hand side where there is one."""

    gram: Float[Tensor, "all all"]
    sizes: list[int]
    mine: slice
    rhs: Float[Tensor, " all"] | None


class Meeting:
    """The backward passes of this process, and what it hears of those of the others.

    Arguments:
        trains: whether the pass that runs gives a parameter of the optimiser a gradient.
        chosen: whether a layer is preconditioned.
        place: where the model's tensors are, and whether they are sharded.
    """

    handle: Reweighting

    def __init__(
        self,
        exchange: Exchange,
        *,
        trains: Callable[[], bool],
        chosen: Callable[[str], bool],
        place: Callable[[], tuple[torch.device, bool]],
    ) -> None:
        self._exchange, self._trains, self._chosen, self._place = exchange, trains, chosen, place
        self._passes: dict[int, _Pass] = {}

    def follow(self, samples: int | None) -> Callable[[], None]:
        """A forward pass has ended; returns what is called when a backward pass reaches its output."""
        self._passes.clear()  # left over from passes that raised
        wrapper = getattr(DistributedDataParallel, "_active_ddp_module", None)
        return partial(self._reached, samples, None if wrapper is None else wrapper.require_backward_grad_sync)

    def _reached(self, samples: int | None, synchronises: bool | None) -> None:
        if self._exchange.world > 1 and not self.handle.is_paused and (self.handle.upcoming() or self._trains()):
            self._hear(samples, synchronises)

    def _hear(self, samples: int | None = None, synchronises: bool | None = None) -> _Pass:
        """A backward pass is under way, perhaps one that is known."""
        task = torch._C._current_graph_task_id()
        if task not in self._passes:
            running = Counter(filter(self._chosen, self.handle.upcoming()))
            self._passes[task] = _Pass(samples, synchronises, bool(self._passes), running)
            # Before that of DistributedDataParallel, which waits for the others' gradients.
            torch.autograd.Variable._execution_engine.queue_callback(partial(self._end, task))
        return self._passes[task]

    def total(self, products: Tensor | None) -> Tensor | None:
        """Returns the sum of what processes have found in a probe; every process has to call it."""
        if self._exchange.world == 1:
            return products
        found = [each for each in self._exchange.everyone_says(None if products is None else products.tolist()) if each]
        return torch.tensor(found).sum(0) if found else None

    def _said(self, own: _Pass, layer: str | None, uses: Sequence[Use] = (), *, probing: bool = False) -> Said:
        dtypes = [tensor.dtype for use in uses for tensor in use]
        return Said(
            layer, own.batch, own.samples, tuple((tuple(x.shape), tuple(z.shape)) for x, z in uses),
            _promoted(dtypes), dict(own.asked), own.coming, own.synchronises, own.nested, self._place()[1],
            probing,
        )  # fmt: skip

    def _end(self, task: int) -> None:
        """The pass has ended: others may still ask."""
        own = self._passes.pop(task)
        said = self._said(own, None)
        while own.refused is None and len(set(self._signatures(said))) > 1:
            self._answers(own, said)
        if own.refused is not None:  # after DistributedDataParallel is done, so that nothing of it is left over
            torch.autograd.Variable._execution_engine.queue_callback(partial(_raise, own.refused))

    def _signatures(self, said: Said) -> list[int]:
        self._told = self._exchange.tell([said.signature, said.batch])
        return [signature for signature, _ in self._told]

    def ask(self, layer: str, rhs: Tensor | None, *, probing: bool = False) -> Joint | None:
        """Returns the joint Gram matrix of the layer that a policy is asked about, once every process can answer.

        None where the pass is refused: the backward pass goes on, so that gradients are averaged as they are in the
        other processes, and raises in the end.
        """
        uses: list[Tensor] = []

        def noted(tensor: Tensor, axis: int) -> Tensor:
            uses.append(tensor.movedim(axis, 0))
            return tensor

        [grads] = self.handle.joined(noted).values()
        own = self._hear()
        own.batch = grads.batch_size
        pairs = list(zip(uses[::2], uses[1::2], strict=True))
        said = self._said(own, layer, pairs, probing=probing)
        found: Joint | None = None
        while found is None and own.refused is None:
            if len(set(self._signatures(said))) == 1:
                found = self._joined([batch for _, batch in self._told], rhs)
            else:
                found = self._answers(own, said, grads, pairs, rhs)
        own.asked[layer] += 1
        return found

    def _joined(self, sizes: list[int], rhs: Tensor | None) -> Joint:
        """All processes ask for one layer, with x and z of the same shapes but for their numbers of samples."""
        gather = partial(self._exchange.gather, sizes=sizes)
        [grads] = self.handle.joined(gather).values()
        return Joint(grads.gram(), sizes, self._exchange.mine(sizes), None if rhs is None else gather(rhs, 0))

    def _answers(
        self,
        now: _Pass,
        own: Said,
        grads: LayerGrads | None = None,
        uses: Sequence[Use] = (),
        rhs: Tensor | None = None,
    ) -> Joint | None:
        """Processes differ: sends what they need for the layers that can be answered; returns the answer to `own`."""
        everyone: list[Said] = self._exchange.tell_all(own)
        if len({said.synchronises for said in everyone}) > 1:  # at once: gradients would be waited for
            raise _refused(
                "some processes average gradients in this backward pass and others do not (no_sync), so that they make "
                "different numbers of passes a step",
                "Give every process the same number of micro-batches",
            )
        answer, layers = None, list[str]()
        try:
            layers = agreed(everyone)
        except ValueError as error:
            now.refused = error
        for layer in layers:
            asking = [said if said.layer == layer else None for said in everyone]
            tensors = [each for use in uses for each in use] + ([] if rhs is None else [rhs])
            received = self._exchange.messages(
                tensors if own.layer == layer else [],
                [[] if said is None else _shapes(said, rhs is not None) for said in asking],
                _promoted([said.dtype for said in asking if said is not None]), self._place()[0],
            )  # fmt: skip
            if own.layer == layer:
                assert grads is not None, "it is this process that asks"
                answer = self._assembled(grads, asking, _sizes(everyone, layer), received, rhs is not None)
        return answer

    def _assembled(
        self, grads: LayerGrads, asking: list[Said | None], sizes: list[int], received: list[list[Tensor]], rhs: bool
    ) -> Joint:
        """The Gram matrix by blocks, as the processes' x and z may have different shapes; zeros of who does not ask."""
        parts: list[tuple[slice, LayerGrads]] = []
        start, right = 0, torch.ones(sum(sizes), device=grads.device, dtype=torch.float32)
        for said, size, tensors in zip(asking, sizes, received, strict=True):
            where, start = slice(start, start + size), start + size
            if said is None or not size:
                continue
            if rhs:
                right = right.to(tensors[-1].dtype)
                right[where] = tensors[-1]
            parts.append((where, grads.with_uses(list(zip(tensors[0::2], tensors[1::2], strict=False)))))
        gram: Tensor | None = None
        for number, (rows, first) in enumerate(parts):
            for columns, second in parts[number:]:
                block = first.gram() if first is second else first.gram(second)
                if gram is None:
                    gram = block.new_zeros(sum(sizes), sum(sizes))
                gram[rows, columns] = block
                gram[columns, rows] = block.mT
        if gram is None:  # nobody has a sample
            gram = grads.gram()
        return Joint(gram, sizes, self._exchange.mine(sizes), right if rhs else None)


def agreed(everyone: Sequence[Said]) -> list[str]:
    """Returns the layers that can be answered, in one order; raises ValueError, in all processes alike, if none can.

    >>> agreed([Said("p", 8), Said("a", 8)])
    ['a', 'p']
    >>> agreed([Said("p", 8), Said("a", 8, coming={"a": 1, "p": 1})])  # the second will come to p
    ['a']
    """
    if len({said.nested for said in everyone}) > 1:
        raise _refused(
            "some processes run a part of the model again in this backward pass and others do not",
            "Checkpoint with use_reentrant=False",
        )
    if any(said.probing for said in everyone) and len({said.layer for said in everyone if said.probing}) > 1:
        raise _refused(
            "to decide on a refresh each process probes the first layer that it runs, and these differ",
            "Give probe_layer=, a layer that every process runs",
        )
    asked = sorted({said.layer for said in everyone if said.layer is not None})
    answered = []
    for layer in asked:
        others = [said for said in everyone if said.layer != layer]
        if any(said.sharded for said in others):
            raise _refused(
                f"layer '{layer}' runs in some processes and not in others, and the weights are sharded (FSDP)",
                "Run every layer in every process, or shard nothing and use DistributedDataParallel",
            )
        times = {said.asked.get(layer, 0) for said in everyone if said.layer == layer}
        if len(times) > 1 or any(said.asked.get(layer) for said in others):
            raise _refused(
                f"layer '{layer}' runs in more forward passes of the model in some processes than in others, or again",
                "Call the model as often in every process",
            )
        if any(said.layer is None and said.coming.get(layer) for said in others):
            raise _refused(
                f"layer '{layer}' has no stored coefficients for this batch in some processes, and in others it has",
                "Let each process run the same layers in the same batch of every epoch",
            )
        if not any(said.coming.get(layer) for said in others):
            answered.append(layer)
    if asked and not answered:
        raise _refused(
            f"the processes run layers {asked} in different orders, so that each would wait for another",
            "Run the layers that processes share in the same order",
        )
    return answered


def _refused(what: str, remedy: str) -> ValueError:
    return ValueError(
        f"gram='global' joins the samples of one backward pass of each process, layer by layer, but {what}. "
        f"{remedy}, or use gram='layer', where each process solves for its own samples"
    )


def _raise(error: ValueError) -> None:
    raise error


def _sizes(everyone: Sequence[Said], layer: str) -> list[int]:
    """How many samples of each process a layer's joint system has.

    Of a process that does not run it those that its model was called with; none where rows are no samples (experts'
    tokens that count one by one).
    """
    asking = [said for said in everyone if said.layer == layer]
    if any(said.samples not in (None, said.batch) for said in asking):
        return [said.batch if said in asking else 0 for said in everyone]
    return [said.batch if said in asking or said.samples is None else said.samples for said in everyone]


def _shapes(said: Said, rhs: bool) -> list[Shape]:
    shapes = [shape for use in said.uses for shape in use]
    return [*shapes, (said.batch,)] if rhs else shapes


def _promoted(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    result = dtypes[0] if dtypes else torch.float32
    for dtype in dtypes[1:]:
        result = torch.promote_types(result, dtype)
    return result
