"""A tiny video of a fixed camera, and the script's main() run on it in this process."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

os.environ["MPLBACKEND"] = "agg"
TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS / "tools")]

import keras
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image

import tscrowdnet_train as ts



class Stopped(Exception):
    """Ends a run where a test has seen enough."""


RESNET50 = keras.applications.ResNet50
COMPILE = keras.Model.compile
SCRIPT = Path(ts.__file__)
README = SCRIPT.parent / "README.md"
SIZE = (48, 64)  # of the frames of the tiny video, (height, width)
TINY = {
    "FRAME_SIZE": SIZE,
    "COUNT": None,
    "WEIGHTS": None,
    "FEATURE_LAYERS_RANDOM": {"conv1_relu": (3, 4), "conv2_block1_out": (1, 2)},
    "PRECISION": "float32",
    "FRAME_BATCH": 2,
    "EPOCHS": 1,
    "BATCH_SIZE": 4,
}


@functools.cache
def first_block(input_shape):
    """The first 11 layers of ResNet50, up to the end of its first residual block."""
    whole = RESNET50(include_top=False, weights=None, input_shape=input_shape)
    return keras.Model(whole.input, whole.get_layer("conv2_block1_out").output, name="resnet50")


def shallow_resnet50(include_top, weights, input_shape):
    """In the place of keras.applications.ResNet50: a second less for each run of the script."""
    block = first_block(input_shape)
    keras.utils.set_random_seed(ts.SEED)  # whether or not the block has just been built
    model = keras.models.clone_model(block)
    if weights:
        model.load_weights(weights)
    return model


def shrink(setattr):
    """Makes runs in this process short: a shallow ResNet50, and training without tf.function, whose
    tracing takes 2 s. test_script.py runs the whole network in its graph."""
    setattr(keras.applications, "ResNet50", shallow_resnet50)
    setattr(keras.Model, "compile", functools.partialmethod(COMPILE, run_eagerly=True))


def make_video(folder, frames=20, size=SIZE, seed=0):
    """labels.csv and frames/frames in folder: as many bright patches on a dim floor as people."""
    height, width = size
    rng = np.random.default_rng(seed)
    floor = rng.integers(60, 100, (height, width, 3))
    floor[: height // 4] //= 3  # a dark wall, and a pillar
    floor[:, width // 8 : width // 4] += 60
    (folder / "frames" / "frames").mkdir(parents=True)
    counts = rng.integers(1, 12, frames)
    for number, count in enumerate(counts, 1):
        pixels = floor + rng.integers(-4, 5, floor.shape)
        for x, y in zip(rng.integers(0, width - 4, count), rng.integers(0, height - 8, count)):
            pixels[y : y + 8, x : x + 4] = rng.integers(120, 256, 3)
        path = folder / "frames" / "frames" / f"seq_{number:06d}.jpg"
        Image.fromarray(pixels.astype("uint8")).save(path, quality=90)
    write_labels(folder, enumerate(counts, 1))
    return folder


def write_labels(folder, rows):
    """labels.csv of rows (id, count)."""
    pd.DataFrame(rows, columns=["id", "count"]).to_csv(folder / "labels.csv", index=False)


def frame_paths(folder):
    return sorted((folder / "frames" / "frames").iterdir())


def digests_of(paths):
    return ts.check_frames([path.name for path in paths], paths, None)["digest"].tolist()


def read_frames(folder, copied=()):
    """The frames of a tiny video, as the script reads them."""
    paths = frame_paths(folder)
    return ts.Frames(paths, digests_of(paths), SIZE, copied)


def results(outputs):
    """The metrics and the predictions in a folder."""
    metrics = json.loads((outputs / "metrics.json").read_text())
    return metrics, pd.read_csv(outputs / "predictions.csv")


def count(folder, frames=None, **options):
    """The counts of the frames of a tiny video by the model in its outputs."""
    model = folder / "outputs" / "ts_crowdnet.keras"
    return ts.count_people(model, folder / "frames" / "frames" if frames is None else frames, **options)


def check_whole(outputs):
    """Fails if any result in outputs cannot be read to its end; .new-* is what a killed run was
    writing."""
    for path in outputs.glob("[!.]*"):
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".png":
            with Image.open(path) as image:
                image.load()
        elif path.suffix == ".keras":
            assert zipfile.ZipFile(path).testzip() is None
        elif path.name in ("predictions.csv", "history.csv"):
            assert path.read_text().endswith("\n") and len(pd.read_csv(path)) in (20, 1)


@pytest.fixture
def video(tmp_path):
    return make_video(tmp_path)


@pytest.fixture
def figures():
    """Asked for by tests that need figures; they take a third of a tiny run, so others go
    without."""


@pytest.fixture
def constants(video, monkeypatch, request):
    """Points the script at the tiny video; call it with further constants to change."""

    def change(**changes):
        for name, value in (TINY | changes).items():
            monkeypatch.setattr(ts, name, value)

    monkeypatch.setattr(ts, "ROOT", video)
    monkeypatch.setattr(sys, "argv", ["tscrowdnet_train.py"])
    monkeypatch.setattr(ts.signal, "signal", lambda *_: None)  # Ctrl-C stays pytest's
    shrink(monkeypatch.setattr)
    if "figures" not in request.fixturenames:
        monkeypatch.setattr(ts, "save_figures", lambda *_: None)
    change()
    yield change
    plt.close("all")


@pytest.fixture
def graph(constants, monkeypatch):
    """Training in TensorFlow's graph, as users have it."""
    monkeypatch.setattr(keras.Model, "compile", COMPILE)


@pytest.fixture
def run(video, constants):
    """Runs main() with the given constants; returns the metrics and the predictions."""

    def run(**changes):
        constants(**changes)
        ts.main()
        return results(video / ts.OUTPUTS)

    return run


@pytest.fixture(scope="session")
def first_run(tmp_path_factory):
    """The folder of the tiny video after one run, made once: take `finished` to change it."""
    folder = make_video(tmp_path_factory.mktemp("finished"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (TINY | {"ROOT": folder}).items():
            patch.setattr(ts, name, value)
        shrink(patch.setattr)
        ts.main()
    return folder


@pytest.fixture
def finished(first_run, video, constants):
    """The tiny video after one run, in a folder of the test's own."""
    shutil.rmtree(video)
    shutil.copytree(first_run, video)
    return video


@pytest.fixture
def until(monkeypatch):
    """until("train") ends the next runs where the script would call that function."""

    def stop(*_, **__):
        raise Stopped

    return lambda name: monkeypatch.setattr(ts, name, stop)


@pytest.fixture
def loaded(monkeypatch):
    """The digests of the frames and copies that are decoded for ResNet50."""
    digests, load = [], ts.Frames.load
    monkeypatch.setattr(
        ts.Frames, "load", lambda self, row: digests.append(self.digests[row]) or load(self, row)
    )
    return digests


def edited_copy(folder, **constants):
    """The script copied into folder, with constants set below the last one."""
    edits = "".join(f"{name} = {value!r}\n" for name, value in constants.items())
    before, mark, after = SCRIPT.read_text().partition("\n# -- Internal")
    assert mark
    (folder / SCRIPT.name).write_text(f"{before}\n{edits}{mark}{after}")
    return folder / SCRIPT.name


def start(arguments, cwd, **environment):
    """A process of its own, without a screen: what became of it."""
    environment = os.environ | environment
    for screen in ("DISPLAY", "WAYLAND_DISPLAY"):
        environment.pop(screen, None)
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def without_tensorflow(errors):
    """What stderr says but for TensorFlow's lines at its import, which nothing silences."""
    at_import = re.compile("WARNING: All log|[IW]0000 |E0000 .*Unable to register")
    return [line for line in errors.splitlines() if not at_import.match(line)]
