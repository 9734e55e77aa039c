"""Dense objectives: matches and losses agree with lightly and with plain loops, also over two processes."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ranks import two_processes
from torch import nn

from tasl_lab.core import InputError
from tasl_lab.data.imageset import ImageSet, Info
from tasl_lab.encoders import Features
from tasl_lab.objectives.base import Plan
from tasl_lab.objectives.cards import CARDS
from tasl_lab.objectives.compose import make
from tasl_lab.objectives.contrastive import Queue
from tasl_lab.objectives.dense import best_match, centres, closest, densecl_loss, overlay, pixpro_loss, propagate, same_spot, vicregl_loss
from tasl_lab.views import View, ViewSpec, make_views, warp


class Patches(nn.Module):
    "The smallest encoder with maps: patches of 4 pixels, then of 8."
    modes, name, width, in_channels = ("whole",), "patches", 10, 1
    strides, channels = (4, 8), (6, 4)

    def __init__(self, dims=2):
        super().__init__()
        conv, self.dims = {2: nn.Conv2d, 3: nn.Conv3d}[dims], dims
        self.fine, self.coarse = conv(1, 6, 4, 4), conv(6, 4, 2, 2)

    def forward(self, x, mask=None, mode="whole"):
        a = self.fine(x).relu()
        b = self.coarse(a)
        return Features(torch.cat([m.flatten(2).mean(2) for m in (a, b)], 1), [a, b])


def small(spec, n=8, rank=0, world=1, dims=2, **options):
    "An objective on the smallest encoder, and its set."
    torch.manual_seed(0)
    data = ImageSet(np.random.default_rng(0).integers(0, 255, (24, 1, *[16] * dims)).astype(np.uint8), Info("noise"))
    plan = Plan(20, n, 0, (16,) * dims, rank, world)
    return make(spec, Patches(dims), data.info, plan, {spec: options} if options else None), data


def draw(*shape, seed=0): return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def alike(ours, theirs, *inputs, atol=1e-5):
    "Equal values and gradients."
    assert torch.allclose(ours, theirs.to(ours.dtype).reshape(()), atol=atol)
    for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs)): assert torch.allclose(a, b, atol=atol)


def cosine(a, b): return a @ b / (a.norm() * b.norm())


# ---------- the map ----------

def test_overlay_repeats_coarse_cells_smoothly():
    fine, coarse = draw(2, 3, 4, 6), draw(2, 5, 2, 3, seed=1)
    got = overlay([draw(2, 1, 8, 12), fine, coarse], 1)
    assert got.shape == (2, 8, 4, 6) and torch.equal(got[:, :3], fine)
    assert torch.allclose(got[:, 3:, 0, 0], coarse[:, :, 0, 0], atol=1e-6)  # a corner
    expected = .75 * (.75 * coarse[..., 0, 0] + .25 * coarse[..., 0, 1]) + .25 * (.75 * coarse[..., 1, 0] + .25 * coarse[..., 1, 1])
    assert torch.allclose(got[:, 3:, 1, 1], expected, atol=1e-6)
    volume = overlay([draw(1, 2, 4, 4, 2), draw(1, 1, 2, 2, 1)], 0)
    assert volume.shape == (1, 3, 4, 4, 2) and overlay([fine, coarse], 1) is not coarse and torch.equal(overlay([fine, coarse], 1), coarse)


# ---------- DenseCL ----------

@pytest.mark.parametrize("cells, others", [(1, 1), (4, 4), (6, 3)])
def test_best_match_is_a_plain_loop(cells, others):
    a, b = draw(3, cells, 4), draw(3, others, 4, seed=1)
    got = best_match(a, b)
    for i in range(3):
        for t in range(cells): assert got[i, t] == max(range(others), key=lambda s: cosine(a[i, t], b[i, s]).item())


@pytest.mark.parametrize("kept", [0, 5])
def test_densecl_loss_is_a_plain_loop(kept):
    n, t, d, tau = 4, 5, 3, .3
    q, k = ((draw(n, d, seed=s), draw(n, t, d, seed=s + 1), draw(n, t, 2, seed=s + 2)) for s in (0, 10))
    queue, mine = Queue(kept, 2 * d), torch.tensor([3, 5, 7, 9])
    if kept:
        queue.owners.copy_(torch.tensor([5, 20, 21, 9, -1]))  # two are back, one place is empty
        queue.keys.copy_(draw(kept, 2 * d, seed=20).detach())
    unit = lambda z: z / z.norm()
    mean = [sum(unit(c) for c in k[1][i]) / t for i in range(n)]
    old = [queue.keys[j] for j in (1, 2)] if kept else []
    wholes, cells = [], []
    for i in range(n):
        pair = lambda a, own, others: -torch.log(torch.exp(cosine(a, own) / tau) / sum(torch.exp(cosine(a, o) / tau) for o in [own, *others]))
        rest = [j for j in range(n) if j != i]
        wholes.append(pair(q[0][i], k[0][i], [k[0][j] for j in rest] + [o[:d] for o in old]))
        for c in range(t):
            own = max(range(t), key=lambda s: cosine(q[2][i, c], k[2][i, s]).item())
            cells.append(pair(q[1][i, c], k[1][i, own], [mean[j] for j in rest] + [o[d:] for o in old]))
    whole, dense = densecl_loss(q, tuple(z.detach() for z in k), queue, mine, tau)
    alike(whole, sum(wholes) / len(wholes), q[0])
    alike(dense, sum(cells) / len(cells), q[1])


def test_densecl_weighs_wholes_and_cells_both_ways():
    objective, data = small("densecl", dense=.3)
    views = objective.views(data.batch(range(8)), 0)
    with torch.no_grad():
        q, k = ([objective.see(v, by) for v in views] for by in (objective, objective.teacher))
        ways = [densecl_loss(q[a], k[1 - a], Queue(0, 256), torch.arange(8), .2) for a in (0, 1)]
        loss = objective(views, 0.)
    whole, dense = ((a + b) / 2 for a, b in zip(*ways))
    assert torch.allclose(loss.parts["global"], whole, atol=1e-6) and torch.allclose(loss.parts["dense"], dense, atol=1e-6)
    assert torch.allclose(loss.total, .7 * whole + .3 * dense, atol=1e-6)


@pytest.mark.parametrize("spec", ["densecl", "pixpro"])
def test_teacher_follows_and_takes_no_gradient(spec):
    objective, data = small(spec, momentum=.9)
    start = {k: v.clone() for k, v in objective.teacher.named_parameters()}
    with torch.no_grad():
        for p in objective.parameters():
            if p.requires_grad: p.add_(1.)
    objective(objective.views(data.batch(range(8)), 0), 0.).total.backward()
    assert all(p.grad is None for p in objective.teacher.parameters()) and all(p.grad is not None for p in objective.parameters() if p.requires_grad)
    state = {k: v.clone() for k, v in objective.state_dict().items()}
    objective(objective.views(data.batch(range(8)), 0), 0.)
    assert all(torch.equal(v, state[k]) for k, v in objective.state_dict().items())  # the loss itself changes nothing
    objective.after_step(0.)
    for k, v in objective.teacher.named_parameters(): assert torch.allclose(v, start[k] + .1, atol=1e-6), k


def test_densecl_queue_holds_keys_of_the_last_batches():
    objective, data = small("densecl", n=4, queue=6)
    for step, ids in enumerate(([0, 1, 2, 3], [4, 5, 6, 7])):
        views = objective.views(data.batch(ids), step)
        objective(views, 0.)
        with torch.no_grad(): whole, cells, _ = objective.see(views[0], objective.teacher)
        objective.after_step(0.)
    assert objective.queue.owners.tolist() == [4, 5, 6, 7, 0, 1]
    assert torch.allclose(objective.queue.keys[:4], torch.cat([whole, F.normalize(cells, dim=-1).mean(1)], 1), atol=1e-6)


# ---------- PixPro: places ----------

def turned(dims, seed=0, size=None, shape=None):
    "Views with crops, mirroring, turning and changed proportions."
    shape = shape or ((16, 24) if dims == 2 else (8, 16, 8))
    spec = ViewSpec(size=size, scale=(.3, .9), ratio=1.5, flip=(.5,) * dims, rotate=30)
    return make_views(torch.zeros(5, 1, *shape), [spec, spec], seed, 0)


def plain_centres(view, stride):
    "Centres of the cells in the source, and the diagonal of a cell, by a loop."
    grid = [n // stride for n in view.x.shape[2:]]
    at = [[m[:, :-1] @ torch.tensor([k * stride + (stride - 1) / 2 for k in cell]) + m[:, -1] for cell in np.ndindex(*grid)] for m in view.affine]
    sides = [[(m[:, axis] * stride).square().sum() for axis in range(len(grid))] for m in view.affine]
    return at, [math.sqrt(sum(s)) for s in sides]


@pytest.mark.parametrize("dims, size", [(2, None), (2, 16), (3, None)])
@pytest.mark.parametrize("threshold", [.3, .7, 1.5])
def test_same_spot_is_a_plain_loop(dims, size, threshold):
    a, b = turned(dims, size=size)
    got = same_spot(a, b, 4, threshold)
    (at, diagonal), (there, other) = plain_centres(a, 4), plain_centres(b, 4)
    expected = [[[bool((p - q).norm() < threshold * max(diagonal[i], other[i])) for q in there[i]] for p in at[i]] for i in range(5)]
    assert got.tolist() == expected and 0 < got.float().mean() < 1
    assert torch.equal(same_spot(b, a, 4, threshold), got.mT)


def test_centres_are_where_the_warp_looks():
    view, shape = turned(2)[0], (16, 24)
    ramp = torch.stack(torch.meshgrid(*[torch.arange(float(n)) for n in shape], indexing="ij"))[None].expand(5, -1, -1, -1)
    seen = warp(ramp, view.affine, shape)                       # each pixel shows its own coordinates in the source
    cells = F.avg_pool2d(seen, 4).flatten(2).transpose(1, 2)    # the mean over a cell is its centre
    at, _ = centres(view, 4)
    inside = ((at >= 4) & (at <= torch.tensor(shape) - 5.)).all(-1)  # far enough from the edges, which are repeated
    assert inside.any() and torch.allclose(cells[inside], at[inside], atol=1e-3)


# ---------- PixPro: loss ----------

@pytest.mark.parametrize("gamma", [1., 2., 3.])
def test_propagation_is_a_plain_loop(gamma):
    x, g = draw(2, 5, 4), draw(2, 5, 3, seed=1)
    expected = torch.stack([torch.stack([sum(cosine(p, q).clamp(min=0) ** gamma * h for q, h in zip(x[i], g[i])) for p in x[i]]) for i in range(2)])
    got, weight = propagate(x, g, gamma), draw(2, 5, 3, seed=2).detach()
    assert torch.allclose(got, expected, atol=1e-5)
    alike((got * weight).sum(), (expected * weight).sum(), x, g)


@pytest.mark.parametrize("cells, others", [(4, 4), (6, 3)])
def test_pixpro_loss_is_a_plain_loop(cells, others):
    y, x = draw(4, cells, 3), draw(4, others, 3, seed=1)
    pairs = torch.rand(4, cells, others, generator=torch.Generator().manual_seed(2)) < .3
    pairs[1] = False  # these views do not meet
    per_picture = []
    for i in range(4):
        apart = [1 - cosine(y[i, t], x[i, s]) for t in range(cells) for s in range(others) if pairs[i, t, s]]
        per_picture.append(sum(apart) / len(apart) if apart else 0.)
    alike(pixpro_loss(y, x, pairs), sum(per_picture) / 4, y, x)


def test_pixpro_without_any_pair_costs_nothing():
    y, x = draw(2, 4, 3), draw(2, 4, 3, seed=1)
    loss = pixpro_loss(y, x, torch.zeros(2, 4, 4, dtype=torch.bool))
    assert loss == 0 and all((g == 0).all() for g in torch.autograd.grad(loss, [y, x]))


@pytest.mark.parametrize("dims", [2, 3])
def test_pixpro_goes_both_ways(dims):
    objective, data = small("pixpro", dims=dims)
    views, gamma = objective.views(data.batch(range(8)), 0), CARDS["pixpro"].defaults["gamma"]
    assert objective.stride == 4
    loss = 0.
    for a, b in (views, views[::-1]):
        x, slow = objective.see(a, objective), objective.see(b, objective.teacher).detach()
        loss = loss + pixpro_loss(propagate(x, objective.transform(x), gamma), slow, same_spot(a, b, 4, .7))
    objective.memo.clear()  # a second graph, so that both can be differentiated
    alike(objective(views, 0.).total, loss, *objective.encoder.parameters(), *objective.transform.parameters())


# ---------- VICRegL ----------

def test_closest_is_a_plain_loop():
    distance = draw(3, 6, 4).abs()
    for k in (1, 4, 9):
        here, there = closest(distance, k)
        for i in range(3):
            best = sorted(min((distance[i, t, s].item(), t, s) for s in range(4)) for t in range(6))[:k]
            assert list(zip(here[i].tolist(), there[i].tolist())) == [(t, s) for _, t, s in best]


def embeddings(n, grid, width=5, dims=2):
    "Embeddings of two views (whole, cells) and places of the cells."
    t = math.prod(grid)
    whole, cells = ([draw(n, *size, width, seed=s + len(size)) for s in (0, 10)] for size in ((), (t,)))
    return whole, cells, [10 * draw(n, t, dims, seed=s).detach() for s in (5, 6)]


def of_lightly(whole, cells, places, grid, **options):
    from lightly.loss import VICRegLLoss
    folded = [z.reshape(len(z), grid[0], -1, z.shape[2]) for z in (*cells, *places)]  # (B, y, x, D); a volume's rows laid side by side
    return VICRegLLoss(**options)([(w, c) for w, c in zip(whole, folded)], folded[2:])


@pytest.mark.parametrize("n, grid, dims", [(2, (2, 2), 2), (8, (4, 4), 2), (16, (3, 5), 2), (8, (2, 3, 4), 3)])
@pytest.mark.parametrize("matches, alpha, weights", [((20, 4), .75, (25., 25., 1.)), ((3, 3), .5, (25., 25., 1.)), ((5, 2), .9, (1., 10., 4.))])
def test_vicregl_is_that_of_lightly(n, grid, dims, matches, alpha, weights):
    whole, cells, places = embeddings(n, grid, dims=dims)
    ours, parts = vicregl_loss(whole, cells, places, alpha, matches, *weights)
    sim, std, cov = weights
    theirs = of_lightly(whole, cells, places, grid, lambda_param=sim, mu_param=std, nu_param=cov, alpha=alpha, num_matches=matches)
    assert torch.allclose(ours, alpha * parts["global"] + (1 - alpha) * (parts["location"] + parts["features"]))
    alike(ours, theirs, *whole, *cells)


@pytest.mark.parametrize("dims", [2, 3])
def test_vicregl_is_put_together_from_its_views(dims):
    objective, data = small("vicregl", dims=dims, matches=3)
    views = objective.views(data.batch(range(8)), 0)
    parts = []
    for v in views:
        f = objective.encoder(v.x)
        rows = overlay(f.maps, 0).flatten(2).transpose(1, 2)
        cells = objective.cell_head(rows.reshape(-1, 10)).reshape(*rows.shape[:2], -1)
        at = torch.stack([torch.stack(p) for p in plain_centres(v, 4)[0]])
        parts.append((objective.head(f.pooled), cells, at))
    theirs = of_lightly(*zip(*parts), (4,), alpha=.75, num_matches=(3, 3))
    assert torch.allclose(objective(views, 0.).total, theirs, atol=1e-4)


# ---------- several processes ----------

def shared(rank, world, spec, **options):
    "Two steps of an objective on a share of eight pictures: losses, gradients of the second, the queue."
    n = 8 // world
    objective, data = small(spec, n, rank, world, **options)
    losses = []
    for step, first in enumerate((0, 4)):  # half of the second batch was in the first
        loss = objective(objective.views(data.batch(range(first + rank * n, first + (rank + 1) * n)), step), 0.).total
        objective.zero_grad()
        loss.backward()
        objective.after_step(0.)
        losses.append(loss.detach())
    grads = {k: p.grad for k, p in objective.named_parameters() if p.requires_grad}
    return torch.stack(losses), grads, list(objective.queue.buffers()) if spec == "densecl" else []


CASES = {"densecl": {"queue": 10}, "pixpro": {}, "vicregl": {"matches": 5}}


def gathered(rank, world, loss):
    "Loss and gradients of this process's part of embeddings of ten pictures."
    mine = slice(rank * 10 // world, (rank + 1) * 10 // world)
    whole, cells, places = ([z.detach()[mine].requires_grad_() for z in zs] for zs in embeddings(10, (3, 4)))
    value = loss(whole, cells, places)
    return value.detach().reshape(()), torch.autograd.grad(value, [*whole, *cells])


def ours(*given): return vicregl_loss(*given, matches=(20, 4))[0]


def theirs(*given): return of_lightly(*given, (3, 4), gather_distributed=True)


def work(rank):
    return {k: shared(rank, 2, k, **o) for k, o in CASES.items()} | {"ours": gathered(rank, 2, ours), "theirs": gathered(rank, 2, theirs)}


@pytest.fixture(scope="module")
def two(tmp_path_factory): return two_processes(work, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("spec", CASES)
def test_two_processes_are_one(two, spec):
    losses, grads, queue = shared(0, 1, spec, **CASES[spec])
    assert torch.allclose(sum(t[spec][0] for t in two) / 2, losses, rtol=1e-5, atol=1e-5)
    for k, g in grads.items(): assert torch.allclose(sum(t[spec][1][k] for t in two) / 2, g, rtol=1e-4, atol=1e-5), k
    for t in two:
        for a, b in zip(t[spec][2], queue): assert torch.allclose(a, b, atol=1e-5)


def test_vicregl_over_two_processes_is_that_of_lightly(two):
    for t in two:
        assert torch.allclose(t["ours"][0], t["theirs"][0], atol=1e-5)
        for a, b in zip(t["ours"][1], t["theirs"][1]): assert torch.allclose(a, b, atol=1e-5)
    value, grads = gathered(0, 1, ours)
    assert torch.allclose(sum(t["ours"][0] for t in two) / 2, value, atol=1e-5)
    for i, g in enumerate(grads): assert torch.allclose(torch.cat([t["ours"][1][i] for t in two]) / 2, g, atol=1e-5)


# ---------- every layer learns, whatever the sizes ----------

@pytest.mark.parametrize("spec", CASES)
@pytest.mark.parametrize("shape", [(16, 24), (8, 8), (64, 64), (8, 16, 8)])
def test_every_layer_learns(spec, shape):
    torch.manual_seed(0)
    data = ImageSet(np.random.default_rng(0).integers(0, 255, (4, 1, *shape)).astype(np.uint8), Info("noise"))
    objective = make(spec, Patches(len(shape)), data.info, Plan(batch=4, size=shape))
    assert objective.stride == (8 if shape == (64, 64) else 4)
    objective(objective.views(data.batch(range(4)), 0), 0.).total.backward()
    for k, p in objective.encoder.named_parameters(): assert p.grad is not None and p.grad.abs().max() > 0, k


# ---------- what cannot work is refused ----------

@pytest.mark.parametrize("spec, given, options, words", [
    ("densecl", {"size": (4, 16)}, {}, r"\(4, 16\).*\(1, 4\) cells.*mocov3"),
    ("pixpro", {"size": (4, 4)}, {}, "byol"), ("vicregl", {"size": (4, 4)}, {}, "vicreg"),
    *[(s, {"batch": 1}, {}, f"batch of 1 for {s}") for s in CASES],
    ("densecl", {}, {"dense": 0}, "dense is 0"), ("densecl", {}, {"dense": 1}, "dense is 1"), ("densecl", {}, {"temperature": 0}, "temperature is 0"),
    ("densecl", {}, {"momentum": 1}, "momentum is 1"), ("densecl", {}, {"queue": -2}, "queue is -2"),
    ("pixpro", {}, {"threshold": 0}, "threshold is 0"), ("pixpro", {}, {"gamma": .5}, "gamma is 0.5"), ("pixpro", {}, {"momentum": -1}, "momentum is -1"),
    ("vicregl", {}, {"alpha": 1}, "alpha is 1"), ("vicregl", {}, {"alpha": 0}, "alpha is 0"), ("vicregl", {}, {"matches": 0}, "matches is 0"),
    ("vicregl", {}, {"std": 0}, "std is 0"),
])
def test_impossible_dense_objective(spec, given, options, words):
    with pytest.raises(InputError, match=words): make(spec, Patches(), Info("noise"), Plan(**{"batch": 8, "size": (16, 16)} | given), {spec: options})


def test_views_that_never_meet_have_no_pairs():
    a = View(torch.zeros(1, 1, 8, 8), torch.tensor([[[.5, 0., 0.], [0., .5, 0.]]]))
    b = View(torch.zeros(1, 1, 8, 8), torch.tensor([[[.5, 0., 20.], [0., .5, 20.]]]))
    assert not same_spot(a, b, 4).any() and same_spot(a, a, 4).any()
