"""Ways of using parameters that a hook on a module, or a guess from shapes, gets wrong."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from .table import Built, Net, classify, cross_entropy, group, ids, randn, regress, squared

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
    """Embedding and output layer share the table: rows touched and a dense matrix, with cross terms in the norm."""
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
    return regress(Net(lambda m, x: m.lin(x) * m.scale + m.shift, lin=lin(), scale=randn(D), shift=randn(D)), randn(B, D))


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


# Parameters that are changed before they meet the data.


@case()
def exp_and_softplus() -> Built:
    """Scales kept positive."""
    model = Net(lambda m, x: x * m.a.exp() + F.softplus(m.b), a=randn(D), b=randn(T, D))
    return regress(model, randn(B, T, D))


@case()
def split_parameter() -> Built:
    """One fused matrix cut into three, used by three operations."""
    def run(m: Net, x: Tensor) -> Tensor:
        q, k, v = m.qkv.split([2, 2, D])
        return (F.linear(x, q) @ F.linear(x, k).mT).softmax(-1) @ F.linear(x, v)

    return regress(Net(run, qkv=randn(4 + D, D)), randn(B, T, D))


@case()
def chunked_activations() -> Built:
    """The same cut after the product: one use with several outputs downstream."""
    def run(m: Net, x: Tensor) -> Tensor:
        q, k, v = m.qkv(x).chunk(3, -1)
        return (q @ k.mT).softmax(-1) @ v

    return regress(Net(run, qkv=lin(D, 6)), randn(B, T, D))


@case()
def sliced_parameter_partly_unused() -> Built:
    """Rows of the table beyond the length get zero."""
    return regress(Net(lambda m, x: x + m.position[: x.shape[1]], position=randn(9, D)), randn(B, T, D))


@case()
def stacked_and_concatenated() -> Built:
    """Several small parameters joined to one weight and one bias."""
    def run(m: Net, x: Tensor) -> Tensor:
        return F.linear(x, torch.stack([m.a, m.b]), torch.cat([m.c, m.d]))

    return regress(Net(run, a=randn(D), b=randn(D), c=randn(1), d=randn(1)), randn(B, D))


@case()
def masked_weight() -> Built:
    """A causal mask on the weight, as in MADE."""
    return regress(Net(lambda m, x: F.linear(x, m.w.tril()), w=randn(D, D)), randn(B, D))


@case("float32")
def cast_weight() -> Built:
    """Through float32 and back, as mixed precision does; z carries float32 noise inside a float64 model."""
    model = Net(lambda m, x: m.b(F.linear(x.float(), m.a.weight.float()).double()), a=lin(bias=False), b=lin())
    return regress(model, randn(B, D))


@case()
def standardised_kernel() -> Built:
    """Weight standardisation (BiT): the kernel is normalised before each convolution."""
    def run(m: Net, x: Tensor) -> Tensor:
        return F.conv2d(x, (m.w - m.w.mean((1, 2, 3), True)) / m.w.std((1, 2, 3), keepdim=True), padding=1)

    return regress(Net(run, w=randn(3, 2, 3, 3)), randn(B, 2, 4, 5))


@case()
def weight_norm() -> Built:
    return regress(parametrizations.weight_norm(lin()), randn(B, T, D))


@case()
def weight_norm_of_a_convolution() -> Built:
    return regress(parametrizations.weight_norm(nn.Conv1d(2, 3, 2)), randn(B, 2, 6))


@case("stateful", axes=None)
def spectral_norm_train() -> Built:
    """Each forward pass in training mode does a power iteration."""
    return regress(parametrizations.spectral_norm(lin()), randn(B, D))


@case()
def spectral_norm_eval() -> Built:
    return regress(parametrizations.spectral_norm(lin()).eval(), randn(B, D))


@case()
def orthogonal() -> Built:
    return regress(parametrizations.orthogonal(lin()), randn(B, D))


@case()
def hypernetwork_without_data() -> Built:
    """The weights of the layer are outputs of a network whose input is a parameter: all of it comes before the data."""
    model = Net(lambda m, x: F.linear(x, m.maker(m.code).view(D, D)), maker=lin(2, D * D), code=randn(2))
    return regress(model, randn(B, T, D))


@case()
def hypernetwork_per_sample() -> Built:
    """Every sample has its own weights, made from its own context."""
    model = Net(lambda m, x, c: torch.bmm(x, m.maker(c).view(-1, D, 2)), maker=lin(3, D * 2))
    return regress(model, (randn(B, T, D), randn(B, 3)))


# Training as people do it.


@case("peers")
def in_place_relu() -> Built:
    return regress(nn.Sequential(lin(), nn.ReLU(inplace=True), lin()), randn(B, D))


@case("peers")
def in_place_relu_after_convolution() -> Built:
    layers = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), nn.GroupNorm(1, 3), nn.ReLU(inplace=True))
    return regress(layers, randn(B, 2, 5, 6))


@case()
def in_place_arithmetic() -> Built:
    """add_, mul_ and writing into a slice, with parameters among the operands."""
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.lin(x)
        y += m.shift
        y[:, 0] = m.start
        return y.mul_(m.scale)

    return regress(Net(run, lin=lin(), shift=randn(D), start=randn(D), scale=randn(D)), randn(B, T, D))


@case("peers")
def checkpointed() -> Built:
    """checkpoint(use_reentrant=False): saved tensors are computed anew when they are read."""
    model = Net(lambda m, x: m.head(checkpoint(m.body, x, use_reentrant=False)),
                body=nn.Sequential(lin(), nn.Tanh(), lin()), head=lin())  # fmt: skip
    return regress(model, randn(B, T, D))


@case("random", axes=None)
def checkpointed_with_dropout() -> Built:
    model = Net(lambda m, x: m.head(checkpoint(m.body, x, use_reentrant=False)),
                body=nn.Sequential(lin(), nn.Dropout(0.5), lin()), head=lin())  # fmt: skip
    return regress(model, randn(B, D))


@case("random", axes=None)
def dropout() -> Built:
    return regress(nn.Sequential(lin(), nn.Dropout(0.5), nn.ReLU(), lin()), randn(B, T, D))


@case()
def frozen_first_layer() -> Built:
    """The output of the first layer has no graph."""
    model = nn.Sequential(lin().requires_grad_(False), nn.ReLU(), lin())
    return regress(model, randn(B, D))


@case()
def frozen_in_the_middle() -> Built:
    """Only a norm and the biases learn."""
    model = nn.Sequential(lin(), nn.LayerNorm(D), lin())
    model[0].weight.requires_grad_(False)
    model[2].requires_grad_(False)
    return regress(model, randn(B, T, D))


@case()
def input_requires_grad() -> Built:
    """An input that is a leaf of the graph is no parameter."""
    return regress(nn.Sequential(lin(), nn.Tanh(), lin()), randn(B, D).requires_grad_())


@case("unused")
def unused_parameters() -> Built:
    """A branch never taken, and a parameter multiplied by zero."""
    model = Net(lambda m, x: m.used(x) + 0 * m.idle, used=lin(), never=lin(), idle=randn(D))
    return regress(model, randn(B, D))


@case("unused")
def used_by_some_samples_only() -> Built:
    """A branch for the samples of one kind: an index picks them."""
    def run(m: Net, x: Tensor, kind: Tensor) -> Tensor:
        y = m.common(x)
        return y.index_add(0, kind.nonzero()[:, 0], m.special(x[kind]))

    return regress(Net(run, common=lin(), special=lin(), never=lin()), (randn(B, D), torch.tensor([True, False, True])))


@case()
def detached_branch() -> Built:
    """A target network: one use counts, the other is detached."""
    return regress(Net(lambda m, x: m.lin(x) - m.lin(x.tanh()).detach(), lin=lin()), randn(B, D))


@case()
def no_grad_branch() -> Built:
    def run(m: Net, x: Tensor) -> Tensor:
        with torch.no_grad():
            code = m.a(x)
        return m.b(code) + m.a(x)

    return regress(Net(run, a=lin(), b=lin()), randn(B, D))


@case()
def gradient_inside_the_model() -> Built:
    """An energy model: the output is the derivative of a scalar by the input, so the graph holds backward nodes."""
    def run(m: Net, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        with torch.enable_grad():  # the builder looks at shapes without a graph
            energy = m.b(m.a(x).tanh()).sum()
            return torch.autograd.grad(energy, x, create_graph=True)[0]

    return regress(Net(run, a=lin(), b=lin(D, 1)), randn(B, D))


class _Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x**3 * w

    @staticmethod
    def backward(ctx, z: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return 3 * z * x**2 * w, (z * x**3).sum_to_size(w.shape)


@case()
def custom_function() -> Built:
    """An autograd.Function with a parameter among its arguments: no rule can know it."""
    return regress(Net(lambda m, x: _Cube.apply(m.lin(x), m.w), lin=lin(), w=randn(D)), randn(B, D))


@case()
def sparse_adjacency() -> Built:
    """A constant sparse matrix beside the parameters."""
    graph = torch.tensor([[0.0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 1, 1], [0, 1, 0, 0]], dtype=torch.float64)
    model = Net(lambda m, x: torch.stack([torch.sparse.mm(graph.to_sparse(), s) for s in m.lin(x)]), lin=lin())
    return regress(model, randn(B, T, D))


# Batches and losses.


@case("peers", "empty")
def batch_of_none() -> Built:
    return regress(nn.Sequential(lin(), nn.ReLU(), lin()), randn(0, D))


@case("empty")
def convolutions_on_a_batch_of_none() -> Built:
    return classify(nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), lin(27, 4)), randn(0, 2, 5, 5))


@case()
def batch_of_one() -> Built:
    return regress(nn.Sequential(lin(), nn.LayerNorm(D), lin()), randn(1, T, D))


@case()
def all_samples_equal() -> Built:
    """Identical rows: no method may tell samples apart by their values."""
    model, loss_fn, x, y = regress(nn.Sequential(lin(), nn.Tanh(), lin()), randn(1, T, D).repeat(B, 1, 1))
    return model, loss_fn, x, y[:1].repeat(B, 1, 1)


@case()
def sample_with_zero_gradient() -> Built:
    """A hinge loss: samples beyond the margin have losses of zero."""
    def hinge(score: Tensor, side: Tensor) -> Tensor:
        return (1 - side * score[:, 0]).clamp(min=0)

    model = nn.Sequential(lin(), nn.Tanh(), lin(D, 1))
    model[2].bias.data.fill_(2.0)
    return model, hinge, randn(4, D), torch.tensor([1.0, -1, 1, -1], dtype=torch.float64)


@case()
def sample_of_weight_zero() -> Built:
    """Sample weights from outside, one of them zero."""
    model, _, x, y = regress(nn.Sequential(lin(), nn.Tanh(), lin()), randn(4, D))
    weights = torch.tensor([1.0, 0, 2, 0.5], dtype=torch.float64)
    return model, lambda o, t: squared(o, t["y"]) * t["w"], x, {"y": y, "w": weights}


@case("peers")
def ignored_positions() -> Built:
    """ignore_index, the mean over what is left of each sample; one sample is ignored altogether."""
    def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(logits, targets) / (targets != -100).sum(1).clamp(min=1)

    model, _, x, targets = classify(nn.Sequential(nn.Embedding(7, D), lin(D, 7)), ids(7, 4, T))
    targets[0, 2:] = targets[1] = -100
    return model, mean_loss, x, targets


@case()
def large_and_small_losses() -> Built:
    """Twelve orders of magnitude between the losses of a batch."""
    model, _, x, y = regress(nn.Sequential(lin(), nn.Tanh(), lin()), randn(4, T, D))
    scales = torch.tensor([1e-6, 1.0, 1e6, 1e-3], dtype=torch.float64)
    return model, lambda o, t: squared(o, t["y"]) * t["scale"], x, {"y": y, "scale": scales}


@case()
def saturated() -> Built:
    """Gradients near underflow at saturated units."""
    return regress(nn.Sequential(lin(), nn.Sigmoid(), lin()), 100 * randn(B, D))


@case()
def losses_of_an_auxiliary_head() -> Built:
    """Outputs in a nested dict, one of them used by the loss for a part of the positions only."""
    def run(m: Net, x: Tensor) -> dict:
        h = m.body(x).tanh()
        return {"main": m.head(h.mean(1)), "more": [{"aux": m.aux(h)}]}

    def loss(outputs: dict, targets: Tensor) -> Tensor:
        return squared(outputs["main"], targets) + outputs["more"][0]["aux"][:, 1].square().sum(1)

    return Net(run, body=lin(), head=lin(D, 2), aux=lin(D, 3)), loss, randn(B, T, D), randn(B, 2)


@case()
def dict_inputs() -> Built:
    model = Net(lambda m, *, left, right: m.a(left) + m.b(right), a=lin(), b=lin(2, D))
    return regress(model, {"left": randn(B, D), "right": randn(B, 2)})


@case(axes=({"x": 0, "pair": (0, 1)}, None))
def nested_inputs() -> Built:
    """Tensors in dicts in tuples, one with the batch on axis 1, and a scale shared by all samples."""
    model = Net(lambda m, d, s: m.a(d["x"]) * s + m.b(d["pair"][0]) + m.c(d["pair"][1]).transpose(0, 1).sum(1),
                a=lin(), b=lin(), c=lin(2, D))  # fmt: skip
    return regress(model, ({"x": randn(B, D), "pair": (randn(B, D), randn(T, B, 2))}, randn()))


@case()
def integer_inputs() -> Built:
    """Pixels of type uint8, converted inside the model."""
    model = Net(lambda m, x: m.lin(x.to(torch.float64) / 255), lin=lin())
    return regress(model, ids(256, B, D).to(torch.uint8))


@case()
def non_contiguous_inputs() -> Built:
    """A transposed view, and every second column of another."""
    return regress(nn.Sequential(lin(), nn.ReLU(), lin()), randn(D, 2 * B).T[::2])


@case()
def channels_last() -> Built:
    layers = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    model, loss_fn, x, y = regress(layers, randn(B, 2, 7, 6))
    return model.to(memory_format=torch.channels_last), loss_fn, x.to(memory_format=torch.channels_last), y


@case()
def expanded_input() -> Built:
    """One image for all samples, a stride of zero over the batch."""
    return regress(nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU()), randn(1, 2, 5, 5).expand(B, -1, -1, -1))
