"""From photos to embeddings: networks, training, checkpoints."""
