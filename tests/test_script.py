"""The script as a user runs it, its files, its cache, reproducibility and resumption."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pytest
from PIL import Image

import tscrowdnet_train as ts
from conftest import SCRIPT, TINY, edited_copy, results, start

FIGURES = {f"{name}.{kind}" for name in ("loss", "predictions", "examples") for kind in ("png", "pdf")}
RESULTS = FIGURES | {"ts_crowdnet.keras", "history.csv", "predictions.csv", "metrics.json"}


@pytest.mark.beside("user")
def test_a_user_runs_the_script(beside):
    """From another folder, in a process of its own."""
    folder, done = beside()
    assert done.returncode == 0 and done.stderr == "", "quiet: no word of TensorFlow's, no warnings"
    outputs = folder / "outputs"
    assert {path.name for path in outputs.iterdir()} == RESULTS
    assert len(list((folder / "feature_cache").rglob("*.npz"))) == 20 + 4, "a file for each picture and copy"
    lines = done.stdout.splitlines()
    assert lines[0].startswith("20 pictures, 20 labels: the first 16 train, the last 4 validate; 20 pictures read.")
    assert lines[1] == "20 windows, 16 of them whole." and f"{folder / 'feature_cache'} (" in lines[2] and "CPU" in lines[3]

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
    assert f"a standard error of {metrics['mae_standard_error']:.3f}" in done.stdout
    history = pd.read_csv(outputs / "history.csv")
    assert history["epoch"].tolist() == [1, 2] and {"loss", "val_loss"} <= set(history.columns)
    for name in RESULTS:
        if name.endswith(".pdf"):
            assert (outputs / name).read_bytes().startswith(b"%PDF")
        if name.endswith(".png"):
            with Image.open(outputs / name) as image:
                assert min(image.size) > 300


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


@pytest.fixture
def computed(monkeypatch):
    """How many pictures and copies pass ResNet50."""
    rows, load = [], ts.Frames.load
    monkeypatch.setattr(ts.Frames, "load", lambda frames, row: rows.append(row) or load(frames, row))
    return rows


SHARED = {  # what changes: (constants, how many pictures and copies are read for it)
    "nothing": ({}, 0),
    "another folder for the results": ({"OUTPUTS": "other"}, 0),
    "stages that learn": ({"LSTM_UNITS": 3, "EPOCHS": 1, "PROJECTION": 0, "COMPONENTS": 3}, 0),
    "fewer frames at once": ({"FRAME_BATCH": 1}, 0),
    "fewer training labels": ({"TRAIN_FRACTION": 0.5}, 0),
    "all labels": ({"TRAIN_FRACTION": 1}, 1),
    "no copies": ({"AUGMENT": 0}, 0),
    "copies of all": ({"AUGMENT": 1}, 12),
    "size": ({"FRAME_SIZE": (50, 64)}, 24),
    "precision": ({"PRECISION": "mixed_bfloat16"}, 24),
    "grid": ({"FEATURE_LAYERS_RANDOM": {"conv1_relu": (1, 1)}}, 24),
    "the seed, of random weights": ({"SEED": 5}, 24),
}


@pytest.mark.parametrize("case", SHARED)
def test_experiments_share_the_features_of_pictures(case, finished, run, computed, monkeypatch):
    changes, expected = SHARED[case]
    before = {path: path.read_bytes() for path in (finished / "feature_cache").rglob("*.npz")}
    run(**changes)
    assert len(computed) - 2 == expected, "but for 2 that calibrate random weights"
    assert all(path.read_bytes() == content for path, content in before.items()), "nothing is deleted"


def test_the_seed_does_not_matter_to_trained_weights(video, run, computed, constants):
    ts.keras.applications.ResNet50(False, None, (48, 64, 3)).save_weights(video / "resnet50.weights.h5")
    trained = {"WEIGHTS": "resnet50.weights.h5", "FEATURE_LAYERS": {"conv1_relu": (3, 4)}}
    run(**trained)
    computed.clear()
    run(SEED=5, OUTPUTS="other", **trained)
    assert not computed


def test_features_belong_to_a_pictures_content(finished, run, computed):
    """Not to its name or time; a picture that is new is read alone."""
    folder = finished / "frames" / "frames"
    for path in folder.iterdir():
        path.rename(path.with_name(f"img{path.stem[4:]}.jpeg"))
    _, table = run(EPOCHS=1)
    assert len(computed) == 2
    shutil.copy(folder / "img000002.jpeg", folder / "img000018.jpeg")
    Image.new("RGB", (64, 48)).save(folder / "img000019.jpeg")
    computed.clear()
    run(EPOCHS=1)
    assert computed[2:] == [18]


def test_damaged_features_are_made_anew(finished, run, computed):
    _, expected = results(finished / "outputs")
    paths = sorted((finished / "feature_cache").rglob("*.npz"))
    whole = {path: np.load(path)["features"] for path in paths}
    cut, missing, empty, random, zeros, short, not_a_number, no_archive, *_ = paths
    cut.write_bytes(cut.read_bytes()[:200])
    missing.unlink()
    empty.write_bytes(b"")
    random.write_bytes(os.urandom(500))
    data = zeros.read_bytes()
    zeros.write_bytes(data[:500] + bytes(300) + data[800:])
    np.savez(short, features=whole[short][:5])
    np.savez(not_a_number, features=whole[not_a_number] * np.nan)
    with no_archive.open("wb") as file:
        np.save(file, whole[no_archive])
    _, table = run()
    assert table["predicted"].equals(expected["predicted"]) and len(computed) == 2 + 8
    for path, features in whole.items():
        np.testing.assert_allclose(np.load(path)["features"], features, rtol=1e-4, atol=1e-5, err_msg=str(path))


def test_the_cache_needs_no_memory_maps(finished, run, computed, monkeypatch):
    """File systems of a cloud may have none."""

    def refuse(*_, **__):
        raise OSError(19, os.strerror(19))

    monkeypatch.setattr(np, "memmap", refuse)
    shutil.rmtree(finished / "feature_cache")
    for pictures in (24, 0):
        computed.clear()
        run()
        assert len(computed) - 2 == pictures


def test_the_sample_is_said_to_be_synthetic(video, constants, monkeypatch, capsys):
    monkeypatch.setattr(ts, "build_backbone", stop)
    for source, said in ((video, False), (SCRIPT.parent, True)):
        monkeypatch.setattr(ts, "ROOT", source)
        constants(OUTPUTS=video / "outputs", CACHE=video / "feature_cache")
        with pytest.raises(KeyboardInterrupt):
            ts.main()
        assert ("pictures are rendered" in capsys.readouterr().out) is said


@pytest.mark.parametrize(("size", "said"), [((48, 64), None), ((64, 48), "(64, 85)"), ((48, 70), None), ((90, 160), "(90, 120)")])
def test_a_size_that_distorts_is_said_with_one_that_does_not(constants, monkeypatch, capsys, size, said):
    monkeypatch.setattr(ts, "build_backbone", stop)
    constants(FRAME_SIZE=size)
    with pytest.raises(KeyboardInterrupt):
        ts.main()
    out = capsys.readouterr().out
    assert f"FRAME_SIZE = {said} keeps their shape" in out if said else "FRAME_SIZE" not in out


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


def test_a_cache_may_be_in_use_by_another_run(video, constants, capsys):
    """Whose half-written files come and go."""
    folder, done = video / "feature_cache" / "of another run", threading.Event()
    folder.mkdir(parents=True)

    def write():
        while not done.is_set():
            ts.write_files(folder, {"0.npz": lambda path: path.write_bytes(b"features")})
            ts.prepare_folder(folder.parent, "CACHE")

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(write)
        try:
            for _ in range(200):
                ts.prepare_cache()
        finally:
            done.set()
        other.result()


def test_an_interrupted_extraction_goes_on_where_it_was(finished, run, constants, monkeypatch):
    _, expected = results(finished / "outputs")
    shutil.rmtree(finished / "feature_cache")
    load, loaded = ts.Frames.load, []

    def fails_late(frames, row):
        loaded.append(row)
        if len(loaded) > 2 + 20:  # calibration, 8 batches, and some of the next
            raise KeyboardInterrupt
        return load(frames, row)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ts.Frames, "load", fails_late)
        ts.main()
    loaded.clear()
    monkeypatch.setattr(ts.Frames, "load", lambda frames, row: loaded.append(row) or load(frames, row))
    _, resumed = run()
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


@pytest.mark.parametrize("name", ["predictions.csv", "metrics.json"])
def test_where_a_result_cannot_be_replaced_all_stay(finished, constants, monkeypatch, name):
    """As where a spreadsheet holds predictions.csv open, on Windows."""
    before = {name: (finished / "outputs" / name).read_bytes() for name in RESULTS}
    replace = os.replace

    def refuse(source, target):
        if Path(target) == finished / "outputs" / name and Path(source).parent.name != "old":
            raise PermissionError(13, os.strerror(13))
        return replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    constants(EPOCHS=1)
    with pytest.raises(SystemExit, match=f"{name}: cannot be replaced.*close it"):
        ts.run_as_script()
    assert {name: (finished / "outputs" / name).read_bytes() for name in RESULTS} == before
    assert not list((finished / "outputs").glob(".new-*"))


def test_what_a_killed_run_was_writing_is_gone_after_the_next(finished, run):
    for folder in (f"outputs/{ts.NEW}abc/old", f"feature_cache/0123/{ts.NEW}def"):
        (finished / folder).mkdir(parents=True)
        (finished / folder / "x.npz").write_bytes(b"half")
    time.sleep(0.05)
    (finished / "outputs" / ".new-of-others").mkdir()
    run(EPOCHS=1)
    assert [path.name for path in finished.rglob(".new-*")] == [".new-of-others"]


def test_all_labels_can_train_and_nothing_passes_for_validation(finished, run, capsys, figures):
    metrics, table = run(TRAIN_FRACTION=1)
    assert (table["split"] == "train").all() and len(table) == 20
    assert metrics["train_frames"] == 20 and metrics["validation_frames"] == 0
    assert not {"mae", "mse", "baseline"} & set(metrics)
    said = capsys.readouterr().out
    assert "the first 20 train, none is left to validate" in said and "nothing is known of the error" in said and "MAE" not in said
    names = {path.name for path in (finished / "outputs").iterdir()}
    assert names == RESULTS - {f"{name}.{kind}" for name in ("predictions", "examples") for kind in ("png", "pdf")}
    assert "val_mse" not in pd.read_csv(finished / "outputs" / "history.csv")


def test_only_what_labelled_windows_show_is_read(video, run, computed, capsys):
    """Labels 10, 11 and 20; of the last two pictures one is unreadable, and no matter."""
    labels = pd.read_csv(video / "labels.csv")
    labels[labels["id"].isin([10, 11, 20])].to_csv(video / "labels.csv", index=False)
    (video / "frames" / "frames" / "seq_000001.jpg").write_bytes(b"unreadable, not asked for")
    (video / "frames" / "frames" / "seq_000018.jpg").unlink()
    _, table = run(AUGMENT=0, TRAIN_FRACTION=0.7)
    assert sorted(set(computed)) == list(range(8)), "6 to 11, 19 and 20"
    said = capsys.readouterr().out
    assert "19 pictures, 3 labels: the first 2 train, the last 1 validate; 8 pictures read. 16 pictures have no label" in said
    assert "3 windows, 2 of them whole" in said and table["split"].tolist() == ["train", "train", "validation"]


def draw(n, epochs=2):
    """The figures of a run with n validation frames."""
    frames = [np.full((4, 4, 3), shade, "uint8") for shade in range(n)]
    history = pd.DataFrame({"mse": 4.0, "val_mse": 5.0}, index=range(1, epochs + 1))
    table = pd.DataFrame({"id": range(n), "split": "validation", "true": 5.0, "predicted": 5.0 + np.arange(n)})
    return ts.draw_figures(history, table, {"rmse": 3.0}, frames, "title")


def test_figures_show_what_they_should():
    figures = draw(11)
    (loss,) = figures["loss"].axes
    assert [line.get_ydata()[0] for line in loss.lines] == [2, 5**0.5, 3]
    left, right = figures["predictions"].axes
    assert left.collections[-1].get_offsets()[:, 1].tolist() == list(range(5, 16))
    shown = [axis.images[0].get_array()[0, 0, 0] for axis in figures["examples"].axes]
    assert shown == [0, 2, 4, 6, 8, 10], "from the smallest to the largest error"


def test_the_curve_over_time_is_in_the_order_of_time():
    """Which is not that of ids like 235959, 0."""
    table = pd.DataFrame({"id": [235958, 235959, 0, 1], "true": [3.0, 9, 7, 1], "predicted": [3.0, 9, 7, 1]})
    _, right = ts.draw_predictions(table, "title").axes
    assert right.lines[0].get_xydata().tolist() == [[0, 3], [1, 9], [2, 7], [3, 1]]


def test_one_epoch_has_a_mark_and_one_picture_is_shown_once():
    figures = draw(1, epochs=1)
    assert all(line.get_marker() == "o" for line in figures["loss"].axes[0].lines[:2])
    assert len(figures["examples"].axes) == 1


@pytest.mark.parametrize(("error", "is_ours"), [(RuntimeError("no display"), False), (KeyError("typo"), True)])
def test_a_figure_that_cannot_be_drawn_costs_only_itself(finished, run, monkeypatch, capsys, figures, error, is_ours):
    """What figures cannot do here is a line; what is a fault of the script is a traceback, after the results."""

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(ts.plt, "subplots", fail)
    (finished / "outputs" / "metrics.json").unlink()
    if is_ours:
        with pytest.raises(KeyError):
            run()
        assert results(finished / "outputs")[0]["mae"] > 0
    else:
        metrics, _ = run()
        assert metrics["mae"] > 0 and capsys.readouterr().err.count("no figures (no display)") == 1


@pytest.mark.parametrize(("backend", "shown"), [("template", 1), ("agg", 0)], ids=["screen", "no screen"])
def test_figures_are_shown_where_there_is_a_screen_when_they_are_saved(tmp_path, monkeypatch, backend, shown):
    """"template" is matplotlib's own stand-in for a back end with windows."""
    seen = []
    monkeypatch.setattr(ts.plt, "show", lambda: seen.append({path.name for path in tmp_path.iterdir()}))
    ts.plt.switch_backend(backend)
    ts.save_figures(tmp_path, (), lambda: {"one": ts.plt.figure()})
    ts.plt.switch_backend("agg")
    assert seen == [{"one.png", "one.pdf"}] * shown


def test_figures_that_cannot_be_saved_are_one_warning_and_none_of_an_earlier_model_stays(tmp_path, monkeypatch, capsys):
    ts.save_figures(tmp_path, ("one.png", "one.pdf"), lambda: {"one": ts.plt.figure()})
    assert {path.name for path in tmp_path.iterdir()} == {"one.png", "one.pdf"}

    def refuse(*_):
        raise PermissionError(13, os.strerror(13))

    monkeypatch.setattr(os, "replace", refuse)
    ts.save_figures(tmp_path, ("one.png", "one.pdf"), lambda: {"one": ts.plt.figure()})
    warning = capsys.readouterr().err
    assert "one.png" in warning and warning.count("\n") == 1 and not list(tmp_path.iterdir())


def test_settings_reach_the_report_as_they_were_written(finished, run):
    metrics, _ = run(OPTIMIZER={"class_name": "sgd", "config": {"momentum": 0.5}}, EPOCHS=1)
    assert metrics["constants"]["OPTIMIZER"] == {"class_name": "sgd", "config": {"momentum": 0.5}}


@pytest.mark.beside("bad")
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
         "Error: No module named tensorflow; pip install -r requirements.txt, with Python 3.10 to 3.13\n"),
        ("raise RuntimeError('glibc too old')", 1, "RuntimeError: glibc too old"),
    ],
    ids=["abort", "not installed", "exception"],
)  # fmt: skip
def test_a_library_that_cannot_be_imported_is_never_silent(tmp_path, source, status, said):
    (tmp_path / "keras.py").write_text(source)
    done = start([SCRIPT], tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == status and said in done.stderr and "start-up" not in done.stderr


@pytest.mark.beside("alone")
def test_importing_does_nothing(beside):
    folder, done = beside()
    assert done.stdout.split() == ["50", "True"], "Ctrl-C and stderr are whose they were"
    assert not re.search("Traceback|tscrowdnet", done.stderr), "TensorFlow may speak, the script does not"
    assert [path.name for path in folder.iterdir()] == [SCRIPT.name]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.beside("killed")
def test_killed_at_random_moments_a_run_ends_with_the_same_digits(first_run, beside):
    folder, done = beside()
    assert done.stdout == "finished\n", done.stderr
    assert "Traceback" not in done.stderr
    for name in ("predictions.csv", "history.csv"):
        undisturbed, disturbed = (pd.read_csv(video / "outputs" / name) for video in (first_run, folder))
        assert undisturbed.equals(disturbed), name


def test_a_notebooks_back_end_does_not_stop_a_script(tmp_path):
    """!python tscrowdnet_train.py, in an environment of its own."""
    done = start([edited_copy(tmp_path, LABELS="none.csv")], tmp_path, MPLBACKEND="module://matplotlib_inline.backend_inline")
    assert done.returncode == 1 and done.stderr.startswith("Error: ") and "none.csv" in done.stderr


def test_a_notebook_keeps_its_own_ctrl_c(tmp_path):
    """%run gives a file the name __main__, in a process that has IPython."""
    (tmp_path / "keras.py").write_text("import signal; print(repr(signal.getsignal(2))); raise SystemExit")
    code = "import signal; signal.signal(2, signal.default_int_handler); "  # a job in the background inherits another
    code += f"import sys, runpy; sys.modules['IPython'] = sys; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    for arguments, expected in ((["-c", code], "default_int_handler"), ([SCRIPT], "SIG_DFL")):
        done = start(arguments, tmp_path, PYTHONPATH=str(tmp_path))
        assert expected in done.stdout, done.stderr


def test_channels_come_last_whatever_keras_is_set_to(run):
    keras.config.set_image_data_format("channels_first")
    try:
        assert run(EPOCHS=1)[0]["mae"] > 0
    finally:
        keras.config.set_image_data_format("channels_last")
