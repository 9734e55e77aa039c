"""The small search: equal effort for all, and cards that say what it found."""
import inspect
import json
from importlib import import_module
from pathlib import Path

import pandas as pd
import pytest

from tasl_lab.alignment.tuning import SearchConfig, search_table, trials
from tasl_lab.objectives.cards import CARDS
from tasl_lab.tasks.finetune import LIGHT, finetune

RESULTS = Path(__file__).parent.parent / "nbs" / "experiments" / "results"


@pytest.fixture(scope="module")
def recorded(): return pd.read_parquet(RESULTS / "tuning.parquet")


@pytest.mark.parametrize("name", [*CARDS, "supervised"])
def test_six_trials_that_differ(name):
    found = trials(name)
    assert len({json.dumps(t, sort_keys=True) for t in found}) == 6 and len({t["lr"] for t in found}) == 3
    for option in found[0]["options"]: assert len({json.dumps(t["options"][option]) for t in found}) == 2


@pytest.mark.parametrize("name", CARDS)
def test_cards_hold_what_the_search_chose(name, recorded):
    rows = recorded[recorded.objective == name]
    assert len(rows) == 6 and rows.chosen.sum() == 1 and rows[rows.chosen].gain.item() == rows.gain.max()
    best = rows[rows.chosen].iloc[0]
    assert {"lr": best.lr, **json.loads(best.options)}.items() <= CARDS[name].defaults.items()
    tried = {json.dumps({"lr": r.lr, "options": json.loads(r.options)}, sort_keys=True) for r in rows.itertuples()}
    assert tried == {json.dumps(t, sort_keys=True) for t in trials(name)}


def test_training_from_scratch_uses_what_the_search_chose(recorded):
    best = recorded[(recorded.objective == "supervised") & recorded.chosen].iloc[0]
    default = {k: p.default for k, p in inspect.signature(finetune).parameters.items()}
    assert default["lr"] == best.lr and (default["augment"] is LIGHT) == json.loads(best.options)["augment"]


def keywords(cls) -> dict:
    "Options of a class and their defaults; those that it hands on to its parent too."
    own = list(inspect.signature(cls.__init__).parameters.values())[4:]  # after self, encoder, info, plan
    handed = keywords(cls.__mro__[1]) if any(p.kind == p.VAR_KEYWORD for p in own) else {}
    return handed | {p.name: p.default for p in own if p.kind != p.VAR_KEYWORD}


@pytest.mark.parametrize("name", CARDS)
def test_a_class_has_the_defaults_of_its_card(name):
    module, _, attribute = CARDS[name].make.partition(":")
    assert keywords(getattr(import_module(module), attribute)) == {k: v for k, v in CARDS[name].defaults.items() if k != "lr"}


def test_cards_show_what_was_recorded():
    "The file behind the cards holds the figures of the recorded matrix, for every objective in it."
    from tasl_lab.objectives.measured import measured
    cells = pd.read_parquet(RESULTS / "objectives_cells.parquet")
    cells = cells[cells.arm.isin(CARDS)]
    assert len(cells) >= 3 * 26 and {k for k in measured() if k in CARDS} == set(cells.arm)
    for r in cells.itertuples():
        found = measured()[r.arm]["tasks"][r.task]
        assert (found["vs_random"], found["vs_random_low"], found["vs_random_high"]) == (r.vs_random, r.vs_random_low, r.vs_random_high)


def test_each_encoder_is_compared_with_its_own_random_weights():
    row = lambda o, e, v: {"objective": o, "trial": 0, "encoder": e, "lr": .1, "options": {}, "values": {"t": v}, "metrics": {"t": "dice"}, "seconds": 1.}
    table = search_table([row("random", "cnn", .5), row("random", "vit", .3), row("a", "cnn", .54), row("b", "vit", .36)]).set_index("objective")
    assert abs(table.gain["a"] - 2) < 1e-9 and abs(table.gain["b"] - 3) < 1e-9
    config = SearchConfig.of(objectives=["mae", "simclr"])
    assert config.encoder_for("mae") == "vit-tiny" and config.encoder_for("simclr") == config.encoder_for("supervised") == "cnn-tiny"
