"""Sources by name, and the ready-made samples: small, licensed, and equal to what the library makes."""
import numpy as np
import pytest

from tasl_lab.config import PretrainConfig
from tasl_lab.core import InputError, read_json
from tasl_lab.data.brain import separation
from tasl_lab.data.imageset import ImageSet
from tasl_lab.data.sources import SAMPLES, build_samples, load, sample
from tasl_lab.lab.lesson import curve_of, records
from tasl_lab.training import load_encoder


@pytest.fixture(scope="module")
def built(tmp_path_factory): return build_samples(tmp_path_factory.mktemp("samples"))


@pytest.mark.parametrize("name", SAMPLES)
def test_a_rebuild_equals_what_is_stored(root, built, name):
    stored, again = (ImageSet.load(top / name) for top in (root / "data_samples", built))
    for a, b in zip((stored.images, *stored.masks.values()), (again.images, *again.masks.values())): assert np.array_equal(a, b)
    assert stored.sha256 == again.sha256 == sample(name).sha256, "run build_samples() and commit data_samples"
    assert (root / "data_samples" / "README.md").read_text() == (built / "README.md").read_text()


def test_files_hold_no_time(built, tmp_path):
    again = build_samples(tmp_path)
    files = sorted(p.relative_to(built) for p in built.rglob("*") if p.is_file())
    assert len(files) == 7
    for f in files: assert (built / f).read_bytes() == (again / f).read_bytes(), f


def test_samples_are_small_and_licensed(root):
    files = [p for p in (root / "data_samples").rglob("*") if p.is_file()]
    weight = {runs: sum(p.stat().st_size for p in files if ("runs" in p.parts) == runs) for runs in (True, False)}
    assert weight[False] < 4e6 and weight[True] < 20e6
    assert "Louis Collins" in (root / "data_samples" / "README.md").read_text() and "Louis Collins" in sample("brain").info.licence


def test_brain_splits_never_touch():
    found = sample("brain")
    assert separation(found.table) == 2 and not found.leaks()
    assert found.info.group == "block of one template" and found.table[found.table.split == "test"].patient.nunique() >= 12


UNKNOWN = [("brian", "brain"), ("phantom:nothing", "preset 'nothing'"), ("no/such/folder", "neither"), ("brain:x", "neither")]


@pytest.mark.parametrize("name, words", UNKNOWN)
def test_unknown_sources_are_named(name, words):
    with pytest.raises(InputError, match=words): load(name)


def test_unknown_sample_is_named():
    with pytest.raises(InputError, match="brain or phantom"): sample("heart")


def test_recorded_runs_are_whole():
    "Each record names its pictures, holds to the schema of its configuration, and its encoder opens."
    for folder in records().iterdir():
        run = read_json(folder / "run.json")
        assert {"name", "pictures", "size", "sha256"} <= set(run["data"]) and PretrainConfig.of(**run["config"]).identity(run["data"]["sha256"]) == run["id"]
        assert len(curve_of(folder)) == run["config"]["steps"] == read_json(folder / "probes.json")[-1]["step"]
        assert sum(p.numel() for p in load_encoder(folder, "cpu").parameters()) > 1e5
