"""The script as a user runs it, its files, its cache, reproducibility and resumption."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pytest
from PIL import Image

import tscrowdnet_train as ts
from conftest import TINY, make_video

SCRIPT = Path(ts.__file__)
RESULTS = {
    "ts_crowdnet.keras", "history.csv", "predictions.csv", "metrics.json",
    "loss.png", "predictions.png", "timeline.png", "examples.png",
}  # fmt: skip


def edited_copy(folder, **constants):
    """The script copied into folder with constants edited at its top, as a user would."""
    text = SCRIPT.read_text()
    for name, value in constants.items():
        text, found = re.subn(rf"^{name} = .*$", lambda _: f"{name} = {value!r}", text, flags=re.MULTILINE)
        assert found == 1, name
    (folder / SCRIPT.name).write_text(text)
    return folder / SCRIPT.name


def start(script, cwd, **environment):
    environment = os.environ | {"MPLBACKEND": "agg"} | environment
    return subprocess.run([sys.executable, script], cwd=cwd, env=environment, capture_output=True, text=True)


def test_a_user_runs_the_script(video, tmp_path_factory):
    script = edited_copy(video, **TINY)
    done = start(script, cwd=tmp_path_factory.mktemp("elsewhere"))
    assert done.returncode == 0 and done.stderr == "", "quiet: no word of TensorFlow's, no warnings"
    outputs = video / "outputs"
    assert {path.name for path in outputs.iterdir() if not path.name.startswith((".", "features-"))} == RESULTS

    table = pd.read_csv(outputs / "predictions.csv")
    labels = pd.read_csv(video / "labels.csv")
    assert list(table.columns) == ["id", "split", "true", "predicted"]
    assert table["id"].tolist() == labels["id"].tolist() and table["true"].tolist() == labels["count"].tolist()
    assert table["split"].tolist() == ["train"] * 16 + ["validation"] * 4

    metrics = json.loads((outputs / "metrics.json").read_text())
    held_out = table[table["split"] == "validation"]
    error = held_out["predicted"] - held_out["true"]
    expected = {
        "mae": error.abs().mean(),
        "mse": (error**2).mean(),
        "rmse": (error**2).mean() ** 0.5,
        "accuracy": (error.abs() <= 0.2 * held_out["true"]).mean(),
        "pearson_r": held_out["predicted"].corr(held_out["true"]),
        "baseline_mae": (held_out["true"] - table["true"][:16].mean()).abs().mean(),
        "frames": 20,
        "train_frames": 16,
        "validation_frames": 4,
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, abs=1e-5), name
    assert metrics["weights"] == "random" and metrics["seconds"]["train"] > 0 and metrics["versions"]["keras"] == keras.__version__
    constants = {name for name in re.findall(r"^([A-Z_]+) = ", SCRIPT.read_text(), re.MULTILINE)} - {"START", "ROOT"}
    assert set(metrics["constants"]) == constants

    for name, value in (("MAE", "mae"), ("MSE", "mse"), ("RMSE", "rmse")):
        assert f"{metrics[value]:.3f}" in re.search(rf".*\({name}\).*", done.stdout)[0]
    history = pd.read_csv(outputs / "history.csv")
    assert history["epoch"].tolist() == list(range(TINY["EPOCHS"])) and {"loss", "val_loss"} <= set(history.columns)
    for name in RESULTS:
        if name.endswith(".png"):
            with Image.open(outputs / name) as image:
                assert min(image.size) > 300 and len(np.unique(np.asarray(image.convert("L")))) > 20
    features = next(outputs.glob("features-*"))
    assert features.stat().st_size == 20 * (2 * (12 * 64 + 2 * 256) + 6 * 8) * 4


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_other_backends_give_the_same_metrics(video, backend):
    """From the same ResNet50 weights, within 1%: the LSTM starts elsewhere, so it learns slowly here, and without noise."""
    same = {"WEIGHTS": "resnet50.weights.h5", "READ_OUT": {"conv1_relu": (3, 4)}, "LEARNING_RATE": 1e-3, "ESTIMATE_NOISE": 0.0}
    if not importlib.util.find_spec(backend):
        pytest.skip(f"{backend} is not installed")
    ts.keras.applications.ResNet50(include_top=False, weights=None, input_shape=(48, 64, 3)).save_weights(video / "resnet50.weights.h5")
    maes = []
    for name in (keras.backend.backend(), backend):
        script = edited_copy(video, **TINY | same | {"OUTPUTS": name})
        done = start(script, cwd=video, KERAS_BACKEND=name)
        assert done.returncode == 0, done.stderr
        maes.append(json.loads((video / name / "metrics.json").read_text())["mae"])
    assert maes[1] == pytest.approx(maes[0], rel=0.01)


def test_one_line_and_exit_status_1(video):
    (video / "labels.csv").unlink()
    done = start(edited_copy(video, **TINY), cwd=video)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1
    assert not (video / "outputs").exists()


def test_importing_does_nothing(tmp_path):
    shutil.copy(SCRIPT, tmp_path)
    code = "import sys, tscrowdnet_train as ts; print(ts.EPOCHS, 'tensorflow' in sys.modules)"
    done = subprocess.run([sys.executable, "-B", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split()[0] == "50" and done.stderr == ""
    assert [path.name for path in tmp_path.iterdir()] == [SCRIPT.name]


def test_same_seed_same_digits_and_another_seed_another_model(run):
    first, table = run()
    second, again = run(OUTPUTS="again")
    other, changed = run(OUTPUTS="other", SEED=1)
    assert (table["predicted"] == again["predicted"]).all()
    assert {name: first[name] for name in ("mae", "mse", "pearson_r")} == {name: second[name] for name in ("mae", "mse", "pearson_r")}
    assert (table["predicted"] != changed["predicted"]).any() and other["mae"] != first["mae"]


def stop(*_, **__):
    raise KeyboardInterrupt


def test_features_are_reused_only_where_nothing_changed(run, constants, video, monkeypatch):
    def features():
        return {path.name: path.stat().st_mtime_ns for path in (video / "outputs").glob("features-*")}

    def extract(**changes):
        constants(**changes)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(ts, "train", stop)
            ts.main()
        return features()

    _, table = run()
    first = features()
    assert len(first) == 1
    _, again = run()
    assert features() == first and (again["predicted"] == table["predicted"]).all()
    assert extract(LSTM_UNITS=3, EPOCHS=1) == first, "the head's constants leave the features as they are"
    names = [set(first)]
    for change in ({"FRAME_SIZE": (50, 64)}, {"SEED": 5}, {"FOREGROUND": None}, {"READ_OUT_RANDOM": {"conv1_relu": (1, 1)}}):
        names.append(set(extract(**change)))
    constants(FRAME_SIZE=TINY["FRAME_SIZE"], SEED=0, FOREGROUND=TINY["FOREGROUND"])
    picture = video / "frames" / "frames" / "seq_000018.jpg"
    shutil.copy(video / "frames" / "frames" / "seq_000002.jpg", picture)
    names.append(set(extract()))
    assert all(len(each) == 1 for each in names), "old features are replaced"
    assert len(set.union(*names)) == len(names), "whatever changed, a frame's content included"


def test_cached_and_literal_runs_agree(run, capsys):
    cached, table = run()
    literal, same = run(CACHE_FEATURES=False, OUTPUTS="literal")
    np.testing.assert_allclose(same["predicted"], table["predicted"], atol=1e-3)
    assert literal["mae"] == pytest.approx(cached["mae"], abs=1e-3)


def test_the_sample_is_said_to_be_synthetic(video, constants, monkeypatch, capsys):
    monkeypatch.setattr(ts, "prepare_backbone", stop)
    for source, said in ((video, False), (SCRIPT.parent, True)):
        monkeypatch.setattr(ts, "ROOT", source)
        with pytest.raises(KeyboardInterrupt):
            ts.main()
        assert ("rendered sample" in capsys.readouterr().out) is said


def test_a_run_takes_paths_and_leaves_files_of_others_alone(run, video):
    for name in ("new_frames", "features-mine", "checkpoint-mine"):
        (video / "outputs" / name).mkdir(parents=True)
        (video / "outputs" / name / "note.txt").write_text("mine")
    for name in ("features-mine.zip", "frames-mine.zip", "checkpoint-mine.npz"):
        (video / "outputs" / name).write_text("mine")
    metrics, _ = run(LABELS=Path("labels.csv"), OUTPUTS=video / "outputs")
    assert metrics["constants"]["LABELS"] == "labels.csv"
    assert len(list((video / "outputs").glob("*/note.txt"))) == 3
    assert len(list((video / "outputs").glob("*-mine.*"))) == 3


def test_a_fingerprint_tells_neighbouring_values_apart():
    assert ts.fingerprint(0.1, 16) != ts.fingerprint(0.11, 6) and ts.fingerprint(1, 664) != ts.fingerprint(16, 64)


def test_a_second_run_into_the_same_folder_is_refused(constants, video):
    pytest.importorskip("fcntl")
    with ts.only_run(video / "outputs"), pytest.raises(SystemExit, match="another run"):
        ts.run_as_script()


FORK = """
import os, random, resource, signal, sys, time
sys.path[:0] = [{tests!r}, {root!r}]
import tscrowdnet_train as ts
from conftest import TINY, check_whole
from pathlib import Path

for name, value in (TINY | {constants!r}).items():
    setattr(ts, name, value)
ts.ROOT = Path({video!r})
signal.signal(signal.SIGINT, signal.SIG_DFL)  # in a child until the script takes it over
moments, signals, kills, status = random.Random(3), [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, "full disk"], 0, 1
begin = time.monotonic()
while kills < {kills} or status:
    kind = signals[kills % 4] if kills < {kills} else None
    room = int(10 ** moments.uniform(2, 6.5))
    child = os.fork()  # imports are done: every moment of the child's life is the script's work
    if not child:
        if kind == "full disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            ts.run_as_script()
        except SystemExit as stop:
            print(stop.code, file=sys.stderr)
            os._exit(1)
        os._exit(0)
    end = time.monotonic() + (moments.uniform(0, {limit}) if kind and kind != "full disk" else 1e6)
    done = 0
    while not done and time.monotonic() < end:
        time.sleep(0.01)
        done, status = os.waitpid(child, os.WNOHANG)
    if not done:
        os.kill(child, kind)
        _, status = os.waitpid(child, 0)
    kills += not done or kind == "full disk"
    check_whole(ts.at(ts.OUTPUTS))
print(kills, time.monotonic() - begin)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_random_moments_a_run_ends_with_the_same_digits(tmp_path):
    video = make_video(tmp_path)

    def launch(outputs, kills, limit):
        constants = {"EPOCHS": 10, "READ_OUT_RANDOM": {"conv1_relu": (3, 4)}, "OUTPUTS": outputs}
        code = FORK.format(tests=str(SCRIPT.parent / "tests"), root=str(SCRIPT.parent), video=str(video),
                           constants=constants, kills=kills, limit=limit)  # fmt: skip
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout.startswith(f"{kills} "), done.stderr
        assert "Traceback" not in done.stderr
        return float(done.stdout.split()[1])

    seconds = launch("undisturbed", kills=0, limit=0)
    launch("disturbed", kills=20, limit=0.5 * seconds)
    for name in ("predictions.csv", "history.csv"):
        undisturbed, disturbed = (pd.read_csv(video / outputs / name) for outputs in ("undisturbed", "disturbed"))
        assert undisturbed.equals(disturbed), name


def test_an_interrupted_run_goes_on_and_does_not_start_again(run, video, constants, monkeypatch, capsys):
    _, expected = run(EPOCHS=6, OUTPUTS="undisturbed")
    save = ts.Checkpoint.on_epoch_end

    def third(*arguments, **options):
        save(*arguments, **options)
        if arguments[1] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(ts.Checkpoint, "on_epoch_end", third)
    constants(EPOCHS=6, OUTPUTS="outputs")
    with pytest.raises(KeyboardInterrupt):
        ts.main()
    monkeypatch.setattr(ts.Checkpoint, "on_epoch_end", save)
    capsys.readouterr()
    _, resumed = run(EPOCHS=6, OUTPUTS="outputs")
    assert "Going on after epoch 3 of 6" in capsys.readouterr().out
    assert resumed.equals(expected)
    histories = [pd.read_csv(video / outputs / "history.csv") for outputs in ("undisturbed", "outputs")]
    assert histories[0].equals(histories[1]) and len(histories[0]) == 6


def test_a_changed_constant_starts_afresh_and_says_so(run, constants, monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pd.DataFrame, "to_csv", stop)
        ts.main()
    run(LEARNING_RATE=1e-2)
    out = capsys.readouterr().out
    assert "starts afresh" in out and "Going on" not in out


def test_a_partly_extracted_video_goes_on_where_it_was(run, constants, video, monkeypatch, capsys):
    _, expected = run(OUTPUTS="undisturbed")
    load, loaded = ts.load_frame, []

    def fails_late(path, size):
        loaded.append(path)
        if len(loaded) > ts.CALIBRATION_FRAMES + 17:
            raise KeyboardInterrupt
        return load(path, size)

    constants(OUTPUTS="outputs")
    monkeypatch.setattr(ts, "load_frame", fails_late)
    with pytest.raises(KeyboardInterrupt):
        ts.main()
    part = next((video / "outputs").glob("features-*.part"))
    with part.open("ab") as file:
        file.write(b"half a batch")
    monkeypatch.setattr(ts, "load_frame", load)
    capsys.readouterr()
    _, resumed = run(OUTPUTS="outputs")
    assert re.search("from frame (8|16)", capsys.readouterr().out)
    assert resumed.equals(expected)


def test_results_of_a_finished_run_stay_until_the_next_is_whole(run, constants, video, monkeypatch):
    run()
    before = {path.name: path.read_bytes() for path in (video / "outputs").iterdir() if path.name in RESULTS}

    def full(*_, **__):
        raise OSError(28, os.strerror(28))

    constants(SEED=1)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    with pytest.raises(SystemExit, match="No space left"):
        ts.run_as_script()
    assert {name: (video / "outputs" / name).read_bytes() for name in RESULTS} == before
