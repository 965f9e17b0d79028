# SPDX-License-Identifier: Apache-2.0
"""The command `jaxprune`: a verb each for what one does with a network.

Each verb imports what it needs when it runs, so that `--help` is quick. Exit codes: 0
done, 1 failed, 2 bad input (both with one line on stderr), 75 to be resumed by the same
command, 130 Ctrl-C; docs/faults.md has them in a table.
"""

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

from jaxprune import base, exits

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

# What each verb does: as the list of verbs says it, and what its own help adds.
RUN = (
    "train, prune, retrain, evaluate and report",
    "Stages that are done are skipped: the same command resumes a stopped run.",
)
INSPECT = (
    "show a network's channel groups and costs, and what cannot be cut",
    (
        "TARGET is a shipped network (segnet, unet, deeplab, ...), a work folder, a "
        "saved network, or pkg.module:function, where the function returns (apply, "
        "variables, *inputs) or (module, *inputs); inputs are arrays, "
        "jax.ShapeDtypeStruct or shapes."
    ),
)
EVAL = (
    "measure the pruned network on a split of its data set",
    "The data set is the one that the work folder's config names.",
)
PREDICT = (
    "write overlays of images with the classes the network sees",
    (
        "INPUT is an image, a folder of images, a quoted pattern such as "
        "'day1/*.png', a video, or -: standard input, PNG, JPEG and PPM images one "
        "after another. With --out -, PNGs go to standard output as they are made. "
        "For a network of your own, in Python: jaxprune.predict.write("
        "jaxprune.load(DIR, apply=model.apply), files, out)."
    ),
)
COMPARE = (
    "prune one network by several methods, and tabulate",
    (
        "Trains the config's dense network once a seed, then runs each method to each "
        "budget with the config's retraining. Writes comparison.md and frontier.png; "
        "the same command resumes a stopped study."
    ),
)
BENCH = (
    "time the pruned network against the dense one",
    (
        "Percentiles of milliseconds, images a second, compile time and memory, at "
        "each batch, on the devices that JAX finds. For a network of your own, in "
        "Python: jaxprune.bench({'dense': (apply, variables), ...}, images)."
    ),
)
PATH = (
    "show a run's pruning path, and cut any of its points out",
    (
        "Each step's costs, validation risk and mIoU, and what each rule chooses. With "
        "--at and --out, the network of that step is written into a folder that "
        "jaxprune.load opens: the weights that the walk began with, shrunk, batch "
        "statistics estimated anew, not retrained."
    ),
)
REPORT = (
    "draw DIR/report/index.html anew from the run's files",
    "Needs no accelerator; a run that has not ended gives a report of what is there.",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with `argv` (default: the process's); returns its exit code."""
    args = parser().parse_args(argv)
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
        return args.verb(args)
    except base.JaxpruneError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return exits.code_of(error)
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


def parser() -> argparse.ArgumentParser:
    """The command's arguments; each verb's function is its default for `verb`."""
    top = argparse.ArgumentParser(
        prog="jaxprune",
        description="Structural pruning of JAX networks.",
        epilog="jaxprune VERB --help tells more about one verb",
    )
    verbs = top.add_subparsers(title="verbs", metavar="VERB", required=True)
    for name, (short, more), function, add_arguments in (
        ("run", RUN, _resumable(_run), _add_run),
        ("compare", COMPARE, _resumable(_compare), _add_compare),
        ("inspect", INSPECT, _inspect, _add_inspect),
        ("eval", EVAL, _eval, _add_eval),
        ("predict", PREDICT, _predict, _add_predict),
        ("bench", BENCH, _bench, _add_bench),
        ("path", PATH, _path, _add_path),
        ("report", REPORT, _report, _add_report),
    ):
        text = f"{short.capitalize()}. {more}"
        verb = verbs.add_parser(name, help=short, description=text)
        verb.set_defaults(verb=function)
        add_arguments(verb)
    return top


def _add_run(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("config", metavar="CONFIG", help="a file like those in configs/")
    verb.add_argument(
        "--workdir", metavar="DIR", help="where to work (runs/NAME-OF-CONFIG)"
    )
    verb.add_argument(
        "--tensorboard", action="store_true", help="write DIR/tensorboard too"
    )
    verb.add_argument(
        "--profile",
        type=_positive,
        default=0,
        metavar="N",
        help="trace N steps of each training into DIR/profile",
    )
    _add_distributed(verb)
    _add_settings(verb, "A.B=VALUE", "change a field of the config; repeatable")


def _add_compare(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("config", metavar="CONFIG", help="a file like those in configs/")
    verb.add_argument(
        "--methods", default="path,l1,taylor", metavar="A,B,..", help="path,l1,taylor"
    )
    verb.add_argument(
        "--budgets", default="0.25", metavar="R,..", help="fractions that stay (0.25)"
    )
    verb.add_argument(
        "--seeds", type=_positive, default=1, metavar="N", help="networks each (1)"
    )
    verb.add_argument(
        "--workdir", metavar="DIR", help="where to work (runs/NAME-OF-CONFIG-compare)"
    )
    _add_distributed(verb)
    _add_settings(verb, "A.B=VALUE", "change a field of the config; repeatable")


def _add_inspect(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("target", metavar="TARGET")
    verb.add_argument(
        "--size",
        type=_size,
        metavar="HxW",
        help="image size of a shipped network (360x480)",
    )
    verb.add_argument(
        "--budget",
        metavar="KIND=RATIO",
        help="widths when every group is cut alike to this budget, e.g. flops=0.5",
    )
    verb.add_argument("--svg", metavar="FILE", help="also draw which group feeds which")
    _add_settings(verb, "FIELD=VALUE", "a field of a shipped network; repeatable")


def _add_eval(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("folder", metavar="DIR", help="a work folder")
    verb.add_argument("--split", default="test", choices=("train", "val", "test"))


def _add_predict(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("folder", metavar="DIR", help="a work folder or a saved network")
    verb.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="an image, folder, 'glob*', video or -",
    )
    verb.add_argument(
        "--out", required=True, metavar="DIR", help="for the overlays, or - for stdout"
    )
    verb.add_argument(
        "--raw",
        type=_size,
        metavar="HxW",
        help="standard input holds bare RGB frames of this size",
    )
    verb.add_argument(
        "--size",
        type=_size_or_native,
        metavar="HxW",
        help="run at this size, or 'native': each image's own (the training size)",
    )
    verb.add_argument("--batch", type=_positive, default=4, help="images a step (4)")
    verb.add_argument(
        "--opacity", type=_share, default=0.5, help="of the colours, 0 to 1 (0.5)"
    )
    verb.add_argument(
        "--labels", action="store_true", help="write the labels as palette PNGs too"
    )
    verb.add_argument(
        "--samples",
        type=_positive,
        default=0,
        metavar="N",
        help="of Monte-Carlo dropout: write how uncertain each pixel is, too",
    )


def _add_bench(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("folder", metavar="DIR", help="a work folder or a saved network")
    verb.add_argument(
        "--batch", type=_batches, default=(1, 8), metavar="N,..", help="images (1,8)"
    )
    verb.add_argument(
        "--size", type=_size, metavar="HxW", help="of the images (the training size)"
    )
    verb.add_argument("--repeats", type=_positive, default=30, help="calls (30)")
    verb.add_argument("--json", metavar="FILE", help="also write the numbers there")


def _add_path(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("folder", metavar="DIR", help="a work folder")
    verb.add_argument(
        "--at",
        metavar="POINT",
        help="step=7, min, 1se, knee, or a budget such as flops=0.4",
    )
    verb.add_argument("--out", metavar="OUT", help="where to write that network")
    verb.add_argument(
        "--round", type=_positive, metavar="N", help="of prune.rounds (the last)"
    )


def _add_report(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("folder", metavar="DIR", help="a work folder")


def _add_distributed(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--distributed",
        nargs="?",
        const="auto",
        metavar="HOST:PORT,N,I",
        help="as process I of N; alone: as SLURM, a TPU pod or MPI says",
    )
    verb.add_argument(
        "--wait",
        type=float,
        metavar="SECONDS",
        help="how long other processes are waited for (600)",
    )


def _add_settings(verb: argparse.ArgumentParser, form: str, text: str) -> None:
    verb.add_argument(
        "--set", dest="settings", action="append", default=[], metavar=form, help=text
    )


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
    workdir = args.workdir or Path("runs") / Path(args.config).stem
    run(settings, workdir, tensorboard=args.tensorboard, profile=args.profile)
    if jax.process_index() == 0:
        print(f"report: {report.write(workdir)}")
    return 0


def _compare(args: argparse.Namespace) -> int:
    import jax

    from jaxprune import peers, report
    from jaxprune.train import config, study

    settings = config.load_config(args.config, args.settings)
    if args.distributed:
        peers.join(args.distributed)
    name = f"{Path(args.config).stem}-compare"
    workdir = Path(args.workdir or Path("runs") / name)
    budgets = [_ratio(text) for text in args.budgets.split(",")]
    methods = [m.strip() for m in args.methods.split(",") if m.strip()]
    rows = study.study(settings, workdir, methods, budgets, range(args.seeds))
    if jax.process_index() == 0:
        print(study.as_markdown(rows))
        print(f"plot: {report.frontier(rows, workdir / 'frontier.png')}")
    return 0


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

    if args.out == streams.STDIN or any(map(streams.is_stream, args.inputs)):
        return _predict_stream(args)
    files = predict.find(args.inputs)
    pruned = checkpoint.load(inspection.saved(args.folder))
    for path in predict.write(
        pruned,
        files,
        Path(args.out),
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
    pruned = checkpoint.load(inspection.saved(args.folder))
    to_stdout = args.out == streams.STDIN
    for name in streams.write(
        pruned,
        streams.frames(args.inputs, args.raw),
        sys.stdout.buffer if to_stdout else Path(args.out),
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
    from jaxprune.bench import as_markdown, bench_saved, write

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


def _size(text: str) -> tuple[int, int]:
    """`360x480` as (360, 480)."""
    height, cross, width = text.lower().partition("x")
    if not (cross and height.isdecimal() and width.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write it 360x480")
    if not (int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"{text!r} is empty; write it 360x480")
    return int(height), int(width)


def _size_or_native(text: str) -> tuple[int, int] | str:
    return text if text == "native" else _size(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _batches(text: str) -> tuple[int, ...]:
    return tuple(_positive(part.strip()) for part in text.split(","))


def _ratio(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise base.ConfigError(
            f"--budgets: {text!r} is no number; write fractions, 0.5,0.25"
        ) from error


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} does not lie between 0 and 1")
    return value
