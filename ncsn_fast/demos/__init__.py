"""The demos of the command line, each a whole run: train, draw, measure, plot.

Belongs here: their settings, numbers and figures. Does not belong here: anything that another program would call.
"""
