"""Where photos come from: a folder, the download, or synthetic images; and those to search with."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from common.config import UserError
from common.data import download, synthetic
from common.data.decode import UnreadablePhotoError, decode_photo
from common.data.folders import find_photos, read_photo, walk
from common.data.web import fetch_photo, is_address


def locate_photos(data: str, home: Path = Path("data")) -> Path:
    """The folder that `data` stands for: a folder itself, "synthetic" (images drawn here), or "auto".

    "auto" is `home` if it holds photos; else they are downloaded there; else, with a line that says so, the synthetic
    images. Raises `UserError`.
    """
    if data == "auto":
        if any(not reason for _, reason in walk(home)):
            return home
        try:
            return _downloaded(home)
        except UserError as error:
            print(
                f"NO REAL PHOTOS: {error}\n"
                "Continuing with synthetic images: the results say nothing about real photos.\n",
                flush=True,
            )
            data = "synthetic"
    if data == "synthetic":
        folder = home / ".cache" / f"synthetic-{synthetic.VERSION}"
        return folder if folder.is_dir() else synthetic.draw_dataset(folder)
    if data == "sample" and not Path(data).exists():
        raise UserError("--data sample is called --data synthetic now")
    return require_folder(Path(data))


def require_folder(folder: Path) -> Path:
    """`folder`; raises `UserError` if it is none."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: name one that holds photos, or leave the option out")
    return folder


def _downloaded(home: Path) -> Path:
    download.download(home)
    return home


def find_queries(names: Iterable[str], exclude: Sequence[str] = ()) -> tuple[dict[str, bytes | None], dict[str, str]]:
    """The photos that are meant by paths, folders and http(s) addresses, and why others can't be used.

    {name: content}, None where it is to be read from the file of that name; and {name: reason}. Files that are named
    are decoded, those in folders are not.
    """
    usable: dict[str, bytes | None] = {}
    unusable = {}
    for name in names:
        try:
            if is_address(name):
                content = fetch_photo(name)
                decode_photo(content, min_size=1)
                usable[name] = content
            elif Path(name).is_dir():
                inside = find_photos(Path(name), exclude).photos
                if not inside:
                    raise UserError("this folder holds no photo")
                usable |= {str(Path(name) / path): None for path, _ in inside}
            else:
                decode_photo(read_photo(Path(name)), min_size=1)
                usable[name] = None
        except OSError as error:
            unusable[name] = f"{error.strerror}: name a photo, a folder of photos or an http(s) address"
        except (UserError, UnreadablePhotoError) as error:
            unusable[name] = str(error)
    return usable, unusable
