"""Download the photos of cats and dogs:  python -m common.data.download"""

import hashlib
import shutil
import stat
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath, PureWindowsPath
from urllib.parse import urlsplit

from tqdm import tqdm

from common.config import UserError, run_script
from common.data.folders import walk
from common.data.web import encode_address, explain
from common.storage import alone_in, atomic_write

ADDRESSES = (
    "https://storage.googleapis.com/kaggle-data-sets/550917/1003830/bundle/archive.zip",
    "https://download.microsoft.com/download/3/E/1/3E1C3F21-ECDB-4869-8368-6DEBA77B919F/kagglecatsanddogs_5340.zip",
)
SHA256 = {  # of archives, as TensorFlow Datasets and others publish it
    ADDRESSES[1]: "b7974bd00a84a99921f36ee4403f089853777b5ae8d151c76a86e64900334af9",
}
FOLDER = "cats-and-dogs"
TIMEOUT = 10.0  # seconds without an answer
MIN_SPEED, MEASURED = 10_000, 60.0  # bytes per second, that an address must send when measured for these seconds
MAX_RATIO = 20  # of the size of what an archive unpacks to and its own; photos are hardly packed
ATTEMPTS = 5  # an address may fail this often in a row without sending a byte
CHUNK = 1 << 20  # bytes


class DownloadError(Exception):
    """One address did not give the archive; the message says why."""


@dataclass
class Config:
    """Where the photos go."""

    data: str = "data"  # the folder; the photos are in cats-and-dogs below it


def download(home: Path, addresses: Sequence[str] = ADDRESSES) -> Path:
    """Downloads and unpacks the first archive available into `home/cats-and-dogs`, and returns that folder.

    An interrupted download is resumed, by this call and, as its beginning is kept in `home/.cache`, by the next. The
    folder appears when all of it is unpacked. Raises `UserError`, with what to do by hand, if no address works.
    """
    folder = home / FOLDER
    if folder.is_dir() and _is_complete(folder):
        return folder
    (home / ".cache").mkdir(parents=True, exist_ok=True)
    with alone_in(home / ".cache", "the download of the photos"):
        if folder.is_dir():  # that has unpacked it in the meantime
            return folder
        return _download(home, folder, addresses)


def _download(home: Path, folder: Path, addresses: Sequence[str]) -> Path:
    failures = []
    for address in addresses:
        host = urlsplit(address).hostname
        archive = home / ".cache" / f"{host}-{PurePosixPath(urlsplit(address).path).name}"
        try:
            _fetch(address, archive)
            _unzip(archive, folder)
            archive.unlink(missing_ok=True)
            return folder
        except (DownloadError, OSError) as error:
            if folder.is_dir():  # another process has unpacked it in the meantime
                return folder
            failures.append(f"{host}: {error}")
    raise UserError(
        f"the cats and dogs could not be downloaded ({'; '.join(failures)}). By hand: open {addresses[-1]} in a "
        f"browser, and unpack it into {home}"
    )


def _is_complete(folder: Path) -> bool:
    """Whether the photos are there; an empty folder, such as somebody made by hand, is removed.

    Raises `UserError` where there are other files.
    """
    if any(not reason for _, reason in walk(folder)):
        return True
    try:
        folder.rmdir()
    except OSError as error:
        raise UserError(f"{folder} holds no photo, but other files: remove it, and run again") from error
    return False


def _fetch(address: str, archive: Path) -> None:
    """Downloads `address` to `archive`, continuing where `archive.part` ends; raises `DownloadError`."""
    if archive.exists():
        return
    part = archive.with_name(archive.name + ".part")
    failed = 0
    while True:
        offset = part.stat().st_size if part.exists() else 0
        try:
            complete = _receive(address, part, offset)
            problem = "the connection was lost"
        except urllib.error.HTTPError as error:
            if error.code == 416 and offset:  # what lies here does not fit what lies there: from the start
                part.unlink()
                complete, problem = False, "the download could not be resumed"
            else:
                raise DownloadError(f"answered {error.code} {error.reason}") from error
        except (urllib.error.URLError, HTTPException, OSError) as error:
            complete, problem = False, explain(error)
        if complete:
            if address in SHA256 and _sha256(part) != SHA256[address]:
                part.unlink()
                raise DownloadError("sent another file than the published one, by its SHA-256")
            part.replace(archive)
            return
        grown = part.exists() and part.stat().st_size > offset
        failed = 0 if grown else failed + 1
        if failed >= (ATTEMPTS if offset else 1):
            raise DownloadError(problem)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _receive(address: str, part: Path, offset: int) -> bool:
    """Appends what is missing to `part`; True if it is complete then."""
    request = urllib.request.Request(encode_address(address), headers={"Range": f"bytes={offset}-"} if offset else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        resumed = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {offset}-")
        offset = offset if resumed else 0
        length = answer.headers.get("Content-Length")
        total = offset + int(length) if length else None
        if total and total - offset > shutil.disk_usage(part.parent).free:
            raise DownloadError(f"its {total / 1e9:.1f} GB don't fit on the disk")
        label = f"downloading from {urlsplit(address).hostname}"
        with (
            part.open("ab" if resumed else "wb") as file,
            tqdm(desc=label, total=total, initial=offset, unit="B", unit_scale=True) as bar,
        ):
            started, received = time.monotonic(), 0
            while chunk := answer.read1(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
                received += len(chunk)
                seconds = time.monotonic() - started
                if seconds > MEASURED and received < MIN_SPEED * seconds:
                    raise DownloadError(f"sends less than {MIN_SPEED / 1000:.0f} kB per second")
        return total is None or part.stat().st_size == total


def _unzip(archive: Path, folder: Path) -> None:
    """Unpacks into `folder`, completely or not at all; deletes an archive that is damaged or tries to leave it."""
    try:
        with zipfile.ZipFile(archive) as opened, atomic_write(folder) as temporary:
            members = [member for member in opened.infolist() if not member.is_dir()]
            for member in members:
                _check_member(member)
            size = sum(member.file_size for member in members)
            if size > MAX_RATIO * archive.stat().st_size + CHUNK:
                raise zipfile.BadZipFile(f"it unpacks to {size / 1e9:.1f} GB, which photos don't")
            if size > shutil.disk_usage(archive.parent).free:
                raise DownloadError("the unpacked photos don't fit on the disk")
            temporary.mkdir()
            for member in tqdm(members, "unpacking", unit=" files"):
                opened.extract(member, temporary)
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, RuntimeError) as error:
        archive.unlink(missing_ok=True)
        raise DownloadError(f"sent something that is not a sound zip archive ({error})") from error


def _check_member(member: zipfile.ZipInfo) -> None:
    """Raises `BadZipFile` for a name that leaves the folder, and for links, which could."""
    name = member.filename
    leaves = (
        PureWindowsPath(name).anchor  # a drive or a root
        or ".." in PureWindowsPath(name).parts
        or stat.S_ISLNK(member.external_attr >> 16)
    )
    if leaves:
        raise zipfile.BadZipFile(f"it tries to write outside its folder: {name!r}")


def main(config: Config) -> None:
    """Downloads, unless the folder exists."""
    print(f"the photos are in {download(Path(config.data))}")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
