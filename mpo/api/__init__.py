"""What `import mpo` gives in a notebook: models to load and ask, and training on own rows (docs/library.md)."""
