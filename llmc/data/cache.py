"""The user's cache folder, and downloads that are checked before they are kept."""

import hashlib
import os
import stat
import sys
import tempfile

from llmc.errors import UserError
from llmc.files.io import open_regular


class DownloadError(UserError):
    """A file could not be had from the network."""


def cache_dir() -> str:
    """The user's cache folder for llmc (it need not exist); of a user without a home that for temporary files."""
    home = os.path.expanduser("~")
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or home
        folder = os.path.join(base, "llmc", "cache")
    elif sys.platform == "darwin":
        base, folder = home, os.path.join(home, "Library", "Caches", "llmc")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or home
        folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.join(home, ".cache"), "llmc")
    return folder if os.path.isabs(base) else _temporary_dir()  # "~" stays where there is no HOME and no passwd entry


def _temporary_dir() -> str:
    """This user's folder under that for temporary files. Errors: UserError if it is there and not this user's alone."""
    user = os.getuid() if hasattr(os, "getuid") else "user"
    folder = os.path.join(tempfile.gettempdir(), f"llmc-{user}")
    if os.path.lexists(folder):
        check_owner(folder)
    return folder


def writable_cache_dir() -> str:
    """cache_dir(), made if missing; where that is not possible, this user's folder for temporary files.

    Errors: UserError where neither can be written, or where somebody else could write into the latter.
    """
    folder = cache_dir()
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        reason = error.strerror or str(error)
    temporary = _temporary_dir()
    try:
        os.makedirs(temporary, mode=0o700, exist_ok=True)
        with tempfile.TemporaryFile(dir=temporary):
            check_owner(temporary)
    except OSError as error:
        raise UserError(f"cannot write to {folder} or {temporary}: {reason}. HINT: set XDG_CACHE_HOME") from error
    return temporary


def check_owner(folder: str) -> None:
    """UserError for a folder under that of temporary files which is not this user's alone: others may fill it."""
    state = os.lstat(folder)
    others = None
    if not stat.S_ISDIR(state.st_mode):
        others = "it is no folder"
    elif hasattr(os, "getuid"):
        if state.st_uid != os.getuid():
            others = f"it belongs to user {state.st_uid}"
        elif state.st_mode & 0o022:
            others = f"others may write to it (mode {stat.S_IMODE(state.st_mode):o})"
    if others:
        raise UserError(f"{folder} is not used as a cache: {others}. HINT: set XDG_CACHE_HOME to a folder of yours")


def sha256_of(data: bytes) -> str:
    """The SHA-256 of the bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def read_bytes(path: str) -> bytes:
    """The content of a file. Errors: UserError."""
    try:
        with open_regular(path) as file:
            return file.read()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}. HINT: check the path") from error


def download(url: str, size: int, sha256: str, otherwise: str) -> bytes:
    """The bytes at a URL; DownloadError unless they are exactly the expected ones.

    otherwise: what helps a user without network, the end of the hint.
    """
    import http.client
    import urllib.request

    hint = f"HINT: connect to the internet, or {otherwise}"
    try:
        with urllib.request.urlopen(url, timeout=20) as response:
            data = response.read(size + 1)
    except (OSError, http.client.HTTPException) as error:
        raise DownloadError(f"cannot download {url}: {error}. {hint}") from error
    if len(data) != size or sha256_of(data) != sha256:
        got = f"{len(data)} bytes with SHA-256 {sha256_of(data)}" if len(data) <= size else f"more than {size} bytes"
        raise DownloadError(f"{url} sent {got}, expected {size} bytes with {sha256}. {hint}")
    return data
