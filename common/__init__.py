"""What all approaches share, in rooms: data <- models <- retrieval <- report."""
