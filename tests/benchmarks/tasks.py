"""What fitting and scoring the probes of a set takes beside one pass of the encoder over it, and how large its feature cache is.

No race: everything is in `extra`. Phantoms of 64x64, `cnn-tiny`; the three probes of a matrix, with what each computes beside its linear head.
"""
import time

from harness import Race

from tasl_lab.data.sources import load
from tasl_lab.encoders import make_encoder
from tasl_lab.tasks.features import extract
from tasl_lab.tasks.registry import make_task

SPECS = ("classification:class", "segmentation:tissue", "detection:boxes")
LABELS = 120


def races(quick: bool) -> list[Race]: return []


def timed(work) -> tuple:
    "Seconds of a call and what it returns."
    start = time.perf_counter()
    found = work()
    return time.perf_counter() - start, found


def probe_seconds(data, bank, labels: int) -> dict:
    return {spec: timed(lambda spec=spec: make_task(spec, data).probe(bank, data, data.budget(labels)).values())[0] for spec in SPECS}


def extra(quick: bool) -> dict:
    data, encoder = load("phantom", 32 if quick else 64, n=300 if quick else 5000), make_encoder("cnn-tiny")
    probe_seconds(data.subset(range(300)), extract(encoder, data.subset(range(300))), 60)  # imports what is needed
    passes = [timed(lambda: extract(encoder, data)) for _ in range(3)]
    once, bank = sorted(s for s, _ in passes)[1], passes[0][1]
    rounds = [probe_seconds(data, bank, min(LABELS, len(data.ids("train")))) for _ in range(3)]
    probes = {spec: sorted(r[spec] for r in rounds)[1] for spec in SPECS}
    return {"pictures": len(data), "labels": LABELS, "feature pass, s": once, "probes, s": probes,
            "all probes / feature pass": sum(probes.values()) / once, "features, MB": bank.nbytes / 1e6}
