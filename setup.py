"""Builds the extension module and carries OpenBLAS into the package; metadata: pyproject.toml.

Choices, all environment variables:

SPARSEATTN_BLAS      openblas (default) | none | a library to open at run time: libopenblas.so.0
SPARSEATTN_SANITIZE  e.g. address,undefined
SPARSEATTN_WERROR    1 turns warnings into errors
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent

# gcc -std=c11 emits no FMA without -ffp-contract=fast, and a tile at -O2 runs at half speed.
FLAGS = [
    "-O3",
    "-std=c11",
    "-ffp-contract=fast",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-wrapv",
    "-Wall",
    "-Wextra",
]
# MinGW-w64. The stack of Windows is aligned to 16 bytes, which GCC forgets where it spills vectors
# of 32 and 64 [GCC bug 54412]: the assembler (of binutils 2.38 or later) makes every move an
# unaligned one, at the same speed where the address is aligned. Static: no DLL of the compiler's.
WINDOWS_FLAGS = [
    "-Wa,-muse-unaligned-vector-move",
    "-D__USE_MINGW_ANSI_STDIO=1",
    "-DMS_WIN64=",
    "-DNDEBUG",  # elsewhere among the flags that Python was built with
]
WINDOWS_LINK = ["-static", "-lsynchronization"]
SHARED = {".so", ".dylib", ".dll"}


def sources() -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/**/*.c"))


def openblas_files() -> tuple[list[Path], list[Path]]:
    """Shared libraries and licence texts of the pinned wheel; not imported, that would load it."""
    spec = importlib.util.find_spec("scipy_openblas32")
    if spec is None or not spec.submodule_search_locations:
        return [], []
    folder = Path(spec.submodule_search_locations[0], "lib")
    libraries = [p for p in folder.iterdir() if p.suffix in SHARED or ".so." in p.name]
    listed = importlib.metadata.files("scipy-openblas32") or []
    licences = [Path(str(f.locate())) for f in listed if "license" in f.name.lower()]
    return sorted(libraries), licences


def blas_choice() -> tuple[str, list[Path], list[Path]]:
    """What the core opens at first use (beside the module when it has a slash), files to carry."""
    asked = os.environ.get("SPARSEATTN_BLAS", "")
    if asked == "none":
        return "", [], []
    if asked not in {"", "openblas"}:
        return asked, [], []
    libraries, licences = openblas_files()
    main = [p.name for p in libraries if p.name.startswith("libscipy_openblas")]
    if not main and asked:
        sys.exit(
            "SPARSEATTN_BLAS=openblas, but scipy-openblas32 is not installed; "
            "install the version pinned in pyproject.toml, or set SPARSEATTN_BLAS=none"
        )
    return (f"_libs/{main[0]}" if main else ""), libraries, licences


class BuildExt(build_ext):
    """Compiles files in parallel, only those that changed, and copies OpenBLAS into _libs."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if sys.platform == "win32" and self.compiler is None:
            self.compiler = "mingw32"

    def run(self) -> None:
        super().run()
        _, libraries, licences = blas_choice()
        module = Path(self.get_ext_fullpath(self.extensions[0].name))
        folder = module.parent / "_libs"
        shutil.rmtree(folder, ignore_errors=True)
        if not libraries:
            return
        folder.mkdir(parents=True)
        for path in libraries:
            shutil.copy2(path, folder / path.name)
        for path in licences:
            shutil.copy2(path, folder / f"OpenBLAS-{path.name}")

    def build_extensions(self) -> None:
        if self.compiler.compiler_type not in {"unix", "mingw32"}:
            sys.exit(
                f"sparseattn needs GCC or Clang, got {self.compiler.compiler_type}; "
                "on Windows put the gcc of MinGW-w64 into PATH and name no other compiler"
            )
        library, _, _ = blas_choice()
        sanitize = os.environ.get("SPARSEATTN_SANITIZE", "")
        for extension in self.extensions:
            self.configure(extension, library, sanitize)
        # A Python built with a run path of its own hands it on; wheels travel without it.
        linker = self.compiler.linker_so
        self.compiler.linker_so = [word for word in linker if not word.startswith("-Wl,-rpath")]
        one = self.extensions[0]
        key = repr((self.compiler.compiler_so, one.extra_compile_args, one.define_macros))
        variant = hashlib.sha256(key.encode()).hexdigest()[:8]  # objects of other flags stay apart
        self.build_temp = os.path.join(self.build_temp, variant)
        one_by_one = self.compiler.compile
        jobs = self.parallel if isinstance(self.parallel, int) else os.cpu_count()

        def compile_all(names: list[str], **options: object) -> list[str]:
            def compile_one(name: str) -> str:
                (built,) = self.compiler.object_filenames([name], output_dir=self.build_temp)
                if self.force or not is_current(Path(built)):
                    one_by_one([name], **options)
                return built

            with ThreadPoolExecutor(jobs) as pool:
                return list(pool.map(compile_one, names))

        self.compiler.compile = compile_all
        self.parallel = None  # one extension: the pool above is the parallelism
        super().build_extensions()

    def configure(self, extension: Extension, library: str, sanitize: str) -> None:
        extension.define_macros = [
            ("SA_VERSION", f'"{self.distribution.get_version()}"'),
            ("SA_BLAS_LIBRARY", f'"{library}"'),
        ]
        flags, link = [*FLAGS, "-MMD"], ["-lm"]
        if sys.platform == "win32":
            flags += WINDOWS_FLAGS
            link += WINDOWS_LINK
        else:
            flags.append("-pthread")
            link.insert(0, "-pthread")
        if sys.platform == "linux":
            link.append("-ldl")
        if sanitize:
            flags[0] = "-O1"  # the tiles take minutes at -O3
            flags += [f"-fsanitize={sanitize}", "-g", "-fno-omit-frame-pointer", "-UNDEBUG"]
            link.append(f"-fsanitize={sanitize}")
        else:
            flags.append("-g0")
            link.append("-Wl,-x" if sys.platform == "darwin" else "-Wl,-s")
        if os.environ.get("SPARSEATTN_WERROR") == "1":
            flags.append("-Werror")
        extension.extra_compile_args, extension.extra_link_args = flags, link


def is_current(built: Path) -> bool:
    """Newer than everything that the compiler listed in the .d file beside it."""
    try:
        text = built.with_suffix(".d").read_text()
        made = built.stat().st_mtime
        names = text.split(":", 1)[1].replace("\\\n", " ").split()
        return all(os.stat(name).st_mtime < made for name in [*names, __file__])
    except OSError:
        return False


class BuildPy(build_py):
    """The script that trained the embedded model stays in the source archive."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        found = super().find_package_modules(package, package_dir)
        return [entry for entry in found if entry[1] != "train_tiny"]


setup(
    ext_modules=[
        Extension(
            "sparseattn._core",
            sources=sources(),
            depends=sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("csrc/**/*.h")),
            include_dirs=["csrc", numpy.get_include()],
        )
    ],
    cmdclass={"build_ext": BuildExt, "build_py": BuildPy},
)
