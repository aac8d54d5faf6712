"""Damaged, mislabelled and hostile video files, made from small good ones, go through everything that a user's file goes through.

Each case is fixed by (seed, its number). `python tests/robustness/fuzz.py` runs many of them, `tests/robustness/test_fuzz.py` a few.
"""
import io
import os
import resource
import struct
import tempfile
import time
import wave
import zipfile
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import cv2
import numpy as np

from vicc.engine.io import IsolatedCall, WorkerDied, remove_partial_files
from vicc.prepare import PrepareSettings, prepare_video
from vicc.video import probe, read_frames

SETTINGS = PrepareSettings(short_side=48, flow_method='farneback', flow_bound=5)
SECONDS, GIB = 20, 2  # limits of a case
HUGE = (0, 1, 0x7FFF, 0xFFFF, 100_000, 10**9, 2**31 - 1, 2**31, 2**32 - 1)

# --- seeds

LARGE = 80, 112  # height and width of the larger seeds
FORMATS = {'h264.mp4': ('libx264', 'yuv420p'), 'hevc.mp4': ('libx265', 'yuv420p'), 'mpeg4.avi': ('mpeg4', 'yuv420p'), 'mjpeg.avi': ('mjpeg', 'yuvj420p'),
           'vp8.webm': ('libvpx', 'yuv420p'), 'vp9.mkv': ('libvpx-vp9', 'yuv420p')}
OPTIONS = {'libx264': dict(preset='fast', crf='30'), 'libx265': {'x265-params': 'log-level=none:pools=none:frame-threads=1', 'crf': '30', 'preset': 'ultrafast'}}

def moving(count: int, height: int, width: int) -> Iterator[np.ndarray]:
    "A bright square on a soft background, moving to the right."
    background = np.add.outer(np.arange(height), np.arange(width))[..., None].repeat(3, 2)
    for number in range(count):
        frame = background.astype(np.uint8)
        frame[10:26, number:number + 16] = 250 - 5*number, 200, 40
        yield frame

def make_seed(path: Path, codec: str, pixel_format: str, count: int = 20, height: int = 48, width: int = 64) -> bytes:
    "A small good video; the same bytes every time."
    with av.open(str(path), 'w', options={'fflags': '+bitexact'}) as container:
        stream = container.add_stream(codec, rate=Fraction(25))
        stream.height, stream.width, stream.pix_fmt = height, width, pixel_format
        stream.codec_context.thread_count, stream.codec_context.gop_size, stream.codec_context.options = 1, 8, OPTIONS.get(codec, {})
        for number, frame in enumerate(moving(count, height, width)):
            picture = av.VideoFrame.from_ndarray(frame, format='rgb24')
            picture.pts, picture.time_base = number, Fraction(1, 25)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path.read_bytes()

def make_seeds() -> dict[str, bytes]:
    "All seeds that this PyAV can write, by name, and a larger, shorter one of each format under the name with 'large-'."
    seeds, written = {}, {name: how for name, how in FORMATS.items() if how[0] in av.codecs_available}
    with tempfile.TemporaryDirectory() as folder:
        for name, how in written.items():
            seeds[name] = make_seed(Path(folder)/name, *how)
            seeds[f'large-{name}'] = make_seed(Path(folder)/f'large-{name}', *how, 6, *LARGE)
    return seeds

# --- what a file is made of

class Piece(NamedTuple):
    "A box (MP4), a chunk (AVI) or an element (Matroska): where it starts, where its content starts, and where it ends."
    name: bytes
    start: int
    body: int
    end: int

NESTED = {b'moov', b'trak', b'mdia', b'minf', b'stbl', b'udta', b'edts', b'dinf', b'stsd'}

def boxes(data: bytes, start: int, end: int) -> Iterator[Piece]:
    "The boxes of an MP4 file, at every depth."
    while start + 8 <= end:
        size, name = struct.unpack_from('>I4s', data, start)
        if not 8 <= size <= end - start: return
        yield Piece(name, start, start + 8, start + size)
        if name in NESTED: yield from boxes(data, start + (16 if name == b'stsd' else 8), start + size)
        if name in (b'avc1', b'hev1', b'hvc1'): yield from boxes(data, start + 86, start + size)
        start += size

def chunks(data: bytes, start: int, end: int) -> Iterator[Piece]:
    "The chunks of an AVI file, at every depth."
    while start + 8 <= end:
        name, size = struct.unpack_from('<4sI', data, start)
        if size > end - start - 8: return
        group = name in (b'RIFF', b'LIST')
        yield Piece(data[start + 8:start + 12] if group else name, start, start + (12 if group else 8), start + 8 + size)
        if group: yield from chunks(data, start + 12, start + 8 + size)
        start += 8 + size + size % 2

MASTERS = {bytes.fromhex(name) for name in ('18538067', '1549a966', '1654ae6b', 'ae', 'e0', '1f43b675', 'a0', '1c53bb6b', 'bb', 'b7', '114d9b74', '4dbb')}

def elements(data: bytes, start: int, end: int) -> Iterator[Piece]:
    "The elements of a Matroska file, at every depth."
    while start + 2 <= end:
        long = 9 - data[start].bit_length()
        name, place = data[start:start + long], start + long
        if long > 4 or place >= end or not data[place]: return
        wide = 9 - data[place].bit_length()
        size = int.from_bytes(data[place:place + wide], 'big') - (1 << 7*wide)
        body = place + wide
        stop = end if size == (1 << 7*wide) - 1 else body + size
        if stop > end: return
        yield Piece(name, start, body, stop)
        if name in MASTERS: yield from elements(data, body, stop)
        start = stop

def pieces(data: bytes) -> list[Piece]:
    "What a seed is made of."
    parse = chunks if data[:4] == b'RIFF' else boxes if data[4:8] == b'ftyp' else elements
    return list(parse(data, 0, len(data)))

def payload(data: bytes) -> tuple[int, int]:
    "Where the pictures begin and end; what lies before and after is header and index."
    found = [piece for piece in pieces(data) if piece.name in (b'mdat', b'movi', bytes.fromhex('1f43b675'))]
    return found[0].body, found[-1].end

# --- mutations: bytes of a seed and a source of chance give other bytes, and the ending of the file's name or None for the right one

Mutated = bytes | tuple[bytes, str]

def flipped(data: bytes, rng: np.random.Generator, places: np.ndarray) -> bytes:
    "A number of bits flipped, 1 … 200, at random places among those given."
    changed = np.frombuffer(data, np.uint8).copy()
    for place in rng.choice(places, int(np.exp(rng.uniform(0, np.log(200))))): changed[place] ^= 1 << rng.integers(8)
    return changed.tobytes()

def bits_anywhere(data: bytes, rng: np.random.Generator, seeds: dict) -> Mutated:
    return flipped(data, rng, np.arange(len(data)))

def bits_of_header(data: bytes, rng: np.random.Generator, seeds: dict) -> Mutated:
    first, last = payload(data)
    return flipped(data, rng, np.r_[:first, last:len(data)])

def bits_of_pictures(data: bytes, rng: np.random.Generator, seeds: dict) -> Mutated:
    return flipped(data, rng, np.arange(*payload(data)))

def truncated(data: bytes, rng: np.random.Generator, seeds: dict) -> Mutated:
    return data[:rng.integers(len(data))]

def a_range(data: bytes, rng: np.random.Generator) -> tuple[int, int]:
    "A box, chunk or element of the file, or any range of bytes."
    if rng.random() < 0.6:
        piece = pieces(data)[rng.integers(len(pieces(data)))]
        return piece.start, piece.end
    first = int(rng.integers(len(data)))
    return first, min(first + int(np.exp(rng.uniform(0, np.log(len(data))))), len(data))

def chunks_moved(data: bytes, rng: np.random.Generator, seeds: dict) -> Mutated:
    "Two ranges swapped, one doubled (up to 50 times), or one deleted."
    (a, b), (c, d), what = a_range(data, rng), a_range(data, rng), rng.integers(3)
    if what == 0: return data[:b] + data[a:b]*int(rng.choice([1, 2, 50])) + data[b:]
    if what == 1: return data[:a] + data[b:]
    (a, b), (c, d) = sorted([(a, b), (c, d)])
    c = max(b, c)
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[max(c, d):]

def zeros(data: bytes, rng: np.random.Generator, seeds: dict) -> Mutated:
    "Zeros (or ones) in the middle, at the beginning, at the end; nothing but zeros; nothing at all."
    what, (a, b) = rng.random(), a_range(data, rng)
    if what < 0.05: return b''
    if what < 0.1: return bytes(int(rng.choice([1, 12, len(data), 100_000])))
    if what < 0.2: return data + bytes(int(rng.choice([1, 1000, 100_000])))
    return data[:a] + bytes([rng.choice([0, 0, 255])])*(b - a) + data[b:]

def sound() -> bytes:
    "A WAV file."
    file = io.BytesIO()
    with wave.open(file, 'wb') as out:
        out.setparams((1, 2, 8000, 0, 'NONE', ''))
        out.writeframes(bytes(4000))
    return file.getvalue()

def archive() -> bytes:
    "A ZIP file."
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w') as out: out.writestr('a.txt', 'not a video')
    return file.getvalue()

PICTURE = next(moving(1, 48, 64))
FOREIGN = {'jpg': cv2.imencode('.jpg', PICTURE)[1].tobytes(), 'png': cv2.imencode('.png', PICTURE)[1].tobytes(), 'bmp': cv2.imencode('.bmp', PICTURE)[1].tobytes(),
           'txt': b'00:01 a note about a video\n'*40, 'pdf': b'%PDF-1.4\n1 0 obj\n<< /Type /Catalog >>\nendobj\ntrailer\n<< /Root 1 0 R >>\n%%EOF\n', 'zip': archive(), 'wav': sound(),
           'html': b'<!DOCTYPE html><html><body>404 not found</body></html>', 'srt': b'1\n00:00:01,000 --> 00:00:02,000\nWords\n', 'svg': b'<svg xmlns="http://www.w3.org/2000/svg"/>',
           'list': b'ffconcat version 1.0\nfile neighbour.mp4\n', 'playlist': b'#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nneighbour.mp4\n#EXT-X-ENDLIST\n',
           'sdp': b'v=0\no=- 0 0 IN IP4 127.0.0.1\ns=-\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n',
           'dash': b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" mediaPresentationDuration="PT1S"><Period><AdaptationSet mimeType="video/mp4">'
                   b'<Representation id="1" bandwidth="1"><BaseURL>neighbour.mp4</BaseURL></Representation></AdaptationSet></Period></MPD>'}

ENDINGS = ['.mp4', '.avi', '.webm', '.mkv', '.mov', '.ts', '.jpg', '.txt', '.MP4', '', ' %03d.mp4', ' %s%n.avi', "'\".mp4", '\n.mp4', '|b.avi', '?a=1&b.mp4', '*.mp4', '[1].mp4', ':b.mp4', ' 漢é.mkv',
           '.mp4.part.mp4', '\\b.mp4', '%2e%2e.mp4', '#.mp4', ' .mp4', '$(b).mp4', '-i.mp4']

def wrong_name(data: bytes, rng: np.random.Generator, seeds: dict) -> Mutated:
    "A video under another ending, or something else under a video's."
    if rng.random() < 0.4: return data, str(rng.choice(ENDINGS))
    return FOREIGN[str(rng.choice(list(FOREIGN)))], str(rng.choice(['.mp4', '.avi', '.webm']))

def joined(data: bytes, rng: np.random.Generator, seeds: dict) -> Mutated:
    "Two files in one: other codec, other size, or half of each."
    other = seeds[str(rng.choice(list(seeds)))]
    what, (a, b), (c, d) = rng.integers(3), payload(data), payload(other)
    if what == 0: return data + other
    if what == 1: return data[:rng.integers(len(data))] + other[rng.integers(len(other)):]
    return data[:a] + other[c:d] + data[b:]  # the header of one, the pictures of another

# Fields: name of the piece, bytes from its content, struct format
COUNTS = [(b'stsz', 8, '>I'), (b'stsz', 4, '>I'), (b'stts', 8, '>I'), (b'stts', 4, '>I'), (b'stsc', 4, '>I'), (b'stsc', 12, '>I'), (b'stco', 4, '>I'), (b'stss', 4, '>I'),
          (b'ctts', 4, '>I'), (b'ctts', 8, '>I'), (b'mdhd', 16, '>I'), (b'mvhd', 16, '>I'), (b'tkhd', 20, '>I'), (b'elst', 4, '>I'), (b'stsd', 4, '>I'),
          (b'avih', 16, '<I'), (b'strh', 32, '<I'), (b'avih', 24, '<I'), (b'strh', 28, '<I'), (b'strh', 44, '<I'), (b'4489', 0, ''), (b'b3', 0, '')]
TIMES = [(b'mvhd', 12, '>I'), (b'mdhd', 12, '>I'), (b'stts', 12, '>I'), (b'ctts', 12, '>I'), (b'stts', 12, '>i'), (b'ctts', 12, '>i'), (b'elst', 8, '>I'), (b'elst', 12, '>i'), (b'elst', 16, '>I'),
         (b'avih', 0, '<I'), (b'strh', 20, '<I'), (b'strh', 24, '<I'), (b'strh', 16, '<I'), (b'23e383', 0, ''), (b'2ad7b1', 0, ''), (b'e7', 0, ''), (b'a3', 1, '>h'), (b'53b8', 0, '')]
SIZES = [(b'tkhd', 76, '>I'), (b'tkhd', 80, '>I'), (b'tkhd', 40, '>I'), (b'tkhd', 44, '>I'), (b'avc1', 24, '>H'), (b'avc1', 26, '>H'), (b'hev1', 24, '>H'), (b'hev1', 26, '>H'),
         (b'avih', 32, '<I'), (b'avih', 36, '<I'), (b'strf', 4, '<i'), (b'strf', 8, '<i'), (b'strf', 14, '<H'), (b'strf', 20, '<I'), (b'b0', 0, ''), (b'ba', 0, ''), (b'54b0', 0, ''), (b'54ba', 0, '')]

def field_changed(data: bytes, rng: np.random.Generator, fields: list, values: tuple) -> bytes:
    "One of the fields that the file has, with one of the values."
    there = {name: [piece for piece in pieces(data) if name in (piece.name, piece.name.hex().encode())] for name, _, _ in fields}
    name, skip, form = (known := [field for field in fields if there[field[0]]])[rng.integers(len(known))]
    piece, value = there[name][rng.integers(len(there[name]))], values[rng.integers(len(values))]
    long = struct.calcsize(form) if form else piece.end - piece.body
    low, high = (-2**(8*long - 1), 2**(8*long - 1) - 1) if form in ('>i', '<i', '>h') else (0, 2**(8*long) - 1)
    place = piece.body + skip
    if place + long > piece.end: return data
    number = min(max(value, low), high)
    return data[:place] + (struct.pack(form, number) if form else number.to_bytes(long, 'big')) + data[place + long:]

def several(data: bytes, rng: np.random.Generator, fields: list, values: tuple) -> bytes:
    "One to four fields changed."
    for _ in range(rng.integers(1, 5)): data = field_changed(data, rng, fields, values)
    return data

def absurd_counts(data: bytes, rng: np.random.Generator, seeds: dict) -> Mutated:
    "Claims of up to 10⁹ frames and more."
    return several(data, rng, COUNTS, (*HUGE, 10**9, 10**6, 19, 21))

def absurd_times(data: bytes, rng: np.random.Generator, seeds: dict) -> Mutated:
    "Rates of 0, 10⁹ or less than nothing a second, frames at times that run backwards."
    return several(data, rng, TIMES, (*HUGE, -1, -25, -10**9, -2**31))

def code(number: int) -> str:
    "Exp-Golomb code of a number, as H.264 and HEVC write it."
    return f'{number + 1:b}'.zfill(2*(number + 1).bit_length() - 1)

def nal_resized(nal: bytes, long: int, old: str, new: str) -> bytes:
    "The parameter set of H.264 or HEVC with other numbers; its first bytes are kept, so is what follows."
    plain = nal.replace(b'\0\0\3', b'\0\0')
    bits = ''.join(f'{byte:08b}' for byte in plain[long:])
    bits = (bits.replace(old, new, 1) + '0000000')[:(len(bits) + len(new) - len(old) + 7)//8*8]
    return plain[:long] + int(bits, 2).to_bytes(len(bits)//8, 'big').replace(b'\0\0\0', b'\0\0\3\0').replace(b'\0\0\1', b'\0\0\3\1')

def box_changed(data: bytes, start: int, end: int, new: bytes) -> bytes:
    "Some bytes replaced by more or fewer, with the sizes of all boxes around them put right."
    changed = bytearray(data)
    for box in pieces(data):
        if box.body <= start and end <= box.end: struct.pack_into('>I', changed, box.start, box.end - box.start + len(new) - end + start)
    return bytes(changed[:start]) + new + bytes(changed[end:])

def parameter_set(data: bytes) -> tuple[int, int] | None:
    "Where the sequence parameter set of an H.264 or HEVC file begins and ends, its length in two bytes before it."
    for box in pieces(data):
        if box.name not in (b'avcC', b'hvcC'): continue
        place = box.body + 6 if box.name == b'avcC' else data.find(b'\x42\x01', box.body, box.end) - 2
        return place + 2, place + 2 + int.from_bytes(data[place:place + 2], 'big')

def absurd_stream(data: bytes, rng: np.random.Generator) -> bytes:
    "Another size in the stream of a larger seed itself, which is what the decoder believes."
    height, width = (int(rng.choice([16, 2000, 5760, 8176, 16368, 30000, 65520, 100_000])) for _ in range(2))
    places = parameter_set(data)
    if places:
        nal = data[slice(*places)]
        h264 = nal[0] & 31 == 7
        old, new = (code(LARGE[1]//16 - 1) + code(LARGE[0]//16 - 1), code(width//16 - 1) + code(height//16 - 1)) if h264 else (code(LARGE[1]) + code(LARGE[0]), code(width) + code(height))
        nal = nal_resized(nal, 6 if h264 else 15, old, new)
        return box_changed(data, places[0] - 2, places[1], len(nal).to_bytes(2, 'big') + nal)
    changed, (first, last) = bytearray(data), payload(data)
    short = [min(value, 0xFFFF) for value in (height, width)]
    for mark, skip, form, values in ((b'\xff\xc0', 5, '>HH', short), (b'\x9d\x01\x2a', 3, '<HH', short[::-1])):  # JPEG, VP8
        place = first
        while (place := data.find(mark, place + 1, last)) >= 0: struct.pack_into(form, changed, place + skip, *values)
    place = first
    while (place := data.find(b'\x49\x83\x42', place + 1, last)) >= 0:  # VP9: 16 bits each, four bits after the mark
        number = int.from_bytes(data[place + 3:place + 8], 'big') & ~(0xFFFFFFFF << 4) | ((short[1] - 1) << 16 | (short[0] - 1)) << 4
        changed[place + 3:place + 8] = number.to_bytes(5, 'big')
    place = data.find(b'\0\0\1\x20', first, last)
    if place >= 0:  # MPEG-4: 13 bits each between marker bits
        bits = ''.join(f'{byte:08b}' for byte in data[place:place + 40])
        bits = bits.replace(f'1{LARGE[1]:013b}1{LARGE[0]:013b}1', f'1{min(width, 8191):013b}1{min(height, 8191):013b}1', 1)
        changed[place:place + 40] = int(bits, 2).to_bytes(40, 'big')
    return bytes(changed)

def absurd_sizes(data: bytes, rng: np.random.Generator, seeds: dict) -> Mutated:
    "Claims of up to 100 000 × 100 000 pixels, in the container, in the stream, or in both."
    what = rng.integers(3)
    if what: data = absurd_stream(data, rng)
    return data if what == 1 else several(data, rng, SIZES, (*HUGE, 8176, 16368, 100_000, -1, -48))

def absurd_boxes(data: bytes, rng: np.random.Generator, seeds: dict) -> Mutated:
    "Boxes that say they are empty, end beyond the file, or hold themselves, thousands deep."
    found = pieces(data)
    piece, (place, form) = found[rng.integers(len(found))], (0, '>I') if data[4:8] == b'ftyp' else (4, '<I')  # where the size of a box or chunk stands
    if rng.random() < 0.3:
        deep, head = int(rng.choice([2, 100, 20_000])), data[piece.start:piece.body]
        return data[:piece.start] + head*deep + data[piece.start:]
    if data[:4] == b'\x1a\x45\xdf\xa3':  # Matroska: the size begins after the name
        place = piece.start + len(piece.name)
        wide = piece.body - place
        number = [1 << 7*wide, (2 << 7*wide) - 1, (2 << 7*wide) - 2, (1 << 7*wide) + 1][rng.integers(4)]
        return data[:place] + number.to_bytes(wide, 'big') + data[piece.body:]
    wrong = (0, 1, 4, 7, 8, piece.end - piece.start - 1, piece.end - piece.start + 1, len(data), 2**31 - 1, 2**31, 2**32 - 1, 2**32 - 8)
    place += piece.start
    return data[:place] + struct.pack(form, wrong[rng.integers(len(wrong))]) + data[place + 4:]

MUTATIONS: dict[str, Callable[..., Mutated]] = {
    'bits anywhere': bits_anywhere, 'bits of the header': bits_of_header, 'bits of the pictures': bits_of_pictures, 'truncated': truncated, 'chunks swapped, doubled, deleted': chunks_moved,
    'zeros, empty': zeros, 'wrong name, no video': wrong_name, 'two files joined': joined, 'absurd counts': absurd_counts, 'absurd times and rates': absurd_times,
    'absurd sizes': absurd_sizes, 'absurd boxes': absurd_boxes}

def case(seeds: dict[str, bytes], seed: int, number: int) -> tuple[str, str, bytes, str]:
    "Format, kind of mutation, bytes and the file's ending of one case; the same for the same numbers."
    formats, rng = [name for name in seeds if not name.startswith('large-')], np.random.default_rng((seed, number))
    name, kind = formats[number % len(formats)], list(MUTATIONS)[number//len(formats) % len(MUTATIONS)]
    made = MUTATIONS[kind](seeds[f'large-{name}' if kind == 'absurd sizes' else name], rng, seeds)  # six frames: each may become huge
    return name, kind, *(made if isinstance(made, tuple) else (made, Path(name).suffix))

# --- what a file goes through

def prepared(source: Path, folder: Path) -> str:
    "Prepare a video, then read back what was written. The note, if there is one."
    rgb, flow = folder/'rgb.mp4', folder/'flow.mp4'
    facts = prepare_video(source, (rgb, flow, folder/'note.txt'), SETTINGS)
    for path, height in ((rgb, facts['height']), (flow, 2*facts['height'])):
        shape, wanted = read_frames(path).shape, (facts['num_frames'], height, facts['width'], 3)
        if shape != wanted: raise AssertionError(f'{path.name} holds {shape}, not {wanted}')
    return facts['note']

STEPS = {'probe': lambda source, folder: probe(source), 'count': lambda source, folder: probe(source, count=True), 'first': lambda source, folder: read_frames(source, [0]),
         'last': lambda source, folder: read_frames(source, [probe(source, count=True).num_frames - 1]), 'all': lambda source, folder: read_frames(source), 'prepare': prepared}

def take_step(step: str, source: Path, folder: Path) -> tuple[str, str, float]:
    "One step of a case in this process: 'used', 'noted', 'refused' or 'problem', the text that goes with it, and the seconds it took."
    start = time.monotonic(), time.process_time()
    def after(outcome: str, text: str = '') -> tuple[str, str, float]:  # seconds of this process, whoever else uses the machine
        return outcome, text, min(time.monotonic() - start[0], time.process_time() - start[1])
    try: note = STEPS[step](source, folder)
    except (ValueError, FileNotFoundError) as error:
        ours = type(error).__module__.startswith('vicc') or type(error) in (ValueError, FileNotFoundError)
        if ours and source.name in str(error): return after('refused', str(error))
        return after('problem', f'no message of ours: {type(error).__name__}: {error}')
    except Exception as error: return after('problem', f'{type(error).__name__}: {error}')
    return after('noted', note) if step == 'prepare' and note else after('used')

def quiet_step(step: str, source: Path, folder: Path) -> tuple[str, str, float]:
    "`take_step` for a worker process, where the decoders' own chatter goes nowhere, and what gives signs of life for ever is ended too."
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + 3*SECONDS, resource.RLIM_INFINITY))
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    return take_step(step, source, folder)

def left_behind(folder: Path, outcome: str, data: bytes, source: Path) -> str:
    "What a case must not leave: half-written files, one file without the other, a changed source. Empty if all is well."
    names = {path.name for path in folder.iterdir()} - {source.name, 'neighbour.mp4'}
    if outcome == 'contained':  # a killed process cannot tidy up: the run that started it does
        remove_partial_files(folder)
        names = {path.name for path in folder.iterdir()} - {source.name, 'neighbour.mp4'} - {'rgb.mp4', 'flow.mp4', 'note.txt'}
    wanted = {'used': {'rgb.mp4', 'flow.mp4'}, 'noted': {'rgb.mp4', 'flow.mp4', 'note.txt'}}.get(outcome, set())
    if names != wanted: return f'left behind: {sorted(names ^ wanted)}'
    if source.read_bytes() != data: return 'the source was changed'
    return ''

def try_case(run: Callable[..., Any], folder: Path, data: bytes, suffix: str, name: str = 'case') -> dict[str, tuple[str, str, float]]:
    "All steps of a case: what came of each, and under 'left' what should not have been left behind."
    source = folder/f'{name}{suffix}'
    source.write_bytes(data)
    steps = {}
    for step in STEPS:
        start = time.monotonic()
        try: steps[step] = run(step, source, folder)
        except WorkerDied as death:
            how = 'hang' if 'worked on it hung' in str(death) else 'memory' if 'of memory' in str(death) else 'crash'
            steps[step] = 'contained', f'{how}: {death}', time.monotonic() - start
    wrong = left_behind(folder, steps['prepare'][0], data, source)
    if wrong: steps['left'] = 'problem', wrong, 0.
    return steps

# --- many cases

COLUMNS = ('kind', 'tried', 'accepted', 'with_a_note', 'refused', 'contained_crashes', 'contained_hangs', 'contained_memory', 'crashes', 'hangs', 'without_a_message', 'losses',
           'seconds', 'first_problem')
PROBLEMS = ('crashes', 'hangs', 'without_a_message', 'losses')

def verdict(steps: dict[str, tuple[str, str, float]]) -> tuple[str, str]:
    "The column in which a case counts, and what was wrong, if anything was."
    for step, (outcome, text, seconds) in steps.items():
        line = f'{step}: {text}'
        if outcome == 'problem': return 'losses' if step == 'left' or 'AssertionError' in text else 'without_a_message', line
        if outcome == 'contained' and 'SIGXCPU' in text: return 'hangs', f'{line} after {3*SECONDS} s of work'
        if outcome != 'contained' and seconds > SECONDS: return 'hangs', f'{step} took {seconds:.0f} s'
    ended = [text.split(':')[0] for outcome, text, _ in steps.values() if outcome == 'contained']
    if ended: return {'crash': 'contained_crashes', 'hang': 'contained_hangs', 'memory': 'contained_memory'}[ended[0]], ''
    return 'refused' if steps['prepare'][0] == 'refused' else 'accepted', ''

def fuzz_videos(count: int, seed: int, log: Callable[[str], None] = print, isolated: bool = True) -> list[dict[str, Any]]:
    "Try so many cases. One row of COLUMNS for each format and kind of mutation. Not isolated: in this process, for a few."
    seeds, rows, said = make_seeds(), {}, time.monotonic()
    worker = IsolatedCall(quiet_step, SECONDS, GIB) if isolated else None
    for number in range(count):
        name, kind, data, suffix = case(seeds, seed, number)
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder)/'neighbour.mp4').write_bytes(seeds[name])  # what a playlist would like to open
            steps = try_case(worker or take_step, Path(folder), data, suffix)
        row = rows.setdefault((name, kind), dict.fromkeys(COLUMNS, 0) | dict(kind=f'{name}: {kind}', first_problem=''))
        column, wrong = verdict(steps)
        row['tried'] += 1
        row[column] += 1
        row['with_a_note'] += column == 'accepted' and steps['prepare'][0] == 'noted'
        row['seconds'] += time.monotonic() - start
        if wrong:
            row['first_problem'] = row['first_problem'] or f'case {number}: {wrong}'
            log(f'seed {seed}, case {number} ({name}, {kind}): {wrong}')
        if time.monotonic() - said > 20:
            said = time.monotonic()
            log(f'{number + 1} of {count} videos tried, problems: {sum(row[column] for row in rows.values() for column in PROBLEMS)}')
    if worker: worker.close()
    return [row | dict(seconds=round(row['seconds'], 1)) for row in rows.values()]
