"""What is inferred: data, model, and the checks that a model must pass."""
