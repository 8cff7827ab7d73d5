"""Counting new footage with a saved model."""

import shutil
import zipfile
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pytest
from PIL import Image

import tscrowdnet_train as ts


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
    assert not written["unfamiliar"].any() and "0 of 20 frames look like" in capsys.readouterr().out
    assert {"counts.png", "counts.pdf"} <= {path.name for path in (finished / "outputs").iterdir()}


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
    assert f"{marked.sum()} of {len(marked)} frames look like no training frame" in capsys.readouterr().out


def test_the_figure_of_counts_shades_single_frames_too():
    table = pd.DataFrame({"count": [3.0, 4, np.nan, 5], "unfamiliar": pd.array([False, True, pd.NA, False], "boolean")})
    (axes,) = ts.draw_counts(table)["counts"].axes
    (shade,) = axes.images
    assert shade.get_array().tolist() == [[0, 1, 1, 0]] and shade.get_extent()[:2] == [-0.5, 3.5]


def test_footage_is_taken_in_the_order_of_its_numbers(tmp_path):
    names = ["frame_1.jpg", "frame_2.PNG", "frame_10.jpeg", "frame_10b.webp", "frame_100.tif"]
    for name in [*names, "._frame_3.jpg", ".hidden", "clip.mpg", "notes.pdf"]:
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in ts.list_pictures(tmp_path)] == names


def test_the_readme_counts_a_window_without_this_project_as_count_people_does(finished, monkeypatch):
    """Frames of another size: how they are resized matters."""
    folder = finished / "frames" / "frames"
    for path in sorted(folder.iterdir()):
        Image.open(path).resize((150, 101)).save(path, quality=95)
    readme = (Path(ts.__file__).parent / "README.md").read_text()
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
    for model in (other, finished / "other.keras", finished / "labels.csv", finished / "none.keras"):
        with pytest.raises(ts.InputError, match="not written by this script"):
            ts.count_people(model, finished / "frames" / "frames")
    monkeypatch.setenv("HOME", str(finished))
    assert len(ts.count_people("~/outputs/ts_crowdnet.keras", "~/frames/frames")) == 20


def test_a_model_of_another_keras_is_refused_with_the_name_of_this_one(finished):
    """Saved by a version with an argument that this one does not know."""
    saved = finished / "outputs" / "ts_crowdnet.keras"
    newer = finished / "newer.keras"
    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(newer, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            if name == "config.json":
                data = data.replace(b'"unit_forget_bias": true', b'"unit_forget_bias": true, "unknown": 1')
            target.writestr(name, data)
    with pytest.raises(ts.InputError) as refusal:
        ts.count_people(newer, finished / "frames" / "frames")
    for part in ("newer.keras", keras.__version__, "unknown"):
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
    assert "2 of 20 frames cannot be read: seq_000007.jpg" in said
    counts = pd.read_csv(finished / "outputs" / "counts.csv", index_col="frame")
    assert counts.index.tolist() == whole.index.tolist(), "rows and files stay aligned"
    empty = counts["count"].isna()
    assert counts.index[empty].tolist() == ["seq_000007.jpg", "seq_000020.jpg"]
    assert counts["unfamiliar"].isna().equals(empty)
    far = [*range(6), *range(11, 19)]  # windows that did not hold the damaged frames
    np.testing.assert_allclose(counts["count"].iloc[far], whole["count"].iloc[far], atol=1e-3)


def test_footage_without_one_whole_frame_is_refused(finished):
    frames = finished / "frames" / "frames"
    Image.fromarray(np.zeros((48, 64), "uint16")).save(finished / "deep.png")
    with pytest.raises(ts.InputError, match="deep.png.*8 bits"):
        ts.count_people(finished / "outputs" / "ts_crowdnet.keras", [finished / "deep.png"])
    damage(frames, range(1, 21))
    with pytest.raises(ts.InputError, match="20 of 20 frames cannot be read") as refusal:
        ts.count_people(finished / "outputs" / "ts_crowdnet.keras", frames)
    assert len(str(refusal.value)) < 500


@pytest.mark.parametrize("form", ["array", "list of arrays", "list of texts"])
def test_frames_come_as_files_or_arrays(finished, form):
    paths = sorted((finished / "frames" / "frames").iterdir())[:3]
    arrays = np.stack([np.asarray(Image.open(path)) for path in paths])
    frames = {"array": arrays, "list of arrays": list(arrays), "list of texts": list(map(str, paths))}[form]
    model = keras.saving.load_model(finished / "outputs" / "ts_crowdnet.keras")
    expected = ts.count_people(model, paths)["count"].to_numpy()
    counts = ts.count_people(model, frames)["count"].to_numpy()
    np.testing.assert_allclose(counts, expected, atol=1e-3)


def test_arrays_that_are_no_pictures_are_refused(finished):
    model = finished / "outputs" / "ts_crowdnet.keras"
    for array in (np.zeros((2, 48, 64, 3)), np.zeros((48, 64, 3), "uint8"), np.zeros((2, 48, 64), "uint8")):
        with pytest.raises(ts.InputError, match=r"no frames to count.*array: .*(not \(H, W, 3\)|data type)"):
            ts.count_people(model, array)


def test_a_video_file_or_an_empty_folder_is_answered_with_the_command_that_makes_frames(finished):
    (finished / "clip.mp4").write_bytes(b"\0\0\0\x18ftypmp42")
    (finished / "clips").mkdir()
    for name in ("clip.mp4", "clips"):
        with pytest.raises(ts.InputError, match=f"{name}: no frames to count.*ffmpeg -i"):
            ts.count_people(finished / "outputs" / "ts_crowdnet.keras", finished / name)


def test_a_loaded_model_is_traced_once_for_all_calls(finished, monkeypatch):
    model = keras.saving.load_model(finished / "outputs" / "ts_crowdnet.keras")
    frames = np.stack([np.asarray(Image.open(path)) for path in sorted((finished / "frames" / "frames").iterdir())])
    ts.count_people(model, frames[:4])
    traced = []
    spatial = model.get_layer("spatial").layer
    call = type(spatial).call
    monkeypatch.setattr(type(spatial), "call", lambda *inputs, **options: traced.append(1) or call(*inputs, **options))
    first, second = (ts.count_people(model, frames[start : start + 4]) for start in (4, 8))
    assert not traced and (first["count"] != second["count"]).all()


def test_a_count_that_was_cut_short_goes_on_where_it_was(finished, constants, monkeypatch):
    footage = finished / "footage"
    footage.mkdir()
    for copy in range(5):
        for path in sorted((finished / "frames" / "frames").iterdir()):
            shutil.copy(path, footage / f"{copy}_{path.name}")
    constants(COUNT="footage")
    load, loaded = ts.Frames.load, []

    def fails_late(frames, row):
        loaded.append(row)
        if row > 70:
            raise KeyboardInterrupt
        return load(frames, row)

    monkeypatch.setattr(ts.Frames, "load", fails_late)
    with pytest.raises(KeyboardInterrupt):
        ts.main()
    assert min(loaded) == 0
    loaded.clear()
    monkeypatch.setattr(ts.Frames, "load", lambda frames, row: loaded.append(row) or load(frames, row))
    ts.main()
    assert min(loaded) == 60, "the first 64 are not counted again; 4 frames before the others are seen"
    counts = pd.read_csv(finished / "outputs" / "counts.csv", index_col="frame")["count"]
    expected = ts.count_people(finished / "outputs" / "ts_crowdnet.keras", footage)["count"]
    np.testing.assert_allclose(counts, expected, atol=1e-3)


def test_a_cache_leaves_the_other_files_of_its_folder_alone(finished):
    """With paths as text, as in the README."""
    paths = [str(path) for path in sorted((finished / "frames" / "frames").iterdir())[:3]]
    folder = finished / "outputs"
    before = sorted(folder.rglob("*"))
    counts = ts.count_people(str(folder / "ts_crowdnet.keras"), [*paths, "missing.jpg"], cache=str(folder))
    assert counts["count"].isna().tolist() == [False] * 3 + [True]
    (cache,) = set(folder.rglob("*")) - set(before)
    assert cache.name.startswith("cache_") and set(before) <= set(folder.rglob("*"))


def test_a_cache_knows_which_frames_could_be_read(finished):
    """Without its unreadable frame, the same footage has other windows."""
    paths, model = sorted((finished / "frames" / "frames").iterdir())[:6], finished / "outputs" / "ts_crowdnet.keras"
    damage(finished / "frames" / "frames", [3])
    ts.count_people(model, paths, cache=finished / "cache")
    del paths[2]
    again = ts.count_people(model, paths, cache=finished / "cache")["count"]
    np.testing.assert_allclose(again, ts.count_people(model, paths)["count"], atol=1e-4)
