import numpy as np
import torch
from common.models.projection import ProjectedNetwork

from common.data.photos import load_photos
from common.models.backbones import Backbone
from common.models.decoded import DecodedPhotos


def test_the_projection_is_orthogonal_about_the_mean_feature(synthetic_photos, embedder):
    photos = load_photos(synthetic_photos).subset(np.arange(5))
    images = DecodedPhotos(embedder.preprocessing, None).load_sample(photos, 5)
    network = ProjectedNetwork(Backbone(embedder.network, embedder.preprocessing, "none", 512), 512)
    network.init_projection(images, embedder.preprocessing)
    batch = embedder.preprocessing.normalize(torch.from_numpy(images))
    with torch.inference_mode():
        features, projected = embedder.network(batch), network(batch)
    assert torch.allclose(projected.mean(0), torch.zeros(512), atol=1e-5)
    centered = features - features.mean(0)
    assert torch.allclose(projected @ projected.T, centered @ centered.T, atol=1e-4)
