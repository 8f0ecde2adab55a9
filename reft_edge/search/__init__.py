"""Many trainings of one base: a search for the settings that do best on held-out rows."""
