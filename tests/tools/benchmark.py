"""Speed and memory of the whole run, beside one pass of Keras's own ResNet50 and the published original.

    python tests/tools/benchmark.py [--video FOLDER] [--frames 2000] [--labels 40] [--growth 200 1600]  # --frames 0: growth alone

FOLDER holds labels.csv and frames/frames; without it the sample's pictures are repeated to --frames, each with a byte of its
own at its end, so that none is found in the cache. The weights come from a file, so that ResNet50 is read at FEATURE_LAYERS, as
with ImageNet's (its values are random, which does not change the work). Prints a table in Markdown; every run is a process of
its own, and peak memory is that process's.
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


def make_video(folder, frames, video=None):
    """That many pictures of a video, or of the sample again and again, and their labels."""
    source = video or SCRIPT.parent
    pictures = ts.list_pictures(source / "frames" / "frames")
    (folder / "frames" / "frames").mkdir(parents=True)
    counts = pd.read_csv(source / "labels.csv")["count"]
    for frame in range(frames):
        repeats, place = divmod(frame, len(pictures))
        data = pictures[place].read_bytes() + bytes(f"{repeats}" * bool(repeats), "ascii")
        (folder / "frames" / "frames" / f"seq_{frame + 1:06d}.jpg").write_bytes(data)
    labels = pd.DataFrame({"id": np.arange(1, frames + 1), "count": np.resize(counts, frames)})
    labels.to_csv(folder / "labels.csv", index=False)
    return folder


def run_script(folder, edit=("", ""), **constants):
    """(seconds in all, seconds until the first word, seconds of extraction, peak memory in MiB) of a run in folder."""
    text = SCRIPT.read_text().replace(*edit)
    for name, value in constants.items():
        text = re.sub(rf"^{name} = .*$", f"{name} = {value!r}", text, flags=re.MULTILINE)
    (folder / SCRIPT.name).write_text(text)
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-u", SCRIPT.name], cwd=folder, stdout=subprocess.PIPE, text=True)
    said = {}
    for line in process.stdout:
        for sign in ("labels: the first", r"^ResNet50 \(", r"(?<!\d)(\d+)/\1(?!\d).*picture"):  # the last is the bar when it is full
            if re.search(sign, line):
                said.setdefault(sign, time.perf_counter() - start)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    seconds = time.perf_counter() - start
    first, reads, full = said.values()
    return seconds, first, full - reads, usage.ru_maxrss / 1024


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
    resnet = keras.applications.ResNet50(include_top=False, weights=None, pooling="avg", input_shape=(*size, 3))
    resnet.trainable = False
    windows = keras.Input((5, *size, 3))
    x = layers.LSTM(512)(layers.TimeDistributed(resnet)(windows))
    model = keras.Model(windows, layers.Dense(1)(layers.Dense(256, activation="relu")(x)))
    model.compile("adam", "mse", jit_compile=False)
    return model


def processor():
    """The machine's name, and whether it has units for bfloat16."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    units = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in info]
    return f"{re.search('model name.*: (.*)', info)[1]}, {os.cpu_count()} cores, bfloat16 units: {', '.join(units) or 'none'}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--video", type=Path)
    parser.add_argument("--frames", type=int, default=2000)
    parser.add_argument("--labels", type=int, default=40)
    parser.add_argument("--growth", type=int, nargs=2, default=(200, 1600))
    options = parser.parse_args()
    n, size = options.frames, ts.FRAME_SIZE
    print(f"{n} pictures of {VIDEO[0]}x{VIDEO[1]}, read at {size[0]}x{size[1]}, 50 epochs; {processor()}; Keras {keras.__version__}\n\n| | seconds | |\n|---|---:|---|")

    def row(name, seconds, note):
        print(f"| {name} | {seconds:.1f} | {note} |", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        weights = str(folder / "resnet50.weights.h5")
        code = f"import keras; keras.applications.ResNet50(include_top=False, weights=None).save_weights({weights!r})"
        subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.DEVNULL)
        grown = []
        for frames in options.growth:  # first: a process's peak memory counts that of the one that started it, too
            video = make_video(folder / f"growth {frames}", frames, options.video)
            _, _, extraction, memory = run_script(video, WEIGHTS=weights)
            grown.append((extraction, memory))
            row(f"extraction of {frames} pictures and copies", extraction, f"{memory:.0f} MiB at most")
        times, memories = (later / earlier for earlier, later in zip(*grown))
        print(f"| {options.growth[1] / options.growth[0]:.0f} x the pictures | | {times:.2f} x the time, {memories:.2f} x the memory |", flush=True)
        if not n:
            return
        video = make_video(folder / "video", n, options.video)
        runs = {}
        for name, constants in (
            ("AUGMENT = 0", {"AUGMENT": 0, "CACHE": "other_cache"}),
            ("float32, BatchNorm not folded", {"PRECISION": "float32", "edit": ("fold_batchnorm(resnet, grids)(", "resnet("), "CACHE": "third_cache"}),
            ("float32", {"PRECISION": "float32"}),
            ("defaults", {}),
            ("defaults, a second run", {}),
            ("defaults, SEED = 1", {"SEED": 1}),
        ):
            runs[name] = run_script(video, **constants | {"WEIGHTS": weights})
        sparse = make_video(folder / "sparse", n, options.video)
        labels = pd.read_csv(sparse / "labels.csv")
        labels[labels["id"] % (n // options.labels) == 0].to_csv(sparse / "labels.csv", index=False)
        runs[f"{options.labels} labels, defaults"] = run_script(sparse, WEIGHTS=weights)

        sample = ts.list_pictures(SCRIPT.parent / "frames" / "frames")
        digests, _ = ts.digest_pictures(sample)
        for shape in (size, VIDEO):
            pixels = ts.Frames(sample, digests, shape)[range(8)].astype("float32")
            plain = keras.applications.ResNet50(include_top=False, weights=None, pooling="avg", input_shape=(*shape, 3))
            keras_pass = median_seconds(lambda: plain.predict_on_batch(pixels)) / 8 * n
            row(f"one pass of Keras's own ResNet50, float32, {shape[0]}x{shape[1]}", keras_pass, f"{keras_pass / n * 1000:.0f} ms a frame")
        for name, (whole, first_sign, extraction, memory) in runs.items():
            row(f"whole run, {name}", whole, f"{whole / keras_pass:.2f} of the last pass; extraction {extraction:.1f}; "
                f"first word after {first_sign:.1f}; {memory:.0f} MiB at most")  # fmt: skip
        whole, _, extraction, _ = runs["defaults"]
        rate = (n + 0.8 * n * ts.AUGMENT) / extraction
        start = time.perf_counter()
        ts.count_people(video / "outputs" / "ts_crowdnet.keras", video / "frames" / "frames")
        counting = time.perf_counter() - start
        row("counting the frames with the saved model", counting, f"{n / counting:.1f} frames/s, {n / counting / rate:.2f} of the extraction's rate")
        model = keras.saving.load_model(video / "outputs" / "ts_crowdnet.keras")
        second = ts.Frames(sample, digests, VIDEO)[range(4)]
        call = median_seconds(lambda: ts.count_people(model, second))
        row("counting 4 more frames with a loaded model, a second of a stream, say", call, f"{call / 4 * rate:.1f} x what they take in the extraction")
        for shape in ((224, 224), VIDEO):
            model = published_original(shape)
            windows = np.random.default_rng(0).uniform(0, 255, (16, 5, *shape, 3)).astype("float32")
            step = median_seconds(lambda: model.train_on_batch(windows, np.ones((16, 1))), repeats=2)
            test = median_seconds(lambda: model.test_on_batch(windows, np.ones((16, 1))), repeats=2)
            epochs = 50 * (step * np.ceil(0.8 * n / 16) + test * np.ceil(0.2 * n / 16))
            row(f"published original, {shape[0]}x{shape[1]}, extrapolated from its steps", epochs, f"{epochs / whole:.0f} x the whole run")


if __name__ == "__main__":
    main()
