"""What other people published, under our names: flags and configuration files, checkpoints, and the layouts of weights.

flags        command-line flags and configuration keys of NorMatch, kekmodel, LeeDoYup, USB, FlowGMM and SCNF
checkpoints  checkpoint files of any origin, ours of any version among them -> the state that `normatch.load` takes
layouts      the names and shapes of tensors in published checkpoints -> ours

Imports nothing of training; `flags` needs no torch, so that a configuration is read fast.
"""
