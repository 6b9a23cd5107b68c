"""MEND: gradients decomposed into rank-one factors, transformed by a small network per shape (Mitchell et al. 2022)."""
