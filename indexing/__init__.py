"""Gradient features of training sequences and the search over them: whitened, encoded rows; two-stage FAISS search, its oracle and its recall.

Knows factors and rows; knows nothing of texts, tokenizers, run directories or Ray.
"""

from indexing.duplicates import ALIKE, all_duplicates, group_duplicates
from indexing.features import FeatureSpec, LayerBuckets, Spreader, feature_rows, feature_spec, query_rows, spreaders
from indexing.rows import Encoding, RowFormat, RowShards, is_mixed, open_rows, row_length_within
from indexing.search import Candidates, RowIndex, best, exact_search, held_bytes, recall, row_scores

__all__ = [
    "ALIKE",
    "Candidates",
    "Encoding",
    "FeatureSpec",
    "LayerBuckets",
    "RowFormat",
    "RowIndex",
    "RowShards",
    "Spreader",
    "all_duplicates",
    "best",
    "exact_search",
    "feature_rows",
    "feature_spec",
    "group_duplicates",
    "held_bytes",
    "is_mixed",
    "open_rows",
    "query_rows",
    "recall",
    "row_length_within",
    "row_scores",
    "spreaders",
]
