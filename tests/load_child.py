"""Loads one folder in a process of its own with bounded memory, and says how that went.

    python load_child.py FOLDER EXTRA_BYTES [KEYWORDS]

The address space may grow by EXTRA_BYTES from what the imports left. KEYWORDS is JSON. Prints JSON:
``error`` (its class) and ``message``, or the ``fingerprint``, and ``seen``: audit events that no
load may cause, and files of the folder that were opened.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import warnings
from typing import Any

import sparseattn as sa

FORBIDDEN = ("pickle.", "marshal.", "subprocess.", "os.system", "os.exec", "os.spawn", "os.fork",
             "socket.connect", "ctypes.dlopen", "code.__new__")  # fmt: skip


def main() -> dict[str, Any]:
    folder, extra = sys.argv[1], int(sys.argv[2])
    keywords = json.loads(sys.argv[3]) if len(sys.argv) > 3 else {}
    sa.Model.from_pretrained()  # every import is done, the engine of tokenizers too
    seen: list[str] = []
    opened: list[str] = []

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if event.startswith(FORBIDDEN):
            seen.append(event)
        elif event in ("open", "import", "exec", "compile") and args:
            name = str(args[1] if event == "import" else args[0])
            if event == "open" and name.startswith(folder):
                opened.append(os.path.relpath(name, folder))
            elif event != "open" and folder in name:
                seen.append(f"{event} {name}")

    sys.addaudithook(watch)
    with open("/proc/self/statm") as file:
        held = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + extra, resource.RLIM_INFINITY))
    result: dict[str, Any] = {}
    try:
        model = sa.Model.from_pretrained(folder, **keywords)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        result["fingerprint"] = model.fingerprint
    except Exception as error:
        result = {"error": type(error).__name__, "message": str(error)}
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return result | {"seen": seen, "opened": sorted(set(opened))}


if __name__ == "__main__":
    warnings.simplefilter("error")
    print(json.dumps(main()))
