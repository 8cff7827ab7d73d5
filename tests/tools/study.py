"""What each part of the model is worth, and how many labels do, on a video of one's own.

    python tests/tools/study.py FOLDER [--resnet50 FILE.py] [--other NAME=FRAMES ...] [--seeds 1]
                                [--split 0.5] [--folds 0] [--labels EVERY ...] [--starts 1 ...] [--rows ROW ...]

FOLDER holds labels.csv, a count for every picture, and frames/frames. Columns, because neighbouring pictures show the same
people and folds dealt out among each other reward memory; believe what all say:

later     a first part, --split, trains, the rest is counted; and again as the folders of --other show it, pictures of the
          same names in other light or from a nudged camera, say
folds     so many stretches, each counted by a model of the others, 5 pictures left out on either side
1/EVERY   --labels: the same as "later" from the counts of every so-many-th picture of the first part alone; --starts: how far
          into each stretch of so many pictures the counted one lies, 1: the last
between   the other pictures of the first part, counted by that model: what COUNT gives for the footage that was labelled

Weights are random, but for those that ResNet50() of FILE.py returns with weights="imagenet". Prints a row for each change: mean
over seeds and starts of MAE / MSE, the standard deviation of the MAE where there are several, and the worst where there are five. Features stay in the script's CACHE.
"""

import argparse
import contextlib
import importlib.util
import io
import itertools
import math
import os
import sys
from pathlib import Path

os.environ["MPLBACKEND"] = "agg"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import keras
import numpy as np

import tscrowdnet_train as ts

MARGIN = 5
PREPROCESS = keras.applications.resnet50.preprocess_input
ROWS = {  # name: constants and functions of the script that differ
    "default": {},
    "1 picture instead of 5": {"SEQUENCE_LENGTH": 1},
    "no PCA": {"COMPONENTS": 0},
    "PCA to 256": {"COMPONENTS": 256},
    "no projection: the LSTM sees the feature vectors": {"PROJECTION": 0},
    "Keras's forget bias": {"FORGET_BIAS": 1.0},
    "batches of 32, however few labels": {"min_steps": 1},
    "a rate of 0.03": {"LEARNING_RATE": 0.03},
    "a rate of 0.3": {"LEARNING_RATE": 0.3},
    "Adam, 1e-3": {"OPTIMIZER": "adam", "LEARNING_RATE": 1e-3},
    "published head, Adam": {
        "COMPONENTS": 0, "PROJECTION": 0, "LSTM_UNITS": 512, "LSTM_DROPOUT": 0.5, "FORGET_BIAS": 1.0, "DENSE_UNITS": 256,
        "BATCH_SIZE": 16, "OPTIMIZER": "adam", "LEARNING_RATE": 1e-3, "AUGMENT": 0,
    },  # fmt: skip
    "a copy of every training picture": {"AUGMENT": 1},
    "no jittered copies": {"AUGMENT": 0},
    "no channel normalisation": {"normalise": lambda frames: PREPROCESS(ts.ops.cast(frames, "float32"))},
    "every stage summarised over the whole picture": {"grids": (1, 1)},
    "last stage alone": {"grids": None},
    "means alone, without standard deviations": {"FEATURE_SPREAD": False},
    "pictures of 480x640": {"FRAME_SIZE": (480, 640)},
    "pictures of 240x320": {"FRAME_SIZE": (240, 320)},
}


def settings(row):
    """The script's constants and functions for a row."""
    changes = {name: value for name, value in row.items() if name not in ("grids", "min_steps")}
    if "grids" in row:
        for name in ("FEATURE_LAYERS", "FEATURE_LAYERS_RANDOM"):
            grids = getattr(ts, name)
            changes[name] = dict.fromkeys(grids, (1, 1)) if row["grids"] else {list(grids)[-1]: (1, 1)}
    return changes


class Video:
    """All pictures of a folder, with their counts, and their features and those of a copy of each, read once for each
    ResNet50."""

    def __init__(self, others):
        labels = ts.read_labels(ts.at(ts.LABELS))
        paths = ts.list_pictures(ts.at(ts.FRAMES))
        self.paths = [paths[row] for row in ts.find_labelled(paths, labels.index)]
        self.counts = labels.to_numpy()
        self.times = ts.find_times(self.paths)
        self.others = others
        self.known = {}

    def read(self, paths, with_copies=False):
        """Features (P, F) of pictures, followed by those of their copies."""
        cache, share = ts.at(ts.CACHE), ts.AUGMENT
        digests, _ = ts.digest_pictures(paths, cache)
        ts.AUGMENT = 1  # a copy of every picture: rows take their share
        frames = ts.Frames(paths, digests, ts.FRAME_SIZE, range(len(paths)) if with_copies else ())
        ts.AUGMENT = share
        return np.concatenate(list(ts.extract_features(self.backbone, frames, cache)))

    def features(self, key, later):
        """(features of pictures and copies (2 P, F), {name: features of the later pictures as the others show them})."""
        if key not in self.known:
            first = ts.digest_pictures(self.paths[:2])[0]
            self.backbone, _ = ts.build_backbone(ts.Frames(self.paths[:2], first, ts.FRAME_SIZE, [0, 1]))
            others = {name: self.read([folder / path.name for path in later]) for name, folder in self.others.items()}
            self.known = {key: (self.read(self.paths, True), others)}  # of the last row: neighbouring rows share them
        return self.known[key]


def predict(features, counts, times, train, tests, min_steps=4):
    """Counts of each of tests, features (M, F) of stretches of pictures, by a network of the labels in rows train.
    features: of the P pictures, then of a copy of each. min_steps: batches are smaller if an epoch had fewer steps."""
    n = len(times)
    windows = ts.make_windows(times, ts.SEQUENCE_LENGTH)
    frames = ts.Frames([None] * n, [""] * n, ts.FRAME_SIZE, np.unique(windows[train]))
    copied = np.flatnonzero(frames.copy_of != np.arange(n))
    features = features[np.r_[:n, n + copied]]
    reduction = ts.build_reduction(features[frames.trained_on])
    keras.utils.set_random_seed(ts.SEED)
    vectors = reduction.predict(features, verbose=0)
    model = keras.Sequential([ts.build_temporal(vectors.shape[1]), ts.build_regression(counts[train])])
    batch_size = min(ts.BATCH_SIZE, math.ceil(len(train) / min_steps))
    ts.train(model, ts.WindowSequence(vectors, windows[train], counts[train], batch_size, True, frames.copy_of))
    counted = []
    for test in tests:
        vectors = reduction.predict(test, verbose=0)
        windows = ts.make_windows(range(len(test)), ts.SEQUENCE_LENGTH)
        counted.append(np.maximum(model.predict(vectors[windows], verbose=0)[:, 0], 0))
    return counted


def measure_row(row, video, options):
    """{column: (MAE, MSE)} of a row, with the script's constants as they are."""
    n, first = len(video.counts), round(len(video.counts) * options.split)
    key = (ts.SEED if not ts.WEIGHTS else 0, ts.FRAME_SIZE, str(ts.FEATURE_LAYERS), ts.FEATURE_SPREAD, "normalise" in row)
    min_steps = row.get("min_steps", 4)
    features, others = video.features(key, video.paths[first:])
    scores = {}

    later = features[first:n]
    for every in options.labels:
        train = np.arange(round(every * options.start) - 1, first, every)
        rest = np.setdiff1d(np.arange(first), train)
        counted = predict(features, video.counts, video.times, train, [later, features[:first]], min_steps)
        scores[f"1/{every}"] = ts.measure(video.counts[first:], counted[0])
        if len(rest):
            scores[f"1/{every}, between"] = ts.measure(video.counts[rest], counted[1][rest])
    if not options.labels:
        conditions = {"later": later} | others
        counted = predict(features, video.counts, video.times, np.arange(first), conditions.values(), min_steps)
        for condition, counts in zip(conditions, counted):
            scores[condition] = ts.measure(video.counts[first:], counts)
    if options.folds:
        counted = np.empty(n)
        for fold in np.array_split(np.arange(n), options.folds):
            train = np.flatnonzero((np.arange(n) < fold[0] - MARGIN) | (np.arange(n) > fold[-1] + MARGIN))
            (counted[fold],) = predict(features, video.counts, video.times, train, [features[fold]], min_steps)
        scores["folds"] = ts.measure(video.counts, counted)
    return {name: (score["mae"], score["mse"]) for name, score in scores.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--resnet50", type=Path)
    parser.add_argument("--other", nargs="*", default=[])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--split", type=float, default=0.5)
    parser.add_argument("--folds", type=int, default=0)
    parser.add_argument("--labels", type=int, nargs="+", default=[])
    parser.add_argument("--starts", type=float, nargs="+", default=[1.0])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    options = parser.parse_args()
    ts.LABELS, ts.FRAMES = str(options.folder.resolve() / "labels.csv"), str(options.folder.resolve() / "frames" / "frames")
    ts.WEIGHTS = None
    if options.resnet50:
        spec = importlib.util.spec_from_file_location("resnet50", options.resnet50)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        keras.applications.ResNet50, ts.WEIGHTS = module.ResNet50, "imagenet"
    video = Video({name: Path(path) for name, path in (other.split("=", 1) for other in options.other)})
    defaults = {name: getattr(ts, name) for name in [name for name in vars(ts) if name.isupper()] + ["normalise"]}
    header = None
    for name in options.rows:
        scores = []
        for seed, options.start in itertools.product(range(options.seeds), options.starts):
            for constant, value in (defaults | settings(ROWS[name]) | {"SEED": seed}).items():
                setattr(ts, constant, value)
            with contextlib.redirect_stdout(io.StringIO()):
                scores.append(measure_row(ROWS[name], video, options))
        if header is None:
            header = list(scores[0])
            print("| change | " + " | ".join(header) + " |\n|---|" + "---|" * len(header), flush=True)
        cells = []
        for column in header:
            maes, mses = zip(*(score[column] for score in scores))
            spread = f" ± {np.std(maes):.2f}" if len(maes) > 1 else ""
            if len(maes) >= 5:
                spread += f" (at most {np.max(maes) / np.median(maes):.2f} x the median)"
            cells.append(f"{np.mean(maes):.3f}{spread} / {np.mean(mses):.2f}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
