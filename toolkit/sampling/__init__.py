"""The reference: NUTS, exact draws, or draws from a file."""
