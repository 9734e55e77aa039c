"""Everything that is wrong with real data: each gives one clear error that names the file, or a listed skip, and nothing is silently wrong."""
import csv
import gzip
import json
import os
import struct
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_files import ct_series, dicom, nifti
from PIL import Image

from tasl_lab.core import InputError
from tasl_lab.data.folders import from_folder, from_manifest
from tasl_lab.data.readers import Picture, read, read_all, read_series

R = np.random.default_rng(0)
GREY, VOLUME = R.integers(1, 255, (12, 16)).astype(np.uint8), R.normal(100, 9, (4, 5, 6)).astype(np.float32)
TEST_FILES = Path(pydicom.__file__).parent / "data" / "test_files"


def png(path, x=GREY):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(x).save(path)
    return path


def saved(name, x=GREY, keep=1., **how):
    "A maker of a picture of which the share `keep` of its bytes is left."
    def make(d):
        Image.fromarray(x).save(d / name, **how)
        data = (d / name).read_bytes()
        (d / name).write_bytes(data[:int(len(data) * keep)])
    return make


def text(name, data=b"plain text"): return lambda d: (d / name).write_bytes(data)


def tiff(name, x, keep=1., **how):
    def make(d):
        tifffile.imwrite(d / name, x, **how)
        (d / name).write_bytes((d / name).read_bytes()[:int((d / name).stat().st_size * keep)])
    return make


def png_of(width, height):
    "A PNG file that promises a size and holds nothing."
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def scan(name="a.nii", x=VOLUME, affine=None, keep=1., patch=()):
    "A maker of a NIfTI file; `patch` overwrites bytes of its header: (offset, format, values)."
    def make(d):
        nifti(d / name, x, affine)
        data = bytearray((d / name).read_bytes())
        for at, kind, *values in patch: struct.pack_into(kind, data, at, *values)
        (d / name).write_bytes(bytes(data[:int(len(data) * keep)]))
    return make


def gz(name, keep=1., spoil=False):
    def make(d):
        nifti(d / "x.nii", VOLUME)
        data = bytearray(gzip.compress((d / "x.nii").read_bytes()))
        (d / "x.nii").unlink()
        if spoil: data[len(data) // 2] ^= 255
        (d / name).write_bytes(bytes(data[:int(len(data) * keep)]))
    return make


def dcm(name="a.dcm", **fields): return lambda d: dicom(d / name, GREY, **fields)


def copy(name): return lambda d: (d / Path(name).name).write_bytes((TEST_FILES / name).read_bytes())


def animated(name, **how):
    def make(d): Image.fromarray(GREY).save(d / name, save_all=True, append_images=[Image.fromarray(x.copy()) for x in (GREY[::-1], GREY[:, ::-1])], **how)
    return make


def pages(d):
    with tifffile.TiffWriter(d / "a.tif") as f:
        f.write(GREY)
        f.write(GREY[:5])


def ring(d): (d / "a.tif").write_bytes(b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", 0) + struct.pack("<I", 8))


def compressed(d):
    ds = pydicom.dcmread(dicom(d / "a.dcm", GREY))
    ds.file_meta.TransferSyntaxUID = pydicom.uid.JPEG2000Lossless
    ds.PixelData = pydicom.encaps.encapsulate([b"\xff\x4f nothing of the kind"])
    ds.save_as(d / "a.dcm")


def cut_dicom(d):
    data = dicom(d / "a.dcm", GREY).read_bytes()
    (d / "a.dcm").write_bytes(data[:-100])


SHEAR = np.array([[1, 0, 0, 0], [0, 1, .3, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
NAN = VOLUME.copy()
NAN[1, 2, 3] = np.nan
NO_FORMS = [(252, "<hh", 0, 0)]

FILES = {  # what makes a bad file, and words of its error
    "empty": (text("a.png", b""), "empty file"),
    "text named png": (text("a.png"), "contents are not PNG"),
    "text named tif": (text("a.tif"), "contents are not TIFF"),
    "text named nii": (text("a.nii"), "contents are not NIfTI"),
    "text named dcm": (text("a.dcm"), "contents are not DICOM"),
    "zeros named dcm": (text("a.dcm", bytes(500)), "contents are not DICOM"),
    "signature alone, png": (text("a.png", b"\x89PNG\r\n\x1a\n"), "cannot be read as PNG"),
    "signature alone, jpeg": (text("a.jpg", b"\xff\xd8\xff"), "cannot be read as JPEG"),
    "signature alone, tiff": (text("a.tif", b"II*\0"), "cannot be read as TIFF"),
    "signature alone, dicom": (text("a.dcm", bytes(128) + b"DICM"), "without a picture's description"),
    "truncated png": (saved("a.png", keep=.6), "cannot be read as PNG"),
    "truncated jpeg": (saved("a.jpg", keep=.8), "cannot be read as JPEG"),
    "truncated tiff": (tiff("a.tif", GREY, keep=.5), "TIFF"),
    "truncated lzw tiff": (saved("a.tif", keep=.5, compression="tiff_lzw"), "TIFF"),
    "truncated bmp": (saved("a.bmp", keep=.5), "cannot be read as BMP"),
    "truncated webp": (saved("a.webp", keep=.5), "cannot be read as WebP"),
    "truncated gif": (saved("a.gif", keep=.5), "cannot be read as GIF"),
    "no pixel png": (text("a.png", png_of(0, 0)), "a.png"),
    "a promise of pixels": (text("a.png", png_of(9, 9)), "cannot be read as PNG"),
    "a bomb": (text("a.png", png_of(200_000, 200_000)), "a.png"),
    "animated gif": (animated("a.gif"), "animation of 3 frames; name one with page=0"),
    "animated png": (animated("a.png"), "animation of 3 frames"),
    "animated webp": (animated("a.webp", lossless=True), "animation of 3 frames"),
    "tiff in LAB": (lambda d: Image.merge("LAB", [Image.fromarray(GREY)] * 3).save(d / "a.tif"), "colours of kind"),
    "complex tiff": (tiff("a.tif", GREY.astype(np.complex64)), "complex64"),
    "nan tiff": (tiff("a.tif", np.full((4, 4), np.nan, np.float32)), "16 of 16 values are nan"),
    "infinite tiff": (tiff("a.tif", np.full((4, 4), np.inf, np.float32)), "nan or infinite"),
    "too great for a float": (tiff("a.tif", np.full((4, 4), 1e300)), "nan or infinite"),
    "pages of two sizes": (pages, "pages of different sizes"),
    "four axes in a tiff": (tiff("a.tif", np.zeros((2, 3, 4, 5), np.uint8), imagej=True, metadata={"axes": "TZYX"}), "save one channel axis"),
    "a ring of pages": (ring, "a.tif"),
    "truncated nifti": (scan(keep=.7), "cannot be read as NIfTI"),
    "a header alone": (scan(keep=352 / 832), "cannot be read as NIfTI"),
    "truncated nii.gz": (gz("a.nii.gz", .7), "a.nii.gz"),
    "spoilt nii.gz": (gz("a.nii.gz", spoil=True), "a.nii.gz"),
    "gzipped text": (text("a.nii.gz", gzip.compress(b"text")), "contents are not NIfTI"),
    "not gzipped": (text("a.nii.gz", b"\x1f\x8b text"), "a.nii.gz"),
    "nan nifti": (scan(x=NAN), "1 of 120 values are nan"),
    "complex nifti": (scan(x=VOLUME.astype(np.complex64)), "complex64"),
    "six axes": (scan(x=np.zeros((2, 2, 2, 2, 2), np.float32)), "keep three axes of space"),
    "no voxels": (scan(patch=[(40, "<8h", 3, 0, 5, 6, 1, 1, 1, 1)]), "empty"),
    "negative size": (scan(patch=[(40, "<8h", 3, -4, 5, 6, 1, 1, 1, 1)]), "a.nii"),
    "vast size": (scan(patch=[(40, "<8h", 4, 32767, 32767, 32767, 32767, 1, 1, 1)]), "more than"),
    "unknown type": (scan(patch=[(70, "<h", 999)]), "cannot be read as NIfTI"),
    "size in the other byte order": (scan(patch=[(40, ">8h", 3, 4, 5, 6, 1, 1, 1, 1)]), "a.nii"),
    "affine of nan": (scan(patch=[(280, "<f", float("nan"))]), "affine map holds nan"),
    "affine of zeros": (scan(patch=[(280, "<12f", *[0.] * 12)]), "spacing"),
    "sheared": (scan(affine=SHEAR), "sheared by"),
    "no spacing": (scan(patch=[*NO_FORMS, (80, "<3f", 0, 1, 1)]), "a.nii"),
    "nan spacing": (scan(patch=[*NO_FORMS, (80, "<3f", float("nan"), 1, 1)]), "a.nii"),
    "vast spacing": (scan(affine=np.diag([1e6, 1, 1, 1])), "below 10,000"),
    "nan slope": (scan(x=VOLUME.astype(np.int16), patch=[(112, "<ff", 1e38, 1e38)]), "nan or infinite"),
    "truncated dicom": (cut_dicom, "bytes of pixel data is less than expected"),
    "dicom without rows": (dcm(Rows=None), "a.dcm"),
    "dicom of no rows": (dcm(Rows=0), "empty"),
    "more frames than pixels": (dcm(NumberOfFrames=3), "a.dcm"),
    "seven bits allocated": (dcm(BitsAllocated=7), "a.dcm"),
    "unknown photometric": (dcm(PhotometricInterpretation="MONOCHROME9"), "a.dcm"),
    "five samples": (dcm(SamplesPerPixel=5), "a.dcm"),
    "spacing of zero": (dcm(PixelSpacing=[0, 1]), "PixelSpacing is [0.0, 1.0]"),
    "one number of spacing": (dcm(PixelSpacing=[1]), "PixelSpacing"),
    "position without spacing": (dcm(ImagePositionPatient=[0, 0, 0], ImageOrientationPatient=[1, 0, 0, 0, 1, 0]), "no PixelSpacing"),
    "two numbers of position": (dcm(PixelSpacing=[1, 1], ImagePositionPatient=[0, 0], ImageOrientationPatient=[1, 0, 0, 0, 1, 0]), "ImagePositionPatient"),
    "directions not at right angles": (dcm(PixelSpacing=[1, 1], ImagePositionPatient=[0] * 3, ImageOrientationPatient=[1, 0, 0, 1, 0, 0]), "right angles"),
    "a dose": (dcm(Modality="RTDOSE"), "RTDOSE, not a picture"),
    "a segmentation": (dcm(Modality="SEG"), "SEG, not a picture"),
    "garbage in JPEG 2000": (compressed, "a.dcm"),
    "pydicom: truncated": (copy("MR_truncated.dcm"), "less than expected"),
    "pydicom: bad VR": (copy("badVR.dcm"), "cannot be read as DICOM"),
    "pydicom: no preamble": (copy("no_meta.dcm"), "contents are not DICOM"),
    "pydicom: no group length": (copy("no_meta_group_length.dcm"), "without a picture's description"),
    "pydicom: no transfer syntax": (copy("meta_missing_tsyntax.dcm"), "meta_missing_tsyntax.dcm"),
    "pydicom: private sequence": (copy("priv_SQ.dcm"), "without a picture's description"),
    "pydicom: nested sequence": (copy("nested_priv_SQ.dcm"), "without a picture's description"),
    "pydicom: unknown sequence": (copy("UN_sequence.dcm"), "without a picture's description"),
    "pydicom: empty character set": (copy("empty_charset_LEI.dcm"), "without a picture's description"),
    "pydicom: report": (copy("reportsi.dcm"), "without pixels (Basic Text SR Storage)"),
    "pydicom: report with gaps": (copy("reportsi_with_empty_number_tags.dcm"), "without pixels"),
    "pydicom: plan": (copy("rtplan.dcm"), "without pixels (RT Plan Storage)"),
    "pydicom: plan, truncated": (copy("rtplan_truncated.dcm"), "without pixels"),
    "pydicom: contours": (copy("rtstruct.dcm"), "without pixels"),
    "pydicom: dose": (copy("rtdose.dcm"), "RTDOSE, not a picture"),
    "pydicom: an ECG": (copy("waveform_ecg.dcm"), "without pixels (12-lead ECG"),
    "pydicom: a segmentation": (copy("liver_1frame.dcm"), "SEG, not a picture"),
    "pydicom: delimiter in JPEG 2000": (copy("JPEG2000-embedded-sequence-delimiter.dcm"), "no decoder could read its JPEG 2000"),
    "pydicom: empty directory": (copy("dicomdirtests/DICOMDIR"), "without a picture's description"),
    "a folder named png": (lambda d: (d / "a.png").mkdir(), "not a file"),
    "a link to nothing": (lambda d: os.symlink(d / "gone", d / "a.png"), "no such file"),
    "a link to itself": (lambda d: os.symlink(d / "a.png", d / "a.png"), "no such file"),
    "a pipe": (lambda d: os.mkfifo(d / "a.png"), "not a file"),
    "another kind of file": (text("a.mp4"), "not a picture that is known"),
    "a very long name": (text("a" * 200 + "\u00fc\u4e16.png"), "contents are not PNG"),
    "garbage named nrrd": (text("a.nrrd", b"NRRD0004\ntype: float\n\nx"), "a.nrrd"),
    "garbage named mha": (text("a.mha", b"ObjectType = Image\nNDims = 3\n"), "a.mha"),
}


REMEDIES = ("add", "allowed", "both must", "choose", "convert", "correct", "cut", "did you mean", "divide", "drop", "expected", "give", "have it", "keep",
            "leave", "mend", "name", "pip install", "put", "read", "remove", "rename", "resample", "save", "use", "widen")


def check(e, *words):
    "One sentence that names what is wrong and the remedy."
    said = str(e)
    assert "\n" not in said and all(w in said for w in words), said
    assert any(f" {w}" in said for w in REMEDIES), f"names no remedy: {said}"


def bad_file(folder):
    found = [p for p in folder.iterdir()]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_is_refused_or_skipped(tmp_path, name):
    make, words = FILES[name]
    folder = tmp_path / "x"
    folder.mkdir()
    make(folder)
    if name.startswith("garbage named"): pytest.importorskip("SimpleITK", reason="NRRD and MetaImage need SimpleITK: pip install tasl-lab[formats]")
    file = bad_file(folder)
    with pytest.raises(InputError) as e: read(file)
    check(e.value, words, file.name)
    good = png(tmp_path / "good.png")
    found, skipped = read_all([good, file], errors="skip")
    assert list(found) == [good] and skipped == [str(e.value)]


def without(k): return lambda d: sorted(d.iterdir())[k].unlink()


def change(k, **fields):
    def make(d):
        file = sorted(d.iterdir())[k]
        ds = pydicom.dcmread(file)
        for name, v in fields.items(): setattr(ds, name, v)
        ds.save_as(file)
    return make


def fewer_rows(d):
    file = sorted(d.iterdir())[2]
    dicom(file, GREY, PixelSpacing=[.7, .8], ImagePositionPatient=[-10, -20, 30], ImageOrientationPatient=[1, 0, 0, 0, 1, 0])


def no_position(d):
    file = sorted(d.iterdir())[1]
    ds = pydicom.dcmread(file)
    del ds.ImagePositionPatient
    ds.save_as(file)


SERIES = {
    "missing slice": ({}, without(0), "1 missing slice,"),
    "doubled slice": ({}, change(0, ImagePositionPatient=[-10, -20, 30]), "lie in one place"),
    "mixed spacing": ({}, change(0, ImagePositionPatient=[-10, -20, 46.5]), "spacing is mixed"),
    "tilted gantry": ({"shear": 1.}, None, "gantry was tilted by 11.3 degrees"),
    "another direction": ({}, change(1, ImageOrientationPatient=[1, 0, 0, 0, 0, -1]), "another direction"),
    "another size": ({}, fewer_rows, "differ in Rows"),
    "another patient": ({}, change(1, PatientID="B"), "differ in the patient"),
    "other pixels": ({}, change(1, PixelSpacing=[.5, .5]), "spacing is mixed"),
    "no position": ({}, no_position, "carries no position"),
    "infinite position": ({}, change(1, ImagePositionPatient=[0, 0, "1e999"]), "ImagePositionPatient"),
    "text among the slices": ({}, lambda d: (d / "z.dcm").write_text("text"), "z.dcm"),
    "no slices": ({}, lambda d: [f.unlink() for f in d.iterdir()], "no files"),
}


@pytest.mark.parametrize("name", SERIES)
def test_a_bad_series_is_refused(tmp_path, name):
    how, spoil, words = SERIES[name]
    folder = tmp_path / "ct"
    ct_series(folder, **how)
    if spoil: spoil(folder)
    with pytest.raises(InputError) as e: read_series(folder)
    check(e.value, words)


VOC = "<annotation><size><width>{w}</width><height>12</height></size><object><name>a</name><bndbox><xmin>{x}</xmin><ymin>2</ymin>" \
      "<xmax>9</xmax><ymax>8</ymax></bndbox></object></annotation>"


def beside(name, x):
    "A good picture with a mask `x`."
    def make(d):
        png(d / "p.png")
        if name.endswith(".nii"): (d / "p.png").unlink(); nifti(d / "p.nii", VOLUME); nifti(d / name, *x)
        elif name.endswith(".tif"): tifffile.imwrite(d / name, x)
        else: png(d / name, x)
    return make


def noted(name, words):
    "A good picture with an annotation file."
    def make(d):
        png(d / "p.png")
        (d / name).write_text(words)
    return make


def coco(**changes):
    def make(d):
        png(d / "p.png")
        base = {"images": [{"id": 0, "file_name": "p.png", "height": 12, "width": 16}], "categories": [{"id": 1, "name": "a"}],
                "annotations": [{"image_id": 0, "category_id": 1, "bbox": [1, 2, 3, 4]}]}
        (d / "n.json").write_text(json.dumps(base | changes))
    return make


def note(**changes): return coco(annotations=[{"image_id": 0, "category_id": 1, "bbox": [1, 2, 3, 4]} | changes])


def several(**files):
    def make(d):
        for name, x in files.items(): png(d / f"{name}.png", x) if x.ndim < 3 or x.shape[-1] == 3 else nifti(d / f"{name}.nii", x)
    return make


def two_and_three(d):
    png(d / "a.png", np.stack([GREY] * 3, -1))
    tifffile.imwrite(d / "b.tif", np.stack([GREY] * 2), photometric="minisblack", metadata={"axes": "CYX"})


MASK = (GREY > 100).astype(np.uint8)
SETS = {  # what makes a folder, options, words of its error
    "constant picture": (several(a=GREY * 0 + 7), {}, "holds the value 7 everywhere"),
    "constant volume": (lambda d: nifti(d / "a.nii", VOLUME * 0), {}, "holds the value 0.0 everywhere"),
    "mask off by one": (beside("p_mask.png", MASK[:, 1:]), {}, "the mask is 12 x 15, its picture p.png 12 x 16"),
    "mask in colours": (beside("p_mask.png", R.integers(0, 9, (12, 16, 3)).astype(np.uint8)), {}, "a mask in colours"),
    "mask of fractions": (beside("p_mask.tif", MASK + np.float32(.5)), {}, "whole class numbers"),
    "mask beyond 255": (beside("p_mask.tif", MASK.astype(np.uint16) * 300), {}, "from 0 to 300"),
    "mask below 0": (beside("p_mask.tif", -MASK.astype(np.int16)), {}, "from -1 to 0"),
    "mask elsewhere in space": (beside("p_seg.nii", (np.uint8(VOLUME > 100), np.diag([1, 1, 1.5, 1]))), {}, "mm away from its picture"),
    "mask one slice short": (beside("p_seg.nii", (np.uint8(VOLUME[:, :, 1:] > 100),)), {}, "both must have one size"),
    "mask without picture": (several(a=GREY, b_mask=MASK), {}, "a mask without a picture"),
    "empty mask": (lambda d: (png(d / "p.png"), (d / "p_mask.png").write_bytes(b"")), {}, "an empty file"),
    "more classes than names": (beside("p_mask.png", MASK * 3), {"classes": {"regions": ["none", "one"]}}, "the masks hold class 3"),
    "two pictures, one mask": (lambda d: (png(d / "p.png"), png(d / "p.bmp", GREY), png(d / "p_mask.png", MASK)), {}, "another picture has this name"),
    "VOC box of no width": (noted("p.xml", VOC.format(w=16, x=10)), {}, "has no width or height"),
    "VOC box outside": (noted("p.xml", VOC.format(w=16, x=-9)), {}, "reaches outside the picture"),
    "VOC box of nan": (noted("p.xml", VOC.format(w=16, x="nan")), {}, "is not four numbers"),
    "VOC of another size": (noted("p.xml", VOC.format(w=17, x=2)), {}, "boxes would be misplaced"),
    "VOC without corner": (noted("p.xml", VOC.format(w=16, x="")), {}, "lacks a name or one of xmin"),
    "VOC of broken XML": (noted("p.xml", "<annotation>"), {}, "not readable XML"),
    "YOLO of text": (noted("p.txt", "a cell"), {}, "expected class x y width height"),
    "YOLO in pixels": (noted("p.txt", "0 8 6 4 4"), {}, "shares from 0 to 1"),
    "YOLO of half a class": (noted("p.txt", ".5 .5 .5 .1 .1"), {}, "class 0.5"),
    "YOLO box of no size": (noted("p.txt", "0 .5 .5 0 .1"), {}, "has no width or height"),
    "COCO box of no size": (note(bbox=[1, 2, 0, 4]), {}, "has no width or height"),
    "COCO box of text": (note(bbox="1 2 3 4"), {}, "annotations[0] has bbox"),
    "COCO box outside": (note(bbox=[10, 2, 9, 4]), {}, "reaches outside the picture"),
    "COCO of no such category": (note(category_id=9), {}, "category_id 9"),
    "COCO of no such picture": (note(image_id=9), {}, "image_id 9"),
    "COCO of another size": (coco(images=[{"id": 0, "file_name": "p.png", "height": 16, "width": 12}]), {}, "boxes would be misplaced"),
    "COCO picture gone": (coco(images=[{"id": 0, "file_name": "q.png"}], annotations=[]), {}, "'q.png' (id 0) is missing"),
    "COCO without categories": (coco(categories=None), {}, "no list 'categories'"),
    "COCO broken": (noted("n.json", '{"annotations": ['), {}, "not valid JSON"),
    "boxes of a volume": (lambda d: (nifti(d / "p.nii", VOLUME), (d / "p.txt").write_text("0 .5 .5 .1 .1")), {}, "boxes of a volume"),
    "flat and deep together": (lambda d: (png(d / "a.png"), nifti(d / "b.nii", VOLUME)), {}, "read volumes and pictures apart"),
    "two and three channels": (two_and_three, {}, "channels, others have 3"),
    "masks of two sizes": (lambda d: [png(d / f"{n}{m}.png", x) for n, x in (("a", GREY), ("b", GREY[:8])) for m in ("", "_mask")], {}, "2 sizes"),
    "no spacing to resample": (several(a=GREY), {"spacing": 1.}, "its spacing is not known"),
    "spacing that would fill the memory": (lambda d: nifti(d / "a.nii", VOLUME, np.diag([900, 900, 900, 1])), {"spacing": .01}, "choose a wider spacing"),
    "no window in the file": (several(a=GREY), {"window": "file"}, "states no window"),
    "patient pattern that misses": (several(a=GREY), {"patient": r"P\d+"}, "does not match this name"),
    "unknown modality": (several(a=GREY), {"modality": "photo"}, "modality 'photo'"),
    "unknown cut": (several(a=GREY), {"cut": "oblique"}, "cut 'oblique'"),
    "window upside down": (several(a=GREY), {"window": (9, 1)}, "the lower first"),
    "size of nothing": (several(a=GREY), {"size": 0}, "size 0"),
    "size for the wrong axes": (several(a=GREY), {"size": (8, 8, 8)}, "or 2"),
    "empty folder": (lambda d: None, {}, "holds no picture"),
    "text alone": (lambda d: (d / "README.md").write_text("hello"), {}, "holds no picture"),
    "a file for a folder": (lambda d: png(d / "a.png"), {"at": "a.png"}, "expected a folder"),
    "no such folder": (lambda d: None, {"at": "gone"}, "no such file or folder"),
    "a name no system can hold": (lambda d: None, {"at": "n" * 5000}, "no such file or folder"),
    "series with a gap": (lambda d: (ct_series(d / "ct"), without(0)(d / "ct")), {}, "1 missing slice,"),
}


@pytest.mark.parametrize("name", SETS)
def test_a_bad_folder_is_refused_and_never_read_wrongly(tmp_path, name):
    make, options, words = SETS[name]
    folder = tmp_path / "d"
    folder.mkdir()
    make(folder)
    at, options = folder / options.get("at", ""), {k: v for k, v in options.items() if k != "at"}
    with pytest.raises(InputError) as e: from_folder(at, salt="s", **options)
    check(e.value, words)
    try: found = from_folder(at, salt="s", errors="skip", **options)
    except InputError as e: check(e, words)                       # nothing else is left, or the whole cannot be read
    else: assert [s for s in found.skipped if words in s] and "skipped" in found.info.note and str(folder) not in found.info.note


TABLE = "file,patient,label,target:age,spacing,split,boxes,page,mask,site\n"
ROW = "p.png,A,ill,50,1,train,,,,\n"
TABLES = {  # text of a table, words of its error
    "no rows": (TABLE, "without rows"),
    "empty": ("", "an empty table"),
    "blanks": (" \n\n", "an empty table"),
    "no file column": ("picture,label\np.png,a\n", "no column 'file'"),
    "misspelt column": ("file,lable\np.png,a\n", "did you mean 'label'?"),
    "misspelt patient": ("file,patinet\np.png,a\n", "did you mean 'patient'?"),
    "two of one name": ("file,label,label\np.png,a,b\n", "two columns are named 'label'"),
    "two of one meaning": ("file,label,class\np.png,a,b\n", "both mean 'label:class'"),
    "a ragged row": (TABLE + "p.png,A\n", "row 2 has 2 values for 10 columns"),
    "an open quote": (TABLE + '"p.png,A\n', "not a readable table"),
    "zero bytes": (TABLE + ROW + "\0", "zero bytes"),
    "a file that is gone": (TABLE + ROW.replace("p.png", "q.png"), "row 2: 'file' is 'q.png', which does not exist"),
    "no file named": (TABLE + ROW.replace("p.png", ""), "row 2: 'file' is empty"),
    "a name no system can hold": (TABLE + ROW.replace("p.png", "n" * 5000), "does not exist"),
    "the same file twice": (TABLE + ROW + ROW, "row 3 names 'p.png' again, as row 2 did"),
    "age of text": (TABLE + ROW.replace("50", "old"), "row 2: 'target:age' is 'old'"),
    "age of infinity": (TABLE + ROW.replace("50", "inf"), "give finite numbers"),
    "two ages": (TABLE + ROW.replace("50", "50 60"), "give one number"),
    "spacing of text": (TABLE + ROW.replace(",1,", ",wide,"), "row 2: 'spacing' is 'wide'"),
    "spacing of zero": (TABLE + ROW.replace(",1,", ",0,"), "above 0"),
    "three numbers of spacing": (TABLE + ROW.replace(",1,", ",1 2 3,"), "3 numbers of spacing for 2 axes"),
    "unknown split": (TABLE + ROW.replace("train", "holdout"), "row 2: 'split' is 'holdout'"),
    "split of one row only": (TABLE + ROW + ROW.replace("p.png", "r.png").replace("train", ""), "has no split, others have"),
    "a patient in two splits": (TABLE + ROW + ROW.replace("p.png", "r.png").replace("train", "test"), "more than one split"),
    "boxes of text": ('file,boxes\np.png,none\n', "give [[y0, x0, y1, x1"),
    "box of four": ('file,boxes\np.png,"[[1, 2, 3, 4]]"\n', "give [[y0, x0, y1, x1"),
    "box of no size": ('file,boxes\np.png,"[[1, 2, 1, 4, 0]]"\n', "has no width or height"),
    "box outside": ('file,boxes\np.png,"[[1, 2, 99, 4, 0]]"\n', "reaches outside the picture"),
    "a page that is not there": ("file,page\np.png,3\n", "page 3 of 1"),
    "half a page": ("file,page\np.png,.5\n", "whole number from 0"),
    "a mask that is gone": ("file,mask\np.png,m.png\n", "'mask' is 'm.png', which does not exist"),
    "a label nobody gave": ("file,label\np.png,\n", "label 'class' is empty everywhere"),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_bad_manifest_is_refused_and_never_read_wrongly(tmp_path, name):
    said, words = TABLES[name]
    for n in ("p", "r"): png(tmp_path / f"{n}.png")
    (tmp_path / "m.csv").write_text(said)
    with pytest.raises(InputError) as e: from_manifest(tmp_path / "m.csv", salt="s")
    check(e.value, words)
    try: found = from_manifest(tmp_path / "m.csv", salt="s", errors="skip")
    except InputError as e: check(e, words)
    else: assert [s for s in found.skipped if words in s]


ODD = {
    "no such table": (lambda d: d / "gone.csv", {}, "no such table"),
    "a table in UTF-16": (lambda d: wrote(d / "m.csv", (TABLE + ROW).encode("utf-16")), {}, "save it as UTF-8"),
    "garbage named parquet": (lambda d: wrote(d / "m.parquet", b"PAR1 garbage PAR1"), {}, "not a readable Parquet table"),
    "a mapped column that is not there": (lambda d: wrote(d / "m.csv", (TABLE + ROW).encode()), {"columns": {"who": "patient"}}, "no column 'who'"),
    "a column mapped to nothing": (lambda d: wrote(d / "m.csv", (TABLE + ROW).encode()), {"columns": {"site": "place"}}, "columns['site'] is 'place'"),
    "a label that is not allowed": (lambda d: wrote(d / "m.csv", (TABLE + ROW).encode()), {"classes": {"class": ["well"]}}, "class is 'ill'; allowed are well"),
    "errors of another kind": (lambda d: wrote(d / "m.csv", (TABLE + ROW).encode()), {"errors": "ignore"}, "errors 'ignore'"),
}


def wrote(path, data):
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("name", ODD)
def test_an_odd_manifest_is_refused(tmp_path, name):
    make, options, words = ODD[name]
    png(tmp_path / "p.png")
    with pytest.raises(InputError) as e: from_manifest(make(tmp_path), salt="s", **options)
    check(e.value, words)


def test_how_many_bad_inputs_there_are(capsys):
    parts = {"files": FILES, "series": SERIES, "folders": SETS, "tables": TABLES, "odd tables": ODD}
    total = sum(map(len, parts.values()))
    with capsys.disabled(): print(f"\nbad inputs: {total} ({', '.join(f'{len(v)} {k}' for k, v in parts.items())})")
    assert total >= 60


def test_the_two_boxes_of_the_blood_cells(extra_data, tmp_path):
    "Real boxes without size, as published."
    folder = extra_data("bccd")
    d = json.loads((folder / "annotations.json").read_text())
    bad = {a["image_id"] for a in d["annotations"] if min(a["bbox"][2:]) <= 0}
    d["images"] = [row for row in d["images"] if row["id"] in bad]
    d["annotations"] = [a for a in d["annotations"] if a["image_id"] in bad]
    (tmp_path / "n.json").write_text(json.dumps(d))
    os.symlink(folder / "images", tmp_path / "images")
    found = from_folder(tmp_path, 64, errors="skip", salt="s")
    assert len(bad) == len(found) == len(found.skipped) == 2 and sum(map(len, found.boxes)) == len(d["annotations"]) - 2
    assert all("has no width or height" in s for s in found.skipped)


# --- chance ----------------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    "Good files by name."
    d = tmp_path_factory.mktemp("seeds")
    png(d / "a.png")
    Image.fromarray(GREY).save(d / "a.jpg")
    Image.fromarray(GREY).save(d / "a.gif")
    tifffile.imwrite(d / "a.tif", np.stack([GREY] * 2), photometric="minisblack")
    nifti(d / "a.nii", VOLUME)
    nifti(d / "b.nii.gz", VOLUME)
    placed = {"PixelSpacing": [1, 1], "ImagePositionPatient": [0, 0, 0], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}
    dicom(d / "a.dcm", GREY, RescaleSlope=2, RescaleIntercept=1, **placed)
    (d / "c.dcm").write_bytes((TEST_FILES / "MR_small_RLE.dcm").read_bytes())
    for f in d.iterdir(): assert isinstance(read(f), Picture)
    return {f.name: f.read_bytes() for f in sorted(d.iterdir())}


BOUNDED = dict(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


MANGLED = dict(name=st.sampled_from(["a.png", "a.jpg", "a.gif", "a.tif", "a.nii", "b.nii.gz", "a.dcm", "c.dcm"]), keep=st.floats(.02, 1),
               changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255), st.booleans()), max_size=12))


def read_mangled(seeds, folder, name, keep, changes):
    "Reads a file that was cut and overwritten."
    data = bytearray(seeds[name])
    for at, value, in_head in changes: data[int(at * (min(len(data), 700 if in_head else len(data)) - 1))] = value
    file = folder.getbasetemp() / f"spoilt-{name}"
    file.write_bytes(bytes(data[:int(len(data) * keep)] if keep < .9 else data))
    try: found = read(file)
    except InputError as e: assert "\n" not in str(e) and file.name in str(e)
    else: assert np.isfinite(found.array).all() and found.array.ndim in (3, 4) and found.array.size


@settings(max_examples=80, **BOUNDED)
@given(**MANGLED)
def test_no_spoilt_file_raises_anything_else(seeds, tmp_path_factory, **how): read_mangled(seeds, tmp_path_factory, **how)


@pytest.mark.slow
@settings(max_examples=1500, **BOUNDED)
@given(**MANGLED)
def test_no_spoilt_file_raises_anything_else_at_length(seeds, tmp_path_factory, **how): read_mangled(seeds, tmp_path_factory, **how)


KNOWN_CELLS = ["p.png", "r.png", "A", "1", "0.5", "train", "test", "", "[[1, 2, 3, 4, 0]]", "nan", "-1", "1e999", ".", "/", ".."]
KNOWN_HEADERS = ["file", "patient", "label", "target:age", "spacing", "split", "boxes", "page", "mask", "factor:x", "label:", ""]
CELLS = st.one_of(st.sampled_from(KNOWN_CELLS), st.text(max_size=12))
HEADERS = st.lists(st.one_of(st.sampled_from(KNOWN_HEADERS), st.text(max_size=8)), min_size=1, max_size=6)
TABLED = dict(header=st.one_of(HEADERS, HEADERS.map(lambda h: ["file", *h[1:]])), rows=st.lists(st.lists(CELLS, min_size=6, max_size=6), max_size=4),
              separator=st.sampled_from(",;\t"), skip=st.booleans(), raw=st.booleans())


def read_table(folder, header, rows, separator, skip, raw):
    "Reads a table of chance."
    folder = folder.getbasetemp() / "tables"
    if not folder.exists(): png(folder / "p.png"), png(folder / "r.png", GREY[::-1].copy())
    with open(folder / "m.csv", "w", encoding="utf-8", errors="surrogatepass", newline="") as f:
        if raw: f.write("\n".join(separator.join(row) for row in [header, *rows]))
        else: csv.writer(f, delimiter=separator).writerows([header, *(row[:len(header)] for row in rows)])
    try: found = from_manifest(folder / "m.csv", 8, salt="s", errors="skip" if skip else "raise")
    except InputError as e: assert str(e)
    else: assert len(found) + len(found.skipped) >= 1 and found.spatial == (8, 8)


@settings(max_examples=60, **BOUNDED)
@given(**TABLED)
def test_no_table_raises_anything_else(tmp_path_factory, **how): read_table(tmp_path_factory, **how)


@pytest.mark.slow
@settings(max_examples=800, **BOUNDED)
@given(**TABLED)
def test_no_table_raises_anything_else_at_length(tmp_path_factory, **how): read_table(tmp_path_factory, **how)


def test_nibabel_agrees_on_what_a_good_seed_holds(seeds, tmp_path):
    "The seeds of the fuzz are read rightly before they are spoilt."
    (tmp_path / "b.nii.gz").write_bytes(seeds["b.nii.gz"])
    assert np.allclose(np.sort(read(tmp_path / "b.nii.gz").array.ravel()), np.sort(nib.load(tmp_path / "b.nii.gz").get_fdata().ravel()))
