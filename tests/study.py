"""What each part of the model is worth: blocked cross-validation on a video of one's own.

    python tests/study.py FOLDER [--seeds 3] [--schemes interleaved contiguous] [--rows ROW ...]

FOLDER holds labels.csv and frames/frames. Every statistic (empty scene, BatchNorm, feature and
target scaling) is fitted to the training part of each fold. Two schemes, because neighbouring frames
show the same people and a random split would reward memory:

interleaved   blocks of 40 frames dealt out to 5 folds, 5 frames left out on either side
contiguous    5 folds of one stretch each, 5 frames left out on either side: counts and light never seen

Prints one line for each row: mean and standard deviation over seeds of MAE and MSE.
"""

import argparse
import contextlib
import io
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

import tscrowdnet_train as ts

BLOCK, MARGIN, FOLDS = 40, 5, 5
ROWS = {  # name: constants that differ from the script's
    "default": {},
    "1 frame instead of 5": {"SEQUENCE_LENGTH": 1},
    "no foreground": {"FOREGROUND": False},
    "no dropout of single frames": {"FRAME_DROPOUT": 0.0, "DROPOUT": 0.4},
    "dropout 0.5": {"DROPOUT": 0.5},
    "one average for the whole frame": {"READ_OUT_RANDOM": {"conv1_relu": (1, 1)}},
    "grid 3 x 4": {"READ_OUT_RANDOM": {"conv1_relu": (3, 4)}},
    "conv2_block1_out added": {"READ_OUT_RANDOM": {"conv1_relu": (6, 8), "conv2_block1_out": (3, 4)}},
    "conv3_block4_out added": {"READ_OUT_RANDOM": {"conv1_relu": (6, 8), "conv3_block4_out": (3, 4)}},
    "ridge regression, last frame": {"head": "ridge"},
}


def folds(scheme, frames):
    """Yields (training rows, validation rows) of each fold."""
    rows = np.arange(frames)
    fold = rows // BLOCK % FOLDS if scheme == "interleaved" else rows * FOLDS // frames
    for k in range(FOLDS):
        near = np.convolve(fold == k, np.ones(2 * MARGIN + 1), "same") > 0
        yield rows[~near], rows[fold == k]


def fold_features(frames, train, read_out, cache):
    """Features of all frames (N, F) from a random backbone fitted to the training rows of a fold."""
    key = ts.fingerprint(train, read_out, ts.SEED, ts.FOREGROUND, ts.FRAME_SIZE)
    backbone = ts.build_backbone(ts.load_resnet50()[0], read_out)
    ts.fit_backbone(backbone, frames[train[np.linspace(0, len(train) - 1, ts.CALIBRATION_FRAMES).astype(int)]], True)
    return ts.extract_features(backbone, frames, cache / f"{key}.float32")


class Rows:
    """Some rows of an array, read as an array."""

    def __init__(self, data, rows):
        self.data, self.rows, self.shape = data, rows, (len(rows), *data.shape[1:])

    def __getitem__(self, place):
        return self.data[self.rows[place]]


def predict_fold(head, features, windows, counts, train, validate, folder):
    if head == "ridge":
        scaler = StandardScaler().fit(features[train])
        ridge = Ridge(alpha=0.07 * features.shape[1]).fit(scaler.transform(features[train]), counts[train])
        return ridge.predict(scaler.transform(features[validate]))
    ts.keras.utils.set_random_seed(ts.SEED)
    model = ts.build_head(Rows(features, train), counts[train])
    training = ts.WindowSequence(features, windows[train], counts[train], shuffle=True)
    checkpoint = folder / "checkpoint.weights.h5"
    checkpoint.unlink(missing_ok=True)
    ts.train(model, training, None, checkpoint)
    return model.predict(ts.WindowSequence(features, windows[validate], counts[validate]), verbose=0)[:, 0]


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
        for row in options.rows:
            cells = []
            for scheme in options.schemes:
                scores = []
                for seed in range(options.seeds):
                    for name, value in (defaults | ROWS[row] | {"SEED": seed}).items():
                        setattr(ts, name, value)
                    windows = ts.make_windows(labels.index.to_numpy(), ts.SEQUENCE_LENGTH)
                    predicted = np.empty(len(counts))
                    with contextlib.redirect_stdout(io.StringIO()):
                        for train, validate in folds(scheme, len(counts)):
                            features = fold_features(frames, train, ts.READ_OUT_RANDOM, Path(folder))
                            predicted[validate] = predict_fold(
                                ROWS[row].get("head"), features, windows, counts, train, validate, Path(folder)
                            )
                    scores.append([np.abs(predicted - counts).mean(), np.square(predicted - counts).mean()])
                mean, deviation = np.mean(scores, axis=0), np.std(scores, axis=0)
                cells += [f"{mean[0]:.2f} ± {deviation[0]:.2f}", f"{mean[1]:.1f} ± {deviation[1]:.1f}"]
            print(f"| {row} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
