"""The random projections that `project` takes: what they are, and the map that each makes for a parameter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from torch import Tensor

from persample.projections.hashing import key_of
from persample.projections.maps import ByEntries, Chosen, Factors, Map, Signs, Sparse

Shape = tuple[int, ...]
Group = Mapping[str, Shape]
"""Parameters whose features are added up, in their order."""


class Projection:
    """Base of all random projections: a linear map P of per-sample gradients to k features, with E⟨Pg, Ph⟩ = ⟨g, h⟩.

    P has a part for each parameter, which depends on the seed and on names and shapes of parameters alone.

    >>> [isinstance(each, Projection) for each in (Kronecker(4, 3), Rademacher(12), SJLT(12), Mask(12))]
    [True, True, True, True]
    """

    k: int
    """Number of features."""

    def _map(self, name: str, group: Group) -> Map:
        """The part for a parameter of a group, complex entries being two real ones on an axis of their own."""
        raise NotImplementedError(f"{type(self).__name__} defines _map")


@dataclass(frozen=True)
class Kronecker(Projection):
    """P_o ⊗ P_i on the factors of each gradient: Σ_t (P_o z_t) ⊗ (P_i x_t) of Σ_t z_t ⊗ x_t, k = out · inp features.

    No row is formed of weights of linear layers, convolutions and tables: this is the cheapest of the projections
    (LoGra: Choe et al., *What is Your Data Worth to GPT?*, 2024). P_o [out, O] and P_i [inp, I] have entries ±1/√out
    and ±1/√inp; a weight of more than two axes is a matrix [O, all others]. Of vectors, such as biases, each entry
    is added, with a sign, to one of the k features.

    Args:
        inp: features of the input, I → inp.
        out: features of the output, O → out.
        seed: of the random signs.

    >>> psg = persample.per_sample(nn.Linear(30, 20), lambda y, _: y.square().sum(1), torch.randn(5, 30))
    >>> psg.project(persample.projections.Kronecker(4, 3)).shape
    torch.Size([5, 12])
    """

    inp: int
    out: int
    seed: int = 0
    k: int = field(init=False)

    def __post_init__(self) -> None:
        positive(inp=self.inp, out=self.out)
        object.__setattr__(self, "k", self.inp * self.out)

    def _map(self, name: str, group: Group) -> Map:
        """Factors of a matrix; for a vector one feature for each entry, with no more variance than signs for all."""
        key = key_of("Kronecker", self.seed, name)
        if len(group[name]) < 2:
            return Sparse(self.k, key, 1)
        return Factors(group[name], self.inp, self.out, key)


@dataclass(frozen=True)
class Rademacher(Projection):
    """A dense matrix of signs ±1/√k (Achlioptas, *Database-friendly random projections*, 2003).

    The variance of ⟨Pg, Ph⟩ is the least of all here, about (‖g‖²‖h‖² + ⟨g, h⟩²) / k, and the cost the highest: rows
    are formed, a few at a time, and each entry meets k signs, which are never stored.

    Args:
        k: number of features.
        seed: of the random signs.

    >>> psg = persample.per_sample(nn.Linear(30, 20), lambda y, _: y.square().sum(1), torch.randn(5, 30))
    >>> psg.project(persample.projections.Rademacher(64)).shape
    torch.Size([5, 64])
    """

    k: int
    seed: int = 0

    def __post_init__(self) -> None:
        positive(k=self.k)

    def _map(self, name: str, group: Group) -> ByEntries:
        """Signs."""
        return Signs(self.k, key_of("Rademacher", self.seed, name))


@dataclass(frozen=True)
class Mask(Projection):
    """k of the gradient's entries, times √(entries / k): one of each of k parts of all entries, each as likely.

    Weights of linear layers and tables need no rows. The variance of ⟨Pg, Ph⟩ is the highest: what lies beside the
    chosen entries is not seen.

    Args:
        k: number of features, at most that of entries of all parameters together, or of the smallest layer for
            `per="layer"`.
        seed: of the choice.

    >>> psg = persample.per_sample(nn.Linear(30, 20), lambda y, _: y.square().sum(1), torch.randn(5, 30))
    >>> psg.project(persample.projections.Mask(64)).shape
    torch.Size([5, 64])
    """

    k: int
    seed: int = 0

    def __post_init__(self) -> None:
        positive(k=self.k)

    def _map(self, name: str, group: Group) -> ByEntries:
        """Chosen entries."""
        sizes = {each: prod(shape) for each, shape in group.items()}
        total = sum(sizes.values())
        if self.k > total:
            raise ValueError(
                f"Mask(k={self.k}) chooses among the {total} entries of {', '.join(sizes)}; give a smaller k, or "
                'project with per="total"'
            )
        names = list(sizes)
        before = sum(sizes[each] for each in names[: names.index(name)])
        return Chosen(self.k, key_of("Mask", self.seed, *names), before, sizes[name], total)


@dataclass(frozen=True)
class SJLT(Projection):
    """A sparse matrix: each entry goes to `nonzeros` of the k features, with a sign (Kane and Nelson, *Sparser
    Johnson–Lindenstrauss Transforms*, 2014).

    Rows are formed, a few at a time, but each entry is added to few features; of tables only what is touched is.

    Args:
        k: number of features.
        seed: of places and signs.
        nonzeros: features that an entry goes to; with 1 a count sketch, with more a variance nearer to that of a dense
            matrix where few entries are large.

    >>> psg = persample.per_sample(nn.Linear(30, 20), lambda y, _: y.square().sum(1), torch.randn(5, 30))
    >>> psg.project(persample.projections.SJLT(64)).shape
    torch.Size([5, 64])
    """

    k: int
    seed: int = 0
    nonzeros: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        positive(k=self.k, nonzeros=self.nonzeros)

    def _map(self, name: str, group: Group) -> ByEntries:
        """Few features for each entry."""
        return Sparse(self.k, key_of("SJLT", self.seed, name), self.nonzeros)


def positive(**numbers: int) -> None:
    """Raises `ValueError` unless these are positive integers."""
    for name, number in numbers.items():
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise ValueError(f"{name} must be a positive number of features; got {number!r}")


def maps_of(projection: object, parameters: Mapping[str, Tensor], groups: Iterable[Sequence[str]]) -> dict[str, Map]:
    """Returns the map of every parameter; `groups`: names of those whose features are added up.

    Raises:
        TypeError: no projection.
    """
    if not isinstance(projection, Projection):
        known = ", ".join(sorted(each.__name__ for each in (Kronecker, Rademacher, SJLT, Mask)))
        raise TypeError(
            f"projection must be one of persample.projections ({known}), such as Kronecker(16, 16); got {projection!r}"
        )
    found: dict[str, Map] = {}
    for names in groups:
        group = {name: _real_shape(parameters[name]) for name in names}
        found |= {name: projection._map(name, group) for name in names}
    return found


def _real_shape(parameter: Tensor) -> Shape:
    return (*parameter.shape, 2) if parameter.is_complex() else tuple(parameter.shape)
