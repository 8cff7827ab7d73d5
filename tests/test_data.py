"""Windows, split, Sequence, label formats and metrics."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.io
from PIL import Image

import tscrowdnet_train as ts


def windows_by_definition(times, step, length):
    """The window of each picture by walking back one step at a time."""
    row = {moment: place for place, moment in enumerate(times)}
    found = []
    for moment in times:
        window = [moment]
        while len(window) < length:
            window.insert(0, window[0] - step if window[0] - step in row else window[0])
        found.append([row[moment] for moment in window])
    return np.array(found)


@pytest.mark.parametrize("length", range(1, 9))
@pytest.mark.parametrize(
    ("times", "step"),
    [([1, 2, 3, 4, 5, 6, 7], 1), ([7, 8, 9, 20, 21, 22, 23, 40], 1), ([5], 1), ([0, 5, 10, 15, 30, 35], 5), ([3, 1, 2, 9, 8], 1)],
    ids=["consecutive", "broken", "one", "strided", "in no order"],
)
def test_windows(times, step, length):
    windows = ts.make_windows(times, length)
    assert windows.tolist() == windows_by_definition(times, step, length).tolist()
    assert (windows[:, -1] == np.arange(len(times))).all(), "one window for each picture, ending at it"


def test_windows_worked_by_hand():
    assert ts.make_windows([1, 2, 3, 7, 8], 3).tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 2], [3, 3, 3], [3, 3, 4]]
    assert ts.make_windows([1, 2, 5], 2).tolist() == [[0, 0], [0, 1], [2, 2]]
    milliseconds = [1700000000000, 1700000000033, 1700000000067, 1700000000100, 1700000000300]
    assert ts.make_windows(milliseconds, 3)[-2:].tolist() == [[1, 2, 3], [4, 4, 4]], "steps of 33 and 34 are one step"
    assert ts.make_windows([10**30, 10**30 + 1], 2).tolist() == [[0, 0], [0, 1]]


NAMES = {  # what the pictures are called: (names in order, their windows of 2)
    "numbers": (["a_2.jpg", "a_10.jpg", "a_18.jpg", "a_40.jpg"], [[0, 0], [0, 1], [1, 2], [3, 3]]),
    "the last number counts": (["cam3_7_5fps.jpg", "cam3_8_6.png"], [[0, 0], [0, 1]]),
    "a clock, over a minute and midnight": (
        ["x_20240101_235958.jpg", "x_20240101_235959.jpg", "x_20240102_000000.jpg", "x_20240102_000009.jpg"],
        [[0, 0], [0, 1], [1, 2], [3, 3]],
    ),
    "a clock with signs": (["2024-01-01 10-00-59.jpg", "2024-01-01 10-01-00.jpg"], [[0, 0], [0, 1]]),
    "a clock with milliseconds": (["20240101100059000.jpg", "20240101100100000.jpg", "20240101100101020.jpg", "20240101100103000.jpg"], [[0, 0], [0, 1], [1, 2], [3, 3]]),
    "a clock with microseconds": (["20240101_100059_900000.jpg", "20240101_100100_000001.jpg"], [[0, 0], [0, 1]]),
    "14 digits that are no date": (["00000000000007.jpg", "00000000000008.jpg"], [[0, 0], [0, 1]]),
    "Unix times": (["1700000059.jpg", "1700000060.jpg", "1700000061.jpg", "1700000091.jpg"], [[0, 0], [0, 1], [1, 2], [3, 3]]),
    "nanoseconds": (["1700000000000000000.jpg", "1700000001000000000.jpg"], [[0, 0], [0, 1]]),
    "one without a number: as given": (["a_1.jpg", "a_2.jpg", "a_90.jpg", "last.jpg"], [[0, 0], [0, 1], [1, 2], [2, 3]]),
    "one number twice: as given": (["a_1.jpg", "b_1.jpg", "b_50.jpg"], [[0, 0], [0, 1], [1, 2]]),
}


@pytest.mark.parametrize("case", NAMES)
def test_windows_go_by_the_numbers_in_the_names(case):
    names, expected = NAMES[case]
    assert ts.make_windows(ts.find_times([Path(name) for name in names]), 2).tolist() == expected


def test_arrays_are_taken_in_the_order_given():
    assert ts.find_times([np.zeros((2, 2, 3), "uint8")] * 3) == [0, 1, 2]


@pytest.fixture
def sequence():
    source = np.arange(10.0)[:, None] * [1, 10]  # feature values tell their row
    windows = ts.make_windows(range(10), 3)
    return lambda **options: ts.WindowSequence(source, windows, np.arange(10) + 100.0, 4, **options)


def read(sequence):
    batches = [sequence[batch] for batch in range(len(sequence))]
    return np.concatenate([x for x, _ in batches]), np.concatenate([y for _, y in batches])[:, 0]


def test_sequence_covers_every_window_in_order_and_keeps_the_tail(sequence):
    x, y = read(sequence())
    assert [len(sequence()[batch][0]) for batch in range(3)] == [4, 4, 2]
    assert y.tolist() == (np.arange(10) + 100).tolist()
    assert x[:, :, 0].tolist() == ts.make_windows(range(10), 3).tolist()
    assert (x[:, :, 1] == 10 * x[:, :, 0]).all()


def test_sequence_shuffles_anew_each_epoch_and_alike_for_one_seed(sequence, monkeypatch):
    def epochs():
        training = sequence(shuffle=True, copy_of=np.arange(10))
        orders = []
        for _ in range(3):
            x, y = read(training)
            assert (x[:, -1, 0] + 100 == y).all(), "counts stay with their windows"
            assert sorted(y) == (np.arange(10) + 100).tolist()
            orders.append(y.tolist())
            training.on_epoch_end()
        return orders

    first = epochs()
    assert first[0] != first[1] != first[2] != first[0]
    assert epochs() == first
    monkeypatch.setattr(ts, "SEED", 1)
    assert epochs() != first


def test_about_half_of_the_windows_show_copies_and_every_epoch_draws_anew():
    """Pictures 0, 4 and 8 have copies, in rows 10, 11 and 12; a window shows all of its copies or none."""
    copy_of = np.arange(10)
    copy_of[[0, 4, 8]] = [10, 11, 12]
    windows = ts.make_windows(range(10), 3)
    training = ts.WindowSequence(np.arange(13.0)[:, None], windows, np.arange(10.0), 4, True, copy_of)
    with_copies = []
    for _ in range(40):
        x, y = read(training)
        for window, last in zip(x[:, :, 0], y.astype(int)):
            assert window.tolist() in (windows[last].tolist(), copy_of[windows[last]].tolist())
            with_copies.append((window > 9).any())
        training.on_epoch_end()
    able = np.isin(windows, [0, 4, 8]).any(axis=1).mean()
    assert np.mean(with_copies) == pytest.approx(able / 2, abs=0.12)


LABELS = {
    "plain": b"id,count\n1,5\n2,0\n3,7\n",
    "any order, other columns, unsorted": b"weather,count,id\nsun,7,3\nrain,5,1\n,0,2\n",
    "byte-order mark": b"\xef\xbb\xbfid,count\n1,5\n2,0\n3,7\n",
    "Latin-1": "id,count,ort\n1,5,Caf\xe9\n2,0,a\n3,7,b\n".encode("latin-1"),
    "semicolons": b"id;count\n1;5\n2;0\n3;7\n",
    "tabs, spaces, capitals": b" ID\tCount \r\n1\t 5\r\n2\t0\r\n3\t7\r\n",
    "blank lines, whole floats": b"id,count\n1.0,5.0\n\n2,0\n3,7\n\n",
    "semicolons in a note of the header": b'id,count,"notes; of; the; day"\n1,5,a\n2,0,b\n3,7,c\n',
    "UTF-16": "id\tcount\n1\t5\n2\t0\n3\t7\n".encode("utf-16"),
    "quoted names": b'"id","count"\n"1","5"\n2,0\n3,7\n',
}


@pytest.mark.parametrize("text", LABELS.values(), ids=LABELS.keys())
def test_label_formats(tmp_path, text):
    path = tmp_path / "labels.csv"
    path.write_bytes(text)
    labels = ts.read_labels(path)
    assert labels.index.tolist() == [1, 2, 3] and labels.tolist() == [5, 0, 7]


def test_a_sheet_may_be_filled_in_here_and_there(tmp_path):
    """Sums of density maps, pictures without a count, ids of any size."""
    path = tmp_path / "labels.csv"
    path.write_text("id,count\n1700000001,38.006\n1700000002,\n,\n1700000003,0\n1700000000000000001,7\n")
    labels = ts.read_labels(path).dropna()
    assert labels.to_dict() == {1700000001: 38.006, 1700000003: 0, 1700000000000000001: 7}


def test_ids_are_exact_however_many_digits_they_have(tmp_path):
    """Dates and clocks with milli- and microseconds; a table calculator's .0 beside them."""
    ids = [20240101100059123, 20240101100000000000, 2]
    path = tmp_path / "labels.csv"
    path.write_text(f"id,count\n{ids[0]},5\n{ids[1]},6\n 2.0 ,7\n")
    assert ts.read_labels(path).to_dict() == dict(zip(ids, (5, 6, 7)))
    names = ("cam_20240101_100059123.jpg", "cam_20240101_100000_000000.jpg", "2.jpg")
    assert ts.find_labelled([tmp_path / name for name in names], pd.Index(ids)).tolist() == [0, 1, 2]


def test_mat_labels(tmp_path):
    path = tmp_path / "mall_gt.mat"
    heads = np.empty((1, 3), object)
    heads[:] = [[np.zeros((200, 2)), np.zeros((0, 2)), np.zeros((7, 2))]]
    scipy.io.savemat(path, {"count": np.array([[200], [0], [7]], "uint8"), "frame": heads})
    labels = ts.read_labels(path)
    assert labels.index.tolist() == [1, 2, 3] and labels.tolist() == [200, 0, 7]
    assert labels.diff().iloc[1] == -200, "uint8 counts must not wrap around"


def test_metrics_worked_by_hand():
    true, predicted = np.array([10.0, 20, 0, 5]), np.array([12.0, 15, 0.4, 5])
    metrics = ts.measure(true, predicted)
    assert metrics["mae"] == pytest.approx((2 + 5 + 0.4 + 0) / 4)
    assert metrics["mse"] == pytest.approx((4 + 25 + 0.16 + 0) / 4)
    assert metrics["rmse"] == pytest.approx(metrics["mse"] ** 0.5)
    assert metrics["accuracy"] == 0.75, "20% off is accurate, 25% is not; 0.4 rounds to a true 0"
    assert ts.measure(np.zeros(3), np.array([0.0, 0.49, 0.51]))["accuracy"] == pytest.approx(2 / 3)


def test_few_counts_have_a_standard_error():
    errors = np.array([1.0, 3, 2, 0])
    assert ts.measure(np.full(4, 9.0), 9 + errors)["mae_standard_error"] == pytest.approx(errors.std(ddof=1) / 2)
    for n in (1, 100):
        assert "mae_standard_error" not in ts.measure(np.zeros(n), np.ones(n))


@pytest.mark.parametrize("name", ["frame_{}.JPG", "img{:04}.png", "seq_{}.jpeg", "2019_cam3_{:06}.bmp", "20240101_1000{:02}.jpg"])
def test_labels_are_matched_by_the_last_number_in_the_names(video, constants, name):
    folder = video / "frames" / "frames"
    for path in folder.iterdir():
        Image.open(path).save(folder / name.format(int(path.stem[4:])))
        path.unlink()
    paths = ts.list_pictures(folder)
    first = 100000 if name.startswith("20240101") else 0
    for ids in ([first + 1, first + 2, first + 20], [20240101100020]) if first else ([1, 2, 20],):
        rows = ts.find_labelled(paths, pd.Index(ids))
        assert [paths[row].name for row in rows] == [name.format(frame % 100) for frame in ids]


def read_copies(paths, training, **options):
    frames = ts.Frames(paths, ts.digest_pictures(paths)[0], (48, 64), training, **options)
    return frames, frames[range(len(frames))].astype(float)


def test_copies_show_the_same_scene_in_other_light_from_a_nudged_camera(video, constants, monkeypatch):
    constants(AUGMENT=1)
    paths = ts.list_pictures(video / "frames" / "frames")[:4]
    frames, shown = read_copies(paths, range(4))
    assert len(frames) == 8 and frames.copy_of.tolist() == [4, 5, 6, 7] and frames.trained_on.tolist() == list(range(8))
    with Image.open(paths[0]) as image:
        assert (shown[0] == np.asarray(image)).all(), "pictures themselves stay as they are"
    changes = shown[4:] - shown[:4]
    assert (2 < np.abs(changes).mean(axis=(1, 2, 3))).all() and (np.abs(changes).mean(axis=(1, 2, 3)) < 60).all()
    assert np.ptp(changes.mean(axis=(1, 2, 3))) > 2, "each copy in a way of its own"
    constants(AUGMENT=1, SEED=1)
    frames, others = read_copies(paths[2:], range(2))
    assert (others[2:] == shown[6:]).all(), "a copy belongs to its picture, whatever the experiment"


def test_rows_of_any_shape_are_read(video, constants):
    paths = ts.list_pictures(video / "frames" / "frames")
    frames, shown = read_copies(paths, ())
    windows = np.array([[0, 0, 1], [3, 2, 2]])
    assert (frames[windows] == shown[windows]).all() and frames[windows].dtype == "uint8"


def test_jitter_keeps_within_its_bounds():
    """A white cross on grey, its centre found again; a flat picture, its brightness."""
    rng = np.random.default_rng(0)
    cross = np.zeros((200, 200, 3), "uint8")
    cross[95:105, 95:105] = 255
    flat = Image.new("RGB", (200, 200), (100, 100, 100))
    moves, lights = [], []
    for _ in range(60):
        y, x = np.argwhere(np.asarray(ts.jitter(Image.fromarray(cross), rng))[..., 0] > 100).mean(axis=0)
        moves.append([x - 99.5, y - 99.5])
        lights.append(np.asarray(ts.jitter(flat, rng))[50:150, 50:150].mean() / 100)
    assert 3 < np.abs(moves).max() <= 0.02 * 200 * 1.04 + 1
    assert 0.8 <= min(lights) < 0.95 and 1.05 < max(lights) <= 1.22
