"""Data sources: real digits through ArrayRecord, files, order as a pure function, and every refusal."""

import subprocess
import sys

import numpy as np
import pytest

from jaxlab.engine import data
from jaxlab.engine.errors import InputError, did_you_mean


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def test_digits_are_the_real_ones(cache, capsys):
    from sklearn.datasets import load_digits

    found = data.load("digits", cache_dir=str(cache))
    assert capsys.readouterr().out == ""
    assert found.train["x"].shape == (1437, 8, 8, 1) and found.test["x"].shape == (360, 8, 8, 1)
    assert found.train["x"].dtype == np.float32 and found.train["y"].dtype == np.int32 and found.num_classes == 10
    images, labels = load_digits(return_X_y=True)
    original = sorted(
        (row.astype(np.float32) / 16).tobytes() + bytes([label]) for row, label in zip(images, labels, strict=True)
    )
    rows = [s["x"][i].tobytes() + bytes([s["y"][i]]) for s in (found.train, found.test) for i in range(len(s["y"]))]
    assert sorted(rows) == original
    assert list(cache.glob("digits-1/**/*.array_record*"))
    assert data.load("digits", cache_dir=str(cache)).fingerprint == found.fingerprint


def test_a_damaged_set_is_prepared_again(cache):
    before = data.load("digits", cache_dir=str(cache)).fingerprint
    for file in cache.glob("digits-1/**/*.array_record*"):
        file.write_bytes(file.read_bytes()[:100])
    assert data.load("digits", cache_dir=str(cache)).fingerprint == before


def test_two_first_runs_at_once(tmp_path):
    code = f"from jaxlab.engine import data; print(data.load('digits', cache_dir={str(tmp_path)!r}).fingerprint)"
    runs = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    prints = [run.communicate(timeout=120)[0].strip() for run in runs]
    assert [run.returncode for run in runs] == [0, 0] and prints[0] == prints[1] and len(prints[0]) == 64
    assert sorted(p.name for p in tmp_path.iterdir()) == ["digits-1"]


def test_an_unwritable_cache_falls_back_to_the_run(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    found = data.load("digits", cache_dir=str(blocked), fallback_dir=str(tmp_path / "run" / "data"))
    assert len(found.train["y"]) == 1437 and (tmp_path / "run" / "data" / "digits-1").is_dir()
    with pytest.raises(InputError, match="not writable"):
        data.load("digits", cache_dir=str(blocked))


def test_order_is_a_pure_function_of_seed_and_step():
    steps = [data.batch_indices(3, s, 10, 4) for s in range(10)]
    epochs = np.concatenate(steps).reshape(4, 10)
    for epoch in epochs:
        assert sorted(epoch) == list(range(10))
    assert not np.array_equal(epochs[0], epochs[1])
    np.testing.assert_array_equal(data.batch_indices(3, 7, 10, 4), steps[7])
    assert not np.array_equal(data.batch_indices(4, 0, 10, 4), steps[0])
    assert sorted(data.batch_indices(0, 5, 10, 10)) == list(range(10))
    with pytest.raises(InputError, match="use at most 10"):
        data.batch_indices(0, 0, 10, 11)


def test_batches():
    split = {"x": np.arange(14.0, dtype=np.float32).reshape(7, 2), "y": np.arange(7, dtype=np.int32)}
    batch = data.batch_at(split, 0, 0, 3)
    np.testing.assert_array_equal(batch["x"], split["x"][batch["index"]])
    assert batch["where"].all()
    parts = list(data.eval_batches(split, 3))
    assert [p["x"].shape for p in parts] == [(3, 2)] * 3 and [p["where"].sum() for p in parts] == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate([p["y"][p["where"]] for p in parts]), split["y"])


X, Y = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32), np.arange(10) % 2


def test_npz_files_and_folders(tmp_path):
    np.savez(tmp_path / "data.npz", x=X, y=Y)
    one = data.load(str(tmp_path / "data.npz"))
    assert len(one.train["y"]) == 8 and len(one.test["y"]) == 2 and one.num_classes == 2
    assert data.load(str(tmp_path)).fingerprint == one.fingerprint
    folder = tmp_path / "two"
    folder.mkdir()
    np.savez(folder / "train.npz", x=(X * 0 + 255).astype(np.uint8), y=Y)
    np.savez(folder / "test.npz", x=(X * 0).astype(np.uint8), y=Y)
    assert data.load(str(folder)).train["x"].max() == 1.0


BAD = [
    ({"x": X}, "has no array 'y'"),
    ({"x": X, "y": Y[:5]}, "one label for each"),
    ({"x": X[:0], "y": Y[:0]}, "is empty"),
    ({"x": X, "y": Y * 0}, "one class only"),
    ({"x": X, "y": Y.astype(float)}, "labels must be integers"),
    ({"x": X, "y": Y - 1}, "between 0"),
    ({"x": X * np.nan, "y": Y}, "not finite"),
    ({"x": X.astype(str), "y": Y}, "x must be numbers"),
    ({"x": X.astype(object), "y": Y}, "object arrays"),
    ({"x": X[:3], "y": Y[:3]}, "at least 5"),
]


@pytest.mark.parametrize("arrays, message", BAD, ids=[m for _, m in BAD])
def test_bad_data_is_refused(arrays, message, tmp_path):
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(InputError, match=message):
        data.load(str(tmp_path / "data.npz"))


def test_bad_names_and_files_are_refused(tmp_path):
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 this is no archive")
    empty = tmp_path / "empty"
    empty.mkdir()
    for spec, message in (
        (str(tmp_path / "broken.npz"), "not a readable"),
        (str(empty), "no .npz at all"),
        (str(tmp_path / "absent.npz"), "no file or folder"),
        ("digit", "did you mean 'digits'"),
        ("tfds:mnist", "not prepared"),
    ):
        with pytest.raises(InputError, match=message):
            data.load(spec, data_dir=str(tmp_path))
    assert did_you_mean("zzz", ["digits"]) == ""


def test_prepared_tfds_sets_are_read(cache):
    data.load("digits", cache_dir=str(cache))
    found = data.load("tfds:jaxlab_digits", data_dir=str(cache / "digits-1"))
    assert len(found.test["y"]) == 360 and "jaxlab_digits" in found.source
