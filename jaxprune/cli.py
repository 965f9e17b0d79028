# SPDX-License-Identifier: Apache-2.0
"""The command `jaxprune`: a verb each for what one does with a network.

Each verb imports what it needs when it runs, so that `--help` is quick. Exit codes: 0
done, 1 failed, 2 bad input (both with one line on stderr), 75 to be resumed by the same
command, 130 Ctrl-C; docs/faults.md has them in a table.
"""

import argparse
import importlib.util
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

from jaxprune import arguments, base, exits

# What only the extras of pyproject.toml install, by the name that it is imported by.
EXTRAS = (
    "PIL",
    "etils",
    "grain",
    "importlib_resources",
    "matplotlib",
    "rich",
    "safetensors",
    "tensorboardX",
    "tensorflow_datasets",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with `argv` (default: the process's); returns its exit code."""
    verbs = {
        "run": _resumable(_run),
        "compare": _resumable(_compare),
        "inspect": _inspect,
        "eval": _eval,
        "predict": _predict,
        "bench": _bench,
        "export": _export,
        "path": _path,
        "report": _report,
    }
    args = arguments.parser(verbs).parse_args(argv)
    try:
        code = _ended(args)
    except Exception:
        if not _one_of_several():
            raise
        traceback.print_exc()
        code = exits.FAILED
    if code and _one_of_several():
        # At its end JAX would wait for the others, and they for this one.
        exits.at_once(code)
    return code


def _one_of_several() -> bool:
    found = sys.modules.get("jaxprune.peers")
    return found is not None and found.joined()


def _ended(args: argparse.Namespace) -> int:
    """The exit code; what a user can mend is told in one line."""
    try:
        code = args.verb(args)
        sys.stdout.flush()  # within reach of what is caught here
        return code
    except base.JaxpruneError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return exits.code_of(error)
    except BrokenPipeError:  # such as `| head`, which has seen enough
        exits.to_nobody()
        return exits.FAILED
    except OSError as error:
        named = f"{error.filename}: " if error.filename else ""
        print(f"error: {named}{error.strerror or error}", file=sys.stderr)
        return exits.code_of(error)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        print(
            f"error: {package} is not installed; the command needs it: "
            "pip install '.[all]' in the checkout",
            file=sys.stderr,
        )
        return exits.BAD_INPUT
    except MemoryError as error:
        print(f"error: not enough memory: {error}", file=sys.stderr)
        return exits.FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return exits.INTERRUPTED


def _resumable(verb: Callable[[argparse.Namespace], int]) -> Any:
    """A verb that one of several processes may run, and SIGTERM end resumably."""

    def run(args: argparse.Namespace) -> int:
        with exits.resumable():
            from jaxprune import peers

            with peers.patience(peers.WAIT if args.wait is None else args.wait):
                try:
                    return verb(args)
                except SystemExit as stop:
                    if stop.code == exits.RESUMABLE:
                        print("stopped; the same command resumes", file=sys.stderr)
                    raise

    return run


def _run(args: argparse.Namespace) -> int:
    import jax

    from jaxprune import peers, report
    from jaxprune.train import config, run

    settings = config.load_config(args.config, args.settings)
    if args.distributed:
        peers.join(args.distributed)
    _check_plots()
    workdir = args.workdir or Path("runs") / Path(args.config).stem
    run(settings, workdir, tensorboard=args.tensorboard, profile=args.profile)
    if jax.process_index() == 0:
        print(f"report: {report.write(workdir)}")
    return 0


def _compare(args: argparse.Namespace) -> int:
    import jax

    from jaxprune import peers, report
    from jaxprune.train import config, study, tabulate

    settings = config.load_config(args.config, args.settings)
    if args.distributed:
        peers.join(args.distributed)
    _check_plots()
    name = f"{Path(args.config).stem}-compare"
    workdir = Path(args.workdir or Path("runs") / name)
    budgets = [_ratio(text) for text in args.budgets.split(",")]
    methods = [m.strip() for m in args.methods.split(",") if m.strip()]
    rows = study.study(settings, workdir, methods, budgets, range(args.seeds))
    if jax.process_index() == 0:
        print(tabulate.as_markdown(rows))
        print(f"plot: {report.frontier(rows, workdir / 'frontier.png')}")
    return 0


def _check_plots() -> None:
    """Raise for a report that could not be drawn when the hours of its run are over."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError(name="matplotlib")


def _inspect(args: argparse.Namespace) -> int:
    from jaxprune import inspection

    found = inspection.find(args.target, size=args.size, settings=args.settings)
    print(inspection.describe(found, budget=args.budget))
    if args.svg:
        picture = inspection.draw(found, Path(args.svg), budget=args.budget)
        print(f"\nthe picture: {picture}")
    return 0


def _eval(args: argparse.Namespace) -> int:
    from jaxprune import checkpoint, inspection, predict, train
    from jaxprune.train import compare

    final = inspection.saved(args.folder)
    found = train.evaluate(args.folder, args.split)
    names, _ = predict.classes(checkpoint.read_card(final))
    print(f"the pruned network of {args.folder} on {args.split}")
    print(compare.as_text(found, names))
    return 0


def _predict(args: argparse.Namespace) -> int:
    from jaxprune import checkpoint, inspection, predict, streams

    out = Path(args.out)
    if out.suffix.lower() in predict.SUFFIXES and not out.is_dir():
        raise base.ConfigError(
            f"--out {out}: the overlays of all inputs go to a folder; name that"
        )
    if args.out == streams.STDIN or any(map(streams.is_stream, args.inputs)):
        return _predict_stream(args)
    if args.raw:
        raise base.ConfigError("--raw says how frames of standard input lie: name -")
    files = predict.find(args.inputs)
    pruned = checkpoint.load(inspection.saved(args.folder))
    for path in predict.write(
        pruned,
        files,
        out,
        size=args.size,
        batch=args.batch,
        opacity=args.opacity,
        labels=args.labels,
        samples=args.samples,
    ):
        print(path, flush=True)
    return 0


def _predict_stream(args: argparse.Namespace) -> int:
    from jaxprune import checkpoint, inspection, streams

    if args.samples:
        raise base.ConfigError("--samples goes with image files and an --out folder")
    to_stdout = args.out == streams.STDIN
    out = None if to_stdout else Path(args.out)
    source = streams.frames(args.inputs, args.raw, out=out)
    pruned = checkpoint.load(inspection.saved(args.folder))
    for name in streams.write(
        pruned,
        source,
        out or sys.stdout.buffer,
        size=args.size,
        batch=args.batch,
        opacity=args.opacity,
        labels=args.labels,
    ):
        if not to_stdout:
            print(name, flush=True)
    return 0


def _bench(args: argparse.Namespace) -> int:
    from jaxprune import inspection
    from jaxprune.bench import as_markdown, bench_saved, check_writable, write

    if args.json:
        check_writable(Path(args.json))
    result = bench_saved(
        inspection.saved(args.folder),
        batches=args.batch,
        size=args.size,
        repeats=args.repeats,
    )
    print(as_markdown(result))
    if args.json:
        write(result, Path(args.json))
    return 0


def _export(args: argparse.Namespace) -> int:
    from jaxprune import checkpoint, inspection
    from jaxprune.export import export, images_of
    from jaxprune.onnx_export import export_onnx

    if args.onnx and (args.shapes or args.platforms or args.int8):
        raise base.ConfigError(
            "an ONNX file has one shape, by --batch and --size, and weights of floats: "
            "leave out --shapes, --platforms and --int8"
        )
    pruned = checkpoint.load(inspection.saved(args.folder))
    images = images_of(pruned, args.folder, size=args.size, batch=args.batch)
    if args.onnx:
        file = export_onnx(
            pruned,
            args.out,
            images,
            fold=args.fold,
            overwrite=args.overwrite,
            train=False,
        )
        print(file)
        return 0
    written = export(
        pruned,
        args.out,
        images,
        shapes=[args.shapes] if args.shapes else (),
        platforms=args.platforms,
        fold=args.fold,
        weights="int8" if args.int8 else "float",
        overwrite=args.overwrite,
        train=False,
    )
    print(written)
    return 0


def _path(args: argparse.Namespace) -> int:
    from jaxprune.train import cutout

    if (args.at is None) != (args.out is None):
        raise base.ConfigError("path: --at POINT and --out FOLDER go together")
    print(cutout.describe(args.folder, args.round))
    if args.at is not None:
        place, _ = cutout.cut_out(
            args.folder, _point(args.at), Path(args.out), args.round
        )
        print(f"step {place}, not retrained: {args.out}")
    return 0


def _report(args: argparse.Namespace) -> int:
    from jaxprune import report

    print(report.write(args.folder))
    return 0


def _point(text: str) -> Any:
    """`step=7` as 7, a rule as it is, `flops=0.4` as a budget."""
    from jaxprune import inspection
    from jaxprune.steps import Rule

    rules = get_args(Rule)
    name, _, number = text.partition("=")
    if name == "step":
        if not number.isdecimal():
            raise base.ConfigError(f"--at {text!r}: write step=7")
        return int(number)
    if text in rules:
        return text
    if "=" not in text:
        raise base.ConfigError(
            f"--at {text!r}: a point is step=7, {', '.join(rules)} or flops=0.4"
        )
    return inspection.parse_budget(text)


def _ratio(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise base.ConfigError(
            f"--budgets: {text!r} is no number; write fractions, 0.5,0.25"
        ) from error
