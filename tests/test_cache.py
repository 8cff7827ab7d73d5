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
from conftest import Stopped, digests_of, frame_paths

CALIBRATION = 2  # frames that random weights are calibrated with in every run

SHARED = {  # what changes: (constants, how many frames and copies are read for it)
    "nothing": ({}, 0),
    "another experiment": ({"OUTPUTS": "other", "FRAME_BATCH": 1, "TRAIN_FRACTION": 0.6}, 0),
    "copies of all": ({"AUGMENT": 1}, 12),
    "size": ({"FRAME_SIZE": (50, 64)}, 24),
    "precision": ({"PRECISION": "mixed_bfloat16"}, 24),
    "grid": ({"FEATURE_LAYERS_RANDOM": {"conv1_relu": (1, 1)}}, 24),
    "the seed, of random weights": ({"SEED": 5}, 24),
}


@pytest.fixture
def read(constants, until, loaded):
    """Runs the script with the given constants until it has all features; returns the digests of
    the frames and copies that were decoded for them."""
    until("build_reduction")

    def read(**changes):
        loaded.clear()
        constants(**changes)
        with pytest.raises(Stopped):
            ts.main()
        return loaded[CALIBRATION:]

    return read


@pytest.mark.parametrize("case", SHARED)
def test_experiments_share_the_features_of_frames(case, finished, read):
    changes, expected = SHARED[case]
    before = {path: path.read_bytes() for path in (finished / "feature_cache").rglob("*.npz")}
    assert len(before) == 20 + 4, "a file for each frame and copy"
    assert len(read(**changes)) == expected
    assert all(path.read_bytes() == content for path, content in before.items()), "none is deleted"


def test_the_seed_does_not_matter_to_trained_weights(video, read):
    resnet = keras.applications.ResNet50(False, None, (48, 64, 3))
    resnet.save_weights(video / "resnet50.weights.h5")
    trained = {"WEIGHTS": "resnet50.weights.h5", "FEATURE_LAYERS": {"conv1_relu": (3, 4)}}
    assert len(read(**trained)) == 24
    assert len(read(SEED=5, **trained)) == 0


def test_features_belong_to_a_frames_content(finished, read):
    """Not to its name or time, as a zip file or git leave them; a new frame is read alone."""
    for path in frame_paths(finished):
        path.rename(path.with_name(f"img{path.stem[4:]}.jpeg"))
    assert len(read()) == 0
    folder = finished / "frames" / "frames"
    shutil.copy(folder / "img000002.jpeg", folder / "img000018.jpeg")
    times = os.stat(folder / "img000019.jpeg")
    Image.new("RGB", (64, 48)).save(folder / "img000019.jpeg")
    os.utime(folder / "img000019.jpeg", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert read() == digests_of([folder / "img000019.jpeg"])


def test_damaged_features_are_computed_anew(finished, read):
    paths = sorted((finished / "feature_cache").rglob("*.npz"))
    whole = {path: np.load(path)["features"] for path in paths}
    cut, missing, empty, random, zeros, short, not_a_number, *_ = paths
    cut.write_bytes(cut.read_bytes()[:200])
    missing.unlink()
    empty.write_bytes(b"")
    random.write_bytes(os.urandom(500))
    zeros.write_bytes(zeros.read_bytes()[:500] + bytes(300) + zeros.read_bytes()[800:])
    np.savez(short, features=whole[short][:5])
    np.savez(not_a_number, features=whole[not_a_number] * np.nan)
    assert len(read()) == 7
    for path, features in whole.items():
        np.testing.assert_allclose(np.load(path)["features"], features, rtol=1e-4, atol=1e-5)


def test_an_interrupted_extraction_goes_on_where_it_was(finished, constants, monkeypatch, read):
    shutil.rmtree(finished / "feature_cache")
    extract, calls = ts.run_backbone, []

    def stop_at_the_second(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise Stopped
        return extract(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ts, "run_backbone", stop_at_the_second)
        read()
    assert len(read()) == 8, "the first 16 of 24 are not computed again"


def test_how_many_frames_are_left_is_said(finished, run, capsys):
    """The progress bar counts only these, so its estimate is right."""
    folder = finished / "frames" / "frames"
    rng = np.random.default_rng(0)
    for number in range(70):
        pixels = rng.integers(0, 255, (48, 64, 3)).astype("uint8")
        Image.fromarray(pixels).save(folder / f"seq_{100 + number:06d}.png")
    for number in range(300, 303):  # the same, byte for byte
        shutil.copy(folder / "seq_000100.png", folder / f"seq_{number:06d}.png")
    run(COUNT="frames/frames")
    said = capsys.readouterr().out
    assert "20 of 93 images are in" in said and "73 are left" in said and "73/73" in said


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
