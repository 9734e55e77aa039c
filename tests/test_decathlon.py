"""The Medical Segmentation Decathlon: folders of the exact form, archives that must not be trusted, and the way here."""
import hashlib
import io
import json
import tarfile

import nibabel as nib
import numpy as np
import pytest
from made_files import nifti
from test_medmnist import Network

from tasl_lab.core import InputError
from tasl_lab.data.decathlon import cases_of, decathlon, decathlon_table, unpack
from tasl_lab.data.medmnist import catalogue

AFFINE = np.array([[-1.5, 0, 0, 40], [0, 0, 2., -30], [0, -1.2, 0, 12], [0, 0, 0, 1]])  # axes turned and mirrored, 1.5 x 1.2 x 2 mm


def write_task(folder, n=8, shape=(10, 9, 8), channels=1, modality="MRI", labels=("background", "organ", "tumour"), change=None):
    "A task folder; the stored volumes and labels by case."
    for part in ("imagesTr", "labelsTr", "imagesTs"): (folder / part).mkdir(parents=True)
    r, made = np.random.default_rng(n), {}
    for k in range(n):
        x = r.normal(100, 30, (*shape, channels) if channels > 1 else shape).astype(np.float32)
        m = r.integers(0, len(labels), shape).astype(np.uint8)
        nifti(folder / f"imagesTr/case_{k:03d}.nii.gz", x, AFFINE), nifti(folder / f"labelsTr/case_{k:03d}.nii.gz", m, AFFINE)
        made[f"case_{k:03d}"] = x, m
    nifti(folder / "imagesTs/case_900.nii.gz", x, AFFINE)
    said = {"name": "Made", "licence": "CC-BY-SA 4.0", "modality": {str(c): modality for c in range(channels)},
            "labels": {str(k): v for k, v in enumerate(labels)},
            "training": [{"image": f"./imagesTr/{c}.nii.gz", "label": f"./labelsTr/{c}.nii.gz"} for c in made], "test": ["./imagesTs/case_900.nii.gz"]}
    if change: change(said)
    (folder / "dataset.json").write_text(json.dumps(said))
    return made


def packed(folder, file):
    "The folder as an archive of its name."
    with tarfile.open(file, "w") as tar: tar.add(folder, folder.name)
    return file.read_bytes()


# --- reading ---------------------------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_a_task_is_read_as_monai_reads_it(tmp_path):
    from monai.data import load_decathlon_datalist
    from monai.transforms import LoadImage, Orientation
    made = write_task(tmp_path / "Task99_Made")
    found = decathlon(tmp_path / "Task99_Made", size=None, private=False, percentiles=(0, 100), dtype="float32")
    listed = load_decathlon_datalist(tmp_path / "Task99_Made" / "dataset.json", True, "training")
    assert [str(e.files[0]) for e in cases_of(tmp_path / "Task99_Made")] == [c["image"] for c in listed]
    turn = Orientation("LPS")
    for k, case in enumerate(listed):
        x, m = (turn(LoadImage(ensure_channel_first=True)(case[part])).numpy()[0].transpose(2, 1, 0) for part in ("image", "label"))
        assert np.allclose(found.images[k, 0], (x - x.min()) / (x.max() - x.min()), atol=1e-5) and (found.masks["regions"][k] == m).all()
    assert found.table[["spacing_z", "spacing_y", "spacing_x"]].iloc[0].tolist() == pytest.approx([1.2, 2., 1.5])
    assert found.table.patient.tolist() == list(made) and found.info.licence == "CC-BY-SA 4.0" and found.info.classes["regions"][1:] == ["organ", "tumour"]


def test_sequences_become_channels(tmp_path):
    write_task(tmp_path / "Task98_Many", channels=4)
    found = decathlon(tmp_path / "Task98_Many", size=8)
    assert found.images.shape == (8, 4, 8, 8, 8) and found.info.modality == "mri"


def test_slices_splits_and_a_part(tmp_path):
    write_task(tmp_path / "t", n=12)
    whole, flat, some = decathlon(tmp_path / "t", 8), decathlon(f"{tmp_path / 't'}:coronal", 16), decathlon(tmp_path / "t", 8, n=5, seed=2)
    assert set(whole.table.split) == {"train", "val", "test"} and flat.dims == 2 and flat.spatial == (16, 16) and len(some) == 5
    split = dict(zip(whole.table.patient, whole.table.split))
    assert all(split[p] == s for t in (flat.table, some.table) for p, s in zip(t.patient, t.split))
    assert len(decathlon(f"{tmp_path / 't'}:axial", 8, n=7)) == 7


def test_test_volumes_train_without_truth(tmp_path):
    write_task(tmp_path / "t")
    plain, more = decathlon(tmp_path / "t", 8), decathlon(tmp_path / "t", 8, unlabelled=True)
    assert len(more) == len(plain) + 1 and (more.masks["regions"][-1] == 255).all() and more.table.split.iloc[-1] == "train"


def test_lungs_are_seen_in_their_window(tmp_path):
    write_task(tmp_path / "Task06_Lung", modality="CT", labels=("background", "cancer"))
    assert decathlon(tmp_path / "Task06_Lung", 8).info.modality == "ct"
    assert decathlon(tmp_path / "Task06_Lung", 8).sha256 == decathlon(tmp_path / "Task06_Lung", 8, window="lung").sha256
    assert decathlon(tmp_path / "Task06_Lung", 8).sha256 != decathlon(tmp_path / "Task06_Lung", 8, window="soft").sha256


def test_a_cache_gives_the_same(tmp_path):
    write_task(tmp_path / "t")
    plain = decathlon(tmp_path / "t", 8)
    kept = decathlon(tmp_path / "t", 8, cache=tmp_path / "cache", progress=False)
    assert isinstance(kept.images, np.memmap) or isinstance(kept.images.base, np.memmap)
    assert kept.sha256 == plain.sha256


@pytest.mark.parametrize("change, said", [
    (lambda d: d["training"][1].update(label="./labelsTr/none.nii.gz"), "does not exist"),
    (lambda d: d["training"][1].update(image="../../outside.nii.gz"), "outside the folder"),
    (lambda d: d["training"][1].update(image=["a.nii.gz", "b.nii.gz"]), "one file is expected"),
    (lambda d: d["training"][1].pop("image"), "without 'image'"),
    (lambda d: d.update(training=[]), "lists no case"),
    (lambda d: d.update(training="imagesTr"), "no list of cases"),
    (lambda d: d["training"].append("case"), "no list of cases"),
    (lambda d: d.update(labels={"0": "background", "2": "x"}), "without gaps"),
    (lambda d: d.update(labels=["background", "x"]), "without gaps"),
    (lambda d: d.pop("labels"), "without gaps"),
])
def test_lists_that_do_not_fit_are_refused(tmp_path, change, said):
    write_task(tmp_path / "t", n=3, change=change)
    with pytest.raises(InputError, match=said): decathlon(tmp_path / "t", 8)


def test_volumes_that_do_not_fit_are_refused_or_skipped(tmp_path):
    write_task(tmp_path / "t")
    (tmp_path / "t" / "imagesTr" / "case_001.nii.gz").write_bytes(b"no volume")
    nifti(tmp_path / "t" / "labelsTr" / "case_002.nii.gz", np.zeros((4, 4, 4), np.uint8), AFFINE)
    nifti(tmp_path / "t" / "labelsTr" / "case_003.nii.gz", np.zeros((10, 9, 8), np.uint8), np.diag([1., 1, 1, 1]))
    with pytest.raises(InputError, match="case_001"): decathlon(tmp_path / "t", 8)
    found = decathlon(tmp_path / "t", 8, errors="skip")
    assert len(found) == 5 and len(found.skipped) == 3 and "3 skipped" in found.info.note


def test_unknown_names_list_the_known(tmp_path):
    for name in ("Task11_Moon", tmp_path / "none"):
        with pytest.raises(InputError, match="Task02_Heart"): decathlon(name)
    with pytest.raises(InputError, match="dataset.json"): decathlon(tmp_path)
    assert len(decathlon_table()) == 10


# --- archives --------------------------------------------------------------------------------------------------------------------------

def archive(file, *members):
    "An archive of (name, contents), or of (name, type as text)."
    with tarfile.open(file, "w") as tar:
        for name, what in members:
            m = tarfile.TarInfo(name)
            if isinstance(what, bytes): m.size = len(what)
            else: m.type, m.linkname = what.encode(), "../../outside"
            tar.addfile(m, io.BytesIO(what) if isinstance(what, bytes) else None)
    return file


@pytest.mark.parametrize("members, said", [
    ([("T/a", b"1"), ("../out", b"2")], "outside the folder"),
    ([("T/a", b"1"), ("T/../../out", b"2")], "outside the folder"),
    ([("T/a", b"1"), ("/abs", b"2")], "outside the folder"),
    ([("T/a", b"1"), ("T/l", tarfile.SYMTYPE.decode())], "link or a device"),
    ([("T/a", b"1"), ("T/l", tarfile.LNKTYPE.decode())], "link or a device"),
    ([("T/a", b"1"), ("T/p", tarfile.FIFOTYPE.decode())], "link or a device"),
    ([("T/a", b"1"), ("T/d", tarfile.CHRTYPE.decode())], "link or a device"),
    ([("A/a", b"1"), ("B/b", b"2")], "2 folders"),
    ([], "0 folders"),
])
def test_archives_that_reach_out_are_refused(tmp_path, members, said):
    (tmp_path / "in").mkdir()
    with pytest.raises(InputError, match=said): unpack(archive(tmp_path / "t.tar", *members), tmp_path / "in" / "deep")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["deep", "in", "t.tar"]


def test_an_archive_larger_than_the_disk(tmp_path, monkeypatch):
    import shutil
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 3})())
    with pytest.raises(InputError, match="make room"): unpack(archive(tmp_path / "t.tar", ("T/a", b"1234")), tmp_path / "in")
    assert not any((tmp_path / "in").iterdir())


def test_a_cut_archive(tmp_path):
    write_task(tmp_path / "Task97_Cut")
    body = packed(tmp_path / "Task97_Cut", tmp_path / "t.tar")
    (tmp_path / "t.tar").write_bytes(body[:len(body) // 2])
    with pytest.raises(InputError, match="cannot be unpacked"): unpack(tmp_path / "t.tar", tmp_path / "in")
    assert not any((tmp_path / "in").iterdir())


# --- the way here ----------------------------------------------------------------------------------------------------------------------

def test_a_task_is_fetched_unpacked_and_kept(tmp_path, monkeypatch):
    from tasl_lab.data.sources import load
    write_task(tmp_path / "Task02_Heart", n=24)
    body = packed(tmp_path / "Task02_Heart", tmp_path / "heart.tar")
    monkeypatch.setenv("TASL_DATA", str(tmp_path / "home"))
    monkeypatch.setitem(catalogue("decathlon")["tasks"]["Task02_Heart"], "md5", hashlib.md5(body).hexdigest())
    with Network(body, breaks=[len(body) - 100]) as network:
        monkeypatch.setitem(catalogue("decathlon"), "site", network.url.rpartition("/")[0])
        volumes, slices = load("decathlon:Task02_Heart", size=8), load("decathlon:Task02_Heart:axial", size=8)
        assert [start for _, start in network.asked] == [0, (len(body) - 100) // 2 ** 16 * 2 ** 16] != [0, 0]
    assert volumes.dims == 3 and slices.dims == 2 and volumes.info.name == slices.info.name == "decathlon:Task02_Heart"
    assert nib.load(tmp_path / "home" / "decathlon" / "Task02_Heart" / "imagesTr" / "case_000.nii.gz").shape == (10, 9, 8)
