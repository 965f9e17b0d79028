# SPDX-License-Identifier: Apache-2.0
"""Seven large networks in PyTorch, with the channel counts of their papers.

`head` makes the output; `heads` is empty, as there is no attention.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

CLASSES, SIZE = 11, 64
# Of the data that they were made for: CamVid, cells, ImageNet, faces.
SIZES = {
    "SegNet": (360, 480),
    "U-Net": (512, 512),
    "ResNet-18": (224, 224),
    "ResNet-50": (224, 224),
    "DenseNet-121": (224, 224),
    "VAE with group norm": (256, 256),
    "ShuffleNet": (224, 224),
}


class Named(nn.Module):
    """A network that tools can ask for hints."""

    heads: dict[str, int] = {}


class ConvNorm(nn.Module):
    """Convolution, batch norm and, unless told not to, ReLU."""

    def __init__(
        self, ins: int, outs: int, size: int = 3, relu: bool = True, **options: Any
    ) -> None:
        super().__init__()
        pad = size // 2
        self.conv = nn.Conv2d(ins, outs, size, padding=pad, bias=False, **options)
        self.norm, self.relu = nn.BatchNorm2d(outs), relu

    def forward(self, x: Any) -> Any:
        x = self.norm(self.conv(x))
        return F.relu(x) if self.relu else x


class SegNet(Named):
    """VGG-16's convolutions, mirrored, with max un-pooling."""

    def __init__(self) -> None:
        super().__init__()
        widths, depths = (64, 128, 256, 512, 512), (2, 2, 3, 3, 3)
        self.down, self.up, ins = nn.ModuleList(), nn.ModuleList(), 3
        for width, depth in zip(widths, depths):
            stage = [ConvNorm(ins if i == 0 else width, width) for i in range(depth)]
            self.down.append(nn.Sequential(*stage))
            ins = width
        for s in (4, 3, 2, 1):
            outs = [widths[s]] * (depths[s] - 1) + [widths[s - 1]]
            stage = [ConvNorm(widths[s], out) for out in outs]
            self.up.append(nn.Sequential(*stage))
        self.up.append(ConvNorm(64, 64))
        self.head = nn.Conv2d(64, CLASSES, 3, padding=1)

    def forward(self, x: Any) -> Any:
        places = []
        for stage in self.down:
            y = stage(x)
            x, where = F.max_pool2d(y, 2, return_indices=True)
            places.append((where, y.shape[2:]))  # odd sizes are rounded down
        for stage in self.up:
            where, size = places.pop()
            x = stage(F.max_unpool2d(x, where, 2, output_size=size))
        return self.head(x)


class UNet(Named):
    """Four levels, skips by concatenation, learnt up-convolutions."""

    def __init__(self, widths: Sequence[int] = (64, 128, 256, 512, 1024)) -> None:
        super().__init__()
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        self.grow, ins = nn.ModuleList(), 3
        for width in widths:
            self.down.append(self._pair(ins, width))
            ins = width
        for small, large in zip(widths[-2::-1], widths[:0:-1]):
            self.grow.append(nn.ConvTranspose2d(large, small, 2, 2))
            self.up.append(self._pair(2 * small, small))
        self.head = nn.Conv2d(widths[0], CLASSES, 1)

    @staticmethod
    def _pair(ins: int, outs: int) -> nn.Module:
        return nn.Sequential(ConvNorm(ins, outs), ConvNorm(outs, outs))

    def forward(self, x: Any) -> Any:
        skips = []
        for i, stage in enumerate(self.down):
            x = stage(x if i == 0 else F.max_pool2d(x, 2))
            skips.append(x)
        skips.pop()
        for grow, stage in zip(self.grow, self.up):
            x = stage(torch.cat([skips.pop(), grow(x)], 1))
        return self.head(x)


class Block(nn.Module):
    """Residual: two 3x3, or 1x1, 3x3, 1x1 to four times the width."""

    def __init__(self, ins: int, width: int, stride: int, deep: bool) -> None:
        super().__init__()
        outs = 4 * width if deep else width
        first = ConvNorm(ins, width, 1) if deep else None
        middle = ConvNorm(width if deep else ins, width, stride=stride)
        last = ConvNorm(width, outs, 1 if deep else 3, relu=False)
        self.body = nn.Sequential(*[m for m in (first, middle, last) if m])
        same = ins == outs and stride == 1
        skip = nn.Identity() if same else ConvNorm(ins, outs, 1, False, stride=stride)
        self.skip = skip

    def forward(self, x: Any) -> Any:
        return F.relu(self.body(x) + self.skip(x))


class ResNet(Named):
    """ResNet-18 and -50."""

    def __init__(self, depths: Sequence[int], deep: bool) -> None:
        super().__init__()
        self.stem, ins, blocks = ConvNorm(3, 64, 7, stride=2), 64, []
        for s, depth in enumerate(depths):
            for i in range(depth):
                stride = 2 if s and i == 0 else 1
                blocks.append(Block(ins, 64 * 2**s, stride, deep))
                ins = 64 * 2**s * (4 if deep else 1)
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(ins, CLASSES)

    def forward(self, x: Any) -> Any:
        x = self.blocks(F.max_pool2d(self.stem(x), 3, 2, 1))
        return self.head(x.mean((2, 3)))


class Dense(nn.Module):
    """Norm, 1x1, norm, 3x3; the input and 32 more channels."""

    def __init__(self, ins: int) -> None:
        super().__init__()
        self.norm, self.narrow = nn.BatchNorm2d(ins), ConvNorm(ins, 128, 1)
        self.conv = nn.Conv2d(128, 32, 3, padding=1, bias=False)

    def forward(self, x: Any) -> Any:
        return torch.cat([x, self.conv(self.narrow(F.relu(self.norm(x))))], 1)


class Halve(nn.Module):
    """Norm, 1x1 to half the channels, mean pooling."""

    def __init__(self, ins: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(ins)
        self.conv = nn.Conv2d(ins, ins // 2, 1, bias=False)

    def forward(self, x: Any) -> Any:
        return F.avg_pool2d(self.conv(F.relu(self.norm(x))), 2)


class DenseNet(Named):
    """DenseNet-121."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, width, layers = ConvNorm(3, 64, 7, stride=2), 64, []
        for s, depth in enumerate((6, 12, 24, 16)):
            for _ in range(depth):
                layers.append(Dense(width))
                width += 32
            if s < 3:
                layers.append(Halve(width))
                width //= 2
        self.layers, self.norm = nn.Sequential(*layers), nn.BatchNorm2d(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Any) -> Any:
        x = self.layers(F.max_pool2d(self.stem(x), 3, 2, 1))
        return self.head(F.relu(self.norm(x)).mean((2, 3)))


class NormBlock(nn.Module):
    """Residual, with group norm before each convolution."""

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__()
        self.one, self.a = nn.GroupNorm(8, ins), nn.Conv2d(ins, outs, 3, padding=1)
        self.two, self.b = nn.GroupNorm(8, outs), nn.Conv2d(outs, outs, 3, padding=1)
        self.skip = nn.Identity() if ins == outs else nn.Conv2d(ins, outs, 1)

    def forward(self, x: Any) -> Any:
        y = self.b(F.silu(self.two(self.a(F.silu(self.one(x))))))
        return self.skip(x) + y


class VAE(Named):
    """Encoder to a mean and a spread, decoder; the mean is passed on."""

    def __init__(self, widths: Sequence[int] = (64, 128, 256)) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1)
        steps = list(zip(widths, (*widths[1:], widths[-1])))
        self.down = nn.ModuleList(NormBlock(*step) for step in steps)
        self.narrow = nn.Conv2d(widths[-1], 8, 3, padding=1)
        self.start = nn.Conv2d(4, widths[-1], 3, padding=1)
        self.up = nn.ModuleList(NormBlock(b, a) for a, b in reversed(steps))
        self.norm = nn.GroupNorm(8, widths[0])
        self.head = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, x: Any) -> Any:
        x = self.stem(x)
        for block in self.down:
            x = F.avg_pool2d(block(x), 2)
        mean, spread = torch.chunk(self.narrow(x), 2, 1)
        x = self.start(mean + 0.1 * torch.exp(0.5 * spread))
        for block in self.up:
            x = block(F.interpolate(x, scale_factor=2))
        return self.head(F.silu(self.norm(x)))


class Shuffle(nn.Module):
    """ShuffleNet v1's block of three groups: 1x1, shuffle, depthwise, 1x1."""

    def __init__(self, ins: int, outs: int, stride: int, groups: int) -> None:
        super().__init__()
        self.stride, new, mid = stride, outs - ins if stride == 2 else outs, outs // 4
        self.a = ConvNorm(ins, mid, 1, groups=groups)
        self.b = ConvNorm(mid, mid, 3, False, stride=stride, groups=mid)
        self.c = ConvNorm(mid, new, 1, False, groups=3)

    def forward(self, x: Any) -> Any:
        y = self.a(x)
        b, _, h, w = y.shape
        y = y.reshape(b, 3, -1, h, w).transpose(1, 2).reshape(b, -1, h, w)
        y = self.c(self.b(y))
        if self.stride == 2:
            return F.relu(torch.cat([F.avg_pool2d(x, 3, 2, 1), y], 1))
        return F.relu(x + y)


class ShuffleNet(Named):
    """ShuffleNet v1 of three groups: 240, 480, 960 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, ins, blocks = ConvNorm(3, 24, stride=2), 24, []
        for width, depth in ((240, 4), (480, 8), (960, 4)):
            for i in range(depth):
                groups = 1 if ins == 24 else 3
                blocks.append(Shuffle(ins, width, 2 if i == 0 else 1, groups))
                ins = width
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(ins, CLASSES)

    def forward(self, x: Any) -> Any:
        x = self.blocks(F.max_pool2d(self.stem(x), 3, 2, 1))
        return self.head(x.mean((2, 3)))


BIG: dict[str, Callable[[], Named]] = {
    "SegNet": SegNet,
    "U-Net": UNet,
    "ResNet-18": lambda: ResNet((2, 2, 2, 2), deep=False),
    "ResNet-50": lambda: ResNet((3, 4, 6, 3), deep=True),
    "DenseNet-121": DenseNet,
    "VAE with group norm": VAE,
    "ShuffleNet": ShuffleNet,
}


def network(
    name: str, size: tuple[int, int] = (SIZE, SIZE)
) -> tuple[nn.Module, torch.Tensor]:
    """The module, and an example of its input."""
    return BIG[name](), torch.zeros(1, 3, *size)
