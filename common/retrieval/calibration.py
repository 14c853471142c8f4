"""From which similarity on two photos are alike, to an embedding and in a gallery."""

import numpy as np

from common.retrieval import distortions
from common.retrieval.engine import SearchEngine
from common.retrieval.protocol import embed_copies

NUM_COPIED, NUM_PAIRS = 24, 20_000
KEPT, EXCEEDING = 0.95, 0.01
SEED = 0


def calibrate_threshold(engine: SearchEngine) -> float:
    """The cosine below which a photo is no more like another one than any two photos of the gallery are.

    Of photos of the gallery, evenly spread, copies by every kind of distortion, none of which training uses, are
    compared with their originals, and pairs are taken at random: see `threshold_between`.
    """
    gallery = engine.gallery
    chosen = np.unique(np.linspace(0, len(gallery) - 1, min(NUM_COPIED, len(gallery))).astype(int))
    originals = engine.knn.gallery[chosen]
    copies = [embed_copies(engine.embedder, gallery.subset(chosen), kind, SEED) for kind in distortions.KINDS]
    first, second = np.random.default_rng(SEED).integers(len(gallery), size=(2, NUM_PAIRS))
    differ = gallery.sha256[first] != gallery.sha256[second]
    pairs = engine.knn.gallery[first[differ]], engine.knn.gallery[second[differ]]
    alike = np.concatenate([(originals * each).sum(axis=1) for each in copies])
    return threshold_between(alike, (pairs[0] * pairs[1]).sum(axis=1))


def threshold_between(copies: np.ndarray, pairs: np.ndarray) -> float:
    """What `KEPT` of copies' similarities, float [M], reach, or `EXCEEDING` of pairs', float [N]: the lower of the two.

    Where copies and pairs lie apart, the nearest photos of an ordinary query lie between them, so the pairs
    decide; where they overlap, nothing that a copy may have is called dissimilar.
    """
    reached = float(np.quantile(copies, 1 - KEPT))
    return min(reached, float(np.quantile(pairs, 1 - EXCEEDING))) if len(pairs) else reached
