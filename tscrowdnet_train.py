"""TS-CrowdNet: count the people in a fixed-camera video with TimeDistributed ResNet50 + LSTM.

    pip install -r requirements.txt && python tscrowdnet_train.py

Reads      labels.csv                            id,count: how many people each frame shows
           frames/frames/seq_000001.jpg ...      the frames of one fixed camera
Writes     outputs/ts_crowdnet.keras             the model: windows of uint8 frames in, counts out
           outputs/metrics.json, predictions.csv, predictions.png, history.csv, loss.png

Shapes, from frames to counts (T = SEQUENCE_LENGTH, H x W = FRAME_SIZE, F = features of a frame):

    1. frames (N, H, W, 3) uint8 --frozen ResNet50, summarised over grids--> features (N, F), kept on disk
    2. features (N, F) --ridge regression--> an estimate of the count of each frame (N, 1)
    3. windows of estimates (batch, T, 1) --head: LSTM, trained for EPOCHS--> counts (batch, 1)
    4. saved model: windows (batch, T, H, W, 3) --TimeDistributed(1, 2)--> (batch, T, 1) --3--> (batch, 1)

Change the constants below and run again; an interrupted run keeps the features that it has.
"""

import contextlib
import hashlib
import inspect
import io
import json
import logging
import numbers
import os
import re
import shutil
import signal
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from textwrap import shorten

if __name__ == "__main__":  # Ctrl-C ends the process without an exception for libraries to report
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import scipy.io
import seaborn as sns
from PIL import Image, ImageEnhance, ImageOps  # Pillow comes with matplotlib
from sklearn.kernel_ridge import KernelRidge
from sklearn.metrics import mean_absolute_error, mean_squared_error
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.preprocessing import StandardScaler

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
with open(os.devnull, "w") as null, os.fdopen(os.dup(2), "w") as stderr:
    os.dup2(null.fileno(), 2)  # TensorFlow writes start-up lines before it reads that level
    try:
        import keras
        from keras import layers, ops
    finally:
        os.dup2(stderr.fileno(), 2)
logging.getLogger("tensorflow").setLevel("ERROR")  # it warns of each new size of batch
try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None
ROOT = Path(__file__).resolve().parent

# -- Data: relative paths start at this script's folder ------------------------------------------------
LABELS = "labels.csv"  # another CSV with columns id,count, or the official "mall_gt.mat"
FRAMES = "frames/frames"  # folder of seq_000001.jpg, seq_000002.jpg, ...: one fixed camera
OUTPUTS = "outputs"  # one folder for each experiment keeps their results apart
SEQUENCE_LENGTH = 5  # frames in a window; 1 to see what the LSTM's memory is worth
FRAME_SIZE = (480, 640)  # (height, width) fed to ResNet50; (240, 320) is 4 x faster, less accurate
TRAIN_FRACTION = 0.8  # first part of the video trains, the rest validates; 0.4 for Mall's canonical split

# -- Backbone: frozen ResNet50 -------------------------------------------------------------------------
WEIGHTS = "imagenet"  # or the path of a ResNet50 weight file (no top), or None: random
# Layers of ResNet50 and the grid (rows, columns) each is summarised over: where people are tells their size.
# As published: FRAME_SIZE = (224, 224) and FEATURE_LAYERS = {"conv5_block3_out": (1, 1)}
FEATURE_LAYERS = {"conv2_block3_out": (3, 2), "conv3_block4_out": (3, 2),
                  "conv4_block6_out": (1, 1), "conv5_block3_out": (1, 1)}  # fmt: skip
FEATURE_LAYERS_RANDOM = {"conv1_relu": (3, 2), "conv2_block1_out": (3, 2), "conv2_block3_out": (3, 2)}
AUGMENT = 1  # jittered copies of each training frame: other light, a nudged camera; 0 saves their time
PRECISION = "auto"  # or "float32" or "bfloat16"; auto takes bfloat16 where it is at least 1.5 x as fast
FRAME_BATCH = 8  # frames ResNet50 sees at once; less memory with fewer, no faster on a CPU with more
CACHE_FEATURES = True  # False: fit passes all windows through ResNet50, as published; no better, far slower

# -- Regression, head and training: features -> estimate of each frame -> LSTM over a window -> count -----
PENALTIES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)  # of ridge regression; cross-validation in training frames picks
ESTIMATE_NOISE = 0.1  # in standard deviations of the count; with more, the LSTM heeds earlier frames more
LSTM_UNITS = 16  # more for longer windows, or where neighbouring frames tell much of each other
BATCH_SIZE = 64  # windows in a training step; 4 where each brings its frames: CACHE_FEATURES = False
EPOCHS = 50  # passes over the training windows; fewer for a quick look
LEARNING_RATE = 5e-3  # falls to 0 over the epochs along a half cosine; lower it if the loss rises
SEED = 0  # another seed, another model: publish mean and standard deviation over several

# -- Evaluation and use --------------------------------------------------------------------------------
TOLERANCE = 0.20  # a count within this share of the truth is accurate
COUNT = None  # a folder of new frames to count with the model in OUTPUTS, instead of training
COUNTED_TYPES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")  # the files counted there
UNFAMILIAR = 1.05  # new frames are marked from this distance on; the furthest training frame has 1


class InputError(ValueError):
    """Something the user can put right; the message names it and the remedy."""


def at(path):
    """A path of the constants: relative to this script, or absolute as it stands."""
    return ROOT / Path(path).expanduser()


def check_constants():
    """Raises InputError for a constant whose wrong value would fail late or obscurely."""
    def is_whole(value, least=1):
        return isinstance(value, numbers.Integral) and least <= value < 2**32
    def is_grid(value):
        return isinstance(value, tuple) and len(value) == 2 and all(map(is_whole, value))

    checks = [("FRAME_SIZE", is_grid(FRAME_SIZE) and min(FRAME_SIZE) >= 32, "(height, width), 32 or more")]
    for name in ("SEQUENCE_LENGTH", "FRAME_BATCH", "LSTM_UNITS", "BATCH_SIZE", "EPOCHS", "AUGMENT", "SEED"):
        least = 0 if name in ("AUGMENT", "SEED") else 1
        checks.append((name, is_whole(globals()[name], least), f"a whole number from {least} to {2**32 - 1}"))
    for name in ("TRAIN_FRACTION", "ESTIMATE_NOISE", "LEARNING_RATE", "TOLERANCE"):
        fine = isinstance(globals()[name], numbers.Real) and 0 <= globals()[name] < 1
        checks.append((name, fine, "a number from 0 to below 1"))
    for name in ("FEATURE_LAYERS", "FEATURE_LAYERS_RANDOM"):
        fine = isinstance(globals()[name], dict) and all(map(is_grid, globals()[name].values() or [None]))
        checks.append((name, fine, "{layer of ResNet50: (rows, columns), ...}, 1 or more of each"))
    checks.append(("PENALTIES", isinstance(PENALTIES, tuple) and min(PENALTIES, default=0) > 0, "(above 0,)"))
    checks.append(("PRECISION", PRECISION in ("auto", "float32", "bfloat16"), "auto, float32 or bfloat16"))
    for name, fine, remedy in checks:
        if not fine:
            raise InputError(f"{name} = {globals()[name]!r}: make it {remedy}")


# == Files in OUTPUTS: whole or absent, whenever a run is cut short ========================================
@contextlib.contextmanager
def lock(outputs):
    """Refuses a second run into the same folder; the lock ends with the process, however it ends."""
    outputs.mkdir(parents=True, exist_ok=True)
    with (outputs / ".lock").open("w") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{outputs}: another run writes here; wait for it, or change OUTPUTS") from None
        yield


def publish(folder, writers):
    """Writes every file {name: write(path)} to the disk under another name, then renames them all.
    The results of an earlier run stay readable until all the new ones are whole."""
    for name, write in writers.items():
        new = folder / f".new-{name}"
        for path in (new, folder / name):
            if path.is_dir():
                raise InputError(f"{path}: a folder where a file will be written; rename or remove it")
        write(new)
        with new.open("r+b") as file:
            os.fsync(file.fileno())
    for name in writers:
        os.replace(folder / f".new-{name}", folder / name)


# == Data ==================================================================================================
def read_csv(path):
    """The columns id and count of a CSV as a table of text, indexed by their rows in the file."""
    data = path.read_bytes()
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    text = data.decode(encoding, errors="replace")  # ids and counts are plain digits anyway
    lines = text.lstrip("\r\n")
    row_of_first = text[: len(text) - len(lines)].count("\n") + 2
    header = lines.partition("\n")[0].lower().replace('"', "")
    splits = {separator: [name.strip() for name in header.split(separator)] for separator in ",;\t"}
    separator = max(splits, key=lambda separator: {"id", "count"} <= set(splits[separator]))
    columns = splits[separator]
    if not columns.count("id") == columns.count("count") == 1:
        raise ValueError("the first line does not name one column id and one column count")
    options = {"sep": separator, "names": range(len(columns)), "header": 0, "index_col": False}
    table = pd.read_csv(io.StringIO(lines), dtype=str, skip_blank_lines=False, **options)
    table = table[[columns.index("id"), columns.index("count")]].set_axis(["id", "count"], axis=1)
    return table.set_axis([f"row {row}" for row in table.index + row_of_first]).dropna(how="all")


def read_labels(path):
    """Reads the people counts from a CSV with columns id and count, or from Mall's mall_gt.mat.
    Returns a float Series of counts indexed by frame id, ascending. Raises InputError."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; set LABELS to your labels.csv or mall_gt.mat")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # rows longer than the header
            if path.suffix.lower() == ".mat":
                counts = np.ravel(scipy.io.loadmat(path, variable_names=["count"])["count"])
                table = pd.DataFrame({"id": range(1, len(counts) + 1), "count": counts}, dtype=str)
                table = table.set_axis("entry " + table["id"])
            else:
                table = read_csv(path)
    except Exception as error:  # SciPy and pandas raise many kinds for a damaged file
        raise InputError(f"{path}: no readable labels ({error}); its first line must be id,count") from None
    if table.empty:
        raise InputError(f"{path}: no labels; give one row id,count for each frame")
    values = table.apply(pd.to_numeric, errors="coerce").astype(float)
    for column, most in (("id", 999_999_999), ("count", 1_000_000)):
        bad = ~values[column].between(0, most) | (values[column] % 1 != 0)
        bad |= (column == "id") & values[column].duplicated()
        if bad.any():
            text, twice = table.loc[bad.idxmax(), column], " or there twice" * (column == "id")
            problem = f"{column} {text!r} is no whole number from 0 to {most}{twice} ({bad.sum()} such rows)"
            raise InputError(f"{path}, {bad.idxmax()}: {problem}; correct or delete the row")
    return values.astype({"id": int}).set_index("id")["count"].sort_index()


def find_frames(ids):
    """The labelled frames: N paths, in FRAMES or, as in Mall's own archive, its parent. Raises InputError."""
    folder = at(FRAMES) if at(FRAMES).is_dir() else at(FRAMES).parent
    present = {path.name for path in folder.glob("seq_*.jpg")}
    names = [f"seq_{frame:06d}.jpg" for frame in ids]
    missing = [name for name in names if name not in present]
    if missing:
        problem = f"{len(missing)} of {len(ids)} labelled frames are missing: {shorten(str(missing), 60)}"
        raise InputError(f"{folder}: {problem}; add them, delete their labels, or set FRAMES to their folder")
    if len(present) > len(names):
        print(f"{len(present) - len(names)} frames in {folder} have no label and are ignored.")
    return [folder / name for name in names]


def check_frames(paths):
    """Raises InputError that names every frame which cannot be used."""
    def damage(path):
        try:
            with Image.open(path) as image:
                image.draft("RGB", (1, 1))  # decoded at an eighth of its size: far faster, as sure
                image.load()
                return "" if image.mode[0] not in "IF" else f"{image.mode} pixels; convert it to 8 bits"
        except Exception as error:  # a damaged file makes Pillow raise many kinds
            return str(error) or type(error).__name__

    with ThreadPoolExecutor() as pool:
        damaged = [f"{path.name}: {what}" for path, what in zip(paths, pool.map(damage, paths)) if what]
    if damaged:
        problem = f"{len(damaged)} of {len(paths)} frames cannot be used: {'; '.join(damaged)}"
        raise InputError(f"{paths[0].parent}: {problem}; replace or remove them, and their labels")


def jitter(image, rng):
    """The scene of an image in other light (brightness, contrast, saturation by up to 15%, colours by 5%) and
    from a nudged camera (by up to 2% of the width, zoom by up to 3%); an image of the same size."""
    zoom = rng.uniform(0.97, 1.03)
    left, top = rng.uniform(-0.02, 0.02, 2) * image.width + np.array(image.size) * (1 - zoom) / 2
    matrix = (zoom, 0, left, 0, zoom, top)
    image = image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhance(image).enhance(rng.uniform(0.85, 1.15))
    return Image.fromarray(np.clip(image * rng.uniform(0.95, 1.05, 3), 0, 255).astype("uint8"))


class Frames:
    """Image files read like an array: frames[rows] decodes them to (len(rows), height, width, 3) uint8 RGB.
    Copies, whose rows follow, are shown jittered, each in a way of its own that SEED determines."""

    def __init__(self, paths, size, copies=()):
        self.paths, self.size, self.first_copy = [*paths, *copies], size, len(paths)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, rows):
        return np.stack([self.load(row) for row in rows])

    def load(self, row):
        with Image.open(self.paths[row]) as image:
            image = ImageOps.exif_transpose(image).convert("RGB")
        image = image.resize(self.size[::-1], Image.Resampling.BILINEAR)
        is_copy = row >= self.first_copy
        return np.asarray(jitter(image, np.random.default_rng((SEED, row))) if is_copy else image)


def make_windows(ids, length):
    """Row numbers of the window that ends at each frame: (N, length). None crosses a gap in the ids: where
    frames are missing before the target, the oldest frame of its unbroken run repeats."""
    rows = np.arange(len(ids))
    run_start = np.maximum.accumulate(np.where(np.diff(ids, prepend=ids[0] - 1) != 1, rows, 0))
    return np.maximum(rows[:, None] + np.arange(1 - length, 1), run_start[:, None])


class WindowSequence(keras.utils.Sequence):
    """Feeds windows (batch, T, ...) and the counts (batch, 1) of their last frames to fit.
    source: anything indexed by rows: Frames, giving (H, W, 3) for each, or estimates of the counts (N, 1).
    windows: (M, T) row numbers, from make_windows. counts: (M, 1) people in the last frame of each window."""

    def __init__(self, source, windows, counts, shuffle=False):
        super().__init__()
        self.source, self.windows, self.counts = source, windows, counts
        self.order, self.rng = np.arange(len(windows)), np.random.default_rng(SEED) if shuffle else None
        self.on_epoch_end()

    def __len__(self):
        return -(-len(self.windows) // BATCH_SIZE)  # rounded up: the last, partial batch counts

    def __getitem__(self, batch):
        chosen = self.order[batch * BATCH_SIZE : (batch + 1) * BATCH_SIZE]
        rows, where = np.unique(self.windows[chosen], return_inverse=True)  # shared frames: read once
        return self.source[rows][where.reshape(len(chosen), -1)], self.counts[chosen]

    def on_epoch_end(self):
        if self.rng:
            self.rng.shuffle(self.order)


# == Model =================================================================================================
def load_resnet50():
    """ResNet50 without its top, with WEIGHTS: (model, what its weights are, whether they are random). He et
    al., "Deep residual learning for image recognition", CVPR 2016. Raises InputError for an unfit file."""
    def build(weights):
        keras.utils.set_random_seed(SEED)  # the same random weights whatever happened before
        return keras.applications.ResNet50(include_top=False, weights=weights, input_shape=(*FRAME_SIZE, 3))

    if WEIGHTS is None:
        return build(None), "random", True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # Keras only warns of layers that have no weights
            if WEIGHTS == "imagenet":
                return build("imagenet"), "imagenet", False
            return build(str(at(WEIGHTS))), Path(WEIGHTS).name, False
    except Exception as error:  # h5py and Keras raise many kinds, a bare Exception when a download fails
        if WEIGHTS != "imagenet":
            raise InputError(f"{at(WEIGHTS)}: no weights of Keras's ResNet50 without top ({error})") from None
        name, reason = "resnet50_weights_tf_dim_ordering_tf_kernels_notop.h5", shorten(str(error), 200)
        remedy = f"download {name} elsewhere and set WEIGHTS to its path"
        print(f"Warning: no ImageNet weights ({reason}); random ones count worse: {remedy}.", file=sys.stderr)
        return build(None), "random (the ImageNet weights could not be downloaded)", True


def calibrate(resnet, frames):
    """Sets BatchNorm's statistics to those of frames (M, H, W, 3): random weights carry no signal without."""
    for layer in resnet.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.momentum = 0.0  # nothing remains of the statistics of before
    resnet(normalise(frames), training=True)


def fold_batchnorm(resnet):
    """The same network with each BatchNorm, now constant, folded into the convolution before it: faster. A
    *_conv read on its own gives what its BatchNorm gives. Jacob et al., "Quantization and training of neural
    networks for efficient integer-arithmetic-only inference", CVPR 2018."""
    def is_norm(layer):
        return isinstance(layer, layers.BatchNormalization)
    def skip_norms(layer, x, **options):
        return x if is_norm(layer) else layer(x, **options)

    folded = keras.models.clone_model(resnet, call_function=skip_norms)
    folded.set_weights([w for layer in resnet.layers if not is_norm(layer) for w in layer.get_weights()])
    for norm in filter(is_norm, resnet.layers):
        convolution = norm.name.removesuffix("bn") + "conv"
        kernel, bias = resnet.get_layer(convolution).get_weights()
        gamma, beta, mean, variance = norm.get_weights()
        gain = gamma / np.sqrt(variance + norm.epsilon)
        folded.get_layer(convolution).set_weights([kernel * gain, (bias - mean) * gain + beta])
    return folded


def normalise(frames):
    """Frames (N, H, W, 3) as ResNet50 takes them (BGR, centred), each channel of each at ImageNet's contrast.
    So counts survive other light."""
    frames = ops.cast(frames, "float32")
    mean, variance = ops.moments(frames, axes=(1, 2), keepdims=True)
    return ((frames - mean) * 57.0 / ops.sqrt(variance + 1.0))[..., ::-1]


def build_backbone(resnet, grids):
    """ResNet50 read at the layers of grids: a frame (H, W, 3) uint8 -> features (F,). Each layer (h, w, C) is
    summarised over the cells of its grid, by the mean and the standard deviation of each channel."""
    frame = keras.Input((*FRAME_SIZE, 3), dtype="uint8", name="frame")
    features = []
    for output, grid in zip(keras.tree.flatten(fold_batchnorm(resnet)(normalise(frame))), grids.values()):
        cell = [-(-side // cells) for side, cells in zip(output.shape[1:3], grid)]
        average, output = layers.AveragePooling2D(cell, padding="same"), ops.cast(output, "float32")
        mean = average(output)
        variance = ops.relu(average(ops.square(output)) - ops.square(mean))  # rounding may make it negative
        features += [layers.Flatten()(mean), layers.Flatten()(ops.sqrt(variance))]
    return keras.Model(frame, layers.Concatenate()(features), name="backbone")


def set_precision(model, precision):
    """Lets the ResNet50 in model compute in "float32" or "bfloat16"; weights and all else stay float32."""
    for layer in model.get_layer("resnet50").layers:
        layer.dtype_policy = "float32" if precision == "float32" else "mixed_bfloat16"
    model.predict_function = None  # it was traced in the precision of before


def choose_precision(model, frame):
    """PRECISION; where that is "auto", the one in which model is fast for a frame (1, H, W, 3)."""
    if PRECISION != "auto":
        return PRECISION
    seconds = {}
    for precision in ("float32", "bfloat16"):
        set_precision(model, precision)
        for _ in range(2):  # the first time it is traced
            start = time.perf_counter()
            model.predict_on_batch(frame)
            seconds[precision] = time.perf_counter() - start
    return "bfloat16" if seconds["float32"] >= 1.5 * seconds["bfloat16"] else "float32"


def fit_regression(features, counts):
    """Ridge regression of counts (M,) on the features (M * (1 + AUGMENT), F) of training frames, then copies.
    Saunders et al., "Ridge regression learning algorithm in dual variables", ICML 1998: one matrix of inner
    products serves every fit. The penalty is the one of PENALTIES that does best on fifths of the video left
    out in turn, with their copies: neighbouring frames show the same people. At most 5,000 rows are used.
    Returns (model: features (F,) -> estimate of the count and distance from the mean training frame, with 1
    for the furthest of them (2,); mean absolute error on the fifths left out)."""
    rows = np.arange(len(features))[:: -(-len(features) // 5000)]
    frame, mean_count = rows % len(counts), counts.mean()
    scaler = StandardScaler(copy=False)
    scaled = scaler.fit_transform(features[rows])  # (rows, F)
    products = (scaled @ scaled.T / scaled.shape[1]).astype("float64")  # 1 on average along the diagonal
    intercept = 1e3  # large in every product: each fit gets an intercept of its own, hardly penalised
    alphas, folds = np.multiply(PENALTIES, len(rows)), GroupKFold(min(5, len(counts)))
    ridge = KernelRidge(kernel="precomputed")
    search = GridSearchCV(ridge, {"alpha": alphas}, cv=folds, scoring="neg_mean_absolute_error")
    search.fit(products + intercept, counts[frame] - mean_count, groups=frame * 5 // len(counts))
    dual = search.best_estimator_.dual_coef_  # (rows,)
    inputs = keras.Input((scaled.shape[1],), name="features")
    standardise, dense = layers.Normalization(), layers.Dense(1, name="estimate")
    z = standardise(inputs)
    distance = ops.sqrt(ops.mean(ops.square(z), axis=-1, keepdims=True) / products.diagonal().max())
    model = keras.Model(inputs, layers.Concatenate()([dense(z), distance]), name="regression")
    standardise.set_weights([scaler.mean_, np.square(scaler.scale_), np.zeros(())])
    standardise.finalize_state()
    bias = np.array([mean_count + intercept * dual.sum()])
    dense.set_weights([scaled.T @ dual[:, None] / scaled.shape[1], bias])
    return model, -search.best_score_


def build_head(counts):
    """Head: a window of estimates (T, 1) -> the count of its last frame (1,), in people, never negative.
    The LSTM corrects the last frame's estimate by what those before it say. Estimates of training frames are
    closer to the truth than those of new frames will be; noise keeps it from taking them at their word.
    counts: (M,) of the training frames, whose mean and standard deviation scale what the LSTM sees."""
    mean, std = float(counts.mean()), max(float(counts.std()), 1.0)
    estimates = keras.Input((SEQUENCE_LENGTH, 1), name="estimates")
    x = layers.GaussianNoise(ESTIMATE_NOISE)(layers.Rescaling(1 / std, -mean / std)(estimates))
    memory = layers.LSTM(LSTM_UNITS, unroll=True, name="lstm")(x)  # (LSTM_UNITS,)
    correction = layers.Dense(1, use_bias=False, kernel_initializer="zeros", name="correction")(memory)
    people = layers.Rescaling(std, mean)(layers.Add()([x[:, -1], correction]))
    return keras.Model(estimates, layers.ReLU(name="count")(people), name="head")


def build_model(backbone, regression, head):
    """The whole network: windows of frames (T, H, W, 3) uint8 -> counts (1,)."""
    per_frame = keras.Model(backbone.input, regression(backbone.output), name="resnet50_regression")
    per_frame.trainable = False
    windows = keras.Input((SEQUENCE_LENGTH, *FRAME_SIZE, 3), dtype="uint8", name="frames")
    estimates = layers.TimeDistributed(per_frame, name="time_distributed_resnet50")(windows)[..., :1]
    return keras.Model(windows, head(estimates), name="ts_crowdnet")


# == Training ==============================================================================================
def stored_outputs(path, shape):
    """The outputs of that shape that predict_frames has stored at path, or None where there are none."""
    try:
        with np.load(path) as stored:  # raises where a checksum in the file does not fit
            return stored["outputs"].reshape(shape)
    except Exception as error:  # zipfile and NumPy raise many kinds
        if path.exists():
            print(f"{path} is damaged ({error}) and will be made anew.")


def predict_frames(model, frames, precision, folder=None):
    """Runs each of the frames (N, H, W, 3) through model once, its ResNet50 in precision: outputs (N, ...).
    Each 8 batches are stored in folder, where one is given: interrupted work goes on with those it was at."""
    set_precision(model, precision)
    bar = keras.utils.Progbar(len(frames), unit_name="frame", interval=0.1 if sys.stdout.isatty() else 20)
    outputs = []
    with ThreadPoolExecutor(2) as decoders:  # decode while the model computes
        for rows in np.split(np.arange(len(frames)), range(8 * FRAME_BATCH, len(frames), 8 * FRAME_BATCH)):
            path = folder and folder / f"{rows[0]:09d}.npz"
            stored = folder and stored_outputs(path, (len(rows), *model.output_shape[1:]))
            if stored is None:
                batches = np.split(rows, range(FRAME_BATCH, len(rows), FRAME_BATCH))
                parts = []
                for batch in decoders.map(frames.__getitem__, batches):
                    parts.append(ops.convert_to_numpy(model.predict_on_batch(batch)))
                    bar.add(len(batch))
                stored = np.concatenate(parts)
                if folder:
                    publish(folder, {path.name: lambda path: np.savez(path, outputs=stored)})
            else:
                bar.add(len(rows))
            outputs.append(stored)
    set_precision(model, "float32")
    return np.concatenate(outputs)


def extract_features(paths, n_train, cache):
    """Runs the frames, and AUGMENT jittered copies of the first n_train, through ResNet50 once; what the
    folder cache holds is used again where nothing that it depends on has changed. Returns (backbone, frames
    and copies, their features (N + AUGMENT * n_train, F), facts for metrics.json)."""
    resnet, weights, is_random = load_resnet50()
    grids = FEATURE_LAYERS_RANDOM if is_random else FEATURE_LAYERS
    try:
        resnet = keras.Model(resnet.input, [resnet.get_layer(name).output for name in grids], name="resnet50")
    except ValueError as error:
        raise InputError(f"FEATURE_LAYERS{'_RANDOM' * is_random}: {shorten(str(error), 300)}") from None
    frames = Frames(paths, FRAME_SIZE, copies=AUGMENT * paths[:n_train])
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    parts = (Frames, jitter, calibrate, fold_batchnorm, normalise, build_backbone)
    code = [keras.__version__, keras.backend.backend(), *map(inspect.getsource, parts)]
    depends_on = (files, n_train, grids, FRAME_SIZE, FRAME_BATCH, AUGMENT, SEED, code)
    digest = hashlib.blake2b(repr(depends_on).encode(), digest_size=8)
    for array in resnet.get_weights():
        digest.update(array)
    kept = next(cache.glob(f"{digest.hexdigest()}-{'*' if PRECISION == 'auto' else PRECISION}"), None)
    if kept is None:
        check_frames(paths)
    if is_random:
        calibrate(resnet, frames[np.linspace(0, n_train - 1, 8).astype(int)])
    backbone = build_backbone(resnet, grids)
    if kept is None:
        kept = cache / f"{digest.hexdigest()}-{choose_precision(backbone, frames[[0]])}"
        shutil.rmtree(cache, ignore_errors=True)
        kept.mkdir(parents=True)
    precision = kept.name.partition("-")[2]
    print(f"ResNet50 ({weights}, {precision}) reads {len(paths)} frames, {len(frames) - len(paths)} copies:")
    features = predict_frames(backbone, frames, precision, kept)
    return backbone, frames, features, {"weights": weights, "precision": precision}


def train(model, training, validation):
    """Trains for EPOCHS epochs; returns the history, a row for each. Validation frames are watched, never
    used: no early stopping, no best epoch, a fixed schedule."""
    schedule = keras.optimizers.schedules.CosineDecay(LEARNING_RATE, EPOCHS * len(training))
    model.compile(keras.optimizers.Adam(schedule), loss="mse", metrics=["mae"])
    options = {"epochs": EPOCHS, "shuffle": False, "verbose": 1 if sys.stdout.isatty() else 2}
    history = model.fit(training, validation_data=validation, **options).history  # the Sequence shuffles
    return pd.DataFrame(history, index=pd.RangeIndex(1, EPOCHS + 1, name="epoch"))


# == Evaluation ============================================================================================
def measure(true, predicted):
    """Metrics of counts (M,). Accuracy is the share within TOLERANCE; a true 0 asks for a rounded 0."""
    accurate = np.where(true == 0, np.round(predicted) == 0, np.abs(predicted - true) <= TOLERANCE * true)
    mae, mse = float(mean_absolute_error(true, predicted)), float(mean_squared_error(true, predicted))
    return {"mae": mae, "mse": mse, "rmse": mse**0.5, "accuracy": float(accurate.mean())}


# == Figures and report ====================================================================================
def draw_figures(history, held_out, title):
    """The figures {file name: figure} of a run, from its history and its table of validation frames."""
    loss, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    curves = history[["loss", "val_loss"]].set_axis(["training", "validation"], axis=1)
    sns.lineplot(curves, ax=axes).set(yscale="log", xlabel="Epoch", ylabel="Mean squared error (people²)")
    loss.suptitle(title, fontsize="small")
    both, (left, right) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=(1, 2), layout="constrained")
    sns.scatterplot(held_out, x="true", y="predicted", s=18, alpha=0.6, ax=left)
    for slope in (1 - TOLERANCE, 1, 1 + TOLERANCE):
        left.axline((0, 0), slope=slope, color="0.6", linewidth=1)
    left.set(xlabel=f"True count (lines: exact, {TOLERANCE:.0%} off)", ylabel="Predicted count (people)")
    sns.lineplot(held_out.set_index("id")[["true", "predicted"]], dashes=False, linewidth=1, ax=right)
    right.set(xlabel="Frame", ylabel="People")
    both.suptitle(title, fontsize="small")
    return {"loss.png": loss, "predictions.png": both}


def save_results(outputs, model, history, table, facts):
    """Metrics and figures of the validation frames and the model: all files at once, then the summary. table:
    a row for each frame, in order: id, split, true, predicted. facts: what metrics.json tells besides."""
    trained_on, held_out = (table[table["split"] == split] for split in ("train", "validation"))
    metrics = measure(held_out["true"], held_out["predicted"])
    baseline = measure(held_out["true"], np.full(len(held_out), trained_on["true"].mean()))
    title = f"Validation frames {held_out['id'].min()}-{held_out['id'].max()}, weights: {facts['weights']}\n"
    title += "MAE {mae:.2f}, MSE {mse:.2f}, accuracy {accuracy:.1%}".format(**metrics)
    figures = draw_figures(history, held_out, title.replace("$", r"\$"))  # it would begin mathematics
    constants = {name: value for name, value in globals().items() if name.isupper() and name != "ROOT"}
    versions = {library.__name__: library.__version__ for library in (keras, np, pd)}
    report = metrics | {"train_frames": len(trained_on), "validation_frames": len(held_out), **facts}
    report |= {"baseline": baseline, "python": sys.version, "versions": versions, "constants": constants}
    publish(outputs, {
        "ts_crowdnet.keras": model.save,
        "history.csv": history.to_csv,
        "predictions.csv": lambda path: table.to_csv(path, index=False, float_format="%.6f"),
        "metrics.json": lambda path: path.write_text(json.dumps(report, indent=2, default=str) + "\n"),
        **{name: figure.savefig for name, figure in figures.items()},
    })  # fmt: skip
    scores = pd.DataFrame({"this model": metrics, "mean count": baseline})
    scores.index = ["MAE, people", "MSE, people squared", "RMSE, people", f"share within {TOLERANCE:.0%}"]
    print(f"\nOn the validation frames:\n{scores.round(3).to_string()}\nResults: {outputs}")
    if metrics["mae"] >= baseline["mae"]:
        print("That is no better than always saying the mean of the training counts. Likely reasons: too few")
        print("training frames, validation frames of another scene, or labels that belong to other frames.")


# == Counting new footage ==================================================================================
def find_footage(folder):
    """The frames in a folder, in the order of the numbers in their names: frame_2 before frame_10."""
    visible = [path for path in folder.iterdir() if not path.name.startswith(".")]
    frames = [path for path in visible if path.is_file() and path.suffix.lower() in COUNTED_TYPES]
    if not frames:
        raise InputError(f"{folder}: no frames to count there; put {', '.join(COUNTED_TYPES)} files into it")
    if len(frames) < len(visible):
        print(f"{len(visible) - len(frames)} other files in {folder} are ignored.")
    split = re.compile(r"(\d+)").split
    return sorted(frames, key=lambda path: [int(t) if t.isdecimal() else t for t in split(path.name)])


def count_people(model, frames):
    """Counts the people in new frames of the camera that a model was trained on. Raises InputError, OSError.
    model: path of a ts_crowdnet.keras, or the loaded model. frames: a folder, its images taken in the order
    of the numbers in their names, or paths in order of time. Returns a DataFrame indexed by file name: count,
    in people, and unfamiliar, whether the frame looks like no training frame: its count means little."""
    if isinstance(frames, (str, Path)):
        frames = find_footage(Path(frames).expanduser())
    paths = [Path(path).expanduser() for path in frames]
    check_frames(paths)
    try:
        if isinstance(model, (str, Path)):
            model = keras.saving.load_model(Path(model).expanduser(), compile=False)
        per_frame, head = model.get_layer("time_distributed_resnet50").layer, model.get_layer("head")
    except Exception as error:  # zipfile, h5py and Keras raise many kinds
        raise InputError(f"{model}: no model written by this script ({error}); train one first") from None
    length, height, width = model.input_shape[1:4]
    frames = Frames(paths, (height, width))
    precision = choose_precision(per_frame, frames[[0]])
    estimates, distances = np.split(predict_frames(per_frame, frames, precision), 2, axis=1)  # (N, 1)
    windows = estimates[make_windows(np.arange(len(paths)), length)]  # (N, T, 1)
    counts = head.predict(windows, batch_size=BATCH_SIZE, verbose=0)[:, 0]
    names = pd.Index([path.name for path in paths], name="frame")
    return pd.DataFrame({"count": counts, "unfamiliar": distances[:, 0] > UNFAMILIAR}, index=names)


def count_folder():
    """The COUNT mode: counts.csv in OUTPUTS from the model there."""
    outputs = at(OUTPUTS)
    with lock(outputs):
        table = count_people(outputs / "ts_crowdnet.keras", at(COUNT))
        publish(outputs, {"counts.csv": lambda path: table.to_csv(path, float_format="%.3f")})
    print(f"{table['count'].mean():.1f} people a frame on average: {outputs / 'counts.csv'}")
    names = shorten(", ".join(table.index[table["unfamiliar"]]), 60)
    if names:
        print(f"{table['unfamiliar'].sum()} frames look like no training frame; doubt their counts: {names}")


# == Main ==================================================================================================
def main():
    """Labels -> frames -> features -> estimates -> counts -> figures and numbers."""
    check_constants()
    sns.set_theme(context="paper", style="ticks", rc={"savefig.dpi": 150})
    if COUNT is not None:
        return count_folder()
    labels = read_labels(at(LABELS))
    ids, counts = labels.index.to_numpy(), labels.to_numpy()
    n, n_train = len(labels), round(len(labels) * TRAIN_FRACTION)
    if not 1 < n_train < n:
        raise InputError(f"{at(LABELS)}: {n} frames: too few for TRAIN_FRACTION {TRAIN_FRACTION}; add some")
    paths = find_frames(ids)
    print(f"{n} frames: the first {n_train} train, the last {n - n_train} validate.")
    if b"synthetic mall sample" in paths[0].read_bytes():
        print("They are the rendered sample, no real people: the README says how to put Mall in its place.")
    outputs = at(OUTPUTS)
    with lock(outputs):
        backbone, frames, features, facts = extract_features(paths, n_train, outputs / "feature_cache")
        training_features = np.delete(features, np.s_[n_train:n], axis=0)  # (n_train * (1 + AUGMENT), F)
        regression, left_out_mae = fit_regression(training_features, counts[:n_train])
        print(f"Ridge regression: MAE {left_out_mae:.2f} on fifths of training video and copies left out.")
        estimates = regression.predict(features[:n], batch_size=256, verbose=0)[:, :1]  # (N, 1)

        keras.utils.set_random_seed(SEED)
        head = build_head(counts[:n_train])
        model = build_model(backbone, regression, head)
        windows, targets = make_windows(ids, SEQUENCE_LENGTH), counts[:, None]  # (N, T), (N, 1)
        source, trained = (estimates, head) if CACHE_FEATURES else (frames, model)
        training = WindowSequence(source, windows[:n_train], targets[:n_train], shuffle=True)
        validation = WindowSequence(source, windows[n_train:], targets[n_train:])
        history = train(trained, training, validation)

        predicted = head.predict(estimates[windows], batch_size=BATCH_SIZE, verbose=0)[:, 0]
        split = np.where(np.arange(n) < n_train, "train", "validation")
        table = pd.DataFrame({"id": ids, "split": split, "true": counts.astype(int), "predicted": predicted})
        save_results(outputs, model, history, table, facts | {"left_out_mae": left_out_mae})
    if plt.get_backend().lower() != "agg":  # a screen
        plt.show()
    plt.close("all")


def run_as_script():
    """main(), with one line instead of a traceback for what the user can put right."""
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    try:
        main()
    except InputError as error:
        sys.exit(" ".join(f"Error: {error}".split()))
    except OSError as error:
        path = error.filename or at(OUTPUTS)
        sys.exit(f"Error: {path}: {error.strerror or error}; free space or correct the path, then run again")


if __name__ == "__main__":
    run_as_script()
