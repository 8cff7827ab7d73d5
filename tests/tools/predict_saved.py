"""Counts windows with a saved model, in a process that knows nothing of the script: python predict_saved.py MODEL WINDOWS COUNTS,
the last two .npy files. A helper of test_model.py."""

import sys

import keras
import numpy as np

path, windows, counts = sys.argv[1:]
model = keras.saving.load_model(path)
layers = [layer for part in model.layers for layer in getattr(getattr(part, "layer", part), "layers", [part])]
assert "TimeDistributed" in [type(layer).__name__ for layer in model.layers]
assert {layer.dtype_policy.name for layer in layers} <= {"float32", "uint8"}
assert model.input_shape == (None, 5, 48, 64, 3) and model.input.dtype == "uint8" and model.output_shape == (None, 1)
np.save(counts, np.asarray(model(np.load(windows)))[:, 0])
