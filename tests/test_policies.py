"""View policies: recipes keep to their rules, rules to their sources, and the dyes of a slide are unmixed as by hand."""
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from tasl_lab.core import InputError
from tasl_lab.data.imageset import MODALITIES
from tasl_lab.policies import POLICIES, SOURCES, policy_for
from tasl_lab.views import STAINS, ViewSpec, make_views

ACTS = {  # what a rule speaks of, as fields of a recipe; other rules speak of crops, pairs and questions
    "flip": ("flip",), "rotation": ("rotate",), "intensity": ("brightness", "contrast", "gamma"), "color": ("color",), "stain": ("stain",),
    "blur": ("blur",), "noise": ("noise",)}
OTHERS = {"crop", "small crops", "neighbours", "rotation pretext"}
QUIET = ViewSpec()


def used(spec, fields): return any(getattr(spec, f) != getattr(QUIET, f) for f in fields)


def verdicts(policy, transform): return {r.verdict for r in policy.rules if r.transform == transform}


# ---------- rules and recipes agree ----------

def test_every_modality_has_a_policy():
    assert set(MODALITIES) == set(POLICIES) and all(p.modality == m for m, p in POLICIES.items())
    with pytest.raises(InputError, match="'photograph'"): policy_for("photograph")


@pytest.mark.parametrize("modality", POLICIES)
def test_rules_are_well_formed(modality):
    for rule in POLICIES[modality].rules:
        assert rule.transform in {*ACTS, *OTHERS} and rule.verdict in ("safe", "limited", "unsafe") and rule.evidence in SOURCES and rule.reason
    said = [(r.transform, r.verdict) for r in POLICIES[modality].rules]
    assert len(set(said)) == len(said)


def test_every_source_is_cited(): assert {r.evidence for p in POLICIES.values() for r in p.rules} == set(SOURCES)


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("modality", POLICIES)
def test_recipes_keep_to_the_rules(modality, channels):
    policy = policy_for(modality, channels)
    for transform, fields in ACTS.items():
        said = verdicts(policy, transform)
        for spec in (policy.strong, policy.mild):
            if "unsafe" in said: assert not used(spec, fields), f"{transform} is unsafe"
            if used(spec, fields): assert said, f"{transform} is used, and no rule says why"
    if "unsafe" in verdicts(policy, "small crops"): assert policy.local[0] >= .4 and policy.strong.scale[0] >= .5
    assert ("unsafe" in verdicts(policy, "rotation pretext")) == (not policy.upright) and verdicts(policy, "rotation pretext")
    if policy.upright: assert not any(policy.mild.flip[:-1])  # upside-down mirrors would take the up away


@pytest.mark.parametrize("modality", POLICIES)
def test_shares_and_mild_recipes_are_sound(modality):
    policy = POLICIES[modality]
    for low, high in (policy.strong.scale, policy.mild.scale, policy.local): assert 0 < low <= high <= 1
    assert policy.mild.scale[0] >= policy.strong.scale[0] and policy.local[0] < policy.strong.scale[1]
    assert replace(policy.mild, scale=(1., 1.), flip=()) == QUIET  # crops and mirrors alone: the rest must be restored


@pytest.mark.parametrize("modality, channels", [(m, c) for m in POLICIES for c in (1, 2, 3, 4)])
def test_colours_are_for_colour_pictures(modality, channels):
    for spec in (policy_for(modality, channels).strong, policy_for(modality, channels).mild):
        if channels == 1: assert spec.color == 0
        if channels != 3 or modality != "histology": assert spec.stain == 0
    if channels != 3:  # switching colours off changes nothing else
        assert replace(policy_for(modality, channels).strong, color=0, stain=0) == replace(POLICIES[modality].strong, color=0, stain=0)


def test_grey_pictures_stay_grey():
    x = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 4 - 2
    for modality in POLICIES:
        assert make_views(x, [policy_for(modality).strong], 0, 0)[0].x.shape == x.shape
        three = make_views(x.expand(-1, 3, -1, -1), [replace(policy_for(modality).strong, noise=0.)], 0, 0)[0].x
        assert (three - three[:, :1]).abs().max() < 1e-5


def test_radiographs_are_neither_mirrored_nor_cut_to_pieces():
    p = policy_for("xray")
    assert p.strong.flip == () == p.mild.flip and p.local[0] >= .5 and p.strong.scale[0] >= .5 and p.mild.scale[0] >= .5 and p.strong.rotate <= 10
    x = (torch.arange(64.) / 16 - 2).expand(32, 1, 64, 64)  # brighter to the right
    for spec in (p.strong, p.mild):
        v = make_views(x, [spec], 0, 0)[0]
        assert (v.x[..., -1] - v.x[..., 0]).min() > 0
        assert torch.linalg.det(v.affine[:, :, :2]).min() >= .5  # area of the source per area of the view


def test_hounsfield_units_are_left_alone():
    ct = policy_for("ct")
    for spec in (ct.strong, ct.mild): assert (spec.brightness, spec.contrast, spec.gamma, spec.color, spec.stain, spec.blur[0]) == (0,) * 6
    v = make_views(torch.full((8, 1, 32, 32), .7), [replace(ct.strong, noise=0.)], 0, 0)[0]
    assert torch.allclose(v.x, torch.full_like(v.x, .7), atol=1e-5)


def test_mirrors_turn_no_patient_upside_down():
    for modality in ("ct", "mri", "ultrasound", "fundus"): assert all(not any(s.flip[:-1]) for s in (POLICIES[modality].strong, POLICIES[modality].mild))


def test_recipes_of_mri_and_generic_are_those_of_the_records():
    gentle = dict(scale=(.4, 1.), ratio=1.2, brightness=.08, contrast=.3, gamma=.2)
    assert POLICIES["mri"].strong == ViewSpec(**gentle, flip=(0., .5), rotate=10)
    assert POLICIES["generic"].strong == ViewSpec(**gentle, flip=(.5, .5))


# ---------- dyes ----------

def slide(seed=0): return torch.rand(3, 3, 5, 4, generator=torch.Generator().manual_seed(seed)) * .9 + .05  # transmitted light, 0 to 1


def restained(light, seed=0, stain=.5):
    "Light through slides whose dyes were changed, and the factors."
    v = make_views(light * 4 - 2, [ViewSpec(stain=stain)], seed, 0)[0]
    return (v.x + 2) / 4, v.intensity["stain"]


def test_unmixing_is_a_plain_loop():
    light = slide()
    got, factor = restained(light)
    dyes = [[c / math.sqrt(sum(v * v for v in dye)) for c in dye] for dye in ([.65, .70, .29], [.07, .99, .11], [.27, .57, .78])]
    for i in range(3):
        for y in range(5):
            for x in range(4):
                density = [-math.log(light[i, c, y, x].item()) for c in range(3)]
                amount = np.linalg.solve(np.array(dyes).T, density)                      # density = sum of amount * dye
                changed = [sum(factor[i, k].item() * amount[k] * dyes[k][c] for k in range(3)) for c in range(3)]
                for c in range(3): assert abs(got[i, c, y, x].item() - min(1., math.exp(-changed[c]))) < 1e-4


@pytest.mark.parametrize("dye", [0, 1, 2])
def test_a_pure_dye_grows_in_density_alone(dye):
    h = STAINS[dye] / STAINS[dye].norm()
    light = torch.exp(-1.2 * h)[None, :, None, None].expand(4, 3, 2, 2)                  # density 1.2 of one dye
    got, factor = restained(light)
    expected = torch.exp(-1.2 * factor[:, dye, None] * h)
    assert torch.allclose(got[..., 0, 0], expected, atol=1e-4) and factor[:, dye].std() > .05


def test_haematoxylin_is_blue_and_eosin_is_pink():
    blue, pink = (torch.exp(-STAINS[k] / STAINS[k].norm()) for k in (0, 1))
    assert blue.argmax() == 2 and pink.argmax() == 0 and pink.argmin() == 1              # most light left: blue; red, and least green


def test_stain_jitter_leaves_glass_clear_and_factors_in_their_range():
    assert torch.allclose(restained(torch.ones(4, 3, 2, 2))[0], torch.ones(4, 3, 2, 2), atol=1e-5)
    factor = torch.cat([restained(slide(), s, .2)[1] for s in range(100)])
    assert factor.shape == (300, 3) and .8 <= factor.min() < .82 and 1.18 < factor.max() <= 1.2
    assert abs(np.corrcoef(factor.T.numpy())[0, 1]) < .2                                 # each dye on its own
    dark, _ = restained(torch.zeros(2, 3, 2, 2))
    assert dark.isfinite().all() and (dark >= 0).all() and (dark <= 1).all()


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_stain_jitter_is_for_rgb(channels):
    with pytest.raises(InputError, match=f"{channels} channels"): make_views(torch.zeros(1, channels, 8, 8), [POLICIES["histology"].strong], 0, 0)
    assert make_views(torch.zeros(1, channels, 8, 8), [policy_for("histology", channels).strong], 0, 0)[0].x.isfinite().all()
