"""The numbers that samplers have unless told otherwise, each once.

Belongs here: numbers that several samplers or their records share. Does not belong here: which option of which sampler
has which (``samplers.py``), published settings of a data set (``presets/``).
"""

from __future__ import annotations

N_STEPS_EACH = 100  # at each level: Song & Ermon, 2019, algorithm 1
# The last step of that paper, in this library's convention, for its last sigma of 0.01: a fifth of its variance.
STEP_LR, STEP_SHARE = 2e-5, 0.2
SNR = 0.16  # of a corrector: Song et al., 2021, appendix G
