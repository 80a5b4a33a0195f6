"""Train a click model in Keras and export it to ONNX with tf2onnx.

It needs TensorFlow, which recpress does not: run it in a separate environment
(``pip install tensorflow-cpu tf2onnx pandas pyarrow``). It reads ``data/train.parquet`` and writes
``model.onnx``, from which ``recpress new --onnx`` writes a bundle (docs/onnx-models.md).
"""

import keras
import numpy as np
import pandas as pd
import tf2onnx

USERS, ITEMS = 300, 400


def build_click_model() -> keras.Model:
    """Return a network over a user, an item, a list of items and a number."""
    user = keras.Input((), name="user", dtype="int64")
    item = keras.Input((), name="item", dtype="int64")
    history = keras.Input((None,), name="history", dtype="int64")
    price = keras.Input((1,), name="price")
    items = keras.layers.Embedding(ITEMS, 8, name="items")
    # The mean of the items, without padding. An empty list has the mean 0; with a mask, Keras's own
    # GlobalAveragePooling1D would divide 0 by 0.
    is_item = keras.ops.expand_dims(keras.ops.cast(keras.ops.not_equal(history, 0), "float32"), 2)
    count = keras.ops.maximum(keras.ops.sum(is_item, axis=1), 1)
    features = [
        keras.layers.Embedding(USERS, 8, name="users")(user),
        items(item),
        keras.ops.sum(items(history) * is_item, axis=1) / count,
        price,
    ]
    x = keras.layers.Concatenate(name="features")(features)
    x = keras.layers.Dense(32, activation="relu", name="hidden")(x)
    click = keras.layers.Dense(1, activation="sigmoid", name="click")(x)
    return keras.Model([user, item, history, price], click)


def main() -> None:
    """Train on ``data/train.parquet`` and write ``model.onnx``."""
    keras.utils.set_random_seed(0)
    data = pd.read_parquet("data/train.parquet")
    longest = data["history"].map(len).max()
    inputs = {name: data[name].to_numpy() for name in ("user", "item", "price")}
    inputs["history"] = np.stack(
        [np.pad(ids, (0, longest - len(ids))) for ids in data["history"]]  # with 0 at the end
    )
    model = build_click_model()
    model.compile(keras.optimizers.Adam(0.01), "binary_crossentropy")
    model.fit(inputs, data["click"].to_numpy(), batch_size=256, epochs=5, verbose=2)
    tf2onnx.convert.from_keras(model, opset=18, output_path="model.onnx")


if __name__ == "__main__":
    main()
