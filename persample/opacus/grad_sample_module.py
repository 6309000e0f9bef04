"""A model that Opacus trains: its own class, whose forward and backward passes are recorded by this library.

Opacus asks for `type(module)` to be its own, so no subclass will do: the object is of Opacus' class, without the hooks
on layers, and a `Recorder` stands for its `forward`. The rest, from `zero_grad` to the checks of its optimizer, is
Opacus' code. Its validator refuses LSTM, GRU and attention by type, for what its hooks cannot do; of models that are
wrapped here they are allowed. Batch normalisation is not, nor are running statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakSet

from torch import nn

from persample.errors import UnsupportedError
from persample.opacus.recording import Recorder

WITHOUT_HOOKS = (nn.LSTM, nn.GRU, nn.MultiheadAttention)
"""What Opacus replaces by layers of its own because its hooks do not fire inside."""
_OURS: WeakSet[nn.Module] = WeakSet()


def GradSampleModule(
    model: nn.Module,
    *,
    batch_first: bool = True,
    loss_reduction: str = "mean",
    ghost: bool = False,
    max_grad_norm: float | None = None,
    output_axis: int | None = None,
    check: bool = True,
) -> Any:
    """Returns a model for `PrivacyEngine.make_private`: an object of Opacus' class, with gradients of this library.

    So models train privately that Opacus' hooks refuse, or get wrong, such as those with tied weights, recurrent layers
    or time first; with Opacus' sampling, noise, accountants and `BatchMemoryManager`, and the same ε. Batches whose
    samples couple inside the model are refused. As with Opacus, the loss must be one of each sample, reduced over the
    batch: of a loss that lets samples influence each other nothing is known here.

    `loss.backward()` forms rows into `grad_sample` of the parameters, or with `ghost=True` norms and a weighted sum
    alone; no ordinary gradient is formed, so `.grad` is what Opacus' optimizer makes of them.

    Args:
        model: any module in training mode; its outputs hold one row for each sample. Which parameters are trained must
            not change afterwards.
        batch_first: whether axis 0 of its first input counts samples; if not, axis 1 does.
        loss_reduction: "mean" or "sum", over the batch; as given to `make_private`.
        ghost: to be used with `make_private(grad_sample_mode="ghost")`, which returns a criterion, too.
        max_grad_norm: with `ghost`, the bound that `make_private` is given, which does not hand it on to a module that
            is there already; another one is refused in `loss.backward()`.
        output_axis: the axis of every output that counts samples; by default it is found by its length.
        check: as in `persample.per_sample`.

    Raises:
        UnsupportedError: Opacus is not installed; a model in DistributedDataParallel.
        CoupledSamplesError, CheckError: in `loss.backward()`, as in `persample.per_sample`.
        TypeError, ValueError: no module; options that do not go together.

    >>> from persample.opacus import GradSampleModule
    >>> private = GradSampleModule(nn.Linear(4, 2))  # then PrivacyEngine().make_private(module=private, ...)
    >>> type(private).__module__, type(private).__name__
    ('opacus.grad_sample.grad_sample_module', 'GradSampleModule')
    >>> private(torch.randn(8, 4)).square().mean().backward()
    >>> private._module.weight.grad_sample.shape
    torch.Size([8, 2, 4])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    if loss_reduction not in ("mean", "sum"):
        raise ValueError(f"loss_reduction must be 'mean' or 'sum'; got {loss_reduction!r}")
    if ghost != (max_grad_norm is not None):
        raise ValueError(
            f"max_grad_norm goes with ghost=True: the bound that make_private is given; got ghost={ghost!r}, "
            f"max_grad_norm={max_grad_norm!r}"
        )
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm must be positive; got {max_grad_norm!r}")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)) or _of_several(model):
        raise UnsupportedError(
            f"the model is a {type(model).__name__}: make_private asks the wrapped model itself whether there are "
            "several processes, and would see none. Train in one process"
        )
    wrapper = _opacus_module(model, batch_first=batch_first, loss_reduction=loss_reduction, max_grad_norm=max_grad_norm)
    recorder = wrapper.forward = Recorder(wrapper, output_axis=output_axis, check=check)
    if ghost:
        wrapper.get_clipping_coef = recorder.clipping_coef
    return wrapper


def _opacus_module(model: nn.Module, *, max_grad_norm: float | None, **options: Any) -> Any:
    """An object of Opacus' class, without hooks."""
    try:
        from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
        from opacus.grad_sample.gsm_base import AbstractGradSampleHooks
        from opacus.validators import ModuleValidator, register_module_validator
    except ImportError as error:
        raise UnsupportedError("persample.opacus needs the Opacus library: pip install 'opacus>=1.5'") from error
    kind: Any = GradSampleModule if max_grad_norm is None else GradSampleModuleFastGradientClipping
    wrapper = kind.__new__(kind)
    nn.Module.__init__(wrapper)
    AbstractGradSampleHooks.__init__(wrapper, model, **options)
    wrapper.hooks_enabled, wrapper.grad_accumulation_allowed = True, True
    wrapper.force_functorch, wrapper.grad_accumulation_hook = False, None
    if max_grad_norm is not None:
        wrapper.trainable_parameters = [p for p in model.parameters() if p.requires_grad]
        wrapper.max_grad_norm, wrapper.use_ghost_clipping = max_grad_norm, True
        wrapper._per_sample_gradient_norms = None
    _OURS.update(model.modules())
    for layer in WITHOUT_HOOKS:
        validator = ModuleValidator.VALIDATORS.get(layer)
        if validator is not None and not isinstance(validator, _Allowing):
            register_module_validator(layer)(_Allowing(validator))
    return wrapper


class _Allowing:
    """A validator of Opacus that lets modules pass which are wrapped here."""

    def __init__(self, validator: Callable[[nn.Module], list]) -> None:
        self._validator = validator

    def __call__(self, module: nn.Module) -> list:
        return [] if module in _OURS else self._validator(module)


def _of_several(model: nn.Module) -> bool:
    return type(model).__name__ == "DifferentiallyPrivateDistributedDataParallel"
