"""Rules of backend `hooks`: from one call of a module, by its type, to the blocks of its parameters.

With x the module's input, z the gradient at its output, x̂ the normalised input, and t the positions of a sample:

    Linear                    weight Σ_t z_bt ⊗ x_bt           bias Σ_t z_bt
    Conv, ConvTranspose       the same with patches of x
    Embedding, EmbeddingBag   weight Σ_t e_(index_bt) ⊗ z_bt
    normalisations            weight Σ_t z_bt ∘ x̂_bt           bias Σ_t z_bt
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from persample.attribution.owner import NOBODY, Owner
from persample.blocks.convolution.build import conv_block
from persample.blocks.reductions import full_precision, materialise
from persample.blocks.types import Block, Dense, Outer, Rows
from persample.errors import UnsupportedError


def place(path: str) -> str:
    """How an error names the module at a path."""
    return f"layer {path!r}" if path else "the model itself"


@dataclass(frozen=True)
class Call:
    """One call of a module, as a rule sees it."""

    path: str
    module: Any
    arguments: Mapping[str, Any]
    """Arguments of `forward` by name, without graph."""
    z: Tensor
    owner: Owner
    wanted: frozenset[str]
    """Own names of the trainable parameters."""

    @property
    def x(self) -> Tensor:
        """The first argument."""
        return next(iter(self.arguments.values()))

    def refused(self, reason: str) -> UnsupportedError:
        """The error for a use of the module that its rule does not cover."""
        return UnsupportedError(
            f"backend 'hooks' does not cover {place(self.path)} ({type(self.module).__name__}): {reason}. "
            "Use backend='outputs', which covers every operation."
        )

    def rows(self, features: int) -> Owner:
        """Owner of z with all but the last `features` dimensions flattened into rows."""
        ids, axis = self.owner.ids, self.owner.axis
        if axis is not None:
            ids = ids.view([-1 if d == axis else 1 for d in range(self.z.ndim)]).expand(self.z.shape)
        lead = self.z.shape[: self.z.ndim - features].numel()
        ids = ids.reshape(lead, self.z.shape[self.z.ndim - features :].numel())
        top = ids.amax(1) if ids.shape[1] else ids.new_full((lead,), NOBODY)
        if not bool(((ids == top[:, None]) | (ids == NOBODY)).all()):
            raise self.refused("several samples share a row of its output")
        return Owner(0, top, self.owner.batch)

    def split(self, tensor: Tensor, features: int) -> Tensor:
        """`tensor` split into samples and positions, [B, T, *features].

        Its leading dimensions are those of z but for the last `features`.
        """
        lead = self.z.ndim - features
        axis = self.owner.axis
        if axis is not None and axis < lead:
            return self.owner.by_sample(tensor).flatten(1, lead)
        flat = tensor.reshape(self.z.shape[:lead].numel(), *tensor.shape[lead:])
        return self.rows(features).by_sample(flat)

    def batched(self, ndim: int) -> Call:
        """The call with the batch dimension of one that the module adds to a single sample."""
        if self.z.ndim == ndim:
            return self
        owner = self.owner if self.owner.axis is None else replace(self.owner, axis=self.owner.axis + 1)
        owner = owner if owner.axis is not None else replace(owner, ids=owner.ids[None])
        name = next(iter(self.arguments))
        return replace(self, z=self.z[None], owner=owner, arguments={**self.arguments, name: self.x[None]})


ModuleRule = Callable[[Call], dict[str, Block]]
MODULE_RULES: dict[type[nn.Module], ModuleRule] = {}

# What a subclass may define and still compute what its base computes.
_HARMLESS = frozenset(
    {
        *("__init__", "__module__", "__doc__", "__qualname__", "__annotations__", "__annotate__", "__annotate_func__"),
        *("__annotations_cache__", "__conditional_annotations__", "__firstlineno__", "__static_attributes__"),
        *("__parameters__", "__orig_bases__", "__type_params__", "__classdictcell__", "__dict__", "__weakref__"),
        *("__repr__", "__hash__", "__eq__", "__reduce_ex__", "__getstate__", "__setstate__", "__constants__"),
        *("extra_repr", "reset_parameters", "from_pretrained", "training", "initialize_parameters", "cls_to_become"),
        *("_load_from_state_dict", "_save_to_state_dict"),
    }
)


def module_rule(*kinds: type[nn.Module]) -> Callable[[ModuleRule], ModuleRule]:
    """Registers a rule for these types of modules."""

    def add(function: ModuleRule) -> ModuleRule:
        MODULE_RULES.update(dict.fromkeys(kinds, function))
        return function

    return add


def rule_of(module: nn.Module) -> ModuleRule | None:
    """The rule of the module's type, or of a base whose computation the type and the instance leave alone."""
    kind = type(module)
    for position, base in enumerate(kind.__mro__):
        if base in MODULE_RULES:
            redefined = {name for sub in kind.__mro__[:position] for name in vars(sub)} | vars(module).keys()
            computing = {name for name in redefined - _HARMLESS if hasattr(base, name)}
            return MODULE_RULES[base] if not computing else None
    return None


def by_batch_statistics(module: nn.Module) -> bool:
    """Whether the module normalises by statistics of the batch."""
    return isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)


def _summed(call: Call, entries: Tensor, features: int) -> Dense:
    return Dense(call.split(full_precision(entries), features).sum(1))


@module_rule(nn.Linear)
def linear(call: Call) -> dict[str, Block]:
    """weight [O, I], bias [O]."""
    if call.z.is_complex():
        raise call.refused("complex numbers")
    blocks: dict[str, Block] = {}
    if "weight" in call.wanted:
        blocks["weight"] = Outer(call.split(call.x.to_dense(), 1), call.split(call.z, 1))
    if "bias" in call.wanted:
        blocks["bias"] = _summed(call, call.z, 1)
    return blocks


@module_rule(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def convolution(call: Call) -> dict[str, Block]:
    """weight, bias; the input is padded by hand where the padding is no property of the convolution itself."""
    if call.z.is_complex():
        raise call.refused("complex numbers")
    call = call.batched(len(call.module.kernel_size) + 2)
    owner = call.rows(call.z.ndim - 1)
    blocks: dict[str, Block] = {}
    if "weight" in call.wanted:
        block: Block = conv_block(call.module, call.x, call.z)
        # several images of one sample: one gradient each, then their sum
        blocks["weight"] = block if owner.layout == "identity" else Dense(owner.sum_by_sample(materialise(block)))
    if "bias" in call.wanted:
        blocks["bias"] = Dense(owner.sum_by_sample(full_precision(call.z).flatten(2).sum(2)))
    return blocks


@module_rule(nn.Embedding)
def embedding(call: Call) -> dict[str, Block]:
    """weight [N, D]; the padding row gets no gradient."""
    module, indices, z = call.module, call.x, call.z
    if module.scale_grad_by_freq:
        raise call.refused("scale_grad_by_freq counts ids over the whole batch")
    if module.padding_idx is not None:
        z = torch.where((indices == module.padding_idx)[..., None], 0, z)
    return {"weight": Rows(call.split(indices, 1), call.split(z, 1), module.num_embeddings)}


@module_rule(nn.EmbeddingBag)
def embedding_bag(call: Call) -> dict[str, Block]:
    """weight [N, D]; an index adds its bag's z, weighted, or divided by the bag's size."""
    module, indices, z = call.module, call.x, full_precision(call.z)
    if module.mode not in ("sum", "mean"):
        raise call.refused(f"mode {module.mode!r}; modes 'sum' and 'mean' are covered")
    if module.scale_grad_by_freq:
        raise call.refused("scale_grad_by_freq counts ids over the whole batch")
    numbers = torch.arange(z.shape[0], device=z.device)
    if indices.ndim == 2:
        bag = numbers.repeat_interleave(indices.shape[1])
    else:
        offsets = call.arguments["offsets"]
        starts = offsets[:-1] if module.include_last_offset else offsets
        ends = torch.cat([starts[1:], starts.new_tensor([indices.numel()])])
        bag = numbers.repeat_interleave(ends - starts)
    flat = indices.reshape(-1)
    counted = torch.ones_like(flat, dtype=z.dtype)
    if module.padding_idx is not None:
        counted = counted * (flat != module.padding_idx)
    factor = counted
    if module.mode == "mean":
        factor = factor / torch.zeros_like(z[:, 0]).index_add_(0, bag, counted).clamp(min=1)[bag]
    weights = call.arguments.get("per_sample_weights")
    if weights is not None:
        factor = factor * weights.reshape(-1)
    of_index = Owner(0, call.rows(1).ids[bag], call.owner.batch)
    return {
        "weight": Rows(of_index.by_sample(flat), of_index.by_sample(z[bag] * factor[:, None]), module.num_embeddings)
    }


@module_rule(nn.LayerNorm, nn.RMSNorm)
def normalised_entries(call: Call) -> dict[str, Block]:
    """weight, bias of the normalised shape."""
    module, x = call.module, full_precision(call.x)
    shape = tuple(module.normalized_shape)
    blocks: dict[str, Block] = {}
    if "weight" in call.wanted:
        if isinstance(module, nn.RMSNorm):
            normalised = F.rms_norm(x, shape, None, module.eps)
        else:
            normalised = F.layer_norm(x, shape, None, None, module.eps)
        blocks["weight"] = _summed(call, full_precision(call.z) * normalised, len(shape))
    if "bias" in call.wanted:
        blocks["bias"] = _summed(call, call.z, len(shape))
    return blocks


def _channels(call: Call, normalise: Callable[[Tensor], Tensor]) -> dict[str, Block]:
    """weight, bias of each channel, dimension 1."""
    z = full_precision(call.z)
    owner = call.rows(z.ndim - 1)
    flat = (*z.shape[:2], prod(z.shape[2:]))
    blocks: dict[str, Block] = {}
    if "weight" in call.wanted:
        entries = z * normalise(full_precision(call.x))
        blocks["weight"] = Dense(owner.sum_by_sample(entries.reshape(*flat).sum(2)))
    if "bias" in call.wanted:
        blocks["bias"] = Dense(owner.sum_by_sample(z.reshape(*flat).sum(2)))
    return blocks


@module_rule(nn.GroupNorm)
def group_norm(call: Call) -> dict[str, Block]:
    """weight, bias [C]."""
    return _channels(call, lambda x: F.group_norm(x, call.module.num_groups, None, None, call.module.eps))


@module_rule(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
def instance_norm(call: Call) -> dict[str, Block]:
    """weight, bias [C]."""
    module = call.module
    own = module.training or not module.track_running_stats
    mean, var = (None, None) if own else (module.running_mean, module.running_var)
    call = call.batched(module._get_no_batch_dim() + 1)
    return _channels(call, lambda x: F.instance_norm(x, mean, var, None, None, own, 0.0, module.eps))


@module_rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
def batch_norm(call: Call) -> dict[str, Block]:
    """weight, bias [C]; by running statistics, or by the batch's in the row reading."""
    module = call.module
    own = by_batch_statistics(module)
    mean, var = (None, None) if own else (module.running_mean, module.running_var)
    return _channels(call, lambda x: F.batch_norm(x, mean, var, None, None, own, 0.0, module.eps))
