"""Item vectors: computed once for one key, and standardised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.fake_engine import FakeEngine

from penchant.errors import StorageError
from penchant.interest.vectors import Scaling, default_layer, item_vectors, standardise

TEXTS = ["Heat (1995)", "Alien (1979)", "M (1931)"]


class Counting(FakeEngine):
    """Counts calls of embed and what each asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[dict[str, Any]] = []

    def embed(self, texts: Any, **kw: Any) -> Any:
        self.asked.append({"texts": list(texts), **kw})
        return super().embed(texts, **kw)


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Counting:
    monkeypatch.setenv("PENCHANT_CACHE", str(tmp_path / "cache"))
    return Counting()


def test_the_engine_is_asked_once_for_one_key(engine: Counting) -> None:
    first = item_vectors(engine, TEXTS, layer=2, template_hash="t")
    again = item_vectors(engine, TEXTS, layer=2, template_hash="t")
    assert len(engine.asked) == 1
    assert (engine.asked[0]["texts"], engine.asked[0]["layer"], engine.asked[0]["pooling"]) == (TEXTS, 2, "mean")
    assert first.tolist() == again.tolist() == FakeEngine().embed(TEXTS, layer=2).tolist()
    assert (first.shape, first.dtype, again.dtype) == ((3, 12), np.float32, np.float32)


def test_another_engine_of_the_same_fingerprint_is_not_asked(engine: Counting) -> None:
    item_vectors(engine, TEXTS, layer=2)
    other = Counting()
    item_vectors(other, TEXTS, layer=2)
    assert not other.asked


@pytest.mark.parametrize(
    "change",
    [
        {"layer": 1},
        {"pooling": "last"},
        {"template_hash": "u"},
        {"texts": [*TEXTS[:2], "M (1932)"]},
        {"texts": TEXTS[::-1]},
        {"texts": TEXTS[:2]},
        {"texts": ["Heat (1995)Alien", " (1979)", TEXTS[2]]},  # the same letters, cut elsewhere
        {"fingerprint": "another"},
    ],
    ids=str,
)
def test_all_that_decides_the_vectors_is_in_the_key(engine: Counting, change: dict[str, Any]) -> None:
    given: dict[str, Any] = {"texts": TEXTS, "layer": 2, "pooling": "mean", "template_hash": "t"}
    item_vectors(engine, given.pop("texts"), **given)
    engine.fingerprint = change.pop("fingerprint", engine.fingerprint)
    given |= {"texts": TEXTS} | change
    changed = item_vectors(engine, texts := given.pop("texts"), **given)
    assert len(engine.asked) == 2
    want = FakeEngine().embed(texts, layer=given["layer"], pooling=given["pooling"])
    np.testing.assert_array_equal(changed, want)


def test_altered_bytes_in_the_cache_are_found(engine: Counting, tmp_path: Path) -> None:
    item_vectors(engine, TEXTS, layer=2)
    (kept,) = (tmp_path / "cache").rglob("*.npy")
    data = bytearray(kept.read_bytes())
    data[-1] ^= 1
    kept.write_bytes(bytes(data))
    with pytest.raises(StorageError, match="corrupt"):
        item_vectors(engine, TEXTS, layer=2)


def test_a_failed_embedding_leaves_nothing_in_the_cache(engine: Counting, tmp_path: Path) -> None:
    def fail(*args: Any, **kw: Any) -> Any:
        raise RuntimeError("out of memory")

    engine.embed = fail  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="out of memory"):
        item_vectors(engine, TEXTS, layer=2)
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_the_default_layer_is_two_thirds_up() -> None:
    assert [default_layer(n) for n in (30, 3, 2, 1, 24)] == [20, 2, 1, 1, 16]


def test_standardised_dimensions_have_mean_0_and_deviation_1(rng: np.random.Generator) -> None:
    vectors = rng.standard_normal((50, 6)).astype(np.float32) * [1, 1e-3, 500, 1, 1, 1] + [0, 0, 3000, -7, 0, 0]
    vectors = vectors.astype(np.float32)
    before = vectors.copy()
    out = standardise(vectors)
    assert out.dtype == np.float32
    assert np.abs(out.mean(axis=0)).max() < 1e-3
    assert out.std(axis=0) == pytest.approx(np.ones(6), abs=1e-3)
    np.testing.assert_array_equal(vectors, before)
    # One scale and shift a dimension: the order within each stays.
    assert (np.argsort(out, axis=0) == np.argsort(vectors, axis=0)).all()


def test_a_dimension_that_never_changes_becomes_0(rng: np.random.Generator) -> None:
    vectors = np.column_stack([np.full(4, 7.0), rng.standard_normal(4)]).astype(np.float32)
    assert standardise(vectors)[:, 0].tolist() == [0, 0, 0, 0]
    assert standardise(vectors[:1]).tolist() == [[0, 0]]


def test_what_a_catalogue_does_not_vary_in_moves_no_later_vector() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(40, 6)).astype(np.float32)
    vectors[:, 2], vectors[:, 4] = 3.0, np.nan  # the same for all; a field that nobody has
    new = rng.normal(size=(5, 6)).astype(np.float32)
    scaled = Scaling.fit(vectors).apply(new)
    assert (scaled[:, [2, 4]] == 0).all()
    assert np.abs(scaled).max() < 5
    assert np.isfinite(Scaling.fit(vectors).apply(vectors)).all()
    few = rng.normal(size=(20, 64)).astype(np.float32)  # fewer items than dimensions
    whitened = Scaling.fit(few, "whiten")
    norms = [np.linalg.norm(whitened.apply(some), axis=1).max() for some in (few, rng.normal(size=(20, 64)))]
    assert norms[1] < 1.5 * norms[0]


def test_the_axes_of_whitening_have_a_sign_of_their_own() -> None:
    vectors = np.random.default_rng(1).normal(size=(60, 8)).astype(np.float32)
    one, two = Scaling.fit(vectors, "whiten").map, Scaling.fit(vectors[::-1].copy(), "whiten").map
    np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)
    assert (one[np.abs(one).argmax(axis=0), np.arange(8)] > 0).all()
