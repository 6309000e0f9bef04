"""What training code does around a step: other optimisers, copies, states of something else, models that move."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from natural import close, cross_entropies, dense, matrix, rows
from torch import Tensor, nn
from torch.nn import functional as F

from fngd import FNGD, KFAC, NGD, SKFAC, Eva, Shampoo

STEPS = 4
Make = Callable[..., Any]


def _shampoo(model: nn.Module, **options: Any) -> Shampoo:
    return Shampoo(model.parameters(), statistics_every=1, inverse_every=1, **options)


MAKERS: dict[str, Make] = {
    "position": partial(FNGD, steps_per_epoch=STEPS),
    "sample": partial(FNGD, steps_per_epoch=STEPS, share="sample", samples=32),
    "ngd": NGD,
    "kfac": KFAC,
    "skfac": SKFAC,
    "eva": Eva,
    "shampoo": _shampoo,
}
SEEING = [name for name in MAKERS if name != "shampoo"]  # what is given the model
pytestmark = pytest.mark.usefixtures("double")


def net(seed: int = 0, width: int = 4) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2))


def loss_of(model: nn.Module, number: int, *, size: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    random = torch.Generator().manual_seed(number)
    x = torch.randn(size, 3, generator=random, dtype=torch.float64).to(dtype)
    return F.cross_entropy(model(x), torch.randint(2, (size,), generator=random), reduction="sum") / 5


def step(model: nn.Module, opt: Any, number: int, **options: Any) -> None:
    if getattr(getattr(opt, "_table", None), "share", None) == "sample":
        opt.next_batch(torch.arange(options.get("size", 5)) + number % STEPS * 5)
    loss_of(model, number, **options).backward()
    opt.step()
    opt.zero_grad()


def values(model: nn.Module) -> Tensor:
    return torch.cat([param.detach().flatten().double() for param in model.parameters()])


def pickled(pair: Any) -> Any:
    return pickle.loads(pickle.dumps(pair))


def saved(pair: Any) -> Any:
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
def test_a_copy_goes_on_as_the_original(copied: Callable[[Any], Any], name: str):
    model = net()
    groups = [{"params": model[0].parameters(), "lr": 0.05}, {"params": model[2].parameters(), "precondition": False}]
    make = MAKERS[name]
    if name == "shampoo":
        opt: Any = Shampoo(groups, statistics_every=1, inverse_every=1)
    else:
        opt = make(model, groups, other="adamw", other_options={"lr": 0.02})
    for number in range(STEPS + 1):
        step(model, opt, number)
    other, its = copied((model, opt))
    for number in range(STEPS + 1, 3 * STEPS):
        step(model, opt, number)
        step(other, its, number)
    assert torch.equal(values(model), values(other))
    assert not any(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", SEEING)
def test_a_copy_of_what_was_removed_leaves_the_model_alone(name: str):
    model = net()
    opt = MAKERS[name](model)
    opt.remove()
    other, _ = copy.deepcopy((model, opt))
    MAKERS[name](other)  # and makes room for the next


def test_a_kind_of_ones_own_that_cannot_be_copied():
    class Mine(NGD):
        def __init__(self, model: nn.Module) -> None:
            super().__init__(model, lr=0.1)

    with pytest.raises(TypeError, match=r"Mine cannot be copied or pickled, as its constructor takes no params="):
        copy.deepcopy(Mine(net()))


@pytest.mark.parametrize("name", ["position", "ngd"])
def test_what_another_optimiser_steps_takes_the_plain_gradient(name: str):
    """Two optimisers, each with some of the parameters: AdamW is not to be handed a preconditioned gradient."""
    model = net()
    opt = MAKERS[name](model, model[0].parameters())
    loss_of(model, 0).backward()
    other = net()
    loss_of(other, 0).backward()
    for param, expected in zip(model[2].parameters(), other[2].parameters(), strict=True):
        torch.testing.assert_close(param.grad, expected.grad, rtol=1e-12, atol=1e-14)
    assert not torch.allclose(model[0].weight.grad, other[0].weight.grad, rtol=1e-3)
    assert opt.explain()["2"] == "plain: its weight is in no parameter group of this optimiser"
    opt.add_param_group({"params": model[2].parameters()})  # thawed later
    model.zero_grad()
    loss_of(model, 0).backward()
    assert not torch.allclose(model[2].weight.grad, other[2].weight.grad, rtol=1e-3)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_states_of_torchs_optimisers_are_refused(kind: Any, name: str):
    model = net()
    foreign = kind(model.parameters(), lr=0.1)
    loss_of(model, 0).backward()
    foreign.step()
    foreign.zero_grad()
    opt = MAKERS[name](model)
    before = copy.deepcopy(opt.state_dict())
    message = {"position": "no 'coefficients'", "sample": "no 'coefficients'", "ngd": "groups have no"}
    with pytest.raises(ValueError, match=message.get(name, "no preconditioner")):
        opt.load_state_dict(foreign.state_dict())
    assert opt.state_dict()["param_groups"] == before["param_groups"]
    step(model, opt, 1)


def test_states_of_other_methods_are_refused():
    model = net()
    opt = KFAC(model)
    state = opt.state_dict()
    opt.remove()
    with pytest.raises(ValueError, match="saved by KFAC, and this optimiser is NGD"):
        NGD(model).load_state_dict(state)


@pytest.mark.parametrize("name", MAKERS)
def test_states_of_other_shapes_are_refused(name: str):
    model, other = net(), net(width=5)
    opt = MAKERS[name](model)
    step(model, opt, 0)
    state = opt.state_dict()
    fresh = MAKERS[name](other)
    before = values(other)
    with pytest.raises(ValueError, match=r"(momentum_buffer of parameter 0 has shape|do not fit)"):
        fresh.load_state_dict(state)
    for number in range(2):
        step(other, fresh, number)  # nothing was loaded by halves
    assert torch.isfinite(before).all()


@pytest.mark.parametrize("name", ["kfac", "skfac", "eva"])
def test_factors_of_other_sizes_are_refused_without_momentum(name: str):
    states = []
    for width in (4, 5):
        model = net(width=width)
        opt = MAKERS[name](model, momentum=0.0)
        step(model, opt, 0)
        states.append((opt, opt.state_dict()))
    message = r"(layer '0' are of 4 inputs .* and 5 outputs.*\[4, 3\]|layer '2' are of 6 inputs .* and 2 .*\[2, 4\])"
    with pytest.raises(ValueError, match=message):
        states[0][0].load_state_dict(states[1][1])


@pytest.mark.parametrize("name", ["position", "sample", "kfac"])
def test_states_of_other_names_are_refused(name: str):
    model = net()
    opt = MAKERS[name](model)
    step(model, opt, 0)
    state = opt.state_dict()
    wrapped = nn.Sequential(net())
    with pytest.raises(ValueError, match=r"of layers \['0', '2'\]; this model's layers are \['0.0', '0.2'\]"):
        MAKERS[name](wrapped).load_state_dict(state)


def test_samples_of_another_data_set_are_refused():
    model = net()
    opt = FNGD(model, steps_per_epoch=STEPS, share="sample", samples=32)
    state = opt.state_dict()
    opt.remove()
    with pytest.raises(ValueError, match="samples=32, this optimiser 33"):
        FNGD(model, steps_per_epoch=STEPS, share="sample", samples=33).load_state_dict(state)


def test_state_of_a_distributed_checkpoint():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = net()
    opt = FNGD(model, steps_per_epoch=STEPS)
    step(model, opt, 0)
    with pytest.raises(ValueError, match=r"torch.distributed.checkpoint, which keeps nothing but"):
        opt.load_state_dict(get_optimizer_state_dict(model, opt))


@pytest.mark.parametrize("name", SEEING)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_that_is_cast_later(dtype: torch.dtype, name: str):
    model, twin = net().float(), net().float()
    opt, its = MAKERS[name](model), MAKERS[name](twin)
    for number in range(STEPS + 1):
        step(model, opt, number, dtype=torch.float32)
        step(twin, its, number, dtype=torch.float32)
    model.to(dtype)
    for number in range(STEPS + 1, 2 * STEPS + 2):
        step(model, opt, number, dtype=dtype)
        step(twin, its, number, dtype=torch.float32)
    tolerance = 1e-5 if dtype == torch.float64 else 0.1
    assert (values(model) - values(twin)).norm() <= tolerance * values(twin).norm()


@pytest.mark.parametrize("name", MAKERS)
def test_an_empty_batch_is_a_zero_gradient(name: str):
    model, twin = net(), net()
    opt, its = MAKERS[name](model), MAKERS[name](twin)
    step(model, opt, 0, size=0)
    assert torch.equal(values(model), values(twin))
    for number in range(2):
        step(model, opt, number)
    assert values(model).isfinite().all()
    # among micro-batches it changes nothing
    model = net()
    opt = MAKERS[name](model)
    for each, optimizer, sizes in ((model, opt, (5, 0)), (twin, its, (5,))):
        for size in sizes:
            if name == "sample":
                optimizer.next_batch(torch.arange(size))
            loss_of(each, 1, size=size).backward()
        optimizer.step()
    assert torch.equal(values(model), values(twin))


@pytest.mark.parametrize("name", SEEING)
def test_a_weight_that_is_replaced(name: str):
    model = net()
    opt = MAKERS[name](model)
    step(model, opt, 0)
    model[0].weight = nn.Parameter(torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"parameters \['0.weight'\] replaced"):
        step(model, opt, 1)


@pytest.mark.parametrize("name", SEEING)
def test_a_layer_that_is_added_later_is_named(name: str):
    model = net()
    opt = MAKERS[name](model)
    model.append(nn.Linear(2, 2))
    opt.add_param_group({"params": model[3].parameters()})
    other = copy.deepcopy(model)
    loss_of(other, 0).backward()
    if name == "sample":
        opt.next_batch(torch.arange(5))
    loss_of(model, 0).backward()
    torch.testing.assert_close(model[3].weight.grad, other[3].weight.grad, rtol=1e-12, atol=1e-14)
    assert opt.explain()["3"].startswith("plain: it was added after the model was")


def test_a_generators_step_is_noticed():
    """D's coefficients are computed for two passes a step; with the generator's, there are three."""
    model = net()
    opt = FNGD(model, steps_per_epoch=1)
    for number in range(2):
        loss_of(model, number).backward()
    opt.step()
    opt.zero_grad()
    for number in range(2):
        loss_of(model, number).backward()
    with pytest.warns(UserWarning, match=r"backward pass 3 of step 1 .* had 2 .*requires_grad_\(False\)"):
        loss_of(model, 2).backward()


def test_a_layer_that_is_thawed_later_is_no_surprise():
    model = net()
    opt = FNGD(model, steps_per_epoch=1)
    model[0].requires_grad_(False)
    for thawed in (False, True, True):
        model[0].requires_grad_(thawed)
        for number in range(2):
            loss_of(model, number).backward()
        opt.step()
        opt.zero_grad()


def test_a_state_of_shampoo_in_another_precision():
    model, single = net(), net().float()
    opt, other = (Shampoo(each.parameters(), lr=0.1, epsilon=1e-2) for each in (model, single))
    step(model, opt, 0)
    single.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    for number in (1, 2):  # by roots of the first step
        step(model, opt, number)
        step(single, other, number, dtype=torch.float32)
    torch.testing.assert_close(values(single), values(model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("name", ["kfac", "skfac", "eva"])
def test_a_bias_that_is_frozen_and_thawed_later(name: str, every: int):
    """Factors are of another size then: they start anew, and until there are some the gradient is the plain one."""
    model = net()
    often = {"every": every} if name == "skfac" else {"statistics_every": every}
    opt = MAKERS[name](model, lr=0.1, momentum=0.0, kl_clip=None, **often)
    for number in range(8):
        model[0].bias.requires_grad_(not 2 <= number < 5)
        before = model[0].weight.detach().clone()
        loss_of(model, number).backward()
        gradient = model[0].weight.grad.clone()
        opt.step()
        opt.zero_grad()
        plain = torch.allclose(model[0].weight, before - 0.1 * gradient)
        assert plain == (every == 3 and number in (2, 5))
    fresh = net()
    fresh.load_state_dict(model.state_dict())
    other = MAKERS[name](fresh, lr=0.1, momentum=0.0, kl_clip=None)
    other.load_state_dict(opt.state_dict())


def test_copies_of_data_parallel_are_refused():
    model = net()
    NGD(model)
    replica = model._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match=r"nn.DataParallel runs copies.*DistributedDataParallel"):
        replica(torch.randn(5, 3))


def test_coefficients_of_a_part_of_the_parameters_are_the_dense_ones():
    """The oracle: N × N matrices of the samples' gradients, for the layers that are the optimiser's."""
    from natural import LAYERS, Small, data

    model, (x, y) = Small(), data(5)
    own = rows(model, x, cross_entropies(y))
    NGD(model, [param for name, param in model.named_parameters() if not name.startswith("inner")], alpha=0.1)
    F.cross_entropy(model(x), y).backward()
    for layer in LAYERS:
        u = matrix(own, layer)
        g = u.mean(1)
        found = torch.cat([p.grad.flatten() for name, p in model.named_parameters() if name.startswith(layer)])
        close(found, g if layer == "inner" else dense(u, g, lam=0.1 * torch.linalg.matrix_norm(u.T @ u)))
