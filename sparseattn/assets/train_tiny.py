"""Train the default model in `tiny/` from scratch and print the figures of its README.

    python train_tiny.py --compile           # the released recipe, about an hour on two cores
    python train_tiny.py --minutes 3 --out d # a quick look
    python train_tiny.py --evaluate          # only the figures of the stored model

Needs Python 3.11 or later with its standard library's sources, and torch, numpy, safetensors and
tokenizers. The text comes from `corpus.py` beside this file. The last checkpoint is kept below
``--work`` so that an interrupted run can be continued with ``--resume``.

The model is a small LLaMA in Hugging Face's layout: RMSNorm, rotate-half RoPE, grouped-query
attention, SwiGLU, tied embeddings. Matrices inside the blocks are trained by Muon, the embedding
and the gains by AdamW. The corpus is small, so three things fight over-fitting: dropout, weight
decay, and BPE dropout (words are spelled by a random one of several segmentations).
"""

import argparse
import json
import re
import time
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import corpus
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
CHOICES = 16  # random spellings of a word under BPE dropout
END = "<|endoftext|>"
WORD = re.compile(r"[A-Za-z]+")

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Shape:
    """The architecture."""

    vocab: int = 2048
    dim: int = 192
    layers: int = 4
    heads: int = 6
    kv_heads: int = 3
    hidden: int = 512
    context: int = 512
    theta: float = 10000.0
    eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


@dataclass(frozen=True)
class Recipe:
    """How it is trained."""

    seed: int = 0
    steps: int = 3700
    batch: int = 8
    muon_lr: float = 0.02
    adam_lr: float = 0.003
    warmup: int = 100
    cooldown: float = 0.45  # the last part of the steps, in which the rates fall linearly to 0
    decay: float = 0.1
    dropout: float = 0.1
    bpe_dropout: float = 0.1  # in half of the documents, but none in the last fifth of the steps
    topic_copies: int = 2  # how often an epoch shows each topic; docstrings once


# ---- text and tokens --------------------------------------------------------------------------


def train_tokenizer(texts: list[str], vocab: int) -> Tokenizer:
    """Byte-level BPE with GPT-2's pre-tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


class Speller:
    """Spells the training text as tokens, optionally with BPE dropout.

    BPE dropout skips each merge with probability `p`. To stay fast and seeded, `CHOICES` random
    segmentations of each distinct word are drawn once; a word in the text then takes any of them.
    """

    def __init__(
        self, tokenizer: Tokenizer, texts: list[str], copies: list[int], p: float, seed: int
    ) -> None:
        self.end = int(tokenizer.token_to_id(END))
        self.copies = copies
        split = tokenizer.pre_tokenizer.pre_tokenize_str
        index: dict[str, int] = {}
        self.documents = [
            np.array([index.setdefault(w, len(index)) for w, _ in split(t)], np.int64)
            for t in texts
        ]
        vocab = tokenizer.get_vocab()
        model = json.loads(tokenizer.to_str())["model"]
        ranks = {tuple(pair): i for i, pair in enumerate(model["merges"])}
        rng = np.random.default_rng([seed, 1])
        choices = CHOICES if p > 0 else 0
        self.spellings = [
            [[vocab[s] for s in merge(list(w), ranks, 0.0, rng)]]
            + [[vocab[s] for s in merge(list(w), ranks, p, rng)] for _ in range(choices)]
            for w in index
        ]

    def epoch(self, rng: np.random.Generator, dropout: bool) -> Ids:
        """Return all documents in random order, each followed by the end token."""
        order = rng.permutation(np.repeat(np.arange(len(self.documents)), self.copies))
        out: list[int] = []
        for d in order:
            words = self.documents[d]
            vary = dropout and rng.random() < 0.5
            n = len(words)
            picks = rng.integers(1, CHOICES + 1, n) if vary else np.zeros(n, np.int64)
            for w, c in zip(words.tolist(), picks.tolist(), strict=True):
                out += self.spellings[w][c]
            out.append(self.end)
        return np.array(out, np.int64)


def merge(
    symbols: list[str], ranks: dict[tuple[str, str], int], p: float, rng: np.random.Generator
) -> list[str]:
    """Apply BPE merges, skipping each candidate with probability `p` at each step."""
    while len(symbols) > 1:
        found = [
            (r, i)
            for i, pair in enumerate(pairwise(symbols))
            if (r := ranks.get(pair)) is not None and (p == 0 or rng.random() >= p)
        ]
        if not found:
            break
        _, i = min(found)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    return symbols


# ---- model ------------------------------------------------------------------------------------


class Norm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        self.q_proj = nn.Linear(s.dim, s.heads * s.head_dim, bias=False)
        self.k_proj = nn.Linear(s.dim, s.kv_heads * s.head_dim, bias=False)
        self.v_proj = nn.Linear(s.dim, s.kv_heads * s.head_dim, bias=False)
        self.o_proj = nn.Linear(s.heads * s.head_dim, s.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (
            f(x).view(b, n, -1, self.s.head_dim).transpose(1, 2)
            for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        group = self.s.heads // self.s.kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        o = causal(q, k, v)
        y: Tensor = self.o_proj(o.transpose(1, 2).reshape(b, n, -1))
        return y


class Mlp(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(s.dim, s.hidden, bias=False)
        self.up_proj = nn.Linear(s.dim, s.hidden, bias=False)
        self.down_proj = nn.Linear(s.hidden, s.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class Layer(nn.Module):
    def __init__(self, s: Shape, dropout: float) -> None:
        super().__init__()
        self.input_layernorm = Norm(s.dim, s.eps)
        self.self_attn = Attention(s)
        self.post_attention_layernorm = Norm(s.dim, s.eps)
        self.mlp = Mlp(s)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.drop(self.self_attn(self.input_layernorm(x), cos, sin))
        x = x + self.drop(self.mlp(self.post_attention_layernorm(x)))
        return x


class Llama(nn.Module):
    """LlamaForCausalLM's arithmetic; `state` gives its names."""

    def __init__(self, s: Shape, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(s.vocab, s.dim)
        self.layers = nn.ModuleList(Layer(s, dropout) for _ in range(s.layers))
        self.norm = Norm(s.dim, s.eps)
        self.drop = nn.Dropout(dropout)
        frequency = s.theta ** (-torch.arange(0, s.head_dim, 2).float() / s.head_dim)
        angle = torch.outer(torch.arange(s.context).float(), frequency).repeat(1, 2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02 if p.shape[0] == s.vocab else p.shape[1] ** -0.5)
        for name, p in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                p.data *= (2 * s.layers) ** -0.5

    def forward(self, ids: Tensor) -> Tensor:
        n = ids.shape[1]
        cos, sin = self.cos[:n], self.sin[:n]
        x = self.drop(self.embed_tokens(ids))
        for layer in self.layers:
            x = layer(x, cos, sin)
        return F.linear(self.norm(x), self.embed_tokens.weight)

    def state(self) -> dict[str, Tensor]:
        return {f"model.{k}": v.detach() for k, v in self.state_dict().items()}

    def load(self, state: dict[str, Tensor]) -> None:
        self.load_state_dict({k.removeprefix("model."): v.float() for k, v in state.items()})


def causal(q: Tensor, k: Tensor, v: Tensor, rows: int = 128) -> Tensor:
    """Attention by strips of query rows: on CPUs faster than the fused kernel at this size."""
    out, n = [], q.shape[2]
    q = q * q.shape[-1] ** -0.5
    for i in range(0, n, rows):
        end = min(i + rows, n)
        scores = q[:, :, i:end] @ k[:, :, :end].transpose(-1, -2)
        ahead = torch.ones(end - i, end, dtype=torch.bool).triu(i + 1)
        out.append(scores.masked_fill(ahead, -torch.inf).softmax(-1).to(v.dtype) @ v[:, :, :end])
    return torch.cat(out, 2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return (x * cos + torch.cat((-b, a), -1) * sin).to(x.dtype)


# ---- training ---------------------------------------------------------------------------------


def train(s: Shape, r: Recipe, text: dict[str, str], tokenizer: Tokenizer, a: Any) -> Llama:
    torch.manual_seed(r.seed)
    model = Llama(s, r.dropout)
    inner = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    outer = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(
            inner, lr=r.muon_lr, weight_decay=r.decay, momentum=0.95, adjust_lr_fn="original"
        ),
        torch.optim.AdamW(outer, lr=r.adam_lr, betas=(0.9, 0.95), weight_decay=r.decay),
    ]
    bases = [o.param_groups[0]["lr"] for o in optimizers]
    copies = [r.topic_copies if n.startswith("topic:") else 1 for n in text]
    speller = Speller(tokenizer, list(text.values()), copies, r.bpe_dropout, r.seed)
    rng = np.random.default_rng([r.seed, 2])
    plain = speller.epoch(np.random.default_rng(0), dropout=False)
    print(f"{len(plain)} training tokens an epoch, {len(speller.spellings)} distinct words")
    held_out = blocks(tokenizer, corpus.evaluation_text(), s.context)

    def forward(ids: Tensor, want: Tensor) -> Tensor:
        return F.cross_entropy(model(ids).float().flatten(0, 1), want.flatten())

    run = torch.compile(forward) if a.compile else forward

    checkpoint = Path(a.work) / "checkpoint.pt"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    step, queue = 0, np.empty(0, np.int64)
    if a.resume and checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=False)
        model.load_state_dict(saved["model"])
        for o, state in zip(optimizers, saved["optimizers"], strict=True):
            o.load_state_dict(state)
        step, queue, rng.bit_generator.state = saved["step"], saved["queue"], saved["rng"]
        torch.set_rng_state(saved["torch"])

    start, first = time.monotonic(), step
    total, losses = r.steps, []
    need = r.batch * s.context
    while step < total:
        if step - first == 10:
            since = time.monotonic()  # compiled by now
        if a.minutes and step - first == 70:  # settle the length from the speed seen
            pace = (time.monotonic() - since) / 60
            total = min(total, int(step + (a.minutes * 60 - time.monotonic() + start) / pace))
            print(f"{pace:.3f} s a step, {total} steps")
        while len(queue) < need + 1:
            epoch = speller.epoch(rng, dropout=r.bpe_dropout > 0 and step < 0.8 * total)
            queue = np.concatenate([queue, epoch[rng.integers(s.context) :]])
        chunk, queue = torch.from_numpy(queue[: need + 1]), queue[need:]
        ids, want = chunk[:-1].view(r.batch, -1), chunk[1:].view(r.batch, -1)
        done = step / total
        scale = min(1.0, (step + 1) / r.warmup, (1 - done) / r.cooldown)
        for o, base in zip(optimizers, bases, strict=True):
            o.param_groups[0]["lr"] = base * scale
        with torch.autocast("cpu", torch.bfloat16):
            loss = run(ids, want)
        for o in optimizers:
            o.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o in optimizers:
            o.step()
        losses.append(loss.item())
        step += 1
        if step % 250 == 0 or step == total:
            elapsed = time.monotonic() - start
            print(
                f"step {step} train {np.mean(losses[-250:]):.4f} "
                f"held-out {model_loss(model, held_out):.4f} {elapsed:.0f} s",
                flush=True,
            )
            saved = {
                "model": model.state_dict(),
                "optimizers": [o.state_dict() for o in optimizers],
                "step": step,
                "rng": rng.bit_generator.state,
                "queue": queue,
                "torch": torch.get_rng_state(),
            }
            torch.save(saved, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
    print(f"trained in {time.monotonic() - start:.0f} s")
    return model


def store(out: Path, s: Shape, model: Llama, tokenizer: Tokenizer) -> None:
    """Write the three files of a Hugging Face folder."""
    out.mkdir(parents=True, exist_ok=True)
    end = tokenizer.token_to_id(END)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": s.vocab,
        "hidden_size": s.dim,
        "intermediate_size": s.hidden,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads,
        "head_dim": s.head_dim,
        "max_position_embeddings": s.context,
        "hidden_act": "silu",
        "rms_norm_eps": s.eps,
        "rope_theta": s.theta,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": end,
        "eos_token_id": end,
        "torch_dtype": "float16",
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    state = {k: v.half().contiguous() for k, v in model.state().items()}
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "model.safetensors").chmod(0o644)


# ---- figures ----------------------------------------------------------------------------------


def blocks(tokenizer: Tokenizer, text: str, context: int) -> Ids:
    """Cut the text's tokens into whole blocks; the rest is dropped."""
    ids = np.array(tokenizer.encode(text).ids, np.int64)
    return ids[: len(ids) // context * context].reshape(-1, context)


@torch.inference_mode()
def model_loss(model: Llama, held_out: Ids) -> float:
    """Mean nats of each block's tokens but the first, given the block's earlier tokens."""
    model.eval()
    losses = []
    for part in np.array_split(held_out, max(1, len(held_out) // 16)):
        ids = torch.from_numpy(part)
        logits = model(ids[:, :-1])
        losses.append(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"))
    model.train()
    return float(torch.cat(losses).mean())


class Bigram:
    """p(w | v) = l(v) c(v w) / c(v) + (1 - l(v)) p(w), with p(w) = m c(w) / n + (1 - m) / vocab.

    l depends on v by the power of two below c(v); `fit` finds all weights by maximum likelihood
    (expectation maximisation) on text that was not counted.
    """

    def __init__(self, vocab: int) -> None:
        self.vocab = vocab
        self.weights = np.full(32, 0.5)
        self.unigram_weight = 0.99

    def count(self, ids: Ids) -> None:
        self.pairs = np.bincount(ids[:-1] * self.vocab + ids[1:], minlength=self.vocab**2)
        self.pairs = self.pairs.reshape(self.vocab, self.vocab)
        self.firsts = self.pairs.sum(1)
        self.uni = np.bincount(ids, minlength=self.vocab) / len(ids)

    def parts(self, before: Ids, after: Ids) -> tuple[Any, Any, Any]:
        n = self.firsts[before]
        bucket = np.frexp(n)[1]
        bi = self.pairs[before, after] / np.maximum(n, 1)
        return bi, self.uni[after], np.minimum(bucket, 31)

    def fit(self, ids: Ids) -> None:
        bi, uni, bucket = self.parts(ids[:-1], ids[1:])
        for _ in range(200):
            low = self.unigram_weight * uni + (1 - self.unigram_weight) / self.vocab
            w = self.weights[bucket]
            share = w * bi / (w * bi + (1 - w) * low)
            total = np.bincount(bucket, minlength=32)
            self.weights = np.bincount(bucket, share, 32) / np.maximum(total, 1)
            to_uni = (1 - share) * self.unigram_weight * uni / low
            self.unigram_weight = float(to_uni.sum() / (1 - share).sum())

    def loss(self, held_out: Ids) -> float:
        bi, uni, bucket = self.parts(held_out[:, :-1].ravel(), held_out[:, 1:].ravel())
        low = self.unigram_weight * uni + (1 - self.unigram_weight) / self.vocab
        w = self.weights[bucket]
        return float(-np.log(w * bi + (1 - w) * low).mean())


def bigram_loss(
    tokenizer: Tokenizer, texts: list[str], held_out: Ids, vocab: int
) -> tuple[float, Bigram]:
    """Weights are fitted on every tenth document, counts then taken from all of them."""
    end = tokenizer.token_to_id(END)
    ids = [np.array([*tokenizer.encode(t).ids, end], np.int64) for t in texts]
    bigram = Bigram(vocab)
    bigram.count(np.concatenate([x for i, x in enumerate(ids) if i % 10]))
    bigram.fit(np.concatenate(ids[::10]))
    bigram.count(np.concatenate(ids))
    return bigram.loss(held_out), bigram


@torch.inference_mode()
def sample(model: Llama, end: int, count: int, length: int, temperature: float, seed: int) -> Ids:
    """Draw `count` texts, each begun by the end token, which is then never drawn again."""
    generator = torch.Generator().manual_seed(seed)
    model.eval()
    ids = torch.full((count, 1), end)
    for _ in range(length):
        logits = model(ids)[:, -1] / temperature
        logits[:, end] = -torch.inf
        ids = torch.cat((ids, torch.multinomial(logits.softmax(-1), 1, generator=generator)), 1)
    out: Ids = ids[:, 1:].numpy()
    return out


def known_words(
    model: Llama, tokenizer: Tokenizer, texts: list[str], seeds: int = 5
) -> tuple[float, int, str]:
    """Share of generated words that occur in the training text: 20 texts of 200 tokens a seed.

    A word is a run of A-Z and a-z. A text's last word is left out where the text ends in it.
    """
    known = {w for t in texts for w in WORD.findall(t)}
    words: Counter[bool] = Counter()
    first = ""
    for seed in range(seeds):
        for row in sample(model, tokenizer.token_to_id(END), 20, 200, 0.7, seed):
            text = tokenizer.decode(row.tolist())
            first = first or text
            words.update(m.group() in known for m in WORD.finditer(text) if m.end() < len(text))
    return words[True] / words.total(), words.total(), first


def evaluate(folder: Path, text: dict[str, str]) -> None:
    """Print the figures of a stored model, its float16 weights widened to float32."""
    c = json.loads((folder / "config.json").read_text())
    s = Shape(
        c["vocab_size"], c["hidden_size"], c["num_hidden_layers"], c["num_attention_heads"],
        c["num_key_value_heads"], c["intermediate_size"], c["max_position_embeddings"],
    )  # fmt: skip
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = Llama(s)
    model.load(load_file(folder / "model.safetensors"))
    held_out = blocks(tokenizer, corpus.evaluation_text(), s.context)
    texts = list(text.values())
    ours = model_loss(model, held_out)
    theirs, bigram = bigram_loss(tokenizer, texts, held_out, s.vocab)
    share, count, first = known_words(model, tokenizer, texts)
    print(f"parameters {sum(p.numel() for p in model.parameters())}")
    print(f"training text  {corpus.text_hash(corpus.training_text())}")
    print(f"held-out text  {corpus.text_hash(corpus.evaluation_text())}, {held_out.size} tokens")
    print(f"held-out loss  {ours:.4f} nats a token; bigram {theirs:.4f}; gain {theirs - ours:.4f}")
    weights = " ".join(f"{w:.2f}" for w in bigram.weights[1:18])
    print(f"bigram weights {weights}, unigram {bigram.unigram_weight:.4f}")
    print(f"known words    {100 * share:.2f} % of {count}")
    print(f"--- the first sample ---\n{first}")


def main() -> None:
    defaults = {**asdict(Shape()), **asdict(Recipe())}
    parser = argparse.ArgumentParser(description="Train the default model.")
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--minutes", type=float, default=0, help="fewer steps, to fit this time")
    parser.add_argument("--out", type=Path, default=HERE / "tiny")
    parser.add_argument("--work", type=Path, default=Path("train_tiny.work"))
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    parser.add_argument("--evaluate", action="store_true", help="train nothing")
    parser.add_argument("--threads", type=int, default=2)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    text = dict(corpus.training_documents())
    if not a.evaluate:
        s = Shape(**{k: getattr(a, k) for k in asdict(Shape())})
        r = Recipe(**{k: getattr(a, k) for k in asdict(Recipe())})
        tokenizer = train_tokenizer(list(text.values()), s.vocab)
        store(a.out, s, train(s, r, text, tokenizer, a), tokenizer)
    evaluate(a.out, text)


if __name__ == "__main__":
    main()
