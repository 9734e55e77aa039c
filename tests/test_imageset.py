"""ImageSet: each wrong input is one error that names part and index; budgets are nested; what is saved is read back; leaks are found."""
import numpy as np
import pandas as pd
import pytest

from tasl_lab.core import InputError
from tasl_lab.data.imageset import OUTLINES, SPLITS, ImageSet, Info

CLASSES = {"kind": ["a", "b"], "finding": ["x", "y", "z"], "tissue": ["out", "in"], "boxes": ["lesion", "node"]}
N = 5


def chance(seed=0): return np.random.default_rng(seed)


def parts(spatial=(8, 10), channels=1, dtype=np.uint8):
    "All parts of a small, right set; `make` alters some of them."
    r, d = chance(), len(spatial)
    images = r.integers(0, 200, (N, channels, *spatial)).astype(dtype)
    if np.dtype(dtype).kind == "f": images = images / np.array(255, dtype)
    box = np.array([[*[1] * d, *[4] * d, 0], [*[0] * d, *spatial, 1]], np.float32)
    return {
        "images": images,
        "labels": {"kind": np.array([0, 1, -1, 1, 0]), "finding": r.integers(0, 2, (N, 3))},
        "masks": {"tissue": r.choice([0, 1, 255], (N, *spatial))},
        "boxes": [box, None, box[:1], np.zeros((0, 2 * d + 1)), None],
        "targets": {"position": np.array([.1, np.nan, 0, 1, 2])},
        "table": pd.DataFrame({"patient": ["p1", "p1", "p2", "p3", "p4"], "split": ["train", "train", "train", "val", "test"],
                               "site": ["A", "A", "B", "B", "A"], "slice": range(N), "factor:size": r.normal(size=N), "factor:look": [*"abcab"]}),
    }


def build(info=None, **given):
    images = given.pop("images")
    return ImageSet(images, info or Info("small", classes=CLASSES), **given)


def changed(value, at, new):
    "A copy of array `value` in which the entry `at` is `new`."
    value = np.array(value, copy=True)
    value[at] = new
    return value


def with_box(box, i=2):
    boxes = parts()["boxes"]
    boxes[i] = None if box is None else np.asarray(box, float)
    return boxes


def with_column(**columns): return parts()["table"].assign(**columns)


def images_with(value, i=3):
    return changed(parts(dtype=np.float32)["images"], (i, 0, 2, 2), value)


P = parts()
RAGGED = [np.zeros((1, 8, 10), np.float32), np.zeros((1, 9, 7), np.float32), np.zeros((1, 8, 8), np.float32)]
WRONG = {
    # pictures
    "no picture": (dict(images=P["images"][:0]), ["no picture"]),
    "no picture, float": (dict(images=np.zeros((0, 1, 8, 8), np.float32)), ["no picture"]),
    "two axes": (dict(images=np.zeros((5, 8), np.uint8)), ["images", r"\(5, 8\)"]),
    "no channel axis": (dict(images=np.zeros((5, 8, 8), np.uint8)), ["images", r"\(5, 8, 8\)"]),
    "no pixels": (dict(images=np.zeros((5, 1, 0, 8), np.uint8)), ["images", "without pixels"]),
    "type": (dict(images=np.zeros((5, 1, 8, 8), np.float64)), ["images", "float64", "float32"]),
    "nan": (dict(images=images_with(np.nan)), [r"images\[3\]", "nan"]),
    "infinity": (dict(images=images_with(-np.inf, 1)), [r"images\[1\]", "infinity"]),
    "scale of floats": (dict(images=images_with(200.)), [r"images\[3\]", "200", r"0\.\.1"]),
    "floats below 0": (dict(images=images_with(-.5, 2)), [r"images\[2\]", "-0.5", r"0\.\.1"]),
    "rows of other lengths": (dict(images=[[[[1, 2], [3]]]]), [r"images\[0\]", "equal length"]),
    "mixed channels": (dict(images=[*RAGGED, np.zeros((3, 8, 8), np.float32)]), [r"images\[3\]", "3 channels"]),
    "mixed axes": (dict(images=[*RAGGED, np.zeros((1, 4, 8, 8), np.float32)]), [r"images\[3\]", r"\(1, 4, 8, 8\)"]),
    "one without pixels": (dict(images=[*RAGGED, np.zeros((1, 0, 8), np.float32)]), [r"images\[3\]", "empty"]),
    "nan in one": (dict(images=[*RAGGED, np.full((1, 8, 8), np.nan, np.float32)]), [r"images\[3\]", "nan"]),
    "scale of one": (dict(images=[*RAGGED, np.full((1, 8, 8), 7, np.float32)]), [r"images\[3\]", "7", r"0\.\.1"]),
    "two types": (dict(images=[*RAGGED, np.zeros((1, 8, 8), np.uint8)]), [r"images\[3\]", "uint8", "float32"]),
    "type of one": (dict(images=[*RAGGED, np.zeros((1, 8, 8), np.int64)]), [r"images\[3\]", "int64"]),
    "modality": (dict(images=P["images"], info=Info("small", modality="smell")), ["modality", "smell"]),
    # labels
    "label length": (dict(labels={"kind": [0, 1]}), [r"labels\['kind'\]", "2 rows for 5"]),
    "label never named": (dict(labels={"grade": [0] * 5}), [r"labels\['grade'\]", "class names"]),
    "label class never seen": (dict(labels={"kind": [0, 1, 0, 2, 0]}), [r"labels\['kind'\]\[3\]", "2", "0 to 1"]),
    "label below -1": (dict(labels={"kind": [0, -2, 0, 1, 0]}), [r"labels\['kind'\]\[1\]", "-2"]),
    "label of text": (dict(labels={"kind": [*"ababa"]}), [r"labels\['kind'\]", "integers"]),
    "label with nan": (dict(labels={"kind": [0, 1, np.nan, 0, 1]}), [r"labels\['kind'\]", "integers"]),
    "label columns": (dict(labels={"finding": np.zeros((5, 2), int)}), [r"labels\['finding'\]", "2 columns for 3"]),
    "label neither 0 nor 1": (dict(labels={"finding": changed(np.zeros((5, 3), int), (4, 1), 2)}), [r"labels\['finding'\]\[4\]", "2"]),
    "label a number": (dict(labels={"kind": 3}), [r"labels\['kind'\]"]),
    # masks
    "mask shape": (dict(masks={"tissue": np.zeros((5, 10, 8), int)}), [r"masks\['tissue'\]", r"\(5, 10, 8\)", r"\(5, 8, 10\)"]),
    "mask count": (dict(masks={"tissue": np.zeros((4, 8, 10), int)}), [r"masks\['tissue'\]", r"\(4, 8, 10\)"]),
    "mask of floats": (dict(masks={"tissue": np.zeros((5, 8, 10))}), [r"masks\['tissue'\]", "float64"]),
    "mask never named": (dict(masks={"bone": np.zeros((5, 8, 10), int)}), [r"masks\['bone'\]", "class names"]),
    "mask class never seen": (dict(masks={"tissue": changed(np.zeros((5, 8, 10), int), (2, 1, 1), 7)}), [r"masks\['tissue'\]\[2\]", "7", "0 to 1"]),
    "mask class beside 255": (dict(masks={"tissue": changed(changed(np.zeros((5, 8, 10), int), (2, 0, 0), 255), (2, 1, 1), 7)}),
                              [r"masks\['tissue'\]\[2\]", "value 7", "0 to 1"]),
    "mask below 0": (dict(masks={"tissue": changed(np.zeros((5, 8, 10), int), (2, 1, 1), -1)}), [r"masks\['tissue'\]\[2\]", "value -1"]),
    "mask on ragged": (dict(images=RAGGED, masks={"tissue": np.zeros((3, 8, 10), int)}), [r"masks\['tissue'\]", "sizes"]),
    # boxes
    "box count": (dict(boxes=P["boxes"][:3]), ["boxes", "3 entries for 5"]),
    "box never named": (dict(boxes=P["boxes"], info=Info("small", classes={k: v for k, v in CLASSES.items() if k != "boxes"})), ["boxes", "class names"]),
    "box below": (dict(boxes=with_box([[1, 1, 9, 4, 0]])), [r"boxes\[2\]\[0\]", "outside", r"8"]),
    "box right": (dict(boxes=with_box([[0, 0, 2, 2, 0], [1, 1, 4, 11, 0]])), [r"boxes\[2\]\[1\]", "outside"]),
    "box above": (dict(boxes=with_box([[-1, 1, 4, 4, 0]])), [r"boxes\[2\]\[0\]", "outside"]),
    "box turned": (dict(boxes=with_box([[4, 1, 1, 4, 0]])), [r"boxes\[2\]\[0\]", "no size"]),
    "box flat": (dict(boxes=with_box([[1, 1, 1, 4, 0]])), [r"boxes\[2\]\[0\]", "no size"]),
    "box nan": (dict(boxes=with_box([[1, 1, np.nan, 4, 0]])), [r"boxes\[2\]\[0\]"]),
    "box class": (dict(boxes=with_box([[1, 1, 4, 4, 2]])), [r"boxes\[2\]\[0\]", "class 2", "0 to 1"]),
    "box half class": (dict(boxes=with_box([[1, 1, 4, 4, .5]])), [r"boxes\[2\]\[0\]", "class 0.5"]),
    "box negative class": (dict(boxes=with_box([[1, 1, 4, 4, -1]])), [r"boxes\[2\]\[0\]", "class -1"]),
    "box without class": (dict(boxes=with_box([[1, 1, 4, 4]])), [r"boxes\[2\]", r"\(1, 4\)"]),
    "boxes without class": (dict(boxes=with_box([[0, 0, 4, 4], [0, 0, 1, 4], [5, 1, 0, 0], [3, 3, 0, 1], [1, 4, 4, 1]])), [r"boxes\[2\]", r"\(5, 4\)"]),
    "box of a ragged picture": (dict(images=RAGGED, boxes=[None, np.array([[0, 0, 9, 7, 0]]), np.array([[0, 0, 9, 7, 0]])]), [r"boxes\[2\]\[0\]", "outside"]),
    # targets
    "target length": (dict(targets={"position": [1., 2]}), [r"targets\['position'\]", r"\(2,\)"]),
    "target columns": (dict(targets={"position": np.zeros((5, 2))}), [r"targets\['position'\]", r"\(5, 2\)"]),
    "target infinite": (dict(targets={"position": [0, 1, np.inf, 0, 0]}), [r"targets\['position'\]\[2\]"]),
    "target of text": (dict(targets={"position": [*"abcde"]}), [r"targets\['position'\]"]),
    "target of digits": (dict(targets={"position": [*"12345"]}), [r"targets\['position'\]", "numbers"]),
    # table
    "table rows": (dict(table=P["table"][:3]), ["table", "3 rows for 5"]),
    "unknown split": (dict(table=with_column(split=["train", "train", "learn", "val", "test"])), [r"split\[2\]", "learn", "train, val, test"]),
    "split missing": (dict(table=with_column(split=["train", "train", None, "val", "test"])), [r"split\[2\]"]),
    "patient in two splits": (dict(table=with_column(split=["train", "test", "train", "val", "test"])), ["'p1'", "more than one split"]),
    "patient missing": (dict(table=with_column(patient=["p1", "p1", "p2", None, None])), [r"patient\[3\]"]),
    "patient nan": (dict(table=with_column(patient=[1, 1, 2, 3, np.nan])), [r"patient\[4\]", "nan"]),
    "patient blank": (dict(table=with_column(patient=["p1", "p1", " ", "p3", "p4"])), [r"patient\[2\]"]),
}


@pytest.mark.parametrize("wrong, words", WRONG.values(), ids=WRONG)
def test_wrong_input_is_one_error_that_names_the_part(wrong, words):
    own = {"images": P["images"], **wrong}
    with pytest.raises(InputError) as e: build(**own)
    for word in words: e.match(word)
    assert "\n" not in str(e.value) and len(str(e.value)) < 300


@pytest.mark.parametrize("spatial, channels", [((8, 10), 1), ((8, 10), 3), ((4, 8, 10), 2)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float16, np.float32])
def test_right_input_is_kept_as_it_is(spatial, channels, dtype):
    given = parts(spatial, channels, dtype)
    found = build(**given)
    assert (found.dims, found.channels, found.spatial, len(found)) == (len(spatial), channels, spatial, N) and found.images.dtype == dtype
    batch = found.batch([4, 0])
    assert batch.images.numpy().dtype == dtype and np.array_equal(batch.images.numpy(), given["images"][[4, 0]])
    assert batch.labels["kind"].tolist() == [0, 0] and np.array_equal(batch.masks["tissue"], given["masks"]["tissue"][[4, 0]])
    assert batch.boxes[0] is None and np.array_equal(batch.boxes[1], given["boxes"][0]) and batch.targets["position"].tolist() == pytest.approx([2, .1])
    assert batch.table.patient.tolist() == ["p4", "p1"] and found.factors.columns.tolist() == ["size", "look"]


def test_unlabelled_batch_holds_no_truth():
    bare = build(**parts()).batch([0, 3]).unlabelled()
    assert bare.labels == {} == bare.masks == bare.targets and bare.boxes is None and not [c for c in bare.table if c.startswith("factor")]
    assert bare.ids.tolist() == [0, 3] and bare.table.split.tolist() == ["train", "val"]


def test_without_a_table_every_picture_is_a_patient():
    found = ImageSet(P["images"], Info("bare"))
    assert found.table.patient.nunique() == N and found.ids("train").tolist() == [*range(N)] and found.ids("test").tolist() == []


def test_ragged_pictures():
    found = ImageSet(RAGGED, Info("ragged", classes=CLASSES), boxes=[None, [[0, 0, 9, 7, 0]], None])
    assert found.spatial is None and found.dims == 2 and found.batch([1]).images.shape == (1, 1, 9, 7)
    assert found.subset([1]).boxes[0].tolist() == [[0, 0, 9, 7, 0]]
    with pytest.raises(InputError, match="size"): found.batch([0, 1])
    with pytest.raises(InputError, match="sizes"): found.save("nowhere")


@pytest.mark.parametrize("call, words", [(lambda s: s.ids("learn"), "learn"), (lambda s: s.subset([]), "no picture"), (lambda s: s.show([]), "no picture")])
def test_wrong_choice_is_one_error(call, words):
    with pytest.raises(InputError, match=words): call(build(**parts()))


@pytest.mark.parametrize("empty", [[], np.zeros((0, 4)), np.zeros((0, 5)), np.zeros(0)])
def test_empty_boxes_are_none_present(empty):
    assert build(**parts() | {"boxes": [empty] * N}).boxes[0].shape == (0, 5)


def test_ragged_pictures_may_be_lists():
    found = ImageSet([np.zeros((1, 8, 9), np.float32), memoryview(np.ones((1, 4, 4), np.float32))], Info("ragged"))
    assert found.images[1].shape == (1, 4, 4) and found.channels == 1


def test_subset_keeps_order_and_parts():
    found = build(**parts()).subset([3, 0])
    assert found.table.patient.tolist() == ["p3", "p1"] and found.labels["kind"].tolist() == [1, 0] and len(found.boxes[0]) == 0 and len(found.boxes[1]) == 2


# ---------- label budgets ----------

def many(patients=12, each=5):
    n = patients * each
    names = np.repeat([f"p{i}" for i in range(patients)], each)
    split = np.where(np.repeat(np.arange(patients), each) % 4, "train", "test")
    return ImageSet(np.zeros((n, 1, 4, 4), np.uint8), Info("many"), table=pd.DataFrame({"patient": names, "split": split}).sample(frac=1, random_state=0))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_budgets_are_nested_and_go_round_the_patients(seed):
    found = many()
    whole = found.budget(1., seed)
    assert sorted(whole) == found.ids("train").tolist()
    for k in range(1, len(whole) + 1):
        ids = found.budget(k, seed)
        assert ids.tolist() == whole[:k].tolist()
        counts = found.table.patient.iloc[ids].value_counts()
        assert counts.max() - (counts.min() if len(counts) == 9 else 0) <= 1  # no patient twice before each was drawn once
    assert found.budget(.2, seed).tolist() == whole[:9].tolist() and len(found.budget(2, seed, "test")) == 2


def test_budgets_of_other_seeds_differ():
    found = many()
    assert len({tuple(found.budget(9, s)) for s in range(5)}) == 5 and found.budget(9, 3).tolist() == many().budget(9, 3).tolist()


def test_budget_takes_numpy_numbers():
    assert many().budget(np.int64(9), np.int64(3)).tolist() == many().budget(9, 3).tolist()


@pytest.mark.parametrize("k", [0, -1, 46, 0., 1.1, 16.])
def test_impossible_budget(k):
    with pytest.raises(InputError, match="budget"): many().budget(k)


def test_budget_of_an_empty_split():
    with pytest.raises(InputError, match="'val'"): many().budget(1, split="val")


# ---------- files ----------

@pytest.mark.parametrize("spatial, channels, dtype", [((8, 10), 1, np.uint8), ((8, 10), 3, np.uint16), ((4, 6, 8), 1, np.float16), ((4, 6, 8), 2, np.float32)])
def test_saved_set_is_read_back(tmp_path, spatial, channels, dtype):
    given = build(**parts(spatial, channels, dtype))
    found = ImageSet.load(given.save(tmp_path / "a"))
    assert found.sha256 == given.sha256 and found.info == given.info and found.images.dtype == dtype and np.array_equal(found.images, given.images)
    for kind in ("labels", "masks", "targets"):
        a, b = getattr(found, kind), getattr(given, kind)
        assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k], equal_nan=kind == "targets") and a[k].dtype == b[k].dtype for k in a)
    assert [None if b is None else b.tolist() for b in found.boxes] == [None if b is None else b.tolist() for b in given.boxes]
    assert found.boxes[3].shape == (0, 2 * len(spatial) + 1)
    pd.testing.assert_frame_equal(found.table, given.table, check_dtype=False)
    again = found.save(tmp_path / "b")
    for name in ("arrays.npz", "table.csv", "info.json"): assert (again / name).read_bytes() == (tmp_path / "a" / name).read_bytes()


@pytest.mark.parametrize("boxes", [None, [None] * N, [np.zeros((0, 5))] * N])
def test_absent_boxes_are_read_back(tmp_path, boxes):
    found = ImageSet.load(build(**parts() | {"boxes": boxes}).save(tmp_path))
    assert found.boxes is None if boxes is None else [b is None for b in found.boxes] == [b is None for b in boxes]


COLUMNS = {"digits": ["01", "02", "03", "04", "05"], "exponent": ["1e5", "b", "c", "d", "e"], "flags": [True, False, True, True, False],
           "numbers": [.1, np.nan, 1e-12, 1 / 3, 5], "words": ["True", "False", "True", "False", "True"], "gaps": ["a", None, "NA", "nan", "x, y\nz"],
           "gaps in digits": ["01", None, "3", None, "1e5"]}


@pytest.mark.parametrize("column", COLUMNS.values(), ids=COLUMNS)
def test_columns_are_read_back(tmp_path, column):
    given = build(**parts() | {"table": with_column(code=column)})
    found = ImageSet.load(given.save(tmp_path)).table.code
    same = [a == b or (pd.isna(a) and pd.isna(b)) or (isinstance(a, float) and abs(a - b) < 1e-9) for a, b in zip(found, column)]
    assert all(same) and [type(a) is str for a in found if not pd.isna(a)] == [type(b) is str for b in column if not pd.isna(b)]


def garble(path, name):
    file = path / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 255
    file.write_bytes(data)


@pytest.mark.parametrize("harm", ["gone", "empty", "cut", "garbled"])
@pytest.mark.parametrize("name", ["arrays.npz", "table.csv", "info.json"])
def test_harmed_files_are_one_error(tmp_path, name, harm):
    file = build(**parts()).save(tmp_path) / name
    if harm == "gone": file.unlink()
    elif harm == "garbled": garble(tmp_path, name)
    else: file.write_bytes(file.read_bytes()[:40] if harm == "cut" else b"")
    with pytest.raises(InputError, match=tmp_path.name) as e: ImageSet.load(tmp_path)
    e.match(name)


@pytest.mark.parametrize("text", ["[]", "{}", '{"name": "a", "classes": {}, "color": "red"}'])
def test_strange_info_is_one_error(tmp_path, text):
    (build(**parts()).save(tmp_path) / "info.json").write_text(text)
    with pytest.raises(InputError, match="info.json"): ImageSet.load(tmp_path)


def test_interrupted_save_leaves_the_old_set(tmp_path, monkeypatch):
    given = build(**parts())
    given.save(tmp_path)

    def fail(*a, **k): raise OSError("disk full")
    with monkeypatch.context() as m:
        m.setattr("tasl_lab.core.os.replace", fail)
        with pytest.raises(OSError): build(**parts(), info=Info("other", classes=CLASSES)).save(tmp_path)
    assert ImageSet.load(tmp_path).info == given.info and len([*tmp_path.iterdir()]) == 3


def test_swapped_labels_are_noticed(tmp_path):
    build(**parts()).save(tmp_path)
    build(**parts() | {"labels": {"kind": np.array([1, 0, 0, 0, 1])}}).save(tmp_path / "other")
    (tmp_path / "other" / "arrays.npz").replace(tmp_path / "arrays.npz")
    with pytest.raises(InputError, match="sha256"): ImageSet.load(tmp_path)


def test_fingerprint_sees_truth_and_not_the_name():
    base = build(**parts()).sha256
    assert build(**parts(), info=Info("other", note="x", classes=CLASSES)).sha256 == base
    for other in ({"images": changed(P["images"], (0, 0, 0, 0), 255)}, {"boxes": None}, {"targets": {}}, {"table": with_column(site="C")},
                  {"labels": {"kind": np.array([0, 1, -1, 1, 1]), "finding": P["labels"]["finding"]}}):
        assert build(**parts() | other).sha256 != base


# ---------- leaks ----------

@pytest.mark.parametrize("spatial", [(6, 8), (4, 6, 8)])
@pytest.mark.parametrize("axes", [(), (0,), (1,), (0, 1)])
def test_equal_and_mirrored_pictures_are_found(spatial, axes):
    images = chance(1).integers(0, 255, (4, 2, *spatial)).astype(np.uint8)
    table = pd.DataFrame({"split": ["train", "val", "test", "test"]})
    assert ImageSet(images, Info("clean"), table=table).leaks() == []
    images[2] = np.flip(images[0], [a + 1 for a in axes])
    found = ImageSet(images, Info("leaky"), table=table).leaks()
    assert len(found) == 1 and "picture 2 (test)" in found[0] and "picture 0 (train)" in found[0]


def test_copies_within_a_split_are_no_leak():
    images = np.zeros((3, 1, 4, 4), np.uint8)
    assert ImageSet(images, Info("same")).leaks() == []
    leaks = ImageSet(images, Info("same"), table=pd.DataFrame({"split": [*SPLITS]})).leaks()
    assert len(leaks) == 2 and "picture 1" in leaks[0] and "picture 2" in leaks[1]


# ---------- pictures ----------

@pytest.mark.parametrize("spatial, channels, dtype", [
    ((8, 10), 1, np.uint8), ((8, 10), 3, np.uint16), ((4, 8, 10), 1, np.float32), ((4, 8, 10), 2, np.float16)])
def test_every_kind_of_set_can_be_shown(spatial, channels, dtype):
    sheet = build(**parts(spatial, channels, dtype)).show(range(N), columns=3, scale=2)
    assert sheet.size == (3 * 22, 2 * 18)


def test_show_has_a_default_for_small_sets():
    assert build(**parts()).show().size == (5 * 22, 18)


def test_greys_and_outlines_are_seen():
    ramp = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    plain = ImageSet(ramp, Info("ramp")).show(scale=1)
    assert plain.mode == "P"  # a picture of mode L would be stored twice in a notebook, as PNG and as JPEG
    plain = plain.convert("L")
    assert len(plain.getcolors()) == 52 and plain.getextrema() == (0, 255)
    boxed = ImageSet(ramp, Info("ramp", classes=CLASSES), boxes=[[[2, 2, 9, 9, 0]]]).show(scale=1).convert("RGB")
    assert OUTLINES[3] in [c for _, c in boxed.getcolors()] and len(boxed.getcolors()) > 50
    gap = np.abs(np.asarray(plain, int)[:16, :16] - ramp[0, 0])
    assert gap.max() <= 4 and plain.size == (18, 18)


def test_coloured_pictures_stay_coloured():
    sheet = np.asarray(ImageSet(chance().integers(0, 255, (2, 3, 8, 8), dtype=np.uint8), Info("colour")).show().convert("RGB"))
    assert (sheet[..., 0] != sheet[..., 2]).any()


def test_sheets_are_small(tmp_path):
    noise = ImageSet(chance().normal(128, 40, (24, 1, 64, 64)).clip(0, 255).astype(np.uint8), Info("noise"))
    noise.show(range(24)).save(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size < 120_000
