"""The command line: `xpatch demo | edit | inspect | evaluate | export | bench | doctor`. `main` is the entry point."""

from xpatch.cli.app import app, main

__all__ = ["app", "main"]
