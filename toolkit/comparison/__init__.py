"""What differs between a fit and the reference, by how much, and whether it matters."""
