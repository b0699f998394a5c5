"""The recipe `mil`: bags of real pictures with one label each, any model of the family, and what it attends to."""

from __future__ import annotations

import dataclasses
import hashlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from jaxlab.engine import data as data_source
from jaxlab.engine.errors import InputError, did_you_mean
from jaxlab.engine.recipe import Recipe
from jaxlab.types import Layer, Learner

PICTURES = ("digits", "skimage")
_CHUNK = 50  # test bags at a time


@dataclasses.dataclass(frozen=True)
class Mil(Recipe):
    """A bag classifier learns which pictures of a bag matter, from the label of the bag alone.

    Command: `jaxlab train mil`. Cost: about a minute on two CPU cores. Expected: an AUC above 0.95 of bags, and above
    0.9 of the instances of positive bags.

    Attributes:
        pictures: `digits`, or `skimage` (patches of the photographs that scikit-image carries).
        data: where the bags lie; filled in.
        model: of the family, see `models`.
        bags: number of training bags; half as many to test.
        size: pictures in a bag, a square number.
        target: which class of picture makes a bag positive; -1 = the nine, or the grass.
        positives: at most so many of them are in a positive bag.
        width: features of a picture.
        learning_rate: of Adam.
        weight_decay: of Adam.
    """

    name: ClassVar[str] = "mil"
    title: ClassVar[str] = "bags of pictures with one label each (multiple-instance learning)"
    expected: ClassVar[str] = "about 1 minute on 2 CPU cores"

    pictures: str = "digits"
    data: str = ""
    model: str = "abmil"
    steps: int = 600
    batch: int = 16
    bags: int = 600
    size: int = 25
    target: int = -1
    positives: int = 3
    width: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 1e-3

    def validate(self) -> None:
        """Raises an InputError for a field that makes no sense."""
        super().validate()
        for value, choices in ((self.pictures, PICTURES), (self.model, tuple(models()))):
            if value not in choices:
                raise InputError(f"{value!r} must be one of {', '.join(choices)}{did_you_mean(value, choices)}")
        if self.width < 8 or self.width % 8:
            raise InputError(f"--width must be a multiple of 8, got {self.width}")
        if round(self.size**0.5) ** 2 != self.size or self.size < 1:
            raise InputError(f"--size must be a square number, got {self.size}")
        if not 1 <= self.positives <= self.size:
            raise InputError(f"--positives must be between 1 and --size {self.size}, got {self.positives}")
        if self.bags < self.batch:
            raise InputError(f"--bags {self.bags} must be at least --batch {self.batch}")

    def prepared(self) -> Mil:
        """Returns the recipe with its bags written to the cache, if they are not there already."""
        self.validate()
        target = {"digits": 9, "skimage": 0}[self.pictures] if self.target == -1 else self.target
        options = (self.pictures, self.bags, self.size, target, self.positives, self.seed)
        name = f"mil-{self.pictures}-{hashlib.sha256(repr(options).encode()).hexdigest()[:12]}"
        folder = data_source._digits_home(None, None).parent / name
        if not (folder / "test.npz").exists():
            pools = _digits() if self.pictures == "digits" else _patches()
            if target not in np.unique(pools[0][1]):
                raise InputError(f"--target {target} is not among the classes 0 to {pools[0][1].max()}")
            rng = np.random.default_rng([self.seed, 77])
            with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
                parts = Path(temporary) / name
                parts.mkdir()
                for part, pool, number in zip(
                    ("train", "test"), pools, (self.bags, max(self.bags // 2, 2)), strict=True
                ):
                    bags = _draw(rng, *pool, target, self.positives, (number, self.size))
                    np.savez(parts / f"{part}.npz", **bags)
                if not folder.exists():
                    parts.rename(folder)
        return dataclasses.replace(self, data=str(folder))

    def learner(self, num_classes: int, steps: int) -> Learner:
        """Returns the chosen model's learner, over bags of pictures."""
        import optax

        optimizer = optax.adamw(self.learning_rate, weight_decay=self.weight_decay)
        return _over_pictures(*models()[self.model](self, optimizer, steps), spectrum=self.pictures == "skimage")

    def report(self, run_dir: Path, evaluation: dict[str, Any]) -> list[str]:
        """Returns the AUC of bags and of instances, and draws what the model attends to."""
        outputs, bags = self._test(run_dir)
        inside = np.where(bags["y"][:, None] == 1, bags["instances"], -1)
        bag_auc, instance_auc = _auc(outputs["margin"], bags["y"]), _auc(outputs["instance"], inside)
        path = _heat_map(run_dir, bags, outputs["instance"], self)
        return [
            f"test bags: AUC {bag_auc:.3f}, accuracy {100 * evaluation['ensemble_accuracy']:.1f}%",
            f"instances of positive test bags: AUC {instance_auc:.3f}",
            f"attention over pictures: {path}",
        ]

    def _test(self, run_dir: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        import jax

        from jaxlab.engine import guard
        from jaxlab.engine.checkpoint import Checkpoints

        with np.load(Path(self.prepared().data) / "test.npz", allow_pickle=False) as file:
            bags = {name: file[name] for name in file.files}
        learner = self.learner(2, self.steps)
        example = {"x": bags["x"][:1], "y": bags["y"][:1], "where": np.ones(1, bool), "index": np.zeros(1, np.int32)}
        example = {name: np.repeat(value, self.batch, axis=0) for name, value in example.items()}
        checkpoints = Checkpoints(run_dir)
        try:
            start = lambda key: guard.start(learner.init(key, example))
            state = checkpoints.restore(jax.eval_shape(start, jax.random.key(0)))[1].learner
        finally:
            checkpoints.close()
        predict, margins, instances = jax.jit(learner.predict), [], []
        for batch in data_source.eval_batches({"x": bags["x"], "y": bags["y"]}, min(_CHUNK, len(bags["y"]))):
            out = jax.device_get(predict(state, {"x": batch["x"]}))
            margin = out["logits"][0, :, 1] - out["logits"][0, :, 0]
            margins.append(margin[batch["where"]])
            instances.append(out["instance"][batch["where"]])
        return {"margin": np.concatenate(margins), "instance": np.concatenate(instances)}, bags


def models() -> dict[str, Callable[..., tuple[Learner, Callable]]]:
    """Returns by name what builds a learner over bags [B, N, D], and a function `(state, x)` to the outputs of bags."""
    from jaxlab import mil
    from jaxlab.ops.layers import mlp

    def plain(make: Callable[[int], Layer]):
        def build(recipe, optimizer, steps):
            del steps
            net = mil.with_encoder(mlp([recipe.width, recipe.width]), make(recipe.width))
            return _plain_learner(net, optimizer), lambda state, x: net.apply(state.params, x)

        return build

    def mhim(recipe, optimizer, steps):
        net = mil.with_encoder(mil.instance_encoder(recipe.width), mil.abmil(2))
        ratio = lambda step: mil.ham_ratio_schedule(0.04, step, steps)
        learner = mil.mhim(net, optimizer, ratio_high=ratio, decay=0.99)
        return learner, lambda state, x: net.apply(state.params, x)

    def mhim_v2(recipe, optimizer, steps):
        del steps
        encoder, model = mil.instance_encoder(recipe.width), mil.abmil(2)
        learner = mil.mhim_v2(encoder, model, optimizer, num_tokens=2, decay=0.99)
        return learner, lambda state, x: learner.predict(state, {"x": x})

    def ins(recipe, optimizer, steps):
        learner = mil.ins(
            mlp([recipe.width, recipe.width]),
            optimizer,
            num_instances=recipe.bags * recipe.size,
            warmup_steps=max(1, steps // 5),
            total_steps=steps,
            inherit_steps=steps // 20,
            queue_size=1024,
            features=recipe.width,
            key_decay=0.99,
        )
        return _instance_learner(learner, recipe.size), lambda state, x: _largest(learner.predict(state, {"x": x}))

    def r2t_abmil(width):
        block = mil.r2t(regions=2, heads=4, taps=3, cross_regions=2, cross_heads=4)
        model = mil.abmil(2)

        def init(key, size):
            import jax

            keys = jax.random.split(key)
            return {"block": block.init(keys[0], size), "model": model.init(keys[1], size)}

        def apply(params, x, *, where=None, segment_ids=None, num_segments=None, key=None, train=False):
            layout = {"where": where, "segment_ids": segment_ids, "num_segments": num_segments}
            h = block.apply(params["block"], x, **layout, key=key, train=train)
            return model.apply(params["model"], h, **layout)

        return Layer(init, apply)

    return {
        "abmil": plain(lambda width: mil.abmil(2)),
        "deepsets": plain(lambda width: mil.deepsets(2, outer=[width])),
        "dsmil": plain(lambda width: mil.dsmil(2)),
        "gated_abmil": plain(lambda width: mil.abmil(2, gated=True)),
        "gnn_mil": plain(lambda width: mil.gnn_mil(2)),
        "hopfield_mil": plain(lambda width: mil.hopfield_mil(2)),
        "ins": ins,
        "mamba_mil": plain(lambda width: mil.mamba_mil(2, features=width, layers=1, rate=5)),
        "max_mil": plain(lambda width: mil.max_mil(2)),
        "mean_mil": plain(lambda width: mil.mean_mil(2)),
        "mhim": mhim,
        "mhim_v2": mhim_v2,
        "mi_net": plain(lambda width: mil.mi_net(1)),
        "mi_net_multi": plain(lambda width: mil.mi_net_multi(4)),
        "r2t_abmil": plain(r2t_abmil),
        "transmil": plain(lambda width: mil.transmil(2)),
    }


def _plain_learner(net: Layer, optimizer) -> Learner:
    import jax
    import jax.numpy as jnp
    import optax

    from jaxlab.types import LearnerState

    def init(key, batch):
        params = net.init(key, batch["x"].shape[-1])
        return LearnerState(params, {}, optimizer.init(params), jnp.zeros((), jnp.int32))

    def update(state, batch, key):
        def loss(params):
            z = _two_logits(net.apply(params, batch["x"], key=key, train=True)["logits"])
            terms = optax.softmax_cross_entropy_with_integer_labels(z, jnp.maximum(batch["y"], 0))
            keep = (batch["y"] >= 0).astype(z.dtype)
            right = (jnp.argmax(z, axis=1) == batch["y"]).astype(z.dtype)
            total = jnp.maximum(jnp.sum(keep), 1)
            return jnp.sum(terms * keep) / total, jnp.sum(right * keep) / total

        (value, accuracy), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return LearnerState(params, {}, opt_state, state.step + 1), {"loss": value, "accuracy": accuracy}

    return Learner(init, update, lambda state, batch: net.apply(state.params, batch["x"]))


def _instance_learner(learner: Learner, size: int) -> Learner:
    """Returns a learner of single instances over bags: each has the label of its bag and a place of its own."""
    import jax
    import jax.numpy as jnp

    def flat(batch, key):
        x = batch["x"].reshape(-1, batch["x"].shape[-1])
        place = batch["index"][:, None] * size + jnp.arange(size)[None]
        strong = x * jax.random.bernoulli(key, 0.8, x.shape)
        y = jnp.repeat(batch["y"], size)
        return {"x": x, "x_strong": strong, "y": jnp.maximum(y, 0), "index": place.reshape(-1), "where": y >= 0}

    def update(state, batch, key):
        key_view, key = jax.random.split(key)
        return learner.update(state, flat(batch, key_view), key)

    return Learner(lambda key, batch: learner.init(key, flat(batch, key)), update, learner.predict)


def _over_pictures(learner: Learner, outputs_of: Callable, *, spectrum: bool) -> Learner:
    """Returns the learner for batches as the loop makes them: `x` [B, N, H, W, 1], `where` [B] real bags.

    It sees pixels, or of patches of photographs the amplitudes of their Fourier transform, which tell textures apart.
    """
    import jax
    import jax.numpy as jnp

    def features(x):
        x = jnp.asarray(x)[..., 0]
        if spectrum:
            waves = jnp.abs(jnp.fft.rfft2(x - jnp.mean(x, axis=(2, 3), keepdims=True)))
            x = jnp.log(waves + 1e-2) / 2  # about as large as pixels are
        return x.reshape(*x.shape[:2], -1)

    def bags(batch):
        y = jnp.where(jnp.asarray(batch["where"]), jnp.asarray(batch["y"]), -1)
        return {"x": features(batch["x"]), "y": y, "index": jnp.asarray(batch["index"])}

    def predict(state, batch):
        x = features(batch["x"])
        outputs = outputs_of(state, x)
        z = _two_logits(outputs["logits"])
        if "attention" in outputs:
            instance = outputs["attention"]
        elif "instance_logits" in outputs:
            instance = outputs["instance_logits"]
        else:  # the bag of that instance alone
            alone = _two_logits(outputs_of(state, x.reshape(-1, 1, x.shape[-1]))["logits"])
            instance = (alone[:, 1] - alone[:, 0]).reshape(x.shape[:2])
        if instance.ndim == 3:  # heads or concepts, or the last of the classes
            classes = instance.shape[2] == 2 and "bag_logits" in outputs
            instance = instance[..., 1] if classes else jnp.max(instance, axis=2)
        return {"logits": z[None], "probs": jax.nn.softmax(z), "instance": instance}

    def update(state, batch, key):
        return learner.update(state, bags(batch), key)

    return Learner(lambda key, batch: learner.init(key, bags(batch)), update, predict)


def _two_logits(z):
    """Returns [B, 2], with 0 for the negative class where a model has one logit."""
    import jax.numpy as jnp

    return jnp.concatenate([jnp.zeros_like(z), z], axis=1) if z.shape[1] == 1 else z


def _largest(outputs):
    """Returns a bag's dict from the probabilities [B, N, 2] of its instances: the largest decides."""
    import jax.numpy as jnp

    instance = outputs["logits"][..., 1] - outputs["logits"][..., 0]
    return {"logits": jnp.max(instance, axis=1, keepdims=True), "instance_logits": instance}


def _digits() -> list[tuple[np.ndarray, np.ndarray]]:
    dataset = data_source.load("digits")
    return [(split["x"], split["y"]) for split in (dataset.train, dataset.test)]


def _patches(side: int = 16) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns grey patches of photographs [M, 16, 16, 1] and which photograph: left three quarters, and right."""
    try:
        from skimage import color, data  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError("--pictures skimage needs scikit-image: pip install scikit-image") from error
    pools: list[list[tuple[np.ndarray, int]]] = [[], []]
    for label, name in enumerate(("grass", "camera", "astronaut", "coffee", "chelsea", "coins")):
        picture = getattr(data, name)()
        grey = color.rgb2gray(picture) if picture.ndim == 3 else picture / 255.0
        rows, columns = (length // side for length in grey.shape)
        tiles = grey[: rows * side, : columns * side].reshape(rows, side, columns, side).swapaxes(1, 2)
        for pool, part in zip(pools, (tiles[:, : columns * 3 // 4], tiles[:, columns * 3 // 4 :]), strict=True):
            pool += [(tile[..., None].astype(np.float32), label) for tile in part.reshape(-1, side, side)]
    return [(np.stack([tile for tile, _ in pool]), np.array([label for _, label in pool])) for pool in pools]


def _draw(
    rng: np.random.Generator, x: np.ndarray, y: np.ndarray, target: int, positives: int, shape: tuple[int, int]
) -> dict[str, np.ndarray]:
    """Draws bags: every other one holds between one and `positives` pictures of the target, the rest none."""
    wanted, others = np.flatnonzero(y == target), np.flatnonzero(y != target)
    labels = (np.arange(shape[0]) % 2).astype(np.int32)
    count = np.where(labels == 1, rng.integers(1, positives + 1, shape[0]), 0)
    instances = rng.permuted((np.arange(shape[1])[None, :] < count[:, None]).astype(np.int32), axis=1)
    rows = np.where(instances == 1, rng.choice(wanted, shape), rng.choice(others, shape))
    return {"x": x[rows], "y": labels, "instances": instances}


def _auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Returns the area under the ROC curve; labels of -1 do not count."""
    from jaxlab import mil

    return float(mil.bag_auc(np.float32(scores).reshape(-1), labels.reshape(-1)))


def _heat_map(run_dir: Path, bags: dict[str, np.ndarray], scores: np.ndarray, recipe: Mil) -> Path:
    """Draws three positive test bags as pictures, and over each what its instances are to the model."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    chosen = np.flatnonzero(bags["y"] == 1)[:3]
    figure = Figure(figsize=(3.2 * len(chosen), 6.6), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, len(chosen), squeeze=False)
    side = round(recipe.size**0.5)
    for column, bag in enumerate(chosen):
        picture = _mosaic(bags["x"][bag], side)
        heat = scores[bag].reshape(side, side)
        for row, axes in enumerate(grid[:, column]):
            axes.imshow(picture, cmap="gray_r")
            axes.set(xticks=[], yticks=[])
            axes.set_title(("a positive bag", f"instances for {recipe.model}")[row], fontsize=9)
        extent = (-0.5, picture.shape[1] - 0.5, picture.shape[0] - 0.5, -0.5)
        grid[1, column].imshow(heat, cmap="inferno", alpha=0.6, extent=extent)
        for y, x in _places(bags["instances"][bag], side):
            height, width = picture.shape[0] / side, picture.shape[1] / side
            grid[0, column].add_patch(_frame(x * width - 0.5, y * height - 0.5, width, height))
    directory = run_dir / "plots"
    directory.mkdir(exist_ok=True)
    figure.savefig(directory / "attention.png", dpi=110)
    return directory / "attention.png"


def _mosaic(pictures: np.ndarray, side: int) -> np.ndarray:
    """Returns [N, H, W, 1] as one picture of `side` times `side`."""
    height, width = pictures.shape[1:3]
    return pictures[..., 0].reshape(side, side, height, width).swapaxes(1, 2).reshape(side * height, side * width)


def _places(instances: np.ndarray, side: int) -> Iterator[tuple[int, int]]:
    yield from (divmod(int(i), side) for i in np.flatnonzero(instances == 1))


def _frame(x: float, y: float, width: float, height: float):
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), width, height, fill=False, edgecolor="tab:red", linewidth=1.5)
