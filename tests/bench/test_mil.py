"""The benchmark of the bag classifiers: its two layouts compute the same, rows are whole, exponents are slopes."""

import json

import jax
import numpy as np
import pytest

from jaxlab import cli
from jaxlab.bench import mil, runner


@pytest.mark.parametrize("name", ["abmil", "r2t, abmil"])
def test_both_layouts_compute_the_same(name):
    counts = [11, 6, 3, 1]
    programs = mil._programs(mil.MODELS[name], counts, 16, mil._arguments(counts, 16))
    with jax.numpy_rank_promotion("allow"):
        listed, padded = (jax.jit(function)(*args) for function, args in programs.values())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), listed, padded)


def test_rows_and_records(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner, "RESULTS", tmp_path)
    monkeypatch.setattr(runner, "matmul_gflops", lambda: 1.0)
    monkeypatch.setattr(mil, "MODELS", {name: mil.MODELS[name] for name in ("mean_mil", "abmil")})
    assert cli.main(["bench", "mil", "--quick", "--rounds", "1", "--record", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["params"]["model"], row["params"]["instances"]) for row in rows] == [
        (name, size) for name in ("mean_mil", "abmil") for size in (100, 200)
    ]
    assert all(row["ms"] > 0 and row["peer_ms"] > 0 and row["peer_temp_bytes"] >= row["temp_bytes"] for row in rows)
    assert rows[0]["ms_exponent"] is None and rows[1]["temp_bytes_exponent"] is not None
    expected = np.log2(rows[3]["temp_bytes"] / rows[2]["temp_bytes"])
    np.testing.assert_allclose(rows[3]["temp_bytes_exponent"], expected, atol=1e-3)
    assert json.loads((tmp_path / "families" / "mil.json").read_text())[0]["rows"] == rows
    assert "abmil" in mil.render(rows) and " - " not in mil.render(rows[1:2])


def test_what_takes_too_long_is_not_timed():
    rows = mil.rows(["mean_mil"], sizes=(50, 100), width=8, rounds=1, seconds=0.0)
    assert rows[0]["ms"] > 0 and rows[1]["ms"] is None and rows[1]["ratio"] is None and rows[1]["temp_bytes"] >= 0
    assert rows[1]["ms_exponent"] is None and "-" in mil.render(rows)
