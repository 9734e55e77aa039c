"""Small NIfTI and DICOM files of known contents, for tests."""
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset

AXIAL = [1, 0, 0, 0, 1, 0]


def nifti(path, x, affine=None) -> Path:
    "A NIfTI file."
    nib.save(nib.Nifti1Image(x, np.eye(4) if affine is None else affine), path)
    return Path(path)


def base(x, **fields) -> Dataset:
    "A data set of one picture (y, x) or of several frames, without its file."
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID, ds.SeriesInstanceUID = pydicom.uid.CTImageStorage, pydicom.uid.generate_uid(entropy_srcs=[str(x.sum())]), "1.2.3"
    ds.Modality, ds.PatientID = "CT", "A-17"
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = *x.shape[-2:], 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.PixelData = np.ascontiguousarray(x).astype(np.uint16).tobytes()
    for k, v in fields.items(): setattr(ds, k, v)
    for k in [k for k, v in fields.items() if v is None]: delattr(ds, k)
    return ds


def dicom(path, x, **fields) -> Path:
    "A DICOM file of one picture; a field of None is left out."
    base(x, **fields).save_as(path, enforce_file_format=True)
    return Path(path)


def ct_series(folder, n=5, gap=5., orientation=AXIAL, uid="1.2.3", slopes=None, shear=0., **fields) -> np.ndarray:
    "A CT series in a folder, its names in another order than its slices; the stored values (n, y, x) in the order of their normal."
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(n).integers(0, 2000, (n, 6, 8))
    axes = np.reshape(orientation, (2, 3)).astype(float)
    normal = np.cross(*axes)
    for k in range(n):
        at = np.array([-10., -20, 30]) + k * gap * normal + k * shear * axes[1]
        own = {"PixelSpacing": [.7, .8], "ImagePositionPatient": at.tolist(), "ImageOrientationPatient": list(map(float, orientation)),
               "SeriesInstanceUID": uid, "InstanceNumber": k + 1, "WindowCenter": 40, "WindowWidth": 400,
               "RescaleSlope": (slopes or [2] * n)[k], "RescaleIntercept": -1024}
        dicom(folder / f"{(k * 3 + 1) % n:02d}.dcm", values[k], **own | fields)
    return values


def enhanced(path, order, gap=4.) -> np.ndarray:
    "A file of many frames, each with its place and slope; the stored values in the order of their places."
    values = np.random.default_rng(1).integers(0, 2000, (len(order), 6, 8))
    ds = base(values[list(order)], NumberOfFrames=len(order), SOPClassUID=pydicom.uid.EnhancedCTImageStorage)
    frames = []
    for k in order:
        frame, place, value = Dataset(), Dataset(), Dataset()
        place.ImagePositionPatient = [0., 0., gap * k]
        value.RescaleSlope, value.RescaleIntercept = 2, -1000
        frame.PlanePositionSequence, frame.PixelValueTransformationSequence = [place], [value]
        frames.append(frame)
    shared, plane, pixel = Dataset(), Dataset(), Dataset()
    plane.ImageOrientationPatient, pixel.PixelSpacing = list(map(float, AXIAL)), [.7, .8]
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = [plane], [pixel]
    ds.PerFrameFunctionalGroupsSequence, ds.SharedFunctionalGroupsSequence = frames, [shared]
    ds.save_as(path, enforce_file_format=True)
    return values
