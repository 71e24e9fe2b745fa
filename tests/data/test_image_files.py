"""Every mode that pillow opens: values that are known, scaled, composited, or refused with a reason; never clipped."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from ncsn_fast.data import load_images, to_uint8
from ncsn_fast.data.images import read_image

RAMP = np.array([[0, 85], [170, 255]], dtype=np.uint8)
COLOURS = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [200, 100, 50]]], dtype=np.uint8)
GREY_OF = [[76, 150], [29, 124]]  # 0.299 R + 0.587 G + 0.114 B
TIFF_BITS, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339


def read(path, channels, **options):
    """As bytes: ``(2, 2)`` lists for grey, ``(2, 2, 3)`` for RGB."""
    pixels = to_uint8(read_image(path, 2, channels, **options))
    assert pixels.shape == (channels, 2, 2)
    return pixels[0].tolist() if channels == 1 else pixels.permute(1, 2, 0).tolist()


def expect_grey(path, grey, **options):
    assert read(path, 1, **options) == grey
    assert read(path, 3, **options) == [[[v] * 3 for v in row] for row in grey]


def expect_colours(path, colours=COLOURS, grey=GREY_OF, atol=0):
    got = np.array(read(path, 3)).astype(int)
    assert np.abs(got - colours).max() <= atol, got.tolist()
    assert np.abs(np.array(read(path, 1)) - grey).max() <= atol


def png(path, depth, kind, rows, transparent=None):
    """A PNG of 2x2 pixels made by hand, for what pillow does not write."""

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, depth, kind, 0, 0, 0))]
    parts += [chunk(b"tRNS", transparent)] if transparent else []
    parts += [chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b""))


def tiff(path, data, bits, photometric=1, sample_format=1, premultiplied=False):
    """A little-endian TIFF of 2x2 pixels made by hand; premultiplied: of grey and alpha."""
    both = 2 if premultiplied else 1  # two shorts fit into a tag itself
    twice = 1 + (1 << 16) if premultiplied else 1
    tags = [
        (256, 3, 1, 2),
        (257, 3, 1, 2),
        (TIFF_BITS, 3, both, bits * twice),
        (259, 3, 1, 1),
        (PHOTOMETRIC, 3, 1, photometric),
        (273, 4, 1, 8),
        (277, 3, 1, both),
        (278, 3, 1, 2),
        (279, 4, 1, len(data)),
        *([(338, 3, 1, 1)] if premultiplied else []),
        (SAMPLE_FORMAT, 3, both, sample_format * twice),
    ]
    data += b"\0" * (len(data) % 2)
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    path.write_bytes(b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory + b"\0" * 4)


@pytest.fixture
def opens_as(monkeypatch):
    """Makes any file open as a given image, for modes that depend on the version or on rare plugins."""

    def make(image, mode):
        buffer = io.BytesIO()
        Image.new("L", image.size).save(buffer, "PNG")
        opened = Image.open(buffer)
        opened.load()
        opened.im, opened._mode, opened.palette = image.im, mode, image.palette
        monkeypatch.setattr(Image, "open", lambda file: opened)

    return make


# --- grey -----------------------------------------------------------------------------------------


def test_one_bit(tmp_path):
    image = Image.fromarray(RAMP).convert("1", dither=Image.Dither.NONE)
    for suffix in ("png", "tiff", "pbm", "bmp"):
        image.save(tmp_path / f"a.{suffix}")
        expect_grey(tmp_path / f"a.{suffix}", [[0, 0], [255, 255]])


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm", "bmp"])
def test_eight_bit_grey(tmp_path, suffix):
    Image.fromarray(RAMP).save(tmp_path / f"a.{suffix}")
    expect_grey(tmp_path / f"a.{suffix}", RAMP.tolist())


def test_few_bits_span_the_range(tmp_path):
    png(tmp_path / "a.png", 2, 0, [b"\x10", b"\xb0"])  # 0, 1; 2, 3
    expect_grey(tmp_path / "a.png", RAMP.tolist())
    (tmp_path / "a.pgm").write_bytes(b"P5 2 2 3\n\0\1\2\3")
    expect_grey(tmp_path / "a.pgm", RAMP.tolist())


@pytest.mark.filterwarnings("ignore:IM image format:DeprecationWarning")
@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm", "im"])
def test_sixteen_bits_are_scaled(tmp_path, suffix):
    deep = RAMP.astype(np.uint16) * 257
    if suffix == "pgm":  # which older pillows only read
        (tmp_path / "a.pgm").write_bytes(b"P5 2 2 65535\n" + deep.astype(">u2").tobytes())
    else:
        Image.fromarray(deep).save(tmp_path / f"a.{suffix}")
    expect_grey(tmp_path / f"a.{suffix}", RAMP.tolist())


def test_sixteen_bits_keep_more_than_eight(tmp_path):
    Image.fromarray(np.full((2, 2), 1000, np.uint16)).save(tmp_path / "a.png")
    got = read_image(tmp_path / "a.png", 2, 1)
    torch.testing.assert_close(got, torch.full((1, 2, 2), 1000 / 32767.5 - 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N"])
def test_byte_orders_of_sixteen_bits(opens_as, mode):
    order = {"I;16B": ">u2", "I;16N": "=u2"}.get(mode, "<u2")
    raw = (RAMP.astype(np.uint16) * 257).astype(order).tobytes()
    try:
        image = Image.frombytes(mode, (2, 2), raw)
        np.asarray(image)
    except (ValueError, KeyError, TypeError) as error:
        pytest.skip(f"this pillow does not have the mode: {error}")
    opens_as(image, mode)
    expect_grey("made.png", RAMP.tolist())


def test_sixteen_bits_in_mode_i(opens_as):
    """As pillow below 11 opens a 16-bit PNG."""
    opens_as(Image.fromarray(RAMP.astype(np.int32) * 257), "I")
    expect_grey("made.png", RAMP.tolist())


def test_twelve_bits_are_scaled_by_twelve(tmp_path):
    # 0, 4095, 2048, 1024: two values in three bytes.
    tiff(tmp_path / "a.tiff", bytes.fromhex("000fff800400"), 12)
    expect_grey(tmp_path / "a.tiff", [[0, 255], [128, 64]])


def test_white_is_zero(tmp_path):
    tiff(tmp_path / "eight.tiff", RAMP.tobytes(), 8, photometric=0)
    expect_grey(tmp_path / "eight.tiff", (255 - RAMP).tolist())
    tiff(tmp_path / "deep.tiff", (RAMP.astype("<u2") * 257).tobytes(), 16, photometric=0)
    expect_grey(tmp_path / "deep.tiff", (255 - RAMP).tolist())


def test_floats_from_zero_to_one_are_scaled(tmp_path):
    Image.fromarray(RAMP.astype(np.float32) / 255).save(tmp_path / "a.tiff")
    expect_grey(tmp_path / "a.tiff", RAMP.tolist())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.0, 255.0], r"must be in \[0, 1\], and it holds 0 to 255"),
        ([-1.0, 1.0], r"holds -1 to 1; values in \[-1, 1\] can be read from a \.npy"),
        ([0.0, 12.5], "holds 0 to 12.5"),
        ([0.0, np.nan], "holds nan to nan"),
        ([0.0, np.inf], "holds 0 to inf"),
    ],
)
def test_other_floats_are_refused(tmp_path, values, message):
    Image.fromarray(np.array([values], np.float32)).save(tmp_path / "odd.tiff")
    for channels in (1, 3):
        with pytest.raises(ValueError, match=rf"odd\.tiff as an image: of mode F, .*{message}"):
            read_image(tmp_path / "odd.tiff", 2, channels)


@pytest.mark.parametrize(
    ("values", "bits", "sample_format"),
    [
        (np.array([0, 1, 2, 255], "<i4"), 32, 2),
        (np.array([0, 1, 2, 2**32 - 1], "<u4"), 32, 1),
        (np.array([0, 1, 2, 32767], "<i2"), 16, 2),
        (np.array([-5, 1, 2, 3], "<i2"), 16, 2),
        (np.array([-5, 1, 2, 3], "i1"), 8, 2),
    ],
)
def test_integers_without_a_stated_white_are_refused(tmp_path, values, bits, sample_format):
    tiff(tmp_path / "odd.tiff", values.tobytes(), bits, sample_format=sample_format)
    for channels in (1, 3):
        with pytest.raises(ValueError, match=r"odd\.tiff as an image: of mode (I|L), it"):
            read_image(tmp_path / "odd.tiff", 2, channels)


# --- colours --------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "tiff", "bmp", "ppm", "tga"])
def test_rgb(tmp_path, suffix):
    Image.fromarray(COLOURS).save(tmp_path / f"a.{suffix}")
    expect_colours(tmp_path / f"a.{suffix}")


def test_sixteen_bit_rgb(tmp_path):
    rows = [(COLOURS[i].astype(">u2") * 257).tobytes() for i in range(2)]
    png(tmp_path / "a.png", 16, 2, rows)
    expect_colours(tmp_path / "a.png")


def test_palette(tmp_path):
    Image.fromarray(COLOURS).quantize(4).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as opened:
        assert opened.mode == "P"
    expect_colours(tmp_path / "a.png")


@pytest.mark.parametrize(("mode", "atol"), [("CMYK", 0), ("YCbCr", 2)])
def test_other_colour_spaces(tmp_path, mode, atol):
    Image.fromarray(COLOURS).convert(mode).save(tmp_path / "a.tiff")
    with Image.open(tmp_path / "a.tiff") as opened:
        if opened.mode != mode:
            pytest.skip(f"this pillow does not read {mode} as it writes it")
    expect_colours(tmp_path / "a.tiff", atol=atol)


def test_lab(tmp_path):
    muted = COLOURS // 2 + 64  # 8 bits of LAB do not hold the purest colours
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    image = ImageCms.profileToProfile(Image.fromarray(muted), *profiles, outputMode="LAB")
    image.save(tmp_path / "a.tiff")
    with Image.open(tmp_path / "a.tiff") as opened:
        assert opened.mode == "LAB"
    expect_colours(tmp_path / "a.tiff", muted, muted @ [0.299, 0.587, 0.114], atol=3)


def test_cmyk_jpeg_of_adobe_is_not_inverted(tmp_path):
    plain = np.full((8, 8, 3), (200, 100, 50), np.uint8)
    Image.fromarray(plain).convert("CMYK").save(tmp_path / "a.jpg", quality=100, subsampling=0)
    with Image.open(tmp_path / "a.jpg") as opened:
        assert opened.mode == "CMYK" and "adobe" in opened.info
    assert np.abs(np.array(read(tmp_path / "a.jpg", 3)) - (200, 100, 50)).max() <= 3


@pytest.mark.parametrize("mode", ["HSV", "RGBX", "RGBa", "PA"])
def test_modes_of_colour_that_few_files_have(opens_as, mode):
    image = Image.fromarray(COLOURS)
    if mode == "RGBa":
        image = image.convert("RGBA")
    opens_as((image.quantize(4) if mode == "PA" else image).convert(mode), mode)
    expect_colours("made.png", atol=3 if mode == "HSV" else 0)


# --- transparency ---------------------------------------------------------------------------------

INK = np.array([[255, 0], [128, 255]], dtype=np.uint8)  # how opaque black ink is
ON_WHITE = [[0, 255], [127, 0]]


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_black_ink_on_transparency(tmp_path, mode):
    black = Image.new("L", (2, 2))
    image = Image.merge(mode, [black] * (len(mode) - 1) + [Image.fromarray(INK)])
    for suffix in ("png", "tiff"):
        image.save(tmp_path / f"a.{suffix}")
        expect_grey(tmp_path / f"a.{suffix}", ON_WHITE)


def test_premultiplied_grey(opens_as):
    image = Image.merge("LA", [Image.new("L", (2, 2)), Image.fromarray(INK)])
    opens_as(image.convert("La"), "La")
    expect_grey("made.png", ON_WHITE)


def test_premultiplied_tiff(tmp_path):
    pairs = np.array([[0, 255], [0, 0], [64, 128], [255, 255]], np.uint8)
    tiff(tmp_path / "a.tiff", pairs.tobytes(), 8, premultiplied=True)
    try:
        Image.open(tmp_path / "a.tiff").close()
    except OSError:  # older pillows do not know it
        with pytest.raises(ValueError, match="cannot read"):
            read(tmp_path / "a.tiff", 1)
        return
    got = np.array(read(tmp_path / "a.tiff", 1))
    assert np.abs(got - [[0, 255], [191, 255]]).max() <= 1


def test_other_backgrounds(tmp_path):
    image = Image.merge("LA", [Image.new("L", (2, 2)), Image.fromarray(INK)])
    image.save(tmp_path / "a.png")
    expect_grey(tmp_path / "a.png", [[0, 0], [0, 0]], background="black")
    expect_grey(tmp_path / "a.png", [[0, 100], [50, 0]], background=100)
    assert read(tmp_path / "a.png", 3, background=(255, 0, 10))[0][1] == [255, 0, 10]
    assert read(tmp_path / "a.png", 3, background="#ff000a")[0][1] == [255, 0, 10]
    assert load_images(tmp_path, 2, 1, background=255).max() == 1
    for wrong in (256, (1, 2), "no colour", (0, 0, 0.5)):
        with pytest.raises(ValueError, match="colou?r"):
            load_images(tmp_path, 2, 1, background=wrong)


@pytest.mark.parametrize("how", ["index", "bytes"])
def test_transparent_palette(tmp_path, how):
    image = Image.fromarray(np.array([[0, 1], [2, 0]], np.uint8)).convert("P")
    image.putpalette([0, 0, 0, 10, 20, 30, 90, 90, 90])
    image.save(tmp_path / "a.png", transparency=1 if how == "index" else bytes([255, 0, 128]))
    half = 90 if how == "index" else 172
    expect_grey(tmp_path / "a.png", [[0, 255], [half, 0]])


def test_transparent_gif(tmp_path):
    image = Image.fromarray(np.array([[0, 1], [2, 0]], np.uint8)).convert("P")
    image.putpalette([0, 0, 0, 10, 20, 30, 90, 90, 90])
    image.save(tmp_path / "a.gif", transparency=1)
    expect_grey(tmp_path / "a.gif", [[0, 255], [90, 0]])


def test_one_transparent_grey_or_colour(tmp_path):
    """A value that stands for transparency, in every depth of PNG."""
    png(tmp_path / "1.png", 1, 0, [b"\x40", b"\x80"], transparent=struct.pack(">H", 0))
    expect_grey(tmp_path / "1.png", [[255, 255], [255, 255]])
    png(tmp_path / "8.png", 8, 0, [b"\0\x55", b"\xaa\0"], transparent=struct.pack(">H", 0))
    expect_grey(tmp_path / "8.png", [[255, 85], [170, 255]])
    rows = [struct.pack(">2H", *row) for row in ([1, 2], [0x5555, 0xAAAA])]
    png(tmp_path / "16.png", 16, 0, rows, transparent=struct.pack(">H", 1))
    expect_grey(tmp_path / "16.png", [[255, 0], [85, 170]])
    colour = struct.pack(">3H", 0, 255, 0)
    png(tmp_path / "rgb.png", 8, 2, [row.tobytes() for row in COLOURS], transparent=colour)
    assert read(tmp_path / "rgb.png", 3)[0] == [[255, 0, 0], [255, 255, 255]]
    rows = [(row.astype(">u2") * 257).tobytes() for row in COLOURS]
    colour = struct.pack(">3H", 200 * 257, 100 * 257, 50 * 257)
    png(tmp_path / "deep.png", 16, 2, rows, transparent=colour)
    assert read(tmp_path / "deep.png", 3)[1] == [[0, 0, 255], [255, 255, 255]]


# --- frames, direction, resizing ------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["gif", "tiff", "png"])
def test_the_first_frame_of_several(tmp_path, suffix):
    frames = [Image.new("L", (4, 4), v) for v in (255, 0, 128)]
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / f"a.{suffix}") as opened:
        assert opened.n_frames == 3
    expect_grey(tmp_path / f"a.{suffix}", [[255, 255], [255, 255]])


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_every_depth_is_turned_upright(tmp_path, depth, suffix):
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    pixels = RAMP.astype(depth) * (257 if depth is np.uint16 else 1)
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}", exif=exif)
    expect_grey(tmp_path / f"a.{suffix}", RAMP[::-1, ::-1].tolist())


def test_resizing_does_not_leave_the_range(tmp_path):
    edges = np.zeros((9, 9), np.uint16)
    edges[3:6, 3:6] = 65535
    Image.fromarray(edges).save(tmp_path / "a.png")
    got = read_image(tmp_path / "a.png", 20, 1)
    assert got.min() == -1 and got.max() == 1


def test_depths_are_resized_alike(tmp_path):
    smooth = (60 + 10 * np.add.outer(np.arange(9), np.arange(9))).astype(np.uint8)
    Image.fromarray(smooth).save(tmp_path / "8.png")
    Image.fromarray(smooth.astype(np.uint16) * 257).save(tmp_path / "16.png")
    shallow, deep = (read_image(tmp_path / f"{bits}.png", 20, 1) for bits in (8, 16))
    torch.testing.assert_close(deep, shallow, rtol=0, atol=3 / 255)


def test_an_error_of_the_decoder_names_the_file(tmp_path):
    """Pillow raises a RuntimeError for what it cannot decode of some formats."""
    Image.fromarray(COLOURS).save(tmp_path / "a.dds")
    broken = bytearray((tmp_path / "a.dds").read_bytes())
    broken[80:84] = bytes(4)  # the flags of the pixel format
    (tmp_path / "a.dds").write_bytes(broken)
    with pytest.raises(ValueError, match=r"cannot read .*a\.dds as an image"):
        read_image(tmp_path / "a.dds", 2, 1)


def test_bytes_are_not_taken_for_images_in_the_range():
    with pytest.raises(TypeError, match=r"floating point, in \[-1, 1\], got torch.uint8"):
        to_uint8(torch.zeros(2, 2, dtype=torch.uint8))
