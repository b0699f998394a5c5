"""Every claim in the catalogue runs in its smoke form, both arms learn, and the seed decides the result."""

import json

import pytest

from jaxlab import catalog, cli, kernels
from jaxlab.claims import harness

CLAIMED = [paper for paper in catalog.papers() if paper.claim is not None]


@pytest.mark.parametrize("paper", CLAIMED, ids=[paper.key for paper in CLAIMED])
def test_smoke(paper):
    result = harness.run(paper, smoke=True)
    assert result["verdict"] == "smoke" and all(result["learnt"].values())
    for name, values in result["arms"].items():
        assert len(set(values)) == len(values), f"the seed does not decide {name}: {values}"


@pytest.mark.parametrize("paper", CLAIMED, ids=[paper.key for paper in CLAIMED])
def test_the_record_is_of_this_code_and_follows_its_rule(paper):
    found = catalog.claim_of(paper)
    assert found is not None and not found["stale"], f"record it again: jaxlab claim {paper.key} --record"
    record = harness.load_record(paper)
    outcome = harness.Outcome(record["arms"], record["facts"], record["floor"], record["learnt"], record["saving"])
    judged = harness.judge(dict(paper.claim), outcome)
    assert (judged.verdict, judged.effect) == (record["verdict"], record["effect"])
    assert record["spec"] == dict(paper.claim)


def test_doctor_finds_the_kernels_in_agreement(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    names = {row["kernel"] for row in report["kernels"]}
    assert names == set(kernels.__all__) - {"TopK", "plan_from_top_k"}
    assert all(row["agrees"] and row["error"] < 1e-4 for row in report["kernels"])


def test_a_changed_row_makes_the_record_stale():
    import dataclasses

    paper = CLAIMED[0]
    assert catalog.claim_of(dataclasses.replace(paper, claim={**paper.claim, "seeds": 99}))["stale"]
