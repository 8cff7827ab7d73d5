"""The script as a user runs it: its output, its files, figures, Ctrl-C, kills, other back ends."""

import importlib.util
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import keras
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image

import tscrowdnet_train as ts
from conftest import (
    README, RESNET50, SCRIPT, TESTS, TINY, Stopped, edited_copy, frame_paths, make_video, results, start, without_tensorflow,
)  # fmt: skip

FIGURES = {f"{name}.{kind}" for name in ("loss", "predictions", "examples") for kind in ("png", "pdf")}
RESULTS = FIGURES | {"ts_crowdnet.keras", "history.csv", "predictions.csv", "metrics.json"}


def test_a_user_runs_the_script(tmp_path):
    """From another folder, in a process of its own: the whole ResNet50, in TensorFlow's graph, and
    all constants as shipped but for the size of frames, the weights and the number of epochs."""
    folder = make_video(tmp_path)
    script = edited_copy(folder, FRAME_SIZE=(48, 64), WEIGHTS=None, EPOCHS=2)
    done = start([script], cwd="/")
    assert done.returncode == 0 and without_tensorflow(done.stderr) == [], "no warnings"
    outputs = folder / "outputs"
    assert {path.name for path in outputs.iterdir()} == RESULTS
    assert len(list((folder / "feature_cache").rglob("*.npz"))) == 20 + 4
    said = done.stdout
    assert said.startswith("Loading TensorFlow ...\n")
    assert f"20 frames in {folder / 'frames/frames'}, 20 labels: the first 16 train, the last 4 valid" in said
    assert f"Features are kept in {folder / 'feature_cache'} (0 MB so far)" in said
    assert "ResNet50 (random; " in said and "20 frames and 4 jittered copies" in said
    assert f"Open predictions.png and examples.png in {outputs}" in said

    metrics, table = results(outputs)
    labels = pd.read_csv(folder / "labels.csv")
    assert list(table.columns) == ["id", "frame", "split", "true", "predicted"]
    assert table["id"].tolist() == labels["id"].tolist()
    assert table["true"].tolist() == labels["count"].tolist()
    assert table["frame"].tolist() == [f"seq_{number:06d}.jpg" for number in range(1, 21)]
    assert table["split"].tolist() == ["train"] * 16 + ["validation"] * 4

    held_out = table[table["split"] == "validation"]
    error = held_out["predicted"] - held_out["true"]
    expected = {
        "mae": error.abs().mean(),
        "mse": (error**2).mean(),
        "rmse": (error**2).mean() ** 0.5,
        "accuracy": (error.abs() <= 0.2 * held_out["true"]).mean(),
        "train_frames": 16,
        "validation_frames": 4,
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, abs=1e-5), name
    mean_error = (held_out["true"] - table["true"][:16].mean()).abs().mean()
    assert metrics["baseline"]["mae"] == pytest.approx(mean_error)
    assert metrics["weights"] == "random" and metrics["constants"]["EPOCHS"] == 2
    assert metrics["versions"]["keras"] == keras.__version__

    number = r"([\d.]+)"
    line = f"Validation frames: MAE {number}, MSE {number}, RMSE {number}, within 20%: {number}%"
    for name, value in zip(("mae", "mse", "rmse"), re.search(line, said).groups()):
        assert float(value) == pytest.approx(metrics[name], abs=6e-4)
    assert "Always the mean count: MAE" in said and "frames: 4, so few that these metrics tell little" in said
    history = pd.read_csv(outputs / "history.csv")
    assert history["epoch"].tolist() == [1, 2] and {"loss", "val_loss"} <= set(history.columns)
    for name in RESULTS:
        if name.endswith(".pdf"):
            assert (outputs / name).read_bytes().startswith(b"%PDF")
        if name.endswith(".png"):
            with Image.open(outputs / name) as image:
                assert min(image.size) > 300


def test_bad_input_is_one_line_and_exit_status_1(tmp_path):
    """Also where a notebook, !python tscrowdnet_train.py, hands down its own back end."""
    script = edited_copy(tmp_path, LABELS="none.csv")
    done = start([script], tmp_path, MPLBACKEND="module://matplotlib_inline.backend_inline")
    (line,) = without_tensorflow(done.stderr)
    assert done.returncode == 1 and line.startswith("Error: ") and "none.csv" in line
    assert not (tmp_path / "outputs").exists()


def test_importing_does_nothing(tmp_path, monkeypatch, capsys):
    shutil.copy(SCRIPT, tmp_path)
    monkeypatch.chdir(tmp_path)
    imported = runpy.run_path(SCRIPT.name, run_name="tscrowdnet_train")
    assert imported["EPOCHS"] == 50 and capsys.readouterr() == ("", "")
    assert [path.name for path in tmp_path.iterdir()] == [SCRIPT.name]


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_other_backends_give_the_same_metrics(video, backend):
    """From the same ResNet50 weights, within 1%: the LSTM starts elsewhere, so it learns slowly."""
    if not importlib.util.find_spec(backend):
        pytest.skip(f"{backend} is not installed")
    same = {"WEIGHTS": "resnet50.weights.h5", "FEATURE_LAYERS": {"conv1_relu": (3, 4)}, "LEARNING_RATE": 1e-3}
    RESNET50(include_top=False, weights=None, input_shape=(48, 64, 3)).save_weights(video / "resnet50.weights.h5")
    maes = []
    for name in (keras.backend.backend(), backend):
        script = edited_copy(video, **TINY | same | {"OUTPUTS": name})
        done = start([script], cwd=video, KERAS_BACKEND=name)
        assert done.returncode == 0, done.stderr
        maes.append(json.loads((video / name / "metrics.json").read_text())["mae"])
    assert maes[1] == pytest.approx(maes[0], rel=0.01)


# -- Interruptions


def test_ctrl_c_is_one_line_and_the_run_goes_on_later(video):
    """In a process of its own, once it trains."""
    script = edited_copy(video, **TINY | {"EPOCHS": 10_000, "SEQUENCE_LENGTH": 1})
    process = subprocess.Popen([sys.executable, script], stdout=-1, stderr=-1, text=True)
    for line in process.stdout:
        if line.startswith("Epoch 3/"):
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    said = [line for line in without_tensorflow(errors) if line]
    assert said == ["Stopped; the same command goes on where it was, but training starts anew."]
    assert len(list((video / "feature_cache").rglob("*.npz"))) == 24


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_random_moments_a_run_ends_with_the_same_digits(first_run, tmp_path):
    done = start([TESTS / "tools" / "killed_runs.py", make_video(tmp_path / "video")], tmp_path)
    assert done.stdout == "finished\n", done.stderr
    assert "Traceback" not in done.stderr
    for name in ("predictions.csv", "history.csv"):
        folders = (first_run, tmp_path / "video")
        undisturbed, disturbed = (pd.read_csv(folder / "outputs" / name) for folder in folders)
        assert undisturbed.equals(disturbed), name
    assert not list((tmp_path / "video" / "outputs").glob(".new-*")), "leftovers are overwritten"


def test_results_stay_until_all_new_ones_are_written(finished, constants, monkeypatch):
    """The disk is full, or another program holds a file."""
    before = {name: (finished / "outputs" / name).read_bytes() for name in RESULTS}

    def full(*_, **__):
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(pd.DataFrame, "to_csv", full)
        with pytest.raises(SystemExit, match="No space left"):
            ts.run_as_script()
    path_open = Path.open

    def refuse(path, mode="r", *arguments, **options):
        if path.name == "metrics.json" and "a" in mode:
            raise PermissionError(13, os.strerror(13))
        return path_open(path, mode, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(SystemExit, match="metrics.json: cannot be written.*close it"):
        ts.run_as_script()
    assert {name: (finished / "outputs" / name).read_bytes() for name in RESULTS} == before
    assert {path.name for path in (finished / "outputs").iterdir()} == RESULTS


def test_a_run_takes_paths_and_leaves_files_of_others_alone(finished, run):
    """Also where Keras is set to put the channels first."""
    for name in ("new_frames/note.txt", "mine.csv"):
        (finished / "outputs" / name).parent.mkdir(exist_ok=True)
        (finished / "outputs" / name).write_text("mine")
    keras.config.set_image_data_format("channels_first")
    try:
        metrics, _ = run(LABELS=Path("labels.csv"), OUTPUTS=finished / "outputs")
    finally:
        keras.config.set_image_data_format("channels_last")
    assert metrics["constants"]["LABELS"] == "labels.csv"
    for name in ("new_frames/note.txt", "mine.csv"):
        assert (finished / "outputs" / name).read_text() == "mine"


def test_results_of_another_experiment_are_named_before_they_are_replaced(finished, constants, capsys):
    outputs = finished / "outputs"
    ts.print_replaced(outputs)
    assert capsys.readouterr().out == ""
    constants(SEED=1, EPOCHS=2)
    ts.print_replaced(outputs)
    assert "holds the results of EPOCHS = 1, SEED = 0: this run" in capsys.readouterr().out
    (outputs / "metrics.json").write_text("[]")
    ts.print_replaced(outputs)
    assert capsys.readouterr().out == ""


def test_the_sample_is_said_to_be_rendered(video, constants, monkeypatch, until, capsys):
    until("build_backbone")
    for root, is_said in ((video, False), (SCRIPT.parent, True)):
        monkeypatch.setattr(ts, "ROOT", root)
        constants(OUTPUTS=video / "outputs", CACHE=video / "feature_cache")
        with pytest.raises(Stopped):
            ts.main()
        assert ("frames are rendered" in capsys.readouterr().out) is is_said


# -- Figures


def make_table(n, ids=None):
    """n validation frames with errors of 0, 1, 2, ... people."""
    names = [f"seq_{number:06d}.jpg" for number in range(1, n + 1)]
    counts = {"true": 5.0, "predicted": 5.0 + np.arange(n)}
    return pd.DataFrame({"id": ids or range(101, 101 + n), "frame": names, "split": "validation"} | counts)


def tick_labels(axis):
    """The names at an x axis as drawn: {place: name}."""
    axis.figure.canvas.draw()
    texts = [tick.get_text() for tick in axis.get_xticklabels()]
    return {place: text for place, text in zip(axis.get_xticks(), texts) if text}


def test_the_loss_is_shown_as_rmse_by_epoch_beside_the_mean_count():
    history = pd.DataFrame({"mse": 4.0, "val_mse": 9.0}, index=range(1, 4))
    (axis,) = ts.plot_loss(history, {"rmse": 6.0}).axes
    assert [line.get_ydata()[0] for line in axis.lines] == [2, 3, 6]
    assert axis.get_title() == "RMSE by epoch"
    one = ts.plot_loss(history[:1], {"rmse": 6.0}).axes[0]
    assert all(line.get_marker() == "o" for line in one.lines[:2]), "one epoch is a point, not a line"
    plt.close("all")


@pytest.mark.parametrize("ids", [None, ["b/2.jpg", "a$^$10.jpg", "c/caf\udce9.jpg"]])
def test_predictions_are_shown_by_the_ids_of_their_frames(ids):
    table = make_table(3, ids)
    left, right = ts.plot_predictions(table, "imagenet", {"mae": 1.234}).axes
    assert left.collections[-1].get_offsets()[:, 1].tolist() == [5, 6, 7]
    assert right.lines[0].get_xydata().tolist() == [[0, 5], [1, 5], [2, 5]]
    assert tick_labels(right) == {
        place: str(label_id).replace("\udce9", "?") for place, label_id in enumerate(table["id"])
    }
    title = left.figure.get_suptitle()
    assert "MAE 1.23" in title and "imagenet" in title and "last 3" in title
    plt.close("all")


@pytest.mark.parametrize(("n", "shown"), [(11, [10, 9, 8, 6, 5, 4]), (5, [4, 3, 2, 1, 0]), (1, [0])])
def test_examples_are_the_largest_errors_then_typical_ones(video, n, shown):
    figure = ts.plot_examples(make_table(n), video / "frames" / "frames")
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles == [f"{101 + place}: true 5, predicted {5 + place:.1f} ({place:+.1f})" for place in shown]
    colours = [axis.title.get_color() for axis in figure.axes if axis.get_title()]
    assert colours == ["tab:red" if place > 1 else "tab:green" for place in shown]
    plt.close("all")


def test_counts_are_shown_with_labels_and_what_is_unfamiliar():
    unfamiliar = pd.array([False, True, pd.NA, False], "boolean")
    names = pd.Index(["a.jpg", "b.jpg", "c.jpg", "d.jpg"], name="frame")
    labels = pd.DataFrame({"true": [7], "split": ["train"]}, index=["d.jpg"])
    table = pd.DataFrame({"count": [3.0, 4, np.nan, 5], "unfamiliar": unfamiliar}, index=names)
    (axis,) = ts.plot_counts(table, labels).axes
    (shade,) = axis.images
    assert shade.get_array().tolist() == [[0, 1, 1, 0]] and shade.get_extent()[:2] == [-0.5, 3.5]
    assert axis.get_ylim()[0] == 0 and tick_labels(axis)[1] == "b.jpg"
    np.testing.assert_array_equal(axis.lines[1].get_ydata(), [np.nan, np.nan, np.nan, 7])
    texts = [text.get_text() for text in axis.get_legend().get_texts()]
    assert texts[:2] == ["counted", "label (train)"] and "unlike" in texts[2]
    assert not ts.plot_counts(table[:1], labels).axes[0].images
    plt.close("all")


@pytest.mark.parametrize(("error", "is_ours"), [(RuntimeError("no display"), False), (KeyError("typo"), True)])
def test_a_figure_that_cannot_be_drawn_costs_only_figures(finished, run, monkeypatch, capsys, figures, error, is_ours):
    """What figures cannot do here is a line; a fault of the script is a traceback, after the
    results."""

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(ts.plt, "subplots", fail)
    (finished / "outputs" / "metrics.json").unlink()
    if is_ours:
        with pytest.raises(KeyError):
            run()
    else:
        run()
        assert capsys.readouterr().err.count("could not be saved (no display)") == 1
    assert results(finished / "outputs")[0]["mae"] > 0
    assert not list((finished / "outputs").glob("*.png")), "no figure of an earlier model stays"


@pytest.mark.parametrize(("backend", "n_shown"), [("template", 1), ("agg", 0)], ids=["screen", "none"])
def test_figures_are_shown_where_there_is_a_screen_when_they_are_saved(tmp_path, monkeypatch, backend, n_shown):
    """"template" is matplotlib's own stand-in for a back end with windows."""
    seen = []
    monkeypatch.setattr(ts.plt, "show", lambda: seen.append({path.name for path in tmp_path.iterdir()}))
    ts.plt.switch_backend(backend)
    try:
        ts.save_figures(tmp_path, {"one": ts.plt.figure})
        ts.show_figures()
    finally:
        ts.plt.switch_backend("agg")
    assert seen == [{"one.png", "one.pdf"}] * n_shown


# -- The README's recipes


def recipe_commands():
    """The README's commands; some go over several lines."""
    blocks = [README.read_text().split(mark)[1].split("```")[1] for mark in ("<!--recipe-->", "<!--then-->")]
    commands = [block.removeprefix("sh\n").strip() for block in blocks]
    return [command for block in commands for command in re.split(r"\n(?=python |ffmpeg )", block)]


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="ffmpeg is not installed")
def test_the_readmes_ffmpeg_makes_good_frames(tmp_path):
    """Its own default is a number of bytes, too few for frames a second apart."""
    video = make_video(tmp_path / "clip", frames=4, size=(480, 640))
    paths = frame_paths(video)
    before = [np.asarray(Image.open(path), int) for path in paths]
    clip = "ffmpeg -loglevel error -framerate 1 -i frames/frames/seq_%06d.jpg -c:v mjpeg -q:v 2 video.mp4"
    subprocess.run(clip.split(), check=True, cwd=video)
    folder, command, *_ = recipe_commands()
    assert folder == "mkdir my_frames"
    (video / "my_frames").mkdir()
    command = command.replace("fps=1/18", "fps=1")
    subprocess.run(command.split(), check=True, cwd=video, stdin=subprocess.DEVNULL)
    for path, pixels in zip(sorted((video / "my_frames").iterdir()), before, strict=True):
        assert np.abs(np.asarray(Image.open(path), int) - pixels).mean() < 1.5, path


def test_the_readme_leads_from_frames_to_counts(tmp_path, constants, monkeypatch, capsys):
    """As it is written: a sheet of the frames that are there, filled in; training; counting."""
    video = make_video(tmp_path / "clip", frames=60)
    counts = pd.read_csv(video / "labels.csv")["count"]
    (video / "frames" / "frames").rename(video / "my_frames")
    _, _, sheet, train, count_all = recipe_commands()
    sheet = sheet.replace("python", sys.executable, 1)
    subprocess.run(sheet, shell=True, check=True, cwd=video)
    rows = pd.read_csv(video / "my_labels.csv")
    assert rows["id"].tolist() == [f"seq_{number:06d}.jpg" for number in range(1, 61, 10)]
    assert rows["count"].isna().all()
    rows.assign(count=counts[::10].tolist()).to_csv(video / "my_labels.csv", index=False)
    again = subprocess.run(sheet, shell=True, cwd=video, capture_output=True)
    assert again.returncode, "counts that were written are not replaced"
    monkeypatch.setattr(ts, "ROOT", video)
    settings = re.search("^4. [*]{2}Set.*", README.read_text(), re.M)[0]
    constants(**{name: value for name, value in re.findall(r'`(\w+) = "(\w+\.?\w*)"`', settings)})
    assert ts.OUTPUTS == "my_out" and train == "python tscrowdnet_train.py"
    ts.main()
    assert "6 labels: the first 5 train, the last 1 validate" in capsys.readouterr().out
    exec(count_all.split('"')[1])
    table = pd.read_csv(video / "my_out" / "counts.csv")
    assert len(table) == 60 and table["count"].ge(0).all()
