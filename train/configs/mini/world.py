"""What Lens-Mini sees when there is only a CPU: small pictures, the strongest silhouettes, mostly brief captions."""

from train.data.small_world import kinds, world

SIDE = 64
CLASSES = kinds.CORE
TASKS = world.TASKS
CAPTIONS = {"geneval": 0.08, "brief": 0.72, "dense": 0.12, "translated": 0.08}
PHOTOGRAPHS = 0.0  # share of scenes before a photograph instead of a drawn backdrop; such a caption is English
