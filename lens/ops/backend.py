"""Which kernel runs, why, and how to override it."""
