"""Commands that look at data, runs and checkpoints. They may import any other module; only `cli` imports them."""
