"""Decodes image files with a limit on memory, and prints what goes wrong:

python -m tests.robustness.decode_images 0 0        # all of odd_images.py; 1 0: without the largest, which take 20 s
python -m tests.robustness.decode_images 1 20000    # so many mutations, of the seed 1
"""

import resource
import signal
import sys
from collections.abc import Iterator

import numpy as np
from PIL import Image

from common.data.decode import UnreadablePhotoError, decode_photo
from tests.robustness.images import ImageFile, mutations, sample
from tests.robustness.odd_images import odd_images

MAX_SECONDS = 20  # for one file; most take milliseconds
MAX_MEMORY = 2_000_000_000  # bytes of address space; a photo of as many pixels as are allowed takes 1.0 GB


def problems(files: Iterator[ImageFile], names: set[str]) -> Iterator[str]:
    """What decoding does wrong with each of the files, whole and at a fraction of its size; adds their `names`."""
    signal.signal(signal.SIGALRM, _stop)
    expected = np.asarray(sample().convert("L").resize((12, 12), Image.Resampling.BOX), float).ravel()
    for file in files:
        if file.name in names:
            yield f"{file.name}: a second one of that name"
        names.add(file.name)
        for min_size in (0, 24):
            signal.alarm(MAX_SECONDS)
            try:
                image = decode_photo(file.data, min_size)
                result = "photo"
                if image.mode != "RGB":
                    yield f"{file.name}: mode {image.mode}"
                if file.expected == "sample":
                    grey = np.asarray(image.convert("L").resize((12, 12), Image.Resampling.BOX), float).ravel()
                    result = "sample" if np.corrcoef(grey, expected)[0, 1] > 0.9 else "another photo"
            except UnreadablePhotoError:
                result = "refused"
            except Exception as error:
                result = f"{type(error).__name__}: {error}"
            finally:
                signal.alarm(0)
            if result not in {"either": ("photo", "refused")}.get(file.expected, (file.expected,)):
                yield f"{file.name}: {result} instead of {file.expected}"


def _stop(*_: object) -> None:
    raise TimeoutError(f"more than {MAX_SECONDS} s")


if __name__ == "__main__":
    seed, count = map(int, sys.argv[1:])
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    files = mutations(seed, count) if count else odd_images(with_largest=not seed)
    names: set[str] = set()
    for problem in problems(files, names):
        print(problem, flush=True)
    print(f"{len(names)} images, peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:.0f} MB")
