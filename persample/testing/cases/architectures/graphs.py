"""Graphs as one list of nodes, sets and point clouds."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from persample.testing.cases.parts import dense
from persample.testing.cases.table import Built, Net, classify, group, randn, regress

case = group("architecture", "architecture")
B, T, D = 3, 4, 6


# Graphs: the nodes of all graphs of the batch are one list, graph[i] says whose node i is.

GRAPH = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
EDGES = torch.tensor([[0, 1, 2, 0, 3, 4, 5, 6, 7, 8, 5], [1, 2, 0, 2, 4, 3, 6, 7, 8, 5, 5]])


def one_graph(inputs: tuple[Tensor, ...], b: int) -> tuple[Tensor, ...]:
    """The nodes and edges of one graph of the batch, renumbered."""
    nodes, edges, graph = inputs
    inside = (graph == b).nonzero()[:, 0]
    mine = edges[:, torch.isin(edges[0], inside)]
    return nodes[inside], mine - inside[0], torch.zeros(len(inside), dtype=torch.long)


def pool(x: Tensor, graph: Tensor) -> Tensor:
    """Sums over the nodes of each graph."""
    return x.new_zeros(int(graph.max()) + 1, x.shape[1]).index_add(0, graph, x)


def on_graphs(convolve: Any, order: Tensor | None = None, **parts: nn.Module | Tensor) -> Built:
    """A network of two convolutions on a batch of three graphs of different size."""

    def run(m: Net, x: Tensor, edges: Tensor, graph: Tensor) -> Tensor:
        x = m.inp(x)
        for _ in range(2):  # the same weights in both rounds
            x = x + convolve(m, x, *edges)
        return m.head(pool(x.tanh(), graph))

    model = Net(run, inp=nn.Linear(D, D), head=nn.Linear(D, 2), **parts)
    return regress(model, (randn(len(GRAPH), D), EDGES, GRAPH))


@case("routing", axes=one_graph)
def graph_network() -> Built:
    """Messages along edges, summed at their targets by index_add."""

    def convolve(m: Net, x: Tensor, source: Tensor, target: Tensor) -> Tensor:
        message = m.message(torch.cat([x[source], x[target]], 1))
        return m.update(torch.cat([x, torch.zeros_like(x).index_add(0, target, message)], 1))

    return on_graphs(convolve, message=dense(2 * D, D), update=dense(2 * D, D, D))


@case("routing", axes=one_graph)
def graph_attention() -> Built:
    """Softmax over the edges of each node, by scatter."""

    def convolve(m: Net, x: Tensor, source: Tensor, target: Tensor) -> Tensor:
        score = F.leaky_relu((m.lin(x)[source] * m.left).sum(1) + (m.lin(x)[target] * m.right).sum(1)).exp()
        share = score / torch.zeros(len(x), dtype=x.dtype).scatter_add(0, target, score)[target]
        return torch.zeros_like(x).index_add(0, target, share[:, None] * m.lin(x)[source])

    return on_graphs(convolve, lin=nn.Linear(D, D, bias=False), left=randn(D), right=randn(D))


@case("routing", axes=one_graph)
def graph_convolution_by_sparse_matrix() -> Built:
    """The adjacency of the whole batch as one sparse matrix."""

    def convolve(m: Net, x: Tensor, source: Tensor, target: Tensor) -> Tensor:
        ones = torch.ones(len(source), dtype=x.dtype)
        return torch.sparse_coo_tensor(torch.stack([target, source]), ones, (len(x),) * 2) @ m.lin(x)

    return on_graphs(convolve, lin=nn.Linear(D, D))


@case("routing", coupled=True, axes=one_graph)
def graph_with_edges_between_samples() -> Built:
    """The neighbourhood of a transductive graph: nodes are samples, and samples see each other."""

    def convolve(m: Net, x: Tensor, source: Tensor, target: Tensor) -> Tensor:
        return torch.zeros_like(x).index_add(0, target.roll(1), m.lin(x)[source])

    return on_graphs(convolve, lin=nn.Linear(D, D))


# Sets and points.


@case()
def deep_sets() -> Built:
    model = Net(lambda m, x: m.rho(m.phi(x).sum(1)), phi=dense(D, D, D), rho=dense(D, D, 2))
    return regress(model, randn(B, T, D))


@case()
def deep_sets_ragged() -> Built:
    """Sets of different size, padded and masked."""
    model = Net(
        lambda m, x, n: m.rho((m.phi(x) * (torch.arange(T) < n[:, None])[..., None]).sum(1) / n[:, None]),
        phi=dense(D, D, D),
        rho=dense(D, D, 2),
    )
    return regress(model, (randn(B, T, D), torch.tensor([2, 4, 1])))


@case()
def pointnet() -> Built:
    """Convolutions of size 1 over points, a learned rotation for each cloud, a maximum over points."""

    def run(m: Net, x: Tensor) -> Tensor:
        turn = m.turn(x).amax(2) @ m.w + torch.eye(3, dtype=x.dtype).flatten()
        return m.head(m.points(torch.bmm(turn.view(-1, 3, 3), x)).amax(2))

    model = Net(
        run,
        turn=nn.Conv1d(3, 5, 1),
        w=randn(5, 9),
        points=nn.Sequential(nn.Conv1d(3, D, 1), nn.ReLU()),
        head=nn.Linear(D, 3),
    )
    return classify(model, randn(B, 3, 7))


@case()
def set_transformer() -> Built:
    """Learned inducing points attend to the set, the set to them, a learned seed pools."""

    def run(m: Net, x: Tensor) -> Tensor:
        few = m.a(m.points.expand(len(x), -1, -1), x, x)[0]
        back = m.b(x, few, few)[0]
        return m.c(m.seed.expand(len(x), -1, -1), back, back)[0][:, 0]

    parts = {name: nn.MultiheadAttention(D, 2, batch_first=True) for name in "abc"}
    return regress(Net(run, points=randn(1, 2, D), seed=randn(1, 1, D), **parts), randn(B, T, D))
