"""Adapters on a PyTorch model."""
