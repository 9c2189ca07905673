"""Runs `xray ARGS...` and kills this process by SIGKILL at a chosen moment.

usage: python kill_helper.py MOMENT ARGS...
MOMENT is step:N (after step N), save:N (during save number N), file:N (after file number N of the
checkpoints, in the thread that writes it), artifact:STAGE (after that stage) or set:N (in data set
number N of eval.sets).
"""

from __future__ import annotations

import os
import signal
import sys


def die() -> None:
    """Kill this process."""
    os.kill(os.getpid(), signal.SIGKILL)


def arm(moment: str) -> None:
    """Patch the trainer, or the evaluation, so that it kills this process at a moment."""
    if moment.startswith("set:"):
        _arm_set(int(moment.partition(":")[2]))
        return
    import xray.training.checkpoint
    import xray.training.metrics
    import xray.training.portable_state
    import xray.training.trainer

    kind, _, which = moment.partition(":")
    if kind == "step":
        write = xray.training.metrics.Sinks.write

        def write_and_die(self, state, values, logged):  # type: ignore[no-untyped-def]
            write(self, state, values, logged)
            if state.step == int(which):
                die()

        xray.training.metrics.Sinks.write = write_and_die  # type: ignore[method-assign]
    elif kind == "save":  # all files are written, but the folder is not renamed yet
        sync = xray.training.checkpoint.sync_tree
        saves = []

        def sync_and_die(folder):  # type: ignore[no-untyped-def]
            sync(folder)
            saves.append(folder)
            if len(saves) == int(which):
                die()

        xray.training.checkpoint.sync_tree = sync_and_die
    elif kind == "file":
        write = xray.training.portable_state.save_tensors
        files = []

        def write_file_and_die(path, tensors):  # type: ignore[no-untyped-def]
            write(path, tensors)
            files.append(path)
            if len(files) == int(which):
                die()

        xray.training.portable_state.save_tensors = write_file_and_die
    else:  # between two stages
        export = xray.training.trainer._export

        def export_and_die(*given):  # type: ignore[no-untyped-def]
            artifact = export(*given)
            if artifact.stage == which:
                die()
            return artifact

        xray.training.trainer._export = export_and_die


def _arm_set(number: int) -> None:
    from xray.evaluation.set_features import SharedSets

    following, encode, done = SharedSets.following, SharedSets.encode_once, []

    def following_and_count(self, *given):  # type: ignore[no-untyped-def]
        done.append(given)
        return following(self, *given)

    def encode_and_die(self, source):  # type: ignore[no-untyped-def]
        features = encode(self, source)
        if len(done) == number - 1:
            die()
        return features

    SharedSets.following = following_and_count  # type: ignore[method-assign]
    SharedSets.encode_once = encode_and_die  # type: ignore[method-assign]


if __name__ == "__main__":
    moment, *arguments = sys.argv[1:]
    sys.argv = ["xray", *arguments]
    arm(moment)
    from xray.commands.main import main

    main()
