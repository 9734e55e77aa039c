"""Tasks: wrong input is named, metrics agree with independent implementations, every encoder works with every task."""
import numpy as np
import pandas as pd
import pytest
import torch

from tasl_lab.core import InputError
from tasl_lab.data.imageset import ImageSet, Info
from tasl_lab.data.phantom import phantom
from tasl_lab.encoders import make_encoder
from tasl_lab.tasks.detection import OVERLAPS, match, pad_boxes
from tasl_lab.tasks.features import extract
from tasl_lab.tasks.registry import make_task, tasks_of
from tasl_lab.tasks.scores import Scores, auroc, froc_per_class, kind_of
from tasl_lab.tasks.segmentation import dice

SPECS = ("classification:class", "segmentation:tissue", "segmentation:lesion", "detection:boxes")


@pytest.fixture(scope="module")
def pictures():
    return phantom(240, size=32, seed=0)


@pytest.fixture(scope="module")
def bank(pictures):
    return extract(make_encoder("cnn-tiny"), pictures)


def altered(set, **parts):
    "The same pictures with some truth replaced."
    return ImageSet(set.images, parts.pop("info", set.info), table=set.table, **parts)


# ---------- wrong input: one sentence that names the part, the value and the remedy ----------

@pytest.mark.parametrize("spec, words", [
    ("class", "kind:target"), ("", "kind:target"), ("classification:", "kind:target"), ("sorting:class", "unknown kind 'sorting'"),
    ("classification:grade", "no label 'grade': it has class"), ("segmentation:liver", "no mask 'liver': it has tissue"),
    ("detection:liver", "detection:boxes"),
])
def test_unknown_task(pictures, spec, words):
    with pytest.raises(InputError, match=words): make_task(spec, pictures)


def test_set_without_boxes(pictures):
    bare = altered(pictures)
    assert {t.split(":")[0] for t in tasks_of(bare)} == {"reconstruction"}                # which needs no truth but the picture
    with pytest.raises(InputError, match="has no boxes"): make_task("detection:boxes", bare)


@pytest.mark.parametrize("spec", SPECS)
def test_budget(pictures, bank, spec):
    task = make_task(spec, pictures)
    wrong = (([], "expected picture indices"), ([.5], "expected picture indices"), ([10_000], "picture 10000: the set has pictures 0 to 239"),
             (pictures.ids("test")[:3], "holds test picture"))
    for budget, words in wrong:
        with pytest.raises(InputError, match=words): task.probe(bank, pictures, budget)


def test_class_never_seen(pictures, bank):
    budget = pictures.budget(120)
    kind = pictures.labels["class"][budget]
    with pytest.raises(InputError, match="class 'lattice' of classification:class is never seen"):
        make_task("classification:class", pictures).probe(bank, pictures, budget[kind != 3])
    empty = [i for i in budget if not len(pictures.boxes[i])]
    for spec in ("detection:boxes", "segmentation:lesion"):
        task, words = make_task(spec, pictures), f"class 'lesion' of {spec} is never seen"
        with pytest.raises(InputError, match=words): task.probe(bank, pictures, empty)
        with pytest.raises(InputError, match=words): task.finetune(make_encoder("cnn-tiny"), pictures, empty, steps=1)


def test_nobody_annotated(pictures, bank):
    unknown = altered(pictures, labels={"class": np.full(240, -1)}, masks={"tissue": np.full((240, 32, 32), 255)}, boxes=[None] * 240)
    for spec in tasks_of(unknown):
        if spec.startswith("reconstruction"): continue
        with pytest.raises(InputError, match="no test picture"): make_task(spec, unknown).probe(bank, unknown, unknown.budget(20))
    y = np.where(unknown.table.split == "test", 0, -1)
    some = altered(pictures, labels={"class": y})
    bank = extract(make_encoder("cnn-tiny"), some)
    with pytest.raises(InputError, match="none of the 20 pictures"):
        make_task("classification:class", some).probe(bank, some, some.budget(20))


def test_bank(pictures, bank):
    other = phantom(240, size=32, seed=1)
    task = make_task("classification:class", pictures)
    with pytest.raises(InputError, match="not of set"): task.probe(bank, other, other.budget(50))
    part = extract(make_encoder("cnn-tiny"), pictures, ids=pictures.ids("train"))
    with pytest.raises(InputError, match="not in the feature bank"): task.probe(part, pictures, pictures.budget(100))
    with pytest.raises(InputError, match="levels"): extract(make_encoder("cnn-tiny"), pictures, ids=[0], levels=[9])
    with pytest.raises(InputError, match="ids is empty"): extract(make_encoder("cnn-tiny"), pictures, ids=[])


def test_diverged_encoder(pictures):
    encoder = make_encoder("cnn-tiny")
    with torch.no_grad():
        for p in encoder.parameters(): p.fill_(torch.nan)
    with pytest.raises(InputError, match="diverged"): extract(encoder, pictures, ids=[0])


def test_weights(pictures, bank):
    scores = make_task("classification:class", pictures).probe(bank, pictures, pictures.budget(100))
    with pytest.raises(InputError, match="negative"): scores.value(weight=-np.ones(len(scores.ids)))
    with pytest.raises(InputError, match="one per test picture"): scores.value(weight=np.ones(3))
    with pytest.raises(InputError, match="use one of auroc"): scores.value(metric="dice")
    with pytest.raises(InputError, match="no such file"): Scores.load("nowhere/scores")


# ---------- every encoder, every task ----------

@pytest.mark.parametrize("name, dims, channels", [
    ("cnn-tiny", 2, 1), ("vit-tiny", 2, 1), ("cnn-tiny", 3, 1), ("vit-tiny", 3, 1), ("cnn-tiny", 2, 3)])
def test_probe_and_finetune(name, dims, channels):
    set = phantom(60, size=16 if dims == 3 else 32, dims=dims, seed=0, preset="histology" if channels == 3 else "texture")
    assert set.channels == channels
    encoder = make_encoder(name, channels=channels, dims=dims)
    bank, budget = extract(encoder, set), set.ids("train")
    for spec in SPECS:
        task = make_task(spec, set)
        for scores in (task.probe(bank, set, budget), task.finetune(encoder, set, budget, steps=2, batch=4)):
            assert list(scores.values())[0] == task.metric and 0 <= scores.value() <= 1
            assert len(scores.per_image()) == len(scores.ids) == len(set.ids("test"))
            assert scores.group_values().without.shape == (len(np.unique(scores.groups)),)


@pytest.mark.parametrize("spec", SPECS)
def test_equal_seeds(pictures, bank, spec, tmp_path):
    task, budget = make_task(spec, pictures), pictures.budget(100)
    a, b = (task.probe(bank, pictures, budget, seed=3) for _ in range(2))
    assert all(np.array_equal(a.raw[k], b.raw[k], equal_nan=a.raw[k].dtype.kind == "f") for k in a.raw) and a.info == b.info
    assert Scores.load(a.save(tmp_path / "s")).values() == pytest.approx(a.values(), nan_ok=True)


def test_pictures_without_lesions(pictures, bank):
    scores = make_task("segmentation:lesion", pictures).probe(bank, pictures, pictures.budget(100))
    absent = scores.raw["pixels"][:, 0] == 0
    assert absent.any() and set(np.nan_to_num(scores.raw["dice"][absent, 0], nan=-1)) <= {0., -1.}
    found = make_task("detection:boxes", pictures).probe(bank, pictures, pictures.budget(100))
    absent = found.raw["n_truth"][:, 0] == 0
    assert absent.any() and not found.raw["matched"][absent[found.raw["picture"]]].any()


def test_without_validation_pictures(pictures):
    table = pictures.table.assign(split=pictures.table.split.replace("val", "train"))
    set = ImageSet(pictures.images, pictures.info, labels=pictures.labels, masks=pictures.masks, boxes=pictures.boxes, table=table)
    bank = extract(make_encoder("cnn-tiny"), set)
    for spec in SPECS: assert 0 <= make_task(spec, set).probe(bank, set, set.budget(150)).value() <= 1


@pytest.mark.parametrize("spec", SPECS)
def test_shuffled_truth_is_chance(spec):
    "Truth of another picture: no better than what ignores the picture (tissue sits in the middle of each, so guessing scores high)."
    set = phantom(600, size=32, seed=0)
    mixed = np.random.default_rng(0).permutation(600)
    masks, boxes = {k: m[mixed] for k, m in set.masks.items()}, [set.boxes[i] for i in mixed]
    wrong = altered(set, labels={"class": set.labels["class"][mixed]}, masks=masks, boxes=boxes)
    bank = extract(make_encoder("cnn-tiny"), wrong)
    found = make_task(spec, wrong).probe(bank, wrong, wrong.budget(300)).value()
    most = {"classification:class": .58, "segmentation:tissue": .6, "segmentation:lesion": .15, "detection:boxes": .15}
    assert found < most[spec]


# ---------- agreement with independent implementations ----------

@pytest.mark.parametrize("seed", range(5))
def test_auroc_of_scikit_learn(seed):
    from sklearn.metrics import roc_auc_score
    g = np.random.default_rng(seed)
    s, y, w = g.integers(0, 20, 80) / 19, g.random(80) < .3, g.integers(0, 4, (3, 80)).astype(float)
    assert auroc(s, y, w) == pytest.approx([roc_auc_score(y, s, sample_weight=v) for v in w], abs=1e-9)


def test_average_precision_of_one_picture_each():
    "With one candidate per picture and a precision that never rises again, average precision is that of scikit-learn."
    from sklearn.metrics import average_precision_score
    g, n = np.random.default_rng(0), 50
    hit = np.sort(g.random(n) < .5)[::-1]
    hit[::7] = True
    raw = dict(score=np.linspace(1, 0, n), picture=np.arange(n), cls=np.zeros(n, int), matched=hit, n_truth=hit[:, None].astype(int))
    ours = kind_of("detection").metrics["ap"].value(raw, np.ones((1, n)), "matched")[0, 0]
    assert ours >= average_precision_score(hit, raw["score"]) - 1e-9
    rising = np.maximum.accumulate((np.cumsum(hit) / np.arange(1, n + 1))[::-1])[::-1]
    assert ours == pytest.approx(rising[hit].sum() / hit.sum(), abs=1e-9)


def test_dice_of_torchmetrics():
    functional = pytest.importorskip("torchmetrics.functional.classification")
    g = torch.Generator().manual_seed(0)
    a, b = (torch.rand(30, 1, 12, 12, generator=g) > .6 for _ in range(2))
    want = functional.binary_f1_score(a.flatten(1).int(), b.flatten(1).int(), multidim_average="samplewise")
    assert dice(a, b)[:, 0].numpy() == pytest.approx(want.numpy(), abs=1e-6)


def random_boxes(g, n):
    start = g.integers(0, 20, (n, 2))
    return np.concatenate([start, start + g.integers(3, 9, (n, 2)), g.integers(0, 2, (n, 1))], 1).astype(np.float32)


@pytest.mark.parametrize("seed", range(5))
def test_matching_of_monai(seed):
    from monai.apps.detection.metrics.matching import matching_batch
    from monai.data.box_utils import box_iou
    g = np.random.default_rng(seed)
    truth, found = ([random_boxes(g, n) for n in g.integers(low, 9, 6)] for low in (0, 1))
    score = [np.sort(g.random(len(f)))[::-1].copy() for f in found]
    parts = lambda boxes: ([b[:, :4] for b in boxes], [b[:, 4].astype(int) for b in boxes])
    want = matching_batch(lambda a, b: np.asarray(box_iou(a, b)), OVERLAPS, *parts(found), score, *parts(truth), [np.zeros(len(t)) for t in truth])
    box = pad_boxes(found, 2)
    for k, overlap in enumerate(OVERLAPS):
        hit = match(box[..., :4], box[..., 4], box[..., 4] >= 0, pad_boxes(truth, 2), overlap)
        for i, f in enumerate(found):
            for c in (0, 1):
                mine = f[:, 4] == c
                theirs = want[i].get(c, {"dtMatches": np.zeros((3, mine.sum()))})["dtMatches"][k]
                assert np.array_equal(hit[i, :len(f)].numpy()[mine], theirs > 0)


def test_froc_of_monai():
    from monai.metrics import compute_froc_curve_data, compute_froc_score
    g = np.random.default_rng(0)
    m, n = 400, 10
    score, hit = g.permutation(m) / m, g.random(m) < .1
    raw = dict(score=score, picture=g.integers(0, n, m), cls=np.zeros(m, int), matched=hit.astype(np.uint8), n_truth=np.full((n, 1), 6))
    fp, sensitivity = compute_froc_curve_data(score[~hit], score[hit], 6 * n, n)
    want = compute_froc_score(fp, sensitivity, (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8))
    assert froc_per_class(raw, np.ones((1, n)))[0, 0] == pytest.approx(want, abs=1e-9)


def test_several_labels():
    g = np.random.default_rng(0)
    y = g.integers(0, 2, (80, 3)).astype(np.uint8)
    images = np.zeros((80, 1, 16, 16), np.uint8) + 60 + 60 * y[:, :1, None, None] + g.integers(0, 30, (80, 1, 16, 16)).astype(np.uint8)
    table = pd.DataFrame({"split": np.repeat(["train", "val", "test"], [40, 10, 30])})
    set = ImageSet(images, Info("several", classes={"what": ["bright", "b", "c"]}), labels={"what": y}, table=table)
    bank, task = extract(make_encoder("cnn-tiny"), set), make_task("classification:what", set)
    assert task.probe(bank, set, set.ids("train")).values()["auroc: bright"] > .9
    with pytest.raises(InputError, match="class 'b'"): task.probe(bank, set, set.ids("train")[y[:40, 1] == 0])
