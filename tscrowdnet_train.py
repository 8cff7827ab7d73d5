"""TS-CrowdNet: count the people in a fixed-camera video with TimeDistributed ResNet50 + LSTM.

    pip install -r requirements.txt && python tscrowdnet_train.py

Reads      labels.csv                            id,count: how many people each frame shows
           frames/frames/seq_000001.jpg ...      the frames of one fixed camera
Writes     outputs/ts_crowdnet.keras             the model: windows of uint8 frames in, counts out
           outputs/metrics.json, predictions.csv, history.csv
           outputs/predictions.png, timeline.png, loss.png, examples.png

Shapes, from frames to counts (T = SEQUENCE_LENGTH, H x W = FRAME_SIZE, F = features per frame):

    frames (N, H, W, 3) uint8 --backbone, each frame once--> features (N, F), kept on disk
    features (N, F) --read-out, ridge regression--> one estimate of the count per frame (N, 1)
    windows of estimates (batch, T, 1) --head: LSTM, dense, trained for EPOCHS--> counts (batch, 1)
    saved model: windows (batch, T, H, W, 3) --TimeDistributed(backbone, read-out)--> (batch, T, 1) --head--> counts
    fine-tuning, if wanted: runs of L = RUN_LENGTH windows (batch, L + T - 1, H, W, 3) --the same layers--> counts (batch, L)

Change the constants below and run again; an interrupted run goes on where it stopped.
"""

import contextlib
import hashlib
import inspect
import io
import json
import os
import platform
import signal
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

START = time.perf_counter()
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import scipy.io
import scipy.linalg
import scipy.sparse.linalg
import scipy.stats
import seaborn as sns
import sklearn
from PIL import Image, ImageOps  # Pillow comes with matplotlib
from sklearn.metrics import mean_absolute_error, mean_squared_error
from sklearn.preprocessing import StandardScaler


@contextlib.contextmanager
def silent_stderr():
    """Hides what C++ libraries write to standard error; Python's exceptions still get out."""
    sys.stderr.flush()
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


with silent_stderr():  # TensorFlow's start-up lines come before its log level is read
    import keras
    from keras import layers, ops

ROOT = Path(__file__).resolve().parent

# -- Data: relative paths start at this script's folder ------------------------------------------
LABELS = "labels.csv"  # another CSV with columns id,count, or the official "mall_gt.mat"
FRAMES = "frames/frames"  # folder of seq_000001.jpg, seq_000002.jpg, ...: one fixed camera
OUTPUTS = "outputs"  # one folder for each experiment keeps their results apart
SEQUENCE_LENGTH = 5  # frames in a window; 1 to see what the LSTM's memory is worth
FRAME_SIZE = (480, 640)  # (height, width) fed to ResNet50; (240, 320) is 4 x faster, less accurate
TRAIN_FRACTION = 0.8  # first part of the video trains, the rest validates; 0.4 for Mall's canonical split

# -- Backbone: frozen ResNet50. Read as published: FRAME_SIZE = (224, 224), FOREGROUND = None and
#    {"conv5_block3_out": (1, 1)} --------------------------------------------------------------------
WEIGHTS = "imagenet"  # or the path of a ResNet50 weight file (no top), or None: random, calibrated
# Layers of ResNet50, finest first, and the grid (rows, columns, at most) that each is averaged over:
READ_OUT = {"conv1_relu": (6, 8), "conv3_block4_out": (3, 4), "conv4_block6_out": (3, 4)}  # trained weights
READ_OUT_RANDOM = {"conv1_relu": (6, 8)}  # random weights, whose deeper layers add noise and time
FOREGROUND = (12, 16)  # grid for where a frame differs from the empty scene; None: no use of the empty scene
CALIBRATION_FRAMES = 96  # training frames whose median is the empty scene; 0.9 MB of memory each at 480x640
FRAME_BATCH = 8  # frames the backbone sees at once; less memory with fewer, no faster on a CPU with more
# False: every window passes TimeDistributed ResNet50 at every epoch, as published; same result, far slower
CACHE_FEATURES = True

# -- Read-out and head: features -> an estimate for each frame -> LSTM over the window -> count ----------
PENALTIES = (3e-5, 1e-4, 3e-4, 1e-3, 1e-2)  # of ridge regression; blocked cross-validation in the training frames picks one
ESTIMATE_NOISE = 0.1  # in standard deviations of the count; with more, the LSTM leans more on the earlier frames of a window
LSTM_UNITS = 16  # more for longer windows, or where neighbouring frames tell much of each other

# -- Training -------------------------------------------------------------------------------------
BATCH_SIZE = 64  # windows in a training step; some 4 with CACHE_FEATURES = False, which holds 5 frames for each
EPOCHS = 50  # passes over the training windows; fewer for a quick look
LEARNING_RATE = 5e-3  # falls to 0 over the epochs along a half cosine; lower it if the loss jumps
SEED = 0  # another seed, another model: publish mean and deviation over several

# -- Fine-tuning: then ResNet50 itself is trained too, end to end; a GPU's work, a CPU takes hours -----
FINE_TUNE_EPOCHS = 0  # e.g. 20
FINE_TUNE_FROM = "conv1"  # first stage of ResNet50 to train, up to what is read; "conv4" leaves conv1 to conv3 as they are
FINE_TUNE_RATE = 1e-5  # falls to 0 like LEARNING_RATE; lower it if the loss jumps when fine-tuning begins
RUN_LENGTH = 8  # consecutive windows that share their frames in a step: 8 windows of 5 are 12 frames, not 40
RUN_BATCH = 2  # runs in a step of each device; 1 where memory is short: 6 GB for 12 frames of 480x640 through READ_OUT
FINE_TUNE_DTYPE = "mixed_bfloat16"  # on GPUs, but with PyTorch; "float32" for those before 2020 (NVIDIA Ampere)

# -- Evaluation and use ----------------------------------------------------------------------------
TOLERANCE = 0.20  # a count within this share of the truth is accurate
COUNT = None  # a folder of new frames to count with the model in OUTPUTS, instead of training


class InputError(ValueError):
    """Something the user can put right; the message, one line, names it and the remedy."""

    def __str__(self):
        return " ".join(super().__str__().split())


def at(name):
    """The path of a constant: relative to this script, or absolute as it stands."""
    return ROOT / Path(name).expanduser()


def check_constants():
    """Raises InputError for a constant out of range, before any work is done."""
    whole = lambda least: lambda value: isinstance(value, int) and value >= least
    name_or_path = lambda value: isinstance(value, (str, Path))
    grids = lambda value: len(value) > 0 and all(len(grid) == 2 and min(grid) > 0 for grid in value.values())
    in_range = {
        "LABELS FRAMES OUTPUTS": (name_or_path, "a path in quotes"),
        "WEIGHTS": (lambda value: value is None or name_or_path(value), '"imagenet", a path in quotes or None'),
        "COUNT": (lambda value: value is None or name_or_path(value), "a path in quotes or None"),
        "FRAME_SIZE": (lambda value: len(value) == 2 and all(map(whole(32), value)), "(height, width), 32 or more: ResNet50's least"),
        "TRAIN_FRACTION": (lambda value: 0 < value < 1, "a number between 0 and 1, both excluded"),
        "FOREGROUND": (lambda value: value is None or grids({"": value}), "(rows, columns) of a grid of 1 x 1 or more, or None"),
        "READ_OUT READ_OUT_RANDOM": (grids, "{ResNet50 layer: (rows, columns) of a grid of 1 x 1 or more, ...}"),
        "SEQUENCE_LENGTH FRAME_BATCH CALIBRATION_FRAMES LSTM_UNITS": (whole(1), "a whole number, 1 or more"),
        "BATCH_SIZE EPOCHS RUN_LENGTH RUN_BATCH": (whole(1), "a whole number, 1 or more"),
        "PENALTIES": (lambda value: min(value) > 0, "a list of numbers above 0"),
        "LEARNING_RATE FINE_TUNE_RATE": (lambda value: value > 0, "a number above 0"),
        "ESTIMATE_NOISE TOLERANCE": (lambda value: value >= 0, "a number, 0 or more"),
        "SEED FINE_TUNE_EPOCHS": (whole(0), "a whole number, 0 or more"),
        "FINE_TUNE_FROM": (lambda value: value.startswith("conv"), '"conv1" to "conv5", a stage of ResNet50'),
        "FINE_TUNE_DTYPE": (lambda value: value in ("float32", "mixed_bfloat16"), '"float32" or "mixed_bfloat16"'),
    }
    for names, (fine, remedy) in in_range.items():
        for name in names.split():
            with contextlib.suppress(TypeError, AttributeError, ValueError):  # what fine() meets in a value of another kind
                if fine(globals()[name]):
                    continue
            raise InputError(f"{name} = {globals()[name]!r}: make it {remedy}")


# == Files in OUTPUTS: whole or absent, whenever a run is cut short ================================


@contextlib.contextmanager
def only_run(outputs):
    """Refuses a second run into the same folder; the lock ends with the process, however it ends."""
    outputs.mkdir(parents=True, exist_ok=True)
    with (outputs / ".lock").open("w") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{outputs}: another run writes here; wait for it, or set OUTPUTS to another folder") from None
        yield


def publish(outputs, writers):
    """Writes every result {file name: write(path)} under another name, then renames them all.

    The results of an earlier run stay readable until all the new ones are whole.
    """
    for name, write in writers.items():
        write(outputs / f".new-{name}")
    for name in writers:
        os.replace(outputs / f".new-{name}", outputs / name)


def drop_files(outputs, kind, kept=()):
    """Deletes "features-0123456789ab..." and the like, but those whose names start with kept; returns how many."""
    ours = [path for path in outputs.glob(f"{kind}-{'[0-9a-f]' * 12}*") if path.is_file()]
    others = [path for path in ours if not path.name.startswith(kept)]
    for path in others:
        path.unlink()
    return len(others)


def fingerprint(*things):
    """A short name for what a stored file depends on: a digest of values and arrays."""
    digest = hashlib.blake2b(digest_size=6)
    for thing in things:
        digest.update(thing.tobytes() if isinstance(thing, np.ndarray) else repr(thing).encode())
        digest.update(b"\0")
    return digest.hexdigest()


# == Data ==========================================================================================


def read_labels(path):
    """Reads the people counts from a CSV with columns id and count, or from Mall's mall_gt.mat.

    Returns a float Series of counts indexed by frame id, ascending. Raises InputError.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; set LABELS to your labels.csv or mall_gt.mat")
    if path.suffix.lower() == ".mat":
        try:
            counts = np.ravel(scipy.io.loadmat(path, variable_names=["count"])["count"])
        except KeyError:
            raise InputError(f"{path}: no variable 'count'; use Mall's own mall_gt.mat") from None
        except Exception as error:  # SciPy raises many kinds for a damaged file
            raise InputError(f"{path}: no readable MATLAB file ({error}); download it again") from None
        table = pd.DataFrame({"id": np.arange(1, len(counts) + 1), "count": counts}, dtype=str)
        rows = "entry " + (table.index + 1).astype(str)
    else:
        text = path.read_bytes()
        encoding = "utf-16" if text[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
        text = text.decode(encoding, errors="replace")  # ids and counts are plain digits anyway
        header = text.lstrip().partition("\n")[0]
        separator = max(",;\t", key=header.count)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", pd.errors.ParserWarning)  # rows longer than the header
                table = pd.read_csv(io.StringIO(text), sep=separator, dtype=str, skip_blank_lines=False, index_col=False)
            table.columns = table.columns.str.strip().str.lower()
            table = table[["id", "count"]].set_axis(["id", "count"], axis=1)  # a column twice is an error
        except Exception as error:  # pandas raises many kinds for what is no CSV
            raise InputError(
                f"{path}: no CSV table with columns id and count ({error}); the first line must be id,count"
            ) from None
        rows = "row " + (table.index + 2).astype(str)
    table = table.set_index(rows).dropna(how="all")
    if table.empty:
        raise InputError(f"{path}: no labels; give one row id,count for each frame")
    numbers = table.apply(pd.to_numeric, errors="coerce").astype(float)
    problems = [
        ("id", "no whole number from 0 to 999999999", ~numbers["id"].between(0, 999_999_999) | (numbers["id"] % 1 != 0)),
        ("count", "no whole number from 0 to 1000000", ~numbers["count"].between(0, 1e6) | (numbers["count"] % 1 != 0)),
        ("id", "there already", numbers["id"].duplicated()),
    ]
    for column, problem, found in problems:
        if found.any():
            row, more = found.idxmax(), f" ({found.sum()} such rows)" if found.sum() > 1 else ""
            raise InputError(f"{path}, {row}: {column} {table.loc[row, column]!r} is {problem}{more}; correct or delete the row")
    return numbers.astype({"id": int}).set_index("id")["count"].sort_index()


def check_frame(path):
    """Decodes a frame at an eighth of its size, which finds damage at a fraction of the cost.

    Returns (digest of the bytes, (width, height), what is wrong or None).
    """
    data = path.read_bytes()
    try:
        with Image.open(io.BytesIO(data)) as image:
            size, mode = image.size, image.mode
            if mode.startswith(("I", "F")):
                return None, size, f"{mode} pixels: convert it to 8 bits"
            image.draft("RGB", (1, 1))
            image.load()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return None, None, "too many pixels for a video frame"
    except Exception as error:  # a damaged file makes Pillow raise many kinds
        return None, None, f"not a whole image ({error})" if data else "empty file"
    return hashlib.blake2b(data).digest(), size, None


def find_frames(ids):
    """The frames of the labels, each checked: (array of N paths, digest of all their bytes).

    They are in FRAMES or, where that folder is missing, in its parent, as in Mall's own archive.
    Raises InputError that names every frame which is missing or damaged.
    """
    folder = at(FRAMES) if at(FRAMES).is_dir() else at(FRAMES).parent
    present = {path.name for path in folder.glob("seq_*.jpg")}
    if not present:
        raise InputError(f"{at(FRAMES)}: no frames seq_000001.jpg ... there; set FRAMES to their folder")
    names = [f"seq_{frame:06d}.jpg" for frame in ids]
    missing = [name for name in names if name not in present]
    if missing:
        raise InputError(
            f"{folder}: {len(missing)} of {len(names)} labelled frames are missing ({first_few(missing)}); "
            f"add them, or delete their labels to use the other {len(names) - len(missing)}"
        )
    if len(present) > len(names):
        print(f"{len(present) - len(names)} frames in {folder} have no label and are ignored.")
    paths = np.array([folder / name for name in names])
    with ThreadPoolExecutor() as pool:
        digests, sizes, problems = zip(*pool.map(check_frame, paths))
    damaged = [f"{path.name}: {problem}" for path, problem in zip(paths, problems) if problem]
    if damaged:
        raise InputError(
            f"{folder}: {len(damaged)} of {len(names)} frames cannot be used; replace them or delete their "
            f"labels: {'; '.join(damaged)}"
        )
    sizes = pd.Series(sizes).value_counts()
    if len(sizes) > 1:
        print(f"Frames differ in size ({first_few(sizes.index)}): all are resized to FRAME_SIZE.")
    return paths, hashlib.blake2b(b"".join(digests)).hexdigest()


def first_few(items):
    """'a, b, c, d, e, ...'"""
    return ", ".join(map(str, items[:5])) + ", ..." * (len(items) > 5)


def load_frame(path, size):
    """Decodes one image: (height, width, 3) uint8 RGB, resized to size = (height, width)."""
    try:
        with Image.open(path) as image:
            ImageOps.exif_transpose(image, in_place=True)
            return np.asarray(image.convert("RGB").resize(size[::-1], Image.Resampling.BILINEAR))  # a copy where sizes agree
    except Exception as error:  # a damaged file makes Pillow raise many kinds
        raise InputError(f"{path}: not a whole image ({error}); replace or remove it") from None


class Frames:
    """Image files read like an array: frames[rows] decodes them, (len(rows), height, width, 3) uint8."""

    def __init__(self, paths, size):
        self.paths, self.size = paths, size

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, rows):
        return np.stack([load_frame(path, self.size) for path in self.paths[rows]])


def make_windows(ids, length):
    """Row numbers of the window that ends at each frame: (N, length).

    Windows never cross a gap in the ids: where frames are missing before the target, the oldest
    frame of its unbroken run repeats.
    """
    rows = np.arange(len(ids))
    run_start = np.maximum.accumulate(np.where(np.diff(ids, prepend=ids[0] - 1) != 1, rows, 0))
    return np.maximum(rows[:, None] + np.arange(1 - length, 1), run_start[:, None])


class WindowSequence(keras.utils.Sequence):
    """Feeds windows (batch, T, ...) and their counts (batch, 1) to fit, evaluate and predict.

    source: anything indexed by rows: Frames, frames (N, H, W, 3) or estimates of the counts (N, 1).
    windows: (M, T) row numbers, from make_windows.
    counts: (M, 1) people in the last frame of each window; (M, L) of the last L frames, where windows are runs.
    shuffle: draws a new order for each epoch, the same for the same SEED and epoch.
    """

    def __init__(self, source, windows, counts, batch_size, shuffle=False):
        super().__init__()
        self.source, self.windows, self.counts, self.batch_size = source, windows, counts, batch_size
        self.shuffle, self.epoch = shuffle, 0
        self.on_epoch_end(epochs=0)

    def __len__(self):
        return -(-len(self.windows) // self.batch_size)  # rounded up: the last, partial batch counts

    def __getitem__(self, batch):
        chosen = self.order[batch * self.batch_size : (batch + 1) * self.batch_size]
        rows, where = np.unique(self.windows[chosen], return_inverse=True)  # shared frames: read once
        return self.source[rows][where.reshape(len(chosen), -1)], self.counts[chosen]

    def on_epoch_end(self, epochs=1):
        self.epoch += epochs
        windows = len(self.windows)
        self.order = np.random.default_rng((SEED, self.epoch)).permutation(windows) if self.shuffle else np.arange(windows)


# == Model =========================================================================================


def load_resnet50():
    """ResNet50 without its top, with WEIGHTS. Returns (model, what its weights are, whether they are random).

    He et al., "Deep residual learning for image recognition", CVPR 2016; keras.applications.
    Raises InputError when WEIGHTS names a file that does not fit.
    """
    def build(weights):
        keras.utils.set_random_seed(SEED)  # the same random weights whatever happened before
        return keras.applications.ResNet50(include_top=False, weights=weights, input_shape=(*FRAME_SIZE, 3))

    if WEIGHTS is None:
        return build(None), "random", True
    if WEIGHTS == "imagenet":
        try:
            return build("imagenet"), "imagenet", False
        except Exception as error:  # Keras raises a bare Exception when the download fails
            print(
                f"Warning: no ImageNet weights ({InputError(error)}); going on with random ones. Download "
                "resnet50_weights_tf_dim_ordering_tf_kernels_notop.h5 elsewhere and set WEIGHTS to its path.",
                file=sys.stderr,
            )
            return build(None), "random (the ImageNet weights could not be downloaded)", True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # Keras only warns of layers that it finds no weights for
            return build(str(at(WEIGHTS))), str(WEIGHTS), False
    except Exception as error:  # h5py and Keras raise many kinds
        raise InputError(f"{at(WEIGHTS)}: no weights of a Keras ResNet50 without its top ({error})") from None


def set_statistics(normalization, mean, deviation):
    """Sets a Normalization layer to known statistics, as adapt() would from data."""
    normalization.set_weights([mean, np.square(deviation), np.zeros(())])
    normalization.finalize_state()


def calibrate(maps, batches):
    """Sets BatchNorm's statistics to those of batches of frames (b, H, W, 3): random weights carry no signal without."""
    for done, batch in enumerate(batches):
        for layer in maps.layers:
            if isinstance(layer, layers.BatchNormalization):
                layer.momentum = done / (done + 1)  # the plain mean over the batches
        maps(keras.applications.resnet50.preprocess_input(batch.astype("float32")), training=True)


def fold_batchnorm(maps):
    """The same maps with each BatchNorm, now constant, folded into the convolution before it: a quarter less time.

    Only a layer *_conv, read on its own, comes out another: normalised. Jacob et al., "Quantization and training of
    neural networks for efficient integer-arithmetic-only inference", CVPR 2018, section 3.2.
    """
    is_batchnorm = lambda layer: isinstance(layer, layers.BatchNormalization)
    skip = lambda layer, x, **options: x if is_batchnorm(layer) else layer(x, **options)
    folded = keras.models.clone_model(maps, call_function=skip)
    for batchnorm in filter(is_batchnorm, maps.layers):
        convolution = batchnorm.name.removesuffix("bn") + "conv"
        kernel, bias = maps.get_layer(convolution).get_weights()
        gamma, beta, mean, variance = batchnorm.get_weights()
        gain = gamma / np.sqrt(variance + batchnorm.epsilon)
        folded.get_layer(convolution).set_weights([kernel * gain, (bias - mean) * gain + beta])
    return folded


def build_backbone(maps, grids):
    """ResNet50 read out: a frame (H, W, 3) uint8 -> features (F,).

    Each output of maps is averaged over its grid, so that features tell where people are, which
    perspective needs. With FOREGROUND it is averaged again with every position weighted by how far
    the finest layer is from its value in the empty scene, so that people are told from furniture;
    that weight, averaged over a grid of its own, is the last view: the share of each cell that is covered.
    """
    frame = keras.Input((*FRAME_SIZE, 3), dtype="uint8", name="frame")
    pixels = keras.applications.resnet50.preprocess_input(ops.cast(frame, "float32"))
    stages = keras.tree.flatten(maps(pixels))  # each (h, w, C)
    views = list(zip(stages, grids))
    if FOREGROUND:
        background = layers.Normalization(axis=(1, 2, 3), name="background")
        square = ops.mean(ops.square(background(stages[0])), axis=-1, keepdims=True)
        distance = ops.sqrt(square + 1e-12)  # a root's gradient at 0 is infinite
        foreground = ops.sigmoid(6.0 * (distance - 0.8))  # (h, w, 1); 0.8 of the usual distance: by blocked validation
        for stage, grid in list(views):
            coarser = layers.AveragePooling2D(2 ** round(np.log2(stages[0].shape[1] / stage.shape[1])), padding="same")
            views.append((stage * coarser(foreground), grid))
        views.append((foreground, FOREGROUND))
    pooled = []
    for view, grid in views:
        cell = [-(-side // cells) for side, cells in zip(view.shape[1:3], grid)]
        pooled.append(layers.Flatten()(layers.AveragePooling2D(cell, padding="same")(view)))
    return keras.Model(frame, layers.Concatenate(name="features")(pooled), name="backbone")


def view_sizes(backbone):
    """How many features each view of the backbone has."""
    return [view.shape[-1] for view in backbone.get_layer("features").input]


def fit_background(backbone, frames, batches):
    """Fits the empty scene to the median of frames (M, H, W, 3), and the usual distance from it to batches of them."""
    resnet, preprocess = backbone.get_layer("resnet50"), keras.applications.resnet50.preprocess_input
    finest = keras.Model(resnet.input, resnet.outputs[0])
    maps = lambda batch: ops.convert_to_numpy(finest(preprocess(batch.astype("float32")), training=False))
    median = np.stack([np.median(row, axis=0) for row in frames.swapaxes(0, 1)])  # by rows: twice as fast as at once
    empty = maps(median[None].astype("uint8"))[0]  # (h, w, C)
    square = [np.square(maps(batch) - empty).mean(axis=(0, 1, 2)) for batch in batches]
    usual = np.sqrt(np.mean(square, axis=0))  # (C,): channels weigh alike in the distance
    set_statistics(backbone.get_layer("background"), empty, np.broadcast_to(np.maximum(usual, usual.mean() / 10), empty.shape))


def prepare_backbone(frames, train):
    """The backbone, fitted to an even sample of the training rows of frames: (backbone, its read-out, what its weights are)."""
    resnet, weights, random_weights = load_resnet50()
    read_out = READ_OUT_RANDOM if random_weights else READ_OUT
    unknown = sorted(set(read_out) - {layer.name for layer in resnet.layers})
    if unknown:
        raise InputError(
            f"READ_OUT{'_RANDOM' * random_weights}: ResNet50 has no layer {first_few(unknown)}; "
            "load_resnet50()[0].summary() lists them"
        )
    maps = keras.Model(resnet.input, [resnet.get_layer(name).output for name in read_out], name="resnet50")
    if FINE_TUNE_EPOCHS and not any(layer.name.startswith(FINE_TUNE_FROM) for layer in maps.layers):
        raise InputError(f"FINE_TUNE_FROM = {FINE_TUNE_FROM!r}: ResNet50 is only read up to {list(read_out)[-1]}; make it conv1")
    sample = frames[train[np.unique(np.linspace(0, len(train) - 1, CALIBRATION_FRAMES).astype(int))]]  # (M, H, W, 3)
    batches = np.array_split(sample, -(-len(sample) // 4))
    batches = batches[:: -(-len(batches) // 4)]  # some 16 frames tell what is usual
    if random_weights:
        calibrate(maps, batches)
    backbone = build_backbone(fold_batchnorm(maps), read_out.values())
    if FOREGROUND:
        fit_background(backbone, sample, batches)
    return backbone, read_out, weights


def ridge(features, target, mean, scale, penalty):
    """Ridge regression of a centred target (M,) on features (M, F) standardised by mean and scale (F,): weights (F,).

    lsmr (Fong & Saunders, SIAM J. Sci. Comput. 2011) only asks for products with the features: they stay on
    the disk, however many.
    """
    mean, scale = mean.astype("float32"), scale.astype("float32")

    def forward(weights):
        weights = weights.ravel().astype("float32") / scale
        return (features @ weights - mean @ weights).astype("float64")

    def backward(errors):
        errors = errors.ravel().astype("float32")
        return ((errors @ features - errors.sum() * mean) / scale).astype("float64")

    operator = scipy.sparse.linalg.LinearOperator(features.shape, forward, backward, dtype="float64")
    return scipy.sparse.linalg.lsmr(operator, target, np.sqrt(penalty * len(target)))[0]


def choose_penalty(features, counts, scale):
    """The one of PENALTIES that does best on blocks of 40 of the frames, left out in 5 turns.

    Blocks, because neighbours of a frame show the same people. All fits come from one matrix of inner products
    (Saunders et al., "Ridge regression learning algorithm in dual variables", ICML 1998), of 4,000 frames at most.
    """
    step = -(-len(counts) // 4000)
    features, counts = features[::step], counts[::step]
    n = len(counts)
    products = np.zeros((n, n))
    for part in np.array_split(np.arange(len(scale)), -(-len(scale) // 4096)):
        scaled = features[:, part] / scale[part].astype("float32")
        scaled -= scaled.mean(axis=0)
        products += scaled @ scaled.T
    blocks = np.arange(n) // max(min(40, n // 5), 1) % 5
    errors = dict.fromkeys(PENALTIES, 0.0)
    for block in np.unique(blocks) if n > 1 else ():
        used, left_out = blocks != block, blocks == block
        centred = products[:, used] - products[used][:, used].mean(axis=0)  # each fold has an intercept of its own
        centred -= centred.mean(axis=1, keepdims=True)
        level, identity = counts[used].mean(), np.eye(used.sum())
        for penalty in errors:
            dual = scipy.linalg.solve(centred[used] + penalty * used.sum() * identity, counts[used] - level, assume_a="pos")
            errors[penalty] += np.square(centred[left_out] @ dual + level - counts[left_out]).sum()
    return min(errors, key=errors.get)


def build_readout(features, counts, views):
    """Read-out: features (F,) -> an estimate of the count (1,), in standard deviations from the mean training count.

    Ridge regression on the features (M, F) and counts (M,) of the training frames.
    views: how many features each view of the backbone has; all views weigh alike, few features or many.
    """
    scaler, n = StandardScaler(), len(counts)
    for start in range(0, n, 256):
        scaler.partial_fit(features[start : start + 256])
    sizes = np.repeat(views, views)  # for each feature, how many its view has
    scale = scaler.scale_ * np.sqrt(sizes * len(views))  # a view's features have a variance of 1 / len(views) together
    target = (counts - counts.mean()) / max(counts.std(), 1.0)
    penalty = choose_penalty(features, target, scale)
    print(f"Ridge regression of the counts on the features, penalty {penalty:g}.")
    weights = ridge(features, target, scaler.mean_, scale, penalty)
    frame = keras.Input((features.shape[1],), name="features")
    scaling, dense = layers.Normalization(name="feature_scaling"), layers.Dense(1, use_bias=False, name="estimate")
    readout = keras.Model(frame, dense(scaling(frame)), name="read_out")
    set_statistics(scaling, scaler.mean_, scale)
    dense.set_weights([weights[:, None]])
    return readout


def build_head(counts):
    """Head: a window of estimates (T, 1) -> the count of its last frame (1,), in people, never negative.

    The LSTM corrects the last frame's estimate by what those before it say. Estimates of training frames are
    closer to the truth than those of new frames will be; noise keeps it from taking them at their word.
    counts: (M,) of the training frames, whose mean and deviation scale the output.
    """
    estimates = keras.Input((SEQUENCE_LENGTH, 1), name="estimates")
    x = layers.GaussianNoise(ESTIMATE_NOISE)(estimates)
    memory = layers.LSTM(LSTM_UNITS, unroll=True, name="lstm")(x)  # (LSTM_UNITS,)
    correction = layers.Dense(1, use_bias=False, kernel_initializer="zeros", name="dense")(memory)
    x = layers.Add()([x[:, -1], correction])
    x = layers.Rescaling(max(float(counts.std()), 1.0), float(counts.mean()), name="target_scaling")(x)
    return keras.Model(estimates, layers.ReLU(name="count")(x), name="head")


def build_model(backbone, readout, head):
    """The whole network: windows of frames (T, H, W, 3) uint8 -> counts (1,)."""
    per_frame = keras.Model(backbone.input, readout(backbone.output), name="resnet50_read_out")
    per_frame.trainable = False
    windows = keras.Input((SEQUENCE_LENGTH, *FRAME_SIZE, 3), dtype="uint8", name="frames")
    estimates = layers.TimeDistributed(per_frame, name="time_distributed_resnet50")(windows)
    return keras.Model(windows, head(estimates), name="ts_crowdnet")


def split_model(model):
    """Both parts of the network: a frame (H, W, 3) -> its estimate (1,), and the head: estimates (T, 1) -> count (1,)."""
    return model.get_layer("time_distributed_resnet50").layer, model.get_layer("head")


# == Training ======================================================================================


def predict_each(model, source, first=0):
    """Yields the model's outputs for the rows of source from first on, FRAME_BATCH rows at a time.

    The next rows are decoded meanwhile. The last batch is filled up by repetition: one shape, one traced graph.
    """
    progress = keras.utils.Progbar(len(source), unit_name="frame", interval=0.1 if sys.stdout.isatty() else 20)
    with ThreadPoolExecutor(1) as decoder:
        read = lambda start: decoder.submit(source.__getitem__, slice(start, start + FRAME_BATCH))
        coming = read(first)
        for start in range(first, len(source), FRAME_BATCH):
            batch, coming = coming.result(), read(start + FRAME_BATCH)  # the last, empty, is never asked for
            full = np.resize(batch, (FRAME_BATCH, *batch.shape[1:]))
            yield ops.convert_to_numpy(model.predict_on_batch(full))[: len(batch)]
            progress.update(start + len(batch))


def store(path, dtype, shape, batches):
    """Writes the rows that batches(first) yields, from row first on, to a file: memory-mapped array of that shape.

    They are appended to a .part file, renamed when complete, so that interrupted work goes on with the batch it was at.
    """
    if not path.exists():
        part, row_bytes = path.with_suffix(".part"), int(np.prod(shape[1:])) * np.dtype(dtype).itemsize
        with part.open("ab") as file:
            done = file.tell() // (FRAME_BATCH * row_bytes) * FRAME_BATCH  # whole batches
            file.truncate(done * row_bytes)
            for rows in batches(done):
                file.write(rows.tobytes())
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    return np.memmap(path, dtype, "r", shape=shape)


def extract_features(backbone, frames, path):
    """Runs each frame through the backbone once: memory-mapped features (N, F) float32."""
    width = backbone.output_shape[-1]

    def extract(done):
        print(f"Extracting {width} features from each of {len(frames)} frames" + f", from frame {done}" * (done > 0))
        return predict_each(backbone, frames, done)

    return store(path, "float32", (len(frames), width), extract)


def store_frames(frames, path):
    """Decodes each frame once: memory-mapped frames (N, H, W, 3) uint8."""
    decode = lambda done: (frames[start : start + FRAME_BATCH] for start in range(done, len(frames), FRAME_BATCH))
    return store(path, "uint8", (len(frames), *FRAME_SIZE, 3), decode)


class Checkpoint(keras.callbacks.Callback):
    """Keeps all that training has changed by the end of an epoch: weights, noise generators, optimizer, schedule, history.

    NumPy's archive instead of Keras's HDF5: on a full disk HDF5 may fail without an exception.
    """

    def __init__(self, path):
        super().__init__()
        self.path, self.history = path, []

    def variables(self):
        return [*self.model.variables, *self.model.optimizer.variables]

    def load(self):
        with np.load(self.path, allow_pickle=False) as state:
            self.history = json.loads(str(state["history"]))
            for number, variable in enumerate(self.variables()):
                variable.assign(state[f"arr_{number}"])

    def on_epoch_end(self, epoch, logs=None):
        self.history.append({"epoch": epoch, **logs})
        state = [ops.convert_to_numpy(variable) for variable in self.variables()]
        publish(self.path.parent, {self.path.name: lambda path: np.savez(path, *state, history=json.dumps(self.history))})


def train(model, training, validation, path, epochs, learning_rate, warmup=0.0):
    """Trains for that many epochs, going on from the checkpoint at path; returns the history table.

    Validation frames are watched, never used: no early stopping, no best epoch, a fixed schedule.
    warmup: share of the steps over which the learning rate rises from 0; then it falls to 0 along a half cosine.
    """
    steps = epochs * len(training)
    rise = int(warmup * steps)
    start, target = (0.0, learning_rate) if rise else (learning_rate, None)
    schedule = keras.optimizers.schedules.CosineDecay(start, steps - rise, warmup_target=target, warmup_steps=rise)
    optimizer = keras.optimizers.Adam(schedule)
    model.compile(optimizer, loss="mse", metrics=["mae"])  # Keras leaves XLA out on a CPU, where it is 10 x slower
    optimizer.build(model.trainable_variables)
    checkpoint = Checkpoint(path)
    if path.exists():
        checkpoint.set_model(model)
        checkpoint.load()
        training.on_epoch_end(epochs=len(checkpoint.history))
        print(f"Going on after epoch {len(checkpoint.history)} of {epochs}.")
    model.fit(
        training,
        validation_data=validation,
        epochs=epochs,
        initial_epoch=len(checkpoint.history),
        callbacks=[checkpoint],
        shuffle=False,  # the Sequence shuffles; Keras would deal its batches by a state that no resumed run has
        verbose=1 if sys.stdout.isatty() else 2,
    )
    return pd.DataFrame(checkpoint.history)


def make_runs(ids, counts, rows, batch):
    """Runs of RUN_LENGTH consecutive windows: row numbers of their frames (M, RUN_LENGTH + T - 1), counts (M, RUN_LENGTH).

    A run is a longer window, with a count for each of its last frames. Each of rows is the last frame of a window in
    some run; where gaps or the end of rows leave less than a run it reaches back to windows that others have too,
    before the first of rows if need be. M is a multiple of batch: every device needs its share.
    """
    unbroken = np.split(rows, np.flatnonzero(np.diff(ids[rows]) != 1) + 1)
    # For rows 0 to 18 and runs of 8, the last frames are 7, 15 and 18.
    ends = np.unique(np.concatenate([np.append(part[RUN_LENGTH - 1 :: RUN_LENGTH], part[-1]) for part in unbroken]))
    ends = np.resize(ends, -(-len(ends) // batch) * batch)  # filled up by repetition
    targets = counts[make_windows(ids, RUN_LENGTH)[ends]]
    return make_windows(ids, RUN_LENGTH + SEQUENCE_LENGTH - 1)[ends], targets


def build_run_model(model):
    """The layers of model over runs (RUN_LENGTH + T - 1, H, W, 3) -> counts (RUN_LENGTH,): each frame passes ResNet50 once."""
    per_frame, head = split_model(model)
    runs = keras.Input((RUN_LENGTH + SEQUENCE_LENGTH - 1, *FRAME_SIZE, 3), dtype="uint8", name="runs")
    estimates = per_frame(ops.reshape(runs, (-1, *FRAME_SIZE, 3)))  # (batch * frames, 1)
    estimates = ops.reshape(estimates, (-1, runs.shape[1], 1))
    windows = ops.stack([estimates[:, start : start + SEQUENCE_LENGTH] for start in range(RUN_LENGTH)], axis=1)
    counts = head(ops.reshape(windows, (-1, SEQUENCE_LENGTH, 1)))  # (batch * RUN_LENGTH, 1)
    return keras.Model(runs, ops.reshape(counts, (-1, RUN_LENGTH)), name="runs")


def data_parallel(devices):
    """The scope in which Keras deals every batch out to these devices."""
    if len(devices) < 2:
        return contextlib.nullcontext()
    if keras.backend.backend() == "tensorflow":  # which keras.distribution does not know yet
        import tensorflow as tf

        return tf.distribute.MirroredStrategy(devices).scope()
    return keras.distribution.DataParallel(devices=devices).scope()


def fine_tune(model, frames, ids, counts, split, path):
    """Trains the whole network on runs of frames (N, H, W, 3) uint8, on all devices; returns the history table.

    A copy is trained: its variables must be made inside the devices' scope, and the saved model stays float32.
    """
    devices = [] if keras.backend.backend() == "torch" else keras.distribution.list_devices()  # PyTorch: one, its own choice
    batch = RUN_BATCH * max(len(devices), 1)
    training = WindowSequence(frames, *make_runs(ids, counts, np.arange(split), batch), batch, shuffle=True)
    validation = WindowSequence(frames, *make_runs(ids, counts, np.arange(split, len(ids)), batch), batch)

    per_frame, _ = split_model(model)
    step = frames[: RUN_BATCH * training.windows.shape[1]]
    per_frame.predict_on_batch(step)  # traced, so that the next call tells the time
    start = time.perf_counter()
    per_frame.predict_on_batch(step)
    passes = 3 * len(training) + len(validation)  # the way back costs twice the way there
    print(f"Fine-tuning from {FINE_TUNE_FROM}: some {passes * (time.perf_counter() - start) / 60:.1f} minutes an epoch.")

    keras.utils.set_random_seed(SEED)
    with data_parallel(devices):
        tuned = deepcopy(model)
        per_frame, _ = split_model(tuned)
        per_frame.trainable = True
        for layer in per_frame.get_layer("resnet50").layers:
            layer.trainable = layer.name >= FINE_TUNE_FROM  # conv1_conv, conv2_block1_1_conv, ...: in the order of their names
            layer.dtype_policy = FINE_TUNE_DTYPE if "gpu" in "".join(devices) else "float32"
        path = Path(f"{path}-{fingerprint(batch)}.npz")
        history = train(build_run_model(tuned), training, validation, path, FINE_TUNE_EPOCHS, FINE_TUNE_RATE, warmup=0.1)
    model.set_weights(tuned.get_weights())
    return history


# == Evaluation ====================================================================================


def accurate(true, predicted):
    """Which counts are within TOLERANCE of the truth; a true 0 asks for a prediction that rounds to 0."""
    return np.where(true == 0, np.round(predicted) == 0, np.abs(predicted - true) <= TOLERANCE * true)


def measure(true, predicted):
    """Metrics of counts (M,) in people: mae, mse, rmse, accuracy (share) and pearson_r (None if undefined)."""
    mse = mean_squared_error(true, predicted)
    varied = len(true) > 1 and np.ptp(true) > 0 and np.ptp(predicted) > 0
    return {
        "mae": float(mean_absolute_error(true, predicted)),
        "mse": float(mse),
        "rmse": float(np.sqrt(mse)),
        "accuracy": float(accurate(true, predicted).mean()),
        "pearson_r": float(scipy.stats.pearsonr(true, predicted).statistic) if varied else None,
    }


def summarise(metrics, baseline):
    """The closing table: each metric, its meaning, and what always predicting the training mean scores."""
    rows = [
        ("Mean Absolute Error (MAE)", "mae", ".3f", "people off, on average"),
        ("Mean Squared Error (MSE)", "mse", ".3f", "people squared; big misses weigh more"),
        ("Root of the MSE (RMSE)", "rmse", ".3f", "people; the usual size of a miss"),
        (f"Accuracy within {TOLERANCE:.0%}", "accuracy", ".2%", "of counts that close to the truth"),
        ("Pearson r", "pearson_r", ".3f", "1: counts rise and fall with the truth"),
    ]
    print(f"{'':27}{'this model':>12}{'mean count':>12}")
    for title, name, form, meaning in rows:
        values = ["undefined" if scores[name] is None else format(scores[name], form) for scores in (metrics, baseline)]
        print("{:27}{:>12}{:>12}   {}".format(title, *values, meaning))


# == Figures and report ============================================================================


def draw_loss(history):
    """Training loss, with noise, and validation loss, without, over the epochs, those of fine-tuning set apart."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    curves = history.rename(columns={"loss": "training", "val_loss": "validation"})
    curves = curves.assign(epoch=curves["epoch"] + 1).melt("epoch", ["training", "validation"], "frames", "loss")
    sns.lineplot(curves, x="epoch", y="loss", hue="frames", style="frames", ax=axes)
    if len(history) > EPOCHS:
        axes.axvline(EPOCHS + 0.5, color="0.5", linestyle="--", linewidth=1)
    axes.set(yscale="log", xlabel="Epoch", ylabel="Mean squared error (people²)")
    return figure


def draw_predictions(table, metrics):
    """Predicted against true counts of the validation frames, with the identity line and the band."""
    figure, axes = plt.subplots(figsize=(5, 5), layout="constrained")
    low, high = min(table["true"].min(), table["predicted"].min()) - 2, max(table["true"].max(), table["predicted"].max()) + 2
    line = np.array([max(low, 0), high])
    axes.fill_between(line, line * (1 - TOLERANCE), line * (1 + TOLERANCE), color="0.92", label=f"within {TOLERANCE:.0%}")
    axes.plot(line, line, color="0.4", linewidth=1, label="exact")
    sns.scatterplot(table, x="true", y="predicted", s=18, alpha=0.6, ax=axes, legend=False)
    r = metrics["pearson_r"]
    text = f"MAE {metrics['mae']:.2f}\nMSE {metrics['mse']:.2f}\nRMSE {metrics['rmse']:.2f}\nwithin {TOLERANCE:.0%}: {metrics['accuracy']:.1%}"
    axes.text(0.03, 0.97, text + (f"\nr {r:.3f}" if r is not None else ""), va="top", transform=axes.transAxes)
    axes.set(xlim=line, ylim=line, aspect="equal", xlabel="True count (people)", ylabel="Predicted count (people)")
    axes.legend(loc="lower right")
    return figure


def draw_timeline(table, split_id):
    """True and predicted counts over all frames, with the split."""
    figure, axes = plt.subplots(figsize=(9, 3.2), layout="constrained")
    axes.plot(table["id"], table["true"], color="0.35", linewidth=1, label="true")
    for split, part in table.groupby("split", sort=False):
        axes.plot(part["id"], part["predicted"], linewidth=1, label={"train": "fitted", "validation": "predicted"}[split])
    axes.axvline(split_id - 0.5, color="0.5", linestyle="--", linewidth=1)
    axes.set(xlabel="Frame", ylabel="People", xlim=(table["id"].min(), table["id"].max()))
    axes.legend(ncols=3, loc="upper left")
    return figure


def draw_examples(table, paths):
    """The best, the median and the worst predicted validation frame, with their counts."""
    ranked = table.assign(error=(table["predicted"] - table["true"]).abs()).sort_values("error")
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    for ax, name, place in zip(axes, ("best", "median", "worst"), (0, len(ranked) // 2, -1)):
        row = ranked.iloc[place]
        with Image.open(paths[row.name]) as image:
            ax.imshow(ImageOps.exif_transpose(image).convert("RGB"))
        ax.set_title(f"{name}: frame {row['id']}, true {row['true']:.0f}, predicted {row['predicted']:.1f}", fontsize="small")
        ax.axis("off")
    return figure


def save_results(outputs, model, history, table, paths, weights, phases):
    """Metrics of the validation frames, the figures, the model: all files at once, then the summary.

    table: a row for each frame, in order, with columns id, split, true and predicted.
    weights: what ResNet50's weights are. phases: {phase: when it ended}, from time.perf_counter.
    """
    trained_on, held_out = table[table["split"] == "train"], table[table["split"] == "validation"]
    metrics = measure(held_out["true"], held_out["predicted"])
    baseline = measure(held_out["true"], np.full(len(held_out), trained_on["true"].mean()))
    figures = {
        "loss.png": draw_loss(history),
        "predictions.png": draw_predictions(held_out, metrics),
        "timeline.png": draw_timeline(table, held_out["id"].iloc[0]),
        "examples.png": draw_examples(held_out, paths),
    }
    phases["evaluate"] = time.perf_counter()
    report = metrics | {
        "baseline_mae": baseline["mae"],
        "frames": len(table),
        "train_frames": len(trained_on),
        "validation_frames": len(held_out),
        "weights": weights,
        "seconds": dict(zip(phases, np.diff([START, *phases.values()]).round(2))),
        "constants": {name: value for name, value in globals().items() if name.isupper() and name not in ("START", "ROOT")},
        "versions": {"python": platform.python_version()} | {m.__name__: m.__version__ for m in (keras, np, pd, sklearn)},
    }
    results = {
        "ts_crowdnet.keras": model.save,
        "history.csv": lambda path: history.to_csv(path, index=False),
        "predictions.csv": lambda path: table.to_csv(path, index=False, float_format="%.6f"),
        "metrics.json": lambda path: path.write_text(json.dumps(report, indent=2, default=str) + "\n"),
    }
    for name, figure in figures.items():
        first, last = held_out["id"].iloc[[0, -1]]
        figure.suptitle(f"ResNet50 weights: {weights}\nvalidation frames {first}-{last}", fontsize="small")
        results[name] = figure.savefig
    publish(outputs, results)
    drop_files(outputs, "checkpoint")
    for path in outputs.glob(".new-*"):  # of runs that were killed
        path.unlink()
    summarise(metrics, baseline)
    print(f"Results: {outputs}")


def count_people(model, frames):
    """Counts the people in new frames of the camera that a model was trained on.

    model: path of a ts_crowdnet.keras, or the loaded model.
    frames: a folder of images, taken in the order of their names, or a list of paths in order of time.
    Returns a Series of counts indexed by file name. Each frame passes the backbone once; of those
    before, only their estimates stay in memory.
    """
    if isinstance(model, (str, Path)):
        try:
            model = keras.saving.load_model(model, compile=False)
        except Exception as error:  # zipfile, h5py and Keras raise many kinds
            raise InputError(f"{model}: no model written by this script ({error}); train one first") from None
    per_frame, head = split_model(model)
    length, height, width = model.input_shape[1:4]
    if isinstance(frames, (str, Path)):
        suffixes = set(Image.registered_extensions())
        frames = sorted(path for path in Path(frames).iterdir() if path.suffix.lower() in suffixes)
    paths = np.array([Path(path) for path in frames])
    if not len(paths):
        raise InputError("no images to count")
    estimates = np.concatenate(list(predict_each(per_frame, Frames(paths, (height, width)))))  # (N, 1)
    windows = estimates[make_windows(np.arange(len(paths)), length)]  # (N, T, 1)
    counts = head.predict(windows, batch_size=BATCH_SIZE, verbose=0)[:, 0]
    return pd.Series(counts, pd.Index([path.name for path in paths], name="frame"), name="count")


def count_folder():
    """The COUNT mode: counts.csv and counts.png in OUTPUTS from the model there."""
    model, folder, outputs = at(OUTPUTS) / "ts_crowdnet.keras", at(COUNT), at(OUTPUTS)
    if not model.is_file():
        raise InputError(f"{model}: no such model; train one first (COUNT = None)")
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; set COUNT to a folder of frames")
    with only_run(outputs):
        counts = count_people(model, folder)
        figure, axes = plt.subplots(figsize=(9, 3.2), layout="constrained")
        axes.plot(np.arange(1, len(counts) + 1), counts.to_numpy(), linewidth=1)
        axes.set(xlabel="Frame", ylabel="Predicted count (people)")
        publish(outputs, {"counts.csv": lambda path: counts.to_csv(path, float_format="%.3f"), "counts.png": figure.savefig})
    print(f"{counts.mean():.1f} people a frame on average, {counts.max():.1f} at most: {outputs / 'counts.csv'}")


# == Main ==========================================================================================


def main():
    """Labels -> frames -> features -> estimates -> counts -> figures and numbers."""
    check_constants()
    sns.set_theme(context="paper", style="ticks", rc={"savefig.dpi": 150})
    if COUNT is not None:
        return count_folder()
    phases = {"import": time.perf_counter()}  # when each phase ended

    labels = read_labels(at(LABELS))
    ids, counts, split = labels.index.to_numpy(), labels.to_numpy(), round(len(labels) * TRAIN_FRACTION)
    if not 0 < split < len(labels) or len(labels) < SEQUENCE_LENGTH:
        raise InputError(
            f"{at(LABELS)}: {len(labels)} frames are too few for TRAIN_FRACTION = {TRAIN_FRACTION} and "
            f"SEQUENCE_LENGTH = {SEQUENCE_LENGTH}; add frames or change these"
        )
    paths, digest = find_frames(ids)
    print(f"{len(labels)} frames: the first {split} train, the last {len(labels) - split} validate.")
    with Image.open(paths[0]) as image:
        if image.info.get("comment") == b"synthetic mall sample":
            print("They are the rendered sample, no real people: the README says how to put Mall in its place.")
    frames = Frames(paths, FRAME_SIZE)
    phases["check frames"] = time.perf_counter()

    outputs = at(OUTPUTS)
    with only_run(outputs):
        backbone, read_out, weights = prepare_backbone(frames, np.arange(split))
        phases["fit backbone"] = time.perf_counter()

        depends_on = (digest, FRAME_SIZE, FRAME_BATCH, FOREGROUND, read_out, inspect.getsource(build_backbone))
        cache = f"features-{fingerprint(*depends_on, *backbone.get_weights())}"
        drop_files(outputs, "features", cache)
        features = extract_features(backbone, frames, outputs / f"{cache}.float32")  # (N, F)
        phases["extract features"] = time.perf_counter()

        readout = build_readout(features[:split], counts[:split], view_sizes(backbone))
        parts = np.array_split(features, -(-len(features) // 256))  # few at a time: they stay on the disk
        estimates = np.concatenate([ops.convert_to_numpy(readout(part)) for part in parts])  # (N, 1)
        phases["fit read-out"] = time.perf_counter()

        keras.utils.set_random_seed(SEED)
        head = build_head(counts[:split])
        model = build_model(backbone, readout, head)
        source, trained = (estimates, head) if CACHE_FEATURES else (frames, model)
        windows, targets = make_windows(ids, SEQUENCE_LENGTH), counts[:, None]  # (N, T), (N, 1)
        training = WindowSequence(source, windows[:split], targets[:split], BATCH_SIZE, shuffle=True)
        validation = WindowSequence(source, windows[split:], targets[split:], BATCH_SIZE)
        settings = (ESTIMATE_NOISE, LSTM_UNITS, BATCH_SIZE, EPOCHS, LEARNING_RATE, SEED, CACHE_FEATURES)
        name = f"checkpoint-{fingerprint(cache, counts, estimates, windows, split, *settings)}"
        if drop_files(outputs, "checkpoint", name):
            print("The unfinished run here had other constants or labels: training starts afresh.")
        history = train(trained, training, validation, outputs / f"{name}.npz", EPOCHS, LEARNING_RATE)
        phases["train"] = time.perf_counter()

        pixels = f"frames-{fingerprint(digest, FRAME_SIZE)}"
        drop_files(outputs, "frames", pixels if FINE_TUNE_EPOCHS else ())
        if FINE_TUNE_EPOCHS:
            stored = store_frames(frames, outputs / f"{pixels}.uint8")  # (N, H, W, 3)
            settings = (FINE_TUNE_EPOCHS, FINE_TUNE_FROM, FINE_TUNE_RATE, RUN_LENGTH, RUN_BATCH, FINE_TUNE_DTYPE)
            tuned = fine_tune(model, stored, ids, counts, split, outputs / f"{name}-{fingerprint(*settings)}")
            history = pd.concat([history, tuned.assign(epoch=tuned["epoch"] + EPOCHS)])
            weights += f", fine-tuned from {FINE_TUNE_FROM}"
            estimates = np.concatenate(list(predict_each(split_model(model)[0], stored)))
            phases["fine-tune"] = time.perf_counter()

        predicted = head.predict(estimates[windows], batch_size=BATCH_SIZE, verbose=0)[:, 0]
        part = np.where(np.arange(len(ids)) < split, "train", "validation")
        table = pd.DataFrame({"id": ids, "split": part, "true": counts.astype(int), "predicted": predicted})
        save_results(outputs, model, history, table, paths, weights, phases)
    if plt.get_backend().lower() != "agg":  # a screen
        plt.show()
    plt.close("all")


def run_as_script():
    """main(), with one line instead of a traceback for what the user can put right."""

    def interrupt(*_):  # no exception, which libraries would catch or report: every file is whole at every moment
        os.write(2, b"\nInterrupted: run the same command again to go on from here.\n")
        os._exit(130)

    signal.signal(signal.SIGINT, interrupt)
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    try:
        main()
    except InputError as error:
        sys.exit(f"Error: {error}")
    except OSError as error:
        sys.exit(f"Error: {error.filename or at(OUTPUTS)}: {error.strerror or error}; free space or correct the path, then run again")


if __name__ == "__main__":
    run_as_script()
