"""TS-CrowdNet counts the people in each frame of a fixed-camera video: TimeDistributed ResNet50 +
LSTM. It learns from one number per frame; 80 labelled frames, spread over the video, are usually
enough.

    pip install -r requirements.txt && python tscrowdnet_train.py

Reads    labels.csv                        id,count: the number of people in each labelled frame
         frames/frames/seq_000001.jpg ...  the frames of one fixed camera, a folder for each clip
Writes   outputs/ts_crowdnet.keras         the model: windows of uint8 frames in, counts out
         outputs/metrics.json, predictions.csv, history.csv, and figures as .png and .pdf
         outputs/counts.csv                with COUNT: the count of each new frame, and a figure
         feature_cache/                    what ResNet50 computed from each frame

Each of the N labels has a window: the T = SEQUENCE_LENGTH frames that end at the labelled one.
All windows together contain P distinct frames, of H x W = FRAME_SIZE pixels. C of the labelled
training frames also have a jittered copy, in other light and from a slightly moved camera.

    windows of frames (N, T, H, W, 3) uint8
    1. spatial     TimeDistributed(ResNet50 -> F features -> PCA)  -> feature vectors (N, T, K)
    2. temporal    the same Dense for each vector, then an LSTM    -> last state (N, LSTM_UNITS)
    3. regression  Dense(gelu), Dense(1)                           -> people in last frames (N, 1)

Stage 1 is frozen, so it reads each of the P + C frames once. A Sequence then feeds windows of
feature vectors to stages 2 and 3, which train. To read the code, begin with main() at the end. The
sections follow the stages; checks and files come last, and a first reading can skip them.
"""

import glob
import hashlib
import io
import json
import math
import os
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from textwrap import shorten

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # hides warnings about missing GPUs
if __name__ == "__main__":
    print("Loading TensorFlow ...", flush=True)
    if os.environ.get("MPLBACKEND", "").startswith("module:"):  # a notebook's, no use here
        os.environ["MPLBACKEND"] = "agg"

import keras
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import scipy.io
import seaborn as sns
import tensorflow as tf
from keras import layers, ops
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageEnhance, ImageOps, UnidentifiedImageError  # comes with matplotlib
from sklearn import decomposition

ROOT = Path(__file__).resolve().parent

# -- Your data. Relative paths start at the folder of this script.
LABELS = "labels.csv"  # a CSV with columns id,count, or the Mall dataset's own "mall_gt.mat"
FRAMES = "frames/frames"  # folder of seq_000001.jpg, ..., or of a folder for each clip
OUTPUTS = "outputs"  # take another folder for each experiment that you want to keep
COUNT = None  # a folder of new frames: count them with the model in OUTPUTS instead of training
TRAIN_FRACTION = 0.8  # share of labels that train, the first in frame order; 1: no validation
FRAME_SIZE = (300, 400)  # (height, width) that ResNet50 sees; larger if people are small
WEIGHTS = "imagenet"  # offline: the path of a weight file; None: random weights, larger errors

# -- Training
SEQUENCE_LENGTH = 5  # frames in a window; on Mall, 1 is as good
EPOCHS = 50  # do not judge by far fewer: after 5, the mean count is still better
BATCH_SIZE = 32  # windows in a step, but at most a quarter of the training windows
LEARNING_RATE = 0.1  # at the start, then it falls to 0; lower it if the loss rises
OPTIMIZER = {"class_name": "SGD", "config": {"momentum": 0.9, "nesterov": True, "clipnorm": 1.0}}
SEED = 0  # publish the mean and standard deviation over several
TOLERANCE = 0.20  # for reports: counts within this share of the truth are called accurate

# -- If memory runs out, or for speed
FRAME_BATCH = 8  # frames that ResNet50 reads at once; fewer need less memory
PRECISION = "auto"  # "mixed_bfloat16" where it is fast; "float32" to compare across machines
CACHE = "feature_cache"  # one for all experiments: 60 KB for each frame, may be deleted
CACHE_FEATURES = True  # False recomputes features at every step: far slower, same result

# -- Network. Results hardly depend on these: see tests/tools/BENCHMARKS.md.
# Layers of ResNet50 to read, each averaged in a grid of (height, width) cells.
FEATURE_LAYERS = {"conv2_block3_out": (3, 2), "conv3_block4_out": (3, 2),
                  "conv4_block6_out": (1, 1), "conv5_block3_out": (1, 1)}
# These are read if the weights are random, because deeper layers would only add noise then.
FEATURE_LAYERS_RANDOM = {"conv1_relu": (3, 2), "conv2_block1_out": (3, 2),
                         "conv2_block3_out": (3, 2)}
FEATURE_SPREAD = True  # also read each grid cell's standard deviation, not its mean alone
COMPONENTS = 512  # greatest size of a feature vector after PCA; 0: no PCA
PROJECTION = 32  # a Dense layer shortens each feature vector to this size; 0: none does
LSTM_UNITS = 64
LSTM_DROPOUT = 0.0  # share of the LSTM's inputs dropped in training
FORGET_BIAS = -2.0  # before training; higher gives earlier frames more weight, Keras's is 1
DENSE_UNITS = 64
AUGMENT = 0.25  # share of the labelled training frames that also get a jittered copy
RANDOM_NEIGHBOURS = 0.5  # share of training windows whose earlier frames are drawn at random
NEIGHBOUR_RANGE = 30  # from this many earlier frames, counting only those that windows contain
UNFAMILIAR = 2.0  # norm from which a frame is marked (median in training: 1); raise if too many

# -- Internal: nothing to edit below this line.
MODEL = "ts_crowdnet.keras"
FRAME_ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff")
IMAGENET_FILE = "resnet50_weights_tf_dim_ordering_tf_kernels_notop.h5"
FFMPEG = "ffmpeg -i VIDEO -vf fps=1 -q:v 2 FOLDER/%06d.jpg"
SAMPLE_COUNTS = "0e5fe536512e4161155f1f2fd24f9369"  # MD5 of the shipped counts, as float64


class InputError(ValueError):
    """A mistake that the user can correct; the message says how."""


@contextmanager
def explain(problem):
    """Turns any exception within into an InputError that begins with problem."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{problem} ({getattr(error, 'strerror', None) or error})") from error


def resolve_path(path):
    """A path from the constants: relative to the folder of this script unless absolute."""
    return ROOT / Path(path).expanduser()


# == Data: labels, frames, windows ========
def read_labels(path):
    """Reads a CSV with columns id and count, or Mall's mall_gt.mat. Returns a DataFrame with these
    columns: each id an int, or each a str; count a float, NaN where nobody has counted. Its index
    is the line in the file. Raises InputError."""
    remedy = "correct LABELS, or make it a CSV whose first line is id,count, or Mall's mall_gt.mat"
    with explain(f"{path}: cannot be read; {remedy}"):
        if path.suffix.lower() == ".mat":
            counts = scipy.io.loadmat(path, variable_names=["count"])["count"].ravel()
            table = pd.DataFrame({"id": range(1, len(counts) + 1), "count": counts}, dtype=str)
        else:
            # sep=None finds out whether commas, semicolons or tabs separate the columns. The
            # first line is read as data, so that pandas refuses lines that are longer than it.
            table = pd.read_csv(path, sep=None, engine="python", header=None, dtype=str,
                                skipinitialspace=True, skip_blank_lines=False,
                                encoding="utf-8-sig", encoding_errors="replace")
            names = table.iloc[0].str.strip().str.lower()
            if sorted(names[names.isin(["id", "count"])]) != ["count", "id"]:
                raise ValueError("its first line does not name one column id and one column count")
            table = table.set_axis(names, axis="columns")[1:]
        table.index += 1
        table = table[["id", "count"]].dropna(how="all")

    def refuse(is_wrong, column, problem):
        if is_wrong.any():
            line = is_wrong.idxmax()
            value = str(table[column].fillna("")[line])[:40]
            raise InputError(f"{path}, row {line}: {column} {value!r} {problem}; correct it")

    ids = table["id"].fillna("").str.strip().str.replace("\\", "/", regex=False)
    refuse(ids == "", "id", "is empty")
    whole = ids.str.replace(r"\.0*$", "", regex=True)  # spreadsheets write 12.0
    is_number = whole.str.fullmatch(r"\d{1,19}")
    is_odd = is_number if is_number.mean() < 0.5 else ~is_number
    refuse(is_odd, "id", "is unlike the others: make all ids numbers, or all names of frames")
    if is_number.all():
        ids = whole.map(int)
    refuse(ids.duplicated(), "id", "appears twice, or lacks its folder")
    counts = pd.to_numeric(table["count"], errors="coerce").astype(float)
    is_count = counts.between(0, 10**6) | table["count"].isna()
    refuse(~is_count, "count", "is not a number from 0 to 1,000,000")
    return pd.DataFrame({"id": ids, "count": counts})


def natural_key(name):
    """Sorts paths as file managers do: folder by folder, and frame_2 before frame_10."""
    keys = []
    for text in os.path.split(name):
        keys += [re.sub(r"\d+", lambda digits: digits[0].zfill(30), text.lower()), text]
    return keys


def list_frames(folder):
    """What is in a folder and the folders below it: (names of frames, names of other files), each
    a path from that folder, with "/", in natural order. Raises InputError if no frame is there."""
    remedy = f"to take frames from a video: {FFMPEG}"
    if folder.is_file():
        raise InputError(f"{folder}: a file, where a folder of frames should be; {remedy}")
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; {remedy}")
    names = glob.glob("**", root_dir=folder, recursive=True)  # leaves hidden files out
    names = [Path(name).as_posix() for name in names if not (folder / name).is_dir()]
    names.sort(key=natural_key)
    is_frame = {name: name.lower().endswith(FRAME_ENDINGS) and (folder / name).is_file()
                for name in names}
    frames = [name for name in names if is_frame[name]]
    others = [name for name in names if not is_frame[name]]
    kinds = Counter(PurePosixPath(name).suffix or name for name in others)
    left_out = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common(9))
    if not frames:
        there = f" (but {left_out})" if others else ""
        raise InputError(f"{folder}: no frames are there{there}; {remedy}")
    if others:
        print(f"Left out: {left_out} in {folder}.")
    return frames, others


def find_names(ids, names):
    """The places in names that each id fits, as a list of lists. A number fits the last number in
    a file's name; a text fits a path, or a file's name, each with or without its ending."""
    places = {}
    for place, name in enumerate(names):
        path = PurePosixPath(name)
        last_number = [int(digits) for digits in re.findall(r"\d+", path.stem)[-1:]]
        for key in {str(path.with_suffix("")), path.name, path.stem, *last_number}:
            places.setdefault(key, []).append(place)
    places |= {name: [place] for place, name in enumerate(names)}  # a whole path fits one alone
    return [places.get(key, []) for key in ids]


def find_clip_starts(names):
    """For each frame, the first row of its clip (P,). Consecutive frames of one folder form a clip;
    so do all frames that come as arrays, whose names are numbers."""
    folders = pd.Series([os.path.dirname(str(name)) for name in names])
    is_start = folders != folders.shift()
    return np.maximum.accumulate(np.where(is_start, np.arange(len(names)), 0))


def make_windows(ends, clip_starts, sequence_length):
    """Windows (n, sequence_length) that end at the rows ends (n,): for each, the rows of its
    frames. If a window would begin before its clip, the clip's first frame repeats: ends 1 and 2
    of one clip give [[0, 0, 1], [0, 1, 2]]. clip_starts: see find_clip_starts."""
    rows = ends[:, None] - np.arange(sequence_length)[::-1]
    return np.maximum(rows, clip_starts[ends][:, None])


def draw_windows(windows, clip_starts, copy_of, rng):
    """The windows (n, T) of one epoch, drawn from the training windows (n, T): rows of frames.

    In a share RANDOM_NEIGHBOURS of them, the frames before the last one are drawn at random, with
    replacement, from the last frame and the NEIGHBOUR_RANGE rows before it in its clip, and sorted.
    A network that has seen such windows is not misled by gaps or other frame rates. In a random
    half of all windows, each frame that has a jittered copy is replaced by it: often the last frame
    alone, because only labelled frames have copies."""
    ends = windows[:, -1:]
    lowest = np.maximum(ends - NEIGHBOUR_RANGE, clip_starts[ends])
    earlier = rng.integers(lowest, ends + 1, (len(windows), windows.shape[1] - 1))
    drawn = np.concatenate([np.sort(earlier), ends], axis=1)
    windows = np.where(rng.random((len(windows), 1)) < RANDOM_NEIGHBOURS, drawn, windows)
    return np.where(rng.random((len(windows), 1)) < 0.5, copy_of[windows], windows)


def open_image(source):
    """An image, not decoded yet. source: a path, or a uint8 array (H, W, 3)."""
    if isinstance(source, np.ndarray):
        if source.ndim != 3 or source.shape[2] not in (3, 4) or not source.size:
            raise ValueError(f"{source.shape}, not (H, W, 3)")
        return Image.fromarray(source)
    data = source.read_bytes()
    image = Image.open(io.BytesIO(data))
    end = data.rstrip(b"\0")
    if image.format == "JPEG" and end != data and b"\xff\xd9" not in end[-4096:]:
        raise ValueError("ends in zeros: it was not written to its end")
    return image


def decode(image):
    """The same image, upright, RGB."""
    if image.mode[0] in "IF":
        raise ValueError(f"{image.mode} pixels; convert it to 8 bits")
    return ImageOps.exif_transpose(image).convert("RGB")


def jitter(image, rng):
    """A copy of an image in other light (up to 15%, tint 5%), as if the camera had been nudged (2%
    of the width, zoom 3%). It is dark beyond the image."""
    zoom = rng.uniform(0.97, 1.03)
    shift = rng.uniform(-0.02, 0.02, 2) * image.width
    left, top = shift + np.array(image.size) * (1 - zoom) / 2
    image = image.transform(image.size, Image.AFFINE, (zoom, 0, left, 0, zoom, top), Image.BILINEAR)
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhance(image).enhance(rng.uniform(0.85, 1.15))
    red, green, blue = rng.uniform(0.95, 1.05, 3)
    return image.convert("RGB", (red, 0, 0, 0, 0, green, 0, 0, 0, 0, blue, 0))


def choose_copied(digests, rows):
    """The rows of the frames that get a jittered copy, among the rows (n,) of all labelled training
    frames: from each of AUGMENT * n groups of neighbours, the frame with the smallest digest. That
    is as good as chance, but equal in all experiments, so that they share cached features."""
    n_copied = round(AUGMENT * len(rows))
    groups = np.array_split(rows, n_copied) if n_copied else []
    return np.array([min(group, key=digests.__getitem__) for group in groups], int)


class Frames:
    """Frames, read when they are indexed: frames[rows] is (*rows.shape, H, W, 3) uint8.

    sources, digests: P paths or arrays, and the MD5 of each, see check_frames. size: (H, W).
    copied: rows of the C frames that have a jittered copy. The copies are in rows P to P + C - 1;
    copy_of (P,) is the row of each frame's copy, or the frame's own row if it has none."""

    def __init__(self, sources, digests, size, copied=()):
        self.sources = [*sources, *(sources[row] for row in copied)]
        self.digests = [*digests, *(f"{digests[row]}-copy" for row in copied)]
        self.size = size
        self.copy_of = np.arange(len(sources))
        self.copy_of[np.asarray(copied, int)] = len(sources) + np.arange(len(copied))

    def __len__(self):
        return len(self.sources)

    def __getitem__(self, rows):
        distinct = np.unique(rows)
        with ThreadPoolExecutor() as pool:
            pixels = np.stack(list(pool.map(self.load, distinct)))
        return pixels[np.searchsorted(distinct, rows)]

    def load(self, row):
        """One frame or copy (H, W, 3)."""
        image = decode(open_image(self.sources[row])).resize(self.size[::-1], Image.BILINEAR)
        if row >= len(self.copy_of):  # a frame has the same copy in all experiments
            digest = self.digests[row].removesuffix("-copy")
            image = jitter(image, np.random.default_rng(int(digest, 16)))
        return np.asarray(image)


class WindowSequence(keras.utils.Sequence):
    """Feeds windows (batch, T, ...) and the counts (batch, 1) of their last frames.

    frame_data: what windows are made of, feature vectors (P + C, K) or Frames. windows: its rows
    (n, T). counts: (n,). draw: None; or, for training, a function: draw(windows, rng=...) gives the
    windows of each epoch, which then come in a new random order."""

    def __init__(self, frame_data, windows, counts, batch_size, draw=None):
        super().__init__()
        self.frame_data = frame_data
        self.windows = windows
        self.counts = counts.reshape(-1, 1)
        self.batch_size = batch_size
        self.draw = draw
        self.rng = np.random.default_rng(SEED)
        self.order = np.arange(len(windows))
        self.epoch_windows = windows
        self.on_epoch_end()

    def __len__(self):
        return math.ceil(len(self.windows) / self.batch_size)  # the last batch may be smaller

    def __getitem__(self, batch):
        chosen = self.order[batch * self.batch_size : (batch + 1) * self.batch_size]
        return self.frame_data[self.epoch_windows[chosen]], self.counts[chosen]

    def on_epoch_end(self):
        if self.draw:
            self.rng.shuffle(self.order)
            self.epoch_windows = self.draw(self.windows, rng=self.rng)


def load_data():
    """Labels, frames and windows. Returns (table: id, frame, split, true of the N labels, in the
    order of their frames; names (P,) of the frames that their windows contain; windows (N, T),
    rows of these names). Raises InputError."""
    file, folder = resolve_path(LABELS), resolve_path(FRAMES)
    labels = read_labels(file)
    all_names, others = list_frames(folder)
    counted = labels.dropna()
    if counted.empty:
        fitting = find_names(labels["id"][:3], all_names)
        check_labels(labels[:3], fitting, all_names, others)
        first = ", ".join([all_names[place] for place, *_ in fitting] or all_names[:3])
        raise InputError(f"{file}: no frame has a count yet; count the people in {first} first")
    n, n_train = len(counted), round(len(counted) * TRAIN_FRACTION)
    if n_train < 2 or (n_train == n and TRAIN_FRACTION < 1):
        problem = f"{TRAIN_FRACTION = } gives {n_train} to train and {n - n_train} to validate"
        remedy = "change it, or write the counts of more frames"
        raise InputError(f"{file} has {n} labels: {problem}; {remedy}")
    fitting = find_names(counted["id"], all_names)
    check_labels(counted, fitting, all_names, others)
    counted = counted.assign(place=np.concatenate(fitting)).sort_values("place")
    places, counts = counted["place"].to_numpy(), counted["count"].to_numpy()
    table = pd.DataFrame({
        "id": counted["id"].to_numpy(),
        "frame": [all_names[place] for place in places],
        "split": np.where(np.arange(n) < n_train, "train", "validation"),
        "true": counts.astype(int) if (counts % 1 == 0).all() else counts,
    })

    # Only frames that windows contain are read. From here on, rows number these alone.
    window_places = make_windows(places, find_clip_starts(all_names), SEQUENCE_LENGTH)  # (N, T)
    contained = np.unique(window_places)  # (P,)
    names = [all_names[place] for place in contained]
    windows = np.searchsorted(contained, window_places)  # (N, T)

    rest = f"the last {n - n_train} validate" if n > n_train else "none is left to validate"
    print(f"{len(all_names)} frames in {folder}, {n} labels: the first {n_train} train, {rest}.")
    if len(names) < len(all_names):
        print(f"The windows of these labels contain {len(names)} of the frames.")
    if n_uncounted := len(labels) - n:
        print(f"{n_uncounted} rows of {LABELS} have no count yet.")
    return table, names, windows


# == Stage 1, spatial: ResNet50, features, PCA ========
def choose_precision():
    """Returns (device, dtype policy for ResNet50), such as ("CPU", "float32").
    bfloat16 is at least twice as fast, but only on hardware that is made for it."""
    device, has_bfloat16 = "CPU", False
    keras_device = str(ops.zeros(1).device).upper()
    if "GPU" in keras_device or "CUDA" in keras_device:
        gpus = tf.config.list_physical_devices("GPU")
        details = tf.config.experimental.get_device_details(gpus[0]) if gpus else {}
        device = f"GPU:0 {details.get('device_name', '')}".strip()
        has_bfloat16 = details.get("compute_capability", (0, 0)) >= (8, 0)
    else:
        with suppress(OSError):  # only Linux has this file
            flags = Path("/proc/cpuinfo").read_text()
            has_bfloat16 = bool(re.search("avx512_bf16|amx_bf16", flags))
    best = "mixed_bfloat16" if has_bfloat16 else "float32"
    return device, best if PRECISION == "auto" else PRECISION


def load_resnet50():
    """ResNet50 without its top (He et al., "Deep residual learning for image recognition", CVPR
    2016): (model, name of its weights, whether they are random). Raises InputError."""

    def build(weights):
        keras.utils.set_random_seed(SEED)  # the same random weights whatever came before
        size = (*FRAME_SIZE, 3)
        return keras.applications.ResNet50(include_top=False, weights=weights, input_shape=size)

    if not WEIGHTS:
        return build(None), "random", True
    if WEIGHTS == "imagenet":
        try:
            return build(WEIGHTS), WEIGHTS, False
        except Exception:  # no network, no room on the disk, ...
            print("Warning: ImageNet's weights could not be loaded, so random ones are used, which"
                  f" count worse. Without a network, set WEIGHTS to a copy of {IMAGENET_FILE}.",
                  file=sys.stderr)
            return build(None), "random instead of ImageNet's", True
    path = resolve_path(WEIGHTS)
    if not path.is_file():
        raise InputError(f"{path}: no such file; correct WEIGHTS")
    with explain(f"{path}: no weight file of Keras's ResNet50 without top; correct WEIGHTS"):
        return build(str(path)), path.name, False


def normalise(frames):
    """RGB frames (n, H, W, 3) -> BGR, as ImageNet's weights expect. Each channel of each frame gets
    a mean of 0 and a standard deviation of 57, ImageNet's, whatever the light."""
    x = ops.cast(ops.flip(frames, axis=-1), "float32")
    # groups=-1: each channel by itself. epsilon=1.0 keeps the noise of a black frame small.
    x = layers.GroupNormalization(groups=-1, epsilon=1.0, center=False, scale=False)(x)
    return layers.Rescaling(57.0)(x)


def calibrate(resnet, frames):
    """Sets BatchNorm's statistics from frames (n, H, W, 3): random weights need that."""
    for layer in resnet.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.momentum = 0.0  # keeps none of the old statistics
    resnet(normalise(frames), training=True)


def fold_batchnorm(resnet, read, precision):
    """The same network, faster: each BatchNorm, ..._bn, is folded into the convolution before it,
    ..._conv. Where the output of that convolution is itself read, both stay. Jacob et al.,
    "Quantization and training of neural networks for efficient integer-arithmetic-only inference",
    CVPR 2018."""
    folded_into = {}  # name of each BatchNorm that vanishes: name of its convolution
    for layer in resnet.layers:
        convolution = layer.name.removesuffix("bn") + "conv"
        if isinstance(layer, layers.BatchNormalization) and convolution not in read:
            folded_into[layer.name] = convolution

    def in_precision(layer):
        return type(layer).from_config(layer.get_config() | {"dtype": precision})

    def skip_norm(layer, x, **options):
        return x if layer.name in folded_into else layer(x, **options)

    folded = keras.models.clone_model(resnet, clone_function=in_precision, call_function=skip_norm)
    for layer in resnet.layers:  # a convolution comes before its BatchNorm: copied, then changed
        if layer.name in folded_into:
            convolution = folded.get_layer(folded_into[layer.name])
            kernel, bias = convolution.get_weights()
            gamma, beta, mean, variance = layer.get_weights()
            gain = gamma / np.sqrt(variance + layer.epsilon)
            convolution.set_weights([kernel * gain, (bias - mean) * gain + beta])
        elif layer.weights:
            folded.get_layer(layer.name).set_weights(layer.get_weights())
    return folded


def summarise(feature_map, grid):
    """The mean of each channel of a feature map (h, w, channels) in each cell of a grid (height,
    width), then, with FEATURE_SPREAD, its standard deviation. Returns a list of flat tensors."""
    x = ops.cast(feature_map, "float32")
    cell = [math.ceil(side / n_cells) for side, n_cells in zip(x.shape[1:3], grid)]
    average = layers.AveragePooling2D(cell, padding="same")
    mean = average(x)  # (height, width, channels), or fewer where these do not divide h, w
    summary = [layers.Flatten()(mean)]
    if FEATURE_SPREAD:
        variance = ops.relu(average(ops.square(x)) - ops.square(mean))
        summary.append(layers.Flatten()(ops.sqrt(variance)))
    return summary


def build_backbone(calibration_frames, precision):
    """ResNet50 read at the layers of FEATURE_LAYERS: a frame (H, W, 3) uint8 -> its features (F,).
    calibration_frames: training frames (n, H, W, 3), for random weights. Returns (model, name of
    its weights). Raises InputError."""
    resnet, weights_name, is_random = load_resnet50()
    constant = "FEATURE_LAYERS_RANDOM" if is_random else "FEATURE_LAYERS"
    grids = globals()[constant]
    names = [layer.name for layer in resnet.layers]
    if unknown := grids.keys() - names:
        some = ", ".join(name for name in names if name.endswith("_out"))
        problem = f"no layer {min(unknown)} in ResNet50"
        raise InputError(f"{constant}: {problem}; take conv1_relu, {some}")
    feature_maps = [resnet.get_layer(name).output for name in grids]
    resnet = keras.Model(resnet.input, feature_maps, name="resnet50")
    if is_random:
        calibrate(resnet, calibration_frames)
    frame = keras.Input((*FRAME_SIZE, 3), dtype="uint8", name="frame")
    feature_maps = fold_batchnorm(resnet, grids, precision)(normalise(frame))
    features = []
    for feature_map, grid in zip(keras.tree.flatten(feature_maps), grids.values()):
        features += summarise(feature_map, grid)
    features = ops.concatenate(features, axis=-1)
    if features.shape[1] > 200_000:
        problem = f"{features.shape[1]:,} features of a frame fill the memory"
        raise InputError(f"{constant}: {problem}; take coarser grids")
    backbone = keras.Model(frame, features, name="backbone")
    backbone.trainable = False  # as in a saved model: the key of the cache depends on it
    return backbone, weights_name


def run_backbone(backbone, frames, rows):
    """Features (n, F) of frames[rows], FRAME_BATCH at a time. Faster than predict()."""
    batches = np.split(rows, range(FRAME_BATCH, len(rows), FRAME_BATCH))
    with ThreadPoolExecutor(1) as reader:  # reads the next frames meanwhile
        pixels = reader.map(frames.__getitem__, batches)
        return np.concatenate([backbone.predict_on_batch(batch) for batch in pixels])


def read_cached(path, n_features):
    """The features (n_features,) in a file of the cache, or None if it is missing or damaged."""
    with suppress(Exception):  # a damaged file raises many types
        with np.load(path) as file:
            features = file["features"]
        if features.shape == (n_features,) and np.isfinite(features).all():
            return features
    return None


def extract_features(backbone, frames, cache):
    """Yields the features (n, F) of all rows of frames, some rows at a time. cache: a folder that
    keeps them, in a file for each frame named by its digest, or None. Raises InputError for a file
    that cannot be written."""
    folder = open_cache(backbone, cache) if cache else None
    files = [f"{digest}.npz" for digest in frames.digests]
    is_left = np.array([not (folder and (folder / file).exists()) for file in files])
    n_left = int(is_left.sum())
    if 64 < n_left < len(files):
        print(f"{len(files) - n_left} of {len(files)} images are in {cache}, {n_left} are left.")
    bar = keras.utils.Progbar(n_left, unit_name="frame", verbose=int(n_left > 64))
    n_features = backbone.output_shape[1]
    step = 8 * FRAME_BATCH  # an interrupted run loses no more than that
    for rows in np.split(np.arange(len(files)), range(step, len(files), step)):
        features = {row: folder and read_cached(folder / files[row], n_features) for row in rows}
        missing = np.array([row for row in rows if features[row] is None])
        if len(missing):
            features |= zip(missing, run_backbone(backbone, frames, missing))
            if folder:
                write_files(folder, {files[row]: partial(np.savez, features=features[row])
                                     for row in missing})
        if is_left[rows].any():
            bar.add(is_left[rows].sum())
        yield np.stack([features[row] for row in rows])


def build_reduction(frame_features, copy_features):
    """The end of stage 1: features (F,) -> feature vector (K,), fitted to the features of the
    training frames (M, F) and of their jittered copies (C, F).

    Returns a model of two layers. "standardised" centres the features and divides each by its
    standard deviation, then all by one number, so that the median training frame has a Euclidean
    norm of 1. So one LEARNING_RATE suits all videos, and a norm above UNFAMILIAR tells a frame
    that is unlike those of training. "components" gives the principal components."""
    features = np.concatenate([frame_features, copy_features])
    mean, deviation = features.mean(axis=0, dtype=float), features.std(axis=0, dtype=float)
    floor = 0.1 * float(np.median(deviation))  # a nearly constant feature may vary in new frames
    scale = np.maximum(deviation, max(floor, 1e-3))
    scaled = (features - mean.astype("float32")) / scale.astype("float32")
    norms = np.linalg.norm(scaled[: len(frame_features)], axis=1)
    typical_norm = max(float(np.median(norms)), 1.0)  # 1.0: if all frames are nearly the same
    variance = np.square(scale * typical_norm)

    reduction = keras.Sequential(name="reduction")
    reduction.add(keras.Input((features.shape[1],), name="features"))
    reduction.add(layers.Normalization(mean=mean, variance=variance, name="standardised"))
    if COMPONENTS:
        n_components = min(COMPONENTS, len(features) - 1, features.shape[1])
        # One power iteration is as accurate here as scikit-learn's default, and takes a third of
        # the time.
        pca = decomposition.PCA(n_components, iterated_power=1, random_state=SEED).fit(scaled)
        components = layers.Dense(n_components, use_bias=False, name="components")
        reduction.add(components)
        components.set_weights([pca.components_.T])  # no bias: the mean of scaled is 0
    return reduction


def build_spatial(backbone, reduction):
    """Stage 1, frozen: windows of frames (T, H, W, 3) uint8 -> feature vectors (T, K)."""
    encoder = keras.Sequential([backbone, reduction], name="encoder")
    encoder.trainable = False
    return layers.TimeDistributed(encoder, name="spatial")


# == Stages 2 and 3: temporal, regression ========
def build_temporal(vector_size):
    """Stage 2: feature vectors (T, K = vector_size) -> the LSTM's last state (LSTM_UNITS,)."""
    temporal = keras.Sequential(name="temporal")
    temporal.add(keras.Input((SEQUENCE_LENGTH, vector_size), name="vectors"))
    if PROJECTION:
        start = keras.initializers.RandomNormal(stddev=0.01)  # Keras's default grows as K shrinks
        temporal.add(layers.Dense(PROJECTION, kernel_initializer=start, name="projection"))
    lstm = layers.LSTM(LSTM_UNITS, dropout=LSTM_DROPOUT, name="lstm")
    temporal.add(lstm)
    gates = [0.0, FORGET_BIAS, 0.0, 0.0]  # input, forget, cell, output
    lstm.cell.bias.assign(np.repeat(gates, LSTM_UNITS))
    return temporal


def build_regression(counts):
    """Stage 3: the LSTM's last state (LSTM_UNITS,) -> people in the last frame (1,). The Dense
    layers give the distance from the mean training count, in standard deviations of the training
    counts (n,): an untrained network starts near that mean."""
    unit, mean = max(float(counts.std()), 1.0), float(counts.mean())
    return keras.Sequential([
        keras.Input((LSTM_UNITS,), name="state"),
        layers.Dense(DENSE_UNITS, activation="gelu", name="dense"),  # relu units can die
        layers.Dense(1, name="output"),
        layers.Rescaling(unit, mean, name="count"),
    ], name="regression")


def build_network(spatial, temporal, regression):
    """The three stages in a row: windows of frames (T, H, W, 3) uint8 -> people (1,), never less
    than 0."""
    windows = keras.Input((SEQUENCE_LENGTH, *FRAME_SIZE, 3), dtype="uint8", name="windows")
    people = layers.ReLU(name="people")(regression(temporal(spatial(windows))))
    return keras.Model(windows, people, name="ts_crowdnet")


# == Training ========
def train(model, training, validation=None):
    """Trains for EPOCHS epochs and returns the history, a DataFrame. Validation is only watched.
    The loss is mse / variance of the counts, so that one LEARNING_RATE suits all crowds."""
    optimizer = keras.optimizers.get(OPTIMIZER)
    steps = EPOCHS * len(training)
    schedule = keras.optimizers.schedules.CosineDecay(float(LEARNING_RATE), steps)
    optimizer.learning_rate = schedule  # replaces any rate that OPTIMIZER has
    variance = max(float(training.counts.var()), 1.0)
    model.compile(optimizer, "mse", loss_weights=1 / variance, metrics=["mse", "mae"])
    fit = model.fit(training, validation_data=validation, epochs=EPOCHS, shuffle=False, verbose=2)
    return pd.DataFrame(fit.history, index=pd.RangeIndex(1, EPOCHS + 1, name="epoch"))


def check_trained(predicted, counts):
    """Raises InputError if the MSE on training frames is over twice that of the mean count."""
    mse = np.mean((predicted - counts) ** 2)
    if not np.isfinite(mse) or mse > 2 * max(counts.var(), 1.0):
        problem = "the network is far worse than always predicting the mean count"
        raise InputError(f"{problem}; try a lower LEARNING_RATE (earlier results stay)")


# == Evaluation: metrics, results, figures ========
def is_accurate(true, predicted):
    """Which counts (n,) are within TOLERANCE of the truth. If that is 0, they must round to 0."""
    is_within = np.abs(predicted - true) <= TOLERANCE * true
    return np.where(true == 0, np.round(predicted) == 0, is_within)


def measure(true, predicted):
    """Metrics of counts (n,); accuracy is the share of accurate ones."""
    error = predicted - true
    mse = np.mean(error**2)
    accuracy = is_accurate(true, predicted).mean()
    return {"mae": np.abs(error).mean(), "mse": mse, "rmse": mse**0.5, "accuracy": accuracy}


def get_constants():
    """The constants, as JSON can hold them."""
    constants = {name: value for name, value in globals().items()
                 if name.isupper() and name != "ROOT"}
    return json.loads(json.dumps(constants, default=str))


def print_replaced(outputs):
    """Says which other experiment's results this run will replace, if there are any."""
    try:
        earlier = json.loads((outputs / "metrics.json").read_text())["constants"].items()
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return  # there are none, or none of this script
    now = get_constants()
    changed = [f"{name} = {value!r}" for name, value in earlier if value != now.get(name)]
    if changed:
        changed = shorten(", ".join(changed), 150, placeholder=" ...")
        print(f"{outputs} holds the results of {changed}: this run will replace them.")


def save_results(outputs, model, history, table, run):
    """Writes all results but the figures, and prints a summary. table: id, frame, split, true,
    predicted of every label. run: more for metrics.json. Returns (metrics, baseline): baseline is
    the metrics of always predicting the mean training count; both are None without validation."""
    training, validation = (table[table["split"] == split] for split in ("train", "validation"))
    metrics = baseline = None
    report = run | {"train_frames": len(training), "validation_frames": len(validation)}
    if len(validation):
        metrics = measure(validation["true"], validation["predicted"])
        baseline = measure(validation["true"], training["true"].mean())
        report = metrics | {"baseline": baseline} | report
    report["constants"] = get_constants()
    report["versions"] = {"python": sys.version, "keras": keras.__version__, "tf": tf.__version__}
    write_files(outputs, {
        MODEL: model.save,
        "history.csv": history.to_csv,
        "predictions.csv": partial(table.to_csv, index=False, float_format="%.6f",
                                   errors="surrogateescape"),
        "metrics.json": lambda path: path.write_text(json.dumps(report, indent=2)),
    })
    print()
    if metrics:
        line = "{}: MAE {mae:.3f}, MSE {mse:.3f}, RMSE {rmse:.3f}, within {:.0%}: {accuracy:.1%}"
        print(line.format("Validation frames", TOLERANCE, **metrics))
        print(line.format("Always the mean count", TOLERANCE, **baseline))
        few = ", so few that these metrics tell little" if len(validation) < 20 else ""
        print(f"Number of validation frames: {len(validation)}{few}.")
        if metrics["mae"] >= baseline["mae"]:
            print("That is no better than always predicting the mean count: label more frames.")
    else:
        print("No label was left to validate: nothing is known of the error on other frames.")
    if (outputs / "counts.csv").exists():
        print(f"{outputs / 'counts.csv'} is older than this model: count once more.")
    return metrics, baseline


def name_frames(axis, names):
    """Writes up to five of the names below an x axis on which frames are at 0, 1, 2, ..."""
    places = np.unique(np.linspace(0, len(names) - 1, 5).round().astype(int))
    texts = [str(names[place]).encode(errors="replace").decode() for place in places]
    axis.set_xticks(places, texts, parse_math=False)
    axis.set_xlim(-0.5, len(names) - 0.5)


def plot_loss(history, baseline):
    """The error by epoch. baseline: the metrics of the mean count, or None."""
    figure, axis = plt.subplots(figsize=(6, 4))
    style = {"marker": "o" if len(history) == 1 else None}
    axis.plot(history.index, history["mse"] ** 0.5, label="training frames", **style)
    if baseline:
        validation = history["val_mse"] ** 0.5
        axis.plot(history.index, validation, "--", label="validation frames", **style)
        label = "validation frames, always the mean count"
        axis.axhline(baseline["rmse"], color="0.5", linestyle=":", label=label)
    axis.set(title="RMSE by epoch", ylim=0, xlabel="Epoch", ylabel="RMSE (people)")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axis.legend()
    return figure


def plot_predictions(validation, weights_name, metrics):
    """True and predicted counts, against each other and frame by frame."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=(1, 2))
    counts = validation[["true", "predicted"]].reset_index(drop=True)
    ends = np.array([counts.min().min() - 1, counts.max().max() + 1])
    low, high = (1 - TOLERANCE) * ends, (1 + TOLERANCE) * ends
    left.fill_between(ends, low, high, color="0.9", label=f"within {TOLERANCE:.0%}")
    left.plot(ends, ends, color="0.5", label="exact")
    sns.scatterplot(counts, x="true", y="predicted", s=18, alpha=0.6, ax=left)
    left.set(xlim=ends, ylim=ends, xlabel="True count", ylabel="Predicted count", aspect="equal")
    left.legend()
    sns.lineplot(counts, linewidth=1, marker="o" if len(counts) < 50 else None, ax=right)
    name_frames(right, validation["id"].tolist())
    right.set(xlabel="Validation frame (its id)", ylabel="People")
    for axis in (left.xaxis, left.yaxis, right.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    title = f"{FRAMES}: the last {len(validation)} labelled frames, MAE {metrics['mae']:.2f}"
    figure.suptitle(f"{title} (ResNet50 weights: {weights_name})", parse_math=False)
    return figure


def plot_examples(validation, folder):
    """Validation frames with their counts: the three largest errors, then three typical ones.
    folder: where the frames are."""
    error = validation["predicted"] - validation["true"]
    order = np.argsort(-np.abs(error.to_numpy()), kind="stable")
    middle = max(3, len(order) // 2 - 1)
    figure, axes = plt.subplots(2 if len(order) > 3 else 1, 3, figsize=(11, 6), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, row in zip(axes.flat, [*order[:3], *order[middle : middle + 3]]):
        label = validation.iloc[row]
        axis.imshow(decode(open_image(folder / label["frame"])))
        text = f"{label['id']}: true {label['true']:g}, predicted {label['predicted']:.1f}"
        axis.set_title(f"{text} ({error.iloc[row]:+.1f})", parse_math=False,
                       color="tab:green" if is_accurate(label["true"], label["predicted"])
                       else "tab:red")
    figure.suptitle("Validation frames: the largest errors, then typical ones"
                    f" (red: off by more than {TOLERANCE:.0%})")
    return figure


def plot_counts(table, labels):
    """The counts of all frames. labels: true counts and split of some of them, by name."""
    figure, axis = plt.subplots(figsize=(11, 4))
    axis.plot(table["count"].to_numpy(), ".-", linewidth=1, markersize=3, label="counted")
    for split, group in labels.groupby("split"):
        true = group["true"].reindex(table.index).to_numpy()
        axis.plot(true, "o", markersize=4, label=f"label ({split})")
    axis.set_ylim(bottom=0)
    doubtful = table["unfamiliar"].fillna(True).to_numpy(float)[np.newaxis]
    if doubtful.any():
        area = (-0.5, len(table) - 0.5, *axis.get_ylim())
        axis.imshow(doubtful, "Greys", vmin=0, vmax=4, aspect="auto", extent=area)
        axis.fill_between([], [], color="0.75", label="unlike most training frames, or unreadable")
    name_frames(axis, table.index)
    axis.set_title(f"{COUNT}: people in each frame", parse_math=False)
    axis.set(xlabel="Frame", ylabel="People")
    axis.legend()
    return figure


def save_figures(folder, figures):
    """Saves figures {name: function that plots one, or None}. Those of an earlier model are deleted
    first. If a figure cannot be saved, a warning says so."""
    try:
        for name in figures:
            for ending in (".png", ".pdf"):
                (folder / f"{name}{ending}").unlink(missing_ok=True)
        settings = {"savefig.dpi": 200, "figure.constrained_layout.use": True, "pdf.compression": 1}
        sns.set_theme("paper", "ticks", "colorblind", rc=settings)
        for name, plot in figures.items():
            if plot:
                figure = plot()
                save_png = partial(figure.savefig, pil_kwargs={"compress_level": 1})
                write_files(folder, {f"{name}.png": save_png, f"{name}.pdf": figure.savefig})
    except (InputError, OSError, ImportError, RuntimeError) as error:
        problem = shorten(str(error), 200)
        print(f"Warning: the figures could not be saved ({problem}).", file=sys.stderr)


def show_figures():
    """Shows all figures, where there is a screen, until their windows are closed."""
    if plt.get_backend().lower() != "agg":
        plt.show()
    plt.close("all")


# == Counting new footage ========
@lru_cache(maxsize=1)
def load_model(path, _):
    """The model in a file. The second argument, when the file was written, tells files apart."""
    return keras.saving.load_model(path, compile=False)


def load_stages(model):
    """(backbone, reduction, temporal, regression) of a model or of its file. Raises InputError."""
    problem = f"cannot be opened with Keras {keras.__version__} as a model of this script"
    with explain(f"{model}: {problem}; train a model first"):
        if isinstance(model, (str, Path)):
            path = Path(model).expanduser()
            if not path.is_file():
                raise InputError(f"{path}: no such file; train a model first")
            model = load_model(path, path.stat().st_mtime_ns)
        encoder = model.get_layer("spatial").layer
        inner = [encoder.get_layer(name) for name in ("backbone", "reduction")]
        return [*inner, *(model.get_layer(name) for name in ("temporal", "regression"))]


def list_sources(frames):
    """(names, sources) of what count_people counts, see there. Raises InputError."""
    if isinstance(frames, (str, Path)):
        path = Path(frames).expanduser()
        if path.is_file() and path.name.lower().endswith(FRAME_ENDINGS):
            return [path.name], [path]
        names, _ = list_frames(path)
        return names, [path / name for name in names]
    if isinstance(frames, np.ndarray) and frames.ndim == 3:
        frames = [frames]
    names, sources = [], []
    for frame in frames:
        is_path = isinstance(frame, (str, Path))
        names.append(Path(frame).as_posix() if is_path else len(names))
        sources.append(Path(frame).expanduser() if is_path else np.array(frame))  # a copy
    if not sources:
        raise InputError("no frames to count: the list is empty")
    return names, sources


def count_people(model, frames, cache=None):
    """Counts the people in new frames of the camera that a model was trained on.

    model: path of a ts_crowdnet.keras, or the loaded model. frames: a folder, as FRAMES; a frame;
    or an iterable of paths or of uint8 RGB arrays (H, W, 3), in order. cache: a folder for what
    ResNet50 computes, so that no frame is read twice. Returns a DataFrame with a row for each
    frame, indexed by its path in the folder, its path as given, or its number: count, and
    unfamiliar, True where a frame is unlike most training frames; both empty where it cannot be
    read. Shows progress for more than 64 frames. Raises InputError."""
    names, sources = list_sources(frames)
    backbone, reduction, temporal, regression = load_stages(model)
    cache = Path(cache).expanduser() if cache else None
    checked = check_frames(names, sources, cache)
    readable = np.flatnonzero(checked["problem"].isna())
    if len(readable) < len(sources):
        problem = describe_problems(checked)
        if not len(readable):
            raise InputError(problem)
        print(f"{problem}; their counts stay empty.")

    size = backbone.input_shape[1:3]
    digests = checked["digest"][readable].tolist()
    readable_frames = Frames([sources[row] for row in readable], digests, size)
    norms, vectors = [], []
    for features in extract_features(backbone, readable_frames, cache):  # (n, F)
        standardised = reduction.get_layer("standardised")(features)
        norms.append(ops.convert_to_numpy(ops.norm(standardised, axis=1)))
        vectors.append(ops.convert_to_numpy(reduction(features)))
    vectors = np.concatenate(vectors)  # (P, K)
    clip_starts = find_clip_starts([names[row] for row in readable])
    windows = make_windows(np.arange(len(vectors)), clip_starts, temporal.input_shape[1])
    people = []
    for rows in np.array_split(windows, math.ceil(len(windows) / 1000)):
        # Called directly: predict() would compile anew for each new number of windows.
        people.append(ops.convert_to_numpy(regression(temporal(vectors[rows]))))
    counts = np.maximum(np.concatenate(people)[:, 0], 0).astype(float)
    unfamiliar = pd.array(np.concatenate(norms) > UNFAMILIAR, "boolean")
    table = pd.DataFrame({"count": counts, "unfamiliar": unfamiliar}, index=readable)
    return table.reindex(range(len(sources))).set_axis(pd.Index(names, name="frame"))


def count_folder():
    """What the script does with COUNT: writes counts.csv and a figure into OUTPUTS."""
    started, outputs = time.time(), resolve_path(OUTPUTS)
    load_stages(outputs / MODEL)  # before any folder is made
    prepare_folder(outputs, "OUTPUTS")
    cache = prepare_cache()
    print(f"{outputs / MODEL} counts the people in {resolve_path(COUNT)}.")
    table = count_people(outputs / MODEL, resolve_path(COUNT), cache)
    save_counts = partial(table.to_csv, float_format="%.3f", errors="surrogateescape")
    write_files(outputs, {"counts.csv": save_counts})
    labels = pd.DataFrame(columns=["true", "split"])
    if resolve_path(COUNT).resolve() == resolve_path(FRAMES).resolve():
        with suppress(OSError, ValueError, LookupError):  # the figure can go without them
            labels = pd.read_csv(outputs / "predictions.csv", index_col="frame")[["true", "split"]]
    save_figures(outputs, {"counts": partial(plot_counts, table, labels)})
    is_familiar = ~table["unfamiliar"].fillna(True).astype(bool)
    n_unfamiliar = int(table["unfamiliar"].sum())
    doubt = ": doubt their counts." if n_unfamiliar else "."
    print(f"{n_unfamiliar} of {len(table)} frames look unlike most training frames{doubt}")
    if is_familiar.any():
        where = f"the {is_familiar.sum()} familiar" if n_unfamiliar else "these"
        print(f"{table['count'][is_familiar].mean():.1f} people on average in {where} frames.")
    print(f"Done in {time.time() - started:.0f} s. Open {outputs / 'counts.png'} and counts.csv.")
    show_figures()


# == Checks and files ========
def check_constants():
    """Raises InputError for values that would otherwise fail late, silently, or by an error that
    does not name the constant. Python names others itself."""

    def require(is_right, name, remedy):
        if not is_right:
            raise InputError(f"{name} = {globals()[name]!r}: make it {remedy}")

    def is_whole(value, least):
        return isinstance(value, int) and value >= least

    path, share, whole = "a path, in quotes", "a share, from 0 to 1", "a whole number from 1"
    require(FRAMES != "", "FRAMES", path)
    require(OUTPUTS != "", "OUTPUTS", path)
    require(COUNT != "", "COUNT", path)
    require(WEIGHTS != "", "WEIGHTS", path)
    require(0 <= TRAIN_FRACTION <= 1, "TRAIN_FRACTION", share)
    is_size = len(FRAME_SIZE) == 2 and all(is_whole(side, 32) for side in FRAME_SIZE)
    require(is_size, "FRAME_SIZE", "(height, width), from 32")
    require(is_whole(SEQUENCE_LENGTH, 1), "SEQUENCE_LENGTH", whole)
    require(is_whole(EPOCHS, 1), "EPOCHS", whole)
    require(is_whole(BATCH_SIZE, 1), "BATCH_SIZE", whole)
    require(0 < LEARNING_RATE < 100, "LEARNING_RATE", "above 0 and below 100, such as 0.1")
    require(is_whole(SEED, 0) and SEED < 2**32, "SEED", "a whole number from 0, below 2**32")
    require(0 <= TOLERANCE <= 1, "TOLERANCE", share)
    require(is_whole(FRAME_BATCH, 1), "FRAME_BATCH", whole)
    precisions = ("auto", "float32", "mixed_bfloat16")
    require(PRECISION in precisions, "PRECISION", f"one of {precisions}")
    require(CACHE, "CACHE", path)
    require(CACHE_FEATURES in (True, False), "CACHE_FEATURES", "True or False")
    for name in ("FEATURE_LAYERS", "FEATURE_LAYERS_RANDOM"):
        grids = globals()[name].values()
        is_right = grids and all(len(grid) == 2 and min(grid) >= 1 for grid in grids)
        require(is_right, name, "{layer: (height, width)}")
    require(is_whole(COMPONENTS, 0), "COMPONENTS", "a whole number from 0")
    require(is_whole(LSTM_UNITS, 1), "LSTM_UNITS", whole)
    require(is_whole(PROJECTION, 0), "PROJECTION", "a whole number from 0")
    require(0 <= LSTM_DROPOUT < 1, "LSTM_DROPOUT", "a share, from 0 and below 1")
    require(is_whole(DENSE_UNITS, 1), "DENSE_UNITS", whole)
    require(0 <= AUGMENT <= 1, "AUGMENT", share)
    require(0 <= RANDOM_NEIGHBOURS <= 1, "RANDOM_NEIGHBOURS", share)
    require(is_whole(NEIGHBOUR_RANGE, 0), "NEIGHBOUR_RANGE", "a whole number from 0")
    with explain(f'{OPTIMIZER = }: make it "adam", say, or the dict that the script comes with'):
        keras.optimizers.get(OPTIMIZER)


def check_labels(labels, places, names, others):
    """Raises InputError unless each label fits exactly one frame. places: of the frames that each
    label fits, see find_names. names: of all frames; others: of other files in their folder."""
    folder, file = resolve_path(FRAMES), resolve_path(LABELS)
    label_of, missing = {}, []
    for line, label_id, fitting in zip(labels.index, labels["id"], places):
        where = f"{file}, row {line}: id {label_id!r}"
        if len(fitting) > 1:
            first, second = (names[place] for place in fitting[:2])
            raise InputError(f"{where} fits {first} and {second}; make paths the ids")
        if not fitting:
            missing.append(label_id)
        elif fitting[0] in label_of:
            other = label_of[fitting[0]]
            raise InputError(f"{where} names the same frame as id {other!r}; remove one")
        else:
            label_of[fitting[0]] = label_id
    if missing:
        some = ", ".join(map(str, missing[:3]))
        problem = f"{len(missing)} of {len(labels)} labelled frames are missing, such as {some}"
        there = f"the folder has {names[0]} ... {names[-1]}"
        if unread := [others[place] for place, *_ in filter(None, find_names(missing, others))]:
            problem = f"{unread[0]} is of a kind not read, or a link that leads nowhere"
            problem += "; if it is a labelled frame, replace it by a .jpg"
        remedy = "correct FRAMES or LABELS. Do ids and names start at the same number?"
        raise InputError(f"{folder}: {problem}; {there}; {remedy}")


def check_frames(names, sources, cache):
    """Finds the frames that cannot be read. Decodes each, except those whose features are in cache
    (a folder, or None). Returns a DataFrame with a row for each: digest, the MD5 of its content;
    width; height; pages of its file; and problem: its name and why it cannot be read, or None."""
    cached = {path.stem for path in cache.glob("*/*.npz")} if cache else set()

    def check(name, source):
        is_array = isinstance(source, np.ndarray)
        try:
            content = source.tobytes() if is_array else source.read_bytes()
            form = f"{source.shape} {source.dtype}".encode() if is_array else b""
            digest = hashlib.md5(form + content).hexdigest()
            image = open_image(source)
            width, height = image.size
            if image.getexif().get(0x0112) in (5, 6, 7, 8):  # EXIF: turn it by 90 degrees
                width, height = height, width
            pages = image.n_frames if image.format == "TIFF" else 1
            if digest not in cached:
                decode(image)
        except Exception as error:  # Pillow raises many types
            problem = "not an image" if isinstance(error, UnidentifiedImageError) else error
            return None, 0, 0, 0, f"{name}: {problem}"
        return digest, width, height, pages, None

    with ThreadPoolExecutor() as pool:
        rows = list(pool.map(check, names, sources))
    columns = ["digest", "width", "height", "pages", "problem"]
    return pd.DataFrame(rows, columns=columns, dtype=object)


def describe_problems(checked):
    """A line about the frames that cannot be read."""
    problems = checked["problem"].dropna()
    named = "; ".join(problems)[:200].encode(errors="replace").decode()
    return f"{len(problems)} of {len(checked)} frames cannot be read: {named}"


def check_data(names, paths, table, cache):
    """Checks the frames with these names and paths (P,) and returns their digests (P,). Prints what
    distorts them. Raises InputError for frames that cannot be read, and if the sample's labels are
    used with other frames."""
    checked = check_frames(names, paths, cache)
    if checked["problem"].notna().any():
        raise InputError(f"{resolve_path(FRAMES)}: {describe_problems(checked)}; replace them")
    if b"synthetic mall sample" in paths[0].read_bytes():
        print("These frames are rendered; the README tells how to use real ones.")
    elif hashlib.md5(table["true"].to_numpy(float).tobytes()).hexdigest() == SAMPLE_COUNTS:
        problem = "labels of the sample, not of these frames"
        raise InputError(f"{resolve_path(LABELS)}: {problem}; correct LABELS")
    if n_pages := int((checked["pages"] - 1).sum()):
        print(f"Left out: {n_pages} further pages of TIFF files.")
    height, width = FRAME_SIZE
    aspect_ratio = (checked["width"] / checked["height"]).astype(float)
    distorted = checked[~(aspect_ratio * height / width).between(0.9, 1.1)]
    if len(distorted):
        (most_width, most_height), *_ = distorted.value_counts(["width", "height"]).index
        print(f"FRAME_SIZE = {FRAME_SIZE} distorts {len(distorted)} of {len(paths)} frames, such as"
              f" those of {most_width}x{most_height}.")
        if len(distorted) > len(paths) / 2:
            fitting = (height, round(height * most_width / most_height))
            print(f"FRAME_SIZE = {fitting} keeps their shape.")
    return checked["digest"].tolist()


def check_split(table, digests):
    """Prints why the validation metrics may mislead. table: frame, split, true of the N labels;
    digests (N,) of their frames."""
    is_train = table["split"] == "train"
    digests = pd.Series(digests)
    n_known = int(digests[~is_train].isin(digests[is_train]).sum())
    if n_known:
        print(f"{n_known} validation frames are copies of training frames, byte for byte:",
              "the metrics look better than they are.")
    highest = table["true"][is_train].max()
    n_above = int((table["true"][~is_train] > highest).sum())
    if n_above:
        print(f"{n_above} of {(~is_train).sum()} validation counts are above {highest:g}, the",
              "highest in training: expect predictions that are too low.")


def write_files(folder, writers):
    """Writes files {name: write(path)}. They are written under temporary names first and moved
    when all are whole, so that no file is ever half written. Raises InputError."""
    targets = {folder / name: folder / f".new-{name}" for name in writers}
    try:
        for (target, new), write in zip(targets.items(), writers.values()):
            write(new)
            if target.exists():
                target.open("ab").close()  # fails now if another program holds the file
        for target, new in targets.items():
            with suppress(FileNotFoundError):  # a run that shares the cache has moved it already
                os.replace(new, target)
    except OSError as error:
        for new in targets.values():
            new.unlink(missing_ok=True)
        is_blocked = isinstance(error, (PermissionError, IsADirectoryError))
        remedy = "close it or move it away" if is_blocked else "make room for it"
        problem = f"cannot be written ({error.strerror or 'is the disk full?'})"
        raise InputError(f"{target}: {problem}; {remedy}") from error


def prepare_folder(folder, constant):
    """Makes the folder that a constant names. Raises InputError if it cannot be written to."""
    with explain(f"{folder}: cannot be written to; set {constant} to another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    return folder


def prepare_cache():
    """The folder CACHE, ready to be written to, or None if features are not kept. Raises
    InputError."""
    if not CACHE_FEATURES:
        return None
    cache = prepare_folder(resolve_path(CACHE), "CACHE")
    size = sum(path.stat().st_size for path in cache.glob("*/[!.]*.npz"))
    print(f"Features are kept in {cache} ({size / 1e6:,.0f} MB so far).")
    return cache


def open_cache(backbone, cache):
    """The folder within the folder cache for features of this very network. Raises InputError."""
    pixels_version = 1  # raise it when decode(), Frames.load() or jitter() changes
    versions = (pixels_version, keras.__version__, keras.backend.backend(), Image.__version__)
    layout = re.sub(r'_\d+"', '"', backbone.to_json())  # Keras numbers the same layers differently
    key = hashlib.md5(f"{versions} {layout}".encode())
    for weights in backbone.get_weights():
        key.update(weights.tobytes())
    return prepare_folder(cache / key.hexdigest(), "CACHE")


# == Main ========
def main():
    """Labels -> windows -> feature vectors -> network -> counts -> figures and numbers."""
    check_constants()
    if COUNT:
        return count_folder()
    started = time.time()
    keras.config.set_image_data_format("channels_last")

    # Data: N windows of T of P frames; C of the frames have a jittered copy.
    table, names, windows = load_data()
    counts = table["true"].to_numpy(float)  # (N,)
    n_train = int((table["split"] == "train").sum())  # the first ones
    outputs = prepare_folder(resolve_path(OUTPUTS), "OUTPUTS")
    print_replaced(outputs)
    cache = prepare_cache()
    paths = [resolve_path(FRAMES) / name for name in names]
    digests = check_data(names, paths, table, cache)  # (P,)
    check_split(table, [digests[row] for row in windows[:, -1]])
    training_rows = np.unique(windows[:n_train])  # (M,), the frames that training windows contain
    copied = choose_copied(digests, windows[:n_train, -1])  # (C,)
    frames = Frames(paths, digests, FRAME_SIZE, copied)

    # Stage 1, spatial: frozen ResNet50, then PCA, fitted to features of the training frames.
    device, precision = choose_precision()
    calibration_frames = frames[training_rows[:2]]  # for random weights; more would fill the memory
    backbone, weights_name = build_backbone(calibration_frames, precision)
    print(f"ResNet50 ({weights_name}; {precision}; {device}): {len(frames)} images,",
          f"{len(names)} frames and {len(copied)} jittered copies.")
    features = np.concatenate(list(extract_features(backbone, frames, cache)))  # (P + C, F)
    reduction = build_reduction(features[training_rows], features[len(names) :])
    spatial = build_spatial(backbone, reduction)

    # Stages 2 and 3, temporal and regression, train.
    keras.utils.set_random_seed(SEED)
    vectors = reduction.predict(features, batch_size=256, verbose=0)  # (P + C, K)
    temporal = build_temporal(vectors.shape[1])
    regression = build_regression(counts[:n_train])
    batch_size = min(BATCH_SIZE, math.ceil(n_train / 4))  # few labels still need enough steps
    if CACHE_FEATURES:
        model = keras.Sequential([temporal, regression])
        frame_data, eval_batch_size = vectors, 512
    else:
        model = keras.Sequential([spatial, temporal, regression])
        frame_data, eval_batch_size = frames, batch_size
    draw = partial(draw_windows, clip_starts=find_clip_starts(names), copy_of=frames.copy_of)
    training = WindowSequence(frame_data, windows[:n_train], counts[:n_train], batch_size, draw)
    validation = None
    if n_train < len(table):
        validation = WindowSequence(frame_data, windows[n_train:], counts[n_train:],
                                    eval_batch_size)
    history = train(model, training, validation)

    # Evaluation: the count of every labelled frame.
    labelled = WindowSequence(frame_data, windows, counts, eval_batch_size)
    predicted = model.predict(labelled, verbose=0)[:, 0]  # (N,)
    check_trained(predicted[:n_train], counts[:n_train])
    table["predicted"] = np.maximum(predicted, 0)
    network = build_network(spatial, temporal, regression)
    run = {"weights": weights_name, "precision": precision, "device": device,
           "features": features.shape[1], "components": vectors.shape[1]}
    metrics, baseline = save_results(outputs, network, history, table, run)
    validated = table[table["split"] == "validation"]
    figures = {"loss": partial(plot_loss, history, baseline), "predictions": None, "examples": None}
    if metrics:
        figures["predictions"] = partial(plot_predictions, validated, weights_name, metrics)
        figures["examples"] = partial(plot_examples, validated, resolve_path(FRAMES))
    save_figures(outputs, figures)
    shown = "predictions.png and examples.png" if metrics else "loss.png"
    print(f"Done in {time.time() - started:.0f} s. Open {shown} in {outputs}.")
    show_figures()


def stop(*_):
    """Ends the process at Ctrl-C. KeyboardInterrupt would now and then crash within TensorFlow."""
    print("\nStopped; the same command goes on where it was, but training starts anew.",
          file=sys.stderr)
    os._exit(130)


def run_as_script():
    """main(), with one line instead of a traceback for what the user can put right."""
    if "IPython" not in sys.modules:  # a notebook's kernel must survive
        signal.signal(signal.SIGINT, stop)
        with suppress(AttributeError):  # not every editor's output has it
            sys.stdout.reconfigure(errors="replace")  # names of files may be no text
    tf.get_logger().setLevel("ERROR")  # else TensorFlow warns of the smaller last batch
    if len(sys.argv) > 1:
        name = Path(__file__).name
        print(f"{name} takes no arguments: edit the constants at its top.", file=sys.stderr)
        sys.exit(2)
    try:
        main()
    except (InputError, OSError) as error:
        if sys.flags.dev_mode:  # python -X dev
            raise
        sys.exit(" ".join(f"Error: {error}".splitlines())[:500])


if __name__ == "__main__":
    run_as_script()
