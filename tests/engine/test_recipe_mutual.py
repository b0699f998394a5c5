"""The recipe `mutual`: every objective is traced on every backbone, and a run of the command line leaves its plots."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxlab import cli
from jaxlab.engine.errors import InputError
from jaxlab.engine.recipes import BACKBONES, OBJECTIVES, Mutual


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_objective_has_a_learner(backbone):
    """Traced only: losses, agreement and predictions have the shapes that the engine reads."""
    batch = {"x": np.zeros((6, 8, 8, 1), np.float32), "y": np.zeros(6, np.int32)}
    for objective in OBJECTIVES:
        recipe = Mutual(backbone=backbone, objective=objective, peers=2, width=8, depth=1, warmup=3)
        if backbone == "vit" and "features" in OBJECTIVES[objective]:
            with pytest.raises(InputError, match="needs --backbone mlp or resnet"):
                recipe.validate()
            continue
        recipe.validate()
        learner = recipe.learner(10, 20)
        state = jax.eval_shape(learner.init, jax.random.key(0), batch)
        new, metrics = jax.eval_shape(learner.update, state, batch, jax.random.key(1))
        assert jax.tree.map(lambda a: (a.shape, a.dtype), new) == jax.tree.map(lambda a: (a.shape, a.dtype), state)
        assert metrics["loss"].shape == metrics["accuracy"].shape == (2,)
        out = jax.eval_shape(learner.predict, new, {"x": batch["x"]})
        assert out["logits"].shape == (2, 6, 10) and out["probs"].shape == (6, 10)


def test_a_run_leaves_its_plots_and_learns(tmp_path, capsys):
    flags = "--steps 30 --batch 64 --peers 2 --width 32 --depth 1 --log-every 5 --save-every 30 --shift 0 --quiet"
    flags += " --objective symmetric_kl --learning-rate 0.01"
    assert cli.main(["train", "mutual", "--run-dir", str(tmp_path / "run"), *flags.split()]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= row["agreement"] <= 1 and 0 <= row["ensemble_accuracy"] <= 1 for row in rows[:-1])
    assert rows[-2]["loss"][0] < rows[0]["loss"][0] and rows[-1]["ensemble_accuracy"] > 0.5
    assert {p.name for p in (tmp_path / "run" / "plots").iterdir()} == {
        "agreement.png",
        "confusion.png",
        "learning_curves.png",
    }
    assert "test accuracy of the peers" in capsys.readouterr().out


def test_wrong_fields_are_refused():
    for field, value, message in (
        ("backbone", "cnn", "--backbone 'cnn' is unknown"),
        ("objective", "kll", "did you mean 'kl'"),
        ("peers", 0, "--peers must be at least 1"),
        ("warmup", -1, "--warmup must be at least 0"),
        ("decay", 2.0, "--decay must be between 0 and 1"),
    ):
        with pytest.raises(InputError, match=message):
            dataclasses.replace(Mutual(), **{field: value}).validate()
