"""What runs have left behind, opened again without a trainer: on the CPU, and only to be read.

`source.py` finds it, a saved role or the checkpoint of a stage; `checkpoints.py` reads weights out of the latter;
`opening.py` puts a role of either on a backbone of its own; `models.py` opens what answers or scores, also from others.
"""
