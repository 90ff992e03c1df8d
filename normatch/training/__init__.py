"""The training loop and what it needs: `loader` makes the batches of a step."""
