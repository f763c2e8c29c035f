"""From finished records to the result of a comparison: plain data, table, CSV, HTML, plot."""

from __future__ import annotations

import hashlib
import html
import importlib
import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sparseattn import plots
from sparseattn.errors import NotSupported
from sparseattn.evaluation.cost import LengthTiming, wins_from
from sparseattn.evaluation.job import Job
from sparseattn.evaluation.rows import DENSE, Row
from sparseattn.evaluation.scores import BlockScore
from sparseattn.evaluation.stats import DRAWS, Interval, bootstrap_mean
from sparseattn.evaluation.table import (
    Column,
    Table,
    lengths_word,
    number,
    percent,
    to_csv,
    with_interval,
)
from sparseattn.evaluation.tasks import TASKS, Task, distance
from sparseattn.evaluation.token_cost import TOKENS

__all__ = ["Comparison", "build_report"]

DENSE_NAME = str(DENSE)
FLAT = {  # what a row holds by length, and the names of its plain columns
    "time": ("seconds", "time_ratio"),
    "decode": ("decode_seconds", "decode_ratio"),
}
BUDGET = "time budget"  # in every reason that more of it would remove


class Comparison:
    """The result of a comparison.

    Attributes
    ----------
    data : dict
        Everything, as plain values; what compare.json holds.
    """

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One dict a variant; intervals are ``[value, low, high]``."""
        rows: list[dict[str, Any]] = self.data["rows"]
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        copied: dict[str, Any] = json.loads(self.to_json())
        return copied

    def to_json(self) -> str:
        """Return everything as JSON, one value a line where it nests."""
        return json.dumps(self.data, indent=1, allow_nan=False, ensure_ascii=False) + "\n"

    def to_csv(self) -> str:
        """Return one line a variant."""
        return to_csv([flat(row) for row in self.rows])

    def to_pandas(self) -> Any:
        """Return one line a variant as a pandas DataFrame; needs the ``plot`` extra."""
        pandas = optional("pandas")
        return pandas.DataFrame([flat(row) for row in self.rows])

    def plot(self) -> Any:
        """Return quality against cost as a matplotlib Figure; needs the ``plot`` extra."""
        optional("matplotlib")
        return plots.quality_cost(self.data)

    def text(self, width: int = 120) -> str:
        """Return the table with its legend, the trust line and the act line."""
        if not self.rows:
            return "\n".join([*heading(self.data), "no row is finished yet"])
        act = self.data["act"]
        ends = [*trust_lines(self.data), f"act    {act['text']}"]
        if act["spec"]:
            ends.append(f"       {act['code']}")
        parts = [
            heading(self.data),
            [self._table().text(width)],
            [folded(line, "  ", width) for line in legend(self.data)],
            [folded(line, " " * 7, width) for line in ends],
        ]
        return "\n\n".join("\n".join(part) for part in parts)

    def __repr__(self) -> str:
        return self.text()

    def _repr_html_(self) -> str:
        lines = [*legend(self.data), *trust_lines(self.data), f"act  {self.data['act']['text']}"]
        notes = "<br>".join(html.escape(line) for line in lines)
        title = html.escape(" · ".join(heading(self.data)))
        table = self._table().html() if self.rows else ""
        return f"<p>{title}</p>{table}<p><small>{notes}</small></p>"

    def _table(self) -> Table:
        return Table(Column("variant", [row["variant"] for row in self.rows]), columns(self.data))


def optional(name: str) -> Any:
    """Return a module of the ``plot`` extra."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise NotSupported(f"{name} is not installed: run pip install 'sparseattn[plot]'") from None


# ---- data --------------------------------------------------------------------------------------


def build_report(
    job: Job,
    rows: Sequence[Row],
    timings: Mapping[str, Sequence[LengthTiming]],
    *,
    seeds: int,
    max_kl: float,
    setup: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return what is finished as plain data.

    Parameters
    ----------
    rows : sequence of Row
        All rows asked for; those without all their blocks are named as unfinished.
    timings : mapping to sequences of LengthTiming
        ``lengths``: of whole sequences; ``decode``: of a token on a cache.
    setup : mapping or None
        What timing was asked for: ``budget``, ``heads``, ``dim``, ``peak_length``.
    """
    dense = job.scores(DENSE, seeds)
    finished = []
    for row in rows:
        scores = job.scores(row.spec, seeds)
        if scores is not None and dense is not None:
            finished.append(row_data(job, row, scores, dense[0], timings))
    names = [row["variant"] for row in finished]
    data = {
        "format": 1,
        "complete": job.records.get("done") is not None,
        "evaluation": {**job.describe(), "seeds": seeds, "seed": job.seed, "draws": DRAWS},
        "environment": job.environment,
        "settings": job.records.settings,
        "unfinished": [row.name for row in rows if row.name not in names],
        "rows": finished,
        "timing": None
        if setup is None
        else {**setup, **{kind: timing_data(found) for kind, found in timings.items()}},
        "trust": {
            "dense_checksum": checksum(dense[0]) if dense else None,
            "reference": without_id(job.records.get("reference")),
        },
    }
    data["act"] = advice(finished, max_kl, TASKS[job.task])
    return data


def row_data(
    job: Job,
    row: Row,
    scores: list[list[BlockScore]],
    dense: list[BlockScore],
    timings: Mapping[str, Sequence[LengthTiming]],
) -> dict[str, Any]:
    """Return one row; `scores` holds a list of blocks for each seed."""
    quality = embedding_data if job.task == "embedding" else loss_data
    counts = {name: sum(s.counts[name] for b in scores for s in b) for name in scores[0][0].counts}
    rates = [score.tokens / score.seconds for blocks in scores for score in blocks]
    return {
        "variant": row.name,
        "role": row.role,
        "budget": row.budget,
        "bound": row.bound,
        "seeds": len(scores),
        **quality(scores, dense, row.spec == DENSE, job.seed),
        "kept": counts["kept"] / counts["visible"],
        "k_rows": counts["k_rows"] / counts["visible_rows"],
        "v_rows": counts["v_rows"] / counts["visible_rows"],
        "tokens_per_second": float(np.median(rates)),
        **time_data(job, row, timings),
    }


def loss_data(
    scores: list[list[BlockScore]], dense: list[BlockScore], is_dense: bool, seed: int
) -> dict[str, Any]:
    """Return the columns of losses, of the next token or of masked ones."""

    def table(name: str, of: Sequence[Sequence[BlockScore]] = scores) -> Any:
        return np.array([[getattr(score, name) for score in blocks] for blocks in of], dtype=float)

    def mean(sums: Any, weights: str) -> list[float | None]:
        return plain(bootstrap_mean(sums, table(weights, [dense])[0], seed=seed))

    nll = mean(table("nll"), "targets")
    return {
        "nll": nll,
        "perplexity": math.exp(min(nll[0] or 0.0, 700.0)),
        "dnll": [0.0] * 3 if is_dense else mean(table("nll") - table("nll", [dense]), "targets"),
        "dnll_tail": [0.0] * 3
        if is_dense
        else mean(table("nll_tail") - table("nll_tail", [dense]), "tail"),
        "kl": [0.0] * 3 if is_dense else mean(table("kl"), "targets"),
        "top1": [1.0] * 3 if is_dense else mean(table("agree"), "targets"),
    }


def embedding_data(
    scores: list[list[BlockScore]], dense: list[BlockScore], is_dense: bool, seed: int
) -> dict[str, Any]:
    """Return the columns of embeddings: cosines to dense's."""
    if is_dense:
        return {"cosine": [1.0] * 3, "distance": [0.0] * 3, "cosine_tokens": [1.0] * 3}

    def mean(name: str, weights: str) -> list[float | None]:
        sums = [[getattr(score, name) for score in blocks] for blocks in scores]
        return plain(bootstrap_mean(sums, [getattr(s, weights) for s in dense], seed=seed))

    cosine = mean("cosine", "targets")
    value, low, high = (None if x is None else 1.0 - x for x in cosine)
    return {
        "cosine": cosine,
        "distance": [value, high, low],
        "cosine_tokens": mean("cosine_tokens", "tokens"),
    }


def time_data(job: Job, row: Row, timings: Mapping[str, Sequence[LengthTiming]]) -> dict[str, Any]:
    """Return the timed columns of one row."""
    peak = job.records.get(f"peak|{row.name}") or {}
    whole = timings["lengths"]
    return {
        "time": length_data(job, row, whole, 1),
        "wins_from": wins_from(whole, row.name, DENSE_NAME, job.seed),
        "measured_to": max((t.length for t in whole if row.name in t.seconds), default=None),
        "decode": length_data(job, row, timings["decode"], TOKENS),
        "peak_bytes": peak.get("bytes"),
    }


def length_data(
    job: Job, row: Row, timings: Sequence[LengthTiming], parts: int
) -> dict[str, dict[str, Any]]:
    """Return seconds, of one of so many parts of a call, and ratio to dense by length."""
    times: dict[str, dict[str, Any]] = {}
    for timing in timings:
        seconds = timing.seconds.get(row.name)
        if seconds is None:
            reason = timing.left_out.get(row.name)
            if reason:
                times[str(timing.length)] = {"left_out": reason}
            continue
        ratio = timing.ratio(row.name, DENSE_NAME, job.seed)
        times[str(timing.length)] = {
            "seconds": float(np.median(seconds)) / parts,
            "ratio": plain(ratio) if ratio else None,
        }
    return times


def timing_data(timings: Sequence[LengthTiming]) -> list[dict[str, Any]]:
    """Return how each length was measured."""
    return [
        {
            "length": t.length,
            "heads": t.heads,
            "kv_heads": t.kv_heads,
            "repetitions": min(map(len, t.seconds.values()), default=0),
            "left_out": t.left_out,
            "spent_seconds": t.spent,
        }
        for t in timings
    ]


def advice(rows: Sequence[dict[str, Any]], max_kl: float, task: Task) -> dict[str, Any]:
    """Return the cheapest spec whose distance to dense is at most `max_kl`, as code."""
    others = [r for r in rows if r["role"] in ("given", "matched") and r["variant"] != DENSE_NAME]
    good = [r for r in others if (distance(r)[0] or 0.0) <= max_kl]
    within = task.near.format(max_kl, 1 - max_kl)
    if not others:
        return {"max_kl": max_kl, "spec": None, "text": "nothing to choose: only dense is finished"}
    if not good:
        near = min(others, key=lambda r: distance(r)[0] or 0.0)
        text = (
            f"no spec here has {within}; {near['variant']} comes nearest with "
            f"{number(near[task.shown][0])}: try larger ones, or a higher --max-kl"
        )
        return {"max_kl": max_kl, "spec": None, "text": text}
    length = min((r["measured_to"] or 0 for r in good), default=0)
    best = min(good, key=lambda r: (ratio_at(r, length) or math.inf, r["k_rows"] + r["v_rows"]))
    code = task.call.format(best["variant"])
    ratio = ratio_at(best, length)
    cost = f"keeps {percent(best['kept'])} %"
    if ratio is not None:
        cost = f"takes {number(ratio)} of dense's attention time at N = {lengths_word(length)}"
    slow = "" if best["wins_from"] or ratio is None else " (so dense is the better choice here)"
    text = f"{within}, cheapest: {best['variant']} {cost}{slow}"
    return {"max_kl": max_kl, "spec": best["variant"], "code": code, "text": text}


def ratio_at(row: dict[str, Any], length: int) -> float | None:
    """Return a row's time over dense's at a length, if it was measured."""
    ratio = row["time"].get(str(length), {}).get("ratio")
    return float(ratio[0]) if ratio else None


def checksum(scores: Sequence[BlockScore]) -> str:
    """Return one digest over the blocks' digests of dense losses."""
    return hashlib.sha256("".join(score.sha256 for score in scores).encode()).hexdigest()


def plain(interval: Interval) -> list[float | None]:
    """Return value, low, high; None where there is no number."""
    return [None if math.isnan(x) else float(x) for x in interval]


def interval(values: Sequence[float | None]) -> Interval:
    """Return what `plain` wrote."""
    return Interval(*(math.nan if x is None else x for x in values))


def without_id(record: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return a record without what the file adds to it."""
    return None if record is None else {k: v for k, v in record.items() if k != "id"}


def flat(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with one plain value a column."""
    out: dict[str, Any] = {}
    for name, value in row.items():
        if name in FLAT:
            seconds, ratios = FLAT[name]
            for length, cell in value.items():
                ratio = cell.get("ratio") or [None] * 3
                out[f"{seconds}_{length}"] = cell.get("seconds")
                for part, x in zip(("", "_low", "_high"), ratio, strict=True):
                    out[f"{ratios}_{length}{part}"] = x
        elif isinstance(value, list):
            for part, x in zip(("", "_low", "_high"), value, strict=True):
                out[f"{name}{part}"] = x
        else:
            out[name] = value
    return out


# ---- words -------------------------------------------------------------------------------------


def heading(data: dict[str, Any]) -> list[str]:
    """Return what was compared on what."""
    e = data["evaluation"]
    heads = f"{e['heads']} heads"
    if e["kv_heads"] != e["heads"]:
        heads += f" over {e['kv_heads']}"
    documents = f" of {e['documents']:,} documents" if e["documents"] > 1 else ""
    return [
        f"{e['model']} ({e['family']}, {e['layers']} layers, {heads} of {e['head_dim']}) "
        f"on {e['text']}",
        f"{e['predictions']:,} {task_in(data).counted} in {e['blocks']} blocks of {e['context']}, "
        f"stride {e['stride']}{documents}",
    ]


def task_in(data: Mapping[str, Any]) -> Task:
    """Return the task of a comparison; files of before there were several have none."""
    return TASKS[data["evaluation"].get("task", "next")]


def columns(data: dict[str, Any]) -> list[Column]:
    """Return all columns but the first."""
    rows, task = data["rows"], task_in(data)
    found = []
    if any(row["budget"] for row in rows):
        found.append(Column("budget", [budget_word(row) for row in rows], "quality"))

    def add(head: str, cells: list[str], group: str) -> None:
        found.append(Column(head, cells, group))

    for head, name, sign, scale in task.measures:
        cells = [with_interval(interval(r[name]), sign=sign, scale=scale) for r in rows]
        add(head, cells, "quality")
    if task.perplexity:
        add("ppl", [number(r["perplexity"], 4) for r in rows], "quality")
    for head, name in (("kept %", "kept"), ("K %", "k_rows"), ("V %", "v_rows")):
        add(head, [percent(r[name]) for r in rows], "cost")
    add("tokens/s", [number(r["tokens_per_second"]) for r in rows], "cost")
    if data["timing"]:
        peaks = [r["peak_bytes"] for r in rows]
        add("peak MiB", [number(None if p is None else p / 2**20) for p in peaks], "cost")
        add("wins from", [wins_word(r) for r in rows], "time")
        for kind, of, mark in (("lengths", "time", ""), ("decode", "decode", "@")):
            for t in data["timing"][kind]:
                if not t["heads"]:
                    continue  # all left out, which the legend says
                cells = [time_word(r, r[of].get(str(t["length"]))) for r in rows]
                add(mark + lengths_word(t["length"]), cells, of)
    return found


def folded(line: str, indent: str, width: int) -> str:
    """Return a line in several, those after the first indented."""
    return textwrap.fill(
        line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def budget_word(row: dict[str, Any]) -> str:
    """Return the share a row was matched to, and which bound it is."""
    if row["budget"] is None:
        return ""
    return f"{100 * row['budget']:g} % {row['bound']}".rstrip()


def wins_word(row: dict[str, Any]) -> str:
    """Return the length from which a row is faster than dense."""
    if row["variant"] == DENSE_NAME or row["measured_to"] is None:
        return "-"
    if row["wins_from"] is None:
        return f"not by {lengths_word(row['measured_to'])}"
    return lengths_word(row["wins_from"])


def time_word(row: dict[str, Any], cell: dict[str, Any] | None) -> str:
    """Return the ratio to dense; for dense itself, the time."""
    if not cell:
        return "-"
    if "left_out" in cell:
        return "left out"
    if row["variant"] == DENSE_NAME:
        seconds = cell["seconds"]
        return f"{number(seconds)} s" if seconds >= 1 else f"{number(seconds * 1e3)} ms"
    ratio = interval(cell["ratio"])
    if ratio.half > ratio.value / 2:  # ± would promise more symmetry than there is
        return f"{number(ratio.low, 2)}..{number(ratio.high, 2)}"
    return with_interval(ratio)


def legend(data: dict[str, Any]) -> list[str]:
    """Return what the columns mean, and what is not there."""
    e, task = data["evaluation"], task_in(data)
    seeds = f" and {e['seeds']} seeds where random" if e["seeds"] > 1 else ""
    perplexity = f"ppl: {task.perplexity}. " if task.perplexity else ""
    lines = [
        f"{task.legend} ±: half the 95 % interval, bootstrap over {e['blocks']} blocks"
        f"{seeds}, {e['draws']:,} draws.",
        f"{perplexity}kept %: of the visible query-key pairs. K %, V %: key and value rows "
        "read, of the visible ones (union over a group of query heads). tokens/s: the whole model.",
    ]
    if any(row["budget"] for row in data["rows"]):
        lines.append("budget: share to keep; floor: random keys, ceiling: best keys by true score.")
    if data["timing"]:
        lines += timing_legend(data["timing"])
    if data["unfinished"]:
        lines.append(f"not finished: {', '.join(data['unfinished'])}")
    return lines


def timing_legend(timing: dict[str, Any]) -> list[str]:
    """Return how the timed columns came about, and what was left out."""
    lengths = " ".join(lengths_word(t["length"]) for t in timing["lengths"])
    both = "causal attention" if timing.get("causal", True) else "attention both ways"
    lines = [
        f"{lengths}: time of {both} over dense's of the same run, a..b: its interval "
        f"where wide (dense: its own time). Heads of {timing['dim']}: "
        f"{heads_words(timing['lengths'])}. wins from: the "
        "length from which the whole interval stays below 1. peak: extra memory of one call at "
        f"N = {lengths_word(timing['peak_length'])}, {timing['heads']} heads.",
    ]
    if timing["decode"]:
        lengths = " ".join(f"@{lengths_word(t['length'])}" for t in timing["decode"])
        lines.append(
            f"{lengths}: the same for one token that is appended to a cache of that length and "
            f"attends to it: {heads_words(timing['decode'])}."
        )
    for kind, mark in (("lengths", ""), ("decode", "@")):
        lines += left_out_words(timing[kind], timing["budget"], mark)
    return lines


def heads_words(timings: Sequence[dict[str, Any]]) -> str:
    """Return how many heads the lengths ran on."""
    heads: list[tuple[int, int]] = []
    for t in timings:
        if t["heads"] and (not heads or heads[-1][1] != t["heads"]):
            heads.append((t["length"], t["heads"]))
    return ", ".join(f"{count} from {lengths_word(n)} on" for n, count in heads)


def left_out_words(timings: Sequence[dict[str, Any]], budget: float, mark: str) -> list[str]:
    """Return which lengths were not measured, and why."""
    beyond: dict[str, list[str]] = {}
    other: dict[str, list[str]] = {}
    for t in timings:
        word = mark + lengths_word(t["length"])
        late = [name for name, reason in t["left_out"].items() if BUDGET in reason]
        if late:
            who = ", ".join(late) if t["heads"] else "everything"
            beyond.setdefault(who, []).append(word)
        for name, reason in t["left_out"].items():
            if BUDGET not in reason:
                other.setdefault(f"{name} ({reason})", []).append(word)
    lines = [f"left out: {who} at {', '.join(lengths)}" for who, lengths in other.items()]
    if beyond:
        words = "; ".join(f"{who} at {', '.join(lengths)}" for who, lengths in beyond.items())
        lines.append(f"left out, beyond the {BUDGET} of {budget:g} s: {words}")
    return lines


def trust_lines(data: dict[str, Any]) -> list[str]:
    """Return why to believe it."""
    e, env, trust = data["evaluation"], data["environment"], data["trust"]
    reference = trust["reference"]
    if reference is None:
        against = "not compared with transformers yet"
    elif "reason" in reference:
        against = f"not compared with transformers: {reference['reason']}"
    else:
        versions = ", ".join(f"{k} {v}" for k, v in reference["versions"].items())
        against = (
            f"largest {task_in(data).compared} difference to transformers "
            f"{reference['max_difference']:.1e} over "
            f"{reference['tokens']} tokens ({versions})"
        )
    check = (trust["dense_checksum"] or "-")[:12]
    packages = ", ".join(f"{k} {v}" for k, v in env["packages"].items() if v)
    return [
        f"trust  dense: {against}; checksum {check}. text: {e['tokens']:,} tokens, sha256 "
        f"{e['text_sha256'][:12]}. sparseattn {env['sparseattn']}, Python {env['python']}, "
        f"{packages}. {env['cpu']}, {env['threads']} threads of {env['cores']} cores, "
        f"{env['isa']}, BLAS {blas_word(env['blas'])}"
    ]


def blas_word(config: str) -> str:
    """Return name and version of the BLAS."""
    return " ".join(config.split()[:2])
