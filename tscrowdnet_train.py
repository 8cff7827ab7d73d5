"""TS-CrowdNet: count the people in a fixed-camera video with TimeDistributed ResNet50 + LSTM.

    pip install -r requirements.txt && python tscrowdnet_train.py

Reads      labels.csv                        id,count: how many people each frame shows
           frames/frames/seq_000001.jpg ...  the frames of one fixed camera
Writes     outputs/ts_crowdnet.keras         the model: windows of uint8 frames in, counts out
           outputs/metrics.json, predictions.csv, history.csv; figures as .png and .pdf

N labelled frames, the first n_train train; C jittered copies of some of these; T = SEQUENCE_LENGTH;
H x W = FRAME_SIZE; F numbers in a feature vector, 15,360 with trained weights. Stages for a window:

    frames (T, H, W, 3) uint8
    1. spatial     TimeDistributed(frozen ResNet50, read at FEATURE_LAYERS)    -> features (T, F)
    2. temporal    the same Dense for every frame (T, PROJECTION), an LSTM     -> memory (LSTM_UNITS,)
    3. regression  Dense(DENSE_UNITS, relu), Dense(1): the last frame's count  -> people (1,)

Stage 1 does not learn, so it reads the N + C pictures once and its features (N + C, F) are kept;
WindowSequence feeds windows of them (BATCH_SIZE, T, F) to stages 2 and 3, which train.
"""

import contextlib
import copy
import csv
import faulthandler
import hashlib
import io
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from textwrap import shorten

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends without a traceback, from here on
    stderr = os.dup(2)
    faulthandler.enable(stderr)  # tells of a crash inside a library, also while that is silent:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # TensorFlow writes lines as it starts
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if os.environ.get("MPLBACKEND", "").lower() != "agg":
        os.environ.pop("MPLBACKEND", None)  # one that is not installed would stop the import
try:
    import keras
    import matplotlib.pyplot as plt
    import numpy as np
    import pandas as pd
    import scipy.io
    import seaborn as sns
    from keras import layers, ops
    from matplotlib.ticker import LogLocator
    from PIL import Image, ImageEnhance, ImageOps  # Pillow comes with matplotlib
    from sklearn.metrics import mean_absolute_error, mean_squared_error
    from sklearn.preprocessing import StandardScaler
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    sys.exit(f"Error: {error}: pip install -r requirements.txt, with Python 3.10 to 3.13")
finally:
    if __name__ == "__main__":
        os.dup2(stderr, 2)

ROOT = Path(__file__).resolve().parent

# -- Data: relative paths start at this script's folder -------------------------------------------
LABELS = "labels.csv"  # another CSV with columns id,count, or the official "mall_gt.mat"
FRAMES = "frames/frames"  # folder of seq_000001.jpg, seq_000002.jpg, ...: one fixed camera
OUTPUTS = "outputs"  # give each experiment a folder of its own to keep its results
SEQUENCE_LENGTH = 5  # frames in a window; more for a high frame rate, 1 to use no earlier frames
FRAME_SIZE = (300, 400)  # (height, width) fed to ResNet50; larger if people are small
TRAIN_FRACTION = 0.8  # first part of the video, to train on; 0.4 for Mall's canonical split

# -- Spatial stage: frozen ResNet50 ---------------------------------------------------------------
WEIGHTS = "imagenet"  # or the path of a ResNet50 weight file (no top), or None: random
# Layers to read and the grid (rows, columns) each is summarised over; finer if people differ in size.
FEATURE_LAYERS = {"conv2_block3_out": (3, 2), "conv3_block4_out": (3, 2),
                  "conv4_block6_out": (1, 1), "conv5_block3_out": (1, 1)}  # fmt: skip
# Read instead if the weights are random: their deeper layers only add noise.
FEATURE_LAYERS_RANDOM = {"conv1_relu": (3, 2), "conv2_block1_out": (3, 2), "conv2_block3_out": (3, 2)}
FEATURE_SPREAD = True  # the standard deviation in each cell, too; False: the mean, as published
AUGMENT = 0.25  # share of training frames with a jittered copy (other light, nudged camera), 0 to 1
PRECISION = "auto"  # "float32", "bfloat16"; auto: bfloat16 where the hardware has units for it
FRAME_BATCH = 8  # frames ResNet50 sees at once; fewer if memory runs out, more on a GPU
CACHE_FEATURES = True  # False: frames pass ResNet50 in every epoch, as published; slower, no better

# -- Temporal stage: projection and LSTM ----------------------------------------------------------
PROJECTION = 32  # numbers of each feature vector that the LSTM sees; 0: all of them, as published
LSTM_UNITS = 64  # more for longer windows
LSTM_DROPOUT = 0.0  # share of the LSTM's inputs dropped in training; 0.5 as published
FORGET_BIAS = -2.0  # of its forget gate at the start; higher: earlier frames weigh more (Keras: 1)

# -- Regression stage and training ----------------------------------------------------------------
DENSE_UNITS = 64  # of the layer between the LSTM and the count
BATCH_SIZE = 32  # windows in a step; about 4 if CACHE_FEATURES = False: each then holds T frames
EPOCHS = 50  # passes over the training windows; fewer for a quick look
# SGD learns what many frames share first, what is peculiar to one last; "adam" learns both at once.
OPTIMIZER = {"class_name": "SGD", "config": {"momentum": 0.9, "nesterov": True, "clipnorm": 1.0}}
LEARNING_RATE = 0.03  # falls to 0 along a half cosine; 0.3 is too much for SGD, Adam wants 1e-3
SEED = 0  # another seed, another model: publish mean and standard deviation over several

# -- Evaluation and use ---------------------------------------------------------------------------
TOLERANCE = 0.20  # counts within this share of the truth are accurate; 0.20 as published
COUNT = None  # a folder of new frames to count with the model in OUTPUTS, instead of training
UNFAMILIAR = 1.05  # mark frames farther from the mean image; the farthest one trained on is at 1

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")  # the files taken for frames


class InputError(ValueError):
    """A mistake the user can correct; the message says what is wrong and how to fix it."""


def at(path):
    """A path from the constants, taken relative to this script's folder unless it is absolute."""
    return ROOT / Path(path).expanduser()


def check_constants():
    """Raises InputError for a constant whose wrong value would fail late or obscurely."""

    def is_path(value):
        return isinstance(value, (str, Path))

    def is_whole(value, low=1):
        return isinstance(value, int) and low <= value < 2**32

    def is_pair(value, low=1):
        return np.shape(value) == (2,) and all(is_whole(part, low) for part in value)

    def is_grids(value):
        return isinstance(value, dict) and value and all(map(is_pair, value.values()))

    def is_number(value, low=0, high=1):
        return isinstance(value, (int, float)) and low <= value <= high

    wholes = dict(LSTM_UNITS=LSTM_UNITS, DENSE_UNITS=DENSE_UNITS, SEQUENCE_LENGTH=SEQUENCE_LENGTH,
                  FRAME_BATCH=FRAME_BATCH, BATCH_SIZE=BATCH_SIZE, EPOCHS=EPOCHS)  # fmt: skip
    grids = dict(FEATURE_LAYERS=FEATURE_LAYERS, FEATURE_LAYERS_RANDOM=FEATURE_LAYERS_RANDOM)
    for constants, is_fine, remedy in (
        (dict(LABELS=LABELS, FRAMES=FRAMES, OUTPUTS=OUTPUTS), is_path, "a path in quotes"),
        (dict(WEIGHTS=WEIGHTS, COUNT=COUNT), lambda x: not x or is_path(x), "a path in quotes, or None"),
        (wholes, is_whole, "a whole number above 0"),
        (dict(PROJECTION=PROJECTION, SEED=SEED), lambda x: is_whole(x, 0), "a whole number, 0 or more"),
        (dict(FRAME_SIZE=FRAME_SIZE), lambda x: is_pair(x, 32), "(height, width), 32 or more"),
        (grids, is_grids, "{layer of ResNet50: (rows, columns), ...}"),
        (dict(PRECISION=PRECISION), ("auto", "float32", "bfloat16").count, "auto, float32 or bfloat16"),
        (dict(AUGMENT=AUGMENT, TOLERANCE=TOLERANCE), is_number, "a number from 0 to 1"),
        (dict(TRAIN_FRACTION=TRAIN_FRACTION), lambda x: is_number(x, 0.001, 0.999), "such as 0.8"),
        (dict(LSTM_DROPOUT=LSTM_DROPOUT), lambda x: is_number(x, 0, 0.99), "a number from 0 to 0.99"),
        (dict(LEARNING_RATE=LEARNING_RATE), lambda x: is_number(x, 1e-9, 100), "such as 0.03"),
        (dict(FORGET_BIAS=FORGET_BIAS), lambda x: is_number(x, -100, 100), "a number such as -2"),
        (dict(UNFAMILIAR=UNFAMILIAR), lambda x: is_number(x, 0, 1e9), "a number such as 1.05"),
    ):
        for name, value in constants.items():
            if not is_fine(value):
                raise InputError(f"{name} = {value!r}: make it {remedy}")
    try:
        keras.optimizers.get(copy.deepcopy(OPTIMIZER)).learning_rate = LEARNING_RATE
    except Exception as error:  # Keras raises many kinds
        raise InputError(f"{OPTIMIZER = }: {shorten(str(error), 150)}") from None


# == Files in OUTPUTS: whole or absent, whenever a run is cut short ===============================
def write_files(folder, writers):
    """Writes files {name: write(path)} under names of this process's own, then renames them all: no
    file is ever half written, or by two runs."""
    new = {name: folder / f".new-{os.getpid()}-{name}" for name in writers}
    for name, write in writers.items():
        if (folder / name).is_dir():
            raise InputError(f"{folder / name}: a folder where a file will be written; rename it")
        write(new[name])
        with new[name].open("r+b") as file:
            os.fsync(file.fileno())
    for name in writers:
        os.replace(new[name], folder / name)


def open_cache(folder, key, files):
    """The folder in folder for what depends on this key and these files; all else in it is deleted."""
    states = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    digest = hashlib.blake2b(repr((key, states)).encode(), digest_size=8).hexdigest()
    if not (folder / digest).exists():
        shutil.rmtree(folder, ignore_errors=True)
        (folder / digest).mkdir(parents=True)
    return folder / digest


# == Data =========================================================================================
def read_csv(path):
    """The columns id and count of a CSV as text, indexed by their rows in the file."""
    data = path.read_bytes()
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    text = data.decode(encoding, errors="replace")  # ids and counts are plain digits anyway
    for separator in ",;\t":
        lines = enumerate(csv.reader(text.splitlines(), delimiter=separator), 1)
        header, *rows = [(row, fields) for row, fields in lines if any(fields)] or [(0, [])]
        columns = [name.strip().lower() for name in header[1]]
        if columns.count("id") == columns.count("count") == 1:
            for row, fields in rows:
                if len(fields) > len(columns):
                    raise ValueError(f"more fields in row {row} than in the header")
            table = {f"row {row}": dict(zip(columns, fields)) for row, fields in rows}
            return pd.DataFrame.from_dict(table, "index").reindex(columns=["id", "count"])
    raise ValueError("its first line must name one column id and one column count, as in id,count")


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
        raise InputError(f"{path}: no readable labels ({error}); replace or correct it") from None
    if table.empty:
        raise InputError(f"{path}: no labels; give one row id,count for each frame")
    values = table.apply(pd.to_numeric, errors="coerce").astype(float)
    whole = values.ge(0) & values.le([10**9, 10**6]) & values.mod(1).eq(0)  # (rows, 2)
    for column, bad, problem in (
        ("id", ~whole["id"], "is not a whole number from 0 to 1000000000"),
        ("id", values["id"].duplicated(), "is there twice"),
        ("count", ~whole["count"], "is not a whole number from 0 to 1000000"),
    ):
        if bad.any():
            row = f"{bad.idxmax()}: {column} {table.loc[bad.idxmax(), column]!r}"
            raise InputError(f"{path}, {row} {problem} ({bad.sum()} such rows); correct it")
    return values.astype({"id": int}).set_index("id")["count"].sort_index()


def list_pictures(folder):
    """The pictures in a folder, in the order of the numbers in their names: frame_2, frame_10."""
    visible = [path for path in folder.iterdir() if not path.name.startswith(".")]
    paths = [path for path in visible if path.suffix.lower() in PICTURES and path.is_file()]
    return sorted(paths, key=lambda path: re.sub(r"\d+", lambda digits: digits[0].zfill(12), path.name))


def find_frames(ids):
    """The labelled frames, N paths, by the last number in their names: in FRAMES or, as in Mall's own
    archive, its parent. Raises InputError."""
    ids = [int(frame) for frame in ids]
    wanted = set(ids)
    found = {folder: {} for folder in (at(FRAMES), at(FRAMES).parent)}  # {folder: {number: paths}}
    for folder, numbered in found.items():
        for path in list_pictures(folder) if folder.is_dir() else []:
            for number in re.findall(r"\d+", path.stem)[-1:]:
                numbered.setdefault(int(number), []).append(path)
    if all(numbered.keys() >= wanted for numbered in found.values()):
        folders = " and ".join(map(str, found))
        raise InputError(f"{folders} both hold a frame for every label; move one video away")
    folder, frames = max(found.items(), key=lambda item: len(item[1].keys() & wanted))
    missing = [frame for frame in ids if frame not in frames]
    shift = min(frames, default=0) - min(ids)
    if missing and all(frame + shift in frames for frame in ids):
        problem = f"ids from {min(ids)}, but frames from {min(frames)}"
        raise InputError(f"{at(LABELS)}: {problem}; add {shift} to each id")
    if missing:
        problem = f"{len(missing)} of {len(ids)} labelled frames missing: {shorten(str(missing), 60)}"
        raise InputError(f"{folder}: {problem}; add them, or correct FRAMES or LABELS")
    for frame in ids:
        if len(frames[frame]) > 1:
            names = " and ".join(path.name for path in frames[frame][:2])
            raise InputError(f"{folder}: {names} have the same number; move one of them away")
    if len(frames) > len(ids):
        print(f"{len(frames) - len(ids)} frames have no label and are ignored.")
    return [frames[frame][0] for frame in ids]


def read_image(source, draft=False):
    """A picture, upright, RGB. source: a path, or a uint8 array (H, W, 3). draft: a JPEG at 1/8 of its
    size, faster, and damage still shows. Raises whatever Pillow does, which is much."""
    if isinstance(source, np.ndarray):
        if source.dtype != "uint8" or source.shape[2:] != (3,):
            raise ValueError(f"{source.dtype} {source.shape}, not uint8 (H, W, 3)")
        return Image.fromarray(source)
    data = source.read_bytes()
    if data.startswith(b"\xff\xd8"):  # a JPEG; zeros at its end are space reserved, never written
        data = data.rstrip(b"\0")
    with Image.open(io.BytesIO(data)) as image:
        if image.mode[0] in "IF":
            raise ValueError(f"{image.mode} pixels; convert it to 8 bits")
        if draft:
            image.draft("RGB", (1, 1))
        image.load()
        with contextlib.suppress(Exception):  # damaged EXIF data leave the pixels as they are
            image = ImageOps.exif_transpose(image)
        return image.convert("RGB")


def find_damage(sources):
    """For each source of read_image None, or what is wrong with it (N)."""

    def find_problem(source):
        try:
            read_image(source, draft=True)
        except Exception as error:
            return f"{getattr(source, 'name', 'array')}: {str(error) or type(error).__name__}"

    with ThreadPoolExecutor() as pool:
        return list(pool.map(find_problem, sources))


def check_frames(paths):
    """Raises InputError for frames that cannot be used; prints a FRAME_SIZE that fits them better."""
    damaged = list(filter(None, find_damage(paths)))
    if damaged:
        problem = f"{len(damaged)} of {len(paths)} frames cannot be used"
        raise InputError(f"{at(FRAMES)}: {problem}: {shorten('; '.join(damaged), 200)}; replace them")
    width, height = read_image(paths[0]).size
    if not 0.9 < FRAME_SIZE[0] / FRAME_SIZE[1] * width / height < 1.1:
        scale = min(FRAME_SIZE) / min(width, height)
        better = (round(height * scale), round(width * scale))
        print(f"FRAME_SIZE = {FRAME_SIZE} distorts frames of {width}x{height}; {better} would not.")


SAMPLE_LABELS = 722921060  # zlib.crc32 of the labels that ship with the sample


def check_sample(labels, paths):
    """Says that the shipped sample is one. Raises InputError where its labels go with other frames."""
    if b"synthetic mall sample" in paths[0].read_bytes():
        print("They are the rendered sample, not real people; the README says how to use Mall instead.")
    elif zlib.crc32(labels.to_json().encode()) == SAMPLE_LABELS:
        raise InputError(f"{at(LABELS)}: labels of the shipped sample, not of these frames; set LABELS")


def jitter(image, rng):
    """A copy in other light (up to 15%, tint 5%), from a nudged camera (2% of the width, zoom 3%),
    black where that sees beyond the picture."""
    zoom = rng.uniform(0.97, 1.03)
    left, top = rng.uniform(-0.02, 0.02, 2) * image.width + np.array(image.size) * (1 - zoom) / 2
    matrix = (zoom, 0, left, 0, zoom, top)
    image = image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhance(image).enhance(rng.uniform(0.85, 1.15))
    red, green, blue = rng.uniform(0.95, 1.05, 3)
    return image.convert("RGB", (red, 0, 0, 0, 0, green, 0, 0, 0, 0, blue, 0))


class Frames:
    """Pictures read like an array: frames[rows] is (*rows.shape, height, width, 3) uint8 RGB.
    sources: of N frames, see read_image. The share AUGMENT of the first n_train has jittered copies,
    in the rows after all frames; copy_of (N,) is the row of each frame's copy, its own without one."""

    def __init__(self, sources, size, n_train=0):
        copied = np.arange(0, n_train, 1 / AUGMENT).astype(int) if AUGMENT else []
        self.sources = [*sources, *(sources[row] for row in copied)]
        self.size = size
        self.copy_of = np.arange(len(sources))
        self.copy_of[list(copied)] = np.arange(len(sources), len(self.sources))

    def __len__(self):
        return len(self.sources)

    def __getitem__(self, rows):
        distinct, places = np.unique(rows, return_inverse=True)  # windows share frames
        with ThreadPoolExecutor() as pool:
            pictures = np.stack(list(pool.map(self.load, distinct)))
        return pictures[places.reshape(np.shape(rows))]

    def load(self, row):
        image = read_image(self.sources[row]).resize(self.size[::-1], Image.Resampling.BILINEAR)
        if row >= len(self.copy_of):
            image = jitter(image, np.random.default_rng((SEED, row)))
        return np.asarray(image)


def make_windows(ids, length):
    """For each frame, the rows of the window that ends at it (N, length). No window crosses a gap in
    the ids: the row after it repeats. Ids 1, 2, 5 and length 3: [[0, 0, 0], [0, 0, 1], [2, 2, 2]]."""
    rows = np.arange(len(ids))
    starts_run = np.diff(ids, prepend=ids[0]) != 1  # the first frame, and the first after each gap
    run_start = np.maximum.accumulate(rows * starts_run)  # (N,)
    return np.maximum(rows[:, None] + np.arange(1 - length, 1), run_start[:, None])


class WindowSequence(keras.utils.Sequence):
    """Feeds windows (batch, T, ...) and the counts (batch, 1) of their last frames to Keras.
    images: Frames, or feature vectors (rows, F). windows: rows (K, T), as from make_windows. counts:
    people in the last frame of each window (K,). copy_of: for training, that of Frames: every epoch
    then shuffles the windows and draws about half of them, to show copies of frames that have some."""

    def __init__(self, images, windows, counts, copy_of=None):
        super().__init__()
        self.images = images
        self.windows = windows
        self.counts = counts.reshape(-1, 1)
        self.copy_of = copy_of
        self.rng = np.random.default_rng(SEED)
        self.order, self.shown = np.arange(len(windows)), windows
        self.on_epoch_end()

    def __len__(self):
        return math.ceil(len(self.windows) / BATCH_SIZE)  # the last, partial batch counts

    def __getitem__(self, batch):
        chosen = self.order[batch * BATCH_SIZE : (batch + 1) * BATCH_SIZE]
        return self.images[self.shown[chosen]], self.counts[chosen]

    def on_epoch_end(self):
        if self.copy_of is not None:
            self.rng.shuffle(self.order)
            with_copies = self.rng.random((len(self.windows), 1)) < 0.5
            self.shown = np.where(with_copies, self.copy_of[self.windows], self.windows)


# == Model, stage 1: spatial ======================================================================
IMAGENET_FILE = "resnet50_weights_tf_dim_ordering_tf_kernels_notop.h5"
IMAGENET_MD5 = "4d473c1dd8becc155b73f8504c6f6626"  # as in keras.applications


def load_resnet50():
    """ResNet50 without its top: (model, what its weights are, whether they are random). He et al.,
    "Deep residual learning for image recognition", CVPR 2016. Raises InputError for an unfit file."""

    def build(weights):
        keras.utils.set_random_seed(SEED)  # the same random weights whatever happened before
        shape = (*FRAME_SIZE, 3)
        return keras.applications.ResNet50(include_top=False, weights=weights, input_shape=shape)

    if not WEIGHTS:
        return build(None), "random", True
    name = "imagenet" if WEIGHTS == "imagenet" else at(WEIGHTS).name
    path = Path(os.environ.get("KERAS_HOME", "~/.keras")).expanduser() / "models" / IMAGENET_FILE
    if name != "imagenet":
        path = at(WEIGHTS)
        if not path.is_file():
            raise InputError(f"{path}: no such file; correct WEIGHTS")
    elif not os.path.isfile(path) or hashlib.md5(path.read_bytes()).hexdigest() != IMAGENET_MD5:
        path = "imagenet"  # to be downloaded; Keras itself does not read a home that it cannot write
    try:
        with warnings.catch_warnings():  # Keras only warns of layers that a file has no weights for
            warnings.filterwarnings("error", category=UserWarning, module="keras")
            return build(str(path)), name, False
    except Exception as error:  # h5py and Keras raise many kinds, a bare Exception without a network
        problem = shorten(str(error), 150)
    if name != "imagenet":
        raise InputError(f"{path}: no weights of Keras's ResNet50 without top ({problem})")
    print(f"Warning: no ImageNet weights ({problem}); random ones count worse.",
          f"Remedy: WEIGHTS = 'path/{IMAGENET_FILE}'", file=sys.stderr)  # fmt: skip
    return build(None), "random (the ImageNet weights could not be downloaded)", True


def normalise(frames):
    """RGB frames (n, H, W, 3) -> BGR, as ImageNet's weights expect, each channel of each frame at mean
    0 and ImageNet's standard deviation of 57, so that a change of light changes little."""
    x = ops.cast(ops.flip(frames, axis=-1), "float32")
    x = layers.GroupNormalization(groups=-1, epsilon=1.0, center=False, scale=False)(x)
    return layers.Rescaling(57.0)(x)


def calibrate(resnet, frames):
    """Sets BatchNorm's statistics from frames (n, H, W, 3): random weights carry no signal without."""
    for layer in resnet.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.momentum = 0.0  # replace the old statistics entirely
    resnet(normalise(frames), training=True)


def fold_batchnorm(resnet):
    """The same network, faster: each convolution, ..._conv, also does the work of the BatchNorm after
    it, ..._bn. Jacob et al., "Quantization and training of neural networks for efficient
    integer-arithmetic-only inference", CVPR 2018."""
    norms = [layer for layer in resnet.layers if isinstance(layer, layers.BatchNormalization)]

    def skip_norm(layer, x, **options):
        return x if isinstance(layer, layers.BatchNormalization) else layer(x, **options)

    folded = keras.models.clone_model(resnet, call_function=skip_norm)
    others = [layer for layer in resnet.layers if layer not in norms]
    folded.set_weights([array for layer in others for array in layer.get_weights()])
    for norm in norms:
        convolution = folded.get_layer(norm.name.removesuffix("bn") + "conv")
        kernel, bias = convolution.get_weights()
        gamma, beta, mean, variance = norm.get_weights()
        gain = gamma / np.sqrt(variance + norm.epsilon)
        convolution.set_weights([kernel * gain, (bias - mean) * gain + beta])
    return folded


def build_backbone(resnet, grids):
    """ResNet50 read at the layers of grids: a frame (H, W, 3) uint8 -> features (F,). Each layer,
    (h, w, C), is summarised over the cells of its grid: mean and standard deviation by channel."""
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
            variance = ops.relu(average(ops.square(x)) - ops.square(mean))  # below 0 by rounding alone
            features.append(layers.Flatten()(ops.sqrt(variance)))
    features = layers.Concatenate()(features) if len(features) > 1 else features[0]
    return keras.Model(frame, features, name="backbone")


def build_spatial(backbone, features, trained_on):
    """Stage 1, for one frame: (H, W, 3) uint8 -> its feature vector (F,), standardised by the training
    images, whose mean squared length is 1. Does the same to features (rows, F), in place; trained_on:
    rows of the training images. The layer "longest" keeps their greatest length for count_people."""
    scaler = StandardScaler().fit(features[trained_on])
    scale = scaler.scale_ * math.sqrt(features.shape[1])
    features -= scaler.mean_.astype("float32")
    features /= scale.astype("float32")
    longest = float(np.linalg.norm(features[trained_on], axis=1).max())
    longest = max(longest, 1e-3)  # 0 where all training images are alike
    x = layers.Normalization(mean=scaler.mean_, variance=np.square(scale * longest))(backbone.output)
    x = layers.Rescaling(longest, name="longest")(x)  # divided by above: keeps it in the saved model
    spatial = keras.Model(backbone.input, x, name="resnet50_features")
    spatial.trainable = False
    return spatial


# == Model, stages 2 and 3: temporal, regression ==================================================
def build_temporal(n_features):
    """Stage 2: feature vectors (T, F) -> what the LSTM makes of them (LSTM_UNITS,)."""
    features = keras.Input((SEQUENCE_LENGTH, n_features), name="features")
    x = features
    if PROJECTION:
        x = layers.Dense(PROJECTION, name="projection")(x)  # (T, PROJECTION)
    lstm = layers.LSTM(LSTM_UNITS, dropout=LSTM_DROPOUT, unroll=True, name="lstm")  # unrolled: faster
    memory = lstm(x)
    kernel, recurrent_kernel, bias = lstm.get_weights()
    bias[LSTM_UNITS : 2 * LSTM_UNITS] = FORGET_BIAS  # Keras's order: input, forget, cell, output
    lstm.set_weights([kernel, recurrent_kernel, bias])
    return keras.Model(features, memory, name="temporal")


def build_regression(counts):
    """Stage 3: (LSTM_UNITS,) -> people in the last frame (1,), never negative. counts (M,), those of
    the training frames, set its start, their mean, and its unit, their standard deviation."""
    memory = keras.Input((LSTM_UNITS,), name="memory")
    x = layers.Dense(DENSE_UNITS, activation="relu", name="dense")(memory)
    x = layers.Dense(1, name="deviation")(x)
    x = layers.Rescaling(max(float(counts.std()), 1.0), float(counts.mean()))(x)
    return keras.Model(memory, layers.ReLU(name="people")(x), name="regression")


def build_network(input_shape, spatial, temporal, regression):
    """The three stages in a row; without the spatial one where windows hold feature vectors already."""
    windows = keras.Input(input_shape, dtype="uint8" if spatial else "float32", name="windows")
    features = layers.TimeDistributed(spatial, name="spatial")(windows) if spatial else windows
    return keras.Model(windows, regression(temporal(features)), name="ts_crowdnet")


# == Features and training ========================================================================
def choose_precision():
    """PRECISION; if "auto", bfloat16 on processors and GPUs with units for it: twice the speed."""
    if PRECISION != "auto":
        return PRECISION
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        for gpu in tf.config.list_physical_devices("GPU"):
            capability = tf.config.experimental.get_device_details(gpu).get("compute_capability", (0,))
            return "bfloat16" if capability >= (8, 0) else "float32"
    flags = ""
    with contextlib.suppress(OSError):  # not Linux
        flags = Path("/proc/cpuinfo").read_text()
    return "bfloat16" if re.search("avx512_bf16|amx_bf16", flags) else "float32"


def set_precision(model, precision):
    """Makes the ResNet50 in model compute in "float32" or "bfloat16"; all else stays float32."""
    resnet = model.get_layer("resnet50")
    policy = keras.DTypePolicy("float32" if precision == "float32" else "mixed_bfloat16")
    if resnet.layers[-1].dtype_policy != policy:
        for layer in resnet.layers:
            layer.dtype_policy = policy
        model.make_predict_function(force=True)  # the old one was traced in the old precision


def read_features(model, frames, rows):
    """Runs frames[rows] through model, FRAME_BATCH at a time: (n, F). The next are read meanwhile."""
    batches = np.split(rows, range(FRAME_BATCH, len(rows), FRAME_BATCH))
    with ThreadPoolExecutor(1) as reader:
        images = reader.map(frames.__getitem__, batches)
        return np.concatenate([model.predict_on_batch(batch) for batch in images])


def compute_rows(compute, shape, path=None):
    """An array of a shape (rows, numbers), filled by compute(rows) for some rows at a time. All is kept
    in the file path, if one is given, from where an interrupted run goes on, with the same digits."""
    array = np.full(shape, np.nan, "float32")  # NaN: not computed yet
    if path:
        try:
            stored = np.load(path, mmap_mode="r")
            is_fit = stored.shape == shape and stored.dtype == array.dtype
        except (OSError, EOFError, ValueError):  # no such file, or a damaged one
            is_fit = False
        if not is_fit:
            write_files(path.parent, {path.name: lambda new: np.save(new, array)})
        array = np.lib.format.open_memmap(path, "r+")
    seconds = 0.1 if sys.stdout.isatty() else 20
    bar = keras.utils.Progbar(len(array), unit_name="frame", interval=seconds, verbose=len(array) > 64)
    for rows in np.split(np.arange(len(array)), range(8 * FRAME_BATCH, len(array), 8 * FRAME_BATCH)):
        if np.isnan(array[rows]).any():
            array[rows] = compute(rows)
        bar.add(len(rows))
    return np.array(array)


FEATURES_VERSION = 2  # raise it when code above changes the features: stored ones are then dropped


def extract_features(frames, n_train, cache):
    """Runs all frames and copies through ResNet50 once, or takes their features from cache. Returns
    (backbone, features (N + C, F), what the weights are). Raises InputError."""
    resnet, weights, is_random = load_resnet50()
    grids = FEATURE_LAYERS_RANDOM if is_random else FEATURE_LAYERS
    try:
        outputs = [resnet.get_layer(name).output for name in grids]
    except ValueError as error:
        raise InputError(f"FEATURE_LAYERS, FEATURE_LAYERS_RANDOM: {shorten(str(error), 200)}") from None
    resnet = keras.Model(resnet.input, outputs, name="resnet50")
    precision = choose_precision()
    key = (FRAME_SIZE, FRAME_BATCH, FEATURE_SPREAD, SEED, grids, n_train, precision, weights)
    code = (FEATURES_VERSION, resnet.count_params(), keras.__version__, keras.backend.backend())
    files = [*frames.sources, *([at(WEIGHTS)] if at(WEIGHTS or "").is_file() else [])]
    folder = open_cache(cache, (key, code), files)
    if is_random:
        calibrate(resnet, frames[[0, n_train - 1]])  # of more, the activations would take gigabytes
    backbone = build_backbone(resnet, grids)
    n = len(frames.copy_of)
    print(f"ResNet50, weights: {weights}, {precision}; feature vectors of {backbone.output_shape[1]:,}",
          f"numbers from {', '.join(grids)}.")  # fmt: skip
    print(f"It reads {n} frames, {len(frames) - n} copies:")
    shape = (len(frames), backbone.output_shape[1])
    set_precision(backbone, precision)
    try:
        path = folder / "features.npy"
        features = compute_rows(lambda rows: read_features(backbone, frames, rows), shape, path)
    finally:
        set_precision(backbone, "float32")
    return backbone, features, weights


def train(model, training, validation):
    """Trains for EPOCHS epochs (the Sequence shuffles); returns the history. Validation is only
    monitored. The loss is the mse divided by the counts' variance: one rate for every crowd."""
    steps = EPOCHS * len(training)
    optimizer = keras.optimizers.get(copy.deepcopy(OPTIMIZER))  # Keras changes what it is given
    optimizer.learning_rate = keras.optimizers.schedules.CosineDecay(LEARNING_RATE, steps)
    variance = max(float(training.counts.var()), 1.0)
    model.compile(optimizer, loss="mse", loss_weights=1 / variance, metrics=["mse", "mae"])
    fit = model.fit(training, validation_data=validation, epochs=EPOCHS, shuffle=False, verbose=2)
    return pd.DataFrame(fit.history, index=pd.RangeIndex(1, EPOCHS + 1, name="epoch"))


# == Evaluation: metrics, figures, results ========================================================
def measure(true, predicted):
    """Metrics of counts. accuracy: share within TOLERANCE; a true 0 needs one that rounds to 0."""
    near = np.abs(predicted - true) <= TOLERANCE * true
    accurate = np.where(true == 0, np.round(predicted) == 0, near)
    mse = float(mean_squared_error(true, predicted))
    mae = float(mean_absolute_error(true, predicted))
    return {"mae": mae, "mse": mse, "rmse": mse**0.5, "accuracy": float(accurate.mean())}


def draw_figures(history, validation, baseline, paths, title):
    """Figures of a run {name: figure}: error by epoch, predicted against true counts, examples."""
    loss, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    axes.plot(history.index - 0.5, history["mse"], label="training: mean over the epoch, copies too")
    axes.plot(history.index, history["val_mse"], "--", label="validation: after the epoch")
    axes.axhline(baseline["mse"], color="0.5", linestyle=":", label="validation: always the mean count")
    axes.set(yscale="log", xlabel="Epoch", ylabel="Mean squared error (people²)")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.legend()

    both, (left, right) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=(1, 2), layout="constrained")
    counts = validation.set_index("id")[["true", "predicted"]]
    ends = np.array([counts.min().min() - 1, counts.max().max() + 1])
    band = np.outer([1 - TOLERANCE, 1 + TOLERANCE], ends)
    left.fill_between(ends, *band, color="0.9", label=f"within {TOLERANCE:.0%} of the truth")
    left.plot(ends, ends, color="0.5", label="exact")
    sns.scatterplot(counts, x="true", y="predicted", s=18, alpha=0.6, ax=left)
    left.set(xlim=ends, ylim=ends, xlabel="True count", ylabel="Predicted count", aspect="equal")
    left.legend()
    sns.lineplot(counts, linewidth=1, ax=right).set(xlabel="Frame", ylabel="People")
    both.suptitle(title, parse_math=False)

    examples, axes = plt.subplots(2, 3, figsize=(11, 6), layout="constrained")
    order = np.argsort(np.abs(validation["predicted"] - validation["true"]).to_numpy(), kind="stable")
    rows = order[np.linspace(0, len(order) - 1, 6).round().astype(int)]  # from the best to the worst
    for axis, row in zip(axes.flat, rows):
        axis.imshow(read_image(paths[row]))
        text = "frame {id}: true {true}, predicted {predicted:.1f}"
        axis.set_title(text.format(**validation.iloc[row]))
        axis.axis("off")
    examples.suptitle("Validation frames, from the smallest to the largest error")
    return {"loss": loss, "predictions": both, "examples": examples}


def draw_counts(table):
    """The figure {name: figure} of counts over new frames, shaded where they are doubtful."""
    figure, axes = plt.subplots(figsize=(11, 4), layout="constrained")
    axes.plot(table["count"].to_numpy(), ".-", linewidth=1, markersize=3)
    odd = table["unfamiliar"].fillna(True).to_numpy(bool).repeat(2)
    sides = np.arange(len(table)).repeat(2) + np.tile([-0.5, 0.5], len(table))  # of each frame
    shade = {"color": "0.85", "linewidth": 0, "transform": axes.get_xaxis_transform()}
    axes.fill_between(sides, 0, 1, odd, **shade)
    axes.set(xlabel="Frame, from 0 (grey: unlike the training frames, or unreadable)", ylabel="People")
    return {"counts": figure}


def save_figures(folder, draw):
    """Saves what draw() returns, {name: figure}, as PNG and PDF; shows it where there is a screen."""
    screen = plt.get_backend()
    try:
        plt.switch_backend("agg")  # files first: they need no screen
        sns.set_theme(context="paper", style="ticks", palette="colorblind", rc={"savefig.dpi": 200})
        figures = draw()
        files = {f"{name}.{kind}": figures[name].savefig for name in figures for kind in ("png", "pdf")}
        write_files(folder, files)
        plt.close("all")
        if screen.lower() != "agg":
            plt.switch_backend(screen)
            draw()
            plt.show()
    except Exception as error:  # matplotlib and its back ends raise many kinds
        print(f"Warning: no figures ({shorten(str(error), 200)}); all else is saved.", file=sys.stderr)


def save_results(outputs, model, history, table, paths, run):
    """Writes all results, prints a summary. table: id, split, true, predicted; of the frames in paths.
    run: more for metrics.json. Figures come last: one that cannot be drawn costs only itself."""
    validation = table[table["split"] == "validation"]
    n_train = len(table) - len(validation)
    metrics = measure(validation["true"], validation["predicted"])
    baseline = measure(validation["true"], np.full(len(validation), table["true"][:n_train].mean()))
    report = metrics | {"train_frames": n_train, "validation_frames": len(validation), **run}
    constants = {name: value for name, value in globals().items() if name.isupper() and name != "ROOT"}
    versions = {library.__name__: library.__version__ for library in (keras, np, pd)}
    report |= {"baseline": baseline, "python": sys.version, "versions": versions, "constants": constants}
    write_files(outputs, {
        "ts_crowdnet.keras": model.save,
        "history.csv": history.to_csv,
        "predictions.csv": lambda path: table.to_csv(path, index=False, float_format="%.6f"),
        "metrics.json": lambda path: path.write_text(json.dumps(report, indent=2, default=str) + "\n"),
    })  # fmt: skip
    scores = pd.DataFrame({"this model": metrics, "mean count": baseline})
    scores.index = ["MAE, people", "MSE, people squared", "RMSE, people", f"within {TOLERANCE:.0%}"]
    print(f"\nOn the validation frames:\n{scores.round(3).to_string()}")
    print(f"ResNet50 weights: {run['weights']}. Results: {outputs}")
    if metrics["mae"] >= baseline["mae"]:
        print("That is no better than the mean training count: few frames, wrong labels, another scene?")
    title = f"Validation frames; ResNet50 weights: {run['weights']}\n"
    title += "MAE {mae:.2f}, MSE {mse:.2f}, within {0:.0%}: {accuracy:.1%}".format(TOLERANCE, **metrics)
    title += "; always the mean count: {mae:.2f}, {mse:.2f}, {accuracy:.1%}".format(**baseline)
    save_figures(outputs, lambda: draw_figures(history, validation, baseline, paths[n_train:], title))


# == Counting new footage =========================================================================
def find_footage(frames):
    """The frames meant by the argument of count_people, as sources of read_image. Raises InputError."""
    sources = frames
    if isinstance(frames, (str, Path)):
        path = Path(frames).expanduser()
        if path.is_file() and path.suffix.lower() not in PICTURES:
            command = f"ffmpeg -i {path.name} -vf fps=1 frame_%06d.jpg"
            raise InputError(f"{path}: no picture; make some of a video in a new folder: {command}")
        sources = [path] if path.is_file() else list_pictures(path)
    if not len(sources):
        raise InputError(f"{frames}: no frames to count; give some of {', '.join(PICTURES)}")
    return [Path(source) if isinstance(source, str) else source for source in sources]


def load_stages(model):
    """(spatial, temporal, regression) of a model, or of the file of one. Raises InputError."""
    name = Path(model).expanduser() if isinstance(model, (str, Path)) else "this model"
    try:
        if isinstance(name, Path):
            model = keras.saving.load_model(name, compile=False)
        return [model.get_layer(stage) for stage in ("spatial", "temporal", "regression")]
    except Exception as error:  # zipfile, h5py and Keras raise many kinds
        problem = f"not written by this script, or by another Keras ({shorten(str(error), 150)})"
    with contextlib.suppress(Exception):
        saved_by = json.loads(zipfile.ZipFile(name).read("metadata.json"))["keras_version"]
        problem += f"; saved by {saved_by}, this is {keras.__version__}"
    raise InputError(f"{name}: {problem}; install that Keras, or train a model first")


def count_people(model, frames, cache=None):
    """Counts the people in new frames of the camera a model was trained on. Raises InputError, OSError.
    model: path of a ts_crowdnet.keras, or the loaded model. frames: a folder or a picture, or paths or
    uint8 RGB arrays (H, W, 3) in time order, at about the frame rate of training. cache: .npy to
    resume from. Returns a DataFrame, a row a frame, indexed by file name: count, and unfamiliar, True
    where a frame looks like no training frame. Both are empty where a frame cannot be read."""
    sources = find_footage(frames)
    spatial, temporal, regression = load_stages(model)
    damage = find_damage(sources)
    good = np.flatnonzero([problem is None for problem in damage])
    if len(good) < len(sources):
        problem = f"{len(sources) - len(good)} of {len(sources)} frames cannot be read: "
        problem += shorten("; ".join(filter(None, damage)), 200)
        if not len(good):
            raise InputError(f"{problem}; replace them")
        print(f"{problem}; their counts stay empty.")
    spatial = spatial.layer
    images = Frames([sources[row] for row in good], spatial.input_shape[1:3])
    windows = make_windows(good, temporal.input_shape[1])
    set_precision(spatial, choose_precision())

    def count(rows):
        """(people, length of the feature vector) in the windows of these rows, (n, 2)."""
        seen, places = np.unique(windows[rows], return_inverse=True)
        features = read_features(spatial, images, seen)[places.reshape(len(rows), -1)]  # (n, T, F)
        memory = temporal.predict_on_batch(features)
        lengths = np.linalg.norm(features[:, -1], axis=1)
        return np.column_stack([regression.predict_on_batch(memory), lengths])

    counts, lengths = compute_rows(count, (len(good), 2), cache).T
    unfamiliar = lengths / float(spatial.get_layer("longest").scale) > UNFAMILIAR
    table = pd.DataFrame({"count": counts, "unfamiliar": unfamiliar}, index=good)
    table = table.astype({"unfamiliar": "boolean"}).reindex(range(len(sources)))
    names = [getattr(source, "name", row) for row, source in enumerate(sources)]
    return table.set_axis(pd.Index(names, name="frame"))


def count_folder():
    """The COUNT mode: counts.csv and a figure in OUTPUTS, from the model there."""
    outputs, model = at(OUTPUTS), at(OUTPUTS) / "ts_crowdnet.keras"
    if not model.is_file():
        raise InputError(f"{model}: no such file; train a model first")
    sources = find_footage(at(COUNT))
    cache = open_cache(outputs / "count_cache", (choose_precision(), FRAME_BATCH), [model, *sources])
    table = count_people(model, sources, cache / "counts.npy")
    write_files(outputs, {"counts.csv": lambda path: table.to_csv(path, float_format="%.3f")})
    mean = table["count"].mean()
    print(f"{len(table)} frames, {mean:.1f} people on average: {outputs / 'counts.csv'}")
    if table["unfamiliar"].any():
        print(f"{table['unfamiliar'].sum()} of them look like no training frame; doubt their counts.")
    save_figures(outputs, lambda: draw_counts(table))


# == Main =========================================================================================
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
    check_sample(labels, paths)
    outputs = at(OUTPUTS)

    # Spatial: every frame and copy through the frozen ResNet50, once.
    frames = Frames(paths, FRAME_SIZE, n_train)
    backbone, features, weights = extract_features(frames, n_train, outputs / "feature_cache")
    trained_on = np.union1d(np.arange(n_train), frames.copy_of[:n_train])
    spatial = build_spatial(backbone, features, trained_on)

    # Temporal and regression: trained on windows of the feature vectors.
    keras.utils.set_random_seed(SEED)
    temporal = build_temporal(features.shape[1])
    regression = build_regression(counts[:n_train])
    network = build_network((SEQUENCE_LENGTH, *FRAME_SIZE, 3), spatial, temporal, regression)
    head = build_network((SEQUENCE_LENGTH, features.shape[1]), None, temporal, regression)
    windows = make_windows(ids, SEQUENCE_LENGTH)  # (N, T)
    images = features if CACHE_FEATURES else frames
    training = WindowSequence(images, windows[:n_train], counts[:n_train], frames.copy_of)
    validation = WindowSequence(images, windows[n_train:], counts[n_train:])
    history = train(head if CACHE_FEATURES else network, training, validation)

    # Evaluation: every frame's count, and the metrics of the validation frames.
    predicted = head.predict(WindowSequence(features, windows, counts), verbose=0)[:, 0]
    split = np.where(np.arange(n) < n_train, "train", "validation")
    table = pd.DataFrame({"id": ids, "split": split, "true": counts.astype(int), "predicted": predicted})
    run = {"weights": weights, "precision": choose_precision(), "features": features.shape[1]}
    save_results(outputs, network, history, table, paths, run)


def run_as_script():
    """main(), with one line instead of a traceback for what the user can put right."""
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    logging.getLogger("tensorflow").setLevel("ERROR")  # no warning when a new batch size is traced
    try:
        main()
    except InputError as error:
        sys.exit(" ".join(f"Error: {error}".split()))
    except OSError as error:
        problem = f"{error.filename or at(OUTPUTS)}: {error.strerror or error}"
        sys.exit(f"Error: {problem}; mend that and run again")


if __name__ == "__main__":
    run_as_script()
