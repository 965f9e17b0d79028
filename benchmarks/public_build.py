# SPDX-License-Identifier: Apache-2.0
"""Builds the networks of `public_networks.toml` from their own repositories' code."""

import functools
import importlib
import importlib.abc
import importlib.machinery
import sys
import tomllib
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

TABLE = Path(__file__).with_name("public_networks.toml")
# Packages that the networks' files import, but the networks do not need.
STAND_INS = """
    bm3d clu cv2 datasets grain imageio matplotlib ott pandas penzai tensorboard
    tensorflow tensorflow_addons tensorflow_datasets tensorflow_hub
    tensorflow_probability tensorflow_text torch torchvision wandb
""".split()


def table() -> dict[str, dict[str, Any]]:
    """{repository and name: entry} of the table, each with its repository's fields."""
    entries = {}
    for repository, fields in tomllib.loads(TABLE.read_text()).items():
        shared = dict(
            repository=repository,
            commit=fields["commit"],
            folders=fields.get("folders", [""]),
            old_nnx=fields.get("old_nnx", False),
        )
        for entry in fields["networks"]:
            entries[f"{repository} {entry['name']}"] = shared | entry
    return entries


def build(entry: Mapping[str, Any], clones: Path) -> tuple[Any, Any, Any, Any]:
    """(apply, variables as shapes, inputs as shapes, static keyword arguments)."""
    root = clones / entry["repository"].replace("/", "+")
    for folder in entry["folders"]:
        sys.path.insert(0, str(root / folder))
    sys.meta_path.insert(0, _StandIns())
    _old_names()
    if jax.config.jax_enable_x64:  # what the networks cast to is to be double as well
        jnp.float32 = jnp.bfloat16 = jnp.float64
    scope = dict(vars(importlib.import_module(entry["module"])))
    scope |= dict(jax=jax, jnp=jnp, np=np, nn=linen, nnx=nnx, partial=functools.partial)
    scope |= dict(array=_array, image=_image, key=jax.random.key(0))
    scope |= dict(abstractly=_abstractly)
    inputs = eval(f"[{entry.get('inputs', 'image(64)')}]", scope)
    static = eval(entry.get("call", "{}"), scope)

    def make() -> Any:
        return eval(entry["make"], scope | {"rngs": nnx.Rngs(0)})

    if "rngs=rngs" in entry["make"]:
        apply, variables = _nnx(make, entry.get("eager", False))
    else:
        net = make()
        names = ("params", "dropout", "sample", "noise", "stochastic_depth", "rng")
        keys = {name: jax.random.key(i) for i, name in enumerate(names)}
        init = functools.partial(net.init, keys, **static)
        apply, variables = net.apply, jax.eval_shape(init, *inputs)
    if entry.get("first", False):
        apply = _first(apply)
    return apply, variables, inputs, static


def _first(apply: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: apply(*args, **kwargs)[0]


def _abstractly(make: Callable[[], Any]) -> Any:
    """What make returns, without the arrays that it draws on the way."""
    made: list[Any] = []
    jax.eval_shape(lambda: made.append(make()))
    return made[0]


def _array(shape: tuple[int, ...], dtype: str = "float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _image(size: int, channels: int = 3) -> jax.ShapeDtypeStruct:
    return _array((1, size, size, channels))


def _nnx(make: Callable[[], Any], eager: bool) -> tuple[Any, Any]:
    net = make() if eager else nnx.eval_shape(make)
    net.eval()
    definition, keys, variables = nnx.split(net, nnx.RngState, ...)
    keys = jax.tree.map(_key_or_zero, keys)

    def apply(state: Any, *args: Any, **kwargs: Any) -> Any:
        return nnx.merge(definition, keys, state)(*args, **kwargs)

    return apply, variables


def _key_or_zero(x: Any) -> Any:
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.key(0)
    return jnp.zeros(x.shape, x.dtype)


def doubled(tree: Any) -> Any:
    """The same shapes, in float64 where they are float32."""
    return jax.tree.map(_double, tree)


def _double(x: Any) -> Any:
    single = x.dtype == np.float32
    return jax.ShapeDtypeStruct(x.shape, jnp.float64) if single else x


def fill(tree: Any, unit: bool = False, spread: float = 1.0) -> Any:
    """Random values of moderate size for shapes: half of them cut, signals still pass.

    Kernels are normal with variance 3 / fan-in (`unit`: 1, where the network itself
    divides by the fan-in), times spread squared; variances and scales lie around 1.
    """
    rng = np.random.default_rng(0)

    def values(path: Any, x: Any) -> Any:
        name = jax.tree_util.keystr(path).lower()
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.zeros(x.shape, x.dtype)
        draw = rng.standard_normal(x.shape).astype(np.float32)
        if "var" in name.replace("variables", ""):
            draw = rng.uniform(0.5, 1.5, x.shape)
        elif len(x.shape) >= 2:
            draw *= spread * (1 if unit else np.sqrt(3 / np.prod(x.shape[:-1])))
        elif any(word in name for word in ("scale", "gamma", "weight")):
            draw = 1 + 0.1 * draw
        else:
            draw *= 0.02
        return jnp.asarray(draw, x.dtype)

    return jax.tree_util.tree_map_with_path(values, tree)


def draw_inputs(inputs: Any, seed: int) -> Any:
    """Noise of a colour, so that pooled outputs move too; times in [0, 1].

    Integers are below 10.
    """
    rng = np.random.default_rng(seed)

    def values(x: Any) -> Any:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.asarray(rng.integers(0, 10, x.shape), x.dtype)
        if len(x.shape) < 2:
            return jnp.asarray(rng.uniform(0, 1, x.shape), x.dtype)
        hue = rng.standard_normal(x.shape[-1:])
        return jnp.asarray(hue + rng.standard_normal(x.shape), x.dtype)

    return jax.tree.map(values, inputs)


# Old code on new libraries


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules of those names, whatever is asked of them."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name.split(".")[0] in STAND_INS:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__getattr__ = _stand_in  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def _stand_in(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return mock.MagicMock(name=name, unsafe=True)


def _old_names() -> None:
    """Names that JAX and Flax had when some of the networks were written."""
    jax.tree_map = jax.tree.map
    jax.random.KeyArray = jnp.DeviceArray = jax.Array
    reshape = jnp.reshape
    jnp.reshape = lambda x, *s, **k: reshape(x, *s, **_renamed(k, newshape="shape"))
    pad = jnp.pad
    jnp.pad = lambda x, *s, **k: pad(x, *s[:2], **k)
    jnp.linspace = functools.partial(_linspace, jnp.linspace)
    for name in ("nn", "optim"):
        module = types.ModuleType(f"flax.{name}")
        module.__getattr__ = _stand_in  # type: ignore[method-assign]
        sys.modules[module.__name__] = module
        setattr(flax, name, module)


def _renamed(arguments: dict[str, Any], **names: str) -> dict[str, Any]:
    return {names.get(name, name): value for name, value in arguments.items()}


def _linspace(traced: Any, *args: Any, **kwargs: Any) -> Any:
    """Depths' drop rates are read as numbers, which a traced array does not allow."""
    try:
        return np.linspace(*args, **kwargs)
    except jax.errors.TracerArrayConversionError:
        return traced(*args, **kwargs)
