"""What NGD and FNGD tell about themselves: figures of every layer, and probes of stored coefficients."""

from __future__ import annotations

import copy

import pytest
import torch
from natural import LAYERS, close, data, matrix, vector
from torch.nn import functional as F
from variants import Small, backward, rows

from fngd import FNGD, NGD, smw_coefficients
from fngd.natural.diagnostics import effective_rank

pytestmark = pytest.mark.usefixtures("double")


@pytest.mark.parametrize("gram", ["layer", "network"])
def test_diagnostics(gram: str) -> None:
    model, batch, alpha = Small(), data(6), 1e-3
    own, _ = rows(model, batch)
    opt = FNGD(model, lr=0.0, alpha=alpha, steps_per_epoch=1, diagnostics=True, gram=gram)
    got = backward(model, batch)
    figures = opt.diagnostics
    assert list(figures) == (list(LAYERS) if gram == "network" else list(LAYERS)[::-1])
    total = sum(vector(got, layer).square().sum() for layer in LAYERS)
    for layer in LAYERS:
        u = matrix(own, *(LAYERS if gram == "network" else (layer,)))
        gram_matrix = u.T @ u
        factors = 6 * smw_coefficients(gram_matrix, alpha=alpha)
        d, g = vector(got, layer), matrix(own, layer).mean(1)
        expected = {
            "damping": alpha * gram_matrix.norm(),
            "effective_rank": gram_matrix.trace() ** 2 / gram_matrix.square().sum(),
            "mean": factors.mean(),
            "spread": factors.std(correction=0),
            "cosine": F.cosine_similarity(d, g, dim=0),
            "share": d.square().sum() / total,
        }
        assert set(figures[layer]) == set(expected)
        for name, value in expected.items():
            close(figures[layer][name], value)
    opt.step()
    backward(model, batch)
    for name in ("mean", "spread", "cosine", "share", "damping"):  # stored coefficients: the same here
        close(opt.diagnostics["inner"][name], figures["inner"][name])
    plain = NGD(Small(), lr=0.0)
    with pytest.raises(ValueError, match="construct the optimiser with diagnostics=True"):
        _ = plain.diagnostics


def test_effective_rank() -> None:
    u = torch.randn(9, 1)
    assert effective_rank(u @ u.T).item() == pytest.approx(1)
    assert effective_rank(3e-9 * torch.eye(5)).item() == pytest.approx(5)
    assert effective_rank(torch.zeros(4, 4)).item() == 0


def test_refresh_by_cosine() -> None:
    """A probe in the first batch decides at the end of the epoch; the probed step itself keeps what is stored."""
    model, same, other = Small(), data(5), data(5)
    other = other[0] * torch.tensor([5.0, 0.1, 1, 1, 9])[:, None, None, None], other[1]
    own, away = rows(model, same)[0], rows(model, other)[0]
    stored, fresh = (smw_coefficients(u.T @ u, alpha=1e-4) for u in (matrix(own, "inner"), matrix(away, "inner")))
    cosine = F.cosine_similarity(stored, fresh, dim=0).item()
    assert cosine < 1 - 1e-6

    def epochs(threshold: float) -> list[bool]:
        """Whether each epoch used fresh coefficients, of batches same, same, other, other, other."""
        net = copy.deepcopy(model)
        opt = FNGD(net, lr=0.0, alpha=1e-4, steps_per_epoch=1, refresh_cosine=threshold, probe_layer="inner")
        result = []
        for batch in (same, same, other, other, other):
            got = vector(backward(net, batch), "inner")
            u = matrix(own if batch is same else away, "inner")
            (copied := FNGD(Small(), lr=0.0, steps_per_epoch=1, refresh_cosine=threshold)).load_state_dict(
                opt.state_dict()
            )
            assert copied._table.computing == opt._table.computing
            d = u @ (smw_coefficients(u.T @ u, alpha=1e-4))
            result.append(bool((got - d).norm() < 1e-8 * d.norm()))
            if not result[-1]:
                close(got, u @ stored)
            opt.step()
        return result

    assert epochs(cosine + 1e-7) == [True, True, False, True, True]
    assert epochs(cosine - 1e-7) == [True, True, False, False, False]
