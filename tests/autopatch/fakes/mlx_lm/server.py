"""Loads on a thread of its own."""

import threading

from .utils import load


def serve(path):
    """Load on a worker thread and return what it loaded."""
    found = []
    thread = threading.Thread(target=lambda: found.append(load(path)))
    thread.start()
    thread.join()
    return found[0]
