"""Constants that trade one cost for another. None of them changes a result."""

from __future__ import annotations

# Slots per row of K/V caches are a multiple of this: a row that grows is given room for several steps at once.
CAPACITY_STEP = 64

# Free slots per row that are not worth moving rows for, to give their memory back.
SPARE_SLOTS = 128

# While entries are moved in parts, the last part may copy this fraction of a part besides: 1/8.
LAST_MOVE = 8

# Blocks of work per thread in ONNX Runtime. Threads fetch blocks where each would have a fixed share, so a thread that
# is held up holds up no other.
DYNAMIC_BLOCKS = 8
