"""Where the photos of a run come from: a folder, the download, or synthetic images."""

from pathlib import Path

from common.config import UserError
from common.data import download, synthetic
from common.data.folders import walk


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
