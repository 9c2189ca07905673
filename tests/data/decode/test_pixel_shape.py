"""Proof of square pixels from the header of a file, compared with FFmpeg's answer."""

from __future__ import annotations

import functools
import io
import random
import re
import struct
from fractions import Fraction
from typing import Any

import av
import numpy as np
import pytest

from data_pipelines.decode import decoders
from data_pipelines.decode.pixel_shape import surely_square

SHAPES = {f"{w}:{h}": Fraction(w, h) for w, h in ((1, 1), (4, 3), (16, 11), (1, 2), (7, 5))}
BARRED = b"\0\0\3"  # two zeros with an emulation prevention byte
IDENTITY = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
TURNED = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 48 << 16, 0, 1 << 30)


@functools.cache
def encoded(
    codec: str = "libx264",
    size: tuple[int, int] = (64, 48),
    pixels: str = "yuv420p",
    container: str = "mp4",
    shape: str = "",
    sound: bool = False,
    **options: str,
) -> bytes:
    """Encode 6 frames; `shape` is the sample aspect ratio that the encoder and the file get."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as file:
        stream: Any = file.add_stream(codec, rate=12, options=options)
        stream.width, stream.height, stream.pix_fmt = *size, pixels
        if shape:
            stream.codec_context.sample_aspect_ratio = SHAPES[shape]
        audio: Any = file.add_stream("aac", rate=16000, layout="mono") if sound else None
        for number in range(6):
            grey = np.full((size[1], size[0], 3), 40 * number, np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(grey, "rgb24")))
        if sound:
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), "fltp", "mono")
            samples.sample_rate = 16000
            file.mux([*audio.encode(samples), *audio.encode()])
        file.mux(stream.encode())
    return buffer.getvalue()


def put(data: bytes, name: bytes, offset: int, form: str, *values: bytes | int) -> bytes:
    """Replace values at an offset in the content of the first box of a name."""
    start = data.index(name) + 4 + offset
    return data[:start] + struct.pack(form, *values) + data[start + struct.calcsize(form) :]


def only_sps(data: bytes) -> bytes:
    """Remove the shape of a pixel from the boxes, so that only the SPS has it."""
    size = struct.unpack_from(">HH", data, data.index(b"stsd") + 44)
    return put(data, b"tkhd", 76, ">II", size[0] << 16, size[1] << 16).replace(b"pasp", b"btrt")


def sps_of(data: bytes) -> bytes:
    start = data.index(b"avcC") + 10
    return data[start + 2 : start + 2 + int.from_bytes(data[start : start + 2], "big")]


def with_extended(data: bytes, number: int, barred: bool = True) -> bytes:
    """Change the extended aspect ratio 7:5 in the SPS to number:number.

    barred: with emulation prevention bytes, for which the boxes grow.
    """
    sps = sps_of(data)
    bits = f"{int.from_bytes(sps.replace(BARRED, BARRED[:2]), 'big'):b}"
    old, new = (f"{255:08b}{w:016b}{h:016b}" for w, h in ((7, 5), (number, number)))
    assert bits.count(old) == 1
    changed = int(bits.replace(old, new), 2).to_bytes((len(bits) + 7) // 8, "big")
    if barred:
        changed = re.sub(rb"\0\0(?=[\0-\3])", BARRED, changed)
    data = data.replace(sps, changed)
    for name in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"avc1", b"avcC"):
        start = data.rindex(name, 0, data.index(b"avcC") + 4)
        size = int.from_bytes(data[start - 4 : start], "big") + len(changed) - len(sps)
        data = data[: start - 4] + struct.pack(">I", size) + data[start:]
    return put(data, b"avcC", 6, ">H", len(changed))


def in_moov(data: bytes, name: bytes, content: bytes) -> bytes:
    """Append a box to the `moov` box, which is the last of the file."""
    size = int.from_bytes(data[data.index(b"moov") - 4 : data.index(b"moov")], "big")
    data = put(data, b"moov", -8, ">I", size + 8 + len(content))
    return data + struct.pack(">I4s", 8 + len(content), name) + content


def turned(data: bytes) -> bytes:
    start = data.index(IDENTITY, data.index(b"tkhd"))
    return data[:start] + TURNED + data[start + 36 :]


def by_ffmpeg(data: bytes, monkeypatch: pytest.MonkeyPatch) -> float:
    with monkeypatch.context() as patch:
        patch.setattr(decoders, "surely_square", lambda data: False)
        return decoders.upright_aspect(data)


PLAIN: dict[str, dict[str, Any]] = {
    "plain": {},
    "mov": {"container": "mov"},
    "sound": {"sound": True},
    "cropped": {"size": (62, 50)},
    "large": {"size": (1280, 720)},
    "baseline": {"profile": "baseline"},
    "main": {"profile": "main"},
    "high10": {"pixels": "yuv420p10le"},
    "high422": {"pixels": "yuv422p"},
    "high444": {"pixels": "yuv444p"},
    "lossless": {"qp": "0"},
    "interlaced": {"flags": "+ildct+ilme", "size": (64, 64)},
    "no B-frames": {"bf": "0"},
    "B-frames": {"bf": "3"},
    "fast start": {"movflags": "faststart"},
    "timing": {"x264-params": "nal-hrd=vbr:vbv-maxrate=1000:vbv-bufsize=1000"},
}
OTHER: dict[str, dict[str, Any]] = {
    "mpeg4": {"codec": "mpeg4"},
    "hevc": {"codec": "libx265", "x265-params": "log-level=none"},
    "mkv": {"container": "matroska"},
    "avi": {"container": "avi", "bf": "0"},
    "scaling matrices": {"x264-params": "cqm=jvt"},
    "parameter sets in samples": {"x264-params": "repeat-headers=1"},
    "fragments": {"movflags": "frag_keyframe+empty_moov"},
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_files_are_proved_square(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for data in (encoded(**PLAIN[name]), turned(encoded(**PLAIN[name]))):
        assert surely_square(data)
        assert by_ffmpeg(data, monkeypatch) == decoders.upright_aspect(data) == 1


@pytest.mark.parametrize("shape", ["", *SHAPES])
@pytest.mark.parametrize("name", [*PLAIN, *OTHER])
def test_the_answer_is_that_of_ffmpeg(
    name: str, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "hevc" and "libx265" not in av.codecs_available:
        pytest.skip("this PyAV has no encoder of HEVC")
    data = encoded(**{**PLAIN, **OTHER}[name], shape=shape)
    forms = [data]
    if b"avcC" in data and data[4:8] == b"ftyp":
        forms += [turned(data), only_sps(data), turned(only_sps(data))]
    for form in forms:
        assert decoders.upright_aspect(form) == by_ffmpeg(form, monkeypatch)
    if shape not in ("", "1:1") and name not in ("avi", "hevc"):
        assert by_ffmpeg(data, monkeypatch) != 1


def test_each_place_that_has_a_shape_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """In each file only one place makes FFmpeg find other pixels than square ones."""
    plain, square = encoded(), encoded(shape="1:1")
    repeated = {"x264-params": "repeat-headers=1"}
    wide, extended = (only_sps(encoded(shape=shape, **repeated)) for shape in ("4:3", "7:5"))
    hidden = sps_of(encoded(shape="1:1", **repeated))
    files = {
        "pasp in place of vmhd": put(plain, b"vmhd", -4, ">4sII", b"pasp", 4, 3),
        "pasp": put(square, b"pasp", 0, ">II", 4, 3),
        "width of the track": put(plain, b"tkhd", 76, ">I", 96 << 16),
        "height of the track": put(plain, b"tkhd", 80, ">I", 96 << 16),
        "matrix of the track": put(plain, b"tkhd", 40, ">I", 2 << 16),
        "matrix of the film": put(plain, b"mvhd", 36, ">I", 2 << 16),
        "SPS": only_sps(encoded(shape="16:11")),
        "extended SPS": only_sps(encoded(shape="7:5")),
        "SPS of the first sample": hidden.join(wide.rsplit(sps_of(wide), 1)),
    }
    for name, data in files.items():
        assert abs(by_ffmpeg(data, monkeypatch) - 1) > 0.1, name
        assert not surely_square(data), name
    assert surely_square(only_sps(square)) and not surely_square(extended)
    for number in (5, 1, 0):  # 0:0 needs emulation prevention bytes
        equal = with_extended(only_sps(encoded(shape="7:5")), number)
        assert surely_square(equal) and by_ffmpeg(equal, monkeypatch) == 1
    assert not surely_square(with_extended(only_sps(encoded(shape="7:5")), 0, barred=False))


def test_only_the_usual_layout_is_trusted() -> None:
    plain = encoded()
    later = struct.unpack_from(">i", plain, plain.index(b"elst") + 16)[0] + 512
    film = plain[plain.index(b"trak") - 4 :]
    film = film[: struct.unpack_from(">I", film)[0]]
    moov = plain.index(b"moov") - 4
    size = struct.unpack_from(">I", plain, moov)[0]
    two = plain[:moov] + struct.pack(">I", size + len(film)) + plain[moov + 4 : moov + size] + film
    for data in (
        b"",
        plain[28:],
        plain + b"more",
        plain + b"\0\0\0\x08uuid",
        two + plain[moov + size :],
        put(plain, b"elst", 12, ">i", later),
        plain.replace(b"ftyp", b"free", 1),
        plain.replace(b"btrt", b"glbl"),
        plain.replace(b"stsz", b"stz2"),
        encoded(sound=True).replace(b"mp4a", b"mp4v"),
        encoded(sound=True).replace(b"soun", b"vide"),
        in_moov(plain, b"mvhd", plain[plain.index(b"mvhd") + 4 :][:100]),
        in_moov(plain, b"tkhd", bytes(84)),
        in_moov(plain, b"pasp", struct.pack(">II", 4, 3)),
        in_moov(plain, b"avcC", plain[plain.index(b"avcC") + 4 :][:60]),
        put(plain, b"stsd", 90, ">H", 8),  # a palette
        put(plain, b"stsz", 12, ">I", 1 << 20),
        put(plain, b"avcC", 5, ">B", 0xE2),
        put(plain, b"avcC", 9, ">B", 118),  # the profile of several views
    ):
        assert not surely_square(data)
    start = struct.unpack_from(">I", plain, plain.index(b"stco") + 12)[0]
    for size in (31, 32):  # FFmpeg probes a second sample after one of less than 32 bytes
        sample = put(plain, b"stsz", 12, ">I", size)
        sample = sample[:start] + struct.pack(">IB", size - 4, 6) + sample[start + 5 :]
        assert surely_square(sample) == (size == 32)
        assert not surely_square(put(sample, b"stsz", 12, ">I", 40))


@pytest.mark.parametrize("name", ["plain", "turned", "sound", "pasp", "SPS", "samples"])
def test_broken_headers_are_never_taken_for_square(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = {
        "plain": encoded,
        "turned": lambda: turned(encoded()),
        "sound": lambda: encoded(sound=True),
        "pasp": lambda: encoded(shape="4:3"),
        "SPS": lambda: only_sps(encoded(shape="16:11")),
        "samples": lambda: only_sps(encoded(shape="4:3", **OTHER["parameter sets in samples"])),
    }[name]()
    draw = random.Random(name)
    start, end = data.index(b"avcC") - 100, data.index(b"avcC") + 60
    for number in range(500):
        broken = bytearray(data)
        for _ in range(draw.randint(1, 3)):
            where = draw.randrange(start, end) if number % 2 else draw.randrange(len(data))
            broken[where] ^= 1 << draw.randrange(8)
        if surely_square(bytes(broken)):
            assert by_ffmpeg(bytes(broken), monkeypatch) == 1
    for length in range(0, len(data), 7):
        assert not surely_square(data[:length])
