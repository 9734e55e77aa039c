"""`tasl data check`: faults, doubles, leaks and sites are found where they were planted, and nobody is named."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from made_files import ct_series, dicom, nifti
from PIL import Image
from typer.testing import CliRunner

from tasl_lab.batch.data_card import write_card
from tasl_lab.cli import app
from tasl_lab.core import InputError
from tasl_lab.data.check import check, lesions, samples, site_signature, stratified_interval, survey
from tasl_lab.data.doubles import doubles_of, leak_sentence, near_pairs, thumbnail
from tasl_lab.data.folders import from_folder, from_manifest, hashed, reason_of
from tasl_lab.data.phantom import phantom
from tasl_lab.data.sources import load
from tasl_lab.data.splits import fold_sets, patient_folds


def scene(seed, shape=(40, 50)):
    "A smooth picture unlike any of another seed."
    r = np.random.default_rng(seed)
    rough = Image.fromarray(r.integers(0, 255, (7, 9)).astype(np.uint8))
    return np.asarray(rough.resize(shape[::-1], Image.Resampling.BICUBIC))


def put(path, x, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(x).save(path, **how)


@pytest.fixture
def folder(tmp_path):
    "Twelve patients in two classes, of two pictures each, with a mask; train and test by folder."
    for p in range(12):
        for k in range(2):
            at = tmp_path / "mine" / ("test" if p > 8 else "train") / ("ill", "well")[p % 2] / f"P{p:02d}"
            put(at / f"{k}.png", scene(10 * p + k))
            mask = np.zeros((40, 50), np.uint8)
            mask[5:5 + p + 1, 8:12] = 1
            put(at / f"{k}_mask.png", mask)
    return tmp_path / "mine"


def test_a_sound_folder_is_described(folder):
    card, found = check(folder, salt="s")
    assert card["pictures"] == 24 and card["people"]["patients"] == 12 and card["people"]["named"] and not card["unreadable"]
    assert not any(f.startswith("leak") for f in card["findings"]) and card["sizes"] == [{"value": "40 x 50", "count": 24}]
    counts = {(r["class"], r["split"]): r["count"] for r in card["balance"]}
    assert counts == {("ill", "train"): 10, ("well", "train"): 8, ("ill", "test"): 2, ("well", "test"): 4}
    row = card["lesions"][0]
    assert row["count"] == 24 and row["side (px)"] == 6.5 and row["area (px)"] == 26 and np.isclose(row["below one patch"], 8 / 24)
    table = lesions(found)
    assert np.allclose(table.patches, [max(8 / 40 * h, 8 / 50 * 4) for h in table.area / 4])


def test_faults_are_listed_by_name_where_that_is_asked(folder):
    (folder / "train/ill/P00/broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    put(folder / "train/ill/P00/grey.png", np.full((9, 9), 7, np.uint8))
    put(folder / "train/ill/P00/7_mask.png", np.ones((9, 9), np.uint8))
    own, told = (check(folder, salt="s", names=n)[0]["unreadable"] for n in (False, True))
    assert [r["fault"] for r in told] == [r["fault"] for r in own] == ["mask without picture", "damaged file", "constant picture"]
    assert [r["file"] for r in told] == ["", "train/ill/P00/broken.png", "train/ill/P00/grey.png"] and "said" not in own[0]
    assert own[1]["file"] == hashed("train/ill/P00/broken.png", "s") and "broken.png" in told[1]["said"]


@pytest.mark.parametrize("change, kind", [("copy", "equal"), ("jpeg", "near"), ("smaller", "near"), ("mirror", "mirrored"), ("flip", "mirrored")])
def test_a_double_in_another_split_is_a_leak(folder, change, kind):
    x = scene(20)  # the first picture of patient 2, who trains
    made = {"copy": x, "jpeg": x, "smaller": np.asarray(Image.fromarray(x).resize((40, 32))), "mirror": x[:, ::-1], "flip": x[::-1]}[change]
    put(folder / "test/ill/P20" / f"a.{'jpg' if change == 'jpeg' else 'png'}", made)
    card, _ = check(folder, names=True)
    pair, = card["leaks"]["across"]
    assert {pair["a"], pair["b"]} == {"train/ill/P02/0.png", f"test/ill/P20/a.{'jpg' if change == 'jpeg' else 'png'}"} and pair["kind"] == kind
    assert card["findings"][0] == "leak: pairs of pictures that look the same and stand in different splits: 1"
    with pytest.warns(UserWarning, match="leak: pictures that look the same"): found = from_folder(folder, 32, salt="s")
    assert found.info.note.startswith("leak: pictures that look the same stand in different splits, pairs: 1 " + kind) and "P02" not in found.info.note


def test_pictures_of_one_patient_may_look_alike(folder):
    put(folder / "train/ill/P02/9.png", scene(20))
    assert not check(folder)[0]["leaks"]["doubles"]
    put(folder / "train/well/P03/9.png", scene(20))
    card, _ = check(folder)
    assert len(card["leaks"]["doubles"]) == 2 and not card["leaks"]["across"] and "within one split" in card["findings"][0]


def test_a_patient_in_two_splits_is_a_leak_and_cannot_be_trained_on(tmp_path):
    for k in range(4): put(tmp_path / f"{k}.png", scene(k))
    (tmp_path / "m.csv").write_text("file,patient,split\n0.png,Jane,train\n1.png,Jane,test\n2.png,John,train\n3.png,Ann,test\n")
    card, _ = check(tmp_path / "m.csv", salt="s")
    assert card["leaks"]["patients"] == {hashed("Jane", "s"): ["test", "train"]} and card["findings"][0] == "leak: patients in more than one split: 1"
    with pytest.raises(InputError, match="in more than one split"): from_manifest(tmp_path / "m.csv", 16, salt="s")


def test_test_pictures_in_a_pool(folder, tmp_path):
    put(tmp_path / "pool/a.png", scene(100))                                            # patient 10, who tests
    put(tmp_path / "pool/b.png", scene(20))                                             # patient 2, who trains: no leak
    put(tmp_path / "pool/c.png", scene(999))
    card, _ = check(folder, tmp_path / "pool", names=True)
    assert [(r["a"], r["b"]) for r in card["leaks"]["pool"]] == [("test/ill/P10/0.png", "a.png")] and "stand in the pool 'pool': 1" in card["findings"][0]


def test_the_site_is_read_where_greys_differ_and_not_elsewhere():
    "A gain of one site is found; with the sites dealt anew to patients the interval holds chance in nearly all of eight draws."
    own = survey(phantom(120, 32, preset="lesion-grade", seed=2)).seen
    r, right = np.random.default_rng(0), 0
    for _ in range(8):
        who = {p: "AB"[i % 2] for i, p in enumerate(r.permutation(sorted({s.patient for s in own})))}
        for s in own: s.site = who[s.patient]
        told = site_signature(own)
        right += told["low"] <= .5 <= told["high"]
    assert right >= 6
    for s in own: s.features = s.features + (s.site == "A") * 2 * np.std([t.features for t in own], 0)
    assert site_signature(own)["low"] > .7 and site_signature(own)["verdict"] == "the site can be read"
    for s in own[6:]: s.site = "A"
    assert site_signature(own)["verdict"].startswith(("cannot decide", "one site"))


def test_the_interval_over_strata_covers():
    r, held = np.random.default_rng(1), 0
    for _ in range(400):
        a, b = r.normal(.6, .1, 8), r.normal(.5, .2, 15)
        _, low, high = stratified_interval(np.r_[a, b], np.repeat([0, 1], (8, 15)))
        held += low <= .55 <= high
    assert .91 < held / 400 < .99


def test_volumes_series_and_boxes_are_examined(tmp_path):
    ct_series(tmp_path / "ct" / "a", PatientID="Planted-1")
    x = np.random.default_rng(0).normal(100, 20, (8, 9, 10)).astype(np.float32)
    nifti(tmp_path / "ct" / "b.nii.gz", x)
    nifti(tmp_path / "ct" / "b_seg.nii.gz", np.uint8(x > 150))
    card, found = check(tmp_path / "ct", salt="s")
    assert card["pictures"] == 2 and {r["value"] for r in card["formats"]} == {"DICOM", "NIfTI"} and "5 x 0.7 x 0.8 mm" in {r["value"] for r in card["spacing"]}
    assert "Planted" not in json.dumps(card) and [x[0].shape for x in samples(found, 2, 32)] == [(1, 32, 32)] * 2
    write_card(card, found, tmp_path / "out")
    put(tmp_path / "b/0.png", scene(0))
    (tmp_path / "b/m.csv").write_text('file,boxes\n0.png,"[[4, 6, 12, 18, ""cell""], [1, 1, 1, 5, ""cell""]]"\n')
    card, found = check(tmp_path / "b/m.csv")
    assert card["lesions"][0]["side (px)"] == 12 and [r["fault"] for r in card["unreadable"]] == ["box without size"] and len(samples(found, 1)[0][2]) == 1


def test_a_set_in_memory_equals_its_files(folder, tmp_path):
    own = from_folder(folder, salt="s")
    own.save(tmp_path / "saved")
    a, b, c = (check(x, salt="s")[0] for x in (folder, own, tmp_path / "saved"))
    for key in ("pictures", "sizes", "greys", "leaks"): assert a[key] == b[key] == c[key]
    strip = lambda rows: [{k: v for k, v in r.items() if k not in ("truth", "class")} for r in rows if r.get("truth") != "boxes"]
    assert strip(a["lesions"]) == strip(b["lesions"]) == strip(c["lesions"])


def test_what_cannot_be_checked_is_named(tmp_path):
    with pytest.raises(InputError, match="no such file or folder"): check(tmp_path / "no")
    with pytest.raises(InputError, match="no picture to look at"): check(tmp_path)
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(InputError, match="expected a folder, a COCO file"): check(tmp_path / "a.png")


def test_every_kind_of_fault_has_a_word_without_names():
    assert reason_of("/a/b/Jane.png: an empty file; leave it out") == "empty file" and reason_of("Jane did it") == "other fault"


def test_near_pairs_do_not_depend_on_chunks_and_tell_patients_apart():
    thumbs = np.stack([thumbnail(x[None]) for x in map(scene, range(200))] + [thumbnail(scene(7)[None, :, ::-1])])
    assert near_pairs(thumbs) == [(7, 200, pytest.approx(1, abs=1e-3), True)]
    assert len(doubles_of(thumbs, list(range(201)), ["p"] * 201)) == 0
    assert near_pairs(np.zeros((3, 32, 32), np.float32)) == []


def test_a_hundred_brain_like_slices_are_no_doubles():
    "Phantoms of one anatomy, the hardest honest case: no two patients are taken for one."
    found = phantom(300, 64, preset="mri", seed=5)
    assert leak_sentence(found) == ""


def test_folds_are_by_patient_and_nested_sets_keep_everything():
    own = phantom(60, 32, preset="lesion-grade", seed=1)
    assert (patient_folds(own.table.patient, 3, 2, 1) == patient_folds(own.table.patient, 3, 2, 1)).all()
    for _, _, part in fold_sets(own, 3, 1):
        split = part.table.groupby("patient").split.nunique()
        assert (split == 1).all() and set(part.table.split) == {"train", "val", "test"} and part.images is own.images


# --- the command -----------------------------------------------------------------------------------------------------------------------

def call(*args): return CliRunner().invoke(app, [str(a) for a in args])


def test_the_command_writes_a_page_and_numbers(folder, tmp_path):
    (folder / "train/ill/P00/broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    done = call("data", "check", folder, "--out", tmp_path / "out", "--json", "--quiet")
    assert done.exit_code == 0, done.output
    told, stored = json.loads(done.stdout), json.loads((tmp_path / "out/card.json").read_text())
    assert {k: told[k] for k in stored} == json.loads(json.dumps(stored)) and stored["unreadable"][0]["fault"] == "damaged file"
    page = (tmp_path / "out/card.html").read_text()
    for part in ("summary", "faults", "leaks", "people", "classes", "lesions", "greys", "samples"): assert f'<section id="{part}"' in page
    assert "http://" not in page.split("<script")[0] and '<img src="data:' in page
    call("data", "check", folder, "--out", tmp_path / "bare", "--no-pictures", "--quiet")
    assert '<img src="data:' not in (tmp_path / "bare/card.html").read_text()
    loud = call("data", "check", folder, "--out", tmp_path / "loud")
    assert "train/ill/P00/broken.png" in loud.stderr and "broken.png" not in loud.stdout
    assert call("data", "check", tmp_path / "nothing").exit_code == 2


# --- nobody is named -------------------------------------------------------------------------------------------------------------------

PLANTED = ("Plantagenet", "Quillfeather", "Zymurgy-77")  # a name, a name and an id that occur nowhere else


def planted(root):
    "A folder in which patients are named in headers, files, folders and a COCO file; the folder itself has a neutral name."
    r = np.random.default_rng(0)
    for p in range(12):
        for k in range(3): put(root / "photos" / ("ill", "well")[p % 2] / f"Plantagenet_{p}" / f"Quillfeather{k}.png", scene(100 * p + k, (32, 32)))
    (root / "photos/ill/Plantagenet_0/Quillfeather_broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    for p in range(12):
        for k in range(2):
            at = root / "xray" / f"Plantagenet_{p}" / f"Quillfeather_{k}.dcm"
            at.parent.mkdir(parents=True, exist_ok=True)
            dicom(at, r.integers(0, 4000, (32, 32)), PatientName=f"Plantagenet^Quillfeather{p}", PatientID=f"Zymurgy-77-{p}", OtherPatientIDs="Zymurgy-77")
    (root / "xray/Plantagenet_0/Quillfeather_cut.dcm").write_bytes((root / "xray/Plantagenet_0/Quillfeather_0.dcm").read_bytes()[:700])
    table = pd.DataFrame({"file": [f"photos/{('ill', 'well')[p % 2]}/Plantagenet_{p}/Quillfeather0.png" for p in range(12)],
                          "patient": [f"Quillfeather {p}" for p in range(12)], "label": ["ab"[p % 2] for p in range(12)], "Remark": "Plantagenet"})
    pd.concat([table, table[:1].assign(file="Plantagenet_gone.png")]).to_csv(root / "list.csv", index=False)
    return {"photos": root / "photos", "xray": root / "xray", "table": root / "list.csv"}


def text_of(path) -> str:
    "Everything that a reader, or a program, could find in a file, packed or not."
    data = path.read_bytes()
    if path.suffix == ".npz":
        with np.load(path) as f: data += " ".join(str(f[k].tolist()) for k in f.files if f[k].dtype.kind in "US").encode()
    if path.suffix == ".parquet": data += pd.read_parquet(path).to_csv().encode()
    return path.name + data.decode("utf-8", "replace") + data.decode("utf-16", "replace")


def betrayed(folder, *words):
    "Files below a folder that hold one of the words."
    files = [p for p in sorted(Path(folder).rglob("*")) if p.is_file()]
    assert files, f"{folder}: nothing was written"
    return sorted({f"{p.relative_to(folder)}: {w}" for p in files for w in words if w in text_of(p) or w in str(p.relative_to(folder))})


def test_cards_and_sets_name_nobody(tmp_path, monkeypatch):
    "Cards, saved sets and what the commands print, from photographs, DICOM files and a table; the test finds names where they are let through."
    monkeypatch.chdir(tmp_path)
    where = planted(tmp_path / "data")
    for name, path in where.items():
        done = call("data", "check", path.relative_to(tmp_path), "--out", f"out/{name}", "--json", "--quiet")
        assert done.exit_code == 0 and not [w for w in (*PLANTED, str(tmp_path)) if w in done.stdout], name
        with pytest.warns(UserWarning) if name == "xray" else open(os.devnull): found = load(path, 32)
        assert found.info.group == "patient" and found.table.patient.nunique() == 12, name
        found.save(tmp_path / "out" / name / "set")
    assert betrayed("out", *PLANTED, str(tmp_path)) == []
    call("data", "check", where["photos"], "--out", "loud", "--names", "--quiet")
    assert {x.split(": ")[1] for x in betrayed("loud", *PLANTED)} == {"Plantagenet", "Quillfeather"}, "the search itself is blind"


TASL = Path(sys.executable).parent / "tasl"


def run(folder, *args):
    "A command in a folder, by its relative paths; it must succeed."
    done = subprocess.run([TASL, *args], cwd=folder, env=os.environ | {"TASL_SALT": "s"}, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_runs_and_reports_name_nobody(tmp_path):
    "Run folders, parquet and JSON of pre-trainings on photographs and on DICOM files, and the report about them: no planted name, no local path."
    planted(tmp_path / "data")
    tiny = ["--objective", "simclr", "--steps", "2", "--batch", "8", "--size", "32", "--quiet"]
    for name in ("photos", "xray"): run(tmp_path, "pretrain", "--data", f"data/{name}", *tiny, "--out", f"out/{name}")
    run(tmp_path, "report", "out", "--data", "data/photos", "--data", "data/xray", "--size", "32", "--out", "out/report.html")
    assert betrayed(tmp_path / "out", *PLANTED, str(tmp_path)) == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_demo_names_nobody(tmp_path):
    "The executed notebook, its log and record, the matrix in parquet and JSON, and the report."
    planted(tmp_path / "data")
    run(tmp_path, "demo", "--data", "data/photos", "--preset", "smoke", "--out", "out", "--quiet")
    assert {".ipynb", ".html", ".json", ".parquet", ".npz", ".txt"} <= {p.suffix for p in (tmp_path / "out").rglob("*")}
    assert betrayed(tmp_path / "out", *PLANTED, str(tmp_path)) == []


# --- real photographs ------------------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_card_of_blood_cells(extra_data, tmp_path):
    "364 photographs of unnamed patients: the two boxes without size are counted and can be named."
    done = call("data", "check", extra_data("bccd"), "--out", tmp_path, "--json", "--quiet", "--names")
    card = json.loads(done.stdout)
    assert done.exit_code == 0 and card["pictures"] == 364 and not card["people"]["named"]
    assert [r["fault"] for r in card["unreadable"]] == ["box without size"] * 2 and all("BloodImage" in r["file"] for r in card["unreadable"])
    assert {r["class"]: r["count"] for r in card["lesions"]}.keys() == {"RBC", "WBC", "Platelets"} and sum(r["count"] for r in card["lesions"]) == 4886
    assert (tmp_path / "card.html").stat().st_size < 8e6


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_blood_cells_from_a_folder_to_a_report_by_one_command(extra_data, tmp_path):
    "Pre-training, the detection matrix with intervals, and the report; no code is written."
    run(tmp_path, "demo", "--data", extra_data("bccd"), "--preset", "smoke", "--out", "out", "--quiet")
    found = json.loads((tmp_path / "out/results.json").read_text())["data"][0]
    cells = [c for c in found["cells"] if c["task"] == "detection:boxes"]
    assert {c["arm"] for c in cells} >= {"simclr", "spark", "random", "supervised"} and all(c["low"] <= c["mean"] <= c["high"] for c in cells)
    assert "2 x box without size" in found["note"] and "2 x box without size" in (tmp_path / "out/report.html").read_text()
