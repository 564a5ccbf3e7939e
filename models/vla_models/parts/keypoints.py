"""What Diffusion Policy sees (Chi et al., arXiv 2303.04137, section III.B): a crop, ResNet18, spatial softmax."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vla_models.parts.resnet import ResNet18, feature_size
from vla_models.parts.vision import SpatialSoftmax


class KeypointEncoder(nn.Module):
    """(N, 3, h, w), normalised -> (N, 2 points), from the coordinates of keypoints in ResNet18's feature map.

    size: (h, w). norm, width: of the ResNet18.
    """

    def __init__(self, size: tuple[int, ...], points: int, norm: str, width: int):
        super().__init__()
        self.backbone = ResNet18(norm, width)
        grid = feature_size(size[0]), feature_size(size[1])
        self.pool = SpatialSoftmax(self.backbone.channels, points, grid, sharpness=False)
        self.out = nn.Linear(2 * points, 2 * points)

    def forward(self, image: Tensor) -> Tensor:
        return nn.functional.relu(self.out(self.pool(self.backbone(image)).flatten(1)))


def crop(images: Tensor, size: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """(N, 3, h, w) -> (N, 3, *size) at random places of the generator, or in the middle; all of it for no size."""
    if not size:
        return images
    spare = [pixels - kept for pixels, kept in zip(images.shape[-2:], size, strict=True)]
    if generator is None:
        top, left = (round(pixels / 2) for pixels in spare)
        return images[..., top : top + size[0], left : left + size[1]]
    rows, columns = (
        (torch.randint(0, pixels + 1, (len(images), 1), generator=generator) + torch.arange(kept)).to(images.device)
        for pixels, kept in zip(spare, size, strict=True)
    )
    index = torch.arange(len(images), device=images.device)[:, None, None]
    return images.movedim(1, -1)[index, rows[:, :, None], columns[:, None]].movedim(-1, 1)
