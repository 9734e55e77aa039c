"""Hybrids with a name: their parts agree with independent implementations, share their passes, and add up with the weights given."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small import SIZES, gradients, small_encoder, small_objective

from tasl_lab.core import InputError
from tasl_lab.data.imageset import ImageSet, Info
from tasl_lab.objectives.base import Plan
from tasl_lab.objectives.compose import make
from tasl_lab.objectives.hybrids import Pyramid, agreement, plane_turns, scale_errors
from tasl_lab.policies import POLICIES
from tasl_lab.views import to_float, warp

KINDS = [(k, d) for k in ("CNN", "ViT") for d in (2, 3)]


def random(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------- what all of them share ----------

@pytest.mark.parametrize("spec, weights", [
    ("swinunetr", {"inpainting": 2., "rotation": .5, "contrast": .25}), ("dira", {"discrimination": .5, "restoration": 3.}),
    ("pcrlv2", {"restoration": 3., "comparison": .5}),
])
def test_total_is_the_weighted_sum_of_unweighted_parts(spec, weights):
    weighted, batch = small_objective(spec, **{spec: weights})
    plain, _ = small_objective(spec, **{spec: dict.fromkeys(weights, 1.)})
    a, b = (o(o.views(batch, 0), 0.) for o in (weighted, plain))
    every = weights | ({"local": weights["comparison"]} if spec == "pcrlv2" else {})
    assert a.parts.keys() == b.parts.keys() == every.keys()
    for k in every: assert torch.allclose(a.parts[k], b.parts[k], atol=1e-6)
    assert torch.allclose(a.total, sum(w * a.parts[k] for k, w in every.items())) and torch.allclose(b.total, sum(b.parts.values()))
    for k, part in a.parts.items():  # each part reaches the encoder
        assert any(g.abs().sum() > 0 for g in gradients(part, weighted.encoder).values()), k


@pytest.mark.parametrize("spec, passes", [("swinunetr", 2), ("dira", 2), ("pcrlv2", 4)])
def test_terms_share_one_pass_per_view(spec, passes):
    objective, batch = small_objective(spec)
    objective(objective.views(batch, 0), 0.)
    assert objective.memo.pictures == passes * 8


@pytest.mark.parametrize("spec", ["swinunetr", "dira", "pcrlv2"])
@pytest.mark.parametrize("kind", ["CNN", "ViT"])
@pytest.mark.parametrize("size", [(16, 24), (8, 12, 16)])
def test_pictures_need_not_be_square(spec, kind, size):
    data = ImageSet(np.random.default_rng(0).integers(0, 255, (4, 1, *size)).astype(np.uint8), Info("noise"))
    objective = make(spec, small_encoder(kind, len(size)), data.info, Plan(batch=4, size=size))
    views = objective.views(data.batch(range(4)), 0)
    assert objective.reconstruct(views[0]).shape == (4, 1, *size) and objective(views, 0.).total.isfinite()
    source = to_float(torch.as_tensor(data.batch(range(4)).images))
    for v in views[:2]: assert torch.allclose(warp(source, v.affine, size), v.target, atol=1e-3)  # the target is the source at the view's place


@pytest.mark.parametrize("spec", ["swinunetr", "dira", "pcrlv2"])
@pytest.mark.parametrize("dims", [2, 3])
def test_two_processes_spoil_as_one(spec, dims):
    one, batch = small_objective(spec, dims=dims)
    halves = [o.views(b, 3) for o, b in (small_objective(spec, dims=dims, batch=4, rank=r, world=2) for r in range(2))]
    for k, v in enumerate(one.views(batch, 3)): assert torch.allclose(torch.cat([h[k].x for h in halves]), v.x, atol=1e-6)


# ---------- Swin UNETR ----------

@pytest.mark.parametrize("kind, dims", KINDS)
def test_swin_views_are_one_crop_with_holes_turned(kind, dims):
    objective, batch = small_objective("swinunetr", kind, dims)
    views = objective.views(batch, 0)
    crop = next(v.x for k, v in objective.memo.views.items() if k != "source")
    seen = set()
    for v in views:
        hidden = (v.x != v.target).any(1)
        assert .05 < hidden.float().mean() < .4
        for i, k in enumerate(v.intensity["turn"].tolist()):
            assert np.array_equal(v.target[i].numpy(), np.rot90(crop[i].numpy(), k, (-2, -1)))
            mean = v.target[i, 0][~hidden[i]].mean()
            assert torch.allclose(v.x[i, 0][hidden[i]], mean, atol=1e-4)
            seen.add(k)
    assert seen == {0, 1, 2, 3} and not torch.equal(views[0].intensity["turn"], views[1].intensity["turn"])


@pytest.mark.parametrize("kind, dims", KINDS)
def test_swin_parts_are_l1_cross_entropy_and_nt_xent(kind, dims):
    from lightly.loss import NTXentLoss
    objective, batch = small_objective("swinunetr", kind, dims)
    views = objective.views(batch, 0)
    loss = objective(views, 0.)
    pooled = [objective.encoder(v.x).pooled for v in views]
    restored = [objective.decoder(objective.encoder(v.x).maps) for v in views]
    l1 = np.mean([np.abs(r.detach().numpy().astype(float) - v.target.numpy()).mean() for r, v in zip(restored, views)])
    assert abs(loss.parts["inpainting"].item() - l1) < 1e-5
    surprise = []
    for p, v in zip(pooled, views):
        for row, k in zip((p @ objective.turn.weight.T + objective.turn.bias).double().tolist(), v.intensity["turn"].tolist()):
            surprise.append(np.log(np.exp(row).sum()) - row[k])
    assert abs(loss.parts["rotation"].item() - np.mean(surprise)) < 1e-5
    theirs = NTXentLoss(.5)(*(objective.project(p) for p in pooled))
    assert torch.allclose(loss.parts["contrast"], theirs, atol=1e-5)
    ours, theirs = (gradients(x, objective) for x in (loss.parts["contrast"], theirs))
    for k in ours: assert torch.allclose(ours[k], theirs[k], atol=1e-5), k


def test_turns_keep_the_shape():
    assert [k for k, _ in plane_turns((16, 16))] == [0, 1, 2, 3] == [k for k, _ in plane_turns((4, 8, 8))]
    assert plane_turns((16, 24)) == [(0, (0, 1)), (2, (0, 1))] and plane_turns((8, 8, 4)) == [(0, (1, 2)), (2, (1, 2))]
    square, _ = small_objective("swinunetr")
    wide = make("swinunetr", small_encoder("CNN"), Info("small"), Plan(batch=4, size=(16, 24)))
    assert square.turn.out_features == 4 and wide.turn.out_features == 2


@pytest.mark.parametrize("name", ["inpainting", "rotation", "contrast"])
def test_a_term_without_weight_is_not_there(name):
    objective, batch = small_objective("swinunetr", swinunetr={name: 0})
    loss = objective(objective.views(batch, 0), 0.)
    assert {*loss.parts} == {"inpainting", "rotation", "contrast"} - {name}
    head = {"inpainting": "decoder", "rotation": "turn", "contrast": "project"}[name]
    assert not [k for k, _ in objective.named_parameters() if k.startswith(head)]


@pytest.mark.parametrize("policy", POLICIES)
def test_turns_are_asked_only_where_there_is_an_up(policy):
    given = small_encoder("CNN", channels=3), Info("small"), Plan(batch=4, size=SIZES[2], policy=policy)
    if POLICIES[policy].upright:
        assert make("swinunetr", *given).turn.out_features == 4
        return
    with pytest.raises(InputError, match=f"{policy} pictures have no canonical up.*rotation=0"): make("swinunetr", *given)
    objective = make("swinunetr", *given, {"swinunetr": {"rotation": 0}})
    batch = small_objective("simclr", channels=3, batch=4)[1]
    a, b = objective.views(batch, 0)
    assert torch.equal(a.target, b.target) and not torch.equal(a.x, b.x)  # nothing is turned


# ---------- DiRA ----------

@pytest.mark.parametrize("kind, dims", KINDS)
def test_dira_is_simsiam_and_the_mean_square(kind, dims):
    from lightly.loss import NegativeCosineSimilarity
    objective, batch = small_objective("dira", kind, dims)
    views = objective.views(batch, 0)
    loss, cosine = objective(views, 0.), NegativeCosineSimilarity()
    z = [objective.head(objective.encoder(v.x).pooled) for v in views]
    p = [objective.predictor(x) for x in z]
    theirs = 1 + (cosine(p[0], z[1].detach()) + cosine(p[1], z[0].detach())) / 2
    assert torch.allclose(loss.parts["discrimination"], theirs, atol=1e-5)
    ours, expected = (gradients(x, objective) for x in (loss.parts["discrimination"], theirs))
    for k in ours: assert torch.allclose(ours[k], expected[k], atol=1e-5), k
    restored = [objective.decoder(objective.encoder(v.x).maps).detach().numpy().astype(float) for v in views]
    squares = [((r - v.target.numpy()) ** 2).mean() for r, v in zip(restored, views)]
    assert abs(loss.parts["restoration"].item() - np.mean(squares)) < 1e-5


@pytest.mark.parametrize("spec", ["dira", "pcrlv2"])
@pytest.mark.parametrize("dims", [2, 3])
def test_targets_are_crops_without_holes_and_without_jitter(spec, dims):
    objective, batch = small_objective(spec, dims=dims)
    source = to_float(torch.as_tensor(batch.images))
    views, holes = objective.views(batch, 0), []
    for k, v in enumerate(views[:2]):
        clean = warp(source, v.affine, SIZES[dims])
        assert torch.allclose(v.target, clean, atol=1e-5)
        jittered = objective.memo.views[(k, objective.recipes()[k])].x
        hidden = (v.x != jittered).any(1)
        assert .05 < hidden.float().mean() < .4 and not torch.allclose(jittered, clean, atol=.05)
        holes.append(hidden)
    assert not torch.equal(views[0].target, views[1].target) and not torch.equal(*holes)


# ---------- PCRLv2 ----------

@pytest.mark.parametrize("spatial", [(8, 12), (4, 8, 4)])
def test_scale_errors_are_a_plain_loop(spatial):
    clean = random(2, 3, *spatial)
    restored = [random(2, 3, *[n // f for n in spatial], seed=f).requires_grad_() for f in (4, 2, 1)]
    got = scale_errors(restored, clean)
    for error, r, f in zip(got, restored, (4, 2, 1)):
        squares, slopes = [], np.zeros(r.shape)
        for at in np.ndindex(*r.shape):
            block = clean[(*at[:2], *[slice(f * k, f * k + f) for k in at[2:]])].numpy().astype(float)
            difference = r[at].item() - block.mean()
            squares.append(difference ** 2)
            slopes[at] = 2 * difference / r.numel()
        assert abs(error.item() - np.mean(squares)) < 1e-5
        slope, = torch.autograd.grad(error, r, retain_graph=True)
        assert np.allclose(slope.numpy(), slopes, atol=1e-5)
        enlarged = r
        for axis in range(2, clean.ndim): enlarged = enlarged.repeat_interleave(f, axis)
        assert torch.allclose(torch.autograd.grad(F.mse_loss(enlarged, clean), r)[0], slope, atol=1e-5)  # as at full size, as in the paper


@pytest.mark.parametrize("widths", [(4,), (8, 3, 5)])
def test_agreement_is_that_of_lightly(widths):
    from lightly.loss import NegativeCosineSimilarity
    draw = lambda seed: [random(6, w, seed=seed + i).requires_grad_() for i, w in enumerate(widths)]
    za, pa, zb, pb = (draw(10 * k) for k in range(4))
    ours, cosine = agreement((za, pa), (zb, pb)), NegativeCosineSimilarity()
    theirs = sum(1 + (cosine(p, z) + cosine(q, y)) / 2 for p, z, q, y in zip(pa, zb, pb, za)) / len(widths)
    assert torch.allclose(ours, theirs, atol=1e-5)
    for x, y in zip(torch.autograd.grad(ours, [*pa, *pb]), torch.autograd.grad(theirs, [*pa, *pb])): assert torch.allclose(x, y, atol=1e-5)
    assert torch.autograd.grad(agreement((za, pa), (zb, pb)), [*za, *zb], allow_unused=True) == (None,) * 2 * len(widths)  # targets are held still


@pytest.mark.parametrize("kind, dims, strides", [("CNN", 2, [4, 2]), ("CNN", 3, [4, 2]), ("ViT", 2, [4, 2, 1]), ("ViT", 3, [4, 2, 1])])
def test_pyramid_climbs_from_the_coarsest_level_alone(kind, dims, strides):
    encoder = small_encoder(kind, dims, 3)
    torch.manual_seed(0)
    pyramid = Pyramid(encoder, 3)
    maps = [m.detach() for m in encoder(random(2, 3, *SIZES[dims])).maps]
    stages = pyramid(maps)
    assert pyramid.strides == strides
    assert [s.shape[1:] for s in stages] == [(w, *[n // s for n in SIZES[dims]]) for w, s in zip(pyramid.widths, strides)]
    restored = pyramid.restore(stages)
    assert [r.shape[2:] for r in restored] == [tuple(n // s for n in SIZES[dims]) for s in strides[:-1]] + [SIZES[dims]]
    changed = pyramid([*[m + 1 for m in maps[:-1]], maps[-1]])
    assert all(torch.equal(a, b) for a, b in zip(stages, changed)) and not torch.equal(pyramid([m + 1 for m in maps])[0], stages[0])


@pytest.mark.parametrize("kind, dims", KINDS)
@pytest.mark.parametrize("crops", [0, 1, 3])
def test_pcrl_parts_are_means_over_views_scales_and_crops(kind, dims, crops):
    objective, batch = small_objective("pcrlv2", kind, dims, pcrlv2={"crops": crops})
    views = objective.views(batch, 0)
    assert [v.x.shape[2:] for v in views] == [SIZES[dims]] * 2 + [tuple(n // 2 for n in SIZES[dims])] * crops
    loss, vectors = objective(views, 0.), []
    for v in views:
        z = [s.flatten(2).mean(2) for s in objective.pyramid(objective.encoder(v.x).maps)]
        z = [(x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt() for x in z]
        vectors.append((z, [p(x) for p, x in zip(objective.predict, z)]))
    assert torch.allclose(loss.parts["comparison"], agreement(*vectors[:2]), atol=1e-5)
    pairs = [agreement(a, b).item() for a in vectors[:2] for b in vectors[2:]]
    assert len(pairs) == 2 * crops and ("local" in loss.parts) == bool(crops)
    if crops: assert abs(loss.parts["local"].item() - np.mean(pairs)) < 1e-5
    errors = [e.item() for v in views[:2] for e in scale_errors(objective.pyramid.restore(objective.pyramid(objective.encoder(v.x).maps)), v.target)]
    assert abs(loss.parts["restoration"].item() - np.mean(errors)) < 1e-5


def test_small_crops_cover_what_the_policy_allows():
    objective, batch = small_objective("pcrlv2", batch=16)
    low, high = objective.policy.local
    for v in objective.views(batch, 0)[2:]:
        area = torch.linalg.det(v.affine[:, :, :2]).abs() * 8 * 8 / 16 / 16
        assert area.min() > low * .8 and area.max() < high * 1.01


# ---------- what cannot work is refused ----------

@pytest.mark.parametrize("spec, given, options, words", [
    ("swinunetr", {"batch": 1}, {}, "batch of 1 for swinunetr"), ("swinunetr", {}, {"temperature": 0}, "temperature is 0"),
    ("swinunetr", {}, {"contrast": -1.}, "weight of contrast is -1"), ("swinunetr", {}, {"share": 2.}, "share"), ("swinunetr", {}, {"holes": 0}, "holes is 0"),
    ("swinunetr", {}, {"inpainting": 0, "rotation": 0, "contrast": 0}, "all 0"),
    ("dira", {"batch": 1}, {}, "batch of 1"), ("dira", {}, {"discrimination": 0}, "use inpainting"), ("dira", {}, {"restoration": -1}, "restoration is -1"),
    ("dira", {}, {"share": 0}, "share"),
    ("pcrlv2", {"batch": 1}, {}, "batch of 1 for pcrlv2"), ("pcrlv2", {}, {"crops": -1}, "crops is -1"), ("pcrlv2", {}, {"comparison": 0}, "weight of pcrlv2"),
    ("pcrlv2", {}, {"restoration": 0}, "weight of pcrlv2"), ("pcrlv2", {}, {"holes": 0}, "holes is 0"),
])
def test_what_cannot_work_is_refused(spec, given, options, words):
    plan = Plan(**{"batch": 4, "size": SIZES[2]} | given)
    with pytest.raises(InputError, match=words): make(spec, small_encoder("CNN"), Info("small"), plan, {spec: options})


def test_a_batch_of_one_will_do_without_contrast():
    objective = make("swinunetr", small_encoder("CNN"), Info("small"), Plan(batch=1, size=SIZES[2]), {"swinunetr": {"contrast": 0}})
    assert objective(objective.views(small_objective("mae", "ViT", batch=1)[1], 0), 0.).total.isfinite()
