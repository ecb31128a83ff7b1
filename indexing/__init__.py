"""Gradient features of training sequences and the search over them: whitened, spread rows, flat FAISS search, its oracle and its recall.

Knows factors and rows; knows nothing of texts, tokenizers, run directories or Ray.
"""

from indexing.features import FeatureSpec, LayerBuckets, Spreader, feature_rows, feature_spec, query_rows, spreaders
from indexing.rows import RowShards, encode_rows, open_rows
from indexing.search import Candidates, FlatIndex, all_scores, best, exact_search, recall

__all__ = [
    "Candidates",
    "FeatureSpec",
    "FlatIndex",
    "LayerBuckets",
    "RowShards",
    "Spreader",
    "all_scores",
    "best",
    "encode_rows",
    "exact_search",
    "feature_rows",
    "feature_spec",
    "open_rows",
    "query_rows",
    "recall",
    "spreaders",
]
