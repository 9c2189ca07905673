"""Output of the commands: help, plans, and one clear line for each mistake."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from child_process import RECIPE, xray
from in_process import invoke
from shards import jpeg, write_tar

from xray.commands.common import guarded


def test_help_needs_no_torch() -> None:
    """`xray --help` answers at once, because nothing heavy is imported before a command."""
    heavy = {"torch", "transformers", "timm"}
    code = f"import sys, xray.commands.main; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
    assert "Train the stages of RECIPE" in xray("--help").stdout


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", ["version", "config mae", "config nothing"])
def test_output_that_nobody_reads_ends_silently(command: str, unbuffered: str) -> None:
    """`xray ... | head` has no message; a mistake of the user still has one."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "xray", *command.split()],
        stdout=writer,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )
    os.close(writer)
    if command == "config nothing":
        assert done.returncode == 2 and b"unknown recipe" in done.stderr
    else:
        assert (done.returncode, done.stderr) == (1, b"")


def test_plan_prints_what_starts_from_what(demo: Path, tmp_path: Path) -> None:
    done = invoke("run", RECIPE, "--plan", f"data.root={demo}", f"out={tmp_path / 'run'}")
    assert done.exit_code == 0 and not (tmp_path / "run").exists()
    assert "hashtag" in done.stdout and "+ text" in done.stdout
    only = invoke("run", RECIPE, "--plan", f"data.root={demo}", "stages=[mae,clip]")
    assert "hashtag" not in only.stdout and "mae" in only.stdout


def test_config_prints_what_is_resolved() -> None:
    done = invoke("config", "mae", "model=vit_s16")
    assert done.exit_code == 0 and "vit_small_patch16_224" in done.stdout
    assert "temperature: 0.07\n" in invoke("config", "eval").stdout
    recipe = invoke("config", "quickstart").stdout
    assert re.findall(r"^(\w+):", recipe, re.M) == ["mae", "hashtag", "text", "clip", "eval"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "quickstrat"], "did you mean 'quickstart'"),
        (["run", "nowhere.yaml"], "config file nowhere.yaml does not exist"),
        (["run", "quickstart", "stages=[mae,clipp]"], "unknown stage 'clipp'"),
        (["run", "quickstart", "stages=[mae,clipp]"], "did you mean 'clip'"),
        (["run", "quickstart", "clip.optim.bse_lr=1"], "did you mean 'optim.base_lr'"),
        (["run", "quickstart", "modle.keep_rate=1"], "did you mean 'model'"),
        (["run", "quickstart", "mae.train.samples=lots"], "train.samples"),
        (["run", "quickstart", "model.keep_rate=1.5"], "model.keep_rate=1.5 must be in (0, 1]"),
        (["train", "hashtags"], "did you mean 'hashtag'"),
        (["train", "mae"], "data.blocks"),
        (["run", "real_small"], "data.root"),
        (["eval", "nothing"], "nothing is not an artifact"),
        (["run", "quickstart", "stages=[mae,"], "cannot be read"),
        (["run", "quickstart", "mae=5"], "mae=5 must be a section of keys"),
        (["run", "quickstart", "model.tubelet=0"], "at least 1"),
        (["lineage", "nothing"], "nothing is not an artifact"),
        (["data", "index", "nothing"], "nothing does not exist"),
    ],
)
def test_mistakes_give_one_line(arguments: list[str], message: str) -> None:
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert message in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_a_mistake_ends_the_process_with_2() -> None:
    done = xray("run", "quickstrat")
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1


def test_unusable_data_is_named_before_training(demo: Path, tmp_path: Path) -> None:
    out = f"out={tmp_path / 'run'}"
    (tmp_path / "photos").symlink_to(demo / "photos")
    missing = invoke("run", RECIPE, "stages=[mae]", f"data.root={tmp_path}", out)
    assert missing.exit_code == 2 and "eval.knn.train=gallery: there is no" in missing.stderr
    write_tar(tmp_path / "bad.tar", {f"{i}.jpg": jpeg() for i in range(20)})
    whole = (tmp_path / "bad.tar").read_bytes()
    (tmp_path / "bad.tar").write_bytes(whole[: len(whole) // 2])
    cut = invoke(
        "run", RECIPE, "stages=[mae]", f"data.root={demo}", out,
        f"data.sources.photos.shards={tmp_path / 'bad.tar'}",
    )  # fmt: skip
    assert cut.exit_code == 2 and "bad.tar is truncated" in cut.stderr
    assert not (tmp_path / "run" / "mae").exists()


def test_bad_samples_are_replaced_counted_and_limited(demo: Path, tmp_path: Path) -> None:
    files = {}
    for i in range(40):
        files[f"{i:03d}.jpg"] = b"broken" if i in (3, 17) else jpeg((5 * i, 90, 200 - 4 * i))
        files[f"{i:03d}.txt"] = b"" if i == 20 else b"a picture"
    write_tar(tmp_path / "some.tar", files)
    settings = [
        "run", RECIPE, "stages=[clip]", f"data.root={demo}", "data.modalities=[image]",
        f"data.sources.photos.shards={tmp_path / 'some.tar'}", "clip.train.samples=80",
    ]  # fmt: skip
    stop = invoke(*settings, f"out={tmp_path / 'a'}", "data.max_bad_fraction=0.001")
    assert stop.exit_code == 2 and "cannot be used" in stop.stderr and "some.tar" in stop.stderr
    go = invoke(*settings, f"out={tmp_path / 'b'}", "data.max_bad_fraction=0.2")
    assert go.exit_code == 0, go.stderr
    manifest = (tmp_path / "b" / "clip" / "artifact" / "manifest.json").read_text()
    assert '"undecodable image": 4' in manifest and '"no caption": 2' in manifest


@pytest.mark.parametrize(
    ("recipe", "stages"),
    [
        ("no_mae", ["hashtag", "text", "clip"]),
        ("no_hashtag", ["mae", "text", "clip"]),
        ("clip_only", ["clip"]),
        ("no_reorganize", ["mae", "hashtag", "text", "clip"]),
        ("image_only", ["mae", "hashtag", "text", "clip"]),
    ],
)
def test_ablations_run_over_any_recipe(
    demo: Path, tmp_path: Path, recipe: str, stages: list[str]
) -> None:
    out = tmp_path / "run"
    done = invoke(
        "run", recipe, f"base={RECIPE}", f"data.root={demo}", f"out={out}", "train.samples=24"
    )
    assert done.exit_code == 0, done.stderr
    assert sorted(p.parent.name for p in out.glob("*/artifact")) == sorted(stages)
    manifest = json.loads((out / "clip" / "artifact" / "manifest.json").read_text())
    assert manifest["keep_rate"] == (1.0 if recipe == "no_reorganize" else 0.7)
    metrics = (out / "clip" / "metrics.jsonl").read_text()
    assert ("clips/loss" in metrics) == (recipe != "image_only")


def test_each_stage_alone(demo: Path, tmp_path: Path) -> None:
    common = ["--recipe", RECIPE, f"data.root={demo}", "train.samples=24"]
    for stage, parents in (("mae", []), ("hashtag", ["mae"]), ("text", []), ("clip", ["hashtag"])):
        start = [x for p in parents for x in ("--init-from", str(tmp_path / p / "artifact"))]
        done = invoke("train", stage, *common, *start, "--out", str(tmp_path / stage))
        assert done.exit_code == 0, done.stderr
    again = invoke("train", "clip", "--resume", str(tmp_path / "clip"))
    assert again.exit_code == 0 and "stage clip is finished" in again.stderr
    result = tmp_path / "results.json"
    done = invoke(
        "eval", str(tmp_path / "clip"), "--recipe", RECIPE, f"data.root={demo}",
        "--suite", "retrieval", "--out", str(result),
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert list(json.loads(result.read_text())) == ["retrieval"]
    chain = invoke("lineage", str(tmp_path / "clip" / "artifact"), "--json")
    assert [row["stage"] for row in json.loads(chain.stdout)] == ["clip", "hashtag", "mae"]


def test_real_photos_and_clips(shared_data: Path, tmp_path: Path) -> None:
    """The shipped recipe for real data, a few steps of each stage."""
    small = ["data.blocks=[{source: photos, samples: 12}, {source: actions, samples: 4}]"]
    done = invoke(
        "run", "real_small", f"data.root={shared_data}", f"out={tmp_path / 'run'}", *small,
        "data.resolution=32", "train.samples=32",
        "text.data.blocks=[{source: photos, samples: 16}]",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["retrieval"]["images"] == 1000 and results["zero_shot"]["classes"] == 100


@pytest.mark.parametrize("value", ["${name}", "${out}", "${nothing.there}"])
def test_a_value_of_a_recipe_that_refers_to_itself_or_to_nothing(
    tmp_path: Path, value: str
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"name: {value}\nout: ${{name}}\nstages: [mae]\n")
    for command in ("run", "config"):
        done = invoke(command, recipe)
        assert done.exit_code == 2, done.output
        assert done.stderr.count("\n") == 1 and "cannot be resolved: " in done.stderr


def test_an_interrupt_during_the_imports_has_no_traceback() -> None:
    code = """
import os, signal, sys
class Interrupt:
    def find_spec(self, name, *_):
        if name == "xray.commands.data":
            os.kill(os.getpid(), signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
sys.meta_path.insert(0, Interrupt())
from xray.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def test_memory_of_a_device_that_runs_out_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    @guarded
    def command() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has 1")

    with pytest.raises(SystemExit, match="1"):
        command()
    told = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1; set a smaller batch_size"
    assert capsys.readouterr().err == f"xray: {told}\n"


def test_a_name_that_is_too_long_is_shortened_in_the_message() -> None:
    done = invoke("data", "check", "n" * 5000)
    assert done.exit_code == 2 and "does not exist" in done.stderr
    assert " ... " in done.stderr and len(done.stderr) < 2100
