"""What an adapter learned, from its numbers and from its effect on a model."""
