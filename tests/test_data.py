"""Windows, split, Sequence, label formats and metrics."""


import numpy as np
import pytest
import scipy.io
from PIL import Image

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
    return lambda **options: ts.WindowSequence(source, windows, np.arange(10) + 100.0, **options)


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
    def epochs():
        training = sequence(copy_of=np.arange(10))
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


def test_about_half_of_the_windows_show_copies_and_every_epoch_draws_anew(monkeypatch):
    """Frames 0, 4 and 8 have copies, in rows 10, 11 and 12; a window shows all of its copies or none."""
    monkeypatch.setattr(ts, "BATCH_SIZE", 4)
    copy_of = np.arange(10)
    copy_of[[0, 4, 8]] = [10, 11, 12]
    windows = ts.make_windows(np.arange(10), 3)
    training = ts.WindowSequence(np.arange(13.0)[:, None], windows, np.arange(10.0), copy_of)
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
    "quoted names": b'"id","count"\n"1","5"\n2,0\n3,7\n',
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
    assert ts.measure(np.zeros(3), np.array([0.0, 0.49, 0.51]))["accuracy"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("name", ["frame_{}.JPG", "img{:04}.png", "seq_{}.jpeg", "2019_cam3_{:06}.bmp"])
def test_frames_are_matched_by_the_last_number_in_their_names(video, constants, name):
    folder = video / "frames" / "frames"
    for path in folder.iterdir():
        Image.open(path).save(folder / name.format(int(path.stem[4:])))
        path.unlink()
    assert [path.name for path in ts.find_frames([1, 2, 20])] == [name.format(frame) for frame in (1, 2, 20)]


def test_copies_show_the_same_scene_in_other_light_from_a_nudged_camera(video, constants):
    constants(AUGMENT=1)
    paths = ts.find_frames([1, 2]) * 2
    frames = ts.Frames(paths, (48, 64), n_train=4)
    assert len(frames.sources) == 8 and frames.copy_of.tolist() == [4, 5, 6, 7]
    shown = frames[np.arange(8)].astype(float)
    with Image.open(paths[0]) as image:
        assert (shown[0] == np.asarray(image)).all(), "frames themselves stay as they are"
    for frame, copy in enumerate(frames.copy_of):
        change = np.abs(shown[copy] - shown[frame]).mean()
        assert 2 < change < 60, "changed, but not beyond recognition"
    assert np.abs(shown[4] - shown[6]).mean() > 2, "each copy in a way of its own"
    assert (frames[[4]] == shown[4]).all(), "and always the same for the same SEED"
    constants(SEED=1)
    assert np.abs(frames[[4]] - shown[4]).mean() > 2


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
