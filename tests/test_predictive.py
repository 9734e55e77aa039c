"""Predictive objectives: turns, tiles, orders and fused pictures agree with plain loops, and no question is asked that has no honest answer."""
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from ranks import two_processes
from small import gradients, small_encoder, small_objective, small_set

from tasl_lab.core import InputError
from tasl_lab.data.imageset import ImageSet, Info
from tasl_lab.encoders import make_encoder
from tasl_lab.objectives.base import Plan
from tasl_lab.objectives.compose import make
from tasl_lab.objectives.fusion import dice_and_ce, draw_boxes, fuse, paint_boxes
from tasl_lab.objectives.predictive import (
    Rotation,
    cut_tiles,
    far_orders,
    quarter_turns,
    tile_places,
    tile_plan,
    turn_affine,
    turn_by,
)
from tasl_lab.policies import POLICIES
from tasl_lab.views import to_float, warp


def chance(seed=0): return torch.Generator().manual_seed(seed)


def colour_objective(spec, size=(24, 24), **options):
    "An objective on RGB noise, and its batch."
    data = ImageSet(np.random.default_rng(0).integers(0, 255, (4, 3, *size)).astype(np.uint8), Info("noise"))
    return make(spec, small_encoder("CNN", 2, 3), data.info, Plan(20, 4, 0, size), {spec: options}), data.batch(range(4)).unlabelled()


# ---------- turns ----------

@pytest.mark.parametrize("size, count", [((5, 5), 4), ((6, 4), 2), ((4, 4, 4), 10), ((3, 4, 4), 6), ((4, 3, 4), 6), ((2, 3, 4), 4)])
def test_turns_are_those_of_rot90_that_keep_the_shape(size, count):
    turns, x = quarter_turns(size), np.random.default_rng(0).random((2, *size))
    expected = [(0, (0, 1))]
    for a, b in itertools.combinations(range(len(size)), 2):
        for k in (1, 2, 3):
            if np.rot90(x[0], k, (a, b)).shape == size: expected.append((k, (a, b)))
    assert turns == expected and len(turns) == count
    turned = [turn_by(torch.from_numpy(x[:, None]), torch.tensor([i, 0]), turns) for i in range(count)]
    for y, (k, axes) in zip(turned, turns):
        assert np.array_equal(y[0, 0].numpy(), np.rot90(x[0], k, axes)) and np.array_equal(y[1, 0].numpy(), x[1])
    assert len({y[0].numpy().tobytes() for y in turned}) == count  # all different: each has its own answer


@pytest.mark.parametrize("size", [(5, 5), (6, 4), (4, 4, 4), (3, 4, 4)])
def test_affine_of_a_turn_leads_back_to_the_upright_picture(size):
    x = torch.rand(1, 2, *size, generator=chance())
    for i, turn in enumerate(quarter_turns(size)):
        assert torch.allclose(warp(x, turn_affine(turn, size)[None], size), turn_by(x, torch.tensor([i]), quarter_turns(size)), atol=1e-5), turn


@pytest.mark.parametrize("dims", [2, 3])
def test_turned_views_are_turned_crops_of_the_source(dims):
    objective, batch = small_objective("rotation", dims=dims, rotation={"copies": 4})
    views, source = objective.views(batch, 0), to_float(batch.images)
    for v in views: assert torch.allclose(warp(source, v.affine, source.shape[2:]), v.x, atol=1e-4)
    assert all(len(set(k.tolist())) == 4 for k in torch.stack([v.target for v in views], 1))  # no turn twice in a picture


def test_all_turns_are_equally_frequent():
    objective, batch = small_objective("rotation", dims=3)
    seen = torch.cat([objective.views(batch, s)[0].target for s in range(250)]).bincount(minlength=10)
    assert len(seen) == 10 and (seen - 200).abs().max() < 5 * math.sqrt(200 * .9)


@pytest.mark.parametrize("modality", POLICIES)
def test_turned_pictures_keep_their_up(modality):
    info, plan = Info("x", modality), Plan(batch=4, size=(16, 16))
    if not POLICIES[modality].upright:
        with pytest.raises(InputError, match=modality): Rotation(small_encoder("CNN"), info, plan)
        return
    recipe, = Rotation(small_encoder("CNN"), info, plan).recipes()
    assert not any(recipe.flip[:-1]) and recipe.rotate == 0  # neither an upside-down mirror nor a lean
    for name in ("relativeposition", "jigsaw"):
        recipe, = make(name, small_encoder("CNN"), info, plan).recipes()
        assert recipe.flip == () and recipe.rotate == 0  # left stays left


# ---------- tiles ----------

@pytest.mark.parametrize("size, cells, tile, gap", [((16, 16), 3, 4, 1), ((64, 48), 3, 8, 4), ((20, 26, 23), 3, 4, 2), ((9, 8, 8), 2, 2, 1)])
def test_tiles_lie_anywhere_in_their_cell_and_keep_their_distance(size, cells, tile, gap):
    p = tile_places(chance(), 3000, size, cells, tile, gap)
    assert p.shape == (3000, cells ** len(size), len(size))
    for axis, n in enumerate(size):
        room = (n + gap) // cells
        start = (n + gap - room * cells) // 2
        for t, at in enumerate(itertools.product(range(cells), repeat=len(size))):
            expected = {start + at[axis] * room + j for j in range(room - gap - tile + 1)}
            assert set(p[:, t, axis].tolist()) == expected
            assert min(expected) >= 0 and max(expected) + tile <= n
    for t, s in itertools.combinations(range(cells ** len(size)), 2):
        away = (p[:, t] - p[:, s]).abs().max(1).values - tile
        assert away.min() >= gap


@pytest.mark.parametrize("size, channels", [((20, 17), 1), ((20, 17), 3), ((9, 8, 10), 2)])
def test_cut_is_slicing(size, channels):
    g, d = chance(1), len(size)
    x = torch.rand(4, channels, *size, generator=g)
    for c in {1, channels}:
        places = torch.stack([torch.randint(0, n - 4, (4, 5, c), generator=g) for n in size], -1)
        got = cut_tiles(x, places, 4)
        for i, t, k in itertools.product(range(4), range(5), range(channels)):
            at = places[i, t, k if c > 1 else 0].tolist()
            assert torch.equal(got[i, t, k], x[(i, k, *[slice(a, a + 4) for a in at])])
        assert got.shape == (4, 5, channels, *[4] * d)


@pytest.mark.parametrize("cells, stride, gap", [(3, 4, .25), (3, 16, .25), (3, 16, .5), (2, 8, .1)])
def test_tile_is_the_largest_that_fits(cells, stride, gap):
    for n in range(8, 140, 3):
        apart = {t: max(1, round(gap * t)) for t in range(2, n)}
        able = [t for t in apart if cells * t + cells * apart[t] <= (n + apart[t]) // cells * cells and (t % stride == 0 or t in (stride / 2, stride / 4))]
        if not able:
            with pytest.raises(InputError, match="leave no tile"): tile_plan((n, n + 5), cells, stride, gap)
            continue
        tile, between, grow = tile_plan((n, n + 5), cells, stride, gap)
        assert tile == max(able) and between == apart[tile] and cells * tile + (cells - 1) * between <= n and tile * grow % stride == 0


@pytest.mark.parametrize("spec", ["relativeposition", "jigsaw"])
@pytest.mark.parametrize("size", [(48, 64), (16, 20, 16)])
def test_tiles_show_the_place_that_they_are_asked_about(spec, size):
    dims = len(size)
    data = ImageSet(np.random.default_rng(0).integers(0, 255, (8, 1, *size)).astype(np.uint8), Info("noise"))
    objective = make(spec, small_encoder("CNN", dims), data.info, Plan(20, 8, 0, size), {spec: {"standardize": False}})
    views, source = objective.views(data.batch(range(8)).unlabelled(), 0), to_float(torch.from_numpy(data.images))
    assert objective.grow == 1
    for v in views: assert torch.allclose(warp(source, v.affine, v.x.shape[2:]), v.x, atol=1e-3)
    middle = (torch.tensor(views[0].x.shape[2:]) - 1) / 2
    centers = torch.stack([v.affine[:, :, :dims] @ middle + v.affine[:, :, dims] for v in views], 1)      # (B, T, d), source pixels
    if spec == "relativeposition":
        answers = [at for at in itertools.product((-1, 0, 1), repeat=dims) if any(at)]
        for i, t in itertools.product(range(8), range(1, len(views))):
            apart = (centers[i, t] - centers[i, 0]) / views[0].affine[i, :, :dims].diagonal()             # view pixels
            assert [round(a) for a in (apart / (objective.tile + objective.gap)).clamp(-1, 1).tolist()] == list(answers[views[t].target[i]])
        return
    for i in range(8):  # the tile of the first cell is named 0, and so on in array order
        order = objective.orders[views[0].target[i]].tolist()
        put_back = [centers[i, order.index(t)].tolist() for t in range(len(views))]
        for a, b in itertools.combinations(range(len(views)), 2):
            cell_a, cell_b = (np.unravel_index(t, (objective.cells,) * dims) for t in (a, b))
            assert all(put_back[a][k] < put_back[b][k] for k in range(dims) if cell_a[k] < cell_b[k])


def test_pixels_of_small_tiles_are_repeated():
    data = small_set(3)
    objective = make("relativeposition", small_encoder("CNN", 3), data.info, Plan(20, 8, 0, (8, 8, 8)), {"relativeposition": {"standardize": False}})
    views, source = objective.views(data.batch(range(8)).unlabelled(), 0), to_float(torch.from_numpy(data.images[:8]))
    assert (objective.tile, objective.grow) == (2, 2) and views[0].x.shape == (8, 1, 4, 4, 4)
    for v in views:
        small = v.x[:, :, ::2, ::2, ::2]
        assert all(torch.equal(v.x[:, :, i::2, j::2, k::2], small) for i, j, k in itertools.product((0, 1), repeat=3))
        amid = v.affine[:, :, :3] @ torch.full((3,), .5) + v.affine[:, :, 3]  # amid the copies of the first pixel lies its centre
        there = warp(source, torch.cat([v.affine[:, :, :3], amid[..., None]], 2), (1, 1, 1))
        assert torch.allclose(there, small[..., :1, :1, :1], atol=1e-4)


@pytest.mark.parametrize("spec", ["relativeposition", "jigsaw"])
def test_tiles_are_levelled(spec):
    levelled, batch = small_objective(spec, channels=2, **{spec: {"standardize": True}})
    raw, _ = small_objective(spec, channels=2, **{spec: {"standardize": False}})
    for v, w in zip(levelled.views(batch, 0), raw.views(batch, 0)):
        for tile, before in zip(v.x.numpy(), w.x.numpy().astype(float)):
            away = before - before.mean()
            assert np.allclose(tile, away / (math.sqrt((away ** 2).mean()) + .1), atol=1e-5)
    flat = replace(batch, images=torch.full_like(batch.images, 200))
    assert all((v.x.abs() < 1e-3).all() for v in levelled.views(flat, 0))


@pytest.mark.parametrize("spec", ["relativeposition", "jigsaw"])
def test_channels_of_colour_tiles_are_cut_apart(spec):
    objective, batch = colour_objective(spec, standardize=False)
    whole = objective.memo.view  # the rendered picture before it is cut
    views = objective.views(batch, 0)
    picture = whole((0, objective.recipes()[0]), None).x
    slips = set()
    for v, i in itertools.product(views, range(4)):
        found = []
        for c in range(3):
            windows = picture[i, c].unfold(0, objective.tile, 1).unfold(1, objective.tile, 1)
            small = v.x[i, c, ::objective.grow, ::objective.grow]
            hit, = (windows == small).all(-1).all(-1).nonzero().tolist()
            found.append(hit)
        slips |= {(a[0] - found[0][0], a[1] - found[0][1]) for a in found[1:]}
    assert slips == set(itertools.product((-1, 0, 1), repeat=2))
    assert small_objective(spec, channels=2)[0].slip == 0 and small_objective(spec, dims=2, channels=3)[0].slip == 1


def test_all_positions_are_asked_about_equally_often():
    objective, batch = small_objective("relativeposition", dims=2, relativeposition={"pairs": 2})
    seen = torch.cat([torch.stack([v.target for v in objective.views(batch, s)[1:]], 1) for s in range(250)])       # (2000, 2)
    assert (seen[:, 0] != seen[:, 1]).all() and (seen.flatten().bincount(minlength=8) - 500).abs().max() < 5 * math.sqrt(500)


@pytest.mark.parametrize("family", ["CNN", "ViT"])
def test_losses_on_tiles_are_cross_entropy_of_tiles_encoded_alone(family):
    def log_p(head, x, target): return head(x).log_softmax(1)[range(len(x)), target]
    objective, batch = small_objective("relativeposition", family, relativeposition={"pairs": 3})
    views = objective.views(batch, 0)
    middle, *others = (objective.encoder(v.x).pooled for v in views)
    each = [-log_p(objective.head, torch.cat([middle, o], 1), v.target).mean() for o, v in zip(others, views[1:])]
    assert torch.allclose(objective(views, 0.).total, sum(each) / 3, atol=1e-5)
    objective, batch = small_objective("jigsaw", family)
    views = objective.views(batch, 0)
    every = torch.cat([objective.encoder(v.x).pooled for v in views], 1)
    assert torch.allclose(objective(views, 0.).total, -log_p(objective.head, every, views[0].target).mean(), atol=1e-5)


# ---------- orders ----------

@pytest.mark.parametrize("tiles, count", [(3, 6), (4, 5), (4, 24), (5, 12)])
def test_orders_are_chosen_by_a_plain_loop(tiles, count):
    every = list(itertools.permutations(range(tiles)))
    hamming = lambda a, b: sum(x != y for x, y in zip(a, b))
    chosen = [every[0]]
    while len(chosen) < count:
        chosen.append(max(every, key=lambda p: (min(hamming(p, q) for q in chosen), sum(hamming(p, q) for q in chosen))))  # the first of equals
    assert far_orders(tiles, count).tolist() == [list(p) for p in chosen]
    assert len(set(chosen)) == count


@pytest.mark.parametrize("tiles, count, least", [(9, 9, 9), (9, 32, 7), (8, 32, 6)])
def test_orders_lie_far_apart(tiles, count, least):
    orders = far_orders(tiles, count)
    apart = [int((a != b).sum()) for a, b in itertools.combinations(orders, 2)]
    assert min(apart) >= least and orders[0].tolist() == list(range(tiles))


# ---------- fused pictures ----------

@pytest.mark.parametrize("size", [(7, 5), (4, 5, 6)])
def test_boxes_are_painted_by_a_plain_loop(size):
    drawn = draw_boxes(chance(), 6, size, 3, (2, 5), (.3, .9))
    got, (first, behind, classes) = paint_boxes(*drawn, size), drawn
    for i in range(6):
        expected = np.zeros(size, int)
        for a, b, k in zip(first[i].tolist(), behind[i].tolist(), classes[i].tolist()):
            if k: expected[tuple(slice(max(0, lo), max(0, hi)) for lo, hi in zip(a, b))] = k
        assert np.array_equal(got[i, 0].numpy(), expected)


@pytest.mark.parametrize("size", [(40, 80), (32, 32, 64)])
def test_boxes_keep_to_what_was_asked(size):
    first, behind, classes = draw_boxes(chance(), 500, size, 4, (3, 9), (.1, .4))
    count = (classes > 0).sum(1)
    assert set(count.tolist()) == set(range(3, 10)) and set(classes.flatten().tolist()) == set(range(5))
    middle = first + (behind - first) // 2
    for axis, n in enumerate(size):
        low, high = (n * s ** (2 / len(size)) for s in (.1, .4))
        long = (behind - first)[..., axis]
        assert low - .5 <= long.min() < low + 2 and high - 2 < long.max() <= high + .5
        assert set(middle[..., axis].flatten().tolist()) == set(range(n))


@pytest.mark.parametrize("dims, batch", [(2, 8), (3, 4), (2, 5)])
def test_neighbours_in_the_batch_are_fused(dims, batch):
    objective, data = small_objective("volumefusion", dims=dims, batch=batch, volumefusion={"levels": 4})
    view, = objective.views(data, 0)
    source = objective.memo.view((0, objective.recipes()[0]), None).x
    assert view.target.dtype == torch.long and view.target.shape == (batch, 1, *source.shape[2:])
    for i in range(batch):
        j = i + 1 if i % 2 == 0 else i - 1
        if j == batch: j = 0
        for at in np.ndindex(*source.shape[2:]):
            a = view.target[(i, 0, *at)].item() / 4
            assert abs(view.x[(i, 0, *at)] - (a * source[(j, 0, *at)] + (1 - a) * source[(i, 0, *at)])) < 1e-5


def test_fusion_at_its_ends():
    a, b = torch.rand(2, 3, 2, 4, 4, generator=chance())
    assert torch.equal(fuse(a, b, torch.zeros(3, 1, 4, 4, dtype=torch.long), 2), b) and torch.equal(fuse(a, b, torch.full((3, 1, 4, 4), 2), 2), a)
    assert torch.allclose(fuse(a, b, torch.ones(3, 1, 4, 4, dtype=torch.long), 2), (a + b) / 2)


def scene(b, k, size, seed=0):
    "Random logits and classes."
    g = chance(seed)
    return torch.randn(b, k, *size, generator=g), torch.randint(k, (b, 1, *size), generator=g)


@pytest.mark.parametrize("b, k, size", [(2, 2, (3, 4)), (3, 5, (4, 4)), (2, 3, (2, 3, 2)), (1, 4, (1, 1))])
def test_dice_and_cross_entropy_are_plain_loops(b, k, size):
    logits, classes = scene(b, k, size)
    logits.requires_grad_()
    both, sums, ce, pixels = [0.] * k, [0.] * k, 0., 0
    for i in range(b):
        for at in np.ndindex(*size):
            z, true = logits[(i, slice(None), *at)], classes[(i, 0, *at)].item()
            p = [torch.exp(z[c]) / sum(torch.exp(z[j]) for j in range(k)) for c in range(k)]
            ce, pixels = ce - torch.log(p[true]), pixels + 1
            for c in range(k):
                both[c] = both[c] + p[c] * (c == true)
                sums[c] = sums[c] + p[c] + (c == true)
    expected = 1 - sum((2 * u + 1e-5) / (s + 1e-5) for u, s in zip(both, sums)) / k, ce / pixels
    got = dice_and_ce(logits, classes)
    for a, e in zip(got, expected):
        assert torch.allclose(a, e, atol=1e-5)
        (ga,), (ge,) = (torch.autograd.grad(t, logits, retain_graph=True) for t in (a, e))
        assert torch.allclose(ga, ge, atol=1e-5)


def test_dice_and_cross_entropy_keep_full_precision_under_autocast():
    logits, classes = scene(2, 5, (8, 8))
    full = dice_and_ce(logits, classes)
    with torch.autocast("cpu", torch.bfloat16): mixed = dice_and_ce(logits, classes)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(full, mixed))


def dice_on_rank(rank):
    "Dice and its gradient on this process's share of four pictures."
    logits, classes = (t[2 * rank:2 * rank + 2] for t in scene(4, 5, (4, 4)))
    logits = logits.clone().requires_grad_()
    dice, ce = dice_and_ce(logits, classes)
    (dice + ce).backward()
    return dice.detach(), ce.detach(), logits.grad


def test_dice_over_two_processes(tmp_path):
    (d0, c0, g0), (d1, c1, g1) = two_processes(dice_on_rank, tmp_path)
    logits, classes = scene(4, 5, (4, 4))
    logits.requires_grad_()
    dice, ce = dice_and_ce(logits, classes)
    (dice + ce).backward()
    assert torch.allclose(d0, dice, atol=1e-6) and torch.allclose(d1, dice, atol=1e-6) and torch.allclose((c0 + c1) / 2, ce, atol=1e-6)
    assert torch.allclose(torch.cat([g0, g1]) / 2, logits.grad, atol=1e-6)  # what distributed training averages


def test_class_that_is_missing_from_a_picture_is_judged_over_the_batch():
    logits = torch.full((2, 2, 2, 2), -20.)
    classes = torch.tensor([0, 1])[:, None, None, None].expand(2, 1, 2, 2)
    logits.scatter_(1, classes, 20.)
    assert dice_and_ce(logits, classes)[0] < 1e-6
    assert dice_and_ce(logits[:1], classes[:1])[0] < 1e-3


# ---------- as terms of a hybrid ----------

def test_terms_do_not_spoil_each_others_views():
    spec = "rotation+0.5*volumefusion+2*jigsaw+relativeposition"
    hybrid, batch = small_objective(spec)
    loss = hybrid(hybrid.views(batch, 2), 0.)
    for name in hybrid.weights:
        term, _ = small_objective(name)
        alone = term(term.views(batch, 2), 0.).total
        assert torch.allclose(loss.parts[name], alone, atol=1e-5), name
    assert torch.allclose(loss.total, sum(hybrid.weights[k] * v for k, v in loss.parts.items()))
    assert len(set(map(float, hybrid.weights.values()))) > 1


def test_parts_carry_gradients():
    for name, parts in (("rotation", {"turn"}), ("relativeposition", {"position"}), ("jigsaw", {"order"}), ("volumefusion", {"dice", "cross_entropy"})):
        objective, batch = small_objective(name)
        loss = objective(objective.views(batch, 0), 0.)
        assert loss.parts.keys() == parts and torch.allclose(loss.total, sum(loss.parts.values()))
        for part in loss.parts.values(): assert any(g.abs().sum() > 0 for g in gradients(part, objective.encoder).values())


# ---------- what cannot work is refused ----------

@pytest.mark.parametrize("spec, size, options, words", [
    ("rotation", (16, 16), {"copies": 5}, "copies is 5"), ("rotation", (16, 16), {"copies": 0}, "copies is 0"),
    ("rotation", (16, 12), {"copies": 3}, "2 turns"),
    ("relativeposition", (7, 16), {}, r"\(7, 16\).*leave no tile"),
    ("relativeposition", (16, 16), {"gap": 0}, "gap is 0"),
    ("relativeposition", (16, 16), {"gap": -.1}, "gap is -0.1"), ("relativeposition", (16, 16), {"gap": 3.}, "leave no tile"),
    ("relativeposition", (32, 32), {"tile": 6}, r"tile is 6.*\[2, 4, 8\]"), ("relativeposition", (32, 32), {"tile": 12}, "tile is 12"),
    ("relativeposition", (16, 16), {"pairs": 9}, "8 neighbours"), ("relativeposition", (16, 16), {"pairs": 0}, "pairs is 0"),
    ("relativeposition", (8, 8, 8), {"pairs": 27}, "26 neighbours"), ("relativeposition", (8, 8, 4), {}, "leave no tile"),
    ("jigsaw", (7, 7), {}, "leave no tile"), ("jigsaw", (16, 16), {"cells": 4}, "cells is 4"), ("jigsaw", (8, 8, 8), {"cells": 3}, "27 tiles"),
    ("jigsaw", (16, 16), {"orders": 1}, "1 orders"), ("jigsaw", (16, 16), {"cells": 2, "orders": 25}, "there are 24"),
    ("jigsaw", (16, 16), {"gap": 0}, "gap is 0"),
    ("volumefusion", (16, 16), {"levels": 0}, "levels is 0"), ("volumefusion", (16, 16), {"boxes": (0, 2)}, "boxes is"),
    ("volumefusion", (16, 16), {"boxes": (3, 2)}, "boxes is"),
    ("volumefusion", (16, 16), {"sides": (0, .5)}, "sides is"), ("volumefusion", (16, 16), {"sides": (.5, 1.1)}, "sides is"),
    ("volumefusion", (16, 16), {"sides": (.5, .4)}, "sides is"),
])
def test_impossible_question(spec, size, options, words):
    with pytest.raises(InputError, match=words): make(spec, small_encoder("CNN", len(size)), Info("small"), Plan(5, 4, 0, size), {spec: options})


def test_fusion_of_a_single_picture_is_refused():
    with pytest.raises(InputError, match="batch of 1"): make("volumefusion", small_encoder("CNN"), Info("small"), Plan(5, 1, 0, (16, 16)))


def test_deep_encoders_get_the_tiles_they_can_take():
    for size, tile, grow in ((32, 8, 2), (64, 16, 1)):
        objective = make("jigsaw", make_encoder("cnn-tiny"), Info("small"), Plan(5, 4, 0, (size, size)))
        assert (objective.tile, objective.grow) == (tile, grow)
    with pytest.raises(InputError, match="stride 16"): make("jigsaw", make_encoder("cnn-tiny"), Info("small"), Plan(5, 4, 0, (13, 13)))
