# SPDX-License-Identifier: Apache-2.0
"""What `jaxprune inspect` shows: a network's groups and costs, and what is frozen."""

import ast
import importlib
import inspect
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from jaxprune import base, budget, checkpoint, graph_io, integrity, models
from jaxprune.cost import cost
from jaxprune.report import diagram, words
from jaxprune.select import select
from jaxprune.trace import trace

SIZE = (360, 480)  # of CamVid; what a shipped network is shown at by default
EXAMPLE = (
    "it returns (apply, variables, *inputs) or (module, *inputs); inputs are arrays, "
    "jax.ShapeDtypeStruct, or shapes such as (1, 224, 224, 3)"
)


class Subject(NamedTuple):
    """What is inspected: a `title`, the dense graph, and a pruned network's keep."""

    title: str
    graph: base.Graph
    keep: base.Keep | None = None


def find(
    target: str,
    *,
    size: tuple[int, int] | None = None,
    settings: Sequence[str] = (),
) -> Subject:
    """What `target` names: a folder, `pkg.module:function`, or a shipped network.

    size: (H, W), and settings: 'field=value', of a shipped network only. Raises
    ConfigError where the target, a field or a function's result is not understood, and
    CheckpointError or DataError for a folder that holds no network.
    """
    folder, function = Path(target).is_dir(), ":" in target
    if (folder or function) and (size or settings):
        raise base.ConfigError(
            f"--size and --set build a shipped network; {target} brings its own"
        )
    if folder:
        return _saved(Path(target))
    if function:
        return _user_function(target)
    if os.sep in target:
        raise base.ConfigError(f"{target} is not a folder; name a work folder")
    return _shipped(target, size or SIZE, settings)


def saved(folder: str | Path) -> Path:
    """Where the pruned network lies: final/ of a work folder, else the folder itself.

    Raises CheckpointError where the work folder's run has not got that far.
    """
    folder = Path(folder)
    if not (folder / "config.json").exists():
        return folder
    final = folder / "final"
    if not integrity.resolve(final).is_dir():
        raise base.CheckpointError(
            f"{folder}: the run has not saved its pruned network (final/) yet; repeat "
            "'jaxprune run' with this --workdir to finish it"
        )
    return final


def describe(subject: Subject, *, budget: str | None = None) -> str:
    """The subject as text: groups, costs, what is frozen and why.

    budget: 'flops=0.5', a kind and a ratio; the widths that are left when every group
    is cut alike to meet it. Raises BudgetError for another form, or one not to be met.
    """
    graph, keep = subject.graph, _keep(subject, budget)
    lines = [
        subject.title,
        "",
        *_groups(graph, keep),
        *graph_io.sets(graph),
        "",
        *_costs(graph, keep),
    ]
    return "\n".join([*lines, "", *_frozen(graph)])


def draw(subject: Subject, file: Path, *, budget: str | None = None) -> Path:
    """Write the subject's groups, and which feeds which, as an SVG; its path.

    Raises BudgetError as `describe` does, ConfigError where the file can't be written.
    """
    text = diagram.svg(subject.graph, _keep(subject, budget))
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise base.ConfigError(f"--svg {file}: {error.strerror}") from error
    return file


def _keep(subject: Subject, budget: str | None) -> base.Keep | None:
    """What the budget leaves, or else what the subject's own pruning left."""
    return _alike(subject.graph, parse_budget(budget)) if budget else subject.keep


def parse_budget(text: str) -> budget.Budget:
    """`flops=0.5` as a Budget. Raises BudgetError for another form."""
    kind, equals, ratio = text.partition("=")
    try:
        value = float(ratio)
    except ValueError:
        value = None
    if not equals or value is None:
        raise base.BudgetError(
            f"{text!r} is no budget; write KIND=RATIO, such as flops=0.5"
        )
    return budget.Budget(kind.strip(), value)  # type: ignore[arg-type]


def _shipped(name: str, size: tuple[int, int], settings: Sequence[str]) -> Subject:
    args = {"num_classes": 11, **dict(_setting(s) for s in settings)}
    net = models.build(name, args)
    images = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    variables = jax.eval_shape(net.init, jax.random.key(0), images)
    graph = trace(net.apply, variables, images, train=False)
    shown = ", ".join(f"{field}={value}" for field, value in args.items())
    return Subject(f"{name}({shown}) at {size[0]}x{size[1]}", graph)


def _setting(text: str) -> tuple[str, Any]:
    field, equals, value = text.partition("=")
    if not (equals and field.isidentifier()):
        raise base.ConfigError(f"--set {text!r}: write FIELD=VALUE, num_classes=19")
    plain = {"true": True, "yes": True, "false": False, "no": False, "none": None}
    if value.strip().lower() in plain:
        return field, plain[value.strip().lower()]
    try:
        return field, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return field, value


def _saved(folder: Path) -> Subject:
    file = folder / "graph.json"
    work = (folder / "config.json").exists()
    if work and file.exists() and not integrity.resolve(folder / "final").is_dir():
        return Subject(f"{folder} (not pruned yet)", _read_graph(file))
    pruned = checkpoint.read_card(saved(folder))
    return Subject(str(folder), pruned.graph, pruned.keep)


def _read_graph(file: Path) -> base.Graph:
    try:
        return graph_io.graph_from_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise base.CheckpointError(f"{file} is damaged: {error}") from error


def _user_function(target: str) -> Subject:
    module_name, _, name = target.partition(":")
    found = getattr(_module(module_name, target), name, None)
    if not callable(found):
        raise base.ConfigError(f"{target}: {module_name} has no function {name!r}")
    try:
        inspect.signature(found).bind()
    except (TypeError, ValueError) as error:
        raise base.ConfigError(
            f"{target} is called without arguments, but {error}; {EXAMPLE}"
        ) from error
    result = found()
    if not isinstance(result, tuple) or len(result) < 2:
        raise base.ConfigError(f"{target} returned {type(result).__name__}; {EXAMPLE}")
    first, *rest = result
    if isinstance(first, linen.Module):
        inputs = [_struct(x) for x in rest]
        variables = jax.eval_shape(first.init, jax.random.key(0), *inputs)
        return Subject(_at(target, inputs), trace(first.apply, variables, *inputs))
    if isinstance(first, nnx.Module):
        definition, state = nnx.split(first)

        def apply(state: Any, *inputs: Any) -> Any:
            return nnx.merge(definition, state)(*inputs)

        inputs = [_struct(x) for x in rest]
        return Subject(_at(target, inputs), trace(apply, state, *inputs))
    if not callable(first):
        raise base.ConfigError(f"{target} returned a {type(first).__name__}; {EXAMPLE}")
    variables, *inputs = (rest[0], *map(_struct, rest[1:]))
    return Subject(_at(target, inputs), trace(first, variables, *inputs))


def _at(target: str, inputs: Any) -> str:
    """The target and its inputs, of which all costs are: a batch of 8 has 8 images'."""
    arrays = [x for x in jax.tree.leaves(inputs) if hasattr(x, "shape")]
    shapes = ", ".join(f"{x.dtype}{list(x.shape)}" for x in arrays)
    return f"{target} at {shapes}" if shapes else target


def _module(name: str, target: str) -> Any:
    """Import a user's module, also one that lies in the working directory."""
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except (ModuleNotFoundError, ValueError) as error:
        missing = getattr(error, "name", None) or ""
        if missing and not f"{name}.".startswith(f"{missing}."):
            raise  # their module lacks something of its own: its traceback says what
        raise base.ConfigError(
            f"{target}: there is no module {name!r} here; run in the folder that holds "
            "it, or install it"
        ) from error


def _struct(x: Any) -> Any:
    """A shape such as (1, 224, 224, 3) as float32 of that shape; all else as it is."""
    if isinstance(x, tuple | list) and x and all(isinstance(n, int) for n in x):
        return jax.ShapeDtypeStruct(tuple(x), jnp.float32)
    return x


def _alike(graph: base.Graph, wanted: budget.Budget) -> base.Keep:
    """Every group cut by the same share; which of its channels go does not matter."""
    scores = {name: np.ones(group.size) for name, group in graph.groups.items()}
    return select(graph, scores, wanted, scope="local")


def _groups(graph: base.Graph, keep: base.Keep | None) -> list[str]:
    """A row a group: its width (before and after), a channel's share, exact or not."""
    if not graph.groups:
        return ["no channel group: nothing of this network can be pruned"]
    dense = cost(graph)
    shares = (
        budget.marginal(graph, "flops") if dense.flops else [0.0] * len(graph.groups)
    )
    head = ["group", "channels", *(["", ""] if keep else []), "FLOPs a channel", ""]
    rows = [head]
    for (name, group), share in zip(graph.groups.items(), shares, strict=True):
        kept = int(np.sum(keep[name])) if keep else group.size
        after = [f"-> {kept}", graph_io.bar(kept / group.size)] if keep else []
        flops = words.quantity(share * dense.flops)
        note = "" if group.exact else "not exact"
        rows.append([words.shorten(name, 40), str(group.size), *after, flops, note])
    return graph_io.aligned(rows, (0,))


def _costs(graph: base.Graph, keep: base.Keep | None) -> list[str]:
    dense = cost(graph)
    count = (
        f"{_plural(len(graph.groups), 'group')}, {_plural(graph.channels, 'channel')}"
    )
    if keep is not None:
        count += f", {sum(int(np.sum(k)) for k in keep.values()):,} kept"
    rows = []
    small = cost(graph, keep) if keep is not None else dense
    for field, label in (
        ("flops", "FLOPs"),
        ("params", "parameters"),
        ("activation_bytes", "activation bytes"),
    ):
        before, after = getattr(dense, field), getattr(small, field)
        row = [label, f"{before:,}"]
        if keep is not None:
            row += [f"-> {after:,}", words.percent(after, before)]
        rows.append(row)
    return [count, *graph_io.aligned(rows, (0,))]


def _frozen(graph: base.Graph) -> list[str]:
    entries = [
        (base.path_str(f.path), f.axis, f.count, f.cause)
        for f in graph.frozen
        if f.cause not in base.EDGES
    ]
    if not entries:
        return ["nothing inside it is frozen: every channel can be cut"]
    return ["cannot be cut:", *graph_io.aligned(words.by_cause(entries, 2), (0, 3))]


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
