"""TS-CrowdNet: count the people in a fixed-camera video with TimeDistributed ResNet50 + LSTM.

    pip install -r requirements.txt && python tscrowdnet_train.py

Reads    labels.csv                        id,count: how many people each frame shows
         frames/frames/seq_000001.jpg ...  the frames of one fixed camera
Writes   outputs/ts_crowdnet.keras         the model: windows of uint8 frames in, counts out
         outputs/metrics.json, predictions.csv, history.csv; figures as .png and .pdf

N labelled frames, of which the first n_train train; C jittered copies of some of these; T frames
in a window, SEQUENCE_LENGTH; H x W = FRAME_SIZE; F numbers in a feature vector. Each window passes:

    frames (T, H, W, 3) uint8
    1. spatial     TimeDistributed(frozen ResNet50)          -> feature vectors (T, F)
    2. temporal    the same Dense for each vector, an LSTM   -> memory (LSTM_UNITS,)
    3. regression  Dense(relu), Dense(1)                     -> people in the last frame (1,)

Stage 1 does not learn, so it reads the N + C pictures once. Its features (N + C, F) are kept, and
WindowSequence feeds windows of them (BATCH_SIZE, T, ...) to stages 2 and 3, which train.
"""

import faulthandler
import hashlib
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from numbers import Integral, Real
from pathlib import Path
from textwrap import shorten

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends without a traceback
    stderr = os.dup(2)
    faulthandler.enable(stderr)  # a crash is still told, TensorFlow's greeting is not
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if os.environ.get("MPLBACKEND", "").lower() != "agg":
        os.environ.pop("MPLBACKEND", None)  # a notebook's may not exist here
try:
    import keras
    import matplotlib.pyplot as plt
    import numpy as np
    import pandas as pd
    import scipy.io
    import scipy.sparse
    import seaborn as sns
    import tensorflow as tf
    from keras import layers, ops
    from matplotlib.ticker import LogLocator
    from PIL import Image, ImageEnhance, ImageOps  # Pillow comes with matplotlib
    from sklearn.preprocessing import StandardScaler
except ModuleNotFoundError as error:
    sys.exit(f"Error: {error}: pip install -r requirements.txt, with Python 3.10 to 3.13")
finally:
    if __name__ == "__main__":
        os.dup2(stderr, 2)

ROOT = Path(__file__).resolve().parent

# -- Data: relative paths start at this script's folder --------------------------------------
LABELS = "labels.csv"  # another CSV with columns id,count, or the official "mall_gt.mat"
FRAMES = "frames/frames"  # folder of seq_000001.jpg, seq_000002.jpg, ...: one fixed camera
OUTPUTS = "outputs"  # give each experiment a folder of its own to keep its results
SEQUENCE_LENGTH = 5  # frames in a window; more for a high frame rate, 1 for single frames
FRAME_SIZE = (300, 400)  # (height, width) fed to ResNet50; larger if people are small
TRAIN_FRACTION = 0.8  # first part of the video, to train on; 0.4 for Mall's canonical split

# -- Spatial stage: frozen ResNet50 ----------------------------------------------------------
WEIGHTS = "imagenet"  # or the path of a ResNet50 weight file (no top), or None: random
# Layers to read, and the grid (rows, columns) over which each is summarised.
FEATURE_LAYERS = {"conv2_block3_out": (3, 2), "conv3_block4_out": (3, 2),
                  "conv4_block6_out": (1, 1), "conv5_block3_out": (1, 1)}  # fmt: skip
# Read instead if the weights are random: their deeper layers only add noise.
FEATURE_LAYERS_RANDOM = {"conv1_relu": (3, 2), "conv2_block1_out": (3, 2),
                         "conv2_block3_out": (3, 2)}  # fmt: skip
FEATURE_SPREAD = True  # standard deviation in each cell, too; False: the mean, as published
AUGMENT = 0.25  # share of training frames with a copy in other light, the camera nudged
PRECISION = "auto"  # "float32", "bfloat16"; auto: bfloat16 where the hardware has units for it
FRAME_BATCH = 8  # frames ResNet50 sees at once; fewer if memory runs out, more on a GPU
CACHE_FEATURES = True  # False: frames pass ResNet50 in every epoch; slower, no better

# -- Temporal stage: projection and LSTM -----------------------------------------------------
PROJECTION = 32  # numbers of each feature vector that the LSTM sees; 0: all, as published
LSTM_UNITS = 64  # more for longer windows
LSTM_DROPOUT = 0.0  # share of the LSTM's inputs dropped in training; 0.5 as published
FORGET_BIAS = -2.0  # where its forget gate starts; higher: earlier frames weigh more (Keras: 1)

# -- Regression stage and training -----------------------------------------------------------
DENSE_UNITS = 64  # of the layer between the LSTM and the count
BATCH_SIZE = 32  # windows in a step; about 4 if CACHE_FEATURES = False
EPOCHS = 50  # passes over the training windows; fewer for a quick look
# SGD learns first what many frames share, last what is peculiar to one; "adam" does not.
OPTIMIZER = {"class_name": "sgd",
             "config": {"momentum": 0.9, "nesterov": True, "clipnorm": 1.0}}  # fmt: skip
LEARNING_RATE = 0.03  # falls to 0 along a half cosine; 0.3 is too much; 1e-3 for "adam"
SEED = 0  # another seed, another model: publish mean and standard deviation over several

# -- Evaluation and use ----------------------------------------------------------------------
TOLERANCE = 0.20  # counts within this share of the truth are accurate; 0.20 as published
COUNT = None  # a folder of new frames to count with the model in OUTPUTS, without training
UNFAMILIAR = 1.05  # mark frames whose feature vector is longer than this x the longest trained on

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")  # files taken for frames
SAMPLE_LABELS = "78609c47c0093b7d9b7a8d3baa543fd5"  # MD5 of the sample's labels.csv


class InputError(ValueError):
    """A mistake the user can correct; the message says what is wrong and how to fix it."""


def at(path):
    """A path from the constants, relative to this script's folder unless it is absolute."""
    return ROOT / Path(path).expanduser()


def check_constants():
    """Raises InputError for a constant whose wrong value would fail late or obscurely."""

    def check(is_fine, remedy, **constants):
        for name, value in constants.items():
            if not is_fine(value):
                raise InputError(f"{name} = {value!r}: make it {remedy}")

    def between(low, high, kind=Real):
        return lambda value: isinstance(value, kind) and low <= value <= high

    def is_pair(value, low=1):
        return np.shape(value) == (2,) and all(map(between(low, 10**5, Integral), value))

    def is_grids(value):
        return isinstance(value, dict) and value and all(map(is_pair, value.values()))

    above_0 = (between(1, 10**6, Integral), "a whole number above 0")
    check(*above_0, SEQUENCE_LENGTH=SEQUENCE_LENGTH, LSTM_UNITS=LSTM_UNITS, EPOCHS=EPOCHS)
    check(*above_0, DENSE_UNITS=DENSE_UNITS, FRAME_BATCH=FRAME_BATCH, BATCH_SIZE=BATCH_SIZE)
    check(between(0, 10**9, Integral), "a whole number", PROJECTION=PROJECTION, SEED=SEED)
    check(between(0, 1), "a number from 0 to 1", AUGMENT=AUGMENT, TOLERANCE=TOLERANCE)
    check(between(0, 0.99), "a number from 0 to 0.99", LSTM_DROPOUT=LSTM_DROPOUT)
    check(between(0.01, 0.99), "such as 0.8", TRAIN_FRACTION=TRAIN_FRACTION)
    check(between(1e-9, 100), "such as 0.03", LEARNING_RATE=LEARNING_RATE)
    check(between(-100, 100), "a number", FORGET_BIAS=FORGET_BIAS, UNFAMILIAR=UNFAMILIAR)
    is_path = (lambda value: isinstance(value, (str, Path)), "a path in quotes")
    check(*is_path, LABELS=LABELS, FRAMES=FRAMES, OUTPUTS=OUTPUTS)
    check(*is_path, WEIGHTS=WEIGHTS or "", COUNT=COUNT or "")
    check(lambda x: is_pair(x, 32), "(height, width), whole, 32 or more", FRAME_SIZE=FRAME_SIZE)
    grids = dict(FEATURE_LAYERS=FEATURE_LAYERS, FEATURE_LAYERS_RANDOM=FEATURE_LAYERS_RANDOM)
    check(is_grids, "{layer of ResNet50: (rows, columns), ...}", **grids)
    check(("auto", "float32", "bfloat16").count, "auto, float32 or bfloat16", PRECISION=PRECISION)
    try:
        keras.optimizers.get(OPTIMIZER).learning_rate = LEARNING_RATE
    except Exception as error:  # Keras raises many kinds
        raise InputError(f"{OPTIMIZER = }: {shorten(str(error), 150)}") from None


# == Files in OUTPUTS: whole or absent, whenever a run is cut short ==========================
def write_files(folder, writers):
    """Writes files {name: write(path)} elsewhere, then moves them into folder: none is ever half
    written, or by two runs."""
    with tempfile.TemporaryDirectory(prefix=".new-", dir=folder) as new:
        for name, write in writers.items():
            write(Path(new, name))
            with open(Path(new, name), "r+b") as file:
                os.fsync(file.fileno())
        for name in writers:
            os.replace(Path(new, name), folder / name)


def open_cache(folder, key, files, shape):
    """The array on disk for this key and these files, float32, NaN where nothing is computed yet.
    All else in folder goes."""
    states = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    digest = hashlib.blake2b(repr((key, shape, states)).encode(), digest_size=8).hexdigest()
    path = folder / f"{digest}.npy"
    try:
        np.load(path, mmap_mode="r")  # "r+" would fill up a cut file with zeros
    except (OSError, EOFError, ValueError):  # not there yet, or damaged
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        empty = np.full(shape, np.nan, "float32")
        write_files(folder, {path.name: lambda new: np.save(new, empty)})
    return np.lib.format.open_memmap(path, "r+")


def fill_rows(array, compute):
    """Fills the rows of array (rows, numbers) that are NaN by compute(rows), some at a time: an
    interrupted run goes on where it was. Returns a copy in memory."""
    bar = keras.utils.Progbar(len(array), unit_name="frame", verbose=len(array) > 64)
    step = 8 * FRAME_BATCH
    for rows in np.split(np.arange(len(array)), range(step, len(array), step)):
        if np.isnan(array[rows]).any():
            array[rows] = compute(rows)
        bar.add(len(rows))
    return np.array(array)


# == Data ====================================================================================
def read_labels(path):
    """Reads the people counts from a CSV with columns id and count, or Mall's mall_gt.mat.
    Returns a float Series of counts indexed by frame id, ascending. Raises InputError."""
    try:
        if path.suffix.lower() == ".mat":
            counts = np.ravel(scipy.io.loadmat(str(path), variable_names=["count"])["count"])
            table = pd.DataFrame({"id": range(1, len(counts) + 1), "count": counts}, dtype=str)
            table.index += 1
        else:
            text = re.sub("[;\t]", ",", path.read_text("utf-8-sig", errors="replace"))
            table = pd.read_csv(io.StringIO(text), dtype=str, skip_blank_lines=False)
            if not isinstance(table.index, pd.RangeIndex):
                raise ValueError("rows have more fields than the header")
            table.columns = table.columns.str.strip().str.lower()
            table.index += 2
        table = table[["id", "count"]].dropna(how="all")
        table.columns = ["id", "count"]  # fails for a column that is there twice
    except Exception as error:  # SciPy and pandas raise many kinds for a damaged file
        remedy = "set LABELS to a CSV whose first line is id,count, or to mall_gt.mat"
        raise InputError(f"{path}: {remedy} ({shorten(str(error), 150)})") from None
    values = table.apply(pd.to_numeric, errors="coerce").astype(float)
    is_bad = ~(values.ge(0) & values.le([10**9, 10**6]) & values.mod(1).eq(0))  # (rows, 2)
    is_bad["id"] |= values["id"].duplicated()
    if is_bad.any(axis=None):
        row, column = is_bad.stack().idxmax()
        problem = f"{column} {table.loc[row, column]!r} is no whole number, or there twice"
        total = is_bad.any(axis=1).sum()
        raise InputError(f"{path}, row {row}: {problem} ({total} such rows); correct it")
    return values.astype({"id": int}).set_index("id")["count"].sort_index()


def list_pictures(folder):
    """The pictures in a folder, by the numbers in their names: frame_2, frame_10."""
    paths = [path for path in folder.glob("[!.]*") if path.suffix.lower() in PICTURES]
    return sorted(paths, key=lambda path: re.sub(r"\d+", lambda n: n[0].zfill(12), path.name))


def find_frames(ids):
    """The labelled frames, N paths, by the last number in their names: in FRAMES or, as in
    Mall's own archive, its parent. Raises InputError."""
    ids = list(map(int, ids))
    folders = {at(FRAMES): {}, at(FRAMES).parent: {}}  # {folder: {number: paths}}
    for folder, numbered in folders.items():
        for path in list_pictures(folder):
            if number := re.search(r"(\d+)\D*$", path.stem):
                numbered.setdefault(int(number[1]), []).append(path)
    if all(numbered.keys() >= set(ids) for numbered in folders.values()):
        names = " and ".join(map(str, folders))
        raise InputError(f"{names} both hold a frame for every label; move one video away")
    folder, numbered = max(folders.items(), key=lambda item: len(item[1].keys() & set(ids)))
    missing = [frame for frame in ids if frame not in numbered]
    if missing:
        problem = f"{len(missing)} of {len(ids)} labelled frames missing"
        remedy = f"add {shorten(str(missing), 60)}, or correct FRAMES or LABELS"
        shift = min(numbered, default=0) - min(ids)
        if all(frame + shift in numbered for frame in ids):
            starts = f"ids from {min(ids)}, frames from {min(numbered)}"
            remedy = f"{starts}: add {shift} to each id in {LABELS}"
        raise InputError(f"{folder}: {problem}; {remedy}")
    for frame in ids:
        if len(numbered[frame]) > 1:
            names = " and ".join(path.name for path in numbered[frame])
            raise InputError(f"{folder}: {names} have the same number; move one away")
    if len(numbered) > len(ids):
        print(f"{len(numbered) - len(ids)} frames have no label and are ignored.")
    return [numbered[frame][0] for frame in ids]


def read_image(source):
    """A picture, upright, RGB. source: a path, or a uint8 array (H, W, 3). Raises what Pillow
    does, which is much."""
    if isinstance(source, np.ndarray):
        if source.dtype != "uint8" or source.shape[2:] != (3,):
            raise ValueError(f"{source.dtype} {source.shape}, not uint8 (H, W, 3)")
        image = Image.fromarray(source)
    else:
        data = source.read_bytes()
        if data.startswith(b"\xff\xd8"):  # a JPEG: zeros at its end are space never written
            data = data.rstrip(b"\0")
        image = Image.open(io.BytesIO(data))
    if image.mode[0] in "IF":
        raise ValueError(f"{image.mode} pixels; convert it to 8 bits")
    return ImageOps.exif_transpose(image).convert("RGB")


def find_damage(sources):
    """The rows of the sources that read_image can read, and a line about the others."""

    def find_problem(source):
        try:
            read_image(source)
        except Exception as error:
            name = getattr(source, "name", "array")
            return f"{name}: {str(error) or type(error).__name__}"

    with ThreadPoolExecutor() as pool:
        problems = list(pool.map(find_problem, sources))
    good = [row for row, problem in enumerate(problems) if not problem]
    line = f"{len(sources) - len(good)} of {len(sources)} frames cannot be read: "
    return good, line + shorten("; ".join(filter(None, problems)), 200)


def check_frames(paths):
    """Raises InputError for frames that cannot be used; prints what else is odd about them."""
    good, line = find_damage(paths)
    if len(good) < len(paths):
        raise InputError(f"{at(FRAMES)}: {line}; replace them")
    width, height = read_image(paths[0]).size
    if not 0.9 < FRAME_SIZE[0] / FRAME_SIZE[1] * width / height < 1.1:
        scale = min(FRAME_SIZE) / min(width, height)
        better = (round(height * scale), round(width * scale))
        print(f"{FRAME_SIZE = } distorts frames of {width}x{height}; {better} would not.")
    if b"synthetic mall sample" in paths[0].read_bytes():
        print("They are rendered, not real people; the README says how to use Mall instead.")
    elif hashlib.md5(at(LABELS).read_bytes()).hexdigest() == SAMPLE_LABELS:
        raise InputError(f"{at(LABELS)}: labels of the sample, not of these frames; set LABELS")


def jitter(image, rng):
    """A copy in other light (up to 15%, tint 5%), from a nudged camera (2% of the width, zoom
    3%), black where that sees beyond the picture."""
    zoom = rng.uniform(0.97, 1.03)
    left, top = rng.uniform(-0.02, 0.02, 2) * image.width + np.array(image.size) * (1 - zoom) / 2
    matrix = (zoom, 0, left, 0, zoom, top)
    image = image.transform(image.size, Image.AFFINE, matrix, Image.BILINEAR)
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhance(image).enhance(rng.uniform(0.85, 1.15))
    red, green, blue = rng.uniform(0.95, 1.05, 3)
    return image.convert("RGB", (red, 0, 0, 0, 0, green, 0, 0, 0, 0, blue, 0))


class Frames:
    """Pictures read like an array: frames[rows] is (*rows.shape, height, width, 3) uint8 RGB.
    sources: of N frames, see read_image. A share AUGMENT of the first n_train has jittered
    copies, in the rows after all frames; copy_of (N,): the row of each frame's copy, its own
    without one."""

    def __init__(self, sources, size, n_train=0):
        copied = np.linspace(0, n_train, round(n_train * AUGMENT), endpoint=False).astype(int)
        self.sources = [*sources, *(sources[row] for row in copied)]
        self.size = size
        self.copy_of = np.arange(len(sources))
        self.copy_of[copied] = np.arange(len(sources), len(self.sources))

    def __len__(self):
        return len(self.sources)

    def __getitem__(self, rows):
        distinct = np.unique(rows)  # windows share frames
        with ThreadPoolExecutor() as pool:
            pictures = np.stack(list(pool.map(self.load, distinct)))
        return pictures[np.searchsorted(distinct, rows)]

    def load(self, row):
        image = read_image(self.sources[row]).resize(self.size[::-1], Image.BILINEAR)
        if row >= len(self.copy_of):  # a copy
            image = jitter(image, np.random.default_rng((SEED, row)))
        return np.asarray(image)


def make_windows(ids, length):
    """For each frame, the rows of the window that ends at it (N, length). No window crosses a
    gap in the ids: the row after it repeats. Ids 1, 2, 5, length 2: [[0, 0], [0, 1], [2, 2]]."""
    rows = np.arange(len(ids))
    starts_run = np.diff(ids, prepend=ids[0]) != 1  # the first frame, the first after a gap
    run_start = np.maximum.accumulate(rows * starts_run)  # (N,)
    return np.maximum(rows[:, None] + np.arange(1 - length, 1), run_start[:, None])


class WindowSequence(keras.utils.Sequence):
    """Feeds windows (batch, T, ...) and the counts (batch, 1) of their last frames to Keras.
    images: Frames, or an array of their features. windows: rows (M, T), as from make_windows.
    counts: people in the last frame of each window (M,). copy_of: for training, that of Frames;
    every epoch then shuffles the windows, and shows half of them in copies, where there are
    some."""

    def __init__(self, images, windows, counts, copy_of=None):
        super().__init__()
        self.images = images
        self.windows = windows
        self.counts = counts.reshape(-1, 1)
        self.copy_of = copy_of
        self.rng = np.random.default_rng(SEED)
        self.order = np.arange(len(windows))
        self.shown = windows
        self.on_epoch_end()

    def __len__(self):
        return math.ceil(len(self.windows) / BATCH_SIZE)  # the last, partial batch counts

    def __getitem__(self, batch):
        chosen = self.order[batch * BATCH_SIZE : (batch + 1) * BATCH_SIZE]
        return self.images[self.shown[chosen]], self.counts[chosen]

    def on_epoch_end(self):
        if self.copy_of is not None:
            self.rng.shuffle(self.order)
            in_copies = self.rng.random((len(self.windows), 1)) < 0.5
            self.shown = np.where(in_copies, self.copy_of[self.windows], self.windows)


# == Model, stage 1: spatial =================================================================
IMAGENET_FILE = "resnet50_weights_tf_dim_ordering_tf_kernels_notop.h5"
IMAGENET_MD5 = "4d473c1dd8becc155b73f8504c6f6626"  # as in keras.applications


def load_resnet50():
    """ResNet50 without its top: (model, what its weights are, whether they are random). He et al.,
    "Deep residual learning for image recognition", CVPR 2016. Raises InputError."""

    def build(weights):
        keras.utils.set_random_seed(SEED)  # the same random weights whatever happened before
        shape = (*FRAME_SIZE, 3)
        return keras.applications.ResNet50(include_top=False, weights=weights, input_shape=shape)

    if not WEIGHTS:
        return build(None), "random", True
    path = at(WEIGHTS)
    if WEIGHTS == "imagenet":
        home = Path(os.environ.get("KERAS_HOME", "~/.keras")).expanduser()
        path = home / "models" / IMAGENET_FILE  # Keras reads none in a home that it cannot write
        if not path.is_file() or hashlib.md5(path.read_bytes()).hexdigest() != IMAGENET_MD5:
            path = WEIGHTS  # to be downloaded
    elif not path.is_file():
        raise InputError(f"{path}: no such file; correct WEIGHTS")
    try:
        with warnings.catch_warnings():  # Keras only warns of layers that a file has no weights for
            warnings.filterwarnings("error", category=UserWarning, module="keras")
            return build(str(path)), Path(WEIGHTS).name, False
    except Exception as error:  # h5py and Keras raise many kinds
        problem = shorten(str(error), 150)
    if WEIGHTS != "imagenet":
        raise InputError(f"{path}: no weights of Keras's ResNet50 without top ({problem})")
    remedy = f"random ones count worse. Remedy: WEIGHTS = 'path/{IMAGENET_FILE}'"
    print(f"Warning: no ImageNet weights ({problem}); {remedy}", file=sys.stderr)
    return build(None), "random (the ImageNet weights could not be downloaded)", True


def normalise(frames):
    """RGB frames (n, H, W, 3) -> BGR, as ImageNet's weights expect, each channel of each frame
    at mean 0 and ImageNet's standard deviation of 57: a change of light changes little."""
    x = ops.cast(ops.flip(frames, axis=-1), "float32")
    x = layers.GroupNormalization(groups=-1, epsilon=1.0, center=False, scale=False)(x)
    return layers.Rescaling(57.0)(x)


def calibrate(resnet, frames):
    """Sets BatchNorm's statistics from frames (n, H, W, 3): random weights need that."""
    for layer in resnet.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.momentum = 0.0  # replace the old statistics entirely
    resnet(normalise(frames), training=True)


def fold_batchnorm(resnet):
    """The same network, faster: each convolution, ..._conv, also does the work of the BatchNorm
    after it, ..._bn. Jacob et al., "Quantization and training of neural networks for efficient
    integer-arithmetic-only inference", CVPR 2018."""

    def skip_norm(layer, x, **options):
        return x if isinstance(layer, layers.BatchNormalization) else layer(x, **options)

    folded = keras.models.clone_model(resnet, call_function=skip_norm)
    for layer in resnet.layers:  # a convolution comes before its BatchNorm
        if isinstance(layer, layers.BatchNormalization):
            convolution = folded.get_layer(layer.name.removesuffix("bn") + "conv")
            kernel, bias = convolution.get_weights()
            gamma, beta, mean, variance = layer.get_weights()
            gain = gamma / np.sqrt(variance + layer.epsilon)
            convolution.set_weights([kernel * gain, (bias - mean) * gain + beta])
        elif layer.weights:
            folded.get_layer(layer.name).set_weights(layer.get_weights())
    return folded


def build_backbone(resnet, grids):
    """ResNet50 read at the layers of grids: a frame (H, W, 3) uint8 -> features (F,). Each
    layer, (h, w, C), is summarised over the cells of its grid: mean and standard deviation."""
    frame = keras.Input((*FRAME_SIZE, 3), dtype="uint8", name="frame")
    maps = keras.tree.flatten(fold_batchnorm(resnet)(normalise(frame)))  # one comes bare
    features = []
    for x, (rows, columns) in zip(maps, grids.values()):
        x = ops.cast(x, "float32")  # (h, w, C)
        cell = (math.ceil(x.shape[1] / rows), math.ceil(x.shape[2] / columns))
        average = layers.AveragePooling2D(cell, padding="same")
        mean = average(x)  # (rows, columns, C), or fewer where these do not divide (h, w)
        features.append(layers.Flatten()(mean))
        if FEATURE_SPREAD:
            variance = ops.relu(average(ops.square(x)) - ops.square(mean))
            features.append(layers.Flatten()(ops.sqrt(variance)))
    return keras.Model(frame, ops.concatenate(features, axis=-1), name="backbone")


def build_spatial(backbone, features, trained_on):
    """Stage 1, for one frame: (H, W, 3) uint8 -> its feature vector (F,), standardised by the
    training images, whose mean squared length is 1. Also standardises features (N + C, F), in
    place. trained_on: rows of the training images. The layer "longest" keeps their greatest
    length for count_people."""
    scaler = StandardScaler().fit(features[trained_on])
    scale = scaler.scale_ * math.sqrt(features.shape[1])
    features -= scaler.mean_.astype("float32")
    features /= scale.astype("float32")
    lengths = np.linalg.norm(features, axis=1)[trained_on]
    longest = max(float(lengths.max()), 1e-3)  # 0 where all training images are alike
    variance = np.square(scale * longest)
    x = layers.Normalization(mean=scaler.mean_, variance=variance)(backbone.output)
    x = layers.Rescaling(longest, name="longest")(x)  # undoes the division: only keeps the number
    spatial = keras.Model(backbone.input, x, name="resnet50_features")
    spatial.trainable = False
    return spatial


# == Model, stages 2 and 3: temporal, regression =============================================
def build_temporal(n_features):
    """Stage 2: feature vectors (T, F) -> what the LSTM makes of them (LSTM_UNITS,)."""
    x = features = keras.Input((SEQUENCE_LENGTH, n_features), name="features")
    if PROJECTION:
        start = keras.initializers.RandomNormal(stddev=0.01)  # whatever K: a small start is best
        x = layers.Dense(PROJECTION, kernel_initializer=start, name="projection")(x)
    lstm = layers.LSTM(LSTM_UNITS, dropout=LSTM_DROPOUT, unroll=True, name="lstm")
    memory = lstm(x)
    gates = [0.0, FORGET_BIAS, 0.0, 0.0]  # input, forget, cell, output
    lstm.cell.bias.assign(np.repeat(gates, LSTM_UNITS))
    return keras.Model(features, memory, name="temporal")


def find_basis(features):
    """An orthonormal basis (F, K) of what the training images' features (K, F) span. SGD moves
    the projection only within it: training on coordinates there is the same, and faster."""
    if PROJECTION:
        return np.linalg.qr(features.T)[0]
    return scipy.sparse.eye_array(features.shape[1], dtype="float32")


def build_regression(counts):
    """Stage 3: (LSTM_UNITS,) -> people in the last frame (1,), never negative. counts (M,) of
    the training frames set its start, their mean, and its unit, their standard deviation."""
    memory = keras.Input((LSTM_UNITS,), name="memory")
    x = layers.Dense(DENSE_UNITS, activation="relu", name="dense")(memory)
    x = layers.Dense(1, name="deviation")(x)
    x = layers.Rescaling(max(float(counts.std()), 1.0), float(counts.mean()))(x)
    return keras.Model(memory, layers.ReLU(name="people")(x), name="regression")


def build_network(spatial, temporal, basis, regression):
    """The three stages in a row: windows (T, H, W, 3) uint8 -> people (1,). temporal was built for
    coordinates (T, K) in basis (F, K); here it becomes one for feature vectors (T, F)."""
    first, *others = temporal.get_weights()  # the kernel that meets the coordinates, (K, ...)
    temporal = build_temporal(basis.shape[0])
    temporal.set_weights([basis @ first, *others])
    windows = keras.Input((SEQUENCE_LENGTH, *FRAME_SIZE, 3), dtype="uint8", name="windows")
    features = layers.TimeDistributed(spatial, name="spatial")(windows)
    return keras.Model(windows, regression(temporal(features)), name="ts_crowdnet")


# == Features and training ===================================================================
def choose_precision():
    """PRECISION; if "auto", bfloat16 where the hardware has units for it: twice the speed."""
    if PRECISION != "auto":
        return PRECISION
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        details = tf.config.experimental.get_device_details(gpus[0])
        has_units = details.get("compute_capability", (0,)) >= (8,)
    else:
        processor = Path("/proc/cpuinfo")  # on Linux
        flags = processor.read_text() if processor.exists() else ""
        has_units = re.search("avx512_bf16|amx_bf16", flags)
    return "bfloat16" if has_units else "float32"


def set_precision(model, precision):
    """Makes the ResNet50 in model compute in float32 or bfloat16; all else stays float32."""
    resnet = model.get_layer("resnet50")
    policy = keras.DTypePolicy("float32" if precision == "float32" else "mixed_bfloat16")
    if resnet.layers[-1].dtype_policy != policy:
        for layer in resnet.layers:
            layer.dtype_policy = policy
        model.make_predict_function(force=True)  # the old one was traced in the old precision


def read_features(model, frames, rows):
    """Runs frames[rows] through model, FRAME_BATCH at a time: (n, F). predict() is slower."""
    batches = np.split(rows, range(FRAME_BATCH, len(rows), FRAME_BATCH))
    with ThreadPoolExecutor(1) as reader:  # reads the next frames meanwhile
        images = reader.map(frames.__getitem__, batches)
        return np.concatenate([model.predict_on_batch(batch) for batch in images])


def extract_features(frames, n_train, cache):
    """Runs all frames and copies through ResNet50 once, or takes their features from cache.
    Returns (backbone, features (N + C, F), what the weights are). Raises InputError."""
    resnet, weights, is_random = load_resnet50()
    grids = FEATURE_LAYERS_RANDOM if is_random else FEATURE_LAYERS
    try:
        outputs = [resnet.get_layer(name).output for name in grids]
    except ValueError as error:
        raise InputError(f"FEATURE_LAYERS, FEATURE_LAYERS_RANDOM: {error}"[:250]) from None
    resnet = keras.Model(resnet.input, outputs, name="resnet50")
    if is_random:
        calibrate(resnet, frames[[0, n_train - 1]])  # more would take gigabytes
    backbone = build_backbone(resnet, grids)
    shape = (len(frames), backbone.output_shape[1])
    precision = choose_precision()
    constants = (FRAME_SIZE, FRAME_BATCH, FEATURE_SPREAD, SEED, grids, n_train)
    versions = (3, keras.__version__, keras.backend.backend())  # 4 when code changes features
    key = (constants, weights, precision, versions, resnet.count_params())
    files = [*frames.sources, *([at(WEIGHTS)] if at(WEIGHTS or "").is_file() else [])]
    array = open_cache(cache, key, files, shape)
    n = len(frames.copy_of)
    print(f"ResNet50, weights: {weights}, {precision}, reads {n} frames and {len(frames) - n}",
          f"copies; {shape[1]:,} numbers each from {', '.join(grids)}:")  # fmt: skip
    set_precision(backbone, precision)
    features = fill_rows(array, lambda rows: read_features(backbone, frames, rows))
    set_precision(backbone, "float32")  # that of the saved model
    return backbone, features, weights


def train(model, training, validation):
    """Trains for EPOCHS epochs (the Sequence shuffles); returns the history. Validation is only
    monitored. The loss: mse divided by the counts' variance, so one rate suits every crowd."""
    steps = EPOCHS * len(training)
    optimizer = keras.optimizers.get(OPTIMIZER)
    optimizer.learning_rate = keras.optimizers.schedules.CosineDecay(LEARNING_RATE, steps)
    variance = max(float(training.counts.var()), 1.0)
    model.compile(optimizer, "mse", loss_weights=1 / variance, metrics=["mse", "mae"])
    fit = model.fit(training, validation_data=validation, epochs=EPOCHS, shuffle=False, verbose=2)
    return pd.DataFrame(fit.history, index=pd.RangeIndex(1, EPOCHS + 1, name="epoch"))


# == Evaluation: metrics, figures, results ===================================================
def measure(true, predicted):
    """Metrics of counts. accuracy: share within TOLERANCE; a true 0 needs one that rounds to 0."""
    error = np.abs(predicted - true)
    accurate = np.where(true == 0, np.round(predicted) == 0, error <= TOLERANCE * true)
    mse = np.mean(error**2)
    return {"mae": error.mean(), "mse": mse, "rmse": mse**0.5, "accuracy": accurate.mean()}


def draw_figures(history, validation, baseline, paths, title):
    """Figures of a run {name: figure}. validation: id, true, predicted of the frames in paths."""
    loss, axes = plt.subplots(figsize=(6, 4))
    axes.plot(history.index - 0.5, history["mse"], label="training: mean over the epoch")
    axes.plot(history.index, history["val_mse"], "--", label="validation: after the epoch")
    axes.axhline(baseline["mse"], color="0.5", linestyle=":", label="validation: the mean count")
    axes.set(yscale="log", xlabel="Epoch", ylabel="Mean squared error (people²)")
    ticks = LogLocator(subs=(1, 2, 5))
    axes.yaxis.set(major_locator=ticks, major_formatter="{x:g}", minor_formatter="")
    axes.legend()

    predictions, (left, right) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=(1, 2))
    counts = validation.set_index("id")[["true", "predicted"]]
    ends = np.array([counts.min().min() - 1, counts.max().max() + 1])
    low, high = (1 - TOLERANCE) * ends, (1 + TOLERANCE) * ends
    left.fill_between(ends, low, high, color="0.9", label=f"within {TOLERANCE:.0%}")
    left.plot(ends, ends, color="0.5", label="exact")
    sns.scatterplot(counts, x="true", y="predicted", s=18, alpha=0.6, ax=left)
    left.set(xlim=ends, ylim=ends, xlabel="True count", ylabel="Predicted count", aspect="equal")
    left.legend()
    sns.lineplot(counts, linewidth=1, ax=right).set(xlabel="Frame", ylabel="People")
    predictions.suptitle(title, parse_math=False)

    examples, axes = plt.subplots(2, 3, figsize=(11, 6))
    order = np.abs(validation["predicted"] - validation["true"]).argsort(kind="stable")
    rows = order.iloc[np.linspace(0, len(order) - 1, 6, dtype=int)]
    for axis, row in zip(axes.flat, rows):
        axis.imshow(read_image(paths[row]))
        text = "frame {id}: true {true}, predicted {predicted:.1f}"
        axis.set_title(text.format(**validation.iloc[row]))
        axis.axis("off")
    examples.suptitle("Validation frames, from the smallest to the largest error")
    return {"loss": loss, "predictions": predictions, "examples": examples}


def draw_counts(table):
    """The figure {name: figure} of counts over new frames, shaded where they are doubtful."""
    figure, axes = plt.subplots(figsize=(11, 4))
    axes.plot(table["count"].to_numpy(), ".-", linewidth=1, markersize=3)
    doubtful = table["unfamiliar"].fillna(True).to_numpy(float)[np.newaxis]
    area = (-0.5, len(table) - 0.5, *axes.get_ylim())
    axes.imshow(doubtful, cmap="Greys", vmin=0, vmax=5, aspect="auto", extent=area)
    axes.set(xlabel="Frame, from 0 (grey: like no training frame, or unreadable)", ylabel="People")
    return {"counts": figure}


def save_figures(folder, draw):
    """Saves what draw() returns, {name: figure}, and shows it where there is a screen."""
    try:
        settings = {"savefig.dpi": 200, "figure.constrained_layout.use": True}
        sns.set_theme(context="paper", style="ticks", palette="colorblind", rc=settings)
        for name, figure in draw().items():
            write_files(folder, {f"{name}.png": figure.savefig, f"{name}.pdf": figure.savefig})
        if plt.get_backend().lower() != "agg":
            plt.show()
        plt.close("all")
    except Exception as error:  # matplotlib and its back ends raise many kinds
        print(f"Warning: no figures ({shorten(str(error), 200)}).", file=sys.stderr)


def save_results(outputs, model, history, table, paths, run):
    """Writes all results, prints a summary. table: id, split, true, predicted; of the frames
    in paths. run: more for metrics.json. Figures come last: one that fails costs only itself."""
    validation = table[table["split"] == "validation"]
    n_train = len(table) - len(validation)
    metrics = measure(validation["true"], validation["predicted"])
    baseline = measure(validation["true"], table["true"][:n_train].mean())
    constants = {name: value for name, value in globals().items() if name.isupper()}
    versions = {library.__name__: library.__version__ for library in (keras, tf, np)}
    report = metrics | run | {"train_frames": n_train, "validation_frames": len(validation)}
    report |= {"baseline": baseline, "constants": constants}
    report |= {"python": sys.version, "versions": versions}
    write_files(outputs, {
        "ts_crowdnet.keras": model.save,
        "history.csv": history.to_csv,
        "predictions.csv": lambda path: table.to_csv(path, index=False, float_format="%.6f"),
        "metrics.json": lambda path: path.write_text(json.dumps(report, indent=2, default=str)),
    })  # fmt: skip
    line = "{}: MAE {mae:.3f}, MSE {mse:.3f}, RMSE {rmse:.3f}, within {:.0%}: {accuracy:.1%}"
    title = line.format("Validation frames", TOLERANCE, **metrics)
    title += "\n" + line.format("Always the mean count", TOLERANCE, **baseline)
    print(f"\n{title}\nResNet50 weights: {run['weights']}. Results: {outputs}")
    paths = paths[n_train:]
    save_figures(outputs, lambda: draw_figures(history, validation, baseline, paths, title))


# == Counting new footage ====================================================================
def find_footage(frames):
    """The frames meant by an argument of count_people: sources of read_image, in a list."""
    sources = frames
    if isinstance(frames, (str, Path)):
        path = Path(frames).expanduser()
        sources = [path]
        if not path.is_file():
            sources = list_pictures(path)
        elif path.suffix.lower() not in PICTURES:
            command = f"ffmpeg -i {path.name} -vf fps=1 frame_%06d.jpg"
            raise InputError(f"{path}: no picture; make some of a video: {command}")
    if not len(sources):
        raise InputError(f"{frames}: no frames to count; give some of {', '.join(PICTURES)}")
    return [Path(source) if isinstance(source, str) else source for source in sources]


def load_stages(model):
    """(spatial, temporal, regression) of a model, or of the file of one. Raises InputError."""
    loaded, saved_by = model, "no Keras"
    try:
        if isinstance(model, (str, Path)):
            path = Path(model).expanduser()
            saved_by = json.loads(zipfile.ZipFile(path).read("metadata.json"))["keras_version"]
            loaded = keras.saving.load_model(path, compile=False)
        return [loaded.get_layer(stage) for stage in ("spatial", "temporal", "regression")]
    except Exception as error:  # zipfile, h5py and Keras raise many kinds
        problem = f"not written by this script, or by another Keras ({shorten(str(error), 150)})"
    versions = f"saved by {saved_by}, this is {keras.__version__}"
    raise InputError(f"{model}: {problem}; {versions}; install that Keras, or train a model first")


def count_people(model, frames, cache=None):
    """Counts the people in new frames of the camera a model was trained on.
    model: path of a ts_crowdnet.keras, or the loaded model, which stays in the precision it counts
    in. frames: a folder or a picture, or paths or uint8 RGB arrays (H, W, 3) in time order, about
    at the frame rate of training. cache: a folder from which an interrupted count of files goes on.
    Returns a DataFrame, a row a frame, indexed by file name: count, and unfamiliar, True where a
    frame looks like no training frame; both empty where it cannot be read. Raises InputError."""
    sources = find_footage(frames)
    spatial, temporal, regression = load_stages(model)
    backbone = spatial.layer
    good, line = find_damage(sources)
    if not good:
        raise InputError(f"{line}; replace them")
    if len(good) < len(sources):
        print(f"{line}; their counts stay empty.")
    images = Frames([sources[row] for row in good], backbone.input_shape[1:3])
    windows = make_windows(good, temporal.input_shape[1])
    precision = choose_precision()
    set_precision(backbone, precision)
    array = np.full((len(good), 2), np.nan, "float32")
    if cache:
        array = open_cache(cache, (precision, FRAME_BATCH), [model, *sources], array.shape)

    def count(rows):
        """(people, length of the last feature vector) for the windows of these rows (n, 2)."""
        seen = np.unique(windows[rows])
        features = read_features(backbone, images, seen)
        features = features[np.searchsorted(seen, windows[rows])]  # (n, T, F)
        people = regression.predict_on_batch(temporal.predict_on_batch(features))
        return np.column_stack([people, np.linalg.norm(features[:, -1], axis=1)])

    counts, lengths = fill_rows(array, count).T
    unfamiliar = pd.array(lengths > UNFAMILIAR * float(backbone.get_layer("longest").scale))
    table = pd.DataFrame({"count": counts, "unfamiliar": unfamiliar}, index=good)
    table = table.reindex(range(len(sources)))
    names = [getattr(source, "name", row) for row, source in enumerate(sources)]
    return table.set_axis(pd.Index(names, name="frame"))


def count_folder():
    """The COUNT mode: counts.csv and a figure in OUTPUTS, from the model there."""
    outputs = at(OUTPUTS)
    model = outputs / "ts_crowdnet.keras"
    if not model.is_file():
        raise InputError(f"{model}: no such file; train a model first")
    table = count_people(model, at(COUNT), outputs / "count_cache")
    write_files(outputs, {"counts.csv": lambda path: table.to_csv(path, float_format="%.3f")})
    mean, unfamiliar = table["count"].mean(), table["unfamiliar"].sum()
    print(f"{len(table)} frames, {mean:.1f} people on average: {outputs / 'counts.csv'}")
    if unfamiliar:
        print(f"{unfamiliar} of them look like no training frame; doubt their counts.")
    save_figures(outputs, lambda: draw_counts(table))


# == Main ====================================================================================
def main():
    """Labels -> frames -> feature vectors -> network -> counts -> figures and numbers."""
    check_constants()
    if COUNT:
        return count_folder()
    labels = read_labels(at(LABELS))
    ids, counts = labels.index.to_numpy(), labels.to_numpy()
    n, n_train = len(labels), round(len(labels) * TRAIN_FRACTION)
    if not 1 < n_train < n:
        raise InputError(f"{at(LABELS)}: {n} frames, too few for {TRAIN_FRACTION = }; change it")
    paths = find_frames(ids)
    print(f"{n} frames: the first {n_train} train, the last {n - n_train} validate.")
    check_frames(paths)
    outputs = at(OUTPUTS)

    # Spatial: every frame and copy through the frozen ResNet50, once.
    frames = Frames(paths, FRAME_SIZE, n_train)
    backbone, features, weights = extract_features(frames, n_train, outputs / "feature_cache")
    trained_on = np.r_[:n_train, n : len(frames)]  # training frames and their copies
    spatial = build_spatial(backbone, features, trained_on)

    # Temporal and regression: trained on windows of coordinates (N + C, K), or of frames.
    keras.utils.set_random_seed(SEED)
    basis = find_basis(features[trained_on])
    temporal = build_temporal(basis.shape[1])
    regression = build_regression(counts[:n_train])
    if CACHE_FEATURES:
        inputs, model = features @ basis, keras.Sequential([temporal, regression])
    else:
        inputs, model = frames, build_network(spatial, temporal, basis, regression)
    windows = make_windows(ids, SEQUENCE_LENGTH)  # (N, T)
    training = WindowSequence(inputs, windows[:n_train], counts[:n_train], frames.copy_of)
    validation = WindowSequence(inputs, windows[n_train:], counts[n_train:])
    history = train(model, training, validation)

    # Evaluation: every frame's count, and the metrics of the validation frames.
    predicted = model.predict(WindowSequence(inputs, windows, counts), verbose=0)[:, 0]
    if CACHE_FEATURES:
        model = build_network(spatial, temporal, basis, regression)
    split = np.where(np.arange(n) < n_train, "train", "validation")
    table = {"id": ids, "split": split, "true": counts.astype(int), "predicted": predicted}
    run = {"weights": weights, "precision": choose_precision(), "features": features.shape[1]}
    save_results(outputs, model, history, pd.DataFrame(table), paths, run)


def run_as_script():
    """main(), with one line instead of a traceback for what the user can put right."""
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    tf.get_logger().setLevel("ERROR")  # no warning of a new batch size
    try:
        main()
    except (InputError, OSError) as error:
        sys.exit(" ".join(f"Error: {error}".split()))


if __name__ == "__main__":
    run_as_script()
