"""Do the scores of fine-tuning order as they must? More labels are better, and labels that mean nothing score at chance."""
import numpy as np
import pytest

from tasl_lab.data.imageset import ImageSet
from tasl_lab.data.phantom import phantom
from tasl_lab.encoders import make_encoder
from tasl_lab.tasks.registry import make_task

pytestmark = pytest.mark.full
STEPS, SHARES = 200, (.05, .25, 1.)


@pytest.fixture(scope="module")
def pictures(): return phantom(1000, size=64, seed=11)


def trained(spec, set, share, seed=0, steps=STEPS):
    "Score of a fresh encoder trained on a share of the labels."
    return make_task(spec, set).finetune(make_encoder("cnn-tiny", seed=seed), set, set.budget(share, seed), seed, steps=steps).value()


@pytest.mark.parametrize("spec", ["classification:site", "segmentation:tissue", "detection:boxes"])
def test_more_labels_are_better(pictures, spec):
    few, some, every = (np.mean([trained(spec, pictures, share, seed) for seed in (0, 1)]) for share in SHARES)
    assert few < some < every, f"{spec}: {few:.3f} with 5 %, {some:.3f} with 25 %, {every:.3f} with all labels"


def test_labels_that_mean_nothing_score_at_chance(pictures):
    shuffled = np.random.default_rng(0).permutation(pictures.labels["site"])
    blind = ImageSet(pictures.images, pictures.info, labels={"site": shuffled}, table=pictures.table)
    assert abs(trained("classification:site", blind, 1., steps=60) - .5) < .1
