"""Every one of five well-known deep models fails a test that models which respect the assumption pass.

The paper's own synthetic bags in 16 dimensions, with 10 background instances in the single-concept set. All models act
on the same network over instances (two layers of 32), and are trained alike: 400 steps of Adam at rate 0.005 on
batches of 32. The models that respect the assumption are mi-Net where one concept counts, and the product over eight
concepts where two do. The facts hold for each seed.

Every other model of the family and its three training methods run the same tests, with the first seed. These
change no verdict: the mean AUC on the test bags is the table of the family's page. A model respects the assumption in
this table if it is never inverted: no mean test AUC is below 0.45.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlab import mil
from jaxlab.claims.harness import Outcome
from jaxlab.ops.layers import mlp
from jaxlab.types import Layer

WIDTH, RATE, BATCH, LENGTH = 32, 5e-3, 32, 53


def re_embedded(model: Layer) -> Layer:
    """Returns the bag model with R2T before it."""
    block = mil.r2t(regions=2, heads=4, taps=3, cross_regions=2, cross_heads=4, dropout=0.0)

    def init(key, size):
        key_block, key_model = jax.random.split(key)
        return {"block": block.init(key_block, size), "model": model.init(key_model, size)}

    def apply(params, x, *, where=None, segment_ids=None, num_segments=None):
        layout = {"where": where, "segment_ids": segment_ids, "num_segments": num_segments}
        return model.apply(params["model"], block.apply(params["block"], x, **layout), **layout)

    return Layer(init, apply)


ATTENTION = mil.abmil(1, hidden=WIDTH)
MODELS = {
    "mi-Net": mil.mi_net(1),
    "product of concepts": mil.mi_net_multi(8),
    "MI-Net": mil.max_mil(1),
    "ABMIL": ATTENTION,
    "TransMIL": mil.transmil(1, depth=1, heads=4),
    "GNN-MIL": mil.gnn_mil(1, hidden=WIDTH),
    "Hopfield": mil.hopfield_mil(1, hidden=WIDTH),
}
VIOLATORS = ("MI-Net", "ABMIL", "TransMIL", "GNN-MIL", "Hopfield")
OTHERS = {
    "least of concepts": mil.mi_net_multi(8, combine="min"),
    "mean": mil.mean_mil(1),
    "gated ABMIL": mil.abmil(1, hidden=WIDTH, gated=True),
    "DSMIL": mil.dsmil(1, hidden=WIDTH),
    "Deep Sets": mil.deepsets(1, outer=[WIDTH]),
    "R2T, ABMIL": re_embedded(ATTENTION),
    "MambaMIL": mil.mamba_mil(1, features=WIDTH, layers=1, hidden=WIDTH, states=8, dropout=0.0),
}
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


def trained_model(model: Layer, train, test, key, *, steps: int):
    """Returns train and test AUC of a bag model."""
    net = mil.with_encoder(mlp([WIDTH, WIDTH]), model)
    result = mil.run_unit_test(key, net, train, test, steps=steps, learning_rate=RATE, batch=BATCH)
    return result["train_auc"], result["test_auc"]


def mined_model(version: int, train, test, key, *, steps: int):
    """Returns train and test AUC of attention trained by either version of MHIM-MIL from the start."""
    encoder, model = mlp([WIDTH, WIDTH]), mil.abmil(2, hidden=WIDTH)
    options = {"ratio_high": 0.1, "high_random": 1.0, "decay": 0.99}
    if version == 1:
        learner = mil.mhim(mil.with_encoder(encoder, model), optax.adam(RATE), ratio_random=0.3, **options)
    else:
        recycling = mil.global_recycling(2, heads=2, head_size=8)
        learner = mil.mhim_v2(encoder, model, optax.adam(RATE), recycling=recycling, **options)
    batch_of = lambda rows: {name: train[name][rows] for name in ("x", "where", "y")}
    margin = lambda state, bags: jnp.matmul(learner.predict(state, bags)["logits"], jnp.array([-1.0, 1.0]))
    return _by_learner(learner, batch_of, margin, train, test, key, steps=steps)


def instance_model(train, test, key, *, steps: int):
    """Returns train and test AUC of the largest instance probability of INS; the strong view has more noise."""
    size = train["x"].shape[1]
    learner = mil.ins(
        mlp([WIDTH, WIDTH]),
        optax.adam(RATE),
        num_instances=train["y"].shape[0] * size,
        warmup_steps=steps // 5,
        total_steps=steps,
        inherit_steps=steps // 50,
        queue_size=512,
        features=WIDTH,
        key_decay=0.99,
    )
    noise = 0.1 * jax.random.normal(key, (BATCH * size, train["x"].shape[2]))

    def batch_of(rows):
        x, place = train["x"][rows].reshape(BATCH * size, -1), rows[:, None] * size + jnp.arange(size)[None]
        labels = jnp.repeat(train["y"][rows], size)
        return {"x": x, "x_strong": x + noise, "y": labels, "index": place.reshape(-1),
                "where": train["where"][rows].reshape(-1)}  # fmt: skip

    def largest(state, bags):
        probs = learner.predict(state, {"x": bags["x"]})["probs"][..., 1]
        return jnp.max(jnp.where(bags["where"], probs, 0.0), axis=1)

    return _by_learner(learner, batch_of, largest, train, test, key, steps=steps)


def claim(*, seeds: Sequence[int], smoke: bool = False) -> Outcome:
    """Returns which models pass which test; the smoke form trains mi-Net and MI-Net on the first."""
    steps, num_train, num_test = (200, 256, 256) if smoke else (400, 4096, 1024)
    length = 16 if smoke else LENGTH

    def draw(make):
        def one(seed):
            key_train, key_test, key = jax.random.split(jax.random.key(seed), 3)
            train, test = make(key_train, num_train, train=True), make(key_test, num_test, train=False)
            return lengthened(train, 16), lengthened(test, length), key

        return jax.jit(jax.vmap(one))(np.asarray(seeds, np.uint32))

    tests = {name: draw(make) for name, make in TESTS.items() if not smoke or name == "single concept"}
    models = {name: MODELS[name] for name in ("mi-Net", "MI-Net")} if smoke else {**MODELS, **OTHERS}
    runs = {name: functools.partial(trained_model, model, steps=steps) for name, model in models.items()}
    if not smoke:
        runs["MHIM-MIL, ABMIL"] = functools.partial(mined_model, 1, steps=steps)
        runs["MHIM v2, ABMIL"] = functools.partial(mined_model, 2, steps=steps)
        runs["INS"] = functools.partial(instance_model, steps=steps)
    train_auc, test_auc = {}, {}
    for name, run in runs.items():
        run = jax.jit(jax.vmap(run))
        some = tests if name in MODELS else {test: jax.tree.map(lambda a: a[:1], data) for test, data in tests.items()}
        results = {test: jax.tree.map(np.asarray, run(*data)) for test, data in some.items()}
        train_auc[name], test_auc[name] = ({test: r[i] for test, r in results.items()} for i in range(2))

    facts, table = {}, {}
    if not smoke:
        facts["mi-Net passes single concept"] = test_auc["mi-Net"]["single concept"].min() > 0.8
        for test in ("multi concept", "false frequency"):
            facts[f"product of concepts passes {test}"] = test_auc["product of concepts"][test].min() > 0.8
        for name in ("MI-Net", "ABMIL"):
            learnt, inverted = train_auc[name]["single concept"], test_auc[name]["single concept"]
            facts[f"{name} inverts single concept"] = learnt.min() > 0.95 and inverted.max() < 0.5
        for name in VIOLATORS:
            facts[f"{name} fails a test"] = np.min(list(test_auc[name].values()), axis=0).max() < 0.5
        for name, auc in test_auc.items():
            means = {test: float(values.mean()) for test, values in auc.items()}
            table[name] = {**means, "respects the assumption": min(means.values()) >= 0.45}
    return Outcome(
        arms={"mi-Net, single concept": test_auc["mi-Net"]["single concept"].tolist()},
        facts={name: bool(holds) for name, holds in facts.items()},
        learnt={name: bool(train_auc[name]["single concept"].min() > 0.7) for name in MODELS if name in train_auc},
        secondary={"mean test AUC": table, "train AUC": train_auc, "test AUC": test_auc},
        data="the paper's three synthetic sets, drawn by the seed",
    )


def _by_learner(learner, batch_of, score, train, test, key, *, steps):
    key_init, key_steps = jax.random.split(key)

    def step(state, key):
        key_rows, key_update = jax.random.split(key)
        rows = jax.random.randint(key_rows, (BATCH,), 0, train["y"].shape[0])
        return learner.update(state, batch_of(rows), key_update)[0], None

    state = learner.init(key_init, batch_of(jnp.arange(BATCH)))
    state = jax.lax.scan(step, state, jax.random.split(key_steps, steps))[0]
    return tuple(mil.bag_auc(score(state, bags), bags["y"]) for bags in (train, test))
