"""Photo files of every kind: what becomes of them, and what is refused, by whoever looks first."""
import io
import struct
import time

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps
from tiny import claim_size, grass

from nbs_lib.core import InputError, open_run, peak_memory
from nbs_lib.eda import describe_photo, describe_photos, run_eda
from nbs_lib.reading import MAX_PIXELS, decode_photo, lying, read_photo


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "P", "CMYK", "1", "I;16", "I", "YCbCr"])
def test_modes_become_rgb(tmp_path, mode):
    picture = grass(0, (120, 240))
    if mode in ("I;16", "I"):
        image = Image.fromarray(picture[..., 1].astype(np.uint16) * 257)
        image = image if mode == "I;16" else image.convert("I")
    else:
        image = Image.fromarray(picture).convert(mode)
    path = tmp_path / f"a.{'jpg' if mode in ('RGB', 'L', 'CMYK', 'YCbCr') else 'tif' if mode == 'I' else 'png'}"
    image.save(path)
    photo = read_photo(path)
    assert photo.shape == (120, 240, 3) and photo.dtype == np.uint8
    if mode not in ("1", "P"):
        wanted = picture if mode in ("RGB", "RGBA", "CMYK", "YCbCr") else np.repeat(np.asarray(image.convert("L") if mode in ("L", "LA") else Image.fromarray(picture[..., 1]))[..., None], 3, 2)
        assert np.abs(photo.astype(int) - wanted).mean() < 12


@pytest.mark.parametrize("orientation, shape", [(1, (100, 240)), (3, (100, 240)), (6, (240, 100)), (8, (240, 100))])
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_exif_orientation(tmp_path, orientation, shape, suffix):
    exif = Image.Exif()
    exif[274] = orientation
    picture = grass(0, (100, 240))
    picture[:20, :20] = 255
    Image.fromarray(picture).save(tmp_path / f"a.{suffix}", exif=exif)
    photo = read_photo(tmp_path / f"a.{suffix}")
    corner = {1: np.s_[:15, :15], 3: np.s_[-15:, -15:], 6: np.s_[:15, -15:], 8: np.s_[-15:, :15]}[orientation]
    assert photo.shape[:2] == shape and photo[corner].mean() > 230


def test_refusals_name_the_file(tmp_path):
    Image.fromarray(grass(0)).save(tmp_path / "good.jpg")
    whole = (tmp_path / "good.jpg").read_bytes()
    bad = {"zero.jpg": b"", "half.jpg": whole[: len(whole) // 2], "tail.jpg": whole[:-2000], "text.jpg": b"image_id,path\n" * 50,
           "magic.jpg": whole[:3], "png.png": b"\x89PNG\r\n\x1a\n" + b"0" * 100}
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.jpg")
    Image.new("F", (100, 100)).save(tmp_path / "float.tif")
    (tmp_path / "dir.jpg").mkdir()
    for name in [*bad, "dot.jpg", "float.tif", "dir.jpg", "absent.jpg"]:
        with pytest.raises(InputError) as told:
            read_photo(tmp_path / name)
        assert name in str(told.value) and "\n" not in str(told.value) and len(str(told.value)) < 400


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


# --- files with a hole -----------------------------------------------------------------------------------------------------
def jpeg(picture: np.ndarray, *how: int) -> bytes:
    return cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 92, *how])[1].tobytes()


KINDS = {"plain": (), "4:4:4": (cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444), "4:2:2": (cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_422),
         "restarts": (cv2.IMWRITE_JPEG_RST_INTERVAL, 40), "optimised": (cv2.IMWRITE_JPEG_OPTIMIZE, 1), "coarse": (cv2.IMWRITE_JPEG_QUALITY, 20), "coarse, optimised": (cv2.IMWRITE_JPEG_QUALITY, 20, cv2.IMWRITE_JPEG_OPTIMIZE, 1)}


@pytest.mark.parametrize("how", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("where", [0.1, 0.5, 0.85])
def test_a_file_with_a_hole_is_refused(where, how):
    "A quarter of the bytes is gone and the end is there; what is left is no picture of a quadrat."
    content = jpeg(grass(1, (400, 800)), *how)
    holed = content[: int(where * len(content))] + content[min(len(content) - 2, int((where + 0.25) * len(content))) :]
    with pytest.raises(InputError, match="ID7.jpg: its lower part is missing"):
        decode_photo(holed, "ID7.jpg")


@pytest.mark.parametrize("how", [*KINDS.values(), (cv2.IMWRITE_JPEG_PROGRESSIVE, 1)], ids=[*KINDS, "progressive"])
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
    told = exif.tobytes()
    return content[:2] + b"\xff\xe1" + (len(told) + 2).to_bytes(2, "big") + told + content[2:]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_hole_is_told_from_a_margin_however_the_camera_was_held(orientation):
    content, picture = jpeg(grass(1, (400, 800))), grass(2, (400, 800))
    with pytest.raises(InputError, match="its lower part is missing"):
        decode_photo(turned(content[: len(content) // 3] + content[len(content) // 2 :], orientation))
    for margin in (np.s_[360:], np.s_[:40], np.s_[:, 760:], np.s_[:, :40]):
        framed = picture.copy()
        framed[margin] = 20
        assert sorted(decode_photo(turned(jpeg(framed), orientation)).shape) == [3, 400, 800]


def pillow(image: Image.Image, form: str, **how) -> bytes:
    file = io.BytesIO()
    image.save(file, form, quality=92, **how)
    return file.getvalue()


def of_kind(kind: str, picture: np.ndarray, gap: slice = slice(0, 0)) -> bytes:
    "The picture as a camera or a phone may write it, the bytes of `gap` (shares of the file) missing."
    image = Image.fromarray(picture)
    content = pillow(image.convert({"grey": "L", "cmyk": "CMYK"}.get(kind, "RGB")), "JPEG")
    content = content[: int(gap.start * len(content))] + content[int(gap.stop * len(content)) :]
    preview = pillow(image.resize((160, 80)), "JPEG")
    if kind == "mpo":  # two pictures in one file: the second starts where the first ends
        whole = pillow(image, "MPO", save_all=True, append_images=[image.resize((160, 80))])
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
        wanted = framed if kind != "grey" else np.repeat(np.asarray(Image.fromarray(framed).convert("L"))[..., None], 3, 2)
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


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("form", ["PNG", "WEBP", "JPEG and bytes"])
def test_odd_exif_turns_a_photo_and_stops_none(form):
    "Tags that Pillow reads and cannot write (a number of bits of 100000), and tags that nobody can read."
    picture = grass(5, (100, 240))
    picture[:20, :20] = 255
    odd = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + struct.pack("<HHII", 258, 4, 1, 100_000) + struct.pack("<HHIHH", 274, 3, 1, 6, 0) + b"\0" * 4

    def save(exif: bytes) -> bytes:
        return pillow(Image.fromarray(picture), form.split()[0], exif=exif) + (b"more" if "bytes" in form else b"")

    with pytest.raises(struct.error):
        ImageOps.exif_transpose(Image.open(io.BytesIO(save(odd))))
    photo = decode_photo(save(odd))
    assert photo.shape == (240, 100, 3) and photo[:15, -15:].mean() > 230
    assert decode_photo(save(b"Exif\0\0II*\0\xff\xff\xff\xff")).shape == (100, 240, 3)


# --- whoever looks first ---------------------------------------------------------------------------------------------------
def write_paddock(folder, n: int = 12):
    from nbs_lib.demo import write_demo

    return write_demo(folder / "in", n_train=n, n_test=2, sites=4, width=240, workers=1)


@pytest.mark.parametrize("fault", ["half", "dot", "huge", "text", "folder"])
def test_the_first_stage_refuses_what_the_second_would(tmp_path, fault):
    folder = write_paddock(tmp_path)
    photo = sorted((folder / "train").glob("*.jpg"))[3]
    content = photo.read_bytes()
    if fault == "dot":
        Image.new("RGB", (1, 1)).save(photo)
    else:
        photo.write_bytes({"half": content[: len(content) // 2], "huge": claim_size(content, 20000, 10000), "text": b"image_id,path\n", "folder": b""}[fault])
    if fault == "folder":
        photo.unlink()
        photo.mkdir()
    with pytest.raises(InputError, match=photo.name) as told:
        run_eda(open_run(folder, tmp_path / "out", "demo"))
    assert "\n" not in str(told.value)
    assert not (tmp_path / "out/artefacts/eda").exists()


def test_a_standing_photo_is_looked_at_lying(tmp_path):
    picture = grass(4, (400, 800))
    picture[:, :100] = (250, 20, 20)
    Image.fromarray(np.rot90(picture, -1)).save(tmp_path / "stands.png")
    assert (lying(read_photo(tmp_path / "stands.png")) == picture).all()
    assert describe_photo(tmp_path / "stands.png")[1][:, :28].mean((0, 1)) == pytest.approx((250, 20, 20), abs=3)


def test_facts_do_not_depend_on_how_a_photo_lies(tmp_path):
    from nbs_lib.data import read_competition

    folder = write_paddock(tmp_path)
    before, _ = describe_photos(read_competition(folder))
    for photo in (folder / "train").glob("*.jpg"):
        turned = np.rot90(read_photo(photo), -1)
        Image.fromarray(turned).save(photo, format="PNG")  # a PNG inside .jpg: nothing is lost
    assert describe_photos(read_competition(folder))[0].equals(before)
