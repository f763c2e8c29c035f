"""The comparison as a whole: paired figures, resuming, folders, the result object."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from conftest import requires, shared_path
from fake_lm import FakeModel, fake_ids

import sparseattn as sa
from sparseattn.evaluation import results
from sparseattn.evaluation.compare import CompareJob, Options
from sparseattn.evaluation.report import Comparison
from sparseattn.evaluation.stats import Interval, bootstrap_mean
from sparseattn.evaluation.table import Column, Table, number, percent, with_interval
from sparseattn.evaluation.trust import reference_difference

SPECS = ["dense", "window:5", "topk:4", "random:4"]


def run(model=None, **changes):
    """A comparison of the fake model, without timing unless asked for."""
    arguments = {
        "text": fake_ids(300),
        "attention": SPECS,
        "tokens": None,
        "context": 64,
        "time_budget": 0,
        **changes,
    }
    return sa.compare(model or FakeModel(), **arguments)


def losses(model, ids, spec, context=64):
    """Losses of each block, from whole logits in float64."""
    found = []
    for begin in range(0, len(ids) - 1, context):
        end = min(begin + context, len(ids) - 1)
        x = model.head(model.hidden(ids[None, begin:end], spec)[0]).astype(np.float64)
        x -= np.logaddexp.reduce(x, axis=1, keepdims=True)
        found.append(-x[np.arange(end - begin), ids[begin + 1 : end + 1]])
    return found


def row(result, name):
    return next(r for r in result.rows if r["variant"] == name)


# ---- figures -----------------------------------------------------------------------------------


def test_differences_are_paired_per_token():
    model, ids = FakeModel(), fake_ids(300)
    result = run(model)
    dense = losses(model, ids, "dense")
    for spec in ("window:5", "topk:4"):
        got = row(result, spec)
        diff = [a - b for a, b in zip(losses(model, ids, spec), dense, strict=True)]
        want = bootstrap_mean([d.sum() for d in diff], [len(d) for d in diff])
        np.testing.assert_allclose(got["dnll"], want, rtol=1e-4, atol=1e-6)
        tail = np.concatenate([d[48:] for d in diff]).mean()
        assert got["dnll_tail"][0] == pytest.approx(tail, rel=1e-4, abs=1e-6)
        assert got["nll"][0] == pytest.approx(np.concatenate(losses(model, ids, spec)).mean())
        assert got["perplexity"] == pytest.approx(math.exp(got["nll"][0]))


def test_pairing_narrows_the_interval():
    got = row(run(attention="window:50"), "window:50")

    def width(name):
        return got[name][2] - got[name][1]

    assert 0 < width("dnll") < width("nll") / 3


def test_a_variant_that_is_dense_differs_in_nothing():
    result = run(attention=["window:64", "topk:64"])
    for got in result.rows:
        np.testing.assert_allclose(got["dnll"] + got["dnll_tail"] + got["kl"], 0, atol=1e-6)
        assert got["top1"] == [1.0, 1.0, 1.0] and got["kept"] == 1.0


def test_dense_is_always_a_row_and_the_first():
    assert [r["variant"] for r in run(attention="topk:4").rows] == ["dense", "topk:4"]
    assert [r["variant"] for r in run(attention=["topk:4", "dense"]).rows] == ["dense", "topk:4"]
    assert [r["role"] for r in run(attention="topk:4").rows] == ["baseline", "given"]


def test_seeds_run_where_a_seed_matters():
    model = FakeModel()
    result = run(model, seeds=3)
    assert [r["seeds"] for r in result.rows] == [1, 1, 1, 3]
    assert {"random:4", "random:4:seed=1", "random:4:seed=2"} <= set(model.calls)
    one = [run(attention=f"random:4:seed={s}").rows[1]["nll"][0] for s in range(3)]
    assert row(result, "random:4")["nll"][0] == pytest.approx(np.mean(one))


def test_budgets_add_rows_between_their_bounds():
    result = run(attention=["dense", "window:5", "topk:4"], budgets=[0.5, 0.25])
    for budget in (0.5, 0.25):
        rows = [r for r in result.rows if r["budget"] == budget]
        assert [(r["role"], r["bound"]) for r in rows] == [
            ("matched", ""),
            ("matched", "ceiling"),  # the top-k that was asked for is the ceiling itself
            ("bound", "floor"),
        ]
        kept = [r["kept"] for r in rows]
        assert max(kept) - min(kept) < 0.02 and abs(kept[0] - budget) < 0.03
        assert rows[1]["kl"][0] < rows[2]["kl"][0]
    assert "25 % floor" in repr(result) and "50 % ceiling" in repr(result)


def test_advice_is_the_cheapest_that_is_near_enough():
    result = run(attention=["window:63", "topk:60", "window:5"], max_kl=0.01)
    act = result.data["act"]
    assert act["spec"] == "window:63"  # both are near enough; a selector reads every key
    assert act["code"] == 'model(tokens, attention="window:63")'
    assert act["code"] in repr(result)
    none = run(attention=["window:5"], max_kl=1e-9).data["act"]
    assert none["spec"] is None and "window:5 comes nearest" in none["text"]
    assert "only dense" in run(attention="dense").data["act"]["text"]


@pytest.mark.usefixtures("clean_memory")
def test_timed_columns():
    result = run(time_budget=1.0, lengths=[64, 128], attention=["window:5", "topk:4"])
    for got in result.rows:
        assert set(got["time"]) == {"64", "128"}
        assert got["measured_to"] == 128
        assert got["peak_bytes"] >= 0
    assert row(result, "window:5")["time"]["128"]["ratio"][0] > 0
    timing = result.data["timing"]
    assert [t["length"] for t in timing["lengths"]] == [64, 128] and timing["heads"] == 12
    assert all(t["repetitions"] >= 3 for t in timing["lengths"])
    assert "wins from" in repr(result) and "left out" not in repr(result)


@pytest.mark.usefixtures("clean_memory")
def test_decode_columns():
    result = run(time_budget=2.0, lengths=[64, 1024, 2048], attention=["window:5"])
    dense, window = result.rows
    assert set(dense["decode"]) == set(window["decode"]) == {"1024", "2048"}
    for cell in dense["decode"].values():
        assert cell["ratio"] == [1.0, 1.0, 1.0] and 0 < cell["seconds"] < 0.1
    value, low, high = window["decode"]["2048"]["ratio"]
    assert 0 < low <= value <= high
    assert [t["length"] for t in result.data["timing"]["decode"]] == [1024, 2048]
    text = repr(result)
    assert "@1k" in text and "@2k" in text and "appended to a cache" in text
    assert "<th>@2k</th>" in result._repr_html_()
    (_, line) = csv.DictReader(io.StringIO(result.to_csv()))
    assert float(line["decode_ratio_2048"]) == value
    assert float(line["decode_ratio_2048_high"]) == high
    assert float(line["decode_seconds_1024"]) == window["decode"]["1024"]["seconds"]
    assert result.to_dict()["rows"] == result.rows


@pytest.mark.usefixtures("clean_memory")
def test_a_cache_length_that_does_not_fit_is_left_out_and_said():
    result = run(time_budget=0.02, lengths=[1 << 20], attention=["window:5"])
    assert "time budget" in result.rows[1]["decode"]["1048576"]["left_out"]
    assert "everything at @1024k" in repr(result)


def test_no_logits_of_the_whole_text(monkeypatch):
    monkeypatch.setattr("sparseattn.evaluation.scores.CHUNK", 50 * 20)
    model = FakeModel()
    run(model, time_budget=0)
    assert model.largest_head <= 64  # the reference run; all else in chunks of 20
    monkeypatch.setattr("sparseattn.evaluation.compare.REFERENCE_TOKENS", 3)
    model.largest_head = 0
    run(model)
    assert model.largest_head == 20


def test_stories_separate_as_the_notes_say(no_reference):
    """On stories260K paired intervals separate what unpaired ones do not."""
    result = sa.compare(
        shared_path("models/stories260K"),
        shared_path("text/tinystories_sample.txt"),
        tokens=4_000,
        time_budget=0,
    )
    dense, window, topk = (row(result, n) for n in ("dense", "window:64", "topk:16"))
    for other in (window, topk):
        assert other["nll"][1] < dense["nll"][0] < other["nll"][2]  # unpaired they overlap
        assert other["dnll"][1] > 0
    assert dense["nll"][0] == pytest.approx(1.3, abs=0.1)
    assert topk["k_rows"] == 1.0 and topk["kept"] < 0.1
    assert topk["kept"] < topk["v_rows"] < 2 * topk["kept"]


def test_dense_is_what_transformers_computes():
    requires("torch")
    requires("transformers")
    folder = shared_path("models/stories260K")
    model = sa.Model.from_pretrained(folder)
    ids = np.array(model.tokenizer.encode("Once upon a time", special=True), np.int32)
    found = reference_difference(folder, ids, model(ids))
    assert found["max_difference"] < 1e-4 and found["tokens"] == len(ids)


def test_a_reference_that_fails_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("sparseattn.evaluation.trust.CHILD", "raise SystemExit('no such thing')")
    logits = np.zeros((2, 5), np.float32)
    found = reference_difference(tmp_path, np.zeros(2, np.int32), logits)
    assert found == {"reason": "transformers failed (no such thing)"}


def test_an_interrupt_ends_the_reference_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    child = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); "
    monkeypatch.setattr("sparseattn.evaluation.trust.CHILD", child + "time.sleep(60)")
    sent = []

    def send():
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.01)
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=send).start()
    with pytest.raises(KeyboardInterrupt):
        reference_difference(tmp_path, np.zeros(2, np.int32), np.zeros((2, 5), np.float32))
    assert time.monotonic() - sent[0] < 0.2
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_loaded_model_is_held_against_its_own_checkpoint(monkeypatch):
    """A model object says where it came from, not that it is still what lies there."""
    asked = []
    monkeypatch.setattr("sparseattn.evaluation.compare.missing_packages", list)
    monkeypatch.setattr(
        "sparseattn.evaluation.compare.reference_difference",
        lambda folder, *_: asked.append(folder) or {"reason": "not asked"},
    )
    folder = shared_path("models/stories260K")
    for seed, want in ((None, folder), (0, None)):
        model = sa.Model.from_pretrained(folder, random_weights=seed)
        sa.compare(model, fake_ids(100), "dense", context=32, time_budget=0)
        assert asked.pop() == want


# ---- folders -----------------------------------------------------------------------------------


def test_saved_files_hold_what_was_printed(tmp_path):
    out = tmp_path / "new" / "out"
    result = run(save=out)
    assert {"compare.csv", "compare.json", "compare.jsonl"} <= {p.name for p in out.iterdir()}
    assert not [p for p in out.iterdir() if p.name.startswith(".")]
    data = json.loads((out / "compare.json").read_text(encoding="utf-8"))
    assert data == result.to_dict() and data["complete"]
    assert repr(Comparison(data)) == repr(result)
    with open(out / "compare.csv", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [line["variant"] for line in lines] == SPECS
    assert float(lines[1]["kl"]) == row(result, "window:5")["kl"][0]
    settings = data["settings"]
    assert settings["attention"] == SPECS and settings["context"] == 64 and settings["threads"]
    assert data["arguments"]["max_kl"] == 0.01 and data["arguments"]["save"] == str(out)
    assert data["environment"]["cpu"] and data["environment"]["packages"]["numpy"]


def test_a_finished_run_is_not_computed_again(tmp_path):
    first = run(save=tmp_path)
    model = FakeModel()
    again = run(model, save=tmp_path)
    assert set(model.calls) <= {"dense"} and len(model.calls) == 0
    assert again.to_dict() == first.to_dict()


class Stop(Exception):
    pass


@pytest.mark.parametrize("after", [0, 1, 7, 12, 19])
def test_an_interrupted_run_goes_on_to_the_same_result(tmp_path, after):
    whole = run()
    model = FakeModel()
    calls = []

    class Interrupting(FakeModel):
        def hidden(self, *args, **kwargs):
            calls.append(1)
            if len(calls) > after:
                raise KeyboardInterrupt
            return super().hidden(*args, **kwargs)

    with pytest.raises(KeyboardInterrupt):
        run(Interrupting(), save=tmp_path)
    finished = after // 5  # five blocks a row
    if finished:
        kept = json.loads((tmp_path / "compare.json").read_text(encoding="utf-8"))
        assert not kept["complete"]
        assert [r["variant"] for r in kept["rows"]] == SPECS[:finished]
        assert kept["unfinished"] == SPECS[finished:]
    else:
        assert not (tmp_path / "compare.json").exists()
    result = run(model, save=tmp_path)
    assert figures(result) == figures(whole)
    assert len([c for c in model.calls if c != "dense"]) == 15 - max(0, after - 5)


def figures(result):
    """All but what a clock says."""
    data = result.to_dict()
    for r in data["rows"]:
        del r["tokens_per_second"]
    return {k: v for k, v in data.items() if k not in ("environment", "arguments")}


def test_a_torn_last_line_is_dropped(tmp_path):
    whole = run(save=tmp_path)
    path = tmp_path / "compare.jsonl"
    content = path.read_bytes()
    for cut in (len(content) - 3, len(content) // 2, 40, 0):
        path.write_bytes(content[:cut])
        (tmp_path / "compare.json").unlink(missing_ok=True)
        assert figures(run(save=tmp_path)) == figures(whole)
        path.unlink()
        (tmp_path / "compare.json").unlink()


def test_a_folder_of_another_run_is_refused(tmp_path):
    run(save=tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    model = FakeModel()
    with pytest.raises(sa.ArgumentError, match=r"holds another run .*context is 64 there and 32"):
        run(model, save=tmp_path, context=32)
    with pytest.raises(sa.ArgumentError, match="model is"):
        run(FakeModel(seed=1), save=tmp_path)
    with pytest.raises(sa.ArgumentError, match="attention is"):
        run(save=tmp_path, attention="dense")
    assert model.calls == []
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    (tmp_path / "compare.jsonl").unlink()
    with pytest.raises(sa.ArgumentError, match=r"not compare\.jsonl"):
        run(save=tmp_path)
    (tmp_path / "compare.json").unlink()
    (tmp_path / "compare.jsonl").write_bytes(b"somebody's notes\n")
    with pytest.raises(sa.ArgumentError, match="not a record of this program"):
        run(save=tmp_path)


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("x", encoding="utf-8")
    model = FakeModel()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(sa.FileError, match="is a file"):
            run(model, save=path)
    with pytest.raises(sa.FileError, match=r"cannot write|not writable"):
        run(model, save="/proc/nothing/here")
    assert model.calls == []


def test_wrong_input_makes_no_folder(tmp_path):
    out = tmp_path / "out"
    for changes in ({"attention": "windw:4"}, {"text": [1, 2]}, {"budgets": 2}, {"seeds": 0}):
        with pytest.raises(sa.ArgumentError):
            run(save=out, **changes)
    assert not out.exists()


def test_two_runs_on_one_folder(tmp_path):
    job = CompareJob(
        FakeModel(), fake_ids(300), Options(tokens=None, context=64, time_budget=0, save=tmp_path)
    )
    with pytest.raises(sa.FileError, match=f"in use by process {os.getpid()} on "):
        run(save=tmp_path, attention=("dense", "window:64", "topk:16"))
    with job:
        job.run()
    result = run(save=tmp_path, attention=("dense", "window:64", "topk:16"))
    assert len(result.rows) == 3


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    results.write_whole(path, b"old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(results.os, name, fail)
            with pytest.raises(sa.FileError, match="No space left"):
                results.write_whole(path, b"new")
        assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.json"]
    results.write_whole(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_full_disk_is_a_sentence():
    """A real limit on file size: the run ends with a FileError, what was written is whole."""
    code = (
        "import resource, signal, sys, pathlib, tempfile\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "import sparseattn as sa\n"
        "from sparseattn.evaluation.results import Records\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "with tempfile.TemporaryDirectory() as folder:\n"
        "    folder = pathlib.Path(folder)\n"
        "    records = Records(folder, 'compare', {})\n"
        "    try:\n"
        "        for i in range(100):\n"
        "            records.add(f'k{i}', {'x': 'y' * 50})\n"
        "    except sa.FileError as error:\n"
        "        print(error)\n"
        "    records.close()\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1)) if 0 else None\n"
        "    print(len((folder / 'compare.jsonl').read_bytes()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, os.path.dirname(__file__)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    sentence, size = done.stdout.splitlines()
    assert "cannot write" in sentence and "File too large" in sentence
    assert int(size) <= 2000


def test_numpy_numbers_are_numbers(tmp_path):
    result = run(
        seed=np.int64(3), seeds=np.int32(2), budgets=np.array([0.5]), max_kl=np.float32(0.5),
        context=np.int64(32), time_budget=np.float64(0), lengths=np.array([64]), save=tmp_path,
    )  # fmt: skip
    assert json.loads((tmp_path / "compare.json").read_text())["arguments"]["lengths"] == [64]
    assert result.data["settings"]["seed"] == 3


# ---- the result --------------------------------------------------------------------------------


def test_result_object():
    result = run(budgets=0.5)
    text = repr(result)
    assert all(len(line) <= 120 for line in text.splitlines())
    assert [r["variant"] for r in result.rows][:2] == ["dense", "window:5"]
    page = result._repr_html_()
    assert page.count("<tr>") == 1 + len(result.rows) and "KL(dense" in page
    assert json.loads(result.to_json()) == result.to_dict()
    lines = list(csv.reader(io.StringIO(result.to_csv())))
    assert len(lines) == 1 + len(result.rows) and {len(line) for line in lines} == {len(lines[0])}


def test_a_result_of_nothing_yet():
    with CompareJob(FakeModel(), fake_ids(300), Options(tokens=None, context=64)) as job:
        result = job.result()
    assert "no row is finished yet" in repr(result)
    assert result.rows == [] and "<table>" not in result._repr_html_()


def test_to_pandas():
    requires("pandas")
    frame = run().to_pandas()
    assert list(frame["variant"]) == SPECS and frame["kl"].dtype == float


def test_without_the_extra_the_sentence_names_it(monkeypatch):
    result = run(attention="dense")
    for name, method in (("pandas", result.to_pandas), ("matplotlib", result.plot)):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(sa.NotSupported, match=rf"{name} .*sparseattn\[plot\]"):
            method()


@pytest.mark.parametrize(
    ("interval", "text"),
    [
        (Interval(0.01234, 0.0111, 0.0137), "0.0123±0.0013"),
        (Interval(1.5, 1.1, 1.9), "1.5±0.4"),
        (Interval(123.4, 100.0, 150.0), "123±25"),
        (Interval(2e-9, 1e-9, 3e-9), "2.0e-09±1e-09"),
        (Interval(0.0, 0.0, 0.0), "0"),
        (Interval(0.5, math.nan, math.nan), "0.500"),
        (Interval(-0.0001, -0.01, 0.01), "0.000±0.010"),
        (None, "-"),
    ],
)
def test_digits_follow_the_interval(interval, text):
    assert with_interval(interval) == text


def test_signs_and_other_numbers():
    assert with_interval(Interval(0.5, 0.4, 0.6), sign=True) == "+0.50±0.10"
    assert with_interval(Interval(-0.5, -0.6, -0.4), sign=True) == "-0.50±0.10"
    assert [number(x) for x in (None, 0, 1234.5, 0.01234, 3.65811, 1e-9)] == [
        "-", "0", "1,230", "0.0123", "3.66", "1.0e-09",
    ]  # fmt: skip
    assert [percent(x) for x in (1.0, 0.99999, 0.0636, 0.0004, None)] == [
        "100", "99.9", "6.4", "0.04", "-",
    ]  # fmt: skip


def test_a_wide_table_wraps_between_groups():
    name = Column("variant", ["a", "bb"])
    columns = [Column(f"head{i}", ["1", "22"], f"g{i // 3}") for i in range(6)]
    wide = Table(name, columns).text(120)
    assert wide.splitlines()[0].split() == ["variant", *(f"head{i}" for i in range(6))]
    assert len(wide.splitlines()) == 4
    narrow = Table(name, columns).text(32)
    heads = [line.split() for line in narrow.splitlines() if line.startswith("variant")]
    assert heads == [["variant", "head0", "head1", "head2"], ["variant", "head3", "head4", "head5"]]
    assert all(len(line) <= 32 for line in narrow.splitlines())
    page = Table(Column("v", ["<x>"]), [Column("a&b", ["1"])]).html()
    assert "&lt;x&gt;" in page and "a&amp;b" in page
