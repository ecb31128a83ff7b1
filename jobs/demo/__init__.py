"""The demonstration: real text, invented facts and a small model trained on both, so that the right answers are known."""
