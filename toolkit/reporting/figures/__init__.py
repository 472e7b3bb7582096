"""Figures: the only code that imports matplotlib. Each function gives a `Picture`; none looks up global state."""
