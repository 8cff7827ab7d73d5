"""labels.csv: its forms, how its ids name frames, and which labels train."""

import numpy as np
import pandas as pd
import pytest
import scipy.io
from PIL import Image

import tscrowdnet_train as ts
from conftest import Stopped, digests_of, frame_paths, write_labels

FORMS = {
    "plain": b"id,count\n1,5\n2,0\n3,7\n",
    "other columns": b"weather,count,id\nsun,5,1\nrain,0,2\n,7,3\n",
    "byte-order mark": b"\xef\xbb\xbfid,count\n1,5\n2,0\n3,7\n",
    "Latin-1": "id,count,ort\n1,5,Caf\xe9\n2,0,a\n3,7,b\n".encode("latin-1"),
    "semicolons": b"id;count\n1;5\n2;0\n3;7\n",
    "tabs, spaces, capitals": b" ID\tCount \r\n1\t 5\r\n2\t0\r\n3\t7\r\n",
    "blank lines, whole floats": b"id,count\n1.0,5.0\n\n2,0\n3,7\n,\n",
    "quoted": b'"id","count"\n"1","5"\n2,0\n3,7\n',
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_labels(tmp_path, form):
    path = tmp_path / "labels.csv"
    path.write_bytes(FORMS[form])
    labels = ts.read_labels(path)
    assert labels["id"].tolist() == [1, 2, 3] and labels["count"].tolist() == [5, 0, 7]


def test_malls_own_annotation(tmp_path):
    path = tmp_path / "mall_gt.mat"
    heads = np.empty((1, 3), object)
    heads[:] = [[np.zeros((200, 2)), np.zeros((0, 2)), np.zeros((7, 2))]]
    scipy.io.savemat(path, {"count": np.array([[200], [0], [7]], "uint8"), "frame": heads})
    labels = ts.read_labels(path)
    assert labels["id"].tolist() == [1, 2, 3] and labels["count"].tolist() == [200, 0, 7]
    assert labels["count"].diff()[2] == -200, "uint8 counts must not wrap around"


def test_a_sheet_may_be_filled_in_here_and_there(tmp_path):
    """Counts may be fractions, such as sums of density maps; ids may be Unix times in ns."""
    path = tmp_path / "labels.csv"
    path.write_text("id,count\n1700000000000000001,38.006\n12,\n ,\n1700000000000000002, \n9,0\n")
    labels = ts.read_labels(path)
    assert labels["id"].tolist() == [1700000000000000001, 12, 1700000000000000002, 9]
    assert labels["count"].dropna().tolist() == [38.006, 0]


def test_paths_as_windows_writes_them_are_ids(tmp_path):
    (tmp_path / "labels.csv").write_text("id,count\nday 1\\1.jpg,5\n")
    assert ts.read_labels(tmp_path / "labels.csv")["id"].tolist() == ["day 1/1.jpg"]


NAMES = ["day 1/0001.jpg", "day 1/0002.jpg", "day 2/0001.jpg", "day 2/cam7_12.png", "cam7_12.jpg"]
IDS = {  # id: the places in NAMES that it fits
    2: [1],
    1: [0, 2],
    12: [3, 4],
    7: [],
    "day 2/0001.jpg": [2],
    "day 2/0001": [2],
    "0002.jpg": [1],
    "0002": [1],
    "0001": [0, 2],
    "cam7_12.jpg": [4],  # a whole path, though the other file has this name, too
    "cam7_12": [3, 4],
    "day 2": [],
}


def test_an_id_is_the_last_number_in_a_name_or_the_name():
    assert ts.find_names(IDS, NAMES) == list(IDS.values())


@pytest.mark.parametrize("form", ["frame_{}.JPG", "img{:04}.png", "2019_cam3_{:06}.bmp", "{}.jfif"])
def test_numbers_name_frames_of_any_pattern(video, constants, form):
    for path in frame_paths(video):
        with Image.open(path) as image:
            image.save(path.with_name(form.format(int(path.stem[4:]))),
                       format="JPEG" if form.endswith("jfif") else None)
        path.unlink()
    table, names, windows = ts.load_data()
    assert table["frame"].tolist() == [form.format(number) for number in range(1, 21)]
    assert names == table["frame"].tolist() and windows[:, -1].tolist() == list(range(20))


def test_names_as_counts_csv_has_them_are_ids(video, constants):
    """And give the same windows as numbers do, in whatever order they stand."""
    table, names, windows = ts.load_data()
    rows = list(zip(table["frame"], table["true"]))
    write_labels(video, rows[::-1])
    named, same_names, same_windows = ts.load_data()
    assert named["id"].tolist() == named["frame"].tolist() == table["frame"].tolist()
    assert named["true"].equals(table["true"]) and same_names == names
    assert (same_windows == windows).all()


def test_only_frames_that_windows_of_labels_show_are_read(video, run, loaded, capsys):
    """Labels 10, 11 and 20. Of the others, one cannot be read and one is not there."""
    labels = pd.read_csv(video / "labels.csv")
    is_labelled = labels["id"].isin([10, 11, 20])
    labels.assign(count=labels["count"].where(is_labelled)).to_csv(video / "labels.csv", index=False)
    (video / "frames" / "frames" / "seq_000001.jpg").write_bytes(b"unreadable, not asked for")
    (video / "frames" / "frames" / "seq_000018.jpg").unlink()
    _, table = run(AUGMENT=0, TRAIN_FRACTION=0.7)
    paths = frame_paths(video)
    expected = [paths[number - 1] for number in range(6, 12)] + paths[14:]  # 15, 16, 17, 19, 20
    assert set(loaded) == set(digests_of(expected))
    said = capsys.readouterr().out
    assert "3 labels: the first 2 train, the last 1 validate" in said
    assert "contain 11 of the frames" in said and "17 rows of labels.csv have no count yet" in said
    assert table["split"].tolist() == ["train", "train", "validation"]


def test_all_labels_can_train_and_nothing_passes_for_validation(finished, run, figures, capsys):
    metrics, table = run(TRAIN_FRACTION=1)
    assert (table["split"] == "train").all() and len(table) == 20
    assert metrics["train_frames"] == 20 and metrics["validation_frames"] == 0
    assert not {"mae", "mse", "baseline"} & set(metrics)
    said = capsys.readouterr().out
    assert "nothing is known of the error" in said and "MAE" not in said
    figures = {path.name for path in (finished / "outputs").glob("*.png")}
    assert figures == {"loss.png"}, "those of the model before are gone"


@pytest.mark.parametrize("is_bad", [False, True], ids=["good", "bad"])
def test_a_split_that_flatters_or_cannot_be_counted_is_named(video, constants, until, capsys, is_bad):
    """Copies of training frames that validate; true counts above all of training."""
    counts = [3] * 16 + ([3, 9, 8, 2] if is_bad else [1, 2, 3, 3])
    write_labels(video, enumerate(counts, 1))
    paths = frame_paths(video)
    for copy, source in ((17, 3), (18, 3), (19, 9)) if is_bad else ():
        paths[copy - 1].write_bytes(paths[source - 1].read_bytes())
    until("build_backbone")
    with pytest.raises(Stopped):
        ts.main()
    said = capsys.readouterr().out
    assert ("3 validation frames are copies of training frames" in said) is is_bad
    assert ("2 of 4 validation counts are above 3, the highest in training" in said) is is_bad
    assert ("copies" in said or "above" in said) is is_bad
