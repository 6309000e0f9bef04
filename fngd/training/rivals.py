"""Optimisers that are not ours, for `python -m fngd compare`: torch's Muon, and those of the `rivals` extra."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fngd.training.settings import Config


class MuonAndAdamW(Optimizer):
    """`torch.optim.Muon` for a model's hidden matrices, AdamW for all else: the last matrix, tables, vectors.

    A convolution's weight [out, in, *kernel] is seen as a matrix [out, in·kernel]. Muon's updates are scaled to the
    size of AdamW's (`adjust_lr_fn="match_rms_adamw"`), so one learning rate serves both.

    Arguments:
        lr: learning rate of both, ≥ 0.
        weight_decay: of both, decoupled.
        momentum: of Muon.

    Raises ValueError where torch has no Muon, before version 2.9.
    """

    def __init__(self, model: nn.Module, *, lr: float, weight_decay: float = 0.01, momentum: float = 0.95) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise ValueError(f"muon needs torch.optim.Muon, of torch 2.9 or newer; this is torch {torch.__version__}")
        hidden = hidden_matrices(model)
        others = [p for p in model.parameters() if p.requires_grad and all(p is not each for each in hidden)]
        self._views = [(each, nn.Parameter(each.detach().flatten(1))) for each in hidden]
        parts: list[Optimizer] = []
        if hidden:
            views = [view for _, view in self._views]
            options: dict[str, Any] = {"momentum": momentum, "adjust_lr_fn": "match_rms_adamw"}
            parts.append(torch.optim.Muon(views, lr=lr, weight_decay=weight_decay, **options))
        if others:
            parts.append(torch.optim.AdamW(others, lr=lr, weight_decay=weight_decay))
        super().__init__([*hidden, *others], {"lr": lr})
        self._parts = parts
        self._share_groups()

    def _share_groups(self) -> None:
        """A scheduler sees, and changes, the groups that the two step by."""
        self.param_groups = [group for part in self._parts for group in part.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients of the model's parameters."""
        for each, _ in self._views:
            each.grad = None
        for part in self._parts:
            part.zero_grad()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Makes one step of both; returns the closure's loss, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for each, view in self._views:
            view.data = each.data.flatten(1)
            view.grad = None if each.grad is None else each.grad.flatten(1)
        for part in self._parts:
            part.step()
        for each, view in self._views:
            if each.data_ptr() != view.data_ptr():  # not contiguous: the view was a copy
                each.copy_(view.view_as(each))
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Returns the states of both."""
        return {"parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        for part, state in zip(self._parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share_groups()


def hidden_matrices(model: nn.Module) -> list[Tensor]:
    """Returns the weights of linear and convolution layers, but for the last one's.

    >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))
    >>> [tuple(each.shape) for each in hidden_matrices(model)]
    [(2, 1, 3, 3)]
    """
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    found = [module.weight for module in model.modules() if isinstance(module, kinds)]
    return [weight for weight in found[:-1] if weight.requires_grad and weight is not found[-1]]


def muon(model: nn.Module, lr: float, config: Config, steps_per_epoch: int) -> Optimizer:
    """Muon beside AdamW."""
    return MuonAndAdamW(model, lr=lr)


def soap(model: nn.Module, lr: float, config: Config, steps_per_epoch: int) -> Optimizer:
    """SOAP (Vyas et al. 2024): Adam in the eigenbasis of Shampoo's matrices, renewed every 10 steps."""
    kind = _of_extra("soap", "pytorch_optimizer", "SOAP")
    return kind(model.parameters(), lr=lr, weight_decay=0.01, precondition_frequency=10)


def adahessian(model: nn.Module, lr: float, config: Config, steps_per_epoch: int) -> Optimizer:
    """AdaHessian (Yao et al. 2021): Adam with the diagonal of the Hessian matrix in place of squared gradients."""
    kind = _of_extra("adahessian", "pytorch_optimizer", "AdaHessian")
    optimizer = kind(model.parameters(), lr=lr, weight_decay=config.weight_decay)
    optimizer.create_graph = True
    return optimizer


def schedule_free(model: nn.Module, lr: float, config: Config, steps_per_epoch: int) -> Optimizer:
    """Schedule-free AdamW (Defazio et al. 2024), warmed up for a twentieth of the run; give --schedule constant."""
    kind = _of_extra("schedule-free", "schedulefree", "AdamWScheduleFree")
    warm_up = max(1, config.epochs * steps_per_epoch // 20)
    return kind(model.parameters(), lr=lr, weight_decay=0.01, warmup_steps=warm_up)


def _of_extra(name: str, module: str, kind: str) -> Any:
    try:
        return getattr(import_module(module), kind)
    except ImportError as error:
        distribution = module.replace("_", "-")
        raise ValueError(f"{name} needs {module}, which is not installed: pip install {distribution}") from error
