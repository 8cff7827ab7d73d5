"""Speed and memory of the whole run, beside one pass of Keras's own ResNet50 and the published original.

    python tests/benchmark.py [--frames 2000] [--growth 200 1600]  # --frames 0: growth alone

The sample's frames are repeated to --frames; the weights come from a file, so that ResNet50 is read at FEATURE_LAYERS, as with
ImageNet's (its values are random, which does not change the work). Prints a table in Markdown; every run is a process of
its own, and peak memory is that process's.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["MPLBACKEND"] = "agg"

import keras
import numpy as np
import pandas as pd
from keras import layers

import tscrowdnet_train as ts

SCRIPT = Path(ts.__file__)
VIDEO = (480, 640)  # (height, width) of the frames themselves


def repeat_video(folder, frames, **constants):
    """The script with constants edited, and the sample repeated to that many frames, by symbolic links."""
    source = SCRIPT.parent / "frames" / "frames"
    (folder / "frames" / "frames").mkdir(parents=True)
    counts = pd.read_csv(SCRIPT.parent / "labels.csv")["count"]
    for frame in range(frames):
        os.symlink(source / f"seq_{frame % len(counts) + 1:06d}.jpg", folder / "frames" / "frames" / f"seq_{frame + 1:06d}.jpg")
    labels = pd.DataFrame({"id": np.arange(1, frames + 1), "count": np.resize(counts, frames)})
    labels.to_csv(folder / "labels.csv", index=False)
    text = SCRIPT.read_text()
    for name, value in constants.items():
        text = re.sub(rf"^{name} = .*$", f"{name} = {value!r}", text, flags=re.MULTILINE)
    (folder / SCRIPT.name).write_text(text)
    return folder


def run_script(folder):
    """(seconds in all, seconds until the first progress, seconds of extraction, peak memory in MiB) of a run."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-u", SCRIPT.name], cwd=folder, stdout=subprocess.PIPE, text=True)
    said = {}
    for line in process.stdout:
        for sign in ("frames: the first", " reads ", r"(?<!\d)(\d+)/\1(?!\d).*frame"):  # the last is the bar when it is full
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
    parser.add_argument("--frames", type=int, default=2000)
    parser.add_argument("--growth", type=int, nargs=2, default=(200, 1600))
    options = parser.parse_args()
    n, size = options.frames, ts.FRAME_SIZE
    print(f"{n} frames of {VIDEO[0]}x{VIDEO[1]}, read at {size[0]}x{size[1]}, 50 epochs; {processor()}; Keras {keras.__version__}\n\n| | seconds | |\n|---|---:|---|")

    def row(name, seconds, note):
        print(f"| {name} | {seconds:.1f} | {note} |", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        weights = folder / "resnet50.weights.h5"
        code = f"import keras; keras.applications.ResNet50(include_top=False, weights=None).save_weights({str(weights)!r})"
        subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.DEVNULL)
        grown = []
        for frames in options.growth:  # first: a process's peak memory counts that of the one that started it, too
            _, _, extraction, memory = run_script(repeat_video(folder / f"growth {frames}", frames, WEIGHTS=str(weights)))
            grown.append((extraction, memory))
            row(f"extraction of {frames} frames and copies", extraction, f"{memory:.0f} MiB at most")
        times, memories = (later / earlier for earlier, later in zip(*grown))
        print(f"| {options.growth[1] / options.growth[0]:.0f} x the frames | | {times:.2f} x the time, {memories:.2f} x the memory |", flush=True)
        if not n:
            return
        runs = {}
        for name, constants in (("AUGMENT = 0", {"AUGMENT": 0}), ("default AUGMENT", {})):
            runs[name] = repeat_video(folder / name, n, WEIGHTS=str(weights), **constants)
            runs[name] = (runs[name], *run_script(runs[name]))
        precision = json.loads((runs["default AUGMENT"][0] / "outputs" / "metrics.json").read_text())["precision"]

        for shape in (size, VIDEO):
            pixels = ts.Frames(sorted((SCRIPT.parent / "frames" / "frames").iterdir()), shape)[np.arange(8)].astype("float32")
            plain = keras.applications.ResNet50(include_top=False, weights=None, pooling="avg", input_shape=(*shape, 3))
            keras_pass = median_seconds(lambda: plain.predict_on_batch(pixels)) / 8 * n
            row(f"one pass of Keras's own ResNet50, float32, {shape[0]}x{shape[1]}", keras_pass, f"{keras_pass / n * 1000:.0f} ms a frame")
        for name, (video, whole, first_sign, extraction, memory) in runs.items():
            row(f"whole run, {name}, {precision}", whole, f"{whole / keras_pass:.2f} of the last pass; {whole / extraction:.2f} of its "
                f"extraction ({extraction:.1f}); first progress after {first_sign:.1f}; {memory:.0f} MiB at most")  # fmt: skip
        video, whole, _, extraction, _ = runs["default AUGMENT"]
        again = run_script(video)[0]
        row("second run, features on disk", again, f"{again / whole:.2f} of the first")
        rate = (n + 0.8 * n * ts.AUGMENT) / extraction
        start = time.perf_counter()
        ts.count_people(video / "outputs" / "ts_crowdnet.keras", video / "frames" / "frames")
        counting = time.perf_counter() - start
        row("counting the frames with the saved model", counting, f"{n / counting:.1f} frames/s, {n / counting / rate:.2f} of the extraction's rate")
        model = keras.saving.load_model(video / "outputs" / "ts_crowdnet.keras")
        second = ts.Frames(sorted((SCRIPT.parent / "frames" / "frames").iterdir())[:4], VIDEO)[range(4)]
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
