"""The commands around training: figures, comparisons, checkpoint conversion, resume verification, `normatch info`.

Tools import training and everything below it. Only `cli` imports tools, except for the figures, which training draws
at the end of a run.
"""
