"""A backbone with two heads: the network of the approaches that learn from classes."""

import torch
from torch import nn
from torch.nn import functional

from common.models.backbones import Backbone, rebuild_backbone
from common.models.checkpoint import Checkpoint
from common.models.pca import principal_components


class FeatureHead(nn.Module):
    """A linear map of a backbone's features, scaled to length 1; in float32 even where the backbone is in 16 bits."""

    def __init__(self, feature_dim: int, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(feature_dim, min(dim, feature_dim))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """BxC -> float32 BxD"""
        with torch.autocast(features.device.type, enabled=False):
            return self.linear(functional.normalize(features.float()))

    @torch.no_grad()
    def init_principal(self, features: torch.Tensor, whitening: float) -> torch.Tensor:
        """Makes the map that to the whitened principal components of unit vectors NxC; returns these, NxD."""
        mean, directions = principal_components(features, self.linear.out_features, whitening)
        self.linear.weight.copy_(directions)
        self.linear.bias.copy_(-directions @ mean)
        return self.linear(features)

    @torch.no_grad()
    def init_orthogonal(self, features: torch.Tensor) -> None:
        """Makes the map orthogonal, about the mean of unit vectors NxC.

        Features are positive, so the angles between them are small; about their mean they use the whole sphere.
        """
        nn.init.orthogonal_(self.linear.weight)
        self.linear.bias.copy_(-self.linear.weight @ features.mean(0))


class TwoHeadedNetwork(nn.Module):
    """The class head learns what the labels tell; the detail head keeps what the backbone saw before training.

    Labels such as cat and dog say nothing about breeds and single photos: a head that learns from them alone loses
    both. The embedding is [class head, detail_weight * detail head], each of length 1; with weight 0 one head is all.
    """

    def __init__(self, backbone: Backbone, class_dim: int, detail_dim: int, detail_weight: float) -> None:
        super().__init__()
        self.backbone = backbone.network
        self.class_head = FeatureHead(backbone.feature_dim, class_dim)
        self.detail_head = FeatureHead(backbone.feature_dim, detail_dim)
        self.detail_weight = detail_weight

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Bx3xSxS -> float32 BxD"""
        features = self.backbone(images)  # BxC
        classes = functional.normalize(self.class_head(features))
        if not self.detail_weight:
            return classes
        return torch.cat([classes, self.detail_weight * functional.normalize(self.detail_head(features))], 1)

    def split(self, embeddings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """BxD -> the unit vectors of the class head and of the detail head, which may be the same."""
        if not self.detail_weight:
            return embeddings, embeddings
        dim = self.class_head.linear.out_features
        return embeddings[:, :dim], embeddings[:, dim:] / self.detail_weight

    def init_heads(self, features: torch.Tensor, whitening: float) -> torch.Tensor:
        """Starts both heads from features before training, unit vectors NxC.

        Returns what the detail head makes of them, unit vectors NxD.
        """
        self.class_head.init_orthogonal(features)
        details = self.detail_head.init_principal(features, whitening)
        return functional.normalize(details if self.detail_weight else self.class_head(features).detach())

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> "TwoHeadedNetwork":
        """The trained network, in the shape that the run's hyperparameters say."""
        config = checkpoint.config
        backbone = rebuild_backbone(config, checkpoint.model["weights"])
        network = cls(backbone, config["class_dim"], config["detail_dim"], config["detail_weight"])
        network.load_state_dict(checkpoint.network)
        return network
