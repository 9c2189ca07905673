"""Reader of MP4 headers that proves pixels square, much faster than opening the file with FFmpeg.

FFmpeg takes it from: `pasp`; the matrices in `mvhd` and `tkhd`; the sizes in `tkhd` and the sample
entry; the SPS in `avcC` or the first sample. It accepts a box anywhere, so all of a name are read.
Sources: ISO/IEC 14496-12 and 14496-15; ITU-T H.264, 7.3.2.1.1 and E.1.1.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

TOP = {b"ftyp", b"free", b"skip", b"wide", b"mdat", b"moov"}
IN_ENTRY = {b"avcC", b"btrt", b"colr", b"fiel"}  # boxes of a sample entry that bring no other SPS
NO_FILM = {b"mp4a", b"tmcd", b"mebx", b"text", b"tx3g"}  # sample entries of sound, time and text
ONE = rb"(?:\x00\x01|\xff\xff)"  # 1 or -1, without its 16 bits of fraction
TURN = rb"(?:%b\x00{14}%b\x00{6}|\x00{4}%b\x00{6}%b\x00{10})" % (ONE, ONE, ONE, ONE)  # unscaled
MVHD = re.compile(rb"(?s)mvhd(?:\x00.{35}|\x01.{47})" + TURN)
TKHD = re.compile(rb"(?s)tkhd(?:\x00.{39}|\x01.{51})" + TURN + rb".{12}(..)\x00\x00(..)\x00\x00")
HANDLER = re.compile(rb"(?s)hdlr.{8}vide")
STSD = re.compile(rb"(?s)stsd.{12}(....)")  # -> name of the first sample entry
ENTRY = re.compile(  # the only one, of 24 bit colors (no palette) -> its size, name, width, height
    rb"(?s)stsd.{4}\x00{3}\x01(.{4})(avc[13]).{24}(..)(..).{46}\x00\x18.."
)
UE = "(?:" + "|".join(f"0{{{n}}}1.{{{n}}}" for n in range(16)) + ")"  # Exp-Golomb code
PLAIN = "(?:01000010|01001101|01011000)"  # profile_idc 66, 77, 88
HIGH = "(?:00101100|01100100|01101110|01111010|11110100)"  # 44, 100, 110, 122, 244
SQUARE_SPS = re.compile(  # in bits; it has one reading, because no code begins with another
    rf"(?:{PLAIN}.{{16}}{UE}"
    rf"|{HIGH}.{{16}}{UE}(?:00100.|(?!00100){UE}){UE}{UE}.0)"  # chroma, depths, no scaling matrix
    rf"{UE}(?:1{UE}|011){UE}.{UE}{UE}(?:1|0.)."  # numbers of frames, size, interlacing
    rf"(?:0|1{UE}{UE}{UE}{UE})"  # cropping
    r"(?:0|1(?:0|1(?:0{8}|0{7}1|1{8}(.{16})\1)))"  # VUI: no aspect ratio, unknown, 1:1 or n:n
)


def surely_square(data: bytes) -> bool:
    """Return True only if FFmpeg finds square pixels in this MP4 or MOV file of H.264.

    False means unknown: another format, or anything unusual in the header.
    """
    try:
        top = list(_boxes(data))
        (moov,) = (box for name, box in top if name == b"moov")
        (film,) = (box for name, box in _boxes(moov) if name == b"trak" and b"avcC" in box)
        (entry,) = ENTRY.finditer(film)
        length, kind, *size = entry.groups()
        end = entry.start() + 12 + int.from_bytes(length, "big")
        boxes = list(_boxes(film[entry.end() : end]))
        (avcc,) = (box for name, box in boxes if name == b"avcC")
        header = b"".join(box for name, box in top if name != b"mdat")
        tracks = TKHD.findall(header)
        return (
            top[0][0] == b"ftyp"
            and TOP.issuperset(name for name, _ in top)
            and IN_ENTRY.issuperset(name for name, _ in boxes)
            and [name for name in STSD.findall(header) if name not in NO_FILM] == [kind]
            and len(HANDLER.findall(header)) == len(HANDLER.findall(film)) == 1
            and len(MVHD.findall(header)) == header.count(b"mvhd") == header.count(b"avcC") == 1
            and len(tracks) == header.count(b"tkhd")
            and [track for track in tracks if any(track[0]) and any(track[1])] == [tuple(size)]
            and b"pasp" not in header
            and _square_avcc(avcc)
            and _usual_start(data, film, avcc[4] % 4 + 1)
        )
    except (ValueError, IndexError, struct.error):
        return False


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the name and content of each box (b"" for `mdat`); raises ValueError, struct.error."""
    start = 0
    while start < len(data):
        size, name = struct.unpack_from(">I4s", data, start)
        if size < 8 or start + size > len(data):
            raise ValueError("a box of unusual size")
        yield name, b"" if name == b"mdat" else data[start + 8 : start + size]
        start += size


def _square_avcc(avcc: bytes) -> bool:
    """Return True if the decoder configuration has one SPS, of square pixels, and one PPS."""
    end = 8 + int.from_bytes(avcc[6:8], "big")
    units = avcc[0], avcc[5] & 31, avcc[8] & 31, avcc[end], avcc[end + 3] & 31
    sps = avcc[9:end]
    if units != (1, 1, 7, 1, 8) or re.search(rb"\x00\x00[\x00-\x02]", sps):
        return False
    sps = sps.replace(b"\0\0\3", b"\0\0")  # emulation prevention
    return SQUARE_SPS.match(f"{int.from_bytes(sps, 'big'):0{8 * len(sps)}b}") is not None


def _usual_start(data: bytes, film: bytes, prefix: int) -> bool:
    """Return True if FFmpeg probes only the first sample, and that has no SPS."""
    (_, sizes), (_, chunks) = film.split(b"stsz"), film.split(b"stco")
    edits, shifts = film.split(b"elst")[1:], film.split(b"ctts")[1:]
    shift = struct.unpack_from(">i", shifts[0], 12)[0] if shifts else 0
    constant, first = struct.unpack_from(">4xI4xI", sizes)
    start = struct.unpack_from(">8xI", chunks)[0]
    end = start + (constant or first)
    shifted = any(struct.unpack_from(">II4xi", edit) != (0, 1, shift) for edit in edits)
    if shifted or end - start < 32:  # FFmpeg then probes another sample, too
        return False
    while start < end:
        size = int.from_bytes(data[start : start + prefix], "big")
        if size < 2 or data[start + prefix] & 31 == 7:
            return False
        start += prefix + size
    return start == end <= len(data)
