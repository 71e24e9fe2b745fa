"""The networks, one file a family, their common base, and what turns other programs' checkpoints into them.

Belongs here: networks, their blocks and configurations, readers of foreign weights. Does not belong here: operators
(``ops``), objectives (``losses.py``), samplers (``sampling``), training.

To add a network, write a subclass of :class:`~ncsn_fast.ScoreModel` in a file of its own, decorate it with
:func:`~ncsn_fast.register`, and import the file in ``ncsn_fast/__init__.py``.
"""
