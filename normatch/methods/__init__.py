"""The methods, one file per paper, and what they share.

base        what training asks of a method (`Method`), and what it tells the method about the data (`Task`)
classifier  methods on an image classifier: normatch, fixmatch, supervised
density     methods that train a flow end to end: flowgmm, scnf
terms       the terms that losses share        means   where FlowGMM's Gaussians stand
backbones, distributed, scorer                 networks, several processes, accuracies

Imports flows and ops, and knows nothing of training. `config.METHODS` maps names to classes.
"""
