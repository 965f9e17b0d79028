# SPDX-License-Identifier: Apache-2.0
"""What the command's verbs take, and what their help says; imports nothing heavy."""

import argparse
from collections.abc import Callable, Mapping

import jaxprune

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
        "budget with the config's retraining. Writes comparison.md and frontier.png, "
        "of all runs of the config that have ended there; the same command resumes a "
        "stopped study."
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
EXPORT = (
    "write the pruned network as one program that runs with JAX alone",
    (
        "A folder with the program, weights and all, and its checksums; with --onnx an "
        "ONNX file, checked in onnxruntime. It takes float images from 0 to 1, "
        "[B, H, W, 3], and gives logits. For a network of your own, in Python: "
        "jaxprune.export(jaxprune.load(DIR, apply=model.apply), OUT, images)."
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


def parser(functions: Mapping[str, Callable[..., int]]) -> argparse.ArgumentParser:
    """The command's arguments; each verb's function is its default for `verb`."""
    top = argparse.ArgumentParser(
        prog="jaxprune",
        description="Structural pruning of JAX networks.",
        epilog="jaxprune VERB --help tells more about one verb",
    )
    top.add_argument(
        "--version", action="version", version=f"jaxprune {jaxprune.__version__}"
    )
    verbs = top.add_subparsers(title="verbs", metavar="VERB", required=True)
    for name, (short, more), add_arguments in (
        ("run", RUN, _add_run),
        ("compare", COMPARE, _add_compare),
        ("inspect", INSPECT, _add_inspect),
        ("eval", EVAL, _add_eval),
        ("predict", PREDICT, _add_predict),
        ("bench", BENCH, _add_bench),
        ("export", EXPORT, _add_export),
        ("path", PATH, _add_path),
        ("report", REPORT, _add_report),
    ):
        text = f"{short.capitalize()}. {more}"
        verb = verbs.add_parser(name, help=short, description=text)
        verb.set_defaults(verb=functions[name])
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


def _add_export(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("folder", metavar="DIR", help="a work folder or a saved network")
    verb.add_argument(
        "--out", required=True, metavar="OUT", help="the new folder, URL or ONNX file"
    )
    verb.add_argument(
        "--shapes",
        metavar="SHAPE",
        help="of any batch and size: 'b, 32*h, 32*w, 3' (--batch and --size, no other)",
    )
    verb.add_argument(
        "--platforms",
        type=_words,
        metavar="A,B,..",
        help="of cpu,cuda,rocm,tpu (the present one)",
    )
    verb.add_argument(
        "--size", type=_size, metavar="HxW", help="of the images (the training size)"
    )
    verb.add_argument("--batch", type=_positive, default=1, help="images a call (1)")
    verb.add_argument(
        "--fold", action="store_true", help="batch norms into the kernels before them"
    )
    verb.add_argument("--int8", action="store_true", help="weights in a quarter")
    verb.add_argument("--onnx", action="store_true", help="an ONNX file instead")
    verb.add_argument(
        "--overwrite", action="store_true", help="an export that is at OUT already"
    )


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


def _words(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} does not lie between 0 and 1")
    return value
