"""What a wheel must and must not hold. Usage: check_wheel.py WHEEL SDIST"""

import re
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

MOST_BYTES = 30_000_000
WANTED = [
    r"sparseattn/_core\..*\.so",
    r"sparseattn/_core\.pyi",
    r"sparseattn/py\.typed",
    r"sparseattn/_libs/libscipy_openblas.*\.so",
    r"sparseattn/_libs/OpenBLAS-LICENSE\.txt",
    r"sparseattn/assets/.*\.safetensors",
    r"sparseattn/assets/.*\.json",
    r"sparseattn/assets/.*\.md",
    r".*\.dist-info/licenses/LICENSE",
]
UNWANTED = [r"(csrc|tests|benchmarks|notebooks)/.*", r".*train_tiny.*", r".*\.([cho]|pyc)"]
SOURCES = [
    "setup.py",
    "csrc/python/module.c",
    "tests/conftest.py",
    "benchmarks/run.py",
    "README.md",
]


def check(wheel: Path, sdist: Path) -> list[str]:
    faults = []
    if wheel.stat().st_size > MOST_BYTES:
        faults.append(f"{wheel.name} has {wheel.stat().st_size} bytes, more than {MOST_BYTES}")
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        names = archive.namelist()
        faults += [f"no {p}" for p in WANTED if not any(re.fullmatch(p, n) for n in names)]
        faults += [f"holds {n}" for n in names if any(re.fullmatch(p, n) for p in UNWANTED)]
        for name in names:
            if re.search(r"_core\..*\.so$", name):
                data = Path(archive.extract(name, folder)).read_bytes()
                here = str(Path.home()).encode()
                faults += [f"{name} names {here!r}"] if len(here) > 5 and here in data else []
    with tarfile.open(sdist) as archive:
        members = {name.split("/", 1)[-1] for name in archive.getnames()}
        faults += [f"{sdist.name} lacks {name}" for name in SOURCES if name not in members]
    return faults


if __name__ == "__main__":
    found = check(Path(sys.argv[1]), Path(sys.argv[2]))
    print("\n".join(found) or "wheel and source archive hold what they should")
    sys.exit(1 if found else 0)
