"""From scores to the result file and pictures."""
