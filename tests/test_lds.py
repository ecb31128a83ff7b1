"""The linear datamodelling score: equal to a plain loop, with intervals that cover, a ceiling that is true, and no bank read that is none."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import spearmanr

from influence.errors import RequestError
from influence.evaluation.bank import Bank, check_sequences, queries_in_bank, query_digest, read_bank, sequences_digest, write_bank
from influence.evaluation.lds import difference, linear_datamodelling_score, noise_ceiling, spearman
from influence.evaluation.methods import read_scores
from influence.measurement import Measurement
from influence.sequences import TrainingSequence

Q, N = 5, 40


def truth(seed: int = 0) -> NDArray[np.float64]:
    """[Q, N]: what each sequence really does for each query."""
    return np.random.default_rng(seed).standard_t(4, size=(Q, N))


def simulated(num_subsets: int, *, num_seeds: int = 1, noise: float = 1.0, seed: int = 0) -> Bank:
    """A bank whose losses are linear in the subset but for noise of each seed."""
    rng = np.random.default_rng([seed, num_subsets, num_seeds])
    masks = np.argsort(rng.random((num_subsets, N)), axis=1) < N // 2
    expected = -(masks @ truth().T)  # [S, Q]
    return Bank(masks=masks, losses=expected + noise * rng.standard_normal((num_seeds, num_subsets, Q)))


def approximate(error: float, seed: int = 1) -> NDArray[np.float64]:
    return truth() + error * np.random.default_rng(seed).standard_normal((Q, N))


def test_score_equals_a_plain_loop_over_queries() -> None:
    bank, scores = simulated(12, num_seeds=2), approximate(1)
    found = linear_datamodelling_score(scores, bank, num_resamples=7, seed=3)
    drawn = np.random.default_rng(3).integers(0, 12, (7, 12))

    def of(subsets: Any, query: int) -> float:
        predicted = [-sum(scores[query, bank.masks[subset]]) for subset in subsets]
        return float(spearmanr(predicted, bank.losses[:, subsets, query].mean(0)).statistic)

    np.testing.assert_allclose(found.per_query, [of(np.arange(12), query) for query in range(Q)], rtol=1e-12)
    np.testing.assert_allclose(found.resampled, [np.mean([of(subsets, query) for query in range(Q)]) for subsets in drawn], rtol=1e-12)
    assert found.value == pytest.approx(found.per_query.mean())


def test_spearman_shares_ranks_of_ties_and_is_zero_for_a_constant() -> None:
    left, right = np.array([[1.0, 2, 2, 3, 2], [1, 1, 1, 1, 1]]), np.array([[5.0, 5, 9, 9, 1], [1, 2, 3, 4, 5]])
    np.testing.assert_allclose(spearman(left, right), [spearmanr(left[0], right[0]).statistic, 0], atol=1e-12)


def test_scores_of_the_truth_without_noise_have_score_one_and_their_negative_minus_one() -> None:
    bank = simulated(20, noise=0)
    assert linear_datamodelling_score(truth(), bank).value == pytest.approx(1)
    assert linear_datamodelling_score(-1e-6 * truth(), bank).value == pytest.approx(-1)
    assert linear_datamodelling_score(truth(), bank).interval[1] <= 1


def test_interval_covers_the_score_on_all_subsets() -> None:
    scores, everything = approximate(1), simulated(20_000)
    true_value = linear_datamodelling_score(scores, everything, num_resamples=1).value
    found = [linear_datamodelling_score(scores, simulated(30, seed=seed), num_resamples=200) for seed in range(60)]
    covered = [low <= true_value <= high for low, high in (score.interval for score in found)]
    assert 0.85 <= np.mean(covered) <= 1.0  # 95%, give or take two binomial standard errors of 60 trials and what so few subsets cost
    assert np.mean([high - low for low, high in (score.interval for score in found)]) < 0.4


def test_more_subsets_make_the_interval_narrower() -> None:
    widths = [np.diff(linear_datamodelling_score(approximate(1), simulated(size)).interval)[0] for size in (15, 60, 240)]
    assert widths == sorted(widths, reverse=True)


def test_a_method_does_not_differ_from_itself() -> None:
    bank, scores = simulated(15), approximate(1)
    found = difference(linear_datamodelling_score(scores, bank), linear_datamodelling_score(7 * scores, bank))
    assert (found.value, found.interval) == (0, (0, 0))


def test_paired_difference_is_surer_than_two_intervals() -> None:
    bank = simulated(40, noise=3)  # what retraining adds by chance is the same for both methods
    better, worse = linear_datamodelling_score(approximate(0.3), bank), linear_datamodelling_score(approximate(1.5), bank)
    found = difference(better, worse)
    assert found.value == pytest.approx(better.value - worse.value)
    assert 0 < found.interval[0] < found.value < found.interval[1]
    opposite = difference(worse, better)
    assert opposite.interval == pytest.approx((-found.interval[1], -found.interval[0]))
    assert np.diff(found.interval) < np.diff(better.interval) + np.diff(worse.interval)


def test_same_seed_gives_the_same_interval() -> None:
    bank, scores = simulated(15), approximate(1)
    assert linear_datamodelling_score(scores, bank).interval == linear_datamodelling_score(scores, bank).interval
    assert linear_datamodelling_score(scores, bank).interval != linear_datamodelling_score(scores, bank, seed=1).interval


@pytest.mark.parametrize("num_seeds", [2, 3])
@pytest.mark.parametrize("noise", [1.0, 4.0, 10.0])
def test_ceiling_is_what_the_truth_scores(num_seeds: int, noise: float) -> None:
    bank = simulated(3000, num_seeds=num_seeds, noise=noise)
    achieved = linear_datamodelling_score(truth(), bank, num_resamples=1).value
    assert noise_ceiling(bank) == pytest.approx(achieved, abs=0.02)  # the formula is exact for plain, not for rank correlations
    assert achieved < 0.999


def test_ceiling_needs_two_seeds_and_is_zero_where_they_do_not_agree() -> None:
    assert noise_ceiling(simulated(10)) is None
    bank = simulated(10, num_seeds=1)
    opposite = Bank(masks=bank.masks, losses=np.concatenate([bank.losses, -bank.losses]))
    assert noise_ceiling(opposite) == 0
    assert noise_ceiling(Bank(masks=bank.masks, losses=np.concatenate([bank.losses, bank.losses]))) == pytest.approx(1)


def test_scores_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"scores have shape \[40, 5\], expected \[5, 40\]"):
        linear_datamodelling_score(truth().T, simulated(5))


# banks as files


def saved(path: Path, **arrays: Any) -> Path:
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def test_bank_is_read_as_it_was_written(tmp_path: Path) -> None:
    bank = Bank(**{**vars(simulated(4, num_seeds=2)), "sequences": "sha256:1", "queries": tuple("abcde")})
    write_bank(tmp_path / "bank.npz", bank)
    found = read_bank(tmp_path / "bank.npz")
    assert (found.sequences, found.queries) == ("sha256:1", tuple("abcde"))
    np.testing.assert_array_equal(found.masks, bank.masks)
    np.testing.assert_array_equal(found.losses, bank.losses)
    first = (tmp_path / "bank.npz").read_bytes()
    write_bank(tmp_path / "bank.npz", bank)
    assert (tmp_path / "bank.npz").read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == ["bank.npz"]


def test_bank_of_one_seed_may_leave_out_its_axis_and_masks_may_be_numbers(tmp_path: Path) -> None:
    bank = simulated(4)
    found = read_bank(saved(tmp_path / "bank.npz", masks=bank.masks.astype(np.int64), query_losses=bank.losses[0]))
    assert (found.num_seeds, found.num_subsets, found.num_queries) == (1, 4, Q)
    np.testing.assert_array_equal(found.masks, bank.masks)


GOOD = {"masks": simulated(4).masks, "query_losses": simulated(4).losses}
BANKS = [
    ({"masks": None}, "has no array 'masks'"),
    ({"query_losses": None}, "has no array 'query_losses'"),
    ({"masks": GOOD["masks"][0]}, r"masks have shape \[40\], expected \[subsets, sequences\]"),
    ({"masks": GOOD["masks"] * 2}, "masks must be true or false"),
    ({"masks": GOOD["masks"] * 0.5}, "masks must be true or false"),
    ({"masks": GOOD["masks"][:3]}, "masks are of 3 subsets and query_losses of 4"),
    (
        {"masks": GOOD["masks"][:2], "query_losses": GOOD["query_losses"][:, :2]},
        "has 2 subsets: a rank correlation over them needs at least 3",
    ),
    ({"query_losses": GOOD["query_losses"][0, 0]}, r"query_losses have shape \[5\], expected \[seeds, subsets, queries\]"),
    ({"query_losses": GOOD["query_losses"][:0]}, "query_losses have shape"),
    ({"query_losses": np.where(GOOD["query_losses"] > 0, np.nan, 1.0)}, "query_losses must be finite numbers"),
    ({"query_losses": GOOD["query_losses"].astype(str)}, "query_losses must be finite numbers"),
    ({"query_losses": GOOD["query_losses"].astype(object)}, "expected an .npz file of plain arrays"),
    ({"queries": np.array(["a", "b"])}, "names 2 queries, but has losses of 5"),
]


@pytest.mark.parametrize(("changes", "message"), BANKS)
def test_wrong_bank_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=message):
        read_bank(saved(tmp_path / "bank.npz", **{**GOOD, **changes}))


def npy(array: NDArray[Any]) -> bytes:
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04 broken", npy(np.ones(3))], ids=["empty", "text", "zip", "npy"])
@pytest.mark.parametrize("read", [read_bank, lambda path: read_scores(path, Q, N)], ids=["bank", "scores"])
def test_file_of_another_kind_is_refused(read: Callable[[Path], Any], content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(RequestError, match=str(path)):
        read(path)
    with pytest.raises(RequestError, match="cannot be read: No such file"):
        read(tmp_path / "nowhere")
    with pytest.raises(RequestError, match="cannot be read: Is a directory"):
        read(tmp_path)


SCORES = [
    (truth().T, r"has shape \[40, 5\], expected \[5, 40\]"),
    (np.where(truth() > 2, np.inf, truth()), "holds scores that are not finite"),
    (truth().astype(str), "is not an .npy file of plain numbers"),
    (truth().astype(object), "is not an .npy file of plain numbers"),
]


@pytest.mark.parametrize(("array", "message"), SCORES)
def test_wrong_scores_are_refused(array: NDArray[Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "scores.npy"
    path.write_bytes(npy(array))
    with pytest.raises(RequestError, match=message):
        read_scores(path, Q, N)


def test_scores_are_read_as_float64(tmp_path: Path) -> None:
    path = tmp_path / "scores.npy"
    path.write_bytes(npy(truth().astype(np.float16)))
    assert read_scores(path, Q, N).dtype == np.float64


# whose losses a bank has


def sequence(*tokens: int, first_counted: int = 1) -> TrainingSequence:
    counted = np.arange(len(tokens)) >= first_counted
    return TrainingSequence(id="x", document="x", tokens=np.array(tokens, np.int32), counted=counted, text="", metadata={})


def measurement(*tokens: int, first_counted: int = 1) -> Measurement:
    return Measurement(prompt="", completion="", contrast=None, parts=((1.0, sequence(*tokens, first_counted=first_counted)),))


def test_bank_that_names_no_queries_is_of_the_first_ones() -> None:
    asked = [measurement(1, n) for n in range(Q + 2)]
    assert queries_in_bank(simulated(4), asked) == [(n, n) for n in range(Q)]
    with pytest.raises(RequestError, match="the bank has losses of 5 queries without saying which, and 4 are given"):
        queries_in_bank(simulated(4), asked[:4])


def test_bank_that_names_its_queries_is_asked_by_name() -> None:
    asked = [measurement(1, n) for n in range(Q)]
    bank = Bank(**{**vars(simulated(4)), "queries": tuple(query_digest(one) for one in asked)})
    assert queries_in_bank(bank, [asked[3], asked[0]]) == [(0, 3), (1, 0)]
    np.testing.assert_array_equal(bank.with_queries([3, 0]).losses, bank.losses[:, :, [3, 0]])
    for other in (measurement(1, 99), measurement(1, 0, 0), measurement(7, 1, 0, first_counted=2)):
        with pytest.raises(RequestError, match="query 2 is not one of the 5 whose losses the bank has"):
            queries_in_bank(bank, [asked[0], other])


def test_digests_tell_apart_what_is_read_and_what_is_counted() -> None:
    one, other = sequence(1, 2, 3), sequence(1, 2, 3, first_counted=2)
    lists = [[one, other], [other, one], [one], [sequence(1, 2), sequence(3, 4)], [sequence(1, 2, 3, 4)], [sequence(1), sequence(2, 3, 4)]]
    assert len({sequences_digest(sequences) for sequences in lists}) == len(lists)


def test_bank_of_other_sequences_is_refused() -> None:
    sequences = [sequence(1, n) for n in range(N)]
    bank = Bank(**{**vars(simulated(4)), "sequences": sequences_digest(sequences)})
    check_sequences(bank, sequences, N)
    check_sequences(simulated(4), sequences, N)
    with pytest.raises(RequestError, match="subsets are of 40 training sequences, but the run has 39"):
        check_sequences(bank, sequences[:39], 39)
    with pytest.raises(RequestError, match="trained on other sequences than the run's"):
        check_sequences(bank, sequences[::-1], N)
