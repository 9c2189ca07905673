"""Two gloo processes against one; test_zero_stage_matrix.py compares them for each stage."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from child_process import RECIPE, torchrun, xray
from run_comparison import assert_same_losses

WAITING = """
import pathlib, sys, time
import torch.distributed
from xray import agreement, dist
torch.distributed.init_process_group("gloo")
dist.join()
for name in ("new_group", "all_gather_object", "all_reduce", "barrier"):
    setattr(torch.distributed, name, None)  # an agreement uses no group and no collective
told, agreement.NOTICE = pathlib.Path(sys.argv[1]) / "told", 0.1
printed = agreement.Agreement._print
agreement.Agreement._print = lambda self, *args: (printed(self, *args), told.touch())
def work():
    while dist.is_main() and not told.exists():
        time.sleep(0.01)
    return time.monotonic()
done = dist.main_first(work, "preparing the data")
first = dist.broadcast_object(done)
assert first <= done, "rank 0 is first"
dist.leave()
assert not torch.distributed.is_initialized(), "its threads could outlive the interpreter"
"""


def test_ranks_wait_for_the_preparation_on_rank_0(tmp_path: Path) -> None:
    script = tmp_path / "waiting.py"
    script.write_text(WAITING)
    stderr = torchrun(str(script), str(tmp_path))
    told = r"xray, rank 1: waiting for rank 0 \(.+, process \d+\), \d+ s so far: preparing the data"
    assert re.search(told, stderr)


def test_a_rank_that_fails_ends_the_other_one_and_the_test(tmp_path: Path) -> None:
    """The helper of these tests does what torchrun does."""
    script = tmp_path / "failing.py"
    code = "import os, sys, time; os.environ['RANK'] == '1' and sys.exit('no'); time.sleep(10_000)"
    script.write_text(code)
    with pytest.raises(AssertionError, match="no"):
        torchrun(str(script))


def test_a_recipe_has_equal_results_on_one_and_two_processes(demo: Path, tmp_path: Path) -> None:
    """Rank 0 stores the vectors of the captions for both."""
    data = Path(shutil.copytree(demo, tmp_path / "data"))
    settings = [f"data.root={data}", "train.samples=48", "clip.text.features=fp32"]
    torchrun("-m", "xray", "run", RECIPE, *settings, f"out={tmp_path / 'two'}")
    one = xray("run", RECIPE, *settings, f"out={tmp_path / 'one'}")
    assert one.returncode == 0, one.stderr
    for stage in ("mae", "hashtag", "text", "clip"):
        assert_same_losses(tmp_path / "one" / stage, tmp_path / "two" / stage, 4)
    a, b = (json.loads((tmp_path / n / "results.json").read_text()) for n in ("one", "two"))
    assert a.keys() == b.keys() == {"zero_shot", "retrieval", "knn", "tags"}


FORKING = """
import os, sys, time
import torch.distributed
from xray import dist
torch.distributed.init_process_group("gloo")
for _ in range(250):
    for _ in range(4):
        torch.distributed.all_reduce(torch.zeros(100))
    dist.settle(1)
    child = os.fork()
    if child == 0:
        os._exit(0)
    asked = time.monotonic()
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        assert time.monotonic() - asked < 600, "a forked process hangs"
        time.sleep(0.001)
dist.leave()
"""


def test_processes_forked_after_a_collective_start(tmp_path: Path) -> None:
    """Without `settle`, one of 100 to 200 processes hangs at its start (Python 3.11)."""
    script = tmp_path / "forking.py"
    script.write_text(FORKING)
    torchrun(str(script))
