"""From embeddings to neighbours and scores."""
