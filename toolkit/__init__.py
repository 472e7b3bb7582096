"""How much room is there between a variational answer and the posterior, whose is it, and does it matter?"""

# ArviZ wraps NumPyro only if NumPyro was imported first (arviz-base 1.3 loads its converters lazily).
import numpyro as _numpyro  # noqa: F401

from toolkit.estimate import Estimate as Estimate
from toolkit.modelling.dataset import Dataset as Dataset
from toolkit.modelling.labels import Labels as Labels
from toolkit.modelling.model import Model as Model
from toolkit.modelling.model import Quantity as Quantity
from toolkit.status import Status as Status
