"""TS-CrowdNet: count the people in a fixed-camera video with TimeDistributed ResNet50 + LSTM,
trained from one number a frame; eighty numbers, spread over the footage, go a long way.

    pip install -r requirements.txt && python tscrowdnet_train.py

Reads    labels.csv                        id,count: the people in some of the pictures, or all
         frames/frames/seq_000001.jpg ...  the pictures of one fixed camera
Writes   outputs/ts_crowdnet.keras         the model: windows of uint8 frames in, counts out
         outputs/metrics.json, predictions.csv, history.csv; figures as .png and .pdf
         outputs/counts.csv                with COUNT: the count of each new picture; a figure
         feature_cache/                    what ResNet50 made of each picture

A label makes a window: the T = SEQUENCE_LENGTH pictures that end at the labelled one. The N
windows show P pictures; the first n_train windows train, and C of their pictures have a
jittered copy. H x W = FRAME_SIZE, F features of a picture, K numbers in its feature vector:
COMPONENTS at most, or F without PCA.

    windows of frames (N, T, H, W, 3) uint8
    1. spatial     TimeDistributed(ResNet50 -> F features -> PCA) -> feature vectors (N, T, K)
    2. temporal    the same Dense for each vector, an LSTM        -> memory (N, LSTM_UNITS)
    3. regression  Dense(gelu), Dense(1)                          -> people in each last picture

Stage 1 is frozen, so it reads each of the P + C pictures once; a Sequence feeds windows of
their feature vectors to stages 2 and 3, which train. With CACHE_FEATURES = False it feeds the
windows of frames to all three.
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
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from textwrap import shorten

if __name__ == "__main__":
    if "IPython" not in sys.modules:  # %run leaves a notebook its own Ctrl-C
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends without a traceback
    if os.environ.get("MPLBACKEND", "").startswith("module:"):  # inherited from a notebook
        del os.environ["MPLBACKEND"]
    stderr = os.dup(2)
    faulthandler.enable(stderr)  # a crash while stderr is closed still says where
    if not shutil.which("nvidia-smi"):  # TensorFlow greets only where it may be about a GPU
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
try:
    import keras
    import matplotlib.pyplot as plt
    import numpy as np
    import pandas as pd
    import scipy.io
    import scipy.stats
    import seaborn as sns
    import tensorflow as tf
    from keras import layers, ops
    from PIL import Image, ImageEnhance, ImageOps, UnidentifiedImageError  # as matplotlib does
    from sklearn import decomposition, preprocessing
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    sys.exit(f"Error: {error}; pip install -r requirements.txt, with Python 3.10 to 3.13")
finally:
    if __name__ == "__main__":
        os.dup2(stderr, 2)

ROOT = Path(__file__).resolve().parent

# -- Data: relative paths start at this script's folder
LABELS = "labels.csv"  # a CSV with columns id,count, or the official "mall_gt.mat"
FRAMES = "frames/frames"  # folder of seq_000001.jpg, ...: one fixed camera
OUTPUTS = "outputs"  # a folder for each experiment
SEQUENCE_LENGTH = 5  # pictures in a window; 1 adds 0.01 to Mall's MAE, 0.1 with 40 labels
FRAME_SIZE = (300, 400)  # (height, width) fed to ResNet50; larger if people are small
TRAIN_FRACTION = 0.8  # first part of the labels; 0.4: Mall's canonical split; 1: all, unvalidated

# -- Spatial stage: frozen ResNet50, PCA
WEIGHTS = "imagenet"  # or the path of a ResNet50 weight file (no top), or None: random
# Layers to read, and the grid (rows, columns) over which each is summarised.
FEATURE_LAYERS = {"conv2_block3_out": (3, 2), "conv3_block4_out": (3, 2),
                  "conv4_block6_out": (1, 1), "conv5_block3_out": (1, 1)}
# Read if the weights are random: their deeper layers only add noise.
FEATURE_LAYERS_RANDOM = {"conv1_relu": (3, 2), "conv2_block1_out": (3, 2),
                         "conv2_block3_out": (3, 2)}
FEATURE_SPREAD = True  # each cell's standard deviation, too; False: its mean alone
COMPONENTS = 512  # length of a feature vector, or less with few pictures; 0: no PCA
AUGMENT = 0.25  # share of training pictures with a copy in other light, the camera nudged
CACHE_FEATURES = True  # False: none are kept, ResNet50 works in each step; the same result
CACHE = "feature_cache"  # one for all experiments
PRECISION = "auto"  # or "float32", "mixed_bfloat16", which is faster on processors made for it
FRAME_BATCH = 8  # pictures ResNet50 reads at once; fewer if memory runs out

# -- Temporal stage: projection and LSTM
PROJECTION = 32  # a Dense shortens each feature vector to so many numbers; 0: none does
LSTM_UNITS = 64  # more for longer windows
LSTM_DROPOUT = 0.0  # share of the LSTM's inputs dropped in training
FORGET_BIAS = -2.0  # higher: earlier pictures weigh more from the start (Keras: 1)

# -- Regression stage and training
DENSE_UNITS = 64  # of the layer between the LSTM and the count
BATCH_SIZE = 32  # windows in a step; a quarter of the training windows if that is less
EPOCHS = 50  # fewer for a quick look
# SGD learns first what many pictures share, last what is peculiar to one.
OPTIMIZER = {"class_name": "sgd",
             "config": {"momentum": 0.9, "nesterov": True, "clipnorm": 1.0}}
LEARNING_RATE = 0.1  # falls to 0 along a half cosine; 1e-3 for "adam"
SEED = 0  # publish mean and standard deviation over several

# -- Evaluation and use
TOLERANCE = 0.20  # counts within this share of the truth are accurate
COUNT = None  # a folder of new pictures to count with the model in OUTPUTS, not to train
UNFAMILIAR = 1.05  # mark pictures this x farther from the training mean than any trained on

IMAGENET_FILE = "resnet50_weights_tf_dim_ordering_tf_kernels_notop.h5"
IMAGENET_MD5 = "4d473c1dd8becc155b73f8504c6f6626"
NEW = ".new-ts_crowdnet-"  # how folders begin of what is not whole yet
PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
MODEL = "ts_crowdnet.keras"
RESULTS = (MODEL, "history.csv", "predictions.csv", "metrics.json")
FIGURES = ("loss.png", "loss.pdf", "predictions.png", "predictions.pdf",
           "examples.png", "examples.pdf")
SAMPLE_COUNTS = "0e5fe536512e4161155f1f2fd24f9369"  # MD5 of the shipped counts, as float64


class InputError(ValueError):
    """A mistake that the user can correct; the message says how."""


def at(path):
    """A path from the constants, relative to this script's folder unless absolute."""
    return ROOT / Path(path).expanduser()


def is_pair(value):
    """Whether value is two ints from 1."""
    return (isinstance(value, (tuple, list)) and len(value) == 2
            and all(type(number) is int and number >= 1 for number in value))


def describe_device():
    """What Keras computes on, and whether it has units for bfloat16: ("CPU", False)."""
    device = str(ops.zeros(1).device).upper()
    if "GPU" in device or "CUDA" in device:
        gpus = tf.config.list_physical_devices("GPU")
        details = tf.config.experimental.get_device_details(gpus[0]) if gpus else {}
        name = f"GPU:0 {details.get('device_name', '')}".strip()
        return name, details.get("compute_capability", (0, 0)) >= (8, 0)
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        flags = ""
    return "CPU", bool(re.search("avx512_bf16|amx_bf16", flags))


def choose_precision():
    """PRECISION; if "auto", bfloat16 where the device has units for it: twice the speed."""
    if PRECISION != "auto":
        return PRECISION
    _, has_bfloat16 = describe_device()
    return "mixed_bfloat16" if has_bfloat16 else "float32"


def check_constants():
    """Raises InputError for constants that would fail late or obscurely."""
    limits = {  # (lowest, highest): names; two ints allow ints alone
        (1, 100): ["SEQUENCE_LENGTH"],
        (1, 1000): ["FRAME_BATCH"],
        (1, 10**6): ["LSTM_UNITS", "DENSE_UNITS", "BATCH_SIZE", "EPOCHS"],
        (0, 10**6): ["COMPONENTS", "PROJECTION", "SEED"],
        (0.0, 1.0): ["AUGMENT", "TOLERANCE", "TRAIN_FRACTION"],
        (0.0, 0.99): ["LSTM_DROPOUT"],
        (1e-6, 99.0): ["LEARNING_RATE"],
        (0.0, 99.0): ["UNFAMILIAR"],
        (-99.0, 99.0): ["FORGET_BIAS"],
    }
    for (low, high), names in limits.items():
        for name in names:
            value, kind = globals()[name], "a whole number" if type(low) is int else "a number"
            is_number = isinstance(value, (int, type(low))) and not isinstance(value, bool)
            if not (is_number and low <= value <= high):
                raise InputError(f"{name} = {value!r}: make it {kind}, {low} to {high}")
    for name in ("FEATURE_SPREAD", "CACHE_FEATURES"):
        if type(globals()[name]) is not bool:
            raise InputError(f"{name} = {globals()[name]!r}: make it True or False")
    for name in ("LABELS", "FRAMES", "OUTPUTS", "CACHE", "WEIGHTS", "COUNT"):
        value, is_optional = globals()[name], name in ("WEIGHTS", "COUNT")
        if not (value and isinstance(value, (str, Path)) or is_optional and not value):
            remedy = "make it a path, in quotes" + (", or None" if is_optional else "")
            raise InputError(f"{name} = {value!r}: {remedy}")
    if not (is_pair(FRAME_SIZE) and min(FRAME_SIZE) >= 32):
        raise InputError(f"{FRAME_SIZE = }: make it (height, width), whole numbers from 32")
    for name in ("FEATURE_LAYERS", "FEATURE_LAYERS_RANDOM"):
        grids = globals()[name]
        if not (isinstance(grids, dict) and grids and all(map(is_pair, grids.values()))):
            remedy = "{layer: (rows, columns)}, whole numbers from 1"
            raise InputError(f"{name} = {grids!r}: make it {remedy}")
    if choose_precision() not in ("float32", "mixed_bfloat16"):
        raise InputError(f'{PRECISION = }: make it "auto", "float32" or "mixed_bfloat16"')
    try:
        keras.optimizers.get(OPTIMIZER).learning_rate = LEARNING_RATE
    except Exception as error:  # of many kinds
        remedy = 'make it "sgd", "adam", or a dict like the one that the script comes with'
        raise InputError(f"{OPTIMIZER = }: {remedy} ({shorten(str(error), 150)})") from error


# == Files: whole or absent ========
def write_files(folder, writers):
    """Writes files {name: write(path)} elsewhere, then moves them into folder: all of them, or
    none unless killed between two moves. Raises InputError where one cannot be written."""
    with tempfile.TemporaryDirectory(prefix=NEW, dir=folder) as new:
        new, old = Path(new), Path(new, "old")
        old.mkdir()
        try:
            for name, write in writers.items():
                write(new / name)
                if (folder / name).is_file():
                    shutil.copyfile(folder / name, old / name)
        except OSError as error:
            problem, remedy = error.strerror or "is the disk full?", "make room for it"
            if isinstance(error, PermissionError):
                remedy = "make it readable, or move it away"
            raise InputError(f"{folder / name}: cannot be written ({problem}); {remedy}") from error
        moved = []
        try:
            for name in writers:
                os.replace(new / name, folder / name)
                moved.append(name)
        except OSError as error:
            for done in moved:
                (folder / done).unlink()
                if (old / done).exists():
                    os.replace(old / done, folder / done)
            problem = f"cannot be replaced ({error.strerror})"
            raise InputError(f"{folder / name}: {problem}; close it or move it away") from error


def prepare_folder(folder, constant, names=()):
    """Makes the folder that a constant names. Raises InputError where these files could not be
    written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(prefix=NEW, dir=folder).cleanup()
    except OSError as error:
        problem = "it is a file" if folder.is_file() else error.strerror
        remedy = f"set {constant} to another folder"
        raise InputError(f"{folder}: cannot be written to ({problem}); {remedy}") from error
    for name in names:
        if (folder / name).is_dir():
            raise InputError(f"{folder / name}: a folder where a file goes; move it away")
    return folder


def sweep(started):
    """Takes away what a killed run left half written before this one started (time.time())."""
    for folder in (at(OUTPUTS), at(CACHE), *at(CACHE).glob("*")):
        for new in folder.glob(f"{NEW}*"):
            if new.exists() and new.stat().st_mtime < started:
                shutil.rmtree(new, ignore_errors=True)


# == Data: labels, pictures, windows ========
def read_labels(path):
    """Reads counts from a CSV with columns id and count, or from Mall's mall_gt.mat. Returns a
    float Series indexed by id, NaN where a row has no count. Raises InputError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); correct LABELS") from error
    try:
        if not data.strip():
            raise ValueError("it is empty")
        if path.suffix.lower() == ".mat":
            counts = scipy.io.loadmat(io.BytesIO(data), variable_names=["count"])["count"].ravel()
            if counts.dtype.kind not in "iuf":
                raise ValueError("its 'count' is no array of numbers")
            table = pd.DataFrame({"id": range(1, len(counts) + 1), "count": counts}, dtype=str)
            table.index += 1
        else:
            encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
            options = {"encoding": encoding, "encoding_errors": "replace"}
            options |= {"sep": None, "engine": "python"}  # whatever separates
            options |= {"dtype": str, "header": None, "skip_blank_lines": False}
            table = pd.read_csv(io.BytesIO(data), **options)
            names = table.iloc[0].str.strip().str.lower()
            if sorted(names[names.isin(["id", "count"])]) != ["count", "id"]:
                raise ValueError(f"its first line has {list(table.iloc[0])}, not id and count")
            table.columns = names
            table.index += 1
            table = table[1:]
        table = table[["id", "count"]].dropna(how="all")
    except Exception as error:  # of many kinds
        remedy = "correct it: a CSV whose first line is id,count, or Mall's mall_gt.mat"
        raise InputError(f"{path}: {shorten(str(error), 150)}; {remedy}") from error

    def refuse(is_bad, column, problem):
        if is_bad.any():
            row = is_bad.idxmax()
            value = table[column].fillna("")[row]
            raise InputError(f"{path}, row {row}: {column} {value[:40]!r} {problem}; correct it")

    is_id = table["id"].fillna("").str.fullmatch(r"\s*\d{1,40}(\.0*)?\s*")
    refuse(~is_id, "id", "is no whole number from 0")
    ids = table["id"].map(lambda text: int(text.split(".")[0]))  # exact, however many digits
    refuse(ids.duplicated(), "id", "is there twice")
    counts = pd.to_numeric(table["count"], errors="coerce").astype(float)
    is_count = table["count"].isna() | counts.between(0, 10**6)
    refuse(~is_count, "count", "is no number from 0 to 1,000,000")
    return pd.Series(counts.to_numpy(), index=ids.tolist()).sort_index()


def list_pictures(folder):
    """The pictures in a folder in the natural order of their names: frame_2, frame_10."""

    def natural(path):
        return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)]

    paths = folder.iterdir() if folder.is_dir() else []
    paths = [path for path in paths if path.suffix.lower() in PICTURES and path.name[0] != "."]
    return sorted((path for path in paths if path.is_file()), key=natural)


def read_numbers(source):
    """(number, stamp, seconds) of a picture: the last number in its name; of a date and clock
    that end the name, as in 20240101_100059.jpg, all digits as one number, and the time. Each
    None where there is none."""
    name = getattr(source, "stem", "")
    number = re.search(r"(\d+)\D*$", name)
    clock = re.search(r"(?<!\d)(\d{4})" + r"\D?(\d\d)" * 5 + r"(?:\D?(\d{3}|\d{6}))?\D*$", name)
    stamp = seconds = None
    if clock:
        *date, fraction = clock.groups("")
        try:
            moment = datetime(*map(int, date), tzinfo=timezone.utc)
            stamp, seconds = int("".join(clock.groups(""))), moment.timestamp()
            seconds += float(f"0.{fraction or 0}")
        except ValueError:  # digits that are no date
            pass
    return int(number[1]) if number else None, stamp, seconds


def find_times(sources):
    """When each picture was taken, as numbers in the unit of its name: seconds where all names
    end with a date and clock, else, or where two have the same, their last numbers. Where a
    name has none, or two have the same again, the order given: 0, 1, 2, ..."""
    numbers, _, seconds = zip(*map(read_numbers, sources))
    for times in (seconds, numbers):
        if None not in times and len(set(times)) == len(times):
            return list(times)
    return list(range(len(sources)))


def find_remedy(ids, rows):
    """What to do where pictures are missing: they are in another folder, or the ids are
    shifted. Or None. rows: those of the pictures that FRAMES has, by number."""
    ids = set(ids.tolist())
    if not ids & rows.keys():
        folder = at(FRAMES)
        below = sorted(path for path in folder.glob("*") if path.is_dir())
        for other in [folder.parent, *below]:
            if ids <= {read_numbers(path)[0] for path in list_pictures(other)}:
                return f"they are in {other}: set FRAMES to it"
        if not folder.is_dir():
            return "there is no such folder; correct FRAMES"
    shift = min(rows, default=0) - min(ids)
    if shift and len(ids) > 1 and {number + shift for number in ids} <= rows.keys():
        return f"do the ids start at another number? With {shift} added to each, all are there"
    return None


def find_labelled(paths, ids):
    """The rows of paths, a picture each, that ids name by their last number, or by all digits
    of a date and clock. Raises InputError."""
    rows = {}
    for row, path in enumerate(paths):
        number, stamp, _ = read_numbers(path)
        for name in {number, stamp} - {None}:
            rows.setdefault(name, []).append(row)
    missing = [frame for frame in ids.tolist() if frame not in rows]
    if missing:
        problem = f"{len(missing)} of {len(ids)} labelled pictures missing"
        remedy = f"add those of ids {shorten(str(missing), 60)}, or correct FRAMES or LABELS"
        raise InputError(f"{at(FRAMES)}: {problem}; {find_remedy(ids, rows) or remedy}")
    for frame in ids.tolist():
        if len(rows[frame]) > 1:
            first, second = (paths[row] for row in rows[frame][:2])
            remedy = "move one away, or take dates and clocks as ids"
            raise InputError(f"{first} and {second.name} have one number; {remedy}")
    found = pd.Series([rows[frame][0] for frame in ids.tolist()], index=ids)
    if found.duplicated().any():
        frame = found.index[found.duplicated()][0]
        raise InputError(f"{at(LABELS)}: id {frame} names a picture that another id names, too")
    return found.to_numpy()


def make_windows(times, length):
    """For each picture, the rows of the window that ends at it (P, length). None reaches across
    a break, where times jump by more than half again their usual step: the picture after it
    repeats. Times 1, 2, 5: [[0, 0], [0, 1], [2, 2]]."""
    first = min(times)
    times = np.array([moment - first for moment in times], float)
    order = np.argsort(times)
    steps = np.diff(times[order])
    usual = np.quantile(steps, 0.5, method="lower") if len(steps) else 1  # a step that occurs
    places = np.arange(len(times))
    starts_clip = np.r_[True, steps > 1.5 * usual]
    clip_start = np.maximum.accumulate(places * starts_clip)  # (P,)
    windows = np.maximum(places[:, None] + np.arange(1 - length, 1), clip_start[:, None])
    return order[windows][np.argsort(order)]


def read_image(source):
    """A picture, upright, RGB. source: a path, or a uint8 array (H, W, 3). Raises InputError."""
    try:
        if isinstance(source, np.ndarray):
            if source.ndim != 3 or source.shape[2] not in (3, 4) or not source.size:
                raise ValueError(f"{source.shape}, not (H, W, 3)")
            image = Image.fromarray(source)
        else:
            data = source.read_bytes()
            image = Image.open(io.BytesIO(data))
            end = data.rstrip(b"\0")
            if image.format == "JPEG" and end != data and not end.endswith(b"\xff\xd9"):
                raise ValueError("ends in zeros: it was not written to its end")
        if image.mode[0] in "IF":
            raise ValueError(f"{image.mode} pixels; convert it to 8 bits")
        return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # of many kinds
        problem = "no picture" if isinstance(error, UnidentifiedImageError) else repr(error)
        raise InputError(f"{getattr(source, 'name', 'array')}: {problem}") from error


def digest_pictures(sources, cache=None):
    """(digests, problem): the MD5 of each picture's content, None where it cannot be read, and
    a line about those. What has features in the folder cache was read before."""
    folders = [path for path in cache.glob("[!.]*") if path.is_dir()] if cache else []

    def digest(source):
        if isinstance(source, np.ndarray):
            data = f"{source.shape} {source.dtype}".encode() + source.tobytes()
        else:
            data = source.read_bytes()
        return hashlib.md5(data).hexdigest()

    def try_picture(source):
        try:
            found = digest(source)
            if not any((folder / f"{found}.npz").exists() for folder in folders):
                read_image(source)
            return found, None
        except (InputError, OSError) as error:
            return None, str(error)

    with ThreadPoolExecutor() as pool:
        digests, problems = zip(*pool.map(try_picture, sources))
    n_bad, named = digests.count(None), shorten("; ".join(filter(None, problems)), 200)
    return list(digests), f"{n_bad} of {len(sources)} pictures cannot be read: {named}"


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


def describe_windows(windows):
    """How many windows, rows of pictures (N, T), reach back over T pictures."""
    is_whole = (np.diff(np.sort(windows)) > 0).all(axis=1)
    return f"{len(windows)} windows, {is_whole.sum()} of them whole."


class Frames:
    """Pictures, read when they are indexed: frames[rows] is (*rows.shape, H, W, 3) uint8.

    sources, digests: of P pictures, see read_image and digest_pictures. training: rows of those
    that train, of which a share AUGMENT has a jittered copy. The copies are in the C rows
    after the pictures: copy_of (P,) holds the row of each picture's copy, or else its own,
    trained_on (M,) the rows of all training pictures and their copies."""

    def __init__(self, sources, digests, size, training=()):
        training = np.array(training, int)
        copied = training[np.diff(np.ceil(np.arange(len(training) + 1) * AUGMENT)) > 0]
        self.sources = [*sources, *(sources[row] for row in copied)]
        self.digests = [*digests, *(f"{digests[row]}-copy" for row in copied)]
        self.size = size
        self.copy_of = np.arange(len(sources))
        self.copy_of[copied] = np.arange(len(sources), len(self.sources))
        self.trained_on = np.union1d(training, self.copy_of[training])

    def __len__(self):
        return len(self.sources)

    def __getitem__(self, rows):
        rows = np.asarray(rows)
        distinct, places = np.unique(rows, return_inverse=True)
        with ThreadPoolExecutor() as pool:
            images = np.stack(list(pool.map(self.load, distinct)))
        return images[places.reshape(rows.shape)]

    def load(self, row):
        image = read_image(self.sources[row]).resize(self.size[::-1], Image.BILINEAR)
        if row >= len(self.copy_of):  # a copy, the same for a picture whatever the experiment
            seed = int(self.digests[row].removesuffix("-copy"), 16)
            image = jitter(image, np.random.default_rng(seed))
        return np.asarray(image)


class WindowSequence(keras.utils.Sequence):
    """Feeds windows (batch, T, ...) and the counts (batch, 1) of their last pictures.

    images: what windows are made of, feature vectors (P + C, K) or Frames. windows: rows of
    images (n, T). counts: (n,). shuffle: every epoch takes the windows in another order.
    copy_of (P,), see Frames: every epoch draws for each window, at even odds, whether it shows
    the copies of those of its pictures that have one."""

    def __init__(self, images, windows, counts, batch_size, shuffle=False, copy_of=None):
        super().__init__()
        self.images = images
        self.windows = windows
        self.counts = counts.reshape(-1, 1)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.copy_of = copy_of
        self.rng = np.random.default_rng(SEED)
        self.order = np.arange(len(windows))
        self.shown = windows
        self.on_epoch_end()

    def __len__(self):
        return math.ceil(len(self.windows) / self.batch_size)  # the last, partial batch counts

    def __getitem__(self, batch):
        chosen = self.order[batch * self.batch_size : (batch + 1) * self.batch_size]
        return self.images[self.shown[chosen]], self.counts[chosen]

    def on_epoch_end(self):
        if self.shuffle:
            self.rng.shuffle(self.order)
        if self.copy_of is not None:
            in_copies = self.rng.random((len(self.windows), 1)) < 0.5
            self.shown = np.where(in_copies, self.copy_of[self.windows], self.windows)


# == Stage 1, spatial: ResNet50, features, PCA ========
def load_resnet50():
    """ResNet50 without its top (He et al., "Deep residual learning for image recognition",
    CVPR 2016): (model, what its weights are, whether they are random). Raises InputError."""

    def build(weights):
        keras.utils.set_random_seed(SEED)  # the same random weights whatever came before
        size = (*FRAME_SIZE, 3)
        return keras.applications.ResNet50(include_top=False, weights=weights, input_shape=size)

    if not WEIGHTS:
        return build(None), "random", True
    if WEIGHTS == "imagenet":
        home = Path(os.environ.get("KERAS_HOME", "~/.keras")).expanduser()
        path = home / "models" / IMAGENET_FILE  # which Keras ignores if it cannot write there
        if not path.is_file() or hashlib.md5(path.read_bytes()).hexdigest() != IMAGENET_MD5:
            path = WEIGHTS  # to be downloaded
    else:
        path = at(WEIGHTS)
        if not path.is_file():
            raise InputError(f"{path}: no such file; correct WEIGHTS")
    try:
        return build(str(path)), Path(WEIGHTS).name, False
    except Exception as error:  # of many kinds
        problem = shorten(str(error), 150)
        if WEIGHTS != "imagenet":
            problem = f"no weights of Keras's ResNet50 without top ({problem})"
            raise InputError(f"{path}: {problem}") from error
    remedy = f"set WEIGHTS to a {IMAGENET_FILE}"
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


def fold_batchnorm(resnet, read):
    """The same network, faster: each convolution, ..._conv, also does the work of the
    BatchNorm after it, ..._bn, unless it is itself among the layers to read. Jacob et al.,
    "Quantization and training of neural networks for efficient integer-arithmetic-only
    inference", CVPR 2018."""
    precision = choose_precision()

    def find_convolution(layer):
        """The name of the convolution that does this layer's work, or None."""
        name = layer.name.removesuffix("bn") + "conv"
        is_norm = isinstance(layer, layers.BatchNormalization)
        return name if is_norm and name not in read else None

    def in_precision(layer):
        return type(layer).from_config(layer.get_config() | {"dtype": precision})

    def skip_norm(layer, x, **options):
        return x if find_convolution(layer) else layer(x, **options)

    options = {"clone_function": in_precision, "call_function": skip_norm}
    folded = keras.models.clone_model(resnet, **options)
    for layer in resnet.layers:  # a convolution comes before its BatchNorm
        if name := find_convolution(layer):
            convolution = folded.get_layer(name)
            kernel, bias = convolution.get_weights()
            gamma, beta, mean, variance = layer.get_weights()
            gain = gamma / np.sqrt(variance + layer.epsilon)
            convolution.set_weights([kernel * gain, (bias - mean) * gain + beta])
        elif layer.weights:
            folded.get_layer(layer.name).set_weights(layer.get_weights())
    return folded


def build_backbone(frames):
    """ResNet50 read at the layers of FEATURE_LAYERS: a frame (H, W, 3) uint8 -> its features
    (F,), the mean and standard deviation of each channel of each layer in each cell of its grid.
    frames: some of the training ones calibrate random weights. Returns (model, what its weights
    are). Raises InputError."""
    keras.utils.clear_session()  # layers are named, and cached under these names, as in any run
    resnet, weights, is_random = load_resnet50()
    constant = "FEATURE_LAYERS_RANDOM" if is_random else "FEATURE_LAYERS"
    grids = globals()[constant]
    names = [layer.name for layer in resnet.layers]
    if unknown := grids.keys() - set(names):
        some = ", ".join(name for name in names if name.endswith("_out"))
        problem = f"no layer {min(unknown)} in ResNet50"
        raise InputError(f"{constant}: {problem}; take conv1_relu, {some}")
    maps = [resnet.get_layer(name).output for name in grids]
    resnet = keras.Model(resnet.input, maps, name="resnet50")
    if is_random:
        calibrate(resnet, frames[frames.trained_on[:2]])  # more would take gigabytes
    frame = keras.Input((*FRAME_SIZE, 3), dtype="uint8", name="frame")
    maps = fold_batchnorm(resnet, grids)(normalise(frame))
    features = []
    for x, (rows, columns) in zip(keras.tree.flatten(maps), grids.values()):
        x = ops.cast(x, "float32")  # (h, w, channels)
        cell = (math.ceil(x.shape[1] / rows), math.ceil(x.shape[2] / columns))
        average = layers.AveragePooling2D(cell, padding="same")
        mean = average(x)  # (rows, columns, channels), or fewer where these do not divide h, w
        features.append(layers.Flatten()(mean))
        if FEATURE_SPREAD:
            variance = ops.relu(average(ops.square(x)) - ops.square(mean))
            features.append(layers.Flatten()(ops.sqrt(variance)))
    features = ops.concatenate(features, axis=-1)
    if features.shape[1] > 200_000:
        problem = f"{features.shape[1]:,} features of a picture fill the memory"
        raise InputError(f"{constant}: {problem}; take coarser grids")
    backbone = keras.Model(frame, features, name="backbone")
    backbone.trainable = False
    print(f"ResNet50 ({weights}; {choose_precision()}; {describe_device()[0]}):",
          f"{features.shape[1]:,} features of a picture, from {', '.join(grids)}.")
    return backbone, weights


def prepare_cache():
    """The folder CACHE, ready to be written to; None if no features are kept. Raises
    InputError."""
    if not CACHE_FEATURES:
        return None
    folder = prepare_folder(at(CACHE), "CACHE")
    size = sum(path.stat().st_size for path in folder.glob("[!.]*/*.npz"))
    print(f"Features are kept in {folder} ({size / 1e6:,.0f} MB so far).")
    return folder


def open_cache(backbone, folder):
    """The folder below folder for the features that this very network computes. Raises
    InputError."""
    pixels_version = 1  # to be raised when read_image(), Frames.load() or jitter() changes
    versions = (pixels_version, keras.__version__, keras.backend.backend(), Image.__version__)
    key = hashlib.md5(f"{versions} {backbone.to_json()}".encode())
    for weights in backbone.get_weights():
        key.update(weights.tobytes())
    return prepare_folder(folder / key.hexdigest(), "CACHE")


def run_backbone(backbone, frames, rows):
    """Features (n, F) of frames[rows], FRAME_BATCH at a time. Faster than predict()."""
    batches = np.split(rows, range(FRAME_BATCH, len(rows), FRAME_BATCH))
    with ThreadPoolExecutor(1) as reader:  # reads the next frames meanwhile
        images = reader.map(frames.__getitem__, batches)
        return np.concatenate([backbone.predict_on_batch(batch) for batch in images])


def extract_features(backbone, frames, cache=None):
    """Yields the features (n, F) of all rows of frames, some rows at a time: from the folder
    cache, where each picture has a file named by its content, or from ResNet50, which then
    fills it. Raises InputError for a picture that cannot be read, or a file not written."""
    folder = open_cache(backbone, cache) if cache else None
    bar = keras.utils.Progbar(len(frames), unit_name="picture", verbose=len(frames) > 64)
    step = 8 * FRAME_BATCH  # an interrupted run loses no more than that
    for rows in np.split(np.arange(len(frames)), range(step, len(frames), step)):
        files = [f"{frames.digests[row]}.npz" for row in rows]
        features = np.full((len(rows), backbone.output_shape[1]), np.nan, "float32")
        for place, file in enumerate(files if folder else []):
            try:
                with np.load(folder / file) as kept:
                    features[place] = kept["features"]
            except Exception:  # not there yet, or damaged, which .npz files notice
                pass
        missing = np.flatnonzero(np.isnan(features).any(axis=1))
        if len(missing):
            features[missing] = run_backbone(backbone, frames, rows[missing])
        if folder and len(missing):
            save = {files[place]: partial(np.savez, features=features[place]) for place in missing}
            write_files(folder, save)
        bar.add(len(rows))
        yield features


def build_reduction(features):
    """The end of stage 1: features (F,) -> feature vector (K,). features: of all training
    pictures and copies (M, F). Returns a model of two layers. After the first, "standardised",
    training features have lengths of 1 at most, so that what is longer is unfamiliar. The
    second, "components", gives principal components, on the scale where the mean squared
    length of the training features is 1: one learning rate for all videos."""
    scaler = preprocessing.StandardScaler().fit(features)
    deviation = np.sqrt(scaler.var_)
    floor = 0.1 * float(np.median(deviation))  # what hardly varied may one day vary as the rest
    deviation = np.maximum(deviation, max(floor, 1e-3))
    deviates = (features - scaler.mean_.astype("float32")) / deviation.astype("float32")
    lengths = np.linalg.norm(deviates, axis=1)
    longest = max(float(lengths.max()), 1.0)
    typical = max(float(np.sqrt(np.mean(lengths**2))), 1.0)

    reduction = keras.Sequential(name="reduction")
    reduction.add(keras.Input((features.shape[1],), name="features"))
    variance = np.square(deviation * longest)
    reduction.add(layers.Normalization(mean=scaler.mean_, variance=variance, name="standardised"))
    if COMPONENTS:
        n_components = min(COMPONENTS, len(features) - 1, features.shape[1])
        # One power iteration does as well here as the default's, in a third of the time.
        pca = decomposition.PCA(n_components, iterated_power=1, random_state=SEED)
        kernel = pca.fit(deviates).components_.T  # no bias: their mean is 0
        reduction.add(layers.Dense(n_components, use_bias=False, name="components"))
        reduction.layers[-1].set_weights([kernel * longest / typical])
    else:
        reduction.add(layers.Rescaling(longest / typical, name="components"))
    return reduction


def build_spatial(backbone, reduction):
    """Stage 1, frozen: windows of frames (T, H, W, 3) uint8 -> feature vectors (T, K)."""
    encoder = keras.Sequential([backbone, reduction], name="encoder")
    encoder.trainable = False
    return layers.TimeDistributed(encoder, name="spatial")


# == Stages 2 and 3: temporal, regression ========
def build_temporal(n_components):
    """Stage 2: feature vectors (T, K = n_components) -> what the LSTM makes of them
    (LSTM_UNITS,)."""
    temporal = keras.Sequential(name="temporal")
    temporal.add(keras.Input((SEQUENCE_LENGTH, n_components), name="vectors"))
    if PROJECTION:
        start = keras.initializers.RandomNormal(stddev=0.01)  # Keras's own grows as K shrinks
        temporal.add(layers.Dense(PROJECTION, kernel_initializer=start, name="projection"))
    lstm = layers.LSTM(LSTM_UNITS, dropout=LSTM_DROPOUT, unroll=SEQUENCE_LENGTH <= 16, name="lstm")
    temporal.add(lstm)
    gates = [0.0, FORGET_BIAS, 0.0, 0.0]  # input, forget, cell, output
    lstm.cell.bias.assign(np.repeat(gates, LSTM_UNITS))
    return temporal


def build_regression(counts):
    """Stage 3: (LSTM_UNITS,) -> people in the last picture (1,). Starts at the mean of the
    training counts (n_train,), in units of their standard deviation."""
    unit, mean = max(float(counts.std()), 1.0), float(counts.mean())
    return keras.Sequential([
        keras.Input((LSTM_UNITS,), name="memory"),
        layers.Dense(DENSE_UNITS, activation="gelu", name="dense"),  # relu can die
        layers.Dense(1, name="deviation"),
        layers.Rescaling(unit, mean, name="count"),
    ], name="regression")


def build_network(spatial, temporal, regression):
    """The three stages in a row: windows of frames (T, H, W, 3) uint8 -> people (1,), which are
    never less than 0."""
    windows = keras.Input((SEQUENCE_LENGTH, *FRAME_SIZE, 3), dtype="uint8", name="windows")
    people = layers.ReLU(name="people")(regression(temporal(spatial(windows))))
    return keras.Model(windows, people, name="ts_crowdnet")


# == Training ========
def train(model, training, validation=None):
    """Trains for EPOCHS epochs (the Sequence shuffles); returns the history. Validation is
    only monitored. The loss is mse / variance of the counts: one rate for all crowds."""
    optimizer = keras.optimizers.get(OPTIMIZER)
    steps = EPOCHS * len(training)
    optimizer.learning_rate = keras.optimizers.schedules.CosineDecay(LEARNING_RATE, steps)
    variance = max(float(training.counts.var()), 1.0)
    model.compile(optimizer, "mse", loss_weights=1 / variance, metrics=["mse", "mae"])
    fit = model.fit(training, validation_data=validation, epochs=EPOCHS, shuffle=False, verbose=2)
    return pd.DataFrame(fit.history, index=pd.RangeIndex(1, EPOCHS + 1, name="epoch"))


def check_trained(predicted, counts):
    """Raises InputError where a network is of no use on what it was trained on."""
    variance = max(counts.var(), 1.0)
    problem = None
    if not np.isfinite(predicted).all():
        problem = "its counts are not finite"
    elif np.mean((predicted - counts) ** 2) > 2 * variance:
        problem = "it is far worse than the mean count"
    elif predicted.std() < 1e-5 * counts.std():
        problem = f"it counts {predicted.mean():.1f} in every picture (are they all alike?)"
    if problem:
        remedy = "try a lower LEARNING_RATE; earlier results are left as they were"
        raise InputError(f"the network did not learn: {problem}; {remedy}")
    if predicted.std() < 0.01 * counts.std():
        print(f"Hardly trained: counts of {predicted.min():.1f} to {predicted.max():.1f} in all",
              "training pictures; more EPOCHS or a higher LEARNING_RATE.")


# == Evaluation: metrics, figures, results ========
def measure(true, predicted):
    """Metrics of counts. accuracy: share within TOLERANCE; a true 0 needs one that rounds to 0.
    mae_standard_error: of fewer than 100 counts."""
    error = np.abs(predicted - true)
    accurate = np.where(true == 0, np.round(predicted) == 0, error <= TOLERANCE * true)
    mse = np.mean(error**2)
    metrics = {"mae": error.mean(), "mse": mse, "rmse": mse**0.5, "accuracy": accurate.mean()}
    if 1 < len(error) < 100:
        metrics["mae_standard_error"] = scipy.stats.sem(error)
    return metrics


def describe(name, metrics):
    """The metrics in a line."""
    line = "{}: MAE {mae:.3f}, MSE {mse:.3f}, RMSE {rmse:.3f}, within {:.0%}: {accuracy:.1%}"
    return line.format(name, TOLERANCE, **metrics)


def draw_loss(history, baseline):
    """The error by epoch; baseline: the metrics of the mean count."""
    figure, axes = plt.subplots(figsize=(6, 4))
    style = {"marker": "o" if len(history) == 1 else None}
    training = history["mse"] ** 0.5
    axes.plot(history.index - 0.5, training, label="training: mean over the epoch", **style)
    if baseline:
        validation = history["val_mse"] ** 0.5
        axes.plot(history.index, validation, "--", label="validation: after the epoch", **style)
        axes.axhline(baseline["rmse"], color="0.5", ls=":", label="validation: the mean count")
    axes.set(ylim=0, xlabel="Epoch", ylabel="Root of the mean squared error (people)")
    axes.legend()
    return figure


def draw_predictions(validation, title):
    """True and predicted counts, against each other and over time."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=(1, 2))
    counts = validation[["true", "predicted"]].reset_index(drop=True)
    ends = np.array([counts.min().min() - 1, counts.max().max() + 1])
    low, high = (1 - TOLERANCE) * ends, (1 + TOLERANCE) * ends
    left.fill_between(ends, low, high, color="0.9", label=f"within {TOLERANCE:.0%}")
    left.plot(ends, ends, color="0.5", label="exact")
    sns.scatterplot(counts, x="true", y="predicted", s=18, alpha=0.6, ax=left)
    left.set(xlim=ends, ylim=ends, xlabel="True count", ylabel="Predicted count", aspect="equal")
    left.legend()
    marker = "o" if len(counts) < 50 else None
    sns.lineplot(counts, linewidth=1, marker=marker, ax=right)
    right.set(xlabel="Validation picture, in order of time", ylabel="People")
    figure.suptitle(title)
    return figure


def draw_examples(validation, paths):
    """Pictures with their counts. paths: of the pictures in validation."""
    order = np.abs(validation["predicted"] - validation["true"]).to_numpy().argsort()
    places = np.unique(np.linspace(0, len(order) - 1, 6, dtype=int))
    columns = min(len(places), 3)
    size = {"figsize": (11, 6), "squeeze": False}
    figure, axes = plt.subplots(math.ceil(len(places) / columns), columns, **size)
    for axis in axes.flat:
        axis.axis("off")
    for axis, row in zip(axes.flat, order[places]):
        axis.imshow(read_image(paths[row]))
        label = validation.iloc[row]
        axis.set_title(f"{label.id}: true {label.true:g}, predicted {label.predicted:.1f}")
    figure.suptitle("Validation pictures, from the smallest to the largest error")
    return figure


def draw_figures(history, table, baseline, paths, title):
    """The figures of a run, {name: figure}. paths: of the validation pictures, if there are
    any."""
    figures = {"loss": draw_loss(history, baseline)}
    validation = table[table["split"] == "validation"]
    if len(validation):
        figures["predictions"] = draw_predictions(validation, title)
        figures["examples"] = draw_examples(validation, paths)
    return figures


def draw_counts(table):
    """Counts over new pictures, grey where they are doubtful."""
    figure, axes = plt.subplots(figsize=(11, 4))
    axes.plot(table["count"].to_numpy(), ".-", linewidth=1, markersize=3)
    doubtful = table["unfamiliar"].fillna(True).to_numpy(float)[np.newaxis]
    area = (-0.5, len(table) - 0.5, *axes.get_ylim())
    axes.imshow(doubtful, "Greys", vmin=0, vmax=5, aspect="auto", extent=area)  # light grey
    axes.set(xlabel="Picture, from 0 (grey: unlike training, or unreadable)", ylabel="People")
    return figure


def save_figures(folder, files, draw):
    """Saves what draw() returns, {name: figure}, in the place of the files of an earlier model,
    and shows it where there is a screen. What fails costs only the figures."""
    try:
        for file in files:
            (folder / file).unlink(missing_ok=True)
        settings = {"savefig.dpi": 200, "figure.constrained_layout.use": True, "pdf.compression": 1}
        sns.set_theme("paper", "ticks", "colorblind", rc=settings)
        for name, figure in draw().items():
            save_png = partial(figure.savefig, pil_kwargs={"compress_level": 1})
            write_files(folder, {f"{name}.png": save_png, f"{name}.pdf": figure.savefig})
        if plt.get_backend().lower() != "agg":
            plt.show()
        plt.close("all")
    except (InputError, OSError, ImportError, RuntimeError) as error:
        print(f"Warning: no figures ({shorten(str(error), 200)}).", file=sys.stderr)


def save_results(outputs, model, history, table, run):
    """Writes all results and prints a summary. table: id, split, true, predicted of every
    label. run: more for metrics.json. Returns (summary, baseline): baseline is what always the
    mean training count scores, None without validation."""
    trained_on = table[table["split"] == "train"]
    validation = table[table["split"] == "validation"]
    report, baseline = {}, None
    summary = "No label was left to validate: nothing is known of the error on other pictures."
    if len(validation):
        metrics = measure(validation["true"], validation["predicted"])
        baseline = measure(validation["true"], trained_on["true"].mean())
        report = metrics | {"baseline": baseline}
        summary = describe("Validation frames", metrics)
        summary += "\n" + describe("Always the mean count", baseline)
    report |= run | {"train_frames": len(trained_on), "validation_frames": len(validation)}
    report["constants"] = {name: globals()[name] for name in globals() if name.isupper()}
    report["versions"] = {"python": sys.version, "keras": keras.__version__, "tf": tf.__version__}
    write_files(outputs, {
        MODEL: model.save,
        "history.csv": history.to_csv,
        "predictions.csv": lambda path: table.to_csv(path, index=False, float_format="%.6f"),
        "metrics.json": lambda path: path.write_text(json.dumps(report, indent=2, default=str)),
    })
    print(f"\n{summary}")
    if error := report.get("mae_standard_error"):
        print(f"With {len(validation)} frames, that MAE has a standard error of {error:.3f}.")
    print(f"ResNet50 weights: {run['weights']}. Results: {outputs}")
    return summary, baseline


# == Counting new footage ========
def load_stages(model):
    """(backbone, reduction, temporal, regression) of a model or of its file. Raises
    InputError."""
    loaded = model
    if isinstance(model, (str, Path)) and not Path(model).expanduser().is_file():
        raise InputError(f"{model}: no such file; train a model first")
    try:
        if isinstance(model, (str, Path)):
            loaded = keras.saving.load_model(Path(model).expanduser(), compile=False)
        encoder = loaded.get_layer("spatial").layer
        inner = [encoder.get_layer(name) for name in ("backbone", "reduction")]
        return [*inner, *(loaded.get_layer(name) for name in ("temporal", "regression"))]
    except Exception as error:  # of many kinds
        problem = f"damaged, or not written by this script with Keras {keras.__version__}"
        try:
            with zipfile.ZipFile(Path(model).expanduser()) as file:
                problem += f" but with {json.loads(file.read('metadata.json'))['keras_version']}"
        except Exception:  # no .keras file
            pass
        reason = shorten(str(error), 200)
        raise InputError(f"{model}: {problem}; train a model first ({reason})") from error


def list_sources(frames):
    """What count_people counts, as a list of paths and arrays. Raises InputError."""
    problem = "no frames to count"
    if isinstance(frames, (str, Path)):
        path = Path(frames).expanduser()
        is_picture = path.is_file() and path.suffix.lower() in PICTURES
        sources = [path] if is_picture else list_pictures(path)
        if not path.exists():
            problem = "no such folder or picture"
        elif not sources:
            below = [str(other) for other in path.glob("*") if list_pictures(other)]
            problem += f", but in {min(below)} there are" if below else ""
    else:
        sources = []
        for frame in frames:
            is_path = isinstance(frame, (str, Path))
            sources.append(Path(frame).expanduser() if is_path else np.asarray(frame))
    if not sources:
        remedy = "to take some out of a video: ffmpeg -i VIDEO -vf fps=1 -q:v 2 FOLDER/%06d.jpg"
        raise InputError(f"{frames}: {problem}; {remedy}")
    return sources


def count_people(model, frames, cache=None):
    """Counts the people in new pictures of the camera that a model was trained on.

    model: path of a ts_crowdnet.keras, or the loaded model. frames: a folder, a picture, or
    paths or uint8 RGB arrays (H, W, 3), about at the frame rate of training; their windows go
    by find_times. cache: a folder for ResNet50's features, so that no picture is read twice.
    Returns a DataFrame, a row a picture, indexed by file name: count, and unfamiliar, True for
    a picture unlike all training pictures; both empty where it cannot be read. Shows how far it
    is where there are more than 64. Raises InputError."""
    sources = list_sources(frames)
    backbone, reduction, temporal, regression = load_stages(model)
    cache = Path(cache).expanduser() if cache else None
    digests, problem = digest_pictures(sources, cache)
    readable = [row for row, digest in enumerate(digests) if digest]
    if not readable:
        where = f"{frames}: " if isinstance(frames, (str, Path)) else ""
        raise InputError(f"{where}no frames to count ({problem})")
    if len(readable) < len(sources):
        print(f"{problem}; their counts stay empty.")

    size = backbone.input_shape[1:3]
    chosen = [(sources[row], digests[row]) for row in readable]
    pictures = Frames(*zip(*chosen), size)
    standardise, reduce = reduction.layers
    lengths, vectors = [], []
    for features in extract_features(backbone, pictures, cache):
        standardised = standardise(features)
        lengths.append(ops.convert_to_numpy(ops.norm(standardised, axis=1)))
        vectors.append(ops.convert_to_numpy(reduce(standardised)))
    vectors = np.concatenate(vectors)
    times = find_times(sources)  # of the unreadable, too: they leave a break
    windows = make_windows([times[row] for row in readable], temporal.input_shape[1])
    if isinstance(frames, (str, Path)):
        print(describe_windows(windows))
    people = []
    for rows in np.split(windows, range(1000, len(windows), 1000)):
        people.append(regression.predict_on_batch(temporal.predict_on_batch(vectors[rows])))
    counts = np.maximum(np.concatenate(people)[:, 0], 0)
    unfamiliar = pd.array(np.concatenate(lengths) > UNFAMILIAR)
    table = pd.DataFrame({"count": counts, "unfamiliar": unfamiliar}, index=readable)
    table = table.reindex(range(len(sources)))
    names = [getattr(source, "name", row) for row, source in enumerate(sources)]
    return table.set_axis(pd.Index(names, name="frame"))


def count_folder():
    """The COUNT mode: counts.csv and a figure in OUTPUTS, from the model there."""
    started, outputs = time.time(), at(OUTPUTS)
    model = outputs / MODEL
    figures, cache = ("counts.png", "counts.pdf"), None
    if outputs.is_dir():  # else there is no model, which count_people says
        prepare_folder(outputs, "OUTPUTS", ("counts.csv", *figures))
        cache = prepare_cache()
    table = count_people(model, at(COUNT), cache)
    save_counts = partial(table.to_csv, float_format="%.3f", errors="surrogateescape")
    write_files(outputs, {"counts.csv": save_counts})
    n_unfamiliar = table["unfamiliar"].sum()
    print(f"{table['count'].mean():.1f} people on average; {n_unfamiliar} of {len(table)} frames",
          "look unlike all training frames" + (": doubt those." if n_unfamiliar else "."))
    save_figures(outputs, figures, lambda: {"counts": draw_counts(table)})
    sweep(started)


# == Main ========
def load_data():
    """Labels and the windows they make. Returns (table: id, split, true of the N labels in time
    order; paths (P,) of the pictures in their windows; windows (N, T), rows of paths). Raises
    InputError."""
    labels = read_labels(at(LABELS))
    n_empty = int(labels.isna().sum())
    labels = labels.dropna()
    n, n_train = len(labels), round(len(labels) * TRAIN_FRACTION)
    if n_train < 2 or (n_train == n and TRAIN_FRACTION < 1):
        problem = f"{TRAIN_FRACTION = } lets {n_train} train and {n - n_train} validate"
        remedy = "change it, or write the counts of more pictures"
        raise InputError(f"{at(LABELS)} has {n} labels: {problem}; {remedy}")
    found = list_pictures(at(FRAMES))
    rows = find_labelled(found, labels.index)
    times = find_times(found)
    order = np.argsort([times[row] for row in rows])
    windows = make_windows(times, SEQUENCE_LENGTH)[rows[order]]
    used, places = np.unique(windows, return_inverse=True)

    rest = f"the last {n - n_train} validate" if n > n_train else "none is left to validate"
    print(f"{len(found)} pictures, {n} labels: the first {n_train} train, {rest};",
          f"{len(used)} pictures read.",
          f"{len(found) - n} pictures have no label, {n_empty} rows no count.")
    print(describe_windows(windows))
    labels = labels.iloc[order]
    counts = labels.astype(int) if (labels % 1 == 0).all() else labels
    split = np.where(np.arange(n) < n_train, "train", "validation")
    table = pd.DataFrame({"id": labels.index, "split": split, "true": counts.to_numpy()})
    return table, [found[row] for row in used], places.reshape(windows.shape)


def check_pictures(paths, table, cache):
    """The digests of the pictures to be read (P,). Raises InputError for one that cannot be
    read, or where they are not those that the labels in table are of."""
    digests, problem = digest_pictures(paths, cache)
    if None in digests:
        raise InputError(f"{at(FRAMES)}: {problem}; replace them")
    if b"synthetic mall sample" in paths[0].read_bytes():
        print("The pictures are rendered; the README tells how to use real ones.")
    elif hashlib.md5(table["true"].to_numpy(float).tobytes()).hexdigest() == SAMPLE_COUNTS:
        raise InputError(f"{at(LABELS)}: labels of the sample, not of these pictures; set LABELS")
    (height, width), image = FRAME_SIZE, read_image(paths[0])
    shape = image.width / image.height
    if not 0.9 < shape * height / width < 1.1:
        fitting = (height, round(height * shape))
        print(f"Distorts {image.width}x{image.height}; FRAME_SIZE = {fitting} keeps their shape.")
    return digests


def main():
    """Labels -> windows -> feature vectors -> network -> counts -> figures and numbers."""
    check_constants()
    if COUNT:
        return count_folder()
    started = time.time()
    keras.config.set_image_data_format("channels_last")

    # Data: N windows of T of P pictures, some of which have copies.
    table, paths, windows = load_data()
    counts = table["true"].to_numpy(float)
    n_train = int((table["split"] == "train").sum())
    outputs = prepare_folder(at(OUTPUTS), "OUTPUTS", RESULTS + FIGURES)
    cache = prepare_cache()
    digests = check_pictures(paths, table, cache)
    frames = Frames(paths, digests, FRAME_SIZE, np.unique(windows[:n_train]))

    # Stage 1, spatial: frozen ResNet50, PCA of the training pictures.
    backbone, weights = build_backbone(frames)
    features = np.concatenate(list(extract_features(backbone, frames, cache)))  # (P + C, F)
    reduction = build_reduction(features[frames.trained_on])
    spatial = build_spatial(backbone, reduction)

    # Stages 2 and 3, temporal and regression, train.
    keras.utils.set_random_seed(SEED)
    vectors = reduction.predict(features, batch_size=256, verbose=0)  # (P + C, K)
    temporal = build_temporal(vectors.shape[1])
    regression = build_regression(counts[:n_train])
    batch_size = min(BATCH_SIZE, math.ceil(n_train / 4))  # small sets need the steps
    stages, images, at_once = [temporal, regression], vectors, 512
    if not CACHE_FEATURES:
        stages, images, at_once = [spatial, temporal, regression], frames, batch_size
    model = keras.Sequential(stages)
    training = WindowSequence(images, windows[:n_train], counts[:n_train], batch_size,
                              shuffle=True, copy_of=frames.copy_of)
    validation = None
    if n_train < len(table):
        validation = WindowSequence(images, windows[n_train:], counts[n_train:], at_once)
    history = train(model, training, validation)

    # The whole network, and the count of every label's picture.
    everything = WindowSequence(images, windows, counts, at_once)
    predicted = model.predict(everything, verbose=0)[:, 0]
    check_trained(predicted[:n_train], counts[:n_train])
    table["predicted"] = np.maximum(predicted, 0)
    network = build_network(spatial, temporal, regression)
    run = {"weights": weights, "precision": choose_precision(), "device": describe_device()[0],
           "features": features.shape[1], "components": vectors.shape[1]}
    summary, baseline = save_results(outputs, network, history, table, run)
    validated = [paths[row] for row in windows[n_train:, -1]]
    draw = partial(draw_figures, history, table, baseline, validated, summary)
    save_figures(outputs, FIGURES, draw)
    sweep(started)


def run_as_script():
    """main(), with one line instead of a traceback for what the user can put right."""
    tf.get_logger().setLevel("ERROR")  # quiet about a last, smaller batch
    try:
        main()
    except (InputError, OSError) as error:
        if sys.flags.dev_mode:  # python -X dev
            raise
        sys.exit(shorten(f"Error: {error}", 500))


if __name__ == "__main__":
    run_as_script()
