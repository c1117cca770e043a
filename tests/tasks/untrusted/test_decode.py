"""Images of every kind decode correctly, and malicious files do not harm the calling process (T6, T7)."""

import contextlib
import io
import os
import random
import signal
import struct
import sys
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path

import imagehash
import numpy as np
import pytest
from PIL import Image, JpegImagePlugin, PngImagePlugin

sys.path.insert(0, str(Path(__file__).parent))

from crafted_images import Crafted, chunk, crafted, encoded, fault_of, header_only_png, icc_profile, ramp

from tasks.rows import RowFault
from tasks.untrusted import decode as decode_module
from tasks.untrusted.decode import (
    CHROMA_SUBSAMPLINGS,
    MAX_PROFILE_BYTES,
    MAX_SCANS,
    DecodedImage,
    DecodingPool,
    decode,
    perceptual_hash,
    without_metadata,
)
from tasks.untrusted.sandbox import Limits

CRAFTED = list(crafted())
MAX_PIXELS = 50_000_000


@pytest.fixture(scope="module")
def decoder() -> Iterator[DecodingPool]:
    with DecodingPool(
        64, 95, MAX_PIXELS, limits=Limits(wall_seconds=120)
    ) as decoder:  # other tests run at the same time
        yield decoder


def pixels_of(decoded: DecodedImage) -> np.ndarray:
    image = Image.open(io.BytesIO(decoded.jpg))
    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (decoded.width, decoded.height))
    assert not set(image.info) - {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
    return np.asarray(image).astype(int)


def outcome(decoder: DecodingPool, data: bytes) -> str | DecodedImage:
    try:
        return decoder.decode(data)
    except RowFault as fault:
        return fault.reason


@pytest.mark.parametrize("file", CRAFTED, ids=lambda file: f"{fault_of(file)}-{file}")
def test_crafted_file(decoder: DecodingPool, file: Crafted) -> None:
    """F5 (cut short), F13 to F20."""
    got = outcome(decoder, file.data)
    if isinstance(file.expected, str):
        assert got == file.expected
        return
    assert isinstance(got, DecodedImage), got
    pixels = pixels_of(got)
    if isinstance(file.expected, np.ndarray):
        assert pixels.shape == file.expected.shape == (got.original_height, got.original_width, 3)
        assert np.abs(pixels - file.expected).mean() < 3
    else:
        assert np.abs(pixels - file.expected).max() <= 4
        assert got.phash is None, "an image of one colour has no perceptual hash"


def test_a_child_decodes_all_crafted_files_like_its_worker(decoder: DecodingPool) -> None:
    assert len({file.name for file in CRAFTED}) == len(CRAFTED) >= 60
    for file in CRAFTED:
        if not isinstance(file.expected, str):
            assert decoder.decode(file.data) == decode(file.data, 64, 95, MAX_PIXELS), file


@pytest.mark.parametrize("subsampling", CHROMA_SUBSAMPLINGS)
def test_chroma_subsampling_is_applied(subsampling: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, "PNG")
    with DecodingPool(64, 95, MAX_PIXELS, subsampling) as decoder:
        decoded = decoder.decode(data)
    assert decoded == decode(data, 64, 95, MAX_PIXELS, subsampling)
    with Image.open(io.BytesIO(decoded.jpg)) as image:
        assert JpegImagePlugin.get_sampling(image) == CHROMA_SUBSAMPLINGS.index(subsampling)


def test_resizing_keeps_the_aspect_ratio_and_never_enlarges() -> None:
    for size, expected in (
        ((400, 200), (128, 64)),
        ((200, 400), (64, 128)),
        ((30, 20), (30, 20)),
        ((500, 3), (500, 3)),
    ):
        decoded = decode(encoded(ramp(*size), "JPEG"), 64, 95, MAX_PIXELS)
        assert (decoded.width, decoded.height) == expected
        assert (decoded.original_width, decoded.original_height) == size


def test_large_images_of_every_mode_shrink_alike() -> None:
    expected = np.asarray(ramp(400, 400).resize((64, 64), Image.Resampling.BOX)).astype(int)
    for data in (
        encoded(ramp(400, 400), "JPEG", quality=95),
        encoded(ramp(400, 400), "WEBP", lossless=True),
        encoded(ramp(400, 400).convert("RGBA"), "PNG"),
        encoded(ramp(400, 400).convert("CMYK"), "JPEG", quality=95),
    ):
        assert np.abs(pixels_of(decode(data, 64, 95, MAX_PIXELS)) - expected).mean() < 3
    levels = np.asarray(ramp(400, 400))[..., 0].astype(np.uint16) * 257
    pixels = pixels_of(decode(encoded(Image.fromarray(levels), "PNG"), 64, 95, MAX_PIXELS))
    assert np.abs(pixels - expected[..., :1]).mean() < 3


def test_t7_nothing_but_pixels_is_stored(decoder: DecodingPool) -> None:
    exif = Image.Exif()
    exif[0x010E] = "SECRET"
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "SECRET")
    for data in (
        encoded(ramp(), "JPEG", exif=exif, comment=b"SECRET", xmp=b"SECRET", icc_profile=b"SECRET" * 40),
        encoded(ramp(), "PNG", exif=exif, pnginfo=text, icc_profile=b"SECRET" * 40),
        encoded(ramp(), "WEBP", exif=exif, xmp=b"SECRET", icc_profile=b"SECRET" * 40),
    ):
        assert b"SECRET" in data
        decoded = decoder.decode(data)
        assert b"SECRET" not in decoded.jpg
        pixels_of(decoded)


def test_perceptual_hash_equals_that_of_imagehash() -> None:
    random_pixels = np.random.default_rng(0)
    for size in [(64, 64), (64, 90), (31, 17), (200, 64)] * 10:
        coarse = Image.fromarray(random_pixels.integers(0, 256, (7, 9, 3), dtype=np.uint8))
        image = coarse.resize(size, Image.Resampling.BICUBIC)
        assert perceptual_hash(image) == str(imagehash.phash(image))
    assert perceptual_hash(Image.new("RGB", (64, 64), "red")) is None
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::16] = 255  # all its vertical frequencies are zero up to floating-point noise
    bits = int(perceptual_hash(Image.fromarray(stripes)) or "", 16)
    assert bits & 0x00FFFFFFFFFFFFFF == 0


def test_the_mean_colour_is_that_of_the_stored_pixels(decoder: DecodingPool) -> None:
    assert decoder.decode(encoded(Image.new("RGB", (80, 70), (250, 3, 128)), "PNG")).colour == "fa0380"
    halves = Image.new("RGB", (400, 400), "white")
    halves.paste((0, 0, 255), (0, 0, 200, 400))
    transparent = halves.convert("RGBA")
    transparent.putalpha(Image.new("L", (400, 400), 0))
    for image, expected in ((halves, (127.5, 127.5, 255)), (ramp(300, 200), np.asarray(ramp(300, 200)).mean((0, 1)))):
        decoded = decoder.decode(encoded(image, "PNG"))
        for colour in (np.array(list(bytes.fromhex(decoded.colour))), pixels_of(decoded).mean(axis=(0, 1))):
            assert np.abs(colour - expected).max() < 1.5
    assert decoder.decode(encoded(transparent, "PNG")).colour == "ffffff", "transparent pixels are stored white"


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (signal.SIGSEGV, "decode_crash"),
        (signal.SIGABRT, "decode_crash"),
        (signal.SIGKILL, "decode_memory"),
        (signal.SIGSTOP, "decode_timeout"),
    ],
)
def test_f22_t6_a_decoder_that_dies_costs_one_row(number: int, reason: str) -> None:
    with DecodingPool(64, 95, MAX_PIXELS, limits=Limits(wall_seconds=1.5)) as decoder:
        expected = decoder.decode(encoded(ramp(), "JPEG"))
        [pid] = decoder.pids
        os.kill(pid, number)
        assert outcome(decoder, encoded(ramp(), "PNG")) == reason
        assert decoder.decode(encoded(ramp(), "JPEG")) == expected
        assert decoder.pids != [pid]


def test_f22_f39_t6_an_image_that_needs_too_much_memory_costs_one_row() -> None:
    with DecodingPool(64, 95, MAX_PIXELS, limits=Limits(memory_bytes=1 << 26)) as decoder:
        assert outcome(decoder, encoded(Image.new("RGB", (5000, 5000), "red"), "PNG")) == "decode_memory"
        assert isinstance(outcome(decoder, encoded(ramp(), "PNG")), DecodedImage)


def test_the_largest_image_of_each_mode_fits_into_a_child(decoder: DecodingPool) -> None:
    for mode in ("RGBA", "I;16", "P", "LA"):
        image = Image.new(mode, (7000, 7000), 1)
        assert isinstance(outcome(decoder, encoded(image, "PNG", compress_level=1)), DecodedImage), mode


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_f19_only_the_first_of_ten_thousand_frames_is_decoded(decoder: DecodingPool, kind: str) -> None:
    first, second = Image.new("L", (8, 8), 200), Image.new("L", (8, 8), 20)
    data = encoded(first, kind, save_all=True, append_images=[second, first] * 4999 + [second], lossless=True)
    assert Image.open(io.BytesIO(data)).n_frames == 10_000  # type: ignore[attr-defined]
    [child] = decoder.pids
    before = cpu_seconds(child)
    assert decoder.decode(data).jpg == decoder.decode(encoded(first, "PNG")).jpg
    assert cpu_seconds(child) - before < 1, "the other frames were decoded too"


def test_f15_a_bomb_is_rejected_by_its_header(decoder: DecodingPool) -> None:
    decompression_bomb = next(file.data for file in CRAFTED if file.name == "png-true-bomb")
    [child] = decoder.pids
    for data in (header_only_png(30_000, 30_000), header_only_png(65_000, 65_000), decompression_bomb):
        with contextlib.suppress(PermissionError):  # only root can, as the child is hidden from its user
            Path(f"/proc/{child}/clear_refs").write_text("5")  # resets the peak memory
        memory, seconds = peak_memory(child), cpu_seconds(child)
        assert outcome(decoder, data) == "too_many_pixels"
        assert cpu_seconds(child) - seconds < 0.5 and peak_memory(child) - memory < 20_000_000


def with_scans(number: int, size: tuple[int, int] = (64, 64), metadata: bytes = b"") -> bytes:
    """Build a progressive JPEG of a number of scans, of which those after the sixth refine nothing."""
    data = encoded(Image.new("L", size, 200), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    segment = b"\xff\xe5" + struct.pack(">H", len(metadata) + 2) + metadata if metadata else b""
    return data[:2] + segment + data[2:-2] + last * (number - data.count(b"\xff\xda")) + data[-2:]


def test_f51_a_scan_bomb_is_refused_before_any_scan_is_decoded(decoder: DecodingPool) -> None:
    [child] = decoder.pids
    bomb = with_scans(200, (7000, 7000))
    assert len(bomb) < 210_000
    seconds = cpu_seconds(child)
    assert outcome(decoder, bomb) == "too_many_scans"
    assert cpu_seconds(child) - seconds < 0.5
    assert outcome(decoder, with_scans(MAX_SCANS + 1)) == "too_many_scans"
    assert outcome(decoder, b"\xff\xd8" + b"\xff" * 1000 + with_scans(MAX_SCANS + 1)[2:]) == "too_many_scans"
    for whole in (with_scans(MAX_SCANS), with_scans(10, metadata=b"\xff\xda" * 100), with_scans(10) + with_scans(400)):
        assert isinstance(outcome(decoder, whole), DecodedImage), "metadata, and what follows an image, is not counted"
    segments = b"\xff\xfe\x00\x02" * 20_000
    assert outcome(decoder, b"\xff\xd8" + segments + with_scans(MAX_SCANS + 1)[2:]) == "too_many_scans"


def test_f51_a_site_of_slow_images_runs_out_of_time_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_module, "SLOW_SECONDS", 0.05)
    slow, quick = with_scans(MAX_SCANS, (4000, 4000)), encoded(ramp(), "JPEG")
    with DecodingPool(64, 95, MAX_PIXELS, site_seconds=0.1) as pool:
        for _ in range(4):
            with contextlib.suppress(RowFault):
                pool.decode(slow, "https://a.slow.example/1.jpg")
        with pytest.raises(RowFault, match="decode_budget"):
            pool.decode(quick, "https://b.slow.example/2.jpg")
        for number in range(20):
            pool.decode(quick, f"https://quick.example/{number}.jpg")
        for url in ("file:///photos/a.jpg", ""):  # of one's own, whatever they cost
            for _ in range(2):
                with contextlib.suppress(RowFault):
                    pool.decode(slow, url)
            pool.decode(quick, url)


def test_f51_a_site_with_a_slow_image_now_and_then_keeps_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_module, "SLOW_SECONDS", 0.5)
    with DecodingPool(64, 95, MAX_PIXELS, site_seconds=3.0) as pool:
        for seconds in [1.0] * 3 + [0.0] * 4 + [2.0] * 4:  # 1.5 s more, back to none, then 6 s more
            pool._charge("mixed.example", seconds - 0.5)
            if seconds == 0.0:
                pool.decode(encoded(ramp(), "JPEG"), "https://mixed.example/2.jpg")
        with pytest.raises(RowFault, match="decode_budget"):
            pool.decode(encoded(ramp(), "JPEG"), "https://www.mixed.example/3.jpg")


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def mutant(seeds: list[bytes], source: random.Random) -> bytes:
    """Return a seed with bytes changed, removed, repeated, or taken from another seed."""
    data = bytearray(source.choice(seeds))
    for _ in range(source.choice((1, 1, 2, 4, 16))):
        at = source.randrange(len(data) or 1)
        kind = source.randrange(7)
        if kind == 0:
            data[at : at + 1] = source.randbytes(1)
        elif kind == 1 and data:
            data[at % len(data)] ^= 1 << source.randrange(8)
        elif kind == 2:
            del data[at : at + source.randrange(1, 40)]
        elif kind == 3:
            data[at:at] = data[at : at + source.randrange(1, 200)]
        elif kind == 4:
            other = source.choice(seeds)
            data[at:] = other[source.randrange(len(other)) :]
        elif kind == 5:
            data[at : at + 4] = struct.pack(">I", source.choice((0, 1, 0x7F, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)))
        else:
            at = source.randrange(min(64, len(data)) or 1)  # within the headers
            data[at : at + 2] = source.randbytes(2)
    return bytes(data)


@pytest.mark.parametrize("count", [1_500, pytest.param(20_000, marks=pytest.mark.slow)])
def test_t6_fuzz(count: int) -> None:
    seeds = [file.data for file in CRAFTED if not isinstance(file.expected, str) and len(file.data) < 20_000]
    assert len(seeds) >= 40
    source = random.Random(count)
    outcomes: dict[str, int] = {}
    with DecodingPool(64, 95, MAX_PIXELS) as decoder:
        children = decoder.pids
        for _ in range(count):
            got = outcome(decoder, mutant(seeds, source))
            name = got if isinstance(got, str) else "image"
            outcomes[name] = outcomes.get(name, 0) + 1
        assert decoder.pids == children, "a child died"
        assert peak_memory(children[0]) < 512 << 20
    assert set(outcomes) <= {"image", "not_an_image", "decode_error", "too_many_pixels"}, outcomes
    assert outcomes["image"] > count / 20 and outcomes["decode_error"] > count / 20, outcomes


def peak_memory(pid: int) -> int:
    """Return the peak resident memory in bytes."""
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) << 10


def with_chunks(data: bytes, *chunks: bytes) -> bytes:
    """PNG with more chunks after its header, and the same after its pixels."""
    end = data.rindex(b"IEND") - 4
    return data[:33] + b"".join(chunks) + data[33:end] + b"".join(chunks[:-1]) + data[end:]


METADATA = {
    "zTXt": chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(8 << 20))),
    "iTXt": chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(bytes(8 << 20))),
    "tEXt": chunk(b"tEXt", b"a\0" + bytes(8 << 20)),
    "many": b"".join(chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(900_000))) for _ in range(100)),
    "orientation": chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(bytes(8 << 20))),
    "xmp": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(8 << 20))),
    "profile": chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2 << 20))),
    "bomb": chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(200 << 20))),
    "method": chunk(b"iCCP", b"a\0\7" + zlib.compress(bytes(100))),
    "short": chunk(b"pHYs", b"\0") + chunk(b"sRGB", b"") + chunk(b"gAMA", b"\0"),
    "checksum": chunk(b"tEXt", b"a\0b")[:-4] + b"\0\0\0\0",
    "private": chunk(b"prVt", bytes(1 << 20)) + chunk(b"iDOT", b""),
}


@pytest.mark.parametrize("name", METADATA)
def test_f100_metadata_of_any_size_costs_no_image(decoder: DecodingPool, name: str) -> None:
    plain = encoded(ramp(), "PNG")
    crowded = with_chunks(plain, METADATA[name], b"")
    assert decoder.decode(crowded) == decoder.decode(plain)
    tracemalloc.start()
    without_metadata(crowded)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 2 * len(crowded) + (40 << 20)


def test_f100_what_changes_pixels_is_read_as_before() -> None:
    """Orientation in EXIF, in a text and in XMP; profiles of up to 16 MB; a palette with transparency; animations."""
    plain = ramp()
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(plain, "PNG", exif=exif.tobytes())
    raw = exif.tobytes().removeprefix(b"Exif\0\0").hex().encode()
    profile_text = b"\nexif\n%8d\n%s\n" % (len(raw) // 2, raw)
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    texts = (
        chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(profile_text)),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp),
    )
    for data in (turned, *(with_chunks(encoded(plain, "PNG"), text, b"") for text in texts)):
        assert decode(data, 64, 95, 10**6).original_width == plain.height
        assert without_metadata(data) == data
    for data in (
        encoded(plain.convert("P"), "PNG", transparency=0),
        encoded(plain, "PNG", save_all=True, append_images=[plain.rotate(90)] * 3),
        encoded(plain, "JPEG"), b"\x89PNG\r\n\x1a\n", encoded(plain, "PNG")[:-7], b"",
    ):  # fmt: skip
        assert without_metadata(data) == data


def test_f100_a_profile_of_up_to_16_mb_changes_the_pixels() -> None:
    """A profile beyond, and none at all, leave them as they are."""
    swapped, plain = icc_profile(b"red and green swapped"), ramp()
    without = pixels_of(decode(encoded(plain, "PNG"), 64, 95, MAX_PIXELS))
    expected = pixels_of(decode(encoded(plain, "PNG", icc_profile=swapped), 64, 95, MAX_PIXELS))
    assert np.abs(expected - without).mean() > 10
    for size, is_applied in ((3 << 20, True), (MAX_PROFILE_BYTES - (100 << 10), True), (MAX_PROFILE_BYTES + 1, False)):
        data = encoded(plain, "PNG", icc_profile=swapped.ljust(size, b"\0"))
        pixels = pixels_of(decode(data, 64, 95, MAX_PIXELS))
        assert np.array_equal(pixels, expected if is_applied else without), size
