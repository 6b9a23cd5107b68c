"""CaliNet: memory slots beside the final FFN, trained on all facts together."""
