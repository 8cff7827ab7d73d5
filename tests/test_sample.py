"""The shipped sample is what its code renders, and worth training on."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import render_sample

ROOT = Path(__file__).resolve().parents[1]


def test_the_shipped_frames_are_what_the_code_renders():
    labels = pd.read_csv(ROOT / "labels.csv", index_col="id")["count"]
    for frame, (rendered, count) in zip([1], render_sample.pictures(0)):
        with Image.open(ROOT / "frames" / "frames" / f"seq_{frame:06d}.jpg") as image:
            shipped = np.asarray(image)
        assert count == labels[frame]
        assert np.abs(shipped.astype(int) - rendered).mean() < 6, "JPEG loses a little, not more"


def test_the_sample_has_the_form_and_the_spread_of_mall():
    labels = pd.read_csv(ROOT / "labels.csv")
    paths = sorted((ROOT / "frames" / "frames").iterdir())
    assert list(labels.columns) == ["id", "count"] and labels["id"].tolist() == list(range(1, len(paths) + 1))
    assert [path.name for path in paths] == [f"seq_{frame:06d}.jpg" for frame in labels["id"]]
    assert sum(path.stat().st_size for path in paths) < 8e6
    counts = labels["count"]
    assert 28 <= counts.mean() <= 34 and 5 <= counts.std() <= 9 and counts.min() >= 10 and counts.max() <= 56
    assert counts.autocorr() > 0.8
    held_out = counts[160:]
    assert (held_out - counts[:160].mean()).abs().mean() > 5, "the mean predictor must not look good by chance"
    with Image.open(paths[0]) as image:
        assert image.size == (640, 480) and image.mode == "RGB" and image.format == "JPEG"


def test_rendering_never_overwrites_frames_of_others(tmp_path):
    (tmp_path / "frames" / "frames").mkdir(parents=True)
    mine = tmp_path / "frames" / "frames" / "seq_000001.jpg"
    Image.new("RGB", (640, 480)).save(mine)
    before = mine.read_bytes()
    with pytest.raises(SystemExit, match="did not render"):
        render_sample.render(tmp_path, frames=1, seed=0)
    assert mine.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["frames"]
