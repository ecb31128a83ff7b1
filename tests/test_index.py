"""Rows and search: sketches that keep inner products, shards on disk, FAISS against brute force."""

from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from conftest import padded_batch, tiny_model

from ekfac import SequenceBatch, attributable_layers, capture, fit, sequence_gradients, true_label_loss
from indexing import (
    FlatIndex,
    LayerBuckets,
    RowShards,
    Spreader,
    all_scores,
    encode_rows,
    exact_search,
    feature_rows,
    feature_spec,
    open_rows,
    query_rows,
    recall,
    spreaders,
)

CPU = torch.device("cpu")
LINEAR = ("*.attn.*", "*.mlp.*")


def spread(spreader: Spreader, whitened: torch.Tensor) -> torch.Tensor:
    """[N, width] of whitened gradients [N, O, J]."""
    target = torch.zeros((len(whitened), spreader.width))
    spreader.add(target, slice(None), whitened)
    return target


def shards_of(rows: np.ndarray, sizes: list[int]) -> RowShards:
    return RowShards(shards=tuple(np.split(rows.astype(np.float16), np.cumsum(sizes)[:-1])))


def heavy_tailed_rows(num_rows: int, length: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(num_rows, length)) * rng.lognormal(sigma=1.0, size=(num_rows, 1))).astype(np.float16)


def test_flat_index_equals_blockwise_exact_search() -> None:
    rows = shards_of(heavy_tailed_rows(500, 64), [200, 1, 299])
    queries = np.random.default_rng(1).normal(size=(7, 64)).astype(np.float32)
    found, expected = FlatIndex(rows).search(queries, 20), exact_search(queries, rows, 20)
    np.testing.assert_array_equal(found.numbers, expected.numbers)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-4, atol=1e-4)  # sums of 64 float32 products, in another order
    dense = queries @ np.concatenate(rows.shards).astype(np.float32).T
    np.testing.assert_array_equal(expected.numbers, np.argsort(-dense, axis=1, kind="stable")[:, :20])


def test_opponents_are_found_by_the_negated_query() -> None:
    rows = shards_of(heavy_tailed_rows(300, 32), [300])
    query = np.random.default_rng(2).normal(size=(1, 32)).astype(np.float32)
    np.testing.assert_array_equal(FlatIndex(rows).search(-query, 5).numbers[0], np.argsort(all_scores(query, rows)[0])[:5])


def test_more_neighbours_than_rows_gives_every_row_once() -> None:
    rows = shards_of(heavy_tailed_rows(5, 8), [5])
    assert sorted(FlatIndex(rows).search(np.ones((1, 8), dtype=np.float32), 50).numbers[0]) == [0, 1, 2, 3, 4]


def test_block_size_does_not_change_scores() -> None:
    rows = shards_of(heavy_tailed_rows(50, 16), [20, 30])
    places = [first for first, block in rows.blocks(block_bytes=7 * 32) for _ in block]
    assert len(places) == 50
    queries = np.ones((1, 16), dtype=np.float32)
    by_small_blocks = np.concatenate([queries @ block.astype(np.float32).T for _, block in rows.blocks(7 * 32)], axis=1)
    np.testing.assert_allclose(by_small_blocks, all_scores(queries, rows), rtol=1e-6)


@pytest.mark.parametrize("queries", [np.full((1, 8), np.nan, np.float32), np.ones((1, 9), np.float32), np.ones(8, np.float32)])
def test_impossible_queries_are_refused(queries: np.ndarray) -> None:
    rows = shards_of(heavy_tailed_rows(5, 8), [5])
    for search in (FlatIndex(rows).search, lambda queries, k: exact_search(queries, rows, k)):
        with pytest.raises(ValueError, match="quer"):
            search(queries, 1)


def test_recall_is_the_share_of_the_truth_that_was_found() -> None:
    assert recall([[1, 2, 3], [4]], [[1, 9], [4]]) == 0.75


def test_rows_on_disk_are_what_was_written(tmp_path: Path) -> None:
    rows = heavy_tailed_rows(6, 4)
    np.save(tmp_path / "a.npy", rows[:4])
    np.save(tmp_path / "b.npy", rows[4:])
    opened = open_rows([tmp_path / "a.npy", tmp_path / "b.npy"], 4)
    assert opened.num_rows == 6
    np.testing.assert_array_equal(np.concatenate(opened.shards), rows)
    with pytest.raises(ValueError, match="expected float16 rows of 5"):
        open_rows([tmp_path / "a.npy"], 5)
    np.save(tmp_path / "c.npy", rows.astype(np.float32))
    with pytest.raises(ValueError, match="float32"):
        open_rows([tmp_path / "c.npy"], 4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_rows_that_float16_cannot_hold_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="row 1"):
        encode_rows(torch.tensor([[1.0, 2.0], [value, 0.0]]))


def test_spreading_keeps_inner_products_without_bias() -> None:
    rng = np.random.default_rng(0)
    left, right = torch.from_numpy(rng.normal(size=(2, 1, 6, 10)))
    right = left + 0.3 * right
    exact = float((left * right).sum())
    estimates = []
    for seed in range(400):
        spreader = Spreader(LayerBuckets(name="layer", shape=(6, 10), start=0, width=16), seed, CPU)
        estimates.append(float((spread(spreader, left) * spread(spreader, right)).sum()))
    standard_error = np.std(estimates) / np.sqrt(len(estimates))
    assert abs(np.mean(estimates) - exact) < 4 * standard_error
    assert np.std(estimates) < 1.5 * float(left.norm() * right.norm()) * np.sqrt(2 / 16)


def test_spreading_uses_every_coordinate_once() -> None:
    buckets = LayerBuckets(name="layer", shape=(5, 7), start=0, width=8)
    spreader = Spreader(buckets, 0, CPU)
    matrix = torch.stack([spread(spreader, torch.eye(35)[n].reshape(1, 5, 7))[0] for n in range(35)])
    assert (matrix.abs().sum(1) == 1).all()
    assert set(matrix.abs().sum(0).tolist()) == {4.0, 5.0}


def test_layer_with_enough_buckets_is_kept_as_it_is() -> None:
    whitened = torch.randn(3, 5, 7)
    spreader = Spreader(LayerBuckets(name="layer", shape=(5, 7), start=0, width=35), 0, CPU)
    assert torch.equal(spread(spreader, whitened), whitened.reshape(3, -1))


@pytest.mark.parametrize("width", [8, 35])
def test_rows_of_a_layer_may_be_spread_some_at_a_time(width: int) -> None:
    whitened = torch.randn(3, 5, 7)
    spreader = Spreader(LayerBuckets(name="layer", shape=(5, 7), start=2, width=width), 0, CPU)
    target, expected = torch.zeros((3, 2 + width)), torch.zeros((3, 2 + width))
    spreader.add(expected, slice(None), whitened)
    for rows in (torch.tensor([0, 3]), torch.tensor([1, 2, 4])):
        spreader.add(target, rows, whitened[:, rows])
    torch.testing.assert_close(target, expected)
    assert target[:, :2].abs().max() == 0


def test_signs_stay_what_they_are() -> None:
    # An index is searched by later versions: where its coordinates went must never change.
    spreader = Spreader(LayerBuckets(name="layer", shape=(2, 3), start=0, width=2), 5, CPU)
    assert spreader.buckets.tolist() == [[0, 1, 0], [1, 1, 0]]
    assert spreader.signs.tolist() == [[-1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]


@pytest.mark.parametrize("row_length", [8, 57, 300, 10**6])
def test_buckets_are_shared_by_effective_dimension_within_what_layers_have(row_length: int) -> None:
    layers = attributable_layers(tiny_model("gpt2"), lambda m: m(input_ids=torch.ones((1, 2), dtype=torch.int64)), LINEAR).layers
    dimensions = {layer.name: 10.0 if ".0." in layer.name else 1.0 for layer in layers}
    spec = feature_spec(layers, dimensions, row_length, seed=0)
    sizes = {layer.name: layer.shape[0] * layer.shape[1] for layer in layers}
    assert spec.row_length == min(row_length, sum(sizes.values()))
    assert all(1 <= place.width <= sizes[place.name] for place in spec.layers)
    assert [place.start for place in spec.layers] == np.concatenate([[0], np.cumsum([p.width for p in spec.layers])[:-1]]).tolist()
    if row_length == 300:
        wide = sum(place.width for place in spec.layers if ".0." in place.name)
        assert wide == pytest.approx(300 * 10 / 11, abs=4)


def test_more_layers_than_buckets_is_refused() -> None:
    layers = attributable_layers(tiny_model("gpt2"), lambda m: m(input_ids=torch.ones((1, 2), dtype=torch.int64)), LINEAR).layers
    with pytest.raises(ValueError, match="bytes_per_sequence"):
        feature_spec(layers, {layer.name: 1.0 for layer in layers}, 3, seed=0)


def test_rows_without_spreading_give_exact_damped_influence(architecture: str) -> None:
    model, batch = tiny_model(architecture), padded_batch(lengths=(7, 4, 5, 7))
    factors, coverage = fit(model, [batch])
    spec = feature_spec(coverage.layers, {name: f.effective_dimension() for name, f in factors.items()}, 10**9, seed=0)
    signs = spreaders(spec, CPU)
    rows, self_influence = feature_rows(model, coverage.layers, factors, spec, signs, true_label_loss, batch)
    gradients: dict[str, torch.Tensor] = {}
    capture(
        model,
        coverage.layers,
        lambda: true_label_loss(model, batch),
        batch.reached,
        lambda layer, record: gradients.__setitem__(layer.name, sequence_gradients(record)),
    )
    exact = sum(torch.einsum("qoj,noj->qn", factors[name].precondition(g), g) for name, g in gradients.items())
    vectors = {name: factors[name].precondition(gradient) for name, gradient in gradients.items()}
    queries = torch.from_numpy(query_rows(vectors, factors, spec, signs))
    torch.testing.assert_close((queries @ rows.T).double(), exact, rtol=1e-4, atol=1e-4 * float(exact.abs().max()))  # rows are float32
    torch.testing.assert_close(self_influence, exact.diagonal(), rtol=1e-9, atol=1e-9)


def test_rows_do_not_depend_on_batching() -> None:
    model, batch = tiny_model("llama"), padded_batch(lengths=(7, 4, 5, 7))
    factors, coverage = fit(model, [batch])
    spec = feature_spec(coverage.layers, {name: f.effective_dimension() for name, f in factors.items()}, 100, seed=0)
    signs = spreaders(spec, CPU)
    whole, _ = feature_rows(model, coverage.layers, factors, spec, signs, true_label_loss, batch)
    for n in range(4):
        length = int(batch.counted[n].nonzero().max()) + 1
        one = SequenceBatch(tokens=batch.tokens[n : n + 1, :length], counted=batch.counted[n : n + 1, :length], keys=batch.keys[n : n + 1])
        row, _ = feature_rows(model, coverage.layers, factors, spec, signs, true_label_loss, one)
        torch.testing.assert_close(row[0], whole[n], rtol=1e-5, atol=1e-5)


def test_layers_left_out_of_a_query_do_not_count() -> None:
    model, batch = tiny_model("gpt2"), padded_batch()
    factors, coverage = fit(model, [batch])
    spec = feature_spec(coverage.layers, {name: f.effective_dimension() for name, f in factors.items()}, 200, seed=0)
    name = coverage.layers[2].name
    gradients = {name: torch.randn(1, *coverage.layers[2].shape, dtype=torch.float64)}
    row = query_rows(gradients, factors, spec, spreaders(spec, CPU))[0]
    place = next(place for place in spec.layers if place.name == name)
    inside = np.zeros(spec.row_length, dtype=bool)
    inside[place.start : place.start + place.width] = True
    assert np.abs(row[~inside]).max() == 0
    assert np.abs(row[inside]).max() > 0


@pytest.mark.skipif(faiss.get_num_gpus() == 0, reason="FAISS sees no GPU")
def test_gpu_index_equals_exact_search() -> None:
    rows = shards_of(heavy_tailed_rows(500, 64), [500])
    queries = np.random.default_rng(1).normal(size=(7, 64)).astype(np.float32)
    assert recall(FlatIndex(rows).search(queries, 10).numbers, exact_search(queries, rows, 10).numbers) > 0.98
