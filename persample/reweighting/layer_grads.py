"""What a linear or convolution layer's input and output gradient make of its per-sample gradients.

symbol   meaning                                                            shape
x, z     a layer's input; gradient of a loss w.r.t. its output              [B, T, I], [B, T, O]
g_b      sample b's share of the layer's gradient, weight and bias together [N]
K        the layer's Gram matrix ⟨g_a, g_b⟩                                 [B, B]
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from persample.blocks import reductions, sums
from persample.blocks.convolution.algorithms import patches
from persample.blocks.convolution.build import conv_block
from persample.blocks.convolution.choice import gram_form
from persample.blocks.precision import full_precision
from persample.blocks.types import Block, Conv, Dense, Outer
from persample.reweighting.batch_axis.folded import image_block
from persample.reweighting.weighted_sum import Parameters, layer_sum

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Linear, *CONVOLUTIONS)

KEEP_BYTES = 256 * 2**20
"""Per-sample gradients of a convolution, formed for its Gram matrix, are kept for the weighted sum up to this size."""


class LayerGrads:
    """The per-sample gradients of one layer, in factored form; everything is computed on demand.

    g_b is sample b's share of the gradient of the *training loss*: with a mean over the batch it is 1/B of
    the gradient of the sample's own loss. Weight and bias count as one vector.

    >>> model, seen = nn.Linear(2, 1, bias=False), {}
    >>> with persample.reweight(model, lambda layer, grads: seen.update({layer: grads})):
    ...     model(torch.tensor([[3.0, 4.0], [0.0, 1.0]])).sum().backward()
    >>> type(seen[""]).__name__
    'LayerGrads'
    """

    def __init__(
        self, module: nn.Module | None, uses: Sequence[tuple[Tensor, Tensor]], needed: Sequence[bool], axis: int
    ) -> None:
        self._module, self._uses, self._needed, self._axis = module, uses, needed, axis
        self._formed: Dense | None = None  # the rows of the weight, once they are

    @cached_property
    def _calls(self) -> list[Outer | Conv]:
        if isinstance(self._module, nn.Linear | None):
            pairs = [(_rows(x, self._axis), _rows(z, self._axis)) for x, z in self._uses]
            # Several calls are more positions: Σ_t runs over all of them, cross terms included.
            return [
                Outer(*(parts[0] if len(parts) == 1 else torch.cat(parts, 1) for parts in zip(*pairs, strict=True)))
            ]
        module: Any = self._module
        images = module.weight.dim() + 1  # one more axis
        return [image_block(module, x, z) if x.dim() == images else conv_block(module, x, z) for x, z in self._uses]

    def _formed_rows(self, call: Outer | Conv) -> Tensor:
        """The rows of the weight, shaped like it: that of a sample's images has one more axis."""
        rows, module = reductions.materialise(call), cast(Any, self._module)
        return rows if module is None else rows.view(len(rows), *module.weight.shape)

    @property
    def _weight(self) -> Block | None:
        if self._formed is not None or not self._needed[0]:
            return self._formed
        if len(self._calls) > 1:
            first, *rest = map(self._formed_rows, self._calls)
            self._formed = Dense(sum(rest, first))
            return self._formed
        return self._calls[0]

    @cached_property
    def _bias(self) -> Block | None:
        if not self._needed[1]:
            return None
        if isinstance(self._module, nn.Linear | None):
            rows = full_precision(self._calls[0].z)
            return Dense(rows[:, 0] if rows.shape[1] == 1 else rows.sum(1))
        first, *rest = (full_precision(call.z).flatten(2).sum(2) for call in self._calls)
        return Dense(sum(rest, first))

    @property
    def batch_size(self) -> int:
        """The number of samples B.

        >>> model, seen = nn.Linear(2, 1, bias=False), {}
        >>> with persample.reweight(model, lambda layer, grads: seen.update({layer: grads.batch_size})):
        ...     model(torch.tensor([[3.0, 4.0], [0.0, 1.0]])).sum().backward()
        >>> seen[""]
        2
        """
        return self._uses[0][1].shape[self._axis]

    @property
    def device(self) -> torch.device:
        """Where the gradients are.

        >>> model, seen = nn.Linear(2, 1, bias=False), {}
        >>> with persample.reweight(model, lambda layer, grads: seen.update({layer: grads.device})):
        ...     model(torch.tensor([[3.0, 4.0], [0.0, 1.0]])).sum().backward()
        >>> seen[""]
        device(type='cpu')
        """
        return self._uses[0][1].device

    @property
    def calls(self) -> tuple[Outer | Conv, ...]:
        """x, z and the geometry of each call of the layer, as blocks, for whoever sums over positions without patches.

        >>> model, seen = nn.Linear(2, 1, bias=False), {}
        >>> with persample.reweight(model, lambda layer, grads: seen.update({layer: grads.calls})):
        ...     model(torch.tensor([[3.0, 4.0], [0.0, 1.0]])).sum().backward()
        >>> [(type(call).__name__, list(call.x.shape), list(call.z.shape)) for call in seen[""]]
        [('Outer', [2, 1, 2], [2, 1, 1])]
        """
        return tuple(self._calls)

    @property
    def _parts(self) -> list[sums.Uses]:
        """Of the weight and of the bias: a block each."""
        return [(block,) for block in (self._weight, self._bias) if block is not None]

    def gram(self, other: LayerGrads | None = None) -> Float[Tensor, "batch other"]:
        """Returns K_ab = ⟨g_a, g_b⟩, in float32 or better; keeps what it forms for `weighted_sum`.

        other: the gradients h_b of the same layer on other samples, from `with_uses`: then K_ab = ⟨g_a, h_b⟩.

        >>> model, seen = nn.Linear(2, 1, bias=False), {}
        >>> with persample.reweight(model, lambda layer, grads: seen.update({layer: grads.gram()})):
        ...     model(torch.tensor([[3.0, 4.0], [0.0, 1.0]])).sum().backward()
        >>> seen[""]
        tensor([[25.,  4.],
                [ 4.,  1.]])
        """
        self._form()
        ours = self._parts
        pairs = zip(ours, ours if other is None else other._parts, strict=True)
        return sums.add([sums.gram(*pair) for pair in pairs])

    def with_uses(self, uses: Sequence[tuple[Tensor, Tensor]]) -> LayerGrads:
        """Returns the gradients of the same layer for other uses of it: (x, z) of each call, samples on axis 0.

        >>> model, seen = nn.Linear(2, 1, bias=False), {}
        >>> def policy(layer, grads):
        ...     elsewhere = torch.tensor([[0.0, 2.0], [1.0, 0.0], [0.0, 0.0]]), torch.ones(3, 1)  # other samples
        ...     seen[layer] = grads.gram(grads.with_uses([elsewhere]))
        >>> with persample.reweight(model, policy):
        ...     model(torch.tensor([[3.0, 4.0], [0.0, 1.0]])).sum().backward()
        >>> seen[""]
        tensor([[8., 3., 0.],
                [2., 0., 0.]])
        """
        return LayerGrads(self._module, uses, self._needed, 0)

    def norms(self) -> Float[Tensor, " batch"]:
        """Returns ‖g_b‖.

        >>> model, seen = nn.Linear(2, 1, bias=False), {}
        >>> with persample.reweight(model, lambda layer, grads: seen.update({layer: grads.norms()})):
        ...     model(torch.tensor([[3.0, 4.0], [0.0, 1.0]])).sum().backward()
        >>> seen[""]
        tensor([5., 1.])
        """
        return sums.norms(self._parts)

    def weighted_sum(self, c: Float[Tensor, " batch"] | None = None) -> Parameters:
        """Returns Σ_b c_b g_b, weight and bias apart; None for one that needs no gradient. c: by default all ones.

        >>> model, seen, c = nn.Linear(2, 1, bias=False), {}, torch.tensor([1.0, 2.0])
        >>> with persample.reweight(model, lambda layer, grads: seen.update({layer: grads.weighted_sum(c)})):
        ...     model(torch.tensor([[3.0, 4.0], [0.0, 1.0]])).sum().backward()
        >>> seen[""]
        (tensor([[3., 6.]]), None)
        """
        if self._formed is not None and c is not None:
            bias = self._bias
            return reductions.weighted_sum(self._formed, c), None if bias is None else reductions.weighted_sum(bias, c)
        return layer_sum(self._module, self._uses, self._needed, self._axis, c)

    def factors(self) -> list[tuple[Tensor, Tensor]]:
        """Returns for each call of the layer (x, z) with g_b = Σ_t z_bt ⊗ x_bt in every group, in float32 or better.

            x    [batch, groups, inp, *kernel, *time]    what the weight meets: inputs, or patches of them
            z    [batch, groups, out, *time]             gradient of the training loss w.r.t. the output

        Both may be views with overlapping memory, so that patches cost nothing before they are used; never write
        into them. A linear layer has one group, no kernel axes and one time axis, which holds all of its calls.

        Raises ValueError for a transposed convolution, in which it is z that comes in patches.

        >>> model, seen = nn.Linear(2, 1, bias=False), {}
        >>> with persample.reweight(model, lambda layer, grads: seen.update({layer: grads.factors()})):
        ...     model(torch.tensor([[3.0, 4.0], [0.0, 1.0]])).sum().backward()
        >>> [(x, z)] = seen[""]
        >>> x.shape, z.shape  # batch, groups, features, time
        (torch.Size([2, 1, 2, 1]), torch.Size([2, 1, 1, 1]))
        """
        result = []
        for block in self._calls:
            x, z = full_precision(block.x), full_precision(block.z)
            if isinstance(block, Outer):
                result.append((x.mT.unsqueeze(1), z.mT.unsqueeze(1)))
                continue
            if block.spec.transposed:
                raise ValueError(
                    "a transposed convolution has no patches of its input; use gram, norms or weighted_sum"
                )
            covered = patches(x, block.spec, tuple(z.shape[2:]))
            groups = block.spec.groups
            result.append((covered.unflatten(1, (groups, -1)), z.unflatten(1, (groups, -1))))
        return result

    def explain(self) -> str:
        """Returns a line that says in which form the gradients are held, and their bytes.

        >>> model, seen = nn.Linear(2, 1, bias=False), {}
        >>> with persample.reweight(model, lambda layer, grads: seen.update({layer: grads.explain()})):
        ...     model(torch.tensor([[3.0, 4.0], [0.0, 1.0]])).sum().backward()
        >>> seen[""]
        'weight: Outer 2 × [1, 2], 24 bytes'
        """
        return " + ".join(
            f"{name}: {type(block).__name__} {block.batch} × {list(block.shape)}, {block.nbytes:,} bytes"
            for name, block in (("weight", self._weight), ("bias", self._bias))
            if block is not None
        )

    def _form(self) -> None:
        """Forms a convolution's rows where its Gram matrix would form them anyway.

        A linear layer's rows are formed and consumed a few at a time, in the cache; its weighted sum from x and z
        costs no more than reading them back would.
        """
        weight = self._weight
        if isinstance(weight, Conv) and gram_form(weight.x, weight.z, weight.spec) == "materialise":
            bytes_each = torch.finfo(weight.dtype).bits // 8
            if weight.batch * weight.numel * bytes_each <= KEEP_BYTES:
                self._formed = Dense(self._formed_rows(weight))


class UnreadGrads(LayerGrads):
    """Of a layer of which it is not certain whose its rows are: their sum is, all else raises what `check` has found.

    So a policy that leaves the layer alone (returns None) is not told of it.
    """

    def __init__(
        self,
        module: nn.Module | None,
        uses: Sequence[tuple[Tensor, Tensor]],
        needed: Sequence[bool],
        error: Exception,
    ) -> None:
        axes = 2 if module is None or isinstance(module, nn.Linear) else cast(Any, module).weight.dim()
        # A layer may be called for one sample at a time, and then its output has no axis for rows.
        each = [(x, z) if z.dim() >= axes else (x.unsqueeze(0), z.unsqueeze(0)) for x, z in uses]
        super().__init__(module, each, needed, 0)
        self._error = error

    @property
    def _calls(self) -> list[Outer | Conv]:
        raise self._error

    @property
    def batch_size(self) -> int:
        """Raises."""
        raise self._error

    def weighted_sum(self, c: Tensor | None = None) -> Parameters:
        """Returns the plain gradient; raises where factors are given."""
        if c is not None:
            raise self._error
        return super().weighted_sum()


def _rows(factor: Tensor, axis: int) -> Float[Tensor, "batch time features"]:
    factor = factor.movedim(axis, 0) if axis else factor
    if factor.dim() == 3:
        return factor
    return factor.unsqueeze(1) if factor.dim() == 2 else factor.flatten(1, -2)
