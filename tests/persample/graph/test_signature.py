"""One walk beside a signature finds what tracing, forming the signature and comparing it finds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from persample.graph.nodes import trace
from persample.graph.signature import signature, walked

Step = Callable[[Tensor, Tensor, nn.ParameterDict], Tensor]
STEPS: dict[str, Step] = {
    "linear": lambda h, _, p: h @ p["square"],
    "other": lambda h, _, p: h @ p["second"],
    "twice": lambda h, _, p: (h @ p["square"]) @ p["square"],
    "bias": lambda h, _, p: h + p["bias"],
    "sine": lambda h, _, p: h.sin(),
    "itself": lambda h, _, p: h * h,
    "input": lambda h, x, p: h * x,
    "first": lambda h, x, p: x * h,
    "slice": lambda h, _, p: torch.cat([h[:, 1:], h[:, :1]], 1),
    "cut": lambda h, _, p: torch.cat([h[:, 2:], h[:, :2]], 1),
    "turned": lambda h, _, p: h.view(-1, 2, 2).transpose(1, 2).reshape(len(h), 4),
    "sum": lambda h, _, p: h.cumsum(1),
    "apart": lambda h, _, p: torch.cat(h.split(2, 1), 1),
    "swapped": lambda h, _, p: torch.cat(h.split(2, 1)[::-1], 1),
}
PROGRAMS = st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=4)


def losses_of(program: list[str], parameters: nn.ParameterDict, batch: int, of_input: bool) -> Tensor:
    x = torch.randn(batch, 4, requires_grad=of_input)
    h = x
    for name in program:
        h = STEPS[name](h, x, parameters)
    return (h @ parameters["square"]).sum(1)


@given(PROGRAMS, PROGRAMS, st.integers(1, 3), st.integers(1, 3), st.booleans(), st.booleans())
def test_a_walk_tells_what_comparing_signatures_does(
    first: list[str], second: list[str], batch: int, other: int, of_input: bool, of_other: bool
) -> None:
    parameters = nn.ParameterDict({name: torch.randn(4, 4) for name in ("square", "second")})
    parameters["bias"] = torch.randn(4)
    before = losses_of(first, parameters, batch, of_input)
    known = signature(trace(before), parameters.values())
    for program, size, leaf in ((first, batch, of_input), (second, other, of_other)):
        losses = losses_of(program, parameters, size, leaf)
        graph = trace(losses)
        same = signature(graph, parameters.values()) == known
        found = walked(losses, known, dict(parameters))
        assert (found is not None) == same
        if found is not None:
            assert [id(node) for node in found] == [id(node) for node in graph.order]


def test_shared_nodes_and_their_copies_are_told_apart() -> None:
    """h + h of one sine, and of two: as many edges, of the same kinds."""
    p = nn.Parameter(torch.randn(3))
    h = p.sin()
    one, two = h * h, p.sin() * p.sin()
    known = {losses: signature(trace(losses), [p]) for losses in (one, two)}
    assert walked(one, known[one], {"p": p})
    assert walked(two, known[two], {"p": p})
    assert walked(one, known[two], {"p": p}) is None
    assert walked(two, known[one], {"p": p}) is None
    assert walked(one.detach(), known[one], {"p": p}) is None


def test_outputs_of_one_node_are_told_apart() -> None:
    p = nn.Parameter(torch.randn(4, 6))
    forward, back = (torch.cat(p.sin().split(3, 1)[::step], 1) for step in (1, -1))
    assert walked(forward, signature(trace(forward), [p]), {"p": p})
    assert walked(back, signature(trace(forward), [p]), {"p": p}) is None


def test_parameters_are_known_by_identity() -> None:
    p, q = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))
    known = signature(trace(p * q), [p, q])
    assert walked(p * q, known, {"p": p, "q": q})
    assert walked(q * p, known, {"p": p, "q": q}) is None
    assert walked(p * p, known, {"p": p, "q": q}) is None
