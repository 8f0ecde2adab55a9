"""Rows of data from where people have them: files, a list, a Hub dataset; what reads them, and which shapes are known."""
