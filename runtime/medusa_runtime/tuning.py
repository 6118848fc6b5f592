"""Constants that trade one cost for another. None of them changes a result."""

from __future__ import annotations

# Slots per row of K/V caches are a multiple of this: a row that grows is given room for several steps at once.
CAPACITY_STEP = 64

# Free slots per row that are not worth moving rows for, to give their memory back.
SPARE_SLOTS = 128

# While entries are moved in parts, the last part may copy this fraction of a part besides: 1/8.
LAST_MOVE = 8

# Blocks of work per thread in ONNX Runtime. Threads fetch blocks where each would have a fixed share, so a thread that
# is held up holds up no other. SmolLM2 on two cores: steps are 1.5 to 3 % faster where a core is taken away at times,
# and no slower where none is.
DYNAMIC_BLOCKS = 8

# Tokens of a prompt that one step takes in while no request decodes, and while others do.
LONE_CHUNK = 512
SHARED_CHUNK = 64

# Entries of rows that are moved at a time while requests decode: faster than a chunk of a prompt, even in new memory.
MOVED_AT_ONCE = 512

# Entries that may be moved in the same loop step as a chunk is taken in. Moving an entry takes a hundredth of the time
# of computing it, or a tenth in new memory.
MOVED_BESIDES = 64

# On CPUs attention takes this many times longer to read a byte of the caches than matrix products take for one of the
# weights.
CACHE_TO_WEIGHTS = 2

# Copying fewer entries than this from another row costs more than it saves.
SHORTEST_COPY = 16
