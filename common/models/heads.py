"""A backbone with a head for each level of similarity: the network of every approach that trains one."""

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from common.data.photos import Photos
from common.models.backbones import Backbone, rebuild_backbone
from common.models.checkpoint import Checkpoint, strip_prefix
from common.models.decoded import DecodedPhotos
from common.models.pca import principal_components
from common.models.preprocessing import shrink

MAX_SAMPLE = 20_000  # photos that the heads' initial weights are computed from
SMALL = 32  # pixels, square, of the photo that the appearance is computed from
PCA_PHOTOS = 4000  # whose principal components are the appearance
RIDGE = 0.01  # penalty of the fitted logits, relative to the mean variance of a feature


class Task(NamedTuple):
    """What there is to learn from beside the photos themselves."""

    has_classes: bool
    features: torch.Tensor  # float32 [M, C], unit vectors: what the backbone makes of photos before training
    small: torch.Tensor | None = None  # float32 [P, 3, SMALL, SMALL], what `load_appearances` gives
    kinds: torch.Tensor | None = None  # float32 [M, K], square roots of the pre-trained classifier's probabilities
    targets: torch.Tensor | None = None  # float32 [N, D], what is to be kept of each of the N training photos

    @property
    def num_kinds(self) -> int:
        """K, or 0 without a classifier."""
        return 0 if self.kinds is None else self.kinds.shape[1]


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
        mean, directions = principal_components(sample(features), self.linear.out_features, whitening)
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


class KindHead(nn.Module):
    """What kind of thing a photo shows: class probabilities such as those of the pre-trained classifier.

    Their square roots are a unit vector; the dot product of two, the Bhattacharyya coefficient, says how much two
    distributions overlap. Their whitened principal components are the output.
    """

    def __init__(self, feature_dim: int, num_classes: int, dim: int) -> None:
        super().__init__()
        self.logits = nn.Linear(feature_dim, num_classes)
        self.components = nn.Linear(num_classes, min(dim, num_classes)).requires_grad_(False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """BxC -> float32 BxD"""
        with torch.autocast(features.device.type, enabled=False):
            probabilities = functional.softmax(self.logits(functional.normalize(features.float())), 1)
            return self.components(probabilities.clamp(min=1e-12).sqrt())  # the root has infinite slope at 0

    @torch.no_grad()
    def init_from_classifier(self, features: torch.Tensor, roots: torch.Tensor, whitening: float) -> torch.Tensor:
        """Fits the classifier's logits by ridge regression; returns the components of its probabilities, NxD.

        `features`: unit vectors NxC; `roots`: square roots of the classifier's probabilities of the same photos, NxK.
        """
        classified, features, roots = roots, sample(features), sample(roots)
        mean, directions = principal_components(roots, self.components.out_features, whitening)
        self.components.weight.copy_(directions)
        self.components.bias.copy_(-directions @ mean)
        logits = 2 * roots.clamp(min=1e-6).log()
        logits -= logits.mean(1, keepdim=True)  # softmax leaves them open to a constant
        weight, bias = ridge_regression(features, logits)
        self.logits.weight.copy_(weight)
        self.logits.bias.copy_(bias)
        return self.components(classified)


class AppearanceHead(nn.Linear):
    """What a photo looks like: principal components of the small photo, the best linear code (Baldi and Hornik 1989).

    Not trained. Where light and color are counts here, which a classification network learns to overlook.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(3 * SMALL**2, min(dim, 3 * SMALL**2))
        self.requires_grad_(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Bx3xSxS -> float32 BxD, whose mean squared length is 1"""
        with torch.autocast(images.device.type, enabled=False):
            return super().forward(shrink(images.float(), SMALL).flatten(1))

    @torch.no_grad()
    def init_principal(self, photos: torch.Tensor) -> None:
        """Makes the components those of photos, Nx3xSMALLxSMALL, normalized as the network's input is."""
        mean, directions = principal_components(photos.flatten(1), self.out_features, whitening=0)
        self.weight.copy_(directions)
        self.bias.copy_(-directions @ mean)


def load_appearances(decoded: DecodedPhotos, photos: Photos) -> torch.Tensor:
    """What `AppearanceHead.init_principal` takes, float32 [P, 3, SMALL, SMALL], of up to `PCA_PHOTOS` photos."""
    small = decoded.load_small(photos, PCA_PHOTOS, SMALL).permute(0, 2, 3, 1)
    return decoded.preprocessing.normalize(255 * small)


def sample(vectors: torch.Tensor) -> torch.Tensor:
    """Up to `MAX_SAMPLE` rows, evenly spread: enough to fit a linear map, whatever the number of photos."""
    return vectors[:: -(-len(vectors) // MAX_SAMPLE)]


def ridge_regression(inputs: torch.Tensor, outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight KxC and bias K of the linear map from NxC to NxK, float32, by ridge regression with `RIDGE`."""
    mean, output_mean = inputs.mean(0), outputs.mean(0)
    centered = (inputs - mean).double()
    covariance = centered.T @ centered / len(inputs)
    penalty = RIDGE * covariance.diagonal().mean().clamp(min=1e-12) * torch.eye(len(mean), dtype=torch.double)
    cross = centered.T @ (outputs - output_mean).double() / len(inputs)
    weight = torch.linalg.solve(covariance + penalty, cross).T.float()
    return weight, output_mean - weight @ mean


class MultiLevelNetwork(nn.Module):
    """The class head learns what labels tell; the kind and detail heads keep what the backbone saw before training.

    Labels such as cat and dog say nothing about breeds and single photos: a head that learns from them alone loses
    both. The embedding is [class head, kind_weight * kind head, detail_weight * detail head, appearance_weight *
    appearance head]; a head of weight 0 is left out. The outputs for class and detail have length 1, that for kind is
    the shorter, the less its probabilities say, and that for appearance has length 1 on average.

    `config` has these hyperparameters: `class_dim`, `kind_dim`, `kind_weight`, `detail_dim`, `detail_weight`,
    `appearance_dim`, `appearance_weight`; without `class_dim`, as where no labels are used, there is no class head, but
    always a detail head. `num_kinds`: classes of the pre-trained classifier; 0 if there is none, and then no kind head.
    """

    def __init__(self, backbone: Backbone, config: Any, num_kinds: int) -> None:
        super().__init__()
        self.backbone = backbone.network
        self.class_head, self.kind_head, self.detail_head, self.appearance_head = None, None, None, None
        self.kind_weight, self.detail_weight = config.kind_weight, config.detail_weight
        self.appearance_weight = config.appearance_weight
        self.dims = [0, 0, 0, 0]
        if hasattr(config, "class_dim"):
            self.class_head = FeatureHead(backbone.feature_dim, config.class_dim)
            self.dims[0] = self.class_head.linear.out_features
        if self.kind_weight and num_kinds:
            self.kind_head = KindHead(backbone.feature_dim, num_kinds, config.kind_dim)
            self.dims[1] = self.kind_head.components.out_features
        if self.detail_weight:
            self.detail_head = FeatureHead(backbone.feature_dim, config.detail_dim)
            self.dims[2] = self.detail_head.linear.out_features
        if self.appearance_weight:
            self.appearance_head = AppearanceHead(config.appearance_dim)
            self.dims[3] = self.appearance_head.out_features

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Bx3xSxS -> float32 BxE"""
        features, parts = self.backbone(images), []  # BxC
        if self.class_head is not None:
            parts.append(functional.normalize(self.class_head(features)))
        if self.kind_head is not None:
            parts.append(self.kind_weight * self.kind_head(features))
        if self.detail_head is not None:
            parts.append(self.detail_weight * functional.normalize(self.detail_head(features)))
        if self.appearance_head is not None:
            parts.append(self.appearance_weight * self.appearance_head(images))
        return torch.cat(parts, 1)

    def split(self, embeddings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """BxE -> the unit vectors of the heads for class, kind and detail.

        Those of a missing head have no columns; but those of a missing detail head are those of the class head.
        """
        classes, kinds, details, _ = embeddings.split(self.dims, 1)
        return (
            classes,
            functional.normalize(kinds),
            classes if self.detail_head is None else details / self.detail_weight,
        )

    @torch.no_grad()
    def init_heads(self, task: Task, whitening: float) -> torch.Tensor:
        """Starts the heads from what there is before training.

        Returns what the kind and detail heads are to keep, their unit vectors beside each other.
        """
        features, kept = task.features, []
        if self.class_head is not None:
            self.class_head.init_orthogonal(features)
        if self.kind_head is not None and task.kinds is not None:
            kept.append(self.kind_head.init_from_classifier(features, task.kinds, whitening))
        if self.detail_head is not None:
            kept.append(self.detail_head.init_principal(features, whitening))
        elif self.class_head is not None:
            kept.append(self.class_head(features))
        if self.appearance_head is not None and task.small is not None:
            self.appearance_head.init_principal(task.small)
        return torch.cat([functional.normalize(each) for each in kept], 1)

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, prefix: str = "") -> "MultiLevelNetwork":
        """The trained network, in the shape that the run's hyperparameters say; `prefix`: of its names in the file."""
        state = strip_prefix(prefix, checkpoint.network)
        backbone = rebuild_backbone(checkpoint.config, checkpoint.model["weights"])
        num_kinds = len(state.get("kind_head.logits.bias", ()))
        network = cls(backbone, SimpleNamespace(**checkpoint.config), num_kinds)
        network.load_state_dict(state)
        return network
