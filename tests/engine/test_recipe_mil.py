"""The recipe `mil` through the command line: a few steps, its figures and its picture; and every model's outputs."""

import jax
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from jaxlab import cli
from jaxlab.engine import recipes_mil
from jaxlab.engine.recipes import find_recipe


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("JAXLAB_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "cache"))


TINY = {"steps": 3, "bags": 12, "batch": 4, "size": 9, "width": 8}


def test_a_run_prints_both_figures_and_draws_its_attention(tmp_path, capsys):
    flags = [f"--{name}={value}" for name, value in TINY.items()]
    assert cli.main(["train", "mil", *flags, "--model", "abmil", "--run-dir", str(tmp_path / "run"), "--quiet"]) == 0
    said = capsys.readouterr().out
    assert "test bags: AUC" in said and "instances of positive test bags: AUC" in said
    assert (tmp_path / "run" / "plots" / "attention.png").read_bytes()[:4] == b"\x89PNG"
    outputs, bags = find_recipe("mil")(**TINY)._test(tmp_path / "run")
    expected = roc_auc_score(bags["y"], outputs["margin"])
    assert f"test bags: AUC {expected:.3f}" in said
    inside = bags["y"] == 1
    expected = roc_auc_score(bags["instances"][inside].ravel(), outputs["instance"][inside].ravel())
    assert f"instances of positive test bags: AUC {expected:.3f}" in said


def test_bags_follow_their_labels_and_test_bags_have_other_pictures():
    recipe = find_recipe("mil")(**{**TINY, "bags": 40})
    train, test = (dict(np.load(f"{recipe.prepared().data}/{part}.npz")) for part in ("train", "test"))
    for bags, number in ((train, 40), (test, 20)):
        assert bags["x"].shape == (number, 9, 8, 8, 1) and bags["y"].sum() == number // 2
        count = bags["instances"].sum(1)
        assert count[bags["y"] == 0].max() == 0 and set(count[bags["y"] == 1]) == {1, 2, 3}
    pictures = [{picture.tobytes() for picture in bags["x"].reshape(-1, 64)} for bags in (train, test)]
    assert not pictures[0] & pictures[1]


@pytest.mark.parametrize("name", recipes_mil.models())
def test_every_model_trains_and_scores_bags_and_instances(name):
    recipe = find_recipe("mil")(**TINY, model=name)
    recipe.validate()
    learner = recipe.learner(2, 3)
    batch = {"x": np.zeros((4, 9, 8, 8, 1), np.float32), "y": np.zeros(4, np.int32), "where": np.ones(4, bool),
             "index": np.zeros(4, np.int32)}  # fmt: skip

    def run(key):
        state, metrics = learner.update(learner.init(key, batch), batch, key)
        return metrics, learner.predict(state, batch)

    metrics, outputs = jax.eval_shape(run, jax.random.key(0))
    assert metrics["loss"].shape == ()
    assert {n: outputs[n].shape for n in ("logits", "probs", "instance")} == {
        "logits": (1, 4, 2), "probs": (4, 2), "instance": (4, 9)}  # fmt: skip


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--model", "abmill"], "did you mean 'abmil'"),
        (["--pictures", "faces"], "must be one of"),
        (["--size", "10"], "square"),
        (["--positives", "30"], "--positives"),
        (["--target", "12"], "--target 12 is not"),
    ],
)
def test_bad_input_is_one_line(flags, message, tmp_path, capsys):
    assert cli.main(["train", "mil", *flags, "--run-dir", str(tmp_path / "r")]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
