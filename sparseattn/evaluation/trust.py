"""What a result must carry to be believed: where it ran, and that dense is what others compute."""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparseattn import _core

__all__ = ["environment", "reference_difference"]

PACKAGES = ("numpy", "safetensors", "tokenizers")
TIMEOUT = 180  # seconds

# Runs in a process of its own: an interrupt ends it at once, and its libraries neither add to
# this process's memory nor disturb its timing. Token ids come in, float32 logits go out.
CHILD = """
import os, sys
results = os.dup(1)
os.dup2(2, 1)
import numpy as np, torch, transformers
ids = np.frombuffer(sys.stdin.buffer.read(), dtype="<i4").astype(np.int64)
model = getattr(transformers, sys.argv[2]).from_pretrained(
    sys.argv[1], local_files_only=True, attn_implementation="eager"
).float().eval()
with torch.no_grad():
    found = model(torch.from_numpy(ids)[None])
logits = (found.logits if "logits" in found else found.last_hidden_state)[0]
with os.fdopen(results, "wb") as out:
    out.write(logits.numpy().astype("<f4").tobytes())
"""


def environment() -> dict[str, Any]:
    """Return hardware, versions, threads, instruction set and BLAS."""
    return {
        "sparseattn": _core.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": _core.num_threads(),
        "isa": _core.isa(),
        "blas": _core.blas_config(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def reference_difference(
    folder: Path | None,
    ids: NDArray[np.int32],
    logits: NDArray[np.float32],
    kind: str = "AutoModelForCausalLM",
) -> dict[str, Any]:
    """Return the largest difference of `logits` to those of transformers, or why there is none.

    Parameters
    ----------
    folder : Path or None
        The checkpoint; None where the parameters are in no file.
    ids : ndarray of int32, shape (tokens,)
    logits : ndarray of float32, shape (tokens, vocabulary)
        Of a `kind` without a head, the states (tokens, hidden).
    kind : str
        transformers' class for the checkpoint.

    Returns
    -------
    dict
        ``max_difference``, ``tokens`` and ``versions``, or ``reason``.
    """
    if folder is None:
        return {"reason": "no checkpoint that transformers could load"}
    missing = missing_packages()
    if missing:
        return {"reason": f"{' and '.join(missing)} not installed"}
    command = [sys.executable, "-c", CHILD, str(folder), kind]
    status, out, err = _run(command, ids.astype("<i4").tobytes())
    if status or len(out) != logits.nbytes:
        lines = [line for line in err.decode(errors="replace").splitlines() if line.strip()]
        last = lines[-1].strip() if lines else f"no answer in {TIMEOUT} s"
        return {"reason": f"transformers failed ({last:.120})"}
    theirs = np.frombuffer(out, dtype="<f4").reshape(logits.shape)
    return {
        "max_difference": float(np.abs(theirs - logits).max()),
        "tokens": len(ids),
        "versions": {name: _version(name) for name in ("transformers", "torch")},
    }


def missing_packages() -> list[str]:
    """Return what a reference run would need and is not there; imports nothing."""
    return [n for n in ("transformers", "torch") if importlib.util.find_spec(n) is None]


def _run(command: Sequence[str], data: bytes) -> tuple[int, bytes, bytes]:
    """Run a child outside of the terminal's group; it does not outlive this call.

    Files instead of pipes: nothing to read while it runs, so an interrupt ends both at once.
    """
    quiet = {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    with TemporaryFile() as stdin, TemporaryFile() as stdout, TemporaryFile() as stderr:
        stdin.write(data)
        stdin.seek(0)
        child = subprocess.Popen(
            command,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            env={**os.environ, **quiet},
            start_new_session=True,
        )
        try:
            latest = time.monotonic() + TIMEOUT
            while child.poll() is None and time.monotonic() < latest:
                time.sleep(0.02)
        finally:
            child.kill()  # does nothing to one that has ended
            status = child.wait()
        stdout.seek(0)
        stderr.seek(0)
        return status, stdout.read(), stderr.read()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.lower().startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
