"""The watch on collapse: figures with known values, readings where the loss compares, and a sentence for collapsed runs only."""
import math
import re

import numpy as np
import pytest
import torch
from small import small_objective

from tasl_lab.objectives.collapse import collapse_note, rankme, readings, spread


def noise(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------- spread ----------

@pytest.mark.parametrize("rows, expected", [
    ([[1., 0.], [-1., 0.]], .5 * 2 ** .5),                                      # deviations 1 and 0
    ([[3., 0.], [0., 2.], [-1., 0.], [0., -5.]], 1.),                           # spread evenly, whatever the lengths
    ([[1., 0.], [0., 1.]], .5 * 2 ** .5),                                       # deviations .5 and .5
    ([[2., 1.], [4., 2.], [6., 3.]], 0.),                                       # one direction, three lengths
    ([[1., 2., 3.]], 0.),                                                       # one picture
])
def test_spread_of_known_rows(rows, expected): assert abs(spread(torch.tensor(rows)) - expected) < 1e-6


@pytest.mark.parametrize("n, width", [(48, 16), (7, 30)])
def test_spread_is_a_plain_loop(n, width):
    z = (noise(n, width) + 1).numpy().astype(float)
    unit = [r / math.sqrt(sum(v * v for v in r)) for r in z]
    expected = np.mean([math.sqrt(sum((r[i] - sum(q[i] for q in unit) / n) ** 2 for r in unit) / n) for i in range(width)]) * math.sqrt(width)
    assert abs(spread(torch.tensor(z)) - expected) < 1e-5


# ---------- RankMe ----------

@pytest.mark.parametrize("rows, center, expected", [
    (torch.eye(5), False, 5.), (torch.eye(5), True, 4.),                        # the mean was one of the directions
    (torch.ones(6, 3), False, 1.), (torch.ones(6, 3), True, 1.),                # one direction, and none, which reads 1 too
    (torch.full((6, 3), .1), True, 1.),                                         # .1 has a rounding error that must not count
    (torch.zeros(4, 3), True, 1.), (torch.ones(1, 3), True, 1.),
    (torch.diag(torch.tensor([3., 1.])), False, math.exp(-.75 * math.log(.75) - .25 * math.log(.25))),
    (torch.cat([torch.eye(3), -torch.eye(3)]) + 100, True, 3.),                 # a large common mean is no direction
])
def test_rankme_of_known_rows(rows, center, expected): assert abs(rankme(rows, center) - expected) < 1e-3


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("n, width", [(48, 16), (7, 30)])
def test_rankme_is_its_formula(n, width, center):
    z = (noise(n, width) * torch.linspace(.1, 2, width) + 1).numpy().astype(float)
    if center: z = z - z.mean(0)
    s = np.sqrt(np.linalg.eigvalsh(z.T @ z).clip(0))
    s = s[s > 1e-6]
    p = s / s.sum() + 1e-7
    assert abs(rankme(noise(n, width) * torch.linspace(.1, 2, width) + 1, center) - math.exp(-(p * np.log(p)).sum())) < 1e-3


def test_features_that_are_no_numbers_have_no_rank():
    assert math.isnan(rankme(torch.tensor([[1., float("nan")], [0., 1.]]))) and math.isnan(rankme(torch.tensor([[1., float("inf")], [0., 1.]])))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_readings_do_not_depend_on_the_type(dtype):
    z = noise(16, 8).to(torch.bfloat16)
    assert abs(spread(z.to(dtype)) - spread(z.float())) < 1e-6 and abs(rankme(z.to(dtype)) - rankme(z.float())) < 1e-4


# ---------- where it looks ----------

def test_readings_are_of_features_and_projections():
    objective, batch = small_objective("simclr")
    views = objective.views(batch, 0)
    objective(views, 0.)
    passes, got = objective.memo.pictures, readings(objective)
    with torch.no_grad():
        z = objective.encoder(views[0].x).pooled
        p = objective.head(z)
    expected = {"spread": spread(z), "rankme": rankme(z), "head/spread": spread(p), "head/rankme": rankme(p)}
    assert got.keys() == expected.keys() and all(abs(got[k] - v) < 1e-4 for k, v in expected.items())
    assert objective.memo.pictures == passes                                    # no pass of its own


def test_readings_of_hybrids_are_by_term():
    objective, batch = small_objective("spark+0.5*simclr")
    objective(objective.views(batch, 0), 0.)
    got = readings(objective)
    assert set(got) == {"spread", "rankme", "simclr/head/spread", "simclr/head/rankme"}
    whole = next(v for v in objective.terms["simclr"].views(batch, 0))          # projections are of a whole view, not of the masked one
    with torch.no_grad(): p = objective.terms["simclr"].head(objective.encoder(whole.x).pooled)
    assert 0 < got["simclr/head/spread"] <= 1.1 and abs(got["simclr/head/spread"] - spread(p)) < .5


@pytest.mark.parametrize("spec, kind", [("spark", "CNN"), ("mae", "ViT")])
def test_objectives_without_a_projection_have_readings_of_features_alone(spec, kind):
    objective, batch = small_objective(spec, kind)
    assert readings(objective) == {}                                            # nothing was seen yet
    objective(objective.views(batch, 0), 0.)
    assert set(readings(objective)) == {"spread", "rankme"}


# ---------- what it says ----------

FINE = {"spread": .2, "rankme": 20., "head/spread": .8, "head/rankme": 30.}


@pytest.mark.parametrize("now, words", [
    ({}, ""),
    ({"spread": .02, "rankme": 3.}, ""),                                        # features of trained encoders share a large mean
    ({"head/rankme": 3.}, ""),
    ({"spread": .002}, r"the features all pictures look alike \(spread 0.002 after 0.2 at the start, directions 20 after 20"),
    ({"rankme": 1.8}, r"the features only a few directions.*directions 1.8 after 20"),
    ({"head/spread": .05}, r"the projections all pictures look alike \(spread 0.05 after 0.8"),
    ({"head/rankme": 1.5}, r"the projections only a few directions.*directions 1.5 after 30"),
])
def test_note(now, words):
    note = collapse_note(FINE, FINE | now, 48)
    assert note == "" if not words else note.startswith("Collapsed") and "try" in note and re.search(words, note), note


def test_note_needs_a_fall():
    "Pictures that differ little to a fresh encoder differ little to a trained one."
    low = {"spread": .005, "rankme": 1.8}
    assert collapse_note(low, low, 48) == "" and collapse_note({"spread": .2, "rankme": 9.}, low, 48) != ""


def test_note_does_not_count_directions_of_few_pictures():
    assert collapse_note(FINE, FINE | {"rankme": 1.8}, 8) == "" and collapse_note(FINE, FINE | {"rankme": 1.8}, 16) != ""
    assert collapse_note(FINE, FINE | {"spread": 0.}, 1) == "" and collapse_note(FINE, FINE | {"spread": 0.}, 2) != ""


def test_note_names_the_term_of_a_hybrid():
    first = {"spread": .2, "rankme": 20., "byol/head/spread": .8, "byol/head/rankme": 30.}
    assert "projections of byol" in collapse_note(first, first | {"byol/head/spread": .01}, 48)


@pytest.mark.parametrize("kind", ["CNN", "ViT"])
@pytest.mark.parametrize("held", [True, False])
def test_simsiam_without_stop_gradient_is_noticed_and_with_it_is_not(held, kind):
    objective, batch = small_objective("simsiam", kind, batch=24, simsiam={"stop_gradient": held, "output_norm": False})
    optimizer, notes, first = torch.optim.AdamW(objective.param_groups(), lr=5e-3), [], None
    for step in range(31):
        loss = objective(objective.views(batch, step), 0.).total
        if step % 10 == 0:
            now = readings(objective)
            first = first or now
            notes.append(collapse_note(first, now, 24))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert notes[0] == "" and (notes[-1] == "") == held, notes
