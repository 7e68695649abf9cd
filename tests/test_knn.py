"""The nearest-neighbour probe against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from samantics.errors import StudyError
from samantics.probing import linear
from samantics.probing.knn import TEMPERATURE, knn_probe
from stub_encoder import CLASSES, MEAN, Data, overlapping_classes, stored


@pytest.fixture(scope="module")
def data() -> Data:
    return overlapping_classes()


@pytest.mark.parametrize("k", [1, 5, 10, 50, 200])
def test_knn_is_sklearns_with_dinov2s_weights(k: int, data: Data) -> None:
    x, y, test_x, test_y = data
    model = KNeighborsClassifier(k, weights=lambda far: np.exp((1 - far) / TEMPERATURE), metric="cosine").fit(x, y)
    shares = model.predict_proba(test_x)
    result = knn_probe(x, y, test_x, test_y, CLASSES, k)
    # sums of float32 cosines differ in the seventh digit: votes as near to each other as that may go either way
    clear = np.diff(np.sort(shares, axis=1)[:, -2:])[:, 0] > 1e-4
    assert clear.mean() > 0.95
    assert np.array_equal(result.predictions[0][clear], shares.argmax(1)[clear])
    if k >= 50:  # else classes without a vote fill the five
        top5 = (np.argsort(-shares, axis=1)[:, :5] == test_y[:, None]).any(1)
        assert abs(top5.mean() - result.top5.mean()) < 0.01


def test_streamed_features_give_what_arrays_give(data: Data, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, test_x, test_y = data
    x, test_x = x / np.abs(x).max(0), test_x / np.abs(x).max(0)
    columns = [stored(tmp_path / name, part).column(MEAN) for name, part in (("a", x), ("b", test_x))]
    halves = [part.astype(np.float16).astype(np.float32) for part in (x, test_x)]
    whole = knn_probe(halves[0], y, halves[1], test_y, CLASSES)
    monkeypatch.setattr(linear, "CHUNK_BYTES", 4 * 24 * 150)
    streamed = knn_probe(columns[0], y, columns[1], test_y, CLASSES)
    assert (streamed.predictions == whole.predictions).mean() > 0.995  # cosines of smaller products, summed otherwise


def test_bad_input(data: Data) -> None:
    x, y, test_x, test_y = data
    with pytest.raises(StudyError, match="not all finite"):
        knn_probe(np.where(x > 0, x, np.nan), y, test_x, test_y, CLASSES)
    with pytest.raises(StudyError, match="smaller k"):
        knn_probe(x, y, test_x, test_y, CLASSES, k=10_000)
    with pytest.raises(StudyError, match="no test images"):
        knn_probe(x, y, test_x[:0], test_y[:0], CLASSES)
