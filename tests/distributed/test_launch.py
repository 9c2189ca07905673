"""Templates of tools/launch, run under scripts that act as Slurm, on one host and on two."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from child_process import RECIPE, ROOT, SUPPORT, clean_environment
from run_comparison import MEASURED, TOLERANCE, assert_same_losses
from tiny import train

from xray import dist
from xray.artifacts.artifact import open_artifact
from xray.training.metrics import read_metrics

LAUNCH = ROOT / "tools" / "launch"
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "11",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),3",
    "SLURM_STEP_NODELIST": "gpu[007-008,12]-ib,login",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
}


def environment(first: Path, **more: str) -> dict[str, str]:
    """Environment of a template: commands of a folder, this Python, this code, one thread."""
    paths = f"{first}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    source = f"{SUPPORT}{os.pathsep}{ROOT}"
    return clean_environment(PATH=paths, PYTHONPATH=source, OMP_NUM_THREADS="1", **more)


STARTED: list[subprocess.Popen[str]] = []


def launch(template: Path, env: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    STARTED.append(
        subprocess.Popen(
            ["bash", str(template), *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
    )
    return STARTED[-1]


def kill(process: subprocess.Popen[str]) -> None:
    """Kill a process and its children at once, as a power failure would."""
    tree = psutil.Process(process.pid)
    for each in [tree, *tree.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    process.communicate()


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    for process in STARTED:
        if process.poll() is None:
            kill(process)
    STARTED.clear()


def wait_for(what: Callable[[], bool]) -> None:
    while any(process.poll() is None for process in STARTED):
        if what():
            return
        time.sleep(0.05)
    assert what(), "all processes ended before"


def steps_in(run: Path) -> int:
    return len(read_metrics(run / "metrics.jsonl"))


# variables of srun -------------------------------------------------------------------------------


def placed(monkeypatch: pytest.MonkeyPatch, **more: str) -> dict[str, str]:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in names:  # set, too: what `setup_environment` sets then ends with the test
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in more.items():
        monkeypatch.setenv(name, value)
    # The tests themselves may be a job of a shell.
    monkeypatch.setattr("xray.slurm.under_job_control", lambda: False)
    dist.setup_environment()
    return {name: os.environ.get(name, "") for name in names}


def test_a_task_of_srun_derives_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = placed(monkeypatch, **SLURM)
    assert (variables["RANK"], variables["WORLD_SIZE"], variables["LOCAL_RANK"]) == ("9", "11", "1")
    assert variables["LOCAL_WORLD_SIZE"] == "3"  # on the third node
    assert variables["MASTER_ADDR"] == "gpu007-ib"  # rank 0's node, not where srun was called
    assert dist.launcher() == "srun"
    other = placed(monkeypatch, SLURM_JOB_ID="4712")
    step = placed(monkeypatch, SLURM_STEP_ID="1")
    ports = [int(x["MASTER_PORT"]) for x in (variables, other, step)]
    assert len(set(ports)) == 3 and all(10000 <= port < 30000 for port in ports)


def test_variables_that_are_set_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = placed(monkeypatch, **SLURM, RANK="3", WORLD_SIZE="4", MASTER_PORT="1234")
    assert (variables["RANK"], variables["WORLD_SIZE"], variables["MASTER_PORT"]) == (
        "3",
        "4",
        "1234",
    )


def test_the_batch_script_is_not_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command in a job's script runs as one process if it is not started by srun."""
    variables = placed(monkeypatch, SLURM_JOB_ID="1", SLURM_NTASKS="8")
    assert (variables["RANK"], variables["WORLD_SIZE"]) == (
        "0",
        "1",
    ) and dist.launcher() == "plain python"


IN_TERMINAL = "import pty, sys; sys.exit(pty.spawn(sys.argv[1:]) >> 8)"
SHOW = "from xray import dist; dist.setup_environment(); print('world', dist.world_size())"


@pytest.mark.parametrize(
    ("how", "world"),
    [
        ("bash -ic '{show}; true'", "1"),  # a command in the shell of srun --pty bash
        ("bash -ic 'bash -c \"$SHOW; true\"; true'", "1"),  # a script in this shell
        ("{show}", "11"),  # srun --pty xray
        ("bash -c '{show}; true'", "11"),  # srun --pty script.sh
    ],
)
def test_a_shell_of_srun_is_told_from_a_task(how: str, world: str, tmp_path: Path) -> None:
    (tmp_path / "show.py").write_text(SHOW)
    show = f"{sys.executable} {tmp_path / 'show.py'}"
    env = clean_environment(**SLURM, PYTHONPATH=str(ROOT), SHOW=show)
    command = shlex.split(how.format(show=show))
    done = subprocess.run(
        [sys.executable, "-c", IN_TERMINAL, *command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=env,
    )
    assert f"world {world}" in done.stdout.replace("\r", "").splitlines(), done
    assert ("one of 11 tasks" in done.stdout) == (world == "1")


def test_a_task_without_a_terminal_is_a_task(tmp_path: Path) -> None:
    """Also if it is started from the shell of srun --pty, whose variables it inherits."""
    env = clean_environment(**SLURM, SLURM_PTY_PORT="1234", PYTHONPATH=str(ROOT))
    command = ["bash", "-c", f'{sys.executable} -c "{SHOW}"; true']
    done = subprocess.run(command, capture_output=True, env=env, start_new_session=True)
    assert done.stdout == b"world 11\n", done


def test_the_shell_of_salloc_is_no_task(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = placed(monkeypatch, **{**SLURM, "SLURM_STEP_ID": "4294967290"})
    assert variables["WORLD_SIZE"] == "1" and dist.launcher() == "plain python"
    assert "SLURM_STEP_NUM_TASKS" not in dist.environment_alone()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_says_for_whom_it_waits_at_the_start(rank: int, tmp_path: Path, demo: Path) -> None:
    port = free_port()
    variables = {**SLURM, "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": str(rank)}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT)}
    command = ["-m", "xray", "run", RECIPE, f"data.root={demo}", f"out={tmp_path / 'out'}"]
    with subprocess.Popen(
        [sys.executable, *command],
        stderr=subprocess.PIPE,
        text=True,
        env=clean_environment(**variables, **address),
        start_new_session=True,
    ) as running:
        assert running.stderr is not None
        line = next((line for line in running.stderr if "so far" in line), "")
        running.kill()
    who = "rank 0" if rank else "the other 1 of 2 processes"
    assert f"waiting for {who} to join the process group at 127.0.0.1:{port}, 10 s" in line
    assert "started by srun; start all ranks, or unset RANK" in line


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[004-007,9]-ib,login2", "gpu004-ib"),
        ("node1", "node1"),
        ("a,b", "a"),
        ("rack[2-3]n[01,05]", "rack2n01"),
        ("", ""),
    ],
)
def test_first_host_of_a_list(nodes: str, first: str) -> None:
    assert dist.first_host(nodes) == first


# Slurm ----------------------------------------------------------------------------------------


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """Commands srun and scontrol for jobs of two tasks."""
    commands = tmp_path / "bin"
    commands.mkdir()
    env = environment(commands, FAKE_SLURM=str(tmp_path), SLURM_JOB_ID="77", SLURM_NTASKS="2")
    scripts = {
        "srun": f'exec {sys.executable} {SUPPORT / "fake_srun.py"} "$@"\n',
        "scontrol": 'echo "$@" >> "$FAKE_SLURM/scontrol.log"\n',
    }
    for name, text in scripts.items():
        path = commands / name
        path.write_text(f"#!/bin/sh\n{text}")
        path.chmod(0o755)
    return env


def sbatch(env: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    (Path(env["FAKE_SLURM"]) / "srun.pid").unlink(missing_ok=True)
    return launch(LAUNCH / "slurm.sbatch", env, *arguments)


def warn(env: dict[str, str]) -> None:
    """Send the tasks the signal that the script requests for the end of its time, as Slurm does."""
    text = (LAUNCH / "slurm.sbatch").read_text()
    (name,) = re.findall(
        r"^#SBATCH --signal=(\w+)@\d+$", text, re.MULTILINE
    )  # without B:, which would signal the script only
    assert re.search(r"^#SBATCH --requeue$", text, re.MULTILINE)
    file = Path(env["FAKE_SLURM"]) / "srun.pid"
    wait_for(lambda: file.is_file() and bool(file.read_text()))
    os.kill(int(file.read_text()), signal.Signals[f"SIG{name}"])


def requeued(env: dict[str, str]) -> list[str]:
    log = Path(env["FAKE_SLURM"]) / "scontrol.log"
    return log.read_text().splitlines() if log.is_file() else []


def test_a_job_that_runs_out_of_time_is_requeued_and_continues(
    slurm: dict[str, str], demo: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = ("train", "mae", "--recipe", RECIPE, f"data.root={demo}", "data.workers=0")
    more = ("train.samples=360", "train.save_every=1000", "--out", str(out))
    early = sbatch(slurm, *command, *more)
    warn(slurm)  # during start-up: there is nothing to save
    assert early.wait() == 138 and requeued(slurm) == ["requeue 77"]
    first = sbatch(slurm, *command, *more)
    wait_for(lambda: steps_in(out) >= 3)
    warn(slurm)
    _, errors = first.communicate()
    assert first.returncode == 75, errors
    assert requeued(slurm) == ["requeue 77"] * 2 and "stopped by a signal" in errors
    (saved,) = (out / "checkpoints").glob("step_*")
    done = int(saved.name.removeprefix("step_"))
    assert 3 <= done < 30
    second = sbatch(slurm, *command, *more)
    _, errors = second.communicate()
    assert second.returncode == 0 and len(requeued(slurm)) == 2, errors
    assert f"step {done} of 30" in errors
    rows = read_metrics(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 31))


def test_an_error_is_not_requeued(slurm: dict[str, str]) -> None:
    job = sbatch({**slurm, "SLURM_NTASKS": "1"}, "run", "nowhere.yaml")
    _, errors = job.communicate()
    assert job.returncode == 2 and requeued(slurm) == [] and "nowhere.yaml" in errors


@pytest.mark.parametrize("name", ["torchrun.sh", "deepspeed.sh", "slurm.sbatch"])
def test_templates_are_scripts(name: str) -> None:
    path = LAUNCH / name
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0
    assert name.endswith(".sbatch") or os.access(path, os.X_OK)


# one host and two hosts ------------------------------------------------------------------------

SAMPLES = "train.samples=1200"  # 100 steps: long enough to lose a host


def start(
    template: str, demo: Path, out: Path, folder: Path, *more: str, **env: str
) -> subprocess.Popen[str]:
    command = ("train", "mae", "--recipe", RECIPE, f"data.root={demo}", "data.workers=0")
    arguments = (*command, SAMPLES, *more, "--out", str(out))
    return launch(LAUNCH / template, environment(folder, **env), *arguments)


def finish(process: subprocess.Popen[str], expected: int = 0) -> str:
    _, errors = process.communicate()
    assert process.returncode == expected, errors[-3000:]
    return errors


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listens(endpoint: str) -> bool:
    host, port = endpoint.split(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


def hosts(nodes: str) -> list[dict[str, str]]:
    """Settings of two hosts that are loopback addresses."""
    common = {"NNODES": nodes, "NPROC": "1", "ENDPOINT": f"127.0.0.1:{free_port()}"}
    common |= {"GLOO_SOCKET_IFNAME": "lo"}
    return [{**common, "ADDRESS": f"127.0.0.{number}"} for number in (1, 2)]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return open_artifact(run / "artifact").load("backbone")


def assert_equal(one: Path, two: Path) -> None:
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.fixture(scope="module")
def whole(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes on one host, without a loss."""
    folder = tmp_path_factory.mktemp("whole")
    finish(start("torchrun.sh", demo, folder / "run", folder, NPROC="2"))
    return folder / "run"


@pytest.mark.slow
def test_metrics_of_two_processes_are_means(demo: Path, whole: Path, tmp_path: Path) -> None:
    """A single process has all samples: its metrics are the expected means."""
    settings = ("data.resolution=[[0.0,16],[0.6,32]]", "data.frames=[[0.0,2],[0.3,4]]")
    train("mae", demo, tmp_path / "one", SAMPLES, *settings)
    assert_same_losses(tmp_path / "one", whole, 100)
    rows = [read_metrics(run / "metrics.jsonl") for run in (tmp_path / "one", whole)]
    for one, two in zip(*rows, strict=True):
        same = [k for k in one if k not in MEASURED and not k.startswith(("data/", "save/"))]
        assert {"photos/loss", "clips/loss", "loss", "lr", "photos/epochs"} <= set(same)
        for name in same:
            assert two[name] == pytest.approx(one[name], rel=100 * TOLERANCE), name
        assert 0 <= two["data/wait"] <= 1


@pytest.mark.slow
def test_two_hosts_have_the_results_of_one(demo: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    both = [start("torchrun.sh", demo, out, tmp_path, **env) for env in hosts("2")]
    for process in both:
        finish(process)
    assert_equal(whole, out)


@pytest.mark.slow
def test_a_run_continues_after_a_lost_host(demo: Path, whole: Path, tmp_path: Path) -> None:
    """The remaining host continues from the last checkpoint, with the results of a whole run."""
    out = tmp_path / "run"
    first, second = hosts("1:2")
    more = ("train.save_every=5",)
    stays = start("torchrun.sh", demo, out, tmp_path, *more, **first)
    # both are this computer: the first one to listen is the rendezvous
    wait_for(lambda: listens(first["ENDPOINT"]))
    lost = start("torchrun.sh", demo, out, tmp_path, *more, **second)
    wait_for(lambda: steps_in(out) >= 12)
    kill(lost)
    assert steps_in(out) < 100
    errors = finish(stays)
    assert "continues from" in errors
    assert_same_losses(whole, out, 100)


@pytest.mark.slow
def test_sigterm_to_torchrun_saves(demo: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    more = ("train.save_every=1000",)
    process = start("torchrun.sh", demo, out, tmp_path, *more, NPROC="2")
    wait_for(lambda: steps_in(out) >= 5)
    process.terminate()
    assert "stopped by a signal" in finish(process, 75)
    finish(start("torchrun.sh", demo, out, tmp_path, *more, NPROC="2"))
    assert_equal(whole, out)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["template", "hosts", "plain"])
def test_the_deepspeed_launcher_starts_a_run(
    demo: Path, whole: Path, tmp_path: Path, way: str
) -> None:
    out, endpoint = tmp_path / "run", f"127.0.0.1:{free_port()}"
    settings = [{"GPUS": "2"}]
    if way == "hosts":
        hostfile = tmp_path / "hostfile"
        hostfile.write_text("127.0.0.1 slots=1\n127.0.0.2 slots=1\n")
        settings = [{"HOSTFILE": str(hostfile), "NODE_RANK": number} for number in "01"]
    template = LAUNCH / "deepspeed.sh"
    if way == "plain":  # without the template: the launcher adds --local_rank to the arguments
        template = tmp_path / "plain.sh"
        port = endpoint.split(":")[1]
        template.write_text(f'exec deepspeed --num_gpus 2 --master_port {port} --module xray "$@"')
    started = [
        start(str(template), demo, out, tmp_path, ENDPOINT=endpoint, **env) for env in settings
    ]
    for process in started:
        finish(process)
    assert_equal(whole, out)
