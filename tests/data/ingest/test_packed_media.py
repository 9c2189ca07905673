"""Pictures and clips as `pack` writes them."""

from __future__ import annotations

import errno
import io
import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from clips import film
from packing import (
    clip,
    frames_of,
    picture,
)
from PIL import Image

from data_pipelines.decode.decoders import open_clip, read_clip
from data_pipelines.ingest.recode import pack_clip, pack_picture
from xray.errors import BadSample

# --- pictures ----------------------------------------------------------------------------------


def test_large_pictures_are_shrunk() -> None:
    data, ending, facts = pack_picture(picture((300, 200)), "jpeg", 100, 92)
    image = Image.open(io.BytesIO(data))
    assert (image.format, image.size, ending) == ("JPEG", (150, 100), "jpeg")
    assert facts == {"width": 150, "height": 100}
    data, ending, _ = pack_picture(picture((300, 200), "PNG"), "png", 100, 92)
    assert (Image.open(io.BytesIO(data)).format, ending) == ("JPEG", "jpg")
    rough, _, _ = pack_picture(picture((300, 200)), "jpg", 100, 10)
    assert len(rough) < len(data)


def test_pictures_that_are_small_enough_keep_their_bytes() -> None:
    for form in ("JPEG", "PNG", "WEBP"):
        data = picture((300, 100), form)
        assert pack_picture(data, "x", 100, 92)[:2] == (data, "x")
        assert pack_picture(data, "x", 0, 92)[:2] == (data, "x")
    moving = io.BytesIO()
    frames = [Image.new("RGB", (50, 50), color) for color in ("red", "green", "blue")]
    frames[0].save(moving, "GIF", save_all=True, append_images=frames[1:])
    assert pack_picture(moving.getvalue(), "gif", 20, 92)[0] == moving.getvalue()
    assert pack_picture(picture((50, 50), "GIF"), "gif", 20, 92)[1] == "jpg"


def test_exif_orientation_is_applied() -> None:
    image = Image.new("RGB", (200, 100), "black")
    image.paste("white", (0, 0, 40, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to see it upright: the corner goes to the right
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    data, _, facts = pack_picture(buffer.getvalue(), "jpg", 50, 92)
    upright = Image.open(io.BytesIO(data))
    assert upright.size == (50, 100) and not upright.getexif()
    assert facts == {"width": 50, "height": 100}
    assert upright.getpixel((45, 5)) > (200,) * 3 and upright.getpixel((5, 5)) < (50,) * 3
    kept, _, facts = pack_picture(buffer.getvalue(), "jpg", 0, 92)
    assert kept == buffer.getvalue() and facts == {"width": 100, "height": 200}


def test_alpha_and_depth_survive() -> None:
    image = Image.new("RGBA", (100, 60), (200, 10, 10, 0))
    image.paste((10, 200, 10, 255), (50, 0, 100, 60))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=True)
    data, ending, _ = pack_picture(buffer.getvalue(), "webp", 30, 92)
    small = Image.open(io.BytesIO(data))
    assert (small.format, small.mode, small.size, ending) == ("PNG", "RGBA", (50, 30), "png")
    assert small.getpixel((2, 15))[3] == 0 and small.getpixel((47, 15)) == (10, 200, 10, 255)
    deep = Image.fromarray(np.full((60, 100), 32768, np.uint16))
    buffer = io.BytesIO()
    deep.save(buffer, "PNG")
    data, _, _ = pack_picture(buffer.getvalue(), "png", 30, 92)
    assert abs(Image.open(io.BytesIO(data)).getpixel((5, 5))[0] - 128) < 3  # not cut off at 255


def test_too_many_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipelines.decode.image_limits.MAX_PIXELS", 799)
    with pytest.raises(BadSample, match="image too large: 40 x 20"):
        pack_picture(picture((40, 20)), "jpg", 0, 92)


# --- clips -------------------------------------------------------------------------------------


def numbers(data: bytes) -> list[int]:
    """Read the number that is encoded in each frame's brightness."""
    return [round((f.to_ndarray(format="gray")[-3, -3] - 16) / 219 * 255) for f in frames_of(data)]


def test_key_frames_are_where_they_are_asked_for(tmp_path: Path) -> None:
    source = clip(sound=True)
    assert [f.key_frame for f in frames_of(source)].count(True) == 1
    data, ending, facts = pack_clip(source, "mov", 0, gop=5, crf=20, folder=tmp_path)
    frames = frames_of(data)
    assert ending == "mp4" and data.index(b"moov") < data.index(b"mdat")
    assert [i for i, frame in enumerate(frames) if frame.key_frame] == [0, 5, 10]
    assert [round(float(f.time), 3) for f in frames] == [i / 10 for i in range(12)]
    assert np.abs(np.subtract(numbers(data), numbers(source))).max() <= 3
    assert facts == {"width": 64, "height": 48, "num_frames": 12, "fps": 10.0, "duration": 1.2}
    with av.open(io.BytesIO(data)) as container:
        stream: Any = container.streams.video[0]
        assert [s.type for s in container.streams] == ["video"]
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
        assert stream.average_rate == 10
    again, _, _ = pack_clip(data, "mp4", 0, gop=3, crf=20, folder=tmp_path)
    keys = [i for i, frame in enumerate(frames_of(again)) if frame.key_frame]
    assert keys == [0, 3, 6, 9]  # and not where they were
    larger, _, _ = pack_clip(clip((256, 192)), "mp4", 0, 4, 40, tmp_path)
    assert b" threads=1 " in larger  # x264 notes it; on more threads the bytes would differ
    assert list(tmp_path.iterdir()) == []


def test_the_film_is_packed_and_not_its_cover(tmp_path: Path) -> None:
    assert pack_clip(film(cover=True), "mp4", 0, 0, 20, tmp_path)[2]["num_frames"] == 24
    data, _, facts = pack_clip(film(cover=True), "mp4", 0, gop=8, crf=20, folder=tmp_path)
    frames = frames_of(data)
    assert len(frames) == 24 and {(f.width, f.height) for f in frames} == {(384, 256)}
    assert (facts["width"], facts["height"], facts["num_frames"]) == (384, 256, 24)
    with av.open(io.BytesIO(data)) as container:
        assert len(container.streams) == 1
    with pytest.raises(BadSample, match="undecodable video: no video stream"):
        pack_clip(film(cover=True, frames=0), "mp4", 0, 0, 20, tmp_path)


@pytest.mark.parametrize(
    ("pixel", "turned", "size"),
    [
        (Fraction(4, 3), False, (512, 256)),
        (Fraction(1, 2), False, (384, 512)),
        (Fraction(4, 3), True, (256, 512)),
    ],
)
def test_packing_keeps_the_shape_of_clips_whose_pixels_are_not_square(
    pixel: Fraction, turned: bool, size: tuple[int, int], tmp_path: Path
) -> None:
    source = film(pixel, turned=turned)
    for short_side, gop, scale in ((0, 0, 1), (0, 8, 1), (min(size) // 2, 4, 2)):
        data, _, facts = pack_clip(source, "mp4", short_side, gop, 20, tmp_path)
        shape = size[0] // scale, size[1] // scale
        assert (facts["width"], facts["height"]) == shape
        (frame,) = read_clip(open_clip(data), data, np.array([3]))
        assert frame.shape[1::-1] == shape


def test_a_full_disk_is_not_the_clips_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("data_pipelines.ingest.recode._encode", fail)
    with pytest.raises(OSError, match="No space left"):
        pack_clip(clip(), "mp4", 0, 4, 20, tmp_path)


def test_a_clip_is_shrunk_to_even_sizes(tmp_path: Path) -> None:
    data, _, facts = pack_clip(clip((90, 50)), "mp4", 25, 0, 20, tmp_path)
    assert {(f.width, f.height) for f in frames_of(data)} == {(44, 24)}
    assert (facts["width"], facts["height"], facts["num_frames"]) == (44, 24, 12)
    small = clip((64, 48))
    assert pack_clip(small, "mov", 48, 0, 20, tmp_path)[:2] == (small, "mov")
    coarse, _, _ = pack_clip(small, "mov", 0, 4, 51, tmp_path)
    assert len(coarse) < len(pack_clip(small, "mov", 0, 4, 0, tmp_path)[0])


def test_a_variable_rate_is_kept(tmp_path: Path) -> None:
    times = (500, 540, 580, 700, 740, 1000, 1040, 1080, 1120, 1160, 1200, 1500)
    data, _, facts = pack_clip(clip(times=times, form="matroska"), "mkv", 0, 4, 20, tmp_path)
    shown = [round(1000 * float(frame.time)) for frame in frames_of(data)]
    assert shown == [t - times[0] for t in times]
    assert facts["num_frames"] == 12 and facts["duration"] >= 1.0


def test_full_range_is_not_washed_out(tmp_path: Path) -> None:
    source = clip(full_range=True)
    data, _, _ = pack_clip(source, "mp4", 0, 4, 5, tmp_path)
    before, after = (frames_of(d)[0].to_ndarray(format="rgb24") for d in (source, data))
    assert np.abs(before[[2, -3], [2, -3]].astype(int) - after[[2, -3], [2, -3]]).max() <= 4


def test_a_phones_rotation_is_applied(tmp_path: Path) -> None:
    data = bytearray(clip((64, 48)))
    matrix = data.index(b"tkhd") + 44
    turn = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 48 << 16, 0, 1 << 30)
    data[matrix : matrix + 36] = turn  # a quarter clockwise, as for a clip filmed upright
    _, _, facts = pack_clip(bytes(data), "mp4", 0, 0, 20, tmp_path)
    assert (facts["width"], facts["height"]) == (48, 64)
    upright, _, facts = pack_clip(bytes(data), "mp4", 24, 4, 20, tmp_path)
    assert (facts["width"], facts["height"], facts["num_frames"]) == (24, 32, 12)
    frame = frames_of(upright)[3]
    assert frame.rotation == 0
    pixels = frame.to_ndarray(format="gray")
    assert pixels.shape == (32, 24)
    corners = pixels[[2, 2, -3, -3], [2, -3, 2, -3]] > 200
    assert corners.tolist() == [False, True, False, False]  # upper left is upper right now


def test_a_clip_that_breaks_off(tmp_path: Path) -> None:
    data = clip((64, 48))
    noise = bytearray(data)
    start = data.index(b"mdat") + 4
    noise[start:] = bytes(len(data) - start)
    for broken in (data[:100], bytes(noise), picture(form="PNG")[:60]):
        with pytest.raises(BadSample) as caught:
            pack_clip(broken, "mp4", 0, 4, 20, tmp_path)
        assert caught.value.cause == "undecodable video"
    assert list(tmp_path.iterdir()) == []
