"""What each part of the network is worth, and how few labels do, on a video of your own.

    python tests/tools/study.py FOLDER [--half-width] [--split 0.5] [--seeds 1] [--rows ROW ...]
                                [--labels EVERY ...] [--starts 1 ...] [--other NAME=FRAMES ...]

FOLDER holds labels.csv with a count for every frame, and frames/frames. A first part of the frames,
--split, trains; all later ones are counted. Weights are random; with --half-width they are those of
half_width.py. Prints a row for each change: MAE / MSE, means over --seeds and --starts, with the
standard deviation of the MAE where there are several. Columns:

later     the later frames as they are; no model ever sees their counts
/20       the same frames, but windows of every 20th one, as if the video had fewer frames a second
alone     the same frames, each without any other
--other   the later frames from another folder of the same names, in other light, say
1/EVERY   --labels: the later frames, counted after training with every so-many-th label alone;
          --starts: how far into each stretch of so many frames the labelled one is, 1: the last
between   the unlabelled frames of the first part, counted by the same model

Neighbouring frames show the same people, so never deal them out to training and test at random.
Features stay in the script's CACHE.
"""

import argparse
import contextlib
import io
import itertools
import math
import os
import sys
from functools import partial
from pathlib import Path

os.environ["MPLBACKEND"] = "agg"
TOOLS = Path(__file__).resolve().parent
sys.path[:0] = [str(TOOLS.parents[1]), str(TOOLS)]

import keras
import numpy as np

import tscrowdnet_train as ts

PREPROCESS = keras.applications.resnet50.preprocess_input
ROWS = {  # name: constants and functions of the script that differ
    "default": {},
    "1 frame instead of 5": {"SEQUENCE_LENGTH": 1},
    "no random neighbours": {"RANDOM_NEIGHBOURS": 0.0},
    "neighbours out of 40 frames": {"NEIGHBOUR_RANGE": 40},
    "no jittered copies": {"AUGMENT": 0},
    "a copy of every labelled frame": {"AUGMENT": 1},
    "no PCA": {"COMPONENTS": 0},
    "PCA to 256": {"COMPONENTS": 256},
    "no projection: the LSTM sees the feature vectors": {"PROJECTION": 0},
    "Keras's forget bias": {"FORGET_BIAS": 1.0},
    "batches of 32, however few labels": {"min_steps": 1},
    "a rate of 0.03": {"LEARNING_RATE": 0.03},
    "a rate of 0.3": {"LEARNING_RATE": 0.3},
    "Adam, 1e-3": {"OPTIMIZER": "adam", "LEARNING_RATE": 1e-3},
    "no channel normalisation": {
        "normalise": lambda frames: PREPROCESS(ts.ops.cast(frames, "float32"))
    },
    "every layer summarised over the whole frame": {"grids": (1, 1)},
    "last layer alone": {"grids": None},
    "means alone, without standard deviations": {"FEATURE_SPREAD": False},
    "frames of 240x320": {"FRAME_SIZE": (240, 320)},
    "frames of 480x640": {"FRAME_SIZE": (480, 640)},
}


def settings(row):
    """The script's constants and functions for a row."""
    changes = {name: value for name, value in row.items() if name not in ("grids", "min_steps")}
    if "grids" in row:
        for name in ("FEATURE_LAYERS", "FEATURE_LAYERS_RANDOM"):
            layers = list(getattr(ts, name))
            kept = layers if row["grids"] else layers[-1:]
            changes[name] = dict.fromkeys(kept, (1, 1))
    return changes


class Video:
    """All frames of a folder, their counts, and their features and those of a copy of each."""

    def __init__(self, others, n_first):
        ts.TRAIN_FRACTION = 1
        table, names, _ = ts.load_data()
        self.counts = table["true"].to_numpy(float)
        self.paths = [ts.resolve_path(ts.FRAMES) / name for name in names]
        self.others = {
            name: [Path(folder) / path.name for path in self.paths[n_first:]]
            for name, folder in others
        }
        self.known = {}

    def read(self, backbone, paths, with_copies):
        """Features (P, F) of frames, followed by those of their copies."""
        cache = ts.resolve_path(ts.CACHE)
        digests = ts.check_frames(paths, paths, cache)["digest"].tolist()
        frames = ts.Frames(paths, digests, ts.FRAME_SIZE, range(len(paths)) if with_copies else ())
        return np.concatenate(list(ts.extract_features(backbone, frames, cache)))

    def features(self, key):
        """(features of frames and copies (2 P, F), {name: features of the others})."""
        if key not in self.known:  # of the last row alone: neighbouring rows share them
            self.digests = ts.check_frames(self.paths, self.paths, None)["digest"].tolist()
            calibration = ts.Frames(self.paths[:2], self.digests[:2], ts.FRAME_SIZE)[[0, 1]]
            backbone, _ = ts.build_backbone(calibration, ts.choose_precision()[1])
            others = {name: self.read(backbone, paths, False) for name, paths in self.others.items()}
            self.known = {key: (self.read(backbone, self.paths, True), others)}
        return self.known[key]


def make_windows(n, step=1):
    """Windows (n, T) of every step-th frame."""
    steps = step * np.arange(ts.SEQUENCE_LENGTH)[::-1]
    rows = np.arange(n)[:, None]
    return np.maximum(rows - steps, rows % step)


def train(video, features, labelled, min_steps):
    """A function that counts windows of features, trained with the labels of these rows."""
    n = len(video.counts)
    windows = make_windows(n)[labelled]
    shown = np.unique(windows)  # as in the script's load_data()
    windows = np.searchsorted(shown, windows)
    copied = ts.choose_copied([video.digests[row] for row in shown], windows[:, -1])
    features = np.concatenate([features[shown], features[n + shown[copied]]])
    copy_of = np.arange(len(shown))
    copy_of[copied] = len(shown) + np.arange(len(copied))
    reduction = ts.build_reduction(features[: len(shown)], features[len(shown) :])
    keras.utils.set_random_seed(ts.SEED)
    vectors = reduction.predict(features, batch_size=256, verbose=0)
    counts = video.counts[labelled]
    temporal, regression = ts.build_temporal(vectors.shape[1]), ts.build_regression(counts)
    batch_size = min(ts.BATCH_SIZE, math.ceil(len(labelled) / min_steps))
    starts = np.zeros(len(shown), int)
    draw = partial(ts.draw_windows, clip_starts=starts, copy_of=copy_of)
    model = keras.Sequential([temporal, regression])
    ts.train(model, ts.WindowSequence(vectors, windows, counts, batch_size, draw))

    def count(features, windows):
        vectors = reduction.predict(features, batch_size=256, verbose=0)
        return np.maximum(model.predict(vectors[windows], batch_size=512, verbose=0)[:, 0], 0)

    return count


def measure_row(row, video, first, start, options):
    """{column: (MAE, MSE)} of a row, with the script's constants as they are."""
    n = len(video.counts)
    seed = ts.SEED if not ts.WEIGHTS else 0
    key = (seed, ts.FRAME_SIZE, str(ts.FEATURE_LAYERS), ts.FEATURE_SPREAD, "normalise" in row)
    features, others = video.features(key)
    min_steps = row.get("min_steps", 4)
    later, truth = features[first:n], video.counts[first:]
    counted = {}
    for every in options.labels:
        labelled = np.arange(round(every * start) - 1, first, every)
        count = train(video, features, labelled, min_steps)
        counted[f"1/{every}"] = truth, count(later, make_windows(n - first))
        rest = np.setdiff1d(np.arange(first), labelled)
        if len(rest):
            between = count(features[:first], make_windows(first))[rest]
            counted[f"1/{every}, between"] = video.counts[rest], between
    if not options.labels:
        count = train(video, features, np.arange(first), min_steps)
        counted["later"] = truth, count(later, make_windows(n - first))
        counted["/20"] = truth, count(later, make_windows(n - first, 20))
        counted["alone"] = truth, count(later, make_windows(n - first, n))
        for name, other in others.items():
            counted[name] = truth, count(other, make_windows(n - first))
    scores = {name: ts.measure(*pair) for name, pair in counted.items()}
    return {name: (score["mae"], score["mse"]) for name, score in scores.items()}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--half-width", action="store_true")
    parser.add_argument("--split", type=float, default=0.5)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--labels", type=int, nargs="+", default=[])
    parser.add_argument("--starts", type=float, nargs="+", default=[1.0])
    parser.add_argument("--other", nargs="*", default=[])
    options = parser.parse_args()
    folder = options.folder.resolve()
    ts.LABELS, ts.FRAMES = folder / "labels.csv", folder / "frames" / "frames"
    ts.WEIGHTS = None
    if options.half_width:
        import half_width

        keras.applications.ResNet50, ts.WEIGHTS = half_width.ResNet50, "imagenet"
    n_labels = len(ts.read_labels(ts.LABELS).dropna())
    first = round(n_labels * options.split)
    with contextlib.redirect_stdout(io.StringIO()):
        video = Video([other.split("=", 1) for other in options.other], first)
    constants = [name for name in vars(ts) if name.isupper()]
    defaults = {name: getattr(ts, name) for name in [*constants, "normalise"]}
    header = None
    for row in options.rows:
        scores = []
        for seed, start in itertools.product(range(options.seeds), options.starts):
            for name, value in (defaults | settings(ROWS[row]) | {"SEED": seed}).items():
                setattr(ts, name, value)
            with contextlib.redirect_stdout(io.StringIO()):
                scores.append(measure_row(ROWS[row], video, first, start, options))
        if header is None:
            header = list(scores[0])
            print("| change | " + " | ".join(header) + " |\n|---|" + "---|" * len(header), flush=True)
        cells = []
        for column in header:
            maes, mses = zip(*(score[column] for score in scores))
            spread = f" ± {np.std(maes):.2f}" if len(maes) > 1 else ""
            cells.append(f"{np.mean(maes):.2f}{spread} / {np.mean(mses):.1f}")
        print(f"| {row} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
