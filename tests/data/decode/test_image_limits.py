"""Images whose decoding would take minutes: refused by their headers, or ended by the CPU time."""

from __future__ import annotations

import signal
import struct
import threading

import pytest
from PIL import features
from shards import photo, progressive

from data_pipelines.decode import image_limits
from data_pipelines.decode.image_limits import count_scans
from data_pipelines.decode.images import decode_image, open_image
from data_pipelines.ingest.recode import pack_picture
from xray.errors import BadSample, Killed


def tiff(size: tuple[int, int], tile: tuple[int, int], tiles: int, compression: int = 1) -> bytes:
    """Make a TIFF of one bit per pixel, all of whose tiles have the same data."""
    pixels = b"\0" * (tile[0] * tile[1] // 8) if compression == 1 else b"\0" * 100
    many = (
        struct.pack(f"<{tiles}I", *[8] * tiles),
        struct.pack(f"<{tiles}I", *[len(pixels)] * tiles),
    )
    start = 8 + len(pixels)
    places = (start, start + len(many[0])) if tiles > 1 else (8, len(pixels))
    tags = [(256, 1, size[0]), (257, 1, size[1]), (258, 1, 1), (259, 1, compression), (262, 1, 1)]
    tags += [(277, 1, 1), (322, 1, tile[0]), (323, 1, tile[1])]
    tags += [(324, tiles, places[0]), (325, tiles, places[1])]
    entries = b"".join(struct.pack("<HHII", tag, 4, count, value) for tag, count, value in tags)
    head = b"II*\0" + struct.pack("<I", start + sum(map(len, many))) + pixels + b"".join(many)
    return head + struct.pack("<H", len(tags)) + entries + b"\0" * 4


def test_a_jpeg_of_too_many_scans_is_refused_before_decoding() -> None:
    data = progressive((4000, 4000), 100)
    assert len(data) < 100_000
    for read in (decode_image, lambda data: pack_picture(data, "jpg", 0, 92)):
        with pytest.raises(BadSample, match="image too large: 4000 x 4000 in 105 scans"):
            read(data)
    assert decode_image(progressive((4000, 4000), 20)).size == (4000, 4000)
    assert decode_image(progressive((100, 100), 1000)).size == (100, 100)


def test_only_the_scans_of_the_image_itself_count() -> None:
    """Thumbnails, comments and films that phones append to a photo have the same bytes."""
    marks = b"\xff\xda" * 30_000
    comment = b"\xff\xfe" + struct.pack(">H", len(marks) + 2) + marks
    plain = progressive((4000, 4000), 1)
    data = plain[:2] + comment + plain[2:] + marks * 5
    assert count_scans(data) == count_scans(plain) == 6  # a grey progressive JPEG of libjpeg has 6
    assert decode_image(data).size == (4000, 4000)
    assert count_scans(photo(0)) == 1
    marks = b"\xff\xda" * 3 + photo(0)[2:]  # a baseline JPEG ends with its first complete scan
    assert count_scans(photo(0)[:-2] + marks) == 1
    assert count_scans(plain[:300]) <= 1 and count_scans(b"") == 0


def test_a_tiff_whose_tiles_overlap_is_refused() -> None:
    with pytest.raises(BadSample, match="image too large: 4000 x 4000 in 300 tiles"):
        open_image(tiff((4000, 4000), (4000, 2000), 300))
    assert decode_image(tiff((4000, 4000), (4000, 2000), 2)).size == (4000, 4000)


@pytest.mark.skipif(not features.check("libtiff"), reason="this Pillow has no libtiff")
def test_a_tiff_with_a_tile_far_larger_than_the_image_is_refused() -> None:
    with pytest.raises(BadSample, match="image too large: 64 x 64 in tiles of 64000 x 128000"):
        open_image(tiff((64, 64), (64_000, 128_000), 1, compression=8))


def test_the_cpu_time_in_pillow_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow skips the fill bytes of a JPEG one by one."""
    data = photo(0)
    filled = data[:2] + b"\xff" * 4_000_000 + data[2:]
    with monkeypatch.context() as patch:
        patch.setattr(image_limits, "SECONDS", 0.05)
        with pytest.raises(Killed, match=r"image decode timed out: 0\.05 s of CPU time"):
            open_image(filled)
        assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)
        assert decode_image(data).size == (64, 48)  # the limit is for each image
    assert open_image(filled).size == (64, 48)


def test_other_threads_decode_without_a_limit() -> None:
    """Python handles signals in its main thread only."""
    sizes = []
    thread = threading.Thread(target=lambda: sizes.append(decode_image(photo(0)).size))
    thread.start()
    thread.join()
    assert sizes == [(64, 48)]
