"""The reference: NUTS, exact draws, or draws from a file."""

import numpyro as numpyro  # before any ArviZ package, whose lazy NumPyro would else be another one
