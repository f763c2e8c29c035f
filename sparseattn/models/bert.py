"""BERT and its kin: attention both ways, norms after each half of a layer, learned positions.

Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding",
2019, arXiv:1810.04805; Liu et al., "RoBERTa", 2019, arXiv:1907.11692; Sanh et al., "DistilBERT",
2019, arXiv:1910.01108. Names and defaults as in Hugging Face's ``BertForMaskedLM``,
``BertForSequenceClassification`` and their namesakes; sentence encoders such as MiniLM are BERT.
"""

from __future__ import annotations

import math
from dataclasses import replace

from sparseattn.models.common import Config, Family, HeadNames
from sparseattn.models.fields import (
    ACTIVATIONS,
    MAX_CONTEXT,
    MAX_HEADS,
    MAX_HIDDEN,
    MAX_LAYERS,
    MAX_VOCAB,
    Fields,
)

MAX_TOKEN_TYPES = 1024
MAX_LABELS = 65_536

# The ends of config.json's architectures, and the head that each has.
ARCHITECTURES = {
    "ForMaskedLM": "masked_lm",
    "ForPreTraining": "masked_lm",
    "ForSequenceClassification": "classifier",
    "Model": "none",
}


def read_bert(fields: Fields) -> Config:
    """BERT's config.json; absent entries mean what they mean in transformers."""
    return read_encoder(
        fields,
        hidden=("hidden_size", 768),
        heads=("num_attention_heads", 12),
        layers=("num_hidden_layers", 12),
        inner=("intermediate_size", 3072),
        act="hidden_act",
        vocab=30522,
        eps=fields.number("layer_norm_eps", 1e-12, 0, 1),
        token_types=fields.integer("type_vocab_size", 2, 1, MAX_TOKEN_TYPES),
    )


def read_roberta(fields: Fields) -> Config:
    """RoBERTa's config.json: positions begin after the padding's own."""
    config = read_bert(fields)
    offset = 1 + fields.integer("pad_token_id", 1, 0, MAX_VOCAB)
    if config.context <= offset:
        raise fields.fail(
            "max_position_embeddings",
            f"is {config.context}: give more than the {offset} that padding takes",
        )
    return replace(config, position_offset=offset, context=config.context - offset)


def read_distilbert(fields: Fields) -> Config:
    """DistilBERT's config.json."""
    return read_encoder(
        fields,
        hidden=("dim", 768),
        heads=("n_heads", 12),
        layers=("n_layers", 6),
        inner=("hidden_dim", 3072),
        act="activation",
        vocab=30522,
        eps=1e-12,
        token_types=0,
    )


def read_encoder(
    fields: Fields,
    *,
    hidden: tuple[str, int],
    heads: tuple[str, int],
    layers: tuple[str, int],
    inner: tuple[str, int],
    act: str,
    vocab: int,
    eps: float,
    token_types: int,
) -> Config:
    """What the family shares: entries by their name and default."""
    width = fields.integer(*hidden, 1, MAX_HIDDEN)
    n_heads = fields.integer(*heads, 1, MAX_HEADS)
    n_layers = fields.integer(*layers, 1, MAX_LAYERS)
    if width % n_heads:
        raise fields.fail(
            hidden[0], f"is {width}: give a multiple of {heads[0]}, which is {n_heads}"
        )
    for name in ("is_decoder", "add_cross_attention"):
        if fields.flag(name, False):
            raise fields.fail(name, "is true: give an encoder, which attends both ways")
    fields.word("position_embedding_type", "absolute", {"absolute": "absolute"})
    return Config(
        family=str(fields.get("model_type", "bert")),
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=width // n_heads,
        hidden=width,
        inner=fields.integer(*inner, 1, 8 * MAX_HIDDEN),
        vocab_size=fields.integer("vocab_size", vocab, 1, MAX_VOCAB),
        context=fields.integer("max_position_embeddings", 512, 1, MAX_CONTEXT),
        eps=eps,
        activation=fields.word(act, "gelu", ACTIVATIONS),
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tied=fields.flag("tie_word_embeddings", True),
        rope=None,
        scales=(1.0 / math.sqrt(width // n_heads),) * n_layers,
        init_std=fields.number("initializer_range", 0.02, 0, 1),
        causal=False,
        token_types=token_types,
        head=read_head(fields),
        labels=read_labels(fields),
    )


def read_head(fields: Fields) -> str:
    """The head of the architecture that config.json names; a file's tensors have the last word."""
    names = fields.get("architectures", [])
    name = names[0] if isinstance(names, list) and names else "BertForMaskedLM"
    found = (head for end, head in ARCHITECTURES.items() if str(name).endswith(end))
    return next(found, "none")


def read_labels(fields: Fields) -> tuple[str, ...]:
    """The names of a classifier's classes; without names, as many as `num_labels` says."""
    named = fields.section("id2label").values
    count = len(named) or fields.integer("num_labels", 2, 1, MAX_LABELS)
    if count > MAX_LABELS:
        raise fields.fail("id2label", f"has {count} labels: give at most {MAX_LABELS}")
    if not named:
        return tuple(f"LABEL_{i}" for i in range(count))
    names = [named.get(str(i)) for i in range(count)]
    if not all(isinstance(name, str) for name in names):
        raise fields.fail("id2label", f"is not text by the numbers 0 to {count - 1}: correct it")
    return tuple(map(str, names))


# Files of the first releases call a norm's parameters gamma and beta.
OLD_NORMS = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))

BERT = Family(
    name="bert",
    prefix="bert.",
    embed="embeddings.word_embeddings",
    positions="embeddings.position_embeddings",
    token_types="embeddings.token_type_embeddings",
    embed_norm="embeddings.LayerNorm",
    layer="encoder.layer.{}.",
    order="post",
    norm1="attention.output.LayerNorm",
    qkv=("attention.self.query", "attention.self.key", "attention.self.value"),
    out="attention.output.dense",
    norm2="output.LayerNorm",
    gate=None,
    up="intermediate.dense",
    down="output.dense",
    norm=None,
    norm_kind="layer",
    weights="out_in",
    scaled_init=False,
    ignored=("embeddings.position_ids", "embeddings.token_type_ids"),
    read_config=read_bert,
    head="cls.predictions.decoder",
    heads={
        "masked_lm": HeadNames(
            dense="cls.predictions.transform.dense",
            activation=None,
            norm="cls.predictions.transform.LayerNorm",
            out="cls.predictions.decoder",
            bias="cls.predictions.bias",
            first=False,
        ),
        "classifier": HeadNames(
            dense="pooler.dense",
            activation="tanh",
            norm=None,
            out="classifier",
            bias="classifier.bias",
            first=True,
        ),
    },
    renamed=OLD_NORMS,
    unused=("pooler.", "cls.seq_relationship."),
)

ROBERTA = replace(
    BERT,
    name="roberta",
    prefix="roberta.",
    read_config=read_roberta,
    head="lm_head.decoder",
    heads={
        "masked_lm": HeadNames(
            dense="lm_head.dense",
            activation="gelu",
            norm="lm_head.layer_norm",
            out="lm_head.decoder",
            bias="lm_head.bias",
            first=False,
        ),
        "classifier": HeadNames(
            dense="classifier.dense",
            activation="tanh",
            norm=None,
            out="classifier.out_proj",
            bias="classifier.out_proj.bias",
            first=True,
        ),
    },
    unused=("pooler.",),
)

XLM_ROBERTA = replace(ROBERTA, name="xlm-roberta")

DISTILBERT = replace(
    BERT,
    name="distilbert",
    prefix="distilbert.",
    token_types=None,
    layer="transformer.layer.{}.",
    norm1="sa_layer_norm",
    qkv=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    out="attention.out_lin",
    norm2="output_layer_norm",
    up="ffn.lin1",
    down="ffn.lin2",
    read_config=read_distilbert,
    head="vocab_projector",
    heads={
        "masked_lm": HeadNames(
            dense="vocab_transform",
            activation=None,
            norm="vocab_layer_norm",
            out="vocab_projector",
            bias="vocab_projector.bias",
            first=False,
        ),
        "classifier": HeadNames(
            dense="pre_classifier",
            activation="relu",
            norm=None,
            out="classifier",
            bias="classifier.bias",
            first=True,
        ),
    },
    unused=(),
)
