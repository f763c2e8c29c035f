"""The main job: what happens when a checkpoint's attention is replaced."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparseattn.errors import SparseAttnError, door
from sparseattn.evaluation.cost import (
    LENGTHS,
    PEAK_LENGTH,
    LengthTiming,
    Timer,
    head_shape,
    peak_bytes,
)
from sparseattn.evaluation.job import (
    checked_int,
    checked_numbers,
    load_model,
    output_folder,
    prepare,
)
from sparseattn.evaluation.report import Comparison, build_report
from sparseattn.evaluation.results import Records
from sparseattn.evaluation.rows import DENSE, given_rows, matched_rows, parse_attention
from sparseattn.evaluation.tasks import TASKS
from sparseattn.evaluation.token_cost import DECODE_SHARE, DecodeTimer, decode_lengths
from sparseattn.evaluation.trust import missing_packages, reference_difference
from sparseattn.progress import Bar
from sparseattn.progress import progress as open_progress
from sparseattn.variants import Variant

__all__ = ["Comparison", "CompareJob", "compare"]

DEFAULT = ("dense", "window:64", "topk:16")
BOTH_WAYS = ("dense", "window:window_size=32/32", "topk:16")  # the default of an encoder
REFERENCE_TOKENS = 128
LENGTH, DECODE = "length", "decode"  # what records of timing begin with


@dataclass(frozen=True)
class Options:
    """What a comparison is asked for, beside model and text."""

    attention: Any = DEFAULT
    tokens: int | None = 20_000
    seeds: int = 1
    lengths: Sequence[int] = LENGTHS
    save: str | os.PathLike[str] | None = None
    context: int | None = None
    stride: int | None = None
    budgets: float | Sequence[float] = ()
    max_kl: float = 0.01
    time_budget: float = 30.0
    seed: int = 0
    random_weights: int | None = None
    tokenizer: str | os.PathLike[str] | None = None
    progress: bool | None = None


@door
def compare(
    model: Any = None,
    text: Any = None,
    attention: str | Variant | Iterable[str | Variant] = DEFAULT,
    tokens: int | None = 20_000,
    seeds: int = 1,
    lengths: Sequence[int] = LENGTHS,
    save: str | os.PathLike[str] | None = None,
    *,
    context: int | None = None,
    stride: int | None = None,
    budgets: float | Sequence[float] = (),
    max_kl: float = 0.01,
    time_budget: float = 30.0,
    seed: int = 0,
    random_weights: int | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> Comparison:
    """Compare attention variants on a checkpoint: quality, cost and memory, a row a variant.

    Parameters
    ----------
    model : path, Model, transformers model or None
        A Hugging Face folder, a loaded model, or None for the embedded one. An encoder is scored by
        the loss of masked tokens, or without a head for it by its embeddings' cosine to dense's.
    text : path, str, sequence of int or None
        A UTF-8 file, the text itself (if it holds a line break), token ids, or None for the
        default text.
    attention : spec or sequence of specs
        Dense is always among the rows: all others are compared with it. An encoder's default window
        is of 32 keys on either side.
    tokens : int or None
        At most so many tokens of the text; None takes all.
    seeds : int
        Seeds that specs with randomness run with.
    lengths : sequence of int
        Sequence lengths at which attention alone is timed, and from 1,024 on, cache lengths at
        which a token is.
    save : path, optional
        A folder for compare.csv, compare.json and the plots. An interrupted run goes on there.
    context, stride : int, optional
        Tokens of a block, and from block to block: the model's context up to 1,024, no overlap.
    budgets : float or sequence of float
        Adds rows that keep these shares of the visible pairs, and their two bounds.
    max_kl : float
        In nats per token: what the recommended spec may differ from dense; of embeddings, by how
        much their cosine may fall below 1.
    time_budget : float
        Seconds for all timing; 0 leaves the timing out.
    seed : int
        Of bootstrap draws, timed inputs and specs with randomness.
    random_weights : int, optional
        Draw the parameters from this seed; the folder needs a config.json only.
    tokenizer : path, optional
        A folder or tokenizer.json instead of the model folder's own.
    progress : bool, optional
        None shows a bar on a terminal and in a notebook.

    Returns
    -------
    Comparison
        Prints as a table; `to_dict`, `to_pandas`, `plot`. Losses and KL in nats per token.

    Raises
    ------
    ArgumentError, FileError
        Before anything is computed: see the message.

    Examples
    --------
    >>> import sparseattn as sa
    >>> result = sa.compare(attention="window:32", tokens=2000, time_budget=0)
    >>> [row["variant"] for row in result.to_dict()["rows"]]
    ['dense', 'window:32']
    """
    options = Options(
        attention=attention,
        tokens=tokens,
        seeds=seeds,
        lengths=lengths,
        save=save,
        context=context,
        stride=stride,
        budgets=budgets,
        max_kl=max_kl,
        time_budget=time_budget,
        seed=seed,
        random_weights=random_weights,
        tokenizer=tokenizer,
        progress=progress,
    )
    with CompareJob(model, text, options) as job:
        job.run()
        return job.result()


class CompareJob:
    """A comparison that can be stopped: `result` holds the rows finished so far.

    Leaving the ``with`` block by an exception writes them to the output folder as well.
    """

    def __init__(self, model: Any, text: Any, options: Options) -> None:
        self.options = options
        self.given_model = model is not None and not isinstance(model, str | os.PathLike)
        specs = parse_attention(options.attention)
        budgets = checked_numbers("budgets", options.budgets)
        self.lengths = check_lengths(options.lengths)
        self.seeds = checked_int("seeds", options.seeds, 1, 1000)
        (self.budget,) = checked_numbers("time_budget", options.time_budget)
        (self.max_kl,) = checked_numbers("max_kl", options.max_kl)
        folder = output_folder(options.save)
        self.job = prepare(
            model,
            text,
            specs,
            tokens=options.tokens,
            context=options.context,
            stride=options.stride,
            seed=options.seed,
            random_weights=options.random_weights,
            tokenizer=options.tokenizer,
            progress=options.progress,
            both_ways=parse_attention(BOTH_WAYS) if options.attention is DEFAULT else None,
        )
        specs, self.task = list(self.job.specs), TASKS[self.job.task]
        self.causal = self.job.task == "next"
        matched = matched_rows(specs, budgets, self.job.context, self.causal)
        self.rows = [*given_rows(specs), *matched]
        self.shape = head_shape(self.job.model.config)
        self.timed = self.budget > 0 and len(self.lengths) > 0
        self.peak_length = min(PEAK_LENGTH, max(self.lengths, default=PEAK_LENGTH))
        settings = {
            "attention": [row.name for row in self.rows],
            "budgets": list(budgets),
            "seeds": self.seeds,
            "lengths": list(self.lengths),
            "time_budget": self.budget,
        }
        self.job.open(folder, "compare", settings)

    def __enter__(self) -> CompareJob:
        return self

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        try:
            if kind is not None:
                self.write()
        finally:
            self.job.records.close()

    def run(self) -> None:
        """Do what has no record yet, and write the files."""
        for row in self.rows:
            self.job.score(row.spec, self.seeds)
        self._reference()
        if self.timed:
            self._peaks()
            self._time()
        if self.job.records.get("done") is None:
            self.job.records.add("done", {})
        self.write(plots=True)

    def result(self) -> Comparison:
        """Return what is finished."""
        setup = {
            "budget": self.budget,
            "causal": self.causal,
            **asdict(self.shape),
            "peak_length": self.peak_length,
        }
        data = build_report(
            self.job,
            self.rows,
            {"lengths": self.timings(), "decode": self.timings(DECODE)},
            seeds=self.seeds,
            max_kl=self.max_kl,
            setup=setup if self.timed else None,
        )
        asked = {**asdict(self.options), "lengths": self.lengths}
        asked["attention"] = [row.name for row in self.rows if row.budget is None]
        data["arguments"] = {name: plain(value) for name, value in asked.items()}
        return Comparison(data)

    def write(self, plots: bool = False) -> None:
        """Write compare.csv and compare.json, and the plots where matplotlib is."""
        records = self.job.records
        if records.folder is None:
            return
        result = self.result()
        if not result.rows:
            return
        records.write(".csv", result.to_csv())
        records.write(".json", result.to_json())
        if plots:
            save_plots(result, records)

    def timed_specs(self) -> dict[str, Variant]:
        """Return what is timed: all but the bounds, which only say how good a row could be."""
        return {r.name: r.spec for r in self.rows if r.role != "bound"}

    def timings(self, key: str = LENGTH) -> list[LengthTiming]:
        """Return the lengths measured so far, of sequences or of caches."""
        found = (self.job.records.get(f"{key}|{n}") for n in self.lengths)
        return [LengthTiming(**{k: v for k, v in r.items() if k != "id"}) for r in found if r]

    def _reference(self) -> None:
        """Compare dense logits with those of transformers, where that is installed."""
        job = self.job
        if job.records.get("reference") is not None:
            return
        ids = job.text.ids[: min(job.context, REFERENCE_TOKENS)]
        ours = job.model.hidden(ids[None], attention=DENSE)[0]
        if self.task.compared == "logit":
            ours = job.model.head(ours)
        found = reference_difference(self._checkpoint(), ids, ours, self.task.reference)
        job.records.add("reference", found)

    def _checkpoint(self) -> Path | None:
        """Return the folder that holds the very parameters that are compared, if one does."""
        folder: Path | None = getattr(self.job.model, "folder", None)
        if folder is None or self.options.random_weights is not None:
            return None
        if self.given_model and not missing_packages():
            stored, _ = load_model(folder, None, None)
            return folder if stored.fingerprint == self.job.model.fingerprint else None
        return folder

    def _peaks(self) -> None:
        for name, spec in self.timed_specs().items():
            key = f"peak|{name}"
            if self.job.records.get(key) is not None:
                continue
            record: dict[str, Any] = {}
            try:
                record["bytes"] = peak_bytes(
                    spec, self.shape, self.peak_length, self.job.seed, self.causal
                )
            except SparseAttnError as error:
                record["reason"] = str(error)
            self.job.records.add(key, record)

    def _time(self) -> None:
        """Time decoding, then whole sequences with what it leaves of the budget."""
        with open_progress(self.budget, "timing", "s", self.options.progress) as bar:
            if self.causal:
                self._run(DecodeTimer, DECODE, self.budget * DECODE_SHARE, bar)
            spent = sum(timing.spent for timing in self.timings(DECODE))
            self._run(Timer, LENGTH, self.budget - spent, bar)

    def _run(self, kind: type[Timer], key: str, budget: float, bar: Bar) -> None:
        timer = kind(
            self.timed_specs(),
            self.shape,
            decode_lengths(self.lengths) if key == DECODE else self.lengths,
            budget,
            seed=self.job.seed,
            done=self.timings(key),
            causal=self.causal,
        )
        for timing in timer.run():
            self.job.records.add(f"{key}|{timing.length}", timing.to_dict())
            bar.update(timing.spent)


def check_lengths(lengths: Iterable[int]) -> tuple[int, ...]:
    """Return the lengths in ascending order, each once."""
    items = [lengths] if isinstance(lengths, int) else lengths
    return tuple(sorted({checked_int("lengths", n, 16, 1 << 24) for n in items}))


def plain(value: Any) -> Any:
    """Return an argument as JSON has it."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


def save_plots(result: Comparison, records: Records) -> None:
    """Write the plots as SVG; without the plot extra, none."""
    from sparseattn import plots

    if not plots.available():
        return
    records.write(".svg", plots.to_svg(plots.quality_cost(result.data)))
    times = plots.time_ratio(result.data)
    if times is not None:
        records.write("-time.svg", plots.to_svg(times))
