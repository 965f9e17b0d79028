# SPDX-License-Identifier: Apache-2.0
"""The launchers: local processes and SLURM for real, the vendors' ones as they read."""

import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxprune import cli, exits, peers
from jaxprune.base import ConfigError

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
CONFIG = """
from jaxprune import train

def get_config():
    fit = train.Fit(epochs={epochs}, batch=4)
    return train.Config(
        network=train.Network("segnet_basic", widths=(8,)),
        data=train.Data("synthetic", size=(16, 16), counts=(8, 4, 4)),
        train=fit,
        prune=train.Prune(ratio=0.4, multiple_of=2, min_channels=2, batches=1),
        retrain=train.Fit(epochs=1, batch=4),
        evaluate=train.Evaluate(every=100, batch=4, repeats=0, samples=1),
        save_every=100,
    )
"""


def command(*arguments, **more) -> subprocess.CompletedProcess:
    return subprocess.run(
        list(map(str, arguments)), capture_output=True, text=True, check=False, **more
    )


def environment(cache: Path | str = "", **more: str) -> dict[str, str]:
    """One CPU device, this Python's commands, compiled programs kept in `cache`."""
    quick = "--xla_backend_optimization_level=0"
    here = os.path.dirname(sys.executable)
    paths = {"PATH": f"{here}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    jaxs = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": quick, "TQDM_DISABLE": "1"}
    kept = {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.02",
    }
    return {**os.environ, **paths, **jaxs, **(kept if cache else {}), **more}


@contextlib.contextmanager
def fake(folder: Path, text: str):
    """A `jaxprune` of a few lines of shell, ahead on PATH; its environment."""
    program = folder / "jaxprune"
    program.write_text(f"#!/usr/bin/env bash\n{text}\n")
    program.chmod(0o755)
    yield {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}


def test_every_script_parses_and_says_how_it_is_called():
    scripts = sorted(LAUNCH.glob("*.sh"))
    assert len(scripts) == 7
    for script in scripts:
        assert command("bash", "-n", script).returncode == 0
    for name in ("local", "slurm", "tpu", "kubernetes"):
        done = command("bash", LAUNCH / f"{name}.sh")
        assert done.returncode == 2
        assert f"launch/{name}.sh" in done.stderr


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="no shellcheck here")
def test_shellcheck_finds_nothing():
    scripts = [*LAUNCH.glob("*.sh"), ROOT / ".ci" / "run"]
    done = command("shellcheck", "-x", *scripts, cwd=ROOT)
    assert done.returncode == 0, done.stdout


def test_the_readme_names_every_launcher():
    text = (LAUNCH / "README.md").read_text()
    assert [f.name for f in LAUNCH.iterdir() if f.name not in text] == ["README.md"]


@pytest.mark.parametrize(
    "where, words",
    [
        ("node0", "HOST:PORT,PROCESSES,INDEX"),
        ("node0:12,4", "HOST:PORT,PROCESSES,INDEX"),
        ("node0:x,4,0", "HOST:PORT,PROCESSES,INDEX"),
        (":1234,4,0", "no port in ':1234'"),
        ("node0:99999,4,0", "no port in 'node0:99999'"),
        ("node0:1234,4,4", "from 0 to 3"),
    ],
)
def test_a_place_to_meet_that_is_none_is_named(where, words):
    with pytest.raises(ConfigError, match=words):
        peers.join(where)


def test_a_bad_place_is_bad_input(tmp_path, capsys):
    config = tmp_path / "config.py"
    config.write_text(CONFIG.format(epochs=1))
    at = ["--workdir", str(tmp_path / "work"), "--distributed", "here"]
    assert cli.main(["run", str(config), *at]) == 2
    assert "--distributed here" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    "before, words",
    [
        ("", "JAX finds no cluster here"),
        ("import jax; jax.devices()", "JAX refuses: jax.distributed.initialize() must"),
    ],
)
def test_alone_it_asks_jax_where_the_others_are(before, words):
    env = environment()
    for name in ("SLURM_JOB_ID", "OMPI_MCA_orte_hnp_uri", "KUBERNETES_SERVICE_HOST"):
        env.pop(name, None)
    program = f"{before}\nfrom jaxprune import peers\npeers.join()"
    done = command(sys.executable, "-c", program, env=env, timeout=120)
    assert done.returncode == 1
    assert f"ConfigError: --distributed auto: {words}" in done.stderr


def test_others_that_never_come_are_waited_for_anew():
    program = (
        "from jaxprune import peers\n"
        "with peers.patience(1):\n"
        f"    peers.join('127.0.0.1:{free_port()},2,0')"
    )
    done = command(sys.executable, "-c", program, env=environment(), timeout=60)
    assert done.returncode == exits.RESUMABLE
    (line,) = done.stderr.splitlines()
    assert "not all processes came within 1 s" in line


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_local_gives_each_process_its_place(tmp_path):
    with fake(tmp_path, 'echo "$@"') as env:
        done = command("bash", LAUNCH / "local.sh", 3, "c.py", "--set", "a b", env=env)
    assert done.returncode == 0, done.stderr
    lines = sorted(done.stdout.splitlines())
    places = [line.split()[-1].split(",") for line in lines]
    assert [line.split()[:5] for line in lines] == [
        ["run", "c.py", "--set", "a", "b"]
    ] * 3
    assert len({address for address, *_ in places}) == 1
    assert sorted(rest for _, *rest in places) == [["3", str(i)] for i in range(3)]


def test_local_ends_the_others_where_one_fails(tmp_path):
    text = '[[ "${@: -1}" != *,1 ]] || { echo broken >&2; exit 7; }; exec sleep 60'
    with fake(tmp_path, text) as env:
        start = time.monotonic()
        env["GRACE"] = "1"
        done = command("bash", LAUNCH / "local.sh", 3, "c.py", env=env)
    assert done.returncode == 7
    assert done.stderr.startswith("[1] broken\n")
    assert time.monotonic() - start < 30


def test_local_passes_sigterm_on(tmp_path):
    text = "trap 'echo saved; exit 143' TERM; echo up; while :; do sleep 0.05; done"
    with fake(tmp_path, text) as env:
        process = subprocess.Popen(
            ["bash", LAUNCH / "local.sh", "2", "c.py"],
            env=env,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["up\n"] * 2
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=30)
    assert process.returncode == 143
    assert out == "saved\n" * 2


def test_two_local_processes_find_each_other(tmp_path):
    program = """
import sys
from pathlib import Path
import jax, numpy as np
from jax.experimental import multihost_utils
from jaxprune import peers
peers.join(sys.argv[-1])
found = multihost_utils.process_allgather(np.array(jax.process_index()))
Path(__file__).with_name(f"found{jax.process_index()}").write_text(f"{found}")
"""
    (tmp_path / "program.py").write_text(program)
    with fake(tmp_path, f'exec {sys.executable} {tmp_path}/program.py "$@"') as env:
        env = environment(PATH=env["PATH"])
        done = command("bash", LAUNCH / "local.sh", 2, "c.py", env=env)
    assert done.returncode == 0, done.stderr
    # (Gloo writes on both outputs whenever it likes.)
    assert [(tmp_path / f"found{i}").read_text() for i in range(2)] == ["[0 1]"] * 2


def test_tpu_commands(tmp_path):
    env = {**os.environ, "DRY_RUN": "1", "ZONE": "here", "TYPE": "v6e-16"}
    tpu = ("bash", LAUNCH / "tpu.sh")
    assert command(*tpu, "status", "slice", env=env).stdout.split() == shlex.split(
        "gcloud compute tpus tpu-vm describe slice --zone here"
    )
    run = ("slice", "configs/a.py", "--workdir", "/mnt/my work")
    done = command(*tpu, "run", *run, env=env)
    ssh = shlex.split(done.stdout)
    at = "gcloud compute tpus tpu-vm ssh slice --zone here --worker=all --command"
    assert ssh[:-1] == at.split()
    words = shlex.split(ssh[-1])
    at_run = words.index("../venv/bin/jaxprune") + 1
    assert words[at_run : at_run + 5] == ["run", *run[1:], "--distributed"]
    made, copied, installed = command(
        *tpu, "create", "slice", env=env
    ).stdout.splitlines()
    assert "create slice --zone here --accelerator-type v6e-16" in made
    assert "--spot" in made
    assert "slice:jaxprune.tar.gz --zone here --worker=all" in copied
    assert shlex.split(installed)[:-1] == at.split()
    resumed = command(*tpu, "resume", *run, env=env).stdout.splitlines()
    assert len(resumed) == 5
    assert "delete slice --zone here --quiet" in resumed[0]
    assert resumed[1].split() == made.split()
    assert resumed[4] == done.stdout.strip("\n")


def on_host(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """What tpu.sh would have each host do, done in a folder."""
    env = {**os.environ, "DRY_RUN": "1"}
    asked = command("bash", LAUNCH / "tpu.sh", *arguments, env=env)
    words = shlex.split(asked.stdout)[-1]
    return command("bash", "-c", words, cwd=folder, timeout=20)


@pytest.mark.skipif(not shutil.which("pgrep"), reason="no pgrep here")
def test_a_tpu_run_goes_on_without_the_connection_until_it_is_stopped(tmp_path):
    (tmp_path / "jaxprune").mkdir()
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    text = "trap 'echo saved; exit 75' TERM; echo \"$@\"; while :; do sleep 0.05; done"
    log = tmp_path / "jaxprune.log"
    run = ("run", "slice", "c.py", "--workdir", "/mnt/my work")
    with fake(tmp_path / "venv" / "bin", text):
        assert "no run is under way" in on_host(tmp_path, "stop", "slice").stdout
        begun = on_host(tmp_path, *run)  # for ever, if it held the connection
        assert (begun.returncode, begun.stdout) == (0, "")
        said = "run c.py --workdir /mnt/my work --distributed\n"
        until(lambda: log.exists() and log.read_text() == said, "it runs", 20)
        again = on_host(tmp_path, *run)
        assert again.returncode == 2 and "a run is under way" in again.stderr
        assert on_host(tmp_path, "stop", "slice").returncode == 0
        until(lambda: log.read_text() == f"{said}saved\n", "it saves", 20)


def test_kubernetes_jobset():
    yaml = pytest.importorskip("yaml")
    env = {**os.environ, "RESOURCE": "google.com/tpu=4", "SELECT": "a/b=4x4,c=1"}
    made = ("bash", LAUNCH / "kubernetes.sh", "run-1", "reg/img:2", 4, "c.py")
    done = command(*made, "--set", 'name="$x: y"', env=env)
    assert done.returncode == 0, done.stderr
    found = yaml.safe_load(done.stdout)
    assert (found["kind"], found["metadata"]["name"]) == ("JobSet", "run-1")
    (job,) = found["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert (spec["parallelism"], spec["completions"]) == (4, 4)
    pod = spec["template"]["spec"]
    assert pod["nodeSelector"] == {"a/b": "4x4", "c": "1"}
    (container,) = pod["containers"]
    assert container["image"] == "reg/img:2"
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["args"] == [
        *("run", "c.py", "--set", 'name="$$x: y"', "--workdir", "/work/run-1"),
        "--distributed",
        "run-1-hosts-0-0.run-1:1234,4,$(JOB_COMPLETION_INDEX)",
    ]
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [exits.FAILED, exits.BAD_INPUT]
    assert command(*made[:2], "Bad_Name", *made[3:]).returncode == 2


@pytest.mark.parametrize(
    "status, restarts, requeued",
    [
        (0, "0", False),
        (1, "0", False),
        (2, "0", False),
        *((code, "99", True) for code in (75, 134, 137, 143)),
        *((code, "100", False) for code in (75, 134, 137, 143)),
    ],
)
def test_what_slurm_queues_anew(tmp_path, status, restarts, requeued):
    for name, text in (("srun", f"exit {status}"), ("scontrol", 'echo "$@"')):
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    env |= {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": restarts}
    env.pop("RESTARTS", None)
    done = command("bash", LAUNCH / "slurm.sh", "c.py", env=env)
    assert ("requeue 7" in done.stdout) == requeued
    assert done.returncode == (0 if requeued else status)


def test_the_image_takes_nothing_that_git_ignores():
    names = {
        line.removeprefix("**/")
        for line in (ROOT / ".dockerignore").read_text().splitlines()
    }
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert {".git", *(line.strip("/") for line in ignored)} <= names


@pytest.fixture
def slurm(tmp_path):
    """The environment of a SLURM of one node of our own, of which this is the admin."""
    programs = ("munged", "slurmctld", "slurmd", "sbatch", "sinfo")
    missing = [p for p in programs if not shutil.which(p, path=_ADMIN)]
    if missing or os.geteuid():
        pytest.skip("SLURM is tested as root, with slurm-wlm and munge installed")
    host = socket.gethostname().partition(".")[0]
    folder = tmp_path / "slurm"
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    config = folder / "slurm.conf"
    config.write_text(f"""
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthInfo=socket={folder}/munge.socket,cred_expire=2
SlurmctldPort={free_port()}
SlurmdPort={free_port()}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=1,defer_batch
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE
""")
    env = {**os.environ, "PATH": _ADMIN, "SLURM_CONF": str(config)}
    munge = [f"--key-file={key}", f"--socket={folder}/munge.socket", "--force"]
    munge += [f"--{n}-file={folder}/munge.{n}" for n in ("pid", "log", "seed")]
    with contextlib.ExitStack() as stack:
        for daemon in (
            ["munged", "--foreground", *munge],
            ["slurmctld", "-D", "-f", str(config)],
            ["slurmd", "-D", "-f", str(config)],
        ):
            with (folder / f"{daemon[0]}.out").open("wb") as log:
                process = subprocess.Popen(daemon, env=env, stdout=log, stderr=log)
            stack.callback(process.wait, 20)
            stack.callback(process.terminate)
            time.sleep(0.5)
        for _ in range(100):
            if command("sinfo", "-h", "-o", "%T", env=env).stdout.strip() == "idle":
                break
            time.sleep(0.2)
        else:
            pytest.fail("\n".join(p.read_text() for p in folder.glob("*.out")))
        yield env
        command("scancel", "--full", "--name", "jaxprune", env=env)


_ADMIN = f"{os.environ['PATH']}:/usr/sbin:/sbin"


def until(true, what: str, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.2)


def test_slurm_requeues_what_was_preempted(slurm, tmp_path):
    config, work = tmp_path / "config.py", tmp_path / "work"
    config.write_text(CONFIG.format(epochs=300))
    env = environment(tmp_path / "compiled")
    env |= {"SLURM_CONF": slurm["SLURM_CONF"], "PATH": f"{env['PATH']}:{_ADMIN}"}
    log = tmp_path / "jaxprune.log"
    done = command(
        *("sbatch", "--parsable", "--ntasks-per-node=2", f"--output={log}"),
        *(LAUNCH / "slurm.sh", config, "--workdir", work),
        env=env,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    job = done.stdout.strip()

    def written() -> str:
        return log.read_text() if log.exists() else ""

    def state() -> str:
        return command("squeue", "-h", "-j", job, "-o", "%T", env=env).stdout.strip()

    until(lambda: "compiling took" in written(), "it trains")
    command("scancel", "--signal=TERM", job, env=env)
    until(lambda: "goes back into the queue" in written(), "it saves and is requeued")
    assert (work / "checkpoints" / "train").is_dir()
    assert not (work / "final").exists()
    until(lambda: state() == "PENDING", "it is queued")
    time.sleep(10)  # of two minutes that SLURM leaves to the nodes to forget the job
    command("scontrol", "update", f"JobId={job}", "StartTime=now", env=env)
    until(lambda: (work / "report" / "index.html").is_file(), "it goes on", 600)
    until(lambda: state() in ("", "COMPLETED"), "it ends")
    assert "resumed at step" in written()
    rows = [json.loads(r) for r in (work / "metrics.jsonl").read_text().splitlines()]
    steps = [r["step"] for r in rows if r["stage"] == "train" and r["split"] == "train"]
    assert steps == sorted(set(steps))
    assert steps[-1] == 600
