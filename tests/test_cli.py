# SPDX-License-Identifier: Apache-2.0
"""The command: verbs, exit codes, and one clear line for bad input."""

import errno
import json
import os
import re
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import workfolder
from PIL import Image

from jaxprune import cli, exits, graph_io

VERBS = (
    *("run", "compare", "inspect", "eval", "predict", "bench", "export", "path"),
    "report",
)


def error_line(capsys) -> str:
    """The one line that a failed call left on stderr."""
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    return captured.err


def test_help_lists_exactly_the_verbs_that_exist(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    listed = re.findall(r"^    (\w+)  ", capsys.readouterr().out, re.MULTILINE)
    assert tuple(listed) == VERBS


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_has_help(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([verb, "--help"])
    assert stop.value.code == 0
    assert f"usage: jaxprune {verb}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["prune"],
        ["run"],
        ["predict", "DIR", "image.png"],
        ["predict", "DIR", "image.png", "--out", "o", "--size", "big"],
        ["predict", "DIR", "image.png", "--out", "o", "--batch", "0"],
        ["predict", "DIR", "image.png", "--out", "o", "--opacity", "2"],
        ["inspect", "segnet", "--size", "0x10"],
        ["inspect", "segnet", "--size", "native"],
        ["eval", "DIR", "--split", "all"],
    ],
)
def test_wrong_usage_exits_with_2(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    assert "usage: jaxprune" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--help"], ["predict", "--help"], ["prune"]])
def test_help_and_wrong_usage_load_nothing_heavy(argv):
    code = (
        "import sys; from jaxprune import cli\n"
        f"try: cli.main({argv!r})\n"
        "except SystemExit: pass\n"
        "loaded = {name.partition('.')[0] for name in sys.modules}\n"
        "print(sorted(loaded & {'jax', 'flax', 'orbax', 'matplotlib', 'PIL', 'rich'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_ctrl_c_exits_with_130(monkeypatch, capsys):
    def stopped(workdir):
        raise KeyboardInterrupt

    monkeypatch.setattr("jaxprune.report.write", stopped)
    assert cli.main(["report", "DIR"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_report_prints_the_page_s_path(tmp_path, capsys):
    folder = workfolder.write(tmp_path / "run")
    assert cli.main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report" / "index.html")


@pytest.mark.parametrize("size", [10, 10**6], ids=["at the end", "in the verb"])
def test_a_reader_that_is_gone_ends_it_in_silence(size):
    code = (
        "import sys; from jaxprune import cli, report\n"
        f"report.write = lambda workdir: 'x' * {size}\n"
        "sys.exit(cli.main(['report', 'DIR']))"
    )
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (exits.FAILED, b"")


def test_report_needs_no_jax(tmp_path):
    folder = workfolder.write(tmp_path / "run")
    code = (
        "import sys; from jaxprune import cli\n"
        f"cli.main(['report', {str(folder)!r}]); print('jax' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "False"


def test_report_of_no_work_folder(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path / "nowhere")]) == 2
    assert "nowhere is not a folder" in error_line(capsys)


def test_report_of_a_damaged_file(tmp_path, capsys):
    folder = workfolder.write(tmp_path / "run")
    (folder / "prune.json").write_text("{\n'")
    assert cli.main(["report", str(folder)]) == 2
    assert "prune.json is damaged" in error_line(capsys)


def test_eval_measures_what_the_run_did(tmp_path, monkeypatch, capsys):
    """On a work folder that a run of no training has left."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = tmp_path / "tiny.py"
    config.write_text(
        textwrap.dedent("""
        from jaxprune import train

        def get_config():
            return train.Config(
                network=train.Network("segnet_basic", widths=(4,)),
                data=train.Data("synthetic", size=(16, 16), counts=(4, 2, 2)),
                train=train.Fit(epochs=0, batch=2),
                prune=train.Prune(
                    criterion="magnitude", ratio=0.9, multiple_of=1, min_channels=1
                ),
                retrain=train.Fit(epochs=0, batch=2),
                evaluate=train.Evaluate(batch=2, repeats=0),
            )
        """)
    )
    folder = tmp_path / "run"
    assert cli.main(["eval", str(folder)]) == 2
    assert "run is no work folder" in error_line(capsys)
    assert cli.main(["run", str(config), "--workdir", str(folder)]) == 0
    evaluation = json.loads((folder / "evaluation.json").read_text())
    capsys.readouterr()
    assert cli.main(["eval", str(folder), "--split", "val"]) == 0
    shown = capsys.readouterr().out
    val = evaluation["networks"]["pruned"]["splits"]["val"]
    score = rf"^mIoU +{val['miou']:.4f} ± {val['miou_error']:.4f}$"
    assert re.search(score, shown, re.MULTILINE)
    for name in evaluation["classes"]:
        assert f"IoU {name}" in shown


@pytest.mark.parametrize(
    ("config", "settings", "said"),
    [
        ("none.py", [], "no such config file"),
        ("good.py", ["prun.ratio=0.3"], "prune"),
        ("good.py", ["prune.ration=0.3"], "ratio"),
        ("good.py", ["prune.ratio=1.5"], "prune.ratio = 1.5"),
        ("good.py", ["seed=soon"], "seed"),
        ("good.py", ["seed"], "write FIELD=VALUE"),
    ],
)
def test_run_bad_config(tmp_path, capsys, config, settings, said):
    (tmp_path / "good.py").write_text(
        "from jaxprune import train\n"
        "def get_config():\n"
        "    return train.Config(data=train.Data('synthetic', size=(16, 16)))\n"
    )
    folder = tmp_path / "run"
    argv = ["run", str(tmp_path / config), "--workdir", str(folder)]
    assert cli.main(argv + [f"--set={text}" for text in settings]) == 2
    assert said in error_line(capsys)
    assert not folder.exists()


@pytest.mark.parametrize("missing", ["matplotlib", "grain.sources"])
def test_a_missing_extra_is_one_line(missing, monkeypatch, capsys):
    def write(workdir):
        raise ModuleNotFoundError(name=missing)

    monkeypatch.setattr("jaxprune.report.write", write)
    assert cli.main(["report", "DIR"]) == 2
    assert "pip install '.[all]' in the checkout" in error_line(capsys)


@pytest.mark.parametrize("verb", ["run", "compare"])
def test_what_the_report_needs_is_looked_for_first(verb, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    argv = [verb, "configs/quickstart.py", "--workdir", str(tmp_path / "run")]
    assert cli.main(argv) == 2
    assert "matplotlib is not installed" in error_line(capsys)
    assert not (tmp_path / "run").exists()


def test_inspect_reads_words_as_run_does(capsys):
    for text in ("norm=no", "norm=false", "norm=False"):
        assert cli.main(["inspect", "unet", "--set", text, "--size", "16x16"]) == 0
        # The sum of (k^2 C_in + 1) C_out over its 23 convolutions.
        assert "31,032,395" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "said", "code"),
    [
        (OSError(errno.ENOSPC, "No space left", "DIR/x"), "DIR/x: No space left", 1),
        (OSError(errno.EIO, "Input/output error"), "Input/output error", 1),
        (OSError("odd"), "odd", 2),
    ],
    ids=["file", "no file", "text"],
)
def test_what_the_system_refuses_is_one_line(error, said, code, monkeypatch, capsys):
    def write(workdir):
        raise error

    monkeypatch.setattr("jaxprune.report.write", write)
    assert cli.main(["report", "DIR"]) == code
    assert error_line(capsys) == f"error: {said}\n"


def test_a_workdir_that_cannot_be_made_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "some.py").write_text(
        "from jaxprune import train\n"
        "def get_config():\n"
        "    data = train.Data('synthetic', size=(16, 16), counts=(8, 1, 1))\n"
        "    return train.Config(data=data)\n"
    )
    workdir = str(tmp_path / "some.py" / "run")
    assert cli.main(["run", str(tmp_path / "some.py"), "--workdir", workdir]) == 2
    assert f"{workdir} cannot be made" in error_line(capsys)


def test_inspect_segnet(capsys):
    assert cli.main(["inspect", "segnet", "--budget", "flops=0.25"]) == 0
    shown = capsys.readouterr().out
    assert "segnet(num_classes=11) at 360x480" in shown
    assert "21 groups, 6,976 channels" in shown
    assert "213,424,865,280" in shown and "29,449,355" in shown
    assert re.search(r"^encoder1_conv1 +64 +-> 32 +█████░░░░░", shown, re.MULTILINE)
    assert re.search(r"^FLOPs.* 25 %$", shown, re.MULTILINE)
    assert "nothing inside it is frozen" in shown


def test_inspect_a_shipped_network_s_fields(capsys):
    settings = ["--set", "num_classes=3", "--set", "widths=(4, 6, 8, 8, 8)"]
    assert cli.main(["inspect", "segnet", "--size", "32x64", *settings]) == 0
    shown = capsys.readouterr().out
    assert "at 32x64" in shown and "21 groups" in shown


@pytest.fixture
def my_nets(tmp_path, monkeypatch):
    """A user's module of networks in the working directory."""
    (tmp_path / "my_nets.py").write_text(
        textwrap.dedent("""
        import jax, jax.numpy as jnp
        from flax import linen, nnx

        class Net(linen.Module):
            @linen.compact
            def __call__(self, x):
                return linen.Dense(3)(jnp.sort(linen.Dense(5)(linen.Dense(7)(x))))

        def of_linen():
            return Net(), (2, 4)

        def of_nnx():
            rngs = nnx.Rngs(0)
            hidden, head = nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)
            return nnx.Sequential(hidden, nnx.relu, head), jnp.ones((1, 4))

        def of_function():
            variables = {"a": jnp.ones((4, 6)), "b": jnp.ones((6, 2))}
            return lambda v, x: jnp.tanh(x @ v["a"]) @ v["b"], variables, (1, 4)

        def of_nothing():
            return 3

        def of_numbers():
            return 3, 4

        constant = 3
        """)
    )
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("my_nets", None)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("of_linen", r"^my_nets:of_linen at float32\[2, 4\]\n"),
        ("of_linen", "1 group, 7 channels"),
        ("of_linen", r"sort +2 +10 +Dense_1 axis 1, Dense_1/bias axis 0"),
        ("of_nnx", "1 group, 8 channels"),
        ("of_function", r"a +6 +12"),
    ],
)
def test_inspect_a_user_s_function(my_nets, function, said, capsys):
    assert cli.main(["inspect", f"my_nets:{function}"]) == 0
    assert re.search(said, capsys.readouterr().out)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["my_nets:of_nothing"], "returned int; it returns (apply, variables"),
        (["my_nets:of_numbers"], "returned a int"),
        (["my_nets:constant"], "has no function 'constant'"),
        (["my_nets:missing"], "has no function 'missing'"),
        (["no.such.module:f"], "no module 'no.such.module'"),
        (["my_nets:of_linen", "--size", "8x8"], "brings its own"),
        (["my_nets:of_linen", "--budget", "flops"], "'flops' is no budget"),
        (["my_nets:of_linen", "--budget", "flops=1.5"], "(0, 1]"),
        (["my_nets:of_linen", "--budget", "flop=0.5"], "flop"),
        (["segnut"], "segnut"),
        (["no/such/folder"], "is not a folder"),
        (["segnet", "--set", "width=3"], "width"),
        (["segnet", "--set", "width"], "FIELD=VALUE"),
        (["segnet", "--set", "dropout=abc"], "dropout='abc'; must be a rate"),
        (["segnet", "--set", "dropout=2.0"], "a rate in"),
        (["unet", "--set", "norm=maybe"], "true or false"),
        (["segnet_basic", "--set", "pixel_scale=abc"], "pixel_scale='abc'"),
        (["segnet_basic", "--set", "pixel_scale=0"], "positive"),
        (["segnet_basic", "--set", "dtype=int8"], "of floats"),
    ],
)
def test_inspect_bad_targets(my_nets, argv, said, capsys):
    assert cli.main(["inspect", *argv]) == 2
    assert said in error_line(capsys)


def test_a_module_s_own_missing_import_is_its_own_error(tmp_path, monkeypatch):
    (tmp_path / "needs.py").write_text("import no_such_package_of_theirs\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_package_of_theirs"):
        cli.main(["inspect", "needs:f"])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny pruned U-Net, saved as a run saves it: work folder with final/."""
    import jax
    import jax.numpy as jnp

    from jaxprune import checkpoint, models
    from jaxprune.budget import flops
    from jaxprune.pruned import Pruned
    from jaxprune.select import select
    from jaxprune.trace import trace
    from jaxprune.trees import shrink

    folder = workfolder.write(tmp_path_factory.mktemp("saved"))
    network = {"name": "unet", "args": {"num_classes": 4, "widths": [4, 4, 8, 8, 8]}}
    net = models.build(network["name"], network["args"])
    variables = models.init(net, jax.random.key(0), (32, 48))
    images = jax.ShapeDtypeStruct((1, 32, 48, 3), jnp.float32)
    graph = trace(net.apply, variables, images, train=False)
    scores = {n: np.arange(g.size, dtype=float) for n, g in graph.groups.items()}
    keep = select(graph, scores, flops(0.5), scope="local")
    (folder / "graph.json").write_text(graph_io.graph_to_json(graph))
    classes = {"names": workfolder.CLASSES, "colors": workfolder.COLORS, "ignore": 255}
    checkpoint.save(
        folder / "final",
        Pruned(net.apply, shrink(graph, keep, variables), graph, keep),
        network=network,
        classes=classes,
        size=[32, 48],
    )
    return folder


def test_inspect_a_run_and_its_final_network(saved, capsys):
    shown = []
    for folder in (saved, saved / "final"):
        assert cli.main(["inspect", str(folder)]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0].splitlines()[1:] == shown[1].splitlines()[1:]
    assert " kept" in shown[0] and "-> " in shown[0]


def test_inspect_a_run_that_has_not_pruned_yet(saved, tmp_path, capsys):
    for name in ("config.json", "graph.json"):
        (tmp_path / name).write_bytes((saved / name).read_bytes())
    assert cli.main(["inspect", str(tmp_path)]) == 0
    assert "(not pruned yet)" in capsys.readouterr().out
    (tmp_path / "graph.json").write_text("{}")
    assert cli.main(["inspect", str(tmp_path)]) == 2
    assert "graph.json is damaged" in error_line(capsys)


def test_a_network_of_ones_own_is_pointed_to_python(tmp_path, capsys):
    import tinyrun

    import jaxprune as jp

    net, variables = tinyrun.Net(), tinyrun.variables()
    images = np.zeros((1, *tinyrun.SIZE, 3), np.float32)
    pruned = jp.prune(net.apply, variables, images, budget=jp.flops(0.5))
    folder, image = tmp_path / "net", tmp_path / "in.png"
    jp.save(folder, pruned, classes={"names": ["a"] * 3, "colors": [[0, 0, 0]] * 3})
    Image.new("RGB", (12, 8)).save(image)
    for argv in (
        ["predict", str(folder), str(image), "--out", str(tmp_path / "out")],
        ["eval", str(folder)],
    ):
        assert cli.main(argv) == 2
        assert "jaxprune.load(path, apply=model.apply)" in error_line(capsys)
    assert cli.main(["report", str(folder)]) == 2
    assert "no work folder" in error_line(capsys)
    # As those lines, and the verb's help, say:
    loaded = jp.load(folder, apply=net.apply)
    (written,) = jp.predict.write(loaded, [image], tmp_path / "out", size="native")
    assert written.exists()


def test_predict_with_a_saved_network(saved, tmp_path, capsys):
    image = tmp_path / "in.png"
    Image.new("L", (50, 40), 90).save(image)
    out = tmp_path / "out"
    argv = ["predict", str(saved), str(image), "--out", str(out), "--labels"]
    assert cli.main(argv) == 0
    assert capsys.readouterr().out.strip() == str(out / "in_overlay.png")
    with Image.open(out / "in_labels.png") as labels:
        assert labels.size == (50, 40)
    assert cli.main([*argv, "--size", "32x48", "--batch", "1"]) == 0


@pytest.mark.parametrize(
    ("folder", "entry", "said"),
    [
        (".", "none.png", "none.png does not exist"),
        (".", "*.png", "no file matches"),
        (".", "text.png", "text.png: damaged"),
        ("no/folder", "good.jpg", "no/folder"),
        ("begun", "good.jpg", "has not saved its pruned network"),
    ],
)
def test_predict_bad_input(saved, tmp_path, monkeypatch, capsys, folder, entry, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.json").write_text("{}")
    if entry == "text.png":
        (tmp_path / "text.png").write_text("no image")
    Image.new("RGB", (8, 8)).save("good.jpg")
    target = saved if folder == "." else folder
    assert cli.main(["predict", str(target), entry, "--out", "out"]) == 2
    assert said in error_line(capsys)
    assert not (tmp_path / "out").exists()
