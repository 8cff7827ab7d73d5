"""Bad input ends in one line that says what is wrong and what to do, and touches no earlier result."""

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
from conftest import make_video, read_frames


def write(name, content):
    def prepare(folder):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)

    return prepare


def labels(text):
    return write("labels.csv", text if isinstance(text, bytes) else text.encode())


def remove(name):
    def prepare(folder):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return prepare


def picture(frame, image, **options):
    file = io.BytesIO()
    image.save(file, **({"format": "JPEG"} | options))
    return write(f"frames/frames/seq_{frame:06d}.jpg", file.getvalue())


def truncate(name, keep):
    def prepare(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * keep)])

    return prepare


def zeros(name):
    """The second half of a file as a recorder leaves it that reserved room and was cut off."""

    def prepare(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2] + bytes(len(data) // 2))

    return prepare


def several(*preparations):
    return lambda folder: [prepare(folder) for prepare in preparations]


def sample_labels(folder):
    """The sample's labels.csv beside 200 other frames."""
    shutil.copy(Path(ts.__file__).with_name("labels.csv"), folder)
    for frame in range(21, 201):
        shutil.copy(folder / "frames/frames/seq_000001.jpg", folder / f"frames/frames/seq_{frame:06d}.jpg")


def mat(**variables):
    file = io.BytesIO()
    scipy.io.savemat(file, variables)
    return write("mall_gt.mat", file.getvalue())


def numbered(rows):
    return "id,count\n" + "".join(f"{row}\n" for row in rows)


MAT = {"LABELS": "mall_gt.mat"}
BOMB = Image.new("1", (20_000, 10_000))
CASES = {  # name: (what to do to the video, constants, parts of the message)
    "no labels file": (remove("labels.csv"), {}, ["labels.csv", "No such file", "LABELS"]),
    "labels is a folder": (None, {"LABELS": "frames"}, ["frames", "Is a directory"]),
    "empty labels": (labels(""), {}, ["labels.csv: it is empty", "id,count"]),
    "only a header": (labels("id,count\n"), {}, ["labels.csv has 0 labels", "lets 0 train"]),
    "a sheet not filled in": (labels("id,count\n1,\n2,\n"), {}, ["labels.csv has 0 labels", "write the counts"]),
    "not CSV": (labels(bytes(range(256)) * 20), {}, ["labels.csv", "id,count"]),
    "wrong columns": (labels("frame,people\n1,2\n"), {}, ["labels.csv: its first line has ['frame', 'people'], not id and count", "id,count"]),
    "a column twice": (labels("id,count,Count\n1,2,3\n"), {}, ["labels.csv", "first line", "id,count"]),
    "non-numeric count": (labels("id,count\n1,2\n2,many\n"), {}, ["row 3", "count", "'many'"]),
    "negative count": (labels("id,count\n1,2\n\n3,-4\n"), {}, ["row 4", "count", "'-4'"]),
    "count without an id": (labels("id,count\n1,2\n,3\n"), {}, ["row 3", "id", "no whole number"]),
    "infinite count": (labels("id,count\n1,inf\n"), {}, ["row 2", "count 'inf' is no number from 0 to 1,000,000"]),
    "absurd count": (labels("id,count\n1,1e300\n"), {}, ["row 2", "count"]),
    "duplicate id": (labels("id,count\n1,2\n2,3\n1,4\n"), {}, ["row 4", "id '1' is there twice"]),
    "fractional id": (labels("id,count\n1.5,2\n"), {}, ["row 2", "id '1.5' is no whole number from 0"]),
    "negative id": (labels("id,count\n-1,2\n"), {}, ["row 2", "id", "'-1'"]),
    "an id of 5,000 digits": (labels(f"id,count\n{'9' * 5000},2\n"), {}, ["row 2", "is no whole number from 0"]),
    "id a name": (labels("id,count\nseq_1,2\n"), {}, ["row 2", "id", "'seq_1'"]),
    "many bad rows": (labels("id,count\n1,a\n2,b\n3,c\n"), {}, ["row 2", "'a'"]),
    "bad row after blank lines": (labels("id,count\n\n\n1,5\n2,b\n"), {}, ["row 5", "'b'"]),
    "a column twice, alike": (labels("id,count,count\n1,2,3\n"), {}, ["labels.csv", "first line", "id,count"]),
    "thousands with a comma": (labels("id,count\n1,1,234\n2,1,300\n"), {}, ["labels.csv", "line 2"]),
    "a row longer than the others": (labels("id,count\n1,5\n2,3,4\n"), {}, ["labels.csv", "line 3"]),
    "no .mat file": (None, MAT, ["mall_gt.mat", "No such file"]),
    ".mat without count": (mat(frame=np.zeros(3)), MAT, ["mall_gt.mat", "'count'"]),
    ".mat with text for count": (mat(count="many"), MAT, ["mall_gt.mat", "'count' is no array of numbers"]),
    ".mat with cells for count": (mat(count=np.array([[1, 2], [3, 4, 5]], object)), MAT, ["mall_gt.mat", "'count' is no array of numbers"]),
    ".mat with a negative count": (mat(count=np.array([3, -2])), MAT, ["mall_gt.mat", "row 2"]),
    "truncated .mat": (several(mat(count=np.arange(5000)), truncate("mall_gt.mat", 0.5)), MAT, ["mall_gt.mat", "correct it: a CSV whose first line is id,count"]),
    "not MATLAB": (write("mall_gt.mat", b"id,count\n" * 99), MAT, ["mall_gt.mat", "correct it: a CSV whose first line is id,count"]),
    "no frames folder": (remove("frames"), {}, ["frames", "20 of 20", "no such folder; correct FRAMES"]),
    "empty frames folder": (several(remove("frames/frames"), write("frames/frames/readme", b"")), {}, ["20 of 20", "FRAMES"]),
    "missing frames": (
        several(*(remove(f"frames/frames/seq_{frame:06d}.jpg") for frame in (3, 4, 5, 6, 7, 8))),
        {},
        ["6 of 20", "3, 4, 5"],
    ),
    "every kind of bad frame at once": (
        several(
            truncate("frames/frames/seq_000002.jpg", 0.5),
            write("frames/frames/seq_000003.jpg", b""),
            write("frames/frames/seq_000004.jpg", b"<html>404</html>"),
            picture(5, BOMB, format="PNG"),
            picture(6, Image.fromarray(np.zeros((48, 64), "uint16")), format="PNG"),
        ),
        {},
        ["5 of 20", "seq_000002.jpg: ", "truncated", "seq_000003.jpg: "],
    ),
    "a decompression bomb": (picture(5, BOMB, format="PNG"), {}, ["1 of 20", "seq_000005.jpg: ", "pixels"]),
    "16 bits": (picture(6, Image.fromarray(np.zeros((48, 64), "uint16")), format="PNG"), {}, ["seq_000006.jpg: ", "8 bits"]),
    "not a picture": (write("frames/frames/seq_000004.jpg", b"<html>404</html>"), {}, ["1 of 20", "seq_000004.jpg: no picture"]),
    "all frames cut off": (several(*(truncate(f"frames/frames/seq_{frame:06d}.jpg", 0.5) for frame in range(1, 21))), {}, ["20 of 20"]),
    "ids one too low": (labels(numbered(f"{frame},3" for frame in range(20))), {}, ["frames", "1 of 20", "With 1 added to each, all are there"]),
    "ids one too high": (labels(numbered(f"{frame},3" for frame in range(2, 22))), {}, ["1 of 20", "With -1 added to each, all are there"]),
    "FRAMES one folder too high": (None, {"FRAMES": "frames"}, ["20 of 20", "they are in", "frames/frames: set FRAMES to it"]),
    "FRAMES one folder too low": (write("frames/frames/more/readme", b""), {"FRAMES": "frames/frames/more"}, ["20 of 20", "they are in", "frames/frames: set"]),
    "two frames with a number": (write("frames/frames/img7.png", b""), {}, ["img7.png and seq_000007.jpg", "one number"]),
    "two ids for a picture": (
        several(write("frames/frames/20240101_100059.jpg", b""), labels(numbered(["100059,3", "20240101100059,3", "2,4"]))),
        {},
        ["id 20240101100059 names a picture that another id names"],
    ),
    "labels of the sample, other pictures": (sample_labels, {}, ["labels.csv", "labels of the sample", "LABELS"]),
    "one frame": (labels(numbered(["1,2"])), {}, ["labels.csv has 1 labels: TRAIN_FRACTION = 0.8 lets 1 train and 0 validate"]),
    "nothing left to validate": (labels(numbered(["1,2", "2,3"])), {"TRAIN_FRACTION": 0.9, "SEQUENCE_LENGTH": 1}, ["lets 2 train and 0 validate"]),
    "one label, none to validate": (labels(numbered(["1,2"])), {"TRAIN_FRACTION": 1}, ["lets 1 train and 0 validate"]),
    "a folder named like a picture": (several(remove("frames/frames/seq_000003.jpg"), write("frames/frames/seq_000003.jpg/x", b"")), {}, ["1 of 20", "add those of ids [3]"]),
    "a JPEG that ends in zeros": (zeros("frames/frames/seq_000003.jpg"), {}, ["seq_000003.jpg", "ends in zeros"]),
    "weight file missing": (None, {"WEIGHTS": "resnet.h5"}, ["resnet.h5", "no such file"]),
    "weight file no HDF5": (write("resnet.h5", b"404 not found"), {"WEIGHTS": "resnet.h5"}, ["resnet.h5", "ResNet50"]),
    "unknown layer": (None, {"FEATURE_LAYERS_RANDOM": {"conv9": (1, 1)}}, ["FEATURE_LAYERS_RANDOM: no layer conv9 in ResNet50; take conv1_relu, conv2_block1_out"]),
    "no path": (None, {"LABELS": None}, ["LABELS = None: make it a path, in quotes"]),
    "COUNT is no switch": (None, {"COUNT": True}, ["COUNT = True: make it a path, in quotes, or None"]),
    "no precision": (None, {"PRECISION": "bf16"}, ["PRECISION = 'bf16'"]),
    "outputs is a file": (write("taken", b""), {"OUTPUTS": "taken"}, ["taken: cannot be written to (it is a file); set OUTPUTS to another folder"]),
    "outputs below a file": (write("taken", b""), {"OUTPUTS": "taken/outputs"}, ["taken/outputs: cannot be written to (Not a directory); set OUTPUTS"]),
    "the cache is a file": (write("taken", b""), {"CACHE": "taken"}, ["taken: cannot be written to (it is a file); set CACHE to another folder"]),
    "a folder in a result's place": (write("outputs/history.csv/x", b""), {}, ["outputs/history.csv", "move it away"]),
    "a folder in a figure's place": (write("outputs/examples.png/x", b""), {}, ["outputs/examples.png", "move it away"]),
    "grids too fine for memory": (None, {"FRAME_SIZE": (96, 128), "FEATURE_LAYERS_RANDOM": {"conv1_relu": (48, 64)}}, ["FEATURE_LAYERS_RANDOM: 393,216 features", "coarser"]),
    "no training labels": (None, {"TRAIN_FRACTION": 0}, ["has 20 labels: TRAIN_FRACTION = 0 lets 0 train and 20 validate; change it"]),
    "count a folder of folders": (None, {"COUNT": "frames"}, ["frames: no frames to count, but in", "frames/frames there are"]),
    "a diverged network": (None, {"LEARNING_RATE": 99}, ["did not learn", "earlier results are left"]),
    "a network that Adam killed": (None, {"LEARNING_RATE": 9.0, "OPTIMIZER": "adam"}, ["did not learn", "earlier results are left"]),
    "count without a model": (None, {"COUNT": "frames/frames", "OUTPUTS": "other"}, ["ts_crowdnet.keras", "train a model first"]),
    "count with a broken model": (None, {"COUNT": "frames/frames"}, ["ts_crowdnet.keras", "not written by this script"]),
} | {
    f"{name} = {value!r}": (None, {name: value}, [f"{name} = {value!r}: ", "make it"])
    for name, value in [
        ("TRAIN_FRACTION", 1.01), ("TRAIN_FRACTION", "most"), ("SEQUENCE_LENGTH", 1000), ("COMPONENTS", -1), ("CACHE", None),
        ("FEATURE_LAYERS", {}), ("FEATURE_LAYERS", {"conv1_relu": 3}), ("FEATURE_LAYERS_RANDOM", {"conv1_relu": (0, 1)}),
        ("FEATURE_LAYERS_RANDOM", {"conv1_relu": (1, 2, 3)}), ("FEATURE_LAYERS", ["conv1_relu"]), ("FEATURE_LAYERS", {"conv1_relu": (1.5, 2)}), ("SEQUENCE_LENGTH", 0), ("SEQUENCE_LENGTH", 2.5), ("EPOCHS", -1),
        ("EPOCHS", "many"), ("BATCH_SIZE", 0), ("FRAME_BATCH", 0), ("FRAME_SIZE", (16, 64)), ("FRAME_SIZE", 224), ("FRAME_SIZE", (224, 224, 3)), ("FRAME_SIZE", (300.0, 400.0)), ("FRAME_SIZE", ("300", "400")),
        ("LEARNING_RATE", float("nan")), ("LEARNING_RATE", 1e38), ("LSTM_DROPOUT", -1), ("LSTM_DROPOUT", 1.0), ("PROJECTION", -1), ("DENSE_UNITS", 0), ("OPTIMIZER", "sdg"), ("OPTIMIZER", {"class_name": "sgd", "config": {"momentun": 1}}),
        ("SEED", -1), ("SEED", 1.5), ("SEED", 2**32), ("TOLERANCE", -0.1), ("LEARNING_RATE", True), ("LEARNING_RATE", 0), ("CACHE_FEATURES", "no"), ("FEATURE_SPREAD", 1), ("OUTPUTS", ""), ("WEIGHTS", 5), ("LSTM_UNITS", 0),
        ("AUGMENT", 25), ("TOLERANCE", 20), ("TRAIN_FRACTION", 80),
        ("AUGMENT", -1), ("AUGMENT", 2), ("LEARNING_RATE", "low"), ("LEARNING_RATE", -0.03), ("FORGET_BIAS", None), ("FORGET_BIAS", "low"), ("SEQUENCE_LENGTH", (5, 5)), ("PRECISION", "bfloat16"), ("OPTIMIZER", None), ("UNFAMILIAR", "1.05"),
    ]  # fmt: skip
}


@pytest.mark.parametrize("case", CASES)
def test_one_line_and_nothing_touched(case, video, constants, capsys):
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


def test_a_full_disk_is_one_line(constants, monkeypatch):
    def full(*_, **__):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(ts.np, "savez", full)
    with pytest.raises(SystemExit, match="feature_cache.*cannot be written.*No space left on device"):
        ts.run_as_script()


def test_in_development_mode_the_traceback_is_shown(constants, monkeypatch):
    """python -X dev, for whoever changes the script."""
    constants(LABELS="none.csv")
    monkeypatch.setattr(ts.sys, "flags", SimpleNamespace(dev_mode=True))
    with pytest.raises(ts.InputError) as refusal:
        ts.run_as_script()
    assert isinstance(refusal.value.__cause__, FileNotFoundError)


@pytest.mark.parametrize(
    "prepare",
    [
        picture(3, Image.new("L", (64, 48), 90)),
        picture(3, Image.new("CMYK", (64, 48))),
        picture(3, Image.new("RGBA", (64, 48)), format="PNG"),
        picture(3, Image.new("P", (64, 48)), format="GIF"),
        picture(3, Image.new("RGB", (131, 77))),
        picture(3, Image.new("RGB", (1, 1))),
    ],
    ids=["grey", "CMYK", "PNG with alpha", "palette", "odd size", "one pixel"],
)
def test_images_that_can_be_converted_are(prepare, video, constants):
    prepare(video)
    frames = read_frames(video)[[1, 2]]
    assert frames.shape == (2, 48, 64, 3) and frames.dtype == "uint8"


def test_rotated_images_are_turned_upright(video, constants):
    upright = Image.fromarray(np.tile(np.linspace(0, 255, 64).astype("uint8"), (48, 1)))
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate 90 degrees clockwise to see it upright"
    picture(3, upright.transpose(Image.Transpose.ROTATE_90), exif=exif, quality=95)(video)
    shown = read_frames(video)[2]
    assert np.abs(shown[..., 0].astype(int) - np.asarray(upright)).max() < 8


def test_damaged_exif_data_do_not_hurt_the_picture(video, constants):
    picture(3, Image.new("RGB", (64, 48), (90, 90, 90)), exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01")(video)
    assert read_frames(video)[2].mean() == pytest.approx(90, abs=2)


def test_fuzzed_labels_and_images_end_in_success_or_one_line(tmp_path, constants, monkeypatch):
    rng = np.random.default_rng(0)
    make_video(tmp_path / "fuzz", frames=6)
    monkeypatch.setattr(ts, "ROOT", tmp_path / "fuzz")
    csv, jpg = tmp_path / "fuzz" / "labels.csv", tmp_path / "fuzz" / "frames" / "frames" / "seq_000002.jpg"
    whole = {csv: csv.read_bytes(), jpg: jpg.read_bytes()}
    outcomes = set()
    for trial in range(200):
        path = (csv, jpg)[trial % 2]
        data = bytearray(whole[path])
        for _ in range(rng.integers(1, 6)):
            if not data:
                break
            place = rng.integers(0, len(data))
            match rng.integers(0, 4):
                case 0:
                    data[place] = rng.integers(0, 256)
                case 1:
                    del data[place : place + rng.integers(1, 9)]
                case 2:
                    data[place:place] = bytes(rng.choice(list(b"0123456789,;-.eE\"'\n\r\t\0 infa\xff"), rng.integers(1, 9)))
                case 3:
                    data = data[: place + 1]
        path.write_bytes(data)
        try:
            labels = ts.read_labels(csv).dropna()
            if not len(labels):
                raise ts.InputError("as main() does")
            paths = ts.list_pictures(jpg.parent)
            ts.find_labelled(paths, labels.index)
            digests, problem = ts.digest_pictures(paths)
            if None in digests:
                raise ts.InputError(problem)
            ts.Frames(paths, digests, (48, 64))[range(len(paths))]
            outcomes.add("read")
            assert labels.between(0, 1e6).all() and labels.index.is_unique and labels.index.dtype == "int64"
        except ts.InputError:
            outcomes.add("refused")
        path.write_bytes(whole[path])
    assert outcomes == {"read", "refused"}
