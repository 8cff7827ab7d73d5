"""Speed and memory of the whole run, beside the published original and the limits of the machine.

    python tests/benchmark.py [FOLDER] [--frames 2000] [--growth 200] [--trained]

FOLDER (default: the sample) holds labels.csv and frames/frames; its frames are repeated to --frames.
Weights are random; with --trained they come from a file, so that READ_OUT is what ResNet50 is read at, as with
ImageNet's (their values do not change the work), and growth and the original are left out. Prints one table; every
run is a process of its own, and peak memory is that process's, page cache of mapped files included.
"""

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["MPLBACKEND"] = "agg"
SCRIPT = Path(__file__).resolve().parents[1] / "tscrowdnet_train.py"
sys.path.insert(0, str(SCRIPT.parent))

import numpy as np
import pandas as pd

import tscrowdnet_train as ts
from tscrowdnet_train import keras, layers, ops


def median_seconds(work, repeats=5):
    """Median time of work(), after one call that is not counted."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def repeat_video(source, folder, frames, weights=None):
    """A video of as many frames as asked for: links to those of source, over and over."""
    labels = pd.read_csv(source / "labels.csv")
    (folder / "frames" / "frames").mkdir(parents=True)
    counts = []
    for frame, row in zip(range(1, frames + 1), itertools.cycle(labels.itertuples())):
        (folder / "frames" / "frames" / f"seq_{frame:06d}.jpg").symlink_to(source / "frames" / "frames" / f"seq_{row.id:06d}.jpg")
        counts.append(row.count)
    pd.DataFrame({"id": range(1, frames + 1), "count": counts}).to_csv(folder / "labels.csv", index=False)
    (folder / SCRIPT.name).write_text(re.sub(r"(?m)^WEIGHTS = .*$", f"WEIGHTS = {weights!r}", SCRIPT.read_text()))
    return folder


def run_script(folder):
    """Runs the script in folder: (seconds, seconds by phase, peak memory in MiB, MAE)."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, SCRIPT.name], cwd=folder, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    metrics = json.loads((folder / "outputs" / "metrics.json").read_text())
    return time.perf_counter() - start, metrics["seconds"], usage.ru_maxrss / 1024, metrics["mae"]


def published_original(size):
    """The published network: frozen ResNet50, average-pooled, LSTM 512, Dense 256, Adam, MSE."""
    resnet = keras.applications.ResNet50(include_top=False, weights=None, pooling="avg", input_shape=(*size, 3))
    resnet.trainable = False
    windows = keras.Input((5, *size, 3))
    x = layers.LSTM(512)(layers.TimeDistributed(resnet)(windows))
    model = keras.Model(windows, layers.Dense(1)(layers.Dense(256, activation="relu")(x)))
    model.compile("adam", "mse", jit_compile=False)
    return model, resnet


def convolution_flops(model, read_out):
    """Multiplications and additions of the convolutions up to a read-out layer, for one frame."""
    part = keras.Model(model.input, [model.get_layer(name).output for name in read_out])
    return sum(
        2 * np.prod(layer.kernel.shape) * np.prod(layer.output.shape[1:3]) for layer in part.layers if isinstance(layer, layers.Conv2D)
    )


def measure_growth(source, folder, frames):
    """Runs on 1, 2, 4 and 8 times the frames: lines of a table."""
    lines = ["\n| frames | extraction, s | x | whole run, s | peak memory, MiB | features on disk, MiB |", "|---:|---:|---:|---:|---:|---:|"]
    for times in (1, 2, 4, 8):
        video = repeat_video(source, folder / f"x{times}", times * frames)
        seconds, phases, memory, _ = run_script(video)
        extraction = phases["extract features"]
        if times == 1:
            base = extraction
        disk = next((video / "outputs").glob("features-*")).stat().st_size / 2**20
        lines.append(f"| {times * frames} | {extraction:.1f} | {extraction / base:.2f} | {seconds:.1f} | {memory:.0f} | {disk:.0f} |")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=SCRIPT.parent)
    parser.add_argument("--frames", type=int, default=2000)
    parser.add_argument("--growth", type=int, default=200)
    parser.add_argument("--trained", action="store_true")
    options = parser.parse_args()
    source, n, rows = options.folder.resolve(), options.frames, []
    read_out, weights = (ts.READ_OUT, "resnet50.weights.h5") if options.trained else (ts.READ_OUT_RANDOM, None)
    with tempfile.TemporaryDirectory() as folder:
        # First: a child's peak memory starts at its parent's.
        growth = [] if options.trained else measure_growth(source, Path(folder), options.growth)
        video = repeat_video(source, Path(folder) / "video", n, weights)
        if weights:
            keras.applications.ResNet50(include_top=False, weights=None).save_weights(video / weights)
        first, phases, memory, mae = run_script(video)
        second, again, _, same = run_script(video)
        assert same == mae, "features from the disk changed the result"
        by_phase = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in phases.items())
        rows.append(("whole run", first, f"{memory:.0f} MiB at most; {by_phase}"))
        rows.append(("second run, features on disk", second, f"{second / first:.0%} of the first"))

        model = keras.saving.load_model(video / "outputs" / "ts_crowdnet.keras", compile=False)
        backbone, _ = ts.split_model(model)
        paths = sorted((video / "frames" / "frames").iterdir())[:256]
        pixels = ts.Frames(np.array(paths), ts.FRAME_SIZE)[np.arange(8)]
        per_frame = median_seconds(lambda: backbone.predict_on_batch(pixels)) / 8
        note = f"whole run is {first / (per_frame * n):.2f} x this"
        rows.append(("backbone over the same frames, read-out included", per_frame * n, note))
        start = time.perf_counter()
        ts.count_people(model, paths)
        counted = (time.perf_counter() - start) / len(paths)
        note = f"{1 / counted:.1f} frames/s, {per_frame / counted:.2f} frames a backbone pass"
        rows.append(("counting new frames with the saved model", counted * n, note))

        resnet = backbone.get_layer("resnet50")
        averages = [layers.GlobalAveragePooling2D()(stage) for stage in resnet.outputs]  # whole maps take time to hand over
        resnet = keras.Model(resnet.input, averages)
        floats = pixels.astype("float32")
        bare = median_seconds(lambda: resnet.predict_on_batch(floats)) / 8
        square = ops.ones((2048, 2048))
        matmul = 2 * 2048**3 / median_seconds(lambda: ops.convert_to_numpy(ops.matmul(square, square)[0, 0]))
        flops = convolution_flops(resnet, read_out)
        rate = f"{flops / bare / 1e9:.0f} GFLOP/s of the machine's {matmul / 1e9:.0f} in matrix multiplication"
        rows.append((f"ResNet50 up to {list(read_out)[-1]} alone", bare * n, rate))

        for size in () if options.trained else ((224, 224), ts.FRAME_SIZE):
            original, resnet = published_original(size)
            windows = np.random.default_rng(0).uniform(0, 255, (16, 5, *size, 3)).astype("float32")
            counts = np.ones((16, 1))
            step = median_seconds(lambda: original.train_on_batch(windows, counts), repeats=2)
            test = median_seconds(lambda: original.test_on_batch(windows, counts), repeats=2)
            whole = median_seconds(lambda: resnet.predict_on_batch(windows[:8, 0])) / 8
            rows.append((f"all of ResNet50, each frame once, {size[0]}x{size[1]}", whole * n, f"{1 / whole:.1f} frames/s"))
            epochs = 50 * (step * np.ceil(0.8 * n / 16) + test * np.ceil(0.2 * n / 16))
            note = f"{step:.1f} s a training step; whole run is {epochs / first:.0f} x faster"
            rows.append((f"published original, 50 epochs, {size[0]}x{size[1]} (extrapolated)", epochs, note))

        print(f"\n| {n} frames of {ts.FRAME_SIZE[1]}x{ts.FRAME_SIZE[0]}, {os.cpu_count()} CPU cores | seconds | |\n|---|---:|---|")
        for name, seconds, note in rows:
            print(f"| {name} | {seconds:.1f} | {note} |")
        print("\n".join(growth))


if __name__ == "__main__":
    main()
