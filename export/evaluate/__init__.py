"""How good a published model is on data of one's own, measured through what serves it: `python -m export eval`.

`plans.py` is read first. Nothing here knows torch or the exporter: a model is what its gateway answers.
"""
