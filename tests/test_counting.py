"""Counting new footage with a saved model."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pytest
from PIL import Image

import tscrowdnet_train as ts
from conftest import README, make_video


def test_counting_new_footage_matches_the_predictions(finished, constants, capsys, figures):
    table = pd.read_csv(finished / "outputs" / "predictions.csv")
    model = finished / "outputs" / "ts_crowdnet.keras"
    counts = ts.count_people(str(model), finished / "frames" / "frames")
    assert counts.index[0] == "seq_000001.jpg" and len(counts) == 20 and counts.index.name == "frame"
    assert np.abs(counts["count"].to_numpy() - table["predicted"]).max() < 1e-3
    with pytest.raises(ts.InputError, match="no frames to count"):
        ts.count_people(model, [])
    some = sorted((finished / "frames" / "frames").iterdir())[:3]
    few = ts.count_people(keras.saving.load_model(model), some)
    np.testing.assert_allclose(few["count"], counts["count"][:3], atol=1e-3)
    constants(COUNT="frames/frames")
    ts.main()
    written = pd.read_csv(finished / "outputs" / "counts.csv", index_col="frame")
    np.testing.assert_allclose(written["count"], counts["count"], atol=1e-3)
    assert not written["unfamiliar"].any() and "0 of 20 frames look unlike" in capsys.readouterr().out
    assert {"counts.png", "counts.pdf"} <= {path.name for path in (finished / "outputs").iterdir()}


def test_a_count_without_a_model_leaves_nothing_behind(video, constants):
    constants(COUNT="frames/frames")
    with pytest.raises(ts.InputError, match="train a model first"):
        ts.main()
    assert {path.name for path in video.iterdir()} == {"labels.csv", "frames"}


def test_that_counts_cannot_be_written_is_said_before_the_counting(finished, constants, loaded):
    (finished / "outputs" / "counts.csv").mkdir()
    shutil.rmtree(finished / "feature_cache")
    constants(COUNT="frames/frames")
    with pytest.raises(ts.InputError, match="outputs/counts.csv: a folder where a file goes; move it away"):
        ts.main()
    assert not loaded


def test_frames_unlike_the_training_frames_are_marked(finished, constants, capsys):
    """Black, white, upside down and foreign frames; not those of other light or from a nudged camera."""
    footage = finished / "footage"
    footage.mkdir()
    rng = np.random.default_rng(1)
    for path in sorted((finished / "frames" / "frames").iterdir())[16:]:
        image = Image.open(path)
        ts.jitter(image, rng).save(footage / f"1-jittered-{path.name}", quality=95)
        image.rotate(180).save(footage / f"2-odd-{path.name}", quality=95)
    for name, colour in (("black", 0), ("white", 255)):
        Image.new("RGB", (64, 48), (colour,) * 3).save(footage / f"2-odd-{name}.png")
    sample = Path(ts.__file__).parent / "frames" / "frames" / "seq_000001.jpg"
    (footage / "2-odd-foreign.jpg").write_bytes(sample.read_bytes())
    constants(COUNT="footage")
    ts.main()
    marked = pd.read_csv(finished / "outputs" / "counts.csv", index_col="frame")["unfamiliar"]
    odd = marked.index.str.startswith("2-odd")
    assert marked[odd].all() and marked[~odd].mean() <= 0.5, marked.to_string()
    assert f"{marked.sum()} of {len(marked)} frames look unlike all training frames" in capsys.readouterr().out


def test_the_figure_of_counts_shades_single_frames_too():
    table = pd.DataFrame({"count": [3.0, 4, np.nan, 5], "unfamiliar": pd.array([False, True, pd.NA, False], "boolean")})
    (axes,) = ts.draw_counts(table).axes
    (shade,) = axes.images
    assert shade.get_array().tolist() == [[0, 1, 1, 0]] and shade.get_extent()[:2] == [-0.5, 3.5]


def test_footage_is_taken_in_the_order_of_its_numbers(tmp_path):
    names = ["frame_1.jpg", "frame_2.PNG", "frame_10.jpeg", "frame_10b.webp", "frame_100.tif"]
    names += [f"x_{number}.jpg" for number in (99999999999999, 100000000000000)]
    for name in [*names, "._frame_3.jpg", ".hidden", "clip.mpg", "notes.pdf"]:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "frame_3.jpg").mkdir()
    assert [path.name for path in ts.list_pictures(tmp_path)] == names


def test_the_readme_counts_a_window_without_this_project_as_count_people_does(finished, monkeypatch):
    """Frames of another size: how they are resized matters."""
    folder = finished / "frames" / "frames"
    for path in sorted(folder.iterdir()):
        Image.open(path).resize((150, 101)).save(path, quality=95)
    readme = README.read_text()
    block = readme.split("<!-- use -->")[1].split("```")[1].removeprefix("python\n")
    names = {}
    monkeypatch.chdir(finished)
    exec(block, names)
    counts = ts.count_people("outputs/ts_crowdnet.keras", "frames/frames")["count"]
    assert names["count"] == pytest.approx(counts.iloc[4], abs=1e-3)
    assert abs(names["count"] - counts.iloc[3]) > 1e-3


def test_another_model_is_refused_in_a_line(finished, constants, monkeypatch):
    other = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    other.save(finished / "other.keras")
    with pytest.raises(ts.InputError, match="none.keras: no such file; train a model first"):
        ts.count_people(finished / "none.keras", finished / "frames" / "frames")
    for model in (other, finished / "other.keras", finished / "labels.csv"):
        with pytest.raises(ts.InputError, match="not written by this script"):
            ts.count_people(model, finished / "frames" / "frames")
    monkeypatch.setenv("HOME", str(finished))
    assert len(ts.count_people("~/outputs/ts_crowdnet.keras", "~/frames/frames")) == 20


def test_a_model_of_another_keras_is_refused_with_both_names(finished):
    """Saved by a version with an argument that this one does not know."""
    saved = finished / "outputs" / "ts_crowdnet.keras"
    newer = finished / "newer.keras"
    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(newer, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            if name == "config.json":
                data = data.replace(b'"unit_forget_bias": true', b'"unit_forget_bias": true, "unknown": 1')
            if name == "metadata.json":
                data = data.replace(keras.__version__.encode(), b"99.0")
            target.writestr(name, data)
    with pytest.raises(ts.InputError) as refusal:
        ts.count_people(newer, finished / "frames" / "frames")
    for part in ("newer.keras", f"with Keras {keras.__version__} but with 99.0", "unknown"):
        assert part in str(refusal.value)


def damage(folder, frames):
    """Cuts these frames' files off in the middle."""
    for frame in frames:
        path = folder / f"seq_{frame:06d}.jpg"
        path.write_bytes(path.read_bytes()[:600])


def test_damaged_frames_have_an_empty_count_and_are_named(finished, constants, capsys):
    model = finished / "outputs" / "ts_crowdnet.keras"
    whole = ts.count_people(model, finished / "frames" / "frames")
    damage(finished / "frames" / "frames", [7, 20])
    constants(COUNT="frames/frames")
    ts.main()
    said = capsys.readouterr().out
    assert "2 of 20 pictures cannot be read: seq_000007.jpg" in said
    counts = pd.read_csv(finished / "outputs" / "counts.csv", index_col="frame")
    assert counts.index.tolist() == whole.index.tolist(), "rows and files stay aligned"
    empty = counts["count"].isna()
    assert counts.index[empty].tolist() == ["seq_000007.jpg", "seq_000020.jpg"]
    assert counts["unfamiliar"].isna().equals(empty)
    far = [*range(6), *range(11, 19)]  # windows that did not hold the damaged frames
    np.testing.assert_allclose(counts["count"].iloc[far], whole["count"].iloc[far], atol=1e-3)


def test_no_window_reaches_across_an_unreadable_picture(finished):
    """Whether its place is known from its name or from the order."""
    folder = finished / "frames" / "frames"
    arrays = [np.asarray(Image.open(path)) for path in sorted(folder.iterdir())[:8]]
    damage(folder, [4])
    model = keras.saving.load_model(finished / "outputs" / "ts_crowdnet.keras")
    apart = [*ts.count_people(model, arrays[:3])["count"], *ts.count_people(model, arrays[4:])["count"]]
    broken = [*arrays[:3], np.zeros((2, 2)), *arrays[4:]]
    for frames in (broken, sorted(folder.iterdir())[:8]):
        assert ts.count_people(model, frames)["count"].dropna().tolist() == pytest.approx(apart, abs=1e-5)


def test_footage_without_one_whole_frame_is_refused(finished):
    frames = finished / "frames" / "frames"
    Image.fromarray(np.zeros((48, 64), "uint16")).save(finished / "deep.png")
    with pytest.raises(ts.InputError, match="deep.png.*8 bits"):
        ts.count_people(finished / "outputs" / "ts_crowdnet.keras", [finished / "deep.png"])
    damage(frames, range(1, 21))
    with pytest.raises(ts.InputError, match="20 of 20 pictures cannot be read") as refusal:
        ts.count_people(finished / "outputs" / "ts_crowdnet.keras", frames)
    assert len(str(refusal.value)) < 500


@pytest.mark.parametrize("form", ["array", "list of arrays", "list of texts", "images"])
def test_frames_come_as_files_or_arrays(finished, form):
    paths = sorted((finished / "frames" / "frames").iterdir())[:3]
    arrays = np.stack([np.asarray(Image.open(path)) for path in paths])
    frames = {"array": arrays, "list of arrays": list(arrays), "list of texts": list(map(str, paths)), "images": list(map(Image.open, paths))}[form]
    model = keras.saving.load_model(finished / "outputs" / "ts_crowdnet.keras")
    expected = ts.count_people(model, paths)["count"].to_numpy()
    counts = ts.count_people(model, frames)["count"].to_numpy()
    np.testing.assert_allclose(counts, expected, atol=1e-3)
    one = ts.count_people(model, str(paths[0]))["count"]
    assert one.index.tolist() == ["seq_000001.jpg"] and one.iloc[0] == pytest.approx(expected[0], abs=1e-3)


def test_arrays_that_are_no_pictures_are_refused(finished):
    model = finished / "outputs" / "ts_crowdnet.keras"
    shapes = (48, 64, 3), (2, 48, 64), (2, 48, 64, 2), (2, 0, 64, 3)
    for array in (np.zeros((2, 48, 64, 3)), *(np.zeros(shape, "uint8") for shape in shapes)):
        with pytest.raises(ts.InputError, match=r"no frames to count.*array: .*(not \(H, W, 3\)|data type)"):
            ts.count_people(model, array)


def test_a_video_file_or_an_empty_folder_is_answered_with_the_command_that_makes_frames(finished):
    (finished / "clip.mp4").write_bytes(b"\0\0\0\x18ftypmp42")
    (finished / "clips").mkdir()
    for name, problem in (("clip.mp4", "no frames to count"), ("clips", "no frames to count"), ("none", "no such folder or picture")):
        with pytest.raises(ts.InputError, match=f"{name}: {problem}.*ffmpeg -i"):
            ts.count_people(finished / "outputs" / "ts_crowdnet.keras", finished / name)


def test_a_loaded_model_is_traced_once_for_all_calls(finished):
    """With as many frames in each call. A function that is traced runs as Python, which the counter sees."""
    traced = []

    @keras.saving.register_keras_serializable("tests")
    class Witness(keras.layers.Layer):
        def call(self, inputs):
            traced.append(1)
            return inputs

    saved = keras.saving.load_model(finished / "outputs" / "ts_crowdnet.keras")
    encoder, temporal, regression = saved.get_layer("spatial").layer, saved.get_layer("temporal"), saved.get_layer("regression")
    frame = encoder.get_layer("backbone")
    frame = keras.Model(frame.input, Witness()(frame.output), name="backbone")
    encoder = keras.Sequential([frame, encoder.get_layer("reduction")])
    model = ts.build_network(keras.layers.TimeDistributed(encoder, name="spatial"), temporal, regression)
    frames = np.stack([np.asarray(Image.open(path)) for path in sorted((finished / "frames" / "frames").iterdir())])
    ts.count_people(model, frames[:4])
    assert traced
    traced.clear()
    first, second = (ts.count_people(model, frames[start : start + 4]) for start in (4, 8))
    assert not traced and (first["count"] != second["count"]).all()


@pytest.fixture
def loaded(monkeypatch):
    """The names of the pictures that ResNet50 is given."""
    names, load = [], ts.Frames.load

    def note(frames, row):
        names.append(getattr(frames.sources[row], "name", row))
        return load(frames, row)

    monkeypatch.setattr(ts.Frames, "load", note)
    return names


def test_names_of_any_bytes_are_counted(finished, constants):
    """As Linux has them: not all are text."""
    odd = os.fsencode(finished / "frames" / "frames") + b"/caf\xe9_000021.jpg"
    try:
        shutil.copy(finished / "frames" / "frames" / "seq_000001.jpg", odd)
    except (OSError, UnicodeError) as error:
        pytest.skip(f"no such names here: {error}")
    constants(COUNT="frames/frames")
    ts.main()
    assert b"caf\xe9_000021.jpg," in (finished / "outputs" / "counts.csv").read_bytes()


def test_a_path_is_named_however_long(finished):
    folder = finished / ("a" * 120)
    with pytest.raises(ts.InputError, match=f"{folder}: no such folder"):
        ts.count_people(finished / "outputs" / "ts_crowdnet.keras", folder)
    folder.mkdir()
    (folder / "1.jpg").write_bytes(b"")
    with pytest.raises(ts.InputError, match=f"{folder}: no frames to count"):
        ts.count_people(finished / "outputs" / "ts_crowdnet.keras", folder)


def test_a_count_that_was_cut_short_goes_on_where_it_was(finished, constants, monkeypatch, loaded):
    """And a growing folder costs only its new pictures."""
    constants(COUNT="frames/frames", FRAME_BATCH=1)
    shutil.rmtree(finished / "feature_cache")
    new = [f"seq_{frame:06d}.jpg" for frame in range(1, 21)]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ts, "write_files", interrupt_after(1, ts.write_files))
        ts.main()
    assert set(loaded) >= set(new[:8])
    loaded.clear()
    ts.main()
    assert sorted(loaded) == new[8:], "the first 8 are not read again"
    counts = pd.read_csv(finished / "outputs" / "counts.csv", index_col="frame")["count"]
    expected = ts.count_people(finished / "outputs" / "ts_crowdnet.keras", finished / "frames" / "frames")["count"]
    np.testing.assert_allclose(counts, expected, atol=1e-3)
    Image.new("RGB", (64, 48)).save(finished / "frames" / "frames" / "seq_000021.jpg")
    loaded.clear()
    ts.main()
    assert loaded == ["seq_000021.jpg"]


def interrupt_after(calls, function):
    """function, which from so many calls on is interrupted before it begins."""
    made = []

    def interrupted(*arguments):
        if len(made) == calls:
            raise KeyboardInterrupt
        made.append(1)
        return function(*arguments)

    return interrupted


@pytest.mark.parametrize("model", ["path", "loaded"])
def test_a_cache_leaves_the_other_files_of_its_folder_alone(finished, monkeypatch, loaded, model):
    """With paths as text, as in the README, some of them of the user's home; and with arrays."""
    monkeypatch.setenv("HOME", str(finished))
    folder = finished / "mine"
    folder.mkdir()
    for name in ("cache_of_mine.npz", "notes.txt"):
        (folder / name).write_bytes(b"mine")
    paths = [f"~/frames/frames/seq_{frame:06d}.jpg" for frame in (1, 2, 3)]
    network = "~/outputs/ts_crowdnet.keras"
    if model == "loaded":
        network = keras.saving.load_model(finished / "outputs" / "ts_crowdnet.keras")
    for _ in range(2):
        counts = ts.count_people(network, [*paths, "missing.jpg", np.zeros((48, 64, 3), "uint8")], cache="~/mine")
        assert counts["count"].isna().tolist() == [False] * 3 + [True, False]
    assert len(loaded) == 4, "the second time all are known"
    assert [(folder / name).read_bytes() for name in ("cache_of_mine.npz", "notes.txt")] == [b"mine"] * 2


def test_two_cameras_of_equal_names_sizes_and_times_do_not_share_features(finished, loaded):
    """As a zip file or git leave them."""
    cameras = []
    for shade in (0, 200):
        folder = finished / f"camera {shade}"
        folder.mkdir()
        Image.new("RGB", (64, 48), (shade,) * 3).save(folder / "frame_1.bmp")
        picture = np.random.default_rng(shade).integers(0, 255, (48, 64, 3)).astype("uint8")
        Image.fromarray(picture).save(folder / "frame_2.bmp")
        for path in folder.iterdir():
            os.utime(path, (1e9, 1e9))
        cameras.append(folder)
    model = keras.saving.load_model(finished / "outputs" / "ts_crowdnet.keras")
    apart = [ts.count_people(model, folder)["count"].iloc[1] for folder in cameras]
    loaded.clear()
    cached = [ts.count_people(model, folder, cache=finished / "cache")["count"].iloc[1] for folder in cameras]
    assert loaded == ["frame_1.bmp", "frame_2.bmp"] * 2 and cached == pytest.approx(apart, abs=1e-4) and cached[0] != cached[1]


def keep(frames):
    """Keeps these of the 20 pictures."""

    def prepare(folder):
        for path in (folder / "frames" / "frames").iterdir():
            if int(path.stem[4:]) not in frames:
                path.unlink()
        labels = pd.read_csv(folder / "labels.csv")
        labels[labels["id"].isin(frames)].to_csv(folder / "labels.csv", index=False)

    return prepare


def label(frames):
    """Leaves these of the 20 labels."""

    def prepare(folder):
        labels = pd.read_csv(folder / "labels.csv")
        labels.assign(count=labels["count"].where(labels["id"].isin(frames))).to_csv(folder / "labels.csv", index=False)

    return prepare


FOLDERS = {
    "consecutive": (lambda folder: None, 16),
    "strided": (keep(range(1, 21, 2)), 6),
    "broken": (keep([*range(1, 8), *range(12, 21)]), 8),
    "bursts": (keep([1, 2, 3, 7, 8, 9, 13, 14, 15, 19, 20]), 0),
    "sparsely labelled": (label([5, 9, 13, 17, 20]), 5),
    "a stray picture without a number": (lambda folder: Image.new("RGB", (64, 48)).save(folder / "frames/frames/empty.png"), 17),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_training_and_counting_see_the_same_windows(case, video, run, capsys):
    prepare, whole = FOLDERS[case]
    prepare(video)
    _, table = run(EPOCHS=1)
    labels = pd.read_csv(video / "labels.csv").dropna()
    assert table["id"].tolist() == labels["id"].tolist() and table["true"].tolist() == labels["count"].tolist()
    run(COUNT="frames/frames")
    said = capsys.readouterr().out
    counts = pd.read_csv(video / "outputs" / "counts.csv", index_col="frame")["count"]
    counts = counts[[f"seq_{frame:06d}.jpg" for frame in table["id"]]]
    assert np.abs(counts.to_numpy() - table["predicted"]).max() < 2e-3
    if case != "a stray picture without a number":
        assert f"{len(labels)} windows, {whole} of them whole" in said


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="ffmpeg is not installed")
def test_the_readme_s_ffmpeg_makes_a_good_picture_of_each_second(tmp_path):
    """Its own default is a number of bytes, too few for pictures a second apart."""
    video = make_video(tmp_path / "clip", frames=4, size=(640, 480))
    command = README.read_text().split("<!-- recipe -->")[1].split("\n")[2]
    pictures = ts.list_pictures(video / "frames" / "frames")
    before = [np.asarray(Image.open(path), int) for path in pictures]
    clip = "ffmpeg -loglevel error -framerate 1 -i frames/frames/seq_%06d.jpg -c:v mjpeg -q:v 2 video.mp4"
    subprocess.run(clip.split(), check=True, cwd=video)
    shutil.rmtree(video / "frames" / "frames")
    (video / "frames" / "frames").mkdir()
    subprocess.run(command.split(), check=True, cwd=video, stdin=subprocess.DEVNULL)
    assert ts.list_pictures(video / "frames" / "frames") == pictures
    for path, picture in zip(pictures, before):
        assert np.abs(np.asarray(Image.open(path), int) - picture).mean() < 1.5, path


def test_the_readme_leads_from_a_video_to_counts(tmp_path, constants, monkeypatch, capsys):
    """Its commands as written, after ffmpeg's: a sheet, filled in for every 10th of 100 pictures; training; counting the rest."""
    ffmpeg, sheet, train, count = README.read_text().split("<!-- recipe -->")[1].strip().split("\n\n")[0].splitlines()
    assert "ffmpeg" in ffmpeg and train.split() == ["python", "tscrowdnet_train.py"]
    video = make_video(tmp_path / "clip", frames=100)
    counts = pd.read_csv(video / "labels.csv", index_col="id")["count"]
    subprocess.run(sheet.strip().replace("python", sys.executable, 1), shell=True, check=True, cwd=video)
    rows = pd.read_csv(video / "labels.csv", index_col="id")
    assert rows.index.tolist() == list(range(10, 2001, 10)) and rows["count"].isna().all()
    rows["count"].fillna(counts).to_csv(video / "labels.csv")
    monkeypatch.setattr(ts, "ROOT", video)
    monkeypatch.setattr(ts, "COUNT", None)  # which the last command changes
    ts.main()
    said = capsys.readouterr().out
    assert "100 pictures, 10 labels: the first 8 train, the last 2 validate; 50 pictures read." in said
    assert "90 pictures have no label, 190 rows no count" in said
    exec(count.split('"')[1])
    counts = pd.read_csv(video / "outputs" / "counts.csv")["count"]
    assert len(counts) == 100 and counts.ge(0).all()
