"""What our step costs beyond the arithmetic of the encoder: bare forward, backward and AdamW on ready tensors, in the same precision.

AdamW is PyTorch's default in the bare step, as one would write it; ours is the fused one, and a bare step with that is shown beside it.

The bare step has no head: it minimises the mean square of the pooled features. Between the two stands the whole objective, heads and
decoder included, on ready views. All three do as many passes through the encoder, in the same mode and with the same masks.
"""
import os
import time
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch
from harness import OURS, Race, peak_memory
from peers import Deferred, pictures
from torch.utils.flop_counter import FlopCounterMode

from tasl_lab.config import PretrainConfig
from tasl_lab.core import autocast, pick_precision
from tasl_lab.data.imageset import ImageSet, Info
from tasl_lab.training import Run

MODES = {"simclr": "whole", "spark": "sparse", "mae": "visible"}
WARM = 2  # steps before anything is timed


@dataclass(frozen=True)
class Case:
    objective: str
    encoder: str
    size: int = 64
    channels: int = 1
    batch: int = 96
    steps: int = 3  # in each portion: short ones, so that what a machine does beside it falls on all alike

    def __str__(self): return f"{self.objective}, {self.encoder}, {self.size}x{self.size} {'grey' if self.channels == 1 else 'RGB'}, batch {self.batch}"


def cases(quick: bool) -> list[Case]:
    pairs = ("simclr", "cnn-tiny"), ("simclr", "vit-tiny"), ("spark", "cnn-tiny"), ("mae", "vit-tiny")
    return [Case(*pair, steps=2 if quick else 3) for pair in pairs]


def make_run(case: Case, images=None) -> Run:
    torch.set_num_threads(os.cpu_count())  # here, because the processes whose memory is measured pass here too
    images = pictures(case.size, case.channels) if images is None else images
    config = PretrainConfig.of(objective=case.objective, encoder=case.encoder, batch=case.batch, steps=10_000)
    return Run(config, ImageSet(images, Info("phantoms")), "cpu")


def ready_views(run: Run) -> list:
    "The views of one step."
    return run.objective.views(run.data.batch(np.arange(run.config.batch)).unlabelled(), 0)


# --- the three ways -------------------------------------------------------------------------------------------------------------------

class Stepped:
    "Steps of a run; a call does a portion."
    def __init__(self, case: Case, images=None):
        self.case, self.done = case, 0
        self.prepare(make_run(case, images))
        for _ in range(WARM): self.next()

    def next(self):
        self.step()
        self.done += 1

    def __call__(self) -> int:
        for _ in range(self.case.steps): self.next()
        return self.case.steps * self.case.batch

    def close(self): self.__dict__.clear()


class Whole(Stepped):
    "Our step."
    def prepare(self, run): self.run = run

    def step(self): self.run.step(self.done)


class Objective(Stepped):
    "The objective on ready views: no batches, no views, no checks."
    def prepare(self, run):
        self.run, self.views = run, ready_views(run)
        self.optimizer = run.optimizer

    def loss(self):
        self.run.objective.memo.clear()
        return self.run.objective(self.views, 0.).total

    def step(self):
        with autocast(self.run.device, self.run.precision): loss = self.loss()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()


class Bare(Objective):
    "The encoder alone on ready tensors, one pass per view or all views in one."
    def __init__(self, case: Case, images=None, joined=False, fused=False):
        self.joined, self.fused = joined, fused
        super().__init__(case, images)

    def prepare(self, run):
        self.run, self.mode = run, MODES[self.case.objective]
        self.views = [(v.x, None if self.mode == "whole" else v.mask) for v in ready_views(run)]
        if self.joined: self.views = [(torch.cat([x for x, _ in self.views]), None)]
        self.optimizer = torch.optim.AdamW(run.encoder.parameters(), lr=1e-3, weight_decay=.01, betas=(.9, .95), fused=self.fused)

    def loss(self): return sum(self.run.encoder(x, mask, self.mode).pooled.float().square().mean() for x, mask in self.views)


class Compiled(Bare):
    "The same through `torch.compile`, whose own time falls into the steps before anything is timed."
    def prepare(self, run):
        super().prepare(run)
        self.compiled = torch.compile(run.encoder)

    def loss(self): return sum(self.compiled(x).pooled.float().square().mean() for x, _ in self.views)


def race(case: Case) -> Race:
    ways = {OURS: Whole, "objective on ready views": Objective, "bare encoder": Bare, "bare encoder, fused optimiser": partial(Bare, fused=True)}
    if case.objective == "simclr": ways |= {"bare encoder, both views in one pass": partial(Bare, joined=True), "bare encoder, compiled": Compiled}
    return Race("overhead", str(case), {name: Deferred(partial(way, case)) for name, way in ways.items()})


def races(quick: bool) -> list[Race]: return [race(case) for case in cases(quick)]


# --- memory ---------------------------------------------------------------------------------------------------------------------------

def noise(case: Case) -> np.ndarray:
    "Pictures that take no memory to make."
    return np.random.default_rng(0).integers(0, 256, (2 * case.batch, case.channels, case.size, case.size), np.uint8)


def hold_whole(case: Case): Whole(case, noise(case))()


def hold_bare(case: Case):
    "The bare step as one would write it: the encoder and tensors, no run."
    from tasl_lab.encoders import make_encoder
    from tasl_lab.views import draw_mask
    torch.set_num_threads(os.cpu_count())
    encoder, mode = make_encoder(case.encoder, case.channels), MODES[case.objective]
    optimizer = torch.optim.AdamW(encoder.parameters())
    x = torch.from_numpy(noise(case)).float()[:case.batch * (2 if mode == "whole" else 1)].split(case.batch)
    mask = None if mode == "whole" else draw_mask(case.batch, [case.size // 8] * 2, .6, 0)
    for _ in range(WARM + case.steps):
        with autocast(torch.device("cpu"), pick_precision(device=torch.device("cpu"))):
            loss = sum(encoder(part, mask, mode).pooled.float().square().mean() for part in x)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


def hold_nothing(case: Case):
    "What both import."
    from tasl_lab.encoders import make_encoder
    make_encoder(case.encoder, case.channels)


def memory(case: Case) -> dict:
    "Megabytes held at most, in fresh processes."
    names = {"ours": hold_whole, "bare": hold_bare, "imports and encoder": hold_nothing}
    held = {name: peak_memory(work, case) for name, work in names.items()}
    base = held["imports and encoder"]
    return held | {"ours / bare": held["ours"] / held["bare"], "ours / bare beyond imports": (held["ours"] - base) / (held["bare"] - base)}


# --- the machine's ceiling ------------------------------------------------------------------------------------------------------------

def fastest(work, times: int) -> float:
    "Seconds of the fastest of several calls, after one to warm up."
    work()
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


@cache
def ceiling(precision: str, n: int = 2048, times: int = 5) -> float:
    "GFLOP/s of a product of two square matrices."
    torch.set_num_threads(os.cpu_count())
    a, b = (torch.randn(n, n, dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[precision]) for _ in range(2))
    return 2 * n ** 3 / fastest(lambda: a @ b, times) / 1e9


def share(case: Case) -> dict:
    "GFLOP of the bare step, GFLOP/s it reaches, and what share of the ceiling that is."
    bare = Bare(case)
    with FlopCounterMode(display=False) as counter: bare.next()
    flop = counter.get_total_flops() / 1e9
    rate = flop / fastest(bare.next, case.steps)
    return {"GFLOP": flop, "GFLOP/s": rate, "precision": bare.run.precision, "share": rate / ceiling(bare.run.precision)}


def extra(quick: bool) -> dict:
    "Peak memory, the ceiling, and how near the bare step comes to it."
    chosen = cases(quick)[:1] if quick else cases(quick)
    return {"peak memory, MB": {str(c): memory(c) for c in chosen}, "bare step": {str(c): share(c) for c in chosen},
            "ceiling, GFLOP/s": {p: ceiling(p) for p in sorted({"fp32", pick_precision(device=torch.device("cpu"))})}}
