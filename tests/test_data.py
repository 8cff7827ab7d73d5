"""Windows, split, Sequence, label formats and metrics."""

import numpy as np
import pytest
import scipy.io

import tscrowdnet_train as ts


def windows_by_definition(ids, length):
    """The window of each frame by walking back one id at a time."""
    row = {frame: place for place, frame in enumerate(ids)}
    found = []
    for frame in ids:
        window = [frame]
        while len(window) < length:
            window.insert(0, window[0] - 1 if window[0] - 1 in row else window[0])
        found.append([row[frame] for frame in window])
    return np.array(found)


@pytest.mark.parametrize("length", range(1, 9))
@pytest.mark.parametrize("ids", [[1, 2, 3, 4, 5, 6, 7], [7, 8, 9, 20, 21, 22, 23, 40], [5], [1, 3, 5, 7]])
def test_windows(ids, length):
    windows = ts.make_windows(np.array(ids), length)
    assert windows.tolist() == windows_by_definition(ids, length).tolist()
    assert (windows[:, -1] == np.arange(len(ids))).all(), "one window for each frame, ending at it"


def test_windows_worked_by_hand():
    assert ts.make_windows(np.array([1, 2, 3, 7, 8]), 3).tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 2], [3, 3, 3], [3, 3, 4]]


@pytest.fixture
def sequence(monkeypatch):
    monkeypatch.setattr(ts, "BATCH_SIZE", 4)
    source = np.arange(10.0)[:, None] * [1, 10]  # feature values tell their row
    windows = ts.make_windows(np.arange(10), 3)
    return lambda **options: ts.WindowSequence(source, windows, np.arange(10)[:, None] + 100.0, ts.BATCH_SIZE, **options)


def read(sequence):
    batches = [sequence[batch] for batch in range(len(sequence))]
    return np.concatenate([x for x, _ in batches]), np.concatenate([y for _, y in batches])[:, 0]


def test_sequence_covers_every_window_in_order_and_keeps_the_tail(sequence):
    x, y = read(sequence())
    assert [len(sequence()[batch][0]) for batch in range(3)] == [4, 4, 2]
    assert y.tolist() == (np.arange(10) + 100).tolist()
    assert x[:, :, 0].tolist() == ts.make_windows(np.arange(10), 3).tolist()
    assert (x[:, :, 1] == 10 * x[:, :, 0]).all()


def test_sequence_shuffles_anew_each_epoch_and_alike_for_one_seed(sequence, monkeypatch):
    def epochs(first=0):
        training = sequence(shuffle=True)
        training.on_epoch_end(epochs=first)
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
    assert epochs(first=1)[0] == first[1], "a resumed run draws the order of the epoch it is in"
    monkeypatch.setattr(ts, "SEED", 1)
    assert epochs() != first


def test_sequence_reads_a_shared_frame_once(sequence):
    class Counting:
        def __init__(self, data):
            self.data, self.rows = data, []

        def __getitem__(self, rows):
            self.rows.append(rows)
            return self.data[rows]

    plain = sequence()
    plain.source = Counting(plain.source)
    plain[1]
    assert plain.source.rows[0].tolist() == [2, 3, 4, 5, 6, 7]


LABELS = {
    "plain": b"id,count\n1,5\n2,0\n3,7\n",
    "any order, other columns, unsorted": b"weather,count,id\nsun,7,3\nrain,5,1\n,0,2\n",
    "byte-order mark": b"\xef\xbb\xbfid,count\n1,5\n2,0\n3,7\n",
    "UTF-16": "id,count\n1,5\n2,0\n3,7\n".encode("utf-16"),
    "Latin-1": "id,count,ort\n1,5,Caf\xe9\n2,0,a\n3,7,b\n".encode("latin-1"),
    "semicolons": b"id;count\n1;5\n2;0\n3;7\n",
    "tabs, spaces, capitals": b" ID\tCount \r\n1\t 5\r\n2\t0\r\n3\t7\r\n",
    "blank lines, whole floats": b"id,count\n1.0,5.0\n\n2,0\n3,7\n\n",
}


@pytest.mark.parametrize("text", LABELS.values(), ids=LABELS.keys())
def test_label_formats(tmp_path, text):
    path = tmp_path / "labels.csv"
    path.write_bytes(text)
    labels = ts.read_labels(path)
    assert labels.index.tolist() == [1, 2, 3] and labels.tolist() == [5, 0, 7]


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
    assert metrics["pearson_r"] == pytest.approx(np.corrcoef(true, predicted)[0, 1])


def test_metrics_of_a_true_zero_and_of_constant_counts():
    assert ts.accurate(np.zeros(3), np.array([0.0, 0.49, 0.51])).tolist() == [True, True, False]
    assert ts.measure(np.array([3.0, 3]), np.array([1.0, 2]))["pearson_r"] is None
    assert ts.measure(np.array([3.0]), np.array([3.0]))["pearson_r"] is None


def test_frames_are_found_in_the_parent_folder_too(video, constants):
    expected = ts.find_frames([1, 2])
    for path in (video / "frames" / "frames").iterdir():
        path.rename(video / "frames" / path.name)
    (video / "frames" / "frames").rmdir()
    paths, digest = ts.find_frames([1, 2])
    assert [path.name for path in paths] == ["seq_000001.jpg", "seq_000002.jpg"] and digest == expected[1]
