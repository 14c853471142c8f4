"""Layers that more than one network uses."""

import torch
from torch import nn
from torch.nn import functional


class GeM(nn.Module):
    """Generalized mean pooling, (mean of x^p)^(1/p) over the maps: [B, C, H, W] -> float32 [B, C].

    Radenovic et al. 2018, Fine-tuning CNN Image Retrieval with No Human Annotation. p = 1 is average pooling; a larger
    p gives more weight to where a feature is strongest. Negative values keep their sign. What is pooled already,
    [B, C], passes. Computed in float32 even where the network computes in bfloat16, whose 8 bits would make different
    photos tie.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def extra_repr(self) -> str:
        """`p`, which is not a parameter."""
        return f"p={self.p}"

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] or [B, C] -> float32 [B, C]."""
        features = features.float()
        if features.ndim != 4:
            return features
        if self.p == 1:
            return features.mean((2, 3))
        moment = (features.sign() * features.abs().pow(self.p)).mean((2, 3))
        return moment.sign() * moment.abs().clamp(min=1e-12).pow(1 / self.p)  # the root has infinite slope at 0


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """3x3 convolution, batch normalization, ReLU."""
    convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class ResidualBlock(nn.Module):
    """Two convolutions with a shortcut (He et al. 2015)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(conv3x3(inputs, outputs, stride), conv3x3(outputs, outputs)[:2])
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1:
            self.shortcut = nn.Sequential(
                nn.AvgPool2d(stride, ceil_mode=True), nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """BxCxHxW -> BxC'xH'xW'"""
        return functional.relu(self.convolutions(maps) + self.shortcut(maps))
