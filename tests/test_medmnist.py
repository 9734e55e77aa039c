"""MedMNIST: files of the exact form, and what can go wrong on their way here. The network is a server on this machine."""
import hashlib
import os
import re
import shutil
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from tasl_lab.core import InputError
from tasl_lab.data import medmnist as mm
from tasl_lab.data.medmnist import catalogue, fetch, medmnist, medmnist_table, official_size, rows_of

SPLITS = ("train", "val", "test")


def write(file, name, counts=(12, 4, 8), size=28, seed=0) -> dict:
    "A file as MedMNIST publishes them; its arrays."
    entry, r = catalogue()["sets"][name], np.random.default_rng(seed)
    k, tail = len(entry["classes"]), (3,) if entry["channels"] == 3 else ()
    label = lambda n: r.integers(0, 2, (n, k)) if entry["task"] == "several" else np.arange(n)[:, None] % k
    parts = {f"{s}_images": r.integers(0, 256, (n, *[size] * entry["dims"], *tail)).astype(np.uint8) for s, n in zip(SPLITS, counts)}
    parts |= {f"{s}_labels": label(n).astype(np.uint8) for s, n in zip(SPLITS, counts)}
    np.savez_compressed(file, **parts)
    return parts


class Network:
    "Serves `body` at any address: whole, from where it is asked, or broken off after `breaks` bytes, once per number."
    def __init__(self, body, breaks=(), ranges=True, length=True, status=200):
        outer, self.body, self.breaks, self.asked = self, body, list(breaks), []

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_): pass

            def do_GET(self):
                found = re.match(r"bytes=(\d+)-", self.headers.get("Range", "")) if ranges else None
                start = int(found[1]) if found else 0
                outer.asked.append((self.path, start))
                if status != 200 or start >= len(outer.body):
                    self.send_error(status if status != 200 else 416)
                    return
                left = outer.body[start:]
                self.send_response(206 if found else 200)
                if length: self.send_header("Content-Length", str(len(left)))
                self.end_headers()
                stop = outer.breaks.pop(0) if outer.breaks else len(left)
                self.wfile.write(left[:stop])
                if stop < len(left):
                    self.wfile.flush()
                    self.connection.shutdown(socket.SHUT_RDWR)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/file.npz"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


BODY = bytes(range(256)) * 2000
MD5 = hashlib.md5(BODY).hexdigest()


# --- the table -------------------------------------------------------------------------------------------------------------------------

def test_the_table_is_whole():
    sets = catalogue()["sets"]
    assert len(sets) == 18 and sum(e["dims"] == 3 for e in sets.values()) == 6
    for name, e in sets.items():
        assert list(e["md5"]) == ([28, 64] if e["dims"] == 3 else [28, 64, 128, 224]), name
        assert all(re.fullmatch("[0-9a-f]{32}", m) for m in e["md5"].values()) and e["licence"].startswith("CC BY")
        assert len(set(e["classes"])) == len(e["classes"])
    assert len(medmnist_table()) == 18
    e = sets["pathmnist"]
    assert [official_size(e, s) for s in (20, 28, 29, 64, 100, 224, 500)] == [28, 28, 64, 64, 128, 224, 224]


# --- files of the exact form -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", catalogue()["sets"])
def test_every_set_reads_from_its_file(tmp_path, name):
    entry = catalogue()["sets"][name]
    parts = write(tmp_path / f"{name}.npz", name)
    found = medmnist(tmp_path / f"{name}.npz", size=28)
    want = np.concatenate([parts[f"{s}_images"] for s in SPLITS])
    assert (found.images == (np.moveaxis(want, -1, 1) if entry["channels"] == 3 else want[:, None])).all()
    label = {"several": "findings"}.get(entry["task"], entry["task"])
    y = np.concatenate([parts[f"{s}_labels"] for s in SPLITS])
    assert (found.labels[label] == (y if entry["task"] == "several" else y[:, 0])).all() and found.info.classes[label] == entry["classes"]
    assert found.table.split.tolist() == ["train"] * 12 + ["val"] * 4 + ["test"] * 8 and found.info.licence == entry["licence"]
    assert "md5 differs" in found.info.note and "it holds [12, 4, 8] pictures" in found.info.note


def test_a_larger_size_is_chosen_and_made_smaller(tmp_path, monkeypatch):
    monkeypatch.setenv("TASL_DATA", str(tmp_path))
    (tmp_path / "medmnist").mkdir()
    file = tmp_path / "medmnist" / "bloodmnist_64.npz"
    write(file, "bloodmnist", size=64)
    monkeypatch.setitem(catalogue()["sets"]["bloodmnist"]["md5"], 64, hashlib.md5(file.read_bytes()).hexdigest())
    found = medmnist("bloodmnist", size=48)
    assert found.spatial == (48, 48) and "md5 differs" not in found.info.note


def test_some_pictures_are_the_same_whatever_is_read(tmp_path, monkeypatch):
    parts = write(tmp_path / "pathmnist.npz", "pathmnist", counts=(50, 10, 20))
    monkeypatch.setattr(mm, "BLOCK", 64)  # many blocks
    some, again, other = (medmnist(tmp_path / "pathmnist.npz", 28, n=17, seed=s) for s in (3, 3, 4))
    assert len(some) == 17 and some.sha256 == again.sha256 != other.sha256
    every = np.concatenate([np.moveaxis(parts[f"{s}_images"], -1, 1) for s in SPLITS])
    assert all((every == x).all((1, 2, 3)).any() for x in some.images)
    for ids in ([0], [49], [0, 1, 48, 49], []):
        assert (rows_of(tmp_path / "pathmnist.npz", "train_images", ids) == parts["train_images"][ids]).all()


def change(parts, **new): return parts | new


@pytest.mark.parametrize("made, said", [
    (lambda p: change(p, train_images=p["train_images"].astype(np.float32)), "float32"),
    (lambda p: change(p, train_images=p["train_images"][..., 0]), "as published"),
    (lambda p: change(p, train_labels=p["train_labels"] + 200), "9 classes"),
    (lambda p: change(p, train_labels=p["train_labels"][:, 0]), "labels have shape"),
    (lambda p: change(p, val_labels=p["val_labels"][:, 0]), "labels have shape"),
    (lambda p: change(p, train_labels=p["train_labels"][:3]), "3 rows, 12 are expected"),
    (lambda p: {k: v for k, v in p.items() if k != "val_labels"}, "val_labels"),
    (lambda p: change(p, train_images=np.array([{"a": 1}], object)), "no plain array"),
])
def test_files_of_another_form_are_refused(tmp_path, made, said):
    file = tmp_path / "pathmnist.npz"
    np.savez(file, **made(write(file, "pathmnist")))
    with pytest.raises(InputError, match=said): medmnist(file, 28)


@pytest.mark.parametrize("bytes_", [b"", b"PK\3\4 no zip", None])
def test_damaged_files_are_refused(tmp_path, bytes_):
    file = tmp_path / "pathmnist.npz"
    write(file, "pathmnist")
    whole = bytearray(file.read_bytes())
    if bytes_ is None: whole[len(whole) // 3] ^= 255  # one bit of a picture
    file.write_bytes(bytes(whole) if bytes_ is None else bytes_)
    with pytest.raises(InputError, match="pathmnist.npz: cannot be read"): medmnist(file, 28)


def test_more_than_memory_is_refused(tmp_path, monkeypatch):
    import psutil
    write(tmp_path / "pathmnist.npz", "pathmnist")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000})())
    with pytest.raises(InputError, match="ask for fewer with n="): medmnist(tmp_path / "pathmnist.npz", 28)


# --- the way here ----------------------------------------------------------------------------------------------------------------------

def test_a_file_comes_once(tmp_path):
    with Network(BODY) as network:
        for _ in range(2): assert fetch(network.url, tmp_path / "a" / "file.npz", MD5).read_bytes() == BODY
        assert len(network.asked) == 1
        (tmp_path / "a" / "file.npz").write_bytes(b"changed by hand")
        assert fetch(network.url, tmp_path / "a" / "file.npz", MD5).read_bytes() == BODY and len(network.asked) == 2
    assert os.listdir(tmp_path / "a") == ["file.npz"]


def test_an_interrupted_file_goes_on(tmp_path):
    with Network(BODY, breaks=[100_000, 70_000]) as network:
        assert fetch(network.url, tmp_path / "file.npz", MD5).read_bytes() == BODY
        assert [start for _, start in network.asked] == [0, 2 ** 16, 2 ** 17]  # whole blocks are kept
    assert os.listdir(tmp_path) == ["file.npz"]


def test_a_file_that_breaks_off_for_good_is_kept_in_part(tmp_path):
    with Network(BODY, breaks=[100_000, 10, 10, 10]) as network:
        with pytest.raises(InputError, match=r"0.1 MB are kept and the same call goes on"): fetch(network.url, tmp_path / "file.npz", MD5)
        assert os.listdir(tmp_path) == [".file.npz.part"] and len(network.asked) == 3
        assert fetch(network.url, tmp_path / "file.npz", MD5).read_bytes() == BODY  # breaks off once more, then comes
        assert network.asked[3][1] == 2 ** 16
    assert os.listdir(tmp_path) == ["file.npz"]


def test_a_server_that_cannot_go_on_begins_anew(tmp_path):
    with Network(BODY, breaks=[100_000], ranges=False) as network:
        assert fetch(network.url, tmp_path / "file.npz", MD5).read_bytes() == BODY
    (tmp_path / "file.npz").unlink()
    (tmp_path / ".file.npz.part").write_bytes(BODY + b"too much")  # of an earlier file
    with Network(BODY) as network: assert fetch(network.url, tmp_path / "file.npz", MD5).read_bytes() == BODY


def test_another_checksum_leaves_nothing(tmp_path):
    with Network(BODY[:-1] + b"!") as network, pytest.raises(InputError, match="has not the published md5"): fetch(network.url, tmp_path / "file.npz", MD5)
    assert os.listdir(tmp_path) == []


def test_a_file_of_unknown_length_is_judged_by_its_checksum(tmp_path):
    with Network(BODY, length=False) as network: assert fetch(network.url, tmp_path / "file.npz", MD5).read_bytes() == BODY
    with Network(BODY, length=False, breaks=[5000] * 4) as network, pytest.raises(InputError): fetch(network.url, tmp_path / "other.npz", MD5)
    assert not (tmp_path / "other.npz").exists()


def test_a_full_disk(tmp_path, monkeypatch):
    with Network(BODY) as network:
        with monkeypatch.context() as m:
            m.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
            with pytest.raises(InputError, match="0.5 MB are to come and 0.0 MB are free"): fetch(network.url, tmp_path / "file.npz", MD5)
        assert os.listdir(tmp_path) == []
        if not Path("/dev/full").exists(): pytest.skip("only Linux has /dev/full")
        (tmp_path / ".file.npz.part").symlink_to("/dev/full")  # a disk that fills while it is written
        with pytest.raises(InputError, match="the disk is full"): fetch(network.url, tmp_path / "file.npz", MD5)
        assert not (tmp_path / "file.npz").exists()
        (tmp_path / ".file.npz.part").unlink()
        assert fetch(network.url, tmp_path / "file.npz", MD5).read_bytes() == BODY


def test_no_network_says_where_to_put_the_file(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        free = s.getsockname()[1]
    with pytest.raises(InputError, match="put the file, fetched elsewhere, at"): fetch(f"http://127.0.0.1:{free}/x", tmp_path / "file.npz", MD5)
    with Network(BODY, status=404) as network, pytest.raises(InputError, match="404"): fetch(network.url, tmp_path / "file.npz", MD5)
    assert os.listdir(tmp_path) == []


def test_a_set_is_fetched_by_its_name(tmp_path, monkeypatch):
    from tasl_lab.data.sources import load
    write(tmp_path / "made.npz", "pneumoniamnist")
    body = (tmp_path / "made.npz").read_bytes()
    monkeypatch.setenv("TASL_DATA", str(tmp_path / "home"))
    monkeypatch.setitem(catalogue()["sets"]["pneumoniamnist"]["md5"], 28, hashlib.md5(body).hexdigest())
    with Network(body) as network:
        monkeypatch.setitem(catalogue(), "site", network.url.rpartition("/")[0])
        found = [load("medmnist:pneumoniamnist", size=28, n=n) for n in (None, 6)]
        assert network.asked == [("/pneumoniamnist.npz?download=1", 0)]
    assert [len(f) for f in found] == [24, 6] and found[0].info.name == "medmnist:pneumoniamnist"
    assert (tmp_path / "home" / "medmnist" / "pneumoniamnist.npz").read_bytes() == body
    with pytest.raises(InputError, match="did you mean 'pneumoniamnist'"): load("medmnist:pneumoniamnst")


def test_the_command_line_fetches(tmp_path, monkeypatch):
    import json

    from typer.testing import CliRunner

    from tasl_lab.cli import app
    write(tmp_path / "breastmnist.npz", "breastmnist")
    answer = CliRunner().invoke(app, ["data", "fetch", f"medmnist:{tmp_path}/breastmnist.npz", "--size", "28", "--json"])
    assert answer.exit_code == 0, answer.output
    said = json.loads(answer.output)
    assert said["pictures"] == 24 and said["licence"] == "CC BY 4.0" and str(tmp_path) not in answer.output
    answer = CliRunner().invoke(app, ["data", "fetch", "brain"])
    assert answer.exit_code == 2
