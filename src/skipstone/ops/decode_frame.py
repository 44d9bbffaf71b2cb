"""The layout of the tables that the compiled functions of a decoding step share: their column numbers, as constants.

A step runs all blocks of a decoder for a few tokens (`decode_stack_native.py`): several tokens of one row, or one token
of each of several rows. The functions of a step are compiled one by one (`workers.Unit`). Each thread has a frame,
whose address they pass each other: an array of int64 with addresses, sizes and the thread's own intermediate values.
The constants of this module name the frame's indices. Small arrays lie in the frame itself.

Mechanisms act at four sites: around a segment of blocks, a block, its attention and its MLP. At each site, a token is
absent, only gives keys and values, or gets an update (`KINDS`).

Shape letters: T tokens (at most 16), S scopes: the four sites, and one for what lies outside of all of them.
"""

from __future__ import annotations

MOST_TOKENS = 16  # of a step
MIXTURE = 8  # columns of a mixture in the table of a block
CHOICE = 6  # columns of a choice of neurons

# Columns of the table of a block: addresses of norms (0: none); then of each matrix the addresses of weight, scale
# (0: weights in floating point; of four-bit ones that of the weight) and bias (0: none), and the number of scales of a
# row (0: four bits, whose scales lie in the weight), or the dtype of weights in floating point (`decode_stack.FLOATS`).
NORMS = ("before_attention", "after_attention", "before_mlp", "after_mlp", "query", "key")
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BEFORE_A, AFTER_A, BEFORE_M, AFTER_M, OF_QUERY, OF_KEY = range(6)
QUERY, KEY, VALUE, OUT, GATE, UP, DOWN = range(6, 34, 4)
# Then, for each site from the outside in, its first gate and the number of its gates; the blocks of the segment
# that begins here (0: none); address and number of the runs of functions (none: the activation is a mixture); and the
# mixture; and the choice of neurons.
OF_SEGMENT = 34
SPAN, RUNS, COUNT = range(42, 45)
MIX = 45
CHOOSES = MIX + MIXTURE
COLUMNS = CHOOSES + CHOICE
# Columns of the memory of a block: addresses of stored keys, values and slots, and of cos and sin (0: not rotated);
# addresses of the activation's stored sums and slots; entries for which a row has room in both stores; the attention
# window (0: none); and the bytes of a number of keys and values. Then, for each row, how many entries both stores have.
KEYS, VALUES, SLOTS, COS, SIN, SUMS, SUM_SLOTS, ROOM, SUM_ROOM, WINDOW, NUMBER = range(11)
LENGTHS, SUM_LENGTHS = 11, 11 + MOST_TOKENS
MEMORY = SUM_LENGTHS + MOST_TOKENS

# What a call says of each block: the number of tokens whose keys were stored and of those that the MLP computed, the
# neurons whose up projection at least one of these needed, and which tokens the first two were, as bits.
GIVEN_KEYS, FED_TOKENS, NEEDED, KEYS_OF, FED_OF = range(5)
OUTCOMES = 5

# The scopes of sites, one inside the other, except that the MLP's is inside the block's.
OUTSIDE, SEGMENT, BLOCK, OF_ATTENTION, OF_MLP = range(5)
SCOPES = 5
# What a token is inside a site.
ABSENT, GIVES_KEYS, ASKS = range(3)

# A frame begins with what `decode_stack.run` gives: addresses, of the blocks' table and memory, the tokens' slots, the
# stream, working memory, table and numbers of the depth mechanisms, numbers of the blocks, and the results; sizes; the
# addresses of the units (0: not needed); and eps and offset of norms and the factor on scores, as floats.
TABLE, MEMORIES, SLOT, STREAM, WORK, GATES, GATE_LINES, BLOCK_NUMBERS = range(8)
STATES, SAID, FLAGS, LOGITS, FED, STORED, SCORES, MARKS = range(8, 16)
BLOCKS, TOKENS, WIDTH, NEURONS, HEADS, GROUPS, HEAD_SIZE, GATE_COUNT, STATE_COUNT, HIDDEN = range(16, 26)
# Most inputs of a matrix, bytes of a thread's own working memory, and 1 if each token has a row of its own, else 0.
WIDEST, PRIVATE, BY_ROW = 26, 27, 28
UNITS = 29
ATTENTION, TURN, ATTEND, MLP, SINGLE, INT8, INT4, ROUNDS, MIXTURE_OF = range(UNITS, UNITS + 9)
CHOSEN, SPREAD, SUMMED, SUMMED_INT8, DECIDE, WEIGH = range(UNITS + 9, UNITS + 15)
NUMBERS = UNITS + 15
GIVEN = NUMBERS + 3
# Then what the thread adds: its index, the number of threads, their barrier and the arrivals there, the block and the
# addresses of its row and memory, and whether the factors of a scope act.
PART, PARTS, BARRIER, ARRIVALS, INDEX, ROW, OWN_MEMORY = range(GIVEN, GIVEN + 7)
ACTS = GIVEN + 7
# Addresses of hidden values, q, k, v, a, y, gate, up, and of a thread's own list of neurons, its normed and rounded
# tokens and the factors that restore these.
PLACES = ACTS + SCOPES
HIDDEN_AT, Q_AT, K_AT, V_AT, A_AT, Y_AT, GATE_AT, UP_AT, LIST, NORMED, ROUNDED, UNIT = range(PLACES, PLACES + 12)
# Arrays: tokens that give keys and tokens that get an update, their scales, fp32 [T]; what each token is in each scope,
# the factor on its sub-layers' updates and that on the whole update, fp32 [S, T].
THERE = UNIT + 1
ASKING = THERE + MOST_TOKENS
SCALES = ASKING + MOST_TOKENS
KINDS = SCALES + MOST_TOKENS
GAINS = KINDS + SCOPES * MOST_TOKENS
FACTORS = GAINS + SCOPES * MOST_TOKENS
FRAME = -(-(FACTORS + SCOPES * MOST_TOKENS) // 8) * 8  # whole lines of a processor's cache
