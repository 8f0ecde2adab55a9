"""One module a command; `reft_edge.cli` puts them together. Heavy imports happen inside the commands."""
