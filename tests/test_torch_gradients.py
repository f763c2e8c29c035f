"""Gradients through PyTorch's graph: against its own attention, and where its rules need care."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from conftest import make_qkv
from reference import gradients as ref_grad

import sparseattn as sa


def leaves(torch: ModuleType, shape: tuple[int, ...], dtype: Any = np.float64) -> list[Any]:
    return [torch.from_numpy(x.copy()).requires_grad_() for x in make_qkv(shape, dtype)]


def random(torch: ModuleType, *shape: int, dtype: Any = None, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype or torch.float64)


def bias_of(torch: ModuleType, *shape: int) -> Any:
    return random(torch, *shape, seed=4).requires_grad_()


CASES: dict[str, Any] = {
    "full": ([(2, 4, 33, 16), (2, 4, 47, 16), (2, 4, 47, 24)], {}),
    "causal": ([(2, 4, 33, 16), (2, 4, 47, 16), (2, 4, 47, 24)], {"is_causal": True}),
    "scale": ([(2, 4, 33, 16), (2, 4, 47, 16), (2, 4, 47, 24)], {"scale": 0.7}),
    "gqa": ([(2, 6, 33, 16), (2, 2, 47, 16), (2, 2, 47, 24)], {"enable_gqa": True}),
    "gqa apart": ([(2, 6, 33, 16), (2, 2, 47, 16), (2, 3, 47, 24)], {"enable_gqa": True}),
    "one kv head": ([(2, 6, 33, 16), (2, 1, 47, 16), (2, 1, 47, 24)], {}),
    "one q head": ([(2, 1, 33, 16), (2, 3, 47, 16), (2, 3, 47, 24)], {}),
    "one batch": ([(2, 4, 33, 16), (1, 4, 47, 16), (1, 4, 47, 24)], {}),
    "missing axes": ([(2, 4, 33, 16), (4, 47, 16), (47, 24)], {}),
    "five axes": ([(5, 3, 2, 9, 16), (5, 3, 2, 11, 16), (5, 3, 2, 11, 8)], {"is_causal": True}),
    "flat": ([(9, 16), (11, 16), (11, 8)], {"is_causal": True}),
    "bias": ([(2, 4, 33, 16), (2, 4, 47, 16), (2, 4, 47, 24)], {"attn_mask": (33, 47)}),
    "bias of heads": ([(2, 4, 33, 16), (2, 4, 47, 16), (2, 4, 47, 24)], {"attn_mask": (4, 1, 47)}),
    "bias of batches": (
        [(2, 4, 33, 16), (2, 4, 47, 16), (2, 4, 47, 24)],
        {"attn_mask": (2, 1, 33, 1)},
    ),
}


@pytest.mark.parametrize("name", ["float64", "float32"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_sdpa(torch: ModuleType, case: str, name: str) -> None:
    shapes, terms = CASES[case]
    dtype = getattr(torch, name)
    inputs = [random(torch, *s, dtype=dtype, seed=i) for i, s in enumerate(shapes)]
    if isinstance(terms.get("attn_mask"), tuple):
        inputs.append(random(torch, *terms["attn_mask"], dtype=dtype, seed=9))
        inputs[-1][..., -1:, :3] = -torch.inf
        terms = {}
    inputs = [x.requires_grad_() for x in inputs]
    want = torch.nn.functional.scaled_dot_product_attention(*inputs, **terms)
    got = sa.scaled_dot_product_attention(*inputs, **terms)
    dout = random(torch, *want.shape, dtype=dtype, seed=7)
    wanted = torch.autograd.grad(want, inputs, dout)
    for ours, theirs in zip(torch.autograd.grad(got, inputs, dout), wanted, strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        bound = {"float64": (1e-10, 1e-10), "float32": (1e-4, 1e-5)}[name]
        torch.testing.assert_close(ours, theirs, rtol=bound[0], atol=bound[1])


def test_gradients_under_a_mask(torch: ModuleType) -> None:
    q, k, v = leaves(torch, (2, 4, 4, 33, 47, 16, 24))
    mask = random(torch, 2, 1, 33, 47) < 0.3
    mask[1, 0, 7] = False  # a row that sees nothing
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)
    got = sa.scaled_dot_product_attention(q, k, v, mask)
    dout = random(torch, *want.shape, seed=7)
    ours, theirs = (torch.autograd.grad(x, (q, k, v), dout) for x in (got, want))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert not ours[0][1, :, 7].any()


def test_dropout_against_the_regenerated_mask(torch: ModuleType) -> None:
    q, k, v = leaves(torch, (2, 4, 2, 33, 47, 16, 24))
    out = sa.attention(q, k, v, causal=True, dropout_p=0.3, seed=77)
    keep = torch.from_numpy(ref_grad.keep_weights(77, 0.3, (2, 4, 33, 47)))
    scores = q @ k.repeat_interleave(2, 1).mT / 4
    seen = torch.ones(33, 47, dtype=torch.bool).tril(47 - 33)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1) * keep
    want = weights @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    dout = random(torch, *out.shape)
    ours, theirs = (torch.autograd.grad(x, (q, k, v), dout) for x in (out, want))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_torch_says_what_is_dropped(torch: ModuleType) -> None:
    """``torch.manual_seed`` repeats a run, and a checkpoint drops again what it dropped."""
    from torch.utils.checkpoint import checkpoint

    q, k, v = leaves(torch, (2, 4, 2, 9, 11, 16, 8))

    def run(x: Any) -> Any:
        return sa.scaled_dot_product_attention(x, k, v, dropout_p=0.5, enable_gqa=True)

    results = []
    for call in (run, run, lambda x: checkpoint(run, x, use_reentrant=False)):
        torch.manual_seed(1)
        out = call(q)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert not torch.equal(run(q), results[0][0])


@pytest.mark.parametrize("spec", ["dense", "window:5", "topk:4", "topk:4:placement=post"])
def test_gradcheck_of_torch(torch: ModuleType, spec: str) -> None:
    q, k, v = leaves(torch, (1, 2, 1, 5, 6, 3, 2))
    plan = sa.plan(q, k, spec, causal=True)

    def run(q: Any, k: Any, v: Any, bias: Any, sink: Any) -> Any:
        terms = {"bias": bias, "params": {"sink": sink}, "dropout_p": 0.2, "seed": 3}
        return sa.attention(q, k, v, plan, return_lse=True, **terms)

    inputs = (q, k, v, bias_of(torch, 2, 1, 6), bias_of(torch, 2))
    assert torch.autograd.gradcheck(run, inputs, nondet_tol=0.0)


def test_all_inputs_get_what_attention_vjp_gives(torch: ModuleType) -> None:
    q, k, v = leaves(torch, (2, 4, 2, 9, 11, 16, 8))
    bias, sink = bias_of(torch, 9, 11), bias_of(torch, 4)
    call = {"causal": True, "softcap": 2.0, "bias": bias, "params": {"sink": sink}}
    got = sa.attention(q, k, v, "topk:5", return_lse=True, return_weights=True, **call)
    out, lse, weights = got
    assert out.requires_grad and lse.requires_grad and not weights.requires_grad
    dout, dlse = random(torch, *out.shape), random(torch, *lse.shape)
    found = torch.autograd.grad((out, lse), (q, k, v, bias, sink), (dout, dlse))
    vjp = sa.attention_vjp(q, k, v, "topk:5", **call)
    assert isinstance(vjp.out, torch.Tensor) and not vjp.out.requires_grad
    dq, dk, dv, dbias, dparams = vjp.pullback(dout, dlse)
    for a, b in zip(found, (dq, dk, dv, dbias, dparams["sink"]), strict=True):
        assert isinstance(b, torch.Tensor) and torch.equal(a, b)
    arrays = [x.detach().numpy() for x in (q, k, v)]
    only = torch.autograd.grad(sa.attention(q, k, v, return_lse=True).lse.sum(), (q, k))
    rows = sa.attention_vjp(q, k, v).pullback(None, torch.ones_like(lse))
    assert torch.equal(only[0], rows.dq) and torch.equal(only[1], rows.dk)
    alone = torch.autograd.grad(sa.attention(q, k, v, causal=True)[0].sum(), k)
    assert (alone[0][1] == 0).all() and alone[0][
        0
    ].any()  # only what is asked for, all of its shape
    assert all(isinstance(x, np.ndarray) for x in sa.attention_vjp(*arrays)[:2])


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_half_tensors(torch: ModuleType, name: str) -> None:
    dtype = getattr(torch, name)
    inputs = [x.detach().to(dtype) for x in leaves(torch, (2, 4, 2, 33, 40, 16, 8))]
    halves = [x.requires_grad_() for x in inputs]
    wide = [x.detach().float().requires_grad_() for x in inputs]
    dout = random(torch, 2, 4, 33, 8).to(dtype)
    got = torch.autograd.grad(sa.attention(*halves, causal=True), halves, dout)
    want = torch.autograd.grad(sa.attention(*wide, causal=True), wide, dout.float())
    step = torch.finfo(dtype).eps
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.float(), b, rtol=2 * step, atol=8 * step)


def test_merge_of_tensors(torch: ModuleType) -> None:
    q, k, v = leaves(torch, (2, 4, 2, 9, 12, 16, 8))
    parts = [sa.attention(q, k[:, :, s], v[:, :, s], return_lse=True) for s in np.s_[:5, 5:6, 6:]]
    out, lse = sa.merge(parts)
    want = sa.attention(q, k, v, return_lse=True)
    torch.testing.assert_close(out, want.out, rtol=1e-12, atol=1e-12)
    grads = (random(torch, *out.shape), random(torch, *lse.shape))
    ours = torch.autograd.grad((out, lse), (q, k, v), grads)
    for a, b in zip(ours, torch.autograd.grad(tuple(want), (q, k, v), grads), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    mixed = [(parts[0].out, parts[0].lse), (parts[1].out.detach().numpy(), parts[1].lse)]
    with pytest.raises(sa.ArgumentError, match="some of parts are tensors"):
        sa.merge(mixed)


# ---- PyTorch's rules -----------------------------------------------------------------------------


def test_no_graph_where_none_is_asked_for(torch: ModuleType) -> None:
    q, k, v = leaves(torch, (2, 4, 2, 9, 11, 16, 8))
    with torch.no_grad():
        out = sa.attention(q, k, v, return_lse=True)
    assert out.out.grad_fn is None and out.lse.grad_fn is None
    assert sa.attention(*(x.detach() for x in (q, k, v))).grad_fn is None
    alive = weakref.ref(out.out)
    del out
    gc.collect()
    assert alive() is None
    target = torch.empty(2, 4, 9, 8, dtype=torch.float64)
    with pytest.raises(sa.ArgumentError, match=r"out= takes no gradients.*no_grad"):
        sa.attention(q, k, v, out=target)
    with torch.no_grad():
        assert sa.attention(q, k, v, out=target) is target


def test_memory_is_freed_by_the_backward(torch: ModuleType) -> None:
    """What a node saved goes with its backward, although the graph still lives."""
    q, k, v = leaves(torch, (2, 4, 2, 9, 11, 16, 8))
    inner = q * 2
    out = sa.attention(inner, k, v, "topk:5", causal=True)
    alive = weakref.ref(inner.untyped_storage())
    pointer = inner.data_ptr()
    del inner
    total = out.sum()
    assert out.grad_fn.saved_tensors[0].data_ptr() == pointer
    gc.collect()
    assert alive() is not None
    total.backward()
    gc.collect()
    assert alive() is None and out.grad_fn is not None
    with pytest.raises(RuntimeError, match="second time"):
        total.backward()


def test_changes_in_place_are_noticed(torch: ModuleType) -> None:
    q, k, v = leaves(torch, (2, 4, 2, 9, 11, 16, 8))
    mask = torch.ones(9, 11, dtype=torch.bool)
    for at in range(2):
        inner = q * 1
        out = sa.attention(inner, k, v, mask=mask)
        (inner.detach() if at == 0 else mask).logical_not_() if at else inner.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_second_derivatives_are_refused(torch: ModuleType) -> None:
    q, k, v = leaves(torch, (2, 4, 2, 9, 11, 16, 8))
    out = sa.attention(q, k, v)
    with pytest.raises(sa.NotSupported, match=r"no second derivative.*create_graph"):
        torch.autograd.grad(out.sum(), q, create_graph=True)


def test_a_graph_may_be_kept_and_run_twice(torch: ModuleType) -> None:
    q, k, v = leaves(torch, (2, 4, 2, 9, 11, 16, 8))
    out = sa.attention(q, k, v, "topk:5")
    once = torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)
    again = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_arrays_beside_tensors(torch: ModuleType) -> None:
    q, k, v = leaves(torch, (2, 4, 2, 9, 11, 16, 8))
    bias = np.linspace(-1, 1, 11)
    out = sa.attention(q, k, v, bias=bias, mask=np.ones((9, 11), bool))
    want = sa.attention(q, k, v, bias=torch.from_numpy(bias))
    ours, theirs = (torch.autograd.grad(x.sum(), (q, k, v)) for x in (out, want))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    with pytest.raises(sa.ArgumentError, match="k is no tensor and others require grad"):
        sa.attention(q, k.detach().numpy(), v)


def test_strided_tensors_share_memory(torch: ModuleType) -> None:
    """(batch, length, heads, dim) as projections give it; gradients flow back through the views."""
    packed = random(torch, 2, 9, 3, 4, 16).requires_grad_()
    views = [x.transpose(1, 2) for x in packed.unbind(2)]
    out = sa.scaled_dot_product_attention(*views, is_causal=True)
    assert out.grad_fn.saved_tensors[0].data_ptr() == views[0].data_ptr()
    want = torch.nn.functional.scaled_dot_product_attention(*views, is_causal=True)
    ours, theirs = (torch.autograd.grad(x.square().sum(), packed)[0] for x in (out, want))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_transforms_of_torch_are_refused(torch: ModuleType) -> None:
    q, k, v = (x.detach() for x in leaves(torch, (2, 4, 2, 9, 11, 16, 8)))
    with pytest.raises(sa.NotSupported, match="q is a tensor without memory"):
        torch.func.grad(lambda x: sa.attention(x, k, v).sum())(q)


PEAK = """
import resource, sys, torch, sparseattn
attend = {"sa": sparseattn, "torch": torch.nn.functional}[sys.argv[1]].scaled_dot_product_attention
x = torch.randn(1, 2, 64, 64).requires_grad_()
attend(x, x, x, is_causal=True).sum().backward()
q, k, v, dout = (torch.randn(1, 12, 4096, 64) for _ in range(4))
q, k, v = (x.requires_grad_() for x in (q, k, v))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
attend(q, k, v, is_causal=True).backward(dout)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.nightly
def test_peak_memory_is_at_most_that_of_torch(torch: ModuleType) -> None:
    """12 heads of 4,096 tokens, forward and backward, in processes of their own."""

    def peak(which: str) -> int:
        child = [sys.executable, "-c", PEAK, which]
        return int(subprocess.run(child, capture_output=True, text=True, check=True).stdout)

    assert peak("sa") <= peak("torch")


@pytest.mark.nightly
def test_compiled_functions_still_run(torch: ModuleType) -> None:
    q, k, v = leaves(torch, (2, 4, 2, 9, 11, 16, 8))

    def run(q: Any) -> Any:
        return sa.attention(q * 2, k, v, "topk:5", causal=True).sum()

    compiled = torch.compile(run, backend="eager")
    ours, theirs = (torch.autograd.grad(f(q), q)[0] for f in (compiled, run))
    assert torch.equal(ours, theirs)


def test_a_toy_transformer_trains_to_the_same_losses(
    torch: ModuleType, one_thread_of_torch: None
) -> None:
    from torch import nn

    class Block(nn.Module):
        def __init__(self, width: int, heads: int, attend: Any) -> None:
            super().__init__()
            self.heads, self.attend = heads, attend
            self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
            self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.mlp = nn.Sequential(
                nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
            )

        def forward(self, x: Any) -> Any:
            batch, length, width = x.shape
            packed = self.qkv(self.norms[0](x)).view(batch, length, 3, self.heads, -1)
            q, k, v = (y.transpose(1, 2) for y in packed.unbind(2))
            mixed = self.attend(q, k, v, is_causal=True).transpose(1, 2)
            x = x + self.proj(mixed.reshape(batch, length, width))
            return x + self.mlp(self.norms[1](x))

    def losses(attend: Any) -> list[float]:
        torch.manual_seed(0)
        embed, head = nn.Embedding(29, 32), nn.Linear(32, 29)
        model = nn.Sequential(embed, Block(32, 4, attend), Block(32, 4, attend), head)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        tokens = torch.randint(29, (4, 25), generator=torch.Generator().manual_seed(5))
        found = []
        for _ in range(50):
            logits = model(tokens[:, :-1])
            loss = nn.functional.cross_entropy(logits.reshape(-1, 29), tokens[:, 1:].reshape(-1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    want = losses(torch.nn.functional.scaled_dot_product_attention)
    got = losses(sa.scaled_dot_product_attention)
    assert want[-1] < want[0] / 2  # it learns
    np.testing.assert_allclose(got, want, rtol=1e-4)
