"""Cases of harm: what counts as one, and that each can be run."""
import numpy as np
import pytest

from tasl_lab.alignment.harm import CASES, HOWS, WAYS, HarmCase, HarmConfig, Way, harm_table, pictures_of, run_case
from tasl_lab.core import InputError, rng, write_json
from tasl_lab.data.phantom import phantom_spec
from tasl_lab.objectives.cards import parse_spec
from tasl_lab.tasks.registry import make_task
from tasl_lab.tasks.scores import Scores
from tasl_lab.views import ViewSpec

TINY = HarmConfig.of(pictures=80, size=16, steps=1, batch=16, labels=40, seeds=1, finetune_steps=1)


def forged(folder, quality, seeds=4, n=160):
    "A case folder with scores of regressions whose error is 1 - quality of each way; frozen and fine-tuned alike."
    g = rng("forged", 0)
    patients = np.repeat([f"p{i:02d}" for i in range(n // 4)], 4)
    truth, hard, items = g.standard_normal(n), g.standard_normal(n), []
    for way in WAYS:
        for s in range(seeds):
            said = truth + (1 - quality[way]) * (hard + .3 * g.standard_normal(n)) + .02 * g.standard_normal()
            items.append(f"{way}-s{s}-x")
            for how in HOWS:
                found = Scores("regression:x", "r2", patients, np.arange(n), {"true": truth, "predicted": said}, ["x"])
                found.save(folder / items[-1] / how)
    write_json(folder / "case.json", {"id": "forged", "task": "regression:x", "why": "", "source": "", "config": TINY, "items": items})
    return folder


@pytest.mark.parametrize("quality, harms, undone", [
    ({"harmful": .3, "remedy": .8, "random": .6}, True, True),
    ({"harmful": .6, "remedy": .8, "random": .3}, False, True),    # merely worse than the remedy
    ({"harmful": .3, "remedy": .3, "random": .6}, True, False),    # the remedy is none
    ({"harmful": .6, "remedy": .6, "random": .6}, False, False),
])
def test_what_counts_as_harm(tmp_path, quality, harms, undone):
    table = harm_table([forged(tmp_path, quality)])
    assert table.harms.tolist() == [harms] * 3 and table.undone.tolist() == [undone] * 3
    assert (table["harm high"] < 0).tolist() == table.harms.tolist()


@pytest.mark.parametrize("name", CASES)
def test_a_case_can_be_made(name):
    "Its pictures exist, its views are views, its objectives are known, and both ways differ."
    case = CASES[name]
    assert case.id == name and case.harmful != case.remedy and case.why and case.source
    for knobs in (case.data, case.data | case.test, case.data | case.harmful.pool, case.data | case.remedy.pool):
        phantom_spec(**{k: v for k, v in knobs.items() if k != "slices"})
    for way in (case.harmful, case.remedy):
        ViewSpec(**way.views)
        parse_spec(way.objective)
    data = pictures_of(case.data, TINY, case.test)
    assert make_task(case.task, data).name == case.task and not data.leaks()


def test_views_and_pools_are_part_of_an_item(tmp_path):
    "Another view, or another pool, is another item; the untrained encoder is shared."
    ways = Way("simclr", {"flip": ()}), Way("simclr", {"flip": (.5, .5)}), Way("simclr", pool={"gain_jitter": .3})
    found = []
    for a, b in ((ways[0], ways[1]), (ways[1], ways[2])):
        folder = run_case(HarmCase("same", {"preset": "texture"}, "classification:class", a, b, "-", "-"), TINY, tmp_path)
        found.append({p.parent.name for p in folder.glob("*/item.json")})
    assert len(found[0]) == 3 and len(found[1]) == 5 and len({n for n in found[1] if n.startswith("random")}) == 1


def test_impossible_slices_are_refused():
    with pytest.raises(InputError, match="17 slices of a volume of 16"): pictures_of({"slices": 17}, TINY)
