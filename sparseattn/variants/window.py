"""Sliding windows, with sinks and global columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sparseattn.errors import ArgumentError
from sparseattn.variants.base import Piece, Problem, Variant, register

if TYPE_CHECKING:
    from sparseattn.variants.base import Array, Params


@register
@dataclass(frozen=True, slots=True)
class Window(Variant):
    """Keys near the query, the first few keys (sinks), and columns that all queries see.

    Parameters
    ----------
    size : int
        Keys a query sees, itself among them, counted back: ``Window(64)`` is
        ``window_size=(63, 0)`` and needs causality.
    window_size : (int, int)
        Keys to the left and to the right of the query's own position; -1 means no bound.
    sinks : int
        The first ``sinks`` keys are seen by every query.
    globals : tuple of int
        Positions of keys that every query sees.

    Raises
    ------
    ArgumentError
        If both or neither of ``size`` and ``window_size`` are given, a value is out of range, or
        a bare size meets ``causal=False``.

    References
    ----------
    Beltagy, Peters, Cohan, "Longformer", 2020, arXiv:2004.05150 (window, global columns);
    Xiao et al., "Efficient streaming language models with attention sinks", 2023, arXiv:2309.17453.

    >>> import sparseattn as sa
    >>> str(sa.Window(window_size=(63, 0), sinks=4))
    'window:window_size=63/0:sinks=4'
    """

    kind: ClassVar[str] = "window"
    aliases: ClassVar[tuple[str, ...]] = ("sliding_window", "local")
    examples: ClassVar[tuple[str, ...]] = (
        "window:64",
        "window:1",
        "window:16:sinks=4",
        "window:window_size=16/8",
        "window:window_size=0/-1",
        "window:16:sinks=2:globals=5/40/41",
    )

    size: int | None = None
    window_size: tuple[int, int] | None = None
    sinks: int = 0
    globals: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        Variant.__post_init__(self)
        object.__setattr__(self, "globals", tuple(sorted(set(self.globals))))
        if (self.size is None) == (self.window_size is None):
            raise ArgumentError(
                "Window takes one of size, as in Window(64), and window_size, as in "
                f"Window(window_size=(63, 0)); got size={self.size}, window_size={self.window_size}"
            )
        if self.size is not None and self.size < 1:
            raise ArgumentError(f"Window.size counts the query itself: at least 1, got {self.size}")
        if min(self.left, self.right) < -1:
            raise ArgumentError(
                "Window.window_size must be at least 0 on either side, or -1 for no bound, "
                f"got {self.window_size}"
            )

    @property
    def left(self) -> int:
        """Keys before the query's position; -1: no bound."""
        return self.size - 1 if self.size is not None else (self.window_size or (0, 0))[0]

    @property
    def right(self) -> int:
        """Keys after the query's position; -1: no bound."""
        return 0 if self.size is not None else (self.window_size or (0, 0))[1]

    def keep(self) -> tuple[int, int] | None:
        if self.left < 0:
            return None
        return max(self.sinks, max(self.globals, default=-1) + 1), self.left

    def build(
        self, q: Array, k: Array, problem: Problem, params: Params | None
    ) -> tuple[Piece, ...]:
        if self.size is not None and problem.causal == 0:
            half = self.size // 2
            raise ArgumentError(
                f"Window({self.size}) counts back from the query, so it needs causal=True; "
                f"for keys on both sides write Window(window_size=({half}, {half})), "
                f"got causal=False"
            )
        return Variant.build(self, q, k, problem, params)
