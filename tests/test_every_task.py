"""All kinds of tasks on all kinds of pictures: fitted, fine-tuned, scored, with a value per picture and an interval's raw material."""
import numpy as np
import pytest

from tasl_lab.data.crops import crops
from tasl_lab.data.folders import from_folder
from tasl_lab.data.phantom import phantom
from tasl_lab.data.sources import load
from tasl_lab.encoders import make_encoder
from tasl_lab.tasks.features import extract
from tasl_lab.tasks.registry import make_task

pytestmark = pytest.mark.slow
KINDS = {"classification", "segmentation", "detection", "regression", "reconstruction"}
SYNTHETIC = {"brain": ("classification:pathology", "segmentation:lesion", "detection:boxes", "regression:position", "reconstruction:kspace"),
             "phantom": ("classification:class", "segmentation:tissue", "detection:boxes", "regression:organ_area", "reconstruction:superresolution")}
CELLS = {"photographs": ("detection:boxes", "reconstruction:denoise"), "crops": ("classification:class", "reconstruction:denoise")}


def check(spec, set, encoder, bank):
    "A probe and a short fine-tuning end in scores that can be resampled."
    task, ids = make_task(spec, set), set.ids("train")
    own = bank if task.inputs(set) is set else extract(encoder, task.inputs(set))
    for scores in (task.probe(own, set, ids), task.finetune(encoder, set, ids, steps=2, batch=8)):
        assert np.isfinite(scores.value()) and scores.metric == next(iter(task.metrics)), spec
        assert len(scores.per_image()) == len(scores.ids) == len(scores.groups), spec
        assert scores.value(weight=np.full((2, len(scores.ids)), 2)) == pytest.approx(scores.value()), spec
    return task.kind


@pytest.mark.parametrize("name", SYNTHETIC)
def test_every_task_on_pictures_that_we_make(name):
    set = load(name, 32, n=240)
    encoder = make_encoder("cnn-tiny", set.channels)
    bank = extract(encoder, set)
    assert {check(spec, set, encoder, bank) for spec in SYNTHETIC[name]} == KINDS


@pytest.mark.parametrize("kind", CELLS)
def test_tasks_on_photographs(extra_data, kind):
    set = from_folder(extra_data("bccd"), (96, 128), errors="skip", modality="microscopy", salt="s")
    set = set.subset(np.arange(0, len(set), 4))
    if kind == "crops": set = crops(set, 32)
    encoder = make_encoder("cnn-tiny", set.channels)
    bank = extract(encoder, set)
    for spec in CELLS[kind]: check(spec, set, encoder, bank)


@pytest.mark.parametrize("spec", ["segmentation:tissue", "detection:boxes"])
def test_volumes(spec):
    set = phantom(60, size=16, dims=3)
    encoder = make_encoder("cnn-tiny", dims=3)
    check(spec, set, encoder, extract(encoder, set))
