"""Pairwise judgements of two systems' outputs by a language model (the paper's Table 2)."""
