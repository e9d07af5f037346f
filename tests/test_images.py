"""Photo files of every kind: how they are decoded, and which the first stage that reads them refuses."""

import functools
import io
import struct
import sys
import time

import cv2
import numpy as np
import pandas as pd
import pillow_heif
import pytest
import tiny
from PIL import Image, ImageCms, ImageOps, TiffImagePlugin, features
from tiny import claim_size, grass

from nbs_lib.eda import describe_photo, describe_photos, run_eda
from nbs_lib.images import (
    ADOBE_RGB,
    BT2020,
    DISPLAY_P3,
    MAX_PIXELS,
    decode_photo,
    file_format,
    read_photo,
    rgb_profile,
    srgb_transform,
    to_landscape,
)
from nbs_lib.inpaint import run_inpaint
from nbs_lib.runtime import InputError, peak_memory
from nbs_lib.stages import open_run
from nbs_lib.tables import read_competition

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "TIFF", "AVIF", "HEIF")


@pytest.fixture(scope="module", autouse=True)
def heif_writer():
    "Let Pillow write HEIF; it is read without this registration."
    pillow_heif.register_heif_opener()


def encode(image: Image.Image, form: str, **how) -> bytes:
    "Encode the picture in a format of Pillow, as close to its pixels as the format allows."
    file = io.BytesIO()
    best = {
        "JPEG": {"subsampling": 0},
        "MPO": {"subsampling": 0},
        "HEIF": {"chroma": 444},
        "AVIF": {"subsampling": "4:4:4"},
    }
    image.save(file, form, **{"quality": 95, **best.get(form, {}), **how})
    return file.getvalue()


def three_channels(grey) -> np.ndarray:
    "Repeat a grey picture (H, W) to (H, W, 3)."
    return np.repeat(np.asarray(grey)[..., None], 3, 2)


# --- pixels and orientation


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "P", "CMYK", "1", "I;16", "I", "YCbCr"])
def test_modes_become_rgb(tmp_path, mode):
    picture = grass(0, (120, 240))
    if mode in ("I;16", "I"):
        image = Image.fromarray(picture[..., 1].astype(np.uint16) * 257)
        image = image if mode == "I;16" else image.convert("I")
    else:
        image = Image.fromarray(picture).convert(mode)
    suffix = {"RGB": "jpg", "L": "jpg", "CMYK": "jpg", "YCbCr": "jpg", "I": "tif"}.get(mode, "png")
    image.save(tmp_path / f"a.{suffix}")
    photo = read_photo(tmp_path / f"a.{suffix}")
    assert photo.shape == (120, 240, 3) and photo.dtype == np.uint8
    wanted = picture
    if mode in ("L", "LA"):
        wanted = three_channels(image.convert("L"))
    if mode in ("I;16", "I"):
        wanted = three_channels(picture[..., 1])
    if mode not in ("1", "P"):
        assert np.abs(photo.astype(int) - wanted).mean() < 12


SHOWN = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}  # EXIF 2.3


@pytest.mark.parametrize("orientation", SHOWN)
@pytest.mark.parametrize("form", FORMATS)
def test_exif_orientation(form, orientation):
    picture = grass(0, (100, 240))
    picture[:20, :20] = (250, 20, 20)
    exif = Image.Exif()
    exif[274] = orientation
    photo = decode_photo(encode(Image.fromarray(picture), form, exif=exif.tobytes()))
    wanted = SHOWN[orientation](picture)
    assert photo.shape == wanted.shape and np.abs(photo.astype(int) - wanted).mean() < 4


def segment(marker: int, body: bytes) -> bytes:
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(body) + 2) + body


def exif_block(order: str = "<", kind: int = 3, orientation: int = 6) -> bytes:
    value = struct.pack(order + "HH", orientation, 0) if kind == 3 else struct.pack(order + "I", orientation)
    entries = (
        struct.pack(order + "HHHII", 2, 256, 4, 1, 240) + struct.pack(order + "HHI", 274, kind, 1) + value
    )
    return (
        b"Exif\0\0" + {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "I", 8) + entries + bytes(4)
    )


XMP = b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:x='adobe:ns:meta/'>%s</x:xmpmeta>"
BLOCKS = {
    "big-endian": [exif_block(">")],
    "a long integer": [exif_block(kind=4)],
    "a long integer, big-endian": [exif_block(">", 4)],
    "after XMP": [XMP % b"", exif_block()],
    "before XMP": [exif_block(), XMP % b""],
    "XMP alone": [XMP % b'<a tiff:Orientation="6"/>'],
}


@pytest.mark.parametrize("blocks", BLOCKS.values(), ids=BLOCKS)
def test_both_decoders_of_jpeg_turn_alike(blocks):
    "A JPEG that ends as one ends goes through OpenCV, one with a film after it through Pillow."
    content = jpeg(grass(0, (100, 240)))
    content = content[:2] + b"".join(segment(0xE1, block) for block in blocks) + content[2:]
    assert decode_photo(content).shape == decode_photo(content + FILM).shape == (240, 100, 3)


@pytest.mark.parametrize(
    "form, mode",
    [
        ("PNG", "RGBA"),
        ("WEBP", "RGBA"),
        ("AVIF", "RGBA"),
        ("HEIF", "RGBA"),
        ("HEIF", "L"),
        ("AVIF", "L"),
        ("HEIF", "I;16"),
    ],
)
def test_alpha_and_grey_of_phone_formats(form, mode):
    picture = grass(0, (120, 240))
    if mode == "RGBA":
        image, wanted = Image.fromarray(picture).convert(mode), picture
        image.putalpha(Image.fromarray(np.full(picture.shape[:2], 90, np.uint8)))
    elif mode == "L":
        image = Image.fromarray(picture).convert(mode)
        wanted = three_channels(image)
    else:
        image = Image.fromarray(picture[..., 1].astype(np.uint16) * 257)
        wanted = three_channels(picture[..., 1])
    assert np.abs(decode_photo(encode(image, form)).astype(int) - wanted).mean() < 6


def test_sixteen_bits_of_colour(tmp_path):
    picture = grass(0, (120, 240))
    cv2.imwrite(str(tmp_path / "a.png"), picture[..., ::-1].astype(np.uint16) * 257)
    assert (read_photo(tmp_path / "a.png") == picture).all()
    cv2.imwrite(str(tmp_path / "a.tif"), picture[..., ::-1].astype(np.uint16) * 257)
    try:  # Pillow 11 reads none such, Pillow 13 does
        assert (read_photo(tmp_path / "a.tif") == picture).all()
    except InputError as e:
        assert "a.tif: its TIFF data is broken or of a kind that is not read" in str(e)


# --- formats of phones, whatever the file is called
FILM = b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom\0\0\0\x10mdat" + b"12345678"


@pytest.mark.parametrize(
    "form, name",
    [
        ("HEIF", "IMG_1234.HEIC"),
        ("HEIF", "IMG_1234.jpg"),
        ("AVIF", "photo.jpg"),
        ("WEBP", "photo.jpg"),
        ("JPEG", "photo.heic"),
    ],
)
def test_the_bytes_give_the_format(tmp_path, form, name):
    picture = grass(0, (120, 240))
    (tmp_path / name).write_bytes(encode(Image.fromarray(picture), form))
    assert np.abs(read_photo(tmp_path / name).astype(int) - picture).mean() < 4


@pytest.mark.parametrize(
    "brands, form",
    [
        (b"heic\0\0\0\0mif1heic", "HEIC"),
        (b"mif1\0\0\0\0mif1heic", "HEIC"),
        (b"heix\0\0\0\0mif1heix", "HEIC"),
        (b"mif1\0\0\0\0mif1miaf", "HEIF"),
        (b"avif\0\0\0\0avifmif1", "AVIF"),
        (b"mif1\0\0\0\0mif1avif", "AVIF"),
        (b"qt  \0\0\0\0qt  qt  ", "video"),
        (b"crx \0\0\0\0crx isom", "CR3"),
    ],
)
def test_brands(brands, form):
    assert file_format(b"\0\0\0\x18ftyp" + brands) == form


def test_without_its_package_a_heic_names_it(tmp_path, monkeypatch):
    (tmp_path / "IMG_1234.jpg").write_bytes(encode(Image.fromarray(grass(0, (120, 240))), "HEIF"))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(InputError, match=r"IMG_1234.jpg: is a HEIC photo .*pip install pillow-heif") as error:
        read_photo(tmp_path / "IMG_1234.jpg")
    assert "\n" not in str(error.value)


def test_a_pillow_without_avif_is_named(monkeypatch):
    content = encode(Image.fromarray(grass(0, (120, 240))), "AVIF")
    monkeypatch.setattr(features, "check", lambda name: False)
    with pytest.raises(InputError, match="ID7.jpg: is an AVIF photo .*pillow>=11.3"):
        decode_photo(content, "ID7.jpg")


@pytest.mark.parametrize(
    "start, form",
    [
        (FILM, "video"),
        (b"\xff\x0a" + bytes(50), "JPEG XL"),
        (b"%PDF-1.7", "PDF"),
        (b"\0\0\0\x18ftypcrx \0\0\0\0crx isom", "CR3"),
    ],
)
def test_other_formats_are_refused_by_name(start, form):
    with pytest.raises(InputError, match=f"ID7.jpg: is a {form} file"):
        decode_photo(start, "ID7.jpg")


@pytest.mark.parametrize("tag, value", [(50706, b"\1\4\0\0"), (254, 1)])
def test_a_raw_file_is_not_its_thumbnail(tag, value):
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[tag] = value
    with pytest.raises(InputError, match="ID7.dng: is a camera's raw file"):
        decode_photo(encode(Image.fromarray(grass(0, (120, 240))), "TIFF", tiffinfo=tags), "ID7.dng")


# --- what else is in the file: films, previews, second pictures
@pytest.mark.parametrize(
    "form, trailer",
    [
        ("JPEG", FILM),
        ("MPO", FILM),
        ("HEIF", b"\0\0\0\x38mpvd" + FILM),
        ("HEIF", b"\0\0\1\2SEFHSEFT"),
        ("AVIF", b"\0\0\0\x38mpvd" + FILM),
        ("WEBP", FILM),
    ],
)
def test_a_motion_photo_is_its_picture(form, trailer):
    content = encode(Image.fromarray(grass(0, (120, 240))), form)
    assert (decode_photo(content + trailer) == decode_photo(content)).all()
    assert (decode_photo(content + trailer[:-3]) == decode_photo(content)).all(), (
        "a film that is cut leaves the picture whole"
    )


def test_the_first_picture_of_several_is_read():
    first, second = Image.fromarray(grass(0, (120, 240))), Image.fromarray(grass(1, (90, 160)))
    for form in ("MPO", "HEIF", "AVIF"):
        content = encode(
            first,
            form,
            save_all=True,
            append_images=[second] if form != "AVIF" else [Image.fromarray(grass(1, (120, 240)))],
        )
        assert np.abs(decode_photo(content).astype(int) - np.asarray(first)).mean() < 4


def test_a_thumbnail_in_the_exif_is_not_the_photo():
    picture, exif = grass(0, (400, 800)), Image.Exif()
    preview = jpeg(grass(1, (80, 160)))
    exif[274] = 6
    block = exif.tobytes()[:-4]  # without the offset of the next IFD: 0, none
    at = len(block) - 6 + 4
    block += struct.pack(">IHHHIIHHIII", at, 2, 513, 4, 1, at + 30, 514, 4, 1, len(preview), 0) + preview
    content = jpeg(picture)
    content = content[:2] + segment(0xE1, block) + content[2:]
    assert content.count(b"\xff\xd8\xff") == 2
    assert np.abs(np.rot90(decode_photo(content)).astype(int) - picture[..., ::-1]).mean() < 12
    for part in (
        content[: len(content) // 2],
        content[: len(content) // 2] + content[len(content) * 2 // 3 :],
    ):
        with pytest.raises(InputError, match="ID7.jpg"):
            decode_photo(part, "ID7.jpg")


# --- cut files
PHONE = {
    "HEIC": ("HEIF", {}),
    "HEIC of tiles": ("HEIF", {"tile_size": 64}),
    "AVIF": ("AVIF", {}),
    "WebP": ("WEBP", {}),
    "WebP, lossless": ("WEBP", {"lossless": True}),
}


@functools.cache
def phone_photo(kind: str) -> bytes:
    form, how = PHONE[kind]
    return encode(Image.fromarray(grass(3, (200, 400))), form, **how)


@pytest.mark.parametrize("kind", PHONE)
@pytest.mark.parametrize("share", [0.04, 0.5, 0.9, 0.999])
def test_a_cut_file_is_called_truncated(kind, share):
    "An iPhone's HEIC is made of tiles; its decoder leaves out those that are missing, without an error."
    content, form = phone_photo(kind), kind.split()[0].strip(",")
    part = content[: int(share * len(content))]
    with pytest.raises(InputError, match=f"ID7.jpg: is a truncated {form} .{len(part)} of [0-9]+ bytes"):
        decode_photo(part, "ID7.jpg")
    if share < 0.99:
        with pytest.raises(InputError, match=f"ID7.jpg: is a truncated {form} .zero bytes"):
            decode_photo(part.ljust(len(content), b"\0"), "ID7.jpg")


# --- colours
# Linear RGB to linear sRGB, and the tone curve, as published (CSS Color 4, section 17), not from the library.
TO_SRGB = {
    "Display P3": [
        [1.2249402, -0.2249402, 0],
        [-0.0420569, 1.0420569, 0],
        [-0.0196376, -0.0786361, 1.0982735],
    ],
    "Adobe RGB": [[1.3983557, -0.3983557, 0], [0, 1, 0], [0, -0.0429289, 1.0429289]],
    "BT.2020": [
        [1.6604910, -0.5876411, -0.0728499],
        [-0.1245505, 1.1328999, -0.0083494],
        [-0.0181508, -0.1005789, 1.1187297],
    ],
}
PROFILES = {
    "Display P3": rgb_profile(DISPLAY_P3),
    "Adobe RGB": rgb_profile(ADOBE_RGB, 2.19921875),
    "BT.2020": rgb_profile(BT2020),
}
PATCHES = np.array(
    [
        (90, 140, 60),
        (200, 180, 90),
        (40, 60, 30),
        (128, 128, 128),
        (150, 90, 70),
        (235, 235, 225),
        (60, 110, 180),
        (110, 160, 40),
    ]
)


def in_srgb(space: str, colours: np.ndarray) -> np.ndarray:
    v = colours / 255
    linear = (
        v**2.19921875
        if space == "Adobe RGB"
        else np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)
    )
    linear = (linear @ np.array(TO_SRGB[space]).T).clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def chart() -> Image.Image:
    "Eight patches of 64 x 64 pixels."
    return Image.fromarray(np.repeat(np.repeat(PATCHES.reshape(2, 4, 3).astype(np.uint8), 64, 0), 64, 1))


def patch_colours(content: bytes) -> np.ndarray:
    photo = decode_photo(content)
    return np.array(
        [
            np.median(photo[y + 16 : y + 48, x + 16 : x + 48], (0, 1))
            for y in (0, 64)
            for x in (0, 64, 128, 192)
        ]
    )


def stored(form: str) -> np.ndarray:
    "Return the patches as a format stores them: a lossy one moves them by a step or two."
    kept = patch_colours(encode(chart(), form, quality=100))
    assert np.abs(kept - PATCHES).max() <= 3
    return kept


@pytest.mark.parametrize("space", TO_SRGB)
@pytest.mark.parametrize("form", FORMATS)
def test_colours_of_a_profile_become_srgb(form, space):
    content, wanted = (
        encode(chart(), form, quality=100, icc_profile=PROFILES[space]),
        in_srgb(space, stored(form)),
    )
    assert np.abs(wanted - PATCHES).max() > 10, "the patches would not show a missing conversion"
    assert np.abs(patch_colours(content) - wanted).max() <= 2
    if form == "JPEG":  # with a film after it Pillow decodes it, not OpenCV
        assert np.abs(patch_colours(content + FILM) - wanted).max() <= 2


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    "profile",
    [
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        b"no profile at all",
        PROFILES["Display P3"][:200],
    ],
    ids=["sRGB", "none", "cut"],
)
def test_srgb_and_damaged_profiles_change_nothing(form, profile, capfd):
    with_profile = decode_photo(encode(chart(), form, icc_profile=profile))
    assert (with_profile == decode_photo(encode(chart(), form))).all()
    assert srgb_transform(profile, "RGB") is None and capfd.readouterr().err == ""


def test_a_profile_for_other_channels_changes_nothing():
    for mode in ("L", "CMYK"):
        assert (
            decode_photo(encode(chart().convert(mode), "JPEG", icc_profile=PROFILES["Display P3"]))
            == decode_photo(encode(chart().convert(mode), "JPEG"))
        ).all()


def test_a_grey_profile_is_converted():
    "Grey of gamma 1.0, 128 of 255 of the light, is 188 in sRGB."
    body = (
        struct.pack(">I", 2) + b"wtpt" + struct.pack(">II", 156, 20) + b"kTRC" + struct.pack(">II", 176, 12)
    )
    body += (
        b"XYZ "
        + bytes(4)
        + struct.pack(">iii", 63190, 65536, 54061)
        + b"curv"
        + bytes(4)
        + struct.pack(">I", 0)
    )
    head = struct.pack(
        ">I4xI4s4s4s12x4s28x", 128 + len(body), 0x02400000, b"mntr", b"GRAY", b"XYZ ", b"acsp"
    ) + struct.pack(">iii", 63190, 65536, 54061)
    grey = Image.new("L", (120, 240), 128)
    assert (
        np.abs(
            decode_photo(encode(grey, "PNG", icc_profile=head.ljust(128, b"\0") + body)).astype(int) - 188
        ).max()
        <= 2
    )


@pytest.mark.parametrize("primaries, space", [(12, "Display P3"), (9, "BT.2020")])
def test_colours_by_code_become_srgb(primaries, space):
    "HEIC and AVIF may name their primaries by a number of H.273 instead of a profile."
    heic = encode(
        chart(),
        "HEIF",
        quality=100,
        color_primaries=primaries,
        transfer_characteristics=13,
        full_range_flag=1,
    )
    avif = encode(chart(), "AVIF", quality=100)
    at = avif.index(b"colrnclx") + 8
    avif = avif[:at] + struct.pack(">HH", primaries, 13) + avif[at + 4 :]
    for content, form in ((heic, "HEIF"), (avif, "AVIF")):
        assert np.abs(patch_colours(content) - in_srgb(space, stored(form))).max() <= 2
    for curve, title in ((16, "PQ"), (18, "HLG")):
        heic = encode(chart(), "HEIF", color_primaries=9, transfer_characteristics=curve)
        for content in (heic, avif[:at] + struct.pack(">HH", 9, curve) + avif[at + 4 :]):
            with pytest.raises(InputError, match=f"ID7.jpg: is an HDR photo .{title}"):
                decode_photo(content, "ID7.jpg")


def test_adobe_rgb_that_only_the_exif_names():
    def content(index: bytes) -> bytes:
        first = struct.pack("<HHHIIII", 1, 34665, 4, 1, 26, 0, 0)[:18]  # IFD0: where the Exif IFD is
        second = struct.pack("<HHHIII", 1, 40965, 4, 1, 44, 0)  # Exif IFD: where the interoperability IFD is
        third = struct.pack("<HHHI4sI", 1, 1, 2, 4, index, 0)
        block = b"Exif\0\0II*\0" + struct.pack("<I", 8) + first + second + third
        plain = encode(chart(), "JPEG", quality=100)
        return plain[:2] + segment(0xE1, block) + plain[2:]

    assert np.abs(patch_colours(content(b"R03\0")) - in_srgb("Adobe RGB", stored("JPEG"))).max() <= 2
    assert np.abs(patch_colours(content(b"R98\0")) - stored("JPEG")).max() == 0


def test_a_portrait_of_twelve_megapixels(tmp_path):
    picture = np.zeros((3024, 4032, 3), np.uint8)
    picture[:] = PATCHES[0]
    picture[:500, :500] = PATCHES[1]
    picture[::64, ::48] += 3
    exif = Image.Exif()
    exif[274] = 6
    (tmp_path / "IMG_1.JPG").write_bytes(
        encode(Image.fromarray(picture), "JPEG", exif=exif.tobytes(), icc_profile=PROFILES["Display P3"])
        + FILM
    )
    photo = read_photo(tmp_path / "IMG_1.JPG")
    assert photo.shape == (4032, 3024, 3) and to_landscape(photo).shape == (3024, 4032, 3)
    seen = np.array(
        [np.median(photo[2000:3000, 1000:2000], (0, 1)), np.median(photo[100:400, -400:-100], (0, 1))]
    )
    assert np.abs(seen - in_srgb("Display P3", PATCHES[:2])).max() <= 2


# --- refusals
def test_refusals_name_the_file(tmp_path):
    Image.fromarray(grass(0)).save(tmp_path / "good.jpg")
    whole = (tmp_path / "good.jpg").read_bytes()
    bad = {
        "zero.jpg": b"",
        "half.jpg": whole[: len(whole) // 2],
        "tail.jpg": whole[:-2000],
        "text.jpg": b"image_id,path\n" * 50,
        "magic.jpg": whole[:3],
        "png.png": b"\x89PNG\r\n\x1a\n" + b"0" * 100,
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.jpg")
    Image.new("F", (100, 100)).save(tmp_path / "float.tif")
    (tmp_path / "dir.jpg").mkdir()
    for name in [*bad, "dot.jpg", "float.tif", "dir.jpg", "absent.jpg"]:
        with pytest.raises(InputError) as error:
            read_photo(tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("size", [(20000, 10000), (9000, 8000)])
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_huge_is_refused_before_it_is_decoded(tmp_path, suffix, size):
    path = tmp_path / f"huge.{suffix}"
    Image.fromarray(grass(0, (64, 64))).save(path)
    path.write_bytes(claim_size(path.read_bytes(), *size))
    before, start = peak_memory(), time.monotonic()
    with pytest.raises(InputError, match="huge.*million"):
        read_photo(path)
    assert time.monotonic() - start < 1 and peak_memory() - before < 20_000_000
    assert size[0] * size[1] > MAX_PIXELS


# --- files with a hole
def jpeg(picture: np.ndarray, *how: int) -> bytes:
    return cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 92, *how])[1].tobytes()


KINDS = {
    "plain": (),
    "4:4:4": (cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444),
    "4:2:2": (cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_422),
    "restarts": (cv2.IMWRITE_JPEG_RST_INTERVAL, 40),
    "optimised": (cv2.IMWRITE_JPEG_OPTIMIZE, 1),
    "coarse": (cv2.IMWRITE_JPEG_QUALITY, 20),
    "coarse, optimised": (cv2.IMWRITE_JPEG_QUALITY, 20, cv2.IMWRITE_JPEG_OPTIMIZE, 1),
}


@pytest.mark.parametrize("how", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("where", [0.1, 0.5, 0.85])
def test_a_file_with_a_hole_is_refused(where, how):
    "A quarter of the bytes is gone and the end is there; what is left is no picture of a quadrat."
    content = jpeg(grass(1, (400, 800)), *how)
    holed = (
        content[: int(where * len(content))]
        + content[min(len(content) - 2, int((where + 0.25) * len(content))) :]
    )
    with pytest.raises(InputError, match="ID7.jpg: its lower part is missing"):
        decode_photo(holed, "ID7.jpg")


@pytest.mark.parametrize(
    "how", [*KINDS.values(), (cv2.IMWRITE_JPEG_PROGRESSIVE, 1)], ids=[*KINDS, "progressive"]
)
@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (90, 120, 60)])
@pytest.mark.parametrize("rows", [16, 41, 200, 399, 400])
def test_a_margin_of_one_colour_is_no_hole(rows, colour, how, capfd):
    picture = grass(2, (400, 800))
    picture[400 - rows :] = colour
    assert decode_photo(jpeg(picture, *how)).shape == picture.shape
    assert capfd.readouterr().err == ""  # nor is it called corrupt on the terminal


def turned(content: bytes, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[274] = orientation
    return content[:2] + segment(0xE1, exif.tobytes()) + content[2:]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_hole_is_no_margin_in_any_orientation(orientation):
    content, picture = jpeg(grass(1, (400, 800))), grass(2, (400, 800))
    with pytest.raises(InputError, match="its lower part is missing"):
        decode_photo(turned(content[: len(content) // 3] + content[len(content) // 2 :], orientation))
    for margin in (np.s_[360:], np.s_[:40], np.s_[:, 760:], np.s_[:, :40]):
        framed = picture.copy()
        framed[margin] = 20
        assert sorted(decode_photo(turned(jpeg(framed), orientation)).shape) == [3, 400, 800]


def of_kind(kind: str, picture: np.ndarray, gap: slice = slice(0, 0)) -> bytes:
    "Write the picture as a camera or a phone may, without the bytes of `gap` (shares of the file)."
    image = Image.fromarray(picture)
    content = encode(image.convert({"grey": "L", "cmyk": "CMYK"}.get(kind, "RGB")), "JPEG")
    content = content[: int(gap.start * len(content))] + content[int(gap.stop * len(content)) :]
    preview = encode(image.resize((160, 80)), "JPEG")
    if kind == "mpo":  # two pictures in one file: the second starts where the first ends
        whole = encode(image, "MPO", save_all=True, append_images=[image.resize((160, 80))])
        second = whole.index(b"\xff\xd8\xff", 2)
        while not whole[:second].endswith(b"\xff\xd9"):
            second = whole.index(b"\xff\xd8\xff", second + 1)
        return whole[: int(gap.start * second)] + whole[int(gap.stop * second) :]
    return content + {"preview": preview, "bytes": b"\x00\x01vendor's own"}.get(kind, b"")


@pytest.mark.parametrize("kind", ["grey", "cmyk", "mpo", "preview", "bytes"])
def test_a_hole_is_seen_in_files_of_every_kind(kind, capfd):
    picture = grass(3, (400, 800))
    for part in (of_kind(kind, picture, slice(0.4, 0.6)), of_kind(kind, picture, slice(0.6, 0.8))):
        with pytest.raises(InputError, match="ID7.jpg: its lower part is missing"):
            decode_photo(part, "ID7.jpg")
    capfd.readouterr()
    for rows in (0, 16, 41, 200, 400):
        framed = picture.copy()
        framed[400 - rows :] = 20
        content = of_kind(kind, framed)
        assert (Image.open(io.BytesIO(content)).format == "MPO") == (kind == "mpo")
        seen = decode_photo(content)
        wanted = three_channels(Image.fromarray(framed).convert("L")) if kind == "grey" else framed
        assert np.abs(seen.astype(int) - wanted).mean() < 12
    assert capfd.readouterr().err == ""


def test_a_cut_picture_before_a_whole_preview_is_refused():
    "What a phone appends ends as a JPEG ends; the picture before it need not."
    content = jpeg(grass(3, (400, 800)))
    with pytest.raises(InputError, match="ID7.jpg: its lower part is missing"):
        decode_photo(content[: len(content) // 2] + jpeg(grass(3, (80, 160))), "ID7.jpg")


@pytest.mark.parametrize("kind", ["grey", "cmyk", "rgb"])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_copy_that_was_broken_off_in_a_file_of_full_length_is_refused(kind, progressive):
    "Zeros are read as picture, by every decoder. A whole file may have some after its end."
    image = Image.fromarray(grass(3, (400, 800))).convert({"grey": "L", "cmyk": "CMYK"}.get(kind, "RGB"))
    for quality in (75, 92):
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality, progressive=progressive)
        content = file.getvalue()
        assert decode_photo(content + bytes(512)).shape == (400, 800, 3)
        for kept in (0.3, 0.5, 0.9):
            with pytest.raises(InputError, match="ID7.jpg"):
                decode_photo(content[: int(kept * len(content))].ljust(len(content), b"\0"), "ID7.jpg")


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("form", ["PNG", "WEBP", "JPEG", "JPEG and bytes"])
def test_odd_exif_turns_a_photo_and_stops_none(form):
    "Tags that Pillow reads and cannot write (a number of bits of 100000), and tags that nobody can read."
    picture = grass(5, (100, 240))
    picture[:20, :20] = 255
    odd = (
        b"Exif\0\0II*\0\x08\0\0\0\x02\0"
        + struct.pack("<HHII", 258, 4, 1, 100_000)
        + struct.pack("<HHIHH", 274, 3, 1, 6, 0)
        + b"\0" * 4
    )

    def save(exif: bytes) -> bytes:
        return encode(Image.fromarray(picture), form.split()[0], exif=exif) + (
            b"more" if "bytes" in form else b""
        )

    with pytest.raises(struct.error):
        ImageOps.exif_transpose(Image.open(io.BytesIO(save(odd))))
    photo = decode_photo(save(odd))
    assert photo.shape == (240, 100, 3) and photo[:15, -15:].mean() > 230
    assert decode_photo(save(b"Exif\0\0II*\0\xff\xff\xff\xff")).shape == (100, 240, 3)


# --- the stages
def write_paddock(folder):
    return tiny.competition(folder / "in", n_train=8, n_test=2)


@pytest.mark.parametrize("fault", ["half", "dot", "huge", "text", "folder"])
def test_the_first_stage_refuses_what_the_second_would(tmp_path, fault):
    folder = write_paddock(tmp_path)
    photo = sorted((folder / "train").glob("*.jpg"))[3]
    content = photo.read_bytes()
    if fault == "dot":
        Image.new("RGB", (1, 1)).save(photo)
    else:
        photo.write_bytes(
            {
                "half": content[: len(content) // 2],
                "huge": claim_size(content, 20000, 10000),
                "text": b"image_id,path\n",
                "folder": b"",
            }[fault]
        )
    if fault == "folder":
        photo.unlink()
        photo.mkdir()
    with pytest.raises(InputError, match=photo.name) as error:
        run_eda(open_run(folder, tmp_path / "out", "demo"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out/artefacts/eda").exists()


def test_a_portrait_photo_is_used_in_landscape(tmp_path):
    picture = grass(4, (400, 800))
    picture[:, :100] = (250, 20, 20)
    Image.fromarray(np.rot90(picture, -1)).save(tmp_path / "stands.png")
    assert (to_landscape(read_photo(tmp_path / "stands.png")) == picture).all()
    thumbnail = describe_photo(tmp_path / "stands.png")[1]
    assert thumbnail[:, :28].mean((0, 1)) == pytest.approx((250, 20, 20), abs=3)


def test_facts_do_not_depend_on_how_a_photo_is_turned(tmp_path):
    folder = write_paddock(tmp_path)
    before, _ = describe_photos(read_competition(folder))
    for photo in (folder / "train").glob("*.jpg"):
        turned = np.rot90(read_photo(photo), -1)
        Image.fromarray(turned).save(photo, format="PNG")  # a PNG inside .jpg: nothing is lost
    assert describe_photos(read_competition(folder))[0].equals(before)


def test_heic_photos_are_used_by_the_stages(tmp_path):
    "train.csv and test.csv name IMG_1000.HEIC; another HEIC is called .jpg."
    folder = tiny.competition(tmp_path / "csiro-biomass", n_train=6, n_test=2)
    before = describe_photos(read_competition(folder))[0]
    photos = sorted((folder / "train").iterdir()) + sorted((folder / "test").iterdir())
    for k, path in enumerate(photos):
        content = encode(Image.fromarray(read_photo(path)), "HEIF", quality=100)
        path.unlink()
        name = path.name if k == 3 else path.stem.replace("ID", "IMG_") + ".HEIC"
        path.with_name(name).write_bytes(content)
    for name in ("train.csv", "test.csv"):
        table = pd.read_csv(folder / name)
        names = table["image_path"].str.replace(r"ID(\d+).jpg", r"IMG_\1.HEIC", regex=True)
        table["image_path"] = table["image_path"].where(table["image_path"].str.contains("ID1003.jpg"), names)
        table.to_csv(folder / name, index=False)
    after = describe_photos(read_competition(folder))[0]
    assert len(after) == 6 and np.abs(before - after).max().max() < 0.02 * before.abs().max().max()
    run = tiny.run_on(folder, tmp_path / "out")
    run_eda(run)
    run_inpaint(run)
    assert len(pd.read_csv(run.artefacts / "photos" / "photos.csv")) == 8


def test_a_sidecar_is_not_taken_for_the_photo(tmp_path):
    from nbs_lib.tables import find_photo

    (tmp_path / "test").mkdir()
    for name in ("ID9.AAE", "ID9.json", "ID9.HEIC", "ID9.mov"):
        (tmp_path / "test" / name).touch()
    assert find_photo(tmp_path, "test/ID9.jpg", "ID9").name == "ID9.HEIC"


def test_a_heic_has_colours_before_any_model(tmp_path):
    from nbs_lib.submit import thumb_features

    picture = grass(5, (400, 800))
    for name, form in (("a.jpg", "JPEG"), ("b.jpg", "HEIF")):
        (tmp_path / name).write_bytes(encode(Image.fromarray(picture), form))
    jpeg, heif = (thumb_features(tmp_path / name) for name in ("a.jpg", "b.jpg"))
    assert np.isfinite(heif).all() and np.abs(jpeg - heif)[:6].max() < 0.02
