"""Transformer-Patcher: one neuron per mistake in the final FFN."""
