"""The demo: a real small model from a Python package, asked a question with and without zmlx."""
