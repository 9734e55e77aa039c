"""What the pre-trainings of a matrix take at its default budget: eight objectives of all paradigms, three seeds, phantoms of 64x64.

No race: everything is in `extra`. A few steps of each objective are profiled, as `tasl profile` does, and the minutes of all runs follow from the pictures
per second; nothing is shared between runs, so one more objective costs its own runs and no other.
"""
from harness import Race

from tasl_lab.alignment.matrix import MatrixConfig
from tasl_lab.checkup import profile
from tasl_lab.data.sources import load

OBJECTIVES = ("simclr", "byol", "vicreg", "densecl", "rotation", "masked", "modelsgenesis", "simclr+0.5*masked")
SEEDS = 3
KEPT = ("pictures_per_second", "share", "peak_memory_mb", "operators")


def races(quick: bool) -> list[Race]: return []


def extra(quick: bool) -> dict:
    default, data = MatrixConfig(), load("phantom", 32 if quick else 64, n=300)
    found = {o: profile(default.pretraining(o, 0), data, steps=1 if quick else 12) for o in OBJECTIVES[:2 if quick else None]}
    seconds = {o: default.steps * default.batch / p["pictures_per_second"] for o, p in found.items()}
    return {"budget": {"encoder": default.encoder, "size": list(data.spatial), "batch": default.batch, "steps": default.steps, "seeds": SEEDS},
            "seconds of a run": seconds, "minutes of all runs": SEEDS * sum(seconds.values()) / 60,
            "profile": {o: {k: p[k] for k in KEPT} for o, p in found.items()}}
