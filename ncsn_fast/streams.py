"""The uses of the noise stream: the one table of who draws which of its words.

Belongs here: the numbers that tell one use from another. Does not belong here: the generator itself (``ops``), seeds.

A word of the stream is named by the seed, the sample, the element, the step and the stream (see ``ops.philox_bits``).
Whatever draws from it takes its numbers from here, and no two uses share any: with equal seeds, what they draw is
independent all the same. The numbers are part of what a seed means, so they do not change.
"""

from __future__ import annotations

import dataclasses

WORDS = 2**32  # of the counter, each: samples, steps and streams are below

STREAM_INIT = 0
STREAM_LANGEVIN = 1
STREAM_TRAINING = 2
STREAM_BATCHES = 3
STREAM_POINTS = 4
STREAM_POINTS_NOISE = 5
STREAM_PROBES = 6
STREAM_PLOTS = 7
# What callers draw for themselves: the library draws from no stream from here on.
STREAM_OTHER = 256

# Two uses of STREAM_LANGEVIN, told apart by the step.
KNOWN_NOISE_STEPS = 2**31
# Two uses of STREAM_BATCHES, told apart by the sample.
ORDER_SAMPLE, LABEL_SAMPLE = 0, 1

_ALL, _FIRST = range(WORDS), range(1)


@dataclasses.dataclass(frozen=True)
class Use:
    """The words of one use: those of any seed, of these streams, samples and steps.

    Attributes:
        name: what is drawn, and what the samples and steps count.
        streams, samples, steps: numbers in the counter.
    """

    name: str
    streams: range
    samples: range = _ALL
    steps: range = _ALL

    def overlaps(self, other: Use) -> bool:
        """Whether the two share words."""
        return all(
            max(a.start, b.start) < min(a.stop, b.stop)
            for a, b in (
                (self.streams, other.streams),
                (self.samples, other.samples),
                (self.steps, other.steps),
            )
        )


def _one(stream: int) -> range:
    return range(stream, stream + 1)


USES = (
    Use("initial state of sample i", _one(STREAM_INIT), steps=_FIRST),
    Use(
        "noise of sample i at a step of a sampler",
        _one(STREAM_LANGEVIN),
        steps=range(KNOWN_NOISE_STEPS),
    ),
    Use(
        "noise of sample i's known region before a step of a sampler, 2**31 + its number",
        _one(STREAM_LANGEVIN),
        steps=range(KNOWN_NOISE_STEPS, WORDS),
    ),
    Use(
        "perturbation of sample i of a batch in the loss; the training's seed holds the step",
        _one(STREAM_TRAINING),
        steps=_FIRST,
    ),
    Use("order of the training data, a step an epoch", _one(STREAM_BATCHES), _one(ORDER_SAMPLE)),
    Use("noise levels of a batch, a step each", _one(STREAM_BATCHES), _one(LABEL_SAMPLE)),
    Use("position of point i", _one(STREAM_POINTS), steps=_FIRST),
    Use("noise around the position of point i", _one(STREAM_POINTS_NOISE), steps=_FIRST),
    Use("signs of Hutchinson's estimate for sample i, a step a probe", _one(STREAM_PROBES)),
    Use("noise on point i in a picture", _one(STREAM_PLOTS), steps=_FIRST),
    Use("callers' own", range(STREAM_OTHER, WORDS)),
)
