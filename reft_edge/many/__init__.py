"""Many tasks for one base: a list of trainings, each with its own rows, file and repository."""
