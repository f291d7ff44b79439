"""Token shards, the loader that serves batches of them, and what makes them of text."""
