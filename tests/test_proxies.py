"""Proxies, similarity and alarms against references and counting by hand."""
import numpy as np
import pandas as pd
import pytest
import torch

from tasl_lab.alignment.alarms import (
    REFERENCE,
    brain_pairs,
    cross_fitted,
    elsewhere,
    insert_lesions,
    pathology_ratio,
    pathology_sensitivity,
    phantom_pairs,
    robustness_chance,
    robustness_counts,
    robustness_index,
    site_probe_gap,
    view_features,
)
from tasl_lab.alignment.proxies import (
    MATCHED,
    PROXIES,
    Lesions,
    alignment,
    alpha_req,
    area_over_shots,
    cluster_miou,
    dimension_share,
    dse,
    dse_parts,
    few_shot_curves,
    knn_accuracy,
    knn_auroc,
    knn_votes,
    lesions_from_boxes,
    lesions_from_masks,
    lidar,
    matched,
    matched_proxy,
    patch_auroc,
    patch_auroc_by_size,
    patch_probe,
    patch_scores,
    proxy_table,
    rankme,
    task_proxy,
    uniformity,
)
from tasl_lab.alignment.similarity import knn_overlap, linear_cka, neighbours, unbiased_cka
from tasl_lab.core import InputError
from tasl_lab.data.imageset import ImageSet, Info
from tasl_lab.data.phantom import phantom
from tasl_lab.encoders import Features, make_encoder
from tasl_lab.tasks.features import extract
from tasl_lab.views import to_float


def draw(*key): return np.random.default_rng(key)


def turn(d, g): return np.linalg.qr(g.standard_normal((d, d)))[0]


@pytest.fixture(scope="module")
def pictures(): return phantom(240, size=32, seed=3)


@pytest.fixture(scope="module")
def cnn(): return make_encoder("cnn-tiny", seed=0, filters=8)


# ---------- directions ----------

@pytest.mark.parametrize("shape", [(60, 20), (20, 60)])
def test_rankme_in_double_precision(shape):
    z = draw(1).standard_normal(shape) * np.linspace(.1, 3, shape[1]) + 2
    s = np.sqrt(np.clip(np.linalg.eigvalsh(z @ z.T if shape[0] < shape[1] else z.T @ z), 0, None))
    p = s / s.sum() + 1e-7
    assert rankme(z) == pytest.approx(np.exp(-np.sum(p * np.log(p))), rel=1e-4)
    assert rankme(z, True) == pytest.approx(rankme(z - z.mean(0)), rel=1e-4) and rankme(z, True) > rankme(z)
    assert rankme(z @ turn(shape[1], draw(2)) * 5) == pytest.approx(rankme(z), rel=1e-4)


@pytest.mark.parametrize("alpha", [.4, 1., 1.7])
def test_alpha_req_of_a_known_power_law(alpha):
    g = draw(3)
    for d in (12, 70):                                                      # fewer and more ranks than the usual window
        u = np.linalg.qr(np.c_[np.ones(200), g.standard_normal((200, d))])[0][:, 1:]
        z = u * np.arange(1, d + 1) ** (-alpha / 2) @ turn(d, g) + g.standard_normal(d)
        assert alpha_req(7 * z) == pytest.approx(alpha, abs=1e-6)
    assert np.isnan(alpha_req(np.ones((9, 4))))


def test_alpha_req_looks_at_ranks_11_to_50_only():
    g, d = draw(4), 80
    values = np.arange(1., d + 1) ** -1.5
    values[:10], values[50:] = values[:10] + 30, 1e-6
    z = np.linalg.qr(np.c_[np.ones(200), g.standard_normal((200, d))])[0][:, 1:] * np.sqrt(values)
    assert alpha_req(z) == pytest.approx(1.5, abs=1e-6)


def slow_lidar(z, delta, eps=1e-7):
    "With loops and a square root of the inverse, as the paper writes it."
    n, q, d = z.shape
    mu = [sum(z[i]) / q for i in range(n)]
    whole = sum(mu) / n
    b = sum(np.outer(m - whole, m - whole) for m in mu) / n
    w = sum(np.outer(z[i, j] - mu[i], z[i, j] - mu[i]) for i in range(n) for j in range(q)) / (n * q) + delta * np.eye(d)
    e, v = np.linalg.eigh(w)
    root = v @ np.diag(e ** -.5) @ v.T
    lam = np.linalg.eigvalsh(root @ b @ root)
    p = lam / np.abs(lam).sum() + eps
    return np.exp(-np.sum(p * np.log(p)))


@pytest.mark.parametrize("n, q, d", [(40, 3, 6), (30, 5, 12)])
def test_lidar_as_the_paper_writes_it(n, q, d):
    g = draw(5, n)
    z = g.standard_normal((n, 1, d)) * np.linspace(.2, 2, d) + .3 * g.standard_normal((n, q, d))
    assert lidar(z, 1e-3) == pytest.approx(slow_lidar(z, 1e-3), rel=1e-6)
    assert lidar(z, 1e-3) != pytest.approx(lidar(z, 1.), rel=1e-2)
    with pytest.raises(InputError, match="two views"): lidar(z[:, :1])


def test_alignment_and_uniformity_by_loops_and_by_lightly():
    hypersphere = pytest.importorskip("lightly.loss.hypersphere_loss")
    a, b = draw(6).standard_normal((2, 30, 5)) + .4
    unit = lambda z: z / np.linalg.norm(z, axis=1, keepdims=True)
    u, v = unit(a), unit(b)
    pairs = [np.exp(-2 * np.sum((u[i] - u[j]) ** 2)) for i in range(30) for j in range(30) if i != j]
    assert uniformity(a) == pytest.approx(np.log(np.mean(pairs)), abs=1e-9)
    assert alignment(a, b) == pytest.approx(np.mean([np.sum((x - y) ** 2) for x, y in zip(u, v)]), abs=1e-9)
    loss = hypersphere.HypersphereLoss(t=2., lam=.7, alpha=2.)(torch.from_numpy(a), torch.from_numpy(b)).item()
    assert alignment(a, b) + .7 * (uniformity(a) + uniformity(b)) / 2 == pytest.approx(loss, abs=1e-9)


def test_uniformity_of_many_rows_is_that_of_one_block():
    z = draw(7).standard_normal((1500, 4))
    d = torch.pdist(torch.nn.functional.normalize(torch.from_numpy(z), dim=1))
    assert uniformity(z) == pytest.approx(d.square().mul(-2).exp().mean().log().item(), abs=1e-9)


# ---------- labels ----------

def test_votes_of_neighbours_by_loops():
    g = draw(8)
    train, test, y = g.standard_normal((30, 6)) + 3, g.standard_normal((9, 6)) + 3, g.integers(0, 3, 30)
    mean, std = train.mean(0), train.std(0)
    unit = lambda z: (z - mean) / std / np.linalg.norm((z - mean) / std, axis=1, keepdims=True)
    want = np.zeros((9, 3))
    for i, row in enumerate(unit(test) @ unit(train).T):
        near = sorted(range(30), key=lambda j: -row[j])[:5]
        share = np.exp(row[near] / .07) / np.exp(row[near] / .07).sum()
        for j, s in zip(near, share): want[i, y[j]] += s
    votes = knn_votes(train, y, test, 3, k=5)
    assert votes == pytest.approx(want, abs=1e-5)
    truth = g.permutation([0, 1, 2] * 3)
    from sklearn.metrics import balanced_accuracy_score, roc_auc_score
    assert knn_accuracy(train, y, test, truth, 3, 5) == pytest.approx(balanced_accuracy_score(truth, want.argmax(1)))
    assert knn_auroc(train, y, test, truth, 3, 5) == pytest.approx(roc_auc_score(np.eye(3)[truth], want, average="macro"))


def test_few_shot_curves_use_so_many_labels_and_no_more():
    g = draw(9)
    y = np.arange(120) % 3
    z = np.eye(3)[y] @ g.standard_normal((3, 10)) + g.standard_normal((120, 10))
    curves = few_shot_curves(z[:90], y[:90], z[90:], y[90:], 3, draws=4)
    assert curves.shape == (4, 3) and (np.diff(curves.mean(0)) > 0).all() and .5 < curves[:, 0].min() < .95 < curves[:, -1].mean()
    assert np.array_equal(curves, few_shot_curves(z[:90], y[:90], z[90:], y[90:], 3, draws=4))
    again = few_shot_curves(z[:90], y[:90], z[90:], y[90:], 3, shots=(5,), draws=4)
    assert again[:, 0] == pytest.approx(curves[:, 1])
    assert area_over_shots([[0., 1.], [.5, .5]], (1, 10)) == pytest.approx([.5, .5])
    by_hand = ((.6 + .8) / 2 * np.log(5) + (.8 + .9) / 2 * np.log(2)) / np.log(10)
    assert area_over_shots([.6, .8, .9], (1, 5, 10)) == pytest.approx(by_hand)


# ---------- patches ----------

def test_dse_of_lightly():
    regulariser = pytest.importorskip("lightly.loss.regularizer.dse")
    from tasl_lab.alignment.proxies import clusters_of, unit_rows
    g = draw(10)
    x = g.standard_normal((11, 30, 16)) + np.eye(16)[g.integers(0, 5, (11, 30))] * 2

    class SameClusters(regulariser.DSERegularizer):
        def _kmeans(self, rows, k):
            label, centres = clusters_of(rows.numpy(), k, 0)
            return torch.from_numpy(centres), torch.from_numpy(label).long()
    theirs, u = SameClusters(local_clusters=3, global_clusters=24), torch.from_numpy(unit_rows(x))
    scale = (u - u.mean((0, 1))).norm(dim=2).mean().item()
    inter, intra_group = (v.item() / scale for v in theirs._batch_structure(u))
    parts = dse_parts(x)
    assert parts.inter == pytest.approx(inter, rel=1e-6)
    assert parts.intra_group == pytest.approx(intra_group, rel=1e-6)
    assert parts.intra_image == pytest.approx(theirs._intra_image_structure(u).item() / scale, rel=1e-6)
    assert dse(x, .3) == pytest.approx(inter - (parts.intra_image + intra_group) / 2 + .3 * parts.dimension, rel=1e-6)
    one = u[:, :1]                                                          # one patch a picture: there is nothing to draw
    assert dimension_share(one.numpy()) == pytest.approx(theirs._effective_dimensionality(one[:, 0]).item(), rel=1e-6)


def test_dse_does_not_mind_rotation_and_sees_collapse():
    g = draw(11)
    x = g.standard_normal((6, 20, 8)) + np.eye(8)[g.integers(0, 3, (6, 20))] * 6
    assert dse(4 * x @ turn(8, g), clusters=3) == pytest.approx(dse(x, clusters=3), abs=1e-5)
    line = x[..., :1] * np.ones(8) + 1e-9 * x
    assert dimension_share(line) < .2 < .5 < dimension_share(g.standard_normal((6, 20, 8)))
    assert dse_parts(np.ones((4, 5, 3))).separation == 0


def test_clusters_against_truth():
    functional = pytest.importorskip("torchmetrics.functional.classification")
    g = draw(12)
    truth = g.integers(0, 4, 500)
    assert cluster_miou(np.array([2, 0, 3, 1])[truth], truth, 4) == 1
    cluster = np.where(g.random(500) < .6, truth, g.integers(0, 4, 500))
    want = functional.multiclass_jaccard_index(torch.from_numpy(cluster), torch.from_numpy(truth), 4).item()
    for names in ([0, 1, 2, 3], [3, 1, 0, 2]): assert cluster_miou(np.array(names)[cluster], truth, 4) == pytest.approx(want, abs=1e-6)
    assert cluster_miou(g.permutation(truth), truth, 4) < .25
    unknown = np.r_[truth, np.full(50, -1), np.full(50, 255)]
    assert cluster_miou(np.r_[cluster, g.integers(0, 4, 100)], unknown, 4) == pytest.approx(want, abs=1e-6)
    assert cluster_miou(np.array([0, 0, 1, 2]), np.array([0, 0, 1, 1]), 2) == pytest.approx((1 + 1 / 2) / 2)   # a third cluster fits no class
    with pytest.raises(InputError, match="known class"): cluster_miou(cluster, np.full(500, 255), 4)


def test_lesions_by_patch():
    mask = np.zeros((2, 16, 16), np.uint8)
    mask[0, 0:8, 0:8] = 1                                                   # fills four patches of 4 pixels
    mask[0, 12, 12] = 1                                                     # a sixteenth of a patch, and still a lesion
    mask[1, 4:6, 3:9] = 1                                                   # half of one patch, an eighth of two others
    mask[1, 8:, :] = 255
    found = lesions_from_masks(mask, (4, 4))
    want = np.zeros((2, 4, 4), int)
    want[0, :2, :2], want[0, 3, 3] = 1, 2
    want[1, 1] = [-1, 3, -1, 0]
    want[1, 2:] = -1
    assert found.patch.reshape(2, 4, 4).tolist() == want.tolist() and found.size.tolist() == [64, 1, 12] and found.third.tolist() == [2, 0, 1]
    boxes = [np.array([[0, 0, 8, 8, 0], [12, 12, 13, 13, 1]], np.float32), np.zeros((0, 5), np.float32)]
    of_boxes = lesions_from_boxes(boxes, (4, 4), (16, 16))
    assert of_boxes.size.tolist() == [64, 1] and (of_boxes.patch[0].reshape(4, 4)[:2, :2] == 1).all() and of_boxes.patch[0, 15] == 2
    assert (of_boxes.patch[1] == 0).all()


def test_lesions_in_volumes():
    mask = np.zeros((1, 8, 8, 8), np.uint8)
    mask[0, :4, :4, 4:] = 1
    assert lesions_from_masks(mask, (2, 2, 2)).patch.tolist() == [[0, 1, 0, 0, 0, 0, 0, 0]]
    boxes = [np.array([[0, 0, 4, 4, 4, 8, 0]], np.float32)]
    assert lesions_from_boxes(boxes, (2, 2, 2), (8, 8, 8)).patch.tolist() == [[0, 1, 0, 0, 0, 0, 0, 0]]


def test_patch_auroc_of_scikit_learn():
    from sklearn.metrics import roc_auc_score
    g = draw(13)
    patch = g.choice([-1, 0, 0, 0, 0, 1, 2, 3, 4], (6, 30))
    lesions, score, times = Lesions(patch, np.array([4, 50, 9, 20])), g.integers(0, 9, (6, 30)) / 3, g.integers(0, 3, (2, 6))
    keep = patch >= 0
    assert patch_auroc(score, lesions)[0] == pytest.approx(roc_auc_score(patch[keep] > 0, score[keep]))
    heavy = [roc_auc_score(patch[keep] > 0, score[keep], sample_weight=np.repeat(t[:, None], 30, 1)[keep]) for t in times]
    assert patch_auroc(score, lesions, times) == pytest.approx(heavy)
    small = (patch == 0) | (patch == 1) | (patch == 3)                      # sizes 4 and 9 are the smallest third
    found = patch_auroc_by_size(score, lesions)
    assert lesions.third.tolist() == [0, 2, 0, 1] and found["small"] == pytest.approx(roc_auc_score(patch[small] > 0, score[small]))
    assert np.isnan(patch_auroc(score, Lesions(np.zeros((6, 30), int), np.zeros(0)))[0])


def test_patch_probe_finds_a_direction():
    g = draw(14)
    patch = g.choice([0, 0, 0, 1, -1], (8, 40))
    x = g.standard_normal((8, 40, 5))
    x[..., 2] += 2 * (patch > 0) + 50 * (patch < 0)                         # patches that do not count must not count
    w = patch_probe(x, patch)
    assert w[:-1, 0].abs().argmax() == 2 and w[2, 0] > 0
    score = patch_scores(x, w)
    assert score == pytest.approx((torch.from_numpy(x) @ w[:-1] + w[-1]).squeeze(-1).numpy())
    assert score[patch == 0].mean() < 0 < score[patch > 0].mean()           # both sides weigh the same
    with pytest.raises(InputError, match="larger one"): patch_probe(x, np.zeros_like(patch))


# ---------- two encoders ----------

@pytest.mark.parametrize("d, e", [(5, 9), (40, 70)])
def test_cka_by_the_independence_criterion(d, e):
    g, n = draw(15), 25
    x, y = g.standard_normal((n, d)), g.standard_normal((n, e)) + 1
    y[:, :4] += 2 * x[:, :4]
    h = np.eye(n) - 1 / n
    hsic = lambda a, b: np.trace(a @ a.T @ h @ b @ b.T @ h)
    assert linear_cka(x, y) == pytest.approx(hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y)), rel=1e-9)
    assert linear_cka(3 * x @ turn(d, g) - 2, y @ turn(e, g)) == pytest.approx(linear_cka(x, y), rel=1e-9)
    stretched = x * np.linspace(.1, 4, d)                                   # not invariant to a scale of each axis
    assert abs(linear_cka(stretched, y) - linear_cka(x, y)) > 1e-3
    assert np.isnan(linear_cka(np.ones((n, d)), y))
    with pytest.raises(InputError, match="same pictures"): linear_cka(x, y[1:])


def test_unbiased_cka_by_sums_over_different_pictures():
    from itertools import permutations
    g = draw(16)
    x, y = g.standard_normal((6, 3)), g.standard_normal((6, 4))
    y[:, 0] += 2 * x[:, 0]
    x, y = x - x.mean(0), y - y.mean(0)

    def hsic(a, b):
        "U-statistic: no index occurs twice."
        k, m = a @ a.T, b @ b.T
        pairs = np.mean([k[i, j] * m[i, j] for i, j in permutations(range(6), 2)])
        apart = np.mean([k[i, j] * m[p, q] for i, j, p, q in permutations(range(6), 4)])
        shared = np.mean([k[i, j] * m[i, q] for i, j, q in permutations(range(6), 3)])
        return pairs + apart - 2 * shared
    assert unbiased_cka(x, y) == pytest.approx(hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y)), rel=1e-9)


def test_overlap_of_neighbours_by_loops():
    g = draw(17)
    x = g.standard_normal((1100, 4))                                        # more than one block
    y, patient = x + .5 * g.standard_normal(x.shape), np.arange(1100) // 3
    unit = lambda z: z / np.linalg.norm(z, axis=1, keepdims=True)

    def near(z, i):
        order = np.argsort(-(unit(z) @ unit(z)[i]))
        return [j for j in order if patient[j] != patient[i]][:7]
    assert neighbours(x, 7, patient)[[0, 500, 1099]].tolist() == [near(x, i) for i in (0, 500, 1099)]
    share = [len(set(near(x, i)) & set(near(y, i))) / 7 for i in range(1100)]
    assert knn_overlap(x, y, 7, patient) == pytest.approx(np.mean(share))
    with pytest.raises(InputError, match="smaller k"): neighbours(x[:5], 5)


def test_neighbours_that_are_missing_do_not_count():
    x = draw(18).standard_normal((4, 3))
    at = neighbours(x, 2, ["a", "a", "a", "b"])
    assert at[:3].tolist() == [[3, -1]] * 3 and set(at[3]) <= {0, 1, 2}
    assert knn_overlap(x, x, 2, ["a", "a", "a", "b"]) == 1


# ---------- alarms ----------

def test_robustness_index_counted_by_hand():
    z = np.array([[1, 0], [1, .1], [1, .2], [1, .3], [0, 1], [.1, 1]])
    label, site = np.array([0, 0, 1, 0, 1, 1]), np.array(["a", "b", "a", "b", "b", "a"])
    # nearest two: 0: 1 2   1: 0 2 (or 2 0)   2: 1 3   3: 2 1   4: 5 3   5: 4 3
    want = [[1, 1], [1, 0], [0, 0], [0, 0], [1, 1], [1, 0]]
    assert robustness_counts(z, label, site, k=2).tolist() == want
    assert robustness_index(z, label, site, k=2) == 4 / 2
    good = sum(label[i] == label[j] and site[i] != site[j] for i in range(6) for j in range(6))
    bad = sum(label[i] != label[j] and site[i] == site[j] for i in range(6) for j in range(6))
    assert robustness_chance(label, site) == pytest.approx(good / bad)
    assert robustness_counts(z, label, site, ["p", "p", "q", "r", "s", "t"], k=2)[0].tolist() == [1, 1]   # 1 is of the same patient: 2 and 3 instead
    assert np.isinf(robustness_index(z[:4], np.zeros(4), ["a", "b", "a", "b"], k=2))


def test_chance_of_the_robustness_index_is_what_noise_gives():
    g = draw(19)
    label, site, patient = g.choice(4, 900, p=[.4, .3, .2, .1]), np.arange(900) // 3 % 3, np.arange(900) // 3
    found = [robustness_index(g.standard_normal((900, 6)), label, site, patient) for _ in range(5)]
    assert np.mean(found) == pytest.approx(robustness_chance(label, site, patient), abs=.04)


def test_site_probe_keeps_patients_apart():
    g = draw(20)
    patient = np.repeat(np.arange(60), 8)
    site, label = patient % 2, g.integers(0, 2, 480)
    who = np.eye(60)[patient] @ g.standard_normal((60, 24)) * 3 + .1 * g.standard_normal((480, 24))
    assert abs(site_probe_gap(who, site, label, patient).site) < .2 < .3 < site_probe_gap(who, site, label, np.arange(480)).site
    said = np.c_[site * 4. + g.standard_normal(480), g.standard_normal((480, 3))]
    gap = site_probe_gap(said, np.array(["n", "s"])[site], label, patient)
    assert gap.site > .4 and abs(gap.label) < .12 and gap.site_chance == .5
    with pytest.raises(InputError, match="tell apart"): site_probe_gap(said, np.zeros(480), label, patient)
    with pytest.raises(InputError, match="more patients"): cross_fitted(said, site, patient // 40)


def test_the_site_probe_does_not_prefer_the_larger_site():
    g = draw(21)
    site = (g.random(600) < .1).astype(int)
    assert abs(site_probe_gap(g.standard_normal((600, 8)), site, g.integers(0, 2, 600), np.arange(600)).site) < .1
    assert 150 < cross_fitted(g.standard_normal((600, 8)), site, np.arange(600)).sum() < 450


class Border(torch.nn.Module):
    "Sees the outermost pixels."
    name, strides = "border", []

    def forward(self, x, mask=None, mode="whole"):
        return Features(torch.stack([x[:, 0, 0].mean(1), x[:, 0, -1].mean(1), x[:, 0, :, 0].mean(1)], 1), [])


class Peak(torch.nn.Module):
    "Sees the largest smoothed value."
    name, strides = "peak", []

    def forward(self, x, mask=None, mode="whole"): return Features(torch.nn.functional.avg_pool2d(x, 3).flatten(1).amax(1, keepdim=True), [])


def test_pathology_sensitivity_by_hand():
    clean = np.array([[0., 0.], [2., 4.]])                                  # deviations 1 and 2
    lesion, augmented = clean + [[3., 0.]], clean + [[0., 4.]]
    assert pathology_sensitivity(clean, lesion, augmented) == pytest.approx(3 / 2, rel=1e-6)
    assert pathology_sensitivity(clean, clean, augmented) == 0
    assert np.isnan(pathology_sensitivity(clean, lesion, clean))


def test_pathology_ratio_of_a_blind_and_of_a_seeing_encoder():
    x = np.full((12, 1, 24, 24), 90, np.uint8) + draw(22).integers(0, 30, (12, 1, 24, 24), np.uint8)
    mask = np.zeros((12, 24, 24), bool)
    mask[:, 9:15, 9:15] = True
    from tasl_lab.alignment.alarms import Pairs
    pairs = Pairs(x, np.where(mask[:, None], 255, x).astype(np.uint8), mask)
    assert pathology_ratio(Border(), pairs) == 0 and pathology_ratio(Peak(), pairs) > 4
    none = Pairs(x, x, mask)
    assert pathology_ratio(Peak(), none) == 0


@pytest.mark.parametrize("preset", ["texture", "histology", "ultrasound"])
def test_phantom_pairs_differ_in_the_lesion_only(preset):
    pairs = phantom_pairs(30, size=48, preset=preset)
    assert len(pairs) > 25 and pairs.mask.reshape(len(pairs), -1).any(1).all()
    change = np.abs(pairs.lesion.astype(int) - pairs.clean).max(1)
    assert change[elsewhere(pairs.mask)].max() <= 1 and change[pairs.mask].mean() > 3
    whole = phantom(30, size=48, preset=preset, seed=1, lesion_share=1.)    # the same patients and noise
    seen = {x.tobytes() for x in whole.images}
    assert all(x.tobytes() in seen for x in pairs.lesion) and not any(x.tobytes() in seen for x in pairs.clean)


def test_phantom_pairs_in_three_dimensions():
    pairs = phantom_pairs(6, size=16, dims=3, lesion_radius=(.12, .15))
    assert pairs.clean.shape[1:] == (1, 16, 16, 16) and (pairs.clean != pairs.lesion).any((1, 2, 3, 4)).all()


def test_brain_pairs_share_anatomy_and_noise():
    pairs = brain_pairs(30, size=48)
    change = np.abs(pairs.lesion.astype(int) - pairs.clean).max(1)
    assert len(pairs) > 10 and change[pairs.mask].mean() > 10 and (change[elsewhere(pairs.mask, 12)] == 0).mean() > .95


def test_lesions_put_into_pictures_of_a_set(pictures):
    put = insert_lesions(pictures, "lesion", n=40)
    assert not (put.clean != put.lesion).any(1)[elsewhere(put.mask)].any()
    index = {x.tobytes(): i for i, x in enumerate(pictures.images)}
    ids = np.array([index[x.tobytes()] for x in put.clean])
    assert not pictures.masks["lesion"][ids].any() and "test" not in set(pictures.table.split[ids])
    tissue = pictures.masks["tissue"][ids]
    assert (tissue[put.mask] > 0).mean() > .8                               # in the organ, where lesions of this set are
    again = insert_lesions(pictures, "lesion", n=40)
    assert np.array_equal(put.lesion, again.lesion) and not np.array_equal(put.lesion[:9], insert_lesions(pictures, "lesion", n=40, seed=1).lesion[:9])
    with pytest.raises(InputError, match="no mask 'tumour'"): insert_lesions(pictures, "tumour")


def test_lesions_put_into_a_set_without_other_masks(pictures):
    plain = ImageSet(pictures.images, Info("plain", classes={"lesion": ["none", "lesion"]}), masks={"lesion": pictures.masks["lesion"]}, table=pictures.table)
    put = insert_lesions(plain, "lesion", n=10)
    assert len(put) == 10 and (put.clean != put.lesion).any((1, 2, 3)).all()
    bare = ImageSet(pictures.images, plain.info, masks={"lesion": 0 * pictures.masks["lesion"]})
    with pytest.raises(InputError, match="choose another mask"): insert_lesions(bare, "lesion")


def test_views_are_the_same_for_all_encoders(pictures, cnn):
    x = pictures.images[:70]
    a = view_features(cnn, x, 2)
    assert np.array_equal(a, view_features(cnn, x, 2)) and not np.allclose(a[:, 0], a[:, 1])
    assert not np.allclose(a, view_features(cnn, x, 2, REFERENCE, seed=1))

    def seen(batch):
        spy, views = Border(), []
        spy.register_forward_pre_hook(lambda module, args: views.append(args[0].clone()))
        view_features(spy, x, 1, batch=batch)
        return torch.cat(views)
    assert torch.equal(seen(64), seen(7)) and not torch.equal(seen(64), to_float(torch.from_numpy(x)))


# ---------- matched proxies ----------

def test_each_kind_of_task_has_its_proxy():
    assert {k: task_proxy(f"{k}:x") for k in MATCHED} == MATCHED
    with pytest.raises(InputError, match="reconstruction"): task_proxy("reconstruction:denoise")


@pytest.mark.parametrize("task", ["classification:class", "segmentation:tissue", "detection:boxes", "regression:organ_area"])
def test_matched_proxies_see_no_test_picture(pictures, cnn, task):
    with_test = matched(extract(cnn, pictures), pictures, task, 50, draws=2)
    split = pictures.table.split.to_numpy()
    without = matched(extract(cnn, pictures, np.flatnonzero(split != "test")), pictures, task, 50, draws=2)
    assert np.allclose(with_test.draws, without.draws, atol=5e-3)           # batches differ, and with them the last bits
    patients = set(pictures.table.patient[split == "val"])
    assert set(with_test.groups) <= patients and with_test.cells.shape == (2, len(with_test.groups))
    assert with_test.draws[0] != with_test.draws[1] and with_test.value == pytest.approx(with_test.draws.mean())


@pytest.mark.parametrize("task, proxy", [("classification:class", None), ("classification:class", "knn auroc"), ("segmentation:tissue", None),
                                         ("segmentation:tissue", "knn dice"), ("detection:boxes", None), ("regression:organ_area", None)])
def test_cells_of_a_matched_proxy_are_pseudo_values(pictures, cnn, task, proxy):
    from tasl_lab.alignment.proxies import _VALUES, _part
    from tasl_lab.core import seed_of
    from tasl_lab.tasks.registry import make_task
    bank = extract(cnn, pictures)
    found = matched(bank, pictures, task, 50, draws=1, seed=4, proxy=proxy)
    val, budget = pictures.ids("val"), pictures.budget(50, seed_of("proxy", 4, 0))
    value = _VALUES[found.proxy](_part(bank, pictures, np.union1d(val, budget)), pictures, make_task(task, pictures), budget, val, 4)
    patient, G = pictures.table.patient.to_numpy()[val], len(found.groups)
    whole = value(np.ones((1, len(val))))[0]
    want = np.array([G * whole - (G - 1) * value((patient != p)[None].astype(float))[0] for p in found.groups])
    assert found.draws[0] == pytest.approx(whole) and found.cells[0] == pytest.approx(want - np.nanmean(want) + whole, nan_ok=True)
    assert matched_proxy(bank, pictures, task, 50, seed=4, draws=1, proxy=proxy) == pytest.approx(whole)
    i = found.interval()
    assert i.low < i.mean < i.high and i.mean == pytest.approx(whole)


def test_a_matched_proxy_is_that_of_the_task(pictures, cnn):
    "Scored on pictures that are called test, the vote of the segmentation task gives the same."
    from tasl_lab.core import seed_of
    from tasl_lab.tasks.registry import make_task
    table = pictures.table.assign(split=pictures.table.split.map({"train": "train", "val": "test", "test": "val"}))
    turned = ImageSet(pictures.images, pictures.info, labels=pictures.labels, masks=pictures.masks, boxes=pictures.boxes, targets=pictures.targets, table=table)
    budget, val = pictures.budget(50, seed_of("proxy", 0, 0)), pictures.ids("val")
    bank = extract(cnn, turned, np.union1d(budget, val))
    task = make_task("segmentation:tissue", turned)
    want = np.nanmean(np.nanmean(task.beside(bank, turned, budget, np.zeros(0, int), turned.ids("test"), 0)["knn_dice"], 0))
    assert matched(cnn, pictures, "segmentation:tissue", 50, draws=1, proxy="knn dice").draws[0] == pytest.approx(want, abs=2e-3)


def test_matched_proxies_need_validation_pictures_and_their_own_set(pictures, cnn):
    bare = ImageSet(pictures.images, pictures.info, labels=pictures.labels, table=pictures.table.assign(split="train"))
    with pytest.raises(InputError, match="'val'"): matched(cnn, bare, "classification:class")
    with pytest.raises(InputError, match="dense probe or knn dice"): matched(cnn, pictures, "segmentation:tissue", proxy="knn auroc")
    with pytest.raises(InputError, match="not of set"): matched(extract(cnn, bare), pictures, "classification:class")


# ---------- the registry ----------

def test_the_registry_is_complete():
    assert {p.level for p in PROXIES.values()} == {"image", "dense", "alarm"}
    assert {p.needs for p in PROXIES.values()} == {"nothing", "labels", "masks", "sites", "pairs"}
    assert all(p.source and p.warning and p.tracks for p in PROXIES.values())
    assert set(MATCHED.values()) - {"ridge r2"} <= set(PROXIES)
    alpha = PROXIES["alpha-req"]
    assert alpha.goodness(1.) > max(alpha.goodness(.8), alpha.goodness(1.3)) and PROXIES["uniformity"].goodness(-3) == 3


def test_a_table_says_what_a_set_does_not_allow(pictures, cnn):
    bare = ImageSet(pictures.images, Info("bare"), table=pictures.table[["patient", "split"]])
    table = proxy_table(cnn, bare)
    assert set(table.proxy.str.split(":").str[0]) == {"rankme", "alpha-req", "lidar", "alignment", "uniformity", "dse"} and table.value.notna().all()
    assert set(table.proxy.str.split(":").str[0]) | set(table.attrs["left out"]) == set(PROXIES)
    with pytest.raises(InputError, match="unknown"): proxy_table(cnn, bare, only=["rank"])
    with pytest.raises(InputError, match="no label 'grade'"): proxy_table(cnn, pictures, label="grade")


def test_a_table_does_not_depend_on_test_pictures(pictures, cnn):
    names = ["rankme", "knn auroc", "dense probe", "patch auroc", "site probe gap", "pathology sensitivity"]
    images = pictures.images.copy()
    images[pictures.ids("test")] = 0
    labels, masks = {k: v.copy() for k, v in pictures.labels.items()}, {k: v.copy() for k, v in pictures.masks.items()}
    for v in (*labels.values(), *masks.values()): v[pictures.ids("test")] = 0
    blank = ImageSet(images, pictures.info, labels=labels, masks=masks, boxes=pictures.boxes, table=pictures.table)
    a, b = (proxy_table(cnn, s, label="class", mask="tissue", only=names) for s in (pictures, blank))
    pd.testing.assert_series_equal(a.value, b.value)
    assert not a.attrs["left out"] and {"patch auroc: small", "site probe gap: label"} <= set(a.proxy)


def test_volumes_have_proxies_too():
    volumes, encoder = phantom(60, size=16, dims=3, seed=2), make_encoder("cnn-tiny", dims=3, filters=8, blocks=(1, 1))
    table = proxy_table(encoder, volumes, labels=30)
    assert set(table.attrs["left out"]) == {"pointing game"} and table.value.notna().all()
    assert np.isfinite(matched_proxy(encoder, volumes, "detection:boxes", 30, draws=2))
