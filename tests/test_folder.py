"""Photographs with masks or a COCO file: what is wrong is named, what is right is read, and every door leads to the one reader."""
import json
import time

import numpy as np
import pytest
from PIL import Image

from tasl_lab.core import InputError
from tasl_lab.data.folders import from_folder
from tasl_lab.data.imageset import ImageSet
from tasl_lab.data.sources import load


def picture(path, shape=(20, 30), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(1, 255, shape).astype(np.uint8)).save(path)
    return path


def read(folder, size=(20, 30), **how): return from_folder(folder, size, salt="s", **how)


@pytest.fixture
def coco(tmp_path):
    "A folder with a COCO file of three pictures; write(**changes) rewrites the file and returns the folder."
    for k in range(3): picture(tmp_path / "images" / f"{k}.png", seed=k)
    rows = [{"id": k, "file_name": f"images/{k}.png", "height": 20, "width": 30} for k in range(3)]
    notes = note() + note(id=1, image_id=2, category_id=4, bbox=[0, 0, 30, 20])
    base = {"images": rows, "annotations": notes, "categories": [{"id": 1, "name": "a"}, {"id": 4, "name": "b"}]}

    def write(**changes):
        (tmp_path / "notes.json").write_text(json.dumps(base | changes))
        return tmp_path
    return write


@pytest.fixture
def masked(tmp_path):
    "A folder with images/ and masks/ of four pictures."
    for k in range(4):
        picture(tmp_path / "images" / f"{k}.png", seed=k)
        a = np.zeros((20, 30), np.uint8)
        a[2:6, 3:9] = 255
        (tmp_path / "masks").mkdir(exist_ok=True)
        Image.fromarray(a).save(tmp_path / "masks" / f"{k}.png")
    return tmp_path


def note(**changes): return [{"id": 0, "image_id": 0, "category_id": 1, "bbox": [3, 4, 6, 8]} | changes]


def test_coco_is_read(coco):
    found = read(coco(), (40, 30))
    assert found.images.shape == (3, 1, 40, 30) and found.boxes[0].tolist() == [[8, 3, 24, 9, 0]] and len(found.boxes[1]) == 0
    assert found.boxes[2].tolist() == [[0, 0, 40, 30, 1]] and found.labels["contains"].tolist() == [[1, 0], [0, 0], [0, 1]]


def test_stated_split_and_patient_are_kept(coco):
    rows = [{"id": k, "file_name": f"{k}.png", "split": s, "patient": f"p{k}"} for k, s in enumerate(["test", "train", "valid"])]
    found = read(coco(images=rows))
    assert found.table.split.tolist() == ["test", "train", "val"] and found.info.group == "patient"


@pytest.mark.parametrize("changes, words", [
    (dict(annotations=note(bbox=[3, 4, 0, 8])), ["box 0", "no width or height", "images/0.png"]),
    (dict(annotations=note(bbox=[25, 4, 9, 8])), ["box 0", "outside the picture (30 x 20)"]),
    (dict(annotations=note(bbox=[3, 4, None, 8])), ["annotations[0]", "expected x, y, width, height"]),
    (dict(annotations=note(category_id=3)), ["annotations[0]", "category_id 3", "1, 4"]),
    (dict(annotations=note(category_id=[1])), ["annotations[0]", "category_id [1]"]),
    (dict(annotations=note(image_id=9)), ["annotations[0]", "image_id 9"]),
    (dict(annotations=[7]), ["annotations[0]", "no object"]),
    (dict(images=[{"id": 0, "file_name": "gone.png"}], annotations=note()), ["gone.png", "missing"]),
    (dict(images=[{"id": 0, "file_name": "images/0.png", "height": 30, "width": 20}], annotations=note()), ["images/0.png", "(30, 20)", "(20, 30)"]),
    (dict(images=[]), ["'images' is empty"]),
    (dict(images=[{"id": 0, "file_name": "images/0.png"}] * 2), ["share an id"]),
    (dict(images=[{"file_name": "images/0.png"}]), ["images[0]", "'id'"]),
    (dict(images=[3]), ["images[0]", "'id'"]),
    (dict(images=[{"id": 0, "file_name": 3}]), ["images[0]", "'file_name'"]),
    (dict(categories=None), ["'categories'"]),
])
def test_faults_of_a_coco_file_are_named(coco, changes, words):
    with pytest.raises(InputError) as e: read(coco(**changes))
    for w in ["notes.json", *words]: assert w in str(e.value)
    assert "\n" not in str(e.value)


def test_what_cannot_be_used_is_skipped_and_counted(coco):
    notes = note() + note(bbox=[3, 4, 0, 8]) + note(bbox=[25, 4, 9, 8]) + note(category_id=3)
    found = read(coco(annotations=notes), errors="skip")
    assert [len(b) for b in found.boxes] == [1, 0, 0] and len(found.skipped) == 3
    assert found.info.note == "3 skipped: 1 x annotation of no class, 1 x box without size, 1 x box outside its picture"
    assert load(coco(annotations=notes), (20, 30)).info.note == found.info.note


def test_a_box_one_pixel_over_the_edge_is_clipped(coco):
    assert read(coco(annotations=note(bbox=[25, 4, 6, 8]))).boxes[0].tolist() == [[4, 25, 12, 30, 0]]


def test_two_coco_files_are_not_guessed_between(coco):
    folder = coco()
    (folder / "more.json").write_text((folder / "notes.json").read_text())
    with pytest.raises(InputError, match=r"2 COCO files \(more.json, notes.json\); name the file itself"): read(folder)
    assert len(read(folder / "more.json")) == 3


def test_every_door_leads_to_the_one_reader(masked, coco, monkeypatch):
    "A path, folder:PATH and ImageSet.from_folder give equal sets; so do a table's path and manifest:FILE; a saved set is a path too."
    monkeypatch.setenv("TASL_SALT", "s")
    own = ImageSet.from_folder(masked, 32)
    assert load(masked, 32).sha256 == load(f"folder:{masked}", 32).sha256 == own.sha256 and (own.masks["regions"] == 1).any()
    own.save(masked / "saved")
    assert load(masked / "saved").sha256 == load(f"folder:{masked / 'saved'}").sha256 == own.sha256
    (masked / "list.csv").write_text("file,mask\n" + "\n".join(f"images/{k}.png,masks/{k}.png" for k in range(4)))
    assert load(masked / "list.csv", 32).sha256 == load(f"manifest:{masked / 'list.csv'}", 32).sha256
    folder = coco()
    assert load(folder, 32).sha256 == load(folder / "notes.json", 32).sha256


def test_masks_are_read(masked):
    found = read(masked)
    assert found.masks["regions"].sum() == 4 * 24 and found.boxes[0].tolist() == [[2, 3, 6, 9, 0]] and found.info.group == "file"
    assert set(found.table.split) == {"train", "val", "test"}


def test_masks_beside_the_pictures(tmp_path):
    for kind in ("benign", "malignant"):
        for k in (1, 2):
            picture(tmp_path / kind / f"{k}.jpg", seed=k + 7 * (kind == "benign"))
            Image.fromarray(np.ones((20, 30), np.uint8)).save(tmp_path / kind / f"{k}_mask.png")
    found = read(tmp_path, 16)
    assert found.labels["class"].tolist() == [0, 0, 1, 1] and (found.masks["regions"] == 1).all()


def test_a_picture_without_mask_is_not_annotated(masked):
    (masked / "masks" / "2.png").unlink()
    found = read(masked)
    assert (found.masks["regions"][2] == 255).all() and found.boxes[2] is None and "contains" not in found.labels


def test_faults_of_a_mask_folder_are_named(masked):
    with pytest.raises(InputError, match="background and every class"): read(masked, classes={"regions": ["background"]})
    with pytest.raises(InputError, match="patient pattern"): read(masked, patient="x")
    picture(masked / "masks" / "1.png", (20, 31))
    with pytest.raises(InputError, match=r"1\.png: the mask is 20 x 31, its picture images/1\.png 20 x 30"): read(masked)
    picture(masked / "masks" / "1.png", (20, 30, 3))
    with pytest.raises(InputError, match="a mask in colours"): read(masked)


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match="no such file or folder"): from_folder(tmp_path / "nothing")
    with pytest.raises(InputError, match="holds no picture"): from_folder(tmp_path)
    picture(tmp_path / "a.png")
    with pytest.raises(InputError, match="expected a folder or a COCO file"): from_folder(tmp_path / "a.png")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"): from_folder(tmp_path / "x.json")


@pytest.mark.parametrize("size", [0, (64, 64, 64), "64", 3.5])
def test_a_wrong_size_is_named(masked, size):
    with pytest.raises(InputError, match="size .*give one number, or 2"): read(masked, size)


# --- what folders in folders mean ------------------------------------------------------------------------------------------------------

def test_a_folder_of_patients_in_a_folder_of_classes(tmp_path):
    for p in range(6):
        for k in range(2): picture(tmp_path / ("ill", "well")[p % 2] / f"Person_{p}" / f"{k}.png", seed=10 * p + k)
    found = read(tmp_path)
    assert found.info.classes["class"] == ["ill", "well"] and found.table.patient.nunique() == 6 and found.info.group == "patient"
    assert "folders taken as patients" in found.info.note and "Person" not in found.table.to_csv() + str(found.info)


def test_many_folders_side_by_side_are_patients(tmp_path):
    for p in range(31):
        for k in range(2): picture(tmp_path / f"Person_{p}" / f"{k}.png", seed=10 * p + k)
    found = read(tmp_path)
    assert "class" not in found.labels and found.table.patient.nunique() == 31 and (found.table.groupby("patient").split.nunique() == 1).all()


def test_blood_cells(extra_data):
    "364 photographs, 3 classes, two boxes without width or height."
    start = time.perf_counter()
    found = load(extra_data("bccd"), (96, 128))
    assert time.perf_counter() - start < 20
    assert found.images.shape == (364, 3, 96, 128) and sum(map(len, found.boxes)) == 4886 and "2 x box without size" in found.info.note
    assert found.info.classes["boxes"] == ["RBC", "WBC", "Platelets"]
    assert found.table.split.value_counts().to_dict() == {"train": 205, "val": 87, "test": 72}
