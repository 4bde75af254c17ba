"""Grids by what they can do.

A grid says which numbers a weight may take. What it can do is its type: methods ask for one of the
abstract types below, never for a concrete grid. Only grid/, formats/, kernels/, runtime/ and
export/ know concrete grids.

    Grid          fit, encode, decode, stored; the params of single columns
    OrderedGrid   codes that have neighbours: all that learned rounding needs
    LinearGrid    weight = (code - zero) * scale - offset: what compiled loops take
    GroupedGrid   groups of neighbouring inputs that share a scale: what a clip search needs
    RangedGrid    params from the two ends of a group's range: what learned clipping needs
    ColumnGrid    levels of its own for each column, also of different bits
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from .kmeans import NotFiniteError
from .params import Params

P = TypeVar("P", bound=Params)


class Levels(Protocol):
    """Levels that are given: those of one input, of (out, 1) weights."""

    def encode(self, w: Tensor) -> Tensor:
        """Round to the nearest codes, (out, 1) float -> (out, 1) uint8."""
        ...

    def decode(self, codes: Tensor) -> Tensor:
        """Decode (out, 1) codes to (out, 1) weights."""
        ...


class Grid(ABC, Generic[P]):
    """Which numbers a weight may take. A grid is a frozen value and holds no tensors.

    What it needs besides codes are its params, of a type ``P`` of its own.
    """

    if TYPE_CHECKING:
        # Read-only members that a dataclass may have as fields: at run time a property here would
        # be taken for the field's default.
        @property
        def bits(self) -> int:
            """Bits of a code, 1 to 8."""

        @property
        def group_size(self) -> int | None:
            """Neighbouring inputs that share params; None for the grid's own default."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The name that `lowbit.grid.names.parse_grid` reads back to an equal grid."""

    @classmethod
    @abstractmethod
    def parse(cls, text: str) -> Grid[P] | None:
        """Read a name of this kind of grid; None if it is of another kind.

        Raises:
            ValueError: it is of this kind, and a number in it is out of range.
        """

    @abstractmethod
    def with_bits(self, bits: int) -> Grid[P]:
        """The same kind of grid with other bits.

        Raises:
            ValueError: there is none.
        """

    @abstractmethod
    def check(self, width: int) -> None:
        """Raise ValueError, with words for a user, if a layer of so many inputs cannot have it."""

    @abstractmethod
    def fit(self, w: Tensor, importance: Tensor | None = None) -> P:
        """Choose params for a weight.

        Args:
            w: (out, in) float.
            importance: (in,) or (out, in) positive weight of each squared error; None for the same
                everywhere. A grid whose params follow from the ends of a range ignores it.
        """

    @abstractmethod
    def encode(self, w: Tensor, params: P) -> Tensor:
        """Round to the nearest codes, (out, in) float -> (out, in) uint8."""

    @abstractmethod
    def decode(self, codes: Tensor, params: P) -> Tensor:
        """Decode (out, in) codes to (out, in) weights; differentiable by the params."""

    @abstractmethod
    def stored(self, params: P, dtype: torch.dtype) -> P:
        """Round params as an artifact of a model in ``dtype`` holds them; gradients pass unchanged.

        What is beyond that dtype becomes infinite, see `check_finite`.
        """

    def check_finite(self, params: P) -> None:
        """Raise NotFiniteError if stored params are not finite. Waits for the device."""
        if not params.finite():
            raise NotFiniteError(f"a number of {self} is beyond what is stored")

    @abstractmethod
    def take(self, params: P, column: int) -> Levels:
        """The levels of one input alone."""

    @property
    def rows_apart(self) -> bool:
        """Whether params belong to single outputs, so that weights may be put above each other."""
        return False

    def period(self, width: int) -> int | None:
        """Neighbouring inputs whose params can be fitted without any others'; None if there are
        none, so that params are fitted for the whole weight.
        """
        return None

    def join(self, parts: list[P]) -> P:
        """Put the params of neighbouring periods side by side; the inverse of cutting there."""
        raise NotImplementedError(f"{self} has no periods")

    @property
    def scales_with_inputs(self) -> bool:
        """Whether scaling an input channel scales its levels and nothing else: no code changes."""
        return False

    def __str__(self) -> str:
        return self.name


AnyGrid = Grid[Any]


@dataclass(frozen=True)
class Fixed:
    """`Levels` of a grid whose params are given."""

    grid: AnyGrid
    params: Params

    def encode(self, w: Tensor) -> Tensor:
        return self.grid.encode(w, self.params)

    def decode(self, codes: Tensor) -> Tensor:
        return self.grid.decode(codes, self.params)


class Neighbours(NamedTuple):
    """The codes around weights.

    Attributes:
        low, high: (out, in) uint8, the codes below and above; equal at an end of the range.
        fraction: (out, in) float32 in [0, 1), how far from ``low`` to ``high`` the weight lies.
    """

    low: Tensor
    high: Tensor
    fraction: Tensor


class OrderedGrid(Grid[P]):
    """A grid whose neighbouring codes stand for neighbouring numbers."""

    @property
    @abstractmethod
    def of_lists(self) -> OrderedGrid[P]:
        """The grid of a weight whose rows are this one's `lists`."""

    @abstractmethod
    def lists(self, w: Tensor) -> Tensor:
        """View (out, in) as (lists, n): what shares params in one row, each with its own."""

    @abstractmethod
    def unlisted(self, lists: Tensor, rows: int) -> Tensor:
        """The inverse of `lists` for a weight of so many rows."""

    def cut(self, params: P, lists: int) -> P:
        """View params as those of the lists of a weight."""
        return params.map(lambda t: t.reshape(lists, -1))

    def uncut(self, params: P, rows: int) -> P:
        """The inverse of `cut` for a weight of so many rows."""
        return params.map(lambda t: t.reshape(rows, -1))

    @abstractmethod
    def neighbours(self, w: Tensor, params: P) -> Neighbours:
        """Find the codes between which (out, in) float weights lie."""

    @abstractmethod
    def beside(self, codes: Tensor, toward: Tensor, params: P) -> Tensor:
        """The next codes in a direction.

        Args:
            codes: (out, in) uint8. toward: (out, in), the sign of the wanted change of the weight;
                0 for none.

        Returns:
            (out, in) uint8; the code itself where there is none further.
        """

    @abstractmethod
    def freedom(self, params: P) -> torch.Size:
        """The shape of the factors by which `moved` moves levels."""

    @abstractmethod
    def moved(self, params: P, factor: Tensor) -> P:
        """Move levels; differentiable by the factor.

        Args:
            factor: of the shape of `freedom`, in [0, 2]; 1 leaves the levels where they are.
        """

    def arranged(self, codes: Tensor, params: P) -> tuple[Tensor, P]:
        """Bring levels that were moved past each other back into order, and the codes with them."""
        return codes, params


class Linear(NamedTuple):
    """Levels of a weight whose groups are seen as rows: weight = (code - zero) * scale - offset.

    Attributes:
        zero, scale: (rows, 1) float. offset: the same, or None for zeros.
    """

    zero: Tensor
    scale: Tensor
    offset: Tensor | None


class LinearGrid(OrderedGrid[P]):
    """A grid whose levels are equidistant within a group, so that compiled loops can take it.

    Codes differ by 1 from their neighbours.
    """

    @property
    def shifted(self) -> bool:
        """Whether the linear form has an offset."""
        return False

    @abstractmethod
    def linear(self, params: P) -> Linear:
        """The linear form of params of an (out, in) weight: rows are its groups, in order;
        differentiable.
        """


class GroupedGrid(Grid[P]):
    """A grid in which neighbouring inputs of one output share a scale."""

    @abstractmethod
    def group(self, in_features: int) -> int:
        """The number of inputs that share a scale in a layer this wide.

        Raises:
            ValueError: the groups do not divide the width.
        """

    def grouped(self, w: Tensor) -> Tensor:
        """View (out, in) as (out, groups, group)."""
        return w.reshape(w.shape[0], -1, self.group(w.shape[1]))


class RangedGrid(GroupedGrid[P]):
    """A grid whose params follow from the two ends of each group's range."""

    @abstractmethod
    def ends(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Least (<= 0) and greatest (>= 0) number of each group, (out, groups) each."""

    @abstractmethod
    def from_range(self, low: Tensor, high: Tensor) -> P:
        """Params for given ends, (out, groups) each; differentiable, rounding straight-through."""

    @abstractmethod
    def rounded(self, w: Tensor, params: P) -> Tensor:
        """The nearest weights; differentiable by both, rounding straight-through."""


class ColumnGrid(OrderedGrid[P]):
    """A grid on which each column may have levels of its own, and bits of its own.

    That is so where `scales_with_inputs` holds.
    """

    @abstractmethod
    def with_bits(self, bits: int) -> ColumnGrid[P]:
        """The same grid with other bits."""

    @abstractmethod
    def refined(self, params: P, column: int, w: Tensor, steps: int) -> P:
        """Params of one column, its levels moved by Lloyd steps.

        Args:
            params: of all columns, this one's with this grid's bits.
            w: (n, 1), the weights that they are moved toward.
        """

    @abstractmethod
    def fit_columns(self, w: Tensor, widths: Tensor, importance: Tensor | None = None) -> P:
        """As `fit`, with the bits of each column.

        Args:
            widths: (in,) int64.
        """
