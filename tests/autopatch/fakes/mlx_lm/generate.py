"""`mlx_lm.generate` is a function that hides this module."""

import sys

from .utils import load


def generate(path):
    """Load and answer."""
    model, _ = load(path)
    return f"answer of {list(model)}"


def main():
    """Answer on stdout."""
    print(generate(sys.argv[1]))


if __name__ == "__main__":
    main()
