"""What a wheel, of Linux or Windows, must and must not hold.

Usage: check_wheel.py WHEEL SDIST [WHEEL]

With a second wheel, made from the source archive of the source archive, both must hold the same.
"""

import base64
import hashlib
import re
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from email.parser import Parser
from pathlib import Path

MOST_BYTES = 30_000_000
WANTED = [
    r"sparseattn/_core\..*\.(so|pyd)",
    r"sparseattn/_core\.pyi",
    r"sparseattn/py\.typed",
    r"sparseattn/_libs/libscipy_openblas.*\.(so|dll)",
    r"sparseattn/_libs/OpenBLAS-LICENSE\.txt",
    r"sparseattn/assets/.*\.safetensors",
    r"sparseattn/assets/.*\.json",
    r"sparseattn/assets/.*\.md",
    r".*\.dist-info/licenses/LICENSE",
]
UNWANTED = [
    r"(?!sparseattn/|sparseattn-[\w.+]*\.dist-info/).*",
    r".*/(csrc|tests|benchmarks|notebooks|\.ci)/.*",
    r".*/(test_\w+|conftest|train_tiny)\.py",
    r".*\.([cho]|pyc|ipynb)",
]
LICENCE_WORDS = ["OpenBLAS", "Redistribution and use", "GCC RUNTIME LIBRARY EXCEPTION"]
SOURCES = [
    "setup.py",
    "csrc/python/module.c",
    "tests/conftest.py",
    "benchmarks/run.py",
    "README.md",
]
SYSTEM = r"(libc|libm|libdl|libpthread|librt|libgcc_s)\.so\.\d+|ld-linux.*"
WINDOWS = r"(kernel32|msvcrt|vcruntime140|python3\d+|api-ms-win-(crt|core)-[a-z0-9-]+)\.dll"
BUILT_AT = (
    rb"/(?:home|root|tmp|work|build|Users|var|opt)/[\w.-]+/[\w./-]+"
    rb"|[A-Z]:[\\/](?:a|Users)[\\/][\w.\\/-]+"
)
MACHINES = {"x86_64": "X86-64", "aarch64": "AArch64"}


def readelf(*options: str) -> str:
    return subprocess.run(["readelf", *options], capture_output=True, text=True, check=True).stdout


def names_faults(names: list[str]) -> list[str]:
    faults = [f"no {p}" for p in WANTED if not any(re.fullmatch(p, n) for n in names)]
    return faults + [f"holds {n}" for n in names if any(re.fullmatch(p, n) for p in UNWANTED)]


def record_faults(archive: zipfile.ZipFile) -> list[str]:
    """Every file stands in RECORD with the digest that it has."""
    names = {n for n in archive.namelist() if not n.endswith("/")}
    record = next(n for n in names if n.endswith(".dist-info/RECORD"))
    rows = dict(line.split(",")[:2] for line in archive.read(record).decode().splitlines())
    faults = [f"RECORD differs in {n}" for n in names ^ set(rows)]
    for name in (names & set(rows)) - {record}:
        digest = base64.urlsafe_b64encode(hashlib.sha256(archive.read(name)).digest())
        if rows[name] != "sha256=" + digest.decode().rstrip("="):
            faults.append(f"RECORD has another digest of {name}")
    return faults


def metadata_faults(wheel: Path, archive: zipfile.ZipFile) -> list[str]:
    """Name, version, one Python and one platform, licence; nothing needed but packages by name."""
    where = next(n for n in archive.namelist() if n.endswith(".dist-info/WHEEL")).rsplit("/", 1)[0]
    tags = Parser().parsestr(archive.read(f"{where}/WHEEL").decode())
    meta = Parser().parsestr(archive.read(f"{where}/METADATA").decode())
    name, version, python, abi, platform = wheel.name.removesuffix(".whl").split("-")
    expanded = {f"{python}-{abi}-{one}" for one in platform.split(".")}
    faults = [f"tag {t}" for t in expanded ^ set(tags.get_all("Tag", []))]
    if not re.fullmatch(r"cp3\d+", python) or abi not in {python, python + "t"}:
        faults.append(f"{python}-{abi} is not one Python")
    if not re.fullmatch(r"((many)?linux\w*_(x86_64|aarch64)\.?)+|win_amd64", platform):
        faults.append(f"{platform} is not Linux on x86-64 or aarch64, nor Windows on x86-64")
    if tags["Root-Is-Purelib"] != "false" or where != f"{name}-{version}.dist-info":
        faults.append(f"{where}/WHEEL: not a binary wheel of {name} {version}")
    if meta["License-Expression"] != "BSD-3-Clause" or meta["Version"] != version:
        faults.append(f"{where}/METADATA: licence or version")
    faults += [f"needs {r}" for r in meta.get_all("Requires-Dist", []) if "@" in r]
    licence = archive.read("sparseattn/_libs/OpenBLAS-LICENSE.txt").decode().upper()
    return faults + [
        f"OpenBLAS licence lacks {w}" for w in LICENCE_WORDS if w.upper() not in licence
    ]


def library_faults(path: Path, carried: set[str], platform: str) -> list[str]:
    """No search path but the wheel's own folder, nothing needed but the system and `carried`."""
    name, faults = path.name, []
    dynamic = readelf("-W", "-d", str(path))
    for folders in re.findall(r"\((?:RPATH|RUNPATH)\).*\[(.*)\]", dynamic):
        faults += [
            f"{name} searches {f}" for f in folders.split(":") if f.split("/")[0] != "$ORIGIN"
        ]
    for needed in re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic):
        if needed not in carried and not re.fullmatch(SYSTEM, needed):
            faults.append(f"{name} needs {needed}, which no wheel carries")
    machine = MACHINES[next(m for m in MACHINES if platform.endswith(m))]
    if machine not in readelf("-h", str(path)):
        faults.append(f"{name} is not for {machine}")
    promised = re.findall(r"manylinux_2_(\d+)", platform)
    used = max(map(int, re.findall(r"GLIBC_2\.(\d+)", readelf("-W", "-V", str(path)))), default=0)
    if promised and used > min(map(int, promised)):
        faults.append(f"{name} needs glibc 2.{used}, more than {platform} says")
    return faults


def imported(data: bytes) -> list[str]:
    """The libraries that a PE file for x86-64 is linked with; an error for any other file."""
    head = struct.unpack_from("<I", data, 0x3C)[0]
    mark, machine, sections = struct.unpack_from("<4sHH", data, head)
    optional = head + 24
    if mark != b"PE\0\0" or machine != 0x8664 or data[optional : optional + 2] != b"\x0b\x02":
        raise ValueError("not for x86-64")
    table = optional + struct.unpack_from("<H", data, head + 20)[0]
    spans = [struct.unpack_from("<8xIIII", data, table + 40 * n) for n in range(sections)]

    def place(address: int) -> int:
        """Where in the file lies what is loaded at the address."""
        return next(address - at + raw for size, at, _, raw in spans if at <= address < at + size)

    names, entry = [], place(struct.unpack_from("<I", data, optional + 120)[0])
    while name := struct.unpack_from("<12xI", data, entry)[0]:
        begin = place(name)
        names.append(data[begin : data.index(b"\0", begin)].decode())
        entry += 20
    return names


def windows_faults(path: Path) -> list[str]:
    """Nothing linked but the system, its C runtimes and Python: the compiler's own are inside."""
    try:
        names = imported(path.read_bytes())
    except (ValueError, struct.error, StopIteration) as error:
        return [f"{path.name} is no library of Windows: {error}"]
    return [
        f"{path.name} needs {name}, which no wheel carries"
        for name in names
        if not re.fullmatch(WINDOWS, name.lower())
    ]


def libraries_faults(wheel: Path, archive: zipfile.ZipFile) -> list[str]:
    names = [n for n in archive.namelist() if re.search(r"\.(so(\.\d+)*|pyd|dll)$", n)]
    carried = {n.rsplit("/", 1)[1] for n in names}
    faults = []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            path = Path(archive.extract(name, folder))
            if path.suffix in {".pyd", ".dll"}:
                faults += windows_faults(path)
            else:
                faults += library_faults(path, carried, wheel.stem.rsplit("-", 1)[1])
            if "/_core." not in name:
                continue
            data = path.read_bytes()
            faults += [f"{name} names {text.decode()}" for text in set(re.findall(BUILT_AT, data))]
            opened = re.findall(rb"_libs/[\w.-]+", data)  # at the first product, not linked
            if not opened or {f"sparseattn/{o.decode()}" for o in opened} - set(names):
                faults.append(f"{name} opens {opened}, which the wheel does not hold")
    return faults


def sdist_faults(sdist: Path) -> list[str]:
    with tarfile.open(sdist) as archive:
        members = {name.split("/", 1)[-1] for name in archive.getnames()}
    return [f"{sdist.name} lacks {name}" for name in SOURCES if name not in members]


def difference_faults(one: Path, other: Path) -> list[str]:
    """The same files with the same bytes: RECORD holds the digests of all."""
    records = []
    for wheel in (one, other):
        with zipfile.ZipFile(wheel) as archive:
            record = next(n for n in archive.namelist() if n.endswith(".dist-info/RECORD"))
            records.append(set(archive.read(record).decode().splitlines()))
    rebuilt = sorted({line.split(",")[0] for line in records[0] ^ records[1]})
    return [f"rebuilt from its own source archive, {name} is another" for name in rebuilt]


def check(wheel: Path, sdist: Path, rebuilt: Path | None) -> list[str]:
    faults = sdist_faults(sdist)
    if wheel.stat().st_size > MOST_BYTES:
        faults.append(f"{wheel.name} has {wheel.stat().st_size} bytes, more than {MOST_BYTES}")
    with zipfile.ZipFile(wheel) as archive:
        absent = names_faults(archive.namelist())
        if absent:
            return faults + absent
        faults += record_faults(archive) + metadata_faults(wheel, archive)
        faults += libraries_faults(wheel, archive)
    return faults + (difference_faults(wheel, rebuilt) if rebuilt else [])


if __name__ == "__main__":
    paths = [Path(word) for word in sys.argv[1:]]
    found = check(paths[0], paths[1], paths[2] if len(paths) > 2 else None)
    digest = hashlib.sha256(paths[0].read_bytes()).hexdigest()
    print("\n".join(found) or f"wheel and source archive hold what they should; sha256 {digest}")
    sys.exit(1 if found else 0)
