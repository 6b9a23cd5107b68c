"""Measurements of xpatch, each runnable alone; `README.md` beside this file says how to read them."""
