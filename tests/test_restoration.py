"""Restoring objectives and SimMIM: corruptions and losses agree with plain loops, hidden pixels stay hidden, and what makes no sense is refused."""
import itertools
import math

import numpy as np
import pytest
import torch
from small import SIZES, gradients, small_encoder, small_objective

from tasl_lab.core import InputError
from tasl_lab.data.imageset import ImageSet, Info
from tasl_lab.encoders import make_encoder
from tasl_lab.objectives.base import Plan
from tasl_lab.objectives.compose import make
from tasl_lab.objectives.masked import masked_distance
from tasl_lab.objectives.restoration import (
    bend_intensity,
    bezier,
    blur_and_noise,
    covered,
    draw_boxes,
    draw_holes,
    draw_paint,
    fill_mean,
    hole_error,
    shuffle_tiles,
)
from tasl_lab.views import View, draw_mask

SHAPES = [(8, 12), (4, 6, 8)]


def chance(seed=0): return torch.Generator().manual_seed(seed)


def random(*shape, seed=0): return torch.randn(*shape, generator=chance(seed))


# ---------- SimMIM ----------

@pytest.mark.parametrize("spatial, grid", [((8, 12), (2, 3)), ((4, 6, 4), (2, 3, 2))])
def test_masked_distance_is_a_plain_loop(spatial, grid):
    guess, truth = random(3, 2, *spatial, seed=1).requires_grad_(), random(3, 2, *spatial, seed=2)
    hidden, cell = draw_mask(3, grid, .5, 0), spatial[0] // grid[0]
    errors, slopes = [], np.zeros(guess.shape)
    for i, c in itertools.product(range(3), range(2)):
        for at in np.ndindex(*spatial):
            if not hidden[(i, *[k // cell for k in at])]: continue
            difference = guess[(i, c, *at)].item() - truth[(i, c, *at)].item()
            errors.append(abs(difference))
            slopes[(i, c, *at)] = np.sign(difference)
    loss = masked_distance(guess, truth, hidden)
    loss.backward()
    assert abs(loss.item() - np.mean(errors)) < 1e-5 and np.allclose(guess.grad.numpy(), slopes / len(errors), atol=1e-5)


@pytest.mark.parametrize("kind", ["CNN", "ViT"])
@pytest.mark.parametrize("dims, channels", [(2, 1), (2, 3), (3, 1)])
def test_simmim_sees_no_hidden_pixel_and_puts_cells_in_place(kind, dims, channels):
    objective, batch = small_objective("simmim", kind, dims, channels, batch=2)
    view = objective.views(batch, 0)[0]
    hole = view.mask
    for axis in range(dims): hole = hole.repeat_interleave(4, axis + 1)
    other = View(torch.where(hole.unsqueeze(1), random(*view.x.shape), view.x), view.affine, view.mask)
    with torch.no_grad():
        got, coarse = objective.reconstruct(view), objective.encoder(view.x, view.mask, "token").maps[-1]
        assert torch.allclose(objective.reconstruct(other), got, atol=1e-5)
        s = objective.stride
        for at in np.ndindex(*coarse.shape[2:]):
            pixels = coarse[(0, slice(None), *at)] @ objective.pixels.weight.flatten(1).T + objective.pixels.bias
            place = (0, slice(None), *[slice(s * k, s * k + s) for k in at])
            assert torch.allclose(got[place], pixels.reshape(channels, *[s] * dims), atol=1e-5)
    loss = objective(objective.views(batch, 0), 0.).total
    if kind == "ViT": assert gradients(loss, objective.encoder)["hidden"].abs().sum() > 0  # the mask token learns


# ---------- boxes and holes ----------

@pytest.mark.parametrize("size", SHAPES)
def test_covered_is_a_plain_loop(size):
    start, stop = draw_boxes(chance(), 5, size, 3, .1, .6)
    stop[0, 1] = start[0, 1]  # an empty box
    got = covered(start, stop, size)
    for i in range(5):
        for at in np.ndindex(*size):
            boxes = zip(start[i].tolist(), stop[i].tolist())
            assert bool(got[(i, *at)]) == any(all(a[k] <= at[k] < b[k] for k in range(len(size))) for a, b in boxes)


@pytest.mark.parametrize("size", [(64, 40), (20, 30, 40)])
def test_boxes_lie_inside_and_are_as_large_as_asked(size):
    start, stop = draw_boxes(chance(), 300, size, 2, .2, .4)
    side = stop - start
    assert start.min() == 0 and bool((stop <= torch.tensor(size)).all()) and bool((stop.amax((0, 1)) == torch.tensor(size)).all())  # up to each edge
    for axis, n in enumerate(size):
        assert side[..., axis].min() == round(.2 * n) and side[..., axis].max() == round(.4 * n)
    tiny = draw_boxes(chance(), 4, (4, 4), 1, .01, .02)
    assert bool((tiny[1] - tiny[0] == 1).all())  # never empty


@pytest.mark.parametrize("size", [(64, 64), (32, 32, 32)])
def test_one_hole_covers_its_share(size):
    share = draw_holes(chance(), 1000, size, 1, .25).flatten(1).float().mean(1)
    assert abs(share.mean() - .25) < .01 and share.std() > .03 and share.min() > 0


@pytest.mark.parametrize("spatial", SHAPES)
def test_fill_mean_is_a_plain_loop(spatial):
    x, hidden = random(3, 2, *spatial), torch.rand(3, *spatial, generator=chance(1)) < .3
    got = fill_mean(x, hidden)
    for i, c in itertools.product(range(3), range(2)):
        seen = [float(x[(i, c, *at)]) for at in np.ndindex(*spatial) if not hidden[(i, *at)]]
        for at in np.ndindex(*spatial):
            expected = np.mean(seen) if hidden[(i, *at)] else float(x[(i, c, *at)])
            assert abs(float(got[(i, c, *at)]) - expected) < 1e-5


@pytest.mark.parametrize("spatial", SHAPES)
def test_hole_error_is_a_plain_loop(spatial):
    guess, truth = random(3, 2, *spatial, seed=1).requires_grad_(), random(3, 2, *spatial, seed=2)
    hidden = torch.rand(3, *spatial, generator=chance()) < torch.tensor([.1, .5, .9]).reshape(3, *[1] * len(spatial))
    total, slopes = 0., np.zeros(guess.shape)
    for i in range(3):
        places = [(i, c, *at) for c in range(2) for at in np.ndindex(*spatial) if hidden[(i, *at)]]
        difference = {p: guess[p].item() - truth[p].item() for p in places}
        total += np.mean([d ** 2 for d in difference.values()]) / 3
        for p, d in difference.items(): slopes[p] = 2 * d / len(places) / 3
    loss = hole_error(guess, truth, hidden)
    loss.backward()
    assert abs(loss.item() - total) < 1e-5 and np.allclose(guess.grad.numpy(), slopes, atol=1e-5)


# ---------- noise and blur ----------

def plain_blur(x, sigma):
    "Gaussian blur of one channel (*spatial), axis by axis, edges repeated."
    reach = math.ceil(3 * sigma)
    weights = [math.exp(-.5 * (t / sigma) ** 2) for t in range(-reach, reach + 1)] if sigma else [1.]
    for axis in range(x.ndim):
        out = np.zeros_like(x)
        for at in np.ndindex(*x.shape):
            for t, w in zip(range(-reach, reach + 1), weights):
                k = min(max(at[axis] + t, 0), x.shape[axis] - 1)
                out[at] += w / sum(weights) * x[(*at[:axis], k, *at[axis + 1:])]
        x = out
    return x


@pytest.mark.parametrize("spatial", [(8, 12), (4, 6, 5)])
def test_blur_and_noise_is_a_plain_loop(spatial):
    x, noise = random(3, 2, *spatial), random(3, 2, *spatial, seed=1)
    sigma, level = torch.tensor([0., .6, 1.2]), torch.tensor([.5, 0., .2])
    got = blur_and_noise(x, sigma, level, noise)
    for i, c in itertools.product(range(3), range(2)):
        expected = plain_blur(x[i, c].numpy().astype(float), float(sigma[i])) + float(level[i]) * noise[i, c].numpy()
        assert np.allclose(got[i, c].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("option, value", [("noise", 0), ("blur", 0)])
def test_denoising_can_do_one_alone(option, value):
    objective, batch = small_objective("denoising", denoising={"noise": .1, "blur": 1.5} | {option: value})
    view = objective.views(batch, 0)[0]
    difference = (view.x - view.target).flatten(1)
    if option == "blur":  # noise alone: of different strength in each picture, within its limit of 0.1 x 4
        assert difference.std(1).max() < .4 * 1.2 and difference.std(1).max() > 2 * difference.std(1).min()
    else:                 # blur alone: pictures get smoother, and their mean stays about the same
        rough = lambda t: t.diff(dim=-1).square().mean((1, 2, 3))
        assert bool((rough(view.x) <= rough(view.target)).all()) and difference.mean(1).abs().max() < .1


# ---------- Models Genesis ----------

def plain_curve(p, steps=256):
    "A cubic curve by its recursive construction (de Casteljau)."
    between = lambda a, b, t: [(1 - t) * u + t * v for u, v in zip(a, b)]
    out = []
    for t in np.linspace(0, 1, steps):
        points = [[0., 0.], *p, [1., 1.]]
        while len(points) > 1: points = [between(a, b, t) for a, b in zip(points, points[1:])]
        out.append(points[0])
    return np.array(out).T


def test_bezier_is_its_recursive_construction():
    points = torch.rand(6, 2, 2, generator=chance())
    x, y = bezier(points)
    for i in range(6):
        expected = plain_curve(points[i].double().tolist())
        assert np.allclose(x[i].numpy(), expected[0], atol=1e-5) and np.allclose(y[i].numpy(), expected[1], atol=1e-5)
    assert bool((x.diff(dim=1) >= 0).all() and (y.diff(dim=1) >= 0).all())  # monotone: the curve can be read as a function


@pytest.mark.parametrize("spatial", SHAPES)
def test_bent_intensities_are_numpys_interpolation(spatial):
    x, points = random(6, 2, *spatial), .1 + .8 * torch.rand(6, 2, 2, generator=chance())
    down = torch.tensor([False, True] * 3)
    got, (at, value) = bend_intensity(x, points, down), bezier(points)
    for i in range(6):
        y = value[i].double().numpy()
        shares = ((x[i].double().numpy() + 2) / 4).clip(0, 1)
        expected = np.interp(shares, at[i].double().numpy(), y[::-1] if down[i] else y) * 4 - 2
        assert np.allclose(got[i].numpy(), expected, rtol=0, atol=1e-5)


def test_steep_curves_stay_in_range():
    x = torch.linspace(-2, 2, 101).reshape(1, 1, 101, 1).repeat(4, 1, 1, 1)
    points = torch.tensor([[[0., 1.], [0., 1.]], [[1., 0.], [1., 0.]], [[0., 0.], [0., 0.]], [[1., 1.], [1., 1.]]])
    y = bend_intensity(x, points, torch.zeros(4, dtype=torch.bool))
    assert y.isfinite().all() and y.min() >= -2 and y.max() <= 2 and bool((y[:, 0, :, 0].diff(dim=1) >= -1e-6).all())


@pytest.mark.parametrize("spatial", SHAPES)
def test_shuffled_tiles_are_a_plain_loop(spatial):
    x, keys = random(4, 2, *spatial), torch.rand(4, *spatial, generator=chance(1))
    side = torch.randint(1, 4, (4, len(spatial)), generator=chance(2))
    side[0] = 1  # moves nothing
    offset = (torch.rand(4, len(spatial), generator=chance(3)) * side).long()
    got = shuffle_tiles(x, side, offset, keys)
    assert torch.equal(got[0], x[0]) and not torch.equal(got[1:], x[1:])
    for i in range(4):
        tiles = {}
        for at in np.ndindex(*spatial): tiles.setdefault(tuple((k + int(o)) // int(s) for k, o, s in zip(at, offset[i], side[i])), []).append(at)
        for places in tiles.values():
            for to, source in zip(places, sorted(places, key=lambda at: float(keys[(i, *at)]))):
                assert torch.equal(got[(i, slice(None), *to)], x[(i, slice(None), *source)])


@pytest.mark.parametrize("size", [(42, 56), (21, 28, 35)])
def test_painting_without_further_boxes(size):
    outside = torch.arange(60) % 2 == 0
    hidden = draw_paint(chance(), 60, size, outside, more=0.)
    assert not hidden[~outside].any()  # in-painting may stop before its first box
    for kept in ~hidden[outside]:      # out-painting keeps one window
        at = kept.nonzero()
        side = at.amax(0) - at.amin(0) + 1
        assert kept.sum() == side.prod() and all(round(3 / 7 * n) <= s <= round(4 / 7 * n) for s, n in zip(side.tolist(), size))


def test_five_small_boxes_hide_more_than_one():
    few, many = (draw_paint(chance(), 400, (60, 60), torch.zeros(400, dtype=torch.bool), more=m).float().mean((1, 2)) for m in (.5, 1.))
    assert many.min() >= .1 ** 2 and many.max() <= 5 / 9 and few.mean() < .5 * many.mean()
    assert abs((few == 0).float().mean() - .5) < .1  # half stop at once


@pytest.mark.parametrize("dims, channels", [(2, 1), (2, 3), (3, 1)])
def test_each_kind_of_damage_alone(dims, channels):
    off = {"nonlinear": 0., "shuffle": 0., "paint": 0.}
    def seen(**on):
        objective, batch = small_objective("modelsgenesis", dims=dims, channels=channels, modelsgenesis=off | on)
        view = objective.views(batch, 0)[0]
        return view.x.flatten(1), view.target.flatten(1)
    x, clean = seen(shuffle=1., window=.3)
    assert torch.allclose(x.sort(1)[0], clean.sort(1)[0]) and not torch.equal(x, clean)
    x, clean = seen(nonlinear=1.)
    for a, b in zip(x, clean):
        step = a[b.argsort()].diff()
        assert bool((step >= -1e-5).all()) or bool((step <= 1e-5).all())  # one monotone curve per picture, up or down
    x, clean = seen(paint=1., outpaint=1.)
    hidden = (x != clean).float().mean(1)
    assert hidden.min() > 0 and hidden.max() < 1 - (3 / 7) ** dims + .1
    x, clean = seen(paint=1., outpaint=0.)
    assert (x != clean).float().mean() < hidden.mean()


def test_chances_are_those_given():
    share = {}
    for name, odds in (("nonlinear", .9), ("paint", .5)):
        options = {"nonlinear": 0., "shuffle": 0., "paint": 0., "outpaint": 1.} | {name: odds}
        objective, batch = small_objective("modelsgenesis", modelsgenesis=options)
        touched = [(v.x != v.target).flatten(1).any(1) for step in range(40) for v in objective.views(batch, step)]
        share[name] = torch.cat(touched).float().mean().item()
    assert abs(share["nonlinear"] - .9) < .06 and abs(share["paint"] - .5) < .1


# ---------- the objectives ----------

@pytest.mark.parametrize("kind", ["CNN", "ViT"])
@pytest.mark.parametrize("dims", [2, 3])
def test_what_is_in_a_hole_reaches_nothing(kind, dims):
    objective, batch = small_objective("inpainting", kind, dims)
    view = objective.views(batch, 0)[0]
    hole = view.mask.unsqueeze(1)
    assert torch.equal(view.x.masked_fill(hole, 0), view.target.masked_fill(hole, 0))
    again = fill_mean(torch.where(hole, random(*view.x.shape), view.target), view.mask)
    assert torch.allclose(again, view.x, atol=1e-6)
    loss = objective([view], 0.)
    assert torch.allclose(loss.total, hole_error(objective.reconstruct(view), view.target, view.mask)) and [*loss.parts] == ["restoration"]


@pytest.mark.parametrize("spec, skips", [("inpainting", False), ("denoising", False), ("modelsgenesis", True)])
def test_only_the_u_net_of_models_genesis_sees_fine_levels(spec, skips):
    objective, batch = small_objective(spec)
    with torch.no_grad():
        maps = objective.encoder(objective.views(batch, 0)[0].x).maps
        same = torch.equal(objective.decoder(maps), objective.decoder([maps[0] + 1, *maps[1:]]))
    assert same != skips


@pytest.mark.parametrize("spec", ["denoising", "modelsgenesis"])
def test_restoration_is_the_mean_square_over_all_pixels(spec):
    objective, batch = small_objective(spec)
    view = objective.views(batch, 0)[0]
    loss = objective([view], 0.)
    restored = objective.reconstruct(view).detach().numpy().astype(float)
    assert abs(loss.total.item() - np.mean((restored - view.target.numpy()) ** 2)) < 1e-5


def test_terms_of_a_sum_leave_each_others_views_alone():
    both, batch = small_objective("inpainting+denoising")
    a, b = both.views(batch, 0)
    assert a.target is b.target and a.x is not b.x  # one mild view, spoiled twice
    for name, view in (("inpainting", a), ("denoising", b)):
        alone, _ = small_objective(name)
        assert torch.equal(alone.views(batch, 0)[0].x, view.x) and torch.equal(alone.views(batch, 0)[0].target, view.target)


@pytest.mark.parametrize("spec", ["simmim", "inpainting", "denoising", "modelsgenesis"])
@pytest.mark.parametrize("kind", ["CNN", "ViT"])
@pytest.mark.parametrize("size", [(16, 24), (8, 16, 12)])
def test_pictures_need_not_be_square(spec, kind, size):
    data = ImageSet(np.random.default_rng(0).integers(0, 255, (2, 1, *size)).astype(np.uint8), Info("noise"))
    options = {"simmim": {"unit": 4}} if spec == "simmim" else {}
    objective = make(spec, small_encoder(kind, len(size)), data.info, Plan(batch=2, size=size), options)
    views = objective.views(data.batch([0, 1]), 0)
    assert objective.reconstruct(views[0]).shape == (2, 1, *size) and objective(views, 0.).total.isfinite()


@pytest.mark.parametrize("spec", ["inpainting", "denoising", "modelsgenesis"])
@pytest.mark.parametrize("dims", [2, 3])
def test_two_processes_spoil_as_one(spec, dims):
    one, batch = small_objective(spec, dims=dims)
    halves = [small_objective(spec, dims=dims, batch=4, rank=r, world=2) for r in range(2)]
    assert torch.allclose(torch.cat([o.views(b, 3)[0].x for o, b in halves]), one.views(batch, 3)[0].x, atol=1e-6)


@pytest.mark.parametrize("spec, options, words", [
    ("inpainting", {"holes": 0}, "holes is 0"), ("inpainting", {"share": 0}, "share .* is 0"), ("inpainting", {"share": 1.}, "share .* is 1"),
    ("denoising", {"noise": 0, "blur": 0}, "both 0"), ("denoising", {"blur": -1}, "blur -1"),
    ("modelsgenesis", {"shuffle": 1.1}, "shuffle is 1.1"), ("modelsgenesis", {"outpaint": -.1}, "outpaint is -0.1"),
    ("modelsgenesis", {"window": 0}, "window is 0"),
    ("modelsgenesis", {"nonlinear": 0, "shuffle": 0, "paint": 0}, "all 0"),
    ("simmim", {"unit": 3}, "cells of 3"), ("simmim", {"unit": 16}, r"\(16, 16\)"), ("simmim", {"ratio": 0}, "ratio is 0"),
])
def test_what_makes_no_sense_is_refused(spec, options, words):
    with pytest.raises(InputError, match=words): make(spec, small_encoder("CNN"), Info("small"), Plan(batch=4, size=SIZES[2]), {spec: options})


def test_simmim_takes_a_unit_that_fits_the_encoder():
    for patch, unit in ((4, 8), (16, 16)):
        encoder = make_encoder("vit-tiny", 1, 2, 0, width=48, depth=1, heads=2, patch=patch)
        assert make("simmim", encoder, Info("small"), Plan(batch=4, size=(64, 64))).unit == unit
