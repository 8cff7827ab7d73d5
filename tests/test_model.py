"""The three stages and the saved model; weights; precision."""

from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pytest
from PIL import Image

import tscrowdnet_train as ts
from conftest import COMPILE, README, RESNET50, read_frames, shallow_resnet50


@pytest.fixture
def frames(video, constants):
    return read_frames(video)


def random_resnet(outputs, seed=0):
    """ResNet50 read at outputs, with BatchNorm statistics as training would leave them: any."""
    resnet = RESNET50(include_top=False, weights=None, input_shape=(*ts.FRAME_SIZE, 3))
    rng = np.random.default_rng(seed)
    for layer in resnet.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.set_weights([rng.uniform(0.5, 1.5, weights.shape) for weights in layer.get_weights()])
    return keras.Model(resnet.input, [resnet.get_layer(name).output for name in outputs], name="resnet50")


@pytest.fixture
def build_backbone_of(monkeypatch):
    """build_backbone with trained weights: those of the model that is given."""

    def build(model):
        monkeypatch.setattr(ts, "load_resnet50", lambda: (model, "of a test", False))
        return ts.build_backbone(None)

    return build


@pytest.mark.parametrize(
    "outputs",
    [["conv5_block3_out"], ["conv1_relu", "conv3_block4_out"], ["conv2_block1_1_conv"], ["conv2_block1_1_conv", "conv2_block3_out"]],
)
def test_folding_leaves_the_function_and_takes_the_batchnorms_away(frames, outputs):
    """All but those whose convolution is itself read."""
    resnet = random_resnet(outputs)
    folded = ts.fold_batchnorm(resnet, outputs)
    kept = sum(name.endswith("_conv") for name in outputs if name != outputs[-1])
    assert sum(isinstance(layer, keras.layers.BatchNormalization) for layer in folded.layers) == kept
    pixels = ts.normalise(frames[range(2)])
    pairs = zip(*(map(np.asarray, keras.tree.flatten(model(pixels))) for model in (resnet, folded)))
    for expected, found in pairs:
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_features_are_means_and_standard_deviations_over_the_grid(frames, constants, build_backbone_of):
    resnet = random_resnet(["conv2_block3_out", "conv5_block3_out"])
    constants(FEATURE_LAYERS={"conv2_block3_out": (3, 4), "conv5_block3_out": (1, 1)})
    backbone, _ = build_backbone_of(resnet)
    shown = frames[range(2)]
    fine, deep = map(np.asarray, resnet(ts.normalise(shown)))  # (2, 12, 16, 256), (2, 2, 2, 2048)
    cells = fine.reshape(2, 3, 4, 4, 4, 256)
    parts = [cells.mean(axis=(2, 4)), cells.std(axis=(2, 4)), deep.mean(axis=(1, 2)), deep.std(axis=(1, 2))]
    expected = np.concatenate([part.reshape(2, -1) for part in parts], axis=1)
    np.testing.assert_allclose(backbone(shown), expected, rtol=2e-3, atol=2e-3 * expected.max())


def test_resnet50_gets_what_its_own_preprocessing_gives_up_to_light(frames):
    """BGR, centred, with about ImageNet's contrast; the same for a frame in other light."""
    shown = frames[range(4)].astype("float32")
    pixels = np.asarray(ts.normalise(shown))
    expected = keras.applications.resnet50.preprocess_input(shown.copy())
    expected -= expected.mean(axis=(1, 2), keepdims=True)
    for channel in range(3):
        assert np.corrcoef(pixels[..., channel].ravel(), expected[..., channel].ravel())[0, 1] > 0.95
    assert np.abs(pixels.mean(axis=(1, 2))).max() < 0.1 and np.abs(pixels.std(axis=(1, 2)) - 57).max() < 1
    other_light = np.asarray(ts.normalise(shown * [0.6, 0.5, 0.7] + 20))
    assert np.abs(other_light - pixels).mean() < 1
    assert np.isfinite(np.asarray(ts.normalise(np.zeros((1, 48, 64, 3), "uint8")))).all(), "a black frame is no error"


def test_the_grid_tells_where(frames, constants, build_backbone_of, monkeypatch):
    """A person on the left changes features of the left columns alone."""
    monkeypatch.setattr(ts, "normalise", lambda frames: keras.ops.cast(frames, "float32"))
    constants(FEATURE_LAYERS={"conv1_relu": (3, 4)})
    backbone, _ = build_backbone_of(random_resnet(["conv1_relu"]))
    floor = np.random.default_rng(0).integers(60, 100, (48, 64, 3)).astype("uint8")
    left = floor.copy()
    left[10:20, 2:6] = 255
    features = np.asarray(backbone(np.stack([floor, left])))[:, : 12 * 64].reshape(2, 3, 4, 64)
    change = np.abs(features[1] - features[0]).sum(axis=2)
    assert change[:2, 0].min() > 0 and change[:, 2:].max() == 0


def test_calibration_gives_random_weights_activations_of_even_size(frames):
    resnet, *_ = ts.load_resnet50()
    resnet = keras.Model(resnet.input, [resnet.get_layer("conv2_block1_3_bn").output], name="resnet50")
    ts.calibrate(resnet, frames[range(8)])
    normalised = np.asarray(resnet(ts.normalise(frames[range(8)]))[0])
    assert abs(normalised.mean()) < 0.05 and 0.9 < normalised.std() < 1.1


@pytest.mark.parametrize("components", [0, 20, 512])
def test_vectors_are_standardised_by_training_images_and_reduced_to_their_components(constants, components):
    constants(COMPONENTS=components)
    rng = np.random.default_rng(0)
    raw = (rng.normal(5, 2, (60, 300)) @ rng.normal(0, 1, (300, 300)) * rng.uniform(0.1, 10, 300)).astype("float32")
    raw[:, 0] = 7  # a dead channel
    reduction = ts.build_reduction(raw[:50])
    vectors = np.asarray(reduction(raw))
    standardised = np.asarray(reduction.get_layer("standardised")(raw))
    assert np.linalg.norm(standardised[:50], axis=1).max() == pytest.approx(1, rel=1e-4), "the longest tells what is unfamiliar"
    assert vectors.shape == (60, {0: 300, 20: 20, 512: 49}[components]), "no more components than training images span"
    if components != 20:
        assert (np.linalg.norm(vectors[:50], axis=1) ** 2).mean() == pytest.approx(1, rel=1e-3)
        known = (raw[:50] - raw[:50].mean(axis=0)) / np.maximum(raw[:50].std(axis=0), 0.1 * np.median(raw[:50].std(axis=0)))
        expected = known @ known.T / (known**2).sum(axis=1).mean()
        np.testing.assert_allclose(vectors[:50] @ vectors[:50].T, expected, atol=1e-3)
    else:
        parts = vectors[:50].var(axis=0)
        assert (np.diff(parts) < 1e-6).all() and 0.4 < (vectors[:50] ** 2).sum(axis=1).mean() < 1, "the 20 strongest"


def test_a_channel_that_hardly_varied_in_training_does_not_shout_later(constants):
    """Its deviation is 1e-3; 0.5 of it, when a light goes on, is nothing to what the others do."""
    rng = np.random.default_rng(0)
    raw = rng.normal(0, 1, (100, 200)).astype("float32")
    raw[:, 0] = rng.normal(0, 1e-3, 100)
    reduction = ts.build_reduction(raw[:50])
    raw[50:, 0] += 0.5
    standardised = reduction.get_layer("standardised")(raw)
    assert np.linalg.norm(standardised, axis=1).max() < 1.3


@pytest.mark.parametrize("share", [0, 0.25, 0.3, 1])
def test_copies_are_spread_evenly_over_the_training_pictures(constants, share):
    constants(AUGMENT=share)
    frames = ts.Frames([Path("frame.jpg")] * 150, ["0"] * 150, (48, 64), range(20, 120))
    copied = np.flatnonzero(frames.copy_of != np.arange(150))
    assert frames.copy_of[copied].tolist() == list(range(150, 150 + len(copied))) and len(frames) == 150 + len(copied)
    assert frames.trained_on.tolist() == [*range(20, 120), *range(150, 150 + len(copied))]
    assert len(copied) == pytest.approx(100 * share, abs=1) and len(set(copied)) == len(copied)
    assert not len(copied) or (copied[0] == 20 and 120 - 2 / share <= copied[-1] < 120 and np.ptp(np.diff(copied)) <= 1)


def test_the_network_has_the_three_stages(first_run, constants):
    """TimeDistributed ResNet50 -> LSTM that sees the sequence of projected feature vectors -> dense layers."""
    model = keras.saving.load_model(first_run / "outputs" / "ts_crowdnet.keras")
    spatial, temporal, regression = (model.get_layer(name) for name in ("spatial", "temporal", "regression"))
    assert isinstance(spatial, keras.layers.TimeDistributed) and not spatial.trainable_weights
    encoder = spatial.layer
    assert [layer.name for layer in encoder.layers] == ["backbone", "reduction"]
    images = 16 + 4  # the pictures of training windows, and their copies
    assert encoder.get_layer("reduction").get_layer("components").units == images - 1
    assert temporal.input_shape == (None, 5, images - 1) and temporal.get_layer("lstm").input.shape == (None, 5, ts.PROJECTION)
    assert temporal.get_layer("projection").kernel.shape == (images - 1, ts.PROJECTION)
    assert temporal.get_layer("lstm").units == regression.input_shape[1] == ts.LSTM_UNITS
    assert [layer.units for layer in regression.layers if isinstance(layer, keras.layers.Dense)] == [ts.DENSE_UNITS, 1]
    assert model.input.dtype == "uint8" and model.input_shape == (None, 5, 48, 64, 3) and model.output_shape == (None, 1)


def test_the_forget_gate_starts_at_its_bias_and_the_others_at_0(constants):
    constants(LSTM_UNITS=3, FORGET_BIAS=-1.5)
    bias = ts.build_temporal(7).get_layer("lstm").get_weights()[2]
    assert bias.tolist() == [0] * 3 + [-1.5] * 3 + [0] * 6


def test_it_learns_what_the_features_say_and_starts_at_the_mean(constants, monkeypatch):
    """Counts written in one direction of the features, and noise."""
    monkeypatch.setattr(keras.Model, "compile", COMPILE)
    constants(EPOCHS=20, BATCH_SIZE=16, SEQUENCE_LENGTH=2)
    rng = np.random.default_rng(0)
    counts = rng.integers(10, 50, 200).astype(float)
    features = rng.normal(0, 1, (200, 40)).astype("float32")
    features[:, :20] += ((counts - 30) / 5)[:, None]
    rows = np.arange(200)
    features = ts.build_reduction(features[:150]).predict(features, verbose=0)
    keras.utils.set_random_seed(0)
    head = keras.Sequential([ts.build_temporal(features.shape[1]), ts.build_regression(counts[:150])])
    windows = ts.make_windows(rows, 2)
    training = ts.WindowSequence(features, windows[:150], counts[:150], 16, shuffle=True, copy_of=rows)
    validation = ts.WindowSequence(features, windows[150:], counts[150:], 16)
    assert head.predict(validation, verbose=0).mean() == pytest.approx(counts[:150].mean(), abs=4)
    history = ts.train(head, training, validation)
    error = np.abs(head.predict(validation, verbose=0)[:, 0] - counts[150:]).mean()
    assert error < 0.3 * np.abs(counts[150:] - counts[:150].mean()).mean()
    assert history["val_mae"].iloc[-1] == pytest.approx(error, rel=1e-3)


def test_no_seed_ends_at_the_mean_count(constants, monkeypatch):
    """27 labels, batches of 7, five seeds: the worst is not far from the median."""
    monkeypatch.setattr(keras.Model, "compile", COMPILE)
    rng = np.random.default_rng(0)
    counts = rng.integers(10, 50, 127).astype(float)
    features = rng.normal(0, 1, (127, 40)).astype("float32")
    features[:, :20] += ((counts - 30) / 5)[:, None]
    vectors = ts.build_reduction(features[:27]).predict(features, verbose=0)
    windows, rows, errors = ts.make_windows(range(127), 2), np.arange(127), []
    for seed in range(5):
        constants(EPOCHS=12, LEARNING_RATE=0.2, SEED=seed, SEQUENCE_LENGTH=2)
        keras.utils.set_random_seed(seed)
        head = keras.Sequential([ts.build_temporal(vectors.shape[1]), ts.build_regression(counts[:27])])
        ts.train(head, ts.WindowSequence(vectors, windows[:27], counts[:27], 7, shuffle=True, copy_of=rows))
        errors.append(np.abs(head.predict(vectors[windows[27:]], verbose=0)[:, 0] - counts[27:]).mean())
    assert max(errors) < 1.3 * np.median(errors) and max(errors) < 0.5 * np.abs(counts[27:] - counts[:27].mean()).mean()


def test_a_video_without_people_is_counted_as_empty(finished, run):
    labels = pd.read_csv(finished / "labels.csv")
    labels.assign(count=0).to_csv(finished / "labels.csv", index=False)
    metrics, table = run()
    assert (table["predicted"] >= 0).all() and metrics["mae"] < 0.5 and np.isfinite(metrics["mse"])


@pytest.mark.beside("saved")
def test_the_saved_model_predicts_on_frames_what_was_predicted_from_features(first_run, beside):
    """In a process that knows nothing of the script."""
    table = pd.read_csv(first_run / "outputs" / "predictions.csv")
    folder, done = beside()
    assert done.returncode == 0, done.stderr
    assert np.abs(np.load(folder / "counts.npy") - table["predicted"]).max() < 1e-3


@pytest.mark.parametrize(("batch_size", "steps"), [(32, 4), (2, 8)])
def test_small_sets_take_at_least_four_steps_an_epoch(constants, monkeypatch, batch_size, steps):
    """16 training windows."""

    def check(model, training, **_):
        assert len(training) == steps
        raise KeyboardInterrupt

    monkeypatch.setattr(keras.Model, "fit", check)
    constants(BATCH_SIZE=batch_size)
    with pytest.raises(KeyboardInterrupt):
        ts.main()


def test_training_is_as_the_readme_says(run, video, monkeypatch):
    """A rate that falls to 0 along a half cosine, another order in each epoch, a loss in variances of the training counts."""
    seen, fit = [], keras.Model.fit

    def watch(model, training, **options):
        class Rate(keras.callbacks.Callback):
            def on_epoch_end(self, epoch, logs=None):
                seen.append((float(model.optimizer.learning_rate), training.order.tolist()))

        return fit(model, training, callbacks=[Rate()], **options)

    monkeypatch.setattr(keras.Model, "fit", watch)
    _, table = run(EPOCHS=4, LEARNING_RATE=0.1)
    rates, orders = zip(*seen)
    np.testing.assert_allclose(rates, [0.1 * (1 + np.cos(np.pi * share)) / 2 for share in (0.25, 0.5, 0.75, 1)], atol=1e-6)
    assert len(set(map(tuple, orders))) == 4 and all(sorted(order) == list(range(16)) for order in orders)
    history = pd.read_csv(video / "outputs" / "history.csv")
    np.testing.assert_allclose(history["loss"], history["mse"] / table["true"][:16].var(ddof=0), rtol=1e-4)


def test_no_unit_of_the_dense_layer_can_die(constants):
    """Whatever drives it below 0, it still passes on a change."""
    dense = ts.build_regression(np.arange(5.0)).get_layer("dense")
    dense.set_weights([np.ones((ts.LSTM_UNITS, ts.DENSE_UNITS)), np.full(ts.DENSE_UNITS, -2.0)])
    low, high = (np.asarray(dense(np.full((1, ts.LSTM_UNITS), value / ts.LSTM_UNITS))) for value in (0, 0.5))
    assert (low != high).all()


def test_a_network_that_has_hardly_trained_says_so(run, capsys):
    run(EPOCHS=1)
    assert "Hardly trained: counts of" in capsys.readouterr().out
    ts.check_trained(np.array([5.0, 5.2]), np.array([3.0, 8.0]))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("optimizer", ["default", "adam"])
def test_training_on_windows_of_frames_gives_the_same_predictions(run, monkeypatch, optimizer):
    """CACHE_FEATURES = False: frames and copies pass TimeDistributed ResNet50 at every step."""
    changes = {"AUGMENT": 0.5, "EPOCHS": 1} | ({} if optimizer == "default" else {"OPTIMIZER": "adam", "LEARNING_RATE": 1e-3})
    _, expected = run(**changes)
    shapes, fit = [], keras.Model.fit

    def watch(model, training, **options):
        shapes.append((training[0][0].shape, training[0][0].dtype, [layer.name for layer in model.layers]))
        return fit(model, training, **options)

    monkeypatch.setattr(keras.Model, "fit", watch)
    _, table = run(CACHE_FEATURES=False, CACHE="none", **changes)
    assert shapes == [((4, 5, 48, 64, 3), "uint8", ["spatial", "temporal", "regression"])]
    assert not (ts.ROOT / "none").exists()
    np.testing.assert_allclose(table["predicted"], expected["predicted"], atol=1e-3)


def test_bfloat16_counts_like_float32(finished, run, constants):
    """A model keeps the precision that its features were computed in, wherever it counts."""
    exact = pd.read_csv(finished / "outputs" / "predictions.csv")["predicted"]
    metrics, table = run(PRECISION="mixed_bfloat16", OUTPUTS="rough")
    assert metrics["precision"] == "mixed_bfloat16" and (table["predicted"] != exact).any()
    assert np.abs(table["predicted"] - exact).max() < 0.3
    for precision in ("mixed_bfloat16", "float32"):
        constants(PRECISION=precision)
        counts = ts.count_people(finished / "rough" / "ts_crowdnet.keras", finished / "frames" / "frames")["count"]
        assert np.abs(counts.to_numpy() - table["predicted"]).max() < 1e-3


@pytest.mark.parametrize(("device", "expected"), [(("CPU", True), "mixed_bfloat16"), (("GPU:0 Tesla", False), "float32")])
def test_auto_takes_bfloat16_where_the_device_has_units_for_it(run, monkeypatch, device, expected):
    """And the device is said."""
    monkeypatch.setattr(ts, "describe_device", lambda: device)
    metrics, _ = run(PRECISION="auto", EPOCHS=1)
    assert (metrics["device"], metrics["precision"]) == (device[0], expected)


def test_the_device_is_the_one_that_keras_computes_on():
    device, has_bfloat16 = ts.describe_device()
    assert device == "CPU" or device.startswith("GPU:0")
    cpuinfo = Path("/proc/cpuinfo")
    if device == "CPU" and cpuinfo.exists():
        assert has_bfloat16 == any(unit in cpuinfo.read_text() for unit in ("avx512_bf16", "amx_bf16"))


def test_nothing_is_fitted_to_validation_frames(finished, run):
    """Other validation frames and counts leave the predictions of training frames as they were, to the digit."""
    before = pd.read_csv(finished / "outputs" / "predictions.csv")
    counts = before["true"].where(before["split"] == "train", 90 - before["true"])
    pd.DataFrame({"id": before["id"], "count": counts}).to_csv(finished / "labels.csv", index=False)
    for frame in (17, 18, 19, 20):
        Image.effect_noise((64, 48), 90).convert("RGB").save(finished / f"frames/frames/seq_{frame:06d}.jpg")
    _, after = run()
    train = before["split"] == "train"
    assert train.sum() == 16
    assert (before["predicted"] == after["predicted"])[train].all()
    assert (before["predicted"] != after["predicted"])[~train].all(), "the exchanged frames are seen"


def test_jittered_copies_train_the_model(run, constants, monkeypatch):
    """With them, a picture in other light from a nudged camera is counted as the picture itself: closer than without."""
    monkeypatch.setattr(keras.Model, "compile", COMPILE)
    folder = ts.ROOT / "frames" / "frames"
    jittered = ts.ROOT / "jittered"
    jittered.mkdir()
    rng = np.random.default_rng(0)
    for path in folder.iterdir():
        ts.jitter(Image.open(path), rng).save(jittered / path.name, quality=95)
    errors = []
    for share in (0, 1):
        _, table = run(AUGMENT=share, EPOCHS=30, SEQUENCE_LENGTH=2)
        counts = ts.count_people(ts.ROOT / "outputs" / "ts_crowdnet.keras", jittered)["count"]
        errors.append(np.abs(counts.to_numpy() - table["true"]).mean())
    assert errors[1] < 0.6 * errors[0], "they are in the components (0.7) and in the epochs (0.5)"


def test_the_published_recipe_gives_the_published_network(run, whole_resnet50):
    """The README's edits, read from the README; here of small frames and one epoch."""
    block = README.read_text().split("<!-- published -->")[1].split("```")[1].removeprefix("python\n")
    recipe = {}
    exec(block, {}, recipe)
    assert recipe.pop("FRAME_SIZE") == (224, 224) and recipe["COMPONENTS"] == 0
    metrics, table = run(**recipe | {"FRAME_SIZE": (64, 64), "EPOCHS": 1})
    assert table["predicted"].notna().all() and metrics["mae"] > 0 and metrics["features"] == 2048
    model = keras.saving.load_model(ts.ROOT / "outputs" / "ts_crowdnet.keras")
    temporal = model.get_layer("temporal")
    assert [type(layer).__name__ for layer in temporal.layers] == ["LSTM"]
    lstm = temporal.get_layer("lstm")
    assert lstm.input.shape == (None, 5, 2048) and lstm.units == 512 and lstm.dropout == 0.5
    assert model.get_layer("regression").get_layer("dense").units == 256


@pytest.mark.parametrize(
    "grids",
    [{"conv5_block3_out": (9, 9)}, {"conv3_block1_out": (1, 1), "conv1_relu": (2, 2)}, {"pool1_pool": (2, 1)}, {"conv1_bn": (1, 1)}],
    ids=["finer than the layer", "coarse before fine", "no convolution", "BatchNorm"],
)
def test_any_layer_and_grid_can_be_read(frames, constants, build_backbone_of, grids):
    constants(FEATURE_LAYERS=grids)
    features = np.asarray(build_backbone_of(random_resnet(grids))[0](frames[range(2)]))
    assert np.isfinite(features).all() and features.shape[1] > 0


@pytest.fixture(scope="module")
def weight_file(tmp_path_factory):
    keras.utils.set_random_seed(7)
    resnet = shallow_resnet50(include_top=False, weights=None, input_shape=(48, 64, 3))
    path = tmp_path_factory.mktemp("weights") / "resnet50$x_0$.weights.h5"
    resnet.save_weights(path)
    return path, resnet.get_layer("conv2_block1_3_conv").get_weights()[0]


def test_imagenet_weights_are_what_keras_downloads(constants, weight_file, monkeypatch, capsys):
    path, kernel = weight_file
    asked = []

    def download(name, url, **_):
        asked.append(name)
        return str(path)

    monkeypatch.setattr("keras.src.applications.resnet.file_utils.get_file", download)
    constants(WEIGHTS="imagenet")
    resnet, weights, is_random = ts.load_resnet50()
    assert asked[0].startswith("resnet50") and "notop" in asked[0]
    assert (weights, is_random) == ("imagenet", False) and "Warning" not in capsys.readouterr().err
    np.testing.assert_array_equal(resnet.get_layer("conv2_block1_3_conv").get_weights()[0], kernel)


def test_trained_weights_from_a_file_are_read_at_their_own_layers(run, weight_file):
    """In a file whose name would be mathematics in a figure's title."""
    path, _ = weight_file
    metrics, table = run(WEIGHTS=str(path), FEATURE_LAYERS={"conv2_block1_out": (1, 2)}, FEATURE_LAYERS_RANDOM={"conv1_relu": (1, 1)})
    assert metrics["weights"] == path.name
    backbone = keras.saving.load_model(ts.ROOT / "outputs" / "ts_crowdnet.keras").get_layer("spatial").layer.get_layer("backbone")
    assert backbone.get_layer("resnet50").outputs[0].shape[-1] == 256


@pytest.mark.filterwarnings("ignore:Skipping nested container:UserWarning")
def test_a_weight_file_of_another_network_is_refused(weight_file, constants, tmp_path):
    keras.Sequential([keras.Input((48, 64, 3)), keras.layers.Conv2D(64, 7, name="conv1_conv")]).save_weights(tmp_path / "other.weights.h5")
    (tmp_path / "cut.weights.h5").write_bytes(weight_file[0].read_bytes()[:100_000])
    for name in ("other.weights.h5", "cut.weights.h5"):
        constants(WEIGHTS=str(tmp_path / name))
        with pytest.raises(ts.InputError, match=name):
            ts.load_resnet50()


def test_a_failed_download_is_one_warning_and_the_same_random_weights(constants, monkeypatch, capsys):
    def fail(*_, **__):
        raise Exception("URL fetch failure on https://example.org: 404")

    monkeypatch.setattr("keras.src.applications.resnet.file_utils.get_file", fail)
    constants(WEIGHTS="imagenet")
    resnet, weights, is_random = ts.load_resnet50()
    warnings = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(warnings) == 1 and "WEIGHTS" in warnings[0] and "notop.h5" in warnings[0] and "404" in warnings[0]
    assert weights.startswith("random") and is_random
    constants(WEIGHTS=None)
    assert all((a == b).all() for a, b in zip(resnet.get_weights(), ts.load_resnet50()[0].get_weights()))
