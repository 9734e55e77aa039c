"""Files of known geometry load to the array and spacing that nibabel, pydicom, tifffile, SimpleITK and MONAI give."""
import itertools
import warnings

import nibabel as nib
import numpy as np
import pydicom
import pytest
import tifffile
from made_files import ct_series, dicom, enhanced, nifti
from nibabel import orientations
from PIL import Image

from tasl_lab.core import InputError
from tasl_lab.data.readers import read, read_all, read_series, series_in, sniff, stacked, suffix_of

ORDERS = ["".join(codes) for axes in itertools.permutations(("RL", "AP", "SI")) for codes in itertools.product(*axes)]


def affine_of(codes, spacing=(1.5, 2.5, 4), origin=(7, -11, 13)):
    "Affine map of a file whose axes run to `codes`; `spacing` belongs to the patient's axes x, y, z."
    to_ras = orientations.inv_ornt_aff(orientations.axcodes2ornt(codes), (1, 1, 1))
    affine = np.linalg.inv(to_ras)
    affine[:3, :3] = np.diag(spacing) @ np.round(affine[:3, :3])
    affine[:3, 3] = origin
    return affine


@pytest.mark.parametrize("codes", ORDERS)
def test_every_orientation_loads_as_nibabel_turns_it(tmp_path, codes):
    stored = np.random.default_rng(0).integers(-900, 900, (4, 5, 6)).astype(np.int16)
    file = nifti(tmp_path / "a.nii", stored, affine_of(codes))
    assert "".join(nib.aff2axcodes(nib.load(file).affine)) == codes
    turned = nib.load(file).as_reoriented(orientations.ornt_transform(orientations.axcodes2ornt(codes), orientations.axcodes2ornt("LPS")))
    found = read(file)
    assert (found.array[0] == np.asarray(turned.dataobj).transpose(2, 1, 0)).all() and found.spacing == (4, 2.5, 1.5)
    assert np.allclose(found.meta["affine"], turned.affine)


def test_a_point_keeps_its_place_in_space(tmp_path):
    "The voxel that lies at a given millimetre holds its value in every orientation, oblique ones too."
    angle = .3
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    for codes in ("RAS", "PIR", "SLA"):
        affine = turn @ affine_of(codes)
        stored = np.zeros((4, 5, 6), np.float32)
        stored[1, 3, 2] = 1
        found = read(nifti(tmp_path / "a.nii", stored, affine))
        z, y, x = np.argwhere(found.array[0] == 1)[0]
        assert np.allclose(found.meta["affine"] @ [x, y, z, 1], affine @ [1, 3, 2, 1])


@pytest.mark.slow  # importing MONAI takes ten seconds
def test_monai_reads_the_same(tmp_path):
    from monai.data import NibabelReader, PydicomReader
    from monai.transforms import LoadImage, Orientation
    stored = np.random.default_rng(0).normal(size=(4, 5, 6)).astype(np.float32)
    turn = Orientation(axcodes="LPS")
    for codes in ("RAS", "PIR", "SLA", "LPS"):
        file = nifti(tmp_path / "a.nii", stored, affine_of(codes))
        theirs = turn(LoadImage(NibabelReader(), image_only=True, ensure_channel_first=True)(file))
        mine = read(file)
        assert (theirs.numpy().transpose(0, 3, 2, 1) == mine.array).all() and np.allclose(theirs.affine, mine.meta["affine"])
    for name, plane in {"axial": [1, 0, 0, 0, 1, 0], "coronal": [1, 0, 0, 0, 0, -1], "sagittal": [0, 1, 0, 0, 0, -1]}.items():
        ct_series(tmp_path / name, orientation=plane)
        theirs = turn(LoadImage(PydicomReader(), image_only=True, ensure_channel_first=True)(tmp_path / name))
        mine = read_series(tmp_path / name)
        assert np.allclose(theirs.numpy().transpose(0, 3, 2, 1), mine.array) and np.allclose(theirs.affine, mine.meta["affine"], atol=1e-4)
        assert np.allclose(theirs.pixdim.numpy()[::-1], mine.spacing, atol=1e-4)


def test_a_series_is_sorted_by_position(tmp_path):
    values = ct_series(tmp_path / "ct", gap=2.5)
    files = sorted((tmp_path / "ct").iterdir())
    direct = sorted((pydicom.dcmread(f) for f in files), key=lambda ds: ds.ImagePositionPatient[2])
    names = [f.name for f in sorted(files, key=lambda f: pydicom.dcmread(f).ImagePositionPatient[2])]
    assert names != sorted(names), "the order of names must not be the order in space"
    found = read_series(tmp_path / "ct")
    assert (found.array[0] == np.stack([ds.pixel_array * 2. - 1024 for ds in direct])).all() and (found.array[0] == values * 2. - 1024).all()
    assert found.spacing == (2.5, .7, .8) and found.meta["window"] == (40, 400) and found.meta["modality"] == "ct"


def test_a_coronal_series_becomes_axial(tmp_path):
    values = ct_series(tmp_path / "ct", orientation=[1, 0, 0, 0, 0, -1], gap=3)
    found = read_series(tmp_path / "ct")                                      # slices run to the back, rows to the foot
    assert found.spacing == (.7, 3, .8) and (found.array[0] == values.transpose(1, 0, 2)[::-1] * 2. - 1024).all()


def test_a_slope_may_differ_between_slices(tmp_path):
    values = ct_series(tmp_path / "pet", slopes=[1, 2, 3, 4, 5])
    assert (read_series(tmp_path / "pet").array[0] == values * np.arange(1., 6)[:, None, None] - 1024).all()


def test_frames_of_one_file_are_sorted_too(tmp_path):
    values = enhanced(tmp_path / "e.dcm", order=(2, 0, 3, 1), gap=4)
    found = read(tmp_path / "e.dcm")
    assert found.spacing == (4, .7, .8) and (found.array[0] == values * 2. - 1000).all()
    assert (read(tmp_path / "e.dcm", page=0).array[0] == values[2] * 2. - 1000).all()


def test_monochrome1_is_turned_with_its_window(tmp_path):
    x = np.arange(16).reshape(4, 4) * 100
    file = dicom(tmp_path / "x.dcm", x, PhotometricInterpretation="MONOCHROME1", RescaleSlope=1, RescaleIntercept=0, WindowCenter=1000, WindowWidth=500)
    found = read(file)
    assert (found.array[0] == 4095 - x).all() and found.meta["window"] == (3095, 500)


@pytest.mark.parametrize("syntax", [pydicom.uid.RLELossless, pydicom.uid.JPEG2000Lossless, pydicom.uid.JPEGLSLossless])
def test_compressed_pictures_are_equal(tmp_path, syntax):
    named = {pydicom.uid.RLELossless: "MR_small_RLE.dcm", pydicom.uid.JPEG2000Lossless: "MR_small_jp2klossless.dcm",
             pydicom.uid.JPEGLSLossless: "MR_small_jpeg_ls_lossless.dcm"}[syntax]
    if syntax == pydicom.uid.JPEGLSLossless: pytest.importorskip("gdcm", reason="JPEG-LS needs python-gdcm: pip install tasl-lab[formats]")
    plain, packed = (pydicom.data.get_testdata_file(n) for n in ("MR_small.dcm", named))
    assert pydicom.dcmread(packed).file_meta.TransferSyntaxUID == syntax and (read(plain).array == read(packed).array).all()


def test_a_name_is_told_and_not_repeated(tmp_path):
    file = dicom(tmp_path / "x.dcm", np.arange(16).reshape(4, 4), PatientName="Planted^Name", PatientBirthDate="19700101", BurnedInAnnotation="YES")
    meta = read(file).meta
    assert meta["identified"] == ["PatientName", "PatientBirthDate", "burned-in text"] and "Planted" not in str(meta) and "1970" not in str(meta)
    assert read(dicom(tmp_path / "y.dcm", np.arange(16).reshape(4, 4), PatientName="Anonymous")).meta["identified"] == []


def test_series_are_told_apart(tmp_path):
    ct_series(tmp_path / "one", uid="1.2.3")
    for f in (tmp_path / "one").iterdir(): f.rename(tmp_path / f"a{f.name}")
    ct_series(tmp_path / "two", uid="1.2.4")
    for f in (tmp_path / "two").iterdir(): f.rename(tmp_path / f"b{f.name}")
    dicom(tmp_path / "loose.dcm", np.arange(16).reshape(4, 4))
    groups = series_in(sorted(p for p in tmp_path.iterdir() if p.is_file()))
    assert sorted(map(len, groups)) == [1, 5, 5] and [f.name for f in groups[-1]] == ["loose.dcm"]


@pytest.mark.parametrize("suffix", ["nrrd", "mha"])
def test_simpleitk_files(tmp_path, suffix):
    sitk = pytest.importorskip("SimpleITK", reason="NRRD and MetaImage need SimpleITK: pip install tasl-lab[formats]")
    x = np.random.default_rng(0).integers(0, 99, (4, 5, 6)).astype(np.int16)
    image = sitk.GetImageFromArray(x)
    image.SetSpacing((1.5, 2.5, 4))
    image.SetDirection((-1, 0, 0, 0, 1, 0, 0, 0, 1))  # x runs to the right
    sitk.WriteImage(image, str(tmp_path / f"a.{suffix}"))
    found = read(tmp_path / f"a.{suffix}")
    assert (found.array[0] == x[:, :, ::-1]).all() and found.spacing == (4, 2.5, 1.5)
    assert (read(nifti_of(image, tmp_path / "a.nii.gz")).array == found.array).all()


def nifti_of(image, path):
    import SimpleITK as sitk
    sitk.WriteImage(image, str(path))
    return path


def test_tiff_kinds(tmp_path):
    r = np.random.default_rng(0)
    grey, rgb = r.integers(0, 255, (9, 12)).astype(np.uint8), r.integers(0, 255, (9, 12, 3)).astype(np.uint8)
    pages, deep = r.integers(0, 255, (5, 9, 12)).astype(np.uint8), r.integers(0, 65535, (9, 12)).astype(np.uint16)
    cases = {"grey": (grey, {}, grey[None]), "deep": (deep, {}, deep[None]), "big-endian": (deep, {"byteorder": ">"}, deep[None]),
             "bigtiff": (deep, {"bigtiff": True}, deep[None]), "white": (grey, {"photometric": "miniswhite"}, 255 - grey[None]),
             "rgb": (rgb, {"photometric": "rgb"}, rgb.transpose(2, 0, 1)), "planes": (rgb.transpose(2, 0, 1), {"photometric": "rgb"}, rgb.transpose(2, 0, 1)),
             "pages": (pages, {"photometric": "minisblack"}, pages[None]), "float": (grey / 7., {}, np.float32(grey / 7)[None])}
    for name, (x, how, expected) in cases.items():
        tifffile.imwrite(tmp_path / f"{name}.tif", x, **how)
        found = read(tmp_path / f"{name}.tif").array
        assert found.shape == expected.shape and found.dtype == expected.dtype and (found == expected).all(), name
    assert (read(tmp_path / "pages.tif", page=3).array[0] == pages[3]).all()


def test_imagej_spacing_is_read(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((5, 9, 12), np.uint8), imagej=True, resolution=(4, 2), metadata={"spacing": 3, "unit": "um", "axes": "ZYX"})
    assert np.allclose(read(tmp_path / "a.tif").spacing, (.003, .0005, .00025))


def test_lzw_without_the_large_codec_package(tmp_path):
    x = np.random.default_rng(0).integers(0, 255, (9, 12)).astype(np.uint8)
    Image.fromarray(x).save(tmp_path / "a.tif", compression="tiff_lzw")
    assert (read(tmp_path / "a.tif").array[0] == x).all()


def test_palette_transparency_cmyk_and_turned_pictures(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 255, (9, 12, 3)).astype(np.uint8)
    p = Image.fromarray(rgb[..., 0] // 64, "P")
    p.putpalette([9, 0, 0, 0, 8, 0, 0, 0, 7, 5, 5, 5])
    p.save(tmp_path / "p.png")
    assert (read(tmp_path / "p.png", indices=True).array[0] == rgb[..., 0] // 64).all()
    assert (read(tmp_path / "p.png").array == np.asarray(p.convert("RGB")).transpose(2, 0, 1)).all()
    Image.fromarray(rgb).convert("RGBA").save(tmp_path / "a.png")
    assert (read(tmp_path / "a.png").array == rgb.transpose(2, 0, 1)).all() and read(tmp_path / "a.png").meta["notes"] == ["transparency was dropped"]
    Image.fromarray(rgb).convert("CMYK").save(tmp_path / "c.jpg")
    assert read(tmp_path / "c.jpg").array.shape == (3, 9, 12) and "CMYK" in read(tmp_path / "c.jpg").meta["notes"][0]
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(rgb).save(tmp_path / "t.png", exif=turned)
    assert (read(tmp_path / "t.png").array == np.rot90(rgb, -1).transpose(2, 0, 1)).all()


def test_nan_has_a_remedy(tmp_path):
    x = np.ones((3, 4, 5), np.float32)
    x[1, 2, 3] = np.nan
    file = nifti(tmp_path / "a.nii", x)
    with pytest.raises(InputError, match="1 of 60 values are nan"): read(file)
    assert read(file, nan=0).array.sum() == 59


def test_units_and_a_single_slice(tmp_path):
    image = nib.Nifti1Image(np.ones((3, 4, 1), np.float32), np.diag([.001, .002, .003, 1]))
    image.header.set_xyzt_units("meter")
    nib.save(image, tmp_path / "a.nii")
    found = read(tmp_path / "a.nii")
    assert found.array.shape == (1, 4, 3) and np.allclose(found.spacing, (2, 1))


def test_preamble_may_play_another_format(tmp_path):
    file = dicom(tmp_path / "x.tif", np.arange(16).reshape(4, 4))
    file.write_bytes(b"II*\0" + file.read_bytes()[4:])
    assert sniff(file) == "DICOM" and "DICOM" in read(file).meta["notes"][0] and suffix_of("b.NII.gz") == ".nii.gz"


def test_skipped_files_are_listed(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"")
    found, skipped = read_all(sorted(tmp_path.iterdir()), errors="skip")
    assert [f.name for f in found] == ["a.png"] and "b.png: an empty file" in skipped[0]
    with pytest.raises(InputError, match="errors 'drop'"): read_all([], errors="drop")


def test_no_warning_escapes(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("MR_small.dcm", "badVR.dcm", "MR_truncated.dcm", "examples_ybr_color.dcm"): read_all([pydicom.data.get_testdata_file(name)], "skip")


def test_a_stack_of_one_has_no_step():
    from tasl_lab.data.readers import Place
    order, affine = stacked([Place(np.zeros(3), np.eye(3)[:2], (2., 1.))])
    assert order.tolist() == [0] and np.allclose(np.diag(affine), [1, 2, 1, 1])
