"""Detection: metrics agree with pycocotools and MONAI, pictures that lack something, the RetinaNet head, real photographs."""
import numpy as np
import pytest
import torch
from torchvision.ops import sigmoid_focal_loss

from tasl_lab.core import InputError
from tasl_lab.data.crops import crops
from tasl_lab.data.folders import from_folder
from tasl_lab.data.imageset import ImageSet, Info
from tasl_lab.data.phantom import phantom
from tasl_lab.encoders import make_encoder
from tasl_lab.tasks.features import extract
from tasl_lab.tasks.registry import make_task
from tasl_lab.tasks.retinanet import CANDIDATES, SIDES, anchored, anchors_of, coder

CLASSES = ["a", "b", "c"]


# ---------- random pictures with random detections ----------

def random_truth(g, n, dims=2, side=64):
    "Boxes of three sizes, some pictures without any; class c is rare."
    out = []
    for k in g.integers(0, 7, n):
        start, extent = g.uniform(0, side - 20, (k, dims)), g.uniform(3, 20, (k, dims))
        out.append(np.concatenate([start, start + extent, g.choice(3, (k, 1), p=[.5, .45, .05])], 1).astype(np.float32))
    return out


def random_detections(g, truth, dims=2, most=30):
    "Shifted copies of the truth, doubles and false alarms, each list sorted by score."
    parts = dict(box=np.zeros((len(truth), most, 2 * dims), np.float32), score=np.full((len(truth), most), -np.inf), cls=np.zeros((len(truth), most), int))
    for i, t in enumerate(truth):
        near = np.repeat(t, 2, 0)[g.random(2 * len(t)) < .7]
        near[:, :-1] += g.normal(0, 1.5, near[:, :-1].shape)
        rows = np.concatenate([near, *random_truth(g, 3, dims)])[:most]
        rows[:, dims:-1] = np.maximum(rows[:, dims:-1], rows[:, :dims] + 1)
        score = np.sort(g.random(len(rows)))[::-1]
        rows = rows[g.permutation(len(rows))]
        parts["box"][i, :len(rows)], parts["score"][i, :len(rows)], parts["cls"][i, :len(rows)] = rows[:, :-1], score, rows[:, -1]
    return parts


def random_scores(seed, n=25, dims=2):
    "Scores of random detections, with their truth and the detections themselves."
    g = np.random.default_rng(seed)
    truth = random_truth(g, n, dims)
    found = random_detections(g, truth, dims)
    set = ImageSet(np.zeros((n, 1, *[64] * dims), np.uint8), Info("random", classes={"boxes": CLASSES}), boxes=truth)
    return make_task("detection:boxes", set).evaluate(found, set, set.ids()), truth, found


def pycoco(truth, found, keep=None):
    "pycocotools' evaluation of the pictures `keep`, repeated as often as they stand there."
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    keep = range(len(truth)) if keep is None else keep
    wide = lambda b: [float(b[1]), float(b[0]), float(b[3]) - float(b[1]), float(b[2]) - float(b[0])]  # x, y, width, height
    notes, said = [], []
    for image, i in enumerate(keep):
        notes += [dict(image_id=image, category_id=int(b[4]), bbox=wide(b), area=wide(b)[2] * wide(b)[3], iscrowd=0) for b in truth[i]]
        rows = [r for r in range(found["score"].shape[1]) if found["score"][i, r] > -np.inf]
        said += [dict(image_id=image, category_id=int(found["cls"][i, r]), bbox=wide(found["box"][i, r]), score=float(found["score"][i, r])) for r in rows]
    gold = COCO()
    categories = [dict(id=k, name=c) for k, c in enumerate(CLASSES)]
    gold.dataset = dict(images=[dict(id=k) for k in range(len(keep))], annotations=[n | {"id": k + 1} for k, n in enumerate(notes)], categories=categories)
    gold.createIndex()
    return COCOeval(gold, gold.loadRes(said), "bbox"), notes


def needs_pycocotools(): pytest.importorskip("pycocotools", reason="needs pycocotools, a development dependency: pip install pycocotools")


@pytest.mark.parametrize("seed", range(6))
def test_coco_map_of_pycocotools(seed):
    needs_pycocotools()
    scores, truth, found = random_scores(seed)
    twice = np.random.default_rng(seed).integers(0, len(truth), len(truth))  # a resample, as pictures and as weights
    for keep in (np.arange(len(truth)), twice):
        evaluation, _ = pycoco(truth, found, keep)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        assert scores.value(keep=keep, metric="coco map") == pytest.approx(evaluation.stats[0], abs=1e-6)
    precision = evaluation.eval["precision"][:, :, :, 0, -1]                  # (overlaps, recalls, classes)
    mine = scores.per_class(np.bincount(twice, minlength=len(truth))[None].astype(float), "coco map")[0]
    for k in range(3):
        known = (precision[:, :, k] > -1).all()
        assert known != np.isnan(mine[k]) and (not known or mine[k] == pytest.approx(precision[:, :, k].mean(), abs=1e-6))


@pytest.mark.parametrize("seed", range(6))
def test_average_precision_of_pycocotools(seed):
    "Our area is the mean of the interpolated precision at the recalls k/n, k = 1 ... n."
    needs_pycocotools()
    scores, truth, found = random_scores(seed)
    for k in range(3):
        evaluation, notes = pycoco(truth, found)
        n = sum(row["category_id"] == k for row in notes)
        if not n: continue
        evaluation.params.iouThrs, evaluation.params.catIds = np.array([.1, .3, .5]), [k]
        evaluation.params.recThrs = np.arange(1, n + 1) / n - 1e-9
        evaluation.evaluate()
        evaluation.accumulate()
        for o, name in enumerate(("ap", "ap30", "ap50")):
            want = evaluation.eval["precision"][o, :, 0, 0, -1].mean()
            assert scores.values()[f"{name}: {CLASSES[k]}"] == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_sensitivity_of_monai(seed):
    from monai.metrics import compute_froc_curve_data, compute_froc_score
    scores, truth, _ = random_scores(seed)
    raw, values = scores.raw, scores.values()
    for k, name in enumerate(CLASSES):
        n = sum((t[:, -1] == k).sum() for t in truth)
        if not n: continue
        mine, hit = raw["cls"] == k, raw["matched"] == 1
        false = np.append(raw["score"][mine & ~hit], -1)     # MONAI leaves the lowest score out, so one is added that may go
        curve = compute_froc_curve_data(false, raw["score"][mine & hit], int(n), len(truth))
        for rate, number in (("1/4", 1 / 4), ("1/2", 1 / 2), ("1", 1), ("2", 2), ("4", 4), ("8", 8)):
            assert values[f"sensitivity@{rate}: {name}"] == pytest.approx(compute_froc_score(*curve, (number,)), abs=1e-6)
        assert values[f"froc: {name}"] == pytest.approx(compute_froc_score(*curve, (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)), abs=1e-6)


def plain_by_size(truth, found, dims, k, third, keep):
    "Sensitivity to a third by size, averaged over the seven rates, by plain loops over pictures and thresholds; written for distinct scores."
    from monai.data.box_utils import box_iou
    volumes = lambda t: (t[:, dims:2 * dims] - t[:, :dims]).prod(1)
    every = np.sort(np.concatenate([volumes(t)[t[:, -1] == k] for t in truth]))
    low, high = (every[int(np.ceil(len(every) * q - 1e-9)) - 1] for q in (1 / 3, 2 / 3))
    which = lambda v: 0 if v <= low else 1 if v <= high else 2
    events, total = [], 0
    for i in keep:
        mine, taken = truth[i][truth[i][:, -1] == k], []
        total += sum(which(v) == third for v in volumes(mine))
        for r in np.flatnonzero((found["cls"][i] == k) & (found["score"][i] > -np.inf)):
            fit = [float(box_iou(found["box"][i, r][None], t[None, :-1])[0, 0]) if j not in taken else -1 for j, t in enumerate(mine)]
            best = int(np.argmax(fit)) if fit and max(fit) >= .1 else None
            if best is not None: taken.append(best)
            events.append((found["score"][i, r], None if best is None else which(volumes(mine)[best])))
    events.sort(key=lambda e: -e[0])
    if not total: return np.nan
    scores = sorted({s for s, _ in events}, reverse=True)
    fp = [0] + [sum(w is None for s, w in events if s >= t) / len(keep) for t in scores]
    tp = [0] + [sum(w == third for s, w in events if s >= t) / total for t in scores]
    return np.interp((1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8), fp, tp).mean()


@pytest.mark.parametrize("dims", [2, 3])
def test_froc_by_size_of_a_plain_loop(dims):
    scores, truth, found = random_scores(3, 12, dims)
    again = np.array([0, 0, 1, 4, 5, 5, 5, 9])
    for keep in (np.arange(12), again):
        mine = {t: scores.per_class(np.bincount(keep, minlength=12)[None].astype(float), f"froc {t}")[0] for t in ("small", "medium", "large")}
        for k in range(2):
            for third, name in enumerate(mine): assert mine[name][k] == pytest.approx(plain_by_size(truth, found, dims, k, third, keep), abs=1e-6, nan_ok=True)


def test_thirds_hold_all_lesions():
    raw = random_scores(0)[0].raw
    limits = {k: np.quantile(raw["truth_size"][raw["truth_cls"] == k], (1 / 3, 2 / 3), method="inverted_cdf") for k in (0, 1)}
    for k in (0, 1):
        number = np.bincount(np.searchsorted(limits[k], raw["truth_size"][raw["truth_cls"] == k]), minlength=3)
        assert number.sum() == raw["n_truth"][:, k].sum() and number.max() - number.min() <= 2
    assert ((raw["matched_size"] > 0) == (raw["matched"] == 1)).all()


def test_weights_are_repeated_pictures():
    "Every metric: a picture that weighs 2 is a picture that stands there twice, and one that weighs 0 is gone."
    scores, truth, found = random_scores(1)
    keep = np.random.default_rng(0).integers(0, len(truth), 40)
    chosen = ImageSet(np.zeros((40, 1, 64, 64), np.uint8), Info("chosen", classes={"boxes": CLASSES}), boxes=[truth[i] for i in keep])
    again = make_task("detection:boxes", chosen).evaluate({k: v[keep] for k, v in found.items()}, chosen, chosen.ids())
    assert len(scores.metrics) == 14
    for metric in scores.metrics:
        if metric in ("froc small", "froc medium", "froc large"): continue   # their thirds are those of all test pictures
        assert scores.value(keep=keep, metric=metric) == pytest.approx(again.value(metric=metric), abs=1e-9, nan_ok=True)


def test_leaving_out_groups():
    scores, *_ = random_scores(2)
    for metric in scores.metrics:
        left = scores.group_values(metric)
        for j in (0, 7): assert left.without[j] == pytest.approx(scores.value(keep=scores.groups != left.names[j], metric=metric), nan_ok=True)


# ---------- pictures without boxes, pictures nobody annotated, absent classes ----------

@pytest.fixture(scope="module")
def partly():
    "Every third picture is not annotated, and the second class is never there."
    set = phantom(150, size=32, seed=0)
    boxes = [None if i % 3 == 0 else b for i, b in enumerate(set.boxes)]
    return ImageSet(set.images, Info("partly", classes={"boxes": ["lesion"]}), boxes=boxes, table=set.table)


def test_not_annotated_is_neither_trained_on_nor_scored(partly):
    task, encoder = make_task("detection:boxes", partly), make_encoder("cnn-tiny")
    bank = extract(encoder, partly)
    mixed, known = partly.ids("train"), np.array([i for i in partly.ids("train") if i % 3])
    assert any(len(partly.boxes[i]) == 0 for i in known) and len(known) < len(mixed)
    for run in (lambda ids: task.probe(bank, partly, ids), lambda ids: task.finetune(encoder, partly, ids, steps=3, batch=8)):
        scores = run(mixed)
        assert set(scores.ids) == {i for i in partly.ids("test") if i % 3} and len(scores.raw["n_truth"]) == len(scores.ids)
        assert all(np.array_equal(v, run(known).raw[k], equal_nan=v.dtype.kind == "f") for k, v in scores.raw.items())


def test_false_alarms_in_empty_pictures_count(partly):
    task = make_task("detection:boxes", partly)
    test = task.tested(partly)
    empty = np.array([len(partly.boxes[i]) == 0 for i in test])
    truth = task.truth(partly, test).numpy()
    found = dict(box=truth[..., :4].copy(), score=np.where(truth[..., 4] >= 0, .5, -np.inf), cls=np.zeros(truth.shape[:2], int))
    perfect = task.evaluate(found, partly, test)
    found["score"][empty, 0], found["box"][empty, 0] = .9, [0, 0, 8, 8]
    alarmed = task.evaluate(found, partly, test)
    assert empty.any() and perfect.value() == 1 and alarmed.value(keep=~empty) == 1
    for metric in ("ap", "coco map", "froc", "sensitivity@1/4", "froc small"): assert alarmed.value(metric=metric) < perfect.value(metric=metric)


def test_retinanet_learns_from_empty_pictures(partly):
    task = make_task("detection:boxes", partly).tuned()
    encoder = make_encoder("cnn-tiny")
    head = task.head(extract(encoder, partly, ids=partly.ids("train")), partly)
    batch = partly.batch([i for i in partly.ids("train") if partly.boxes[i] is not None and not len(partly.boxes[i])][:3])
    loss = task.loss(task.outputs(head, encoder(batch.images.float() / 255), (32, 32)), batch, (32, 32))
    loss.backward()
    assert loss.isfinite() and head.score.cls_logits.bias.grad.min() > 0     # every anchor is pushed down
    assert head.shape.bbox_reg.bias.grad.abs().max() == 0                    # and no box is learnt


# ---------- the RetinaNet head ----------

def test_every_box_has_an_anchor():
    g = np.random.default_rng(0)
    for dims in (2, 3):
        grids = [(32 // s,) * dims for s in (4, 8, 16)]
        anchors, places = anchors_of((32,) * dims, grids, [4, 8, 16]), [int(np.prod(n)) for n in grids]
        for _ in range(20):
            start, extent = g.uniform(0, 20, (4, dims)), g.uniform(1, 12, (4, dims))
            boxes = torch.as_tensor(np.concatenate([start, start + extent], 1), dtype=torch.float32)
            which = anchored(boxes, anchors, places)
            assert len(which) == len(anchors) == sum(places) * len(SIDES)
            best = [int(anchored(b[None], anchors, places).max()) for b in boxes]
            assert best == [0, 0, 0, 0] and which.max() < 4


class Focal(torch.nn.Module):
    "torchvision's focal loss as a module, which MONAI's detector asks for."
    def forward(self, x, y): return sigmoid_focal_loss(x, y, alpha=.25, gamma=2, reduction="sum")


def test_loss_of_monai():
    "Equal to MONAI's own detector with torchvision's focal loss, where its matcher leaves no box without an anchor."
    from monai.apps.detection.networks.retinanet_detector import RetinaNetDetector
    from monai.apps.detection.utils.anchor_utils import AnchorGeneratorWithAnchorShape
    set = phantom(40, size=64, seed=0)
    task = make_task("detection:boxes", set).tuned()
    encoder, anchors = make_encoder("cnn-tiny"), AnchorGeneratorWithAnchorShape([4, 8, 16], [[s, s] for s in SIDES])
    head = task.head(extract(encoder, set), set).eval()
    detector = RetinaNetDetector(torch.nn.Identity(), anchors, spatial_dims=2, num_classes=1)
    detector.set_atss_matcher(4, center_in_gt=False)
    detector.set_cls_loss(Focal())
    detector.set_box_regression_loss(torch.nn.SmoothL1Loss(beta=1 / 9, reduction="sum"), encode_gt=True, decode_pred=False)
    compared = 0
    for i in [i for i in set.ids() if len(set.boxes[i])][:8]:
        batch = set.batch([i])
        with torch.no_grad(): said = task.outputs(head, encoder(batch.images.float() / 255), (64, 64))
        box = torch.as_tensor(batch.boxes[0])
        targets = [dict(boxes=box[:, :4], labels=box[:, 4].long())]
        which = detector.compute_anchor_matched_idxs([said.anchors], targets, said.places)[0]
        if set_of(which) != set_of(torch.arange(-1, len(box))) or not torch.equal(which, anchored(box[:, :4], said.anchors, said.places)): continue
        parts = detector.compute_loss({"classification": said.score, "box_regression": said.shape}, targets, [said.anchors], said.places)
        assert float(task.loss(said, batch, (64, 64))) == pytest.approx(float(sum(parts.values())) / int((which >= 0).sum()), rel=1e-5)
        compared += 1
    assert compared >= 3


def set_of(x): return set(x.tolist())


@pytest.mark.parametrize("dims", [2, 3])
def test_decoding_of_monai(dims):
    "The same detections as MONAI's box selector, which removes doubles picture by picture."
    from monai.apps.detection.utils.box_selector import BoxSelector
    task = make_task("detection:boxes", ImageSet(np.zeros((2, 1, *[32] * dims), np.uint8), Info("d", classes={"boxes": CLASSES}), boxes=[None, None])).tuned()
    g = torch.Generator().manual_seed(0)
    grids = [(32 // s,) * dims for s in (8, 16)]
    anchors = anchors_of((32,) * dims, grids, [8, 16])
    score, shape = torch.randn(2, len(anchors), 3, generator=g), .3 * torch.randn(2, len(anchors), 2 * dims, generator=g)
    found = task.decode((score, shape, anchors, None), (32,) * dims)
    pick = BoxSelector(score_thresh=0, topk_candidates_per_level=CANDIDATES, nms_thresh=.3, detections_per_img=100)
    for i in range(2):
        box, s, c = pick.select_boxes_per_image([coder(dims).decode_single(shape[i], anchors)], [score[i]], (32,) * dims)
        order = torch.argsort(s, descending=True)[:100]
        here = found["score"][i] > -np.inf
        assert here.sum() == len(order) and found["score"][i][here] == pytest.approx(s[order].numpy(), abs=1e-6)
        assert np.allclose(found["box"][i][here], box[order].numpy(), atol=1e-4) and (found["cls"][i][here] == c[order].numpy()).all()


LONG = [pytest.param(*case, marks=pytest.mark.slow) for case in (("vit-tiny", 2), ("cnn-tiny", 3), ("vit-tiny", 3))]


@pytest.mark.parametrize("name, dims", [("cnn-tiny", 2), *LONG])
def test_retinanet_learns_by_heart(name, dims):
    "A few pictures, the same at every step: loss falls, equal seeds agree, the boxes of those pictures come out."
    from tasl_lab.tasks.finetune import optimizer
    set = phantom(12, size=16 if dims == 3 else 32, dims=dims, seed=0)
    task, encoder = make_task("detection:boxes", set).tuned(), make_encoder(name, dims=dims)
    torch.manual_seed(0)
    head = task.head(extract(encoder, set), set)
    batch = set.batch([i for i in set.ids() if len(set.boxes[i])][:4])
    x, losses = batch.images.float() / 255, []
    solver = optimizer(encoder, head)
    for group in solver.param_groups: group["lr"] = 5e-3 * group["share"]
    for _ in range(40):
        loss = task.loss(task.outputs(head, encoder(x), set.spatial), batch, set.spatial)
        solver.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for g in solver.param_groups for p in g["params"]], 1.)
        solver.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < .4 * losses[0]
    with torch.no_grad(): found = task.decode(task.outputs(head.eval(), encoder.eval()(x), set.spatial), set.spatial)
    part = ImageSet(set.images[batch.ids], set.info, boxes=[set.boxes[i] for i in batch.ids])
    assert task.evaluate(found, part, np.arange(4)).value() > .5


def test_finetuning_is_deterministic():
    set = phantom(60, size=32, seed=0)
    task, encoder = make_task("detection:boxes", set).tuned(), make_encoder("cnn-tiny")
    one, same, other = (task.finetune(encoder, set, set.ids("train"), seed=s, steps=3, batch=8) for s in (0, 0, 1))
    assert all(np.array_equal(one.raw[k], same.raw[k]) for k in one.raw) and not np.array_equal(one.raw["score"], other.raw["score"])


def test_retinanet_is_not_fitted():
    set = phantom(60, size=32, seed=0)
    task, bank = make_task("detection:boxes", set).tuned(), extract(make_encoder("cnn-tiny"), set)
    with pytest.raises(InputError, match="call `finetune`"): task.probe(bank, set, set.ids("train"))


# ---------- real photographs ----------

@pytest.fixture(scope="module")
def bccd(extra_data): return from_folder(extra_data("bccd"), (96, 128), errors="skip", modality="microscopy", salt="s")


def test_boxes_of_blood_cells(bccd):
    assert len(bccd) == 364 and bccd.info.classes["boxes"] and "2 x box without size" in bccd.info.note
    assert sum(map(len, bccd.boxes)) == 4886 and bccd.channels == 3


def test_probe_of_blood_cells(bccd):
    "Run end to end: a random encoder finds cells far more often than where boxes are put at random places."
    task = make_task("detection:boxes", bccd)
    bank = extract(make_encoder("cnn-tiny", channels=3), bccd)
    scores = task.probe(bank, bccd, bccd.budget(100))
    values = scores.values()
    assert all(f"{m}: {c}" in values for m in ("ap", "coco map", "froc small") for c in task.classes)
    g, n = np.random.default_rng(0), len(scores.ids)
    start, extent = g.uniform(0, (70, 100), (n, 100, 2)), g.uniform(8, 26, (n, 100, 2))
    chance = dict(box=np.concatenate([start, start + extent], 2).astype(np.float32), score=np.sort(g.random((n, 100)))[:, ::-1].copy(),
                  cls=g.integers(0, 3, (n, 100)))
    chance = task.evaluate(chance, bccd, scores.ids).values()
    print({k: (round(values[k], 3), round(chance[k], 3)) for k in ("ap", "ap50", "coco map", "froc")})
    for metric in ("ap", "ap50", "coco map", "froc"): assert values[metric] > 2 * chance[metric]


def test_finetuning_on_blood_cells(bccd):
    task = make_task("detection:boxes", bccd).tuned()
    scores = task.finetune(make_encoder("cnn-tiny", channels=3), bccd, bccd.budget(60), steps=2, batch=4)
    assert 0 <= scores.value() <= 1 and scores.raw["n_truth"].shape == (len(bccd.ids("test")), 3)


def test_crops_of_blood_cells(bccd):
    cells = crops(bccd, 32)
    assert len(cells) == 4886 and cells.spatial == (32, 32)
    assert cells.table.groupby("patient").split.nunique().max() == 1
    assert (cells.table.patient.to_numpy() == bccd.table.patient.to_numpy()[cells.table.picture]).all()
    few = cells.subset(np.sort(np.random.default_rng(0).permutation(len(cells))[:900]))
    scores = make_task("classification:class", few).probe(extract(make_encoder("cnn-tiny", channels=3), few), few, few.ids("train"))
    print({k: round(v, 3) for k, v in scores.values().items() if ":" not in k})
    assert scores.value() > .9
