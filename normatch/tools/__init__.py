"""The commands that look at data, runs and checkpoints. They may import everything else; nothing imports them but `cli`."""
