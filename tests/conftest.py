"""A tiny video of a fixed camera, and the script's main() run on it in this process."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ["MPLBACKEND"] = "agg"
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent / "tools")]

import keras
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from keras.src.applications import resnet
from PIL import Image

import tscrowdnet_train as ts

RESNET50 = keras.applications.ResNet50
COMPILE = keras.Model.compile
SCRIPT = Path(ts.__file__)
README = SCRIPT.parent / "README.md"
TOOLS = SCRIPT.parent / "tests" / "tools"
TINY = {
    "FRAME_SIZE": (48, 64),
    "WEIGHTS": None,
    "FEATURE_LAYERS_RANDOM": {"conv1_relu": (3, 4), "conv2_block1_out": (1, 2)},
    "PRECISION": "float32",
    "FRAME_BATCH": 2,
    "EPOCHS": 2,
    "BATCH_SIZE": 4,
}


def pytest_configure(config):
    """Warnings that are not ours to mend, by name."""
    config.addinivalue_line("markers", "beside(program): one of PROGRAMS runs beside all other tests")
    for warning in (
        "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning",  # Keras 3 with NumPy 2
        "ignore:.*np.object.*:FutureWarning",  # Keras's names of NumPy types
    ):
        config.addinivalue_line("filterwarnings", warning)


def shallow_resnet50(include_top, weights, input_shape):
    """The first 11 layers of ResNet50, built and loaded by Keras's own code: a second less for each run of the script."""

    def first_block(x):
        return resnet.stack_residual_blocks_v1(x, 64, 1, stride1=1, name="conv2")

    names = {"name": "resnet50", "weights_name": "resnet50"}
    return resnet.ResNet(first_block, False, True, include_top=include_top, weights=weights, input_shape=input_shape, **names)


def shrink(setattr):
    """What makes runs in this process short: a shallow ResNet50, and training without tf.function, whose tracing takes 2 s."""
    setattr(keras.applications, "ResNet50", shallow_resnet50)
    setattr(keras.Model, "compile", functools.partialmethod(COMPILE, run_eagerly=True))


def make_video(folder, frames=20, size=(64, 48), seed=0):
    """labels.csv and frames/frames in folder: as many bright patches on a dim floor as people."""
    rng = np.random.default_rng(seed)
    floor = rng.integers(60, 100, (size[1], size[0], 3))
    floor[: size[1] // 4] //= 3  # a dark wall, and a pillar
    floor[:, size[0] // 8 : size[0] // 4] += 60
    (folder / "frames" / "frames").mkdir(parents=True)
    counts = rng.integers(1, 12, frames)
    for frame, count in enumerate(counts, 1):
        picture = floor + rng.integers(-4, 5, floor.shape)
        for x, y in zip(rng.integers(0, size[0] - 4, count), rng.integers(0, size[1] - 8, count)):
            picture[y : y + 8, x : x + 4] = rng.integers(120, 256, 3)
        Image.fromarray(picture.astype("uint8")).save(folder / "frames" / "frames" / f"seq_{frame:06d}.jpg", quality=90)
    pd.DataFrame({"id": np.arange(1, frames + 1), "count": counts}).to_csv(folder / "labels.csv", index=False)
    return folder


def check_whole(outputs):
    """Fails if any result in outputs cannot be read to its end; .new-* is what a killed run was writing."""
    for path in outputs.glob("[!.]*"):
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".png":
            with Image.open(path) as image:
                image.load()
        elif path.suffix == ".keras":
            assert zipfile.ZipFile(path).testzip() is None
        elif path.name in ("predictions.csv", "history.csv"):
            assert path.read_text().endswith("\n") and len(pd.read_csv(path)) in (20, 2)


def read_frames(folder):
    """The pictures of a tiny video as the script reads them."""
    paths = ts.list_pictures(folder / "frames" / "frames")
    return ts.Frames(paths, ts.digest_pictures(paths)[0], TINY["FRAME_SIZE"])


def results(outputs):
    """The metrics and the predictions in a folder."""
    return json.loads((outputs / "metrics.json").read_text()), pd.read_csv(outputs / "predictions.csv")


@pytest.fixture
def video(tmp_path):
    return make_video(tmp_path)


@pytest.fixture
def figures():
    """Asked for by tests that need figures; they take a third of a tiny run, so others go without."""


@pytest.fixture
def constants(video, monkeypatch, request):
    """Points the script at the tiny video; call it with further constants to change."""

    def change(**changes):
        for name, value in (TINY | changes).items():
            monkeypatch.setattr(ts, name, value)

    monkeypatch.setattr(ts, "ROOT", video)
    shrink(monkeypatch.setattr)
    if "figures" not in request.fixturenames:
        monkeypatch.setattr(ts, "save_figures", lambda *_: None)
    change()
    yield change
    plt.close("all")


@pytest.fixture
def whole_resnet50(constants, monkeypatch):
    monkeypatch.setattr(keras.applications, "ResNet50", RESNET50)


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
        start = time.monotonic()
        ts.main()
    (folder / "seconds").write_text(str(time.monotonic() - start))
    return folder


@pytest.fixture
def finished(first_run, video, constants):
    """The tiny video after one run, in a folder of the test's own."""
    shutil.rmtree(video)
    shutil.copytree(first_run, video)  # times too: the features there are still those of the frames
    return video


def edited_copy(folder, **constants):
    """The script copied into folder with constants edited at its top, as a user would."""
    text = SCRIPT.read_text()
    for name, value in constants.items():
        text, found = re.subn(rf"^{name} = (\{{[^}}]*\}}|.*$)", lambda _: f"{name} = {value!r}", text, flags=re.MULTILINE)
        assert found == 1, name
    (folder / SCRIPT.name).write_text(text)
    return folder / SCRIPT.name


def start(arguments, cwd, **environment):
    environment = os.environ | environment
    for screen in ("DISPLAY", "WAYLAND_DISPLAY"):
        environment.pop(screen, None)
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


def user(folder, _):
    return [edited_copy(make_video(folder), **TINY)]


def bad(folder, _):
    make_video(folder)
    (folder / "labels.csv").unlink()
    return [edited_copy(folder, **TINY)]


def killed(folder, first_run):
    return [TOOLS / "killed_runs.py", make_video(folder), (first_run / "seconds").read_text()]


def saved(folder, first_run):
    np.save(folder / "windows.npy", read_frames(first_run)[ts.make_windows(range(20), 5)])
    return [TOOLS / "predict_saved.py", first_run / "outputs" / "ts_crowdnet.keras", folder / "windows.npy", folder / "counts.npy"]


def alone(folder, _):
    shutil.copy(SCRIPT, folder)
    code = "import os, signal; before = signal.getsignal(2), os.fstat(2); import tscrowdnet_train as ts; "
    return ["-B", "-c", code + "print(ts.EPOCHS, (signal.getsignal(2), os.fstat(2)) == before)"]


PROGRAMS = {"user": user, "bad": bad, "killed": killed, "saved": saved, "alone": alone}


@pytest.fixture(scope="session", autouse=True)
def processes(request, tmp_path_factory):
    """{program: (its folder, its process, to be waited for)} of the tests marked with beside(program): they run one after
    another beside all other tests. Nothing is started where no such test is chosen."""
    marks = [item.get_closest_marker("beside") for item in request.session.items]
    with ThreadPoolExecutor(1) as pool:
        started = {}
        for program in dict.fromkeys(mark.args[0] for mark in marks if mark):
            folder = tmp_path_factory.mktemp(program)
            arguments = PROGRAMS[program](folder, request.getfixturevalue("first_run"))
            started[program] = folder, pool.submit(start, arguments, folder)
        yield started
        pool.shutdown(cancel_futures=True)


@pytest.fixture
def beside(request, processes):
    """Waits for the process of a test: its folder, and what became of it."""
    folder, run = processes[request.node.get_closest_marker("beside").args[0]]
    return lambda: (folder, run.result())
