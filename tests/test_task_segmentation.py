"""Segmentation: metrics agree with independent implementations, neighbours vote as a search does, what is absent or unannotated is handled."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tasl_lab.core import InputError, rng
from tasl_lab.data.imageset import Batch, ImageSet
from tasl_lab.data.phantom import phantom
from tasl_lab.encoders import make_encoder
from tasl_lab.tasks.decoder import Decoder
from tasl_lab.tasks.features import FeatureBank, extract
from tasl_lab.tasks.finetune import optimizer
from tasl_lab.tasks.in_context import draw_patches, patch_grid, patch_shares, remember, vote
from tasl_lab.tasks.registry import make_task
from tasl_lab.tasks.scores import Scores
from tasl_lab.tasks.segmentation import IGNORE, by_size, dice, hd95, lesions, lesions_found, small_lesions_found

SHAPES = {2: (24, 20), 3: (10, 12, 9)}


@pytest.fixture(scope="module")
def pictures():
    return phantom(240, size=32, seed=0)


@pytest.fixture(scope="module")
def bank(pictures):
    return extract(make_encoder("cnn-tiny"), pictures)


def blobs(dims, n=12, k=3, seed=0):
    "Smooth random regions, two sets that overlap in part; some are empty, some touch the edge."
    g = torch.Generator().manual_seed(seed)
    pool = F.avg_pool2d if dims == 2 else F.avg_pool3d
    a, b = (pool(torch.rand(n, k, *SHAPES[dims], generator=g), 3, 1, 1) > (.58 if dims == 2 else .54) for _ in range(2))
    b[:6] |= a[:6]
    a[5, 0], b[5, 0], b[6, 1], a[7, 2] = False, False, False, False
    return a, b


def relabelled(set, **masks):
    "The same pictures with other masks."
    return ImageSet(set.images, set.info, masks=masks, table=set.table)


def rebanked(bank, set):
    "The same features for a set with other truth."
    return FeatureBank(bank.ids, bank.pooled, bank.maps, bank.spatial, bank.levels, set.sha256, bank.encoder)


# ---------- metrics against independent implementations ----------

@pytest.mark.parametrize("dims", (2, 3))
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_hd95_is_monais(dims, seed):
    from monai.metrics import compute_hausdorff_distance
    a, b = blobs(dims, seed=seed)
    both = a.flatten(2).any(2) & b.flatten(2).any(2)
    found, want = hd95(a, b), compute_hausdorff_distance(a.float(), b.float(), include_background=True, percentile=95).double()
    assert 0 < both.sum() < both.numel() and torch.allclose(found[both], want[both], rtol=1e-6, atol=1e-6)
    assert found[~both].isnan().all() and len(found[both].unique()) > 3


def test_hd95_of_far_regions():
    "Opposite corners of one picture, beside pictures whose regions are nearer in the row of pictures."
    a, b = torch.zeros(3, 1, 16, 16, dtype=bool), torch.zeros(3, 1, 16, 16, dtype=bool)
    a[1, 0, 0, 0], b[1, 0, 15, 15] = True, True
    a[0, 0, 15, 15], b[0, 0, 15, 15], a[2, 0, 15, 15] = True, True, True
    assert hd95(a, b)[:2, 0].tolist() == [0, pytest.approx(15 * 2 ** .5)] and hd95(a, b)[2].isnan()


@pytest.mark.parametrize("dims", (2, 3))
def test_dice_is_torchmetrics(dims):
    from torchmetrics.functional.segmentation import dice_score
    a, b = blobs(dims)
    there = (a | b).flatten(2).any(2)
    want = dice_score(a.int(), b.int(), 3, include_background=True, average="none", aggregation_level="samplewise")
    assert torch.allclose(dice(a, b)[there], want.reshape(there.shape)[there].double(), atol=1e-6) and dice(a, b)[~there].isnan().all()


def flood(region):
    "Connected components of a region (*spatial) bool by walking from pixel to pixel, as lists of places."
    left, parts = set(zip(*np.nonzero(region))), []
    while left:
        part, todo = [], [left.pop()]
        while todo:
            here = todo.pop()
            part.append(here)
            near = {tuple(np.add(here, step * np.eye(region.ndim, dtype=int)[axis])) for axis in range(region.ndim) for step in (-1, 1)}
            todo += near & left
            left -= near
        parts.append(part)
    return parts


@pytest.mark.parametrize("dims", (2, 3))
def test_lesions_are_a_plain_walk(dims):
    "Components by walking, recall by a plain loop, also in a resample of the pictures."
    a, b = blobs(dims)
    rows = [(i, c, len(part), np.mean([bool(a[(i, c, *at)]) for at in part])) for i, c in np.ndindex(*b.shape[:2]) for part in flood(b[i, c].numpy())]
    raw = lesions(a, b)
    mine = list(zip(*(raw[k] for k in ("lesion_picture", "lesion_class", "lesion_pixels", "lesion_share"))))
    assert np.allclose(sorted(mine), sorted(rows), atol=1e-6) and len(rows) > 20
    weight = np.stack([np.ones(len(a)), np.random.default_rng(0).integers(0, 4, len(a))])
    for c in range(3):
        own = [(i, n, s) for i, k, n, s in rows if k == c]
        cut = np.median([n for _, n, _ in own])
        assert raw["small_cut"][c] == cut
        for w, all_, small in zip(weight, lesions_found(raw, weight)[:, c], small_lesions_found(raw, weight)[:, c]):
            for value, most in ((all_, np.inf), (small, cut)):
                some = [(w[i], s >= .1) for i, n, s in own if n <= most]
                assert value == pytest.approx(np.average([s for _, s in some], weights=[v for v, _ in some]), abs=1e-6)


def test_metrics_follow_weights(pictures, bank, tmp_path):
    "A resample that names pictures is the same as the score of these pictures alone."
    task = make_task("segmentation:tissue", pictures)
    scores = task.probe(bank, pictures, pictures.budget(120))
    assert scores.metrics == list(task.metrics) and task.metrics["hd95"].lower and task.metric == "dice"
    some = scores.ids[::2]
    head = task.fitted(bank, pictures, pictures.budget(120))
    alone = task.evaluate(task.predict(head, bank.stream(some), bank.spatial), pictures, some)
    for m in ("dice", "surface dice", "hd95", "lesion recall"):
        assert scores.value(np.arange(0, len(scores.ids), 2), metric=m) == pytest.approx(alone.value(metric=m), abs=1e-9)
    again = Scores.load(scores.save(tmp_path / "s"))
    assert again.values() == pytest.approx(scores.values(), nan_ok=True) and by_size(again).equals(by_size(scores))


def test_by_size(pictures, bank):
    scores = make_task("segmentation:lesion", pictures).probe(bank, pictures, pictures.budget(120))
    table, pixels = by_size(scores), scores.raw["pixels"][:, 0]
    assert table["size"].tolist() == ["small", "middle", "large"] and table.pictures.sum() == (pixels > 0).sum()
    for row in table.itertuples():
        mine = (pixels >= row.smallest) & (pixels <= row.largest) & (pixels > 0)
        assert mine.sum() == row.pictures and row.dice == pytest.approx(scores.raw["dice"][mine, 0].mean())
    assert table.largest[0] < table.smallest[1] and table.largest[1] < table.smallest[2]


# ---------- neighbours ----------

@pytest.mark.parametrize("width, classes", [(8, 3), (2, 5)])
def test_vote_is_a_softmax_of_cosines(width, classes):
    r = np.random.default_rng(width)
    query, memory, shares = r.normal(size=(50, width)), r.normal(size=(200, width)), r.dirichlet(np.ones(classes), 200)
    query, memory = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (query, memory))
    weight = np.exp(query @ memory.T / .05)
    want = weight @ shares / weight.sum(1, keepdims=True)
    assert np.allclose(vote(*(torch.from_numpy(x) for x in (query, memory, shares)), .05), want, atol=1e-6)


@pytest.mark.parametrize("dims", (2, 3))
def test_shares_are_plain_means(dims):
    size, grid = (12, 8, 8)[:dims], (3, 2, 2)[:dims]
    masks = np.random.default_rng(0).choice([0, 1, 2, IGNORE], size=(70, *size))
    masks[0, :4, :4] = IGNORE
    found = patch_shares(masks, 3, grid)
    for i, p in ((0, 0), (0, 3), (69, 1)):
        at = tuple(slice(g * 4, g * 4 + 4) for g in np.unravel_index(p, grid))
        cell = masks[(i, *at)]
        want = [(cell == c).sum() / max((cell != IGNORE).sum(), 1) for c in range(3)]
        assert np.allclose(found[i, p], want, atol=1e-6)
    assert found.shape == (70, np.prod(grid), 3)


def test_memory_is_balanced_and_repeatable(pictures, bank):
    ids, mask = pictures.ids("train"), pictures.masks["lesion"]
    shares = patch_shares(mask[ids], 2, patch_grid(bank)).reshape(-1, 2)
    a, b = (draw_patches(shares, rng("test", 0), 500) for _ in range(2))
    assert np.array_equal(a[0], b[0]) and len(np.unique(a[0])) == 500 and a[1][1] < .05 and a[2][1] > 5 * a[1][1]
    with pytest.raises(InputError, match="no patch"): draw_patches(shares[:0], rng("test", 0))


@pytest.mark.parametrize("name, dims", [("cnn-tiny", 2), ("vit-tiny", 2), ("cnn-tiny", 3), ("vit-tiny", 3)])
def test_neighbours_know_informative_features(name, dims):
    "Appended levels that hold the mask make neighbours nearly perfect; shuffled truth in the memory makes them guess."
    set = phantom(60, size=16 if dims == 3 else 32, dims=dims, seed=0)
    bank = extract(make_encoder(name, dims=dims), set)
    m = set.masks["tissue"]
    bank.maps = [(m[:, None] == np.arange(3).reshape(-1, *[1] * dims)).astype(np.float16) * 100]
    task, train = make_task("segmentation:tissue", set), set.ids("train")
    known = task.probe(bank, set, train).value(metric="knn dice")
    shuffled = m.copy()
    shuffled[train] = rng("test", 0).permutation(m[train].ravel()).reshape(m[train].shape)
    blind = relabelled(set, tissue=shuffled)
    memory = remember(bank, train, shuffled[train], 3, task.stats(bank, blind), rng("test", 0))
    guess = np.nanmean(dice(*task.compared(memory.decide(bank, task.tested(set), .5), set, task.tested(set))).numpy())
    assert known > .95 and guess < known - .3


# ---------- the decoder ----------

@pytest.mark.parametrize("name, dims", [("cnn-tiny", 2), ("vit-tiny", 2), ("cnn-tiny", 3), ("vit-tiny", 3)])
def test_decoder(name, dims):
    "Begins as the linear head, reaches every parameter, and works in other sizes than it was built for."
    set = phantom(8, size=32, dims=dims, seed=0)
    encoder = make_encoder(name, dims=dims)
    bank = extract(encoder, set)
    task = make_task("segmentation:tissue", set).tuned()
    head, f = task.head(bank, set), bank.features([0, 1])
    assert isinstance(head, Decoder) and task.tuned() is task and head(f, set.spatial).abs().max() == 0
    groups = optimizer(encoder, head).param_groups
    assert sum(p.numel() for g in groups for p in g["params"]) == sum(p.numel() for m in (encoder, head) for p in m.parameters())
    with torch.no_grad(): head.last.weight.normal_()
    head(f, set.spatial).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())
    double = encoder(torch.rand(1, 1, *[64] * dims))
    double.maps = double.maps[-len(bank.maps):]
    assert head(double, [64] * dims).shape == (1, 3, *[64] * dims)


@pytest.mark.slow
def test_decoder_learns(pictures):
    "The loss on three pictures falls far below where it began, and equal seeds give equal scores."
    task, few = make_task("segmentation:tissue", pictures).tuned(), pictures.ids("train")[:6]
    encoder = make_encoder("cnn-tiny")
    a, b = (task.finetune(encoder, pictures, few, seed=1, steps=60, batch=6, augment=None, device="cpu") for _ in range(2))
    assert np.array_equal(a.raw["dice"], b.raw["dice"], equal_nan=True) and a.info["loss"] < .6
    assert "knn dice" not in a.metrics and a.task == "segmentation:tissue"


# ---------- what is absent, what is unknown ----------

def test_unannotated_pixels_do_not_count(pictures, bank):
    "What is said, and what would be true, at pixels of value 255 changes no metric."
    task, ids = make_task("segmentation:tissue", pictures), pictures.ids("test")
    r = np.random.default_rng(0)
    hidden = np.zeros(pictures.masks["tissue"].shape, bool)
    hidden[:, :, :9], hidden[ids[3]] = True, True
    partly = relabelled(pictures, tissue=np.where(hidden, IGNORE, pictures.masks["tissue"]))
    said = r.integers(0, 3, size=(len(ids), 32, 32)).astype(np.uint8)
    other = np.where(hidden[ids], r.integers(0, 3, size=said.shape), said).astype(np.uint8)
    a, b = (task.score({"mask": m}, partly, ids) for m in (said, other))
    assert (said != other).any() and all(np.array_equal(a[k], b[k], equal_nan=True) for k in a)
    assert a["pixels"][3].sum() == 0 and np.isnan(a["dice"][3]).all() and not (a["lesion_picture"] == 3).any()


def test_unannotated_pixels_do_not_teach(pictures, bank):
    "Linear head and neighbours are the same, whatever the truth at hidden pixels is; a batch without any annotated pixel costs nothing."
    task, mask, budget = make_task("segmentation:tissue", pictures), pictures.masks["tissue"].copy(), pictures.budget(60)
    mask[:, :16] = IGNORE
    partly = relabelled(pictures, tissue=mask)
    scores = task.probe(rebanked(bank, partly), partly, budget)
    assert 0 < scores.value() < 1 and 0 < scores.value(metric="knn dice") < 1
    outputs = torch.randn(2, 3, 32, 32, requires_grad=True)
    batch = lambda m: Batch(None, None, None, masks={"tissue": m})
    task.loss(outputs, batch(mask[:2]), (32, 32)).backward()
    assert outputs.grad[:, :, :16].abs().max() == 0 and outputs.grad[:, :, 16:].abs().max() > 0
    nothing = task.loss(outputs, batch(np.full((2, 32, 32), IGNORE, np.uint8)), (32, 32))
    assert float(nothing.detach()) == 0


def test_background_may_be_absent(pictures, bank):
    "Every pixel belongs to a region: no correction is made for the class that is never seen."
    full = relabelled(pictures, tissue=np.maximum(pictures.masks["tissue"], 1))
    scores = make_task("segmentation:tissue", full).probe(rebanked(bank, full), full, full.budget(100))
    assert all(np.isfinite(scores.value(metric=m)) for m in scores.metrics) and scores.value() > .5


def test_class_absent_from_test(pictures, bank):
    "Its metrics are nan and leave the mean to the other class."
    mask, ids = pictures.masks["tissue"].copy(), pictures.ids("test")
    mask[ids] = np.where(mask[ids] == 2, 0, mask[ids])
    less = relabelled(pictures, tissue=mask)
    task = make_task("segmentation:tissue", less)
    raw = task.score({"mask": mask[ids]}, less, ids)
    scores = Scores(task.name, task.metric, less.table.patient.to_numpy(str)[ids], ids, raw, task.classes)
    found = scores.per_class(np.ones((1, len(ids))), "lesion recall")[0]
    assert found[0] == 1 and np.isnan(found[1]) and np.isnan(raw["small_cut"][1])
    assert scores.value() == pytest.approx(1) and scores.value(metric="hd95") == 0 and by_size(scores).pictures[3:].sum() == 0


def test_pictures_without_lesions(pictures, bank):
    "They have no distance and no lesion to find; what is painted into them costs Dice. Validation pictures without any lesion choose nothing."
    task, ids = make_task("segmentation:lesion", pictures), pictures.ids("test")
    everywhere = task.score({"mask": np.ones((len(ids), 32, 32), np.uint8)}, pictures, ids)
    absent = everywhere["pixels"][:, 0] == 0
    assert absent.any() and (everywhere["dice"][absent] == 0).all() and np.isnan(everywhere["hd95"][absent]).all()
    assert not absent[everywhere["lesion_picture"]].any() and (everywhere["lesion_share"] == 1).all()
    nowhere = task.score({"mask": np.zeros((len(ids), 32, 32), np.uint8)}, pictures, ids)
    assert np.isnan(nowhere["dice"][absent]).all() and (nowhere["dice"][~absent] == 0).all() and np.isnan(nowhere["hd95"]).all()
    mask = pictures.masks["lesion"].copy()
    mask[pictures.ids("val")] = 0
    healthy = relabelled(pictures, lesion=mask)
    scores = task.probe(rebanked(bank, healthy), healthy, healthy.budget(120))
    assert scores.info["l2"] == .1 and scores.info["tau"] == .5
