"""Training, stopping, resuming and evaluating through the command line, on a tiny flagship."""

import json
import signal

import numpy as np
import pytest

from jaxlab import cli
from jaxlab.engine import data as data_source
from jaxlab.engine import loop

TINY = [
    "--steps", "6", "--batch", "32", "--width", "16", "--depth", "1", "--experts", "2", "--hidden", "8",
    "--heads", "2", "--log-every", "1", "--save-every", "2",
]  # fmt: skip


def run(*arguments):
    return cli.main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "whole"
    assert run("train", "--run-dir", directory, *TINY, "--quiet") == 0
    return directory


def rows(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_everything(finished):
    config = json.loads((finished / "config.json").read_text())
    assert config["recipe"] == "mutual_moe" and config["fields"]["steps"] == 6
    assert [row["step"] for row in rows(finished)] == [1, 2, 3, 4, 5, 6, 6]
    last = rows(finished)[-1]
    assert len(last["test_accuracy"]) == 2 and all(0 <= a <= 1 for a in last["test_accuracy"])
    assert {p.name for p in (finished / "plots").iterdir()} == {
        "agreement.png",
        "learning_curves.png",
        "expert_load.png",
        "confusion.png",
    }
    assert all(p.read_bytes()[:4] == b"\x89PNG" for p in (finished / "plots").iterdir())
    assert list((finished / "tensorboard").glob("events*"))
    assert (finished / "checkpoints" / "6").is_dir()


def test_eval_gives_the_same_figures_to_the_last_bit(finished, capsys):
    assert run("eval", finished, "--json") == 0
    out = json.loads(capsys.readouterr().out)
    assert set(out) >= {"step", "test_accuracy", "params_sha256"} and out["step"] == 6
    assert out["test_accuracy"] == rows(finished)[-1]["test_accuracy"]
    assert run("eval", finished, "--json") == 0
    assert json.loads(capsys.readouterr().out) == out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_goes_on_exactly(finished, tmp_path, capsys, monkeypatch, number):
    directory = tmp_path / "stopped"
    real = data_source.batch_at

    def batch_at(split, seed, step, batch):
        if step == 3:
            signal.raise_signal(number)
        return real(split, seed, step, batch)

    with monkeypatch.context() as patch:
        patch.setattr(data_source, "batch_at", batch_at)
        assert run("train", "--run-dir", directory, *TINY, "--quiet") == 75
    said = capsys.readouterr().out
    assert f"jaxlab train --resume {directory}" in said and "step 4" in said
    assert run("train", "--resume", directory, "--quiet") == 0
    assert loop.evaluate(directory) == loop.evaluate(finished)
    assert rows(directory) == rows(finished)


def test_resuming_a_finished_run_changes_nothing(finished):
    before = loop.evaluate(finished), rows(finished)
    assert run("train", "--resume", finished, "--quiet") == 0
    assert (loop.evaluate(finished), rows(finished)) == before


def test_the_seed_decides_the_run(finished, tmp_path):
    same, other = tmp_path / "same", tmp_path / "other"
    assert run("train", "--run-dir", same, *TINY, "--quiet") == 0
    assert run("train", "--run-dir", other, *TINY, "--seed", 1, "--quiet") == 0
    assert loop.evaluate(same) == loop.evaluate(finished)
    assert loop.evaluate(other)["params_sha256"] != loop.evaluate(finished)["params_sha256"]


def test_a_mesh_gives_the_same_training(finished, tmp_path):
    directory = tmp_path / "mesh"
    assert run("train", "--run-dir", directory, *TINY, "--mesh", "data=2,expert=2,peer=2", "--quiet") == 0
    for a, b in zip(rows(directory)[:6], rows(finished)[:6], strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=2e-3)


def test_progress_goes_to_stderr_and_names_the_run(tmp_path, capsys):
    assert run("train", "--run-dir", tmp_path / "r", *TINY) == 0
    captured = capsys.readouterr()
    first = captured.err.splitlines()[0]
    assert first.startswith("mutual_moe: ") and "6 steps on 1 cpu device" in first
    assert "compiling" in captured.err and "test accuracy" in captured.out and "--resume" in captured.out


BAD = [
    (["trian"], "did you mean 'train'"),
    (["train", "mutual_mo"], "did you mean 'mutual_moe'"),
    (["train", "--setps", "3"], "did you mean '--steps'"),
    (["train", "--steps", "many"], "invalid int value"),
    (["train", "--steps", "0"], "at least 1"),
    (["train", "--batch", "5000"], "1437"),
    (["train", "--data", "digit"], "did you mean 'digits'"),
    (["train", "--data", "tfds:nothing"], "not prepared"),
    (["train", "--top-k", "9"], "--top-k must be between"),
    (["train", "--heads", "5"], "must divide"),
    (["train", "--mesh", "date=2"], "did you mean 'data'"),
    (["train", "--mesh", "data=64"], "needs 64 devices"),
    (["train", "--mesh", "data=3", "--batch", "128"], "126 or 129"),
    (["train", "--mesh", "expert=3"], "3 or 6"),
    (["train", "--mesh", "peer=3"], "use 3"),
    (["eval", "nowhere"], "no config.json"),
    (["train", "--resume", "nowhere"], "no config.json"),
    (["papers", "--family", "mot"], "did you mean 'moe'"),
    (["show", "groko"], "groco"),
]


@pytest.mark.parametrize("arguments, message", BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert message in lines[-1] and "Traceback" not in "".join(lines)
    assert not list(tmp_path.glob("**/checkpoints"))


def test_a_run_directory_is_never_overwritten(finished, capsys):
    before = (finished / "metrics.jsonl").read_bytes()
    assert run("train", "--run-dir", finished, *TINY, "--quiet") == 2
    assert "is not empty" in capsys.readouterr().err
    assert run("train", "--resume", finished, "--steps", "9", "--quiet") == 2
    assert "steps: 6 then, 9 now" in capsys.readouterr().err
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_a_checkpoint_of_another_model_is_refused_by_name(finished, tmp_path, capsys):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    config = json.loads((copy / "config.json").read_text())
    config["fields"]["hidden"] = 12
    (copy / "config.json").write_text(json.dumps(config))
    assert run("eval", copy) == 2
    assert "another model" in capsys.readouterr().err


def test_traceback_on_demand():
    with pytest.raises(ValueError):
        run("train", "--mesh", "date=2", "--traceback")
