"""Reproducibility in Multiple Instance Learning: A Case For Algorithmic Unit Tests (2023, arXiv 2310.17867).

Three synthetic sets of bags that a model solves if it respects the assumption that a bag is positive because of what it
holds, never because of what it lacks. A model that can also learn the reverse, "positive unless ...", is tempted to,
and is wrong on the test bags, where the temptation points the other way.

    single concept     positive: 1 to 3 instances of N(0, 3) or N(1, 1);  all bags: B background instances of N(0, 1)
    multi concept      positive: 1 to 3 of N(2, .1) and as many of N(3, .1);  negative: one instance of one of the two;
                       all bags: 1 to 9 background instances
    false frequency    positive: one of each of the two concepts;  negative: copies of one of them, 1 or 2 in training
                       and 35 to 44 in the test;  all bags: 1 to 9 background instances

N(m, s) has standard deviation s, in every one of D dimensions. In the first two sets a poisoned instance N(-10, .1)
stands in each negative training bag and in each positive test bag. A model passes if its test AUC is above 0.5.

Reconstructed: two sampling ranges of the false-frequency set (one instance of each concept in positive bags, a concept
drawn at random in negative ones), the threshold, and the training. The graph network is reduced to one layer of means
over nearest neighbours.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxlab.mil.metrics import bag_auc
from jaxlab.mil.models import at_least_one, bag_model, xavier_dense
from jaxlab.mil.pooling import Bags, group
from jaxlab.ops.masked import compute_dtype, masked_mean, zero_where_false
from jaxlab.ops.sharding import rows_mixed
from jaxlab.types import Layer


@functools.partial(jax.jit, static_argnames=("num_bags", "features", "background", "train"))
def make_single_concept(
    key: Array, num_bags: int, *, features: int = 16, background: int = 10, train: bool = True
) -> dict[str, Array]:
    """Returns bags of the single-concept test: positive if an instance of N(0, 3) or N(1, 1) is there.

    Args:
        key: decides everything but the labels, which alternate.
        num_bags: number of bags n.
        features: D.
        background: B, instances of N(0, 1) in every bag.
        train: whether the poisoned instance stands in the negative bags, or, for the test, in the positive ones.

    Returns:
        A dict: `x` float32 [n, B + 4, D], `where` bool [n, B + 4], `y` int32 [n], and `instance_labels` int32
        [n, B + 4] (1 = of a concept, 0 = background, -1 = poison or padding). The order inside a bag is random.

    Raises:
        ValueError: a size is below 1.

    Example:
        >>> bags = make_single_concept(jax.random.key(0), 4, features=2)
        >>> bags["x"].shape, bags["y"].tolist()
        ((4, 14, 2), [0, 1, 0, 1])

    Source:
        Raff, Holt, arXiv 2310.17867, algorithm 1.
    """
    at_least_one(num_bags=num_bags, features=features, background=background)
    key_count, key_kind, key_fill = jax.random.split(key, 3)
    positive = _alternating(num_bags)
    count = jnp.where(positive, jax.random.randint(key_count, (num_bags,), 1, 4), 0)
    concept = 1 + jax.random.bernoulli(key_kind, 0.5, (num_bags, 3)).astype(jnp.int32)
    kinds = [
        _some(positive != train, 1, 1, _POISON),
        jnp.where(jnp.arange(3)[None, :] < count[:, None], concept, jnp.int32(_PADDING)),
        jnp.zeros((num_bags, background), jnp.int32),
    ]
    means, deviations = (0.0, 0.0, 1.0, -10.0), (1.0, 3.0, 1.0, 0.1)
    return _filled(key_fill, jnp.concatenate(kinds, axis=1), positive, features, means, deviations)


@functools.partial(jax.jit, static_argnames=("num_bags", "features", "train"))
def make_multi_concept(key: Array, num_bags: int, *, features: int = 16, train: bool = True) -> dict[str, Array]:
    """Returns bags of the multi-concept test: positive if instances of N(2, .1) and of N(3, .1) are both there.

    Args:
        key: decides everything but the labels, which alternate.
        num_bags: number of bags n.
        features: D.
        train: whether the poisoned instance stands in the negative bags, or, for the test, in the positive ones.

    Returns:
        A dict as of `make_single_concept`, with up to 16 instances in a bag. The single concept instance of a negative
        bag has the instance label 1: it is one, though it does not make the bag positive.

    Raises:
        ValueError: a size is below 1.

    Example:
        >>> jax.eval_shape(lambda key: make_multi_concept(key, 6), jax.random.key(0))["where"].shape
        (6, 16)

    Source:
        Raff, Holt, arXiv 2310.17867, algorithm 2.
    """
    at_least_one(num_bags=num_bags, features=features)
    key_count, key_one, key_background, key_fill = jax.random.split(key, 4)
    positive = _alternating(num_bags)
    count = jax.random.randint(key_count, (num_bags,), 1, 4)
    only = jax.random.bernoulli(key_one, 0.5, (num_bags,)).astype(jnp.int32) + 1
    kinds = [_some(positive != train, 1, 1, _POISON)]
    for concept in (1, 2):
        number = jnp.where(positive, count, (only == concept).astype(jnp.int32))
        kinds.append(_some(number > 0, number, 3, concept))
    return _with_background(key_background, key_fill, kinds, positive, features)


@functools.partial(jax.jit, static_argnames=("num_bags", "features", "train"))
def make_false_frequency(key: Array, num_bags: int, *, features: int = 16, train: bool = True) -> dict[str, Array]:
    """Returns bags of the false-frequency test: positive if both concepts are there, however often.

    Args:
        key: decides everything but the labels, which alternate.
        num_bags: number of bags n.
        features: D.
        train: whether negative bags hold their one concept once or twice, or, for the test, 35 to 44 times.

    Returns:
        A dict as of `make_multi_concept`, with up to 11 instances in a training bag and 53 in a test bag, never
        poisoned.

    Raises:
        ValueError: a size is below 1.

    Example:
        >>> bags = jax.eval_shape(lambda key: make_false_frequency(key, 2, train=False), jax.random.key(0))
        >>> bags["where"].shape
        (2, 53)

    Source:
        Raff, Holt, arXiv 2310.17867, algorithm 3.
    """
    at_least_one(num_bags=num_bags, features=features)
    key_count, key_one, key_background, key_fill = jax.random.split(key, 4)
    positive = _alternating(num_bags)
    low, high = (1, 2) if train else (35, 44)
    count = jax.random.randint(key_count, (num_bags,), low, high + 1)
    only = jax.random.bernoulli(key_one, 0.5, (num_bags,)).astype(jnp.int32) + 1
    kinds = [_some(positive | (only == 1), jnp.where(positive, 1, count), high, 1)]
    second = jnp.where(positive, 1, count)
    kinds.append(_some(positive | (only == 2), second, high, 2))
    bags = _with_background(key_background, key_fill, kinds, positive, features)
    longest = high + 9  # at most so many are there, and they stand first
    return {name: value if name == "y" else value[:, :longest] for name, value in bags.items()}


def run_unit_test(
    key: Array,
    model: Layer,
    train: Mapping[str, Array],
    test: Mapping[str, Array],
    *,
    steps: int = 1000,
    learning_rate: float = 1e-3,
    batch: int = 64,
) -> dict[str, Array]:
    """Returns how a model does on training bags and on test bags after training with Adam on the bags' labels.

    Args:
        key: of the initialisation and of the batches, which are drawn with replacement.
        model: bag model with one logit, `Layer` whose `apply` returns a dict with `logits` [B, 1].
        train: bags as of `make_single_concept(..., train=True)`: `x`, `where`, `y`.
        test: likewise, of the same features; the number of instances may differ.
        steps: optimiser steps.
        learning_rate: of Adam.
        batch: bags per step.

    Returns:
        A dict of scalars: `train_auc`, `test_auc`, and `passed`, bool, whether `test_auc` is above 0.5.

    Raises:
        ValueError: the model has not exactly one logit.

    Example:
        >>> from jaxlab import mil
        >>> def test(key):
        ...     train, test = (make_single_concept(key, 64, train=there) for there in (True, False))
        ...     return run_unit_test(key, mil.mean_mil(1), train, test)
        >>> sorted(jax.eval_shape(test, jax.random.key(0)))
        ['passed', 'test_auc', 'train_auc']

    Source:
        Raff, Holt, arXiv 2310.17867, section 4. Reconstructed: optimiser and threshold.
    """
    train, test = ({name: jnp.asarray(bags[name]) for name in ("x", "where", "y")} for bags in (train, test))
    key_init, key_steps = jax.random.split(key)
    params = model.init(key_init, train["x"].shape[-1])
    optimizer = optax.adam(learning_rate)

    def logits(params, x, where):
        z = model.apply(params, x, where=where)["logits"]
        if z.shape[1:] != (1,):
            raise ValueError(f"model gives logits of shape {z.shape}, expected [B, 1]")
        return z[:, 0].astype(compute_dtype(z))

    def loss(params, rows):
        z = logits(params, train["x"][rows], train["where"][rows])
        return jnp.mean(optax.sigmoid_binary_cross_entropy(z, train["y"][rows].astype(z.dtype)))

    def step(carry, key):
        params, state = carry
        rows = jax.random.randint(key, (batch,), 0, train["y"].shape[0])
        updates, state = optimizer.update(jax.grad(loss)(params, rows), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(key_steps, steps))

    def auc(bags):
        score = lambda one: logits(params, one[0][None], one[1][None])[0]
        scores = jax.lax.map(score, (bags["x"], bags["where"]), batch_size=min(256, bags["y"].shape[0]))
        return bag_auc(scores, bags["y"])

    train_auc, test_auc = auc(train), auc(test)
    return {"train_auc": train_auc, "test_auc": test_auc, "passed": test_auc > 0.5}


def monotonicity_violation(
    model: Layer, params: dict, x: Array, extra: Array, *, where: Array | None = None, tolerance: float = 0.0
) -> Array:
    """Returns how often adding an instance to a bag lowers its logit, which no respectful model does.

    `mean over bags b and instances e of [logit(bag b and e) < logit(bag b) - tolerance]`.

    Args:
        model: bag model with one logit or more (each counts).
        params: its parameters.
        x: float [B, N, D], bags.
        extra: float [M, D], instances to add, one at a time.
        where: bool [B, N], real instances; empty bags do not count.
        tolerance: >= 0, for models whose last operations round.

    Returns:
        Scalar in [0, 1], in the accumulation dtype; 0 without a bag.

    Raises:
        ValueError: shapes do not fit or `tolerance` is negative.

    Example:
        >>> from jaxlab import mil
        >>> model, x = mil.mi_net(1), jnp.ones((4, 5, 3))
        >>> violated = jax.jit(lambda key: monotonicity_violation(model, model.init(key, 3), x, x[0]))
        >>> float(violated(jax.random.key(0)))
        0.0

    Source:
        Raff, Holt, arXiv 2310.17867, section 3 (the property that the tests look for).
    """
    bags = group(x, where, None, None)
    if extra.ndim != 2 or extra.shape[1] != x.shape[2]:
        raise ValueError(f"extra has shape {extra.shape}, expected [M, {x.shape[2]}]")
    if tolerance < 0:
        raise ValueError(f"tolerance={tolerance} must not be negative")
    return rows_mixed(_violation)(x, extra, params, bags, model=model, tolerance=tolerance)


def mi_net_multi(num_concepts: int, *, combine: str = "product") -> Layer:
    """Returns the monotone model of concepts that must all be present: `AND_c max_i (w_c . h_i + b_c)`.

    The conjunction is the smallest concept's logit ("min"), or the logit of the product of their probabilities, which
    passes a gradient to all of them and so learns where the minimum gets stuck. Adding an instance to a bag that is not
    empty never lowers its logit. Give it more concepts than the data have: several may find the same one.

    Args:
        num_concepts: number of concepts.
        combine: "product" or "min".

    Returns:
        A `Layer` over instances [B, N, D] or [T, D]; its dict has `logits` [B, 1], `concept_logits` [B, concepts] and
        `instance_logits` [B, N, concepts] or [T, concepts].

    Raises:
        ValueError: `num_concepts` is below 1 or `combine` is unknown; in `apply`, shapes do not fit.

    Example:
        >>> model = mi_net_multi(2)
        >>> out = jax.eval_shape(lambda key: model.apply(model.init(key, 3), jnp.ones((4, 5, 3))), jax.random.key(0))
        >>> out["logits"].shape
        (4, 1)

    Source:
        Raff, Holt, arXiv 2310.17867, section 3 (threshold-based assumption). The model is reconstructed.
    """
    at_least_one(num_concepts=num_concepts)
    if combine not in ("product", "min"):
        raise ValueError(f"combine={combine!r} must be 'product' or 'min'")
    head = xavier_dense(num_concepts)

    def run(params, x, bags):
        bias = params["head"]["b"].astype(x.dtype)
        scores = xavier_dense(num_concepts, bias=False).apply({"w": params["head"]["w"]}, x)
        concepts = bags.max(scores) + bias[None]
        instances = scores + bias.reshape((1,) * (x.ndim - 1) + (-1,))
        logits = jnp.min(concepts, axis=1, keepdims=True) if combine == "min" else _logit_of_product(concepts)
        return {"logits": logits, "concept_logits": concepts, "instance_logits": instances}

    return bag_model(lambda key, size: {"head": head.init(key, size)}, run)


def gnn_mil(num_classes: int, *, hidden: int = 64, k: int = 4) -> Layer:
    """Returns a graph network over a bag's nearest neighbours, the mean over its nodes, and a linear head.

    `u_i = relu(W_1 h_i + W_2 mean_{j in kNN(i)} h_j + b)`, neighbours by Euclidean distance inside the bag.

    Args:
        num_classes: C.
        hidden: size of u.
        k: number of neighbours; all others where a bag has fewer, and the mean of none is 0.

    Returns:
        A `Layer` over instances [B, N, D] or [T, D]; its dict has `logits` and `embedding`. Distances have no gradient.

    Raises:
        ValueError: a size is below 1; in `apply`, shapes do not fit.

    Example:
        >>> model = gnn_mil(2)
        >>> out = jax.eval_shape(lambda key: model.apply(model.init(key, 3), jnp.ones((4, 5, 3))), jax.random.key(0))
        >>> out["embedding"].shape
        (4, 64)

    Source:
        Tu et al., Multiple instance learning with graph neural networks, arXiv 1906.04881, reduced to one layer.
    """
    at_least_one(num_classes=num_classes, hidden=hidden, k=k)
    own, near, head = xavier_dense(hidden), xavier_dense(hidden, bias=False), xavier_dense(num_classes)

    def init(key, size):
        keys = jax.random.split(key, 3)
        return {"own": own.init(keys[0], size), "near": near.init(keys[1], size), "head": head.init(keys[2], hidden)}

    def run(params, x, bags):
        u = own.apply(params["own"], x) + near.apply(params["near"], _neighbour_mean(x, bags, k))
        pooled = bags.mean(jax.nn.relu(u)).astype(x.dtype)
        return {"logits": head.apply(params["head"], pooled), "embedding": pooled}

    return bag_model(init, run)


def _violation(x, extra, params, bags, *, model, tolerance):
    absent, present = (jnp.full((x.shape[0], 1), there) for there in (False, True))

    def lowered(instance):
        # Before and after have one shape, so that rounding is the same and an exact comparison is fair.
        longer = jnp.concatenate([x, jnp.broadcast_to(instance[None, None], (x.shape[0], 1, x.shape[2]))], axis=1)
        before, after = (
            model.apply(params, longer, where=jnp.concatenate([bags.keep, there], axis=1))["logits"]
            for there in (absent, present)
        )
        return (after < before - tolerance).astype(compute_dtype(x))

    some = jnp.broadcast_to((bags.count > 0)[None, :], (extra.shape[0], x.shape[0]))
    return masked_mean(jax.vmap(lowered)(extra), some)


def _logit_of_product(logits: Array) -> Array:
    """With s = sum_c softplus(-z_c) = -log of the product, its logit is -log(exp(s) - 1) = -s - log(1 - exp(-s))."""
    wide = logits.astype(compute_dtype(logits))
    cost = jnp.sum(jax.nn.softplus(-wide), axis=1, keepdims=True)
    tiny = jnp.finfo(wide.dtype).tiny
    return (-cost - jnp.log(-jnp.expm1(-jnp.maximum(cost, tiny)))).astype(logits.dtype)


def _neighbour_mean(x: Array, bags: Bags, k: int) -> Array:
    """The mean over each instance's k nearest of the same bag; a list is one long row of several bags."""
    rows, keep = (x, bags.keep) if bags.segment_ids is None else (x[None], bags.keep[None])
    ids = jnp.zeros(keep.shape, jnp.int32) if bags.segment_ids is None else bags.segment_ids[None]
    n = rows.shape[1]
    wide = jax.lax.stop_gradient(rows.astype(compute_dtype(x)))

    def nearest(row, keep, ids):
        square = jnp.sum(row * row, axis=-1)

        def of(i):
            distance = square[i] + square - 2 * jnp.matmul(row, row[i])
            other = keep & keep[i] & (ids == ids[i]) & (jnp.arange(n) != i)
            nearness, index = jax.lax.top_k(jnp.where(other, -distance, -jnp.inf), min(k, n))
            return index, nearness > -jnp.inf

        # Blocks of instances, so that memory does not grow with the square of the bag.
        everyone = jnp.arange(n)
        return jax.vmap(of)(everyone) if n <= _BLOCK else jax.lax.map(of, everyone, batch_size=_BLOCK)

    index, real = jax.vmap(nearest)(wide, keep, ids)
    near = jax.vmap(lambda row, i: row[i])(rows, index)
    mean = masked_mean(near, real, axis=2).astype(x.dtype)
    return mean if bags.segment_ids is None else mean[0]


_BLOCK = 256
_PADDING, _POISON = -1, 3


def _alternating(num_bags: int) -> Array:
    return jnp.arange(num_bags) % 2 == 1


def _some(there: Array, number, slots: int, kind: int) -> Array:
    """Returns int32 [n, slots]: `kind` in the first `number` slots of the bags where it is there, padding elsewhere."""
    number = jnp.broadcast_to(jnp.asarray(number), there.shape)
    filled = there[:, None] & (jnp.arange(slots)[None, :] < number[:, None])
    return jnp.where(filled, jnp.int32(kind), jnp.int32(_PADDING))


def _with_background(key, key_fill, kinds, positive, features):
    number = jax.random.randint(key, positive.shape, 1, 10)
    kinds = jnp.concatenate([*kinds, _some(number > 0, number, 9, 0)], axis=1)
    return _filled(key_fill, kinds, positive, features, (0.0, 2.0, 3.0, -10.0), (1.0, 0.1, 0.1, 0.1))


def _filled(key, kinds, positive, features, means, deviations):
    """Draws the instances of the given kinds, in random order with the padding behind them."""
    key_order, key_noise = jax.random.split(key)
    order = jnp.argsort(jnp.where(kinds == _PADDING, 2.0, jax.random.uniform(key_order, kinds.shape)), axis=1)
    kinds = jnp.take_along_axis(kinds, order, axis=1)
    keep = kinds != _PADDING
    kind = jnp.maximum(kinds, 0)
    noise = jax.random.normal(key_noise, (*kinds.shape, features))
    x = jnp.asarray(means, noise.dtype)[kind][..., None] + jnp.asarray(deviations, noise.dtype)[kind][..., None] * noise
    labels = jnp.where((kinds == 1) | (kinds == 2), 1, jnp.where(kinds == 0, 0, -1)).astype(jnp.int32)
    return {
        "x": zero_where_false(x, keep),
        "where": keep,
        "y": positive.astype(jnp.int32),
        "instance_labels": labels,
    }
