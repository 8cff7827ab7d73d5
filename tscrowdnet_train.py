"""TS-CrowdNet: count the people in a fixed-camera video with TimeDistributed ResNet50 + LSTM.

    pip install -r requirements.txt && python tscrowdnet_train.py

Reads    labels.csv                        id,count: the people that each frame shows
         frames/frames/seq_000001.jpg ...  the frames of one fixed camera
Writes   outputs/ts_crowdnet.keras         the model: windows of uint8 frames in, counts out
         outputs/metrics.json, predictions.csv, history.csv; figures as .png and .pdf

N labelled frames, of which the first n_train train, with C jittered copies of some; T =
SEQUENCE_LENGTH frames in a window; H x W = FRAME_SIZE; F numbers in a feature vector:

    a window (T, H, W, 3) uint8
    1. spatial     TimeDistributed(frozen ResNet50)         -> feature vectors (T, F)
    2. temporal    the same Dense for each vector, an LSTM  -> memory (LSTM_UNITS,)
    3. regression  Dense(relu), Dense(1)                    -> people in the last frame (1,)

Stage 1 does not learn: it reads the N + C images once. WindowSequence feeds windows of their
feature vectors, as K coordinates (BATCH_SIZE, T, K), to stages 2 and 3, which train.
"""

import faulthandler
import hashlib
import json
import math
import os
import re
import signal
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from textwrap import shorten

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends without a traceback
    stderr = os.dup(2)
    faulthandler.enable(stderr)  # crashes are told, TensorFlow's greeting is not
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
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
    from PIL import Image, ImageEnhance, ImageOps  # Pillow comes with matplotlib
    from sklearn.preprocessing import StandardScaler
finally:
    if __name__ == "__main__":
        os.dup2(stderr, 2)

ROOT = Path(__file__).resolve().parent

# -- Data: relative paths start at this script's folder
LABELS = "labels.csv"  # a CSV with columns id,count, or the official "mall_gt.mat"
FRAMES = "frames/frames"  # folder of seq_000001.jpg, ...: one fixed camera
OUTPUTS = "outputs"  # a folder for each experiment
SEQUENCE_LENGTH = 5  # frames in a window; more for a high frame rate
FRAME_SIZE = (300, 400)  # (height, width) fed to ResNet50; larger if people are small
TRAIN_FRACTION = 0.8  # first part of the video; 0.4 for Mall's canonical split

# -- Spatial stage: frozen ResNet50
WEIGHTS = "imagenet"  # or the path of a ResNet50 weight file (no top), or None: random
# Layers to read, and the grid (rows, columns) over which each is summarised.
FEATURE_LAYERS = {"conv2_block3_out": (3, 2), "conv3_block4_out": (3, 2),
                  "conv4_block6_out": (1, 1), "conv5_block3_out": (1, 1)}
# Read if the weights are random: their deeper layers only add noise.
FEATURE_LAYERS_RANDOM = {"conv1_relu": (3, 2), "conv2_block1_out": (3, 2),
                         "conv2_block3_out": (3, 2)}
FEATURE_SPREAD = True  # each cell's standard deviation, too; False: its mean alone
AUGMENT = 0.25  # share of training frames with a copy in other light, the camera nudged
PRECISION = "auto"  # or "float32", "mixed_bfloat16", which is faster on CPUs made for it
FRAME_BATCH = 8  # frames ResNet50 sees at once; fewer if memory runs out

# -- Temporal stage: projection and LSTM
PROJECTION = 32  # numbers of each feature vector that the LSTM sees; 0: all
LSTM_UNITS = 64  # more for longer windows
LSTM_DROPOUT = 0.0  # share of the LSTM's inputs dropped in training
FORGET_BIAS = -2.0  # higher: earlier frames weigh more from the start (Keras: 1)

# -- Regression stage and training
DENSE_UNITS = 64  # of the layer between the LSTM and the count
BATCH_SIZE = 32  # windows in a step
EPOCHS = 50  # fewer for a quick look
# SGD learns first what many frames share, last what is peculiar to one.
OPTIMIZER = {"class_name": "sgd",
             "config": {"momentum": 0.9, "nesterov": True, "clipnorm": 1.0}}
LEARNING_RATE = 0.03  # falls to 0 along a half cosine; 1e-3 for "adam"
SEED = 0  # publish mean and standard deviation over several

# -- Evaluation and use
TOLERANCE = 0.20  # counts within this share of the truth are accurate
COUNT = None  # a folder of new frames to count with the model in OUTPUTS, not to train
UNFAMILIAR = 1.05  # mark frames of feature vectors above this x the longest trained on

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
SAMPLE_LABELS = "78609c47c0093b7d9b7a8d3baa543fd5"  # MD5 of the shipped labels.csv


class InputError(ValueError):
    """A mistake that the user can correct; the message says how."""


def at(path):
    """A path from the constants, relative to this script's folder unless absolute."""
    if not isinstance(path, (str, Path)):
        raise InputError(f"{path!r}: make it a path, in quotes")
    return ROOT / Path(path).expanduser()


def choose_precision():
    """PRECISION; if "auto", bfloat16 where the CPU has units for it: twice the speed."""
    if PRECISION != "auto":
        return PRECISION
    processor = Path("/proc/cpuinfo")
    flags = processor.read_text() if processor.exists() else ""
    has_units = re.search("avx512_bf16|amx_bf16", flags)
    return "mixed_bfloat16" if has_units else "float32"


def check_constants():
    """Raises InputError for constants that would fail late or obscurely."""
    limits = {  # (lowest, highest): names; two ints allow ints alone
        (1, 1000): ["SEQUENCE_LENGTH", "FRAME_BATCH"],
        (1, 10**6): ["LSTM_UNITS", "DENSE_UNITS", "BATCH_SIZE", "EPOCHS"],
        (0, 10**6): ["PROJECTION", "SEED"],
        (0.0, 1.0): ["AUGMENT", "TOLERANCE"],
        (0.0, 0.99): ["TRAIN_FRACTION", "LSTM_DROPOUT"],
        (0.0, 99.0): ["LEARNING_RATE", "UNFAMILIAR"],
        (-99.0, 99.0): ["FORGET_BIAS"],
    }
    for (low, high), names in limits.items():
        for name in names:
            value, kind = globals()[name], type(low)
            if not (isinstance(value, (int, kind)) and low <= value <= high):
                raise InputError(f"{name} = {value!r}: make it {kind.__name__}, {low} to {high}")
    size = np.array(FRAME_SIZE)
    if size.shape != (2,) or size.dtype.kind != "i" or size.min() < 32:
        raise InputError(f"{FRAME_SIZE = }: make it (height, width), ints from 32")
    if choose_precision() not in ("float32", "mixed_bfloat16"):
        raise InputError(f"{PRECISION = }: make it auto, float32 or mixed_bfloat16")
    try:
        keras.optimizers.get(OPTIMIZER).learning_rate = LEARNING_RATE
    except Exception as error:  # of many kinds
        raise InputError(f"{OPTIMIZER = }: {error}") from None


# == Files in OUTPUTS: whole or absent ========
def write_files(folder, writers):
    """Writes files {name: write(path)} elsewhere, then moves them into folder."""
    with tempfile.TemporaryDirectory(prefix=".new-", dir=folder) as new:
        for name, write in writers.items():
            write(Path(new, name))
        for name in writers:
            os.replace(Path(new, name), folder / name)


def open_cache(folder, key, files, shape):
    """The array on disk, float32, for this key and these files; NaN where nothing is
    computed yet. Those of other keys in folder go."""
    states = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    digest = hashlib.md5(repr((key, shape, states)).encode()).hexdigest()
    path = folder / f"cache_{digest}.npy"
    try:
        np.load(path, mmap_mode="r")  # "r+" would fill up a cut file with zeros
    except (OSError, EOFError, ValueError):  # not there yet, or damaged
        folder.mkdir(parents=True, exist_ok=True)
        for other in folder.glob("cache_*.npy"):
            other.unlink()
        empty = np.full(shape, np.nan, "float32")
        write_files(folder, {path.name: lambda new: np.save(new, empty)})
    return np.load(path, mmap_mode="r+")


def fill_rows(array, compute):
    """Fills the rows of array that are NaN by compute(rows), some at a time, so that an
    interrupted run goes on where it was. Returns a copy in memory."""
    bar = keras.utils.Progbar(len(array), unit_name="frame", verbose=len(array) > 64)
    step = 8 * FRAME_BATCH
    for rows in np.split(np.arange(len(array)), range(step, len(array), step)):
        if np.isnan(array[rows]).any():
            array[rows] = compute(rows)
        bar.add(len(rows))
    return np.array(array)


# == Data ========
def read_labels(path):
    """Reads counts from a CSV with columns id and count, or from Mall's mall_gt.mat. Returns
    a float Series indexed by frame id, ascending. Raises InputError."""
    try:
        if path.suffix.lower() == ".mat":
            counts = scipy.io.loadmat(str(path), variable_names=["count"])["count"].ravel()
            table = pd.DataFrame({"id": range(1, len(counts) + 1), "count": counts}, dtype=str)
            table.index += 1
        else:
            options = {"encoding": "utf-8-sig", "encoding_errors": "replace"}
            options |= {"sep": None, "engine": "python"}  # whatever separates
            table = pd.read_csv(path, dtype=str, header=None, skip_blank_lines=False, **options)
            table.columns = table.iloc[0].str.strip().str.lower()
            table.index += 1
            table = table[1:]
        table = table[["id", "count"]].dropna(how="all")
        table.columns = ["id", "count"]  # fails for a column that is there twice
    except Exception as error:  # of many kinds
        remedy = "set LABELS to a CSV whose first line is id,count, or to mall_gt.mat"
        raise InputError(f"{path}: {remedy} ({error})") from None
    values = table.apply(pd.to_numeric, errors="coerce").astype(float)
    is_bad = ~(values.ge(0) & values.le([10**9, 10**6]) & values.mod(1).eq(0))
    is_bad["id"] |= values["id"].duplicated()
    if is_bad.any(axis=None):
        row, column = is_bad.stack().idxmax()
        problem = f"{column} {table.loc[row, column]!r} is no whole number, or there twice"
        raise InputError(f"{path}, row {row}: {problem}; correct it")
    return values.astype({"id": int}).set_index("id")["count"].sort_index()


def list_pictures(folder):
    """The pictures in a folder, by the numbers in their names: frame_2, frame_10."""
    paths = [path for path in folder.glob("[!.]*") if path.suffix.lower() in PICTURES]
    return sorted(paths, key=lambda path: re.sub(r"\d+", lambda n: n[0].zfill(12), path.name))


def find_frames(ids):
    """The N labelled frames in FRAMES, by the last number in their names. Raises InputError."""
    numbered = {}
    for path in list_pictures(at(FRAMES)):
        if number := re.search(r"(\d+)\D*$", path.stem):
            if (twin := numbered.setdefault(int(number[1]), path)) != path:
                raise InputError(f"{twin} and {path.name} have one number; move one away")
    missing = [int(frame) for frame in ids if frame not in numbered]
    if missing:
        problem = f"{len(missing)} of {len(ids)} labelled frames missing"
        remedy = f"add {shorten(str(missing), 60)}, or correct FRAMES or LABELS"
        raise InputError(f"{at(FRAMES)}: {problem}; {remedy}")
    return [numbered[frame] for frame in ids]


def read_image(source):
    """A picture, upright, RGB. source: a path, or a uint8 array (H, W, 3)."""
    if isinstance(source, np.ndarray):
        if source.ndim != 3:
            raise ValueError(f"{source.shape}, not (H, W, 3)")
        image = Image.fromarray(source)
    else:
        image = Image.open(source)
    if image.mode[0] in "IF":
        raise ValueError(f"{image.mode} pixels; convert it to 8 bits")
    return ImageOps.exif_transpose(image).convert("RGB")


def find_readable(sources):
    """The rows of the sources that read_image can read, and a line about the others."""

    def find_problem(source):
        try:
            read_image(source)
        except Exception as error:  # of many kinds
            return f"{getattr(source, 'name', 'array')}: {error!r}"

    with ThreadPoolExecutor() as pool:
        problems = list(pool.map(find_problem, sources))
    readable = [row for row, problem in enumerate(problems) if not problem]
    n, named = len(sources), shorten("; ".join(filter(None, problems)), 200)
    return readable, f"{n - len(readable)} of {n} frames cannot be read: {named}"


def check_frames(paths):
    """Raises InputError for frames that cannot be read, or are not those of LABELS."""
    readable, problem = find_readable(paths)
    if len(readable) < len(paths):
        raise InputError(f"{at(FRAMES)}: {problem}; replace them")
    if b"synthetic mall sample" in paths[0].read_bytes():
        print("The frames are rendered; the README tells how to use real ones.")
    elif hashlib.md5(at(LABELS).read_bytes()).hexdigest() == SAMPLE_LABELS:
        raise InputError(f"{at(LABELS)}: labels of the sample, not of these frames; set LABELS")


def jitter(image, rng):
    """A copy in other light (up to 15%, tint 5%), the camera nudged (2% of the width, zoom
    3%), black beyond the picture."""
    zoom = rng.uniform(0.97, 1.03)
    shift = rng.uniform(-0.02, 0.02, 2) * image.width
    left, top = shift + np.array(image.size) * (1 - zoom) / 2
    image = image.transform(image.size, Image.AFFINE, (zoom, 0, left, 0, zoom, top), Image.BILINEAR)
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhance(image).enhance(rng.uniform(0.85, 1.15))
    red, green, blue = rng.uniform(0.95, 1.05, 3)
    return image.convert("RGB", (red, 0, 0, 0, 0, green, 0, 0, 0, 0, blue, 0))


class Frames:
    """Pictures read like an array: frames[rows] is (len(rows), height, width, 3) uint8.
    sources: of N frames, see read_image. A share AUGMENT of the first n_train has jittered
    copies, in the rows after all frames; copy_of (N,): the row of each frame's copy or own."""

    def __init__(self, sources, size, n_train=0):
        copied = np.linspace(0, n_train, round(n_train * AUGMENT), endpoint=False).astype(int)
        self.sources = [*sources, *(sources[row] for row in copied)]
        self.size = size
        self.n = len(sources)
        self.copy_of = np.arange(self.n)
        self.copy_of[copied] = np.arange(self.n, len(self.sources))

    def __getitem__(self, rows):
        with ThreadPoolExecutor() as pool:
            return np.stack(list(pool.map(self.load, rows)))

    def load(self, row):
        image = read_image(self.sources[row]).resize(self.size[::-1], Image.BILINEAR)
        if row >= self.n:  # a copy
            image = jitter(image, np.random.default_rng((SEED, row)))
        return np.asarray(image)


def make_windows(ids, length):
    """For each frame, the rows of the window that ends at it (N, length). None crosses a
    gap in the ids: the row after it repeats. Ids 1, 2, 5: [[0, 0], [0, 1], [2, 2]]."""
    rows = np.arange(len(ids))
    starts_run = np.diff(ids, prepend=ids[0]) != 1  # the first frame, the first after a gap
    run_start = np.maximum.accumulate(rows * starts_run)  # (N,)
    return np.maximum(rows[:, None] + np.arange(1 - length, 1), run_start[:, None])


class WindowSequence(keras.utils.Sequence):
    """Feeds windows (batch, T, ...) and the counts (batch, 1) of their last frames.
    images: an array, a row an image. windows: rows (M, T). counts: people in the last frame
    of each window (M,). copy_of: for training, that of Frames; every epoch then shuffles the
    windows and shows, in half of them, the copy of each frame that has one."""

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


# == Model, stage 1: spatial ========
def load_resnet50():
    """ResNet50 without its top (He et al., "Deep residual learning for image recognition",
    CVPR 2016): (model, what its weights are, whether they are random). Raises InputError."""

    def build(weights):
        keras.utils.set_random_seed(SEED)  # the same random weights whatever came before
        size = (*FRAME_SIZE, 3)
        return keras.applications.ResNet50(include_top=False, weights=weights, input_shape=size)

    if not WEIGHTS:
        return build(None), "random", True
    path = WEIGHTS if WEIGHTS == "imagenet" else at(WEIGHTS)
    if path != "imagenet" and not path.is_file():
        raise InputError(f"{path}: no such file; correct WEIGHTS")
    try:
        return build(str(path)), Path(path).name, False
    except Exception as error:  # of many kinds
        problem = shorten(str(error), 150)
    if path != "imagenet":
        raise InputError(f"{path}: no weights of Keras's ResNet50 without top ({problem})")
    remedy = "set WEIGHTS to a resnet50_weights_tf_dim_ordering_tf_kernels_notop.h5"
    print(f"Warning: no ImageNet weights ({problem}); {remedy}", file=sys.stderr)
    return build(None), "random, for want of ImageNet's", True


def normalise(frames):
    """RGB frames (n, H, W, 3) -> BGR, as ImageNet's weights expect, each channel of each
    frame at mean 0 and ImageNet's standard deviation, whatever the light."""
    x = ops.cast(ops.flip(frames, axis=-1), "float32")
    x = layers.GroupNormalization(groups=-1, epsilon=1.0, center=False, scale=False)(x)
    return layers.Rescaling(57.0)(x)


def calibrate(resnet, frames):
    """Sets BatchNorm's statistics from frames (n, H, W, 3): random weights need that."""
    for layer in resnet.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.momentum = 0.0  # forget the old ones
    resnet(normalise(frames), training=True)


def fold_batchnorm(resnet):
    """The same network, faster: each convolution, ..._conv, also does the work of the
    BatchNorm after it, ..._bn. Jacob et al., "Quantization and training of neural networks
    for efficient integer-arithmetic-only inference", CVPR 2018."""

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
    precision = choose_precision()
    for layer in folded.layers:
        layer.dtype_policy = precision
    return folded


def build_backbone(resnet, grids):
    """ResNet50 read at the layers of grids: frames (H, W, 3) uint8 -> features (F,), the
    mean and standard deviation of each layer, (h, w, C), over the cells of its grid."""
    frame = keras.Input((*FRAME_SIZE, 3), dtype="uint8", name="frame")
    maps = keras.tree.flatten(fold_batchnorm(resnet)(normalise(frame)))  # one is no list
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
    """Stage 1, for one frame: (H, W, 3) uint8 -> its feature vector (F,), standardised by
    the training images, rows trained_on, to a mean squared length of 1. Returns the model,
    and features (N + C, F) standardised."""
    scaler = StandardScaler().fit(features[trained_on])
    scale = scaler.scale_ * math.sqrt(features.shape[1])
    features = (features - scaler.mean_.astype("float32")) / scale.astype("float32")
    longest = max(float(np.linalg.norm(features[trained_on], axis=1).max()), 1e-3)
    variance = np.square(scale * longest)  # divides by longest, too
    x = layers.Normalization(mean=scaler.mean_, variance=variance)(backbone.output)
    x = layers.Rescaling(longest, name="longest")(x)  # undoes that: saved for count_people
    spatial = keras.Model(backbone.input, x, name="resnet50_features")
    spatial.trainable = False
    return spatial, features


# == Model, stages 2 and 3: temporal, regression ========
def build_temporal(n_features):
    """Stage 2: feature vectors (T, F) -> what the LSTM makes of them (LSTM_UNITS,)."""
    x = features = keras.Input((SEQUENCE_LENGTH, n_features), name="features")
    if PROJECTION:
        start = keras.initializers.RandomNormal(stddev=0.01)  # for any number of features
        x = layers.Dense(PROJECTION, kernel_initializer=start, name="projection")(x)
    lstm = layers.LSTM(LSTM_UNITS, dropout=LSTM_DROPOUT, unroll=True, name="lstm")
    memory = lstm(x)
    gates = [0.0, FORGET_BIAS, 0.0, 0.0]  # input, forget, cell, output
    lstm.cell.bias.assign(np.repeat(gates, LSTM_UNITS))
    return keras.Model(features, memory, name="temporal")


def find_basis(features):
    """An orthonormal basis (F, K) of what the training images' features (M, F) span. SGD does
    not leave that span: the projection trains on K coordinates as on F numbers, but faster."""
    if PROJECTION:
        return np.linalg.qr(features.T)[0]
    return scipy.sparse.eye_array(features.shape[1], dtype="float32")


def build_regression(counts):
    """Stage 3: (LSTM_UNITS,) -> people in the last frame (1,), never negative. Starts at
    the mean of the training counts (M,), in units of their standard deviation."""
    memory = keras.Input((LSTM_UNITS,), name="memory")
    x = layers.Dense(DENSE_UNITS, activation="relu", name="dense")(memory)
    x = layers.Dense(1, name="deviation")(x)
    x = layers.Rescaling(max(float(counts.std()), 1.0), float(counts.mean()))(x)
    return keras.Model(memory, layers.ReLU(name="people")(x), name="regression")


def build_network(spatial, temporal, basis, regression):
    """The three stages in a row: windows (T, H, W, 3) uint8 -> people (1,). temporal was
    trained on coordinates (T, K) in basis (F, K); here it takes feature vectors (T, F)."""
    first, *others = temporal.get_weights()  # first: the kernel (K, ...) of its first layer
    temporal = build_temporal(basis.shape[0])
    temporal.set_weights([basis @ first, *others])
    windows = keras.Input((SEQUENCE_LENGTH, *FRAME_SIZE, 3), dtype="uint8", name="windows")
    features = layers.TimeDistributed(spatial, name="spatial")(windows)
    return keras.Model(windows, regression(temporal(features)), name="ts_crowdnet")


# == Features and training ========
def read_features(model, frames, rows):
    """Runs frames[rows] through model, FRAME_BATCH at a time: (n, F). Faster than predict."""
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
        raise InputError(f"FEATURE_LAYERS, FEATURE_LAYERS_RANDOM: {error}") from None
    resnet = keras.Model(resnet.input, outputs, name="resnet50")
    if is_random:
        calibrate(resnet, frames[[0, n_train - 1]])  # more would take gigabytes
    backbone = build_backbone(resnet, grids)
    precision = choose_precision()
    constants = (FRAME_SIZE, FRAME_BATCH, FEATURE_SPREAD, SEED, grids, n_train)
    versions = (4, keras.__version__, keras.backend.backend())  # 4: of this code
    key = (constants, versions, weights, precision, resnet.count_params())
    files = [*frames.sources, *filter(Path.is_file, [at(WEIGHTS or "")])]
    array = open_cache(cache, key, files, (len(frames.sources), backbone.output_shape[1]))
    print(f"ResNet50 ({weights}, {precision}) reads {frames.n} frames, {len(array) - frames.n} copies:")
    print(f"{array.shape[1]:,} numbers of each, from {', '.join(grids)}.")
    features = fill_rows(array, lambda rows: read_features(backbone, frames, rows))
    return backbone, features, weights


def train(model, training, validation):
    """Trains for EPOCHS epochs (the Sequence shuffles); returns the history. Validation is
    only monitored. The loss is mse / variance of the counts: one rate for all crowds."""
    optimizer = keras.optimizers.get(OPTIMIZER)
    steps = EPOCHS * len(training)
    optimizer.learning_rate = keras.optimizers.schedules.CosineDecay(LEARNING_RATE, steps)
    variance = max(float(training.counts.var()), 1.0)
    model.compile(optimizer, "mse", loss_weights=1 / variance, metrics=["mse", "mae"])
    fit = model.fit(training, validation_data=validation, epochs=EPOCHS, shuffle=False, verbose=2)
    return pd.DataFrame(fit.history, index=pd.RangeIndex(1, EPOCHS + 1, name="epoch"))


# == Evaluation: metrics, figures, results ========
def measure(true, predicted):
    """Metrics of counts. accuracy: share within TOLERANCE; a true 0 needs one that rounds to 0."""
    error = np.abs(predicted - true)
    accurate = np.where(true == 0, np.round(predicted) == 0, error <= TOLERANCE * true)
    mse = np.mean(error**2)
    return {"mae": error.mean(), "mse": mse, "rmse": mse**0.5, "accuracy": accurate.mean()}


def draw_figures(history, validation, baseline, paths, title):
    """Figures of a run {name: figure}. validation: id, true, predicted of frames in paths."""
    loss, axes = plt.subplots(figsize=(6, 4))
    axes.plot(history.index - 0.5, history["mse"] ** 0.5, label="training: mean over the epoch")
    axes.plot(history.index, history["val_mse"] ** 0.5, "--", label="validation: after the epoch")
    axes.axhline(baseline["rmse"], color="0.5", ls=":", label="validation: the mean count")
    axes.set(ylim=0, xlabel="Epoch", ylabel="Root of the mean squared error (people)")
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
    predictions.suptitle(title)

    examples, axes = plt.subplots(2, 3, figsize=(11, 6))
    order = np.abs(validation["predicted"] - validation["true"]).argsort()
    rows = order.iloc[np.linspace(0, len(order) - 1, 6, dtype=int)]
    for axis, row in zip(axes.flat, rows):
        axis.imshow(read_image(paths[row]))
        frame = validation.iloc[row]
        axis.set_title(f"frame {frame.id}: true {frame.true}, predicted {frame.predicted:.1f}")
        axis.axis("off")
    examples.suptitle("Validation frames, from the smallest to the largest error")
    return {"loss": loss, "predictions": predictions, "examples": examples}


def draw_counts(table):
    """The figure {name: figure} of counts over new frames, grey where they are doubtful."""
    figure, axes = plt.subplots(figsize=(11, 4))
    axes.plot(table["count"].to_numpy(), ".-", linewidth=1, markersize=3)
    doubtful = table["unfamiliar"].fillna(True).to_numpy(float)[np.newaxis]
    area = (-0.5, len(table) - 0.5, *axes.get_ylim())
    axes.imshow(doubtful, "Greys", vmin=0, vmax=5, aspect="auto", extent=area)  # light grey
    axes.set(xlabel="Frame, from 0 (grey: unlike training, or unreadable)", ylabel="People")
    return {"counts": figure}


def save_figures(folder, draw):
    """Saves what draw() returns, {name: figure}, and shows it where there is a screen."""
    try:
        settings = {"savefig.dpi": 200, "figure.constrained_layout.use": True}
        sns.set_theme("paper", "ticks", "colorblind", rc=settings)
        for name, figure in draw().items():
            write_files(folder, {f"{name}.png": figure.savefig, f"{name}.pdf": figure.savefig})
        if plt.get_backend().lower() != "agg":
            plt.show()
        plt.close("all")
    except Exception as error:  # costs only itself
        print(f"Warning: no figures ({shorten(str(error), 200)}).", file=sys.stderr)


def save_results(outputs, model, history, table, paths, run):
    """Writes all results, prints a summary. table: id, split, true, predicted of the frames
    in paths. run: more for metrics.json."""
    validation = table[table["split"] == "validation"]
    n_train = len(table) - len(validation)
    metrics = measure(validation["true"], validation["predicted"])
    baseline = measure(validation["true"], table["true"][:n_train].mean())
    report = metrics | run | {"baseline": baseline}
    report |= {"train_frames": n_train, "validation_frames": len(validation)}
    report["constants"] = {name: globals()[name] for name in globals() if name.isupper()}
    report["versions"] = {"python": sys.version, "keras": keras.__version__, "tf": tf.__version__}
    write_files(outputs, {
        "ts_crowdnet.keras": model.save,
        "history.csv": history.to_csv,
        "predictions.csv": lambda path: table.to_csv(path, index=False, float_format="%.6f"),
        "metrics.json": lambda path: path.write_text(json.dumps(report, indent=2, default=str)),
    })
    line = "{}: MAE {mae:.3f}, MSE {mse:.3f}, RMSE {rmse:.3f}, within {:.0%}: {accuracy:.1%}"
    title = line.format("Validation frames", TOLERANCE, **metrics)
    title += "\n" + line.format("Always the mean count", TOLERANCE, **baseline)
    print(f"\n{title}\nResNet50 weights: {run['weights']}. Results: {outputs}")
    shown = (history, validation, baseline, paths[n_train:], title)
    save_figures(outputs, lambda: draw_figures(*shown))


# == Counting new footage ========
def load_stages(model):
    """(spatial, temporal, regression) of a model or of its file. Raises InputError."""
    loaded = model
    try:
        if isinstance(model, (str, Path)):
            loaded = keras.saving.load_model(Path(model).expanduser(), compile=False)
        return [loaded.get_layer(stage) for stage in ("spatial", "temporal", "regression")]
    except Exception as error:  # of many kinds
        problem = f"not written by this script with Keras {keras.__version__}"
        raise InputError(f"{model}: {problem}; train a model first ({error})") from None


def count_people(model, frames, cache=None):
    """Counts the people in new frames of the camera that a model was trained on.
    model: path of a ts_crowdnet.keras, or the loaded model. frames: a folder, or paths or
    uint8 RGB arrays (H, W, 3) in time order, about at the frame rate of training. cache: a
    folder, if all are paths: a count cut short goes on. Returns a DataFrame, a row a frame,
    indexed by file name: count, and unfamiliar, True for a frame unlike all training
    frames; both empty where it cannot be read. Raises InputError."""
    sources = frames
    if isinstance(frames, (str, Path)):
        sources = list_pictures(Path(frames).expanduser())
    sources = [Path(source) if isinstance(source, str) else source for source in sources]
    distributed, temporal, regression = load_stages(model)
    spatial = distributed.layer
    readable, problem = find_readable(sources)
    if not readable:
        remedy = "of a video: ffmpeg -i VIDEO -vf fps=1 FOLDER/%06d.jpg"
        raise InputError(f"{shorten(str(frames), 99)}: no frames to count ({problem}); {remedy}")
    if len(readable) < len(sources):
        print(f"{problem}; their counts stay empty.")
    images = Frames([sources[row] for row in readable], spatial.input_shape[1:3])
    windows = make_windows(readable, temporal.input_shape[1])
    array = np.full((len(readable), 2), np.nan, "float32")
    if cache:
        array = open_cache(Path(cache), readable, [Path(model), *images.sources], array.shape)

    def count(rows):
        """(people, length of the last feature vector) of the windows of rows: (n, 2)."""
        seen = np.unique(windows[rows])
        features = read_features(spatial, images, seen)
        features = features[np.searchsorted(seen, windows[rows])]  # (n, T, F)
        people = regression.predict_on_batch(temporal.predict_on_batch(features))
        return np.column_stack([people, np.linalg.norm(features[:, -1], axis=1)])

    counts, lengths = fill_rows(array, count).T
    unfamiliar = pd.array(lengths > UNFAMILIAR * float(spatial.get_layer("longest").scale))
    table = pd.DataFrame({"count": counts, "unfamiliar": unfamiliar}, index=readable)
    table = table.reindex(range(len(sources)))
    names = [getattr(source, "name", row) for row, source in enumerate(sources)]
    return table.set_axis(pd.Index(names, name="frame"))


def count_folder():
    """The COUNT mode: counts.csv and a figure in OUTPUTS, from the model there."""
    outputs = at(OUTPUTS)
    model = outputs / "ts_crowdnet.keras"
    table = count_people(model, at(COUNT), outputs / "count_cache")
    write_files(outputs, {"counts.csv": lambda path: table.to_csv(path, float_format="%.3f")})
    print(f"{table['count'].mean():.1f} people on average; {table['unfamiliar'].sum()} of",
          f"{len(table)} frames look like no training frame: doubt those.")
    save_figures(outputs, lambda: draw_counts(table))


# == Main ========
def main():
    """Labels -> frames -> feature vectors -> network -> counts -> figures and numbers."""
    check_constants()
    if COUNT:
        return count_folder()
    labels = read_labels(at(LABELS))
    ids, counts = labels.index.to_numpy(), labels.to_numpy()
    n, n_train = len(labels), round(len(labels) * TRAIN_FRACTION)
    if not 1 < n_train < n:
        raise InputError(f"{at(LABELS)}: {n} frames, too few for {TRAIN_FRACTION = }")
    paths = find_frames(ids)
    print(f"{n} frames: the first {n_train} train, the last {n - n_train} validate.")
    check_frames(paths)
    outputs = at(OUTPUTS)

    # Spatial: every frame and copy passes the frozen ResNet50 once.
    frames = Frames(paths, FRAME_SIZE, n_train)
    backbone, features, weights = extract_features(frames, n_train, outputs / "feature_cache")
    trained_on = np.r_[:n_train, n : len(features)]  # training frames and their copies
    spatial, features = build_spatial(backbone, features, trained_on)

    # Temporal and regression: trained on windows of coordinates (N + C, K).
    keras.utils.set_random_seed(SEED)
    basis = find_basis(features[trained_on])
    coordinates = features @ basis
    temporal = build_temporal(basis.shape[1])
    regression = build_regression(counts[:n_train])
    head = keras.Sequential([temporal, regression])
    windows = make_windows(ids, SEQUENCE_LENGTH)  # (N, T)
    training = WindowSequence(coordinates, windows[:n_train], counts[:n_train], frames.copy_of)
    validation = WindowSequence(coordinates, windows[n_train:], counts[n_train:])
    history = train(head, training, validation)

    # The whole network, and every frame's count.
    network = build_network(spatial, temporal, basis, regression)
    predicted = head.predict(WindowSequence(coordinates, windows, counts), verbose=0)[:, 0]
    split = np.where(np.arange(n) < n_train, "train", "validation")
    table = {"id": ids, "split": split, "true": counts.astype(int), "predicted": predicted}
    run = {"weights": weights, "precision": choose_precision(), "features": features.shape[1]}
    save_results(outputs, network, history, pd.DataFrame(table), paths, run)


def run_as_script():
    """main(), with one line instead of a traceback for what the user can put right."""
    tf.get_logger().setLevel("ERROR")  # quiet about a last, smaller batch
    try:
        main()
    except (InputError, OSError) as error:
        sys.exit(shorten(f"Error: {error}", 500))


if __name__ == "__main__":
    run_as_script()
