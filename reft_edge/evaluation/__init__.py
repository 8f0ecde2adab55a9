"""How well a model, with or without an adapter, answers the rows of a task."""
