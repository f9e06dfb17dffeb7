"""How fast: cases, measurement, comparison. `python -m bench list | run | compare | report`."""
