"""One self-contained file per algorithm."""
