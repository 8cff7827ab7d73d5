"""The script as a user runs it, its files, its cache, reproducibility and resumption."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pytest
from PIL import Image

import tscrowdnet_train as ts
from conftest import SCRIPT, TINY, check_whole, edited_copy, results, start

FIGURES = {f"{name}.{kind}" for name in ("loss", "predictions", "examples") for kind in ("png", "pdf")}
RESULTS = FIGURES | {"ts_crowdnet.keras", "history.csv", "predictions.csv", "metrics.json"}


def test_a_user_runs_the_script(beside):
    """From another folder, in a process of its own."""
    folder, done = beside()
    assert done.returncode == 0 and done.stderr == "", "quiet: no word of TensorFlow's, no warnings"
    outputs = folder / "outputs"
    assert {path.name for path in outputs.iterdir() if not path.name.startswith(".")} == RESULTS | {"feature_cache"}

    metrics, table = results(outputs)
    labels = pd.read_csv(folder / "labels.csv")
    assert list(table.columns) == ["id", "split", "true", "predicted"]
    assert table["id"].tolist() == labels["id"].tolist() and table["true"].tolist() == labels["count"].tolist()
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
    assert metrics["baseline"]["mae"] == pytest.approx((held_out["true"] - table["true"][:16].mean()).abs().mean())
    assert metrics["weights"] == "random" and metrics["precision"] == "float32" and metrics["features"] > 0
    assert metrics["versions"]["keras"] == keras.__version__ and metrics["versions"]["python"] == sys.version
    constants = {name for name in re.findall(r"^([A-Z0-9_]+) = ", SCRIPT.read_text(), re.MULTILINE)}
    assert set(metrics["constants"]) == constants

    said = re.search("^Validation frames: MAE (.*), MSE (.*), RMSE (.*), within 20%: (.*)%$", done.stdout, re.MULTILINE)
    for name, value in zip(("mae", "mse", "rmse"), said.groups()):
        assert float(value) == pytest.approx(metrics[name], abs=6e-4)
    assert float(said[4]) == pytest.approx(100 * metrics["accuracy"], abs=0.06)
    history = pd.read_csv(outputs / "history.csv")
    assert history["epoch"].tolist() == [1, 2] and {"loss", "val_loss"} <= set(history.columns)
    for name in RESULTS:
        if name.endswith(".pdf"):
            assert (outputs / name).read_bytes().startswith(b"%PDF")
        if name.endswith(".png"):
            with Image.open(outputs / name) as image:
                assert min(image.size) > 300 and len(np.unique(np.asarray(image.convert("L")))) > 20


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_other_backends_give_the_same_metrics(video, backend):
    """From the same ResNet50 weights, within 1%: the LSTM starts elsewhere, so it learns slowly here, and without noise."""
    same = {"WEIGHTS": "resnet50.weights.h5", "FEATURE_LAYERS": {"conv1_relu": (3, 4)}, "LEARNING_RATE": 1e-3}
    if not importlib.util.find_spec(backend):
        pytest.skip(f"{backend} is not installed")
    keras.applications.ResNet50(include_top=False, weights=None, input_shape=(48, 64, 3)).save_weights(video / "resnet50.weights.h5")
    maes = []
    for name in (keras.backend.backend(), backend):
        script = edited_copy(video, **TINY | same | {"OUTPUTS": name})
        done = start([script], cwd=video, KERAS_BACKEND=name)
        assert done.returncode == 0, done.stderr
        maes.append(json.loads((video / name / "metrics.json").read_text())["mae"])
    assert maes[1] == pytest.approx(maes[0], rel=0.01)


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_ctrl_c_ends_the_process_quietly_while_libraries_are_imported(video):
    """At moments after NumPy is loaded, which is when the script's own first lines have run, however busy the machine is."""
    script = edited_copy(video, **TINY)
    processes = [subprocess.Popen([sys.executable, script], stdout=-1, stderr=-1, text=True) for _ in range(4)]
    for seconds, process in zip((0, 0.3, 0.8, 1.6), processes):
        maps = Path(f"/proc/{process.pid}/maps")
        while maps.exists() and process.poll() is None and "numpy" not in maps.read_text():
            time.sleep(0.02)
        time.sleep(seconds if maps.exists() else seconds + 2)
        process.send_signal(signal.SIGINT)
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == -signal.SIGINT and errors == ""


def test_same_seed_same_digits_and_another_seed_another_model(finished, run):
    first, table = results(finished / "outputs")
    second, again = run(OUTPUTS="again")
    other, changed = run(OUTPUTS="other", SEED=1)
    assert (table["predicted"] == again["predicted"]).all() and second["mae"] == first["mae"]
    assert (table["predicted"] != changed["predicted"]).any() and other["mae"] != first["mae"]


def stop(*_, **__):
    raise KeyboardInterrupt


def test_features_are_used_again_only_where_nothing_changed(finished, constants, monkeypatch):
    cache = finished / "outputs" / "feature_cache"
    computed = []
    set_random_seed = keras.utils.set_random_seed
    monkeypatch.setattr(keras.utils, "set_random_seed", lambda _: set_random_seed(0))  # as trained weights: SEED does not change them

    def features(**changes):
        """The name of the features that a run with these changes uses, and whether it computes any."""
        constants(**{"SEED": 0, "AUGMENT": 0.25, "TRAIN_FRACTION": 0.8} | changes)
        computed.clear()
        monkeypatch.setattr(ts, "build_spatial", stop)
        monkeypatch.setattr(ts, "read_features", lambda model, _, rows: computed.append(1) or np.zeros((len(rows), model.output_shape[1])))
        with pytest.raises(KeyboardInterrupt):
            ts.main()
        (folder,) = cache.iterdir()  # one alone: those of before are gone
        return folder.name, bool(computed)

    (first,) = (path.name for path in cache.iterdir())
    for change in ({}, {"LSTM_UNITS": 3, "EPOCHS": 1}, {"PROJECTION": 0}):
        assert features(**change) == (first, False), "the stages that learn do not change the features"
    names = {first}
    for change in (
        {"FRAME_SIZE": (50, 64)}, {"SEED": 5}, {"AUGMENT": 0}, {"TRAIN_FRACTION": 0.5}, {"PRECISION": "mixed_bfloat16"},
        {"FEATURE_LAYERS_RANDOM": {"conv1_relu": (1, 1)}}, {"FEATURE_LAYERS_RANDOM": {"conv2_block1_out": (1, 1)}},
    ):  # fmt: skip
        name, new = features(**change)
        assert new and name not in names, change
        names.add(name)
    assert features() == (first, True)
    picture = finished / "frames" / "frames" / "seq_000018.jpg"
    shutil.copy(finished / "frames" / "frames" / "seq_000002.jpg", picture)
    name, new = features()
    assert new and name not in names, "a frame's content"


@pytest.mark.parametrize("damage", ["cut", "missing", "empty", "random", "half computed"])
def test_damaged_features_are_made_anew(tmp_path, damage, monkeypatch):
    monkeypatch.setattr(ts, "FRAME_BATCH", 1)
    computed = []

    def fill():
        array = ts.open_cache(tmp_path, "key", [], (20, 2))
        return ts.fill_rows(array, lambda rows: computed.extend(rows) or rows[:, None] * [1, 10])

    expected = fill()
    (path,) = tmp_path.iterdir()
    damaged = {"cut": path.read_bytes()[:200], "empty": b"", "random": os.urandom(500)}
    if damage == "missing":
        path.unlink()
    elif damage == "half computed":
        np.save(path, np.where(np.arange(20)[:, None] == 9, [9, np.nan], expected).astype("float32"))
    else:
        path.write_bytes(damaged[damage])
    computed.clear()
    assert (fill() == expected).all() and (np.load(path) == expected).all()
    assert computed == list(range(8, 16) if damage == "half computed" else range(20))


def test_the_sample_is_said_to_be_synthetic(video, constants, monkeypatch, capsys):
    monkeypatch.setattr(ts, "extract_features", stop)
    for source, said in ((video, False), (SCRIPT.parent, True)):
        monkeypatch.setattr(ts, "ROOT", source)
        constants(OUTPUTS=video / "outputs")
        with pytest.raises(KeyboardInterrupt):
            ts.main()
        assert ("frames are rendered" in capsys.readouterr().out) is said


def test_a_run_takes_paths_and_leaves_files_of_others_alone(first_run, finished, run):
    for name in ("new_frames/note.txt", "mine.csv"):
        (finished / "outputs" / name).parent.mkdir(exist_ok=True)
        (finished / "outputs" / name).write_text("mine")
    metrics, _ = run(LABELS=Path("labels.csv"), OUTPUTS=finished / "outputs")
    assert metrics["constants"]["LABELS"] == "labels.csv"
    assert [(finished / "outputs" / name).read_text() for name in ("new_frames/note.txt", "mine.csv")] == ["mine"] * 2


def test_two_runs_into_one_folder_leave_the_files_of_one(tmp_path):
    """Each writes under names of its own, and the last to end wins."""
    inner = {"a": lambda path: path.write_text("second"), "b": lambda path: path.write_text("second")}

    def write_while_another_run_does(path):
        ts.write_files(tmp_path, inner)
        path.write_text("first")

    ts.write_files(tmp_path, {"a": write_while_another_run_does, "b": lambda path: path.write_text("first")})
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "first", "b": "first"}


def test_an_interrupted_extraction_goes_on_where_it_was(finished, run, constants, monkeypatch):
    _, expected = results(finished / "outputs")
    load, loaded = ts.Frames.load, []

    def fails_late(frames, row):
        loaded.append(row)
        if len(loaded) > 2 + 20:  # calibration, 8 batches, and some of the next
            raise KeyboardInterrupt
        return load(frames, row)

    constants(OUTPUTS="interrupted")
    monkeypatch.setattr(ts.Frames, "load", fails_late)
    with pytest.raises(KeyboardInterrupt):
        ts.main()
    loaded.clear()
    monkeypatch.setattr(ts.Frames, "load", lambda frames, row: loaded.append(row) or load(frames, row))
    _, resumed = run(OUTPUTS="interrupted")
    assert resumed.equals(expected)
    assert sorted(loaded[2:]) == list(range(16, 24)), "the first batches are not computed again"


def test_results_of_a_finished_run_stay_until_the_next_is_whole(finished, constants, monkeypatch):
    before = {name: (finished / "outputs" / name).read_bytes() for name in RESULTS}

    def full(*_, **__):
        raise OSError(28, os.strerror(28))

    constants(EPOCHS=1)
    monkeypatch.setattr(pd.DataFrame, "to_csv", full)
    with pytest.raises(SystemExit, match="No space left"):
        ts.run_as_script()
    assert {name: (finished / "outputs" / name).read_bytes() for name in RESULTS} == before


def test_a_figure_that_cannot_be_drawn_costs_only_itself(finished, run, monkeypatch, capsys, figures):
    def fail(*_, **__):
        raise RuntimeError("no display")

    monkeypatch.setattr(ts.plt, "subplots", fail)
    (finished / "outputs" / "metrics.json").unlink()
    metrics, _ = run()
    assert metrics["mae"] > 0 and capsys.readouterr().err.count("no figures (no display)") == 1


@pytest.mark.parametrize(("backend", "shown"), [("template", 1), ("agg", 0)], ids=["screen", "no screen"])
def test_figures_are_shown_where_there_is_a_screen_when_they_are_saved(tmp_path, monkeypatch, backend, shown):
    """"template" is matplotlib's own stand-in for a back end with windows."""
    seen = []
    monkeypatch.setattr(ts.plt, "show", lambda: seen.append({path.name for path in tmp_path.iterdir()}))
    ts.plt.switch_backend(backend)
    ts.save_figures(tmp_path, lambda: {"one": ts.plt.figure()})
    ts.plt.switch_backend("agg")
    assert seen == [{"one.png", "one.pdf"}] * shown


def test_a_folder_in_the_place_of_a_figure_is_one_warning(tmp_path, capsys):
    (tmp_path / "one.png").mkdir()
    ts.save_figures(tmp_path, lambda: {"one": ts.plt.figure()})
    warning = capsys.readouterr().err
    assert "one.png" in warning and warning.count("\n") == 1


def test_settings_reach_the_report_as_they_were_written(finished, run):
    metrics, _ = run(OPTIMIZER={"class_name": "sgd", "config": {"momentum": 0.5}}, EPOCHS=1)
    assert metrics["constants"]["OPTIMIZER"] == {"class_name": "sgd", "config": {"momentum": 0.5}}


def test_one_line_and_exit_status_1(beside):
    folder, done = beside()
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1
    assert not (folder / "outputs").exists()


@pytest.mark.parametrize(
    ("source", "status", "said"),
    [
        ("import os; os.abort()", -signal.SIGABRT, "Fatal Python error: Aborted"),
        ("import os; os.write(2, b'start' b'-up'); raise ModuleNotFoundError('No module named tensorflow')", 1,
         "ModuleNotFoundError: No module named tensorflow\n"),
        ("raise RuntimeError('glibc too old')", 1, "RuntimeError: glibc too old"),
    ],
    ids=["abort", "not installed", "exception"],
)  # fmt: skip
def test_a_library_that_cannot_be_imported_is_never_silent(tmp_path, source, status, said):
    (tmp_path / "keras.py").write_text(source)
    done = start([SCRIPT], tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == status and said in done.stderr and "start-up" not in done.stderr


def test_importing_does_nothing(beside):
    folder, done = beside()
    assert done.stdout.split() == ["50", "True"], "Ctrl-C and stderr are whose they were"
    assert not re.search("Traceback|tscrowdnet", done.stderr), "TensorFlow may speak, the script does not"
    assert [path.name for path in folder.iterdir()] == [SCRIPT.name]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_random_moments_a_run_ends_with_the_same_digits(first_run, beside):
    folder, done = beside()
    assert done.stdout == "finished\n", done.stderr
    assert "Traceback" not in done.stderr
    for name in ("predictions.csv", "history.csv"):
        undisturbed, disturbed = (pd.read_csv(video / "outputs" / name) for video in (first_run, folder))
        assert undisturbed.equals(disturbed), name
