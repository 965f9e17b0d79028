# SPDX-License-Identifier: Apache-2.0
"""The zoo in PyTorch: the constructs of `zoo_flax`, with the same widths."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

IMAGE, SEQUENCE = (2, 3, 8, 8), (2, 6, 3)


class Net(nn.Module):
    """Named layers, a function of them and the input, and a head of three outputs.

    heads: {layer: number}, for tools that need to be told.
    """

    def __init__(
        self,
        layers: dict[str, Any],
        body: Callable[[Any, Any], Any],
        shape: tuple[int, ...] = IMAGE,
        out: int = 8,
        heads: dict[str, int] | None = None,
        flat: bool = False,
    ) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        image = len(shape) == 4 and not flat
        self.head = nn.Conv2d(out, 3, 1) if image else nn.Linear(out, 3)
        self.body, self.shape, self.heads = body, shape, heads or {}

    def forward(self, x: Any) -> Any:
        return self.head(self.body(self, x))


def conv(ins: int = 3, outs: int = 8, size: int = 3, **options: Any) -> nn.Module:
    pad = options.get("dilation", 1) * (size // 2)
    return nn.Conv2d(ins, outs, size, padding=pad, **options)


def chain(*layers: nn.Module, out: int = 8) -> Net:
    """Layers one after the other, each with a ReLU."""

    def body(m: Any, x: Any) -> Any:
        for i in range(len(layers)):
            x = F.relu(getattr(m, f"layer{i}")(x))
        return x

    shape = SEQUENCE if isinstance(layers[0], nn.Linear) else IMAGE
    named = {f"layer{i}": layer for i, layer in enumerate(layers)}
    return Net(named, body, shape, out)


def normalised(norm: nn.Module) -> Net:
    layers = {"a": conv(), "n": norm, "b": conv(8)}
    return Net(layers, lambda m, x: F.relu(m.b(m.n(F.relu(m.a(x))))))


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of an image."""

    def forward(self, x: Any) -> Any:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def residual() -> Net:
    def body(m: Any, x: Any) -> Any:
        x = F.relu(m.a(x))
        return x + F.relu(m.c(F.relu(m.b(x))))

    return Net({"a": conv(), "b": conv(8, 6), "c": conv(6)}, body)


def concatenated() -> Net:
    def body(m: Any, x: Any) -> Any:
        return F.relu(m.c(torch.cat([F.relu(m.a(x)), F.relu(m.b(x))], 1)))

    return Net({"a": conv(), "b": conv(3, 6), "c": conv(14)}, body)


def chunked() -> Net:
    def body(m: Any, x: Any) -> Any:
        left, right = torch.chunk(F.relu(m.a(x)), 2, 1)
        return torch.cat([right, F.relu(m.b(left))], 1)

    return Net({"a": conv(), "b": conv(4, 6)}, body, out=10)


def with_itself() -> Net:
    def body(m: Any, x: Any) -> Any:
        x = F.relu(m.a(x))
        return torch.cat([x, x], 1)

    return Net({"a": conv()}, body, out=16)


def flattened() -> Net:
    def body(m: Any, x: Any) -> Any:
        return F.relu(m.b(torch.flatten(F.relu(m.a(x)), 1)))

    return Net({"a": conv(), "b": nn.Linear(512, 8)}, body, flat=True)


def to_image() -> Net:
    def body(m: Any, x: Any) -> Any:
        x = m.a(x.mean((2, 3))).reshape(-1, 8, 2, 2)
        return F.relu(m.b(x))

    layers = {"a": nn.Linear(3, 32), "b": nn.ConvTranspose2d(8, 6, 2, 2)}
    return Net(layers, body, out=6)


def attention(told: bool) -> Net:
    def body(m: Any, x: Any) -> Any:
        x = m.a(x)
        q, k, v = (f(x).reshape(2, 6, 2, -1).transpose(1, 2) for f in (m.q, m.k, m.v))
        y = torch.softmax(q @ k.transpose(-1, -2) / 2, -1) @ v
        return m.o(y.transpose(1, 2).reshape(2, 6, -1))

    layers = {"a": nn.Linear(3, 8)} | {n: nn.Linear(8, 8) for n in "qkvo"}
    heads = {"q": 2, "k": 2, "v": 2} if told else {}
    return Net(layers, body, SEQUENCE, heads=heads)


def grouped_queries() -> Net:
    def body(m: Any, x: Any) -> Any:
        x = m.a(x)
        q = m.q(x).reshape(2, 6, 4, -1).transpose(1, 2)
        k, v = (f(x).reshape(2, 6, 2, -1).transpose(1, 2) for f in (m.k, m.v))
        k, v = (torch.repeat_interleave(y, 2, 1) for y in (k, v))
        y = torch.softmax(q @ k.transpose(-1, -2) / 2, -1) @ v
        return m.o(y.transpose(1, 2).reshape(2, 6, -1))

    widths = {"a": (3, 8), "q": (8, 16), "k": (8, 8), "v": (8, 8), "o": (16, 8)}
    layers = {name: nn.Linear(*width) for name, width in widths.items()}
    return Net(layers, body, SEQUENCE, heads={"q": 4, "k": 2, "v": 2})


def pixel_shuffle() -> Net:
    layers = {"a": conv(3, 32), "p": nn.PixelShuffle(2)}
    return Net(layers, lambda m, x: m.p(F.relu(m.a(x))))


def channel_shuffle() -> Net:
    def body(m: Any, x: Any) -> Any:
        x = F.relu(m.b(F.relu(m.a(x))))
        x = x.reshape(2, 2, -1, 8, 8).transpose(1, 2).reshape(2, -1, 8, 8)
        return F.relu(m.c(x))

    layers = {"a": conv(), "b": conv(8, groups=2), "c": conv(8, groups=2)}
    return Net(layers, body)


def unpooled() -> Net:
    def body(m: Any, x: Any) -> Any:
        y, places = F.max_pool2d(F.relu(m.a(x)), 2, return_indices=True)
        y = F.max_unpool2d(F.relu(m.c(F.relu(m.b(y)))), places, 2)
        return F.relu(m.d(y))

    return Net({"a": conv(), "b": conv(8, 6), "c": conv(6), "d": conv(8)}, body)


def tied_embedding() -> Net:
    def body(m: Any, x: Any) -> Any:
        return F.linear(m.c(F.relu(m.b(m.e(x)))), m.e.weight)

    layers = {"e": nn.Embedding(11, 8), "b": nn.Linear(8, 6), "c": nn.Linear(6, 8)}
    return Net(layers, body, (2, 6), out=11)


def shared() -> Net:
    def body(m: Any, x: Any) -> Any:
        return m.s(F.relu(m.s(F.relu(m.a(x)))))

    return Net({"a": conv(), "s": conv(8)}, body)


def free(product: Callable[[Any, Any], Any]) -> Net:
    layers = {"w": nn.Parameter(torch.randn(3, 8))}
    return Net(layers, lambda m, x: F.relu(product(x, m.w)), SEQUENCE)


def gated() -> Net:
    def body(m: Any, x: Any) -> Any:
        x = F.relu(m.a(x))
        return x * torch.sigmoid(m.b(x).detach())

    return Net({"a": conv(), "b": conv(8, 8, 1)}, body)


def squeezed() -> Net:
    def body(m: Any, x: Any) -> Any:
        x = F.relu(m.a(x))
        gate = F.relu(m.b(x.mean((2, 3), keepdim=True)))
        return x * torch.sigmoid(m.c(gate))

    return Net({"a": conv(), "b": conv(8, 4, 1), "c": conv(4, 8, 1)}, body)


def recurrent(cell: Callable[..., nn.Module]) -> Net:
    layers = {"a": nn.Linear(3, 8), "r": cell(8, 8, batch_first=True)}
    return Net(layers, lambda m, x: m.r(m.a(x))[0], SEQUENCE)


def loop() -> Net:
    def body(m: Any, x: Any) -> Any:
        x = m.a(x)
        for _ in range(3):
            x = x + torch.tanh(m.b(x))
        return x

    layers = {"a": nn.Linear(3, 8), "b": nn.Linear(8, 8, bias=False)}
    return Net(layers, body, SEQUENCE)


def transpose(outs: int, **options: Any) -> nn.Module:
    return nn.ConvTranspose2d(8, outs, 4, 2, 1, **options)


ZOO: dict[str, Callable[[], Net]] = {
    "convolution": lambda: chain(conv(), conv(8)),
    "strided": lambda: chain(conv(), conv(8, stride=2)),
    "dilated": lambda: chain(conv(), conv(8, dilation=2)),
    "transposed": lambda: chain(conv(), transpose(6), out=6),
    "grouped": lambda: chain(conv(), conv(8, groups=2)),
    "grouped transposed": lambda: chain(conv(), transpose(8, groups=2)),
    "depthwise": lambda: chain(conv(), conv(8, groups=8)),
    "dense": lambda: chain(nn.Linear(3, 8), nn.Linear(8, 8)),
    "batch norm": lambda: normalised(nn.BatchNorm2d(8)),
    "layer norm": lambda: normalised(ChannelNorm(8)),
    "group norm": lambda: normalised(nn.GroupNorm(2, 8)),
    "instance norm": lambda: normalised(nn.InstanceNorm2d(8, affine=True)),
    "residual": residual,
    "concatenation": concatenated,
    "chunk and concatenation": chunked,
    "slice": lambda: Net({"a": conv()}, lambda m, x: F.relu(m.a(x))[:, 2:6], out=4),
    "concatenation with itself": with_itself,
    "flatten": flattened,
    "reshape before a transposed convolution": to_image,
    "attention": lambda: attention(told=False),
    "attention, told its heads": lambda: attention(told=True),
    "grouped queries": grouped_queries,
    "pixel shuffle": pixel_shuffle,
    "channel shuffle": channel_shuffle,
    "max un-pooling": unpooled,
    "tied embedding": tied_embedding,
    "weight sharing": shared,
    "free parameter, matmul": lambda: free(lambda x, w: x @ w),
    "free parameter, einsum": lambda: free(
        lambda x, w: torch.einsum("btc,cd->btd", x, w)
    ),
    "stop-gradient gate": gated,
    "squeeze and excite": squeezed,
    "gated linear unit": lambda: Net(
        {"a": conv(3, 16)}, lambda m, x: F.glu(F.relu(m.a(x)), 1)
    ),
    "LSTM": lambda: recurrent(nn.LSTM),
    "GRU": lambda: recurrent(nn.GRU),
    "loop": loop,
}


def network(name: str) -> tuple[nn.Module, torch.Tensor]:
    """The module, and an example of its input."""
    net = ZOO[name]()
    if name == "tied embedding":
        return net, torch.zeros(net.shape, dtype=torch.long)
    return net, torch.zeros(net.shape)
