"""Extraction, probes, metrics and intervals against the loops that are usually written for them.

Phantoms of 64x64 and a random `cnn-tiny`: what an encoder knows does not matter here, only that both sides get the same. Where two ways solve
a problem step by step they are held to the same accuracy: `tolerance` says how. What else must agree is in `extra`.
"""
import warnings
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from harness import OURS, Race
from monai.apps.detection.metrics.coco import COCOMetric
from monai.apps.detection.metrics.matching import matching_batch
from monai.data.box_utils import box_iou
from monai.metrics import DiceMetric, SurfaceDiceMetric
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, SGDClassifier
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler
from torch.utils.data import DataLoader, Dataset

from tasl_lab.alignment.intervals import crossed_interval, pseudo_values
from tasl_lab.core import rng
from tasl_lab.data.sources import load
from tasl_lab.encoders import make_encoder
from tasl_lab.tasks.classification import GRID
from tasl_lab.tasks.detection import OVERLAPS
from tasl_lab.tasks.features import extract
from tasl_lab.tasks.heads import fit_logistic
from tasl_lab.tasks.registry import make_task
from tasl_lab.tasks.segmentation import PENALTIES, dice, sample_places, surface_dice

SIZE, SEEDS = 64, 3
warnings.filterwarnings("ignore", category=ConvergenceWarning)  # a loose tolerance is tried on purpose
warnings.filterwarnings("ignore", module="monai")               # regions that nobody outlined, and its own old arguments


class Setting(NamedTuple):
    "Phantoms, a random encoder, its features, and the pictures whose labels may be used."
    data: object
    encoder: object
    bank: object
    budget: np.ndarray

    def __str__(self): return f"{SIZE}x{SIZE} grey, cnn-tiny"


@cache
def setting(quick: bool) -> Setting:
    data = load("phantom", SIZE, n=150 if quick else 1800)
    encoder = make_encoder("cnn-tiny", data.channels, data.dims)
    return Setting(data, encoder, extract(encoder, data), data.budget(24 if quick else 120))


@cache
def scored(quick: bool, kind: str, seed: int = 0):
    "Scores of our probe, one label draw per seed."
    s = setting(quick)
    return make_task(kind, s.data).probe(s.bank, s.data, s.data.budget(len(s.budget), seed), seed)


# --- extraction -----------------------------------------------------------------------------------------------------------------------

class Pictures(Dataset):
    "One picture at a time, as floats of the range that the encoder takes."
    def __init__(self, images): self.images = images

    def __len__(self): return len(self.images)

    def __getitem__(self, i): return torch.from_numpy(self.images[i]).float() / 255 * 4 - 2


@torch.no_grad()
def plain_extraction(encoder, images, workers=0):
    "Pooled features and maps by a loop over a DataLoader, in fp32."
    pooled, maps = [], []
    for x in DataLoader(Pictures(images), batch_size=64, num_workers=workers):
        f = encoder(x)
        pooled.append(f.pooled.numpy())
        maps.append([m.numpy() for m in f.maps])
    return np.concatenate(pooled), [np.concatenate(m) for m in zip(*maps)]


def extraction(quick: bool) -> Race:
    s = setting(quick)
    loop = lambda workers=0: len(plain_extraction(s.encoder.eval(), s.data.images, workers)[0])
    return Race("extraction", f"{s}, {len(s.data)} pictures", {
        OURS: lambda: len(extract(s.encoder, s.data)),
        f"{OURS}, fp32": lambda: len(extract(s.encoder, s.data, precision="fp32")),
        "DataLoader": loop, "DataLoader, 2 workers": lambda: loop(2)})


# --- linear probe on pooled features --------------------------------------------------------------------------------------------------

class Problem(NamedTuple):
    "A logistic regression to be solved at several penalties: mean loss + l2/2 * squared weights."
    x: torch.Tensor    # (S, C) standardised features
    y: torch.Tensor    # (S,) classes
    penalties: tuple

    @property
    def classes(self) -> int: return int(self.y.max()) + 1

    def value(self, w, l2) -> float:
        "What is minimised, at the solution `w` (C+1, K)."
        x, w = self.x.double(), torch.as_tensor(w).double()
        return float(F.cross_entropy(x @ w[:-1] + w[-1], self.y) + l2 / 2 * w[:-1].square().sum())


def our_path(p: Problem, **how) -> list: return fit_logistic(p.x, p.y, p.classes, p.penalties, **how)


def their_path(p: Problem, tol, solver="lbfgs") -> list:
    "The same problems by scikit-learn, each from the solution before."
    model, found = LogisticRegression(tol=tol, solver=solver, max_iter=10_000, warm_start=True), []
    for l2 in p.penalties:
        model.set_params(C=1 / (l2 * len(p.x))).fit(p.x.numpy(), p.y.numpy())
        found.append(np.vstack([model.coef_.T, model.intercept_]))
    return found


def excess(p: Problem, path, best) -> list:
    "How far each solution lies above the optimum, in units of the mean loss."
    return [p.value(w, l2) - p.value(b, l2) for w, b, l2 in zip(path, best, p.penalties)]


TOLERANCES = tuple(10. ** (-k / 2) for k in range(2, 17))


def tolerance(p: Problem, solver="lbfgs") -> dict:
    "The loosest of scikit-learn's tolerances whose worst solution is as close to the optimum as our worst one; the optimum is ours in float64."
    exact = our_path(p._replace(x=p.x.double()), tolerance=1e-14, steps=2000)
    ours = max(excess(p, our_path(p), exact))
    for tol in TOLERANCES:
        theirs = max(excess(p, their_path(p, tol, solver), exact))
        if theirs <= ours: break
    return {"tol": tol, "excess of ours": ours, f"excess of scikit-learn {solver}": theirs}


@cache
def linear_problem(quick: bool, labels: int) -> Problem:
    s = setting(quick)
    ids, task = s.data.budget(labels), make_task("classification:class", s.data)
    x = task.head(s.bank, s.data).standard(torch.from_numpy(s.bank.pooled[s.bank.rows(ids)])).double()
    return Problem(x, task.truth(s.data, ids), GRID)


@cache
def linear_tolerance(quick: bool, labels: int, solver: str) -> dict: return tolerance(linear_problem(quick, labels), solver)


def label_numbers(quick: bool) -> list:
    "As many labels as a probe has, and all of them."
    s = setting(quick)
    return [len(s.budget), len(s.data.ids("train"))]


SOLVERS = ("lbfgs", "newton-cholesky")


def linear_probe(quick: bool, labels: int) -> Race:
    p = linear_problem(quick, labels)
    race = Race("linear probe", f"{labels} labels, {p.x.shape[1]} features, {p.classes} classes, {len(GRID)} penalties", unit="fits")
    race.contenders[OURS] = lambda: len(our_path(p))
    for solver in SOLVERS:
        tol = linear_tolerance(quick, labels, solver)["tol"]
        race.contenders[f"scikit-learn {solver}"] = lambda solver=solver, tol=tol: len(their_path(p, tol, solver))
    return race


# --- dense probe ----------------------------------------------------------------------------------------------------------------------

DENSE = "segmentation:tissue"


def pixels_of(bank, i) -> np.ndarray:
    "Features of every pixel of picture `i`: all levels enlarged to its size, (pixels, C)."
    maps = bank.features([i]).maps
    return torch.cat([F.interpolate(m, bank.spatial, mode="bilinear") for m in maps], 1)[0].flatten(1).T.numpy()


def sampled_pixels(s: Setting) -> tuple:
    "Features and classes of the pixels that our probe fits on, collected picture by picture."
    masks = s.data.masks["tissue"][s.budget]
    at, *_ = sample_places(masks, 3, rng("segmentation", 0))
    picture, pixel = np.divmod(at, SIZE * SIZE)
    parts = [(pixels_of(s.bank, i)[pixel[picture == k]], masks[k].ravel()[pixel[picture == k]]) for k, i in enumerate(s.budget)]
    return tuple(np.concatenate(p) for p in zip(*parts))


def mean_dice(said, truth) -> float:
    "Over pictures and regions, a region that is in neither left out."
    hot = lambda m: np.stack([m == c for c in (1, 2)], 1)
    return float(np.nanmean(dice(*(torch.from_numpy(hot(m)) for m in (said, truth))).numpy()))


def per_pixel_probe(s: Setting, models) -> np.ndarray:
    "Masks of the test pictures by a scikit-learn model of pixels, the best of `models` on the validation pictures."
    x, y = sampled_pixels(s)
    scaler, best, chosen = StandardScaler().fit(x), -1., None
    x = scaler.transform(x)
    predict = lambda model, ids: np.stack([model.predict(scaler.transform(pixels_of(s.bank, i))).reshape(SIZE, SIZE) for i in ids])
    for model in models:
        reached = mean_dice(predict(model.fit(x, y), s.data.ids("val")), s.data.masks["tissue"][s.data.ids("val")])
        if reached > best: best, chosen = reached, model
    return predict(chosen, s.data.ids("test"))


def our_dense_probe(s: Setting) -> np.ndarray:
    "Masks of the test pictures."
    task = make_task(DENSE, s.data)
    head = task.fitted(s.bank, s.data, s.budget)
    return task.predict(head, s.bank.stream(s.data.ids("test")), s.bank.spatial)["mask"]


@cache
def dense_tolerance(quick: bool) -> dict:
    "As for the linear probe, on the sampled pixels in float32."
    x, y = sampled_pixels(setting(quick))
    x = StandardScaler().fit_transform(x).astype(np.float32)
    return tolerance(Problem(torch.from_numpy(x), torch.from_numpy(y).long(), PENALTIES))


def dense_ways(quick: bool) -> dict:
    "Contender -> masks of the test pictures."
    s = setting(quick)
    n = len(sampled_pixels(s)[0])
    exact = lambda: [LogisticRegression(C=1 / (l2 * n), tol=dense_tolerance(quick)["tol"], max_iter=10_000) for l2 in PENALTIES]
    descent = lambda: [SGDClassifier(loss="log_loss", alpha=l2, random_state=0) for l2 in PENALTIES]
    return {OURS: lambda: our_dense_probe(s), "scikit-learn LogisticRegression": lambda: per_pixel_probe(s, exact()),
            "scikit-learn SGDClassifier": lambda: per_pixel_probe(s, descent())}


def dense_probe(quick: bool) -> Race:
    s = setting(quick)
    case = f"{s}, {len(s.budget)} labels, {len(PENALTIES)} penalties, {len(s.data.ids('test'))} test pictures"
    return Race("dense probe", case, {k: lambda f=f: 1 if f() is not None else 0 for k, f in dense_ways(quick).items()}, unit="probes")


# --- metrics --------------------------------------------------------------------------------------------------------------------------

@cache
def regions(quick: bool) -> tuple:
    "What was said and what is true of the test pictures, (n, K, y, x) bool."
    s = setting(quick)
    hot = lambda m: torch.stack([torch.from_numpy(m == c) for c in (1, 2)], 1)
    return hot(our_dense_probe(s)), hot(s.data.masks["tissue"][s.data.ids("test")])


def monai_loop(metric, said, truth):
    "A MONAI metric, called for one picture after the other."
    metric.reset()
    for a, b in zip(said, truth): metric(a[None], b[None])
    return metric.aggregate()


def region_ways(quick: bool) -> dict:
    "Metric -> contender -> values (n, K)."
    said, truth = regions(quick)
    floats = said.float(), truth.float()
    overlap = DiceMetric(reduction="none")
    surface = SurfaceDiceMetric(class_thresholds=[1.] * said.shape[1], include_background=True, reduction="none")
    return {"Dice": {OURS: lambda: dice(said, truth), "MONAI loop": lambda: monai_loop(overlap, *floats)},
            "normalised surface Dice": {OURS: lambda: surface_dice(said, truth), "MONAI loop": lambda: monai_loop(surface, *floats)}}


@cache
def detections(quick: bool) -> tuple:
    "The task, its predictions on the test pictures and these pictures."
    s = setting(quick)
    task, test = make_task("detection:boxes", s.data), s.data.ids("test")
    head = task.fitted(s.bank, s.data, s.budget)
    return task, task.predict(head, s.bank.stream(test), s.bank.spatial), s.data, test


def our_precision(task, predictions, data, ids) -> list:
    "Average precision at each of `OVERLAPS`."
    found = task.evaluate(predictions, data, ids)
    return [found.value(metric=m) for m in ("ap", "ap30", "ap50")]


def monai_precision(task, predictions, data, ids) -> list:
    "The same by MONAI's matching and COCO metric."
    kept = [s > -np.inf for s in predictions["score"]]
    parts = [[x[k] for x, k in zip(predictions[name], kept)] for name in ("box", "cls", "score")]
    truth = [data.boxes[i] for i in ids]
    metric = COCOMetric(task.classes, iou_list=OVERLAPS, iou_range=(.1, .5, .2), max_detection=(100,), per_class=False, verbose=False)
    matched = matching_batch(box_iou, metric.get_iou_thresholds(), *parts, [b[:, :4] for b in truth], [b[:, 4].astype(int) for b in truth])
    values = metric(matched)[0]
    return [values[f"AP_IoU_{o:.2f}_MaxDet_100"] for o in OVERLAPS]


def precision_ways(quick: bool) -> dict:
    given = detections(quick)
    return {OURS: lambda: our_precision(*given), "MONAI loop": lambda: monai_precision(*given)}


def metrics(quick: bool) -> list:
    ways, n = region_ways(quick) | {"average precision at 3 overlaps": precision_ways(quick)}, len(setting(quick).data.ids("test"))
    count = lambda f: lambda: n if f() is not None else 0
    return [Race("metrics", f"{name}, {n} pictures {SIZE}x{SIZE}", {k: count(f) for k, f in by.items()}) for name, by in ways.items()]


# --- resamples and intervals ----------------------------------------------------------------------------------------------------------

LABEL = "classification:lesion"


def their_auroc(scores, keep=slice(None)) -> float:
    "Of two classes."
    return roc_auc_score(scores.raw["y"][keep], scores.raw["prob"][keep, 1])


def draws(groups, number: int) -> tuple:
    "Patients drawn with repetition (R, G), the index of each picture's patient, and how many there are."
    names, index = np.unique(groups, return_inverse=True)
    return rng("bootstrap").integers(len(names), size=(number, len(names))), index, len(names)


def our_bootstrap(scores, number: int) -> np.ndarray:
    drawn, index, n = draws(scores.groups, number)
    return scores.value(weight=np.stack([np.bincount(d, minlength=n) for d in drawn])[:, index])


def their_bootstrap(scores, number: int) -> np.ndarray:
    drawn, index, n = draws(scores.groups, number)
    mine = [np.flatnonzero(index == g) for g in range(n)]
    return np.array([their_auroc(scores, np.concatenate([mine[g] for g in d])) for d in drawn])


def our_interval(all_scores):
    "Jackknife over patients, crossed with the seeds."
    cells = [pseudo_values(lambda w, s=s: s.value(weight=w), s.groups, vectorised=True, recenter=True) for s in all_scores]
    return crossed_interval(np.stack(cells))


def loop_interval(all_scores):
    "The same, the metric computed anew without each patient."
    cells = [pseudo_values(lambda keep, s=s: their_auroc(s, keep), s.groups, recenter=True) for s in all_scores]
    return crossed_interval(np.stack(cells))


def percentile_interval(all_scores, number: int) -> np.ndarray:
    "The usual bootstrap: seeds and patients drawn with repetition, percentiles of the mean."
    by_seed = np.stack([their_bootstrap(s, number) for s in all_scores])                                  # (S, R)
    seeds = rng("seeds").integers(len(by_seed), size=by_seed.shape)
    return np.percentile(np.take_along_axis(by_seed, seeds, 0).mean(0), [2.5, 97.5])


def resampling(quick: bool) -> list:
    every, number = [scored(quick, LABEL, seed) for seed in range(SEEDS)], 100 if quick else 1000
    patients = len(np.unique(every[0].groups))
    case = f"AUROC, {len(every[0].ids)} pictures of {patients} patients"
    return [
        Race("bootstrap", f"{case}, {number} resamples", {
            OURS: lambda: len(our_bootstrap(every[0], number)), "scikit-learn loop": lambda: len(their_bootstrap(every[0], number))}, "resamples"),
        Race("interval", f"{case}, {SEEDS} seeds", {
            OURS: lambda: 1 if our_interval(every) else 0, "scikit-learn, delete-one loop": lambda: 1 if loop_interval(every) else 0,
            f"scikit-learn, {number} resamples": lambda: 1 if len(percentile_interval(every, number)) else 0}, "intervals")]


# --- what the benchmark consists of ---------------------------------------------------------------------------------------------------

def races(quick: bool) -> list[Race]:
    linear = [linear_probe(quick, n) for n in label_numbers(quick)]
    return [extraction(quick), *linear, *metrics(quick), *resampling(quick), dense_probe(quick)]


def furthest(a, b) -> float:
    "Largest difference where both are defined."
    return float(np.nanmax(np.abs(np.asarray(a, float) - np.asarray(b, float))))


def agreement(quick: bool) -> dict:
    "Largest differences between our values and theirs."
    pairs = region_ways(quick) | {"average precision": precision_ways(quick)}
    found = {name: furthest(*(f() for f in by.values())) for name, by in pairs.items()}
    one, every = scored(quick, LABEL), [scored(quick, LABEL, seed) for seed in range(SEEDS)]
    ours, loop = our_interval(every), loop_interval(every)
    return found | {"bootstrap of AUROC": furthest(our_bootstrap(one, 20), their_bootstrap(one, 20)),
                    "interval of AUROC": furthest([ours.low, ours.high], [loop.low, loop.high])}


def extra(quick: bool) -> Iterator[dict]:
    "How far equal values agree, how equal accuracy was ensured, and what the dense probes reached: the last takes minutes."
    s = setting(quick)
    plain, ours = plain_extraction(s.encoder.eval(), s.data.images)[0], extract(s.encoder, s.data, precision="fp32").pooled
    accuracy = {f"{n} labels, {solver}": linear_tolerance(quick, n, solver) for n in label_numbers(quick) for solver in SOLVERS}
    found = {"largest difference": {"pooled features": furthest(plain, ours)} | agreement(quick), "accuracy": accuracy}
    yield found
    truth = s.data.masks["tissue"][s.data.ids("test")]
    yield found | {"accuracy": accuracy | {"dense probe": dense_tolerance(quick)},
                   "Dice of the dense probes": {k: mean_dice(f(), truth) for k, f in dense_ways(quick).items()}}
