"""Decoding of images and clips, broken ones included, and the limits of the decode process."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import signal
import subprocess
import sys
import time
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any

import av
import hostile_decoder
import numpy as np
import psutil
import pytest
from clips import HOSTILE, clip, film
from PIL import Image
from shards import jpeg, photo

from data_pipelines.decode import decoders, images
from data_pipelines.decode.animations import mean_rate
from data_pipelines.decode.decoders import AvClip, DecordClip, FrameChoice
from data_pipelines.decode.sandbox import ClipDecoder, Killed
from xray.errors import BadSample


def test_image_modes_become_rgb() -> None:
    for mode in ("L", "P", "RGBA", "CMYK", "I;16", "1", "LA"):
        buffer = io.BytesIO()
        form = "JPEG" if mode == "CMYK" else "PNG"
        Image.new(mode, (8, 6)).save(buffer, format=form)
        image = images.decode_image(buffer.getvalue())
        assert image.mode == "RGB" and image.size == (8, 6)
    with pytest.raises(BadSample, match="undecodable image"):
        images.decode_image(jpeg()[:200])
    for high in (1, 255, 65535):  # of a float TIFF
        buffer = io.BytesIO()
        Image.fromarray(np.linspace(0, high, 48, dtype=np.float32).reshape(6, 8)).save(
            buffer, "TIFF"
        )
        assert images.decode_image(buffer.getvalue()).getextrema() == ((0, 255),) * 3


@pytest.mark.parametrize("side", [16, 32, 48, 64])
def test_a_single_frame_of_a_small_clip_has_no_padding(side: int) -> None:
    """decord returns a single small frame with its padding, and fails for several."""
    data = clip(side, frames=6)
    (frame,) = decoders.read_clip(decoders.open_clip(data), data, np.array([2]))
    (same,) = AvClip(data).read(np.array([2]), 0)
    assert frame.shape == (side, side, 3)
    assert np.abs(frame.astype(int) - same.astype(int)).max() <= 4


def test_a_jpeg_is_decoded_no_larger_than_needed() -> None:
    data = photo(0, (400, 304))
    full = images.decode_image(data)
    cases = (((400, 304), (400, 304)), ((200, 152), (200, 152)), ((99, 70), (100, 76)))
    for at_least, size in cases:
        small = images.decode_image(data, at_least)
        assert small.size == size
        difference = np.asarray(small, int) - np.asarray(full.resize(size, Image.Resampling.BOX))
        assert np.abs(difference).mean() < 2


def test_a_decompression_bomb_is_refused_before_decoding() -> None:
    buffer = io.BytesIO()
    Image.new("1", (9000, 9000)).save(buffer, format="PNG")
    with pytest.raises(BadSample, match="image too large: 9000 x 9000"):
        images.decode_image(buffer.getvalue())


@pytest.mark.parametrize("large", [decoders.LARGE, 0])
def test_decord_and_pyav_agree(large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At full size, and when the decoder scales the frames down."""
    monkeypatch.setattr(decoders, "LARGE", large)
    data, indices = clip(256), np.array([0, 3, 4, 11])
    first, second = (reader(data) for reader in (DecordClip, AvClip))
    assert {(c.total, round(c.fps)) for c in (first, second)} == {(12, 12)}
    a, b = (np.stack(c.read(indices, least=100)) for c in (first, second))
    side = 256 if large else 100
    assert a.shape == b.shape == (4, side, side, 3)
    assert np.abs(a.astype(int) - b.astype(int)).mean() <= (0.5 if large else 2)
    with monkeypatch.context() as patch:
        patch.setattr(decoders, "MAX_PIXELS", 1000)
        with pytest.raises(BadSample, match="video too large: 256 x 256"):
            decoders.read_clip(first, data, indices)


def test_a_frame_can_be_read_twice() -> None:
    data = clip(64)
    once = decoders.read_clip(DecordClip(data), data, np.array([2, 7]))
    twice = decoders.read_clip(DecordClip(data), data, np.array([2, 2, 7, 7]))
    assert np.array_equal(np.stack(twice), np.stack([once[0], once[0], once[1], once[1]]))


def test_frames_of_several_sizes_are_a_bad_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = [np.zeros((8, side, 3), np.uint8) for side in (8, 16)]
    data = clip()
    monkeypatch.setattr(AvClip, "read", lambda self, indices, least: frames)
    with pytest.raises(BadSample, match="the size of its frames changes"):
        decoders.read_clip(AvClip(data), data, np.array([0, 1]))


def test_animations_are_clips() -> None:
    frames = [Image.new("RGB", (10, 8), (40 * i, 0, 0)) for i in range(5)]
    for form, durations in product(("GIF", "WEBP"), ([50] * 5, [10, 70, 70, 70, 30])):
        buffer = io.BytesIO()
        more: dict[str, Any] = {"append_images": frames[1:], "duration": durations}
        frames[0].save(buffer, form, save_all=True, lossless=True, comment=b"GIF" * 99, **more)
        animation = decoders.open_clip(buffer.getvalue())
        assert (animation.total, animation.fps) == (5, 20)
        assert mean_rate(buffer.getvalue()[:-200]) > 0
        pixels = np.stack(animation.read(np.array([1, 4]), 0))
        assert pixels.shape == (2, 8, 10, 3)
        assert np.abs(pixels[:, 0, 0, 0].astype(int) - [40, 160]).max() <= 2


def test_frames_of_avi_have_the_right_numbers(shared_data: Path) -> None:
    """decord seeks to wrong frames in this container, so PyAV reads it."""
    for name in ("msvd.avi", "mmaction_test.avi", "mjpeg.avi"):
        data = (shared_data / "awkward" / "videos" / name).read_bytes()
        with av.open(io.BytesIO(data)) as container:
            frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
        indices = np.array([5, len(frames) // 2, len(frames) - 1])
        opened = decoders.open_clip(data)
        assert opened.total == len(frames)
        read = np.stack(opened.read(indices, 0))
        assert np.array_equal(read, np.stack([frames[i] for i in indices]))


def test_real_files_with_unusual_content(shared_data: Path) -> None:
    """Each file decodes or raises BadSample, as the manifest of the files says."""
    decoder = ClipDecoder(3600, 2)
    outcomes = {"decodes": 0, "must be rejected": 0}
    for row in csv.DictReader((shared_data / "awkward" / "MANIFEST.csv").open()):
        content = (shared_data / "awkward" / row["file"]).read_bytes()
        try:
            if row["file"].startswith("images/"):
                image = images.decode_image(content)
                assert image.mode == "RGB" and min(image.size) > 0
            else:
                frames = decoder.decode(content, FrameChoice(4)).pixels
                assert len(frames) == 4 and frames.shape[3] == 3 and min(frames.shape) > 0
            outcome = "decodes"
        except BadSample as error:
            assert not isinstance(error, Killed), row["file"]
            outcome = "must be rejected"
        if row["expected"] in outcomes:
            assert outcome == row["expected"], row["file"]
            outcomes[outcome] += 1
    decoder.close()
    assert min(outcomes.values()) > 10


def test_rotated_clips_are_upright_at_any_size(
    shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"rot90.mov": (568, 320), "rot180.mov": (320, 568), "rotated_metadata.mp4": (480, 270)}
    for name, (height, width) in sizes.items():
        data = (shared_data / "awkward" / "videos" / name).read_bytes()
        full = [c.read(np.array([1]), 0)[0] for c in (DecordClip(data), AvClip(data))]
        assert full[0].shape == full[1].shape == (height, width, 3)
        # Versions of FFmpeg convert colours differently.
        assert np.abs(full[0].astype(int) - full[1]).mean() < 1
        with monkeypatch.context() as patch:
            patch.setattr(decoders, "LARGE", 0)
            clips = DecordClip(data), AvClip(data)
            small = [c.read(np.array([1]), 128)[0].astype(int) for c in clips]
        assert min(small[0].shape[:2]) == 128 and small[0].shape == small[1].shape
        assert np.abs(small[0] - small[1]).mean() < 4


@pytest.mark.parametrize("reader", [DecordClip, AvClip])
def test_a_cover_is_not_taken_for_the_film(reader: type[DecordClip | AvClip]) -> None:
    """An attached picture may be the first video stream of a file."""
    data = film(cover=True)
    with av.open(io.BytesIO(data)) as container:
        assert [stream.codec.name for stream in container.streams.video] == ["mjpeg", "h264"]
    opened = reader(data)
    assert (opened.total, opened.fps) == (24, 12)
    (frame,) = opened.read(np.array([5]), 0)
    assert frame.shape == (256, 384, 3) and abs(frame.mean() - 40) < 3


def test_a_cover_alone_is_no_clip() -> None:
    with pytest.raises(BadSample, match=r"undecodable video: .*no video stream"):
        decoders.open_clip(film(cover=True, frames=0))


@pytest.mark.parametrize("large", [decoders.LARGE, 0])
@pytest.mark.parametrize(
    ("pixel", "turned", "shape"),
    [
        (Fraction(4, 3), False, (256, 512)),
        (Fraction(1, 2), False, (512, 384)),
        (Fraction(4, 3), True, (512, 256)),
        (Fraction(101, 100), False, (256, 384)),  # makes up for a rounded size
    ],
)
def test_pixels_that_are_not_square(
    pixel: Fraction, turned: bool, shape: tuple[int, int], large: int, monkeypatch: Any
) -> None:
    monkeypatch.setattr(decoders, "LARGE", large)
    data, scale = film(pixel, turned=turned), 1 if large else 2
    frames = [reader(data).read(np.array([0, 5]), 128) for reader in (DecordClip, AvClip)]
    for first, other in frames:
        assert first.shape == other.shape == (shape[0] // scale, shape[1] // scale, 3)
        assert abs(other.mean() - 40) < 3
    if shape != (256, 384):
        monkeypatch.setattr(decoders, "MAX_PIXELS", 384 * 256)
        with pytest.raises(BadSample, match=f"video too large: .*{max(shape)}"):
            decoders.read_clip(AvClip(data), data, np.array([0]))


def test_the_decode_process_equals_decoding_in_this_process() -> None:
    decoder = ClipDecoder(3600, 2)
    for side, count in ((64, 2), (128, 5), (32, 1)):  # the second needs more shared memory
        data, choice = clip(side), FrameChoice(count)
        decoded = decoder.decode(data, choice)
        opened = decoders.open_clip(data)
        assert (decoded.total, decoded.fps) == (opened.total, opened.fps) == (12, 12)
        frames = decoders.read_clip(opened, data, choice.indices(12, 12.0))
        assert np.array_equal(decoded.pixels, np.stack(frames))
    with pytest.raises(BadSample, match="undecodable video"):
        decoder.decode(b"junk" * 100, FrameChoice(2))
    assert decoder.decode(clip(), FrameChoice(2)).total == 12  # the process survives a bad clip
    decoder.close()


@pytest.mark.parametrize(
    ("marker", "cause"),
    [
        (hostile_decoder.HANG, "timed out"),
        (hostile_decoder.BLOAT, "too much memory"),
        (hostile_decoder.CRASH, "crashed"),
    ],
)
def test_a_hostile_clip_affects_no_other_clip(marker: bytes, cause: str) -> None:
    decoder = hostile_decoder.Decoder(0.4)
    expected = decoder.decode(clip(), FrameChoice(2)).pixels.copy()
    process = decoder._process.pid if decoder._process else 0
    with pytest.raises(Killed, match=cause):
        decoder.decode(marker, FrameChoice(2))
    assert not psutil.pid_exists(process)
    assert np.array_equal(decoder.decode(clip(), FrameChoice(2)).pixels, expected)
    decoder.close()


def test_a_sound_clip_survives_a_kill_of_its_process(tmp_path: Path) -> None:
    """The kernel's memory killer chooses a process, not a clip."""
    decoder = hostile_decoder.Decoder(2)
    expected = decoder.decode(clip(), FrameChoice(2)).pixels.copy()
    assert decoder._process
    os.kill(decoder._process.pid, signal.SIGKILL)  # between two clips
    assert np.array_equal(decoder.decode(clip(), FrameChoice(2)).pixels, expected)
    marked = hostile_decoder.killed_once(tmp_path / "mark", clip())  # during one
    assert np.array_equal(decoder.decode(marked, FrameChoice(2)).pixels, expected)
    assert (tmp_path / "mark").exists()
    decoder.close()


def test_two_failures_with_other_causes_are_not_held_against_a_clip(tmp_path: Path) -> None:
    decoder = hostile_decoder.Decoder(2)
    marked = hostile_decoder.killed_once(tmp_path / "mark", hostile_decoder.HANG)
    with pytest.raises(BadSample, match=r"timed out: .*; before: video decoder crashed") as caught:
        decoder.decode(marked, FrameChoice(2))
    assert not isinstance(caught.value, Killed)
    with pytest.raises(Killed, match="timed out"):
        decoder.decode(marked, FrameChoice(2))
    decoder.close()


def test_a_decode_process_that_is_killed_while_it_starts_is_started_again(tmp_path: Path) -> None:
    code = "import os, pathlib, signal, sys; from data_pipelines.decode import worker\n"
    code += f"mark = pathlib.Path({str(tmp_path / 'mark')!r})\n"
    code += "if not mark.exists(): mark.touch(); os.kill(os.getpid(), signal.SIGKILL)\n"
    decoder = ClipDecoder(3600, 2, (sys.executable, "-c", code + "worker.main()"))
    assert decoder.decode(clip(), FrameChoice(2)).total == 12
    decoder.close()


def test_the_decode_process_dies_with_its_parent() -> None:
    """The parent is killed by SIGKILL while a clip hangs."""
    code = (
        "from data_pipelines.decode.sandbox import ClipDecoder\n"
        "from data_pipelines.decode.decoders import FrameChoice\n"
        f"d = ClipDecoder(10**6, 2, {HOSTILE!r}); d._start(); print(d._process.pid, flush=True)\n"
        "d.decode(b'HANG', FrameChoice(1))\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    time.sleep(0.5)
    assert psutil.pid_exists(child)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    with contextlib.suppress(psutil.NoSuchProcess):
        while psutil.Process(child).status() != "zombie":
            time.sleep(0.1)


def test_the_decode_process_does_not_load_torch() -> None:
    code = "import sys, data_pipelines.decode.worker; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
