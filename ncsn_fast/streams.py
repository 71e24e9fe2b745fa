"""The uses of the noise stream: the one table of who draws which of its words.

Belongs here: the numbers that tell one use from another. Does not belong here: the generator itself (``ops``), seeds.

A word of the stream is named by the seed, the stream, the sample, the step and the element (see ``ops.philox_bits``).
Whatever the library draws takes its numbers from here, and no two of its uses share any: with equal seeds, what they
draw is independent all the same. The numbers are part of what a seed means, so they do not change.

====== ============== ============= ==========================================================================
stream sample         step          use
====== ============== ============= ==========================================================================
0      of the batch   0             initial state of a sampler
1      of the batch   0, 1, ...     noise at a step of a sampler
1      of the batch   2**31 + step  noise of the known region before a step, when inpainting
2      of the batch   0             perturbation in the loss (training puts its step into the seed)
3      0              the epoch     order of the training data
3      1              the step      noise levels of a batch of the training
3      callers'       callers'      what callers draw by ``ops.philox_*`` and no stream of their own; the library
                                    does not, but for the two uses above, which are older than this table
4      number of it   0             position of a point of the toy data
5      number of it   0             noise around that position
6      of the batch   of the probe  signs of Hutchinson's estimate
7      number of it   0             noise on a point in a picture
8      of the batch   of training   whether an image of a batch is mirrored
9      of the batch   of training   dequantisation of an image of a batch
10     of the row     0, 1, ...     second noise at a step of an interpolation, towards which the first is rotated
11     of the batch   of the probe  directions of sliced score matching (training puts its step into the seed)
====== ============== ============= ==========================================================================
"""

from __future__ import annotations

STREAM_INIT = 0
STREAM_LANGEVIN = 1
STREAM_TRAINING = 2
STREAM_OTHER = 3
STREAM_BATCHES = STREAM_OTHER
STREAM_POINTS = 4
STREAM_POINTS_NOISE = 5
STREAM_PROBES = 6
STREAM_PLOTS = 7
STREAM_FLIPS = 8
STREAM_DEQUANTISATION = 9
STREAM_ROTATION = 10
STREAM_SLICES = 11

# Two uses of STREAM_LANGEVIN, told apart by the step.
KNOWN_NOISE_STEPS = 2**31
# Two uses of STREAM_BATCHES, told apart by the sample.
ORDER_SAMPLE, LABEL_SAMPLE = 0, 1
