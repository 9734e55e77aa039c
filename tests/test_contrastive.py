"""Momentum and positional contrast: losses agree with lightly and with plain loops, also over two processes; queues hold what they should."""
import copy
import math

import numpy as np
import pandas as pd
import pytest
import torch
from ranks import two_processes
from small import Flat
from torch import nn

from tasl_lab.core import InputError
from tasl_lab.data.imageset import ImageSet, Info
from tasl_lab.objectives.base import Plan
from tasl_lab.objectives.compose import make
from tasl_lab.objectives.contrastive import MoCoV3, Queue, info_nce, positional_loss, same_place, similarities

POSITION = [.0, .05, .5, .52, .55, .9, .3, .97]


def slices(n=8):
    "Random pictures with a position, in two planes."
    images = np.random.default_rng(0).integers(0, 255, (n, 1, 16, 16)).astype(np.uint8)
    table = pd.DataFrame({"position": (POSITION * n)[:n], "plane": ["axial", "axial", "coronal", "axial"] * (n // 4) + ["axial"] * (n % 4)})
    return ImageSet(images, Info("slices"), table=table)


def small(spec, n=8, rank=0, world=1, **options):
    "An objective on the smallest encoder, and its set."
    torch.manual_seed(0)
    data = slices(24)
    plan = Plan(20, n, 0, (16, 16), rank, world, tuple(data.table))
    return make(spec, Flat(), data.info, plan, {spec: options} if options else None), data


def rows(n, width=8, seed=0): return torch.randn(n, width, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def alike(ours, theirs, *inputs):
    "Equal values and gradients."
    assert torch.allclose(ours, theirs.to(ours.dtype), atol=1e-5)
    for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs)): assert torch.allclose(a, b, atol=1e-5)


# ---------- InfoNCE ----------

@pytest.mark.parametrize("n, bank", [(1, 1), (2, 5), (16, 64), (64, 300)])
@pytest.mark.parametrize("temperature", [.05, .2, 1.])
def test_info_nce_is_that_of_lightly_with_a_memory_bank(n, bank, temperature):
    from lightly.loss import NTXentLoss
    q, k, others = rows(n), rows(n, seed=1), nn.functional.normalize(rows(bank, seed=2).detach(), dim=1)
    theirs = NTXentLoss(temperature, memory_bank_size=(bank, 8))
    theirs.memory_bank.bank = others.clone()
    theirs.memory_bank.bank_ptr = torch.zeros(1, dtype=torch.long)
    alike(info_nce(q, k, others, temperature=temperature), theirs(q, k), q, k)


def cosine(a, b): return a @ b / (a.norm() * b.norm())


@pytest.mark.parametrize("places", [None, 1, 5])
def test_info_nce_is_a_plain_loop(places):
    shape = (4, 3) if places is None else (4, places, 3)
    q, own = (rows(math.prod(shape) // 3, 3, s).detach().reshape(shape).requires_grad_() for s in (0, 1))
    others = rows(6, 3, 2)
    struck = torch.rand(4, 6, generator=torch.Generator().manual_seed(3)) < .5
    struck[0] = True  # nothing left to tell it from: no cost
    terms = []
    for i in range(4):
        for a, b in zip(q[i].reshape(-1, 3), own[i].reshape(-1, 3)):
            right = torch.exp(cosine(a, b) / .3)
            terms.append(-torch.log(right / (right + sum(torch.exp(cosine(a, o) / .3) for o, s in zip(others, struck[i]) if not s))))
    assert terms[0] == 0
    alike(info_nce(q, own, others, struck, .3), sum(terms) / len(terms), q, own, others)


def test_info_nce_keeps_full_precision_under_autocast():
    q, k, others = rows(64), rows(64, seed=1), rows(64, seed=2)
    full = info_nce(q, k, others, temperature=.05)
    with torch.autocast("cpu", torch.bfloat16): mixed = info_nce(q, k, others, temperature=.05)
    alike(mixed, full, q, k, others)


# ---------- the queue ----------

def keys(*numbers): return torch.tensor([[float(n), 1.] for n in numbers])


def test_queue_is_first_in_first_out():
    queue = Queue(5, 2)
    for batch in ((1, 2), (3, 4), (5, 6)):
        queue.negatives(keys(*batch), torch.tensor(batch))
        queue.push()
    assert queue.owners.tolist() == [5, 6, 3, 4, 1] and torch.equal(queue.keys, keys(5, 6, 3, 4, 1))
    queue.negatives(keys(*range(10, 17)), torch.arange(10, 17))  # more than it holds
    queue.push()
    assert queue.owners.tolist() == [10, 11, 12, 13, 14] and torch.equal(queue.keys, keys(10, 11, 12, 13, 14))
    before = queue.owners.clone()
    queue.push()  # nothing new
    assert torch.equal(queue.owners, before)


def test_old_keys_of_pictures_in_the_batch_are_no_negatives():
    queue = Queue(4, 2)
    queue.negatives(keys(1, 2, 3), torch.tensor([1, 2, 3]))
    queue.push()
    found, struck = queue.negatives(keys(2, 9, 2), torch.tensor([2, 9, 2]))  # a picture that comes twice in a batch is not its own negative
    assert torch.equal(found, torch.cat([keys(2, 9, 2), keys(1, 2, 3), torch.zeros(1, 2)]))
    old = [False, True, False, True]  # 1, 2, 3, empty
    assert struck.tolist() == [[True, False, True, *old], [False, True, False, *old], [True, False, True, *old]]


def test_queue_takes_up_keys_after_the_step_alone():
    objective, data = small("mocov3", queue=12)
    views = objective.views(data.batch(range(8)), 0)
    state = copy.deepcopy(objective.state_dict())
    first, again = (objective(views, 0.).total for _ in range(2))
    assert first == again and all(torch.equal(v, state[k]) for k, v in objective.state_dict().items())
    with torch.no_grad(): fresh = objective.teacher.head(objective.teacher.encoder(views[0].x).pooled)
    objective.after_step(0.)
    assert objective.queue.owners.tolist() == [*range(8), *[-1] * 4] and torch.allclose(objective.queue.keys[:8], fresh, atol=1e-6)


@pytest.mark.parametrize("queue", [0, 3])
def test_queue_is_part_of_the_weights(queue):
    from safetensors.torch import load, save
    objective, data = small("mocov3", queue=queue)
    objective(objective.views(data.batch(range(8)), 0), 0.)
    objective.after_step(0.)
    other, _ = small("mocov3", queue=queue)
    other.load_state_dict(load(save({k: v.contiguous().clone() for k, v in objective.state_dict().items()})))
    views = objective.views(data.batch(range(8, 16)), 1)
    assert other(other.views(data.batch(range(8, 16)), 1), 0.).total == objective(views, 0.).total and other.queue.owners.tolist() == [0, 1, 2][:queue]


# ---------- MoCo v3 ----------

@pytest.mark.parametrize("queue", [0, 6])
def test_mocov3_is_a_plain_loop(queue):
    objective, data = small("mocov3", queue=queue, temperature=.3)
    old = list(range(4, 10))
    if queue:
        objective(objective.views(data.batch(old), 0), 0.)
        objective.after_step(0.)
    views = objective.views(data.batch(range(8)), 1)
    q = [objective.predictor(objective.head(objective.encoder(v.x).pooled)) for v in views]
    k = [objective.teacher.head(objective.teacher.encoder(v.x).pooled) for v in views]
    loss = 0
    for a, b in ((0, 1), (1, 0)):
        for i in range(8):
            right = torch.exp(cosine(q[a][i], k[b][i]) / .3)
            wrong = sum(torch.exp(cosine(q[a][i], k[b][j]) / .3) for j in range(8) if j != i)
            if queue: wrong = wrong + sum(torch.exp(cosine(q[a][i], objective.queue.keys[old.index(n)]) / .3) for n in (8, 9))  # 4 to 7 are in the batch
            loss = loss - 2 * .3 * torch.log(right / (right + wrong)) / 8
    alike(objective(views, 0.).total, loss, *objective.head.parameters(), *objective.predictor.parameters(), *objective.encoder.parameters())


def test_mocov3_teacher_follows_and_takes_no_gradient():
    objective, data = small("mocov3", momentum=.9)
    start = copy.deepcopy(objective.teacher.state_dict())
    with torch.no_grad():
        for p in (*objective.encoder.parameters(), *objective.head.parameters()): p.add_(1.)
    objective(objective.views(data.batch(range(8)), 0), 0.).total.backward()
    assert all(p.grad is None and not p.requires_grad for p in objective.teacher.parameters())
    objective.after_step(0.)
    for k, v in objective.teacher.named_parameters(): assert torch.allclose(v, start[k] + .1, atol=1e-6), k
    objective.after_step(1.)  # at the end it stands still
    for k, v in objective.teacher.named_parameters(): assert torch.allclose(v, start[k] + .1, atol=1e-6), k


# ---------- positional contrast ----------

@pytest.mark.parametrize("n, threshold", [(2, .1), (5, .1), (8, .04), (8, .3), (8, .99)])
@pytest.mark.parametrize("planes", [False, True])
def test_positional_loss_is_a_plain_loop(n, threshold, planes):
    a, b = rows(n, 4), rows(n, 4, 1)
    at, plane = POSITION[:n], [(i % 3 == 2) * planes for i in range(n)]
    z, terms = [*a, *b], []
    for i in range(2 * n):
        positives = [j for j in range(2 * n) if j != i and abs(at[i % n] - at[j % n]) < threshold and plane[i % n] == plane[j % n]]
        assert (i + n) % (2 * n) in positives
        below = sum(torch.exp(cosine(z[i], z[j]) / .3) for j in range(2 * n) if j != i)
        terms.append(-sum(torch.log(torch.exp(cosine(z[i], z[j]) / .3) / below) for j in positives) / len(positives))
    place = torch.tensor([[p, float(q)] for p, q in zip(at, plane)])
    alike(positional_loss(a, b, place, threshold, .3), sum(terms) / len(terms), a, b)


def test_pcl_without_neighbours_is_simclr():
    torch.manual_seed(0)
    objective, data = small("pcl", threshold=.001)
    simclr, _ = small("simclr")
    simclr.load_state_dict(objective.state_dict())
    batch = data.batch(range(8))
    assert torch.allclose(objective(objective.views(batch, 0), 0.).total, simclr(simclr.views(batch, 0), 0.).total, atol=1e-6)


def test_pcl_reads_position_and_plane():
    objective, data = small("pcl", threshold=.1)
    views = objective.views(data.batch([0, 1, 2, 3, 4, 7]), 0)
    near = same_place(views[0].target, views[1].target, .1)
    # positions 0, .05, .5, .52, .55, .97; the third is coronal
    assert near.int().tolist() == [[1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 1]]
    objective.plan = Plan(batch=8, columns=("position",))  # the plane is not known: all are of one
    near = same_place(*[objective.places(data.batch([2, 3]))] * 2, .1)
    assert near.all()


def test_pcl_leaves_shared_views_alone():
    torch.manual_seed(0)
    data = slices()
    hybrid = make("simclr+pcl", Flat(), data.info, Plan(batch=8, size=(16, 16), columns=tuple(data.table)))
    views = hybrid.views(data.batch(range(8)), 0)
    assert views[0].target is None and views[2].target.shape == (8, 2) and views[0].x is views[2].x
    hybrid(views, 0.)
    assert hybrid.memo.pictures == 16


def test_similarities_strike_out_the_view_itself():
    a, b = rows(3), rows(3, seed=1)
    logits, partner = similarities(a, b)
    assert logits.isinf().nonzero().tolist() == [[i, i] for i in range(6)] and partner.tolist() == [3, 4, 5, 0, 1, 2]


# ---------- several processes ----------

def shared(rank, world, spec, **options):
    "Two steps of an objective on a share of eight pictures: losses, gradients of the second, the queue."
    n = 8 // world
    objective, data = small(spec, n, rank, world, **options)
    losses = []
    for step, first in enumerate((0, 4)):  # half of the second batch was in the first
        ids = range(first + rank * n, first + (rank + 1) * n)
        loss = objective(objective.views(data.batch(ids), step), 0.).total
        objective.zero_grad()
        loss.backward()
        objective.after_step(0.)
        losses.append(loss.detach())
    grads = {k: p.grad for k, p in objective.named_parameters() if p.requires_grad}
    queue = getattr(objective, "queue", None)
    return torch.stack(losses), grads, None if queue is None else (queue.keys, queue.owners)


CASES = {"mocov3": {"queue": 0}, "with a queue": {"queue": 10}, "pcl": {"threshold": .1}}


def work(rank): return {k: shared(rank, 2, "pcl" if k == "pcl" else "mocov3", **o) for k, o in CASES.items()}


def test_two_processes_are_one(tmp_path):
    two = two_processes(work, tmp_path)
    for case, options in CASES.items():
        losses, grads, queue = shared(0, 1, "pcl" if case == "pcl" else "mocov3", **options)
        assert torch.allclose(sum(t[case][0] for t in two) / 2, losses, atol=1e-5), case
        for k, g in grads.items(): assert torch.allclose(sum(t[case][1][k] for t in two) / 2, g, atol=1e-5), (case, k)
        if queue is None: continue
        for t in two: assert torch.allclose(t[case][2][0], queue[0], atol=1e-5) and torch.equal(t[case][2][1], queue[1])


# ---------- what cannot work is refused ----------

@pytest.mark.parametrize("spec, given, options, words", [
    ("mocov3", {"batch": 1}, {}, "batch of 1 for mocov3"), ("mocov3", {}, {"temperature": 0}, "temperature is 0"), ("mocov3", {}, {"queue": -1}, "queue is -1"),
    ("mocov3", {}, {"momentum": 1.}, "momentum is 1"), ("mocov3", {}, {"momentum": -.1}, "momentum is -0.1"),
    ("pcl", {"columns": ("patient", "site")}, {}, "'position'.*simclr"), ("pcl", {"batch": 1}, {}, "batch of 1 for pcl"),
    ("pcl", {}, {"threshold": 0}, "threshold is 0"), ("pcl", {}, {"threshold": 1}, "threshold is 1"), ("pcl", {}, {"temperature": -1}, "temperature is -1"),
])
def test_impossible_contrast(spec, given, options, words):
    plan = Plan(**{"batch": 8, "size": (16, 16), "columns": ("position",)} | given)
    with pytest.raises(InputError, match=words): make(spec, Flat(), Info("slices"), plan, {spec: options})


@pytest.mark.parametrize("value", [float("nan"), -.1, 1.5, "high"])
def test_impossible_position(value):
    objective, data = small("pcl")
    batch = data.batch([5, 9])
    batch.table = batch.table.assign(position=[.5, value])
    with pytest.raises(InputError, match=r"position\[9\] is .*0 to 1"): objective.views(batch, 0)


def test_one_process_of_two_may_hold_one_picture():
    assert isinstance(make("mocov3", Flat(), Info("slices"), Plan(batch=1, world=2, size=(16, 16))), MoCoV3)
