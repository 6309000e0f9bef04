"""Coefficients that are computed in one epoch and reused in later ones (FNGD paper, Section IV-B).

What is stored is the factor B·c_b by which each sample's share of the plain gradient is multiplied; 1 is SGD.
Which epochs compute is for `fngd.natural.sharing.epochs` to say.

- `share="position"`, the paper's rule: the key is (layer, batch index, position in the batch). Batches are
  reshuffled, so a factor meets another sample in every epoch. A shorter last batch has its own shorter
  vector.
- `share="sample"`, what the paper's argument ("determined by the intrinsic nature of samples") would
  support: the key is (layer, sample id).
- `control="constant"`: all factors 1 (plain SGD by the same code). `control="permuted"`: every computed
  vector is permuted at random before it is used and stored. Both exist to test whether it matters whose
  factor it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fngd.natural.sharing.epochs import Epochs
from fngd.optim.guards import warn_of_more_passes, warn_of_same_samples
from fngd.optim.state.forms import COUNT, REMEDY, Maybe, Table, Where, check_form

SHARES = ("position", "sample", None)
CONTROLS = (None, "constant", "permuted")


class CoefficientTable(Epochs):
    """Factors by layer and batch position or sample id, with the place in the epoch that finds them.

    Arguments:
        steps_per_epoch, refresh_epochs, refresh_cosine, probe_layer: see `Epochs`.
        share: "position" or "sample".
        samples: the number of different sample ids; only with "sample".
        control: None, "constant" or "permuted".
        seed: of the permutations.
    """

    def __init__(
        self,
        steps_per_epoch: int | None,
        *,
        share: str = "position",
        samples: int | None = None,
        refresh_epochs: int | None = None,
        refresh_cosine: float | None = None,
        probe_layer: str | None = None,
        control: str | None = None,
        seed: int = 0,
    ) -> None:
        _check(steps_per_epoch, share, samples, refresh_epochs, control)
        assert steps_per_epoch is not None, "checked"
        super().__init__(
            steps_per_epoch, refresh_epochs=refresh_epochs, refresh_cosine=refresh_cosine, probe_layer=probe_layer
        )
        self.share, self.samples, self.control = share, samples, control
        self._random = torch.Generator().manual_seed(seed)
        self._calls: dict[str, int] = {}  # backward passes of each layer since the last step
        self._written: set[str] = set()  # layers whose coefficients were computed since the last step
        self._warned = False
        self.restarts: Callable[[str], bool] = lambda layer: False
        """Asked in a layer's later backward passes since the last step: whether earlier ones do not count."""
        self._latest: dict[str, Tensor] = {}  # by layer, what was looked up by sample in its latest backward pass
        self._asked = False  # whether a layer has used the latest ids
        self._announced: list[Tensor] = []  # ids of each backward pass since the last step
        self._asks: dict[str, tuple[int, int]] = {}  # of each layer since then: how many, the latest one's pass
        # by (layer, backward pass within the step): rows [steps, longest batch], their lengths, which to redo
        self._rows: dict[tuple[str, int], Tensor] = {}
        self._lengths: dict[tuple[str, int], list[int]] = {}
        self._bad: dict[tuple[str, int], Tensor] = {}
        self._ready: dict[str, tuple[int, Tensor]] | None = None  # see `make_ready`

    @property
    def rows(self) -> dict[tuple[str, int], Tensor]:
        """The factors by layer and backward pass within the step: [steps, longest batch], or [samples]."""
        return self._rows

    def has(self, layer: str) -> bool:
        """Whether `lookup` would find factors for the layer's next backward pass, or raise."""
        if self.computing:
            return False
        if self.control == "constant" or self.share == "sample":
            return self.control == "constant" or (layer, 0) in self._rows
        number = self._calls.get(layer, 0)
        if number and self.restarts(layer):
            number = 0
        lengths = self._lengths.get((layer, number))
        return lengths is not None and lengths[self.place] > 0

    def lookup(self, layer: str, batch: int, device: torch.device) -> Float[Tensor, " batch"] | None:
        """Returns the factors to use now, None where they must be computed; for one backward pass."""
        self.check_place()
        if self.control == "constant":
            return torch.ones(batch, device=device)
        return self._by_sample(layer, batch) if self.share == "sample" else self._by_position(layer, batch)

    def make_ready(self, wanted: Callable[[str], bool]) -> None:
        """Looks up at once what the first backward pass of this step will ask of all layers, for `ready`.

        Between two convolutions each Python function must be read from memory again; in one loop it costs nothing.
        """
        if self._ready is not None:
            return
        self._ready = {}
        probes = self.refresh_cosine is not None and not self.index
        if self.share != "position" or self.control == "constant" or self.computing or probes:
            return
        index = self.place
        for (layer, number), lengths in self._lengths.items():
            if not number and lengths[index] and wanted(layer):
                self._ready[layer] = lengths[index], self._rows[layer, 0][index, : lengths[index]]

    def ready(self, layer: str, batch: int) -> Float[Tensor, " batch"] | None:
        """Returns what `lookup` would, for a layer's first backward pass in this step; None where it is to be asked."""
        length, factors = (0, None) if self._ready is None else self._ready.pop(layer, (0, None))
        if length != batch or layer in self._calls:
            return None
        self._calls[layer] = 1
        return factors

    def look_for_more(self, layer: str) -> None:
        """Warns, once, where `lookup` found nothing because the step makes more backward passes than it used to."""
        number, index = self._calls.get(layer, 0) - 1, self.place
        if number < 1 or self.computing or self._warned or layer in self._written:
            return  # a layer that has just been written to is new to the table
        if (layer, number) not in self._bad or not self._bad[layer, number][index]:
            warn_of_more_passes(layer, number, index)
            self._warned = True

    def probing(self, layer: str) -> bool:
        """Whether the factors that `lookup` just found are to be compared with fresh ones, by `probe`."""
        return self.control != "constant" and super().probing(layer)

    def store(
        self, layer: str, factors: Float[Tensor, " batch"], good: Tensor, sizes: Sequence[int] | None = None
    ) -> Float[Tensor, " batch"]:
        """Stores what was computed and returns what to use.

        good: a tensor holding one bool; where it is False the factors are used now but computed again next
            time. It is not looked at before the epoch ends, because that would wait for the device.
        sizes: of the backward passes whose samples the factors are for, the present one last; default: it alone.
        """
        sizes = [len(factors)] if sizes is None else list(sizes)
        if self.control == "permuted":
            order = torch.randperm(len(factors), generator=self._random)
            factors = factors[order.to(factors.device, non_blocking=True)]
        if self.share == "sample":
            assert self.samples is not None, "the constructor has checked"
            key = layer, 0
            if key not in self._rows:
                self._rows[key] = factors.new_full((self.samples,), torch.nan)
            ids = torch.cat([ids.to(factors.device) for ids in self._announced[-len(sizes) :]])
            self._rows[key][ids] = torch.where(good, factors, torch.nan)
            return factors
        first = self._calls[layer] - len(sizes)
        for number, part in enumerate(factors.split(sizes)):
            self._write((layer, first + number), part, good)
        return factors

    def _write(self, key: tuple[str, int], factors: Tensor, good: Tensor) -> None:
        self._written.add(key[0])
        rows = self._rows.get(key)
        if rows is None or rows.shape[1] < len(factors):
            wider = factors.new_ones(self.steps_per_epoch, len(factors))
            if rows is not None:
                wider[:, : rows.shape[1]] = rows
            self._rows[key] = rows = wider
        if key not in self._lengths:
            self._lengths[key] = [0] * self.steps_per_epoch
            self._bad[key] = torch.zeros(self.steps_per_epoch, dtype=torch.bool, device=factors.device)
        index = self.place
        rows[index, : len(factors)] = factors
        self._bad[key][index] = ~good
        self._lengths[key][index] = len(factors)

    def next_batch(self, sample_ids: Tensor) -> None:
        """Announces the ids (0 … samples − 1) of the coming backward pass's samples; for share="sample"."""
        if self.share != "sample":
            raise ValueError(f"next_batch(sample_ids) is for share='sample', but share is {self.share!r}")
        ids = torch.as_tensor(sample_ids)
        if ids.dim() != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise ValueError(f"sample_ids must be integers [B], not {ids.dtype} of shape {list(ids.shape)}")
        assert self.samples is not None, "the constructor has checked"
        if ids.device.type == "cpu" and len(ids) and not (ids.min() >= 0 and ids.max() < self.samples):
            raise ValueError(
                f"sample_ids are {ids.min()} to {ids.max()}, must be 0 to {self.samples - 1} (samples - 1)"
            )
        if self._asked or not self._announced:
            self._announced.append(ids)
        else:
            self._announced[-1] = ids  # announced again before any layer has asked
        self._asked = False

    def explained(self, reason: str, layer: str) -> str:
        """Returns why a layer is reweighted, or that its latest batch was not, as its samples were never met."""
        factors = self._latest.get(layer)
        unmet = 0 if factors is None else int(factors.isnan().sum())
        if factors is None or not unmet:
            return reason
        how = "were not met, or were not finite, when coefficients were computed (share='sample')"
        if unmet == len(factors):
            return f"plain in the latest batch: its {unmet} samples {how}"
        return f"{reason}, but for {unmet} of the {len(factors)} samples of the latest batch, which {how}"

    def advance(self) -> None:
        """Ends a step: the next backward pass belongs to the next batch."""
        self.restart()
        self._announced, self._asked = [], False
        super().advance()

    def restart(self) -> None:
        """The next backward pass is the first one of the step: earlier ones do not count."""
        self._calls.clear()
        self._asks.clear()
        self._written.clear()
        self._ready = None

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that resuming needs; tensors are not copied."""
        return super().state_dict() | {
            "share": self.share,
            "samples": self.samples,
            "random": self._random.get_state(),
            "rows": dict(self._rows),
            "lengths": {key: list(lengths) for key, lengths in self._lengths.items()},
            "bad": dict(self._bad),
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError if a state was saved with another steps_per_epoch, share or samples."""
        check_form(state, FORM, "coefficients")
        for name in ("steps_per_epoch", "share", "samples"):
            own = getattr(self, name)
            if state.get(name, own) != own:  # states of version 0.1 have no samples
                raise ValueError(
                    f"the saved state has {name}={state[name]!r}, this optimiser {own!r}: "
                    "coefficients would meet other samples. Construct the optimiser as the saved one was."
                )
        for key, rows in state["rows"].items():
            shape = [self.samples] if self.share == "sample" else [self.steps_per_epoch, *rows.shape[1:2]]
            lengths, bad = state["lengths"].get(key), state["bad"].get(key)
            fits = list(rows.shape) == shape and rows.is_floating_point()
            if fits and self.share == "position":
                fits = lengths is not None and bad is not None and len(lengths) == len(rows) == bad.numel()
                fits = fits and bad.dtype == torch.bool and max(lengths) <= rows.shape[1]
            if not fits:
                raise ValueError(
                    f"the state's coefficients of layer '{key[0]}' are of shape {list(rows.shape)}, with lengths "
                    f"{lengths}; they must be of shape {shape}, with a length for each batch. {REMEDY}"
                )

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restores what `state_dict` returned, with tensors on `device`; raises as `check_state` does."""
        self.check_state(state)
        super().load_state_dict(state, device)
        self._random.set_state(state["random"].cpu())
        self._rows = {key: rows.to(device, copy=True) for key, rows in state["rows"].items()}
        self._bad = {key: bad.to(device, copy=True) for key, bad in state["bad"].items()}
        self._lengths = {key: list(lengths) for key, lengths in state["lengths"].items()}
        self.restart()
        self._announced, self._asked = [], False

    def _by_position(self, layer: str, batch: int) -> Tensor | None:
        key = layer, self._calls.get(layer, 0)
        self._calls[layer] = key[1] + 1
        index = self.place
        length = self._lengths[key][index] if key in self._lengths else 0
        if self.computing or not length:
            return None
        if length != batch:
            raise ValueError(
                f"batch {index + 1} of the epoch has {batch} samples at layer '{layer}', but its stored "
                f"coefficients are for {length}. Batches must come in the same sizes every epoch: is "
                f"steps_per_epoch={self.steps_per_epoch} the length of the loader? With batches of varying "
                "size use fngd.NGD or share='sample'. A step that is skipped (by a GradScaler) keeps its place if the "
                "optimiser's zero_grad() follows; gradients that belong to no batch are for the model's zero_grad()."
            )
        return self._rows[key][index, :length]

    def _by_sample(self, layer: str, batch: int) -> Tensor | None:
        if not self._announced:
            raise ValueError("share='sample' needs opt.next_batch(sample_ids) before loss.backward()")
        self._ask(layer)
        ids = self._announced[-1]
        if len(ids) != batch:
            raise ValueError(f"next_batch got {len(ids)} sample ids, but layer '{layer}' has a batch of {batch}")
        self._asked = True
        if self.computing or (layer, 0) not in self._rows:
            self._latest.pop(layer, None)
            return None
        rows = self._rows[layer, 0]
        factors = self._latest[layer] = rows[ids.to(rows.device)]
        # Samples that were never met take the plain gradient.
        return torch.where(factors.isnan(), 1.0, factors)

    def _ask(self, layer: str) -> None:
        """A layer asks for its factors: where its pass has no ids of its own, they are taken to be the latest ones."""
        number, latest = self._asks.get(layer, (0, 0))
        if number and self.restarts(layer):
            number = 0
        running = torch._C._current_graph_task_id()
        self._asks[layer] = number + 1, running
        if number < len(self._announced):
            return
        if running != latest and not self._warned:  # in one pass they are several forward passes
            warn_of_same_samples(layer, number)
            self._warned = True
        self._announced.append(self._announced[-1])

    def close_epoch(self) -> None:
        """Ends the epoch; looks at what was probed, and at which batches had values that were not finite."""
        super().close_epoch()
        self._ready = None
        # With the probe the only look at device values, once an epoch: such a batch is redone next time.
        for key, bad in self._bad.items():
            for index in bad.nonzero().flatten().tolist():
                self._lengths[key][index] = 0


KEY = Where(tuple, lambda key: len(key) == 2 and isinstance(key[0], str), "a pair (layer, backward pass)")
FORM = {
    "epoch": COUNT, "index": COUNT, "explicit": bool, "steps_per_epoch": int, "stale?": bool, "cosine?": Maybe(Tensor),
    "products?": Maybe(Where(Tensor, lambda value: value.shape == (3,), "three numbers")), "share?": str,
    "samples?": Maybe(int), "random": Tensor, "rows": Table(KEY, Tensor), "lengths": Table(KEY, [COUNT]),
    "bad": Table(KEY, Tensor),
}  # fmt: skip
"""Of `CoefficientTable.state_dict()`; states of version 0.1 have less."""


def _check(steps_per_epoch: object, share: object, samples: object, refresh_epochs: object, control: object) -> None:
    if share not in SHARES:
        raise ValueError(f"share={share!r} is unknown; choose one of {list(SHARES)}")
    if control not in CONTROLS:
        raise ValueError(f"control={control!r} is unknown; choose one of {list(CONTROLS)}")
    counts = {"steps_per_epoch": steps_per_epoch, "refresh_epochs": refresh_epochs, "samples": samples}
    for name, value in counts.items():
        optional = name != "steps_per_epoch" and value is None
        if not optional and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            hint = " (give len(loader))" if name == "steps_per_epoch" else ""
            raise ValueError(f"{name}={value!r}; it must be a whole number of at least 1{hint}")
    if (share == "sample") != (samples is not None):
        raise ValueError(
            f"share={share!r} with samples={samples}: share='sample' needs samples=len(dataset), and nothing else does"
        )
