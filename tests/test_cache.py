"""Features are kept, shared by experiments, and can be trusted."""

import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import keras
import numpy as np
import pytest
from PIL import Image

import tscrowdnet_train as ts
from conftest import count, frame_paths, results

CALIBRATION = 2  # frames that random weights are calibrated with in every run

SHARED = {  # what changes: (constants, how many frames and copies are read for it)
    "nothing": ({}, 0),
    "stages that learn, in another folder": ({"OUTPUTS": "other", "LSTM_UNITS": 3, "EPOCHS": 1, "PROJECTION": 0, "COMPONENTS": 3}, 0),
    "fewer frames at once, fewer training labels": ({"FRAME_BATCH": 1, "TRAIN_FRACTION": 0.6}, 0),
    "copies of all": ({"AUGMENT": 1}, 12),
    "size": ({"FRAME_SIZE": (50, 64)}, 24),
    "precision": ({"PRECISION": "mixed_bfloat16"}, 24),
    "grid": ({"FEATURE_LAYERS_RANDOM": {"conv1_relu": (1, 1)}}, 24),
    "the seed, of random weights": ({"SEED": 5}, 24),
}


@pytest.mark.parametrize("case", SHARED)
def test_experiments_share_the_features_of_frames(case, finished, run, loaded):
    changes, expected = SHARED[case]
    before = {path: path.read_bytes() for path in (finished / "feature_cache").rglob("*.npz")}
    assert len(before) == 20 + 4, "a file for each frame and copy"
    run(**changes)
    assert len(loaded) - CALIBRATION == expected
    assert all(path.read_bytes() == content for path, content in before.items()), "none is deleted"


def test_the_seed_does_not_matter_to_trained_weights(video, run, loaded):
    resnet = keras.applications.ResNet50(False, None, (48, 64, 3))
    resnet.save_weights(video / "resnet50.weights.h5")
    trained = {"WEIGHTS": "resnet50.weights.h5", "FEATURE_LAYERS": {"conv1_relu": (3, 4)}}
    run(**trained)
    loaded.clear()
    run(SEED=5, OUTPUTS="other", **trained)
    assert len(loaded) == CALIBRATION


def test_features_belong_to_a_frames_content(finished, run, loaded):
    """Not to its name or time; a new frame is read alone."""
    for path in frame_paths(finished):
        path.rename(path.with_name(f"img{path.stem[4:]}.jpeg"))
    run(EPOCHS=1)
    assert len(loaded) == CALIBRATION
    folder = finished / "frames" / "frames"
    shutil.copy(folder / "img000002.jpeg", folder / "img000018.jpeg")
    Image.new("RGB", (64, 48)).save(folder / "img000019.jpeg")
    loaded.clear()
    run(EPOCHS=1)
    assert loaded[CALIBRATION:] == ts.check_frames([folder / "img000019.jpeg"])["digest"].tolist()


def test_damaged_features_are_computed_anew(finished, run, loaded):
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
    assert table["predicted"].equals(expected["predicted"]) and len(loaded) == CALIBRATION + 8
    for path, features in whole.items():
        found = np.load(path)["features"]
        np.testing.assert_allclose(found, features, rtol=1e-4, atol=1e-5, err_msg=str(path))


def test_an_interrupted_extraction_goes_on_where_it_was(finished, run, constants, monkeypatch, loaded):
    _, expected = results(finished / "outputs")
    shutil.rmtree(finished / "feature_cache")
    extract = ts.run_backbone

    def stop_at_the_second(*arguments, calls=[]):  # noqa: B006
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return extract(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ts, "run_backbone", stop_at_the_second)
        ts.main()
    loaded.clear()
    _, resumed = run()
    assert resumed.equals(expected)
    assert len(loaded) == CALIBRATION + 8, "the first 16 of 24 are not computed again"


def test_how_many_frames_are_left_is_said(finished, run, capsys):
    """The progress bar counts only these, so its estimate is right."""
    folder = finished / "frames" / "frames"
    rng = np.random.default_rng(0)
    for number in range(70):
        pixels = rng.integers(0, 255, (48, 64, 3)).astype("uint8")
        Image.fromarray(pixels).save(folder / f"seq_{100 + number:06d}.png")
    run(COUNT="frames/frames")
    said = capsys.readouterr().out
    assert "20 of 90 images are in" in said and "70 are left" in said and "70/70" in said


def test_a_cache_leaves_the_other_files_of_its_folder_alone(finished, monkeypatch, loaded):
    """With paths as text, some of them of the user's home, and arrays."""
    monkeypatch.setenv("HOME", str(finished))
    folder = finished / "mine"
    folder.mkdir()
    for name in ("cache_of_mine.npz", "notes.txt"):
        (folder / name).write_bytes(b"mine")
    paths = [f"~/frames/frames/seq_{number:06d}.jpg" for number in (1, 2, 3)]
    frames = [*paths, "missing.jpg", np.zeros((48, 64, 3), "uint8")]
    for _ in range(2):
        counts = ts.count_people("~/outputs/ts_crowdnet.keras", frames, cache="~/mine")
        assert counts["count"].isna().tolist() == [False] * 3 + [True, False]
    assert len(loaded) == 4, "the second time all are known"
    assert [(folder / name).read_bytes() for name in ("cache_of_mine.npz", "notes.txt")] == [b"mine"] * 2


def test_two_cameras_of_equal_names_sizes_and_times_do_not_share_features(finished, loaded):
    """As a zip file or git leave them."""
    cameras = []
    for shade in (0, 200):
        folder = finished / f"camera {shade}"
        folder.mkdir()
        pixels = np.random.default_rng(shade).integers(0, 255, (48, 64, 3)).astype("uint8")
        Image.fromarray(pixels).save(folder / "frame_1.bmp")
        os.utime(folder / "frame_1.bmp", (1e9, 1e9))
        cameras.append(folder)
    apart = [count(finished, folder)["count"].iloc[0] for folder in cameras]
    loaded.clear()
    cached = [count(finished, folder, cache=finished / "cache")["count"].iloc[0] for folder in cameras]
    assert len(loaded) == 2 and cached == pytest.approx(apart, abs=1e-4) and cached[0] != cached[1]


def test_two_experiments_may_fill_the_cache_at_once(tmp_path):
    """Each of many files is written by both, under the same names."""
    files = {f"{number}.npz": lambda path: path.write_bytes(b"features") for number in range(50)}
    barrier = threading.Barrier(2)

    def write(_):
        barrier.wait()
        for _ in range(20):
            ts.write_files(tmp_path, files)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, range(2)))
    assert {path.name for path in tmp_path.iterdir()} == set(files)
    assert all(path.read_bytes() == b"features" for path in tmp_path.iterdir())
