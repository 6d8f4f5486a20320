"""Places for the values between launches: one piece of memory, in which places are used again."""

from __future__ import annotations

from zmlx.backend.cuda.recording import ALIGNED


class Arena:
    """Gives out places, the lowest that fits.

    Attributes:
        size: bytes that it took.
    """

    def __init__(self) -> None:
        self.size = 0
        self._taken: list[tuple[int, int]] = []  # beginning and end, in order

    def take(self, size: int) -> int:
        """Return where so many bytes are free, and take them."""
        needed = max(-(-size // ALIGNED), 1) * ALIGNED
        at, number = 0, 0
        for begin, end in self._taken:
            if begin - at >= needed:
                break
            at, number = end, number + 1
        self._taken.insert(number, (at, at + needed))
        self.size = max(self.size, at + needed)
        return at

    def give_back(self, offset: int) -> None:
        """Let what was taken at an offset be taken again."""
        [found] = [part for part in self._taken if part[0] == offset]
        self._taken.remove(found)
