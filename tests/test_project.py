# SPDX-License-Identifier: Apache-2.0
"""The house rules that a reader would otherwise have to check by eye."""

import ast
import functools
import importlib
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import jaxprune

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "jaxprune"
SOURCES = sorted(PACKAGE.rglob("*.py"))
FOLDERS = (
    "jaxprune",
    "configs",
    "benchmarks",
    "launch",
    "tests",
    "examples",
    ".github",
    ".ci",
)
TEXTS = sorted(
    path
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*")
    if path.is_file() and path.suffix in {".py", ".sh", ".yml", ""}
)

# From the bottom up; a file may import those of its own line and of the lines before.
LAYERS = (
    "base jaxpr factors formats disk exits peers",
    "balance labels shuffles walk plan rules splits singles groups trace "
    "taps behind chains affine absorb folding",
    "keeps matching placement sharded",
    "trees slim graph_io modules",
    "cost budget latency criteria measures features select",
    "pricing steering sparsity gates metric",
    "steps path path_io risks weakest search weights pruned prune "
    "reconstruct layerwise responses ranks lowrank int8",
    "integrity remote leaves storage store checkpoint export onnx_export bench",
    "data models",
    "train",
    "report inspection predict streams",
    "arguments cli __main__ __init__ api",
)
RANK = {name: rank for rank, line in enumerate(LAYERS) for name in line.split()}

# Imports within a function that may point up: a graph's own JSON; the shipped networks,
# which `load` builds.
UPWARD = {("base", "graph_io"), ("checkpoint", "models")}

HEAVY = ("tensorflow", "tensorflow_datasets", "grain", "matplotlib", "PIL")

# What only one file may import, and that file.
ONLY = {"jax.extend": "jaxpr.py", "orbax": "storage.py"}

# Modules that nothing here imports, and words that no file holds (in pieces, so that
# this one does not hold them either).
BANNED = (
    "pickle",
    "cloudpickle",
    "dill",
    "tensorflow",
    "torch",
    "clu",
    "jax." + "_src",
)
WORDS = ("jax." + "_src", "allow_pickle" + "=True", "jax." + "pmap", "shell" + "=True")

relative = functools.partial(map, lambda path: str(path.relative_to(ROOT)))


def unit(path: Path) -> str:
    """The file or package right under jaxprune/ that a file belongs to."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(module or module.name, whether at the file's top level) of every import."""
    tree = ast.parse(path.read_text())
    inner = {
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node not in inner) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (
                (f"{node.module}.{alias.name}", node not in inner)
                for alias in node.names
            )


def imported_units(path: Path) -> Iterator[tuple[str, bool]]:
    """As `imports`, for what lies right under jaxprune/."""
    for name, top in imports(path):
        parts = name.split(".")
        if parts[0] == "jaxprune" and len(parts) > 1:
            yield parts[1], top


@pytest.mark.parametrize("path", SOURCES, ids=relative(SOURCES))
def test_imports_point_down_only(path):
    own = unit(path)
    assert own in RANK, f"{own} has no place in LAYERS"
    for other, top in imported_units(path):
        assert other in RANK, f"{own} imports {other}, which is no file of jaxprune"
        allowed = RANK[other] <= RANK[own] or (not top and (own, other) in UPWARD)
        assert allowed, f"{own} imports {other}, which lies above it"


def test_every_upward_import_is_still_there():
    found = {
        (unit(path), other) for path in SOURCES for other, _ in imported_units(path)
    }
    assert found >= UPWARD


@pytest.mark.parametrize("module", ONLY)
def test_only_one_file_imports(module):
    users = {
        path.name
        for path in SOURCES
        for name, _ in imports(path)
        if f"{name}.".startswith(f"{module}.")
    }
    assert users == {ONLY[module]}


@pytest.mark.parametrize("path", SOURCES, ids=relative(SOURCES))
def test_no_banned_module_is_imported(path):
    names = [name for name, _ in imports(path)]
    banned = [n for n in names if f"{n}.".startswith(tuple(f"{b}." for b in BANNED))]
    assert banned == []


def python(program: str, **env: str) -> list[str]:
    """The lines that a fresh interpreter prints; its warnings are errors."""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **env},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_import_is_light_and_touches_no_device():
    program = f"""
import json, sys
import jaxprune
jaxprune.trace
print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))
import jax
try:
    jax.devices()
except RuntimeError:
    print("a device would have been an error")
"""
    heavy, devices = python(program, JAX_PLATFORMS="none_such")
    assert json.loads(heavy) == []
    assert devices == "a device would have been an error"


def test_the_core_runs_without_what_is_optional():
    program = f"""
import sys
sys.modules.update(dict.fromkeys({(*HEAVY, "chex")!r}))  # None: importing raises
import jax
import jaxprune as jp
net = jp.models.UNet(3, widths=(4, 4, 4, 4, 4))
variables = jp.models.init(net, jax.random.key(0), (16, 16))
pruned = jp.prune(net.apply, variables, jax.numpy.zeros((1, 16, 16, 3)),
                  budget=jp.flops(0.5))
print(jp.cost(pruned.graph, pruned.keep).flops <= 0.5 * jp.cost(pruned.graph).flops)
"""
    assert python(program) == ["True"]


def test_functions_win_over_the_files_of_their_names():
    program = """
from jaxprune.prune import prune
import jaxprune.trace
import jaxprune as jp
print(*[type(f).__name__ for f in (jp.trace, jp.slim, jp.select, jp.cost, jp.prune)])
print(jaxprune.trace is jp.trace, jp.prune is prune, jp.trees.__name__)
print(set(jp.__all__) <= set(dir(jp)), hasattr(jp, "trcae"), hasattr(jp, "__main__"))
"""
    kinds, same, listed = python(program)
    assert kinds.split() == ["function"] * 5
    assert same == "True True jaxprune.trees"
    assert listed == "True False False"
    named_as_a_file = {
        name for name in jaxprune.__all__ if (PACKAGE / f"{name}.py").exists()
    }
    assert named_as_a_file == {"base", *jaxprune._FUNCTIONS}


def test_public_names_are_there_and_documented():
    assert sorted(set(jaxprune.__all__)) == sorted(jaxprune.__all__)
    bare = [
        n for n in jaxprune.__all__ if not (getattr(jaxprune, n).__doc__ or "").strip()
    ]
    assert bare == []


@pytest.mark.parametrize("path", SOURCES, ids=relative(SOURCES))
def test_public_functions_have_docstrings(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{path.name} says not what it is"
    bare = [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert bare == []


@pytest.mark.parametrize("path", TEXTS, ids=relative(TEXTS))
def test_files_are_licensed_short_and_clean(path):
    text = path.read_text()
    if path.suffix != ".md":
        assert "SPDX-License-Identifier: Apache-2.0" in "".join(
            text.splitlines(True)[:2]
        )
    assert len(text.splitlines()) <= 500
    assert [word for word in WORDS if word in text] == []


@pytest.mark.parametrize("path", SOURCES, ids=relative(SOURCES))
def test_no_assert_for_users(path):
    asserts = [
        n.lineno
        for n in ast.walk(ast.parse(path.read_text()))
        if isinstance(n, ast.Assert)
    ]
    assert asserts == []


def test_the_documents_link_to_files_that_exist():
    documents = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("launch/*.md")]
    broken = [
        f"{document.relative_to(ROOT)}: {target}"
        for document in documents
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text())
        if "://" not in target and not (document.parent / target).exists()
    ]
    assert broken == []


def test_the_version_is_said_once():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert f"## [{project['version']}]" in changes
    assert jaxprune.__version__ == project["version"]
    module, _, name = project["scripts"]["jaxprune"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))
