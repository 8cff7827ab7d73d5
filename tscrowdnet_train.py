"""TS-CrowdNet: count the people in a fixed-camera video with TimeDistributed ResNet50 + LSTM.
Trained on Mall's frames 1-800 it counts 801-1600 with MAE 1.9, MSE 5.7 on 2 CPU cores (README: which weights).

    pip install -r requirements.txt && python tscrowdnet_train.py

Reads      labels.csv                            id,count: how many people each frame shows
           frames/frames/seq_000001.jpg ...      the frames of one fixed camera
Writes     outputs/ts_crowdnet.keras             the model: windows of uint8 frames in, counts out
           outputs/metrics.json, predictions.csv, predictions.png, history.csv, loss.png

N labelled frames, the first M train; C jittered copies of these; T = SEQUENCE_LENGTH; H x W = FRAME_SIZE;
F numbers in a feature vector, 15,360 with trained weights. The network of a window, in three stages:

    frames (T, H, W, 3) uint8
    1. spatial      TimeDistributed(frozen ResNet50, read at FEATURE_LAYERS)       -> feature vectors (T, F)
    2. temporal     the same Dense for every frame (T, PROJECTION), then an LSTM   -> (LSTM_UNITS,)
    3. regression   Dense(DENSE_UNITS, relu), Dense(1)                             -> last frame's count (1,)

The spatial stage does not learn, so it reads the N + C pictures once and its features (N + C, F) are kept;
WindowSequence feeds windows of them (BATCH_SIZE, T, F) to stages 2 and 3, which train for EPOCHS.
"""

import signal

if __name__ == "__main__":  # Ctrl-C ends the process without a traceback, from here on
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import contextlib
import csv
import hashlib
import io
import json
import logging
import math
import os
import re
import shutil
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from textwrap import shorten

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import scipy.io
import seaborn as sns
from PIL import Image, ImageEnhance, ImageOps  # Pillow comes with matplotlib
from sklearn.metrics import mean_absolute_error, mean_squared_error
from sklearn.preprocessing import StandardScaler

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
FEATURE_SPREAD = True  # read the standard deviation in each cell, too; False: the mean alone, as published
AUGMENT = 0.25  # share of training frames with a jittered copy (other light, nudged camera); 0: none, 1: all
PRECISION = "auto"  # or "float32" or "bfloat16"; auto takes bfloat16 where the hardware has units for it
FRAME_BATCH = 8  # frames ResNet50 sees at once; fewer if memory runs out, more on a GPU; a change recomputes
CACHE_FEATURES = True  # False: training batches go through ResNet50 again, as published; no better, slower

# -- Head: feature vectors -> projection -> LSTM -> dense layers -> count ----------------------------------
PROJECTION = 32  # numbers a feature vector is reduced to before the LSTM; 0: all of them enter, as published
LSTM_UNITS = 64  # more for longer windows
LSTM_DROPOUT = 0.0  # share of the LSTM's inputs dropped in training; 0.5 as published
FORGET_BIAS = -2.0  # starting bias of its forget gate; higher: earlier frames weigh more (Keras starts at 1)
DENSE_UNITS = 64  # of the layer between the LSTM and the count

# -- Training ------------------------------------------------------------------------------------------
BATCH_SIZE = 64  # windows in a step; about 4 if CACHE_FEATURES = False: each then holds T frames
EPOCHS = 50  # passes over the training windows; fewer for a quick look
# SGD learns what many frames share first and what is peculiar to one last; "adam" learns both at once.
OPTIMIZER = {"class_name": "SGD", "config": {"momentum": 0.9, "nesterov": True, "clipnorm": 1.0}}
LEARNING_RATE = 0.1  # falls to 0 along a half cosine; 0.3 is too much for SGD, Adam needs 1e-3 or less
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


def is_optimizer(value):
    """Whether Keras can make an optimizer of the value of OPTIMIZER."""
    try:
        return bool(keras.optimizers.get(value))
    except Exception:  # Keras raises many kinds
        return False


def check_constants():
    """Raises InputError for a constant whose wrong value would fail late or obscurely."""
    def is_number(value, low, high=math.inf):
        return isinstance(value, (int, float)) and low <= value < high

    def is_whole(value, low=1):
        return isinstance(value, int) and is_number(value, low, 2**32)

    def is_pair(value, low=1):
        return isinstance(value, tuple) and len(value) == 2 and all(is_whole(part, low) for part in value)

    def are_grids(value):
        return isinstance(value, dict) and len(value) > 0 and all(map(is_pair, value.values()))

    for names, is_fine, remedy in (
        ("LABELS FRAMES OUTPUTS", lambda x: isinstance(x, (str, Path)), "a path in quotes"),
        ("WEIGHTS COUNT", lambda x: not x or isinstance(x, (str, Path)), "a path in quotes, or None"),
        ("SEQUENCE_LENGTH FRAME_BATCH BATCH_SIZE EPOCHS", is_whole, "a whole number above 0"),
        ("LSTM_UNITS DENSE_UNITS", is_whole, "a whole number above 0"),
        ("PROJECTION SEED", lambda x: is_whole(x, 0), "a whole number, 0 or more"),
        ("AUGMENT", lambda x: x == 1 or is_number(x, 0, 1), "a number from 0 to 1"),
        ("LSTM_DROPOUT TOLERANCE", lambda x: is_number(x, 0, 1), "a number from 0 to below 1"),
        ("TRAIN_FRACTION", lambda x: is_number(x, 1e-9, 1), "a number between 0 and 1"),
        ("LEARNING_RATE", lambda x: is_number(x, 1e-9, 100), "a number above 0, such as 0.1"),
        ("FORGET_BIAS", lambda x: is_number(x, -100, 100), "a number"),
        ("FEATURE_LAYERS FEATURE_LAYERS_RANDOM", are_grids, "{layer of ResNet50: (rows, columns), ...}"),
        ("FRAME_SIZE", lambda x: is_pair(x, 32), "(height, width), 32 or more"),
        ("PRECISION", ("auto", "float32", "bfloat16").__contains__, "auto, float32 or bfloat16"),
        ("UNFAMILIAR", lambda x: is_number(x, 1e-9), "a number above 0"),
        ("OPTIMIZER", is_optimizer, "a name such as 'adam', or Keras's {'class_name': ..., 'config': {...}}"),
    ):
        for name in names.split():
            if not is_fine(globals()[name]):
                raise InputError(f"{name} = {globals()[name]!r}: make it {remedy}")


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
    copied: rows of the frames that have a jittered copy; the copies have the rows after all frames, in the
    same order. SEED and the row determine the jitter."""

    def __init__(self, paths, size, copied=()):
        self.paths = [*paths, *(paths[row] for row in copied)]
        self.first_copy = len(paths)
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


def choose_copied(n_train):
    """Rows of the training frames that have a jittered copy: the share AUGMENT, evenly spaced."""
    if not AUGMENT:
        return np.arange(0)
    return np.arange(0, n_train, 1 / AUGMENT).astype(int)


class WindowSequence(keras.utils.Sequence):
    """Feeds windows (batch, T, ...) and the counts (batch, 1) of their last frames to fit and predict.
    images: Frames, (H, W, 3) a row, or feature vectors, (F,) a row. windows: rows (K, T), as from make_windows.
    counts: people in the last frame of each window (K,). For training, copy_of: the row of each frame's
    jittered copy, or its own where it has none. Every epoch then shuffles the windows, and shows about half
    of them with copies in the place of the frames that have one."""

    def __init__(self, images, windows, counts, copy_of=None):
        super().__init__()
        self.images = images
        self.windows = windows
        self.counts = counts.reshape(-1, 1)
        self.copy_of = copy_of
        self.rng = np.random.default_rng(SEED)
        self.shown = windows
        self.order = np.arange(len(windows))
        self.on_epoch_end()

    def __len__(self):
        return math.ceil(len(self.windows) / BATCH_SIZE)  # the last, partial batch counts

    def __getitem__(self, batch):
        chosen = self.order[batch * BATCH_SIZE : (batch + 1) * BATCH_SIZE]
        rows, places = np.unique(self.shown[chosen], return_inverse=True)  # read a shared frame once
        places = places.reshape(len(chosen), -1)  # (batch, T)
        return self.images[rows][places], self.counts[chosen]

    def on_epoch_end(self):
        if self.copy_of is not None:
            self.rng.shuffle(self.order)
            with_copies = self.rng.random((len(self.windows), 1)) < 0.5
            self.shown = np.where(with_copies, self.copy_of[self.windows], self.windows)


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
    """RGB frames (N, H, W, 3) -> BGR, as ImageNet's weights expect, each channel of each frame at mean 0 and
    ImageNet's standard deviation of 57, so that a change of light changes little."""
    x = ops.cast(ops.flip(frames, axis=-1), "float32")
    x = layers.GroupNormalization(groups=-1, epsilon=1.0, center=False, scale=False)(x)
    return layers.Rescaling(57.0)(x)


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
        features.append(layers.Flatten()(mean))
        if FEATURE_SPREAD:
            variance = ops.relu(average(ops.square(x)) - ops.square(mean))  # rounding may make it negative
            features.append(layers.Flatten()(ops.sqrt(variance)))
    features = layers.Concatenate()(features) if len(features) > 1 else features[0]
    return keras.Model(frame, features, name="backbone")


def standardise(features, trained_on):
    """Standardises features (R, F) in place, by the statistics of the training images alone, and divides them
    so that the vectors of these have length 1 on average. Returns the Keras layers that do the same.
    The scale of the second is the length of the longest: see count_people."""
    scaler = StandardScaler().fit(features[trained_on])
    scale = scaler.scale_ * math.sqrt(features.shape[1])
    features -= scaler.mean_.astype("float32")
    features /= scale.astype("float32")
    longest = float(np.linalg.norm(features[trained_on], axis=1).max())
    longest = max(longest, 1e-3)  # 0 where all training images are alike
    normalization = layers.Normalization(mean=scaler.mean_, variance=np.square(scale * longest))
    return [normalization, layers.Rescaling(longest, name="longest")]


def build_spatial(backbone, standardisation):
    """Stage 1, for one frame: (H, W, 3) uint8 -> its standardised feature vector (F,)."""
    features = backbone.output
    for layer in standardisation:
        features = layer(features)
    spatial = keras.Model(backbone.input, features, name="resnet50_features")
    spatial.trainable = False
    return spatial


def build_temporal(n_features):
    """Stage 2: feature vectors (T, F) -> what the LSTM makes of them (LSTM_UNITS,)."""
    features = keras.Input((SEQUENCE_LENGTH, n_features), name="features")
    x = features
    if PROJECTION:
        x = layers.Dense(PROJECTION, name="projection")(x)  # (T, PROJECTION)
    lstm = layers.LSTM(LSTM_UNITS, dropout=LSTM_DROPOUT, unroll=True, name="lstm")
    memory = lstm(x)
    kernel, recurrent_kernel, bias = lstm.get_weights()
    bias[LSTM_UNITS : 2 * LSTM_UNITS] = FORGET_BIAS  # Keras's order of the gates: input, forget, cell, output
    lstm.set_weights([kernel, recurrent_kernel, bias])
    return keras.Model(features, memory, name="temporal")


def build_regression(counts):
    """Stage 3: (LSTM_UNITS,) -> people in the last frame (1,). counts (M,), those of the training frames, set
    the scale: the dense layers begin at their mean and work in their standard deviations."""
    mean = float(counts.mean())
    std = max(float(counts.std()), 1.0)
    memory = keras.Input((LSTM_UNITS,), name="memory")
    x = layers.Dense(DENSE_UNITS, activation="relu", name="dense")(memory)
    x = layers.Dense(1, name="people")(x)
    return keras.Model(memory, layers.Rescaling(std, mean)(x), name="regression")


def build_network(input_shape, spatial, temporal, regression):
    """The three stages in a row; without the spatial one where the windows hold feature vectors already."""
    windows = keras.Input(input_shape, dtype="uint8" if spatial else "float32", name="windows")
    features = layers.TimeDistributed(spatial, name="spatial")(windows) if spatial else windows
    return keras.Model(windows, regression(temporal(features)), name="ts_crowdnet")


def set_precision(model, precision):
    """Makes the ResNet50 in model compute in "float32" or "bfloat16"; weights and all else stay float32."""
    for layer in model.get_layer("resnet50").layers:
        layer.dtype_policy = "float32" if precision == "float32" else "mixed_bfloat16"
    model.make_predict_function(force=True)  # the old one was traced in the old precision


def choose_precision():
    """PRECISION; if "auto", bfloat16 on processors and GPUs with units for it, which double its speed or more."""
    if PRECISION != "auto":
        return PRECISION
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf
        for gpu in tf.config.list_physical_devices("GPU"):
            capability = tf.config.experimental.get_device_details(gpu).get("compute_capability", (0, 0))
            return "bfloat16" if capability >= (8, 0) else "float32"
    try:
        processor = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        processor = ""
    return "bfloat16" if re.search("avx512_bf16|amx_bf16", processor) else "float32"


# == Features and training =================================================================================
def load_chunk(path, shape):
    """The features of a chunk of frames stored at path, or None if they are damaged or of another shape."""
    try:
        with np.load(path) as stored:  # raises if a checksum in the file is wrong
            return stored["features"].reshape(shape)
    except Exception as error:  # zipfile and NumPy raise many kinds
        print(f"{path} is damaged ({error}) and is computed again.")


def predict_frames(model, frames, folder=None):
    """Runs frames (N, H, W, 3) through model, its ResNet50 in the chosen precision: features (N, F).
    Every 8 batches are saved in folder, if one is given: an interrupted run resumes from them."""
    bar = keras.utils.Progbar(len(frames), unit_name="frame", interval=0.1 if sys.stdout.isatty() else 20)
    features = np.empty((len(frames), *model.output_shape[1:]), "float32")
    set_precision(model, choose_precision())
    try:
        with ThreadPoolExecutor(2) as decoders:  # decode while the model computes
            for rows in np.split(np.arange(len(frames)), range(8 * FRAME_BATCH, len(frames), 8 * FRAME_BATCH)):
                path = folder / f"{rows[0]:09d}.npz" if folder else None
                stored = load_chunk(path, features[rows].shape) if path and path.exists() else None
                if stored is not None:
                    features[rows] = stored
                    bar.add(len(rows))
                    continue
                batches = np.split(rows, range(FRAME_BATCH, len(rows), FRAME_BATCH))
                for batch, images in zip(batches, decoders.map(frames.__getitem__, batches)):
                    features[batch] = model.predict_on_batch(images)
                    bar.add(len(batch))
                if path:
                    write_files(folder, {path.name: lambda new: np.savez(new, features=features[rows])})
    finally:
        set_precision(model, "float32")
    return features


FEATURES_VERSION = 1  # raise it when code above changes the features: stored ones are then dropped


def open_cache(cache, frames, n_train, resnet, grids):
    """The folder for these features in cache; those of other frames, constants or weights are deleted."""
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in frames.paths]
    constants = (FRAME_SIZE, FRAME_BATCH, FEATURE_SPREAD, SEED, choose_precision())
    code = (FEATURES_VERSION, keras.__version__, keras.backend.backend())
    digest = hashlib.blake2b(repr((files, n_train, grids, constants, code)).encode(), digest_size=8)
    for array in resnet.get_weights():
        digest.update(np.ascontiguousarray(array))
    folder = cache / digest.hexdigest()
    if not folder.exists():
        shutil.rmtree(cache, ignore_errors=True)
        folder.mkdir(parents=True)
    return folder


def extract_features(frames, n_train, cache):
    """Runs all frames and copies through ResNet50 once, or takes their features from cache. Returns (backbone,
    features (R, F), what the weights are). Raises InputError."""
    resnet, weights, is_random = load_resnet50()
    grids = FEATURE_LAYERS_RANDOM if is_random else FEATURE_LAYERS
    try:
        resnet = keras.Model(resnet.input, [resnet.get_layer(name).output for name in grids], name="resnet50")
    except ValueError as error:
        raise InputError(f"FEATURE_LAYERS, FEATURE_LAYERS_RANDOM: {shorten(str(error), 300)}") from None
    folder = open_cache(cache, frames, n_train, resnet, grids)
    if is_random:
        calibrate(resnet, frames[[0, n_train - 1]])  # every activation is kept: more frames would take gigabytes
    backbone = build_backbone(resnet, grids)
    copies = len(frames) - frames.first_copy
    print(f"ResNet50, weights: {weights}, {choose_precision()}; feature vectors of {backbone.output_shape[1]:,}",
          f"numbers from {', '.join(grids)}.\nIt reads {frames.first_copy} frames, {copies} copies:")  # fmt: skip
    return backbone, predict_frames(backbone, frames, folder), weights


def train(model, training, validation, counts):
    """Trains for EPOCHS epochs (the Sequence shuffles); returns the history, losses in people squared.
    Validation is only monitored. counts: those of the training frames; their variance scales the gradient."""
    optimizer = keras.optimizers.get(OPTIMIZER)
    optimizer.learning_rate = keras.optimizers.schedules.CosineDecay(LEARNING_RATE, EPOCHS * len(training))
    variance = max(float(counts.var()), 1.0)
    model.compile(optimizer, loss="mse", loss_weights=1 / variance, metrics=["mse", "mae"])
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
    curves = history[["mse", "val_mse"]].set_axis(["training", "validation"], axis=1)
    sns.lineplot(curves, ax=axes).set(yscale="log", ylabel="Mean squared error (people²)")
    axes.set_xlabel("Epoch\nTraining: mean over the epoch, half of the windows with jittered copies.")
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
    """Writes all results, prints a summary. table: id, split, true, predicted. run: more for metrics.json.
    The model and the tables come first: a figure that cannot be drawn costs only itself."""
    training = table[table["split"] == "train"]
    validation = table[table["split"] == "validation"]
    metrics = measure(validation["true"], validation["predicted"])
    baseline = measure(validation["true"], np.full(len(validation), training["true"].mean()))
    constants = {name: value for name, value in globals().items() if name.isupper() and name != "ROOT"}
    versions = {library.__name__: library.__version__ for library in (keras, np, pd)}
    report = metrics | {"train_frames": len(training), "validation_frames": len(validation), **run}
    report |= {"baseline": baseline, "python": sys.version, "versions": versions, "constants": constants}
    write_files(outputs, {
        "ts_crowdnet.keras": model.save,
        "history.csv": history.to_csv,
        "predictions.csv": lambda path: table.to_csv(path, index=False, float_format="%.6f"),
        "metrics.json": lambda path: path.write_text(json.dumps(report, indent=2, default=str) + "\n"),
    })  # fmt: skip
    scores = pd.DataFrame({"this model": metrics, "mean count": baseline})
    scores.index = ["MAE, people", "MSE, people squared", "RMSE, people", f"share within {TOLERANCE:.0%}"]
    print(f"\nOn the validation frames:\n{scores.round(3).to_string()}")
    print(f"ResNet50 weights: {run['weights']}. Results: {outputs}")
    if metrics["mae"] >= baseline["mae"]:
        print("That is no better than the mean training count: few frames, wrong labels, another scene?")
    title = "Validation frames {}-{}, weights: {}\n".format(*validation["id"].iloc[[0, -1]], run["weights"])
    title += "MAE {mae:.2f}, MSE {mse:.2f}, accuracy {accuracy:.1%}".format(**metrics)
    try:
        figures = draw_figures(history, validation, title)
        write_files(outputs, {name: figure.savefig for name, figure in figures.items()})
    except Exception as error:  # matplotlib and its back ends raise many kinds
        print(f"Warning: no figures ({shorten(str(error), 200)}); all else is saved.", file=sys.stderr)


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


def split_for_counting(model):
    """The network in two, so that a long recording is read once and little is kept of each of its frames:
    (frame (H, W, 3) -> (P + 1,), windows of P numbers (T, P) -> people (1,)). P: PROJECTION, or F if that is
    0. The last of the P + 1 is the length of the feature vector, 1 for the longest training image."""
    spatial, temporal = model.get_layer("spatial").layer, model.get_layer("temporal")
    features = spatial.output
    length = ops.norm(features, axis=-1, keepdims=True) / spatial.get_layer("longest").scale
    reduced = features
    for layer in temporal.layers[1:-1]:  # the projection, if there is one, between the input and the LSTM
        reduced = layer(reduced)
    per_frame = keras.Model(spatial.input, layers.Concatenate()([reduced, length]))
    windows = keras.Input((temporal.input_shape[1], reduced.shape[-1]))
    per_window = keras.Model(windows, model.get_layer("regression")(temporal.layers[-1](windows)))
    return per_frame, per_window


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
        per_frame, per_window = split_for_counting(model)
    except Exception as error:  # zipfile, h5py and Keras raise many kinds
        raise InputError(f"{model}: no model written by this script ({error}); train one first") from None
    check_frames(paths)
    reduced = predict_frames(per_frame, Frames(paths, model.input_shape[2:4]))  # (N, P + 1)
    windows = make_windows(np.arange(len(paths)), model.input_shape[1])
    sequence = WindowSequence(reduced[:, :-1], windows, np.zeros(len(paths)))
    counts = per_window.predict(sequence, verbose=0)[:, 0]
    names = pd.Index([path.name for path in paths], name="frame")
    return pd.DataFrame({"count": np.maximum(counts, 0), "unfamiliar": reduced[:, -1] > UNFAMILIAR}, index=names)


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
    """Labels -> frames -> feature vectors -> network -> counts -> figures and numbers."""
    check_constants()
    if COUNT:
        return count_folder()
    labels = read_labels(at(LABELS))
    ids = labels.index.to_numpy()
    counts = labels.to_numpy()
    n = len(labels)
    n_train = round(n * TRAIN_FRACTION)
    if not 1 < n_train < n:
        raise InputError(f"{at(LABELS)}: {n} frames, too few for this TRAIN_FRACTION; add some or change it")
    paths = find_frames(ids)
    check_frames(paths)
    print(f"{n} frames: the first {n_train} train, the last {n - n_train} validate.")
    if b"synthetic mall sample" in paths[0].read_bytes():
        print("They are the rendered sample, not real people; the README says how to use Mall instead.")
    outputs = at(OUTPUTS)
    with lock(outputs):
        # Spatial: every frame and copy through the frozen ResNet50, once.
        copied = choose_copied(n_train)
        frames = Frames(paths, FRAME_SIZE, copied)  # N frames, then C copies
        backbone, features, weights = extract_features(frames, n_train, outputs / "feature_cache")
        copy_of = np.arange(n)
        copy_of[copied] = n + np.arange(len(copied))
        trained_on = np.r_[:n_train, n : n + len(copied)]
        standardisation = standardise(features, trained_on)  # features (N + C, F)

        # Temporal and regression: trained on windows of the feature vectors.
        keras.utils.set_random_seed(SEED)
        spatial = build_spatial(backbone, standardisation)
        temporal = build_temporal(features.shape[1])
        regression = build_regression(counts[:n_train])
        network = build_network((SEQUENCE_LENGTH, *FRAME_SIZE, 3), spatial, temporal, regression)
        head = build_network((SEQUENCE_LENGTH, features.shape[1]), None, temporal, regression)
        windows = make_windows(ids, SEQUENCE_LENGTH)  # (N, T)
        images, fitted = (features, head) if CACHE_FEATURES else (frames, network)
        training = WindowSequence(images, windows[:n_train], counts[:n_train], copy_of)
        validation = WindowSequence(images, windows[n_train:], counts[n_train:])
        history = train(fitted, training, validation, counts[:n_train])

        # Evaluation: every frame's count, and the metrics of the validation frames.
        predicted = head.predict(WindowSequence(features, windows, counts), verbose=0)[:, 0]
        split = np.where(np.arange(n) < n_train, "train", "validation")
        table = {"id": ids, "split": split, "true": counts.astype(int), "predicted": np.maximum(predicted, 0)}
        model = keras.Model(network.input, layers.ReLU(name="count")(network.output), name="ts_crowdnet")
        run = {"weights": weights, "precision": choose_precision(), "features": features.shape[1]}
        save_results(outputs, model, history, pd.DataFrame(table), run)
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
