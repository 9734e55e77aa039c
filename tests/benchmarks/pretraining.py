"""Pictures per second of pre-training, each picture counted once per step: ours, lightly's and stable-pretraining's recipes on the same encoder.

lightly's loop runs as published, and given what ours does: bf16 where this processor multiplies in it, and, on a CNN, channels-last weights and
pictures as well; which layout is faster depends on the encoder.

DINO, MAE and DenseCL are raced twice: each library as it publishes the method, and all with the same work (`same`): smaller heads, fewer views or
fewer passes alone make a step cheaper. What else differs is said in `peer_lightly.py` and `peer_stable.py`.
"""
import os
from functools import partial

import torch
from harness import OURS, Race
from peers import CHOSEN, SAME, WORKERS, Case, Deferred, Ours, installed, tried

from tasl_lab.core import pick_precision

METHODS = {"simclr": ("cnn-tiny", "vit-tiny"), "byol": ("cnn-tiny", "vit-tiny"), "dino": ("cnn-tiny", "vit-tiny"),
           "densecl": ("cnn-tiny",), "mae": ("vit-tiny",)}
STEPS = {64: 8, 128: 4}  # in a portion: about as many seconds


def cases(quick: bool) -> list[Case]:
    sizes = {64: 2} if quick else STEPS
    given = [(objective, encoder, size, channels) for size in sizes for channels in ((1,) if quick else (1, 3))
             for objective, encoders in METHODS.items() for encoder in encoders]
    return [Case(*g, same, steps=sizes[g[2]]) for g in given for same in (False, True) if not same or g[0] in SAME]


def lightly(case: Case, how: dict, workers: int):
    from peer_lightly import Lightly
    return Lightly(case, workers, **how)


def stable(case: Case, workers: int):
    from peer_stable import Stable
    return Stable(case, workers)


def peers(case: Case) -> dict:
    "Contender -> what makes it from a number of workers, for what is installed and has the method."
    found = {}
    if installed("lightly", *(["timm"] if case.objective == "mae" else [])):
        ways, half = {"lightly": {}}, pick_precision(device=torch.device("cpu")) == "bf16"
        if half: ways["lightly, bf16"] = {"bf16": True}
        if not case.vit: ways[f"lightly{', bf16' if half else ''}, channels last"] = {"bf16": half, "layout": torch.channels_last}
        found |= {name: partial(lightly, case, how) for name, how in ways.items()}
    if case.objective != "densecl" and installed("stable_pretraining"): found["stable-pretraining"] = partial(stable, case)
    return found


def race(case: Case, quick: bool) -> Race:
    counts = WORKERS[:1] if quick else WORKERS
    contenders = {OURS: Deferred(partial(Ours, case))}
    contenders |= {name: Deferred(partial(tried, make, case, name, counts)) for name, make in peers(case).items()}
    return Race("pretraining", str(case), contenders)


def races(quick: bool) -> list[Race]:
    torch.set_num_threads(os.cpu_count())
    return [race(case, quick) for case in cases(quick)]


def extra(quick: bool) -> dict:
    "Pictures per second with 0, 1 and 2 workers in a short trial; the best count was raced. What `same` stands for."
    return {"workers": CHOSEN, "same work": SAME}
