"""The data engine's parts: records, what reads a source, the steps, classifiers, near-duplicates, and what runs them."""
