"""How time and memory grow: with the number of pictures, their size, and the objectives, tasks and seeds of a matrix.

No race: everything is in `extra`. `points` holds what was measured, `exponents` the slope of log time (log memory) on log size by least squares,
with its standard error: 1 is proportional, 0 does not grow. Phantoms, `cnn-tiny`, SimCLR with 96 pictures a step.
"""
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from itertools import chain, count

import numpy as np
from harness import Race, peak_memory
from scipy.stats import linregress

from tasl_lab.alignment.matrix import MatrixConfig, run_matrix
from tasl_lab.config import PretrainConfig
from tasl_lab.core import read_json
from tasl_lab.data.imageset import ImageSet
from tasl_lab.data.sources import load
from tasl_lab.encoders import make_encoder
from tasl_lab.tasks.features import extract
from tasl_lab.tasks.registry import make_task
from tasl_lab.training import Run, batch_ids

PICTURES = {True: (300, 600), False: (1000, 3000, 10_000, 30_000, 100_000)}  # quick or not
SIDES = {True: (32, 64), False: (32, 48, 64, 96, 128)}
LABELS = {True: 20, False: 120}
SMALL, FEW, BATCH = 32, 300, 96  # pixels where pictures grow in number, pictures where they grow in size, pictures of a step
OBJECTIVES = ("simclr", "byol", "vicreg", "barlowtwins", "simsiam", "swav", "mocov3", "denoising")
TASKS = ("classification:class", "segmentation:tissue", "detection:boxes")


# --- what is measured -----------------------------------------------------------------------------------------------------------------

def pictures(n: int, side: int = SMALL) -> ImageSet:
    "As many phantoms as asked for; beyond a thousand they are repeated, each copy with patients of its own."
    some = load("phantom", side, n=min(n, 1000))
    at = np.arange(n) % len(some)
    data = some.subset(at)
    data.table["patient"] = data.table.patient + "-" + (np.arange(n) // len(some)).astype(str).astype(object)
    return data


def encoder(): return make_encoder("cnn-tiny")


def training(data) -> Run: return Run(PretrainConfig.of(batch=BATCH, steps=10_000, watch=0), data)


def pieces(data, labels: int) -> Iterator[tuple]:
    "Name and function of each piece of work on a set."
    run, step, model = training(data), count(), encoder()
    yield "views of a step", lambda: views(run, next(step))
    yield "pre-training step", lambda: run.step(next(step))
    yield "extraction", lambda: extract(model, data)
    bank = extract(model, data)
    probe = lambda spec, ids: lambda: make_task(spec, data).probe(bank, data, ids)
    for spec in TASKS: yield f"probe {spec.partition(':')[0]}", probe(spec, data.budget(labels))
    yield "probe classification, all labels", probe(TASKS[0], data.ids("train"))


def views(run: Run, step: int):
    batch = run.data.batch(batch_ids(run.pool, BATCH, 0, step)).unlabelled()
    return run.objective.views(batch, step)


# --- time -----------------------------------------------------------------------------------------------------------------------------

def seconds(work: Callable, enough: float = .5, most: int = 5) -> float:
    "Median time of a call, repeated until enough of it was seen; a first call that is quick does not count."
    taken = []
    while len(taken) < most and sum(taken) < enough:
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return float(np.median(taken[1:] or taken))


def sweep(axis: str, sizes, make: Callable, labels: int) -> Iterator[dict]:
    "One point per size and piece of work; `make(size)` is the set."
    for size in sizes:
        for name, work in pieces(make(size), labels): yield {"axis": axis, "work": name, "size": size, "seconds": seconds(work)}


@cache
def matrix(objectives: int, tasks: int, seeds: int) -> dict:
    "Items of a tiny matrix and the seconds they took, those with an objective and the controls apart."
    config = MatrixConfig.of(objectives=list(OBJECTIVES[:objectives]), tasks=list(TASKS[:tasks]), seeds=seeds, labels=[60], steps=4, batch=32,
                             finetune_steps=4, ceiling=False)
    with tempfile.TemporaryDirectory() as out:
        folder = run_matrix(config, load("phantom", SMALL, n=240), out, verbose=False)
        done = [read_json(p) for p in folder.glob("*/item.json")]
    spent = lambda wanted: sum(d["total_seconds"] for d in done if bool(d["item"]["objective"]) == wanted)
    return {"work": "matrix", "items": len(done), "seconds": spent(True) + spent(False), "seconds of objectives": spent(True),
            "seconds of controls": spent(False)}


def matrices(quick: bool) -> Iterator[dict]:
    "Points of growing matrices; a first one, which also imports what is needed, does not count."
    matrix(2, 1, 1)
    for n in (1, 2) if quick else (1, 2, 4, 8): yield {"axis": "objectives", "size": n} | matrix(n, 3, 1)
    for n in (1, 3) if quick else (1, 2, 3): yield {"axis": "tasks", "size": n} | matrix(1, n, 1)
    for n in (1, 2) if quick else (1, 2, 4, 8): yield {"axis": "seeds", "size": n} | matrix(1, 3, n)


# --- memory ---------------------------------------------------------------------------------------------------------------------------

def imported(): return training(pictures(BATCH * 2))


def extracted(n: int): return extract(encoder(), pictures(n))


def trained(side: int):
    run = training(pictures(FEW, side))
    for step in range(3): run.step(step)


def peaks(quick: bool) -> Iterator[dict]:
    "Megabytes over those of a process that has made its encoder and a few pictures, the largest moment counted."
    floor = peak_memory(imported)
    for n in PICTURES[quick][-1:] if quick else PICTURES[quick][::2]:
        yield {"axis": "pictures", "work": "extraction", "size": n, "megabytes": peak_memory(extracted, n) - floor}
    for side in () if quick else SIDES[quick][::2]:
        yield {"axis": "pixels per side", "work": "pre-training step", "size": side, "megabytes": peak_memory(trained, side) - floor}


# --- exponents ------------------------------------------------------------------------------------------------------------------------

def exponents(points: list) -> list:
    "Slope of log value on log size of everything that was measured at two sizes or more."
    found = {}
    for p in points:
        for of in p.keys() - {"axis", "work", "size"}: found.setdefault((p["axis"], p["work"], of), []).append((p["size"], p[of]))
    fits = {k: linregress(*np.log(np.array(v)).T) for k, v in sorted(found.items()) if len(v) > 1}
    return [{"axis": axis, "work": work, "of": of, "exponent": fit.slope, "standard error": fit.stderr, "points": len(found[axis, work, of])}
            for (axis, work, of), fit in fits.items()]


def races(quick: bool) -> list[Race]: return []


def extra(quick: bool) -> Iterator[dict]:
    "What is known after each point: whoever stops here has what is measured."
    points, work = [], chain(matrices(quick), peaks(quick), sweep("pixels per side", SIDES[quick], lambda side: pictures(FEW, side), LABELS[quick]),
                             sweep("pictures", PICTURES[quick], pictures, LABELS[quick]))
    for point in work:
        points.append(point)
        yield {"points": points, "exponents": exponents(points)}
