"""Where examples come from: the embedded digits, prepared TFDS data sets, folders of `.npz`; and their order."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import os
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jaxlab.engine.errors import InputError, did_you_mean

Split = dict[str, np.ndarray]
TEST_EXAMPLES = 360


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set in memory.

    Attributes:
        name: what was asked for.
        train: `x` float32 [N, ...], `y` int32 [N].
        test: likewise; nothing is ever chosen by it.
        num_classes: C.
        source: where the examples came from.
    """

    name: str
    train: Split
    test: Split
    num_classes: int
    source: str

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over all arrays."""
        digest = hashlib.sha256()
        for split in (self.train, self.test):
            for key in ("x", "y"):
                digest.update(f"{split[key].dtype}{split[key].shape}".encode())
                digest.update(np.ascontiguousarray(split[key]).tobytes())
        return digest.hexdigest()


def load(
    spec: str, *, data_dir: str | None = None, fallback_dir: str | None = None, cache_dir: str | None = None
) -> Dataset:
    """Loads a data set.

    Args:
        spec: `digits` (scikit-learn's handwritten digits), `tfds:NAME` (a prepared TFDS data set with image and label),
            or the path of a `.npz` file or of a folder with `train.npz` and `test.npz`, each holding `x` and `y`. A
            single file is split 4 : 1 by a fixed permutation.
        data_dir: where prepared TFDS data sets lie.
        fallback_dir: where digits are prepared if the user's cache directory is not writable.
        cache_dir: instead of the user's cache directory.

    Raises:
        InputError: the name is unknown or the data is empty, damaged or unfit for classification.
    """
    if spec == "digits":
        train, test, source = _digits(fallback_dir, cache_dir)
    elif spec.startswith("tfds:"):
        train, test, source = _tfds(spec[5:], data_dir)
    elif Path(spec).exists():
        train, test, source = _npz(Path(spec))
    elif os.sep in spec or spec.endswith(".npz"):
        raise InputError(f"there is no file or folder {spec!r}")
    else:
        names = ("digits",)
        raise InputError(f"unknown data {spec!r}: use digits, tfds:NAME or a path{did_you_mean(spec, names)}")
    train, test = (_checked(split, f"{spec} ({part})") for part, split in (("train", train), ("test", test)))
    classes = int(max(train["y"].max(), test["y"].max())) + 1
    if len(np.unique(train["y"])) < 2:
        raise InputError(f"{spec} has one class only, {int(train['y'][0])}: nothing to learn")
    if train["x"].shape[1:] != test["x"].shape[1:]:
        raise InputError(f"{spec}: examples have shape {train['x'].shape[1:]} in train, {test['x'].shape[1:]} in test")
    return Dataset(spec, train, test, classes, source)


def _checked(split: Split, name: str) -> Split:
    for key in ("x", "y"):
        if key not in split:
            raise InputError(f"{name} has no array {key!r}; it has {', '.join(sorted(split)) or 'nothing'}")
    x, y = split["x"], split["y"]
    if x.dtype == object or y.dtype == object:
        raise InputError(f"{name} holds object arrays, which are not read")
    if x.ndim < 1 or len(x) == 0 or y.size == 0:
        raise InputError(f"{name} is empty")
    if y.ndim != 1 or len(x) != len(y):
        raise InputError(f"{name}: y must have one label for each of the {len(x)} examples, got shape {y.shape}")
    if not np.issubdtype(y.dtype, np.integer):
        raise InputError(f"{name}: labels must be integers, got {y.dtype}")
    if y.min() < 0 or y.max() > 100_000:
        raise InputError(f"{name}: labels must lie between 0 and 100000, got {y.min()} to {y.max()}")
    if not (np.issubdtype(x.dtype, np.number) or x.dtype == bool) or np.iscomplexobj(x):
        raise InputError(f"{name}: x must be numbers, got {x.dtype}")
    scale = 255.0 if x.dtype == np.uint8 else 1.0
    x = np.ascontiguousarray(x, np.float32) / np.float32(scale)
    if not np.all(np.isfinite(x)):
        raise InputError(f"{name}: x holds values that are not finite")
    return {"x": x, "y": np.ascontiguousarray(y, np.int32)}


@contextlib.contextmanager
def _quiet_tfds() -> Iterator:
    """Imports tensorflow_datasets with its progress bars and third-party warnings off."""
    import logging

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise InputError("data sets need the extra `train`: pip install 'jaxlab[train]'") from error
        tfds.disable_progress_bar()
        logging.getLogger("absl").setLevel(logging.ERROR)
        with contextlib.redirect_stdout(io.StringIO()):  # results alone go to stdout
            yield tfds


def _read(builder, split: str) -> Split:
    source = builder.as_data_source(split)
    rows = [source[i] for i in range(len(source))]
    names = ("image", "x") if not rows or "image" in rows[0] else ("x",)
    key = next((n for n in names if rows and n in rows[0]), None)
    label = next((n for n in ("label", "y") if rows and n in rows[0]), None)
    if key is None or label is None:
        raise InputError(f"{builder.name} has no image and label; it has {', '.join(rows[0]) if rows else 'no rows'}")
    return {"x": np.stack([row[key] for row in rows]), "y": np.array([row[label] for row in rows])}


def _digits_builder(tfds, directory: Path):
    import sklearn.datasets

    class JaxlabDigits(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Scikit-learn's handwritten digits, 8 x 8 pixels in [0, 1]."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            image = tfds.features.Tensor(shape=(8, 8, 1), dtype=np.float32)
            label = tfds.features.ClassLabel(num_classes=10)
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict({"image": image, "label": label}))

        def _split_generators(self, dl_manager):
            del dl_manager
            order = np.random.default_rng(0).permutation(1797)
            return {"train": self._rows(order[TEST_EXAMPLES:]), "test": self._rows(order[:TEST_EXAMPLES])}

        def _generate_examples(self, rows):
            return self._rows(rows)

        def _rows(self, rows):
            images, labels = sklearn.datasets.load_digits(return_X_y=True)
            for i in rows:
                image = (images[i].reshape(8, 8, 1) / 16).astype(np.float32)
                yield int(i), {"image": image, "label": int(labels[i])}

    return JaxlabDigits(data_dir=str(directory), file_format="array_record")


def _digits_home(fallback_dir: str | None, cache_dir: str | None) -> Path:
    base = cache_dir or os.environ.get("JAXLAB_CACHE_DIR")
    if base is None:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxlab"
    for directory in (base, fallback_dir):
        if directory is None:
            continue
        with contextlib.suppress(OSError):
            Path(directory).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=directory):
                return Path(directory) / "digits-1"
    raise InputError(f"{base} is not writable: name a directory that is in JAXLAB_CACHE_DIR")


def _digits(fallback_dir: str | None, cache_dir: str | None) -> tuple[Split, Split, str]:
    """Reads the digits from their ArrayRecord files, which the first run writes."""
    home = _digits_home(fallback_dir, cache_dir)
    with _quiet_tfds() as tfds:
        for attempt in range(3):
            if home.exists():
                try:
                    builder = tfds.builder_from_directory(str(next(home.glob("*/1.0.0"))))
                    train, test = _read(builder, "train"), _read(builder, "test")
                    if (len(train["y"]), len(test["y"])) == (1797 - TEST_EXAMPLES, TEST_EXAMPLES):
                        return train, test, "scikit-learn's handwritten digits, as a TFDS ArrayRecord data set"
                except Exception:  # whatever a damaged file raises: it is prepared again, and the last try raises
                    if attempt == 2:
                        raise
                shutil.rmtree(home, ignore_errors=True)
            temporary = Path(tempfile.mkdtemp(prefix="digits-", dir=home.parent))
            try:
                _digits_builder(tfds, temporary).download_and_prepare()
                with contextlib.suppress(OSError):  # another first run was faster: its files are as good
                    temporary.rename(home)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    raise InputError(f"the digits in {home} are damaged and could not be prepared again")


def _tfds(name: str, data_dir: str | None) -> tuple[Split, Split, str]:
    root = Path(data_dir or os.environ.get("TFDS_DATA_DIR") or Path.home() / "tensorflow_datasets")
    there = sorted(p.name for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
    if name.split("/")[0].split(":")[0] not in there:
        listing = f"it has {', '.join(there)}" if there else "nothing is prepared there"
        raise InputError(f"tfds:{name} is not prepared under {root}: {listing}{did_you_mean(name, there)}")
    with _quiet_tfds() as tfds:
        try:
            builder = tfds.builder(name, data_dir=str(root), try_gcs=False)
            splits = list(builder.info.splits)
            if "train" not in splits or "test" not in splits:
                raise InputError(f"tfds:{name} needs the splits train and test, it has {', '.join(splits)}")
            return _read(builder, "train"), _read(builder, "test"), f"TFDS {builder.info.full_name}"
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"tfds:{name} cannot be read: {' '.join(str(error).split())[:200]}") from error


def _npz(path: Path) -> tuple[Split, Split, str]:
    def read(file: Path) -> Split:
        try:
            # numpy leaves the file open when the archive is damaged, so it is opened here.
            with file.open("rb") as handle, np.load(handle, allow_pickle=False) as arrays:
                return {key: arrays[key] for key in arrays.files}
        except (OSError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
            reason = "object arrays are not read" if "allow_pickle" in str(error) else str(error)
            raise InputError(f"{file} is not a readable .npz file: {reason}") from error

    if path.is_dir():
        train, test = path / "train.npz", path / "test.npz"
        if train.exists() and test.exists():
            return read(train), read(test), f"{train.name} and {test.name} of a folder"
        single = sorted(path.glob("*.npz"))
        if len(single) != 1:
            found = ", ".join(p.name for p in single) or "no .npz at all"
            raise InputError(f"{path} needs train.npz and test.npz, or one .npz file; it has {found}")
        path = single[0]
    whole = _checked(read(path), str(path))
    order = np.random.default_rng(0).permutation(len(whole["y"]))
    cut = len(order) // 5
    if cut == 0:
        raise InputError(f"{path} has {len(order)} examples, at least 5 are needed to split off a test set")
    train, test = ({key: array[rows] for key, array in whole.items()} for rows in (order[cut:], order[:cut]))
    return train, test, f"{path.name}, split 4 : 1"


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed % 2**64, epoch])).permutation(size)


def batch_indices(seed: int, step: int, size: int, batch: int) -> np.ndarray:
    """Returns the examples of a step, int64 [batch]: a pure function of its arguments.

    Each epoch is a permutation of all examples drawn from (seed, epoch); a batch may straddle two epochs.
    """
    if batch > size:
        raise InputError(f"a batch of {batch} is larger than the {size} examples: use at most {size}")
    places = step * batch + np.arange(batch)
    epochs = places // size
    return np.concatenate([_permutation(seed, int(e), size)[places[epochs == e] % size] for e in np.unique(epochs)])


def batch_at(split: Split, seed: int, step: int, batch: int) -> Split:
    """Returns the batch of a step: `x`, `y`, `where` (all True) and `index`."""
    index = batch_indices(seed, step, len(split["y"]), batch)
    return {
        "x": split["x"][index],
        "y": split["y"][index],
        "where": np.ones(batch, bool),
        "index": index.astype(np.int32),
    }


def eval_batches(split: Split, batch: int) -> Iterator[Split]:
    """Yields all examples in order, the last batch padded with zeros and marked by `where`."""
    for first in range(0, len(split["y"]), batch):
        x, y = split["x"][first : first + batch], split["y"][first : first + batch]
        pad = batch - len(y)
        yield {
            "x": np.pad(x, ((0, pad),) + ((0, 0),) * (x.ndim - 1)),
            "y": np.pad(y, (0, pad)),
            "where": np.arange(batch) < len(y),
        }
