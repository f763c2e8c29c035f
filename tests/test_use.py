"""`sa.use`: a model attends otherwise inside a block, and as before after it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import requires
from tiny_models import GPT2_CONFIG, LLAMA_CONFIG, gpt2_weights, llama_weights, save_folder

import sparseattn as sa
from sparseattn.models import Model

pytestmark = pytest.mark.usefixtures("one_thread_of_torch")

# ---- our own -------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return Model.from_pretrained(save_folder(tmp_path, LLAMA_CONFIG, llama_weights(LLAMA_CONFIG)))


IDS = np.random.default_rng(3).integers(0, 61, (2, 40))


def test_inside_the_block_and_after_it(model: Model) -> None:
    dense, window = model(IDS), model(IDS, attention="window:4")
    greedy = model.generate(IDS[0, :9], 8, attention="window:4")
    with sa.use(model, "window:4") as same:
        assert same is model
        np.testing.assert_array_equal(model(IDS), window)
        np.testing.assert_array_equal(model(IDS, attention="dense"), dense)
        np.testing.assert_array_equal(model.generate(IDS[0, :9], 8), greedy)
        layer = model(IDS, per_layer={0: "dense"})
        np.testing.assert_array_equal(
            layer, model(IDS, attention="window:4", per_layer={0: "dense"})
        )
    np.testing.assert_array_equal(model(IDS), dense)


def test_blocks_nest_and_errors_restore(model: Model) -> None:
    model.attention = "topk:3"
    with sa.use(model, "window:4"):
        with pytest.raises(KeyError), sa.use(model, sa.TopK(5)):
            assert model.attention == sa.TopK(5)
            raise KeyError
        assert model.attention == sa.Window(4)
    assert model.attention == "topk:3"


def test_a_stream_keeps_what_it_began_with(model: Model) -> None:
    want = model.generate(IDS[0, :9], 8, attention="window:4").tolist()
    with sa.use(model, "window:4"):
        stream = model.stream(IDS[0, :9], 8)
    assert list(stream) == want


def test_wrong_arguments(model: Model) -> None:
    with pytest.raises(sa.ArgumentError, match="window"), sa.use(model, "windw:4"):
        pass
    for wrong in (SimpleNamespace(attention=None), None, Model):
        with (
            pytest.raises(sa.DtypeError, match=r"give a sparseattn\.Model or a transformers model"),
            sa.use(wrong, "dense"),
        ):
            pass


# ---- transformers --------------------------------------------------------------------------------

Make = Callable[..., Any]


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny model of transformers; LLaMA with 8 heads over 2, GPT-2 with scales by layer."""
    requires("torch")
    transformers = requires("transformers")
    if request.param == "gpt2":
        config = {**GPT2_CONFIG, "scale_attn_by_inverse_layer_idx": True, "eos_token_id": None}
        weights = gpt2_weights(config)
    else:
        config = {**LLAMA_CONFIG, "eos_token_id": None}
        weights = llama_weights(config)
    folder = save_folder(tmp_path_factory.mktemp("theirs"), config, weights)
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture
def theirs(loaded: Any) -> Any:
    loaded.set_attn_implementation("sdpa")
    return loaded


@pytest.fixture
def ids(torch: Any) -> Any:
    return torch.from_numpy(IDS)


def padding(torch: Any, side: str) -> Any:
    """A mask of (2, 40) with seven tokens of padding in the first row."""
    mask = torch.ones(2, 40, dtype=torch.long)
    if side != "none":
        mask[0, slice(0, 7) if side == "left" else slice(33, 40)] = 0
    return mask


@pytest.mark.promise("A3")
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_dense_gives_their_logits(
    theirs: Any, ids: Any, torch: Any, side: str, implementation: str
) -> None:
    mask = padding(torch, side)
    theirs.set_attn_implementation(implementation)
    with torch.no_grad():
        want = theirs(ids, attention_mask=mask).logits
        with sa.use(theirs, "dense"):
            got = theirs(ids, attention_mask=mask).logits
        assert theirs.config._attn_implementation == implementation
    there = mask.bool()
    torch.testing.assert_close(got[there], want[there], rtol=0, atol=2e-5)


def test_a_mask_of_nothing_but_causality_is_no_matrix(theirs: Any, ids: Any, torch: Any) -> None:
    """Nor is one of causality and padding."""
    from sparseattn.integrations import transformers as ours

    seen: list[Any] = []
    real = ours.read_sight

    def read_sight(mask: Any, *others: Any) -> Any:
        seen.append(mask)
        return real(mask, *others)

    ours.read_sight = read_sight
    try:
        with torch.no_grad(), sa.use(theirs, "window:8"):
            theirs(ids)
            assert all(mask is None for mask in seen) and seen
            seen.clear()
            theirs(ids, attention_mask=padding(torch, "left"))
            assert all(mask.shape == (2, 40) for mask in seen) and seen
    finally:
        ours.read_sight = real


def test_a_window_is_our_models_window(theirs: Any, ids: Any, torch: Any) -> None:
    own = Model.from_pretrained(theirs.config._name_or_path)
    with torch.no_grad():
        dense = theirs(ids).logits
        for spec in ("window:8", "topk:5", sa.PerLayer({0: "dense"}, other="window:8")):
            with sa.use(theirs, spec):
                got = theirs(ids).logits
            np.testing.assert_allclose(got.numpy(), own(IDS, attention=spec), atol=3e-5)
            assert (got - dense).abs().max() > 0.1
        assert torch.equal(theirs(ids).logits, dense)


@pytest.mark.parametrize(("side", "cache"), [("none", None), ("left", None), ("left", "static")])
def test_their_generate(theirs: Any, ids: Any, torch: Any, side: str, cache: str | None) -> None:
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    how["attention_mask"] = padding(torch, side)
    want = theirs.generate(ids, **how)
    with sa.use(theirs, "dense"):
        got = theirs.generate(ids, cache_implementation=cache, **how)
    assert torch.equal(got, want)
    with sa.use(theirs, "window:8"):
        assert not torch.equal(theirs.generate(ids, cache_implementation=cache, **how), want)


def test_decoding_a_window_is_reading_it_whole(theirs: Any, ids: Any, torch: Any) -> None:
    with torch.no_grad(), sa.use(theirs, "window:8:sinks=2"):
        want = theirs(ids).logits
        first = theirs(ids[:, :17], use_cache=True)
        parts, cache = [first.logits], first.past_key_values
        for chunk in (ids[:, 17:30], *ids[:, 30:].split(1, 1)):
            parts.append(theirs(chunk, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(parts, 1), want, rtol=0, atol=3e-5)


def test_packed_sequences_and_masks_of_the_users_own(theirs: Any, ids: Any, torch: Any) -> None:
    places = torch.cat([torch.arange(15), torch.arange(25)])[None].expand(2, -1)
    allowed = torch.rand(2, 1, 40, 40, generator=torch.Generator().manual_seed(0)) < 0.5
    allowed |= torch.eye(40, dtype=torch.bool)
    added = torch.zeros(2, 1, 40, 40).masked_fill(~allowed, torch.finfo(torch.float32).min)
    biased = added + torch.randn(40, generator=torch.Generator().manual_seed(1))
    calls = [{"position_ids": places, "use_cache": False}]
    calls += [{"attention_mask": mask} for mask in (allowed, allowed.tril(), added, biased)]
    with torch.no_grad():
        for call in calls:
            want = theirs(ids, **call).logits
            with sa.use(theirs, "dense"):
                got = theirs(ids, **call).logits
            scale = max(1.0, float(want.abs().max()))
            torch.testing.assert_close(got, want, rtol=0, atol=2e-5 * scale)


def test_gradients_flow(theirs: Any, ids: Any, torch: Any) -> None:
    mask = padding(torch, "left")
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 7] = -100  # a token of padding would have to tell it

    def gradients() -> list[Any]:
        theirs.zero_grad()
        theirs(ids, labels=labels, attention_mask=mask).loss.backward()
        return [parameter.grad.clone() for parameter in theirs.parameters()]

    want = gradients()
    with sa.use(theirs, "dense"):
        got = gradients()
    with sa.use(theirs, "window:4"):
        other = gradients()
    scale = max(float(g.abs().max()) for g in want)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * scale)
    assert any((a - b).abs().max() > 1e-2 * scale for a, b in zip(other, want, strict=True))


def test_weights_where_they_ask_for_them(ids: Any, torch: Any) -> None:
    transformers = requires("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, vocab_size=61, attn_implementation="eager",
    )  # fmt: skip
    llama = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        want = llama(ids, output_attentions=True).attentions
        with sa.use(llama, "dense"):
            got = llama(ids, output_attentions=True).attentions
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


def test_their_blocks_nest_and_restore(theirs: Any, ids: Any, torch: Any) -> None:
    with torch.no_grad():
        dense = theirs(ids).logits
        with sa.use(theirs, "window:8"):
            window = theirs(ids).logits
            with pytest.raises(KeyError), sa.use(theirs, "topk:3"):
                raise KeyError
            assert torch.equal(theirs(ids).logits, window)
        assert theirs.config._attn_implementation == "sdpa"
        assert torch.equal(theirs(ids).logits, dense)
    assert not any("sparseattn" in name for m in theirs.modules() for name in vars(m))


def test_a_model_that_cannot_be_changed_is_left_as_it_was(
    theirs: Any, ids: Any, torch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(theirs), "_can_set_attn_implementation", lambda self: False)
    monkeypatch.setattr(type(theirs.base_model), "_can_set_attn_implementation", lambda self: False)
    refused = pytest.raises(sa.NotSupported, match="does not let its attention be replaced")
    with refused, sa.use(theirs, "window:8"):
        pass
    assert theirs.config._attn_implementation == "sdpa"
    assert not any("sparseattn" in name for m in theirs.modules() for name in vars(m))


def test_dropout_while_training(theirs: Any, ids: Any, torch: Any) -> None:
    from sparseattn.integrations.transformers import attend

    q = torch.randn(1, 4, 20, 8)
    module = SimpleNamespace(is_causal=True)
    torch.manual_seed(5)
    one, _ = attend(module, q, q, q, None, dropout=0.5)
    torch.manual_seed(5)
    two, _ = attend(module, q, q, q, None, dropout=0.5)
    three, _ = attend(module, q, q, q, None, dropout=0.5)
    assert torch.equal(one, two) and not torch.equal(one, three)


def test_sinks_soft_caps_and_position_biases(torch: Any) -> None:
    """What other families hand to an attention function."""
    from sparseattn.integrations.transformers import attend

    torch.manual_seed(0)
    q, k, v = torch.randn(2, 6, 20, 8), torch.randn(2, 2, 20, 8), torch.randn(2, 2, 20, 8)
    sinks, bias = torch.randn(6), torch.randn(1, 6, 20, 20)
    module = SimpleNamespace(is_causal=True, layer_idx=0)
    out, _ = attend(
        module, q, k, v, None, scaling=0.3, softcap=2.0, s_aux=sinks, position_bias=bias
    )
    wide_k, wide_v = (x.repeat_interleave(3, 1) for x in (k, v))
    scores = 2.0 * torch.tanh(0.3 * q @ wide_k.mT / 2.0) + bias
    scores = scores.masked_fill(~torch.ones(20, 20, dtype=torch.bool).tril(), -torch.inf)
    scores = torch.cat([scores, sinks[:, None, None].expand(2, 6, 20, 1)], -1)
    want = (scores.softmax(-1)[..., :-1] @ wide_v).transpose(1, 2)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-5)
    assert out.is_contiguous()


def test_a_module_that_does_not_say_its_layer(torch: Any) -> None:
    from sparseattn.integrations.transformers import SPEC, attend

    q = torch.randn(1, 2, 5, 8)
    module = SimpleNamespace(**{SPEC: sa.PerLayer({0: "dense"}, other="window:2")})
    with pytest.raises(sa.NotSupported, match="does not say which layer it is"):
        attend(module, q, q, q, None)
    with pytest.raises(sa.ArgumentError, match=r"attention_mask has shape \(5,\)"):
        attend(SimpleNamespace(), q, q, q, torch.ones(5))
