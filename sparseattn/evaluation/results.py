"""The folder of a run: append-only records that survive an interrupt, and whole files.

``NAME.jsonl`` starts with the settings of the run; every further line is one finished piece of
work, flushed when it is done. A last line torn by a crash is dropped, the same command goes on
after what is there, and a folder of other settings is refused. Whole files are replaced at once.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from sparseattn.errors import ArgumentError, FileError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]
try:
    import msvcrt
except ImportError:  # not Windows
    msvcrt = None  # type: ignore[assignment]

__all__ = ["Records", "check_writable", "save_file", "write_whole"]

FORMAT = 1


def check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be made or written to, before any work; creates nothing."""
    place = folder
    while not place.exists():
        if place == place.parent:
            break
        place = place.parent
    if not place.is_dir():
        raise FileError(f"output folder {folder}: {place} is a file; name another folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise FileError(f"output folder {folder}: {place} is not writable; name another folder")


def save_file(folder: Path, name: str, content: str) -> None:
    """Write one whole file into a folder that is made if need be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _file_error(folder, error) from None
    write_whole(folder / name, content.encode())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that a crash leaves the old one or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        try:
            with open(temporary, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)
    except OSError as error:
        raise _file_error(path, error) from None


class Records:
    """Finished pieces of work by id, in memory, and in ``folder/name.jsonl`` where one is given.

    Parameters
    ----------
    folder : Path or None
    name : str
        The verb, which names the files.
    settings : mapping
        What the results depend on: a folder of other settings is refused.

    Raises
    ------
    ArgumentError
        If the folder holds another run.
    FileError
        If it cannot be written, or another process uses it.
    """

    def __init__(self, folder: Path | None, name: str, settings: Mapping[str, Any]) -> None:
        self.folder, self.name = folder, name
        self.settings = json.loads(json.dumps(settings))
        self.found: dict[str, dict[str, Any]] = {}
        self._file = -1
        if folder is not None:
            try:
                self._open(folder)
            except OSError as error:
                self.close()
                if isinstance(error, FileError):
                    raise
                raise _file_error(folder, error) from None
            except BaseException:
                self.close()
                raise

    def get(self, key: str) -> dict[str, Any] | None:
        """Return the record of that id, if there is one."""
        return self.found.get(key)

    def add(self, key: str, record: Mapping[str, Any]) -> None:
        """Keep a finished record; on disk before this returns, but for a power cut."""
        self.found[key] = dict(record)
        self._append({"id": key, **record})

    def sync(self) -> None:
        """Make what was added safe from a power cut as well."""
        if self._file >= 0:
            os.fsync(self._file)

    def write(self, suffix: str, content: str | bytes) -> Path | None:
        """Replace ``folder/name + suffix`` at once."""
        if self.folder is None:
            return None
        path = self.folder / f"{self.name}{suffix}"
        write_whole(path, content.encode() if isinstance(content, str) else content)
        return path

    def close(self) -> None:
        """Let another run use the folder."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Records:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _open(self, folder: Path) -> None:
        path = folder / f"{self.name}.jsonl"
        whole = folder / f"{self.name}.json"
        if whole.exists() and not path.exists():
            raise ArgumentError(
                f"output folder {folder} holds {whole.name} but not {path.name}, so that run "
                f"cannot go on: name another folder or delete {whole.name}"
            )
        folder.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | FLAGS, 0o666)
        lines, end = _read_lines(self._file)
        _lock(self._file, folder, lines)
        lines, end = _read_lines(self._file)  # the process before us may have just ended
        header = lines[0] if lines else None
        if header is None:
            if end:
                raise ArgumentError(
                    f"{path} is not a record of this program: name another folder or delete it"
                )
            os.ftruncate(self._file, 0)
            self._append({"id": "settings", "format": FORMAT, "settings": self.settings})
        else:
            self._check_settings(folder, header)
            os.ftruncate(self._file, end)  # drops a torn last line
        self.found = {line["id"]: line for line in lines[1:] if line["id"] not in OWN_IDS}
        self._append({"id": "owner", "pid": os.getpid(), "host": socket.gethostname()})

    def _check_settings(self, folder: Path, header: dict[str, Any]) -> None:
        theirs = header.get("settings")
        if header["id"] != "settings" or not isinstance(theirs, dict):
            theirs = {}
        names = [k for k in {**self.settings, **theirs} if self.settings.get(k) != theirs.get(k)]
        if header.get("format") != FORMAT:
            names.insert(0, "format")
        if not names:
            return
        name = names[0]
        first = f"{name} is {_short(theirs.get(name))} there and {_short(self.settings.get(name))}"
        more = f", {', '.join(names[1:5])} differ too" if len(names) > 1 else ""
        raise ArgumentError(
            f"output folder {folder} holds another run ({first} here{more}): "
            f"name another folder or delete it"
        )

    def _append(self, record: Mapping[str, Any]) -> None:
        if self._file < 0:
            return
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        try:
            while line:
                line = line[os.write(self._file, line) :]
        except OSError as error:
            raise _file_error(self.folder or Path(), error) from None


OWN_IDS = frozenset({"settings", "owner"})
# The second: Windows would write two bytes for each end of a line.
FLAGS = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
LOCK_AT = 0x7FFFFFFE  # Windows keeps others from the very byte that is locked: far behind the text


def _read_lines(file: int) -> tuple[list[dict[str, Any]], int]:
    """Return the records and where the last whole line ends; damaged lines are left out."""
    os.lseek(file, 0, os.SEEK_SET)
    content = b"".join(iter(lambda: os.read(file, 1 << 20), b""))
    end = content.rfind(b"\n") + 1
    records = []
    for line in content[:end].split(b"\n"):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("id"), str):
            records.append(record)
    return records, end


def _lock(file: int, folder: Path, lines: list[dict[str, Any]]) -> None:
    """Take the folder, or name the process that has it; a dead process holds no lock."""
    try:
        _take(file)
    except (BlockingIOError, PermissionError):
        owner: dict[str, Any] = next((r for r in reversed(lines) if r["id"] == "owner"), {})
        raise FileError(
            f"output folder {folder} is in use by process {owner.get('pid', '?')} on "
            f"{owner.get('host', '?')}: wait for it, or name another folder"
        ) from None
    except OSError:
        pass  # a file system without locks


def _take(file: int) -> None:
    """Lock the file until it is closed; an OSError where another process has it, or none can."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    elif msvcrt is not None:
        os.lseek(file, LOCK_AT, os.SEEK_SET)
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 48 else f"{text[:45]}..."


def _sync_folder(folder: Path) -> None:
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return  # not every system opens folders
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def _file_error(path: Path, error: OSError) -> FileError:
    return FileError(f"cannot write {path}: {error.strerror or error}")
