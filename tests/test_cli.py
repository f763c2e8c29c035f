"""The command line, as child processes: what is printed, exit codes, interrupts."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import signal
import statistics
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import LLAMA_CONFIG, llama_weights, save_folder

import sparseattn as sa
from sparseattn.cli import main, make_parser

VERBS = ("compare", "eval", "generate", "info", "version")
COMMAND = [sys.executable, "-m", "sparseattn"]
WITH_REFERENCE = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(
        [str(Path(sa.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    ),
    "COLUMNS": "120",
}
# The reference that compare asks where it can takes seconds; test_compare.py looks at it.
BARE = str(Path(__file__).with_name("without_transformers"))
ENV = {**WITH_REFERENCE, "PYTHONPATH": os.pathsep.join([BARE, WITH_REFERENCE["PYTHONPATH"]])}
LETTERS = "abcdefghijklmnopqrstuvwxyz \n"


def cli(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", env=ENV, timeout=100, **options
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaMA that reads letters."""
    from tokenizers import Tokenizer, models

    made = save_folder(tmp_path_factory.mktemp("model"), LLAMA_CONFIG, llama_weights(LLAMA_CONFIG))
    vocab = {c: i + 2 for i, c in enumerate(LETTERS)}
    Tokenizer(models.BPE(vocab=vocab, merges=[])).save(str(made / "tokenizer.json"))
    return made


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    letters = np.random.default_rng(0).choice(list(LETTERS), 600)
    path.write_text("".join(letters), encoding="utf-8")
    return path


@pytest.fixture
def quick(folder: Path, text: Path) -> list[object]:
    """A comparison of a second."""
    return ["compare", "--model", folder, "--text", text, "--attention", "window:5",
            "--attention", "topk:4", "--time-budget", "0.3", "--lengths", "64,128"]  # fmt: skip


# ---- what is printed ---------------------------------------------------------------------------


def test_compare_prints_one_table_and_no_bar(quick):
    done = cli(*quick)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[5:8]] == ["dense", "window:5", "topk:4"]
    for word in ("Δnll", "KL", "top-1", "ppl", "kept %", "K %", "V %", "tokens/s",
                 "wins from", "peak MiB", "128", "trust", "act", "checksum"):  # fmt: skip
        assert word in done.stdout
    assert all(len(line) <= 120 for line in lines)
    assert "\r" not in done.stdout and "\x1b" not in done.stdout


def test_json_is_the_saved_result(quick, tmp_path):
    done = cli(*quick, "--json", "--save", tmp_path / "out", "--budgets", "0.5,0.2", "--seeds", "2")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == json.loads((tmp_path / "out" / "compare.json").read_text())
    assert json.loads(done.stdout)["evaluation"]["seeds"] == 2


def test_eval_prints_perplexity(folder, text, tmp_path):
    arguments = ["eval", "--model", folder, "--text", text, "--attention", "topk:4"]
    done = cli(*arguments, "--stride", "24", "--save", tmp_path / "out")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.match(r"perplexity [\d.]+, loss [\d.±]+ nats a token, with topk:4\n", done.stdout)
    assert "599 predictions in 24 blocks of 48, stride 24" in done.stdout
    saved = json.loads((tmp_path / "out" / "eval.json").read_text())
    again = json.loads(cli(*arguments, "--stride", "24", "--json").stdout)
    assert saved["nll"] == again["nll"] and saved["value"] == again["value"]


def test_random_weights_need_a_config_only(tmp_path, text, folder):
    bare = save_folder(tmp_path / "bare", LLAMA_CONFIG)
    arguments = ["eval", "--model", bare, "--text", text, "--random-weights", "3"]
    done = cli(*arguments, "--tokenizer", folder, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert "random weights (seed 3)" in found["evaluation"]["model"]
    assert found["value"] == pytest.approx(61, rel=0.2)  # knows nothing: about its vocabulary


def test_generate_prints_what_follows(folder, tmp_path):
    model = sa.Model.from_pretrained(folder)
    arguments = ["generate", "once upon", "--model", folder, "--max-new-tokens", "12"]
    done = cli(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == model.generate("once upon", 12) + "\n" and len(done.stdout) > 5
    how = ["--temperature", "0.9", "--top-k", "20", "--top-p", "0.9", "--seed", "3"]
    text = model.generate("once upon", 12, 0.9, 20, 0.9, 3, attention="window:3")
    done = cli(*arguments, *how, "--attention", "window:3", "--json", "--save", tmp_path / "out")
    found = json.loads(done.stdout)
    assert found["text"] == text and found["complete"] and found["top_k"] == 20
    assert found == json.loads((tmp_path / "out" / "generate.json").read_text())
    stopped = cli(*arguments, *how, "--attention", "window:3", "--stop", text[3:6], "--stop", "\a")
    assert stopped.stdout == text[: text.index(text[3:6])] + "\n"


def test_generate_reads_standard_input(folder):
    arguments = ["generate", "-", "--model", folder, "--max-new-tokens", "12"]
    model = sa.Model.from_pretrained(folder)
    assert cli(*arguments, input="once\nupon").stdout == model.generate("once\nupon", 12) + "\n"
    done = subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, env=ENV,
                          input=b"once \xff", timeout=60)  # fmt: skip
    assert done.returncode == 2 and done.stdout == b""
    assert b"standard input is not UTF-8 at byte 5" in done.stderr


def test_info_and_version():
    done = cli("info", "--threads", "1")
    assert done.returncode == 0
    for word in ("sparseattn", "threads     1", "isa", "blas", "numpy", "topk", "window:64"):
        assert word in done.stdout
    found = json.loads(cli("info", "--json").stdout)
    assert {s.name for s in sa.specs()} == set(found["variants"])
    assert cli("version").stdout.strip() == sa.__version__ == cli("--version").stdout.split()[1]


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_has_an_example_that_parses(verb):
    done = cli(verb, "--help")
    assert done.returncode == 0
    for option in ("--json", "--seed", "--threads", "--save"):
        assert option in done.stdout
    _, _, epilog = done.stdout.partition("example")
    joined = epilog.partition("\n\n")[0].replace("\\\n", " ")
    examples = [line.strip() for line in joined.splitlines() if line.startswith("  sparseattn")]
    assert examples
    for example in examples:
        options = make_parser().parse_args(shlex.split(example)[1:])
        assert options.verb == verb


def test_verbs_that_do_not_exist_are_not_listed():
    listed = re.findall(r"^    (\w+) ", cli("--help").stdout, re.M)
    assert tuple(listed) == VERBS


# ---- wrong input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "VERB"),
        (["compar"], "compar"),
        (["compare", "--nonsense"], "--nonsense"),
        (["compare", "--tokens", "many"], "many"),
        (["compare", "--budgets", "a,b"], "a,b"),
        (["compare", "--budgets", "1.5"], "1.5"),
        (["compare", "--attention", "windw:64"], "window"),
        (["compare", "--attention", "topk:0"], "0"),
        (["compare", "--attention", "window:0"], "0"),
        (["compare", "--attention", "blockmask:64"], "layout"),
        (["compare", "--model", "/no/such/folder"], "/no/such/folder"),
        (["compare", "--text", "no-such-text.txt"], "no-such-text.txt"),
        (["compare", "--seeds", "0"], "seeds"),
        (["compare", "--threads", "0"], "0"),
        (["compare", "--context", "100000"], "context"),
        (["compare", "--lengths", "1"], "lengths"),
        (["compare", "--save", "{text}"], "is a file"),
        (["compare", "--save", "{text}/below"], "is a file"),
        (["compare", "--model", "{folder}", "--text", "{short}"], "too short"),
        (["compare", "--model", "{folder}", "--text", "{binary}"], "not UTF-8"),
        (["eval", "--model", "{bare}"], "model.safetensors"),
        (["eval", "--model", "{bare}", "--random-weights", "0"], "no tokenizer"),
        (["eval", "--attention", "dense,topk:4"], "compare"),
        (["eval", "--attention", "dense", "--attention", "topk:4"], "compare takes several"),
        (["compare", "--token", "many"], "did you mean --tokens?"),
        (["info", "--threads", "0"], "number of threads must be 1 to 64"),
        (["generate", "x", "--max-tokens", "5"], "did you mean --max-new-tokens?"),
        (["generate", "Once", "upon", "a"], "quotes"),
        (["generate", "x", "--top-k", "5"], "temperature"),
        (["generate", "x", "--attention", "dense", "--attention", "topk:4"], "takes one here"),
        (["generate", "x", "--stop", ""], "stop holds an empty string"),
        (["generate", "a", "--top-p", "2", "--temperature", "1"], "top_p is 2"),
        (["generate", "a", "--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["generate", "a", "--save", "{text}"], "is a file"),
        (["generate", "a", "--model", "{bare}", "--random-weights", "0"], "no tokenizer"),
        (["generate", "a" * 60, "--model", "{folder}"], "context of 48"),
        (["info", "--save", "{text}"], "is a file"),
    ],
    ids=lambda x: " ".join(map(str, x)) if isinstance(x, list) else "",
)
def test_wrong_input_is_one_sentence_and_exit_2(
    arguments, words, folder, text, tmp_path, monkeypatch, capfd
):
    """In this process; what a child's exit code is, the tests around show."""
    names = {"folder": folder, "text": text, "short": tmp_path / "s", "binary": tmp_path / "b"}
    (tmp_path / "s").write_text("a short text")
    (tmp_path / "b").write_bytes(b"\x80\xff" * 100)
    names["bare"] = save_folder(tmp_path / "bare", LLAMA_CONFIG)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    try:
        code = main([a.format(**names) for a in arguments])
    except SystemExit as stop:  # the parser's
        code = stop.code
    out, err = capfd.readouterr()
    assert (code, out) == (2, "")
    assert err.count("\n") == 1 and "Traceback" not in err
    assert err.startswith("sparseattn")
    assert words in err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_of_another_run_is_refused(quick, tmp_path):
    assert cli(*quick, "--save", tmp_path).returncode == 0
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    done = cli(*quick, "--save", tmp_path, "--tokens", "300")
    assert done.returncode == 2 and "another run" in done.stderr
    assert done.stderr.count("\n") == 1
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


# ---- pipes, terminals, interrupts --------------------------------------------------------------


def test_a_reader_that_leaves_is_harmless(quick):
    with subprocess.Popen(
        [*COMMAND, *map(str, quick)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENV
    ) as child:
        child.stdout.close()
        err = child.stderr.read()
    assert (child.returncode, err) == (0, b"")


def test_an_ascii_terminal_gets_a_table_too(quick):
    env = {**ENV, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([*COMMAND, *map(str, quick)], capture_output=True, env=env, timeout=60)
    assert done.returncode == 0 and b"topk:4" in done.stdout


def test_a_terminal_gets_a_bar(quick):
    main, terminal = pty.openpty()  # both ends stay open here: what is unread must not be lost
    termios.tcsetwinsize(terminal, (24, 100))
    os.set_blocking(main, False)
    done = subprocess.run([*COMMAND, *map(str, quick)], stdout=subprocess.PIPE, stderr=terminal,
                          env=ENV, timeout=60)  # fmt: skip
    shown = os.read(main, 1 << 16)
    os.close(terminal)
    os.close(main)
    assert done.returncode == 0
    assert b"%|" in shown and b"%|" not in done.stdout


def start(arguments: list[object], env: dict[str, str] = ENV) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env=env,
    )


def wait_for(path: Path, word: bytes, count: int, process: subprocess.Popen[str]) -> None:
    """Wait until so many records of the run hold the word."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and path.read_bytes().count(word) >= count:
            return
        time.sleep(0.005)
    raise AssertionError("the run ended before it could be interrupted")


def test_ctrl_c_keeps_finished_rows_and_the_same_command_goes_on(tmp_path):
    arguments = ["compare", "--attention", "window:64", "--attention", "topk:16", "--tokens",
                 "4000", "--time-budget", "0", "--save", tmp_path / "out"]  # fmt: skip
    path = tmp_path / "out" / "compare.jsonl"
    with start(arguments) as child:
        wait_for(path, b'"block|', 9, child)  # dense has eight blocks
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "dense" in out and "Traceback" not in err
    assert "run the same command again" in err and err.count("\n") == 1
    kept = json.loads((tmp_path / "out" / "compare.json").read_text(encoding="utf-8"))
    assert kept["rows"] and not kept["complete"]
    records = path.read_bytes().count(b'"block|')
    done = cli(*arguments)
    assert done.returncode == 0, done.stderr
    whole = json.loads((tmp_path / "out" / "compare.json").read_text(encoding="utf-8"))
    assert whole["complete"] and whole["rows"][: len(kept["rows"])] == kept["rows"]
    assert path.read_bytes().count(b'"block|') == 24 > records
    clean = json.loads(cli(*arguments[:-2], "--json").stdout)
    for a, b in zip(whole["rows"], clean["rows"], strict=True):
        assert {**a, "tokens_per_second": 0} == {**b, "tokens_per_second": 0}


@pytest.mark.promise("E4")
def test_killed_runs_go_on_to_the_table_of_one_that_was_not(quick, tmp_path):
    arguments = [*quick[:-4], "--context", "16", "--time-budget", "0"]
    for count in (1, 30, 60, 90):
        with start([*arguments, "--save", tmp_path]) as child:
            wait_for(tmp_path / "compare.jsonl", b'"block|', count, child)
            child.kill()
    done = cli(*arguments, "--save", tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    clean = json.loads(cli(*arguments, "--json").stdout)
    for a, b in zip(json.loads(done.stdout)["rows"], clean["rows"], strict=True):
        assert {**a, "tokens_per_second": 0} == {**b, "tokens_per_second": 0}
    lines = (tmp_path / "compare.jsonl").read_text(encoding="utf-8").splitlines()
    ids = [json.loads(line)["id"] for line in lines]
    assert len(ids) - len(set(ids)) == ids.count("owner") - 1  # no other id twice


def test_generate_prints_as_it_decodes_and_keeps_it_at_ctrl_c():
    with start(["generate", "The list of", "--max-new-tokens", "500"]) as child:
        first = child.stdout.read(20)  # comes before the end, through a pipe
        assert child.poll() is None
        child.send_signal(signal.SIGINT)
        rest, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert err == "sparseattn: interrupted: the text is not complete\n"
    whole = cli("generate", "The list of", "--max-new-tokens", "500").stdout
    assert rest.endswith("\n") and whole.startswith((first + rest)[:-1])
    assert len(first + rest) < len(whole)


@pytest.mark.promise("C4")
def test_ctrl_c_stops_at_once_at_any_moment(tmp_path):
    """While scoring, in the reference, and in timing from short to long lengths."""
    waits = []
    moments = [(b'"block|', 1), (b'"block|', 9), (b'"reference"', 1), (b'"length|', 1),
               (b'"length|', 4)]  # fmt: skip
    for i, (word, count) in enumerate(moments):
        arguments = ["compare", "--tokens", "2000", "--time-budget", "5",
                     "--save", tmp_path / str(i)]  # fmt: skip
        env = WITH_REFERENCE if b"reference" in word else ENV
        with start(arguments, env) as child:
            wait_for(tmp_path / str(i) / "compare.jsonl", word, count, child)
            time.sleep(0.01 * i)
            begin = time.monotonic()
            child.send_signal(signal.SIGINT)
            _, err = child.communicate(timeout=60)
            waits.append(time.monotonic() - begin)
        assert child.returncode == 130, err
        assert "Traceback" not in err
    assert statistics.median(waits) < 0.2, waits
    assert max(waits) < 0.5, waits  # what a busy machine adds
