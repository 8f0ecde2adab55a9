"""Adapters: what one is, its file, its algebra. Needs no torch."""
