"""TS-CrowdNet: count the people in a fixed-camera video with TimeDistributed ResNet50 + LSTM.
Trained on Mall's frames 1-800: MAE 1.9, MSE 5.7 on 801-1600, in 70 seconds on 2 CPU cores (README: weights).

    pip install -r requirements.txt && python tscrowdnet_train.py

Reads      labels.csv                            id,count: how many people each frame shows
           frames/frames/seq_000001.jpg ...      the frames of one fixed camera
Writes     outputs/ts_crowdnet.keras             the model: windows of uint8 frames in, counts out
           outputs/metrics.json, predictions.csv, predictions.png, history.csv, loss.png

Shapes. N labelled frames, the first M train; R = N + AUGMENT * M, with their jittered copies; F features of a
frame, 15,360 with trained weights; T = SEQUENCE_LENGTH; H x W = FRAME_SIZE:
    1. frozen ResNet50    all frames, then copies of the first M: (R, H, W, 3) uint8 -> features (R, F)
    2. ridge regression   features (N, F) -> (N, 2): estimate of the count, distance from the mean image
    3. LSTM head          windows of estimates (batch, T, 1) -> counts of their last frames (batch, 1)
    4. saved model        windows (batch, T, H, W, 3) -> 1 and 2 -> (batch, T, 1) -> 3 -> counts (batch, 1)
"""

import contextlib
import csv
import hashlib
import inspect
import io
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import timeit
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from textwrap import shorten

if __name__ == "__main__":  # Ctrl-C ends the process without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import scipy.io
import seaborn as sns
from PIL import Image, ImageEnhance, ImageOps  # Pillow comes with matplotlib
from sklearn.compose import TransformedTargetRegressor
from sklearn.kernel_ridge import KernelRidge
from sklearn.metrics import mean_absolute_error, mean_squared_error
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import KernelCenterer, StandardScaler

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
with open(os.devnull, "w") as null, os.fdopen(os.dup(2), "w") as stderr:
    os.dup2(null.fileno(), 2)  # TensorFlow writes start-up lines before it reads that level
    try:
        import keras
        from keras import layers, ops
    finally:
        os.dup2(stderr.fileno(), 2)
logging.getLogger("tensorflow").setLevel("ERROR")  # no warning when a new batch size is traced
ROOT = Path(__file__).resolve().parent

# -- Data: relative paths start at this script's folder ------------------------------------------------
LABELS = "labels.csv"  # another CSV with columns id,count, or the official "mall_gt.mat"
FRAMES = "frames/frames"  # folder of seq_000001.jpg, seq_000002.jpg, ...: one fixed camera
OUTPUTS = "outputs"  # give each experiment a folder of its own to keep its results
SEQUENCE_LENGTH = 5  # frames in a window; more for a high frame rate, 1 to use no earlier frames
FRAME_SIZE = (300, 400)  # (height, width) fed to ResNet50; larger if people are small, smaller for speed
TRAIN_FRACTION = 0.8  # first part of the video trains, the rest validates; 0.4 for Mall's canonical split

# -- Backbone: frozen ResNet50 -------------------------------------------------------------------------
WEIGHTS = "imagenet"  # or the path of a ResNet50 weight file (no top), or None: random
# Layers to read and the grid (rows, columns) each is summarised over: finer where people differ more in size.
FEATURE_LAYERS = {"conv2_block3_out": (3, 2), "conv3_block4_out": (3, 2),
                  "conv4_block6_out": (1, 1), "conv5_block3_out": (1, 1)}  # fmt: skip
# Read instead if the weights are random: their deeper layers only add noise.
FEATURE_LAYERS_RANDOM = {"conv1_relu": (3, 2), "conv2_block1_out": (3, 2), "conv2_block3_out": (3, 2)}
AUGMENT = 1  # jittered copies of each training frame (other light, nudged camera); 0 saves their time
PRECISION = "auto"  # or "float32" or "bfloat16"; auto takes bfloat16 where it is at least 1.5 x as fast
FRAME_BATCH = 8  # frames ResNet50 sees at once; fewer if memory runs out, more on a GPU; a change recomputes
CACHE_FEATURES = True  # False: training batches go through ResNet50 again, as published; no better, slower

# -- Regression, head and training: features -> estimate of each frame -> LSTM over a window -> count -----
PENALTIES = (1e-4, 1e-3, 1e-2)  # ridge penalties to try; add a higher one if the last is chosen
ESTIMATE_NOISE = 0.1  # on training estimates, in counts' standard deviations; more: earlier frames weigh more
LSTM_UNITS = 16  # more for longer windows, or where the counts of neighbouring frames are closely related
BATCH_SIZE = 64  # windows in a training step; about 4 if CACHE_FEATURES = False: each then holds T frames
EPOCHS = 50  # passes over the training windows; fewer for a quick look
LEARNING_RATE = 5e-3  # falls to 0 over the epochs along a half cosine; lower it if the loss rises
SEED = 0  # another seed, another model: publish mean and standard deviation over several

# -- Evaluation and use --------------------------------------------------------------------------------
TOLERANCE = 0.20  # a prediction within this share of the true count is accurate; 0.20 as published
COUNT = None  # a folder of new frames to count with the model in OUTPUTS, instead of training
COUNTED_TYPES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")  # the files counted there
UNFAMILIAR = 1.05  # mark frames farther from the mean image than this; the farthest one trained on is at 1


class InputError(ValueError):
    """A mistake the user can correct; the message says what is wrong and how to fix it."""


def at(path):
    """A path from the constants, taken relative to this script's folder unless it is absolute."""
    return ROOT / Path(path).expanduser()


def check_constants():
    """Raises InputError for a constant whose wrong value would fail late or obscurely."""
    def is_whole(value):
        return isinstance(value, int) and 0 <= value < 2**32
    def is_positive(value):
        return is_whole(value) and value > 0
    def is_above_0(value):
        return isinstance(value, (int, float)) and value > 0
    def is_share(value):
        return isinstance(value, (int, float)) and 0 <= value < 1
    def is_pair(value):
        return isinstance(value, tuple) and len(value) == 2 and all(map(is_positive, value))
    def are_grids(value):
        return isinstance(value, dict) and len(value) > 0 and all(map(is_pair, value.values()))
    def require(names, is_fine, remedy):
        for name in names.split():
            if not is_fine(globals()[name]):
                raise InputError(f"{name} = {globals()[name]!r}: make it {remedy}")
    require("LABELS FRAMES OUTPUTS", lambda value: isinstance(value, (str, Path)), "a path in quotes")
    require("WEIGHTS COUNT", lambda value: isinstance(value or "", (str, Path)), "a path in quotes, or None")
    require("SEQUENCE_LENGTH FRAME_BATCH LSTM_UNITS BATCH_SIZE EPOCHS", is_positive, "a whole number above 0")
    require("AUGMENT SEED", is_whole, "a whole number, 0 or more")
    require("ESTIMATE_NOISE TOLERANCE", is_share, "a number from 0 to below 1")
    require("TRAIN_FRACTION LEARNING_RATE", lambda value: is_share(value) and value > 0, "between 0 and 1")
    require("FEATURE_LAYERS FEATURE_LAYERS_RANDOM", are_grids, "{layer of ResNet50: (rows, columns), ...}")
    require("FRAME_SIZE", lambda value: is_pair(value) and min(value) >= 32, "(height, width), 32 or more")
    require("PRECISION", lambda value: value in ("auto", "float32", "bfloat16"), "auto, float32 or bfloat16")
    require("PENALTIES", lambda value: isinstance(value, tuple) and value and all(map(is_above_0, value)),
            "a tuple of numbers above 0, such as (1e-3,)")  # fmt: skip
    require("UNFAMILIAR", is_above_0, "a number above 0")


# == Files in OUTPUTS: whole or absent, whenever a run is cut short ========================================
@contextlib.contextmanager
def lock(outputs):
    """Refuses a second run into the same folder; the lock ends with the process, however it ends."""
    outputs.mkdir(parents=True, exist_ok=True)
    with (outputs / ".lock").open("w") as file:
        try:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{outputs}: another run writes here; wait for it, or change OUTPUTS") from None
        except (ImportError, OSError):  # none on Windows and some network drives
            pass
        yield


def write_files(folder, writers):
    """Writes files {name: write(path)} under other names, then renames all: no file is ever half written."""
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
    header_row = text[: len(text) - len(lines)].count("\n") + 1
    for separator in ",;\t":
        header = next(csv.reader(lines.splitlines(), delimiter=separator), [])
        columns = [name.strip().lower() for name in header]
        if columns.count("id") == columns.count("count") == 1:
            break
    else:
        raise ValueError("its first line must name one column id and one column count, as in id,count")
    table = pd.read_csv(io.StringIO(lines), sep=separator, header=None, dtype=str, skip_blank_lines=False)
    table.index = [f"row {row}" for row in table.index + header_row]
    table = table.iloc[1:, [columns.index("id"), columns.index("count")]]
    return table.set_axis(["id", "count"], axis=1).dropna(how="all")


def read_labels(path):
    """Reads the people counts from a CSV with columns id and count, or from Mall's mall_gt.mat.
    Returns a float Series of counts indexed by frame id, ascending. Raises InputError."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; set LABELS to your labels.csv or mall_gt.mat")
    try:
        if path.suffix.lower() == ".mat":
            counts = np.ravel(scipy.io.loadmat(path, variable_names=["count"])["count"])
            table = pd.DataFrame({"id": range(1, len(counts) + 1), "count": counts}, dtype=str)
            table = table.set_axis("entry " + table["id"])
        else:
            table = read_csv(path)
    except Exception as error:  # SciPy and pandas raise many kinds for a damaged file
        raise InputError(f"{path}: no readable labels ({error}); replace it or correct it") from None
    if table.empty:
        raise InputError(f"{path}: no labels; give one row id,count for each frame")
    values = table.apply(pd.to_numeric, errors="coerce").astype(float)
    whole = values.ge(0) & values.le([999_999_999, 1_000_000]) & values.mod(1).eq(0)  # (rows, 2)
    for column, bad, problem in (
        ("id", ~whole["id"], "is not a whole number from 0 to 999999999"),
        ("id", values["id"].duplicated(), "is there twice"),
        ("count", ~whole["count"], "is not a whole number from 0 to 1000000"),
    ):
        if bad.any():
            row = bad.idxmax()
            problem = f"{column} {table.loc[row, column]!r} {problem} ({bad.sum()} such rows)"
            raise InputError(f"{path}, {row}: {problem}; correct or delete the row")
    return values.astype({"id": int}).set_index("id")["count"].sort_index()


def find_frames(ids):
    """The labelled frames: N paths, in FRAMES or, as in Mall's own archive, its parent. Raises InputError."""
    folder = at(FRAMES) if at(FRAMES).is_dir() else at(FRAMES).parent
    present = {path.name for path in folder.glob("seq_*.jpg")}
    names = [f"seq_{frame:06d}.jpg" for frame in ids]
    missing = [name for name in names if name not in present]
    if missing:
        problem = f"{len(missing)} of {len(ids)} labelled frames missing: {shorten(', '.join(missing), 60)}"
        raise InputError(f"{at(FRAMES)}: {problem}; add them, delete their labels, or correct FRAMES")
    if len(present) > len(names):
        print(f"{len(present) - len(names)} frames in {folder} have no label and are ignored.")
    return [folder / name for name in names]


def check_frames(paths):
    """Raises InputError that names every frame which cannot be used."""
    def find_problem(path):
        try:
            with Image.open(path) as image:
                image.draft("RGB", (1, 1))  # JPEGs decode at 1/8 size: faster, and damage still shows
                image.load()
                return f"{image.mode} pixels; convert it to 8 bits" if image.mode[0] in "IF" else None
        except Exception as error:  # a damaged file makes Pillow raise many kinds
            return str(error) or type(error).__name__
    with ThreadPoolExecutor() as pool:
        problems = pool.map(find_problem, paths)
    damaged = [f"{path.name}: {problem}" for path, problem in zip(paths, problems) if problem]
    if damaged:
        problem = f"{len(damaged)} of {len(paths)} frames cannot be used: {'; '.join(damaged)}"
        raise InputError(f"{paths[0].parent}: {problem}; replace or remove them (and their labels, if any)")


def jitter(image, rng):
    """A copy in other light (up to 15%, tint 5%), from a nudged camera (up to 2% of the width, zoom 3%)."""
    zoom = rng.uniform(0.97, 1.03)
    left, top = rng.uniform(-0.02, 0.02, 2) * image.width + np.array(image.size) * (1 - zoom) / 2
    matrix = (zoom, 0, left, 0, zoom, top)
    image = image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhance(image).enhance(rng.uniform(0.85, 1.15))
    red, green, blue = rng.uniform(0.95, 1.05, 3)
    return image.convert("RGB", (red, 0, 0, 0, 0, green, 0, 0, 0, 0, blue, 0))


class Frames:
    """Image files read like an array: frames[rows] decodes them to (len(rows), height, width, 3) uint8 RGB.
    The rows after those of paths are jittered copies; SEED and the row determine how."""

    def __init__(self, paths, size, copies=()):
        self.paths, self.first_copy = [*paths, *copies], len(paths)
        self.size = size

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, rows):
        return np.stack([self.load(row) for row in rows])

    def load(self, row):
        with Image.open(self.paths[row]) as image:
            image = ImageOps.exif_transpose(image).convert("RGB")
        image = image.resize(self.size[::-1], Image.Resampling.BILINEAR)
        if row >= self.first_copy:
            image = jitter(image, np.random.default_rng((SEED, row)))
        return np.asarray(image)


def make_windows(ids, length):
    """For each frame, the rows of the window that ends at it (N, length). No window crosses a gap in the ids:
    the row after it repeats instead. Ids 1, 2, 5 and length 3: [[0, 0, 0], [0, 0, 1], [2, 2, 2]]."""
    rows = np.arange(len(ids))
    starts_run = np.diff(ids, prepend=ids[0]) != 1  # the first frame, and the first after each gap
    run_start = np.maximum.accumulate(rows * starts_run)  # (N,)
    return np.maximum(rows[:, None] + np.arange(1 - length, 1), run_start[:, None])


class WindowSequence(keras.utils.Sequence):
    """Feeds windows (batch, T, ...) and the counts (batch, 1) of their last frames to fit.
    source: Frames, (H, W, 3) for each row, or an array of estimates (N, 1). windows: rows (K, T), as from
    make_windows. counts: people in the last frame of each window (K, 1)."""

    def __init__(self, source, windows, counts, shuffle=False):
        super().__init__()
        self.source, self.windows, self.counts = source, windows, counts
        self.order = np.arange(len(windows))
        self.rng = np.random.default_rng(SEED) if shuffle else None
        self.on_epoch_end()

    def __len__(self):
        return math.ceil(len(self.windows) / BATCH_SIZE)  # the last, partial batch counts

    def __getitem__(self, batch):
        chosen = self.order[batch * BATCH_SIZE : (batch + 1) * BATCH_SIZE]
        rows, inverse = np.unique(self.windows[chosen], return_inverse=True)  # read a shared frame once
        return self.source[rows][inverse.reshape(len(chosen), -1)], self.counts[chosen]

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
    if not WEIGHTS:
        return build(None), "random", True
    weights = "imagenet" if WEIGHTS == "imagenet" else str(at(WEIGHTS))
    try:
        with warnings.catch_warnings():  # Keras only warns of layers that a file has no weights for
            warnings.filterwarnings("error", category=UserWarning, module="keras")
            return build(weights), Path(weights).name, False
    except Exception as error:  # h5py and Keras raise many kinds, a bare Exception when a download fails
        if WEIGHTS != "imagenet":
            raise InputError(f"{weights}: no weights of Keras's ResNet50 without top ({error})") from None
        print(f"Warning: no ImageNet weights ({shorten(str(error), 200)}); random ones count worse. Remedy:",
              "WEIGHTS = 'path/resnet50_weights_tf_dim_ordering_tf_kernels_notop.h5'", file=sys.stderr)
        return build(None), "random (the ImageNet weights could not be downloaded)", True


def calibrate(resnet, frames):
    """Sets BatchNorm's statistics from frames (n, H, W, 3); without this, random weights carry no signal."""
    for layer in resnet.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.momentum = 0.0  # replace the old statistics entirely
    resnet(normalise(frames), training=True)


def fold_batchnorm(resnet):
    """The same network, faster: each convolution also does the work of the BatchNorm after it. Jacob et al.:
    "Quantization and training of neural networks for efficient integer-arithmetic-only inference", 2018."""
    def is_norm(layer):
        return isinstance(layer, layers.BatchNormalization)
    def skip_norm(layer, x, **options):
        return x if is_norm(layer) else layer(x, **options)
    folded = keras.models.clone_model(resnet, call_function=skip_norm)
    others = [layer for layer in resnet.layers if not is_norm(layer)]
    folded.set_weights([array for layer in others for array in layer.get_weights()])
    for norm in filter(is_norm, resnet.layers):
        convolution = folded.get_layer(norm.name.removesuffix("bn") + "conv")
        kernel, bias = convolution.get_weights()
        gamma, beta, mean, variance = norm.get_weights()
        gain = gamma / np.sqrt(variance + norm.epsilon)
        convolution.set_weights([kernel * gain, (bias - mean) * gain + beta])
    return folded


def normalise(frames):
    """RGB frames (N, H, W, 3) -> BGR, each channel of each at mean 0, ImageNet's standard deviation of 57."""
    frames = ops.cast(ops.flip(frames, axis=-1), "float32")
    mean, variance = ops.moments(frames, axes=(1, 2), keepdims=True)
    return (frames - mean) * 57.0 / ops.sqrt(variance + 1.0)  # + 1: a frame of one colour has variance 0


def build_backbone(resnet, grids):
    """ResNet50 read at the layers of grids: a frame (H, W, 3) uint8 -> features (F,). Each layer (h, w, C) is
    summarised over the cells of its grid, by the mean and the standard deviation of each channel."""
    frame = keras.Input((*FRAME_SIZE, 3), dtype="uint8", name="frame")
    maps = keras.tree.flatten(fold_batchnorm(resnet)(normalise(frame)))
    features = []
    for x, (rows, columns) in zip(maps, grids.values()):
        x = ops.cast(x, "float32")  # (h, w, C)
        cell = (math.ceil(x.shape[1] / rows), math.ceil(x.shape[2] / columns))
        average = layers.AveragePooling2D(cell, padding="same")
        mean = average(x)  # (rows, columns, C), or fewer where these do not divide (h, w)
        variance = ops.relu(average(ops.square(x)) - ops.square(mean))  # rounding may make it negative
        features += [layers.Flatten()(mean), layers.Flatten()(ops.sqrt(variance))]
    return keras.Model(frame, layers.Concatenate()(features), name="backbone")


def set_precision(model, precision):
    """Makes the ResNet50 in model compute in "float32" or "bfloat16"; weights and all else stay float32."""
    for layer in model.get_layer("resnet50").layers:
        layer.dtype_policy = "float32" if precision == "float32" else "mixed_bfloat16"
    model.make_predict_function(force=True)  # the old one was traced in the old precision


def choose_precision(model, frames):
    """PRECISION; if "auto", bfloat16 where it runs model at least 1.5 x as fast on two of the frames."""
    if PRECISION != "auto":
        return PRECISION
    batch = frames[range(len(frames))[:2]]  # one alone gains less, more take longer
    seconds = {}
    for precision in ("float32", "bfloat16"):  # the first trial compiles; other programs may slow down some
        set_precision(model, precision)
        seconds[precision] = min(timeit.repeat(lambda: model.predict_on_batch(batch), number=1, repeat=4))
    return "bfloat16" if seconds["float32"] >= 1.5 * seconds["bfloat16"] else "float32"


def fit_regression(features, rows, counts):
    """Ridge regression of counts (M,) on features (R, F); rows are those of the M training frames, then their
    copies in the same order. 5-fold cross-validation picks the penalty; a fold is a fifth of the video with
    its copies. All fits share one kernel matrix of at most 5,000 images: Saunders et al., "Ridge regression
    learning algorithm in dual variables", ICML 1998. Returns (model, MAE in cross-validation, penalty). The
    model maps features (F,) to (2,): count, and distance from the mean image, 1 for the farthest here."""
    kept = np.linspace(0, len(rows) - 1, min(len(rows), 5000)).astype(int)  # K images
    features = features[rows[kept]]  # (K, F)
    origin = kept % len(counts)  # the training frame that each shows
    targets = counts[origin].astype("float32")
    scaler = StandardScaler(copy=False)
    for chunk in np.array_split(features, math.ceil(len(kept) / 256)):  # at once: three times the memory
        scaler.partial_fit(chunk)
    scaled = scaler.transform(features)
    kernel = scaled @ scaled.T  # (K, K), its diagonal F on average
    # Centred anew in every fit: around a mean of all rows, the others would tell a fold its own mean count.
    kernel_ridge = KernelRidge(kernel="precomputed")
    ridge = TransformedTargetRegressor(kernel_ridge, transformer=StandardScaler(with_std=False))
    pipeline = Pipeline([("centre", KernelCenterer()), ("ridge", ridge)])
    alphas = {"ridge__regressor__alpha": np.multiply(PENALTIES, scaled.size)}
    folds = GroupKFold(min(5, len(counts)))
    search = GridSearchCV(pipeline, alphas, cv=folds, scoring="neg_mean_absolute_error")
    search.fit(kernel, targets, groups=origin * 5 // len(counts))
    dual = search.best_estimator_["ridge"].regressor_.dual_coef_.reshape(-1, 1)  # (K, 1)

    inputs = keras.Input((scaled.shape[1],), name="features")
    z = layers.Normalization(mean=scaler.mean_, variance=np.square(scaler.scale_))(inputs)
    dense = layers.Dense(1, name="estimate")
    distance = ops.sqrt(ops.sum(ops.square(z), axis=-1, keepdims=True) / kernel.diagonal().max())
    model = keras.Model(inputs, layers.Concatenate()([dense(z), distance]), name="regression")
    dense.set_weights([scaled.T @ dual, targets.mean(keepdims=True)])
    return model, -search.best_score_, float(PENALTIES[search.best_index_])


def build_head(counts):
    """Window of estimates (T, 1) -> count of its last frame (1,), never negative. The LSTM corrects the last
    estimate using the earlier ones. Estimates are better for training frames than they will be for new ones;
    the noise makes up for that. counts (M,), those of the training frames, set the scale of what it sees."""
    mean, std = float(counts.mean()), max(float(counts.std()), 1.0)
    estimates = keras.Input((SEQUENCE_LENGTH, 1), name="estimates")
    x = layers.GaussianNoise(ESTIMATE_NOISE)(layers.Rescaling(1 / std, -mean / std)(estimates))
    memory = layers.LSTM(LSTM_UNITS, unroll=True, name="lstm")(x)  # (LSTM_UNITS,)
    correction = layers.Dense(1, use_bias=False, kernel_initializer="zeros", name="correction")(memory)
    people = layers.Rescaling(std, mean)(layers.Add()([x[:, -1], correction]))
    return keras.Model(estimates, layers.ReLU(name="count")(people), name="head")


def build_model(backbone, regression, head):
    """The whole network: a window of frames (T, H, W, 3) uint8 -> the count of the last one (1,)."""
    per_frame = keras.Model(backbone.input, regression(backbone.output), name="resnet50_regression")
    per_frame.trainable = False
    windows = keras.Input((SEQUENCE_LENGTH, *FRAME_SIZE, 3), dtype="uint8", name="frames")
    estimates = layers.TimeDistributed(per_frame, name="time_distributed_resnet50")(windows)[..., :1]
    return keras.Model(windows, head(estimates), name="ts_crowdnet")


# == Features and training =================================================================================
def load_chunk(path, shape):
    """The predictions (rows, ...) stored at path, or None if they are damaged or of another shape."""
    try:
        with np.load(path) as stored:  # raises if a checksum in the file is wrong
            return stored["predictions"].reshape(shape)
    except Exception as error:  # zipfile and NumPy raise many kinds
        print(f"{path} is damaged ({error}) and is computed again.")


def predict_frames(model, frames, precision, folder=None):
    """Runs the frames (N, H, W, 3) through model, its ResNet50 in the given precision: predictions (N, ...).
    Every 8 batches are saved in folder, if one is given: an interrupted run resumes from them."""
    set_precision(model, precision)
    bar = keras.utils.Progbar(len(frames), unit_name="frame", interval=0.1 if sys.stdout.isatty() else 20)
    predictions = np.empty((len(frames), *model.output_shape[1:]), "float32")
    with ThreadPoolExecutor(2) as decoders:  # decode while the model computes
        for rows in np.split(np.arange(len(frames)), range(8 * FRAME_BATCH, len(frames), 8 * FRAME_BATCH)):
            path = folder / f"{rows[0]:09d}.npz" if folder else None
            stored = load_chunk(path, (len(rows), *predictions.shape[1:])) if path and path.exists() else None
            if stored is not None:
                predictions[rows] = stored
                bar.add(len(rows))
                continue
            batches = np.split(rows, range(FRAME_BATCH, len(rows), FRAME_BATCH))
            for batch, images in zip(batches, decoders.map(frames.__getitem__, batches)):
                predictions[batch] = model.predict_on_batch(images)
                bar.add(len(batch))
            if path:
                write_files(folder, {path.name: lambda new: np.savez(new, predictions=predictions[rows])})
    set_precision(model, "float32")
    return predictions


def extract_features(paths, n_train, cache):
    """Runs the frames, and AUGMENT jittered copies of the first n_train, through ResNet50 once. Features in
    cache are reused if nothing they depend on has changed. Returns (backbone, Frames of all R images, their
    features (R, F), entries for metrics.json)."""
    resnet, weights, is_random = load_resnet50()
    grids = FEATURE_LAYERS_RANDOM if is_random else FEATURE_LAYERS
    try:
        resnet = keras.Model(resnet.input, [resnet.get_layer(name).output for name in grids], name="resnet50")
    except ValueError as error:
        raise InputError(f"FEATURE_LAYERS, FEATURE_LAYERS_RANDOM: {shorten(str(error), 300)}") from None
    frames = Frames(paths, FRAME_SIZE, copies=AUGMENT * paths[:n_train])

    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    functions = (Frames, jitter, calibrate, fold_batchnorm, normalise, build_backbone, extract_features)
    code = [keras.__version__, keras.config.backend(), *map(inspect.getsource, functions)]
    depends_on = (files, n_train, grids, FRAME_SIZE, FRAME_BATCH, AUGMENT, SEED, code)
    values = b"".join(array.tobytes() for array in resnet.get_weights())
    digest = hashlib.blake2b(repr(depends_on).encode() + values, digest_size=8).hexdigest()
    if is_random:
        calibrate(resnet, frames[[0, n_train - 1]])  # two: every activation is kept; more take gigabytes
    backbone = build_backbone(resnet, grids)
    folder = next(cache.glob(f"{digest}-{'*' if PRECISION == 'auto' else PRECISION}"), None)
    if folder is None:
        folder = cache / f"{digest}-{choose_precision(backbone, frames)}"
        shutil.rmtree(cache, ignore_errors=True)
        folder.mkdir(parents=True)
    precision = folder.name.split("-")[1]  # "auto" keeps the choice of the run that began these features
    print(f"ResNet50 ({weights}, {precision}) reads {len(paths)} frames, {len(frames) - len(paths)} copies:")
    features = predict_frames(backbone, frames, precision, folder)
    return backbone, frames, features, {"weights": weights, "precision": precision}


def train(model, training, validation):
    """Trains for EPOCHS epochs (the Sequence shuffles); returns the history. Validation is only monitored."""
    schedule = keras.optimizers.schedules.CosineDecay(LEARNING_RATE, EPOCHS * len(training))
    model.compile(keras.optimizers.Adam(schedule), loss="mse", metrics=["mae"])
    fit = model.fit(training, validation_data=validation, epochs=EPOCHS, shuffle=False, verbose=2)
    return pd.DataFrame(fit.history, index=pd.RangeIndex(1, EPOCHS + 1, name="epoch"))


# == Evaluation: metrics, figures, report ==================================================================
def measure(true, predicted):
    """Metrics of predicted counts. Accuracy: share within TOLERANCE; a true 0 needs one that rounds to 0."""
    accurate = np.where(true == 0, np.round(predicted) == 0, np.abs(predicted - true) <= TOLERANCE * true)
    mae, mse = float(mean_absolute_error(true, predicted)), float(mean_squared_error(true, predicted))
    return {"mae": mae, "mse": mse, "rmse": mse**0.5, "accuracy": float(accurate.mean())}


def draw_figures(history, validation, title):
    """The figures {file name: figure} of a run, from its history and its table of validation frames."""
    sns.set_theme(context="paper", style="ticks", rc={"savefig.dpi": 150})
    loss, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    curves = history[["loss", "val_loss"]].set_axis(["training", "validation"], axis=1)
    sns.lineplot(curves, ax=axes).set(yscale="log", ylabel="Mean squared error (people²)")
    axes.set_xlabel("Epoch\nTraining: fitted frames, with noise added. Validation: new frames, without.")
    both, (left, right) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=(1, 2), layout="constrained")
    sns.scatterplot(validation, x="true", y="predicted", s=18, alpha=0.6, ax=left)
    for slope in (1 - TOLERANCE, 1, 1 + TOLERANCE):
        left.axline((0, 0), slope=slope, color="0.6", linewidth=1)
    left.set(xlabel=f"True count (lines: exact, {TOLERANCE:.0%} off)", ylabel="Predicted count (people)")
    lines = validation.set_index("id")[["true", "predicted"]]
    sns.lineplot(lines, dashes=False, linewidth=1, ax=right).set(xlabel="Frame", ylabel="People")
    for figure in (loss, both):
        figure.suptitle(title, fontsize="small", parse_math=False)
    return {"loss.png": loss, "predictions.png": both}


def save_results(outputs, model, history, table, run):
    """Writes all results, prints a summary. table: id, split, true, predicted. run: more for metrics.json."""
    training, validation = table[table["split"] == "train"], table[table["split"] == "validation"]
    metrics = measure(validation["true"], validation["predicted"])
    baseline = measure(validation["true"], np.full(len(validation), training["true"].mean()))
    title = "Validation frames {}-{}, weights: {}\n".format(*validation["id"].iloc[[0, -1]], run["weights"])
    title += "MAE {mae:.2f}, MSE {mse:.2f}, accuracy {accuracy:.1%}".format(**metrics)
    figures = draw_figures(history, validation, title)
    constants = {name: value for name, value in globals().items() if name.isupper() and name != "ROOT"}
    versions = {library.__name__: library.__version__ for library in (keras, np, pd)}
    report = metrics | {"train_frames": len(training), "validation_frames": len(validation), **run}
    report |= {"baseline": baseline, "python": sys.version, "versions": versions, "constants": constants}
    write_files(outputs, {
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
        print("That is no better than the mean training count: few frames, wrong labels, another scene?")


# == Counting new footage ==================================================================================
def find_footage(folder):
    """The frames in a folder, in the order of the numbers in their names: frame_2 before frame_10."""
    def by_numbers(path):
        return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)]
    visible = [path for path in folder.iterdir() if not path.name.startswith(".")]
    frames = [path for path in visible if path.is_file() and path.suffix.lower() in COUNTED_TYPES]
    if len(frames) < len(visible):
        print(f"{len(visible) - len(frames)} other files in {folder} are ignored.")
    return sorted(frames, key=by_numbers)


def count_people(model, frames):
    """Counts the people in new frames of the camera that a model was trained on. Raises InputError, OSError.
    model: path of a ts_crowdnet.keras, or the loaded model. frames: a folder, or paths in time order, of one
    recording at about the frame rate of training. Returns a DataFrame indexed by file name, with two columns:
    count, and unfamiliar: True where a frame looks like no training frame, so that its count means little."""
    found = find_footage(Path(frames).expanduser()) if isinstance(frames, (str, Path)) else frames
    paths = [Path(path).expanduser() for path in found]
    if not paths:
        raise InputError(f"{frames}: no frames to count; give some of {', '.join(COUNTED_TYPES)}")
    try:
        if isinstance(model, (str, Path)):
            model = keras.saving.load_model(Path(model).expanduser(), compile=False)
        per_frame, head = model.get_layer("time_distributed_resnet50").layer, model.get_layer("head")
    except Exception as error:  # zipfile, h5py and Keras raise many kinds
        raise InputError(f"{model}: no model written by this script ({error}); train one first") from None
    check_frames(paths)
    length, height, width = model.input_shape[1:4]
    images = Frames(paths, (height, width))
    predictions = predict_frames(per_frame, images, choose_precision(per_frame, images))
    estimates, distances = np.split(predictions, 2, axis=1)  # (N, 1) each
    windows = make_windows(np.arange(len(paths)), length)
    counts = head.predict(estimates[windows], batch_size=BATCH_SIZE, verbose=0)[:, 0]
    names = pd.Index([path.name for path in paths], name="frame")
    return pd.DataFrame({"count": counts, "unfamiliar": distances[:, 0] > UNFAMILIAR}, index=names)


def count_folder():
    """The COUNT mode: counts.csv in OUTPUTS, from the model there."""
    outputs = at(OUTPUTS)
    with lock(outputs):
        table = count_people(outputs / "ts_crowdnet.keras", at(COUNT))
        write_files(outputs, {"counts.csv": lambda path: table.to_csv(path, float_format="%.3f")})
    print(f"{len(table)} frames, {table['count'].mean():.1f} people on average: {outputs / 'counts.csv'}")
    if table["unfamiliar"].any():
        print(f"{table['unfamiliar'].sum()} of them look like no training frame; doubt their counts.")


# == Main ==================================================================================================
def main():
    """Labels -> frames -> features -> estimates -> counts -> figures and numbers."""
    check_constants()
    if COUNT:
        return count_folder()
    labels = read_labels(at(LABELS))
    ids, counts = labels.index.to_numpy(), labels.to_numpy()
    n, n_train = len(labels), round(len(labels) * TRAIN_FRACTION)
    if not 1 < n_train < n:
        raise InputError(f"{at(LABELS)}: {n} frames, too few for this TRAIN_FRACTION; add some or change it")
    paths = find_frames(ids)
    check_frames(paths)
    print(f"{n} frames: the first {n_train} train, the last {n - n_train} validate.")
    if b"synthetic mall sample" in paths[0].read_bytes():
        print("They are the rendered sample, not real people; the README says how to use Mall instead.")
    outputs = at(OUTPUTS)
    with lock(outputs):
        backbone, frames, features, run = extract_features(paths, n_train, outputs / "feature_cache")
        rows = np.r_[:n_train, n : len(features)]  # the training frames, then their copies
        regression, run["cv_mae"], run["penalty"] = fit_regression(features, rows, counts[:n_train])
        print("Ridge regression: MAE {cv_mae:.2f} in cross-validation, penalty {penalty:g}.".format(**run))
        estimates = regression.predict(features[:n], batch_size=256, verbose=0)[:, :1]  # (N, 1)

        keras.utils.set_random_seed(SEED)
        head = build_head(counts[:n_train])
        model = build_model(backbone, regression, head)
        windows, targets = make_windows(ids, SEQUENCE_LENGTH), counts[:, None]  # (N, T), (N, 1)
        source, fitted = (estimates, head) if CACHE_FEATURES else (frames, model)  # rows (1,) or (H, W, 3)
        training = WindowSequence(source, windows[:n_train], targets[:n_train], shuffle=True)
        validation = WindowSequence(source, windows[n_train:], targets[n_train:])
        history = train(fitted, training, validation)

        predicted = head.predict(estimates[windows], batch_size=BATCH_SIZE, verbose=0)[:, 0]
        split = np.where(np.arange(n) < n_train, "train", "validation")
        table = pd.DataFrame({"id": ids, "split": split, "true": counts.astype(int), "predicted": predicted})
        save_results(outputs, model, history, table, run)
    if plt.get_backend().lower() != "agg":  # a screen
        plt.show()


def run_as_script():
    """main(), with one line instead of a traceback for what the user can put right."""
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    try:
        main()
    except InputError as error:
        sys.exit(" ".join(f"Error: {error}".split()))
    except OSError as error:
        sys.exit(f"Error: {error.filename or at(OUTPUTS)}: {error.strerror or error}; fix that and run again")


if __name__ == "__main__":
    run_as_script()
