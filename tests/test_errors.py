"""Wrong calls are answered: the argument, the value, the remedy, and the built-in that fits."""

from __future__ import annotations

import functools
import inspect
import re
import sys
import traceback
from pathlib import Path
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


def attend(q: Any = Q, k: Any = K, v: Any = V, spec: Any = None, **terms: Any) -> Any:
    return sa.attention(q, k, v, spec, **terms)


def huge(*shape: int) -> np.ndarray:
    return np.broadcast_to(np.ones(shape[-1], np.float32), shape)


RECORD = Path(__file__).with_name("wrong_calls.txt")


@functools.cache
def model() -> Any:
    """The embedded one."""
    return sa.Model.from_pretrained()


def filled() -> sa.Cache:
    cache = sa.Cache()
    cache.append(K, V)
    return cache


def forgetful() -> sa.Cache:
    cache, x = sa.Cache("window:2"), np.zeros((1, 1, 600, 4), np.float32)
    cache.append(x, x)
    return cache


def recorded() -> dict[str, str]:
    """Calls and their errors, as ``wrong_calls.txt`` has them: a line each, the second indented."""
    lines = RECORD.read_text().splitlines()
    return {call: error.strip() for call, error in zip(lines[::2], lines[1::2], strict=True)}


def error_of(call: str) -> sa.SparseAttnError:
    """The error of a call that is written as Python; anything else is a failure."""
    with pytest.raises(sa.SparseAttnError) as caught:
        eval(call, globals())
    return caught.value


def written(error: sa.SparseAttnError) -> str:
    return f"{type(error).__name__}: {error}"


WRONG = recorded()


@pytest.mark.promise("G2")
@pytest.mark.parametrize("call", WRONG)
def test_wrong_calls_are_answered(call: str) -> None:
    """One sentence, the one that was read and recorded: to change it on purpose, run this file."""
    error = error_of(call)
    message = str(error)
    assert written(error) == WRONG[call]
    assert "\n" not in message and 15 < len(message) < 400, message
    assert isinstance(error, ValueError | TypeError | MemoryError | OSError | NotImplementedError)


@pytest.mark.promise("G2")
def test_wrong_calls_are_many_and_of_every_function() -> None:
    assert len(WRONG) >= 150
    text = "\n".join(WRONG)
    called = set(re.findall(r"sa\.(\w+)", text)) | {"attention", "Model"}
    takes_nothing = {"Dense", "specs", "get_num_threads", "Variant"}
    public = {name for name in sa.__all__ if callable(getattr(sa, name))}
    errors = {name for name in public if isinstance(getattr(sa, name), type)}
    errors = {name for name in errors if issubclass(getattr(sa, name), Exception)}
    assert public - errors - takes_nothing <= called, public - errors - takes_nothing - called


@pytest.mark.promise("G2")
def test_tracebacks_show_no_machinery() -> None:
    """The user's own line, the function they called, and at most two private ones below it; no
    chained exception of ours, and the chain is cut where we reword one."""
    for call in WRONG:
        error = error_of(call)
        assert "During handling" not in "".join(traceback.format_exception(error)), call
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        ours = [
            frame.f_code.co_name
            for frame in frames
            if frame.f_globals.get("__name__", "").startswith("sparseattn.")
            and not frame.f_code.co_name.startswith("<")
        ]
        assert len(ours) <= 3, (call, ours)


def test_a_fault_of_our_own_keeps_its_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise sa.InternalError("a bug")

    monkeypatch.setattr(sys.modules["sparseattn.attention"], "read_call", broken)
    with pytest.raises(sa.InternalError) as caught:
        attend()
    names = [frame.f_code.co_name for frame, _ in traceback.walk_tb(caught.value.__traceback__)]
    assert names[-2:] == ["attention", "broken"]


def test_a_users_own_frames_stay() -> None:
    def mod(b: Any, h: Any, q: Any, k: Any) -> Any:
        return sa.attention(Q, K, V, "topq")

    with pytest.raises(sa.ArgumentError) as caught:
        sa.Plan.from_mask_mod(mod, 1, 1, 5, 5)
    names = [frame.f_code.co_name for frame, _ in traceback.walk_tb(caught.value.__traceback__)]
    assert names[-1] == "mod"


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
        attend(out=out, spec="perhead(dense)")
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


def record() -> None:
    """Write the file anew; what has changed is then read by a person, as a diff."""
    lines = [f"{call}\n    {written(error_of(call))}\n" for call in WRONG]
    RECORD.write_text("".join(lines))


if __name__ == "__main__":
    record()
