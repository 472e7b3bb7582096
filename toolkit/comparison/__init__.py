"""What differs between a fit and the reference, by how much, and whether it matters."""

import numpyro as numpyro  # before any ArviZ package, whose lazy NumPyro would else be another one
