"""Clocks that count steps, so that a stop falls on a known one."""


class StopAfter:
    """Over once so many steps are taken: a loop asks when it begins one, and finishes that."""

    def __init__(self, steps):
        self.left, self.elapsed, self.asked = steps, 1.0, False
        self.start, self.limit = 0.0, None

    @property
    def over(self):
        self.left -= 1
        return self.left < 1


FOREVER = StopAfter(1 << 30)
