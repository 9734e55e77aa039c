"""What the races against other libraries share: the same pictures, the same encoder, loaders with the best worker count, contenders made when needed.

Their recipes are in `peer_lightly.py` and `peer_stable.py`, ours is `Ours` below.
"""
import time
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

from tasl_lab.config import PretrainConfig
from tasl_lab.data.imageset import ImageSet, Info
from tasl_lab.data.phantom import phantom
from tasl_lab.encoders import make_encoder
from tasl_lab.objectives.dense import overlay
from tasl_lab.objectives.heads import dense_level
from tasl_lab.training import Run

WORKERS = (0, 1, 2)
CHOSEN = {}  # case -> contender -> pictures per second of each worker count that was tried
# What all get when all shall do the same work, in the words of our options: the sizes are lightly's; with DenseCL it makes both views
# queries, as we do, compares cells of our map and keeps as many keys.
SAME_DINO = {"hidden": 512, "bottleneck": 64, "prototypes": 2048, "local": 6}
SAME_MAE = {"decoder": 512, "depth": 1, "ratio": .75}
SAME_DENSECL = {"queue": 512}
SAME = {"dino": SAME_DINO, "mae": SAME_MAE, "densecl": SAME_DENSECL}


@cache
def installed(*names: str) -> bool:
    "Are these packages here? If not, says so once."
    missing = [n for n in names if find_spec(n) is None]
    if missing: print(f"{', '.join(missing)} not installed: its contenders are left out")
    return not missing


@dataclass(frozen=True)
class Case:
    "What is equal for all contenders of a race."
    objective: str      # simclr, byol, dino, mae or densecl
    encoder: str
    size: int           # pixels per axis
    channels: int
    same: bool = False  # the same work, too: heads, number of views; else each as published
    batch: int = 96
    steps: int = 8      # in each portion

    def __str__(self):
        work = ", same work" if self.same else ""
        return f"{self.objective}, {self.encoder}, {self.size}x{self.size} {'grey' if self.channels == 1 else 'RGB'}, batch {self.batch}{work}"

    @property
    def vit(self) -> bool: return self.encoder.startswith("vit")

    @property
    def small(self) -> int:
        "Side of small views: the usual 96/224 of the picture, or half as ours, in whole cells of the coarsest map."
        return self.size // 2 if self.same else round(self.size * 96 / 224 / 16) * 16

    def make_encoder(self): return make_encoder(self.encoder, self.channels, **({"size": self.size} if self.vit else {}))


@cache
def pictures(size: int, channels: int, n: int = 480) -> np.ndarray:
    "Phantoms (n, channels, size, size) uint8; RGB by stacking three different ones."
    return phantom(n * channels, size).images.reshape(n, channels, size, size)


class Pictures(Dataset):
    "PIL pictures from an array in memory, each with a class that nobody uses."
    def __init__(self, images, transform=None):
        self.images = images[:, 0] if images.shape[1] == 1 else np.ascontiguousarray(images.transpose(0, 2, 3, 1))
        self.transform = transform or (lambda picture: picture)

    def __len__(self): return len(self.images)

    def __getitem__(self, i): return self.transform(Image.fromarray(self.images[i])), 0


def loader(data, case: Case, workers: int) -> DataLoader:
    """One portion is one epoch: at its start the workers are idle, at its end too, so that they do nothing while others race.

    They live on between epochs."""
    sampler = RandomSampler(data, num_samples=case.steps * case.batch)
    return DataLoader(data, case.batch, sampler=sampler, num_workers=workers, persistent_workers=workers > 0, drop_last=True)


class Pooled(nn.Module):
    "An encoder whose output is one vector per picture."
    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, x, **_): return self.encoder(x).pooled


class Coarsest(Pooled):
    "An encoder whose output is its coarsest map."
    def forward(self, x): return self.encoder(x).maps[-1]


class Overlaid(Pooled):
    "An encoder whose output is the map of our dense objectives."
    def __init__(self, encoder, size):
        super().__init__(encoder)
        self.level = dense_level(encoder, (size, size))
        self.channels = sum(encoder.channels[self.level:])

    def forward(self, x): return overlay(self.encoder(x).maps, self.level)


class Tokens(Pooled):
    "A ViT whose output is the class token and those of the visible patches (B, 1+V, D)."
    def forward(self, x, hidden):  # (B, *grid) bool
        f = self.encoder(x, hidden, "visible")
        return torch.cat([f.cls.unsqueeze(1), f.tokens], 1)


class Deferred:
    "A contender made when it is first called, so that those of other races take neither time nor memory."
    def __init__(self, make): self.make, self.made = make, None

    def __call__(self) -> int:
        self.made = self.made or self.make()
        return self.made()

    def close(self):
        if self.made: self.made.close()
        self.made = None


def tried(make, case: Case, name: str, counts=WORKERS):
    """`make(workers)` with the worker count that was fastest in one epoch after a first one, which starts the workers.

    A library's loader is tried once: "lightly, channels last" takes the count of "lightly"."""
    tries = CHOSEN.setdefault(str(case), {})
    rates = tries.setdefault(name.partition(",")[0], {})
    for workers in counts if len(counts) > 1 and not rates else ():
        contender = make(workers)
        contender()
        start = time.perf_counter()
        rates[workers] = contender() / (time.perf_counter() - start)
        contender.close()
    return make(max(rates, key=rates.get) if rates else counts[0])


class Ours:
    "Our pre-training, as `tasl_lab.training.pretrain` runs it."
    def __init__(self, case: Case):
        data = ImageSet(pictures(case.size, case.channels), Info("phantoms"))
        config = PretrainConfig.of(objective=case.objective, encoder=case.encoder, batch=case.batch, steps=10_000, options=options(case))
        self.run, self.case, self.done = Run(config, data, "cpu"), case, 0

    def __call__(self) -> int:
        for _ in range(self.case.steps):
            self.run.step(self.done)
            self.done += 1
        return self.case.steps * self.case.batch

    def close(self): self.run = None


def options(case: Case) -> dict:
    "Our options where all do the same work; ours as they are otherwise."
    if not case.same: return {}
    return {case.objective: SAME[case.objective] | ({"norm": False} if case.objective == "dino" else {})}
