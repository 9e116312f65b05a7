"""Offer the library on the command line: one file per command, installed as `snnconv.cli`."""
