"""Reference solutions of periodic equations u_t = L u + N(u) by our own spectral solver.

Fourier modes in x; in time the exponential Runge–Kutta method of order four (Cox and Matthews 2002), whose coefficients
are means over a circle in the complex plane (Kassam and Trefethen 2005). L is diagonal, so stiffness costs nothing.
How right they are is told by refinement: `tests/project/test_experiments_equations.py` halves both steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

Array = np.ndarray
CIRCLE = 32
"""Points on the circle."""


@dataclass(frozen=True)
class Table:
    """A solution on a grid: times [T], places [X], values [T, X]."""

    times: Array
    places: Array
    values: Array


def march(start: Array, linear: Array, nonlinear: Callable[[Array], Array], end: float, steps: int, kept: int) -> Array:
    """Values [kept + 1, X] at times 0, end/kept, …, end.

    Arguments:
        start: u at time 0 on the grid, [X].
        linear: L of each mode of `numpy.fft.rfft`.
        nonlinear: modes of u -> modes of N(u).
        steps: of the time, a multiple of `kept`.
    """
    step = end / steps
    full, half = np.exp(step * linear), np.exp(step * linear / 2)
    circle = np.exp(2j * np.pi * (np.arange(CIRCLE) + 0.5) / CIRCLE)
    z = step * linear[:, None] + circle

    def mean(values: Array) -> Array:
        return step * values.mean(1)

    q = mean((np.exp(z / 2) - 1) / z)
    f1 = mean((-4 - z + np.exp(z) * (4 - 3 * z + z**2)) / z**3)
    f2 = mean((2 + z + np.exp(z) * (z - 2)) / z**3)
    f3 = mean((-4 - 3 * z - z**2 + np.exp(z) * (4 - z)) / z**3)
    v, found = np.fft.rfft(start), [start]
    for number in range(1, steps + 1):
        n = nonlinear(v)
        a = half * v + q * n
        na = nonlinear(a)
        b = half * v + q * na
        nb = nonlinear(b)
        nc = nonlinear(half * a + q * (2 * nb - n))
        v = full * v + f1 * n + 2 * f2 * (na + nb) + f3 * nc
        if number % (steps // kept) == 0:
            found.append(np.fft.irfft(v, len(start)))
    return np.stack(found)


@lru_cache(maxsize=4)
def allen_cahn(modes: int = 4096, steps: int = 2000, kept: int = 100) -> Table:
    """u_t = 10⁻⁴ u_xx + 5(u − u³), u(0, x) = x² cos πx, periodic on [−1, 1); t in [0, 1]."""
    x = 2 * np.arange(modes) / modes - 1
    k = np.pi * np.arange(modes // 2 + 1)

    def nonlinear(v: Array) -> Array:
        u = np.fft.irfft(v, modes)
        return np.fft.rfft(-5 * u**3)

    values = march(x**2 * np.cos(np.pi * x), 5 - 1e-4 * k**2 + 0j, nonlinear, 1.0, steps, kept)
    return Table(np.linspace(0, 1, kept + 1), x, values)


@lru_cache(maxsize=4)
def korteweg_de_vries(modes: int = 512, steps: int = 8000, kept: int = 100) -> Table:
    """u_t + u u_x + 0.022² u_xxx = 0, u(0, x) = cos πx, periodic on [−1, 1); t in [0, 1]."""
    x = 2 * np.arange(modes) / modes - 1
    k = np.pi * np.arange(modes // 2 + 1)
    known = np.arange(len(k)) <= modes // 3  # products of these fold onto none of them

    def nonlinear(v: Array) -> Array:
        return -0.5j * k * np.fft.rfft(np.fft.irfft(known * v, modes) ** 2)

    values = march(np.cos(np.pi * x), 1j * 0.022**2 * k**3, nonlinear, 1.0, steps, kept)
    return Table(np.linspace(0, 1, kept + 1), x, values)
