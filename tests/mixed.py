# SPDX-License-Identifier: Apache-2.0
"""Random networks that mix everything vision networks are made of."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import networks
import numpy as np

# Few widths, so that networks share compiled operations.
WIDTHS = (4, 8)


class Weight(nn.Module):
    """A free parameter [channels of y, width]."""

    width: int

    @nn.compact
    def __call__(self, y: Any) -> Any:
        init = nn.initializers.lecun_normal()
        return self.param("weight", init, (y.shape[-1], self.width))


def shuffled(y: Any, groups: int, first: bool = False) -> Any:
    """Channels of `groups` runs dealt in turn; first: in NCHW."""
    n, h, w, c = y.shape
    if not first:
        y = y.reshape(n, h, w, groups, c // groups)
        return jnp.swapaxes(y, -1, -2).reshape(n, h, w, c)
    y = jnp.moveaxis(y, -1, 1).reshape(n, groups, c // groups, h, w)
    return jnp.moveaxis(y.transpose(0, 2, 1, 3, 4).reshape(n, c, h, w), 1, -1)


class Mixed(networks.Drawn):
    """As `Drawn`, with grouped convolutions, attention, shuffles, loops ..."""

    def _op(self, kind: str, y: Any, z: Any, b: int, train: bool) -> Any:
        extra = getattr(self, f"do_{kind}", None)
        if extra is not None:
            return extra(y, z, b)
        if y.shape[-1] not in WIDTHS:
            y = nn.Conv(WIDTHS[b % 2], (1, 1))(y)
        return super()._op(kind, y, z, b, train)

    def do_grouped(self, y: Any, z: Any, b: int) -> Any:
        y = nn.relu(nn.Conv(8, (1, 1))(y))
        return nn.Conv(WIDTHS[b % 2], (3, 3), feature_group_count=2)(y)

    def do_group_norm(self, y: Any, z: Any, b: int) -> Any:
        return nn.GroupNorm(num_groups=2)(nn.Conv(8, (1, 1))(y))

    def do_joined_norms(self, y: Any, z: Any, b: int) -> Any:
        parts = [nn.GroupNorm(2)(nn.Conv(n, (1, 1))(y)) for n in (4, 8)]
        return nn.relu(nn.GroupNorm(2 + b % 3)(jnp.concatenate(parts, axis=-1)))

    def do_instance_norm(self, y: Any, z: Any, b: int) -> Any:
        return nn.GroupNorm(num_groups=None, group_size=1)(y)

    def do_attention(self, y: Any, z: Any, b: int) -> Any:
        tokens = y[:, ::4, ::4].reshape(y.shape[0], 4, y.shape[-1])
        attend = nn.MultiHeadDotProductAttention(2, qkv_features=8, out_features=4)
        out = attend(tokens, tokens).reshape(y.shape[0], 2, 2, 4)
        return jnp.repeat(jnp.repeat(out, 4, 1), 4, 2)

    def do_fused_heads(self, y: Any, z: Any, b: int) -> Any:
        n, heads, width = y.shape[0], 1 + b % 3, 2 + b % 2
        tokens = y[:, ::4, ::4].reshape(n, 4, y.shape[-1])
        parts = nn.Dense(heads * 3 * width)(tokens).reshape(n, 4, heads, 3 * width)
        out = nn.dot_product_attention(*jnp.split(parts, 3, axis=-1))
        out = nn.Dense(4)(out.reshape(n, 4, heads * width)).reshape(n, 2, 2, 4)
        return jnp.repeat(jnp.repeat(out, 4, 1), 4, 2)

    def do_vector_to_image(self, y: Any, z: Any, b: int) -> Any:
        h, w = y.shape[1:3]
        image = nn.Dense(4 * 4 * 3)(y.mean(axis=(1, 2))).reshape(-1, 4, 4, 3)
        return jax.image.resize(image, (len(y), h, w, 3), "nearest")

    def do_pad_channels(self, y: Any, z: Any, b: int) -> Any:
        left, right = b % 3, 4 - b % 3
        wide = jnp.pad(y, ((0, 0), (0, 0), (0, 0), (left, right)))
        return nn.relu(wide + nn.Conv(wide.shape[-1], (1, 1))(y))

    def do_einsum(self, y: Any, z: Any, b: int) -> Any:
        return jnp.einsum("bhwc,cd->bhwd", y, Weight(WIDTHS[b % 2])(y))

    def do_matmul(self, y: Any, z: Any, b: int) -> Any:
        return nn.tanh(y @ Weight(WIDTHS[b % 2])(y))

    def do_glu(self, y: Any, z: Any, b: int) -> Any:
        value, gate = jnp.split(nn.Conv(8, (1, 1))(y), 2, axis=-1)
        return value * nn.sigmoid(gate)

    def do_channel_shuffle(self, y: Any, z: Any, b: int) -> Any:
        y = nn.Conv((8, 12, 12)[b % 3], (1, 1))(y)
        return nn.relu(shuffled(y, (2, 3, 4)[b % 3], b > 2))

    def do_shuffle_unit(self, y: Any, z: Any, b: int) -> Any:
        """ShuffleNet's: grouped, shuffled, depthwise, grouped; of 2 to 4 groups."""
        groups, width = ((2, 8), (3, 6), (4, 8))[b % 3]
        y = nn.Conv(width, (1, 1))(y)
        x = nn.relu(nn.Conv(width, (1, 1), feature_group_count=groups)(y))
        x = shuffled(x, groups, b > 2)
        x = nn.Conv(width, (3, 3), feature_group_count=width)(x)
        x = nn.Conv(width, (1, 1), feature_group_count=groups)(x)
        return nn.relu(x + y) if b > 2 else jnp.concatenate([x, y], axis=-1)

    def do_shuffle_halves(self, y: Any, z: Any, b: int) -> Any:
        """ShuffleNet v2's: one half passes, the two are shuffled; several times."""
        y = nn.Conv(8, (1, 1))(y)
        for _ in range(1 + b % 3):
            left, right = jnp.split(y, 2, axis=-1)
            right = nn.relu(nn.Conv(4, (1, 1))(right))
            right = nn.Conv(4, (3, 3), feature_group_count=4)(right)
            y = shuffled(jnp.concatenate([left, right], axis=-1), 2, b > 2)
        return y

    def do_shuffle_residual(self, y: Any, z: Any, b: int) -> Any:
        """LEDNet's: two layers end to end, added, shuffled; several times."""
        y = nn.Conv(8, (1, 1))(y)
        for _ in range(1 + b % 3):
            halves = [nn.Conv(4, (1, 1))(y), nn.Conv(4, (3, 3))(y)]
            y = nn.relu(y + jnp.concatenate(halves, axis=-1))
            y = shuffled(y, 2 + 2 * (b % 2), b > 2)
        return y

    def do_pixel_shuffle(self, y: Any, z: Any, b: int) -> Any:
        y = nn.Conv(8, (3, 3))(y[:, ::2, ::2])
        n, h, w, _ = y.shape
        y = y.reshape(n, h, w, 2, 2, 2).transpose(0, 1, 3, 2, 4, 5)
        return nn.Conv(4, (1, 1))(y.reshape(n, 2 * h, 2 * w, 2))

    def do_space_to_depth(self, y: Any, z: Any, b: int) -> Any:
        n, h, w, c = y.shape
        y = y.reshape(n, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5)
        y = nn.Conv(4, (1, 1))(y.reshape(n, h // 2, w // 2, 4 * c))
        return jax.image.resize(y, (n, h, w, 4), "bilinear")

    def do_split(self, y: Any, z: Any, b: int) -> Any:
        left, right = jnp.split(y, [1 + b % (y.shape[-1] - 1)], axis=-1)
        return jnp.concatenate([nn.relu(left), right], axis=-1)

    def do_excite(self, y: Any, z: Any, b: int) -> Any:
        squeezed = nn.relu(nn.Dense(4)(y.mean(axis=(1, 2))))
        return y * nn.sigmoid(nn.Dense(y.shape[-1])(squeezed))[:, None, None]

    def do_scan(self, y: Any, z: Any, b: int) -> Any:
        w = Weight(y.shape[-1])(y)

        def body(carry: Any, bias: Any) -> Any:
            carry = jnp.tanh(carry @ w) + carry
            return carry, (carry * bias).mean(axis=(1, 2))

        out, means = jax.lax.scan(body, y, jnp.arange(3.0), reverse=bool(b % 2))
        return out + means.sum(0)[:, None, None]

    def do_cond(self, y: Any, z: Any, b: int) -> Any:
        one, two = Weight(4)(y), Weight(4)(y)
        # Not by the mean, which of centred features is 0 but for rounding.
        large = jnp.square(y).mean() > 0.5
        return jax.lax.cond(large, lambda y: y @ one, lambda y: -y @ two, y)

    def do_remat(self, y: Any, z: Any, b: int) -> Any:
        return jax.checkpoint(lambda y, w: nn.relu(y @ w))(y, Weight(4)(y))

    def do_shared(self, y: Any, z: Any, b: int) -> Any:
        layer = nn.Dense(y.shape[-1])
        return layer(nn.relu(layer(y)))

    def do_gather(self, y: Any, z: Any, b: int) -> Any:
        # Not by means, which of centred rows are 0 but for rounding.
        order = jnp.argsort(nn.relu(y).max(axis=(0, 2, 3)))
        return jnp.take(y, order, axis=1)

    def do_sort(self, y: Any, z: Any, b: int) -> Any:
        return jnp.sort(y, axis=2) if b % 2 else jnp.cumsum(y, axis=1) / 8

    def do_scatter(self, y: Any, z: Any, b: int) -> Any:
        return y.at[:, b % 8].add(y[:, 0]) if b % 2 else y.at[:, 1:3].set(0)

    def do_constant(self, y: Any, z: Any, b: int) -> Any:
        return y * jnp.asarray(np.linspace(0.5, 1.5, y.shape[-1]), y.dtype)

    def do_centred(self, y: Any, z: Any, b: int) -> Any:
        return y - y.mean(axis=-1, keepdims=True)

    def do_softmax(self, y: Any, z: Any, b: int) -> Any:
        return nn.softmax(y) if b % 2 else y / (1 + y.max(axis=-1, keepdims=True) ** 2)

    def do_two_pass(self, y: Any, z: Any, b: int) -> Any:
        if b % 2:
            return nn.LayerNorm(use_fast_variance=False, use_scale=b > 2)(y)
        y = nn.Conv(8, (1, 1))(y)
        norm = nn.GroupNorm(2, use_fast_variance=False, use_bias=b > 2, use_scale=b > 2)
        return nn.relu(norm(y)) if b > 2 else norm(y)

    def do_standardised(self, y: Any, z: Any, b: int) -> Any:
        w = Weight(WIDTHS[b % 2])(y)
        w = (w - w.mean(0)) / (w.std(0) + 0.1) if b > 2 else nn.standardize(w, axis=0)
        return nn.relu(y @ w)

    def do_channel_attention(self, y: Any, z: Any, b: int) -> Any:
        y = nn.relu(nn.Conv(4, (1, 1))(y))
        pooled = (y.max(-1), nn.sigmoid(y).mean(-1), nn.softmax(y).min(-1))
        gates = jnp.stack(pooled[: 2 + b % 2], axis=-1)
        return y * nn.sigmoid(nn.Conv(1, (3, 3))(gates))

    def do_unknown(self, y: Any, z: Any, b: int) -> Any:
        """A primitive without a rule, over channels."""
        y = nn.Conv(4, (1, 1))(y)
        s = jax.lax.stop_gradient(y.mean(axis=(1, 2)))
        return y @ jax.lax.linalg.cholesky(jnp.eye(4, dtype=s.dtype) + s.T @ s)

    def do_mix_tokens(self, y: Any, z: Any, b: int) -> Any:
        """MLP-Mixer's: a dense layer over positions, the channels its batch."""
        tokens = nn.LayerNorm()(y[:, ::4, ::4].reshape(y.shape[0], 4, y.shape[-1]))
        rows = jnp.swapaxes(tokens, 1, 2)
        rows = nn.Dense(4)(nn.gelu(nn.Dense(8)(rows)))
        tokens = nn.LayerNorm()(tokens + jnp.swapaxes(rows, 1, 2))
        out = nn.Dense(4)(tokens).reshape(y.shape[0], 2, 2, 4)
        return jnp.repeat(jnp.repeat(out, 4, 1), 4, 2)

    def do_permute(self, y: Any, z: Any, b: int) -> Any:
        order = np.random.default_rng(b).permutation(y.shape[-1])
        if b > 2:
            return jnp.take(y, jnp.asarray(order), axis=-1) + y
        return y[..., order[: 2 + b]]

    def do_first(self, y: Any, z: Any, b: int) -> Any:
        """NCHW, as ported networks have it."""
        x = jnp.moveaxis(y, -1, 1)
        x = x - x.mean(axis=(2, 3), keepdims=True)
        return jnp.moveaxis(x, 1, -1)

    def do_straight_through(self, y: Any, z: Any, b: int) -> Any:
        return y + jax.lax.stop_gradient(jnp.round(y) - y)


KINDS = (
    *networks.KINDS,
    *(name.removeprefix("do_") for name in vars(Mixed) if name.startswith("do_")),
)


def mixed(ops: tuple[tuple[str, int, int], ...], seed: int = 0) -> tuple[Any, Any, Any]:
    """(apply, variables, images) of a random network."""
    return networks.linen(lambda: Mixed(ops), seed)
