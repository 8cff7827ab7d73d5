"""Fine-tuning: runs of windows against windows, what is trained, resumption, several devices."""

import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pytest

import tscrowdnet_train as ts
from conftest import TINY

SMALL = {"FINE_TUNE_EPOCHS": 2, "RUN_LENGTH": 4, "FINE_TUNE_RATE": 1e-4}
SHALLOW = SMALL | {"READ_OUT_RANDOM": {"conv1_relu": (3, 4)}}


@pytest.mark.parametrize("rows", [range(0, 20), range(0, 13), range(13, 20), range(19, 20)])
@pytest.mark.parametrize("ids", [range(20), [*range(5), *range(9, 24)], range(0, 40, 2)])
def test_runs_are_made_of_the_windows(ids, rows, constants):
    constants(RUN_LENGTH=4)
    ids, counts = np.array(ids), np.arange(20) + 100.0
    windows = ts.make_windows(ids, ts.SEQUENCE_LENGTH)
    runs, targets = ts.make_runs(ids, counts, np.array(rows), 3)
    assert len(runs) % 3 == 0, "whole batches"
    seen = set()
    for run, target in zip(runs, targets):
        for start, count in enumerate(target):
            assert run[start : start + ts.SEQUENCE_LENGTH].tolist() == windows[int(count - 100)].tolist()
            seen.add(int(count - 100))
    assert seen >= set(rows) and max(seen) == max(rows), "each window is in a run, and none of later frames"


@pytest.fixture
def model(video, constants):
    """(whole model, frames (N, H, W, 3), ids, counts) of the tiny video."""
    constants(**SMALL)
    labels = ts.read_labels(video / "labels.csv")
    frames, counts = ts.Frames(ts.find_frames(labels.index)[0], ts.FRAME_SIZE), labels.to_numpy()
    backbone, *_ = ts.prepare_backbone(frames, np.arange(16))
    features = backbone.predict(frames[np.arange(16)], verbose=0)
    readout = ts.build_readout(features, counts[:16], ts.view_sizes(backbone))
    return ts.build_model(backbone, readout, ts.build_head(counts[:16])), frames[np.arange(20)], labels.index.to_numpy(), counts


def test_runs_give_the_loss_and_the_gradients_of_the_plain_model(model):
    tf = pytest.importorskip("tensorflow")
    model, frames, ids, counts = model
    per_frame, _ = ts.split_model(model)
    per_frame.trainable = True
    variables = [*per_frame.trainable_variables, *model.get_layer("head").trainable_variables]
    assert len(variables) > 10
    rng = np.random.default_rng(0)
    for variable in variables:
        variable.assign(variable.numpy() * rng.uniform(0.9, 1.1, variable.shape))  # so that there is a loss
    runs, targets = (part[[0, 2]] for part in ts.make_runs(ids, counts, np.arange(16), 1))
    rows = np.array([0, 1, 2, 3, 8, 9, 10, 11])
    windows = ts.make_windows(ids, ts.SEQUENCE_LENGTH)[rows]

    def loss_and_gradients(network, inputs, truth):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(tf.reshape(network(inputs), [-1]) - truth.ravel()))
        return float(loss), tape.gradient(loss, [variable.value for variable in variables])

    loss, gradients = loss_and_gradients(ts.build_run_model(model), frames[runs], targets)
    expected, plain = loss_and_gradients(model, frames[windows], counts[rows])
    assert runs.shape == (2, 8) and windows.shape == (8, 5), "16 frames pass the backbone, not 40"
    assert loss > 0.1 and loss == pytest.approx(expected, rel=1e-4)
    for name, from_runs, from_windows in zip([variable.path for variable in variables], gradients, plain):
        size = np.abs(from_windows).max()
        np.testing.assert_allclose(from_runs, from_windows, rtol=1e-3, atol=1e-3 * size, err_msg=name)
    assert sum(np.abs(gradient).max() > 0 for gradient in plain) > 10


def test_a_frame_of_the_empty_scene_has_finite_gradients(model):
    """There the distance from the empty scene is 0, where a square root has none."""
    tf = pytest.importorskip("tensorflow")
    model, frames, *_ = model
    per_frame, _ = ts.split_model(model)
    per_frame.trainable = True
    empty = np.median(frames[:16:5], axis=0)[None].astype("uint8")
    with tf.GradientTape() as tape:
        estimate = per_frame(np.concatenate([empty, frames[:1]]))
    distance = keras.Model(per_frame.input, per_frame.get_layer("background").output).predict(empty, verbose=0)
    gradients = tape.gradient(estimate, [variable.value for variable in per_frame.trainable_variables])
    assert (distance == 0).any() and all(np.isfinite(gradient).all() for gradient in gradients)


def saved(video):
    model = keras.saving.load_model(video / "outputs" / "ts_crowdnet.keras", compile=False)
    return model, ts.split_model(model)[0].get_layer("resnet50")


def test_the_named_stages_are_trained_and_saved(run, video, capsys):
    metrics, table = run(**SMALL, FINE_TUNE_FROM="conv2")
    after, resnet = saved(video)
    frames = ts.Frames(ts.find_frames(table["id"])[0], ts.FRAME_SIZE)
    before = ts.prepare_backbone(frames, np.arange(16))[0].get_layer("resnet50")
    for layer, tuned in zip(before.layers, resnet.layers):
        for old, new in zip(layer.get_weights(), tuned.get_weights()):
            assert (old == new).all() == (layer.name < "conv2"), layer.name
    printed = capsys.readouterr().out
    assert "Fine-tuning from conv2: some" in printed and metrics["seconds"]["fine-tune"] > 0
    history = pd.read_csv(video / "outputs" / "history.csv")
    assert history["epoch"].tolist() == [0, 1, 2, 3] and history.notna().all(axis=None)
    windows = ts.make_windows(table["id"].to_numpy(), ts.SEQUENCE_LENGTH)
    counts = after.predict(frames[np.arange(20)][windows], verbose=0)[:, 0]
    np.testing.assert_allclose(counts, table["predicted"], atol=1e-3)
    assert history["val_mae"].iloc[-1] == pytest.approx(metrics["mae"], abs=1e-3), "4 validation frames: one run"


def test_fine_tuning_learns(run, video):
    """From read-out and head that know little, the loss falls."""
    run(**SHALLOW | {"FINE_TUNE_EPOCHS": 8, "FINE_TUNE_RATE": 1e-3}, PENALTIES=[100.0], ESTIMATE_NOISE=0.0)
    loss = pd.read_csv(video / "outputs" / "history.csv")["loss"]
    assert loss.iloc[-1] < 0.5 * loss[TINY["EPOCHS"] - 1]


def test_interrupted_fine_tuning_goes_on_to_the_same_counts(run, constants, monkeypatch, capsys):
    """Not to the last digit: threads sum a convolution's gradients in any order."""
    _, expected = run(**SHALLOW, OUTPUTS="undisturbed")
    save, epochs = ts.Checkpoint.on_epoch_end, []

    def third(*arguments, **options):
        save(*arguments, **options)
        epochs.append(arguments[1])
        if len(epochs) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(ts.Checkpoint, "on_epoch_end", third)
    constants(**SHALLOW)
    with pytest.raises(KeyboardInterrupt):
        ts.main()
    monkeypatch.setattr(ts.Checkpoint, "on_epoch_end", save)
    capsys.readouterr()
    _, resumed = run(**SHALLOW)
    printed = capsys.readouterr().out
    assert "Going on after epoch 2 of 2" in printed and "Going on after epoch 1 of 2" in printed
    np.testing.assert_allclose(resumed["predicted"], expected["predicted"], atol=1e-4)


def test_a_gpu_trains_resnet50_in_its_own_precision(run, video, monkeypatch):
    """The policy of GPUs, on a CPU; what is saved is float32 again."""
    policies = []
    train = ts.train

    def watch(model, *arguments, **options):
        policies.append({layer.dtype_policy.name for layer in model._flatten_layers() if layer.name.startswith("conv")})
        return train(model, *arguments, **options)

    monkeypatch.setattr(ts, "train", watch)
    monkeypatch.setattr(keras.distribution, "list_devices", lambda *_: ["gpu:0"])
    metrics, _ = run(**SHALLOW)
    assert policies[1] == {"mixed_bfloat16"}
    assert {layer.dtype_policy.name for layer in saved(video)[0]._flatten_layers()} == {"float32"}
    assert metrics["mae"] < 3


def test_a_stage_that_is_not_read_is_refused(constants):
    constants(FINE_TUNE_FROM="conv5", FINE_TUNE_EPOCHS=1)
    with pytest.raises(SystemExit, match="FINE_TUNE_FROM.*conv2_block1_out"):
        ts.run_as_script()


DEVICES = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
import tensorflow as tf
tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2)
import tscrowdnet_train as ts
from pathlib import Path
for name, value in {constants!r}.items():
    setattr(ts, name, value)
ts.ROOT = Path({video!r})
scope, used = ts.data_parallel, []
ts.data_parallel = lambda devices: used.append(len(devices)) or scope(devices)
ts.main()
assert used == [2]
"""


def test_two_devices_give_the_result_of_one(run, video):
    """Steps of two runs; three runs and a single one of validation frames: both are filled up."""
    if keras.backend.backend() != "tensorflow":
        pytest.skip("two logical CPU devices by TensorFlow")
    root, changes = Path(ts.__file__).parent, SHALLOW | {"RUN_LENGTH": 6, "ESTIMATE_NOISE": 0.0}
    _, one = run(**changes, RUN_BATCH=2)
    constants = TINY | changes | {"RUN_BATCH": 1, "OUTPUTS": "two"}
    code = DEVICES.format(tests=str(root / "tests"), root=str(root), video=str(video), constants=constants)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    two = pd.read_csv(video / "two" / "predictions.csv")
    np.testing.assert_allclose(two["predicted"], one["predicted"], atol=1e-3)
    errors = pd.read_csv(video / "outputs" / "history.csv")["val_mae"]
    assert abs(errors.iloc[-1] - errors[TINY["EPOCHS"] - 1]) > 0.01, "fine-tuning made a difference"
