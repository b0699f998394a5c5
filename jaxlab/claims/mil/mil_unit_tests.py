"""Every one of five well-known deep models fails a test that models which respect the assumption pass.

The paper's own synthetic bags in 16 dimensions, with 10 background instances in the single-concept set. All models act
on the same network over instances (two layers of 32), and are trained alike: 1500 steps of Adam at rate 0.005 on
batches of 32. The models that respect the assumption are mi-Net where one concept counts, and the product over eight
concepts where two do. The facts hold for each seed.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab import mil
from jaxlab.claims.harness import Outcome
from jaxlab.ops.layers import mlp

WIDTH = 32
MODELS = {
    "mi-Net": mil.mi_net(1),
    "product of concepts": mil.mi_net_multi(8),
    "MI-Net": mil.max_mil(1),
    "ABMIL": mil.abmil(1, hidden=WIDTH),
    "TransMIL": mil.transmil(1, depth=1, heads=4),
    "GNN-MIL": mil.gnn_mil(1, hidden=WIDTH),
    "Hopfield": mil.hopfield_mil(1, hidden=WIDTH),
}
VIOLATORS = ("MI-Net", "ABMIL", "TransMIL", "GNN-MIL", "Hopfield")
TESTS = {
    "single concept": mil.make_single_concept,
    "multi concept": mil.make_multi_concept,
    "false frequency": mil.make_false_frequency,
}


def lengthened(bags: dict[str, jax.Array], size: int) -> dict[str, jax.Array]:
    """Returns the bags with room for `size` instances, so that all tests share one program."""
    more = size - bags["x"].shape[1]
    x, where = jnp.pad(bags["x"], ((0, 0), (0, more), (0, 0))), jnp.pad(bags["where"], ((0, 0), (0, more)))
    return {"x": x, "where": where, "y": bags["y"]}


def claim(*, seeds: Sequence[int], smoke: bool = False) -> Outcome:
    """Returns which models pass which test; the smoke form trains mi-Net and MI-Net on the first."""
    steps, num_train, num_test = (300, 512, 256) if smoke else (1500, 8192, 2048)
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))

    def draw(make):
        def one(key):
            key_train, key_test, key = jax.random.split(key, 3)
            train, test = make(key_train, num_train, train=True), make(key_test, num_test, train=False)
            return lengthened(train, 16), lengthened(test, 53), key

        return jax.jit(jax.vmap(one))(keys)

    tests = {name: draw(make) for name, make in TESTS.items() if not smoke or name == "single concept"}
    train_auc, test_auc = {}, {}
    for name, model in MODELS.items():
        if smoke and name not in ("mi-Net", "MI-Net"):
            continue
        net = mil.with_encoder(mlp([WIDTH, WIDTH]), model)

        def run(train, test, key, net=net):
            return mil.run_unit_test(key, net, train, test, steps=steps, learning_rate=5e-3, batch=32)

        run = jax.jit(jax.vmap(run))
        results = {test: jax.tree.map(np.asarray, run(*data)) for test, data in tests.items()}
        train_auc[name] = {test: r["train_auc"] for test, r in results.items()}
        test_auc[name] = {test: r["test_auc"] for test, r in results.items()}

    facts = {}
    if not smoke:
        facts["mi-Net passes single concept"] = test_auc["mi-Net"]["single concept"].min() > 0.8
        for test in ("multi concept", "false frequency"):
            facts[f"product of concepts passes {test}"] = test_auc["product of concepts"][test].min() > 0.8
        for name in ("MI-Net", "ABMIL"):
            learnt, inverted = train_auc[name]["single concept"], test_auc[name]["single concept"]
            facts[f"{name} inverts single concept"] = learnt.min() > 0.95 and inverted.max() < 0.5
        for name in VIOLATORS:
            facts[f"{name} fails a test"] = np.min(list(test_auc[name].values()), axis=0).max() < 0.5
    return Outcome(
        arms={"mi-Net, single concept": test_auc["mi-Net"]["single concept"].tolist()},
        facts={name: bool(holds) for name, holds in facts.items()},
        learnt={name: bool(auc["single concept"].min() > 0.7) for name, auc in train_auc.items()},
        secondary={"train AUC": train_auc, "test AUC": test_auc},
        data="the paper's three synthetic sets, drawn by the seed",
    )
