"""What each part of the model is worth: blocked cross-validation on a video of one's own.

    python tests/study.py FOLDER [--seeds 3] [--schemes interleaved contiguous] [--rows ROW ...]

FOLDER holds labels.csv and frames/frames. Every statistic (empty scene, BatchNorm, penalty, feature and
target scaling) is fitted to the training part of each fold. Two schemes, because neighbouring frames
show the same people and a random split would reward memory:

interleaved   blocks of 40 frames dealt out to 5 folds, 5 frames left out on either side
contiguous    5 folds of one stretch each, 5 frames left out on either side: counts and light never seen

Weights are random. Prints one line for each row: mean and standard deviation over seeds of MAE and MSE.
"""

import argparse
import contextlib
import io
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

import tscrowdnet_train as ts

BLOCK, MARGIN, FOLDS = 40, 5, 5
ROWS = {  # name: constants that differ from the script's, or (lower case) another way through it
    "default": {},
    "1 frame instead of 5": {"SEQUENCE_LENGTH": 1},
    "read-out alone, no LSTM": {"head": False},
    "no noise on the estimates": {"ESTIMATE_NOISE": 0.0},
    "features weigh alike, not views": {"views": "joined"},
    "without the share covered": {"views": [0, 1]},
    "without any foreground": {"views": [0]},
    "grid 3 x 4": {"READ_OUT_RANDOM": {"conv1_relu": (3, 4)}},
    "one average for the whole frame": {"READ_OUT_RANDOM": {"conv1_relu": (1, 1)}},
    "conv2_block1_out added": {"READ_OUT_RANDOM": {"conv1_relu": (6, 8), "conv2_block1_out": (3, 4)}},
    "share covered on a 6 x 8 grid": {"FOREGROUND": (6, 8)},
    "share covered on a 24 x 32 grid": {"FOREGROUND": (24, 32)},
}


def folds(scheme, frames):
    """Yields (training rows, validation rows) of each fold."""
    rows = np.arange(frames)
    fold = rows // BLOCK % FOLDS if scheme == "interleaved" else rows * FOLDS // frames
    for k in range(FOLDS):
        near = np.convolve(fold == k, np.ones(2 * MARGIN + 1), "same") > 0
        yield rows[~near], rows[fold == k]


def fold_features(frames, train, cache, folder):
    """(features of all frames (N, F), size of each view) from a random backbone fitted to the training rows."""
    key = ts.fingerprint(train, ts.READ_OUT_RANDOM, ts.SEED, ts.FOREGROUND, ts.FRAME_SIZE)
    if key not in cache:
        backbone, *_ = ts.prepare_backbone(frames, train)
        cache[key] = ts.extract_features(backbone, frames, folder / f"{key}.float32"), ts.view_sizes(backbone)
    return cache[key]


def predict_fold(row, features, views, windows, counts, train, validate, folder):
    """Counts of the validation rows by a read-out and a head trained on the training rows."""
    if row.get("views") == "joined":
        views = [sum(views)]
    elif "views" in row:
        parts = np.split(features, np.cumsum(views)[:-1], axis=1)
        features = np.concatenate([parts[view] for view in row["views"]], axis=1)
        views = [views[view] for view in row["views"]]
    readout = ts.build_readout(features[train], counts[train], views)
    estimates = readout.predict(features, verbose=0)
    if not row.get("head", True):
        return estimates[validate, 0] * counts[train].std() + counts[train].mean()
    ts.keras.utils.set_random_seed(ts.SEED)
    head = ts.build_head(counts[train])
    checkpoint = folder / "checkpoint.npz"
    checkpoint.unlink(missing_ok=True)
    training = ts.WindowSequence(estimates, windows[train], counts[train, None], ts.BATCH_SIZE, shuffle=True)
    ts.train(head, training, None, checkpoint, ts.EPOCHS, ts.LEARNING_RATE)
    return head.predict(ts.WindowSequence(estimates, windows[validate], counts[validate, None], ts.BATCH_SIZE), verbose=0)[:, 0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--schemes", nargs="+", default=["interleaved", "contiguous"])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    options = parser.parse_args()
    ts.ROOT, ts.WEIGHTS = options.folder.resolve(), None
    defaults = {name: value for name, value in vars(ts).items() if name.isupper()}
    labels = ts.read_labels(ts.at(ts.LABELS))
    frames = ts.Frames(ts.find_frames(labels.index)[0], ts.FRAME_SIZE)
    counts = labels.to_numpy()
    print("| change | " + " | ".join(f"{scheme}: MAE | MSE" for scheme in options.schemes) + " |")
    print("|---|" + "---|---|" * len(options.schemes))
    with tempfile.TemporaryDirectory() as folder:
        cache = {}
        for name in options.rows:
            row, cells = ROWS[name], []
            for scheme in options.schemes:
                scores = []
                for seed in range(options.seeds):
                    for constant, value in (defaults | row | {"SEED": seed}).items():
                        if constant.isupper():
                            setattr(ts, constant, value)
                    windows = ts.make_windows(labels.index.to_numpy(), ts.SEQUENCE_LENGTH)
                    predicted = np.empty(len(counts))
                    with contextlib.redirect_stdout(io.StringIO()):
                        for train, validate in folds(scheme, len(counts)):
                            features, views = fold_features(frames, train, cache, Path(folder))
                            data = (features, views, windows, counts)
                            predicted[validate] = predict_fold(row, *data, train, validate, Path(folder))
                    scores.append([np.abs(predicted - counts).mean(), np.square(predicted - counts).mean()])
                mean, deviation = np.mean(scores, axis=0), np.std(scores, axis=0)
                cells += [f"{mean[0]:.2f} ± {deviation[0]:.2f}", f"{mean[1]:.2f} ± {deviation[1]:.2f}"]
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
