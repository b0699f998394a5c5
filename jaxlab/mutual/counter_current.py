"""Counter-Current Learning: A Biologically Plausible Dual Network Approach for Deep Learning (CCL).

2024, arXiv 2409.19841. Two networks with weights of their own and mirrored sizes: one carries inputs up, the other
carries targets down. At every level the two meet in a local loss, and no gradient crosses a layer: no weights are
transported and no layer waits for another's error.

    up      a_0 = x,      a_l = elu(sg(a_{l-1}) W_l),        logits = sg(a_{L-1}) W_L
    down    c_L = targets (one row a class),  c_{l-1} = elu(sg(c_l) U_l),  c_0 = sg(c_1) U_1
    product L_l = 256 s mean((a_l c_l^T - onehot(y))^2) / D_l                        l = 0 .. L - 1,  s = 0.5
    cosine  L_l = s mean((A C^T - onehot(y))^2) + r mean((A A^T - 1)^2) + r mean((C C^T - 1)^2),  rows of length 1
    total   sum_l L_l + CE(y, logits)

sg stops the gradient, so W_l learns from L_l alone, W_L from the cross entropy, U_{l+1} from L_l. The constant 256 is
the code's and not the batch. Both networks take plain SGD with rate 1, each clipped to norm 1 on its own. As an
autoencoder, targets are the images and all levels, the last included, have L_l = s mean((a_l - c_l)^2).

Reconstructed: masks, unlabelled examples, collectives. Feedback alignment (arXiv 1411.0247), to which the paper
compares, is the same pair of networks whose downward weights stand still and carry the error of the cross entropy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxlab.ops.collectives import gather_rows, global_mean, value_and_grad
from jaxlab.ops.layers import dense
from jaxlab.ops.masked import compute_dtype, masked_mean, safe_divide, safe_normalize, zero_where_false
from jaxlab.ops.reduction import reduce_terms
from jaxlab.ops.sharding import rows_mixed
from jaxlab.types import Layer, Learner, LearnerState


def counter_current(
    net: Layer,
    optimizer: optax.GradientTransformation,
    *,
    num_classes: int | None,
    kind: str = "product",
    scale: float = 0.5,
    decorrelation: float = 0.5,
    confident: float | None = None,
    axis_name: str | None = None,
) -> Learner:
    """Returns a learner of an upward and a downward network that meet at every level.

    Args:
        net: a `counter_current_net`.
        optimizer: of both networks, see `counter_current_sgd`.
        num_classes: C, whose one-hot rows go down; None = an autoencoder, down which the images go.
        kind: of the level losses, see `counter_current_level_loss`; an autoencoder has "squared".
        scale: s.
        decorrelation: r.
        confident: examples whose label already has more than `1 - confident` of the probability enter the level losses
            as zeros; None = none do.
        axis_name: mapped axis over which the examples are spread.

    Returns:
        A `Learner` with a `LearnerState`. `init(key, batch)`; `batch`: `x [N, D]`, `y int [N]` (-1 = unlabelled, takes
        no part; an autoencoder reads none), optional `where [N]`. Metrics `loss`, `top` (of the last level) and
        `levels [L]`. `predict` gives `logits`.

    Raises:
        ValueError: `confident` is out of range or an autoencoder has one; see also `counter_current_loss`.

    Example:
        >>> learner = counter_current(counter_current_net([3], 2), counter_current_sgd(), num_classes=2)
        >>> batch = {"x": jnp.ones((4, 5)), "y": jnp.array([0, 1, 0, 0])}
        >>> state = jax.jit(learner.init)(jax.random.key(0), batch)
        >>> jax.jit(learner.update)(state, batch, None)[1]["levels"].shape
        (2,)

    Source:
        Kao, Hariharan, arXiv 2409.19841, algorithm 1; code IandRover/CCL-NeurIPS24.
    """
    if confident is not None and (num_classes is None or not 0 < confident < 1):
        raise ValueError(f"confident={confident} must lie in (0, 1), and an autoencoder must leave it at None")
    options = {"kind": "squared" if num_classes is None else kind, "scale": scale, "decorrelation": decorrelation}

    def init(key, batch):
        params = net.init(key, batch["x"].shape[1])
        return LearnerState(params, {}, optimizer.init(params), jnp.zeros((), jnp.int32))

    def update(state, batch, key):
        del key
        where = batch.get("where")
        where = jnp.ones(len(batch["x"]), bool) if where is None else where
        x = zero_where_false(batch["x"], where)
        labels = None if num_classes is None else jnp.asarray(batch["y"])
        targets = x if labels is None else jnp.eye(num_classes, dtype=x.dtype)

        def total(params):
            outputs = net.apply(params, x, targets)
            if confident is not None:
                probs = jax.lax.stop_gradient(jax.nn.softmax(outputs["logits"].astype(compute_dtype(x))))
                sure = jnp.take_along_axis(probs, jnp.maximum(labels, 0)[:, None], axis=1)[:, 0]
                learn = (sure <= 1 - confident)[:, None]
                silent = [jnp.where(learn, a, jnp.zeros_like(a)) for a in outputs["activations"][:-1]]
                outputs = {**outputs, "activations": (*silent, outputs["activations"][-1])}
            return counter_current_loss(outputs, labels, where=where, axis_name=axis_name, **options)

        (loss, levels), grads = value_and_grad(total, axis_name=axis_name, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss, "levels": levels[:-1], "top": levels[-1]}
        return LearnerState(params, {}, opt_state, state.step + 1), metrics

    def predict(state, batch):
        return {"logits": net.apply(state.params, batch["x"])["logits"]}

    return Learner(init, update, predict)


def counter_current_net(
    hidden: Sequence[int],
    num_outputs: int,
    *,
    gradient: str = "local",
    activation: Callable[[Array], Array] = jax.nn.elu,
    autoencoder: bool = False,
) -> Layer:
    """Returns the two networks, without biases, their weights drawn uniformly within `1 / sqrt(inputs)`.

    Args:
        hidden: sizes d_1 .. d_{L-1}.
        num_outputs: d_L, the number of classes; of an autoencoder the size of an image.
        gradient: "local" crosses no layer; "backprop" is the usual derivative; "alignment" carries the error of the
            logits down by the downward network's weights, which get no gradient.
        activation: between layers, both ways.
        autoencoder: whether upward weights behind the middle and downward weights before it start a thousand times
            smaller.

    Returns:
        A `Layer`: `init(key, size)` gives `forward` and `feedback` with leaves [inputs, outputs]; `apply(params, x,
        targets=None)` gives a dict: `logits`, `activations` (a_0 .. a_{L-1}, logits), and with targets [M, d_L]
        `signals` (c_0 .. c_{L-1}, targets).

    Raises:
        ValueError: an option is unknown or a size is below 1.

    Example:
        >>> net = counter_current_net([4], 3)
        >>> run = jax.jit(lambda key, x: net.apply(net.init(key, 2), x, jnp.eye(3)))
        >>> outputs = run(jax.random.key(0), jnp.ones((5, 2)))
        >>> [a.shape for a in outputs["activations"]], [c.shape for c in outputs["signals"]]
        ([(5, 2), (5, 4), (5, 3)], [(3, 2), (3, 4), (3, 3)])

    Source:
        Kao, Hariharan, arXiv 2409.19841; code IandRover/CCL-NeurIPS24. Feedback alignment: Lillicrap et al.,
        arXiv 1411.0247.
    """
    if gradient not in ("local", "backprop", "alignment"):
        raise ValueError(f"gradient={gradient!r} must be 'local', 'backprop' or 'alignment'")
    outputs = (*hidden, num_outputs)
    if min(outputs) < 1:
        raise ValueError(f"hidden={list(hidden)} and num_outputs={num_outputs} must be at least 1")
    depth = len(outputs)
    stop = jax.lax.stop_gradient if gradient == "local" else lambda a: a

    def init(key, size):
        sizes = list(pairwise((size, *outputs)))
        # One draw for all weights, so that a program need not hold a generator for each.
        counts = [a * b for a, b in sizes] * 2
        draws = jax.random.uniform(key, (sum(counts),), minval=-1.0, maxval=1.0)
        params, start = {"forward": {}, "feedback": {}}, 0
        for i, (name, (lower, upper)) in enumerate((n, s) for n in params for s in sizes):
            shape = (lower, upper) if name == "forward" else (upper, lower)
            late = (i % depth >= depth / 2) == (name == "forward")
            reach = shape[0] ** -0.5 * (1e-3 if autoencoder and late else 1.0)
            params[name][f"dense_{i % depth}"] = {"w": draws[start : start + counts[i]].reshape(shape) * reach}
            start += counts[i]
        return params

    def up(params, i, a):
        layer, weights = dense(outputs[i], bias=False), params["forward"][f"dense_{i}"]
        if gradient != "alignment":
            return layer.apply(weights, stop(a))
        # In value the product with the upward weights; its derivative by a is that of the downward weights.
        steered = layer.apply({"w": jax.lax.stop_gradient(params["feedback"][f"dense_{i}"]["w"].T)}, a)
        return layer.apply(weights, jax.lax.stop_gradient(a)) + (steered - jax.lax.stop_gradient(steered))

    def apply(params, x, targets=None):
        activations = [x]
        for i in range(depth):
            a = up(params, i, activations[-1])
            activations.append(activation(a) if i < depth - 1 else a)
        result = {"logits": activations[-1], "activations": tuple(activations)}
        if targets is None:
            return result
        if targets.ndim != 2 or targets.shape[1] != num_outputs:
            raise ValueError(f"targets has shape {targets.shape}, expected [M, {num_outputs}]")
        signals = [targets]
        for i in reversed(range(depth)):
            weights = params["feedback"][f"dense_{i}"]
            c = dense(weights["w"].shape[1], bias=False).apply(weights, stop(signals[0]))
            signals.insert(0, activation(c) if i else c)
        return {**result, "signals": tuple(signals)}

    return Layer(init, apply)


def counter_current_loss(
    outputs: dict[str, Array],
    labels: Array | None,
    *,
    kind: str = "product",
    scale: float = 0.5,
    decorrelation: float = 0.5,
    where: Array | None = None,
    axis_name: str | None = None,
) -> tuple[Array, Array]:
    """Returns the sum of all levels' losses, and each.

    Args:
        outputs: of a `counter_current_net`, with `activations` and `signals`.
        labels: int [N], -1 = unlabelled, takes no part; None = an autoencoder.
        kind: of the levels, see `counter_current_level_loss`; the last has cross entropy where there are labels.
        scale: s.
        decorrelation: r.
        where: bool [N], real examples.
        axis_name: mapped axis over which the examples are spread.

    Returns:
        The loss, a scalar in the accumulation dtype, and [L + 1], its terms from the input's level to the last.

    Raises:
        ValueError: see `counter_current_level_loss`.

    Example:
        >>> rows = jnp.eye(2)
        >>> outputs = {"logits": 50 * rows, "activations": (rows, 50 * rows), "signals": (rows, rows)}
        >>> jax.jit(counter_current_loss)(outputs, jnp.array([0, 1]))[1].tolist()
        [0.0, 0.0]

    Source:
        Kao, Hariharan, arXiv 2409.19841; code IandRover/CCL-NeurIPS24.
    """
    options = {"kind": kind, "scale": scale, "decorrelation": decorrelation, "where": where, "axis_name": axis_name}
    pairs = list(zip(outputs["activations"], outputs["signals"], strict=True))
    levels = [counter_current_level_loss(a, c, labels, **options) for a, c in (pairs if labels is None else pairs[:-1])]
    if labels is not None:
        labels = jnp.asarray(labels)
        keep = labels >= 0 if where is None else where & (labels >= 0)
        z = zero_where_false(outputs["logits"], keep)
        z = z.astype(compute_dtype(z))
        terms = optax.softmax_cross_entropy_with_integer_labels(z, jnp.maximum(labels, 0))
        levels.append(global_mean(terms, keep, axis_name=axis_name))
    levels = jnp.stack(levels)
    return jnp.sum(levels), levels


def counter_current_level_loss(
    activations: Array,
    signals: Array,
    labels: Array | None = None,
    *,
    kind: str = "product",
    scale: float = 0.5,
    decorrelation: float = 0.5,
    where: Array | None = None,
    axis_name: str | None = None,
    reduction: str = "mean",
) -> Array:
    """Returns how far a level's activations are from meeting the signals of their classes.

    `product`: `256 s mean_nc (a_n c_c^T - [y_n = c])^2 / D`. `cosine`: `s mean_nc (cos(a_n, c_c) - [y_n = c])^2` and r
    times the same for all pairs of activations and all pairs of signals, which should be like themselves alone.
    `squared`: `s mean (a_n - c_n)^2`, one signal an example and no labels.

    Args:
        activations: float [N, D].
        signals: float [C, D], one a class; for "squared" [N, D].
        labels: int [N], -1 = unlabelled, no term; None for "squared".
        kind: "product", "cosine" or "squared".
        scale: s.
        decorrelation: r.
        where: bool [N], real examples.
        axis_name: mapped axis over which the examples are spread.
        reduction: "mean" (over all shards) or "none", `[N]`.

    Returns:
        Scalar in the accumulation dtype (float32 for bfloat16 input), or `[N]` in the dtype of `activations`; no term
        gives 0.

    Raises:
        ValueError: shapes do not fit, an option is unknown, or labels are missing or too many.

    Example:
        >>> a, c = jnp.eye(2), jnp.array([[1.0, 0.0], [0.0, 1.0]])
        >>> loss = jax.jit(counter_current_level_loss)
        >>> float(loss(a, c, jnp.array([0, 1]))), float(loss(a, c, jnp.array([1, 0])))
        (0.0, 64.0)

    Source:
        Kao, Hariharan, arXiv 2409.19841; the constants are those of the code IandRover/CCL-NeurIPS24 (s = 0.5 for
        multilayer perceptrons; its convolutional network has cosines, s = 1, r = 0.5).
    """
    if kind not in ("product", "cosine", "squared"):
        raise ValueError(f"kind={kind!r} must be 'product', 'cosine' or 'squared'")
    if activations.ndim != 2 or signals.ndim != 2 or signals.shape[1] != activations.shape[1]:
        raise ValueError(f"activations and signals must be [N, D] and [M, D], got {activations.shape}, {signals.shape}")
    rows = activations.shape[0]
    if (labels is None) != (kind == "squared"):
        raise ValueError(f"kind={kind!r} {'takes no' if kind == 'squared' else 'needs'} labels")
    if labels is not None and labels.shape != (rows,):
        raise ValueError(f"labels has shape {labels.shape}, expected ({rows},)")
    if labels is None and len(signals) != rows:
        raise ValueError(f"signals has {len(signals)} rows, expected {rows}, one an example")
    if where is not None and where.shape != (rows,):
        raise ValueError(f"where has shape {where.shape}, expected ({rows},)")
    keep = jnp.ones(rows, bool) if where is None else where
    if labels is None:
        dtype = compute_dtype(activations, signals)
        apart = zero_where_false(activations, keep).astype(dtype) - zero_where_false(signals, keep).astype(dtype)
        terms = scale * jnp.mean(jnp.square(apart), axis=1)
    else:
        labels = jnp.asarray(labels)
        keep = keep & (labels >= 0)
        terms = rows_mixed(_level_terms)(
            activations, signals, labels, keep, kind=kind, scale=scale, decorrelation=decorrelation, axis_name=axis_name
        )
    return reduce_terms(terms, keep, reduction=reduction, axis_name=axis_name, dtype=activations.dtype)


def counter_current_alignment(
    activations: Array, signals: Array, labels: Array, *, where: Array | None = None
) -> Array:
    """Returns how well the two networks agree at a level: the mean cosine of an activation and its class's signal.

    `mean_n cos(a_n, c_{y_n})`.

    Args:
        activations: float [N, D].
        signals: float [C, D].
        labels: int [N], -1 = unlabelled.
        where: bool [N], real examples.

    Returns:
        Scalar in the accumulation dtype, 0 without any example; a zero vector has cosine 0.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> a, c = jnp.array([[2.0, 0.0]]), jnp.array([[0.0, 1.0], [3.0, 0.0]])
        >>> float(jax.jit(counter_current_alignment)(a, c, jnp.array([1])))
        1.0

    Source:
        A diagnostic of this library for arXiv 2409.19841, whose figures compare the two networks' representations.
    """
    if activations.ndim != 2 or signals.ndim != 2 or signals.shape[1] != activations.shape[1]:
        raise ValueError(f"activations and signals must be [N, D] and [C, D], got {activations.shape}, {signals.shape}")
    if labels.shape != activations.shape[:1]:
        raise ValueError(f"labels has shape {labels.shape}, expected {activations.shape[:1]}")
    labels = jnp.asarray(labels)
    keep = labels >= 0 if where is None else where & (labels >= 0)
    dtype = compute_dtype(activations, signals)
    a = safe_normalize(zero_where_false(activations, keep).astype(dtype))
    c = safe_normalize(signals.astype(dtype))[jnp.maximum(labels, 0)]
    return masked_mean(jnp.sum(a * c, axis=1), keep)


def counter_current_sgd(
    learning_rate: float | Callable[[Array], Array] = 1.0, *, max_norm: float = 1.0, centralize: bool = False
) -> optax.GradientTransformation:
    """Returns plain SGD for the two networks, each of whose gradients is clipped to a norm of its own.

    Args:
        learning_rate: of both.
        max_norm: largest norm of all gradients of one network.
        centralize: whether every unit's gradient first loses its mean over the unit's inputs.

    Returns:
        A transformation for parameters with the entries `forward` and `feedback`.

    Raises:
        ValueError: `max_norm` is not positive.

    Example:
        >>> tx = counter_current_sgd()
        >>> grads = {"forward": jnp.array([[0.0], [8.0]]), "feedback": jnp.array([[0.5]])}
        >>> updates, _ = jax.jit(lambda g: tx.update(g, tx.init(g)))(grads)
        >>> updates["forward"].tolist(), updates["feedback"].tolist()
        ([[-0.0], [-1.0]], [[-0.5]])

    Source:
        Code IandRover/CCL-NeurIPS24 (rate 1, norm 1 for MNIST; centralised gradients for convolutional networks).
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm={max_norm} must be positive")

    def centre(updates, params=None):
        del params
        return jax.tree.map(lambda g: g - jnp.mean(g, axis=0, keepdims=True), updates)

    steps = [optax.clip_by_global_norm(max_norm), optax.sgd(learning_rate)]
    one = optax.chain(*([optax.stateless(centre)] if centralize else []), *steps)
    return optax.partition({"forward": one, "feedback": one}, {"forward": "forward", "feedback": "feedback"})


def _level_terms(activations, signals, labels, keep, *, kind, scale, decorrelation, axis_name):
    dtype = compute_dtype(activations, signals)
    a, c = zero_where_false(activations, keep).astype(dtype), signals.astype(dtype)
    product = lambda x, y: jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST)
    wanted = jax.nn.one_hot(labels, c.shape[0], dtype=dtype)
    if kind == "product":
        return 256 * scale / a.shape[1] * jnp.mean(jnp.square(product(a, c) - wanted), axis=1)
    a, c = safe_normalize(a), safe_normalize(c)
    everyone, real = gather_rows(a, axis_name), gather_rows(keep, axis_name)
    # A row's cosine with itself is 1 as wanted (0 for a zero vector), so only the others are asked for.
    own = jnp.sum(jnp.square(a), axis=1)
    others = jnp.sum(jnp.where(real[None, :], jnp.square(product(a, everyone)), 0.0), axis=1)
    alike = safe_divide(others - jnp.square(own) + jnp.square(own - 1), jnp.sum(real, dtype=dtype))
    classes = jnp.mean(jnp.square(product(c, c) - jnp.eye(c.shape[0], dtype=dtype)))
    meet = jnp.mean(jnp.square(product(a, c) - wanted), axis=1)
    return scale * meet + decorrelation * (alike + classes)
