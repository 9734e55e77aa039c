"""Reading the user's own pictures: what is wrong is named, what is right is read."""
import json
import time

import numpy as np
import pytest
from PIL import Image

from tasl_lab.core import InputError
from tasl_lab.data.folder import from_coco, from_folder, from_masks_folder, read_picture


def picture(path, shape=(20, 30), value=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(shape, value, np.uint8)).save(path)
    return path


@pytest.fixture
def coco(tmp_path):
    "A folder with a COCO file of three pictures; write(**changes) rewrites the file and returns the folder."
    for k in range(3): picture(tmp_path / "images" / f"{k}.png")
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
        picture(tmp_path / "images" / f"{k}.png")
        a = np.zeros((20, 30), np.uint8)
        a[2:6, 3:9] = 255
        (tmp_path / "masks").mkdir(exist_ok=True)
        Image.fromarray(a).save(tmp_path / "masks" / f"{k}.png")
    return tmp_path


def note(**changes): return [{"id": 0, "image_id": 0, "category_id": 1, "bbox": [3, 4, 6, 8]} | changes]


def test_coco_is_read(coco):
    found = from_coco(coco(), size=(40, 30))
    assert found.images.shape == (3, 1, 40, 30) and found.boxes[0].tolist() == [[8, 3, 24, 9, 0]] and len(found.boxes[1]) == 0
    assert found.boxes[2].tolist() == [[0, 0, 40, 30, 1]] and found.labels["contains"].tolist() == [[1, 0], [0, 0], [0, 1]]


def test_stated_split_and_patient_are_kept(coco):
    rows = [{"id": k, "file_name": f"{k}.png", "split": s, "patient": f"p{k}"} for k, s in enumerate(["test", "train", "valid"])]
    found = from_coco(coco(images=rows))
    assert found.table.split.tolist() == ["test", "train", "val"] and found.info.group == "patient"


@pytest.mark.parametrize("changes, words", [
    (dict(annotations=note(bbox=[3, 4, 0, 8])), ["annotations[0]", "no width or height", "images/0.png", 'errors="skip"']),
    (dict(annotations=note(bbox=[25, 4, 9, 8])), ["annotations[0]", "outside the picture (30 x 20)", 'errors="skip"']),
    (dict(annotations=note(bbox=[3, 4, None, 8])), ["annotations[0]", "four numbers"]),
    (dict(annotations=note(category_id=3)), ["annotations[0]", "category_id 3", "1, 4"]),
    (dict(annotations=note(image_id=9)), ["annotations[0]", "image_id 9"]),
    (dict(images=[{"id": 0, "file_name": "gone.png"}]), ["gone.png", "missing"]),
    (dict(images=[{"id": 0, "file_name": "images/0.png", "height": 30, "width": 20}]), ["images/0.png", "20 x 30 on disk"]),
    (dict(images=[]), ["'images' is empty"]),
    (dict(images=[{"id": 0, "file_name": "images/0.png"}] * 2), ["share an id"]),
    (dict(images=[{"file_name": "images/0.png"}]), ["images[0]", "'id'"]),
    (dict(categories=None), ["'categories'"]),
])
def test_faults_of_a_coco_file_are_named(coco, changes, words):
    with pytest.raises(InputError) as e: from_coco(coco(**changes))
    for w in ["notes.json", *words]: assert w in str(e.value)
    assert "\n" not in str(e.value)


def test_unusable_boxes_can_be_skipped(coco):
    notes = note() + note(bbox=[3, 4, 0, 8]) + note(bbox=[25, 4, 9, 8])
    found = from_coco(coco(annotations=notes), errors="skip")
    assert [len(b) for b in found.boxes] == [1, 0, 0] and found.info.note.startswith("2 of 3 boxes skipped")
    with pytest.raises(InputError, match="category_id"): from_coco(coco(annotations=note(category_id=3)), errors="skip")


def test_a_box_one_pixel_over_the_edge_is_clipped(coco):
    assert from_coco(coco(annotations=note(bbox=[25, 4, 6, 8])), size=(20, 30)).boxes[0].tolist() == [[4, 25, 12, 30, 0]]


def test_masks_are_read(masked):
    found = from_masks_folder(masked, size=(20, 30))
    assert found.masks["regions"].sum() == 4 * 24 and found.boxes[0].tolist() == [[2, 3, 6, 9, 0]] and found.info.group == "photograph"
    assert set(found.table.split) == {"train", "val", "test"}
    assert from_folder(masked, 32).spatial == (32, 32)


def test_masks_beside_the_pictures(tmp_path):
    for kind in ("benign", "malignant"):
        picture(tmp_path / kind / "1.jpg")
        picture(tmp_path / kind / "1_mask.png", value=1)
    found = from_masks_folder(tmp_path, 16)
    assert found.labels["class"].tolist() == [0, 1] and (found.masks["regions"] == 1).all()


def test_a_picture_without_mask_is_not_annotated(masked):
    (masked / "masks" / "2.png").unlink()
    found = from_masks_folder(masked, 16)
    assert (found.masks["regions"][2] == 255).all() and found.boxes[2] is None and "1 of 4" in found.info.note


def test_faults_of_a_mask_folder_are_named(masked, tmp_path):
    with pytest.raises(InputError, match="background and every class"): from_masks_folder(masked, classes=["background"])
    with pytest.raises(InputError, match="patient pattern"): from_masks_folder(masked, patient="x")
    picture(masked / "masks" / "1.png", (20, 31), 0)
    with pytest.raises(InputError, match=r"1\.png: the mask is 20 x 31, its picture 1\.png 20 x 30"): from_masks_folder(masked)
    picture(masked / "masks" / "1.png", (20, 30, 3), 0)
    with pytest.raises(InputError, match="one channel"): from_masks_folder(masked)


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match="no such file or folder"): from_folder(tmp_path / "nothing")
    with pytest.raises(InputError, match="holds no picture"): from_folder(tmp_path)
    picture(tmp_path / "a.png")
    with pytest.raises(InputError, match="no masks found"): from_folder(tmp_path)
    with pytest.raises(InputError, match="expected a COCO file"): from_folder(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes(b"not a picture")
    with pytest.raises(InputError, match="not a readable picture"): read_picture(tmp_path / "a.png")
    for name in ("x.json", "y.json"): (tmp_path / name).write_text("{")
    with pytest.raises(InputError, match="found 2"): from_folder(tmp_path)
    with pytest.raises(InputError, match="not valid JSON"): from_folder(tmp_path / "x.json")


@pytest.mark.parametrize("size", [0, (64, 64, 64), "64", 3.5])
def test_a_wrong_size_is_named(masked, size):
    with pytest.raises(InputError, match="height, width"): from_folder(masked, size)


def test_grey_stays_grey_and_color_stays_color(tmp_path):
    picture(tmp_path / "g.png")
    picture(tmp_path / "c.jpg", (20, 30, 3))
    Image.fromarray(np.full((20, 30), 257 * 9, np.uint16)).save(tmp_path / "deep.png")
    assert read_picture(tmp_path / "g.png", 16)[0].shape == (1, 16, 16) and read_picture(tmp_path / "c.jpg", 16)[0].shape == (3, 16, 16)
    assert (read_picture(tmp_path / "deep.png", 16)[0] == 9).all()


def test_blood_cells(extra_data):
    "364 photographs, 3 classes, two boxes without width or height."
    folder = extra_data("bccd")
    with pytest.raises(InputError, match=r"annotations\[3950\].*no width or height"): from_folder(folder, (96, 128))
    start = time.perf_counter()
    found = from_folder(folder, (96, 128), errors="skip")
    assert time.perf_counter() - start < 20
    assert found.images.shape == (364, 3, 96, 128) and sum(map(len, found.boxes)) == 4886 and found.info.note.startswith("2 of 4888")
    assert found.info.classes["boxes"] == ["RBC", "WBC", "Platelets"]
    assert found.table.split.value_counts().to_dict() == {"train": 205, "val": 87, "test": 72}
