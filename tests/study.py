"""What each part of the model is worth, on a video of one's own.

    python tests/study.py FOLDER [--resnet50 FILE.py] [--other NAME=FRAMES ...] [--seeds 1]
                           [--folds 10] [--rows ROW ...]

FOLDER holds labels.csv and frames/frames. Two schemes, because neighbouring frames show the same people and folds dealt out
among each other reward memory; believe what both say:

later     the first half trains, the second is counted; and again as the folders of --other show it, frames of the same
          names in other light or from a nudged camera, say
folds     10 stretches, each counted by a model of the others, 5 frames left out on either side

Weights are random, but for those that ResNet50() of FILE.py returns with weights="imagenet". Prints a row for each change: mean
over the seeds of MAE / MSE, and the standard deviation of the MAE where there are several.
"""

import argparse
import contextlib
import importlib.util
import io
import os
import sys
import tempfile
from pathlib import Path

os.environ["MPLBACKEND"] = "agg"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import keras
import numpy as np

import tscrowdnet_train as ts


MARGIN = 5
PREPROCESS = keras.applications.resnet50.preprocess_input
ROWS = {  # name: constants and functions of the script that differ
    "default": {},
    "1 frame instead of 5": {"SEQUENCE_LENGTH": 1},
    "no projection: the LSTM sees the feature vectors": {"PROJECTION": 0},
    "Keras's forget bias": {"FORGET_BIAS": 1.0},
    "Adam, 1e-3": {"OPTIMIZER": "adam", "LEARNING_RATE": 1e-3},
    "published head, Adam": {
        "PROJECTION": 0, "LSTM_UNITS": 512, "LSTM_DROPOUT": 0.5, "FORGET_BIAS": 1.0, "DENSE_UNITS": 256,
        "BATCH_SIZE": 16, "OPTIMIZER": "adam", "LEARNING_RATE": 1e-3, "AUGMENT": 0,
    },  # fmt: skip
    "a copy of every training frame": {"AUGMENT": 1},
    "no jittered copies": {"AUGMENT": 0},
    "no channel normalisation": {"normalise": lambda frames: PREPROCESS(ts.ops.cast(frames, "float32"))},
    "every stage summarised over the whole frame": {"grids": (1, 1)},
    "last stage alone": {"grids": None},
    "frames of 480x640": {"FRAME_SIZE": (480, 640)},
    "frames of 360x480": {"FRAME_SIZE": (360, 480)},
    "frames of 240x320": {"FRAME_SIZE": (240, 320)},
    "frames of 192x256": {"FRAME_SIZE": (192, 256)},
}


def settings(row):
    """The script's constants and functions for a row."""
    changes = {name: value for name, value in row.items() if name != "grids"}
    if "grids" in row:
        for name in ("FEATURE_LAYERS", "FEATURE_LAYERS_RANDOM"):
            layers = getattr(ts, name)
            changes[name] = dict.fromkeys(layers, (1, 1)) if row["grids"] else {list(layers)[-1]: (1, 1)}
    return changes


def predict(features, counts, ids, train, tests):
    """Counts of each of tests, features (M, F) of stretches of frames, by a network of the training rows (M,).
    features: of the N frames, then of a copy of each."""
    n = len(counts)
    copied = train[ts.Frames(train, ts.FRAME_SIZE, len(train)).copy_of >= len(train)]  # as the script chooses
    copy_of = np.arange(n)
    copy_of[copied] = n + copied
    raw = keras.Input(features.shape[1:])
    trained_on = np.union1d(train, copy_of[train])
    spatial, known = ts.build_spatial(keras.Model(raw, raw), features, trained_on)
    keras.utils.set_random_seed(ts.SEED)
    basis = ts.find_basis(known[trained_on])
    known = known @ basis
    head = keras.Sequential([ts.build_temporal(known.shape[1]), ts.build_regression(counts[train])])
    windows = ts.make_windows(ids, ts.SEQUENCE_LENGTH)
    training = ts.WindowSequence(known, windows[train], counts[train], copy_of)
    ts.train(head, training, ts.WindowSequence(known, windows[:1], counts[:1]))
    counted = []
    for test in tests:
        test = spatial.predict(test, verbose=0) @ basis
        windows = ts.make_windows(np.arange(len(test)), ts.SEQUENCE_LENGTH)
        sequence = ts.WindowSequence(test, windows, np.zeros(len(test)))
        counted.append(head.predict(sequence, verbose=0)[:, 0])
    return counted


def measure_row(row, labels, others, folds, folder):
    """{column: (MAE, MSE)} of a row, with the script's constants as they are."""
    paths, counts, ids = ts.find_frames(labels.index), labels.to_numpy(), labels.index.to_numpy()
    n, half = len(counts), len(counts) // 2
    key = repr((ts.SEED, ts.FRAME_SIZE, ts.FEATURE_LAYERS, ts.FEATURE_LAYERS_RANDOM, "normalise" in row))
    if key not in measure_row.features:
        share, ts.AUGMENT = ts.AUGMENT, 1  # a copy of every frame: rows take their share
        frames = ts.Frames(paths, ts.FRAME_SIZE, n)
        ts.AUGMENT = share
        backbone, features, _ = ts.extract_features(frames, half, folder / "cache")
        seen = {}
        for name, other in others.items():
            frames = ts.Frames([other / path.name for path in paths[half:]], ts.FRAME_SIZE)
            seen[name] = ts.read_features(backbone, frames, np.arange(len(frames.sources)))
        measure_row.features = {key: (features, seen)}
    features, seen = measure_row.features[key]

    conditions = {"later": features[half:n]} | seen
    predicted = predict(features, counts, ids, np.arange(half), conditions.values())
    scores = {name: ts.measure(counts[half:], counted) for name, counted in zip(conditions, predicted)}
    if folds:
        counted = np.empty(n)
        for fold in np.array_split(np.arange(n), folds):
            train = np.flatnonzero((np.arange(n) < fold[0] - MARGIN) | (np.arange(n) > fold[-1] + MARGIN))
            (counted[fold],) = predict(features, counts, ids, train, [features[fold]])
        scores["folds"] = ts.measure(counts, counted)
    return {name: (score["mae"], score["mse"]) for name, score in scores.items()}


measure_row.features = {}  # of the last row: neighbouring rows share them


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--resnet50", type=Path)
    parser.add_argument("--other", nargs="*", default=[])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--folds", type=int, default=10, help="0: none")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    options = parser.parse_args()
    ts.ROOT, ts.WEIGHTS = options.folder.resolve(), None
    if options.resnet50:
        spec = importlib.util.spec_from_file_location("resnet50", options.resnet50)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        keras.applications.ResNet50, ts.WEIGHTS = module.ResNet50, "imagenet"
    others = {name: Path(path) for name, path in (other.split("=", 1) for other in options.other)}
    labels = ts.read_labels(ts.at(ts.LABELS))
    defaults = {name: getattr(ts, name) for name in [name for name in vars(ts) if name.isupper()] + ["normalise"]}
    columns = ["later", *others] + ["folds"] * bool(options.folds)
    print("| change | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in options.rows:
            scores = []
            for seed in range(options.seeds):
                for constant, value in defaults.items():
                    setattr(ts, constant, value)
                for constant, value in (settings(ROWS[name]) | {"SEED": seed}).items():
                    setattr(ts, constant, value)
                with contextlib.redirect_stdout(io.StringIO()):
                    scores.append(measure_row(ROWS[name], labels, others, options.folds, Path(folder)))
            cells = []
            for column in columns:
                maes, mses = zip(*(score[column] for score in scores))
                spread = f" ± {np.std(maes):.2f}" if len(maes) > 1 else ""
                cells.append(f"{np.mean(maes):.2f}{spread} / {np.mean(mses):.2f}")
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
