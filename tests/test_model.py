"""Features against the whole model, both ways of training, weights and calibration."""

import subprocess
import sys

import keras
import numpy as np
import pandas as pd
import pytest

from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, PredefinedSplit
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer

import tscrowdnet_train as ts


@pytest.fixture
def parts(video, constants):
    """(frames, windows, counts, backbone, features) of the tiny video, as main() makes them."""
    labels = ts.read_labels(video / "labels.csv")
    paths, _ = ts.find_frames(labels.index)
    frames = ts.Frames(paths, ts.FRAME_SIZE)
    constants(CALIBRATION_FRAMES=8)
    backbone, *_ = ts.prepare_backbone(frames, np.arange(8))
    features = ts.extract_features(backbone, frames, video / "features-0.float32")
    return frames, ts.make_windows(labels.index.to_numpy(), ts.SEQUENCE_LENGTH), labels.to_numpy(), backbone, features


def new_head(counts):
    keras.utils.set_random_seed(0)
    return ts.build_head(counts)


def test_the_saved_model_predicts_on_frames_what_the_head_predicted_on_estimates(run, video, parts, tmp_path):
    """In a process that knows nothing of the script."""
    _, table = run()
    frames, windows, *_ = parts
    np.save(tmp_path / "windows.npy", frames[np.arange(len(frames))][windows])
    code = f"""
import keras, numpy as np
model = keras.saving.load_model({str(video / "outputs" / "ts_crowdnet.keras")!r})
assert [type(layer).__name__ for layer in model.layers] == ["InputLayer", "TimeDistributed", "Functional"]
assert model.input_shape == (None, 5, 48, 64, 3) and model.input.dtype == "uint8" and model.output_shape == (None, 1)
np.save({str(tmp_path / "counts.npy")!r}, model.predict(np.load({str(tmp_path / "windows.npy")!r}), verbose=0)[:, 0])
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    assert np.abs(np.load(tmp_path / "counts.npy") - table["predicted"]).max() < 1e-3


def test_training_on_frames_and_on_estimates_gives_the_same_head(parts, tmp_path, constants):
    frames, windows, counts, backbone, features = parts
    constants(LEARNING_RATE=1e-2)
    readout = ts.build_readout(features[:16], counts[:16], ts.view_sizes(backbone))
    estimates = readout.predict(features, verbose=0)
    weights = []
    for source in (estimates, frames):
        head = new_head(counts[:16])
        start = head.get_weights()
        model = head if source is estimates else ts.build_model(backbone, readout, head)
        training = ts.WindowSequence(source, windows[:16], counts[:16, None], ts.BATCH_SIZE, shuffle=True)
        validation = ts.WindowSequence(source, windows[16:], counts[16:, None], ts.BATCH_SIZE)
        ts.train(model, training, validation, tmp_path / f"checkpoint-{len(weights)}.npz", ts.EPOCHS, ts.LEARNING_RATE)
        weights.append(head.get_weights())
    moved = [np.abs(a - b).max() for a, b in zip(start, weights[0])]
    assert max(moved) > 1e-2, "the head has learned something"
    for from_estimates, from_frames in zip(*weights):
        np.testing.assert_allclose(from_estimates, from_frames, atol=1e-4)


@pytest.mark.parametrize(("rows", "width"), [(60, 15), (60, 400)])
def test_ridge_is_ridge_regression(rows, width):
    """The same predictions as scikit-learn's exact solution, for few features and for many."""
    rng = np.random.default_rng(0)
    features = rng.normal(5, 2, (rows, width)).astype("float32")
    counts, scale = features[:, 0] * 2 + rng.normal(0, 1, rows), rng.uniform(1, 3, width)
    mean = features.mean(axis=0)
    weights = ts.ridge(features, counts - counts.mean(), mean, scale, penalty=0.1)
    exact = Ridge(alpha=0.1 * rows).fit(features / scale, counts)
    np.testing.assert_allclose((features - mean) / scale @ weights + counts.mean(), exact.predict(features / scale), atol=1e-3)


@pytest.mark.parametrize("seed", range(5))
def test_the_penalty_is_the_one_of_a_grid_search(seed):
    """scikit-learn's search over the same blocks, each fold with an intercept of its own: light drifts."""
    rng = np.random.default_rng(seed)
    frames = np.arange(400)
    features = (rng.normal(0, 1, (400, 150)) + frames[:, None] / 100).astype("float32")
    counts, scale = features @ rng.normal(0, 1, 150) + rng.normal(0, 3.0**seed, 400), np.full(150, 12.0)
    search = GridSearchCV(Pipeline([("scale", FunctionTransformer(lambda x: x / scale)), ("ridge", Ridge())]),
                          {"ridge__alpha": np.array(ts.PENALTIES) * 320}, scoring="neg_mean_squared_error",
                          cv=PredefinedSplit(frames // 40 % 5))  # fmt: skip
    best = search.fit(features, counts).best_params_["ridge__alpha"]
    assert ts.choose_penalty(features, counts, scale) == pytest.approx(best / 320)


def test_the_penalty_is_the_one_that_does_best_on_blocks_left_out(parts, monkeypatch):
    """Features of pure noise are worth nothing: the highest penalty; counts written in the features: a low one."""
    rng = np.random.default_rng(0)
    counts = rng.integers(10, 50, 100).astype(float)
    noise = rng.normal(0, 1, (100, 300)).astype("float32")
    chosen, ridge = [], ts.ridge
    monkeypatch.setattr(ts, "ridge", lambda *arguments: chosen.append(arguments[-1]) or ridge(*arguments))
    ts.build_readout(noise, counts, [300])
    assert chosen[-1] == max(ts.PENALTIES)
    ts.build_readout(np.column_stack([counts, noise[:, :3]]).astype("float32"), counts, [4])
    assert chosen[-1] == min(ts.PENALTIES)


def test_every_view_weighs_alike(parts):
    """A view's features have the same total variance after scaling, however many they are."""
    rng = np.random.default_rng(0)
    features = (rng.normal(0, 1, (50, 40)) * rng.uniform(0.1, 10, 40)).astype("float32")
    readout = ts.build_readout(features, rng.integers(0, 9, 50).astype(float), [36, 4])
    scaled = readout.get_layer("feature_scaling")(features)
    variance = np.var(np.asarray(scaled), axis=0)
    assert variance[:36].sum() == pytest.approx(0.5, rel=1e-3) and variance[36:].sum() == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize(("fine_tune", "tolerance"), [(0, 0), (1, 1e-4)])  # threads sum a convolution's gradients in any order
def test_nothing_is_fitted_to_validation_frames(run, video, fine_tune, tolerance):
    """Other validation frames and counts leave the predictions of training frames as they were, fine-tuned or not."""
    _, before = run(EPOCHS=3, FINE_TUNE_EPOCHS=fine_tune)
    (video / "labels.csv").write_text(
        "id,count\n" + "".join(f"{i},{c if i <= 16 else 90 - c}\n" for i, c in zip(before["id"], before["true"]))
    )
    for frame in (17, 18, 19, 20):
        (video / f"frames/frames/seq_{frame:06d}.jpg").write_bytes((video / "frames/frames/seq_000001.jpg").read_bytes())
    _, after = run(EPOCHS=3, FINE_TUNE_EPOCHS=fine_tune)
    train = before["split"] == "train"
    assert train.sum() == 16
    assert ((before["predicted"] - after["predicted"]).abs() <= tolerance)[train].all()
    assert (before["true"] != after["true"])[~train].all()
    assert (before["predicted"] != after["predicted"])[~train].any(), "the exchanged frames are seen"


def test_counts_are_never_negative(parts):
    head = new_head(np.zeros(16))
    assert (head.predict(np.random.default_rng(0).normal(0, 1e3, (50, 5, 1)), verbose=0) >= 0).all()


def test_calibration_gives_random_weights_activations_of_even_size(parts, constants):
    frames, *_, backbone, _ = parts
    pixels = keras.applications.resnet50.preprocess_input(frames[np.arange(8)].astype("float32"))
    resnet = backbone.get_layer("resnet50")
    normalised = keras.Model(resnet.input, resnet.get_layer("conv2_block1_3_conv").output).predict(pixels, verbose=0)
    assert abs(normalised.mean()) < 0.1 and 0.7 < normalised.std() < 1.3


def test_the_foreground_is_where_people_are(parts, video):
    """The weight of a position rises where a frame differs from the empty scene, and only there."""
    frames, *_, backbone, _ = parts
    empty = np.median(frames[np.arange(8)], axis=0).astype("uint8")
    person = empty.copy()
    person[16:32, 48:56] = (255, 0, 0)
    difference = keras.Model(backbone.input, backbone.get_layer("background").output)
    distance = np.sqrt(np.square(difference.predict(np.stack([empty, person]), verbose=0)).mean(axis=-1))
    assert distance[0].max() < 1e-3
    assert distance[1, 9:15, 25:27].min() > 1 and distance[1, :, :20].max() < 1e-3
    everywhere, _, foreground, _, covered = np.split(backbone.predict(np.stack([empty, person]), verbose=0), np.cumsum([768, 512, 768, 512]), axis=1)
    share = (foreground / np.maximum(everywhere, 1e-6)).reshape(2, 3, 4, 64).mean(axis=3)
    assert share[0].max() < 0.01 and share[1, :, 0].max() < 0.01 and share[1, 1, 3] > 0.2, "and so do the features"
    covered = covered.reshape(2, 6, 8)
    assert covered[0].max() < 0.01 and covered[1, 2:4, 6].min() > 0.5 and covered[1, :, :5].max() < 0.01


def test_the_grid_tells_where(parts, constants):
    """A person on the left changes features of the left columns alone."""
    frames, *_, backbone, _ = parts
    constants(FOREGROUND=None, READ_OUT_RANDOM={"conv1_relu": (3, 4)})
    backbone, *_ = ts.prepare_backbone(frames, np.arange(8))
    empty = np.zeros((48, 64, 3), "uint8")
    left = empty.copy()
    left[10:20, 2:6] = 255
    change = np.abs(np.diff(backbone.predict(np.stack([empty, left]), verbose=0), axis=0)).reshape(3, 4, 64).sum(axis=2)
    assert change[:, 0].sum() > 0 and change[:, 2:].max() == 0 and change[2].max() == 0


def test_the_published_read_out_is_one_edit_away(parts, constants):
    """The average-pooled output of Keras's own ResNet50, BatchNorm and all."""
    constants(FRAME_SIZE=(224, 224), FOREGROUND=None, READ_OUT_RANDOM={"conv5_block3_out": (1, 1)})
    frames = ts.Frames(parts[0].paths, ts.FRAME_SIZE)
    rng = np.random.default_rng(0)
    build = ts.load_resnet50

    def trained():
        resnet, *rest = build()
        for layer in resnet.layers:
            if isinstance(layer, keras.layers.BatchNormalization):
                layer.set_weights([rng.uniform(0.5, 1.5, weights.shape) for weights in layer.get_weights()])
        trained.resnet = resnet
        return resnet, *rest

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ts, "load_resnet50", trained)
        patch.setattr(ts, "calibrate", lambda *_: None)
        backbone, *_ = ts.prepare_backbone(frames, np.arange(8))
    pixels = frames[np.arange(2)]
    expected = trained.resnet.predict(keras.applications.resnet50.preprocess_input(pixels.astype("float32")), verbose=0).mean(axis=(1, 2))
    assert backbone.output_shape == (None, 2048)
    np.testing.assert_allclose(backbone.predict(pixels, verbose=0), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


@pytest.fixture(scope="module")
def weight_file(tmp_path_factory):
    keras.utils.set_random_seed(7)
    resnet = keras.applications.ResNet50(include_top=False, weights=None, input_shape=(48, 64, 3))
    path = tmp_path_factory.mktemp("weights") / "resnet50.weights.h5"
    resnet.save_weights(path)
    return path, resnet.get_layer("conv4_block6_3_conv").get_weights()[0]


def test_imagenet_weights_are_what_keras_downloads(run, weight_file, monkeypatch, capsys):
    path, kernel = weight_file
    asked = []

    def download(name, url, **_):
        asked.append((name, url))
        return str(path)

    monkeypatch.setattr("keras.src.applications.resnet.file_utils.get_file", download)
    small = {"conv1_relu": (3, 4), "conv4_block6_out": (1, 1)}
    metrics, _ = run(WEIGHTS="imagenet", READ_OUT=small, READ_OUT_RANDOM={"conv1_relu": (1, 1)})
    assert asked[0][0].startswith("resnet50") and "notop" in asked[0][0]
    assert metrics["weights"] == "imagenet" and "Warning" not in capsys.readouterr().err
    resnet, *_ = ts.load_resnet50()
    np.testing.assert_array_equal(resnet.get_layer("conv4_block6_3_conv").get_weights()[0], kernel)


def test_weights_from_a_file(run, weight_file):
    path, _ = weight_file
    metrics, _ = run(WEIGHTS=str(path), READ_OUT={"conv2_block1_out": (1, 2)})
    assert metrics["weights"] == str(path)


def test_a_weight_file_of_another_network_is_refused(weight_file, constants, tmp_path):
    keras.applications.MobileNetV2(include_top=False, weights=None, input_shape=(48, 64, 3)).save_weights(tmp_path / "other.weights.h5")
    (tmp_path / "cut.weights.h5").write_bytes(weight_file[0].read_bytes()[:1_000_000])
    for name in ("other.weights.h5", "cut.weights.h5"):
        constants(WEIGHTS=str(tmp_path / name))
        with pytest.raises(ts.InputError, match=name):
            ts.load_resnet50()


def test_a_failed_download_is_one_warning_and_recorded(run, monkeypatch, capsys):
    def fail(*_, **__):
        raise Exception("URL fetch failure on https://example.org: 404")

    monkeypatch.setattr("keras.src.applications.resnet.file_utils.get_file", fail)
    metrics, table = run(WEIGHTS="imagenet")
    warnings = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(warnings) == 1 and "WEIGHTS" in warnings[0] and "notop.h5" in warnings[0]
    assert metrics["weights"].startswith("random")
    assert table["predicted"].notna().all()
    _, unloaded = run(WEIGHTS=None)
    assert (unloaded["predicted"] == table["predicted"]).all(), "the failed download leaves the same random weights"


def test_counting_new_footage_matches_the_predictions(run, constants, video):
    _, table = run()
    counts = ts.count_people(video / "outputs" / "ts_crowdnet.keras", video / "frames" / "frames")
    assert counts.index[0] == "seq_000001.jpg" and len(counts) == 20
    assert np.abs(counts.to_numpy() - table["predicted"]).max() < 1e-3
    some = sorted((video / "frames" / "frames").iterdir())[:3]
    few = ts.count_people(keras.saving.load_model(video / "outputs" / "ts_crowdnet.keras"), some)
    np.testing.assert_allclose(few, counts[:3], atol=1e-3)
    constants(COUNT="frames/frames")
    ts.main()
    assert (video / "outputs" / "counts.png").stat().st_size > 1000
    written = pd.read_csv(video / "outputs" / "counts.csv", index_col="frame")["count"]
    np.testing.assert_allclose(written, counts, atol=1e-3)
