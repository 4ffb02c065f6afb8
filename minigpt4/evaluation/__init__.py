"""Tasks, the answers of a model, scores and their statistics: over chat."""
