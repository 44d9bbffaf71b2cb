"""Find corpus files on this machine; the only code in this package that downloads anything.

Order: the folder SKIPSTONE_DATA, the cache (SKIPSTONE_CACHE, else ~/.cache/skipstone), system folders, the download.
"""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import shutil
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

log = logging.getLogger(__name__)
TIMEOUT = 30  # seconds without a byte
CHUNK = 1 << 20  # bytes


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """A published file: where to find it on this machine or on the web, and how to check it.

    path: its path below the data folder, such as `enwik8/enwik8`. size: its size in bytes. sha256: its hash in
    lower-case hexadecimal. url: its address; None means that it cannot be downloaded. member: the name of the file in
    the zip archive at `url`; None means that `url` is the file itself. download_size: size of that archive in bytes;
    not used without `member`. system: absolute paths where system packages install the file. hint: what the user can do
    if the file is missing. A size or hash that is None is not checked.
    """

    path: str
    size: int | None = None
    sha256: str | None = None
    url: str | None = None
    member: str | None = None
    download_size: int | None = None
    system: tuple[str, ...] = ()
    hint: str = ""


def offline() -> bool:
    """Return whether the environment variable SKIPSTONE_OFFLINE, which forbids network access, is set.

    Empty and "0" count as not set.
    """
    return os.environ.get("SKIPSTONE_OFFLINE", "") not in ("", "0")


def cache_folder() -> Path:
    """Return the folder for downloads: the environment variable SKIPSTONE_CACHE, or ~/.cache/skipstone."""
    return Path(os.environ.get("SKIPSTONE_CACHE") or Path.home() / ".cache" / "skipstone").expanduser()


def places(source: SourceFile) -> list[Path]:
    """Return every path at which a file is looked for, in the order in which they are tried.

    The order is: below the folder SKIPSTONE_DATA (if this environment variable is set), below the cache folder, and the
    system paths of `source`. The files need not exist.
    """
    data = os.environ.get("SKIPSTONE_DATA")
    roots = ([Path(data).expanduser()] if data else []) + [cache_folder()]
    return [root / source.path for root in roots] + [Path(path) for path in source.system]


def locate(source: SourceFile) -> Path:
    """Return the path of the file `source` on this machine, downloading it to the cache folder if it is not there yet.

    Raises FileNotFoundError if the file is not on this machine and cannot be downloaded, and ValueError if a file at
    a path where it is looked for (`places`), or the downloaded file, has another size or hash than `source` says; a
    file that was there is left unchanged.
    """
    looked = places(source)
    for path in looked:
        if path.is_file():
            problem = _difference(path, source.size, source.sha256)
            if problem:
                raise ValueError(f"{path} {problem}; move it away, so that the published file is used instead")
            return path
    if source.url is None:
        raise FileNotFoundError(_absent(source, looked, ""))
    if offline():
        raise FileNotFoundError(_absent(source, looked, "SKIPSTONE_OFFLINE is set, so it was not downloaded"))
    target = cache_folder() / source.path
    try:
        _download(source, target)
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it is the response too, and holds its connection open
        reason = f"downloading {source.url} failed ({str(error) or type(error).__name__})"
        raise FileNotFoundError(_absent(source, looked, reason)) from error
    return target


def _absent(source: SourceFile, looked: list[Path], reason: str) -> str:
    """Return the message for a published file that was not found.

    looked: the paths at which it was looked for. reason: why it was not downloaded; "" for none.
    """
    where = ", ".join(map(str, looked))
    todo = source.hint or f"put it at $SKIPSTONE_DATA/{source.path}" + (f" (from {source.url})" if source.url else "")
    return f"{source.path} is not here: looked for {where}; " + (f"{reason}; " if reason else "") + todo


def _download(source: SourceFile, target: Path) -> None:
    """Download to a temporary file, check, then rename: `target` is the whole published file or does not exist."""
    assert source.url is not None
    log.info("downloading %s to %s", source.url, target)
    target.parent.mkdir(parents=True, exist_ok=True)
    size = source.download_size if source.member else source.size
    with _aside(target) as fetched:
        with urllib.request.urlopen(source.url, timeout=TIMEOUT) as response, fetched.open("wb") as out:
            _copy(response, out, size)
        _check(fetched, source.url, size, None if source.member else source.sha256)
        if source.member is None:
            fetched.replace(target)
        else:
            _unpack(source, fetched, target)


def _unpack(source: SourceFile, archive: Path, target: Path) -> None:
    with _aside(target) as unpacked:
        try:
            with (
                zipfile.ZipFile(archive) as opened,
                opened.open(str(source.member)) as member,
                unpacked.open("wb") as out,
            ):
                _copy(member, out, source.size)
        except (zipfile.BadZipFile, KeyError, zlib.error, EOFError) as error:
            raise ValueError(f"{source.url} is not the expected archive of {source.member}: {error}") from None
        _check(unpacked, f"{source.member} in {source.url}", source.size, source.sha256)
        unpacked.replace(target)


def _copy(source: IO[bytes], out: IO[bytes], size: int | None) -> None:
    """Copy a stream, but at most one byte more than expected, which shows that it is too long without filling the disk.

    size: the expected number of bytes; None means that all is copied.
    """
    if size is None:
        shutil.copyfileobj(source, out, CHUNK)
        return
    left = size + 1
    while left and (chunk := source.read(min(CHUNK, left))):
        out.write(chunk)
        left -= len(chunk)


@contextmanager
def _aside(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`, and remove it afterwards.

    It is on the same file system, so that renaming is atomic.
    """
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    os.close(handle)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def _check(path: Path, what: str, size: int | None, sha256: str | None) -> None:
    problem = _difference(path, size, sha256)
    if problem:
        raise ValueError(f"the download from {what} {problem} and was discarded")


def _difference(path: Path, size: int | None, sha256: str | None) -> str:
    """Return in words how a file's size or SHA-256 differs from the expected one; "" if it does not.

    size, sha256: the expected values; those that are None are not checked.
    """
    actual = path.stat().st_size
    if size is not None and actual != size:
        more = "more than " if actual == size + 1 else ""
        return f"has {more}{size if more else actual} bytes, the published file has {size}"
    if sha256 is None:
        return ""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return "" if digest == sha256 else f"has SHA-256 {digest}, the published file has {sha256}"
