"""ShuffleNet V1, from Zhang et al., *ShuffleNet*, CVPR 2018, section 3 and table 1."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

# Channels of stage 2 by the number of groups (table 1, width 1); each further stage doubles them.
STAGE2_CHANNELS = {1: 144, 2: 200, 3: 240, 4: 272, 8: 384}
STAGE_UNITS = (4, 8, 4)
STEM_CHANNELS = 24


class ShuffleUnit(nn.Module):
    """Grouped 1×1, channel shuffle, 3×3 depthwise, grouped 1×1; figure 2 (b) and (c).

    With stride 2 the shortcut is a 3×3 average pooling whose result is concatenated, so that the
    branch gives the remaining channels.
    """

    def __init__(self, channels: int, out_channels: int, stride: int, groups: int) -> None:
        super().__init__()
        self.stride, self.groups = stride, groups
        inner = out_channels // 4
        branch = out_channels - channels if stride == 2 else out_channels
        # The stem's 24 channels are too few to be grouped (section 3.2).
        first_groups = 1 if channels == STEM_CHANNELS else groups
        self.reduce = nn.Conv2d(channels, inner, 1, groups=first_groups, bias=False)
        self.reduce_bn = nn.BatchNorm2d(inner)
        self.depthwise = nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False)
        self.depthwise_bn = nn.BatchNorm2d(inner)
        self.expand = nn.Conv2d(inner, branch, 1, groups=groups, bias=False)
        self.expand_bn = nn.BatchNorm2d(branch)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) → (B, C', ⌈H/stride⌉, ⌈W/stride⌉)."""
        y = self.reduce_bn(self.reduce(x)).relu()
        y = functional.channel_shuffle(y, self.groups)
        y = self.expand_bn(self.expand(self.depthwise_bn(self.depthwise(y))))
        if self.stride == 1:
            return (x + y).relu()
        return torch.cat([functional.avg_pool2d(x, 3, 2, 1), y], 1).relu()


class ShuffleNetV1(nn.Module):
    """Images (B, 3, H, W) → logits (B, num_classes).

    Args:
        num_classes: size of the head.
        groups: of the 1×1 convolutions: 1, 2, 3, 4 or 8.
    """

    def __init__(self, num_classes: int, groups: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, STEM_CHANNELS, 3, 2, 1, bias=False),
            nn.BatchNorm2d(STEM_CHANNELS),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
        )
        channels, out_channels = STEM_CHANNELS, STAGE2_CHANNELS[groups]
        units: list[nn.Module] = []
        for count in STAGE_UNITS:
            for number in range(count):
                stride = 2 if number == 0 else 1
                units.append(ShuffleUnit(channels, out_channels, stride, groups))
                channels = out_channels
            out_channels *= 2
        self.units = nn.Sequential(*units)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (B, num_classes)."""
        return self.fc(self.units(self.stem(images)).mean((2, 3)))
