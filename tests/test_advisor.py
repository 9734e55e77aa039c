"""The advisor: answers at once and without PyTorch, every id resolves, bad books are refused, and what is measured counts."""
import json
import math
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from tasl_lab import cli
from tasl_lab.alignment.advisor import (
    GRANULARITY,
    Book,
    advise,
    case_of,
    check_rules,
    coverage,
    measured_rows,
    partial_pool,
    path_of,
    resolve,
    rule_book,
    tree,
    unreachable,
)
from tasl_lab.alignment.granularity import contour_complexity, granularity_of
from tasl_lab.config import PretrainConfig
from tasl_lab.core import InputError
from tasl_lab.data.imageset import MODALITIES
from tasl_lab.data.phantom import phantom
from tasl_lab.policies import POLICIES

BOOK = rule_book()
FACETS = BOOK.rules["facets"]
ROOT = Path(__file__).resolve().parent.parent


def call(*args): return CliRunner().invoke(cli.app, ["advise", *map(str, args)])


# --- speed ------------------------------------------------------------------------------------------------------------------------------

def test_an_answer_takes_less_than_a_second_and_no_torch():
    "Processor time of the whole program, the best of three."
    code = ("import sys, time\nfrom tasl_lab.cli import app\n"
            "try: app(['advise', '--task', 'segmentation', '--modality', 'mri', '--labels', '20', '--dims', '3', '--json'])\n"
            "except SystemExit as e: code = e.code\n"
            "heavy = [m for m in ('torch', 'monai', 'sklearn', 'pandas', 'plotly', 'scipy.stats') if m in sys.modules]\n"
            "print(code or 0, time.process_time(), *heavy, file=sys.stderr)")
    told = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True) for _ in range(3)]
    status, _, *heavy = told[0].stderr.split()
    assert status == "0" and not heavy and json.loads(told[0].stdout)["ranked"][0]["entry"] == "mae-resenc"
    assert min(float(t.stderr.split()[1]) for t in told) < float(os.environ.get("TASL_PATIENCE", "1"))


def test_the_import_is_light():
    code = "import time; start = time.process_time(); import tasl_lab.alignment.advisor; print(time.process_time() - start)"
    seconds = [float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout) for _ in range(3)]
    assert min(seconds) < .3 * float(os.environ.get("TASL_PATIENCE", "1"))


# --- the book ---------------------------------------------------------------------------------------------------------------------------

def test_the_book_is_sound():
    assert check_rules() == [] and unreachable() == []
    assert set(MODALITIES) <= set(FACETS["modality"])
    for m in FACETS["modality"]: assert BOOK.rules["view_policies"].get(m, m) in POLICIES
    assert {k for k in BOOK.rules["aliases"]} == {e["what"] for r in BOOK.rules["rules"] for e in r["rank"] if e["what"] in BOOK.rules["aliases"]}


def test_every_piece_of_evidence_says_where_it_is_from():
    for i, row in BOOK.evidence.items():
        assert set(row) == {"finding", "data", "metric", "source", "result", "verified", "says"}, i
        assert row["result"] in ("number", "direction") and row["says"] in ("paper", "review", "summary") and isinstance(row["verified"], bool)
        assert (row["says"] == "review") == i.startswith("V") and (row["says"] == "summary") == i.startswith("S")


RULE = {r["id"]: k for k, r in enumerate(BOOK.rules["rules"])}


def _put(name, **values): return lambda rules, evidence: rules["rules"][RULE[name]].update(values)


BROKEN = {
    "resolves to nothing": (_put("R04", rank=[{"what": "smid", "why": "", "evidence": ["E1"]}]), "no objective"),
    "external weights nobody knows": (_put("R04", rank=[{"what": "external:x", "why": "", "evidence": ["E1"]}]), "is in no table"),
    "an alias of nothing": (lambda rules, e: rules["aliases"]["smit"].update(nearest="ibott"), "no objective"),
    "no evidence": (_put("R24", evidence=[]), "R24: stands on no evidence that was read"),
    "evidence that nobody read": (_put("R24", evidence=["M1"]), "R24: stands on no evidence that was read"),
    "a first entry without evidence": (_put("R24", rank=[{"what": "masked", "why": "", "evidence": []}]), "R24: its first entry has no evidence"),
    "evidence in no file": (_put("R24", evidence=["E99"]), "evidence 'E99' is in no file"),
    "evidence of an entry in no file": (_put("R24", rank=[{"what": "masked", "why": "", "evidence": ["E98"]}]), "evidence 'E98' is in no file"),
    "high confidence on one piece": (_put("R04", evidence=["E1"]), "two are needed"),
    "ranked and avoided": (_put("R24", avoid=[{"what": "masked", "why": ""}]), "'masked' (masked) is both ranked and avoided"),
    "ranked and avoided under another name": (_put("R05", avoid=[{"what": "ibot", "why": ""}]), "both ranked and avoided"),
    "the same conditions": (lambda rules, e: rules["rules"].insert(-1, deepcopy(rules["rules"][RULE["R24"]]) | {"id": "R24b"}), "same conditions as R24"),
    "the same id": (lambda rules, e: rules["rules"].insert(0, deepcopy(rules["rules"][RULE["R24"]]) | {"if": {"dims": ["3"], "labels": ["L"]}}), "used twice"),
    "out of reach": (_put("R02", **{"if": {"task": ["detection"]}}), "R11: no case reaches it"),
    "a proxy nobody has": (_put("R24", proxies=["dense prob"]), "proxy 'dense prob' does not exist"),
    "a facet nobody has": (_put("R24", **{"if": {"scanner": ["a"]}}), "which is no facet"),
    "a word nobody has": (_put("R24", **{"if": {"task": ["prognosis"]}}), "task 'prognosis' is unknown"),
    "a gate of nothing": (lambda rules, e: rules["gates"][0].update(evidence=["M4"]), "G1: stands on no evidence that was read"),
    "no end": (lambda rules, e: rules["rules"].pop(), "the last rule must have no condition"),
    "confidence of its own": (_put("R24", confidence="certain"), "confidence 'certain'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_book_is_refused(name):
    change, said = BROKEN[name]
    rules, evidence = deepcopy(BOOK.rules), deepcopy(BOOK.evidence)
    change(rules, evidence)
    assert any(said in fault for fault in check_rules(Book(rules, evidence))), check_rules(Book(rules, evidence))


def test_coverage_names_what_has_no_rule():
    told = coverage()
    assert told["combinations"] == math.prod(len(FACETS[f]) for f in ("task", "modality", "dims", "labels", "compute"))
    assert sum(told["by confidence"].values()) == told["combinations"] and len(told["fallback"]) == told["by confidence"]["none"]
    for case in told["fallback"][::40]:
        a = advise(case["task"], case["modality"], {"XS": 2, "S": 20, "M": 160, "L": 10**6}[case["labels"]], int(case["dims"]), case["compute"], measured=())
        assert a.confidence == "none" and a.note.startswith("No evidence")


# --- the answer -------------------------------------------------------------------------------------------------------------------------

def every_case():
    for task in FACETS["task"]:
        for modality in FACETS["modality"]:
            kinds = [(2, 20, "laptop", 100), (2, 10**5, "gpu", None), (3, 3, "laptop", None), (3, 99, "cluster", 10**5)]
            for k, (dims, labels, compute, few) in enumerate(kinds):
                grain = ({}, {"size": .5, "contour": 2., "scope": "local"})[k % 2]
                yield task, modality, labels, dims, compute, few, grain


def test_every_answer_resolves_and_can_be_run():
    nodes = tree()
    ids, parents = {n["id"] for n in nodes}, {n["id"]: n["parent"] for n in nodes}
    for args in every_case():
        a = advise(*args, measured=())
        cited = [i for part in (a.ranked, a.avoid, a.gates) for row in part for i in row["evidence"]]
        assert set(cited) <= set(a.evidence) and all(e["verified"] and e["source"] for e in a.evidence.values())
        assert a.ranked and all(r["source"] or r["kind"] == "registry" for r in a.ranked) and {r["rule"] for r in a.ranked} <= set(a.rules)
        assert all(PretrainConfig.of(**r["config"]) for r in a.ranked if r["config"]) and a.gates
        assert set(a.nodes) <= ids and all(parents[i] in ("", *a.nodes) for i in a.nodes)
        assert not {resolve(x["what"]).key for x in a.avoid if x["what"] in ("simclr", "rotation")} & {resolve(r["entry"]).key for r in a.ranked}
        assert json.loads(json.dumps(a.as_dict())) and all(i in str(a) for i in a.rules)


def test_what_would_change_it_does():
    "Each change that is named, made alone, brings the rules that are named; one that is not named changes no ranking."
    ranks = lambda a: [resolve(r["entry"]).key for r in a.ranked]
    a = advise("segmentation", "mri", 20, dims=3, measured=())
    named = {(c["facet"], w): c for c in a.changes for w in c["to"]}
    labels = {"XS": 3, "S": 20, "M": 100, "L": 1000}
    grains = {"size": {"below-patch": .5, "small": 2, "large": 9}, "contour": {"smooth": 1, "complex": 2}, "scope": {"local": "local", "global": "global"}}
    for facet in ("labels", "modality", "compute", *GRANULARITY):
        for w in FACETS[facet]:
            given = {"modality": "mri", "labels": 20, "compute": "laptop", "granularity": {}}
            given |= {"granularity": {facet: grains[facet][w]}} if facet in grains else {facet: labels[w] if facet == "labels" else w}
            b = advise("segmentation", dims=3, measured=(), **given)
            if (facet, w) in named: assert b.rules == named[facet, w]["rules"] and ranks(b) != ranks(a)
            else: assert ranks(b) == ranks(a), (facet, w)


def test_bins_begin_and_end_where_the_file_says():
    words = lambda **kw: case_of("segmentation", "mri", **{"labels": 1} | kw)
    assert [words(labels=n)["labels"] for n in (150, 151, 1500, 1501, 20000, 20001)] == ["XS", "S", "S", "M", "M", "L"]
    assert [words(labels=n, dims=3)["labels"] for n in (5, 6, 25, 26, 200, 201)] == ["XS", "S", "S", "M", "M", "L"]
    assert [words(granularity={"size": s})["size"] for s in (.9, 1, 1.1, 3, 3.1)] == ["below-patch", "below-patch", "small", "small", "large"]
    assert words()["unlabelled"] is None and words(unlabelled=2000)["unlabelled"] == "few"


@pytest.mark.parametrize("wrong, said", [
    ({"modality": "pet"}, "use one of mri, ct"), ({"task": "prognosis"}, "use one of classification"), ({"labels": None}, "labels are missing"),
    ({"labels": -3}, "labels -3"), ({"labels": True}, "labels True"), ({"dims": 4}, "use one of 2, 3"), ({"compute": "phone"}, "use one of laptop"),
    ({"granularity": {"colour": 1}}, "use size, contour, scope"), ({"granularity": {"scope": "near"}}, "use one of local, global"),
    ({"task": []}, "no task is named"),
    ({"modality": None}, "modality is missing"), ({"measured": "nowhere"}, "holds no cells.parquet"), ({"unlabelled": float("nan")}, "unlabelled nan"),
])
def test_what_cannot_be_used_is_refused_in_one_sentence(wrong, said):
    with pytest.raises(InputError, match=said) as e: advise(**{"task": "segmentation", "modality": "mri", "labels": 20} | wrong)
    assert "\n" not in str(e.value)


def test_several_tasks_get_a_front_and_the_least_regret():
    a = advise(["classification:class", "segmentation:tissue"], "ct", 100, dims=3, compute="cluster", measured=())
    worst = {k: max(v.values()) for k, v in a.regret.items()}
    assert list(worst.values()) == sorted(worst.values()) and a.ranked[0]["objective"] == next(iter(worst))
    for k in a.front:
        assert not any(all(o[t] <= a.regret[k][t] for t in o) and o != a.regret[k] for o in a.regret.values())
    dominated = set(a.regret) - set(a.front)
    for k in dominated: assert any(all(a.regret[f][t] <= a.regret[k][t] for t in a.regret[k]) for f in a.front)
    assert advise(["segmentation", "segmentation"], "ct", 100, measured=()).rules == advise("segmentation", "ct", 100, measured=()).rules


# --- what was measured ------------------------------------------------------------------------------------------------------------------

def cells(gains, data="mine", half=.02, task="segmentation:organ"):
    common = {"data": data, "task": task, "metric": "dice", "budget": 20}
    return pd.DataFrame([common | {"arm": a, "vs_random": g, "vs_random_low": g - half, "vs_random_high": g + half} for a, g in gains.items()])


@pytest.mark.parametrize("gains, outcome", [
    ({"spark": .3, "ibot": .2, "modelsgenesis": .1}, "agrees"), ({"spark": .1, "ibot": .3}, "conflicts"), ({"spark": .2, "ibot": .2}, "open"),
    ({"spark": .1, "byol": .4}, "conflicts"), ({"spark": .3, "simclr": .1}, "agrees"), ({"byol": .3, "dino": .1}, "not measured")])
def test_measurements_agree_or_conflict(gains, outcome, tmp_path):
    table = cells(gains | {"random": np.nan})
    assert advise("segmentation", "mri", 20, dims=3, measured=table).measured["outcome"] == outcome
    table.to_parquet(tmp_path / "cells.parquet")
    for source in (tmp_path, tmp_path / "cells.parquet", [table]):
        assert advise("segmentation", "mri", 20, dims=3, measured=source).measured["outcome"] == outcome


def test_the_nearest_set_is_compared_and_several_are_pooled():
    one, other = {"spark": .3, "ibot": .1}, {"spark": .1, "ibot": .3}
    table = pd.concat([cells(one, "phantom:mri"), cells(other, "phantom:ct"), cells(other, "phantom:xray")])
    mri, ct = (advise("segmentation", m, 20, dims=3, measured=table).measured for m in ("mri", "ct"))
    assert mri["data"] == ["phantom:mri"] and mri["outcome"] == "agrees" and ct["data"] == ["phantom:ct"] and mri["gains"]["spark"]["sets"] == 3
    assert .1 < mri["gains"]["spark"]["gain"] < .3 and mri["gains"]["spark"]["low"] < mri["gains"]["spark"]["gain"] < mri["gains"]["spark"]["high"]


def test_the_record_of_the_project_has_rows_of_both_kinds_of_set():
    assert {r["data"] for r in measured_rows()} >= {"phantom:texture", "brain"} and measured_rows(()) == []


def test_pooling_draws_noisy_sets_more_and_never_past_the_mean():
    p = partial_pool([.4, .1, .1, .1, .12], [.1, .02, .02, .02, .02])
    q = partial_pool([.4, .1, .1, .1, .12], [.01, .02, .02, .02, .02])
    assert .1 < p["shrunken"][0] < q["shrunken"][0] < .4 and p["new_low"] < p["low"] < p["mean"] < p["high"] < p["new_high"]
    with pytest.raises(InputError): partial_pool([.1, .2], [.1])


# --- granularity ------------------------------------------------------------------------------------------------------------------------

def test_granularity_of_a_set_moves_the_rule():
    data = phantom(120, 64, seed=31, lesion_radius=(.02, .03), lesion_share=.9)
    a = advise("segmentation:lesion", labels=120, imageset=data, measured=())
    assert a.granularity["size"] < 1 and a.rules[-1] == "R21" and a.case["modality"] == "generic" and a.case["unlabelled"] == "few"
    assert advise("segmentation:lesion", labels=120, imageset=data, granularity={"size": 9., "contour": 1.}, measured=()).rules[-1] == "R24"
    assert granularity_of(phantom(16, 24, 3, seed=5), "detection:boxes", patch=4)["size"] > 0


def test_a_border_is_measured_alike_in_every_direction_and_size():
    y, x = np.mgrid[:64, :64] - 31.5
    square = (abs(x) < 15) & (abs(y) < 15)
    turned = abs(x) + abs(y) < 21
    assert abs(contour_complexity(square) - np.sqrt(np.pi) / 2) < .03 and contour_complexity(turned) < 1.35
    comb = square & ~((x.astype(int) % 6 < 2) & (y > -10))
    assert contour_complexity(comb) > 2 * contour_complexity(square)


# --- the command ------------------------------------------------------------------------------------------------------------------------

def test_the_command_answers_in_text_and_json(tmp_path):
    args = ["--task", "classification", "--task", "segmentation", "--modality", "ct", "--labels", 100, "--dims", 3, "--compute", "gpu"]
    told, plain = call(*args), json.loads(call(*args, "--json").stdout)
    assert told.exit_code == 0 and "Pareto front" in told.output and plain["front"] and set(plain["by_task"]) == {"classification", "segmentation"}
    page = tmp_path / "tree.html"
    assert call("--task", "detection", "--modality", "mri", "--labels", 9, "--dims", 3, "--tree", page).exit_code == 0
    assert "this case" in page.read_text() and "R02" in page.read_text()


@pytest.mark.parametrize("args, said", [
    (["--task", "segmentation", "--modality", "pet", "--labels", 3], "modality 'pet' is unknown"),
    (["--task", "segmentation", "--labels", 3], "modality is missing"),
    (["--task", "segmentation", "--modality", "mri"], "labels are missing"), (["--task", "segmentation", "--data", "nowhere", "--labels", 3], "nowhere"),
    (["--task", "segmentation", "--modality", "mri", "--labels", 3, "--tree", "tree.png"], ".html")])
def test_the_command_refuses_in_one_line(args, said):
    result = call(*args)
    assert result.exit_code == 2 and said in result.stderr and "\n" not in result.stderr.strip()


def test_the_command_reads_a_set():
    found = json.loads(call("--task", "detection:boxes", "--data", "phantom", "--pictures", 90, "--labels", 40, "--json").stdout)
    assert found["case"]["modality"] == "generic" and found["granularity"]["objects"] > 0 and found["case"]["unlabelled"] == "few"


def test_a_path_leads_to_each_rule_that_matched():
    for args in list(every_case())[::7]:
        task, modality, labels, dims, compute, few, grain = args
        case = case_of(task, modality, labels, dims, compute, few, grain)
        assert [i.split("/")[-1] for i in path_of(case)[3:]] == advise(*args, measured=()).rules
