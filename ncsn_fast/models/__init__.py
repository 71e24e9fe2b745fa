"""The networks, one file a family, and what turns other programs' checkpoints into them.

Belongs here: networks, their blocks and configurations, readers of foreign weights. Does not belong here: operators
(``ops``), objectives (``losses.py``), samplers (``sampling.py``), training.
"""
