"""Speed and memory of the whole run, beside one pass of Keras's own ResNet50 and the published
original.

    python tests/tools/benchmark.py [--video FOLDER] [--frames 2000] [--labels 40]

FOLDER holds labels.csv and frames/frames; without it the sample's frames are repeated, each with a
byte of its own at its end, so that none is found in the cache. The weights come from a file, so that
ResNet50 is read at FEATURE_LAYERS, as with ImageNet's; its values are random, which does not change
the work. Prints a table in Markdown. Every run is a process of its own, and its peak memory is
that process's.
"""

import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ["MPLBACKEND"] = "agg"

import keras
import numpy as np
import pandas as pd
from keras import layers

import tscrowdnet_train as ts

SCRIPT = Path(ts.__file__)
VIDEO = (480, 640)  # (height, width) of the frames themselves


def make_video(folder, n_frames, source):
    """That many frames of a video, again and again if it is shorter, and their labels."""
    names, _ = ts.list_frames(source / "frames" / "frames")
    (folder / "frames" / "frames").mkdir(parents=True)
    counts = pd.read_csv(source / "labels.csv")["count"]
    for number in range(n_frames):
        repeats, place = divmod(number, len(names))
        data = (source / "frames" / "frames" / names[place]).read_bytes()
        data += bytes(f"{repeats}" * bool(repeats), "ascii")
        (folder / "frames" / "frames" / f"seq_{number + 1:06d}.jpg").write_bytes(data)
    labels = {"id": np.arange(1, n_frames + 1), "count": np.resize(counts, n_frames)}
    pd.DataFrame(labels).to_csv(folder / "labels.csv", index=False)
    return folder


def run_script(folder, edit=("", ""), **constants):
    """(seconds in all, seconds of extraction, peak memory in MiB) of a run in folder."""
    constants = "".join(f"{name} = {value!r}\n" for name, value in constants.items())
    text = SCRIPT.read_text().replace("\n# -- Internal", f"\n{constants}\n# -- Internal")
    (folder / SCRIPT.name).write_text(text.replace(*edit))
    start = time.perf_counter()
    command = [sys.executable, "-u", SCRIPT.name]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)
    reads = trains = None
    for line in process.stdout:
        if line.startswith("ResNet50 ("):
            reads = time.perf_counter()
        elif line.startswith("Epoch 1/"):
            trains = time.perf_counter()
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    return time.perf_counter() - start, trains - reads, usage.ru_maxrss / 1024


def median_seconds(step, repeats=5):
    """The median time of a step, after a first one that traces and compiles."""
    step()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


def published_original(size):
    """The published network: frozen ResNet50, average-pooled, LSTM 512, Dense 256, Adam, MSE."""
    resnet = keras.applications.ResNet50(
        include_top=False, weights=None, pooling="avg", input_shape=(*size, 3)
    )
    resnet.trainable = False
    windows = keras.Input((5, *size, 3))
    x = layers.LSTM(512)(layers.TimeDistributed(resnet)(windows))
    model = keras.Model(windows, layers.Dense(1)(layers.Dense(256, activation="relu")(x)))
    model.compile("adam", "mse", jit_compile=False)
    return model


def describe_processor():
    """The machine's name, and whether it has units for bfloat16."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    units = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in info]
    name = re.search("model name.*: (.*)", info)[1]
    return f"{name}, {os.cpu_count()} cores, bfloat16 units: {', '.join(units) or 'none'}"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--video", type=Path, default=SCRIPT.parent)
    parser.add_argument("--frames", type=int, default=2000)
    parser.add_argument("--labels", type=int, default=40)
    options = parser.parse_args()
    n, size = options.frames, ts.FRAME_SIZE
    print(f"{n} frames of {VIDEO[0]}x{VIDEO[1]}, read at {size[0]}x{size[1]}, 50 epochs;",
          f"{describe_processor()}; Keras {keras.__version__}\n\n| | seconds | |\n|---|---:|---|")

    def row(name, seconds, note=""):
        print(f"| {name} | {seconds:.1f} | {note} |", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        weights = str(folder / "resnet50.weights.h5")
        # In a process of its own: a run's peak memory counts that of the process that starts it.
        code = "import keras; keras.applications.ResNet50(include_top=False, weights=None)"
        subprocess.run([sys.executable, "-c", f"{code}.save_weights({weights!r})"], check=True,
                       stderr=subprocess.DEVNULL)
        video = make_video(folder / "video", n, options.video)
        float32 = {"PRECISION": "float32", "CACHE": "float32_cache"}
        unfolded = float32 | {"edit": ("fold_batchnorm(resnet, grids, precision)(", "resnet("),
                              "CACHE": "unfolded_cache"}
        for name, constants in {
            "whole run": {},
            "a second run": {},
            "a second run, SEED = 1": {"SEED": 1},
            "whole run, no copies": {"AUGMENT": 0, "CACHE": "no_copies_cache"},
            "whole run, float32": float32,
            "whole run, float32, BatchNorm not folded": unfolded,
        }.items():
            whole, extraction, memory = run_script(video, **constants | {"WEIGHTS": weights})
            row(name, whole, f"extraction {extraction:.1f}; {memory:.0f} MiB at most")
        sparse = make_video(folder / "sparse", n, options.video)
        labels = pd.read_csv(sparse / "labels.csv")
        is_labelled = labels["id"] % (n // options.labels) == 0
        labels[is_labelled].to_csv(sparse / "labels.csv", index=False)
        whole, extraction, memory = run_script(sparse, WEIGHTS=weights)
        row(f"whole run, {options.labels} labels", whole,
            f"extraction {extraction:.1f}; {memory:.0f} MiB at most")

        start = time.perf_counter()
        model = sparse / "outputs" / "ts_crowdnet.keras"
        ts.count_people(model, video / "frames" / "frames")
        counting = time.perf_counter() - start
        row("counting all frames", counting, f"{n / counting:.1f} frames/s")
        names, _ = ts.list_frames(video / "frames" / "frames")
        paths = [video / "frames" / "frames" / name for name in names[:5]]
        arrays = [np.asarray(ts.decode(ts.open_image(path))) for path in paths]
        loaded = keras.saving.load_model(model)
        call = median_seconds(lambda: ts.count_people(loaded, arrays))
        row("counting the last 5 frames of a stream", call)

        pixels = np.stack(arrays)
        for shape in (size, VIDEO):
            images = np.asarray(keras.ops.image.resize(pixels, shape), "float32")
            plain = keras.applications.ResNet50(
                include_top=False, weights=None, pooling="avg", input_shape=(*shape, 3)
            )
            seconds = median_seconds(lambda: plain.predict_on_batch(images)) / len(images) * n
            row(f"one pass of Keras's own ResNet50, float32, {shape[0]}x{shape[1]}", seconds)
        shape = (224, 224)
        original = published_original(shape)
        windows = np.random.default_rng(0).uniform(0, 255, (16, 5, *shape, 3)).astype("float32")
        counts = np.ones((16, 1))
        step = median_seconds(lambda: original.train_on_batch(windows, counts), repeats=2)
        test = median_seconds(lambda: original.test_on_batch(windows, counts), repeats=2)
        epochs = 50 * (step * np.ceil(0.8 * n / 16) + test * np.ceil(0.2 * n / 16))
        row("published original, 224x224, extrapolated from its steps", epochs)


if __name__ == "__main__":
    main()
