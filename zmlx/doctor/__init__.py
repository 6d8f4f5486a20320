"""`zmlx doctor`: what zmlx finds here, what it does with a model, and why not more."""
