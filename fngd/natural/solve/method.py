"""What NGD and FNGD make of the per-sample gradients: the choices, checked once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fngd.coefficients import SCALES, check_damping, is_number

REDUCTIONS = ("mean", "sum")
FISHERS = ("empirical", "improved", "true")
GRAMS = ("layer", "network", "global")
ACCUMULATIONS = ("separate", "joint")


@dataclass(frozen=True)
class Method:
    """The options of `NGD` that say which direction is taken; it explains them.

    Raises ValueError for an unknown or impossible choice.
    """

    alpha: float | None
    damping: float | None
    scale: str = "absorb"
    reduction: str = "mean"
    fisher: str = "empirical"
    gram: str = "layer"
    accumulate: str = "separate"
    kl_clip: float | None = None
    output_axis: int = 0

    def __post_init__(self) -> None:
        known = {
            "scale": (*SCALES, "graft"), "reduction": REDUCTIONS, "fisher": FISHERS, "gram": GRAMS,
            "accumulate": ACCUMULATIONS,
        }  # fmt: skip
        for name, allowed in known.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose one of {list(allowed)}")
        check_damping(self.alpha, self.damping, self.solved_scale)
        if self.kl_clip is not None and not (is_number(self.kl_clip) and self.kl_clip > 0):
            raise ValueError(f"kl_clip={self.kl_clip!r}; it must be > 0 (1e-3 is usual), or None for no clipping")
        if isinstance(self.output_axis, bool) or not isinstance(self.output_axis, int) or self.output_axis < 0:
            raise ValueError(f"output_axis={self.output_axis!r}; axes count from the front, 0, 1, …")
        if self.gram == "global" and (self.kl_clip is not None or self.scale == "graft"):
            raise ValueError(
                "gram='global' has neither kl_clip nor scale='graft': a process sees its own part of the direction "
                "only. Use gram='layer', where every process has a direction of its own"
            )
        if self.gram == "global" and (self.fisher == "true" or self.accumulate == "joint"):
            raise ValueError(
                "gram='global' exchanges the samples of one backward pass: it goes with neither fisher='true' nor "
                "accumulate='joint'. Use gram='layer' or 'network', where every process has a direction of its own"
            )

    @property
    def solved_scale(self) -> str:
        """The scale of the coefficients; grafting takes any and rescales the direction."""
        return "absorb" if self.scale == "graft" else self.scale

    @property
    def needs_scale(self) -> bool:
        """Whether the step depends on the scale of the loss: a sum, a mean, or what a GradScaler makes of it."""
        free = self.damping is None and self.scale != "per_layer" and self.kl_clip is None
        return not free or self.fisher != "empirical"

    def check_sharing(self, refresh_cosine: Any, probe_layer: str | None) -> None:
        """Raises ValueError where coefficients of an earlier epoch cannot serve, or would never be probed."""
        if self.gram == "network" and probe_layer is not None:
            raise ValueError(
                f"probe_layer={probe_layer!r} names one layer, but with gram='network' coefficients are those of all "
                "layers together: leave it out"
            )
        if self.fisher == "true":
            raise ValueError(
                "fisher='true' weights gradients of labels that are drawn anew in every step: there are no "
                "coefficients to share. Use fngd.NGD, or share=None"
            )
        if self.accumulate == "joint" and refresh_cosine is not None:
            raise ValueError(
                "refresh_cosine compares the coefficients of single backward passes; with accumulate='joint' they "
                "belong to the whole step. Use refresh_epochs, or accumulate='separate'"
            )
