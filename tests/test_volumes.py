"""Volumes all the way: NIfTI of made geometry through data, views, encoders, objectives, tasks and a cell of the matrix; windows and sliding windows."""
import numpy as np
import pandas as pd
import pytest
import torch
from made_files import nifti

from tasl_lab.core import InputError
from tasl_lab.data.imageset import ImageSet, Info
from tasl_lab.data.patches import patches
from tasl_lab.encoders import make_encoder
from tasl_lab.tasks.features import default_levels, extract, keep_levels
from tasl_lab.tasks.registry import make_task
from tasl_lab.tasks.volumes import memory_of, probe_volumes, slide
from tasl_lab.views import to_float

SHAPE = (20, 18, 16)  # voxels of the files, in their order
TURNED = np.array([[0, -1.5, 0, 40], [2, 0, 0, -30], [0, 0, -1., 12], [0, 0, 0, 1]])  # 2 x 1.5 x 1 mm, axes swapped and mirrored


def ball(k, shape=SHAPE, spacing=(2, 1.5, 1)):
    "Noise with a brighter ball, round in mm, and where it is."
    r = np.random.default_rng(k)
    at = np.stack(np.meshgrid(*[np.arange(n) * s for n, s in zip(shape, spacing)], indexing="ij"))
    centre, radius = [r.uniform(.3, .7) * n * s for n, s in zip(shape, spacing)], r.uniform(4, 6)
    near = ((at - np.reshape(centre, (3, 1, 1, 1))) ** 2).sum(0) < radius ** 2
    return (r.normal(300, 60, shape) + 250 * near).astype(np.int16), near.astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Twenty volumes with their masks, as others keep them: images/ and labels/."
    place = tmp_path_factory.mktemp("nifti") / "balls"
    for part in ("images", "labels"): (place / part).mkdir(parents=True)
    for k in range(20):
        x, m = ball(k)
        nifti(place / f"images/p{k:02d}.nii.gz", x, TURNED), nifti(place / f"labels/p{k:02d}.nii.gz", m, TURNED)
    return place


def test_geometry_survives(folder):
    found = ImageSet.from_folder(folder, private=False)
    assert found.dims == 3 and sorted(found.spatial) == sorted(SHAPE)
    spacing = found.table[["spacing_z", "spacing_y", "spacing_x"]].iloc[0].tolist()
    assert spacing == pytest.approx([1, 2, 1.5]) and found.spatial == (16, 20, 18)  # x of the world is the second axis of the file, y the first
    assert [int(m.sum()) for m in found.masks["regions"]] == [int(ball(k)[1].sum()) for k in range(20)]
    even = ImageSet.from_folder(folder, spacing=2., size=16)
    sides = [np.ptp(np.argwhere(m == 1), axis=0) + 1 for m in even.masks["regions"]]
    assert np.abs(np.mean([s / s.mean() for s in sides], 0) - 1).max() < .15  # a ball in mm is a ball in cubes, in each direction


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ["cnn-tiny", "vit-tiny", "monai:SegResNet?init_filters=8"])
def test_from_nifti_to_a_cell_of_the_matrix(folder, tmp_path, encoder):
    from tasl_lab.alignment.matrix import MatrixConfig, Results, cells_table, run_matrix
    data = ImageSet.from_folder(folder, spacing=2., size=16, cache=tmp_path / "cache", progress=False)
    assert isinstance(data.images, np.memmap) or isinstance(data.images.base, np.memmap)
    objective = "simclr" if encoder.startswith("monai") else "masked"
    config = MatrixConfig(objectives=[objective], tasks=["segmentation:regions"], labels=[8], seeds=2, draws=1, again=False, ceiling=False, encoder=encoder,
                          steps=2, batch=6, finetune_steps=2)
    results = Results(run_matrix(config, data, tmp_path, verbose=False))
    table = cells_table(results)
    assert len(table) == 3 and table[["mean", "low", "high"]].notna().all(axis=None) and table["mean"].between(0, 1).all()
    assert not encoder.startswith(("cnn", "monai")) or table.set_index("arm").loc["random", "mean"] > .3  # bright balls are found by chance features


def volumes(n=16, shape=(16, 32, 24)):
    x, m = zip(*(ball(k, shape, (1, 1, 1)) for k in range(n)))
    x = ((np.stack(x) - 100) / 3).clip(0, 255).astype(np.uint8)
    split = np.array(["train", "val", "test"])[np.searchsorted([.5, .7], np.arange(n) / n, side="right")]
    return ImageSet(x[:, None], Info("balls", classes={"ball": ["background", "ball"]}), masks={"ball": np.stack(m)}, table=pd.DataFrame({"split": split}))


@pytest.mark.parametrize("encoder", ["cnn-tiny", "vit-tiny"])
def test_windows_are_fitted_and_volumes_are_scored(encoder):
    whole = volumes()
    windows = patches(whole, 16, per=3, around=.7)
    task = make_task("segmentation:ball", whole)
    e = make_encoder(encoder, dims=3, **({"size": 16, "patch": 4} if encoder == "vit-tiny" else {})).eval()
    scores = probe_volumes(task, e, windows, whole, windows.ids("train"))
    assert scores.ids.tolist() == whole.ids("test").tolist() and scores.info["window"] == [16, 16, 16]
    empty = task.evaluate({"mask": np.zeros_like(whole.masks["ball"][scores.ids])}, whole, scores.ids)
    everywhere = task.evaluate({"mask": np.ones_like(whole.masks["ball"][scores.ids])}, whole, scores.ids)
    assert scores.value() > 1.5 * everywhere.value() > empty.value() == 0


def test_a_window_over_everything_is_the_whole():
    whole = volumes(8, (16, 32, 32))
    task, e = make_task("segmentation:ball", whole), make_encoder("cnn-tiny", dims=3).eval()
    bank = extract(e, whole)
    head = task.fitted(bank, whole, whole.ids("train"))
    x = to_float(whole.batch([0, 7]).images)
    with torch.no_grad(): want = task.outputs(head, keep_levels(e(x[:1]), default_levels(e.strides)), (16, 32, 32))
    got = slide(task, e, head, x, (16, 32, 32))
    assert got.shape == (2, 2, 16, 32, 32) and (got[:1] - want).abs().max() < 1e-3 * want.abs().max()
    assert slide(task, e, head, x, (16, 16, 16), overlap=0, batch=1).shape == got.shape
    flipped = slide(task, e, head, x.flip(0), (16, 16, 16))
    assert torch.allclose(flipped.flip(0), slide(task, e, head, x, (16, 16, 16)), rtol=1e-3, atol=1e-3)


def test_a_picture_larger_than_the_window_in_two_dimensions():
    r = np.random.default_rng(0)
    x = r.normal(80, 10, (12, 40, 56))
    m = np.zeros((12, 40, 56), np.uint8)
    for k in range(12): m[k, 4 + k:16 + k, 20:34] = 1
    flat = ImageSet((x + 80 * m)[:, None].clip(0, 255).astype(np.uint8), Info("flat", classes={"box": ["background", "box"]}), masks={"box": m},
                    table=pd.DataFrame({"split": ["train"] * 8 + ["test"] * 4}))
    windows = patches(flat, 32, per=4, around=.5)
    task = make_task("segmentation:box", flat)
    assert probe_volumes(task, make_encoder("cnn-tiny").eval(), windows, flat, windows.ids("train")).value() > .8


def test_windows_keep_patients_apart():
    whole = volumes()
    windows = patches(whole, 16, per=3)
    assert dict(zip(windows.table.patient, windows.table.split)) == dict(zip(whole.table.patient, whole.table.split))
    task, e = make_task("segmentation:ball", whole), make_encoder("cnn-tiny", dims=3)
    moved = whole.table.assign(split="train")
    moved.loc[0, "split"] = "test"
    other = ImageSet(whole.images, whole.info, masks=whole.masks, table=moved)
    with pytest.raises(InputError, match="in the label budget and among the test volumes"): probe_volumes(task, e, windows, other, windows.ids("train"))
    for bad in (lambda: patches(whole, 17), lambda: patches(whole, 16, per=0), lambda: patches(whole, 16, around=-1), lambda: patches(whole, 16, mask="liver")):
        with pytest.raises(InputError): bad()


def test_memory_grows_with_voxels():
    e = make_encoder("cnn-tiny", dims=3)
    small, large, two = memory_of(e, (16,) * 3), memory_of(e, (32,) * 3), memory_of(e, (16,) * 3, batch=2)
    assert 6 < large["activations_mb"] / small["activations_mb"] < 10 and 1.8 < two["activations_mb"] / small["activations_mb"] < 2.2
    weights = sum(p.numel() * 4 for p in e.parameters()) / 1e6
    assert small["weights_mb"] == large["weights_mb"] == pytest.approx(4 * weights)
