"""A backbone with a linear projection: the network of the approaches that learn from pairs and triplets."""

import numpy as np
import torch
from torch import nn

from common.models.backbones import Backbone, rebuild_backbone
from common.models.checkpoint import Checkpoint
from common.models.layers import ForceFloat32
from common.models.preprocessing import Preprocessing


class ProjectedNetwork(nn.Module):
    """The branch that all photos of a pair or triplet pass through."""

    def __init__(self, backbone: Backbone, embedding_dim: int) -> None:
        super().__init__()
        self.backbone = backbone.network
        self.projection = ForceFloat32(nn.Linear(backbone.feature_dim, embedding_dim))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Bx3xSxS -> BxD"""
        features = self.backbone(images)  # BxC
        return self.projection(features)  # BxD

    @torch.no_grad()
    def init_projection(self, images: np.ndarray, preprocessing: Preprocessing) -> None:
        """Makes the projection orthogonal, about the mean feature of some photos, uint8 NxSxSx3.

        The features are positive, so the angles between them are small; about their mean they use the whole sphere.
        """
        batches = torch.from_numpy(images).split(8)
        mean = torch.cat([self.backbone(preprocessing.normalize(batch)) for batch in batches]).mean(0)  # C
        (linear,) = self.projection
        assert isinstance(linear, nn.Linear)
        nn.init.orthogonal_(linear.weight)
        linear.bias.copy_(-linear.weight @ mean)

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> "ProjectedNetwork":
        """The trained network, in the shape that the run's hyperparameters say."""
        backbone = rebuild_backbone(checkpoint.config, checkpoint.model["weights"])
        network = cls(backbone, checkpoint.config["embedding_dim"])
        network.load_state_dict(checkpoint.network)
        return network
