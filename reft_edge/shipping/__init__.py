"""Adapters as goods: push them to a repository, pull them into a store, roll back. Needs no torch.

`release` says what a repository offers, `folder`, `http`, `hub` and `oci` are the kinds of repositories, `wire` is the network
under them, `store` is the folder of adapters on a device, `parts` are the downloads under way in it, and `pull` brings one to
the other.
"""
