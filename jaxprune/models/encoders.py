# SPDX-License-Identifier: Apache-2.0
"""Encoders trained elsewhere: torchvision's VGG-16 and ResNets, from a file of arrays.

The file is a state dict under torchvision's names, as .safetensors or .npz; nothing in
it is run. Kernels [out, in, kh, kw] become [kh, kw, in, out].
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from jaxprune import base, formats
from jaxprune.models.deeplab import DeepLabV3Plus
from jaxprune.models.fcn import FCN
from jaxprune.models.refinenet import RefineNet
from jaxprune.models.segnet import DEPTHS, SegNet

# Of ImageNet's channels in [0, 1], which torchvision's networks expect to be removed.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
# Those of VGG have biases, also before a norm; a ResNet's have none.
_BIASED = ("features", "classifier")
_NORM = {
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


class _Layer(NamedTuple):
    """A convolution and its batch norm: ours and theirs (None: they have no norm)."""

    conv: str
    norm: str
    their_conv: str
    their_norm: str | None


def import_encoder(
    net: nn.Module,
    variables: Mapping[str, Any],
    file: str | Path,
    *,
    mean: tuple[float, ...] = MEAN,
    std: tuple[float, ...] = STD,
) -> dict[str, Any]:
    """`variables` with the weights and statistics of an encoder; the rest stays.

    SegNet and FCN take vgg16 or vgg16_bn (FCN its classifier.0 and .3 too, where the
    file has them), DeepLabV3Plus and RefineNet a ResNet of bottlenecks with as many
    blocks. The encoder then computes in eval mode what torchvision's does on images
    from which `mean` and `std` were removed: that is folded into the first convolution,
    exactly but at the image's edge, where torchvision pads with the mean, not with 0.

    Raises ConfigError for a network without such an encoder; CheckpointError that names
    the file and the array which is missing, misshapen or not finite.
    """
    file = Path(file)
    found = _read(file)
    layers = _layers(net, found, file)
    params, stats = (dict(variables[k]) for k in ("params", "batch_stats"))
    for number, layer in enumerate(layers):
        kernel, bias = _conv(found, layer.their_conv, params[layer.conv], file)
        if number == 0:
            scaled = kernel / np.reshape(std, (-1, 1))
            bias = bias - np.einsum("hwio,i->o", scaled, mean)
            kernel = scaled
        params[layer.conv] = _like(params[layer.conv], {"kernel": kernel, "bias": bias})
        norm = _norm(found, layer, len(bias), file)
        params[layer.norm] = _like(params[layer.norm], norm)
        stats[layer.norm] = _like(stats[layer.norm], norm)
    return {**variables, "params": params, "batch_stats": stats}


def _read(file: Path) -> dict[str, np.ndarray]:
    """The arrays of a .npz or .safetensors file by name."""
    if file.suffix not in (".npz", ".safetensors"):
        raise base.CheckpointError(
            f"{file}: encoders are read from .npz or .safetensors; convert others, "
            "such as .pth, with safetensors.torch.save_file"
        )
    try:
        if file.suffix == ".npz":
            return formats.read_npz(file)
        import safetensors
        import safetensors.numpy

        try:
            return safetensors.numpy.load_file(file)
        except (safetensors.SafetensorError, KeyError, TypeError) as error:
            raise base.CheckpointError(f"{file} is damaged: {error}") from error
    except OSError as error:
        raise base.CheckpointError(f"{file}: {error.strerror or error}") from error
    except ValueError as error:
        raise base.CheckpointError(f"{file} is damaged: {error}") from error


def _layers(net: nn.Module, found: Mapping[str, Any], file: Path) -> list[_Layer]:
    if isinstance(net, SegNet | FCN):
        return _vgg(isinstance(net, FCN), found, file)
    if isinstance(net, DeepLabV3Plus | RefineNet):
        return _resnet(net.depths, found, file)
    raise base.ConfigError(
        f"{type(net).__name__} has no encoder of torchvision's; SegNet, FCN, "
        "DeepLabV3Plus and RefineNet have"
    )


def _vgg(whole: bool, found: Mapping[str, Any], file: Path) -> list[_Layer]:
    """Convolutions are numbered among all layers; behind each may be its norm."""
    named = [re.fullmatch(r"features\.(\d+)\.weight", name) for name in found]
    numbers = sorted(int(m[1]) for m in named if m and found[m[0]].ndim == 4)
    places = [(s, i) for s, depth in enumerate(DEPTHS, 1) for i in range(1, depth + 1)]
    if len(numbers) != len(places):
        raise base.CheckpointError(
            f"{file} holds {len(numbers)} convolutions features.N.weight, VGG-16 has "
            f"{len(places)}"
        )
    layers = []
    for (s, i), n in zip(places, numbers, strict=True):
        norm = f"features.{n + 1}"
        some = n + 1 not in numbers and found.keys() & _their(norm).values()
        own = norm if some else None
        layers.append(
            _Layer(f"encoder{s}_conv{i}", f"encoder{s}_bn{i}", f"features.{n}", own)
        )
    if whole and "classifier.0.weight" in found:
        layers.append(_Layer("fc_conv6", "fc_bn6", "classifier.0", None))
        layers.append(_Layer("fc_conv7", "fc_bn7", "classifier.3", None))
    return layers


def _resnet(depths: Any, found: Mapping[str, Any], file: Path) -> list[_Layer]:
    """A block's first kernel is 1x1 in bottlenecks, 3x3 in basic blocks."""
    if np.shape(found.get("layer1.0.conv1.weight", 0))[2:] == (3, 3):
        raise base.CheckpointError(
            f"{file} holds a ResNet of basic blocks, as ResNet-18 and ResNet-34 are; "
            "the network's are bottlenecks: take ResNet-50, -101 or -152"
        )
    for s, depth in enumerate(depths, 1):
        if f"layer{s}.{depth}.conv1.weight" in found:
            raise base.CheckpointError(
                f"{file} holds more than {depth} blocks in layer{s}, the network's "
                f"depths are {tuple(depths)}; are they those of the file?"
            )
    layers = [_Layer("stem_conv1", "stem_bn1", "conv1", "bn1")]
    for s, depth in enumerate(depths, 1):
        for b in range(depth):
            own, their = f"stage{s + 1}_block{b + 1}", f"layer{s}.{b}"
            layers += [
                _Layer(
                    f"{own}_conv{i}",
                    f"{own}_bn{i}",
                    f"{their}.conv{i}",
                    f"{their}.bn{i}",
                )
                for i in (1, 2, 3)
            ]
        own, their = f"stage{s + 1}_block1", f"layer{s}.0.downsample"
        layers.append(_Layer(f"{own}_conv4", f"{own}_bn4", f"{their}.0", f"{their}.1"))
    return layers


def _conv(
    found: Mapping[str, Any], name: str, own: Mapping[str, Any], file: Path
) -> tuple[np.ndarray, np.ndarray]:
    """(kernel [kh, kw, in, out], bias [out]) in doubles; a dense layer is one too."""
    height, width, read, out = own["kernel"].shape
    shape = (out, read, height, width)
    dense = name.startswith("classifier")
    given = _array(
        found, f"{name}.weight", (out, read * height * width) if dense else shape, file
    )
    bias = np.zeros(out)
    if f"{name}.bias" in found or name.startswith(_BIASED):
        bias = _array(found, f"{name}.bias", (out,), file)
    return given.reshape(shape).transpose(2, 3, 1, 0), bias


def _norm(
    found: Mapping[str, Any], layer: _Layer, features: int, file: Path
) -> dict[str, np.ndarray]:
    """Batch norm's four vectors; without one of theirs, one that changes nothing."""
    if layer.their_norm is None:
        one, zero = np.ones(features), np.zeros(features)
        # Flax adds its epsilon, 1e-5, to the variance.
        return {"scale": one, "bias": zero, "mean": zero, "var": one - 1e-5}
    return {
        own: _array(found, name, (features,), file)
        for own, name in _their(layer.their_norm).items()
    }


def _their(norm: str) -> dict[str, str]:
    """{our name: the file's} of the four vectors of a batch norm."""
    return {own: f"{norm}.{their}" for own, their in _NORM.items()}


def _array(
    found: Mapping[str, Any], name: str, shape: tuple[int, ...], file: Path
) -> np.ndarray:
    if name not in found:
        raise base.CheckpointError(f"{file} lacks {name} {shape}")
    given = np.asarray(found[name])
    if given.shape != shape:
        raise base.CheckpointError(
            f"{file}: {name} has shape {given.shape}, the network's is {shape}; are "
            "its widths and depths those of the file?"
        )
    real = jnp.issubdtype(given.dtype, jnp.floating)  # bfloat16, too
    if not real or not np.isfinite(given.astype(np.float64)).all():
        raise base.CheckpointError(f"{file}: {name} holds what is no finite number")
    if name.endswith("running_var") and (given < 0).any():
        raise base.CheckpointError(f"{file}: {name} holds a negative variance")
    return given.astype(np.float64)


def _like(own: Mapping[str, Any], new: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The leaves of `own` with new values, in their dtypes."""
    return {k: jnp.asarray(new[k], x.dtype) if k in new else x for k, x in own.items()}
