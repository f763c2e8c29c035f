"""Positions of tokens: what turns queries and keys, and how fast."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array: TypeAlias = NDArray[Any]

RopeKind = Literal["default", "linear", "dynamic", "yarn", "llama3"]


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions: channels t and t + dim/2 of a head turn together by position times w_t.

    ============ ======================================================================
    kind         angular frequency w_t, in radians a token, of the plain w_t = theta^(-2t / dim)
    ============ ======================================================================
    ``default``  w_t
    ``linear``   w_t / factor: positions are squeezed into the original range
    ``dynamic``  theta grows with the current length beyond ``original``, so that the slowest
                 channel is squeezed to fit and the fastest one stays
    ``yarn``     w_t for channels with more than ``beta_fast`` turns in ``original`` positions,
                 w_t / factor for those with fewer than ``beta_slow``, a ramp over channels between;
                 queries and keys grow by ``attention``
    ``llama3``   the same with ``high_freq_factor`` and ``low_freq_factor`` turns, and a ramp over
                 turns
    ============ ======================================================================

    Parameters
    ----------
    theta : float
        Base of the frequencies.
    dim : int
        Channels that turn, the first ones of a head; an odd number is rounded up to whole pairs.
    kind : str
        See above.
    factor : float
        How many times longer than ``original`` texts may become; 1 or more.
    original : int
        Positions that the model was trained on before.
    beta_fast, beta_slow, attention_factor, mscale, mscale_all_dim, truncate
        Of ``yarn``: turns that bound the ramp, what multiplies queries and keys, or (None) the two
        numbers that it follows from (0 is not given), and whether the ramp begins and ends at whole
        channels.
    low_freq_factor, high_freq_factor
        Of ``llama3``.

    Notes
    -----
    Names, defaults and results are those of transformers' ``rope_parameters``. With ``dynamic``
    frequencies depend on the length, and keys in a cache keep what they were turned by: continuing
    a text token by token is not, beyond ``original``, what reading it at once is.

    References
    ----------
    Su et al., "RoFormer", 2021, arXiv:2104.09864, section 3.2.2 (default); Chen et al., "Extending
    context window of large language models via positional interpolation", 2023, arXiv:2306.15595,
    equation 4 (linear); bloc97, "NTK-aware scaled RoPE", and emozilla, "Dynamically scaled RoPE",
    r/LocalLLaMA, 2023 (dynamic); Peng et al., "YaRN", 2023, arXiv:2309.00071, equations 17 to 22
    (yarn); Dubey et al., "The Llama 3 herd of models", 2024, arXiv:2407.21783, and the reference
    code of Llama 3.1 (llama3).

    >>> from sparseattn.positions import Rope
    >>> Rope(theta=10000.0, dim=4, kind="linear", factor=2.0).frequencies().tolist()
    [0.5, 0.005]
    """

    theta: float
    dim: int
    kind: RopeKind = "default"
    factor: float = 1.0
    original: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def follows_length(self, length: int) -> bool:
        """Whether texts of this length are turned by frequencies of their own."""
        return self.kind == "dynamic" and length > self.original

    def frequencies(self, length: int = 0) -> Array:
        """w_t (pairs,) in float64, for a text of `length` tokens so far."""
        theta = self.theta
        if self.follows_length(length):
            stretch = self.factor * length / self.original - (self.factor - 1)
            theta *= stretch ** (self.dim / (self.dim - 2))
        plain: Array = theta ** (-np.arange(0, self.dim, 2, dtype=np.float64) / self.dim)
        squeezed: Array = plain / self.factor
        if self.kind == "linear":
            return squeezed
        if self.kind in ("yarn", "llama3"):
            kept = self._yarn_kept() if self.kind == "yarn" else self._llama3_kept(plain)
            plain = plain * kept + squeezed * (1 - kept)
        return plain

    @property
    def attention(self) -> float:
        """What turned queries and keys are multiplied by, each."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._grown(self.mscale) / self._grown(self.mscale_all_dim)
        return self._grown(1.0)

    def tables(self, pos: Array, length: int = 0) -> tuple[Array, Array]:
        """cos and sin (positions, pairs) in float32, of angles in float64, times `attention`."""
        angle = np.outer(pos, self.frequencies(length))
        by = self.attention
        return (by * np.cos(angle)).astype(np.float32), (by * np.sin(angle)).astype(np.float32)

    def _grown(self, mscale: float) -> float:
        """YaRN's equation 22, where mscale is 1."""
        return 0.1 * mscale * math.log(self.factor) + 1.0

    def _yarn_kept(self) -> Array:
        """Share of the plain frequency that each pair keeps: 1 - the ramp of equation 18."""

        def channel(turns: float) -> float:
            """The pair that makes so many turns in the original positions."""
            by_turn = math.log(self.original / (turns * 2 * math.pi))
            return self.dim * by_turn / (2 * math.log(self.theta))

        low, high = channel(self.beta_fast), channel(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(float(low), 0.0), min(float(high), self.dim - 1.0)
        if low == high:
            high += 0.001
        ramp: Array = (np.arange((self.dim + 1) // 2) - low) / (high - low)
        return 1 - np.clip(ramp, 0, 1)

    def _llama3_kept(self, plain: Array) -> Array:
        """Share of the plain frequency that each pair keeps, by its turns in `original`."""
        turns = self.original * plain / (2 * math.pi)
        low, high = self.low_freq_factor, self.high_freq_factor
        kept: Array = np.clip((turns - low) / (high - low), 0, 1)
        return kept
