"""Windows: the order of frames, clips, what training draws, and the Sequence that feeds them."""

from functools import partial

import keras
import numpy as np
import pandas as pd
import pytest

import tscrowdnet_train as ts
from conftest import count, frame_paths


def windows_of(names, length):
    starts = ts.find_clip_starts(names)
    return ts.make_windows(np.arange(len(names)), starts, length).tolist()


def test_windows_worked_by_hand():
    assert windows_of(["a.jpg", "b.jpg", "c.jpg"], 3) == [[0, 0, 0], [0, 0, 1], [0, 1, 2]]
    clips = ["mon/1.jpg", "mon/2.jpg", "tue/1.jpg", "tue/2.jpg"]
    assert windows_of(clips, 3) == [[0, 0, 0], [0, 0, 1], [2, 2, 2], [2, 2, 3]]
    assert windows_of([0, 1, 2], 2) == [[0, 0], [0, 1], [1, 2]], "arrays have no folders"
    assert windows_of(["x.jpg"], 1) == [[0]]


ORDERS = {
    "numbers": ["f_1.jpg", "f_2.jpg", "f_10.jpg"],
    "fractions of seconds": ["cam.1512579138.00433.jpg", "cam.1512579138.70433.jpg", "cam.1512579139.00100.jpg"],
    "a folder for each day": ["2024-01-09/08-30-17.jpg", "2024-01-09/08-31-02.jpg", "2024-01-10/08-29-00.jpg"],
    "a clock, then a number": ["20240101_100059_37.jpg", "20240101_100100_2.jpg"],
    "folders as numbers": ["2/001.jpg", "10/001.jpg", "10/002.jpg"],
    "frames of a folder stay together": ["a.jpg", "z.jpg", "clip/b.jpg"],
    "folders of one number": ["clip_01/1.jpg", "clip_01/2.jpg", "clip_1/1.jpg", "clip_1/2.jpg"],
    "capitals": ["IMG_1.JPG", "img_2.jpg", "Img_3.png"],
}  # fmt: skip


@pytest.mark.parametrize("case", ORDERS)
def test_frames_are_taken_in_natural_order(tmp_path, case):
    for name in reversed(ORDERS[case]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert ts.list_frames(tmp_path) == (ORDERS[case], [])


def test_what_is_no_frame_is_left_out_and_named(tmp_path, capsys):
    for name in ("1.jpg", "2.heic", "3.HEIC", "clip/4.gif", "notes", ".hidden.jpg", ".hid/5.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "lost.jpg").symlink_to(tmp_path / "nowhere")
    names, others = ts.list_frames(tmp_path)
    assert names == ["1.jpg"] and others == ["2.heic", "3.HEIC", "lost.jpg", "notes", "clip/4.gif"]
    assert "Left out: 1 .heic, 1 .HEIC, 1 .jpg, 1 notes, 1 .gif in" in capsys.readouterr().out


def clock(number, form, step=1.0):
    """Names of real cameras: a moment number * step seconds after 2024-01-01 10:00:55."""
    return (pd.Timestamp("2024-01-01 10:00:55") + pd.Timedelta(seconds=number * step)).strftime(form)


SCHEMES = {  # how real cameras and tools name frames: number -> name
    "seconds with a fraction": lambda n: f"cam.{1512579138 + n * 7 // 10}.{n * 7 % 10}0433.jpg",
    "SEC.NSEC": lambda n: f"image_{1512579138 + n * 7 // 10}.{n * 7 % 10 * 10**8}.jpg",
    "a clock alone": lambda n: clock(n, "%H-%M-%S.jpg"),
    "a clock, then a short number": lambda n: clock(n, "%Y%m%d_%H%M%S_") + f"{n * 37 % 50}.jpg",
    "two-digit years": lambda n: clock(n, "%y-%m-%d %H-%M-%S.jpg"),
    "a clock without seconds": lambda n: clock(n, "%Y%m%d_%H%M.jpg", 60),
    "a frame each 1.4 s": lambda n: clock(n, "%Y%m%d_%H%M%S.jpg", 1.4),
    "a folder within folders": lambda n: f"2024/01/cam 1/{n}.jpeg",
    "numbers without zeros": lambda n: f"frame{n}.jpg",
    "gaps": lambda n: f"seq_{n * n:06d}.jpg",
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_names_of_real_cameras_give_the_counts_of_plain_names(finished, scheme):
    expected = count(finished)["count"].tolist()
    folder = finished / "footage"
    for number, path in enumerate(frame_paths(finished), 1):
        target = folder / SCHEMES[scheme](number)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    counts = count(finished, folder)
    assert counts.index.tolist() == [SCHEMES[scheme](number) for number in range(1, 21)]
    np.testing.assert_allclose(counts["count"], expected, atol=1e-4)


def test_no_window_leaves_its_folder(finished, run):
    """In training and counting alike: the first frame of a clip is the only one of its window."""
    folder = finished / "frames" / "frames"
    for number, path in enumerate(frame_paths(finished), 1):
        target = folder / ("monday" if number <= 7 else "tuesday") / path.name
        target.parent.mkdir(exist_ok=True)
        path.rename(target)
    _, names, windows = ts.load_data()
    assert windows[6:9].tolist() == [[2, 3, 4, 5, 6], [7, 7, 7, 7, 7], [7, 7, 7, 7, 8]]
    assert ts.find_clip_starts(names).tolist() == [0] * 7 + [7] * 13
    _, table = run()
    assert table["frame"][7] == "tuesday/seq_000008.jpg"
    counts = count(finished)
    np.testing.assert_allclose(counts["count"], table["predicted"], atol=1e-3)
    alone = count(finished, folder / "tuesday")["count"].tolist()
    np.testing.assert_allclose(counts["count"][7:], alone, atol=1e-4)


def read(sequence):
    batches = [sequence[batch] for batch in range(len(sequence))]
    return np.concatenate([x for x, _ in batches]), np.concatenate([y for _, y in batches])[:, 0]


CLIPS = np.repeat([0, 40], 40)


@pytest.fixture
def sequence():
    """Two clips of 40 frames. Feature vectors tell their rows; rows from 80 are the copies."""
    windows = ts.make_windows(np.arange(80), CLIPS, 3)
    vectors = np.arange(160.0)[:, None] * [1, 10]
    return lambda draw=None: ts.WindowSequence(vectors, windows, np.arange(80.0), 32, draw)


def draw(windows, rng):
    return ts.draw_windows(windows, CLIPS, np.arange(80, 160), rng)


def test_validation_windows_come_whole_in_order_with_the_tail(sequence):
    x, y = read(sequence())
    assert [len(sequence()[batch][0]) for batch in range(3)] == [32, 32, 16]
    assert y.tolist() == list(range(80)) and (x[:, :, 1] == 10 * x[:, :, 0]).all()
    assert x[38:42, :, 0].tolist() == [[36, 37, 38], [37, 38, 39], [40, 40, 40], [40, 40, 41]]
    before = sequence()
    before.on_epoch_end()
    assert (read(before)[0] == x).all(), "nothing is drawn for them"


def test_what_an_epoch_draws(sequence):
    """Half of the windows as they are, half with earlier frames of their clip, in order; half of
    either from copies; always with the labelled frame last."""
    training = sequence(draw)
    own = {row: window for row, window in enumerate(training.windows.tolist())}
    shares, reached = [], []
    for _ in range(60):
        x, y = read(training)
        assert sorted(y) == list(range(80))
        rows = x[:, :, 0].astype(int)
        is_copy = rows >= 80
        assert (is_copy.all(axis=1) | ~is_copy.any(axis=1)).all(), "all of its copies, or none"
        rows %= 80
        assert (rows[:, -1] == y).all() and (np.diff(rows) >= 0).all()
        assert (rows // 40 == y[:, None] // 40).all(), "none leaves its clip"
        assert (y[:, None] - rows <= ts.NEIGHBOUR_RANGE).all()
        is_own = [window == own[row] for window, row in zip(rows.tolist(), y.astype(int))]
        shares.append([np.mean(is_own), is_copy.mean()])
        reached.append((y[:, None] - rows).max())
        training.on_epoch_end()
    own_share, copy_share = np.mean(shares, axis=0)
    assert own_share == pytest.approx(0.53, abs=0.05) and copy_share == pytest.approx(0.5, abs=0.04)
    assert max(reached) == ts.NEIGHBOUR_RANGE


def test_epochs_differ_and_a_seed_repeats_them(sequence, monkeypatch):
    def epochs():
        training = sequence(draw)
        seen = []
        for _ in range(3):
            seen.append(np.column_stack([read(training)[0][:, :, 0], read(training)[1]]).tolist())
            training.on_epoch_end()
        return seen

    first = epochs()
    assert first[0] != first[1] != first[2] != first[0] and epochs() == first
    monkeypatch.setattr(ts, "SEED", 1)
    assert epochs() != first


def test_what_an_epoch_draws_makes_counts_robust(constants, graph):
    """Counts drift slowly and each frame shows them with noise, so that earlier frames help; a
    second feature shows them, too, but changes with the light, as copies tell. Then frames are
    counted with neighbours from anywhere, and in other light."""
    rng = np.random.default_rng(0)
    counts = np.convolve(rng.normal(0, 12, 440), np.ones(20) / 20**0.5, "valid")[:400] + 40
    vectors = rng.normal(0, 0.3, (600, 8)).astype("float32")
    vectors[:400, :2] += (counts[:, None] - 40) / 15
    vectors[400:] = vectors[:200]  # rows from 400: copies of those that train
    vectors[400:, 1] += rng.normal(0, 2, 200)
    own = ts.make_windows(np.arange(200), np.zeros(200, int), 5)
    wrong = np.c_[rng.integers(0, 200, (200, 4)), np.arange(200)]
    later = vectors[200:400]
    shown = {"own": later[own], "wrong": later[wrong], "light": (later + [0, 1, *[0] * 6])[own]}
    errors = {}
    for is_robust in (False, True):
        share = 0.5 if is_robust else 0.0
        constants(EPOCHS=12, BATCH_SIZE=20, FORGET_BIAS=1.0, RANDOM_NEIGHBOURS=share)
        copy_of = np.arange(200) + (400 if is_robust else 0)
        draw = partial(ts.draw_windows, clip_starts=np.zeros(200, int), copy_of=copy_of)
        keras.utils.set_random_seed(0)
        model = keras.Sequential([ts.build_temporal(8), ts.build_regression(counts[:200])])
        ts.train(model, ts.WindowSequence(vectors, own, counts[:200], 20, draw))
        for name, windows in shown.items():
            predicted = model.predict(windows, verbose=0, batch_size=200)[:, 0]
            errors[name, is_robust] = np.abs(predicted - counts[200:]).mean()
    for name in ("wrong", "light"):  # how many times worse than where nothing is wrong
        harm, before = (errors[name, robust] / errors["own", robust] for robust in (True, False))
        assert harm < 0.85 * before, errors
    assert errors["own", True] < 1.4 * errors["own", False], errors
