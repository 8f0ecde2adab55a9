"""Training adapters in PyTorch. Needs the extra `train`."""
