"""What Lens-Mini sees when there is only a CPU: small pictures, the strongest silhouettes, mostly brief captions."""

from train.data.kinds import CORE
from train.data.world import TASKS as ALL_TASKS

SIDE = 64
CLASSES = CORE
TASKS = ALL_TASKS
CAPTIONS = {"geneval": 0.08, "brief": 0.72, "dense": 0.12, "translated": 0.08}
