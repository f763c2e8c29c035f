"""PyTorch tensors in and out, and parity with its scaled_dot_product_attention."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from conftest import make_qkv

import sparseattn as sa

CEILING = {np.float32: 1e-5, np.float64: 1e-12}


def tensors(torch: ModuleType, shape: tuple[int, ...], dtype: Any = np.float32) -> list[Any]:
    return [torch.from_numpy(x) for x in make_qkv(shape, dtype)]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("shapes", "terms"),
    [
        ([(2, 4, 33, 16), (2, 4, 47, 16), (2, 4, 47, 24)], {}),
        ([(2, 4, 33, 16), (2, 4, 47, 16), (2, 4, 47, 24)], {"is_causal": True}),
        ([(2, 4, 47, 16), (2, 4, 33, 16), (2, 4, 33, 16)], {"is_causal": True}),
        ([(2, 4, 33, 16), (2, 4, 47, 16), (2, 4, 47, 24)], {"scale": 0.7}),
        ([(2, 6, 33, 16), (2, 2, 47, 16), (2, 2, 47, 24)], {"enable_gqa": True}),
        ([(2, 6, 33, 16), (2, 1, 47, 16), (2, 1, 47, 24)], {}),
        ([(2, 6, 33, 16), (2, 2, 47, 16), (2, 3, 47, 24)], {"enable_gqa": True}),
        ([(5, 3, 2, 9, 16), (5, 3, 2, 11, 16), (5, 3, 2, 11, 8)], {}),
        ([(5, 9, 16), (5, 11, 16), (5, 11, 8)], {"is_causal": True}),
        ([(9, 16), (11, 16), (11, 8)], {}),
        ([(2, 4, 33, 16), (1, 4, 47, 16), (1, 4, 47, 24)], {}),
    ],
)
def test_parity_with_sdpa(
    torch: ModuleType, shapes: list[tuple[int, ...]], terms: dict[str, Any], dtype: Any
) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (torch.from_numpy(rng.standard_normal(s).astype(dtype)) for s in shapes)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, **terms)
    got = sa.scaled_dot_product_attention(q, k, v, **terms)
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    assert (got - want).abs().max() <= CEILING[dtype]


@pytest.mark.parametrize("kind", ["bool", "float", "empty row", "broadcast"])
def test_parity_with_sdpa_under_masks(torch: ModuleType, kind: str) -> None:
    q, k, v = tensors(torch, (2, 4, 4, 33, 47, 16, 24))
    mask: Any = torch.from_numpy(np.random.default_rng(1).random((2, 4, 33, 47)) < 0.5)
    if kind == "float":
        mask = torch.randn(33, 47, generator=torch.Generator().manual_seed(0))
    elif kind == "empty row":
        mask[1, 2, 7] = False
    elif kind == "broadcast":
        mask = mask[:, :1, :1]
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)
    got = sa.scaled_dot_product_attention(q, k, v, mask)
    assert (got - want).abs().max() <= 1e-5
    if kind == "empty row":
        assert not got[1, 2, 7].any()


def test_what_sdpa_refuses_is_refused(torch: ModuleType) -> None:
    q, k, v = tensors(torch, (2, 6, 2, 5, 9, 16, 8))
    theirs = torch.nn.functional.scaled_dot_product_attention
    mask = torch.ones(5, 9, dtype=torch.bool)
    for args, terms in (
        ((q, k, v), {}),
        ((q, k[:, :1], v[:, :1], mask), {"is_causal": True}),
        ((q, k.double(), v), {"enable_gqa": True}),
        ((q[0, 0, 0], k[0, 0, 0], v[0, 0, 0]), {}),
        ((q, k, v, mask.int()), {"enable_gqa": True}),
    ):
        with pytest.raises((RuntimeError, ValueError)):
            theirs(*args, **terms)
        with pytest.raises(sa.SparseAttnError):
            sa.scaled_dot_product_attention(*args, **terms)


def test_tensors_in_tensors_out_without_copies(torch: ModuleType) -> None:
    q, k, v = tensors(torch, (2, 4, 2, 9, 11, 16, 8))
    before = [x.clone() for x in (q, k, v)]
    out, lse, weights = sa.attention(
        q, k, v, "topk:5", causal=True, return_lse=True, return_weights=True
    )
    assert all(isinstance(x, torch.Tensor) for x in (out, lse, weights))
    arrays = [x.numpy() for x in (q, k, v)]
    want = sa.attention(*arrays, "topk:5", causal=True)
    assert isinstance(want, np.ndarray) and out.numpy().tobytes() == want.tobytes()
    target = torch.empty_like(out)
    assert sa.attention(q, k, v, "topk:5", causal=True, out=target) is target
    assert torch.equal(target, out)
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), before, strict=True))
    mask = torch.ones(9, 11, dtype=torch.bool).tril()
    assert torch.equal(sa.attention(q, k, v, mask=mask), sa.attention(q, k, v, mask=mask.numpy()))
    key_mask = torch.ones(2, 11, dtype=torch.bool)
    key_mask[1, :4] = False
    padded = sa.attention(q, k, v, key_mask=key_mask)
    assert torch.equal(padded[1], sa.attention(q[1], k[1, :, 4:], v[1, :, 4:]))
    plan = sa.plan(q, k, "topk:5", causal=True)
    assert torch.equal(sa.attention(q, k, v, plan), out)
    joined = sa.merge([(out, lse)])
    assert isinstance(joined.out, torch.Tensor) and torch.allclose(joined.out, out)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_half_precision_tensors(torch: ModuleType, name: str) -> None:
    dtype = getattr(torch, name)
    q, k, v = (x.to(dtype) for x in tensors(torch, (2, 4, 2, 9, 11, 16, 8)))
    out = sa.attention(q, k, v)
    want = sa.attention(q.float(), k.float(), v.float())
    assert out.dtype == dtype and torch.equal(out, want.to(dtype))
    target = torch.empty_like(out)
    assert sa.attention(q, k, v, out=target) is target
    assert torch.equal(target, out)
    assert torch.equal(sa.attention(q, k, v, bias=torch.zeros(1, 1, dtype=dtype)), out)


def test_other_devices_and_layouts_are_refused(torch: ModuleType) -> None:
    q, k, v = tensors(torch, (2, 4, 2, 9, 11, 16, 8))
    with pytest.raises(sa.ArgumentError, match=r"k is on device meta.*CPU"):
        sa.attention(q, k.to("meta"), v)
    with pytest.raises(sa.ArgumentError, match=r"to_dense"):
        sa.attention(q.to_sparse(), k, v)
    with pytest.raises(sa.DtypeError, match=r"q has dtype int64"):
        sa.attention(q.long(), k, v)
    with pytest.raises(sa.DtypeError, match=r"q has dtype complex64"):
        sa.attention(q + 0j, k, v)


def test_strided_tensors(torch: ModuleType) -> None:
    packed = torch.randn(2, 9, 3, 4, 16, generator=torch.Generator().manual_seed(1))
    q, k, v = packed.unbind(2)  # (batch, length, heads, dim) as projections give it
    views = [x.transpose(1, 2) for x in (q, k, v)]
    want = sa.attention(*(x.contiguous() for x in views), causal=True)
    assert torch.equal(sa.attention(*views, causal=True), want)
    spread = [x.unsqueeze(-1).expand(*x.shape, 2)[..., 0] for x in views]
    assert torch.equal(sa.attention(*spread, causal=True), want)
