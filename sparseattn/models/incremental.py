"""A model run token by token: what it has read is kept, layer by layer, in caches.

Prompts of different lengths run in one batch. Where every layer's spec looks back from the newest
token only, the shorter ones are padded in front and share their caches. Where a spec names keys by
their place (sinks, global columns), padding would stand in those places, so only prompts of one
length share a cache; where it draws keys by their place in a batch, none do. Rows of all groups go
through the rest of the model together, without padding from the first token on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sparseattn.attention import attention
from sparseattn.cache import Cache
from sparseattn.models.common import F32
from sparseattn.models.network import Scratch, by_head
from sparseattn.models.windows import band, cached, stays_inside
from sparseattn.variants import Dense, RandomKeys, TopK, Variant, Window

if TYPE_CHECKING:
    from sparseattn.models.model import Model


class Group:
    """Prompts that share their caches.

    Attributes
    ----------
    prompts : list of int
        Which of the batch they are; ascending.
    """

    def __init__(self, prompts: list[int], specs: Sequence[Variant]) -> None:
        self.prompts = prompts
        self.caches = [Cache(spec) for spec in specs]

    def keep(self, prompts: set[int]) -> None:
        """Let go of all but these."""
        index = [at for at, prompt in enumerate(self.prompts) if prompt in prompts]
        if index and len(index) < len(self.prompts):
            for cache in self.caches:
                cache.batch_select_indices(index)
        self.prompts = [self.prompts[at] for at in index]


class Incremental:
    """Several prompts, read together, then continued by a token each and step.

    Parameters
    ----------
    model : Model
    specs : sequence of Variant
        One a layer.
    prompts : sequence of arrays of int
        Checked ids, each at least one.

    Attributes
    ----------
    prompts : list of int
        Those that go on, in the order of the rows of logits.
    """

    def __init__(
        self, model: Model, specs: Sequence[Variant], prompts: Sequence[NDArray[np.int64]]
    ) -> None:
        self.model, self.network = model, model._network
        self.waiting: Sequence[NDArray[np.int64]] | None = prompts
        self.lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        specs = [cached(spec, model.config.window(i)) for i, spec in enumerate(specs)]
        self.groups = [Group(members, specs) for members in grouped(self.lengths, specs)]
        self.scratch = Scratch()

    @property
    def prompts(self) -> list[int]:
        return [prompt for group in self.groups for prompt in group.prompts]

    def read(self) -> F32:
        """Read the prompts; logits (prompts, vocabulary) of their last tokens."""
        assert self.waiting is not None
        prompts, self.waiting = self.waiting, None
        ids, pos, long, sizes, masks = [], [], [], [], []
        for group in self.groups:
            lengths = self.lengths[group.prompts]
            longest = int(lengths.max())
            place = np.arange(longest, dtype=np.int32) - (longest - lengths)[:, None]
            masks.append(None if (lengths == longest).all() else place >= 0)
            padded = np.zeros(place.shape, np.int64)
            for row, prompt in zip(padded, group.prompts, strict=True):
                row[longest - len(prompts[prompt]) :] = prompts[prompt]
            ids.append(padded.reshape(-1))
            pos.append(np.maximum(place, 0).reshape(-1))  # padding stands anywhere
            long.append(np.repeat(lengths, longest))
            sizes.append(place.shape)
        joined = np.concatenate(ids), np.concatenate(pos), np.concatenate(long)
        rows = self._forward(*joined, sizes, masks)
        ends = [0, *np.cumsum([batch * length for batch, length in sizes])]
        last = [
            rows[begin:end].reshape(*size, -1)[:, -1]
            for (begin, end), size in zip(pairwise(ends), sizes, strict=True)
        ]
        return self.model.head(np.concatenate(last))

    def step(self, tokens: Sequence[int]) -> F32:
        """Append a token to each prompt; logits (prompts, vocabulary) of what follows."""
        prompts = self.prompts
        pos = self.lengths[prompts]
        self.lengths[prompts] += 1
        sizes = [(len(group.prompts), 1) for group in self.groups]
        ids, masks = np.array(tokens, np.int64), [None] * len(sizes)
        rows = self._forward(ids, pos, pos + np.int32(1), sizes, masks)
        return self.model.head(rows)

    def keep(self, prompts: set[int]) -> None:
        """Let go of all prompts but these."""
        for group in self.groups:
            group.keep(prompts)
        self.groups = [group for group in self.groups if group.prompts]

    def _forward(
        self,
        ids: NDArray[np.int64],
        pos: NDArray[np.int32],
        lengths: NDArray[np.int32],
        sizes: Sequence[tuple[int, ...]],
        masks: Sequence[NDArray[np.bool_] | None],
    ) -> F32:
        """States of all rows, of texts of `lengths` so far; those of a group are (batch, length) of
        `sizes`, group by group."""
        config = self.model.config

        def attend(layer: int, *arrays: F32) -> None:
            begin, window = 0, config.window(layer)
            for group, (batch, length), mask in zip(self.groups, sizes, masks, strict=True):
                rows = slice(begin, begin + batch * length)
                q, k, v, out = (by_head(a[rows], batch) for a in arrays)
                cache, shown = group.caches[layer], None
                if not stays_inside(cache.spec, window):
                    shown = band(window, length, cache.get_seq_length() + length)
                attention(
                    *(q, k, v),
                    causal=True,
                    scale=config.scales[layer],
                    mask=shown,
                    key_mask=mask,
                    cache=cache,
                    out=out,
                )
                begin = rows.stop

        return self.network.forward(ids, pos, attend, self.scratch, lengths=lengths)


def grouped(lengths: NDArray[np.int32], specs: Sequence[Variant]) -> list[list[int]]:
    """Which prompts may share caches."""
    prompts = list(range(len(lengths)))
    parts = {leaf for spec in specs for leaf in leaves(spec)}
    if all(map(looks_back, parts)):
        return [prompts]
    if any(isinstance(part, RandomKeys) for part in parts):
        return [[p] for p in prompts]
    return [[p for p in prompts if lengths[p] == n] for n in dict.fromkeys(lengths.tolist())]


def leaves(spec: Variant) -> Iterator[Variant]:
    """The specs that a spec is made of."""
    children = getattr(spec, "children", ())
    for child in children:
        yield from leaves(child)
    if not children:
        yield spec


def looks_back(spec: Variant) -> bool:
    """Whether what a row keeps depends on the keys before it alone, not on how many there are."""
    if isinstance(spec, Window):
        return not spec.sinks and not spec.globals
    return isinstance(spec, Dense | TopK)
