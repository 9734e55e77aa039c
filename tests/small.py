"""The smallest encoders, pictures and objectives that still have every part."""
import numpy as np
import pandas as pd
import torch
from torch import nn

from tasl_lab.data.imageset import ImageSet, Info
from tasl_lab.encoders import Features, make_encoder
from tasl_lab.objectives.base import Plan, family
from tasl_lab.objectives.cards import CARDS, parse_spec
from tasl_lab.objectives.compose import make

SIZES = {2: (16, 16), 3: (8, 8, 8)}
OPTIONS = {"spark": {"unit": 4}, "simmim": {"unit": 4}}  # mask cells that fit pictures of 16 and 8 pixels


class Flat(nn.Module):
    "The smallest encoder: one matrix."
    modes, name, width = ("whole",), "flat", 12

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(256, self.width)

    def forward(self, x, mask=None, mode="whole"): return Features(self.map(x.flatten(1)), [])


def small_encoder(family, dims=2, channels=1, seed=0):
    "The smallest encoder of a family: strides 2 and 4, or patches of 4."
    if family == "CNN": return make_encoder("cnn-tiny", channels, dims, seed, filters=8, blocks=(1, 1))
    return make_encoder("vit-tiny", channels, dims, seed, width=48, depth=2, heads=2, patch=4, size=SIZES[dims][0])


def small_set(dims=2, channels=1, n=24, seed=0):
    "Smooth random pictures, told apart by scale, orientation and brightness, with a slice position each."
    r = np.random.default_rng(seed)
    at = np.stack(np.meshgrid(*[np.linspace(0, 1, s) for s in SIZES[dims]], indexing="ij"))
    waves = np.tensordot(r.normal(size=(n, channels, dims)) * 6, at, 1) + r.uniform(0, 6, (n, channels, *[1] * dims))
    x = .5 + .3 * np.sin(waves) + .15 * r.uniform(-1, 1, (n, 1, *[1] * dims))
    return ImageSet((x * 255).clip(0, 255).astype(np.uint8), Info("waves"), table=pd.DataFrame({"position": np.arange(n) * .37 % 1}))


def small_objective(spec, kind="CNN", dims=2, channels=1, seed=0, batch=8, rank=0, world=1, balance="fixed", **options):
    "An objective on a small encoder, and a batch for it: `batch` pictures, the share of `rank`."
    data, encoder = small_set(dims, channels), small_encoder(kind, dims, channels, seed)
    options = {n: OPTIONS[n] for _, n in parse_spec(spec, kind) if n in OPTIONS} | options
    plan = Plan(20, batch, seed, SIZES[dims], rank, world, tuple(data.table))
    objective = make(spec, encoder, data.info, plan, options, balance)
    assert family(encoder) == kind
    return objective, data.batch(range(rank * batch, (rank + 1) * batch)).unlabelled()


def gradients(loss, module):
    "Gradient of each parameter by name, zero where it does not take part."
    named = {k: p for k, p in module.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, named.values(), allow_unused=True, retain_graph=True)
    return {k: torch.zeros_like(p) if g is None else g for (k, p), g in zip(named.items(), grads)}


def every(dims=(2, 3)):
    "Every objective with each family of encoders it runs on, in 2-D and 3-D."
    return [(name, f, d) for name, card in CARDS.items() for f in card.encoders for d in dims]
