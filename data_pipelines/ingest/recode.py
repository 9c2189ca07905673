"""Checks that pictures and clips decode, and shrinks or re-encodes them for packing.

Files that need no change keep their bytes. Re-encoded clips have the film only, with square pixels.
"""

from __future__ import annotations

import errno
import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import GifImagePlugin, Image, ImageOps, WebPImagePlugin

from data_pipelines.decode.decoders import film_of, pixel_aspect, quarter_turns, square_size
from data_pipelines.decode.images import decoding_image, open_image, upright, upright_size
from xray.errors import BadSample

Media = tuple[bytes, str, dict[str, Any]]  # bytes, file ending, facts such as width and height
ANIMATED = (GifImagePlugin.GifImageFile, WebPImagePlugin.WebPImageFile)
TEMPORARY = ".packing."  # prefix of the names of unfinished files


@contextmanager
def _decoding_clip() -> Iterator[None]:
    """Convert a decoder's errors to BadSample, except the error of a full disk."""
    try:
        yield
    except BadSample:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        # Some messages name a temporary file, so they differ between runs.
        detail = error.strerror if isinstance(error, av.FFmpegError) else str(error)
        raise BadSample("undecodable video", detail or type(error).__name__) from error


def pack_picture(data: bytes, ending: str, short_side: int, quality: int) -> Media:
    """Shrink a picture whose short side is larger than `short_side` (0 = never).

    Animated GIF and WebP files are not changed, because a run may use them as clips. Raises
    BadSample.
    """
    image: Image.Image = open_image(data)
    with decoding_image():
        larger = 0 < short_side < min(image.size)
        # Shrinking an animated image would lose its frames.
        if not larger or (isinstance(image, ANIMATED) and image.is_animated):
            image.load()
            width, height = upright_size(image)
            return data, ending, {"width": width, "height": height}
        if image.has_transparency_data:
            image, form, ending = ImageOps.exif_transpose(image).convert("RGBA"), "PNG", "png"
        else:
            image, form = upright(image), "JPEG"
            ending = ending if ending in ("jpg", "jpeg") else "jpg"
        scale = short_side / min(image.size)
        width, height = (round(side * scale) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, format=form, quality=quality)
    return buffer.getvalue(), ending, {"width": width, "height": height}


def pack_clip(data: bytes, ending: str, short_side: int, gop: int, crf: int, folder: Path) -> Media:
    """Check that a clip's first frame decodes; re-encode it to shrink it or to set key frames.

    folder: place for a temporary file. Raises BadSample.
    """
    with _decoding_clip():
        facts = _probe(data)
        short = min(facts["width"], facts["height"])
        shrink = 0 < short_side < short
        if gop or shrink:
            scale = short_side / short if shrink else 1.0
            width, height = (
                max(2, round(facts[side] * scale) // 2 * 2) for side in ("width", "height")
            )
            # A file is needed: the mp4 muxer reads its output to move the index to the front.
            with tempfile.NamedTemporaryFile(dir=folder, prefix=TEMPORARY) as file:
                _encode(data, file.name, (width, height), gop, crf)
                data, ending = file.read(), "mp4"
            facts = _probe(data)
    return data, ending, facts


def _probe(data: bytes) -> dict[str, Any]:
    """Return the size of an upright frame with square pixels, and the clip's length if known."""
    with av.open(io.BytesIO(data)) as container:
        stream = film_of(container)
        frame = next(container.decode(stream), None)
        if frame is None:
            raise BadSample("undecodable video", "no frames")
        width, height = square_size(frame.width, frame.height, pixel_aspect(stream))
        facts: dict[str, Any] = {"width": width, "height": height}
        if quarter_turns(frame) % 2:
            facts = {"width": height, "height": width}
        if stream.frames:
            facts["num_frames"] = stream.frames
        if stream.average_rate:
            facts["fps"] = round(float(stream.average_rate), 3)
        if container.duration:
            facts["duration"] = round(container.duration / av.time_base, 3)
        return facts


def _encode(data: bytes, target: str, size: tuple[int, int], gop: int, crf: int) -> None:
    """Encode a clip as H.264 without sound; frames are rotated and keep their timestamps."""
    options = {"crf": str(crf), "bf": "0"}  # no B-frames: decoding order is display order
    if gop:
        options |= {"g": str(gop), "keyint_min": str(gop), "sc_threshold": "0"}
    flags = {"movflags": "+faststart"}
    with av.open(io.BytesIO(data)) as source, av.open(target, "w", "mp4", options=flags) as sink:
        video = film_of(source)
        rate = video.average_rate or video.guessed_rate or 25
        step = max(1, round(1 / float(rate) / float(video.time_base)))  # ticks of one frame
        stream: Any = sink.add_stream("libx264", rate=rate, options=options)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        _configure_encoder(stream.codec_context, video)
        first, last = None, -1
        for frame in source.decode(video):
            picture = _upright(frame, size)
            pts = last + step if frame.pts is None else frame.pts
            first = pts if first is None else first
            last = max(last + 1, pts - first)
            picture.pts, picture.time_base = last, video.time_base
            sink.mux(stream.encode(picture))
        sink.mux(stream.encode())


def _configure_encoder(encoder: Any, video: Any) -> None:
    encoder.thread_count = 1  # the encoded bytes depend on the number of threads
    encoder.time_base = video.time_base
    encoder.color_range = 1  # range of the frames of _upright: 16 to 235
    if video.codec_context.colorspace:  # 0 means RGB, which is wrong for yuv420p
        encoder.colorspace = video.codec_context.colorspace
    encoder.color_primaries = video.codec_context.color_primaries
    encoder.color_trc = video.codec_context.color_trc


def _upright(frame: av.VideoFrame, size: tuple[int, int]) -> av.VideoFrame:
    """Apply the container's rotation to a frame and resize it to (width, height)."""
    turns = quarter_turns(frame)
    width, height = size[::-1] if turns % 2 else size
    form = "yuv444p" if turns else "yuv420p"  # yuv444p rotates as one array
    frame = frame.reformat(width, height, form, interpolation="BICUBIC", dst_color_range="MPEG")
    if turns:
        planes: Any = np.rot90(frame.to_ndarray(), turns, axes=(1, 2))
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(planes), form)
        frame = frame.reformat(format="yuv420p")
    frame.pict_type = 0  # otherwise the encoder repeats the source's key frames
    return frame
