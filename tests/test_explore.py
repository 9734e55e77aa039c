"""Maps, viewers and comparisons without a browser: other threads, many points, runs that are re-run, volumes, and what is refused."""
import threading
import time
from functools import partial
from itertools import product

import numpy as np
import pandas as pd
import pytest

from tasl_lab.alignment.embedding import MapJob, colour_of, disagreement, joint_axes, nearest, patches_of, pca_map, trust, wait_for
from tasl_lab.alignment.similarity import knn_overlap
from tasl_lab.core import InputError
from tasl_lab.data.imageset import ImageSet, Info
from tasl_lab.data.phantom import phantom
from tasl_lab.encoders import make_encoder
from tasl_lab.figures.embedding import embedding_maps, look_of, mark, remap, repaint
from tasl_lab.figures.style import alt
from tasl_lab.lab.canvas import PictureCanvas
from tasl_lab.lab.compare import Compare, who_is_right
from tasl_lab.lab.explore import Explore, thumbnails
from tasl_lab.lab.extras import large_map, volume_view
from tasl_lab.lab.viewers import Paint, PatchViewer, Segmented


def elsewhere(act):
    "Call in another thread, as JupyterLab sometimes does; what it raises is raised here."
    found = []
    def run():
        try: found.append(act())
        except Exception as e: found.append(e)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(found[0], Exception): raise found[0]
    return found[0]


@pytest.fixture(scope="module")
def data(): return phantom(60, size=32, seed=0)


@pytest.fixture(scope="module")
def encoder(): return make_encoder("cnn-tiny", filters=8, blocks=(1, 1))


@pytest.fixture(scope="module")
def vit(): return make_encoder("vit-tiny", width=48, depth=2, heads=2, patch=8, size=32)


def waves(n, spatial, seed=0):
    "Pictures with a site and a class, quickly made."
    g = np.random.default_rng(seed)
    x = g.integers(0, 255, (n, 1, *spatial), dtype=np.uint8)
    split = ["train", "train", "test", "test"] * (n // 4)
    table = pd.DataFrame({"patient": [f"p{i // 2}" for i in range(n)], "site": [f"s{i // 2 % 3}" for i in range(n)], "split": split})
    mask = np.zeros((n, *spatial), np.uint8)
    mask[(slice(None), *(slice(1, 3) for _ in spatial))] = 1
    info = Info("waves", classes={"kind": ["a", "b"], "spot": ["none", "spot"]})
    return ImageSet(x, info, labels={"kind": np.arange(n) // 2 % 2}, masks={"spot": mask}, table=table)


def test_handlers_from_both_threads(data, encoder):
    panel = Explore(encoder, data, live=True)
    panel.show()
    for call in (lambda act: act(), elsewhere):
        assert len(call(lambda: panel.select("pictures", range(7)))) == 7
        assert panel.sheet.count == 7 and "7 of 60 pictures" in panel.words.value
        assert len(call(lambda: panel.point("patches", 3))) == 8 and panel.big.count == 1
        call(lambda: panel.colour("site" if "site" in panel.choices else panel.choices[1]))
        call(lambda: setattr(panel.others, "clicked", {"index": 1, "y": 0, "x": 0, "n": time.monotonic_ns()}))
    panel.select("pictures", [])
    assert "Nothing is selected" in panel.words.value and panel.sheet.count == 0
    panel.close()


def test_without_a_mouse(data, encoder, vit):
    "What a lasso chooses, a list of groups chooses; what a click looks at, a number looks at."
    one, two = Explore(encoder, data, live=True), Compare({"cnn": encoder, "vit": vit}, data, live=True)
    for panel in (one, two):
        panel.show()
        panel.controls["colour"].value = "site"
        group = panel.controls["group"]
        name = next(v for _, v in group.options if v and "patches" not in v)
        elsewhere(partial(setattr, group, "value", name))
        site, there = name.removeprefix("pictures: ").rpartition(" (")[0], data.table.site.to_numpy(str)
        assert set(there[panel.chosen]) == {site} and len(panel.chosen) == (there[panel.ids] == site).sum() > 0
        panel.controls["number"].value = 7
        assert panel.at == 7 and "Picture 7" in panel.facts.value
        panel.controls["number"].value = 700
        said = panel.doing.value if panel is one else panel.words.value
        assert "picture 700 is not on the maps" in said and panel.at == 7
        panel.controls["clear"].click()
        assert len(panel.chosen) == 0
    shown = one.values()["patches"][one.maps["patches"].rows]
    name = next(v for _, v in one.controls["group"].options if v and v.startswith("patches: "))
    one.controls["group"].value = name
    assert f"({(shown == name.removeprefix('patches: ').rpartition(' (')[0]).sum():,})" in name
    one._lassoed("pictures", [1, 2])
    assert one.controls["group"].value is None and len(one.chosen) == 2
    one.close()
    two.close()


def controls_of(widget):
    "All widgets inside a widget that a hand can move."
    found = [widget] if hasattr(widget, "click") or hasattr(widget, "value") and type(widget).__name__ not in ("HTML", "IntProgress") else []
    return found + [w for child in getattr(widget, "children", ()) for w in controls_of(child)]


def free(widget): return widget.comm is not None and not getattr(widget, "disabled", False)


def until(there, seconds=60):
    "Wait for work in the background."
    end = time.monotonic() + seconds
    while not there() and time.monotonic() < end: time.sleep(.1)


def moved(widget):
    "Do with a widget what a hand does; what cannot be another value stays."
    if hasattr(widget, "click"): return widget.click()
    options = [o[1] if isinstance(o, tuple) else o for o in getattr(widget, "options", ())]
    if type(widget).__name__ == "SelectMultiple": widget.value = options[:2]
    elif options and type(widget).__name__ != "Combobox":
        widget.value = options[options.index(widget.value) + 1 - len(options) if widget.value in options else 0]
    elif isinstance(widget.value, bool): widget.value = not widget.value
    elif isinstance(widget.value, (int, float)):
        widget.value = min(getattr(widget, "max", 1e9), widget.value + getattr(widget, "step", 1) or 1)


@pytest.mark.slow
def test_every_control_answers_from_both_threads(data, tmp_path, monkeypatch):
    "Each control of each panel, moved from here and from another thread: nothing is raised and nothing complains."
    from ipywidgets.widgets.widget import CallbackDispatcher

    from tasl_lab.config import PretrainConfig
    from tasl_lab.lab import Lab
    raised, moves = [], {}
    def loud(self, *args, **more):
        for f in self.callbacks:
            try: f(*args, **more)
            except Exception as e: raised.append(e)
    monkeypatch.setattr(CallbackDispatcher, "__call__", loud)
    monkeypatch.setenv("TASL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    lab = Lab(data, PretrainConfig.of(objective="spark", steps=2, batch=16, precision="fp32"), live=True, out=tmp_path / "runs", tasks=(), device="cpu")
    lab.session.submit()
    assert lab.session.wait(timeout=120)
    for name in lab.names:
        began, controls = time.monotonic(), controls_of(lab.panel(name).show())
        for where, call in (("here", lambda act: act()), ("elsewhere", elsewhere)):
            until(lambda controls=controls: any(map(free, controls)))
            own = 0
            for widget in filter(free, controls):
                call(partial(moved, widget))
                own += 1
            moves[name, where] = own
        lab.session.wait(timeout=120)
        print(f"{name}: {moves[name, 'here']} and {moves[name, 'elsewhere']} moves in {time.monotonic() - began:.1f} s")
        assert not raised and not lab.session.problems, (name, raised, lab.session.problems)
    assert all(moves.values()) and list(moves) == list(product(["Choose", "Audit", "Train", "Explore", "Compare", "Decide"], ["here", "elsewhere"]))
    lab.close()
    lab.session.close()


def test_a_lasso_is_answered_once(data, encoder):
    "One message chooses on both maps; Plotly's own answer, a drawing of all points for each trace, is not given."
    panel = Explore(encoder, data, live=True)
    panel.show()
    said, figure = [], panel.figure
    for kind in ("restyle", "update", "relayout"):
        figure.observe(lambda c: c["new"] and said.append(sorted(c["new"].get("style_data", [c["name"]]))), names=f"_py2js_{kind}")
    points = {"trace_indexes": [2] * 9, "point_indexes": list(range(9)), "xs": [0] * 9, "ys": [0] * 9}
    elsewhere(lambda: setattr(figure, "_js2py_pointsCallback", {"event_type": "plotly_selected", "points": points}))
    assert list(figure.data[2].selectedpoints) == list(range(9)) and set(panel.ids[list(figure.data[0].selectedpoints)]) == set(panel.chosen)
    assert said == [[], ["selectedpoints"]], "the mouse points again; and the choice"
    assert all(t.selectedpoints is None for k, t in enumerate(figure.data) if k not in (0, 2))
    said.clear()
    empty = {"trace_indexes": [], "point_indexes": [], "xs": [], "ys": []}
    figure._js2py_pointsCallback = {"event_type": "plotly_selected", "points": empty}
    assert said == [["selectedpoints"]] and list(figure.data[2].selectedpoints) == list(range(9)), "what the page has forgotten is said again"
    panel.close()


def test_ten_thousand_points(encoder):
    "From the lasso to the thumbnails in less than a second of Python, and what is left out is said."
    many = waves(10_000, (16, 16))
    panel = Explore(encoder, many, most=10_000, live=True)
    panel.show()
    assert len(panel.figure.data[0].x) == 10_000 and "5,000 of 160,000 patches" in panel.maps["patches"].words
    panel.select("pictures", range(10))
    took = []
    for start in (0, 1000, 2000):
        began = time.perf_counter()
        panel.select("pictures", np.arange(start, start + 7000))
        took.append(time.perf_counter() - began)
    assert panel.sheet.count == 24 and "7,000 of 10,000 pictures" in panel.words.value
    assert min(took) < 1, f"lasso of 7,000 points to thumbnails: {min(took):.2f} s"
    panel.close()


def test_fifty_thousand_points_and_no_more():
    z = np.random.default_rng(0).standard_normal((50_001, 8)).astype(np.float32)
    found = pca_map(z)
    fig = embedding_maps({"pictures": found.xy}, look_of({"pictures": z[found.rows, 0]}, "x"), {"pictures": found.words})
    assert len(fig.data[0].x) == len(found.rows) == 50_000 and "50,000 of 50,001 pictures, drawn by chance" in alt(fig)


def test_reruns_leave_nothing(data, encoder, tmp_path):
    "A panel that is closed ends its map's process and its thread, also when it is made again at once."
    before, processes = set(threading.enumerate()), []
    for k in range(10):
        panel = Explore(encoder, data, live=True, cache=tmp_path / str(k))
        panel.show()
        panel.map("UMAP")
        processes += [j.process for j in panel.jobs.values()]
        panel.close()
        assert panel.wait(20)
    assert all(p.poll() is not None for p in processes) and set(threading.enumerate()) <= before and len(processes) == 20


@pytest.mark.full
def test_umap_arrives_and_is_kept(data, encoder, tmp_path):
    panel = Explore(encoder, data, live=True, cache=tmp_path)
    panel.show()
    panel.map("UMAP")
    assert panel.wait(280) and panel.maps["pictures"].method == "UMAP" and "Made in" in panel.status, panel.status
    assert np.allclose(panel.figure.data[0].x, panel.maps["pictures"].xy[:, 0])
    panel.other_seed()
    assert panel.wait(280) and panel.maps["pictures"].seed == 1 and "neighbours by UMAP 0 are neighbours by UMAP 1" in panel.status
    again = Explore(encoder, data, cache=tmp_path)
    again.map("UMAP")
    assert again.wait(30) and (again.maps["patches"].xy == wait_for(MapJob(again.patches.z, cache=tmp_path / "maps")).xy).all()
    panel.close()


def test_a_worker_that_fails_is_told(data, encoder, tmp_path):
    "What cannot be mapped is said in the panel and stops nothing."
    panel = Explore(encoder, data, live=True, cache=tmp_path)
    panel.show()
    panel.features["pictures"] = np.full((60, 8), np.nan, np.float32)
    panel.map("UMAP")
    panel.jobs["patches"].stop()
    assert panel.wait(120) and "was not made" in panel.doing.value and panel.maps["pictures"].method == "PCA"
    assert len(panel.select("pictures", [1, 2])) == 2
    panel.close()


def test_numbers_stay_in_the_original_space():
    g = np.random.default_rng(0)
    z = g.standard_normal((200, 30)).astype(np.float32)
    at, cosine = nearest(z, 4, 5)
    by_hand = z @ z[4] / np.linalg.norm(z, axis=1) / np.linalg.norm(z[4])
    by_hand[4] = -2
    assert (at == np.argsort(-by_hand)[:5]).all() and np.allclose(cosine, np.sort(by_hand)[::-1][:5], atol=1e-5)
    other = z + g.standard_normal(z.shape)
    assert np.isclose(1 - disagreement(z, other).mean(), knn_overlap(z, other))
    kept, shuffled = trust(z, pca_map(z).xy)[:2], trust(z, g.standard_normal((200, 2)))[:2]
    assert min(kept) > max(shuffled) and abs(np.mean(shuffled) - .5) < .08
    with pytest.raises(InputError, match="200 features and 9 places"): trust(z, z[:9, :2])


def test_joint_axes_of_one_encoder_are_its_principal_components():
    from sklearn.decomposition import PCA
    g = np.random.default_rng(1)
    m = g.standard_normal((6, 10, 4, 4)).astype(np.float32)
    flat = np.moveaxis(m, 1, -1).reshape(-1, 10)
    own = PCA(3).fit_transform(flat - flat.mean(0))
    axes = joint_axes({"a": m})[0]["a"].reshape(-1, 3)
    assert all(abs(np.corrcoef(own[:, k], axes[:, k])[0, 1]) > .999 for k in range(3))


def test_volumes(tmp_path):
    volumes = waves(16, (16, 16, 16))
    cnn = make_encoder("cnn-tiny", dims=3, filters=8, blocks=(1, 1))
    panel = Explore(cnn, volumes, live=True)
    panel.show()
    assert panel.patches.place.shape[1] == 3 and len(panel.select("patches", range(30))) > 0 and panel.sheet.count > 0
    panel.point("patches", 2)
    assert panel.big.count == 1
    before, where = bytes(panel.big.sheet), panel.where
    panel.controls["slice"].value = 0
    first = np.asarray(volumes.images[panel.at])[0, 0]
    assert bytes(panel.big.sheet) != before and panel.where == where == ("patches", int(panel.maps["patches"].rows[2]))
    assert (thumbnails(volumes, [panel.at], None, 16, share=.5 / 16)[0][..., 0] == first).all(), "the first slice"
    panel.close()
    view = PatchViewer(cnn, volumes, ids=[2, 3])
    view.ask(0, 5, 9)
    assert len(view.tiles()[0]["cnn-tiny"][0]) == 2
    painted = Paint(cnn, volumes, ids=[2], labels=8)
    painted.share, painted.tool = 2.5 / 16, "erase"
    assert painted.deep == [2]
    assert (painted.stroke([(2, 2)]).distance > 0).all() and painted.drawn.ndim == 3


def test_compare_links_selection(data, encoder, vit):
    panel = Compare({"cnn": encoder, "vit": vit}, data, live=True)
    panel.show()
    elsewhere(lambda: panel.select([1, 2, 3]))
    assert [list(panel.figure.data[2 * k].selectedpoints) for k in (0, 1)] == [[1, 2, 3]] * 2 and panel.sheet.count == 3
    label = next(c for c in panel.choices if c.startswith("right: "))
    panel.controls["colour"].value = label
    assert set(panel.values()) <= {"all", "none", "only cnn", "only vit", "unknown"}
    panel.select([])
    assert panel.figure.data[0].selectedpoints is None
    panel.close()
    assert who_is_right({"a": ["right"], "b": ["unknown"]}).tolist() == ["unknown"]


def test_canvas_gives_what_the_browser_needs():
    canvas = PictureCanvas(np.zeros((5, 8, 8, 3), np.uint8), "Five.", columns=3, captions="abcde")
    state = canvas.get_state()
    assert state["count"] == 5 and state["captions"] == list("abcde") and bytes(state["sheet"][:4]) == b"\x89PNG" and state["alt"] == "Five."
    heard = []
    canvas.observe(lambda c: heard.append(threading.current_thread().name), "stroke")
    canvas.stroke = [[1, 2]]
    elsewhere(lambda: setattr(canvas, "stroke", [[3, 4]]))
    assert len(set(heard)) == 2


def test_maps_change_in_place():
    g = np.random.default_rng(0)
    xy, kind = g.standard_normal((50, 2)), np.array(["a", "b"] * 25)
    look = look_of({"m": kind}, "kind")
    fig = embedding_maps({"m": xy}, look)
    mark(fig, "m", [1, 2])
    remap(fig, "m", xy[:20], look_of({"m": kind[:20]}, "kind"), "fewer")
    assert len(fig.data[0].x) == 20 and len(fig.data[1].x) == 0 and "fewer" in fig.layout.annotations[0].text
    repaint(fig, look_of({"m": xy[:20, 0].astype(np.float32)}, "x"))
    assert fig.layout.coloraxis.showscale and not any(t.visible for t in fig.data[2:])


def test_what_is_refused(data, encoder):
    with pytest.raises(InputError, match="neither an encoder nor the folder"): Explore("nowhere", data)
    with pytest.raises(InputError, match="nothing to be compared with"): Compare(encoder, data)
    with pytest.raises(InputError, match="have no 'mood'"): colour_of(data, [0], "mood")
    with pytest.raises(InputError, match="holds no maps"): patches_of(type("Bank", (), {"maps": []})())


def test_segmentations_beside_the_truth(data, encoder, vit):
    panel = Segmented({"cnn": encoder, "vit": vit}, data, live=True, labels=24, target="tissue")
    panel.show()
    assert [panel.canvases[n].count for n in ("true mask", "cnn", "vit")] == [len(panel.ids)] * 3
    masks, dice, _ = panel.predicted(panel.sources[1])
    i = int(panel.ids[0])
    planes = [np.stack([m == c for c in range(1, len(data.info.classes["tissue"]))]) for m in (masks[i], data.masks["tissue"][i])]
    both, either = (planes[0] & planes[1]).sum((1, 2)), planes[0].sum((1, 2)) + planes[1].sum((1, 2))
    assert np.isclose(dice[i], np.mean(2 * both[either > 0] / either[either > 0])) and f"Dice {dice[i]:.2f}" in panel.canvases["vit"].captions[0]
    elsewhere(lambda: setattr(panel.strip, "clicked", {"index": 1, "y": 0, "x": 0, "n": 1}))
    assert f"picture {panel.ids[1]}" in panel.words.value
    panel.close()


def test_extras_with_the_real_libraries(tmp_path):
    pytest.importorskip("jscatter", reason="jupyter-scatter is an extra")
    chosen, g = [], np.random.default_rng(0)
    widget = large_map(g.standard_normal((60_000, 2)), g.integers(0, 3, 60_000).astype(str), "kind", chosen.append)
    elsewhere(lambda: setattr(widget, "selection", np.array([3, 59_999])))
    assert chosen[-1].tolist() == [3, 59_999]
    pytest.importorskip("ipyniivue", reason="ipyniivue is an extra")
    view = volume_view(waves(4, (8, 8, 8)), 1, "spot", tmp_path)
    assert len(view.volumes) == 2 and len(list(tmp_path.glob("*.nii.gz"))) == 2


def test_a_map_of_more_points_than_plotly_draws(encoder, monkeypatch):
    import tasl_lab.lab.extras as extras
    handed = []
    monkeypatch.setattr(extras, "large_map", lambda xy, values, name, select: handed.append((xy, values, name, select)))
    panel = Explore(encoder, waves(40, (16, 16)), live=True)
    panel.show()
    panel.maps["pictures"].rows, panel.maps["pictures"].xy = panel.maps["pictures"].rows[::2], panel.maps["pictures"].xy[::2]
    panel.all_points()
    xy, values, _, select = handed[0]
    assert len(xy) == len(values) == 40
    elsewhere(lambda: select([4, 5]))
    assert panel.chosen.tolist() == [4, 5] and panel.linked[0] == [2], "of the two only the fourth is on the figure"
    monkeypatch.setattr(extras, "large_map", lambda *_: PictureCanvas())
    panel._extras()[0].click()
    assert "All 40 pictures by two principal components. Colour shows label: kind: a 20, b 20" in panel.room.children[1].value
    panel.close()
