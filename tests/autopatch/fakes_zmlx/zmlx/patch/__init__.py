"""A patcher whose effect and failures a test can choose by the model's name."""


class Report:
    """What a report needs for the hook."""

    patched_count = 1

    def __init__(self, origin):
        self.origin = origin

    def line(self):
        """Return the line."""
        return f"zmlx: marked by {self.origin}"

    def summary(self):
        """Return more."""
        return self.line() + "\n  a page"


class Untouched(Report):
    """The report on a model of which nothing was replaced."""

    patched_count = 0

    def line(self):
        """Return the line."""
        return "zmlx: plain stays"


def patch_loaded(model, *, origin):
    """Mark a model, or fail as its name says."""
    if "broken" in model:
        raise ValueError("detection broke")
    if "interrupt" in model:
        raise KeyboardInterrupt
    if "plain" in model:
        return Untouched(origin)
    model.append("marked")
    return Report(origin)
