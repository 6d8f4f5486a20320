"""MLX on the processor: the native library, and how many threads it uses."""
