"""Models whose parameters are spread over processes: told by name, for the graph has other parameters than the model.

FSDP computes with whole parameters that it gathers anew for every pass, and tensor parallelism with a part of each.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from persample.errors import UnsupportedError

REMEDY = (
    "Compute them on a model that is not sharded: build it once more on each process, load what "
    "torch.distributed.checkpoint.state_dict.get_model_state_dict(model, options=StateDictOptions("
    "full_state_dict=True)) returns there, and give each process its own samples. In training, persample.reweight "
    "takes models of fully_shard as they are"
)


def refuse_sharded(model: nn.Module | None, parameters: Mapping[str, Tensor]) -> None:
    """Raises `UnsupportedError` for parameters that are a part of the model's, or for a model made of such.

    Args:
        model: None where there are parameters alone.
        parameters: by name.
    """
    for what in (*_by_parameter(parameters), *(_by_module(model) if model is not None else ())):
        raise UnsupportedError(
            f"{what}: each process holds a part of the parameters, and gradients for each sample are those of whole "
            f"ones. {REMEDY}"
        )


def _by_parameter(parameters: Mapping[str, Tensor]) -> Iterator[str]:
    dtensor, flat = _known("torch.distributed.tensor", "DTensor"), _known("torch.distributed.fsdp", "FlatParameter")
    for name, parameter in parameters.items():
        if dtensor is not None and isinstance(parameter, dtensor):
            yield (
                f"parameter {name!r} is a DTensor (fully_shard, parallelize_module), placed as "
                f"{tuple(map(str, parameter.placements))} on a mesh of {parameter.device_mesh.size()} processes"
            )
        elif (flat is not None and isinstance(parameter, flat)) or hasattr(parameter, "_fsdp_flattened"):
            yield f"parameter {name!r} is a FlatParameter of FullyShardedDataParallel, or lies in one"


def _by_module(model: nn.Module) -> Iterator[str]:
    known = {kind: _known("torch.distributed.fsdp", kind) for kind in ("FullyShardedDataParallel", "FSDPModule")}
    wrappers = tuple(each for each in known.values() if each is not None)
    if not wrappers or not any(isinstance(module, wrappers) for module in model.modules()):
        return
    for kind, wrapper in known.items():
        for path, module in model.named_modules():
            if wrapper is not None and isinstance(module, wrapper):
                yield f"the model is sharded: module {path!r} is of type {type(module).__name__} ({kind})"


def _known(module: str, name: str) -> Any:
    """A class of torch that is there only if somebody has imported it."""
    return getattr(sys.modules.get(module), name, None)
