"""Wrong calls are answered: the argument, the value, the remedy, and the built-in that fits."""

from __future__ import annotations

import inspect
import traceback
from typing import Any

import conftest
import numpy as np
import pytest

import sparseattn as sa

Q = np.zeros((2, 4, 5, 16), np.float32)
K = np.zeros((2, 2, 7, 16), np.float32)
V = np.zeros((2, 2, 7, 8), np.float32)
MASK = np.ones((5, 7), bool)
PLAN = sa.plan(Q, K, "topk:3", causal=True)


def call(q: Any = Q, k: Any = K, v: Any = V, spec: Any = None, **terms: Any) -> Any:
    return sa.attention(q, k, v, spec, **terms)


def huge(*shape: int) -> np.ndarray:
    return np.broadcast_to(np.ones(shape[-1], np.float32), shape)


WRONG: list[tuple[Any, type[Exception], list[str]]] = [
    # kinds and dtypes
    (lambda: call(q=None), ValueError, ["q must be an array", "None"]),
    (lambda: call(q="abc"), ValueError, ["q", "'abc'"]),
    (lambda: call(q=[[1.0], [1.0, 2.0]]), ValueError, ["q cannot be read"]),
    (lambda: call(q=Q.astype(int)), TypeError, ["q has dtype int64", "astype(np.float32)"]),
    (lambda: call(k=K.astype(object)), TypeError, ["k has dtype object"]),
    (lambda: call(v=V.astype(complex)), TypeError, ["v has dtype complex128"]),
    (lambda: call(q=Q.astype(np.longdouble)), TypeError, ["q has dtype", "float64"]),
    (lambda: call(k=K.astype(np.float64)), TypeError, ["k is float64", "q is float32"]),
    (lambda: call(v=V.astype(np.float16)), TypeError, ["v is float16", "q is float32"]),
    (lambda: call(q=np.ma.masked_array(Q)), ValueError, ["q is a masked array", "mask="]),
    # shapes
    (lambda: call(q=Q[0, 0]), ValueError, ["q must be (..., heads, length, dim)", "(5, 16)"]),
    (lambda: call(q=np.float32(3)), ValueError, ["q", "()"]),
    (lambda: call(q=Q[..., :8]), ValueError, ["k", "16", "8"]),
    (lambda: call(k=K[:, :, :6]), ValueError, ["v", "7", "6"]),
    (lambda: call(q=Q[:, :3]), ValueError, ["2 heads", "3 heads"]),
    (lambda: call(v=V[:, :1]), ValueError, ["v", "heads of k"]),
    (lambda: call(k=np.zeros((3, 2, 7, 16), np.float32)), ValueError, ["q (2, 4, 5, 16)", "k (3,"]),
    # sizes that no memory holds: nothing is copied or filled before that is known
    (lambda: call(k=huge(2, 2, 2**31, 16), v=huge(2, 2, 2**31, 8)), ValueError, ["length of k"]),
    (lambda: call(q=huge(1, 1, 2**20, 2**20)), ValueError, ["q must be at most 4096 wide"]),
    (lambda: call(q=huge(2, 4, 2**40, 16)), MemoryError, ["output", "does not fit in memory"]),
    (lambda: call(q=huge(2, 4, 2**40, 32)[..., ::2]), MemoryError, ["copy of q", "does not fit"]),
    # causal, scale, softcap
    (lambda: call(causal="bottom"), ValueError, ["causal", "'bottom_right'", "'bottom'"]),
    (lambda: call(causal=1), ValueError, ["causal", "got 1"]),
    (lambda: call(causal=None), ValueError, ["causal", "None"]),
    (lambda: call(scale="big"), ValueError, ["scale", "'big'"]),
    (lambda: call(scale=np.nan), ValueError, ["scale", "nan"]),
    (lambda: call(softcap=-1), ValueError, ["softcap", "-1"]),
    # masks
    (lambda: call(mask=MASK.astype(np.float32)), TypeError, ["mask has dtype float32", "bias="]),
    (lambda: call(mask=MASK.astype(int)), TypeError, ["mask has dtype int64", "astype(bool)"]),
    (lambda: call(mask=MASK.T), ValueError, ["mask must broadcast", "(2, 4, 5, 7)", "(7, 5)"]),
    (lambda: call(mask=np.ones((2, 7), bool)), ValueError, ["mask", "key_mask="]),
    (lambda: call(mask=np.ones((2, 5, 7), bool)), ValueError, ["mask", "mask[:, None]"]),
    (lambda: call(bias=MASK), TypeError, ["bias has dtype bool", "mask="]),
    (lambda: call(bias=np.zeros((5, 7), int)), TypeError, ["bias has dtype int64"]),
    (lambda: call(bias=np.zeros((5, 6))), ValueError, ["bias must broadcast", "(5, 6)"]),
    (lambda: call(key_mask=MASK), ValueError, ["key_mask must have shape (2, 7)", "(5, 7)"]),
    (lambda: call(key_mask=MASK[None, None]), ValueError, ["key_mask", "mask="]),
    (lambda: call(key_mask=np.ones((2, 7), int)), TypeError, ["key_mask", "astype(bool)"]),
    (lambda: call(key_mask=np.ones((2, 7))), TypeError, ["key_mask has dtype float64"]),
    # specs and params
    (lambda: call(spec="topq:3"), ValueError, ["topq", "did you mean topk"]),
    (lambda: call(spec=16), ValueError, ["spec", "got 16"]),
    (lambda: call(spec="topk:0"), ValueError, ["TopK.k", "got 0"]),
    (lambda: call(spec="window:64"), ValueError, ["causal=True", "window_size=(32, 32)"]),
    (lambda: call(spec="window:0"), ValueError, ["Window.size", "got 0"]),
    (lambda: call(spec="blockmask"), ValueError, ["params={'layout'", "(heads or 1, 1, 1)"]),
    (
        lambda: call(spec="blockmask", params={"layout": np.ones((1, 2, 2), bool)}),
        ValueError,
        ["layout"],
    ),
    (
        lambda: call(spec="blockmask", params={"layout": np.ones((1, 1, 1))}),
        TypeError,
        ["layout", "bool"],
    ),
    (lambda: call(spec="topk:3", params={"theta": Q}), ValueError, ["'theta'", "takes no arrays"]),
    (lambda: call(spec="blockmask", params={"laout": Q}), ValueError, ["'laout'", "layout"]),
    (lambda: call(params=3), ValueError, ["params must be a mapping", "got 3"]),
    (lambda: call(spec="perhead(2*dense)"), ValueError, ["2 specs", "4 heads"]),
    # plans
    (lambda: call(spec=PLAN, mask=MASK), ValueError, ["mask is part of a plan", "sa.plan"]),
    (lambda: call(spec=PLAN, key_mask=MASK), ValueError, ["key_mask is part of a plan"]),
    (lambda: call(spec=PLAN, params={}), ValueError, ["params is part of a plan"]),
    (lambda: call(spec=PLAN, causal="top_left"), ValueError, ["causal='top_left'", "plan"]),
    (lambda: call(spec=PLAN, q=Q[:, :, :4]), ValueError, ["(2, 4, 5, 7)", "(2, 4, 4, 7)"]),
    (lambda: call(spec=PLAN, k=K[:, :1], v=V[:, :1]), ValueError, ["2 kv heads", "with 1"]),
    (lambda: sa.plan(Q, K, PLAN), ValueError, ["got a Plan"]),
    (lambda: sa.Plan.from_mask(MASK.astype(float)), TypeError, ["mask has dtype float64"]),
    (lambda: sa.Plan.from_mask(MASK[0]), ValueError, ["mask", "(7,)"]),
    (lambda: sa.Plan.from_mask_mod(lambda b, h, q, k: q - k, 1, 1, 5, 5), ValueError, ["int64"]),
    (
        lambda: sa.Plan.from_mask_mod(lambda b, h, q, k: q > k and q < 3, 1, 1, 5, 5),
        ValueError,
        ["& and |"],
    ),
    (lambda: sa.Plan.from_mask_mod(lambda b, h, q, k: q > k, 1, 1, -5, 5), ValueError, ["n_q"]),
    # out
    (lambda: call(out=[1.0]), ValueError, ["out must be an array", "list"]),
    (lambda: call(out=np.zeros((2, 4, 5, 7), np.float32)), ValueError, ["out", "(2, 4, 5, 8)"]),
    (lambda: call(out=np.zeros((2, 4, 5, 8))), TypeError, ["out must have dtype float32"]),
    (
        lambda: call(out=np.broadcast_to(np.float32(0), (2, 4, 5, 8))),
        ValueError,
        ["out must be writable"],
    ),
    # what is spelled otherwise here
    (lambda: call(is_causal=True), TypeError, ["is_causal", "causal", "top_left"]),
    (lambda: call(attn_mask=MASK), TypeError, ["attn_mask", "mask", "bias"]),
    (lambda: call(attention_mask=MASK), TypeError, ["attention_mask", "key_mask"]),
    (lambda: call(dropout=0.1), TypeError, ["dropout", "dropout_p"]),
    (lambda: call(softmax_scale=0.1), TypeError, ["softmax_scale", "use scale"]),
    (lambda: call(window_size=(3, 0)), TypeError, ["window_size", "sa.Window"]),
    (lambda: call(need_weights=True), TypeError, ["return_weights"]),
    (lambda: call(past_key_values=3), TypeError, ["past_key_values", "cache=sa.Cache()"]),
    (lambda: call(sinks=3), TypeError, ["sinks", "params={'sink'"]),
    (lambda: call(is_casual=True), TypeError, ["is_casual: use causal"]),
    (lambda: call(soft_cap=True), TypeError, ["soft_cap: use softcap"]),
    (lambda: sa.attention_vjp(Q, K, V, dout=Q), TypeError, ["pullback(dout)"]),
    (lambda: sa.attention_vjp(Q, K, V, return_lse=True), TypeError, ["lse comes with"]),
    (lambda: call(colour=3), TypeError, ["colour", "return_lse"]),
    (lambda: sa.plan(Q, K, is_causal=True), TypeError, ["plan()", "causal"]),
    # what comes later
    (lambda: call(dropout_p=1.5), ValueError, ["dropout_p", "[0, 1)", "1.5"]),
    (lambda: call(dropout_p="half"), ValueError, ["dropout_p", "number", "'half'"]),
    (lambda: call(dropout_p=0.1, seed=-1), ValueError, ["seed", "2**63", "-1"]),
    (lambda: call(dropout_p=0.1, seed=1 << 63), ValueError, ["seed", "2**63", str(1 << 63)]),
    (lambda: call(dropout_p=0.1, seed=0.5), ValueError, ["seed", "integer", "0.5"]),
    (lambda: call(params={"sink": np.zeros(3)}), ValueError, ["sink", "(4,)", "(3,)"]),
    (lambda: call(params={"sink": [1, 2, 3, 4]}), TypeError, ["sink", "int64", "float32"]),
    (lambda: call(params={"sinks": np.zeros(4)}), ValueError, ["sinks", "sink"]),
    (lambda: call(cu_seqlens=[0, 5]), ValueError, ["cu_seqlens", "pair (cu_q, cu_k)"]),
    (lambda: call(cache=object()), ValueError, ["cache must be a sa.Cache", "object"]),
    # what runs
    (lambda: sa.set_num_threads(0), ValueError, ["0"]),
    (lambda: sa.set_num_threads(65), ValueError, ["65"]),
    (lambda: sa.set_num_threads("two"), ValueError, ["n", "'two'"]),
    (lambda: sa.show_config("json"), ValueError, ["mode", "'json'"]),
    # PyTorch's signature
    (lambda: sa.scaled_dot_product_attention(Q, K, V), ValueError, ["4, 2, 2 heads", "enable_gqa"]),
    (
        lambda: sa.scaled_dot_product_attention(Q, Q, Q, np.ones((5, 5), int)),
        TypeError,
        ["attn_mask has dtype int64", "astype(bool)"],
    ),
    (lambda: sa.scaled_dot_product_attention(Q[0, 0, 0], Q, Q), ValueError, ["query", "(16,)"]),
    (
        lambda: sa.scaled_dot_product_attention(Q, Q, Q, np.ones((5, 4), bool)),
        ValueError,
        ["attn_mask must broadcast", "(5, 4)"],
    ),
    (
        lambda: sa.scaled_dot_product_attention(Q[:, :3], K, V, enable_gqa=True),
        ValueError,
        ["2 heads of key", "3 of query"],
    ),
    (
        lambda: sa.scaled_dot_product_attention(Q, Q, Q, dropout_p=1.1),
        ValueError,
        ["dropout_p"],
    ),
]


@pytest.mark.promise("G2")
@pytest.mark.parametrize(("wrong", "builtin", "words"), WRONG, ids=range(len(WRONG)))
def test_wrong_calls_are_answered(wrong: Any, builtin: type[Exception], words: list[str]) -> None:
    with pytest.raises(sa.SparseAttnError) as caught:
        wrong()
    message = str(caught.value)
    assert isinstance(caught.value, builtin), type(caught.value)
    assert "\n" not in message and 15 < len(message) < 400, message
    for word in words:
        assert word in message, message


def test_messages_show_no_machinery() -> None:
    """No chained exception of ours, and the chain is cut where we reword one."""
    for wrong, _, _ in WRONG:
        try:
            wrong()
        except sa.SparseAttnError as error:
            text = "".join(traceback.format_exception(error))
            assert "During handling" not in text, text


def test_exceptions_fit_built_ins() -> None:
    pairs = {
        sa.ArgumentError: ValueError,
        sa.DtypeError: TypeError,
        sa.UnknownArgument: TypeError,
        sa.NotSupported: NotImplementedError,
        sa.OutOfMemory: MemoryError,
        sa.InternalError: RuntimeError,
        sa.FileError: OSError,
    }
    for ours, builtin in pairs.items():
        assert issubclass(ours, sa.SparseAttnError) and issubclass(ours, builtin)
        assert ours.__doc__


def test_renamed_arguments_are_real_ones() -> None:
    from sparseattn.attention import KEYWORDS
    from sparseattn.plan import RENAMED

    signature = inspect.signature(sa.attention)
    kinds = {p.name: p.kind for p in signature.parameters.values()}
    keywords = [name for name, kind in kinds.items() if kind is inspect.Parameter.KEYWORD_ONLY]
    assert tuple(keywords) == KEYWORDS
    for name, right in RENAMED.items():
        assert name not in kinds
        first = right.split()[0].rstrip(",")
        assert first in kinds or first == "nothing:", right


def test_inputs_are_untouched_when_a_call_fails() -> None:
    out = np.full((2, 4, 5, 8), 7.0, np.float32)
    with pytest.raises(sa.ArgumentError):
        call(out=out, spec="perhead(dense)")
    assert (out == 7).all()


def test_attributes_that_are_not_there() -> None:
    with pytest.raises(AttributeError, match="flash_attention"):
        _ = sa.flash_attention
    assert {"Model", "compare", "plots"} <= set(dir(sa))


def test_a_missing_part_skips_but_not_where_all_is_required(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(conftest, "REQUIRE_ALL", False)
    with pytest.raises(pytest.skip.Exception, match="no_such_module"):
        conftest.requires("no_such_module")
    monkeypatch.setattr(conftest, "REQUIRE_ALL", True)
    with pytest.raises(pytest.fail.Exception, match="no_such_module"):
        conftest.requires("no_such_module")
    assert conftest.requires("json").dumps(1) == "1"


def test_what_runs(capsys: pytest.CaptureFixture[str]) -> None:
    config = sa.show_config("dicts")
    assert config is not None and not capsys.readouterr().out
    assert config["isa"] in config["isas"] and config["threads"] == sa.get_num_threads()
    assert config["version"] == sa.__version__
    assert sa.show_config() is None
    printed = capsys.readouterr().out
    assert all(name in printed for name in config)
