"""Worked studies: from a kernel's first version to the shipped one, each step predicted, checked, looked at.

    study.py       what a study is made of: steps with predictions
    check.py       every step against float64, before anything is said of it
    microscope.py  what a step's launches come to on a chip that need not be here
    rendering.py   the tables, and their places in the pages of docs/optimise/
    run.py         the command line that all studies share

The other files are the studies.
"""
