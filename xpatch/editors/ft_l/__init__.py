"""FT-L: fine-tuning of one FFN down-projection inside a box around its own weights."""
