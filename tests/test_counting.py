"""Counting new footage with a saved model."""

import json
import os
import re
import shutil
import warnings
import zipfile

import keras
import numpy as np
import pandas as pd
import pytest
from PIL import Image

import tscrowdnet_train as ts
from conftest import count, frame_paths


def test_counting_the_training_footage_gives_its_predictions(finished, constants, figures, capsys):
    table = pd.read_csv(finished / "outputs" / "predictions.csv")
    counts = count(finished)
    assert counts.index.tolist() == table["frame"].tolist() and counts.index.name == "frame"
    assert np.abs(counts["count"].to_numpy() - table["predicted"]).max() < 1e-3
    assert counts["count"].dtype == "float64" and json.dumps(counts["count"].iloc[0])
    constants(COUNT="frames/frames")
    ts.main()
    written = pd.read_csv(finished / "outputs" / "counts.csv")
    assert list(written.columns) == ["frame", "count", "unfamiliar"]
    np.testing.assert_allclose(written["count"], counts["count"], atol=1e-3)
    assert {"counts.png", "counts.pdf"} <= {path.name for path in (finished / "outputs").iterdir()}
    said = capsys.readouterr().out
    assert f"{counts['count'].mean():.1f} people on average in these frames." in said
    assert "counts.png" in said
    assert not written["unfamiliar"].any() and "0 of 20 frames look unlike" in said


@pytest.mark.parametrize("form", ["array", "arrays", "paths", "texts", "images", "one text", "one array"])
def test_frames_come_as_files_or_arrays(finished, form):
    paths = frame_paths(finished)[:3]
    expected = count(finished, paths)["count"].to_numpy()
    arrays = np.stack([np.asarray(Image.open(path)) for path in paths])
    forms = {"array": arrays, "arrays": list(arrays), "paths": paths, "texts": list(map(str, paths)),
             "images": list(map(Image.open, paths)), "one text": str(paths[0]), "one array": arrays[0]}
    names = {"paths": [path.as_posix() for path in paths], "one text": ["seq_000001.jpg"]}
    names |= {"texts": names["paths"], "one array": [0]}
    counts = count(finished, forms[form])
    assert counts.index.tolist() == names.get(form, [0, 1, 2])
    np.testing.assert_allclose(counts["count"], expected[: len(counts)], atol=1e-3)


def test_a_stream_that_refills_one_buffer_is_counted_frame_by_frame(finished):
    arrays = [np.asarray(Image.open(path)) for path in frame_paths(finished)[:6]]
    buffer = np.empty_like(arrays[0])

    def stream():
        for array in arrays:
            buffer[:] = array
            yield buffer

    counts = count(finished, stream())["count"]
    np.testing.assert_allclose(counts, count(finished, arrays)["count"], atol=1e-6)


def test_counting_again_and_again_is_quiet_and_compiles_nothing_anew(finished, capsys, monkeypatch):
    """From the model's path, as in a loop over a stream; other numbers of frames each time."""
    traced = []

    @keras.saving.register_keras_serializable("tests")
    class Witness(keras.layers.Layer):
        def call(self, inputs):
            traced.append(1)  # a function that is traced runs as Python
            return inputs

    model = finished / "outputs" / "ts_crowdnet.keras"
    saved = keras.saving.load_model(model)
    encoder = saved.get_layer("spatial").layer
    backbone = encoder.get_layer("backbone")
    backbone = keras.Model(backbone.input, Witness()(backbone.output), name="backbone")
    spatial = keras.Sequential([backbone, encoder.get_layer("reduction")], name="encoder")
    spatial = keras.layers.TimeDistributed(spatial, name="spatial")
    network = ts.build_network(spatial, saved.get_layer("temporal"), saved.get_layer("regression"))
    network.save(model)
    arrays = [np.asarray(Image.open(path)) for path in frame_paths(finished)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for n_frames in (5, 3, 1):
            ts.count_people(model, arrays[:n_frames])
        traced.clear()
        for n_frames in (2, 4, 6, 7, 5, 1):
            ts.count_people(model, arrays[:n_frames])
    assert not traced
    assert capsys.readouterr() == ("", "")


# -- What is unlike the training frames


ODD = {
    "black": lambda image: Image.new("RGB", image.size),
    "white": lambda image: Image.new("RGB", image.size, (255, 255, 255)),
    "upside down": lambda image: image.rotate(180),
    "noise": lambda image: Image.effect_noise(image.size, 90).convert("RGB"),
}


@pytest.mark.parametrize("is_spoilt", [False, True], ids=["", "one training frame is black"])
def test_frames_unlike_the_training_frames_are_marked(video, run, is_spoilt, capsys):
    """One odd training frame does not hide the others. Frames in other light, or from a nudged
    camera, are not marked as long as copies of such trained."""
    paths = frame_paths(video)
    if is_spoilt:
        Image.new("RGB", (64, 48)).save(paths[4])
    run(AUGMENT=0.5)
    footage = video / "footage"
    footage.mkdir()
    rng = np.random.default_rng(1)
    for path in paths[16:]:
        image = Image.open(path)
        ts.jitter(image, rng).save(footage / f"fine {path.name}", quality=95)
        for name, change in ODD.items():
            change(image).save(footage / f"odd {name} {path.name}", quality=95)
    run(COUNT="footage")
    table = pd.read_csv(video / "outputs" / "counts.csv", index_col="frame")
    is_odd = table.index.str.startswith("odd")
    marked = table["unfamiliar"]
    assert marked[is_odd].mean() > 0.9 and marked[~is_odd].mean() <= 0.5, marked.to_string()
    said = capsys.readouterr().out
    assert f"{marked.sum()} of {len(marked)} frames look unlike" in said
    mean = table["count"][~marked].mean()
    assert f"{mean:.1f} people on average in the {(~marked).sum()} familiar frames." in said


# -- What cannot be read


def damage(paths):
    """Cuts files off in the middle."""
    for path in paths:
        path.write_bytes(path.read_bytes()[:600])


def test_damaged_frames_have_an_empty_count_and_are_named(finished, constants, capsys):
    whole = count(finished)
    damage([frame_paths(finished)[number] for number in (6, 19)])
    constants(COUNT="frames/frames")
    ts.main()
    assert "2 of 20 frames cannot be read: seq_000007.jpg" in capsys.readouterr().out
    counts = pd.read_csv(finished / "outputs" / "counts.csv", index_col="frame")
    assert counts.index.tolist() == whole.index.tolist(), "rows and files stay aligned"
    is_empty = counts["count"].isna()
    assert counts.index[is_empty].tolist() == ["seq_000007.jpg", "seq_000020.jpg"]
    assert counts["unfamiliar"].isna().equals(is_empty)
    far = [*range(6), *range(11, 19)]  # windows that did not show the damaged frames
    np.testing.assert_allclose(counts["count"].iloc[far], whole["count"].iloc[far], atol=1e-3)


def test_footage_without_one_whole_frame_is_refused(finished):
    Image.fromarray(np.zeros((48, 64), "uint16")).save(finished / "deep.png")
    with pytest.raises(ts.InputError, match="deep.png.*8 bits"):
        count(finished, [finished / "deep.png"])
    damage(frame_paths(finished))
    with pytest.raises(ts.InputError, match="20 of 20 frames cannot be read") as refusal:
        count(finished)
    assert len(str(refusal.value)) < 500


def test_a_video_or_an_empty_folder_is_answered_with_the_command_that_makes_frames(finished):
    (finished / "clip.mp4").write_bytes(b"\0\0\0\x18ftypmp42")
    (finished / "clips").mkdir()
    problems = {"clip.mp4": "a file", "clips": "no frames are there", "none": "no such folder"}
    for name, problem in problems.items():
        with pytest.raises(ts.InputError, match=f"{name}: {problem}.*ffmpeg -i"):
            count(finished, finished / name)


def test_arrays_that_are_no_frames_are_refused(finished):
    shapes = (48, 64), (2, 48, 64), (2, 48, 64, 2), (2, 0, 64, 3)
    for array in (np.zeros((2, 48, 64, 3)), *(np.zeros(shape, "uint8") for shape in shapes)):
        with pytest.raises(ts.InputError, match=r" 0: .*(not \(H, W, 3\)|data type)"):
            count(finished, array)
    with pytest.raises(ts.InputError, match="empty"):
        count(finished, [])


def test_names_of_any_bytes_are_counted(finished, constants):
    """As Linux has them: not all are text."""
    odd = os.fsencode(finished / "frames" / "frames") + b"/caf\xe9_000021.jpg"
    try:
        shutil.copy(frame_paths(finished)[0], odd)
    except (OSError, UnicodeError) as error:
        pytest.skip(f"no such names here: {error}")
    constants(COUNT="frames/frames")
    ts.main()
    assert b"caf\xe9_000021.jpg," in (finished / "outputs" / "counts.csv").read_bytes()


# -- Models


def test_other_models_are_refused_in_a_line(finished):
    other = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    other.save(finished / "other.keras")
    frames = finished / "frames" / "frames"
    with pytest.raises(ts.InputError, match="none.keras: no such file; train a model first"):
        ts.count_people(finished / "none.keras", frames)
    for model in (other, finished / "other.keras", finished / "labels.csv"):
        with pytest.raises(ts.InputError, match="cannot be opened with Keras"):
            ts.count_people(model, frames)


def test_a_model_of_a_newer_keras_is_refused_with_the_reason(finished):
    newer = finished / "newer.keras"
    with zipfile.ZipFile(finished / "outputs" / "ts_crowdnet.keras") as source:
        with zipfile.ZipFile(newer, "w") as target:
            for name in source.namelist():
                data = source.read(name)
                if name == "config.json":
                    data = re.sub(b'("unit_forget_bias": true)', rb'\1, "unknown_option": 1', data)
                target.writestr(name, data)
    with pytest.raises(ts.InputError, match=f"{keras.__version__}.*unknown_option"):
        ts.count_people(newer, finished / "frames" / "frames")


def test_a_model_that_was_trained_anew_is_the_one_that_counts(finished, run, monkeypatch):
    """Though the path is the same."""
    before = count(finished)["count"].tolist()
    _, table = run(SEED=3)
    counts = count(finished)["count"].tolist()
    assert counts == pytest.approx(table["predicted"].tolist(), abs=1e-3) and counts != before


def test_a_loaded_model_counts_like_its_file(finished):
    model = keras.saving.load_model(finished / "outputs" / "ts_crowdnet.keras")
    counts = ts.count_people(model, frame_paths(finished))["count"].tolist()
    assert counts == pytest.approx(count(finished)["count"].tolist(), abs=1e-4)


def test_a_count_without_a_model_leaves_nothing_behind(video, constants):
    constants(COUNT="frames/frames")
    with pytest.raises(ts.InputError, match="train a model first"):
        ts.main()
    assert {path.name for path in video.iterdir()} == {"labels.csv", "frames"}


def test_a_folder_that_grows_costs_only_its_new_frames(finished, run, loaded, capsys):
    """And counts of an earlier model are told from those of the new one."""
    for n_new in (0, 1, 2):
        for number in range(n_new):
            path = finished / "frames" / "frames" / f"seq_{21 + number:06d}.jpg"
            Image.new("RGB", (64, 48), (99 * number, 0, 0)).save(path)
        loaded.clear()
        run(COUNT="frames/frames")
        assert len(loaded) == min(n_new, 1)
    assert len(pd.read_csv(finished / "outputs" / "counts.csv")) == 22
    assert "older than" not in capsys.readouterr().out
    run()
    assert "counts.csv is older than this model: count once more." in capsys.readouterr().out
