"""Rethinking Positive Pairs in Contrastive Learning (2024, arXiv 2410.18200; Hydra, later SimLAP).

Samples of ANY two classes may be a positive pair: a gate, learnt for the pair of classes, chooses the dimensions in
which they are to be alike. All other classes' samples are negatives, in the same dimensions.

    v_ab = sigmoid(MLP((e_a + e_b) / 2)) in (0, 1)^D                   e_c an embedding of class c
    s_ik = cos(z_i * v, z'_k * v) / t,   v the gate of the anchor's class a = y_i and its partner class b
    loss_i = mean over p with y_p = b of log(exp s_ip + sum_{k: y_k not in {a, b}} exp s_ik) - s_ip

z and z' are two views. With b = a and gates of 1 this is a supervised contrastive loss. Following the authors' code,
only the partner's class is positive; further samples of the anchor's own class are neither positive nor negative.

Reconstructed: masks; layer normalisation inside the gate where the code has batch normalisation (the gate then depends
on its pair alone); the mean over an anchor's positives before that over anchors (the code has it in one of its scripts
and the mean over all pairs in others, which is the same for classes of one size). `normalize=False` is another of its
scripts, which takes z * v^2 . z' of unit vectors as it is.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.contrastive._pairs import checked_where, unit_rows
from jaxlab.ops.collectives import gather_rows
from jaxlab.ops.layers import dense, feature_norm
from jaxlab.ops.masked import compute_dtype, masked_logsumexp, masked_mean, safe_divide, zero_where_false
from jaxlab.ops.reduction import reduce_terms
from jaxlab.ops.sharding import rows_mixed
from jaxlab.types import Layer, PyTree


def pair_contrastive_loss(
    a: Array,
    b: Array,
    labels: Array,
    partners: Array,
    gates: Array,
    *,
    temperature: float | Array = 0.1,
    normalize: bool = True,
    where: Array | None = None,
    axis_name: str | None = None,
    reduction: str = "mean",
) -> Array:
    """Returns the contrastive loss whose positives are the samples of each anchor's partner class, seen through a gate.

    `mean_i mean_{p: y_p = partner_i} [log(exp s_ip + sum_{k negative} exp s_ik) - s_ip]`, s from `filtered_similarity`.

    Args:
        a: float [N, D], anchors: one view of each sample; need not be normalised.
        b: float [N, D], another view of the same samples.
        labels: int [N], class of each sample; -1 = unlabelled: no anchor and no positive, but a negative of all.
        partners: int [N], the class paired with each anchor's (`sample_partners`); -1 = the anchor is no term.
        gates: float >= 0 [N, D], of the pairs (`labels`, `partners`), from `pair_gate`; 1 everywhere = no gate.
        temperature: t > 0 (the code starts at 0.1 and trains its logarithm: an array may be given).
        normalize: whether gated vectors are brought to length 1 before their product.
        where: bool [N], real samples.
        axis_name: mapped axis over which the samples are spread: positives and negatives come from all shards.
        reduction: "mean" (over all shards) or "none", `[N]`.

    Returns:
        Scalar in the accumulation dtype (float32 for bfloat16 input), or `[N]` in the dtype of `a`. An anchor whose
        partner class is absent is no term; no term gives 0.

    Raises:
        ValueError: shapes do not fit, or an option is out of range.

    Example:
        >>> z, y = jnp.eye(3), jnp.arange(3)
        >>> loss = jax.jit(lambda partners: pair_contrastive_loss(z, z, y, partners, jnp.ones((3, 3))))
        >>> round(float(loss(y)), 3), round(float(loss(y[::-1])), 3)
        (0.0, 0.462)

    Source:
        Wu et al., arXiv 2410.18200, and its code (class SimLAP: type "arbitrary", temperature 0.1).
    """
    keep = _checked_gated(a, b, gates, where, temperature)
    if a.shape != b.shape:
        raise ValueError(f"a and b must have one shape [N, D], got {a.shape} and {b.shape}")
    for name, value in {"labels": labels, "partners": partners}.items():
        if value.shape != keep.shape:
            raise ValueError(f"{name} has shape {value.shape}, expected {keep.shape}, a class for each row")
    terms, some = rows_mixed(_terms)(
        a, b, labels, partners, gates, keep, temperature=temperature, normalize=normalize, axis_name=axis_name
    )
    return reduce_terms(terms, some, reduction=reduction, axis_name=axis_name, dtype=a.dtype)


def pair_gate(num_classes: int, *, embedding: int = 512, hidden: int = 1024) -> Layer:
    """Returns the network that chooses dimensions for a pair of classes: the same for (a, b) and (b, a).

    `sigmoid(MLP((e_a + e_b) / 2))`, the MLP being ReLU, norm, dense, ReLU, norm, dense.

    Args:
        num_classes: C.
        embedding: size of a class embedding.
        hidden: size of the hidden layer.

    Returns:
        A `Layer`: `params = init(key, D)`, `gates = apply(params, a, b=None)` with `a`, `b` int [...] (None: b = a)
        and gates float32 [..., D] in (0, 1). A class out of range (-1) has the gate of a class in range.

    Raises:
        ValueError: a size is below 1.

    Example:
        >>> gate = pair_gate(5, embedding=8, hidden=8)
        >>> run = jax.jit(lambda key, a, b: gate.apply(gate.init(key, 3), a, b))
        >>> gates = run(jax.random.key(0), jnp.array([1, 4]), jnp.array([4, 1]))
        >>> gates.shape, bool((gates[0] == gates[1]).all())
        ((2, 3), True)

    Source:
        Wu et al., arXiv 2410.18200; sizes of the code. Reconstructed: layer instead of batch normalisation.
    """
    for name, value in {"num_classes": num_classes, "embedding": embedding, "hidden": hidden}.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    norm, first = feature_norm(), dense(hidden)

    def init(key, size):
        key_table, key_first, key_last = jax.random.split(key, 3)
        return {
            "table": jax.random.normal(key_table, (num_classes, embedding)),
            "norm_in": norm.init(key, embedding),  # takes no random numbers
            "first": first.init(key_first, embedding),
            "norm_hidden": norm.init(key, hidden),
            "last": dense(size).init(key_last, hidden),
        }

    def look_up(table, a, b):
        a, b = (jnp.clip(index, 0, num_classes - 1) for index in (a, b))
        return (table[a] + table[b]) / 2

    def apply(params, a, b=None):
        x = rows_mixed(look_up)(params["table"], a, a if b is None else b)
        x = first.apply(params["first"], norm.apply(params["norm_in"], jax.nn.relu(x)))
        x = norm.apply(params["norm_hidden"], jax.nn.relu(x))
        return jax.nn.sigmoid(dense(params["last"]["b"].shape[0]).apply(params["last"], x))

    return Layer(init, apply)


def filtered_similarity(a: Array, b: Array, gates: Array, *, normalize: bool = True) -> Array:
    """Returns the cosines between gated vectors, `cos(a_i * gates_i, b_k * gates_i)`, without forming them.

    Args:
        a: float [N, D]; need not be normalised.
        b: float [M, D].
        gates: float >= 0 [N, D], of each row of `a`; their scale does not matter if `normalize`.
        normalize: False gives `sum_d a_id gates_id^2 b_kd` of the unit vectors instead.

    Returns:
        float [N, M] in the dtype of `a`; 0 where a gated vector is zero.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> a, b = jnp.array([[1.0, 1.0]]), jnp.array([[2.0, -2.0]])
        >>> similarity = jax.jit(filtered_similarity)
        >>> [similarity(a, b, jnp.array([gate])).round(3).item() for gate in ([0.5, 0.0], [0.5, 0.5])]
        [1.0, 0.0]

    Source:
        Wu et al., arXiv 2410.18200, and its code.
    """
    keep = _checked_gated(a, b, gates, None, 1.0)
    exist = jnp.ones(b.shape[0], bool)
    return rows_mixed(_similarity)(unit_rows(a, keep), unit_rows(b, exist), gates, normalize=normalize).astype(a.dtype)


def sample_partners(key: Array, labels: Array, *, kind: str = "arbitrary", num_classes: int | None = None) -> Array:
    """Returns a class to pair with that of each sample.

    Args:
        key: decides the pairing.
        labels: int [N]; -1 = unlabelled, which as a partner means no term.
        kind: "arbitrary": the class of another sample, by a random permutation of the batch, so that the partner class
            is present; "identical": the own class; "distinct": any other class, uniformly.
        num_classes: C >= 2, of "distinct".

    Returns:
        int32 [N].

    Raises:
        ValueError: `kind` is unknown, or "distinct" comes without `num_classes`.

    Example:
        >>> y = jnp.array([3, 1, 2])
        >>> sorted(sample_partners(jax.random.key(0), y).tolist())
        [1, 2, 3]

    Source:
        Wu et al., arXiv 2410.18200, and its code.
    """
    labels = jnp.asarray(labels, jnp.int32)
    if kind == "arbitrary":
        return rows_mixed(jax.random.permutation)(key, labels)
    if kind == "identical":
        return labels
    if kind != "distinct":
        raise ValueError(f"kind={kind!r} must be 'arbitrary', 'identical' or 'distinct'")
    if num_classes is None or num_classes < 2:
        raise ValueError(f"num_classes={num_classes} must be at least 2 for kind='distinct'")
    step = jax.random.randint(key, labels.shape, 1, num_classes, jnp.int32)
    return jnp.where(labels >= 0, (labels + step) % num_classes, -1)


def gate_entropy(gates: Array, *, where: Array | None = None) -> Array:
    """Returns the mean entropy of gates as probabilities, in nats: 0 if all are 0 or 1, log 2 if all are a half.

    Added to the loss with a small weight it drives gates to decide.

    Args:
        gates: float [N, D] in [0, 1].
        where: bool [N], real rows.

    Returns:
        Scalar in the accumulation dtype; 0 without rows.

    Raises:
        ValueError: a shape does not fit.

    Example:
        >>> round(float(gate_entropy(jnp.array([[0.5, 1.0]]))), 4)  # log(2) / 2
        0.3466

    Source:
        Wu et al., arXiv 2410.18200, whose code reports it. Reconstructed: as the penalty on gates.
    """
    if gates.ndim != 2 or (where is not None and where.shape != gates.shape[:1]):
        raise ValueError(
            f"gates and where must be [N, D] and [N], got {gates.shape} and {getattr(where, 'shape', None)}"
        )
    keep = jnp.ones(gates.shape[0], bool) if where is None else where
    p = zero_where_false(gates, keep).astype(compute_dtype(gates))
    parts = (jnp.where((q > 0) & (q < 1), q, 1.0) for q in (p, 1 - p))
    return masked_mean(-sum(q * jnp.log(q) for q in parts), keep)


def class_relations(gate: Layer, params: PyTree, *, num_classes: int) -> Array:
    """Returns how many dimensions each two classes share: the mean of their gate.

    Args:
        gate: from `pair_gate`.
        params: its parameters.
        num_classes: C.

    Returns:
        float [C, C], symmetric, in (0, 1).

    Example:
        >>> gate = pair_gate(3, embedding=4, hidden=4)
        >>> run = lambda key: class_relations(gate, gate.init(key, 8), num_classes=3)
        >>> jax.eval_shape(run, jax.random.key(0)).shape
        (3, 3)

    Source:
        Wu et al., arXiv 2410.18200 (class relationships by gates); the mean is reconstructed.
    """
    every = jnp.arange(num_classes)
    one, other = (jnp.broadcast_to(x, (num_classes, num_classes)) for x in (every[:, None], every[None, :]))
    return jnp.mean(gate.apply(params, one, other), axis=-1)


def _checked_gated(a, b, gates, where, temperature):
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"a and b must be [N, D] and [M, D], got {a.shape} and {b.shape}")
    if gates.shape != a.shape:
        raise ValueError(f"gates has shape {gates.shape}, expected {a.shape}, as a")
    return checked_where(where, a.shape[0], temperature)


def _similarity(a, b, gates, *, normalize):
    """Returns the products [N, M] of unit vectors through gates, in the accumulation dtype."""
    gates = gates.astype(a.dtype)
    product = lambda x, y: jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST)
    if not normalize:
        return product(a * gates * gates, b)
    # A cosine does not depend on the gates' scale; brought to 1, no square of theirs can underflow.
    largest = jax.lax.stop_gradient(jnp.max(gates, axis=1, keepdims=True))
    square = jnp.square(safe_divide(gates, largest))
    lengths = jnp.sum(a * a * square, axis=1, keepdims=True) * product(square, b * b)
    some = lengths > jnp.finfo(lengths.dtype).tiny
    return jnp.where(some, product(a * square, b) / jnp.sqrt(jnp.where(some, lengths, 1.0)), 0.0)


def _terms(a, b, labels, partners, gates, keep, *, temperature, normalize, axis_name):
    """Returns the loss of each anchor [N] and whether it has a positive."""
    others, exist, classes = (gather_rows(x, axis_name) for x in (unit_rows(b, keep), keep, labels))
    gates = zero_where_false(gates, keep)
    logits = _similarity(unit_rows(a, keep), others, gates, normalize=normalize) / temperature
    own, partner = (classes[None, :] == x[:, None] for x in (labels, partners))
    anchor = keep & (labels >= 0) & (partners >= 0)
    positive = partner & exist[None, :] & anchor[:, None]
    negative = exist[None, :] & jnp.logical_not(own | partner)
    # log(exp s_p + sum exp s_k) - s_p = softplus(log sum exp s_k - s_p); without negatives it is 0.
    some = jnp.any(negative, axis=1, keepdims=True)
    rest = masked_logsumexp(logits, negative | jnp.logical_not(some))[:, None]
    term = jnp.where(some, jax.nn.softplus(rest - logits), 0.0)
    return masked_mean(term, positive, axis=1), jnp.any(positive, axis=1)
