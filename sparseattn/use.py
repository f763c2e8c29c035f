"""``use``: a model whose attention is another one for the time of a block."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from sparseattn.errors import DtypeError
from sparseattn.variants import Variant, parse

__all__ = ["use"]


@contextlib.contextmanager
def use(model: Any, spec: Variant | str) -> Iterator[Any]:
    """Let a model attend by `spec` inside a ``with`` block; before and after, by what it did.

    Parameters
    ----------
    model : Model, or a model of transformers
        Of ours, calls that name an attention keep to it. Of transformers, every model whose
        attention goes through ``AttentionInterface`` (GPT-2 and LLaMA are tested): its own masks,
        padding, caches and ``generate`` work on, training included.
    spec : spec or str
        ``sa.PerLayer`` says it layer by layer.

    Yields
    ------
    The model.

    Raises
    ------
    ArgumentError
        If the spec is unknown.
    DtypeError
        If `model` is neither.
    NotSupported
        If a part of the model does not let its attention be replaced.

    Notes
    -----
    The model itself is changed, so other threads see it; blocks nest, and exceptions restore too.

    Examples
    --------
    >>> import sparseattn as sa
    >>> model = sa.Model.from_pretrained()
    >>> with sa.use(model, "window:64"):
    ...     text = model.generate("The list of", max_new_tokens=8)
    """
    wanted = parse(spec)
    with opened(model, wanted):
        yield model


def opened(model: Any, spec: Variant) -> contextlib.AbstractContextManager[None]:
    """The block for this kind of model; a model that exists has imported its own package."""
    ours = sys.modules.get("sparseattn.models.model")
    if ours is not None and isinstance(model, ours.Model):
        return replaced(model, spec)
    theirs = sys.modules.get("transformers")
    if theirs is not None and isinstance(model, theirs.PreTrainedModel):
        from sparseattn.integrations import transformers

        return transformers.use(model, spec)
    raise DtypeError(
        f"model is a {type(model).__name__}: give a sparseattn.Model or a transformers model"
    )


@contextlib.contextmanager
def replaced(model: Any, spec: Variant) -> Iterator[None]:
    before = model.attention
    model.attention = spec
    try:
        yield
    finally:
        model.attention = before
