"""The user's cache folder, and downloads that are checked before they are kept."""

import hashlib
import os
import sys
import tempfile

from llmc.errors import UserError


class DownloadError(UserError):
    """A file could not be had from the network."""


def cache_dir() -> str:
    """The user's cache folder for llmc (it need not exist)."""
    if sys.platform == "win32":
        return os.path.join(os.environ.get("LOCALAPPDATA") or os.path.expanduser("~"), "llmc", "cache")
    if sys.platform == "darwin":
        return os.path.expanduser("~/Library/Caches/llmc")
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "llmc")


def writable_cache_dir() -> str:
    """cache_dir(), made if missing; where that is not possible, this user's folder for temporary files."""
    folder = cache_dir()
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        user = os.getuid() if hasattr(os, "getuid") else "user"
        temporary = os.path.join(tempfile.gettempdir(), f"llmc-{user}")
        try:
            os.makedirs(temporary, mode=0o700, exist_ok=True)
        except OSError:
            raise UserError(f"cannot write to {folder} or {temporary}: {error.strerror}. HINT: set TMPDIR") from error
        return temporary


def sha256_of(data: bytes) -> str:
    """The SHA-256 of the bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def read_bytes(path: str) -> bytes:
    """The content of a file. Errors: UserError."""
    try:
        with open(path, "rb") as file:
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
