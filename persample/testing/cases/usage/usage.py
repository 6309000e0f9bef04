"""Uses of parameters that a hook on a module misses: shared, repeated, without a module of their own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from persample.testing.cases.table import Built, Net, classify, group, ids, randn, regress

case = group("usage", "usage")
B, T, D = 3, 4, 5


def lin(inp: int = D, out: int = D, bias: bool = True) -> nn.Linear:
    """A linear layer, as most cases need one."""
    return nn.Linear(inp, out, bias=bias)


# One parameter, several uses.


@case("peers")
def tied_weights() -> Built:
    """Two layers with one weight."""
    first, second = lin(), lin()
    second.weight = first.weight
    return regress(Net(lambda m, x: m.b(m.a(x).tanh()), a=first, b=second), randn(B, T, D))


@case("peers")
def tied_embedding() -> Built:
    """Embedding and output layer share the table: rows touched and a dense matrix, with cross terms in the
    norm.
    """
    head = lin(D, 7, bias=False)
    model = Net(lambda m, i: m.head(m.table(i).tanh()), table=nn.Embedding(7, D), head=head)
    head.weight = model.table.weight
    return classify(model, ids(7, B, T))


@case("peers")
def module_called_twice() -> Built:
    return regress(Net(lambda m, x: m.lin(m.lin(x).tanh()), lin=lin()), randn(B, D))


@case()
def convolution_called_twice_at_two_sizes() -> Built:
    """The same kernel on an image and on its halved version."""
    model = Net(lambda m, x: (m.conv(x), m.conv(F.avg_pool2d(x, 2))), conv=nn.Conv2d(2, 3, 3, padding=1))
    return regress(model, randn(B, 2, 6, 8))


@case()
def weight_used_by_two_kinds_of_operation() -> Built:
    """As a matrix and as a convolution kernel."""
    model = Net(lambda m, x: F.conv1d((x @ m.w).mT, m.w[:, :, None]), w=randn(D, D))
    return regress(model, randn(B, T, D))


@case()
def weight_and_its_transpose() -> Built:
    """An autoencoder with one matrix."""
    return regress(Net(lambda m, x: (x @ m.w).tanh() @ m.w.T, w=randn(D, 2)), randn(B, T, D))


@case()
def weight_squared() -> Built:
    """A product of the parameter with itself before it meets the data."""
    return regress(Net(lambda m, x: x @ (m.w @ m.w), w=randn(D, D)), randn(B, D))


@case()
def two_parameters_meet_first() -> Built:
    """A low-rank product: both factors are upstream of the data."""
    return regress(Net(lambda m, x: F.linear(x, m.up @ m.down), up=randn(4, 2), down=randn(2, D)), randn(B, T, D))


# Parameters that no module of their own applies.


@case("peers")
def bare_parameter_beside_a_child() -> Built:
    return regress(
        Net(lambda m, x: m.lin(x) * m.scale + m.shift, lin=lin(), scale=randn(D), shift=randn(D)), randn(B, D)
    )


@case("peers")
def functional_use_of_a_childs_weight() -> Built:
    """F.linear(x, child.weight): the child itself is never called."""
    return regress(Net(lambda m, x: F.linear(x, m.child.weight), child=lin(bias=False)), randn(B, T, D))


@case("peers")
def functional_use_and_call() -> Built:
    """The child is called, and its weight is used beside it too."""
    return regress(Net(lambda m, x: m.child(x) + F.linear(x.tanh(), m.child.weight), child=lin()), randn(B, D))


@case("peers")
def keyword_arguments() -> Built:
    return regress(Net(lambda m, x: m.lin(input=x).tanh(), lin=lin()), randn(B, D))


@case()
def method_of_a_child() -> Built:
    """A method other than forward."""
    model = Net(lambda m, x: m.lin.forward(x), lin=lin())
    return regress(model, randn(B, D))


@case()
def scalar_parameter() -> Built:
    """Parameters without axes: a temperature and a gate."""
    model = Net(lambda m, x: m.lin(x) * m.t.exp() + m.gate.sigmoid(), lin=lin(), t=randn(), gate=randn())
    return regress(model, randn(B, T, D))


@case()
def parameter_with_axes_of_one() -> Built:
    """Shapes [1, 1, D] and [1, T, 1], broadcast against the batch."""
    return regress(Net(lambda m, x: (x + m.a) * m.b, a=randn(1, 1, D), b=randn(1, T, 1)), randn(B, T, D))


@case("peers")
def token_expanded_over_the_batch() -> Built:
    """A class token: expand, then concatenate."""
    model = Net(lambda m, x: m.lin(torch.cat([m.token.expand(len(x), -1, -1), x], 1)), token=randn(1, 1, D), lin=lin())
    return regress(model, randn(B, T, D))


@case()
def token_repeated_over_the_batch() -> Built:
    model = Net(lambda m, x: torch.cat([m.token.repeat(len(x), 1, 1), x], 1), token=randn(1, 2, D))
    return regress(model, randn(B, T, D))


@case()
def table_by_indexing() -> Built:
    """table[rel_index]: duplicated entries, the same for every sample."""
    index = torch.arange(T)[:, None] - torch.arange(T)[None] + T - 1

    def run(m: Net, x: Tensor) -> Tensor:
        return (x @ x.mT + m.table[index]).softmax(-1) @ x

    return regress(Net(run, table=randn(2 * T - 1)), randn(B, T, D))


@case()
def table_by_indexing_with_data() -> Built:
    """table[ids] and index_select, gather, take_along_dim with indices of the batch."""

    def run(m: Net, i: Tensor) -> Tensor:
        picked = m.table.index_select(0, i.flatten()).view(*i.shape, D)
        return m.table[i] * picked + m.table.gather(0, i[:, :1].expand(-1, D))[:, None]

    return regress(Net(run, table=randn(7, D)), ids(7, B, T))


@case()
def one_hot_lookup() -> Built:
    """An embedding as a matrix product with one-hot rows."""
    model = Net(lambda m, i: F.one_hot(i, 7).to(m.table.dtype) @ m.table, table=randn(7, D))
    return regress(model, ids(7, B, T))


@case()
def einsum_with_a_head_axis() -> Built:
    model = Net(lambda m, x: torch.einsum("btd,hde->bhte", x, m.w), w=randn(2, D, 3))
    return regress(model, randn(B, T, D))


@case()
def batched_product_per_position() -> Built:
    """A matrix of its own for every position, so the batch is an inner axis of the product."""
    model = Net(lambda m, x: torch.bmm(x.transpose(0, 1), m.w).transpose(0, 1), w=randn(T, D, 2))
    return regress(model, randn(B, T, D))


@case("complex")
def complex_weights() -> Built:
    """A spectral filter, as in FNet and FNO: rfft, a complex product, irfft."""
    weight = torch.randn(T // 2 + 1, D, dtype=torch.complex128)
    model = Net(lambda m, x: torch.fft.irfft(torch.fft.rfft(x, dim=1) * m.w, n=T, dim=1), w=weight)
    return regress(model, randn(B, T, D))


@case("complex")
def complex_linear() -> Built:
    model = Net(lambda m, x: m.lin(x.to(torch.complex128)).abs(), lin=nn.Linear(D, 2, dtype=torch.complex128))
    return regress(model, randn(B, D))
