"""``nomemory_child.py ENTRY FIRST LAST``: the n-th allocation of the interpreter fails in a call of
``public_calls``, for n = FIRST .. LAST; prints what became of each as JSON. A process of its own,
because the interpreter may not survive."""

from __future__ import annotations

import _testcapi
import gc
import json
import os
import sys
import traceback

from public_calls import calls, digest

from sparseattn import _core


def say(**words: object) -> None:
    os.write(1, json.dumps(words).encode() + b"\n")


def main(entry: str, first: int, last: int) -> None:
    call = calls()[entry]
    for _ in range(3):
        want = digest(call())
    gc.collect()
    _core.trim()
    live = _core.live_bytes()
    for n in range(first, last + 1):
        say(n=n, kind="begin")
        kind = line = None
        try:
            _testcapi.set_nomemory(n, n + 1)
            try:
                call()
            finally:
                _testcapi.remove_mem_hooks()
        except BaseException as error:
            kind = "MemoryError" if isinstance(error, MemoryError) else type(error).__name__
            line = traceback.extract_tb(error.__traceback__)[-1].line
            say(n=n, kind=kind, line=line, said=str(error))
        gc.collect()
        _core.trim()
        if _core.live_bytes() != live:
            say(n=n, kind="bytes", line=str(line), said=_core.live_bytes() - live)
            live = _core.live_bytes()
        if digest(call()) != want:
            say(n=n, kind="the next call gives something else", line=str(line))
        _core.trim()


main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
