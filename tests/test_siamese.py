"""Siamese objectives: losses against lightly and plain loops, over one and two processes; teachers that move, targets that are held still."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ranks import two_processes
from small import gradients, small_encoder, small_objective

from tasl_lab.core import InputError
from tasl_lab.data.imageset import Info
from tasl_lab.objectives.base import Plan
from tasl_lab.objectives.cards import CARDS
from tasl_lab.objectives.compose import make
from tasl_lab.objectives.siamese import barlow_twins_loss, negative_cosine, vicreg_loss

NAMES = ("byol", "simsiam", "barlowtwins", "vicreg")
SHAPES = [(2, 3), (8, 16), (33, 5), (64, 128)]


def pairs(n, *width, seed=0):
    "Two views' embeddings, alike and not equal; dimensions differ in scale and are correlated."
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(n, *width, generator=g) * torch.linspace(.2, 2, width[-1]) + torch.randn(n, *width[:-1], 1, generator=g)
    return [x.requires_grad_() for x in (a, a.detach() + .5 * torch.randn(n, *width, generator=g))]


def same(ours, theirs, inputs):
    "Values and gradients agree within 1e-5, of a large value or gradient within 1e-5 of its size."
    assert torch.allclose(ours, theirs, atol=1e-5, rtol=1e-5)
    for x, y in zip(torch.autograd.grad(ours, inputs, retain_graph=True), torch.autograd.grad(theirs, inputs, retain_graph=True)):
        assert torch.allclose(x, y, atol=1e-5 * max(1., y.abs().max().item()))


# ---------- losses are those of lightly ----------

@pytest.mark.parametrize("shape", SHAPES)
def test_negative_cosine_is_that_of_lightly(shape):
    from lightly.loss import NegativeCosineSimilarity
    a, b = pairs(*shape)
    same(negative_cosine(a, b), NegativeCosineSimilarity()(a, b), [a, b])


@pytest.mark.parametrize("redundancy", [5e-3, .1])
@pytest.mark.parametrize("shape", SHAPES)
def test_barlow_twins_is_that_of_lightly(shape, redundancy):
    from lightly.loss import BarlowTwinsLoss
    a, b = pairs(*shape)
    same(barlow_twins_loss(a, b, redundancy)[0], BarlowTwinsLoss(redundancy)(a, b), [a, b])


@pytest.mark.parametrize("weights", [(25., 25., 1.), (10., 3., .5)])
@pytest.mark.parametrize("shape", [*SHAPES, (7, 4, 5)])
def test_vicreg_is_that_of_lightly(shape, weights):
    from lightly.loss import VICRegLoss
    a, b = pairs(*shape)
    same(vicreg_loss(a, b, *weights)[0], VICRegLoss(*weights)(a, b), [a, b])


# ---------- and their formulas, in plain loops ----------

def test_barlow_twins_is_its_formula():
    a, b = (x.detach().double().numpy() for x in pairs(6, 4))
    c = [[np.mean((a[:, i] - a[:, i].mean()) * (b[:, j] - b[:, j].mean())) / np.sqrt((a[:, i].var() + 1e-5) * (b[:, j].var() + 1e-5)) for j in range(4)]
         for i in range(4)]
    invariance = sum((1 - c[i][i]) ** 2 for i in range(4))
    redundancy = sum(c[i][j] ** 2 for i in range(4) for j in range(4) if i != j)
    total, parts = barlow_twins_loss(*pairs(6, 4), .3)
    for got, expected in ((parts["invariance"], invariance), (parts["redundancy"], redundancy), (total, invariance + .3 * redundancy)):
        assert abs(got.item() - expected) < 1e-5


def test_vicreg_is_its_formula():
    a, b = (x.detach().double().numpy() for x in pairs(6, 4))
    invariance = sum((a[n, i] - b[n, i]) ** 2 for n in range(6) for i in range(4)) / 24
    std = lambda z, i: math.sqrt(sum((z[n, i] - z[:, i].mean()) ** 2 for n in range(6)) / 5 + 1e-4)
    variance = sum(max(0, 1 - std(z, i)) for z in (a, b) for i in range(4)) / 8
    cov = lambda z, i, j: sum((z[n, i] - z[:, i].mean()) * (z[n, j] - z[:, j].mean()) for n in range(6)) / 5
    covariance = sum(cov(z, i, j) ** 2 for z in (a, b) for i in range(4) for j in range(4) if i != j) / 4
    total, parts = vicreg_loss(*pairs(6, 4), 3., 5., 7.)
    assert 0 < variance and list(parts) == ["invariance", "variance", "covariance"]
    for got, expected in zip((*parts.values(), total), (invariance, variance, covariance, 3 * invariance + 5 * variance + 7 * covariance)):
        assert abs(got.item() - expected) < 1e-5 * max(1, expected)


def test_losses_keep_full_precision_under_autocast():
    a, b = pairs(64, 16)
    for loss in (negative_cosine, lambda a, b: barlow_twins_loss(a, b)[0], lambda a, b: vicreg_loss(a, b)[0]):
        full = loss(a, b)
        with torch.autocast("cpu", torch.bfloat16): mixed = loss(a, b)
        assert mixed.dtype == torch.float32
        same(mixed, full, [a, b])


def test_collapsed_projections_pay():
    "Alike for all pictures: the least agreement can cost, and the most that redundancy and variance can."
    flat = torch.ones(5, 3)
    assert abs(negative_cosine(flat, flat).item() + 1) < 1e-6
    assert barlow_twins_loss(flat, flat)[0].item() == 3                         # one per dimension
    assert abs(vicreg_loss(flat, flat)[0].item() - 25 * (1 - .01)) < 1e-4      # the root of 1e-4 is left of the deviation


# ---------- two processes ----------

def losses(a, b):
    return {"cosine": negative_cosine(a, b), "barlow": barlow_twins_loss(a, b)[0], "vicreg": vicreg_loss(a, b)[0], "local": vicreg_loss(a, b, 1., 5., 2.)[0]}


def lightly_losses(a, b, gather=False):
    from lightly.loss import BarlowTwinsLoss, NegativeCosineSimilarity, VICRegLoss
    return {"cosine": NegativeCosineSimilarity()(a, b), "barlow": BarlowTwinsLoss(gather_distributed=gather)(a, b),
            "vicreg": VICRegLoss(gather_distributed=gather)(a, b), "local": VICRegLoss(1., 5., 2., gather_distributed=gather)(a, b)}


def valued(found, inputs):
    "Each loss with its gradients, by name."
    return {k: (v.detach(), *torch.autograd.grad(v, inputs, retain_graph=True)) for k, v in found.items()}


def alike(x):
    "Rows whose first and second half have the same mean and deviation in each dimension."
    return torch.cat([(h - h.mean(0)) / h.std(0, correction=0) for h in x.detach().chunk(2)])


def shares(rank):
    "What one process of two finds out."
    mine = [x.detach().chunk(2)[rank].requires_grad_() for x in pairs(10, 6)]
    level = [alike(x).chunk(2)[rank] for x in pairs(10, 6)]
    found = {}
    for name in NAMES:
        objective, batch = small_objective(name, batch=4, rank=rank, world=2)
        loss = objective(objective.views(batch, 0), 0.).total
        found[name] = loss.detach(), gradients(loss, objective)
    return {"ours": valued(losses(*mine), mine), "lightly": valued(lightly_losses(*mine, gather=True), mine),
            "level": [losses(*level)["barlow"], lightly_losses(*level, gather=True)["barlow"]], "objectives": found}


@pytest.fixture(scope="module")
def two(tmp_path_factory): return two_processes(shares, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("name", ["cosine", "barlow", "vicreg", "local"])
def test_losses_over_two_processes_are_those_of_one(name, two):
    "The mean over processes, of the loss and of its gradients as distributed training takes it, is that of lightly in one process with all pictures."
    both = pairs(10, 6)
    expected, *grads = valued(lightly_losses(*both), both)[name]
    mine = [t["ours"][name] for t in two]
    assert torch.allclose((mine[0][0] + mine[1][0]) / 2, expected, atol=1e-5, rtol=1e-5)
    for k, g in enumerate(grads, 1): assert torch.allclose(torch.cat([m[k] for m in mine]) / 2, g, atol=1e-5), name


@pytest.mark.parametrize("name", ["cosine", "vicreg", "local"])
def test_losses_over_two_processes_are_those_of_lightly_with_gathering(name, two):
    for t in two:
        for x, y in zip(t["ours"][name], t["lightly"][name]): assert torch.allclose(x, y, atol=1e-5, rtol=1e-5)


def test_barlow_twins_normalises_over_all_processes(two):
    "As in the paper's program; lightly norms each process by itself, which is the same where their statistics agree, and else is not."
    for t in two:
        assert torch.allclose(*t["level"], atol=1e-5)  # the shares have equal statistics
        assert not torch.allclose(t["ours"]["barlow"][0], t["lightly"]["barlow"][0], atol=3e-4)


@pytest.mark.parametrize("name", NAMES)
def test_objectives_over_two_processes_are_one(name, two):
    objective, batch = small_objective(name)
    loss = objective(objective.views(batch, 0), 0.).total
    assert torch.allclose(sum(t["objectives"][name][0] for t in two) / 2, loss, atol=1e-5, rtol=1e-5)
    grads = gradients(loss, objective)
    most = max(1., max(g.abs().max().item() for g in grads.values()))
    for k, g in grads.items(): assert torch.allclose(sum(t["objectives"][name][1][k] for t in two) / 2, g, atol=1e-5 * most), k


# ---------- what each objective compares ----------

def test_byol_is_the_distance_of_unit_vectors():
    objective, batch = small_objective("byol")
    views = objective.views(batch, 0)
    with torch.no_grad():
        for p in objective.teacher.parameters(): p.add_(.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
        p = [objective.predictor(objective.head(objective.encoder(v.x).pooled)) for v in views]
        z = [objective.teacher.head(objective.teacher.encoder(v.x).pooled) for v in views]
        unit = lambda x: x / x.norm()
        far = [sum(((unit(x) - unit(y)) ** 2).sum().item() for x, y in zip(p[i], z[1 - i])) / len(p[i]) for i in (0, 1)]
    assert abs(objective(objective.views(batch, 0), 0.).total.item() - sum(far) / 2) < 1e-5


def test_byol_teaches_without_learning_from_the_loss():
    objective, batch = small_objective("byol")
    loss = objective(objective.views(batch, 0), 0.).total
    assert not any(p.requires_grad for p in objective.teacher.parameters())
    loss.backward()
    assert all(p.grad is None for p in objective.teacher.parameters()) and objective.encoder.net.conv_init.weight.grad.abs().max() > 0


def test_byol_teacher_follows_after_the_step_only():
    objective, batch = small_objective("byol", byol={"momentum": .9})
    student, teacher = objective.head[0].weight, objective.teacher.head[0].weight
    assert torch.equal(student, teacher)
    with torch.no_grad(): student.add_(1.)
    start = teacher.clone()
    objective(objective.views(batch, 0), 0.)
    assert torch.equal(teacher, start)                                          # forward moves nothing
    for progress, step in ((0., .1), (.5, .9 * .05), (1., 0.)):                 # a tenth of the way, half of that of what is left, nothing at the end
        before = teacher.clone()
        objective.after_step(progress)
        assert torch.allclose(teacher - before, torch.full_like(start, step), atol=1e-6)


def test_simsiam_holds_its_targets_still():
    "The gradient is that of targets which are plain numbers; without the stop-gradient it is not."
    grads = {}
    for held in (True, False):
        objective, batch = small_objective("simsiam", simsiam={"stop_gradient": held})
        grads[held] = gradients(objective(objective.views(batch, 0), 0.).total, objective)
    views = objective.views(batch, 0)
    with torch.no_grad(): fixed = [objective.project(v) + 0. for v in views]
    p = [objective.predictor(objective.project(v)) for v in views]
    loss = 1 - (F.cosine_similarity(p[0], fixed[1]).mean() + F.cosine_similarity(p[1], fixed[0]).mean()) / 2
    expected = gradients(loss, objective)
    assert all(torch.allclose(grads[True][k], g, atol=1e-6) for k, g in expected.items())
    assert not all(torch.allclose(grads[False][k], g, atol=1e-4) for k, g in expected.items())


def test_simsiam_collapses_without_stop_gradient():
    "Twenty steps: the loss is far better and every picture's projection points the same way."
    spread = {}
    for held in (True, False):
        objective, batch = small_objective("simsiam", simsiam={"stop_gradient": held, "output_norm": False})
        optimizer = torch.optim.AdamW(objective.param_groups(), lr=5e-3)
        for step in range(20):
            loss = objective(objective.views(batch, step), 0.).total
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        z = F.normalize(objective.project(objective.views(batch, 99)[0]), dim=1)
        spread[held] = z.std(0).mean().item() * z.shape[1] ** .5
    assert spread[True] > .5 and spread[False] < .3, spread


# ---------- refusals ----------

@pytest.mark.parametrize("name", NAMES)
def test_one_picture_is_refused(name):
    plan = lambda **given: Plan(**{"batch": 1, "size": (16, 16)} | given)
    with pytest.raises(InputError, match=f"batch of 1 for {name}.*at least 2"): make(name, small_encoder("CNN"), Info("small"), plan())
    make(name, small_encoder("CNN"), Info("small"), plan(world=2))              # one in each of two processes is a batch of two


@pytest.mark.parametrize("name, options, words", [
    ("byol", {"momentum": 1.}, "momentum is 1.0"), ("byol", {"momentum": -.1}, "momentum is -0.1"), ("simsiam", {"bottleneck": 0}, "bottleneck is 0"),
    ("barlowtwins", {"redundancy": 0.}, "redundancy is 0.0"), ("vicreg", {"std": 0.}, "std 0.0.*alike"), ("vicreg", {"sim": 0.}, "sim 0.0"),
    ("vicreg", {"cov": -1.}, "cov -1.0"),
])
def test_options_that_cannot_work_are_refused(name, options, words):
    with pytest.raises(InputError, match=words): make(name, small_encoder("CNN"), Info("small"), Plan(batch=4, size=(16, 16)), {name: options})


def test_cards_name_the_defaults_of_the_classes():
    import inspect
    from importlib import import_module
    for name in NAMES:
        module, _, attribute = CARDS[name].make.partition(":")
        signature = inspect.signature(getattr(import_module(module), attribute).__init__).parameters
        own = {k: p.default for k, p in signature.items() if p.default is not p.empty}
        assert {k: v for k, v in CARDS[name].defaults.items() if k != "lr"} == own
