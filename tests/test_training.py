"""What is learnt, from which frames, and how training goes."""

from functools import partial

import keras
import numpy as np
import pandas as pd
import pytest
from PIL import Image

import tscrowdnet_train as ts
from conftest import (
    README, RESNET50, SIZE, Stopped, frame_paths, read_frames, results, write_labels
)  # fmt: skip


def test_it_learns_what_the_features_say_and_starts_at_the_mean(constants, graph):
    """Counts are written in one half of the features; the other half is noise."""
    constants(EPOCHS=20, BATCH_SIZE=16, SEQUENCE_LENGTH=2)
    rng = np.random.default_rng(0)
    counts = rng.integers(10, 50, 200).astype(float)
    features = rng.normal(0, 1, (200, 40)).astype("float32")
    features[:, :20] += ((counts - 30) / 5)[:, None]
    vectors = ts.build_reduction(features[:150], features[:0]).predict(features, verbose=0)
    clip_starts = np.zeros(200, int)
    windows = ts.make_windows(np.arange(200), clip_starts, 2)
    keras.utils.set_random_seed(ts.SEED)
    model = keras.Sequential([ts.build_temporal(40), ts.build_regression(counts[:150])])
    validation = ts.WindowSequence(vectors, windows[150:], counts[150:], 64)
    before = model.predict(validation, verbose=0)
    assert before.mean() == pytest.approx(counts[:150].mean(), abs=4)
    draw = partial(ts.draw_windows, clip_starts=clip_starts, copy_of=np.arange(200))
    training = ts.WindowSequence(vectors, windows[:150], counts[:150], 16, draw)
    history = ts.train(model, training, validation)
    error = np.abs(model.predict(validation, verbose=0)[:, 0] - counts[150:]).mean()
    assert error < 0.3 * np.abs(counts[150:] - counts[:150].mean()).mean()
    assert history["val_mae"].iloc[-1] == pytest.approx(error, rel=1e-3)


def test_nothing_is_fitted_to_validation_frames(finished, run):
    """Other validation frames and counts leave the predictions of training frames as they were, to
    the digit."""
    before = pd.read_csv(finished / "outputs" / "predictions.csv")
    is_train = before["split"] == "train"
    counts = before["true"].where(is_train, 90 - before["true"])
    pd.DataFrame({"id": before["id"], "count": counts}).to_csv(finished / "labels.csv", index=False)
    for path in frame_paths(finished)[16:]:
        Image.effect_noise(SIZE[::-1], 90).convert("RGB").save(path)
    _, after = run()
    assert is_train.sum() == 16 and (before["predicted"] == after["predicted"])[is_train].all()
    assert (before["predicted"] != after["predicted"])[~is_train].all(), "the new frames are seen"


def test_same_seed_same_digits_and_another_seed_another_model(finished, run):
    first, table = results(finished / "outputs")
    second, again = run(OUTPUTS="again")
    other, changed = run(OUTPUTS="other", SEED=1)
    assert table.equals(again) and second["mae"] == first["mae"]
    assert (table["predicted"] != changed["predicted"]).any() and other["mae"] != first["mae"]


def test_training_is_as_the_readme_says(run, video, monkeypatch):
    """A rate that falls to 0 along a half cosine, another order in each epoch, a loss in variances
    of the training counts."""
    seen, fit = [], keras.Model.fit

    def watch(model, training, **options):
        class Watch(keras.callbacks.Callback):
            def on_epoch_end(self, epoch, logs=None):
                seen.append((float(model.optimizer.learning_rate), training.order.tolist()))

        return fit(model, training, callbacks=[Watch()], **options)

    monkeypatch.setattr(keras.Model, "fit", watch)
    _, table = run(EPOCHS=3, LEARNING_RATE=0.1)
    rates, orders = zip(*seen)
    np.testing.assert_allclose(rates, [0.075, 0.025, 0], atol=1e-6)
    assert len(set(map(tuple, orders))) == 3
    assert all(sorted(order) == list(range(16)) for order in orders)
    history = pd.read_csv(video / "outputs" / "history.csv")
    variance = table["true"][:16].var(ddof=0)
    np.testing.assert_allclose(history["loss"], history["mse"] / variance, rtol=1e-4)


@pytest.mark.parametrize(("batch_size", "steps"), [(32, 4), (2, 8)])
def test_small_sets_take_at_least_four_steps_an_epoch(constants, monkeypatch, batch_size, steps):
    """16 training windows."""

    def check(model, training, **_):
        assert len(training) == steps
        raise Stopped

    monkeypatch.setattr(keras.Model, "fit", check)
    constants(BATCH_SIZE=batch_size)
    with pytest.raises(Stopped):
        ts.main()


def test_training_on_windows_of_frames_gives_the_same_predictions(run, monkeypatch):
    """CACHE_FEATURES = False: frames and copies pass TimeDistributed ResNet50 at every step."""
    write_labels(ts.ROOT, zip(range(1, 21), [3, 1, 4, 1, 5, 9] + [None] * 14))
    changes = {"AUGMENT": 0.5, "TRAIN_FRACTION": 0.67, "SEQUENCE_LENGTH": 2}
    _, expected = run(**changes)
    shapes, fit = [], keras.Model.fit

    def watch(model, training, **options):
        pixels = training[0][0]
        shapes.append((pixels.shape, pixels.dtype, [layer.name for layer in model.layers]))
        return fit(model, training, **options)

    monkeypatch.setattr(keras.Model, "fit", watch)
    _, table = run(CACHE_FEATURES=False, CACHE="none", **changes)
    assert shapes == [((1, 2, *SIZE, 3), "uint8", ["spatial", "temporal", "regression"])]
    assert not (ts.ROOT / "none").exists()
    np.testing.assert_allclose(table["predicted"], expected["predicted"], atol=1e-3)


def test_a_video_without_people_is_counted_as_empty(video, run):
    labels = pd.read_csv(video / "labels.csv")
    labels.assign(count=0).to_csv(video / "labels.csv", index=False)
    metrics, table = run()
    assert (table["predicted"] >= 0).all() and metrics["mae"] < 0.5 and np.isfinite(metrics["mse"])


def test_the_published_recipe_gives_the_published_network(constants, monkeypatch):
    """The README's constants; here with small frames."""
    block = README.read_text().split("<!--published-->")[1].split("```")[1].removeprefix("python\n")
    recipe = {}
    exec(block, {}, recipe)
    assert recipe.pop("FRAME_SIZE") == (224, 224) and set(recipe) <= set(vars(ts))

    def check(model, training, validation):
        temporal, regression = model.layers
        (lstm,) = temporal.layers
        assert lstm.input.shape == (None, 5, 2048) and lstm.units == 512 and lstm.dropout == 0.5
        assert regression.get_layer("dense").units == 256
        assert training[0][0].shape == (4, 5, 2048)
        raise Stopped

    monkeypatch.setattr(keras.applications, "ResNet50", RESNET50)
    monkeypatch.setattr(ts, "train", check)
    constants(**recipe | {"FRAME_SIZE": (32, 32)})
    with pytest.raises(Stopped):
        ts.main()


# -- Jittered copies


def test_copies_show_the_same_scene_in_other_light_from_a_nudged_camera(video, constants):
    frames = read_frames(video, copied=[0, 1, 2, 3])
    assert len(frames) == 24 and frames.copy_of[:5].tolist() == [20, 21, 22, 23, 4]
    pixels, copies = (frames[rows].astype(float) for rows in (range(4), range(20, 24)))
    with Image.open(frame_paths(video)[0]) as image:
        assert (pixels[0] == np.asarray(image)).all(), "frames themselves stay as they are"
    changes = np.abs(copies - pixels).mean(axis=(1, 2, 3))
    assert (2 < changes).all() and (changes < 60).all()
    assert np.ptp((copies - pixels).mean(axis=(1, 2, 3))) > 2, "each copy in a way of its own"
    constants(SEED=1)
    others = read_frames(video, copied=[3])
    assert (others[20] == copies[3]).all(), "a copy belongs to its frame, whatever the experiment"


def test_jitter_keeps_within_its_bounds():
    """A white cross on grey, its centre found again; a flat image, its brightness."""
    rng = np.random.default_rng(0)
    cross = np.zeros((200, 200, 3), "uint8")
    cross[95:105, 95:105] = 255
    flat = Image.new("RGB", (200, 200), (100, 100, 100))
    moves, lights = [], []
    for _ in range(60):
        jittered = np.asarray(ts.jitter(Image.fromarray(cross), rng))[..., 0]
        y, x = np.argwhere(jittered > 100).mean(axis=0)
        moves.append([x - 99.5, y - 99.5])
        lights.append(np.asarray(ts.jitter(flat, rng))[50:150, 50:150].mean() / 100)
    assert 3 < np.abs(moves).max() <= 0.02 * 200 * 1.04 + 1
    assert 0.8 <= min(lights) < 0.95 and 1.05 < max(lights) <= 1.22


@pytest.mark.parametrize("share", [0, 0.25, 0.3, 1])
def test_a_share_of_the_training_frames_has_copies_chosen_by_chance(constants, share):
    constants(AUGMENT=share)
    rng = np.random.default_rng(0)
    digests = [rng.bytes(16).hex() for _ in range(500)]
    rows = np.arange(20, 420)
    copied = ts.choose_copied(digests, rows)
    assert len(copied) == round(share * 400) == len(set(copied)) and set(copied) <= set(rows)
    assert (ts.choose_copied(digests, rows) == copied).all()
    if share == 0.25:  # labels at any stride have copies of the labelled frames
        for stride in (4, 5, 6, 8, 10):
            hits = np.isin(rows[stride - 1 :: stride], copied).mean()
            assert hits == pytest.approx(0.25, abs=0.12), stride
        half = ts.choose_copied(digests, rows[:200])
        assert set(half) <= set(copied), "fewer labels share the copies of more"
