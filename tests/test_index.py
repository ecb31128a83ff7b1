"""Rows and search: sketches that keep inner products, shards on disk, FAISS against brute force."""

import math
import resource
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, padded_batch, tiny_model

from ekfac import LayerFactors, SequenceBatch, attributable_layers, capture, fit, sequence_gradients, true_label_loss
from indexing import (
    Encoding,
    FeatureSpec,
    LayerBuckets,
    RowFormat,
    RowIndex,
    RowShards,
    Spreader,
    best,
    exact_search,
    feature_rows,
    feature_spec,
    group_duplicates,
    open_rows,
    query_rows,
    recall,
    row_length_within,
    row_scores,
    spreaders,
)
from indexing.features import FOLDED_NUMBERS
from indexing.sparse import SAMPLED, DamagedRow, SparseFormat, largest
from indexing.sparse_reading import decode, scores

ENCODINGS: tuple[Encoding, ...] = ("float16", "int8", "bit", "sparse")
LINEAR = ("*.attn.*", "*.mlp.*")


def spreader_of(shape: tuple[int, int], width: int, *, seed: int = 0, start: int = 0, eigenvalues: torch.Tensor | None = None) -> Spreader:
    """Of factors that whiten nothing when no eigenvalues are given: their inverse and their shrinkage are one."""
    eigenvalues = torch.ones(shape) if eigenvalues is None else eigenvalues
    factor = LayerFactors(input_vectors=None, output_vectors=None, eigenvalues=eigenvalues, damping=0.0)
    buckets = LayerBuckets(name="layer", shape=shape, start=start, width=width)
    return Spreader(buckets, FeatureSpec(layers=(buckets,), seed=seed), factor)


def spread(spreader: Spreader, gradients: torch.Tensor) -> torch.Tensor:
    """[N, width] of gradients [N, O, J] in the eigenbasis."""
    target = spreader.nothing(len(gradients))
    spreader.add(target, slice(None), gradients)
    return target


def format_of(encoding: Encoding, length: int) -> RowFormat:
    """Sparse rows keep about two in three numbers."""
    return RowFormat(encoding=encoding, length=length, most_bytes=32 + length)


def shards_of(rows: np.ndarray, sizes: list[int], encoding: Encoding = "float16") -> RowShards:
    row_format = format_of(encoding, rows.shape[1])
    codes = row_format.encode(torch.from_numpy(rows))
    return RowShards(format=row_format, shards=tuple(np.split(codes, np.cumsum(sizes)[:-1])))


def heavy_tailed_rows(num_rows: int, length: int, seed: int = 0) -> np.ndarray:
    """With norms that differ tenfold, as those of gradients do."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(num_rows, length)) * rng.lognormal(sigma=1.0, size=(num_rows, 1))).astype(np.float32)


def some_queries(count: int, length: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, length)).astype(np.float32)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("length", [64, 61, 3])
def test_decoded_rows_are_the_nearest_that_the_encoding_has(encoding: Encoding, length: int) -> None:
    rows = heavy_tailed_rows(50, length)
    row_format = format_of(encoding, length)
    codes = row_format.encode(torch.from_numpy(rows))
    decoded = row_format.decode(codes)
    assert codes.shape == (50, row_format.bytes_per_row)
    assert codes.dtype == np.uint8
    largest = np.abs(rows).max(axis=1, keepdims=True)
    if encoding == "float16":
        np.testing.assert_allclose(decoded, rows, rtol=2**-11, atol=1e-7)
    elif encoding == "int8":
        assert (np.abs(decoded - rows) <= 0.5001 * largest / 127).all()
    elif encoding == "bit":
        expected = np.sign(rows) * (np.square(rows).sum(1) / np.abs(rows).sum(1))[:, None]
        np.testing.assert_allclose(decoded, expected, rtol=1e-5)
    else:
        for kept, row in zip(decoded, rows, strict=True):
            descending = np.argsort(-np.abs(row), kind="stable")
            largest_places = descending[: np.count_nonzero(kept)]
            assert set(np.flatnonzero(kept)) == set(largest_places)
            assert len(largest_places) == len(row) or (
                row_format.sparse.bits_for(descending[: len(largest_places) + 1]) > row_format.sparse.num_bits
            )
            roots, few = np.sqrt(np.abs(row[largest_places])), -(-len(largest_places) // 8)
            fewer, fewest = -(-few // 8), -(-few // 64)
            sizes = np.concatenate([np.full(len(part), part.mean()) for part in np.split(roots, [fewest, fewer, few]) if len(part)])
            sizes *= (row @ row) / (sizes @ np.abs(row[largest_places]))
            np.testing.assert_allclose(kept[largest_places], np.sign(row[largest_places]) * sizes, rtol=1e-5)
    if encoding in ("bit", "sparse"):
        np.testing.assert_allclose((decoded * rows).sum(1), np.square(rows).sum(1), rtol=1e-5)  # a query along x has the right product


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_row_of_zeros_stays_without_influence(encoding: Encoding) -> None:
    row_format = format_of(encoding, 20)
    assert np.abs(row_format.decode(row_format.encode(torch.zeros(2, 20)))).max() == 0


@pytest.mark.parametrize(
    ("encoding", "size", "length"),
    [
        ("float16", 1024, 512),
        ("int8", 1024, 1020),
        ("bit", 1024, 8160),
        ("bit", 3, 0),
        ("sparse", 1024, 2**20),
        ("sparse", 2**20, 2**27),
        ("sparse", 8, 0),
    ],
)
def test_rows_fill_the_bytes_they_may_have(encoding: Encoding, size: int, length: int) -> None:
    assert row_length_within(encoding, size) == length
    assert RowFormat(encoding=encoding, length=length, most_bytes=size).bytes_per_row <= max(size, 13)


@pytest.mark.parametrize(
    ("size", "length"), [(8192, 2**20), (1024, 2**20), (1024, 500_000), (512, 3000), (100, 65), (60, 10**6), (100, 1), (24, 50)]
)
@pytest.mark.parametrize("crowded", [False, True])
def test_sparse_rows_keep_as_much_as_there_is_room_for(size: int, length: int, crowded: bool) -> None:
    found = SparseFormat.within(size, length)
    assert found.num_bytes <= size
    rng = np.random.default_rng(0)
    row = rng.standard_normal(length).astype(np.float32)
    if crowded:  # what is large is in a few stretches of 128 numbers
        row *= np.repeat(np.where(rng.random(length // 128 + 1) < 8 * size / length / 2, 100, 1), 128)[:length]
    codes = found.encode(row[None])
    assert codes.shape == (1, found.num_bytes)
    decoded = decode(found, codes)
    descending, kept = np.argsort(-np.abs(row), kind="stable"), decoded.nnz
    assert sorted(decoded.indices) == sorted(descending[:kept])
    assert kept == length or found.bits_for(descending[: kept + 1]) > found.num_bits
    # places, signs and sizes of so many numbers anywhere cannot be told by fewer bits than this
    least = (math.lgamma(length + 1) - math.lgamma(kept + 1) - math.lgamma(length - kept + 1)) / math.log(2) + 1.6 * kept
    assert kept < 100 or crowded or least < found.num_bits < 1.4 * least
    assert size < 1024 or not crowded or kept > 1.3 * decode(found, found.encode(rng.permuted(row)[None])).nnz


def test_sparse_rows_stay_what_they_are() -> None:
    # An index is searched by later versions: what its bytes mean must never change.
    row = np.zeros(96, dtype=np.float32)
    row[[3, 32, 34, 36, 38, 40, 95]] = 9, 4, -4, 4, -4, 4, -1
    row_format = SparseFormat(length=96, num_bytes=32)
    (code,) = row_format.encode(row[None])
    assert code[:6].view(np.uint16).tolist() == [2, 1, 7]  # two places alone, one block, seven numbers
    expected = [
        *[1, 1, 0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 1],  # 3 and 95: the last five bits of each, lowest first, and the rests 0 and 2
        *[1, 1, 0],  # block 1 of 3: its last bit, and the rest 0
        *[1, 0, 1, 0, 1, 0, 1, 0, 1, *[0] * 23],  # its places
        *[1, 0, 1, 0, 1, 0, 1],  # signs of 9, -1, 4, -4, 4, -4, 4
        *[0, 0, 1, 0, 1, 1],  # the first is the larger one of these seven, which is larger still, and again
    ]
    bits = np.unpackbits(code[22:], bitorder="little").tolist()
    assert bits == expected + [0] * (len(bits) - len(expected))
    means = np.array([(5 * 2 + 1) / 6, 0, 0, 3])
    sizes = means * (81 + 5 * 16 + 1) / (means[3] * 9 + means[0] * 21)
    np.testing.assert_allclose(code[6:22].view(np.float32), sizes, rtol=1e-6)
    decoded = decode(row_format, code[None]).toarray()[0]
    np.testing.assert_allclose(decoded, np.sign(row) * np.where(row == 9, sizes[3], sizes[0]), rtol=1e-6)


SIZES = {
    "of any size": np.random.default_rng(0).standard_cauchy(2000),
    "large where none is sampled": np.where(np.arange(2000) % SAMPLED == 0, 0.5, np.arange(2000) % 7),
    "large where some are sampled": np.where(np.arange(2000) % SAMPLED == 0, 9.0, np.arange(2000) % 7),
    "equal": np.ones(2000),
    "mostly zero": np.where(np.arange(2000) > 1990, 1.0, 0.0),
    "zero": np.zeros(2000),
    "one": np.ones(1),
}


@pytest.mark.parametrize("kind", SIZES)
def test_the_largest_numbers_are_found_and_of_equal_ones_the_first(kind: str):
    sizes = np.abs(SIZES[kind]).astype(np.float32)
    order = np.argsort(-sizes, kind="stable")
    for count in {0, 1, 2, 9, 100, 700, len(sizes) - 1, len(sizes)}:
        expected = np.sort(order[:count])
        np.testing.assert_array_equal(largest(sizes, min(count, len(sizes))), expected[sizes[expected] > 0])


@pytest.mark.parametrize(("size", "length"), [(8192, 2**20), (200, 3001)])
def test_damaged_sparse_rows_are_refused_or_have_numbers_at_places_that_exist(size: int, length: int) -> None:
    row_format, rng = SparseFormat.within(size, length), np.random.default_rng(0)
    rows = rng.standard_t(2, size=(2, length)).astype(np.float32)
    rows[:, : length // 8 : 3] *= 20
    whole, query, refused = row_format.encode(rows), some_queries(1, length), list[str]()
    for damage in range(300):
        codes = whole.copy()
        first = int(rng.integers(0, (24, 22, size)[damage % 3]))
        codes[1, first : first + (1, 3, 100)[damage // 3 % 3]] = rng.integers(0, 256)
        try:
            places = decode(row_format, codes).indices
            scores(row_format, codes, query)
        except DamagedRow as error:
            refused.append(str(error))
        else:
            assert ((places >= 0) & (places < length)).all()
    assert len(refused) > 50
    assert all("damaged" in message for message in refused)


def test_few_numbers_among_zeros_are_all_that_is_kept() -> None:
    rows = np.zeros((2, 300), dtype=np.float32)
    rows[0, [3, 200, 299]] = 5, -2, 1
    rows[1, 7] = -4
    decoded = format_of("sparse", 300).decode(format_of("sparse", 300).encode(torch.from_numpy(rows)))
    assert np.flatnonzero(decoded[0]).tolist() == [3, 200, 299]
    assert np.sign(decoded[0, [3, 200, 299]]).tolist() == [1, -1, 1]
    assert np.flatnonzero(decoded[1]).tolist() == [7]
    assert decoded[1, 7] == -4


def test_a_single_number_is_kept_among_very_many() -> None:
    row = np.zeros((1, 2**25 + 1), dtype=np.float32)
    row[0, 2**25 - 7] = -3
    row_format = SparseFormat.within(200, row.shape[1])
    decoded = decode(row_format, row_format.encode(row))
    assert (decoded.indices.tolist(), decoded.data.tolist()) == ([2**25 - 7], [-3])


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("length", [64, 61])
def test_index_of_few_rows_equals_blockwise_exact_search(encoding: Encoding, length: int) -> None:
    rows, queries = shards_of(heavy_tailed_rows(500, length), [200, 1, 299], encoding), some_queries(7, length)
    found, expected = RowIndex(rows).search(queries, 20), exact_search(queries, rows, 20)
    dense = queries @ np.concatenate([rows.format.decode(shard) for shard in rows.shards]).T
    np.testing.assert_array_equal(expected.numbers, np.argsort(-dense, axis=1, kind="stable")[:, :20])
    if encoding == "bit":  # FAISS rounds the query to eight bits
        lengths = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(
            rows.format.decode(rows.take(found.numbers.ravel())), axis=1
        ).reshape(7, 20)
        assert (np.abs(found.scores - np.take_along_axis(dense, found.numbers, axis=1)) < 0.01 * lengths).all()
        assert recall(found.numbers, expected.numbers) > 0.97
    else:
        np.testing.assert_array_equal(found.numbers, expected.numbers)
        np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-4, atol=1e-4)  # sums of float32 products, in another order


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_sketch_finds_what_whole_rows_would(encoding: Encoding) -> None:
    length, rng = 6 * 8 * 768 // 4, np.random.default_rng(3)  # more numbers than a sketch keeps
    queries = some_queries(4, length)
    strength = np.linspace(0, 0.4, 600)[:, None] * rng.permuted(np.ones((600, 1)))
    rows = shards_of((strength * queries[np.arange(600) % 4] + rng.normal(size=(600, length))).astype(np.float32), [100, 500], encoding)
    assert rows.format.sketched(queries, 768).shape[1] <= 8 * 768 < length
    index, expected = RowIndex(rows, shortlist=100), exact_search(queries, rows, 10)
    assert recall(index.search(queries, 10).numbers, expected.numbers) == 1
    np.testing.assert_allclose(index.search(queries, 10).scores, expected.scores, rtol=0.02)


@pytest.mark.parametrize("shortlist", [None, 100])
@pytest.mark.parametrize("size", [1e-12, 1e7])
def test_length_of_a_query_makes_no_difference(shortlist: int | None, size: float) -> None:
    # FAISS takes inner products from squared distances, of which a long query would leave nothing.
    rows, queries = shards_of(heavy_tailed_rows(400, 256), [400], "bit"), some_queries(3, 256)
    index = RowIndex(rows, shortlist=shortlist)
    found, expected = index.search(np.float32(size) * queries, 10), index.search(queries, 10)
    assert recall(found.numbers, expected.numbers) > 0.95
    np.testing.assert_allclose(found.scores, np.float32(size) * expected.scores, rtol=1e-2)


def test_best_prefers_the_lower_number_among_equals() -> None:
    scores = np.array([[1.0, 3.0, 2.0, 3.0, 2.0, 2.0]], dtype=np.float32)
    for k in range(8):
        np.testing.assert_array_equal(best(scores, k).numbers, np.argsort(-scores, axis=1, kind="stable")[:, :k])


def test_more_shards_than_files_may_be_open_can_be_searched(tmp_path: Path) -> None:
    rows = heavy_tailed_rows(300, 8)
    written = shards_of(rows, [1] * 300)
    for place, shard in enumerate(written.shards):
        np.save(tmp_path / f"{place}.npy", shard)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, before[1]))
    try:
        opened = open_rows([tmp_path / f"{place}.npy" for place in range(len(written.shards))], written.format)
        np.testing.assert_array_equal(opened.take(np.arange(300)), np.concatenate(written.shards))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_weights_multiply_scores_in_both_stages() -> None:
    rows, queries = shards_of(heavy_tailed_rows(400, 256), [400], "bit"), some_queries(3, 256)
    weights = np.random.default_rng(5).lognormal(sigma=2, size=400)
    dense = queries @ rows.format.decode(rows.shards[0]).T * weights
    expected = np.argsort(-dense, axis=1)[:, :10]
    assert recall(RowIndex(rows, weights, shortlist=60).search(queries, 10).numbers, expected) > 0.95
    assert recall(RowIndex(rows, weights).search(queries, 10).numbers, expected) > 0.95


@pytest.mark.parametrize("shortlist", [None, 40])
def test_only_allowed_rows_are_found(shortlist: int | None) -> None:
    rows, queries = shards_of(heavy_tailed_rows(300, 64), [100, 200], "int8"), some_queries(3, 64)
    allowed = np.random.default_rng(6).random(300) < 0.5
    index = RowIndex(rows, shortlist=shortlist)
    scores = np.where(allowed, queries @ np.concatenate([rows.format.decode(shard) for shard in rows.shards]).T, -np.inf)
    found = index.search(queries, 5, allowed)
    assert allowed[found.numbers].all()
    assert recall(found.numbers, np.argsort(-scores, axis=1)[:, :5]) > 0.8
    few = np.zeros(300, dtype=bool)
    few[[7, 250]] = True
    numbers = index.search(queries, 5, few).numbers
    assert [sorted(row) for row in numbers[:, :2].tolist()] == [[7, 250]] * 3
    assert (numbers[:, 2:] == -1).all()
    assert (index.search(queries, 5, np.zeros(300, dtype=bool)).numbers == -1).all()


def test_opponents_are_found_by_the_negated_query() -> None:
    rows, query = shards_of(heavy_tailed_rows(300, 32), [300]), some_queries(1, 32, seed=2)
    scores = row_scores(query, rows, np.arange(300))
    np.testing.assert_array_equal(RowIndex(rows).search(-query, 5).numbers[0], np.argsort(scores[0])[:5])


def test_more_neighbours_than_rows_gives_every_row_once() -> None:
    rows = shards_of(heavy_tailed_rows(5, 8), [5])
    assert sorted(RowIndex(rows).search(np.ones((1, 8), dtype=np.float32), 50).numbers[0]) == [0, 1, 2, 3, 4]


def test_blocks_and_taken_rows_are_the_table() -> None:
    rows = shards_of(heavy_tailed_rows(50, 16), [20, 0, 30])
    table = np.concatenate(rows.shards)
    np.testing.assert_array_equal(np.concatenate([block for _, block in rows.blocks(block_bytes=7 * 32)]), table)
    assert [first for first, _ in rows.blocks(block_bytes=7 * 32)] == [0, 7, 14, 20, 27, 34, 41, 48]
    numbers = np.array([49, 0, 20, 19, 19])
    np.testing.assert_array_equal(rows.take(numbers), table[numbers])


@pytest.mark.parametrize("queries", [np.full((1, 8), np.nan, np.float32), np.ones((1, 9), np.float32), np.ones(8, np.float32)])
def test_impossible_queries_are_refused(queries: np.ndarray) -> None:
    rows = shards_of(heavy_tailed_rows(5, 8), [5])
    for search in (RowIndex(rows).search, lambda queries, k: exact_search(queries, rows, k)):
        with pytest.raises(ValueError, match="quer"):
            search(queries, 1)


def test_recall_is_the_share_of_the_truth_that_was_found() -> None:
    assert recall([[1, 2, 3], [4]], [[1, 9], [4]]) == 0.75


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_near_duplicates_are_one_result(encoding: Encoding) -> None:
    rng = np.random.default_rng(7)
    rows = rng.normal(size=(6, 2000)).astype(np.float32)
    rows[3] = 2 * rows[0] + 0.1 * rng.normal(size=2000)  # twice as long, in nearly the same direction
    rows[4] = rows[1] + 0.8 * rng.normal(size=2000)  # a cosine of .78
    groups = group_duplicates(shards_of(rows, [6], encoding), [5, 0, 1, 3, 4, 2], 4)
    assert groups == [[0], [1, 3], [2], [4]]
    assert group_duplicates(shards_of(rows, [6], encoding), [3, 0, 1], 1) == [[0, 1]]


def test_rows_on_disk_are_what_was_written(tmp_path: Path) -> None:
    written = shards_of(heavy_tailed_rows(6, 4), [4, 2])
    np.save(tmp_path / "a.npy", written.shards[0])
    np.save(tmp_path / "b.npy", written.shards[1])
    opened = open_rows([tmp_path / "a.npy", tmp_path / "b.npy"], written.format)
    assert opened.num_rows == 6
    np.testing.assert_array_equal(np.concatenate(opened.shards), np.concatenate(written.shards))
    with pytest.raises(ValueError, match="expected float16 rows of 10 bytes"):
        open_rows([tmp_path / "a.npy"], RowFormat(encoding="float16", length=5))
    np.save(tmp_path / "c.npy", np.zeros((2, 8), dtype=np.float32))
    with pytest.raises(ValueError, match="float32"):
        open_rows([tmp_path / "c.npy"], written.format)


@pytest.mark.parametrize(
    ("encoding", "value"), [("float16", 1e6), *((name, v) for name in ENCODINGS for v in (float("nan"), float("inf"), 1e19))]
)
def test_rows_that_cannot_be_held_are_refused(encoding: Encoding, value: float) -> None:
    with pytest.raises(ValueError, match="row 1"):
        format_of(encoding, 2).encode(torch.tensor([[1.0, 2.0], [value, 0.0]]))


def test_spreading_keeps_inner_products_without_bias() -> None:
    rng = np.random.default_rng(0)
    left, right = torch.from_numpy(rng.normal(size=(2, 1, 6, 10)))
    right = left + 0.3 * right
    exact = float((left * right).sum())
    estimates = []
    for seed in range(400):
        spreader = spreader_of((6, 10), 16, seed=seed)
        estimates.append(float((spread(spreader, left) * spread(spreader, right)).sum()))
    standard_error = np.std(estimates) / np.sqrt(len(estimates))
    assert abs(np.mean(estimates) - exact) < 4 * standard_error
    assert np.std(estimates) < 1.5 * float(left.norm() * right.norm()) * np.sqrt(2 / 16)


@pytest.mark.parametrize("width", [3, 8, 11, 34])
def test_spreading_uses_every_coordinate_once_and_every_bucket_about_equally(width: int) -> None:
    spreader = spreader_of((5, 7), width)
    matrix = torch.stack([spread(spreader, torch.eye(35)[n].reshape(1, 5, 7))[0] for n in range(35)])
    assert (matrix.abs().sum(1) == 1).all()
    used = matrix.abs().sum(0)
    assert used.max() - used.min() <= 2


@pytest.mark.parametrize(("inputs", "width"), [(64, 512), (64, 1000), (65, 2600), (97, 61), (384, 2700), (1537, 384), (768, 768)])
def test_a_heavy_column_is_spread_over_all_buckets(inputs: int, width: int) -> None:
    outputs = 8 * width // inputs + 64
    eigenvalues = torch.ones((outputs, inputs))
    column = torch.zeros((1, outputs, inputs))
    column[:, :, -1] = 1
    spreader = spreader_of((outputs, inputs), width, eigenvalues=eigenvalues)
    spreader.weights = spreader.weights.abs()  # without signs, a bucket's number is how many coordinates it got
    used = spread(spreader, column)[0]
    parts = torch.stack([part.sum() for part in used.chunk(8)]) / outputs
    assert parts.max() < 0.3  # of eighths of the buckets


def test_layer_with_enough_buckets_is_kept_as_it_is() -> None:
    gradients, eigenvalues = torch.randn(3, 5, 7), torch.rand(5, 7)
    spreader = spreader_of((5, 7), 35, eigenvalues=eigenvalues)
    torch.testing.assert_close(spread(spreader, gradients), (gradients / eigenvalues.sqrt()).reshape(3, -1))


@pytest.mark.parametrize("numbers", [1, 2**20])  # a sequence at a time, and all
@pytest.mark.parametrize("width", [3, 8, 35])
def test_rows_of_a_layer_may_be_spread_some_at_a_time(width: int, numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = torch.randn(3, 5, 7)
    spreader = spreader_of((5, 7), width)
    expected = spread(spreader, gradients)
    monkeypatch.setitem(FOLDED_NUMBERS, True, numbers)
    for parts in ((torch.tensor([0, 3]), torch.tensor([1, 2, 4])), (slice(0, 2), slice(2, 5)), (slice(None),)):
        target = spreader.nothing(3)
        for rows in parts:
            spreader.add(target, rows, gradients[:, rows])
        torch.testing.assert_close(target, expected)


def test_spread_gradients_are_whitened_and_shrunk() -> None:
    eigenvalues, gradients = torch.rand(5, 7), torch.randn(3, 5, 7)
    buckets = LayerBuckets(name="layer", shape=(5, 7), start=0, width=8)
    factor = LayerFactors(input_vectors=None, output_vectors=None, eigenvalues=eigenvalues, damping=0.3)
    weighted = gradients / (eigenvalues + 0.3).sqrt() * (eigenvalues / (eigenvalues + 0.3)).sqrt()
    spec = FeatureSpec(layers=(buckets,), seed=0)
    torch.testing.assert_close(spread(Spreader(buckets, spec, factor), gradients), spread(spreader_of((5, 7), 8), weighted))
    whole = LayerBuckets(
        name="layer", shape=(5, 7), start=0, width=35
    )  # of sparse rows, which leave out most of it, also where there is room
    made = spread(Spreader(whole, FeatureSpec(layers=(whole,), seed=0, mixed=False), factor), gradients)
    torch.testing.assert_close(made, weighted.flatten(1))


def test_spreading_stays_what_it_is() -> None:
    # An index is searched by later versions: where its coordinates went must never change.
    spreader = spreader_of((2, 20), 7, seed=5)
    assert spreader.stride == 20
    row = spread(spreader, torch.arange(40.0).reshape(1, 2, 20))[0]
    assert row.tolist() == [105.0, 65.0, -21.0, 75.0, 79.0, 71.0, -20.0]


@pytest.mark.parametrize("row_length", [8, 57, 300, 10**6])
def test_buckets_are_shared_by_weight_within_what_layers_have(row_length: int) -> None:
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


@pytest.mark.parametrize(
    "architecture", [pytest.param(name, marks=[pytest.mark.slow] * (name not in ("gpt2", "llama"))) for name in ARCHITECTURES]
)
def test_rows_without_spreading_give_exact_damped_influence(architecture: str) -> None:
    model, batch = tiny_model(architecture), padded_batch(lengths=(7, 4, 5, 7))
    factors, coverage = fit(model, [batch])
    spec = feature_spec(coverage.layers, {name: f.row_weight() for name, f in factors.items()}, 10**9, seed=0)
    signs = spreaders(spec, factors)
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
    rotated = {name: factors[name].rotate(gradient) for name, gradient in gradients.items()}
    queries = torch.from_numpy(query_rows(rotated, spec, signs))
    torch.testing.assert_close((queries @ rows.T).double(), exact, rtol=1e-4, atol=1e-4 * float(exact.abs().max()))  # rows are float32
    torch.testing.assert_close(self_influence, exact.diagonal(), rtol=1e-9, atol=1e-9)


def test_rows_do_not_depend_on_batching() -> None:
    model, batch = tiny_model("llama"), padded_batch(lengths=(7, 4, 5, 7))
    factors, coverage = fit(model, [batch])
    spec = feature_spec(coverage.layers, {name: f.row_weight() for name, f in factors.items()}, 100, seed=0)
    signs = spreaders(spec, factors)
    whole, _ = feature_rows(model, coverage.layers, factors, spec, signs, true_label_loss, batch)
    for n in range(4):
        length = int(batch.counted[n].nonzero().max()) + 1
        one = SequenceBatch(tokens=batch.tokens[n : n + 1, :length], counted=batch.counted[n : n + 1, :length], keys=batch.keys[n : n + 1])
        row, _ = feature_rows(model, coverage.layers, factors, spec, signs, true_label_loss, one)
        torch.testing.assert_close(row[0], whole[n], rtol=1e-5, atol=1e-5)


def test_layers_left_out_of_a_query_do_not_count() -> None:
    model, batch = tiny_model("gpt2"), padded_batch()
    factors, coverage = fit(model, [batch])
    spec = feature_spec(coverage.layers, {name: f.row_weight() for name, f in factors.items()}, 200, seed=0)
    name = coverage.layers[2].name
    gradients = {name: torch.randn(1, *coverage.layers[2].shape, dtype=torch.float64)}
    row = query_rows(gradients, spec, spreaders(spec, factors))[0]
    place = next(place for place in spec.layers if place.name == name)
    inside = np.zeros(spec.row_length, dtype=bool)
    inside[place.start : place.start + place.width] = True
    assert np.abs(row[~inside]).max() == 0
    assert np.abs(row[inside]).max() > 0


def test_each_layers_range_estimates_the_layers_own_score() -> None:
    """Rows of queries that hold one layer, against Σ Λ/(Λ+λ) q x over that layer's whitened coordinates; over many seeds, without bias."""
    model, batch = tiny_model("gpt2"), padded_batch()
    factors, coverage = fit(model, [batch])
    generator = torch.Generator().manual_seed(0)
    left = {layer.name: torch.randn(1, *layer.shape, generator=generator, dtype=torch.float64) for layer in coverage.layers}
    right = {name: query + torch.randn(query.shape, generator=generator, dtype=torch.float64) for name, query in left.items()}
    weights, estimates, wholes = {name: f.row_weight() for name, f in factors.items()}, [], []
    for seed in range(40):
        spec = feature_spec(coverage.layers, weights, 200, seed=seed)
        signs = spreaders(spec, factors)
        row = query_rows(right, spec, signs)[0].astype(np.float64)
        alone = [query_rows({name: query}, spec, signs)[0] for name, query in left.items()]
        estimates.append([float(own @ row) for own in alone])
        wholes.append(float(query_rows(left, spec, signs)[0] @ row))
    np.testing.assert_allclose(np.sum(estimates, axis=1), wholes, rtol=1e-5, atol=1e-5 * np.abs(wholes).max())  # rows are float32
    widths = {place.name: place.width for place in spec.layers}
    for place, name in enumerate(left):
        factor, own = factors[name], np.array(estimates)[:, place]
        kept = torch.ones_like(factor.eigenvalues) if widths[name] == left[name].numel() else factor.retained()
        exact = float((left[name] * right[name] * kept * factor.inverse()).sum())
        error = np.std(own) / np.sqrt(len(own)) + 1e-5 * abs(exact)
        assert abs(own.mean() - exact) < 4.5 * error, name
    assert any(widths[name] < query.numel() for name, query in left.items())


@pytest.mark.skipif(faiss.get_num_gpus() == 0, reason="FAISS sees no GPU")
def test_gpu_sketch_finds_what_whole_rows_would() -> None:
    rows, queries = shards_of(heavy_tailed_rows(500, 64), [500]), some_queries(7, 64)
    assert recall(RowIndex(rows, shortlist=200).search(queries, 10).numbers, exact_search(queries, rows, 10).numbers) > 0.98
