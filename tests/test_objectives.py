"""The ground of all objectives: losses against independent implementations and plain loops, masks and sparse passes, hybrids that add up."""
import copy
import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from ranks import two_processes
from small import SIZES, Flat, gradients, small_encoder, small_objective, small_set
from torch import nn

from tasl_lab.core import InputError
from tasl_lab.data.imageset import ImageSet, Info
from tasl_lab.encoders import Visibility, VisibleGroupNorm, fold, make_encoder, unfold
from tasl_lab.objectives.base import Plan
from tasl_lab.objectives.cards import CARDS
from tasl_lab.objectives.compose import gradient_agreement, make, operate
from tasl_lab.objectives.contrastive import SimCLR, nt_xent
from tasl_lab.objectives.heads import GatheredNorm
from tasl_lab.objectives.masked import masked_error
from tasl_lab.views import View, draw_mask

# ---------- NT-Xent ----------

def pairs(n, width=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(n, width, generator=g)
    return [x.requires_grad_() for x in (a, a.detach() + .5 * torch.randn(n, width, generator=g))]


@pytest.mark.parametrize("n", [2, 3, 16, 64])
@pytest.mark.parametrize("temperature", [.05, .2, 1.])
def test_nt_xent_is_that_of_lightly(n, temperature):
    from lightly.loss import NTXentLoss
    a, b = pairs(n)
    ours, theirs = nt_xent(a, b, temperature), NTXentLoss(temperature)(a, b)
    assert torch.allclose(ours, theirs, atol=1e-5)
    for x, y in zip(torch.autograd.grad(ours, [a, b]), torch.autograd.grad(theirs, [a, b])): assert torch.allclose(x, y, atol=1e-5)


def test_nt_xent_is_its_formula():
    a, b = pairs(4, 3)
    z = [x / x.norm() for x in (*a.detach(), *b.detach())]
    s = [[math.exp(float(x @ y) / .3) for y in z] for x in z]
    terms = [-math.log(s[i][(i + 4) % 8] / sum(s[i][j] for j in range(8) if j != i)) for i in range(8)]
    assert abs(nt_xent(a, b, .3).item() - sum(terms) / 8) < 1e-5


def test_nt_xent_keeps_full_precision_under_autocast():
    a, b = pairs(64)
    full = nt_xent(a, b, .1)
    with torch.autocast("cpu", torch.bfloat16): mixed = nt_xent(a, b, .1)
    assert torch.allclose(full, mixed, atol=1e-5)
    for x, y in zip(torch.autograd.grad(full, [a, b]), torch.autograd.grad(mixed, [a, b])): assert torch.allclose(x, y, atol=1e-5)


def flat_simclr(rank, world):
    "SimCLR on a share of eight pictures: loss and parameter gradients."
    torch.manual_seed(0)
    encoder, data, n = Flat(), small_set(n=8), 8 // world
    objective = make("simclr", encoder, data.info, Plan(batch=n, rank=rank, world=world, size=(16, 16)))
    loss = objective(objective.views(data.batch(range(rank * n, (rank + 1) * n)), 0), 0.).total
    return loss.detach(), gradients(loss, objective)


def shares(rank):
    "What one process of two finds out: losses, normed values and gradients."
    mine = slice(rank * 5, (rank + 1) * 5)
    a, b = (x.detach()[mine].requires_grad_() for x in pairs(10))
    x = pairs(10)[0].detach()[mine].requires_grad_()
    loss, y = nt_xent(a, b, .2), GatheredNorm(16)(x)
    loss.backward()
    (y ** 3).sum().backward()
    return {"loss": loss.detach(), "a": a.grad, "b": b.grad, "norm": y.detach(), "x": x.grad, "simclr": flat_simclr(rank, 2)}


@pytest.fixture(scope="module")
def two(tmp_path_factory): return two_processes(shares, tmp_path_factory.mktemp("two"))


def test_nt_xent_over_two_processes(two):
    """The loss of a process is the mean over its own views: the mean over processes is the loss of one process that holds all pictures.
    Gradients pass through the gathering and add up over the processes, so that of a projection is `world` times the single one, and what
    distributed training averages over processes is the single gradient."""
    a, b = pairs(10)
    loss = nt_xent(a, b, .2)
    loss.backward()
    assert torch.allclose(torch.stack([t["loss"] for t in two]).mean(), loss, atol=1e-5)
    for key, x in (("a", a), ("b", b)): assert torch.allclose(torch.cat([t[key] for t in two]) / 2, x.grad, atol=1e-5)


def test_norm_over_two_processes_is_batch_norm(two):
    x = pairs(10)[0]
    y = F.batch_norm(x, None, None, training=True)
    assert torch.allclose(torch.cat([t["norm"] for t in two]), y, atol=1e-5) and torch.allclose(GatheredNorm(16)(x), y, atol=1e-5)
    (y ** 3).sum().backward()  # a sum over pictures: here the gradients of the processes are the single ones
    assert torch.allclose(torch.cat([t["x"] for t in two]), x.grad, atol=1e-4)


def test_simclr_over_two_processes(two):
    loss, grads = flat_simclr(0, 1)
    assert torch.allclose(sum(t["simclr"][0] for t in two) / 2, loss, atol=1e-5)
    for k, g in grads.items(): assert torch.allclose(sum(t["simclr"][1][k] for t in two) / 2, g, atol=1e-5), k


# ---------- masked error ----------

@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("spatial, grid", [((8, 12), (2, 3)), ((4, 6, 4), (2, 3, 2))])
def test_masked_error_is_a_plain_loop(spatial, grid, normalize):
    g = torch.Generator().manual_seed(0)
    guess, truth = (torch.randn(3, 2, *spatial, generator=g) for _ in range(2))
    hidden = draw_mask(3, grid, .5, 0)
    cell, errors = spatial[0] // grid[0], []
    for i, at in itertools.product(range(3), np.ndindex(*grid)):
        if not hidden[(i, *at)]: continue
        box = (i, slice(None), *[slice(k * cell, (k + 1) * cell) for k in at])
        p, t = guess[box].numpy().astype(float).ravel(), truth[box].numpy().astype(float).ravel()
        if normalize: t = (t - t.mean()) / np.sqrt(t.var(ddof=1) + 1e-6)
        errors += list((p - t) ** 2)
    assert abs(masked_error(guess, truth, hidden, normalize).item() - np.mean(errors)) < 1e-5


@pytest.mark.parametrize("spatial", [(8, 12), (4, 6, 8)])
def test_fold_takes_blocks_in_order(spatial):
    x = torch.randn(2, 3, *spatial)
    folded = fold(x, 2)
    for at in np.ndindex(*folded.shape[2:]):
        block = x[(slice(None), slice(None), *[slice(2 * k, 2 * k + 2) for k in at])]
        assert torch.equal(folded[(slice(None), slice(None), *at)], block.flatten(1))
    assert torch.equal(unfold(folded, 2), x)


# ---------- MAE: where tokens go ----------

def cells(x, mask, patch):
    "For each picture: (cell, is it hidden, its pixels in order channel, then axes)."
    place = lambda at: (slice(None), *[slice(k * patch, (k + 1) * patch) for k in at])
    for picture, hidden in zip(x, mask):
        yield [(at, bool(hidden[at]), picture[place(at)].reshape(-1)) for at in np.ndindex(*mask.shape[1:])]


@pytest.mark.parametrize("dims, channels", [(2, 1), (2, 3), (3, 1)])
def test_visible_tokens_are_those_of_the_visible_patches(dims, channels):
    encoder = small_encoder("ViT", dims, channels)
    x = torch.randn(2, channels, *SIZES[dims])
    mask = draw_mask(2, [n // 4 for n in SIZES[dims]], .6, 0)
    got = encoder(x, mask, "visible")
    for i, picture in enumerate(cells(x, mask, 4)):
        seen = [(t, encoder.embed(pixels) + encoder.position[(0, slice(None), *at)]) for t, (at, hidden, pixels) in enumerate(picture) if not hidden]
        y = torch.stack([encoder.cls[0, 0], *[token for _, token in seen]])[None]
        for block in encoder.blocks: y = block(y)
        assert got.visible_ids[i].tolist() == [t for t, _ in seen] and torch.allclose(got.tokens[i], encoder.norm(y)[0, 1:], atol=1e-5)


@pytest.mark.parametrize("dims, channels", [(2, 1), (2, 3), (3, 1)])
def test_mae_puts_every_token_back_in_its_place(dims, channels):
    objective, batch = small_objective("mae", "ViT", dims, channels, batch=2)
    view = objective.views(batch, 0)[0]
    with torch.no_grad():
        features, got = objective.encoder(view.x, view.mask, "visible"), objective.reconstruct(view)
        for i, picture in enumerate(cells(view.x, view.mask, 4)):
            tokens, k = [], 0
            for t, (_, hidden, _) in enumerate(picture):
                tokens.append((objective.token if hidden else objective.narrow(features.tokens[i, k])) + objective.position[0, t])
                k += not hidden
            assert k == features.tokens.shape[1]
            pixels = objective.pixels(objective.blocks(torch.stack(tokens)[None]))[0]
            for (at, _, _), p in zip(picture, pixels):
                place = (i, slice(None), *[slice(4 * c, 4 * c + 4) for c in at])
                assert torch.allclose(got[place], p.reshape(channels, *[4] * dims), atol=1e-5)


# ---------- SparK: what is hidden stays hidden ----------

def plain_norm(x, visible, groups, weight, bias, eps):
    "Group norm by loops: x (C, *spatial), visible (*spatial); statistics of visible positions, hidden ones zero."
    out, size = np.zeros_like(x), len(x) // groups
    for g in range(groups):
        seen = [x[(c, *at)] for c in range(g * size, (g + 1) * size) for at in np.ndindex(*visible.shape) if visible[at]]
        if not seen: continue
        mean, var = np.mean(seen), np.var(seen)
        for c in range(g * size, (g + 1) * size):
            for at in np.ndindex(*visible.shape):
                if visible[at]: out[(c, *at)] = (x[(c, *at)] - mean) / np.sqrt(var + eps) * weight[c] + bias[c]
    return out


def plain_conv(x, conv, visible):
    "Convolution by loops with zero padding, then hidden positions emptied: x (C, *spatial), visible (*spatial of the result)."
    w, step, side = conv.weight.detach().numpy().astype(float), conv.stride[0], conv.kernel_size[0]
    p = np.pad(x, [(0, 0)] + [(conv.padding[0],) * 2] * (x.ndim - 1))
    out = np.zeros((len(w), *visible.shape))
    for at in np.ndindex(*visible.shape):
        if visible[at]: out[(slice(None), *at)] = np.tensordot(w, p[(slice(None), *[slice(step * k, step * k + side) for k in at])], w.ndim - 1)
    return out


def coarser(visible):
    "A position of half the resolution is visible where any of its parts is."
    small = np.zeros([n // 2 for n in visible.shape], bool)
    for at in np.ndindex(*visible.shape): small[tuple(k // 2 for k in at)] |= visible[at]
    return small


def plain_sparse(encoder, x, visible):
    "The sparse pass of one picture, x (C, *spatial) folded, level by level."
    detached = lambda n: (n.num_groups, n.weight.detach().numpy(), n.bias.detach().numpy(), n.eps)
    maps, x = [], plain_conv(x, encoder.net.conv_init, visible)
    for level in encoder.net.layers:
        for block in level["blocks"]:
            y = plain_conv(np.maximum(plain_norm(x, visible, *detached(block.norm1)), 0), block.conv1, visible)
            x = x + plain_conv(np.maximum(plain_norm(y, visible, *detached(block.norm2)), 0), block.conv2, visible)
        maps.append(x)
        if not isinstance(level["downsample"], nn.Identity):
            visible = coarser(visible)
            x = plain_conv(x, level["downsample"], visible)
    return maps


def unsettle_norms(encoder):
    "Norms with weights and biases that are not 1 and 0."
    g = torch.Generator().manual_seed(0)
    for m in encoder.modules():
        if isinstance(m, nn.GroupNorm):
            with torch.no_grad(): m.weight.copy_(1 + .5 * torch.randn(m.weight.shape, generator=g)), m.bias.copy_(torch.randn(m.bias.shape, generator=g))


@pytest.mark.parametrize("dims, unit", [(2, 4), (2, 2), (3, 4)])
def test_sparse_pass_is_masking_after_every_convolution(dims, unit):
    encoder = small_encoder("CNN", dims)
    unsettle_norms(encoder)
    x, mask = torch.randn(2, 1, *SIZES[dims], generator=torch.Generator().manual_seed(1)), draw_mask(2, [n // unit for n in SIZES[dims]], .6, 0)
    with torch.no_grad(): got = encoder(x, mask, "sparse")
    for i in range(2):
        hidden = mask[i].numpy()
        for axis in range(dims): hidden = hidden.repeat(unit, axis)
        seen = fold(x[i:i + 1] * ~torch.from_numpy(hidden), 2)[0].numpy().astype(float)
        expected = plain_sparse(encoder, seen, ~hidden[(slice(None, None, 2),) * dims])
        for level, m in enumerate(expected): assert np.allclose(got.maps[level][i].numpy(), m, atol=1e-4), level
        assert np.allclose(got.pooled[i].numpy(), np.concatenate([m.mean(tuple(range(1, dims + 1))) for m in expected]), atol=1e-4)


@pytest.mark.parametrize("dims", [2, 3])
def test_sparse_pass_of_nothing_hidden_is_the_whole_pass(dims):
    encoder, x = small_encoder("CNN", dims), torch.randn(2, 1, *SIZES[dims])
    unsettle_norms(encoder)
    none = torch.zeros(2, *[n // 4 for n in SIZES[dims]], dtype=torch.bool)
    with torch.no_grad(): whole, sparse, again = encoder(x), encoder(x, none, "sparse"), encoder(x)
    for a, b, c in zip(whole.maps, sparse.maps, again.maps): assert torch.allclose(a, b, atol=1e-4) and torch.equal(a, c)


@pytest.mark.parametrize("spatial", [(6, 5), (3, 4, 2)])
@pytest.mark.parametrize("groups, offset", [(1, 0.), (2, 5.), (4, 0.)])
def test_visible_group_norm_is_a_plain_loop(spatial, groups, offset):
    g = torch.Generator().manual_seed(0)
    visibility = Visibility()
    norm = VisibleGroupNorm(visibility, groups, 4)
    with torch.no_grad(): norm.weight.copy_(torch.randn(4, generator=g)), norm.bias.copy_(torch.randn(4, generator=g))
    visible = torch.rand(3, 1, *spatial, generator=g) < .4
    visible[2] = False  # a picture of which nothing is seen
    x = (torch.randn(3, 4, *spatial, generator=g) + offset) * visible
    visibility.set(visible.float())
    got = norm(x)
    for i in range(3):
        expected = plain_norm(x[i].numpy().astype(float), visible[i, 0].numpy(), groups, norm.weight.detach().numpy(), norm.bias.detach().numpy(), norm.eps)
        assert np.allclose(got[i].detach().numpy(), expected, atol=1e-4)
    visibility.set(None)
    assert torch.allclose(norm(x), F.group_norm(x, groups, norm.weight, norm.bias), atol=1e-5)


@pytest.mark.parametrize("dims", [2, 3])
def test_hidden_pixels_do_not_reach_the_encoder(dims):
    for family, name in (("CNN", "spark"), ("ViT", "mae")):
        objective, batch = small_objective(name, family, dims)
        view = objective.views(batch, 0)[0]
        hole = view.mask
        for axis in range(dims): hole = hole.repeat_interleave(4, axis + 1)
        other = View(torch.where(hole.unsqueeze(1), torch.randn_like(view.x), view.x), view.affine, view.mask)
        with torch.no_grad(): assert torch.allclose(objective.reconstruct(view), objective.reconstruct(other), atol=1e-5)


@pytest.mark.parametrize("unit", [2, 4, 8, 16, 6, 12, 24])
def test_spark_works_with_every_unit_it_accepts(unit):
    data = ImageSet(np.random.default_rng(0).integers(0, 255, (2, 1, 48, 48)).astype(np.uint8), Info("noise"))
    objective = make("spark", make_encoder("cnn-tiny", filters=8, blocks=(1, 1, 1, 1)), data.info, Plan(batch=2, size=(48, 48)), {"spark": {"unit": unit}})
    assert objective(objective.views(data.batch([0, 1]), 0), 0.).total.isfinite()


# ---------- hybrids ----------

@pytest.mark.parametrize("family", ["CNN", "ViT"])
@pytest.mark.parametrize("spec, weights", [("simclr+0.5*masked", (1, .5)), ("2*simclr+0.1*masked", (2, .1)), ("0.5*masked", (0, .5))])
def test_hybrid_is_the_weighted_sum_of_its_terms(family, spec, weights):
    hybrid, batch = small_objective(spec, family)
    loss = hybrid(hybrid.views(batch, 3), 0.)
    expected, grads = 0., {}
    for name, w in zip(("simclr", "masked"), weights):
        if not w: continue
        term, _ = small_objective(name, family)  # equal seeds: equal weights, views and masks
        alone = term(term.views(batch, 3), 0.).total
        resolved = name if name in CARDS else {"CNN": "spark", "ViT": "mae"}[family]
        assert torch.allclose(loss.parts[resolved], alone, atol=1e-6)
        expected = expected + w * alone
        for k, g in gradients(alone, term.encoder).items(): grads[k] = grads.get(k, 0) + w * g
    assert torch.allclose(loss.total, expected, atol=1e-5)
    for k, g in gradients(loss.total, hybrid.encoder).items(): assert torch.allclose(g, grads[k], atol=1e-5), k


def test_gradient_agreement_is_norm_and_cosine():
    hybrid, batch = small_objective("simclr+0.5*masked")
    loss = hybrid(hybrid.views(batch, 0), 0.)
    flat = {k: torch.cat([g.flatten() for g in gradients(v, hybrid.encoder).values()]) for k, v in loss.parts.items()}
    got = gradient_agreement(loss, hybrid.encoder)
    a, b = flat["simclr"], flat["spark"]
    expected = {"norm/simclr": a.norm(), "norm/spark": b.norm(), "cosine/simclr/spark": a @ b / a.norm() / b.norm()}
    assert got.keys() == expected.keys() and all(abs(got[k] - expected[k].item()) < 1e-4 for k in got)


def plain_surgery(grads, order):
    "Projecting conflicting gradients by loops (arXiv:2001.06782): grads (terms, P) lists of floats."
    out = []
    for i, others in enumerate(order):
        g = list(grads[i])
        for j in others:
            dot = sum(a * b for a, b in zip(g, grads[j]))
            if j != i and dot < 0:
                size = sum(b * b for b in grads[j])
                g = [a - dot / size * b for a, b in zip(g, grads[j])]
        out.append(g)
    return [sum(column) for column in zip(*out)]


@pytest.mark.parametrize("terms", [2, 3, 4])
def test_gradient_surgery_is_a_plain_loop(terms):
    g = torch.Generator().manual_seed(terms)
    grads = torch.randn(terms, 5, generator=g) - .5 * torch.arange(terms)[:, None]
    order = [torch.randperm(terms, generator=g).tolist() for _ in range(terms)]
    assert torch.allclose(operate(grads, order), torch.tensor(plain_surgery(grads.tolist(), order)), atol=1e-5)


def test_surgery_changes_the_encoder_alone():
    fixed, batch = small_objective("simclr+20*masked")
    operated, _ = small_objective("simclr+20*masked", balance="surgery")
    for o in (fixed, operated): o.backward(o(o.views(batch, 0), 0.))
    parts = fixed(fixed.views(batch, 0), 0.).parts
    rows = [torch.cat([w * g.flatten() for k, g in gradients(parts[n], fixed).items() if k.startswith("encoder.")]) for n, w in (("simclr", 1), ("spark", 20))]
    expected = operate(torch.stack(rows), [[0, 1], [0, 1]])
    got = {k: p.grad for k, p in operated.named_parameters()}
    assert torch.allclose(torch.cat([g.flatten() for k, g in got.items() if k.startswith("encoder.")]), expected, atol=1e-5)
    for k, p in fixed.named_parameters():
        if not k.startswith("encoder."): assert torch.allclose(got[k], p.grad, atol=1e-6), k


def test_uncertainty_weighs_by_what_was_learned():
    hybrid, batch = small_objective("simclr+2*masked", balance="uncertainty")
    with torch.no_grad(): hybrid.doubt.copy_(torch.tensor([.5, -9.]))  # the second lies beyond the bound of 2
    loss = hybrid(hybrid.views(batch, 0), 0.)
    a, b = loss.parts["simclr"], loss.parts["spark"]
    assert torch.allclose(loss.total, math.exp(-.5) * a + .5 + 2 * (math.exp(2) * b - 2), atol=1e-4)
    grad = torch.autograd.grad(loss.total, hybrid.doubt)[0]
    assert torch.allclose(grad, torch.tensor([1 - math.exp(-.5) * a.item(), 0.]), atol=1e-4)


@pytest.mark.parametrize("balance", ["fixed", "uncertainty", "surgery"])
def test_hybrids_hold_their_encoder_once(balance):
    hybrid, _ = small_objective("byol+0.5*masked", balance=balance)
    names = list(hybrid.state_dict())
    assert not [k for k in names if k.startswith("terms.") and ".encoder." in k and ".teacher." not in k]
    assert all(o.encoder is hybrid.encoder for o in hybrid.terms.values()) and copy.deepcopy(hybrid).terms["byol"].encoder is not hybrid.encoder


def test_encoded_pictures_are_counted():
    for spec, views in (("simclr", 2), ("spark", 1), ("simclr+0.5*spark", 3)):
        objective, batch = small_objective(spec)
        for _ in range(2):
            objective(objective.views(batch, 0), 0.)
            assert objective.memo.pictures == views * 8


# ---------- the memo of a step ----------

def test_looking_without_gradient_does_not_stop_training():
    objective, batch = small_objective("spark")
    views = objective.views(batch, 0)
    with torch.no_grad(): objective.reconstruct(views[0])
    assert any(g.abs().sum() > 0 for g in gradients(objective(views, 0.).total, objective.encoder).values())


def test_features_are_those_of_the_picture_given():
    objective, batch = small_objective("spark")
    view = objective.views(batch, 0)[0]
    with torch.no_grad():
        for k in range(40):
            view.x = torch.full_like(view.x, k / 10)  # the storage of an earlier picture may be used again
            assert torch.equal(objective.encode(view, "sparse").maps[0], objective.encoder(view.x, view.mask, "sparse").maps[0]), k


def test_weight_decay_spares_single_tokens_norms_and_biases():
    for family, spec in (("CNN", "simclr+0.5*masked"), ("ViT", "simclr+0.5*masked")):
        objective, _ = small_objective(spec, family)
        decayed, spared = ({id(p) for p in g["params"]} for g in objective.param_groups())
        names = {k: id(p) for k, p in objective.named_parameters()}
        assert not decayed & spared and decayed | spared == set(names.values())
        alone = ("bias", "norm", "cls", "hidden", "token")
        assert [k for k, i in names.items() if i in decayed and any(w in k for w in alone)] == []


# ---------- what cannot work is refused ----------

def plan(**given): return Plan(**{"steps": 5, "batch": 4, "size": (16, 16)} | given)


@pytest.mark.parametrize("spec, family, given, options, words", [
    ("nonesuch", "CNN", {}, {}, "'nonesuch'.*unknown"), ("simclr+0.5*nonesuch", "CNN", {}, {}, "'nonesuch'.*unknown"), ("", "CNN", {}, {}, "unknown"),
    ("x*simclr", "CNN", {}, {}, "weight 'x'"), ("-1*simclr", "CNN", {}, {}, "above zero"), ("0*simclr", "CNN", {}, {}, "above zero"),
    ("nan*simclr", "CNN", {}, {}, "weight|above zero"),
    pytest.param("inf*simclr", "CNN", {}, {}, "inf"),
    ("spark+masked", "CNN", {}, {}, "twice"),
    ("mae", "CNN", {}, {}, "spark on a CNN"), ("spark", "ViT", {}, {}, "mae on a ViT"), ("simclr", "CNN", {"batch": 1}, {}, "batch of 1"),
    ("mae", "ViT", {"size": (16, 18)}, {}, r"\(16, 18\)"), ("mae", "ViT", {"size": (4, 4)}, {}, r"\(4, 4\)"),
    ("spark", "CNN", {"size": (4, 4)}, {}, r"\(4, 4\)"),
    ("spark", "CNN", {}, {"spark": {"unit": 3}}, "cells of 3"), ("mae", "ViT", {}, {"mae": {"ratio": 1.}}, "ratio is 1"),
    ("simclr", "CNN", {}, {"simclr": {"temperature": 0}}, "temperature is 0"), ("simclr", "CNN", {}, {"simclr": {"tau": .1}}, "'tau'"),
    ("simclr", "CNN", {}, {"mae": {"ratio": .5}}, "'mae'"),
])
def test_impossible_objective(spec, family, given, options, words):
    with pytest.raises(InputError, match=words): make(spec, small_encoder(family), Info("small"), plan(**given), options)


@pytest.mark.parametrize("family, size, grid, mode, words", [
    ("CNN", (18, 18), None, "whole", r"\(18, 18\)"), ("ViT", (18, 16), None, "whole", r"\(18, 16\)"), ("ViT", (2, 2), None, "whole", r"\(2, 2\)"),
    ("CNN", (16, 16), (3, 3), "sparse", r"\(2, 3, 3\)"), ("CNN", (16, 16), (4, 4), "visible", "mode 'visible'"),
    ("ViT", (16, 16), (4, 4), "sparse", "mode 'sparse'"),
    ("CNN", (16, 16), (4, 4), "whole", "mode 'whole'"), ("CNN", (16, 16), None, "sparse", "mode 'sparse'"),
    *[pytest.param(f, (16, 16), (16, 16), m, r"\(2, 16, 16\)")
      for f, m in (("CNN", "sparse"), ("ViT", "token"))],
])
def test_impossible_input_of_an_encoder(family, size, grid, mode, words):
    mask = None if grid is None else torch.zeros(2, *grid, dtype=torch.bool)
    with pytest.raises(InputError, match=words): small_encoder(family)(torch.zeros(2, 1, *size), mask, mode)


def test_uneven_masks_are_refused_where_tokens_are_left_out():
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[0, 0, 0] = True
    with pytest.raises(InputError, match="same number"): small_encoder("ViT")(torch.zeros(2, 1, 16, 16), mask, "visible")


# ---------- encoders can be copied and stand alone ----------

@pytest.mark.parametrize("family", ["CNN", "ViT"])
def test_copies_of_an_encoder_do_not_share_state(family):
    encoder, x = small_encoder(family), torch.randn(2, 1, 16, 16)
    other = copy.deepcopy(encoder)
    mode, mask = ("sparse" if family == "CNN" else "visible"), draw_mask(2, (4, 4), .5, 0)
    with torch.no_grad():
        expected = encoder(x).pooled
        for p in encoder.parameters(): p.zero_()
        if family == "CNN": encoder.visibility.set(torch.zeros(2, 1, 8, 8))
        assert torch.equal(other(x).pooled, expected) and other(x, mask, mode).pooled.abs().sum() > 0


def test_objectives_need_no_truth():
    data = ImageSet(small_set().images, Info("small", classes={"y": ["a", "b"]}), labels={"y": [0, 1] * 12}, table=pd.DataFrame({"factor:f": range(24)}))
    bare = data.batch(range(4)).unlabelled()
    objective = make("simclr", small_encoder("CNN"), data.info, plan())
    assert isinstance(objective, SimCLR) and objective(objective.views(bare, 0), 0.).total.isfinite() and bare.labels == {}
