"""Rotary positions as config.json asks for them, in the spelling of any generation of files."""

from __future__ import annotations

from typing import get_args

from sparseattn.models.checkpoint import show
from sparseattn.models.fields import MAX_CONTEXT, Fields
from sparseattn.positions import Rope, RopeKind

MIN_THETA, MAX_THETA = 1e-6, 1e12
MAX_FACTOR = 1e6  # of everything that scales positions

KINDS: dict[str, RopeKind] = {kind: kind for kind in get_args(RopeKind)}


def read_rope(
    fields: Fields,
    head_dim: int,
    context: int,
    *,
    theta: str = "rope_theta",
    share: str = "partial_rotary_factor",
    default_share: float = 1.0,
    partial: bool = False,
) -> tuple[Rope | None, int]:
    """The rotation and the longest text it serves.

    `theta` and `share` are the family's own entries, which its rope section may repeat; `partial`
    says whether it can turn a part of each head. `context` is max_position_embeddings.
    """
    section = fields.section("rope_scaling")  # where both are given, transformers reads this one
    if not section.values:
        section = fields.section("rope_parameters")
    for name, value in section.values.items():
        if isinstance(value, dict):
            raise section.fail(
                show(name), f"is {show(value)}: give one set of positions for all layers"
            )
    base = fields.number(theta, 10000.0, MIN_THETA, MAX_THETA)
    base = section.number("rope_theta", base, MIN_THETA, MAX_THETA)
    least = 0 if partial else 1
    turned = fields.number(share, default_share, least, 1, closed=True)
    turned = section.number("partial_rotary_factor", turned, least, 1, closed=True)
    dim = int(head_dim * turned)
    if dim == 0:
        return None, context
    if dim % 2 and dim == head_dim:
        raise fields.fail("head_dim", f"is {head_dim}: give an even number, as RoPE turns pairs")
    rope = read_kind(fields, section, base, dim, context)
    return rope, longest(rope, context)


def read_kind(fields: Fields, section: Fields, theta: float, dim: int, context: int) -> Rope:
    """The section's numbers, of the kind that it names."""
    name = "type" if section.values.get("rope_type") is None else "rope_type"
    kind = section.word(name, "default", KINDS)
    if kind == "default":
        return Rope(theta, dim)
    if kind == "linear":
        return Rope(theta, dim, kind, factor=read_factor(section))
    if kind == "dynamic":
        if dim < 4:
            raise section.fail(
                name, f"is 'dynamic': it needs heads of 4 turned channels, not {dim}"
            )
        return Rope(theta, dim, kind, factor=read_factor(section), original=context)
    original = section.integer("original_max_position_embeddings", context, 1, MAX_CONTEXT)
    original = fields.integer("original_max_position_embeddings", original, 1, MAX_CONTEXT)
    if kind == "llama3":
        return read_llama3(section, theta, dim, original)
    return read_yarn(section, theta, dim, original, context)


def read_factor(section: Fields, default: float | None = None) -> float:
    return section.number("factor", default, 1, MAX_FACTOR, closed=True)


def read_llama3(section: Fields, theta: float, dim: int, original: int) -> Rope:
    factor = read_factor(section)
    low, high = (section.number(f"{x}_freq_factor", None, 0, MAX_FACTOR) for x in ("low", "high"))
    if high <= low:
        raise section.fail(
            "high_freq_factor", f"is {high:g}: give more than low_freq_factor, which is {low:g}"
        )
    return Rope(
        *(theta, dim, "llama3", factor, original), low_freq_factor=low, high_freq_factor=high
    )


def read_yarn(section: Fields, theta: float, dim: int, original: int, context: int) -> Rope:
    factor = read_factor(section, context / original)  # absent: what the two lengths say
    fast = section.number("beta_fast", 32.0, 0, MAX_FACTOR)
    slow = section.number("beta_slow", 1.0, 0, MAX_FACTOR)
    if fast < slow:
        raise section.fail("beta_fast", f"is {fast:g}: give at least beta_slow, which is {slow:g}")
    if theta <= 1:
        raise section.fail("rope_theta", f"is {theta:g}: give more than 1, as yarn needs")
    scale = section.values.get("attention_factor")
    if scale is not None:
        scale = section.number("attention_factor", None, 0, MAX_FACTOR)
    return Rope(
        *(theta, dim, "yarn", factor, original),
        beta_fast=fast,
        beta_slow=slow,
        attention_factor=scale,
        mscale=section.number("mscale", 0.0, 0, MAX_FACTOR, closed=True),
        mscale_all_dim=section.number("mscale_all_dim", 0.0, 0, MAX_FACTOR, closed=True),
        truncate=section.flag("truncate", True),
    )


def longest(rope: Rope, context: int) -> int:
    """Positions that a scaling is for: max_position_embeddings may be those before or after it."""
    before = {"linear": context, "dynamic": context, "yarn": rope.original}.get(rope.kind, 0)
    return min(max(context, int(before * rope.factor)), MAX_CONTEXT)
