"""What every bag model of the family keeps: two layouts, padding anywhere, order, empty bags, over random bags."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import mil
from jaxlab.types import Layer

B, N, D = 4, 9, 8


def after(block, model):
    """The model behind a block that gives features for features."""

    def init(key, size):
        return {"block": block.init(key, size), "model": model.init(key, size)}

    def apply(params, x, **layout):
        return model.apply(params["model"], block.apply(params["block"], x, **layout), **layout)

    return Layer(init, apply)


FREE = {
    "abmil": mil.abmil(2, hidden=4),
    "gated abmil": mil.abmil(2, hidden=4, gated=True),
    "mean_mil": mil.mean_mil(2),
    "max_mil": mil.max_mil(2),
    "mi_net": mil.mi_net(2),
    "mi_net_multi": mil.mi_net_multi(3),
    "dsmil": mil.dsmil(2, hidden=4),
    "transmil": mil.transmil(2, heads=2, depth=1),
    "hopfield_mil": mil.hopfield_mil(2, hidden=4),
    "gnn_mil": mil.gnn_mil(2, hidden=4, k=2),
    "deepsets": mil.deepsets(2, inner=[4], outer=[4]),
}
ORDERED = {
    "r2t": after(mil.r2t(regions=2, heads=2, taps=3, cross_regions=2, cross_heads=2), mil.abmil(2, hidden=4)),
    "mamba_mil": mil.mamba_mil(2, features=4, layers=1, hidden=4, rate=3, states=2, dropout=0.0),
}
MODELS = FREE | ORDERED


def random_bags(rng):
    """Bags of 0 to 6 instances (one of them empty, one full) and three ways to write them."""
    counts = np.array([0, 6, *rng.integers(1, 7, B - 2)])
    bags = [rng.normal(size=(count, D)).astype(np.float32) for count in counts]
    forms = {}
    for name in ("at the front", "anywhere", "in another order"):
        x, where = np.full((B, N, D), np.nan, np.float32), np.zeros((B, N), bool)
        for b, bag in enumerate(bags):
            places = np.arange(len(bag)) if name == "at the front" else np.sort(rng.permutation(N)[: len(bag)])
            where[b, places] = True
            x[b, places] = rng.permutation(bag) if name == "in another order" else bag
        forms[name] = x, where
    x, where = forms["anywhere"]
    order = np.argsort(np.where(where, rng.random((B, N)).cumsum(1), rng.random((B, N)) * N).reshape(-1))
    ids = np.where(where, np.arange(B)[:, None], -1).reshape(-1)[order].astype(np.int32)
    return forms, (x.reshape(-1, D)[order], ids)


@pytest.mark.parametrize("name", MODELS)
def test_layouts_padding_order_and_empty_bags(name):
    model, rng = MODELS[name], np.random.default_rng(0)
    shapes = jax.eval_shape(lambda key: model.init(key, D), jax.random.key(0))
    params = jax.tree.map(lambda v: np.float32(0.6 * rng.normal(size=v.shape)), shapes)
    padded = jax.jit(lambda x, where: model.apply(params, x, where=where)["logits"])
    listed = jax.jit(lambda x, ids: model.apply(params, x, segment_ids=ids, num_segments=B)["logits"])
    moved, empty = 0.0, []
    for _ in range(3):
        forms, as_list = random_bags(rng)
        expected = np.asarray(padded(*forms["at the front"]))
        assert np.isfinite(expected).all()
        np.testing.assert_allclose(padded(*forms["anywhere"]), expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(listed(*as_list), expected, rtol=1e-4, atol=1e-5)
        moved = max(moved, np.abs(padded(*forms["in another order"]) - expected).max())
        empty.append(expected[0])
    assert (moved < 1e-4) == (name in FREE)
    np.testing.assert_allclose(empty, np.broadcast_to(empty[0], (3, len(empty[0]))), rtol=1e-5)
    if name in ("mi_net", "abmil", "mamba_mil"):
        np.testing.assert_allclose(empty[0], params["head"]["b"], rtol=1e-5)


def test_every_bag_model_is_here():
    """A function of the family that builds a layer with `logits` from bags must be in the list above."""
    found = set()
    for name in mil.__all__:
        try:
            layer = getattr(mil, name)(2)
            key = jax.random.key(0)
            out = jax.eval_shape(lambda key, layer=layer: layer.apply(layer.init(key, D), jnp.ones((B, N, D))), key)
        except (TypeError, ValueError, AttributeError):
            continue
        if isinstance(layer, Layer) and isinstance(out, dict) and "logits" in out:
            found.add(name)
    assert found == set(MODELS) - {"gated abmil", "r2t"}
