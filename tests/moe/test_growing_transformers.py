"""The frozen embedding, the mean of logits and growth against NumPy and plain facts."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import Arg, Case

from jaxlab import moe

rng = np.random.default_rng(0)


def softmax(z):
    z = np.exp(z - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


def test_the_mean_of_logits_is_a_geometric_mean_and_never_worse_than_the_mean():
    logits, weights = rng.normal(size=(3, 6, 5)) * 3, rng.random(3)
    both = jax.jit(lambda z, w: (moe.average_logits(z, w), moe.average_logits(z)))
    got, plain = both(np.float32(logits), np.float32(weights))
    geometric = np.prod(softmax(logits) ** (weights / weights.sum())[:, None, None], axis=0)
    np.testing.assert_allclose(softmax(np.float64(got)), geometric / geometric.sum(-1, keepdims=True), rtol=1e-4)
    losses = -np.log(softmax(logits))
    assert np.all(-np.log(softmax(np.float64(plain))) <= losses.mean(0) + 1e-5)
    same = both(np.float32(np.repeat(logits[:1], 3, 0)), np.float32(weights))
    np.testing.assert_allclose(same[0], logits[0], rtol=1e-5)
    spread = jax.vmap(lambda z, w: moe.average_logits(z[None], w[None], axis_name="expert"), axis_name="expert")
    np.testing.assert_allclose(spread(np.float32(logits), np.float32(weights)), np.stack([got] * 3), rtol=1e-5)
    np.testing.assert_array_equal(both(np.float32(logits), np.zeros(3, np.float32))[0], np.zeros((6, 5)))


def test_embeddings_are_fixed_and_tell_characters_apart():
    bitmaps = rng.integers(0, 2, (9, 4, 4)).astype(float)
    whole = moe.glyph_embedding(bitmaps, 16)
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, rtol=1e-6)
    centred = bitmaps.reshape(9, 16) - bitmaps.reshape(9, 16).mean(0)
    cosines = centred @ centred.T / np.linalg.norm(centred, axis=1)[:, None] / np.linalg.norm(centred, axis=1)[None]
    np.testing.assert_allclose(whole @ whole.T, cosines, atol=1e-5)  # all components: nothing is lost
    few = moe.glyph_embedding(bitmaps, 3)
    vectors = np.linalg.eigh(centred.T @ centred)[1]
    best = centred @ vectors[:, ::-1][:, :3]
    best = best / np.linalg.norm(best, axis=1, keepdims=True)
    np.testing.assert_allclose(few @ few.T, best @ best.T, atol=1e-5)
    tokens = moe.glyph_embedding(bitmaps, 16, characters=np.array([[0, -1], [1, 2], [-1, -1]]))
    pair = whole[1] + whole[2]
    np.testing.assert_allclose(tokens, [whole[0], pair / np.linalg.norm(pair), 0 * pair], atol=1e-6)
    for size in (21, 50):
        codes = moe.codepoint_embedding(np.arange(32, 300), size)
        gram = codes @ codes.T
        assert np.all(gram[~np.eye(len(gram), dtype=bool)] < 1 - 1e-3)
        np.testing.assert_allclose(np.diag(gram), 1, rtol=1e-5)
    both = moe.codepoint_embedding(np.array([[97, 98], [98, 97], [97, -1], [-1, -1]]), 30)
    np.testing.assert_array_equal(both[0], both[1])
    np.testing.assert_array_equal(both[2], moe.codepoint_embedding(np.array([97]), 30)[0])
    assert not np.any(both[3])


def apply(params, x):
    h = params["embedding"][x]
    for name in sorted(params["blocks"]):
        block = params["blocks"][name]
        h = h + jnp.tanh(h @ block["w"]) @ block["out"]
    return h @ params["head"]


def test_a_grown_block_changes_nothing_at_first_and_alone_is_trained():
    block = lambda: {"w": np.float32(rng.normal(size=(4, 6))), "out": np.float32(rng.normal(size=(6, 4)))}
    embedding, head = np.float32(rng.normal(size=(7, 4))), np.float32(rng.normal(size=(4, 3)))
    params = {"embedding": embedding, "head": head, "blocks": {"block_0": block()}}
    x, y = rng.integers(0, 7, 12), rng.integers(0, 3, 12)
    grown = moe.grow(params, block(), zero_outputs=["out"])
    mask = moe.active_mask(grown)
    optimizer = moe.train_active(optax.adam(0.1), mask)

    def steps(params):
        def one(carry, _):
            params, state = carry
            loss = lambda p: jnp.mean(optax.softmax_cross_entropy_with_integer_labels(apply(p, x), y))
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        (trained, state), losses = jax.lax.scan(one, (params, optimizer.init(params)), None, length=20)
        return trained, state, losses, apply(params, x)

    trained, state, losses, before = jax.jit(steps)(grown)
    np.testing.assert_allclose(before, apply(params, x), rtol=1e-5, atol=1e-5)
    assert losses[-1] < losses[0]
    np.testing.assert_array_equal(trained["embedding"], embedding)
    jax.tree.map(np.testing.assert_array_equal, trained["blocks"]["block_0"], params["blocks"]["block_0"])
    assert np.any(trained["blocks"]["block_1"]["out"]) and np.any(trained["head"] != head)
    moments = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert moments == 2 * (4 * 6 + 6 * 4 + 4 * 3), "frozen parts have state"
    nested = moe.grow({"blocks": {}}, {"ff": {"down": jnp.ones(2), "up": jnp.ones(2)}}, zero_outputs=["ff/down"])
    assert jax.tree.map(lambda a: a.tolist(), nested) == {"blocks": {"block_0": {"ff": {"down": [0, 0], "up": [1, 1]}}}}


def test_refuses():
    for make, match in (
        (lambda: moe.average_logits(jnp.ones(3)), "logits must be"),
        (lambda: moe.average_logits(jnp.ones((3, 2)), jnp.ones(2)), "weights has shape"),
        (lambda: moe.compose_experts([]), "at least one model"),
        (lambda: moe.compose_experts([{"w": np.ones(2)}, {"w": np.ones(3)}]), "same shapes"),
        (lambda: moe.glyph_embedding(np.ones((2, 3)), 4), "bitmaps must be"),
        (lambda: moe.glyph_embedding(np.ones((2, 3, 3)), 4, characters=np.array([[2]])), "characters must be"),
        (lambda: moe.codepoint_embedding(np.array([1]), 0), "size=0"),
        (lambda: moe.grow({"head": 1}, {}), "dict of blocks"),
        (lambda: moe.grow({"blocks": {}}, {"w": 1}, zero_outputs=["out"]), "zero_outputs names 'out'"),
        (lambda: moe.active_mask({"head": 1}), "dict of blocks"),
    ):
        with pytest.raises(ValueError, match=match):
            make()


def composed(x):
    stacked = moe.compose_experts([{"w": x}, {"w": 2 * x}])
    grown = moe.grow({"blocks": {"block_0": {"out": x}}}, {"out": stacked["w"][1]})
    optimizer = moe.train_active(optax.sgd(0.5), moe.active_mask(grown))
    updates, _ = optimizer.update(grown, optimizer.init(grown), grown)
    return stacked["w"], updates["blocks"]["block_1"]["out"]


CASES = [
    Case(moe.average_logits, {"logits": Arg("scores", (3, 6, 4)), "weights": Arg("weights", (3,))},
         wrt=("logits", "weights")),
    Case(composed, {"x": Arg("activations", (4, 3))}, wrt=("x",), helper=True,
         covers=("moe.compose_experts", "moe.grow", "moe.active_mask", "moe.train_active")),
    Case(lambda bitmaps: moe.glyph_embedding(bitmaps, 3), {"bitmaps": Arg("weights", (5, 2, 2))}, host=True,
         name="glyph_embedding", covers=("moe.glyph_embedding",)),
    Case(lambda codes: moe.codepoint_embedding(codes, 30), {"codes": Arg("index", (5,), high=300)}, host=True,
         name="codepoint_embedding", covers=("moe.codepoint_embedding",)),
]  # fmt: skip
test_conformance = conformance.conformance_tests(CASES)
