"""Constants that trade one cost for another. None of them changes a result."""

from __future__ import annotations

# Slots per row of K/V caches are a multiple of this: a row that grows is given room for several steps at once.
CAPACITY_STEP = 64

# Free slots per row that are not worth moving rows for, to give their memory back.
SPARE_SLOTS = 128

# Entries are moved in parts. The call that copies the last part may finish the move if that copies no more than a
# fraction of one part besides: 1/8.
LAST_MOVE = 8

# Blocks of work per thread in ONNX Runtime. Threads fetch blocks where each would have a fixed share, so a thread that
# is held up holds up no other. SmolLM2 on two cores: steps are 1.5 to 3 % faster where a core is taken away at times,
# and no slower where none is.
DYNAMIC_BLOCKS = 8

# Seconds of processor time for which opening a bundle with weights in integers moves them to huge pages. Linux moves
# the rest later. In a virtual machine a page of 2 MiB took 5 ms.
HUGE_PAGES_PATIENCE = 1.0

# Tokens of a prompt that one step takes in while no request decodes, and while others do.
LONE_CHUNK = 512
SHARED_CHUNK = 64

# Pairs of a token and a slot in a chunk of a prompt, where attention keeps the scores of all pairs in memory, as in
# bundles with weights in integers. A model of 32 heads takes 128 MiB for each buffer of them. No chunk becomes shorter
# than SHARED_CHUNK for it.
MOST_SCORES = 2**20

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

# A text match of fewer tokens is no lookup hit: single tokens promise too little.
SHORTEST_MATCH = 2

# Of two places in the text, the one with the longer match wins. Matches are compared up to this length.
LONGEST_MATCH = 8

# Nodes for lookup hits below the deepest head. Deeper nodes are seldom right, and each makes steps longer.
DEEPEST_LOOKUP = 8

# Earlier places in the text that are compared, the latest first.
PLACES = 16

# Accepted tokens per expected one, before any are counted. Texts of other kinds than the calibration's accept fewer.
FIRST_ACCURACY = 0.8

# A tree is used only if its expected speed exceeds plain decoding by this share: measured step times are no more exact.
LEAST_GAIN = 0.03

# Measured steps: entries of each row, rounds that do not count, and the fewest and most rounds in all.
FILL = 64
WARM_UP = 2
FEWEST_ROUNDS, MOST_ROUNDS = WARM_UP + 3, WARM_UP + 7

# Seconds after which a measurement runs no more than the fewest rounds.
PATIENCE = 4.0

# Once a tree has less than this part of the best speed, larger trees are not measured.
LEAST_SPEED = 0.6

# Tokens of all rows in one measured step on a CPU, at most: no CPU that we know verifies more tokens any faster.
MOST_TOKENS = 64

# Execution contexts of a compiled engine, each with a captured CUDA graph, that are kept: enough for every tree size
# that is measured, with and without sampling. A context that is made again costs as much as hundreds of steps.
MOST_CONTEXTS = 32
