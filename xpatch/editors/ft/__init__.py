"""Fine-tuning of the final FFN, the baseline of the MPN paper."""
