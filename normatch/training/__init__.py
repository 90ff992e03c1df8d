"""The training loop and everything it needs: steps -> batches (`loader`)."""
