"""What Lens-Mini sees on a GPU: every class at 128 pixels, half of the captions dense."""

from train.data.small_world import world

SIDE = 128
CLASSES = None  # all
TASKS = world.TASKS
CAPTIONS = {"geneval": 0.05, "brief": 0.35, "dense": 0.50, "translated": 0.10}
PHOTOGRAPHS = 0.0  # share of scenes before a photograph instead of a drawn backdrop; such a caption is English
