"""What people keep frames and masks in: what is taken, what is changed and said, and what is refused."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from ccmdist.data.images import read_frame, read_mask
from ccmdist.errors import ShardError

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (48, 48), dtype=np.uint8)
MASK = np.zeros((48, 48), bool)
MASK[10:13] = True


def saved(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def grey_image():
    return Image.fromarray(GREY)


def transparent(alpha):
    image = grey_image().convert("RGBA")
    image.putalpha(alpha)
    return image


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_grey_stored_as_one_or_three_channels_is_taken_bit_for_bit(kind, mode):
    found = read_frame(saved(grey_image().convert(mode), kind), "here")
    np.testing.assert_array_equal(found.pixels, GREY)
    assert not found.is_cropped
    assert not found.is_scaled


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_jpeg_gives_what_pillow_decodes(mode):
    data = saved(grey_image().convert(mode), "JPEG", quality=95)
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(read_frame(data, "here").pixels, np.asarray(image.convert("L")))


@pytest.mark.parametrize("mode", ["P", "LA", "RGBA"])
def test_palettes_and_opaque_alpha_channels_of_grey_pictures_are_taken(mode):
    np.testing.assert_array_equal(read_frame(saved(grey_image().convert(mode)), "here").pixels, GREY)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_become_eight_the_same_way_for_every_frame(kind):
    deep = np.full((48, 48), 257, np.uint16)
    deep[0, :6] = [0, 128, 129, 65535, 32896, 65406]
    found = read_frame(saved(deep, kind), "here")
    assert found.is_scaled
    assert found.pixels[0, :6].tolist() == [0, 0, 1, 255, 128, 254]
    assert found.pixels[1, 0] == 1


def test_twelve_bits_in_sixteen_are_refused_because_they_would_come_out_black():
    with pytest.raises(ShardError, match=r"here has 16 bits but no value above 4095: .* so that 65535 is white"):
        read_frame(saved(np.linspace(0, 4095, 48 * 48).reshape(48, 48).astype(np.uint16)), "here")


def test_the_footer_of_a_native_export_is_cut_off_frame_and_mask_alike():
    export = RNG.integers(0, 256, (484, 384), dtype=np.uint8)
    found = read_frame(saved(export), "here")
    assert found.is_cropped
    np.testing.assert_array_equal(found.pixels, export[:384])
    mask = np.zeros((484, 384), np.uint8)
    mask[380:, 5] = 255
    found = read_mask(saved(mask), "here")
    assert found.is_cropped
    assert found.pixels.shape == (384, 384)
    assert found.pixels.sum() == 4


def colourful():
    image = grey_image().convert("RGB")
    image.putpixel((3, 3), (255, 0, 0))
    return image


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(grey_image(), "JPEG", exif=exif)


def huge_header():
    chunk = b"IHDR" + struct.pack(">IIBBBBB", 5000, 5000, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + saved(GREY)[33:]
    )


FRAMES = [Image.fromarray(GREY), Image.fromarray(255 - GREY)]
REFUSED = {
    "colour": (saved(colourful()), "here has colours, expected grey; save it as grey PNG, without overlays"),
    "a coloured palette": (saved(colourful().convert("P")), "here has colours"),
    "cmyk": (saved(grey_image().convert("CMYK"), "JPEG"), "here is of mode CMYK, expected grey with 8 or 16 bits"),
    "float": (saved(GREY.astype(np.float32), "TIFF"), "here is of mode F, expected grey with 8 or 16 bits"),
    "transparency": (saved(transparent(200)), "here is partly transparent"),
    "animation": (saved(FRAMES[0], save_all=True, append_images=FRAMES[1:]), "here holds 2 pictures, expected one"),
    "pages": (saved(FRAMES[0], "TIFF", save_all=True, append_images=FRAMES[1:]), "here holds 2 pictures"),
    "rotation": (rotated(), "here is turned by its metadata, so it may not fit its mask"),
    "size": (huge_header(), "here has 5000x5000 px, expected at most 16777216 in all"),
    "black": (saved(np.zeros((48, 48), np.uint8)), "here is empty, all its pixels are 0; remove the row"),
    "white": (saved(np.full((48, 48), 255, np.uint8)), "here is empty, all its pixels are 255"),
    "no square": (saved(GREY[:40]), "here is 48x40 px, expected a square of at least 32 px; crop it; only the footer"),
    "small": (saved(GREY[:16, :16]), "here is 16x16 px, expected a square of at least 32 px"),
    "gif": (saved(grey_image(), "GIF"), "here is no PNG, JPEG, TIFF, BMP, DICOM that can be read; save it as PNG"),
    "text": (b"%PDF-1.4", "here is no PNG, JPEG, TIFF, BMP, DICOM that can be read"),
    "half": (saved(GREY)[:900], "here is no PNG, JPEG, TIFF, BMP, DICOM that can be read"),
    "nothing": (b"", "here is no PNG, JPEG, TIFF, BMP, DICOM that can be read"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_grey_still_upright_frame_is_refused(name):
    data, message = REFUSED[name]
    with pytest.raises(ShardError) as error:
        read_frame(data, "here")
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("dtype", "nerve"), [(np.uint8, 1), (np.uint8, 255), (np.uint8, 90), (np.uint16, 1), (np.uint16, 65535)]
)
def test_of_two_values_the_larger_one_is_nerve(dtype, nerve):
    np.testing.assert_array_equal(read_mask(saved(MASK.astype(dtype) * dtype(nerve)), "here").pixels, MASK)


def test_one_bit_masks_and_palettes_and_rgb_are_taken():
    image = Image.fromarray(MASK)
    for data in (saved(image), saved(image.convert("L").convert("P")), saved(image.convert("RGB"), "BMP")):
        np.testing.assert_array_equal(read_mask(data, "here").pixels, MASK)


def test_a_mask_with_smooth_edges_or_jpeg_noise_is_cut_at_half_of_the_range():
    smooth = MASK.astype(np.uint8) * 255
    smooth[9, ::2], smooth[13, ::2] = np.arange(24) * 5, 255 - np.arange(24) * 5
    np.testing.assert_array_equal(read_mask(saved(smooth), "here").pixels, smooth >= 128)
    jpeg = saved(MASK.astype(np.uint8) * 255, "JPEG", quality=90)
    np.testing.assert_array_equal(read_mask(jpeg, "here").pixels, MASK)


def test_an_empty_mask_is_a_mask():
    assert not read_mask(saved(np.zeros((48, 48), np.uint8)), "here").pixels.any()


def classes(*values):
    mask = np.zeros((48, 48), np.uint8)
    for row, value in enumerate(values):
        mask[row] = value
    return saved(mask)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            classes(1, 2),
            "here is no mask: it holds 3 values (0, 1, 2), 0% of its pixels are in between; save it with two",
        ),
        (
            classes(85, 170, 255),
            "here is no mask: it holds 4 values (0, 85, 170, 255), 4% of its pixels are in between",
        ),
        (saved(GREY), "here is no mask: it holds "),
        (saved(np.clip(GREY, 100, 101)), "here is no mask: it holds 2 values (100, 101)"),
        (
            saved(np.where(MASK, 0, 255).astype(np.uint8)),
            "here calls 94% of the frame nerve, expected at most 50%; nerves are",
        ),
        (saved(np.full((48, 48), 255, np.uint8)), "here calls 100% of the frame nerve"),
        (saved(colourful()), "here has colours"),
    ],
    ids=["classes", "bright classes", "a frame", "two greys", "inverted", "white", "colour"],
)
def test_what_is_no_mask_is_refused(data, message):
    with pytest.raises(ShardError) as error:
        read_mask(data, "here")
    assert str(error.value).startswith(message)
