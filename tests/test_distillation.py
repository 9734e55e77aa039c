"""Self-distillation: losses against lightly and plain loops, over one and two processes; codes, centres, queues, teachers and masks."""
import inspect
import math
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from ranks import two_processes
from small import gradients, small_encoder, small_objective, small_set
from torch import nn

from tasl_lab.core import InputError, torch_rng
from tasl_lab.data.imageset import Info
from tasl_lab.encoders import Features
from tasl_lab.objectives.base import Plan
from tasl_lab.objectives.cards import CARDS
from tasl_lab.objectives.compose import make
from tasl_lab.objectives.distillation import DINO, Prototypes, SwAV, dino_loss, moved_centre, multi_crop, sinkhorn, swav_loss, warmed
from tasl_lab.objectives.tokens import IBOT, DINOv2, block_order, koleo_loss, token_loss, token_masks
from tasl_lab.policies import policy_for

NAMES = ("swav", "dino", "ibot", "dinov2")
SHAPES = [(2, 2), (8, 16), (33, 5), (64, 96)]  # pictures, prototypes


def scores(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul(.3).tanh().requires_grad_()


def same(ours, theirs, inputs):
    "Values and gradients agree within 1e-5, of a large value or gradient within 1e-5 of its size."
    assert torch.allclose(ours, theirs, atol=1e-5, rtol=1e-5)
    for x, y in zip(torch.autograd.grad(ours, inputs, retain_graph=True), torch.autograd.grad(theirs, inputs, retain_graph=True)):
        assert torch.allclose(x, y, atol=1e-5 * max(1., y.abs().max().item()))


# ---------- losses are those of lightly ----------

@pytest.mark.parametrize("epsilon, rounds", [(.05, 3), (.1, 1), (.5, 10)])
@pytest.mark.parametrize("shape", SHAPES)
def test_sinkhorn_is_that_of_lightly(shape, epsilon, rounds):
    from lightly.loss.swav_loss import sinkhorn as theirs
    assert torch.allclose(sinkhorn(scores(*shape), epsilon, rounds), theirs(scores(*shape), rounds, epsilon), atol=1e-5)


def plain_sinkhorn(s, epsilon, rounds):
    q = np.exp(np.asarray(s, dtype=np.float64) / epsilon)
    for _ in range(rounds):
        for k in range(q.shape[1]): q[:, k] /= sum(q[:, k])
        for b in range(len(q)): q[b] /= sum(q[b])
    return q


@pytest.mark.parametrize("queue", [0, 7])
def test_sinkhorn_is_a_plain_loop(queue):
    s, extra = scores(6, 4).detach(), scores(queue, 4, seed=1).detach()
    expected = plain_sinkhorn(torch.cat([s, extra]).numpy(), .05, 3)[:6]
    assert np.allclose(sinkhorn(s, .05, 3, extra if queue else None).numpy(), expected, atol=1e-5)


def test_sinkhorn_balances_and_does_not_overflow():
    s = scores(32, 8).detach() + torch.linspace(0, 1, 8)  # all pictures like the last prototype best
    codes = sinkhorn(s, .05, 100)
    assert torch.allclose(codes.sum(1), torch.ones(32), atol=1e-5) and torch.allclose(codes.sum(0), torch.full((8,), 4.), atol=.05)
    tight = sinkhorn(s, 1e-3, 3)  # e^1000 is no float
    assert tight.isfinite().all() and torch.allclose(tight.sum(1), torch.ones(32), atol=1e-5)


@pytest.mark.parametrize("local", [0, 3])
@pytest.mark.parametrize("queue", [0, 9])
@pytest.mark.parametrize("shape", SHAPES)
def test_swav_is_that_of_lightly(shape, local, queue):
    from lightly.loss import SwaVLoss
    views = [scores(*shape, seed=k) for k in range(2 + local)]
    kept = [scores(queue, shape[1], seed=10 + k).detach() for k in range(2)] if queue else None
    theirs = SwaVLoss(temperature=.2)(views[:2], views[2:], kept)
    same(swav_loss(views, .2, .05, 3, kept), theirs.sum(), views)


@pytest.mark.parametrize("local", [0, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_dino_is_that_of_lightly(shape, local):
    from lightly.loss import DINOLoss
    student, teacher = [scores(*shape, seed=k) for k in range(2 + local)], [scores(*shape, seed=9 + k).detach() for k in range(2)]
    theirs, centre = DINOLoss(shape[1], teacher_temp=.05, center_momentum=.7), torch.zeros(shape[1])
    for _ in range(3):  # the centre moves after each step
        same(dino_loss(student, teacher, centre, .1, .05), theirs(teacher, student), student)
        centre = moved_centre(centre, torch.cat(teacher), .7)
        assert torch.allclose(centre, theirs.center.flatten(), atol=1e-6) and centre.abs().sum() > 0
        teacher = [t + .1 for t in teacher]


@pytest.mark.parametrize("batch, grid, k", [(2, (2, 2), 3), (5, (4, 6), 16), (16, (8, 8), 64)])
def test_token_loss_is_that_of_lightly(batch, grid, k):
    from lightly.loss import IBOTPatchLoss
    mask = token_masks(torch_rng("m"), batch, grid, (.1, .5))
    assert len(set(mask.flatten(1).sum(1).tolist())) > 1 or batch == 2  # numbers differ, and some pictures hide nothing
    n, theirs, centre = int(mask.sum()), IBOTPatchLoss(k, .05, .1, center_momentum=.8), torch.zeros(k)
    for step in range(2):
        student, teacher = scores(n, k, seed=step), scores(n, k, seed=7 + step).detach()
        same(token_loss(student, teacher, mask, centre, .1, .05), theirs(teacher, student, mask), [student])
        centre = moved_centre(centre, teacher, .8)
        assert torch.allclose(centre, theirs.center.value.flatten(), atol=1e-6)


def test_token_loss_of_volumes_is_a_plain_loop():
    mask = token_masks(torch_rng("m"), 4, (2, 3, 2), (.2, .5), share=.75)
    student, teacher, centre = scores(int(mask.sum()), 5), scores(int(mask.sum()), 5, seed=1).detach(), scores(5, seed=2).detach()
    soft = lambda v, t: [math.exp(x / t) / sum(math.exp(y / t) for y in v) for x in v]
    total, row = 0., 0
    for m in mask:
        n = int(m.sum())
        for _ in range(n):
            p, q = soft((teacher[row] - centre).tolist(), .05), soft(student[row].tolist(), .1)
            total, row = total - sum(a * math.log(b) for a, b in zip(p, q)) / n, row + 1
    assert abs(token_loss(student, teacher, mask, centre, .1, .05).item() - total / 4) < 1e-5


@pytest.mark.parametrize("shape", [(2, 3), (8, 16), (64, 128)])
def test_koleo_is_that_of_lightly(shape):
    from lightly.loss import KoLeoLoss
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    same(koleo_loss(x), KoLeoLoss()(x), [x])


def test_losses_keep_full_precision_under_autocast():
    views, mask = [scores(16, 32, seed=k) for k in range(3)], torch.ones(4, 2, 2, dtype=torch.bool)
    centre, prototypes = scores(32, seed=5).detach(), Prototypes(32, 8)
    for loss in (lambda: swav_loss(views), lambda: dino_loss(views, [v.detach() for v in views[:2]], centre), lambda: koleo_loss(views[0]),
                 lambda: token_loss(views[0], views[1].detach(), mask, centre), lambda: prototypes(views[0]).square().sum()):
        full = loss()
        with torch.autocast("cpu", torch.bfloat16): mixed = loss()
        same(mixed, full, views[:1])


# ---------- over two processes ----------

class Flat(nn.Module):
    "The smallest encoder: 4 by 4 means and one matrix; its map has 4 by 4 cells, a hidden cell is emptied."
    modes, name, width, dims, in_channels = ("whole", "token"), "flat", 12, 2, 1
    channels, strides = [6], [4]

    def __init__(self):
        super().__init__()
        self.map, self.cells = nn.Linear(16, self.width), nn.Conv2d(1, 6, 1)

    def forward(self, x, mask=None, mode="whole"):
        if mask is not None: x = x * ~mask.repeat_interleave(4, 1).repeat_interleave(4, 2).unsqueeze(1)
        m = nn.functional.adaptive_avg_pool2d(x, 4)
        return Features(self.map(m.flatten(1)), [self.cells(m)])


def flat(rank, world, name, steps=3):
    """Some steps of an objective on a share of eight pictures: losses, gradients of the last step, and what it keeps. Objectives that ask for single
    precision get double: batch norm over few tokens amplifies rounding a hundredfold."""
    torch.manual_seed(0)
    encoder, data, n = Flat(), small_set(n=8), 8 // world
    options = {"queue": 12} if name == "swav" else {}
    objective = make(name, encoder, data.info, Plan(batch=n, rank=rank, world=world, size=(16, 16)), {name: {"prototypes": 8} | options}).double()
    losses = []
    for step in range(steps):
        views = [replace(v, x=v.x.double()) for v in objective.views(data.batch(range(rank * n, (rank + 1) * n)), step)]
        with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
            loss = objective(views, .5)
            losses.append(loss.total.detach())
            objective.after_step(.5)
    return torch.stack(losses), gradients(loss.total, objective), dict(objective.named_buffers())


def shared(rank):
    "What one process of two finds out; losses are taken with lightly's own gathering too, where it has it."
    from lightly.loss import DINOLoss, IBOTPatchLoss, SwaVLoss
    mine, found = slice(rank * 5, rank * 5 + 5), {}
    views = [scores(10, 6, seed=k).detach()[mine].requires_grad_() for k in range(4)]
    queue = [scores(4, 6, seed=20 + k).detach() for k in range(2)]
    x = torch.randn(10, 7, generator=torch.Generator().manual_seed(0))[mine].requires_grad_()
    grads = lambda loss, over: [loss.detach(), *torch.autograd.grad(loss, over)]
    found["codes"] = grads(swav_loss(views), views)
    found["codes lightly"] = grads(SwaVLoss(sinkhorn_gather_distributed=True)(views[:2], views[2:]).sum(), views)
    found["queue"] = grads(swav_loss(views, queues=queue), views)
    found["queue lightly"] = grads(SwaVLoss(sinkhorn_gather_distributed=True)(views[:2], views[2:], [q[2 * rank:2 * rank + 2] for q in queue]).sum(), views)
    found["koleo"] = grads(koleo_loss(x), [x])
    d, i, mask = DINOLoss(6), IBOTPatchLoss(6), torch.ones(5, 1, 1, dtype=torch.bool)
    teacher = [v.detach() for v in views[:2]]
    d(teacher, views), i(teacher[0], views[0], mask)
    found["centre"] = [moved_centre(torch.zeros(6), torch.cat(teacher)), d.center.flatten()]
    found["token centre"] = [moved_centre(torch.zeros(6), teacher[0]), i.center.value.flatten()]
    return found | {n: flat(rank, 2, n) for n in NAMES}


@pytest.fixture(scope="module")
def two(tmp_path_factory): return two_processes(shared, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("name", ["codes", "queue"])
def test_codes_are_balanced_over_processes_as_lightly_does(two, name):
    everything = [scores(10, 6, seed=k) for k in range(4)]
    queue = [scores(4, 6, seed=20 + k).detach() for k in range(2)] if name == "queue" else None
    whole = swav_loss(everything, queues=queue)
    grads = torch.autograd.grad(whole, everything)
    ours = [r[name] for r in two]
    for o, r in zip(ours, two):
        for a, b in zip(o, r[f"{name} lightly"]): assert torch.allclose(a, b, atol=1e-5)
    assert torch.allclose((ours[0][0] + ours[1][0]) / 2, whole, atol=1e-5)
    for k, g in enumerate(grads): assert torch.allclose(torch.cat([o[1 + k] for o in ours]) / 2, g, atol=1e-5)


def test_neighbours_are_sought_in_all_processes(two):
    from lightly.loss import KoLeoLoss
    x = torch.randn(10, 7, generator=torch.Generator().manual_seed(0)).requires_grad_()
    whole = KoLeoLoss()(x)
    assert torch.allclose(sum(r["koleo"][0] for r in two) / 2, whole, atol=1e-5)
    assert torch.allclose(torch.cat([r["koleo"][1] for r in two]) / 2, torch.autograd.grad(whole, x)[0], atol=1e-5)


@pytest.mark.parametrize("name", ["centre", "token centre"])
def test_centres_take_up_all_processes_as_lightly_does(two, name):
    rows = torch.cat([scores(10, 6, seed=k).detach() for k in range(2 if name == "centre" else 1)])
    for r in two:
        for c in r[name]: assert torch.allclose(c, .1 * rows.mean(0), atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_keep_what_one_does(two, name):
    losses, grads, kept = flat(0, 1, name)
    (la, ga, ka), (lb, gb, kb) = (r[name] for r in two)
    assert torch.allclose((la + lb) / 2, losses, atol=1e-5)
    for k, g in grads.items(): assert torch.allclose((ga[k] + gb[k]) / 2, g, atol=1e-8), k
    assert ka.keys() == kept.keys() and any("queue" in k or "centre" in k for k in kept)
    for k, v in kept.items():
        assert torch.allclose(ka[k], kb[k], atol=1e-6)  # every process keeps the same
        order = (lambda t: t.flatten().sort().values) if k == "queue" else (lambda t: t)
        assert torch.allclose(order(ka[k]), order(v), atol=1e-5), k


# ---------- what is kept from step to step ----------

def test_queue_is_used_once_it_is_full():
    objective, batch = small_objective("swav", swav={"queue": 12, "prototypes": 16})
    objective.epsilon = .05
    plain, _ = small_objective("swav", swav={"prototypes": 16})
    plain.epsilon = .05
    for step in range(3):
        views = objective.views(batch, step)
        loss, without = objective(views, 0.).total, plain(plain.views(batch, step), 0.).total
        assert torch.equal(loss, without) == (step < 2)  # 8 pictures a step: full after two
        new, old = objective.aside.clone(), objective.queue.clone()
        objective.after_step(0.)
        assert torch.equal(objective.queue, torch.cat([new, old], 1)[:, :12])  # the newest first
    kept = [list(objective.prototypes(q)) for q in old]
    expected = swav_loss([objective.prototypes(objective.head(objective.encode(v).pooled)) for v in views], .1, .05, 3, [torch.stack(k) for k in kept])
    assert torch.allclose(loss, expected, atol=1e-6)


@pytest.mark.parametrize("name", ["dino", "ibot", "dinov2"])
def test_centre_takes_up_what_the_teacher_said(name):
    objective, batch = small_objective(name, **{name: {"centring": .75, "momentum": .5}})
    views = objective.views(batch, 0)
    objective(views, 0.)
    teacher, head, tokens = objective.teacher.encoder, objective.teacher.head, []
    with torch.no_grad():
        seen = [teacher(v.x) for v in views[:2]]  # whole, also where the student's views are masked
        said = torch.cat([(head if name == "dino" else head["image"])(f.pooled) for f in seen])
        if name != "dino": tokens = [head["token"](f.maps[0].flatten(2).transpose(1, 2).flatten(0, 1)) for f in seen]  # of all cells
    objective.after_step(0.)
    assert torch.allclose(objective.centre, .25 * said.mean(0), atol=1e-6)
    if tokens: assert torch.allclose(objective.token_centre, .25 * torch.cat(tokens).mean(0), atol=1e-6)


def test_teacher_moves_after_the_step_by_half():
    objective, batch = small_objective("dino", dino={"momentum": .5})
    with torch.no_grad(): objective.head[-1].weight += 1.
    before = objective.teacher.head[-1].weight.clone()
    objective(objective.views(batch, 0), 0.)
    assert torch.equal(objective.teacher.head[-1].weight, before)
    objective.after_step(0.)
    assert torch.allclose(objective.teacher.head[-1].weight, before + .5, atol=1e-6)


def test_sharpness_follows_progress():
    assert [warmed(p, .02, .06, .5) for p in (0., .25, .5, 1.)] == pytest.approx([.02, .04, .06, .06]) and warmed(0., .02, .06, 0.) == .06
    objective, batch = small_objective("dino", dino={"start_temperature": .02, "teacher_temperature": .08})
    views = objective.views(batch, 0)
    assert objective(views, 0.).total != objective(views, .1).total
    assert objective(views, .3).total == objective(views, 1.).total


# ---------- views and masks ----------

@pytest.mark.parametrize("size, side", [
    ((64, 64), (32, 32)), ((16, 16), (8, 8)), ((24, 40), (12, 20)), ((8, 8, 8), (4, 4, 4)), ((4, 4), (4, 4)), ((12, 12), (4, 4))])
def test_small_views_have_half_the_side(size, side):
    encoder = small_encoder("CNN", len(size))  # coarsest stride 4
    recipes = multi_crop(policy_for("xray"), encoder, size, 3)
    assert len(recipes) == 5 and [r.size for r in recipes] == [None] * 2 + [side] * 3
    assert [r.scale for r in recipes[2:]] == [(.5, .6)] * 3 and recipes[0] == policy_for("xray").strong


@pytest.mark.parametrize("name, pictures", [("swav", 4), ("dino", 6), ("ibot", 6), ("dinov2", 6)])
def test_encoded_pictures_are_counted(name, pictures):
    objective, batch = small_objective(name)
    objective(objective.views(batch, 0), 0.)
    assert objective.memo.pictures == pictures * 8


@pytest.mark.parametrize("grid", [(8, 8), (4, 6), (2, 2), (4, 4, 4), (2, 5, 3)])
@pytest.mark.parametrize("blocks", [True, False])
def test_masks_hide_the_share_they_should(grid, blocks):
    n, cells = 64, math.prod(grid)
    mask = token_masks(torch_rng("masks", 3), n, grid, (.1, .5), .5, blocks)
    hidden = mask.flatten(1).sum(1)
    assert (hidden == 0).sum() == 32 and hidden.max() <= round(.5 * cells) and hidden[hidden > 0].min() >= max(1, round(.1 * cells))
    exact = token_masks(torch_rng("masks", 3), n, grid, (.3, .3), 1., blocks).flatten(1).sum(1)
    assert (exact == max(1, round(.3 * cells))).all()
    assert not torch.equal(mask, token_masks(torch_rng("masks", 4), n, grid, (.1, .5), .5, blocks))


def test_blocks_are_boxes():
    first = block_order(torch_rng("boxes"), 40, (8, 8), boxes=1)
    for picture in first == 0:
        rows, columns = picture.any(1).nonzero(), picture.any(0).nonzero()
        high, wide = rows.max() - rows.min() + 1, columns.max() - columns.min() + 1
        assert picture.sum() == high * wide and 2 <= high <= 4 and 2 <= wide <= 4


@pytest.mark.parametrize("kind", ["CNN", "ViT"])
def test_students_do_not_see_hidden_cells_and_teachers_do(kind):
    objective, batch = small_objective("ibot", kind, ibot={"masked": 1.})
    views = objective.views(batch, 0)
    assert [v.mask is None for v in views] == [False, False, True, True]
    hole = views[0].mask
    for axis in (1, 2): hole = hole.repeat_interleave(objective.cell, axis)
    other = torch.where(hole.unsqueeze(1), 1.5, views[0].x)
    with torch.no_grad():
        assert torch.allclose(objective.encoder(other, views[0].mask, "token").pooled, objective.encode(views[0], "token").pooled, atol=1e-5)
        assert not torch.allclose(objective.encoder(other).pooled, objective.encode(views[0]).pooled, atol=1e-3)


def test_tokens_of_unmasked_pictures_do_not_count():
    objective, batch = small_objective("ibot", "ViT", ibot={"masked": .25})
    views = objective.views(batch, 0)
    sums = [v.mask.flatten(1).any(1).sum().item() for v in views[:2]]
    assert sums == [2, 2]
    terms = []
    with torch.no_grad():
        for v in views[:2]:
            seen, guess = objective.teacher.encoder(v.x).tokens, objective.encoder(v.x, v.mask, "token").tokens
            named = [h["token"](f.flatten(0, 1)).reshape(8, 16, -1) for h, f in ((objective.teacher.head, seen), (objective.head, guess))]
            for b in range(8):
                hidden = v.mask[b].flatten().nonzero().flatten().tolist()
                each = [-(torch.softmax(named[0][b, t] / .03, 0) * torch.log_softmax(named[1][b, t] / .1, 0)).sum().item() for t in hidden]
                terms.append(sum(each) / max(1, len(each)))
        assert abs(objective(views, 0.).parts["tokens"].item() - sum(terms) / 16) < 1e-5


@pytest.mark.parametrize("name", ["ibot", "dinov2"])
@pytest.mark.parametrize("kind", ["CNN", "ViT"])
def test_heads_are_tied_as_far_as_widths_allow(name, kind):
    head = small_objective(name, kind)[0].head
    assert (head["image"] is head["token"]) == (name == "ibot" and kind == "ViT") and (head["image"][-1] is head["token"][-1]) == (name == "ibot")
    teacher = small_objective(name, kind)[0].teacher.head
    assert (teacher["image"][-1] is teacher["token"][-1]) == (name == "ibot")


def test_dinov2_is_the_sum_of_its_parts():
    objective, batch = small_objective("dinov2", dinov2={"koleo": .3, "tokens": .5})
    views = objective.views(batch, 0)
    loss = objective(views, .5)
    parts = {k: v.item() for k, v in loss.parts.items()}
    assert set(parts) == {"image", "tokens", "koleo"} and abs(loss.total.item() - (parts["image"] + .5 * parts["tokens"] + .3 * parts["koleo"])) < 1e-5
    with torch.no_grad(): spread = sum(koleo_loss(objective.encoder(v.x, v.mask, "token").pooled) for v in views[:2]) / 2
    assert abs(parts["koleo"] - spread.item()) < 1e-5


def test_pictures_that_are_the_same_get_no_gradient_from_koleo():
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    x[1] = x[0]
    x.requires_grad_()
    koleo_loss(x).backward()
    assert x.grad.isfinite().all() and (x.grad[2:].abs().sum(1) > 0).all() and x.grad.abs().max() < 10


@pytest.mark.parametrize("name", ["dino", "ibot", "dinov2"])
@pytest.mark.parametrize("kind", ["CNN", "ViT"])
def test_the_papers_head_trains_too(name, kind):
    objective, batch = small_objective(name, kind, **{name: {"norm": False}})
    grads = gradients(objective(objective.views(batch, 0), 0.).total, objective.head)
    assert all(g.abs().max() > 0 for g in grads.values())


# ---------- cards and refusals ----------

@pytest.mark.parametrize("cls, name", [(SwAV, "swav"), (DINO, "dino"), (IBOT, "ibot"), (DINOv2, "dinov2")])
def test_card_tells_the_defaults_of_the_class(cls, name):
    own = {}
    for c in reversed(cls.__mro__[:-2]):  # a later class may change what an earlier one says
        if "__init__" in vars(c): own |= {k: p.default for k, p in inspect.signature(c.__init__).parameters.items() if p.default is not p.empty}
    assert own == {k: v for k, v in CARDS[name].defaults.items() if k != "lr"}


@pytest.mark.parametrize("name, kind, given, options, words", [
    *[(n, "CNN", {"size": (18, 16)}, {}, r"\(18, 16\)") for n in NAMES], *[(n, "CNN", {}, {"prototypes": 1}, "prototypes is 1") for n in NAMES],
    *[(n, "CNN", {}, {"local": -1}, "local is -1") for n in NAMES], *[(n, "CNN", {"batch": 1}, {}, "batch|at least 2") for n in NAMES],
    ("swav", "CNN", {}, {"temperature": 0}, "temperature is 0"), ("swav", "CNN", {}, {"epsilon": -1.}, "epsilon -1"),
    ("swav", "CNN", {}, {"rounds": 0}, "rounds is 0"), ("swav", "CNN", {}, {"queue": -1}, "queue is -1"),
    ("dino", "CNN", {}, {"teacher_temperature": .1}, "targets fade"), ("dino", "CNN", {}, {"start_temperature": 0.}, "above 0"),
    ("dino", "CNN", {}, {"momentum": 1.}, "momentum is 1"), ("dino", "CNN", {}, {"centring": -.1}, "centring is -0.1"),
    ("dino", "CNN", {}, {"warmup": 2}, "warmup is 2"),
    ("ibot", "CNN", {}, {"tokens": 0}, "use dino"), ("ibot", "CNN", {}, {"least": .6}, "0.6 to 0.5"), ("ibot", "CNN", {}, {"most": 1.}, "to 1.0"),
    ("ibot", "CNN", {}, {"masked": 0}, "masked is 0"), ("ibot", "ViT", {"size": (4, 4)}, {}, "one cell of 4"),
    ("dinov2", "CNN", {}, {"koleo": 0}, "use ibot"), ("dinov2", "CNN", {"batch": 1}, {"norm": False}, "batch of 1"),
])
def test_impossible_objective(name, kind, given, options, words):
    plan = Plan(**{"steps": 5, "batch": 4, "size": (16, 16)} | given)
    with pytest.raises(InputError, match=words): make(name, small_encoder(kind), Info("small"), plan, {name: options})


def test_one_picture_at_a_time_is_possible_without_the_norm():
    objective, batch = small_objective("dino", batch=1, dino={"norm": False})
    assert objective(objective.views(batch, 0), 0.).total.isfinite()
