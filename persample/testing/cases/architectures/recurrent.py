"""Recurrent layers: every kind, one or two layers, both directions, either layout, projections, packed
sequences.
"""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from persample.testing.cases.table import Built, Net, add, group, randn, regress

case = group("layer", "layer")
B, T, I, H = 3, 4, 5, 2
KINDS = {"RNN": nn.RNN, "LSTM": nn.LSTM, "GRU": nn.GRU}


def recurrent(kind: str, steps: int = T, **options: Any) -> Built:
    """Output and final states enter the loss; states have the batch on axis 1 in either layout."""
    first = options.get("batch_first", False)
    x = randn(B, steps, I) if first else randn(steps, B, I)
    return regress(KINDS[kind](I, H, **options), x, 0 if first else 1, *(1,) * (2 if kind == "LSTM" else 1))


def packed(kind: str, **options: Any) -> Built:
    """Sequences of different lengths: torch sorts the samples by length and interleaves them by time step."""

    def run(m: Net, x: Tensor, lengths: Tensor) -> Tensor:
        sequence = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(m.rnn(sequence)[0], batch_first=True, total_length=x.shape[1])[0]

    model = Net(run, rnn=KINDS[kind](I, H, batch_first=True, **options))
    return regress(model, (randn(B, T, I), torch.tensor([2, 4, 1])))


for kind, layers, both, first in product(KINDS, (1, 2), (False, True), (False, True)):
    options = {"num_layers": layers, "bidirectional": both, "batch_first": first}
    shown = ",".join(k for k, on in (("2 layers", layers == 2), ("bidirectional", both), ("batch_first", first)) if on)
    tags = ["layer", "peers"] + ([] if first else ["time-major"])
    add(f"layer/{kind}({shown})", partial(recurrent, kind, **options), *tags, axes=0 if first else 1)

for kind in KINDS:
    add(
        f"layer/{kind}(bias=False,T=B)",
        partial(recurrent, kind, steps=B, bias=False),
        "layer",
        "time-major",
        axes=1,
    )
    add(f"layer/{kind}(packed)", partial(packed, kind), "layer", "routing")
    add(
        f"layer/{kind}(packed,bidirectional,2 layers)",
        partial(packed, kind, bidirectional=True, num_layers=2),
        "layer",
        "routing",
    )

add("layer/LSTM(proj_size)", lambda: recurrent("LSTM", proj_size=1, batch_first=True), "layer")
add("layer/RNN(relu)", lambda: recurrent("RNN", nonlinearity="relu"), "layer", "time-major", axes=1)


@case("random", name="GRU(dropout)", axes=None)
def _() -> Built:
    return recurrent("GRU", num_layers=2, dropout=0.5)


@case(name="LSTM(given states)", axes=(0, (1, 1)))
def _() -> Built:
    """Initial states as inputs, nested in a tuple."""
    model = nn.LSTM(I, H, batch_first=True)
    return regress(model, (randn(B, T, I), (randn(1, B, H), randn(1, B, H))), 0, 1, 1)


@case("peers", name="GRU(learned initial state)")
def _() -> Built:
    """A parameter expanded over the batch as the first state."""
    model = Net(
        lambda m, x: m.rnn(x, m.start.expand(-1, len(x), -1).contiguous())[0],
        rnn=nn.GRU(I, H, batch_first=True),
        start=randn(1, 1, H),
    )
    return regress(model, randn(B, T, I))


def _cell(kind: str) -> Built:
    def run(m: Net, x: Tensor) -> Tensor:
        zeros = x.new_zeros(len(x), H)
        state: Any = (zeros, zeros) if kind == "LSTMCell" else zeros
        for step in x.unbind(1):
            state = m.cell(step, state)
        return state[0] if kind == "LSTMCell" else state

    return regress(Net(run, cell=getattr(nn, kind)(I, H)), randn(B, T, I))


for kind in ("RNNCell", "LSTMCell", "GRUCell"):
    add(f"layer/{kind}(loop)", partial(_cell, kind), "layer")
