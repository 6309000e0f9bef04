"""What NGD and FNGD share: coefficients in the backward pass, then a step of SGD with momentum, or AdamW."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from fngd.natural.adaptive_damping import AdaptiveDamping
from fngd.natural.layer_groups import LayerGroups
from fngd.natural.measuring import Measuring
from fngd.natural.policy import NETWORK, Policy
from fngd.natural.saved_state import check_saved
from fngd.natural.sharing.table import CoefficientTable
from fngd.natural.solve.method import Method
from fngd.natural.true_fisher.sampling import Sampling
from fngd.optim.coverage import Coverage, told
from fngd.optim.distributed import world_size
from fngd.optim.first_order import first_order_step
from fngd.optim.groups import (
    check_group,
    check_scaler,
    completed_group,
    first_order_groups,
    first_parameter,
    sgd_options,
)
from fngd.optim.guards import Unchanged, check_probe
from fngd.optim.kl_clip import by_pass, kl_clip_bound
from fngd.optim.layers import (
    Members,
    Part,
    attention_parameters,
    by_parameter,
    elsewhere,
    members,
    parameters,
    scaled_rows,
    unseen,
)
from fngd.optim.state.copying import Copied
from fngd.optim.state.parts import OwnState, check_state, not_compiled
from persample import Reweighting, reweight
from persample.reweighting import BatchAxis


class NaturalSGD(Sampling, Measuring, Copied, OwnState):
    """Base of `NGD` and `FNGD`; `_table` holds shared coefficients, None computes them in every step."""

    _table: CoefficientTable | None = None

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None = None,
        *,
        lr: float | Tensor = 0.1,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        alpha: float | None = 1e-2,
        damping: float | None = None,
        adapt_damping: AdaptiveDamping | None = None,
        scale: str = "absorb",
        reduction: str = "mean",
        fisher: str = "empirical",
        gram: str = "layer",
        accumulate: str = "separate",
        kl_clip: float | None = None,
        other: str = "sgd",
        other_options: Mapping[str, Any] | None = None,
        output_axis: int = 0,
        scaler: Any = None,
        process_group: Any = None,
        diagnostics: bool = False,
        batch_axis: BatchAxis | None = None,
        functions: bool = True,
        foreach: bool | None = None,
        seed: int = 0,
    ) -> None:
        method = Method(
            alpha=alpha, damping=damping, scale=scale, reduction=reduction, fisher=fisher, gram=gram,
            accumulate=accumulate, kl_clip=kl_clip, output_axis=output_axis,
        )  # fmt: skip
        check_scaler(scaler)
        if self._table is not None:
            method.check_sharing(self._table.refresh_cosine, self._table.probe_layer)
        if adapt_damping is not None and not isinstance(adapt_damping, AdaptiveDamping):
            raise ValueError(f"adapt_damping={adapt_damping!r}; it must be an fngd.AdaptiveDamping(...), or None")
        if adapt_damping is not None and gram == "global":
            raise ValueError("adapt_damping does not go with gram='global'; use gram='layer' or 'network'")
        self._model, self._method, self._group, self._seed = model, method, process_group, seed
        self._reduction = reduction
        self._scaler, self._functions = scaler, functions
        self._adaptive, self._completed = adapt_damping, 0
        self._policy = Policy(
            method,
            self._table,
            chosen=self._chosen,
            groups=lambda: self.param_groups,
            scaler=scaler,
            process_group=process_group,
            diagnostics=diagnostics,
        )
        self._policy.measuring = adapt_damping is not None
        joint = gram == "network"
        handle = self._policy.handle = self._handle = reweight(
            model,
            self._policy.of_all if joint else self._policy.of_layer,
            known=self._policy.known if self._table is not None and not joint else None,
            batch_axis=batch_axis,
            joint=joint,
            outputs=fisher == "improved",
            functions=functions,
            follow=self._policy.meeting.follow if gram == "global" else None,
        )
        self._policy.meeting.handle = handle
        self._layers = LayerGroups(handle)
        defaults = sgd_options(lr, momentum, nesterov, weight_decay, decoupled_weight_decay, foreach=foreach)
        try:
            chosen = {param for path in handle.explain() for param in parameters(handle, path)}
            if functions:
                chosen.update(attention_parameters(model))
            groups = first_order_groups(model.parameters() if params is None else params, chosen, other, other_options)
            super().__init__(groups, defaults)
            self._find_groups()
            self._coverage = Coverage(type(self).__name__, model)
            self._coverage.begin(self.param_groups, other)
            if self._table is not None and self._table.probe_layer is not None:
                check_probe(self._table.probe_layer, handle, self._chosen, model if functions else None)
        except BaseException:
            handle.remove()  # a constructor that fails leaves the model alone
            raise

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as any optimiser does."""
        super().add_param_group(completed_group(param_group))
        check_group(self.param_groups[-1])
        if hasattr(self, "_coverage"):  # torch's constructor calls this, too
            self._find_groups()
            self._coverage.add(self.param_groups[-1:])

    def _find_groups(self) -> None:
        self._layers.find_groups(self.param_groups)
        self._unchanged = Unchanged(self._model)

    def _chosen(self, layer: str) -> bool:
        return self._layers.chosen(layer, self.param_groups)

    @property
    def handle(self) -> Reweighting:
        """The handle of `persample.reweight` on the model: its layers, and a way to watch what they are answered.

        >>> fngd.NGD(nn.Linear(3, 1), lr=0.1).handle.layers
        ('',)
        """
        return self._handle

    def paused(self) -> AbstractContextManager[None]:
        """Returns a context in which passes through the model are plain, and none of this optimiser's backward passes.

        For gradients that are differentiated again, as a gradient penalty's: run the forward pass inside. What its
        backward pass adds to `.grad` is the plain gradient; the passes outside are
        preconditioned as ever.

        >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        >>> opt, x = fngd.NGD(model, lr=0.1), torch.randn(8, 3, requires_grad=True)
        >>> with opt.paused():
        ...     [slope] = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        >>> penalty = (slope.norm(dim=1) - 1).square().mean()
        >>> (model(x).mean() + penalty).backward()
        >>> opt.step()
        """
        return self._handle.paused()

    @property
    def diagnostics(self) -> dict[str, dict[str, Tensor]]:
        """For each layer what the latest backward pass did to it, see `fngd.natural.diagnostics`; needs
        diagnostics=True.

        >>> model = nn.Linear(3, 1)
        >>> opt = fngd.NGD(model, lr=0.1, diagnostics=True)
        >>> model(torch.randn(8, 3)).square().mean().backward()
        >>> opt.step()
        >>> sorted(opt.diagnostics[""])
        ['cosine', 'damping', 'effective_rank', 'mean', 'share', 'spread']
        """
        if self._policy.recorder is None:
            raise ValueError("nothing was recorded; construct the optimiser with diagnostics=True")
        return self._policy.recorder.figures()

    @property
    def bytes_sent(self) -> int:
        """Bytes that this process has sent to gather factors, with gram='global'; DDP's own are not counted.

        >>> fngd.NGD(nn.Linear(3, 1), lr=0.1, gram="global").bytes_sent  # one process has nobody to send to
        0
        """
        return self._policy.exchange.bytes_sent

    def _preconditioned(self) -> tuple[list[Part], Callable[[Tensor], str]]:
        """What is, and why a parameter is not."""
        return told(self._model, self._handle, self.explain(), functions=self._functions)

    def _elsewhere(self, layers: Iterable[str]) -> list[Members]:
        """The layers that this step has met in other processes, where these are others than here."""
        exchange = self._policy.exchange
        return elsewhere(exchange, self.param_groups, self._handle, layers) if exchange.world > 1 else []

    def _clipped(self) -> dict[Tensor, Tensor]:
        """The gradients of preconditioned layers times ν, by parameter; empty without a KL clip."""
        inner = self._policy.inner
        if self._method.kl_clip is None or not (inner or world_size(self._group) > 1):
            return {}
        rates = {layer: self._layers.rate(layer, self.param_groups) for layer in inner}
        passes, device = by_pass(inner, rates), first_parameter(self.param_groups).device
        scale = kl_clip_bound(passes, self._method.kl_clip, self._group, device)
        parts = by_parameter([*(members(self._handle, layer) for layer in inner), *self._elsewhere(inner)])
        return {param: scaled_rows(param.grad, rows, scale) for param, rows in parts.items() if param.grad is not None}

    @not_compiled
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Makes one step with the gradients in `.grad`; returns the closure's loss, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            self._check_where_it_matters(loss)
        self._check_adapted()
        self._unchanged.look(self.param_groups)
        counts = self._policy.met_batch or not self._only_makes_state()
        if counts:
            self._coverage.look(self._preconditioned)
            self._policy.look_at_scale(type(self).__name__)
        clipped = self._clipped()
        before, elsewhere = self._before()
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if params:
                first_order_step(group, params, [clipped.get(param, param.grad) for param in params], self.state)
        if before:
            self._predicted = self._predict(before, elsewhere)
        if counts:
            self._completed += 1
            self._end_batch()
        else:
            self._as_new()
        return loss

    @not_compiled
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients. A batch whose step was skipped (by a GradScaler that met inf) ends here.

        Gradients that are no batch's (a GAN's generator's) are for the model's own zero_grad() to clear, first. A batch
        whose backward pass has raised an exception does not end: it is to be run again. To go on without it call
        `start_epoch()` of `FNGD` in every epoch, by which later ones keep their places.
        """
        if self._policy.met_batch and self._policy.end_unstepped():
            self._end_batch()
        super().zero_grad(set_to_none)

    def _end_batch(self) -> None:
        self._policy.end_batch()
        self._policy.measuring = self._adaptive is not None and self._completed % self._adaptive.every == 0

    def state_dict(self) -> dict[str, Any]:
        """Returns torch's optimiser state, and by name what else a run needs to go on.

        "coefficients": the table and the place in the epoch; "adaptive": the factor on the damping and the steps
        made; "sampling": the state of the random numbers.
        """
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` returned; tensors go to the device of the parameters.

        Raises ValueError if the state was saved by another kind of optimiser or for another model, holds no
        coefficients, or those of a loader of another length. Then nothing has been loaded.
        """
        super().load_state_dict(state_dict)

    def _own_state(self) -> dict[str, Any]:
        own: dict[str, Any] = {}
        if self._table is not None:
            own["coefficients"] = self._table.state_dict()
        if self._adaptive is not None:
            own["adaptive"] = {"factor": self.damping_factor, "completed": self._completed}
        if self._random is not None:
            own["sampling"] = self._random.get_state()
        return own

    def _check_state(self, state: Mapping[str, Any]) -> None:
        check_saved(state, type(self).__name__, self._table, self._model)
        check_state(state, self.param_groups, self.defaults)

    def _load_own_state(self, state: Mapping[str, Any]) -> None:
        device = first_parameter(self.param_groups).device
        if self._table is not None:
            self._table.load_state_dict(state["coefficients"], device)
        if self._adaptive is not None:
            if "adaptive" not in state:
                warnings.warn(
                    "the state has no 'adaptive': it was saved by an optimiser without adapt_damping, or by way of "
                    "torch.distributed.checkpoint, which loses it. The damping starts anew from alpha or damping",
                    stacklevel=2,
                )
            saved = state.get("adaptive", {"factor": 1.0, "completed": 0})
            self._policy.damping_factor, self._completed = saved["factor"], saved["completed"]
        self._random = None  # labels were not drawn yet, or
        if "sampling" in state:
            self._random = torch.Generator(device)
            self._random.set_state(state["sampling"].cpu())
        self._predicted = None
        self._policy.clear()
        self._policy.measuring = self._adaptive is not None and self._completed % self._adaptive.every == 0

    def explain(self) -> dict[str, str]:
        """Returns for each linear and convolution layer and function whether it is preconditioned, and why not.

        >>> model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
        >>> opt = fngd.NGD(model, lr=0.1)
        >>> model(torch.randn(8, 3)).square().mean().backward()
        >>> opt.explain()
        {'0': 'reweighted, samples on axis 0 of its output'}
        """
        result = {}
        for path, reason in self._handle.explain().items():
            reason = self._layers.explained(path, reason, self.param_groups)
            if reason.startswith("reweighted") and self._table is not None:
                reason = self._table.explained(reason, NETWORK if self._method.gram == "network" else path)
            result[path] = reason
        return result | unseen(self._model, list(result), functions=self._functions)

    def remove(self) -> None:
        """Takes the hooks off the model, which then trains with plain gradients. Harmless when repeated.

        >>> model = nn.Linear(3, 1)
        >>> fngd.NGD(model, lr=0.1).remove()
        >>> opt = fngd.NGD(model, lr=0.2)  # a second one, as the first is gone
        """
        self._handle.remove()
