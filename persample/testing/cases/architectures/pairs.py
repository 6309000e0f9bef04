"""Pairs, towers, recommenders, and models of decisions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from persample.testing.cases.parts import dense
from persample.testing.cases.table import Built, Net, group, ids, randn, regress

case = group("architecture", "architecture")
B, T, D = 3, 4, 6


# Pairs and towers.


@case("peers")
def siamese() -> Built:
    """One encoder, called on both inputs."""
    model = Net(lambda m, x, y: m.head((m.encoder(x) - m.encoder(y)).abs()), encoder=dense(D, D, D), head=dense(D, 1))
    return regress(model, (randn(B, D), randn(B, D)))


@case("peers")
def siamese_joined() -> Built:
    """One encoder, called once on both inputs, one after the other on the batch axis: 2 B rows."""

    def run(m: Net, x: Tensor, y: Tensor) -> Tensor:
        a, b = m.encoder(torch.cat([x, y])).chunk(2)
        return m.head((a - b).abs())

    return regress(Net(run, encoder=dense(D, D, D), head=dense(D, 1)), (randn(B, D), randn(B, D)))


@case()
def triplets() -> Built:
    """Anchor, positive and negative of shape [B, 3, D]; a hinge, so some samples may be zero."""
    model = Net(lambda m, x: m.encoder(x), encoder=dense(D, D, D))

    def loss(out: Tensor, _: Tensor) -> Tensor:
        anchor, near, far = out.unbind(1)
        return ((anchor - near).norm(dim=1) - (anchor - far).norm(dim=1) + 0.2).clamp(min=0)

    return model, loss, randn(4, 3, D), randn(4)


def towers(contrastive: bool) -> Built:
    """CLIP: images and texts to one space, a learned temperature."""

    def run(m: Net, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return F.normalize(m.image(image)), F.normalize(m.text(m.words(text).mean(1))), m.temperature.exp()

    def each(outputs: tuple[Tensor, ...], wanted: Tensor) -> Tensor:
        return F.softplus(-wanted * outputs[2] * (outputs[0] * outputs[1]).sum(1))

    def against_all(outputs: tuple[Tensor, ...], _: Tensor) -> Tensor:
        scores = outputs[2] * outputs[0] @ outputs[1].T
        return (torch.logsumexp(scores, 0) + torch.logsumexp(scores, 1)) / 2 - scores.diagonal()

    image = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(16, D))
    model = Net(run, image=image, words=nn.Embedding(9, D), text=dense(D, D, D), temperature=torch.zeros(()))
    inputs = (randn(B, 3, 5, 5), ids(9, B, T))
    return (
        model,
        against_all if contrastive else each,
        inputs,
        torch.tensor([1.0, -1, 1], dtype=torch.float64),
    )


@case()
def clip_pairwise() -> Built:
    """Each pair judged alone, as in SigLIP without the other pairs."""
    return towers(contrastive=False)


@case(coupled=True)
def clip_contrastive() -> Built:
    """Every text is a wrong answer for every other image."""
    return towers(contrastive=True)


@case()
def recommender() -> Built:
    """DLRM: bags of categories, dense features, products of all pairs."""

    def run(m: Net, numbers: Tensor, bags: Tensor, user: Tensor) -> Tensor:
        parts = torch.stack([m.bottom(numbers), m.items(bags), m.users(user)], 1)
        i, j = torch.tril_indices(3, 3, -1)
        return m.top(torch.cat([parts[:, 0], (parts @ parts.mT)[:, i, j]], 1))

    model = Net(
        run,
        bottom=dense(4, D),
        items=nn.EmbeddingBag(7, D, mode="mean"),
        users=nn.Embedding(5, D),
        top=dense(D + 3, D, 1),
    )
    return regress(model, (randn(B, 4), ids(7, B, 4), ids(5, B)))


@case()
def matrix_factorisation() -> Built:
    """Two tables and their biases, a product of rows; users repeat within the batch."""
    model = Net(
        lambda m, u, i: (m.users(u) * m.items(i)).sum(1) + m.user_bias(u)[:, 0] + m.bias[i] + m.mean,
        users=nn.Embedding(4, D),
        items=nn.Embedding(5, D),
        user_bias=nn.Embedding(4, 1),
        bias=randn(5),
        mean=randn(),
    )
    return regress(model, (torch.tensor([0, 2, 2, 1]), torch.tensor([3, 3, 1, 0])))


@case()
def policy_and_value() -> Built:
    """Reinforcement learning: two heads on one body, advantages detached."""
    model = Net(
        lambda m, x: (m.policy(m.body(x)), m.value(m.body(x))[:, 0]),
        body=dense(D, 5, 5),
        policy=nn.Linear(5, 3),
        value=nn.Linear(5, 1),
    )

    def loss(out: tuple[Tensor, Tensor], t: dict[str, Tensor]) -> Tensor:
        advantage = (t["return"] - out[1]).detach()
        chosen = out[0].log_softmax(1).gather(1, t["action"][:, None])[:, 0]
        return -advantage * chosen + (out[1] - t["return"]).square()

    return model, loss, randn(B, D), {"return": randn(B), "action": ids(3, B)}


@case()
def dueling_network() -> Built:
    """A mean over actions inside the sample, not over the batch."""
    model = Net(
        lambda m, x: m.value(x) + m.gain(x) - m.gain(x).mean(1, keepdim=True),
        value=dense(D, 5, 1),
        gain=dense(D, 5, B),
    )
    return regress(model, randn(B, D))
