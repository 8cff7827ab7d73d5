"""The three stages and the saved model; ResNet50's weights; precision."""

import sys
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pytest
from PIL import Image

import tscrowdnet_train as ts
from conftest import RESNET50, SIZE, TESTS, count, frame_paths, read_frames, shallow_resnet50, start


def test_the_network_has_the_three_stages(first_run, constants):
    """TimeDistributed ResNet50 -> an LSTM that sees the projected vectors -> dense layers."""
    model = keras.saving.load_model(first_run / "outputs" / "ts_crowdnet.keras")
    stages = [model.get_layer(name) for name in ("spatial", "temporal", "regression")]
    spatial, temporal, regression = stages
    assert isinstance(spatial, keras.layers.TimeDistributed) and not spatial.trainable_weights
    assert [layer.name for layer in spatial.layer.layers] == ["backbone", "reduction"]
    length = 16 + 4 - 1  # no more components than the training frames and copies span
    assert temporal.input_shape == (None, 5, length)
    assert temporal.get_layer("projection").kernel.shape == (length, ts.PROJECTION)
    assert temporal.get_layer("lstm").input.shape == (None, 5, ts.PROJECTION)
    assert temporal.get_layer("lstm").units == regression.input_shape[1] == ts.LSTM_UNITS
    dense = [layer for layer in regression.layers if isinstance(layer, keras.layers.Dense)]
    assert [layer.units for layer in dense] == [ts.DENSE_UNITS, 1]
    assert model.input.dtype == "uint8" and model.input_shape == (None, 5, *SIZE, 3)
    assert model.output_shape == (None, 1)


def test_the_saved_model_needs_no_code_of_this_project(finished):
    """It counts windows of frames in a process that knows nothing of the script, by the lines of
    BENCHMARKS.md. The frames have another size than in training: how they are resized matters."""
    for path in frame_paths(finished):
        Image.open(path).resize((150, 101)).save(path, quality=95)
    page = (TESTS / "tools" / "BENCHMARKS.md").read_text()
    block = page.split("<!-- use -->")[1].split("```")[1].removeprefix("python\n")
    done = start(["-c", block], finished)
    assert done.returncode == 0, done.stderr
    counts = count(finished)["count"]
    assert float(done.stdout) == pytest.approx(counts.iloc[4], abs=1e-3)
    assert abs(counts.iloc[4] - counts.iloc[3]) > 2e-3


# -- Spatial stage


@pytest.fixture
def frames(video, constants):
    return read_frames(video)


def random_resnet(outputs):
    """ResNet50 read at outputs, with BatchNorm statistics as training would leave them: any."""
    resnet = RESNET50(include_top=False, weights=None, input_shape=(*SIZE, 3))
    rng = np.random.default_rng(0)
    for layer in resnet.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.set_weights([rng.uniform(0.5, 1.5, array.shape) for array in layer.get_weights()])
    outputs = [resnet.get_layer(name).output for name in outputs]
    return keras.Model(resnet.input, outputs, name="resnet50")


def test_folding_leaves_the_function_and_takes_the_batchnorms_away(frames):
    """All but those whose convolution is itself read."""
    outputs = ["conv2_block1_1_conv", "conv2_block3_out", "conv4_block1_out"]
    resnet = random_resnet(outputs)
    folded = ts.fold_batchnorm(resnet, outputs, "float32")
    kept = sum(isinstance(layer, keras.layers.BatchNormalization) for layer in folded.layers)
    assert kept == 1
    pixels = ts.normalise(frames[range(2)])
    pairs = zip(*(map(np.asarray, keras.tree.flatten(model(pixels))) for model in (resnet, folded)))
    for expected, found in pairs:
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_features_are_means_and_standard_deviations_over_the_grid(frames, constants, monkeypatch):
    resnet = random_resnet(["conv2_block3_out", "conv4_block1_out"])
    constants(FEATURE_LAYERS={"conv2_block3_out": (3, 4), "conv4_block1_out": (1, 1)})
    monkeypatch.setattr(ts, "load_resnet50", lambda: (resnet, "of a test", False))
    backbone, _ = ts.build_backbone(None, "float32")
    pixels = frames[range(2)]
    fine, deep = map(np.asarray, resnet(ts.normalise(pixels)))  # (2, 12, 16, 256), (2, 3, 4, 1024)
    cells = fine.reshape(2, 3, 4, 4, 4, 256)
    parts = [cells.mean(axis=(2, 4)), cells.std(axis=(2, 4)), deep.mean(axis=(1, 2)), deep.std(axis=(1, 2))]
    expected = np.concatenate([part.reshape(2, -1) for part in parts], axis=1)
    np.testing.assert_allclose(backbone(pixels), expected, rtol=2e-3, atol=2e-3 * expected.max())


def test_resnet50_gets_what_its_own_preprocessing_gives_up_to_light(frames):
    """BGR, centred, with about ImageNet's contrast; the same for a frame in other light."""
    shown = frames[range(4)].astype("float32")
    pixels = np.asarray(ts.normalise(shown))
    expected = keras.applications.resnet50.preprocess_input(shown.copy())
    for channel in range(3):
        pair = pixels[..., channel].ravel(), expected[..., channel].ravel()
        assert np.corrcoef(*pair)[0, 1] > 0.95
    assert np.abs(pixels.mean(axis=(1, 2))).max() < 0.1
    assert np.abs(pixels.std(axis=(1, 2)) - 57).max() < 1
    other_light = np.asarray(ts.normalise(shown * [0.6, 0.5, 0.7] + 20))
    assert np.abs(other_light - pixels).mean() < 1
    black = np.asarray(ts.normalise(np.zeros((1, *SIZE, 3), "uint8")))
    assert np.isfinite(black).all(), "a black frame is no error"


def test_calibration_gives_random_weights_activations_of_even_size(frames):
    resnet, *_ = ts.load_resnet50()
    resnet = keras.Model(resnet.input, [resnet.get_layer("conv2_block1_3_bn").output])
    ts.calibrate(resnet, frames[range(8)])
    activations = np.asarray(resnet(ts.normalise(frames[range(8)]))[0])
    assert abs(activations.mean()) < 0.05 and 0.9 < activations.std() < 1.1


@pytest.mark.parametrize("components", [0, 20, 512])
def test_vectors_are_standardised_and_reduced_to_their_principal_components(constants, components):
    constants(COMPONENTS=components)
    rng = np.random.default_rng(0)
    raw = rng.normal(5, 2, (60, 300)) @ rng.normal(0, 1, (300, 300)) * rng.uniform(0.1, 10, 300)
    raw[:, 0] = 7  # a dead channel
    raw[40:50] *= 2  # the copies
    raw = raw.astype("float32")
    reduction = ts.build_reduction(raw[:40], raw[40:50])
    vectors = np.asarray(reduction(raw))
    standardised = np.asarray(reduction.get_layer("standardised")(raw))
    lengths = np.linalg.norm(standardised[:40], axis=1)
    assert np.median(lengths) == pytest.approx(1, rel=1e-4), "of the frames, not the copies"
    assert vectors.shape == (60, {0: 300, 20: 20, 512: 49}[components])
    if components == 20:
        assert (np.diff(vectors[:50].var(axis=0)) < 1e-6).all(), "the strongest first"
    else:
        expected = standardised[:50] @ standardised[:50].T
        np.testing.assert_allclose(vectors[:50] @ vectors[:50].T, expected, atol=1e-3)


def test_a_feature_that_hardly_varied_in_training_does_not_shout_later(constants):
    """Its deviation is 1e-3; 0.5 of it, when a light goes on, is nothing to what the others do."""
    rng = np.random.default_rng(0)
    raw = rng.normal(0, 1, (100, 200)).astype("float32")
    raw[:, 0] = rng.normal(0, 1e-3, 100)
    reduction = ts.build_reduction(raw[:50], raw[:0])
    raw[50:, 0] += 0.5
    standardised = reduction.get_layer("standardised")(raw)
    assert np.linalg.norm(standardised, axis=1).max() < 1.4


# -- Temporal and regression stages


def test_the_forget_gate_starts_at_its_bias_and_the_others_at_0(constants):
    constants(LSTM_UNITS=3, FORGET_BIAS=-1.5)
    bias = ts.build_temporal(7).get_layer("lstm").get_weights()[2]
    assert bias.tolist() == [0] * 3 + [-1.5] * 3 + [0] * 6


# -- Weights and precision


def test_imagenet_weights_are_what_keras_downloads(constants, video, monkeypatch, capsys):
    """By Keras's own code, but for the download itself."""
    keras.utils.set_random_seed(7)
    source = RESNET50(include_top=False, weights=None, input_shape=(*SIZE, 3))
    source.save_weights(video / "resnet50.weights.h5")
    asked = []
    monkeypatch.setattr(keras.applications, "ResNet50", RESNET50)
    monkeypatch.setattr(sys.modules[RESNET50.__module__].file_utils, "get_file",
                        lambda name, *_, **__: asked.append(name) or video / "resnet50.weights.h5")
    constants(WEIGHTS="imagenet")
    resnet, weights, is_random = ts.load_resnet50()
    assert asked == [ts.IMAGENET_FILE]
    assert (weights, is_random) == ("imagenet", False) and capsys.readouterr().err == ""
    kernels = (model.get_layer("conv2_block1_3_conv").get_weights()[0] for model in (source, resnet))
    np.testing.assert_array_equal(*kernels)


def test_a_failed_download_is_one_line_and_random_weights(constants, monkeypatch, capsys):
    def build(include_top, weights, input_shape):
        if weights == "imagenet":
            raise Exception("URL fetch failure on https://example.org: 404 " + "and so on " * 99)
        return shallow_resnet50(include_top, weights, input_shape)

    monkeypatch.setattr(keras.applications, "ResNet50", build)
    constants(WEIGHTS="imagenet")
    resnet, weights, is_random = ts.load_resnet50()
    (line,) = capsys.readouterr().err.splitlines()
    assert "worse" in line and ts.IMAGENET_FILE in line and "[...]" not in line and len(line) < 250
    assert weights.startswith("random") and is_random
    constants(WEIGHTS=None)
    pairs = zip(resnet.get_weights(), ts.load_resnet50()[0].get_weights())
    assert all((a == b).all() for a, b in pairs), "the same that WEIGHTS = None gives"


def test_trained_weights_from_a_file_are_read_at_their_own_layers(run, video, figures):
    """From a file whose name would be mathematics in a figure's title."""
    resnet = shallow_resnet50(False, None, (*SIZE, 3))
    resnet.save_weights(video / "resnet50$x_0$.weights.h5")
    metrics, _ = run(WEIGHTS="resnet50$x_0$.weights.h5", FEATURE_LAYERS={"conv1_relu": (1, 2)},
                     FEATURE_LAYERS_RANDOM={"conv2_block1_out": (1, 1)})
    assert metrics["weights"] == "resnet50$x_0$.weights.h5"
    assert metrics["features"] == 2 * 64 * 2, "means and deviations of 64 channels in two cells"


def test_bfloat16_counts_like_float32(finished, run, constants):
    """A model keeps the precision that its features were computed in, wherever it counts."""
    exact = pd.read_csv(finished / "outputs" / "predictions.csv")["predicted"]
    metrics, table = run(PRECISION="mixed_bfloat16")
    assert metrics["precision"] == "mixed_bfloat16" and (table["predicted"] != exact).any()
    assert np.abs(table["predicted"] - exact).max() < 0.3
    constants(PRECISION="float32")
    assert np.abs(count(finished)["count"].to_numpy() - table["predicted"]).max() < 1e-3


def test_auto_takes_bfloat16_where_the_processor_is_made_for_it(constants):
    constants(PRECISION="auto")
    device, precision = ts.choose_precision()
    assert device == "CPU" or device.startswith("GPU:0")
    cpuinfo = Path("/proc/cpuinfo")
    if device == "CPU" and cpuinfo.exists():
        has_units = any(unit in cpuinfo.read_text() for unit in ("avx512_bf16", "amx_bf16"))
        assert precision == ("mixed_bfloat16" if has_units else "float32")
    constants(PRECISION="float32")
    assert ts.choose_precision() == (device, "float32")
