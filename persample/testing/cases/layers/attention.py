"""MultiheadAttention in both layouts with all its options, and torch's Transformer layers."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from persample.testing.cases.table import Built, Net, add, group, randn, regress

case = group("layer", "layer")
B, T, S, E = 3, 4, 5, 4


def attend(steps: int = T, keys: int = S, heads: int = 2, weights: bool = True, **options: Any) -> Built:
    """Cross-attention with three different inputs; torch takes another path (fused) where weights are not
    wanted.
    """
    first = options.get("batch_first", False)
    sizes = ((steps, E), (keys, options.get("kdim") or E), (keys, options.get("vdim") or E))
    inputs = tuple(randn(B, n, d) if first else randn(n, B, d) for n, d in sizes)
    model = Net(
        lambda m, q, k, v: m.attention(q, k, v, need_weights=weights)[: 1 + weights],
        attention=nn.MultiheadAttention(E, heads, **options),
    )
    return regress(model, inputs, 0 if first else 1, *([0] if weights else []))


for first in (True, False):
    layout = "batch_first" if first else "time-major"
    tags = ["layer", "peers"] + ([] if first else ["time-major"])
    variants: dict[str, dict[str, Any]] = {
        "": {},
        "1 head": {"heads": 1},
        "fused": {"weights": False},
        "T=B": {"steps": B, "keys": B},
        "bias=False": {"bias": False},
        "add_bias_kv": {"add_bias_kv": True},
        "add_zero_attn": {"add_zero_attn": True},
        "kdim,vdim": {"kdim": 3, "vdim": 2},
        "everything": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 3, "vdim": 2, "weights": False},
    }
    for name, options in variants.items():
        title = ",".join(filter(None, (layout, name)))
        add(
            f"layer/MultiheadAttention({title})",
            partial(attend, batch_first=first, **options),
            *tags,
            axes=0 if first else 1,
        )


def itself(first: bool, steps: int = T) -> Built:
    """Self-attention: one input in three roles."""
    model = Net(
        lambda m, x: m.attention(x, x, x, need_weights=False)[0],
        attention=nn.MultiheadAttention(E, 2, batch_first=first),
    )
    return regress(model, randn(B, steps, E) if first else randn(steps, B, E), 0 if first else 1)


add("layer/self-attention(batch_first)", lambda: itself(True), "layer", "peers")
add("layer/self-attention(time-major)", lambda: itself(False), "layer", "peers", "time-major", axes=1)
add("layer/self-attention(time-major,T=B)", lambda: itself(False, B), "layer", "peers", "time-major", axes=1)


@case(name="self-attention(padding mask)")
def _() -> Built:
    """Padded keys are masked, so their rows get gradients of exactly zero."""
    model = Net(
        lambda m, x, mask: m.attention(x, x, x, key_padding_mask=mask)[0],
        attention=nn.MultiheadAttention(E, 2, batch_first=True),
    )
    mask = torch.arange(T) >= torch.tensor([[2], [4], [3]])
    return regress(model, (randn(B, T, E), mask))


def _stack(kind: str, first: bool, steps: int = T, **options: Any) -> Built:
    parts = {"d_model": E, "nhead": 2, "dim_feedforward": 6, "dropout": 0.0, "batch_first": first, **options}
    shape = [(B, n, E) if first else (n, B, E) for n in (steps, steps if steps == B else S)]
    axis = 0 if first else 1
    if kind == "encoder":
        return regress(nn.TransformerEncoderLayer(**parts), randn(*shape[0]), axis)
    if kind == "decoder":
        return regress(nn.TransformerDecoderLayer(**parts), (randn(*shape[0]), randn(*shape[1])), axis)
    parts |= {"num_encoder_layers": 1, "num_decoder_layers": 1}
    return regress(nn.Transformer(**parts), (randn(*shape[1]), randn(*shape[0])), axis)


for kind, title in (
    ("encoder", "TransformerEncoderLayer"),
    ("decoder", "TransformerDecoderLayer"),
    ("both", "Transformer"),
):
    add(f"layer/{title}(batch_first)", partial(_stack, kind, True), "layer", "peers")
    add(f"layer/{title}(time-major)", partial(_stack, kind, False), "layer", "peers", "time-major", axes=1)
    add(
        f"layer/{title}(time-major,T=B)",
        partial(_stack, kind, False, B),
        "layer",
        "peers",
        "time-major",
        axes=1,
    )

add(
    "layer/TransformerEncoderLayer(norm_first,gelu,bias=False)",
    lambda: _stack("encoder", True, norm_first=True, activation="gelu", bias=False),
    "layer",
    "peers",
)


@case("peers", name="TransformerEncoderLayer eval")
def _() -> Built:
    """In eval mode torch has a fast path, taken only where no gradient is wanted."""
    model, *rest = _stack("encoder", True)
    return model.eval(), *rest


@case("peers", "random", name="TransformerEncoderLayer(dropout)", axes=None)
def _() -> Built:
    return _stack("encoder", True, dropout=0.3)
