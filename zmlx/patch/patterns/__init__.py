"""The patterns, one file each, named as the pattern."""
