"""Bad input ends in one line that says what is wrong and what to do, and touches no result."""

import io
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.io
from PIL import Image

import tscrowdnet_train as ts
from conftest import Stopped, frame_paths, make_video, read_frames


def write(name, content):
    def prepare(folder):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return prepare


def labels(text):
    return write("labels.csv", text)


def remove(name):
    def prepare(folder):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return prepare


def frame(number, image, **options):
    file = io.BytesIO()
    image.save(file, **({"format": "JPEG"} | options))
    return write(f"frames/frames/seq_{number:06d}.jpg", file.getvalue())


def cut(name, end=b""):
    """The first half of a file, as a copy that was cut off leaves it."""

    def prepare(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2] + end)

    return prepare


def append(data):
    return lambda folder: frame_paths(folder)[2].open("ab").write(data)


def several(*preparations):
    return lambda folder: [prepare(folder) for prepare in preparations]


def sample_labels(folder):
    """The sample's labels.csv beside 200 other frames."""
    shutil.copy(Path(ts.__file__).with_name("labels.csv"), folder)
    for number in range(21, 201):
        shutil.copy(frame_paths(folder)[0], folder / f"frames/frames/seq_{number:06d}.jpg")


def rename(new):
    """All frames in other folders or with other names: new(number)."""

    def prepare(folder):
        for number, path in enumerate(frame_paths(folder), 1):
            target = folder / "frames" / "frames" / new(number)
            target.parent.mkdir(exist_ok=True)
            path.rename(target)

    return prepare


def link_to_nowhere(folder):
    path = frame_paths(folder)[6]
    path.unlink()
    path.symlink_to("nowhere.jpg")


def mat(**variables):
    file = io.BytesIO()
    scipy.io.savemat(file, variables)
    return write("mall_gt.mat", file.getvalue())


MAT = {"LABELS": "mall_gt.mat"}
SEQ_7 = "frames/frames/seq_000007"
CASES = {  # name: (what to do to the video, constants, parts of the message)
    # labels.csv
    "no labels file": (remove("labels.csv"), {}, ["labels.csv", "No such file", "LABELS"]),
    "empty labels": (labels(""), {}, ["labels.csv", "id,count"]),
    "no count yet": (labels("id,count\n5,\n10,\n15,\n20,\n"), {}, ["count the people in seq_000005.jpg, seq_000010.jpg, seq_000015.jpg"]),
    "wrong columns": (labels("frame,people\n1,2\n"), {}, ["labels.csv", "first line", "id,count"]),
    "UTF-16": (labels("id,count\n1,5\n".encode("utf-16")), {}, ["labels.csv", "id,count"]),
    "thousands with a comma": (labels("id,count\n1,1,234\n2,1,300\n"), {}, ["labels.csv", "line 2"]),
    "a count that is no number": (labels("id,count\n1,2\n\n2,many\n"), {}, ["row 4", "count 'many' is not a number"]),
    "a negative count": (labels("id,count\n1,2\n3,-4\n"), {}, ["row 3", "count '-4'"]),
    "a count without an id": (labels("id,count\n1,2\n,3\n"), {}, ["row 3", "id '' is empty"]),
    "an id twice": (labels("id,count\n1,2\n2,3\n1,4\n"), {}, ["row 4", "id '1' appears twice"]),
    "a name among numbers": (labels("id,count\n1,2\n2,3\nseq_3,4\n"), {}, ["row 4", "id 'seq_3' is unlike the others"]),
    "two names of one frame": (labels("id,count\nseq_000001,2\nseq_000001.jpg,3\nseq_000002,3\n"), {}, ["row 3", "names the same frame as id 'seq_000001'"]),
    "a .mat without counts": (mat(frame=np.zeros(3)), MAT, ["mall_gt.mat", "'count'"]),
    "half a .mat": (several(mat(count=np.arange(5000)), cut("mall_gt.mat")), MAT, ["mall_gt.mat", "make it a CSV"]),
    "labels of the sample": (sample_labels, {}, ["labels.csv", "labels of the sample", "LABELS"]),
    "none is left to validate": (labels("id,count\n1,2\n2,3\n"), {"TRAIN_FRACTION": 0.9}, ["has 2 labels", "TRAIN_FRACTION = 0.9 gives 2 to train and 0 to validate"]),
    # frames
    "no such folder": (remove("frames"), {}, ["frames: no such folder", "ffmpeg"]),
    "an empty folder": (several(remove("frames/frames"), write("frames/frames/a.heic", b"")), {}, ["no frames are there (but 1 .heic)", "ffmpeg"]),
    "missing frames": (several(*(remove(f"frames/frames/seq_{number:06d}.jpg") for number in (3, 4, 5, 6))), {}, ["4 of 20", "such as 3, 4, 5;", "has seq_000001.jpg ... seq_000020.jpg", "Do ids and names start at the same number?"]),
    "a number that fits two": (rename(lambda n: f"clip{n % 2}/{(n + 1) // 2:04d}.jpg"), {}, ["row 2: id 1 fits clip0/0001.jpg and clip1/0001.jpg; make paths the ids"]),
    "a kind that is not read": (lambda folder: (folder / f"{SEQ_7}.jpg").rename(folder / f"{SEQ_7}.heic"), {}, ["seq_000007.heic is of a kind not read"]),
    "a link to nowhere": (link_to_nowhere, {}, ["seq_000007.jpg is", "a link that leads nowhere"]),
    "five bad frames": (several(
        cut("frames/frames/seq_000002.jpg"), write("frames/frames/seq_000003.jpg", b""),
        frame(4, Image.new("1", (20_000, 10_000)), format="PNG"),
        cut("frames/frames/seq_000005.jpg", bytes(500)),
        frame(6, Image.fromarray(np.zeros((48, 64), "uint16")), format="PNG"),
    ), {}, ["5 of 20", "seq_000002.jpg: ", "truncated", "seq_000003.jpg: not an image"]),
    "a huge image": (frame(5, Image.new("1", (20_000, 10_000)), format="PNG"), {}, ["1 of 20", "seq_000005.jpg: ", "pixels"]),
    "16 bits": (frame(6, Image.fromarray(np.zeros((48, 64), "uint16")), format="PNG"), {}, ["seq_000006.jpg: ", "8 bits"]),
    "a JPEG that ends in zeros": (cut(f"{SEQ_7}.jpg", bytes(500)), {}, ["seq_000007.jpg", "ends in zeros"]),
    # weights, folders, network
    "no weight file": (None, {"WEIGHTS": "resnet.h5"}, ["resnet.h5: no such file", "correct WEIGHTS"]),
    "count without a model": (None, {"COUNT": "frames/frames", "OUTPUTS": "other"}, ["ts_crowdnet.keras: no such file", "train a model first"]),
    "no weights in it": (write("resnet.h5", b"404 not found"), {"WEIGHTS": "resnet.h5"}, ["resnet.h5", "ResNet50"]),
    "an unknown layer": (None, {"FEATURE_LAYERS_RANDOM": {"conv9": (1, 1)}}, ["FEATURE_LAYERS_RANDOM: no layer conv9", "take conv1_relu"]),
    "too many features": (None, {"FRAME_SIZE": (96, 128), "FEATURE_LAYERS_RANDOM": {"conv1_relu": (48, 64)}}, ["393,216 features", "coarser"]),
    "outputs is a file": (write("taken", b""), {"OUTPUTS": "taken"}, ["taken: cannot be written to; set OUTPUTS", "File exists"]),
    "the cache is below a file": (write("taken", b""), {"CACHE": "taken/cache"}, ["taken/cache: cannot be written to", "set CACHE"]),
    "a folder in a result's place": (write("outputs/history.csv/x", b""), {}, ["outputs/history.csv", "move it away"]),
    "a network that diverged": (None, {"LEARNING_RATE": 99, "EPOCHS": 2}, ["worse than always predicting", "earlier results stay"]),
    "count with a broken model": (None, {"COUNT": "frames/frames"}, ["ts_crowdnet.keras: cannot be opened with Keras", "train a model first"]),
} | {
    f"{name} = {value!r}": (None, {name: value}, [f"{name} = {value!r}: make it "])
    for name, value in [
        ("COUNT", ""), ("BATCH_SIZE", 2.5), ("SEED", None), ("CACHE", None), ("TRAIN_FRACTION", 80), ("FRAME_SIZE", (300.0, 400.0)),
        ("FRAME_SIZE", (16, 64)), ("FEATURE_LAYERS", {"conv1_relu": (0, 1)}), ("FEATURE_LAYERS_RANDOM", {}), ("NEIGHBOUR_RANGE", -1),
        ("LEARNING_RATE", float("nan")), ("PRECISION", "bf16"), ("CACHE_FEATURES", "no"), ("OPTIMIZER", "sdg"),
    ]
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_one_line_and_nothing_touched(case, video, constants):
    prepare, changes, parts = CASES[case]
    if prepare:
        prepare(video)
    constants(**changes)
    outputs = video / "outputs"
    outputs.mkdir(exist_ok=True)
    for name in ("ts_crowdnet.keras", "metrics.json"):
        (outputs / name).write_bytes(b"of an earlier run")
    with pytest.raises(SystemExit) as stop:
        ts.run_as_script()
    message = stop.value.code
    assert isinstance(message, str), "a message is exit status 1"
    assert message.startswith("Error: ") and "\n" not in message.strip() and len(message) < 600
    for part in parts:
        assert part in message
    for name in ("ts_crowdnet.keras", "metrics.json"):
        assert (outputs / name).read_bytes() == b"of an earlier run"
    assert not list(outputs.glob(".new-*"))


def test_arguments_are_refused(constants, monkeypatch, capsys):
    """They would do nothing, and an old model would be replaced."""
    monkeypatch.setattr(ts.sys, "argv", ["tscrowdnet_train.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        ts.run_as_script()
    assert stop.value.code == 2 and "takes no arguments" in capsys.readouterr().err


def test_a_full_disk_is_one_line(constants, monkeypatch):
    def full(*_, **__):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(ts.np, "savez", full)
    with pytest.raises(SystemExit, match="feature_cache.*No space left on device.*make room"):
        ts.run_as_script()


def test_in_development_mode_the_traceback_is_shown(constants, monkeypatch):
    """python -X dev, for whoever changes the script."""
    constants(LABELS="none.csv")
    monkeypatch.setattr(ts.sys, "flags", SimpleNamespace(dev_mode=True))
    with pytest.raises(ts.InputError) as refusal:
        ts.run_as_script()
    assert isinstance(refusal.value.__cause__, FileNotFoundError)


# -- Input that is odd, but can be used


IMAGES = {
    "grey": frame(3, Image.new("L", (64, 48), 90)),
    "CMYK": frame(3, Image.new("CMYK", (64, 48))),
    "with alpha": frame(3, Image.new("RGBA", (64, 48)), format="PNG"),
    "a palette": frame(3, Image.new("P", (64, 48)), format="GIF"),
    "another size": frame(3, Image.new("RGB", (131, 77))),
    "with a trailer": several(frame(3, Image.new("RGB", (64, 48))), append(b"META\0")),
    "one pixel": frame(3, Image.new("RGB", (1, 1))),
    "damaged EXIF data": frame(3, Image.new("RGB", (64, 48)), exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01"),
}  # fmt: skip


@pytest.mark.parametrize("kind", IMAGES)
def test_images_that_can_be_converted_are(kind, video, constants):
    IMAGES[kind](video)
    frames = read_frames(video)[[1, 2]]
    assert frames.shape == (2, 48, 64, 3) and frames.dtype == "uint8"


def test_images_are_turned_upright(video, constants):
    upright = Image.fromarray(np.tile(np.linspace(0, 255, 64).astype("uint8"), (48, 1)))
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate 90 degrees clockwise to see it upright"
    frame(3, upright.transpose(Image.Transpose.ROTATE_90), exif=exif, quality=95)(video)
    shown = read_frames(video)[2]
    assert np.abs(shown[..., 0].astype(int) - np.asarray(upright)).max() < 8
    paths = frame_paths(video)
    checked = ts.check_frames(paths, paths, None)
    assert (checked["width"] == 64).all() and (checked["height"] == 48).all()


DISTORTED = {  # FRAME_SIZE: (frames of 96x48 among the 20 of 64x48, what is said)
    (48, 64): (0, None),
    (48, 70): (0, None),
    (64, 48): (0, "distorts 20 of 20 frames, such as those of 64x48.\nFRAME_SIZE = (64, 85) keeps"),
    (96, 128): (3, "distorts 3 of 20 frames, such as those of 96x48.\n"),
}


@pytest.mark.parametrize("size", DISTORTED)
def test_a_size_that_distorts_is_said_with_one_that_does_not(video, constants, until, capsys, size):
    n_wide, said = DISTORTED[size]
    for number in range(7, 7 + n_wide):
        frame(number, Image.new("RGB", (96, 48)))(video)
    until("build_backbone")
    constants(FRAME_SIZE=size)
    with pytest.raises(Stopped):
        ts.main()
    out = capsys.readouterr().out
    assert said in out if said else "FRAME_SIZE" not in out
    assert ("keeps their shape" in out) is (size == (64, 48)), "advice for all, not for a few"


def test_further_pages_of_a_tiff_are_named(video, constants, until, capsys):
    pages = [Image.new("RGB", (64, 48), (shade,) * 3) for shade in (0, 99, 200)]
    path = frame_paths(video)[3]
    path.unlink()
    pages[0].save(path.with_suffix(".tif"), save_all=True, append_images=pages[1:])
    until("build_backbone")
    with pytest.raises(Stopped):
        ts.main()
    assert "Left out: 2 further pages of TIFF files" in capsys.readouterr().out


CHARACTERS = b"0123456789,;-.eE\"'\n\r\t\0 infa\xff"


def test_fuzzed_labels_and_images_end_in_success_or_one_line(tmp_path, constants, monkeypatch):
    rng = np.random.default_rng(0)
    folder = make_video(tmp_path / "fuzz", frames=6)
    monkeypatch.setattr(ts, "ROOT", folder)
    outcomes = set()
    for path in (folder / "labels.csv", frame_paths(folder)[1]) * 50:
        whole = path.read_bytes()
        data = bytearray(whole)
        for place in rng.integers(0, len(data), rng.integers(1, 6)):
            length = rng.integers(0, 9)
            data[place : place + rng.integers(0, 9)] = bytes(rng.choice(list(CHARACTERS), length))
        path.write_bytes(data if rng.random() < 0.8 else data[: len(data) // 2])
        try:
            table, names, _ = ts.load_data()
            paths = [folder / "frames" / "frames" / name for name in names]
            ts.Frames(paths, ts.check_data(names, paths, table, None), (48, 64))[range(len(paths))]
            assert table["true"].between(0, 1e6).all() and table["id"].is_unique
            outcomes.add("read")
        except ts.InputError:
            outcomes.add("refused")
        path.write_bytes(whole)
    assert outcomes == {"read", "refused"}
