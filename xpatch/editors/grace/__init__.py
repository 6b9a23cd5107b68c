"""GRACE: a codebook of keys, radii and values at the final FFN."""
