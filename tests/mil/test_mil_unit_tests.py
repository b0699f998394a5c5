"""The synthetic sets against their definitions, the monotone and the graph model against loops, and the test itself."""

import json
from importlib import resources

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab import mil
from jaxlab.ops.layers import mlp
from jaxlab.types import Layer

rng = np.random.default_rng(0)
MAKERS = {
    "single": mil.make_single_concept,
    "multi": mil.make_multi_concept,
    "frequency": mil.make_false_frequency,
}


@pytest.fixture(scope="module")
def drawn():
    """All six sets, of 400 bags."""

    def draw(key):
        return {(n, t): make(key, 400, train=t) for n, make in MAKERS.items() for t in (True, False)}

    return jax.tree.map(np.asarray, jax.jit(draw)(jax.random.key(0)))


def recognise(x):
    """The concept of an instance of the multi-concept sets, by its mean: 0 background, 1, 2, or 3 for poison."""
    mean, spread = x.mean(), x.std()
    return {2: 1, 3: 2, -10: 3}.get(round(mean), 0) if spread < 0.3 else 0


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", MAKERS)
def test_bags_are_what_the_algorithms_say(drawn, name, train):
    bags = drawn[name, train]
    assert bags["y"].sum() == 200
    assert not np.any(bags["x"][~bags["where"]])
    seen = set()
    for x, keep, y, labels in zip(*(bags[n] for n in ("x", "where", "y", "instance_labels")), strict=True):
        size = keep.sum()
        assert keep[:size].all() and (labels[size:] == -1).all()
        kinds = [recognise(row) for row in x[:size]]
        assert [k == 3 for k in kinds] == (labels[:size] == -1).tolist()
        poisoned, concepts = kinds.count(3), int((labels == 1).sum())
        assert poisoned == (name != "frequency" and bool(y) != train)
        if name == "single":
            assert (labels[:size] == 0).sum() == 10 and (1 <= concepts <= 3 if y else concepts == 0)
            seen.add(concepts)
            continue
        assert 1 <= kinds.count(0) <= 9
        assert [k in (1, 2) for k in kinds] == (labels[:size] == 1).tolist()
        ones, twos = kinds.count(1), kinds.count(2)
        if y:
            assert ones == twos and (1 <= ones <= 3 if name == "multi" else ones == 1)
        elif name == "multi":
            assert ones + twos == 1
        else:
            low, high = (1, 2) if train else (35, 44)
            assert min(ones, twos) == 0 and low <= max(ones, twos) <= high
        seen.add((bool(y), ones, twos))
    if name == "single":
        assert seen == {0, 1, 2, 3}
    else:  # every count occurs, and negative bags of either concept
        expected = {"multi": 5, ("frequency", True): 5, ("frequency", False): 21}
        assert len(seen) == expected.get(name, expected.get((name, train)))


def test_instances_of_a_concept_have_its_distribution(drawn):
    """Pooled over a set: mean and variance of concept, background and poisoned instances."""
    for name, cases in {
        "single": {1: (0.5, (9 + 1) / 2 + 0.25), 0: (0, 1), -1: (-10, 0.01)},
        "multi": {0: (0, 1), -1: (-10, 0.01)},
    }.items():
        bags = drawn[name, True]
        for label, (mean, variance) in cases.items():
            rows = bags["x"][bags["where"] & (bags["instance_labels"] == label)]
            assert abs(rows.mean() - mean) < 0.1 and abs(rows.var() / variance - 1) < 0.1


def test_the_bag_with_shuffled_order_holds_the_concept_anywhere(drawn):
    places = np.argwhere(drawn["single", True]["instance_labels"] == 1)[:, 1]
    assert set(places) >= set(range(10))


def started(model, size=4):
    """Parameters of the right shapes, away from their start, where biases are 0."""
    shapes = jax.eval_shape(lambda key: model.init(key, size), jax.random.key(0))
    return jax.tree.map(lambda v: np.float32(0.6 * rng.normal(size=v.shape)), shapes)


X = rng.normal(size=(3, 6, 4)).astype(np.float32)
KEEP = np.array([[1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]], bool)


def concepts_oracle(p, x, combine):
    z = [max([float(h @ p["head"]["w"][:, c]) for h in x], default=0.0) + p["head"]["b"][c] for c in range(3)]
    if combine == "min":
        return min(z)
    product = np.prod([1 / (1 + np.exp(-v)) for v in z])
    return np.log(product / (1 - product))


def graph_oracle(p, x, k=2):
    nodes = []
    for i in range(len(x)):
        near = sorted((j for j in range(len(x)) if j != i), key=lambda j: ((x[i] - x[j]) ** 2).sum())[:k]
        mean = x[near].mean(0) if near else np.zeros(x.shape[1])
        nodes.append(np.maximum(x[i] @ p["own"]["w"] + p["own"]["b"] + mean @ p["near"]["w"], 0))
    return (np.mean(nodes, 0) if nodes else np.zeros(5)) @ p["head"]["w"] + p["head"]["b"]


ORACLES = {
    "product": (mil.mi_net_multi(3), lambda p, x: concepts_oracle(p, x, "product")),
    "min": (mil.mi_net_multi(3, combine="min"), lambda p, x: concepts_oracle(p, x, "min")),
    "graph": (mil.gnn_mil(1, hidden=5, k=2), graph_oracle),
}


@pytest.mark.parametrize("name", ORACLES)
def test_models_equal_the_loop_in_both_layouts(name):
    model, oracle = ORACLES[name]
    params = started(model)
    dirty = np.where(KEEP[..., None], X, np.float32(np.nan)).reshape(-1, 4)
    order = rng.permutation(18)
    ids = np.where(KEEP, np.arange(3)[:, None], -1).reshape(-1)[order]
    padded, listed = jax.jit(
        lambda p: (
            model.apply(p, dirty.reshape(3, 6, 4), where=KEEP)["logits"],
            model.apply(p, dirty[order], segment_ids=ids, num_segments=3)["logits"],
        )
    )(params)
    wide = jax.tree.map(np.float64, params)
    expected = [np.reshape(oracle(wide, x[keep].astype(np.float64)), 1) for x, keep in zip(X, KEEP, strict=True)]
    np.testing.assert_allclose(padded, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(listed, expected, rtol=1e-5, atol=1e-5)


def test_respectful_models_never_violate_and_others_do():
    extra = 3 * rng.normal(size=(20, 4)).astype(np.float32)
    models = {
        "mi_net": mil.mi_net(2),
        "min": mil.mi_net_multi(3, combine="min"),
        "product": mil.mi_net_multi(3),
        "abmil": mil.abmil(1),
        "max_mil": mil.max_mil(1),
    }
    started_models = {n: started(m) for n, m in models.items()}

    def rates(params):
        found = {
            n: mil.monotonicity_violation(m, params[n], X, extra, where=KEEP, tolerance=1e-5 * (n == "product"))
            for n, m in models.items()
        }
        empty = mil.monotonicity_violation(models["mi_net"], params["mi_net"], X, -extra, where=np.zeros((3, 6), bool))
        return {**found, "empty bags": empty}

    got = jax.jit(rates)(started_models)
    assert got["mi_net"] == got["min"] == got["product"] == 0
    # By hand for attention: logits of the two bags that are not empty, with and without each instance.
    p, count = jax.tree.map(np.float64, started_models["abmil"]), 0

    def logit(x):
        s = np.array([np.tanh(h @ p["hidden"]["w"]) @ p["score"]["w"][:, 0] for h in x])
        a = np.exp(s - s.max())
        return a / a.sum() @ x @ p["head"]["w"][:, 0]

    for b in range(2):
        for instance in extra:
            bag = X[b][KEEP[b]].astype(np.float64)
            count += logit(np.vstack([bag, instance])) < logit(bag)
    np.testing.assert_allclose(got["abmil"], count / 40, rtol=1e-6)
    assert got["max_mil"] > 0
    assert got["empty bags"] == 0


def test_the_test_tells_a_model_that_learns_the_poison(drawn):
    train, test = drawn["single", True], drawn["single", False]

    def both(key):
        keys = jax.random.split(key)
        model = mil.with_encoder(mlp([16]), mil.mi_net(1))
        respectful = mil.run_unit_test(keys[0], model, train, test, steps=150, learning_rate=0.03)
        return respectful, mil.run_unit_test(keys[1], mil.mean_mil(1), train, test, steps=150, learning_rate=0.03)

    respectful, violator = jax.jit(both)(jax.random.key(0))
    assert respectful["passed"] and respectful["train_auc"] > 0.6
    assert not violator["passed"] and violator["train_auc"] > 0.99 and violator["test_auc"] < 0.1


def test_the_auc_is_of_all_bags(drawn):
    """A model that is not trained: its AUC on both sets is that of its scores, whatever the chunks of evaluation."""
    from sklearn.metrics import roc_auc_score

    fixed = np.float32(rng.normal(size=16))
    model = Layer(
        lambda key, size: {"w": jnp.ones(())},
        lambda p, x, where: {
            "logits": (mil.mean_pool(x, where=where) @ fixed)[:, None] * jax.lax.stop_gradient(p["w"])
        },
    )
    train, test = ({n: v[:300] for n, v in drawn["multi", t].items()} for t in (True, False))
    got = jax.jit(lambda: mil.run_unit_test(jax.random.key(0), model, train, test, steps=1))()
    for name, bags in (("train_auc", train), ("test_auc", test)):
        scores = [x[keep].mean(0) @ fixed for x, keep in zip(bags["x"], bags["where"], strict=True)]
        np.testing.assert_allclose(got[name], roc_auc_score(bags["y"], scores), atol=1e-4)


def test_the_table_of_the_familys_page_is_that_of_the_record():
    """Mean test AUC of every model and whether it respects the assumption, as the claim recorded them."""
    record = json.loads(resources.files("jaxlab").joinpath("claims/mil/mil_unit_tests.json").read_text())
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in mil.__doc__.splitlines() if "|" in line]
    head, _, *rows = rows
    table = record["secondary"]["mean test AUC"]
    assert [row[0] for row in rows] == list(table) and head[-1] == "respects the assumption"
    for name, *cells, respects in rows:
        assert cells == [f"{table[name][test]:.2f}" for test in head[1:-1]]
        assert respects == ("yes" if table[name]["respects the assumption"] else "no")


def test_refuses(drawn):
    with pytest.raises(ValueError, match="background=0 must be"):
        mil.make_single_concept(jax.random.key(0), 4, background=0)
    with pytest.raises(ValueError, match="num_bags=0 must be"):
        mil.make_false_frequency(jax.random.key(0), 0)
    with pytest.raises(ValueError, match=r"expected \[B, 1\]"):
        mil.run_unit_test(jax.random.key(0), mil.mean_mil(2), drawn["multi", True], drawn["multi", False])
    with pytest.raises(ValueError, match="combine='max'"):
        mil.mi_net_multi(2, combine="max")
    with pytest.raises(ValueError, match="extra has shape"):
        mil.monotonicity_violation(mil.mean_mil(1), {}, X, X[0, :, :2])
    with pytest.raises(ValueError, match="tolerance=-1"):
        mil.monotonicity_violation(mil.mean_mil(1), {}, X, X[0], tolerance=-1)


def model_case(name, *covers, **options):
    model, params = ORACLES[name][0], started(ORACLES[name][0])

    def run(x, where):
        return model.apply(params, x, where=where)["logits"]

    return Case(run, {"x": Arg("embeddings", (3, 6, 4)), "where": Arg("where", (3, 6))}, wrt=("x",), name=name,
                rows={"x": 1, "where": 1}, symmetry="invariant", covers=covers, **options)  # fmt: skip


ATTENTION = mil.abmil(1, hidden=3)
ATTENTION_PARAMS = started(ATTENTION)


def violation_case(x, extra, where):
    return mil.monotonicity_violation(ATTENTION, ATTENTION_PARAMS, x, extra, where=where)


def unit_test_case(x, where, key):
    bags = {"x": x, "where": where, "y": jnp.arange(6) % 2}
    return mil.run_unit_test(key, mil.mi_net(1), bags, bags, steps=2, batch=2)


def maker_case(make):
    only_a_key = dict.fromkeys(("extremes", "dtype"), "the only input is a key")
    return Case(lambda key: make(key, 3, features=2)["x"], {"key": Arg("key")}, helper=True, name=make.__name__,
                covers=(f"mil.{make.__name__}",), skip=only_a_key)  # fmt: skip


CASES = [
    model_case("product", "mil.mi_net_multi", helper=True),
    model_case("min", helper=True),
    model_case("graph", "mil.gnn_mil", skip={
        "gradient": "neighbours are chosen by distances, which are constants; equal neighbours jump"}),
    Case(violation_case, {"x": Arg("embeddings", (3, 6, 4)), "extra": Arg("embeddings", (5, 4)),
         "where": Arg("where", (3, 6))}, reason="a share of comparisons has no gradient",
         helper=True, covers=("mil.monotonicity_violation",)),
    Case(unit_test_case, {"x": Arg("embeddings", (6, 4, 3)), "where": Arg("where", (6, 4)), "key": Arg("key")},
         reason="ranks have no gradient", covers=("mil.run_unit_test",), helper=True,
         skip={"dtype": "a model trained in bfloat16 may rank otherwise"}),
    *(maker_case(make) for make in MAKERS.values()),
]  # fmt: skip
test_conformance = conformance.conformance_tests(CASES)
