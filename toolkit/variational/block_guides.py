"""NumPyro's guide for a Gaussian with blocks (`toolkit.variational.blocks`), and its parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions.transforms import ComposeTransform, LowerCholeskyAffine, PermuteTransform, Transform
from numpyro.infer.initialization import init_to_uniform

from toolkit.variational.block_normals import BlockCholesky, BlockNormal
from toolkit.variational.block_search import blocks_of_program, grouped_blocks
from toolkit.variational.blocks import Blocks
from toolkit.variational.structured_guides import AutoStructuredNormal

BLOCKS, COUPLED = "blocks", "coupled"


class AutoBlockNormal(AutoStructuredNormal):
    """NumPyro's guide for a multivariate normal with blocks; `toolkit.variational.blocks` says which.

    Its parameters are `<prefix>_loc`, (size,) in NumPyro's order of the unconstrained coordinates, and
    `<prefix>_scale_tril`, the Cholesky factor (size, size) with rows and columns in `blocks.order`. Under SVI only the
    entries inside the pattern are free, scaled as AutoMultivariateNormal's are. A solver of one's own may write the
    two directly (`params_from`); what it leaves outside of the pattern is not read and has no gradient.

    Usage::

        guide = AutoBlockNormal(model)  # blocks from the model's plates, shared coordinates coupled to all
        svi = SVI(model, guide, ...)

    Args:
        model: A NumPyro callable.
        structure: `"coupled"` (shared coordinates coupled to all blocks; the default), `"blocks"` (not coupled), or
            blocks found before, as by `plate_blocks`.
        groups: Sites to be named together instead (`named_blocks`); everything else is then on its own.
        along: The plates whose units are the blocks, where they are not to be found by trial (`plate_blocks`).
        prefix: Of the names of parameters.
        init_loc_fn: NumPyro's strategy for the first location.
        init_scale: The first sd of every coordinate, in unconstrained units.

    Attributes:
        blocks: The structure in use, once the guide has seen the model.

    Raises:
        ValueError: Structure, groups or plates are not as above, or do not fit the model when the guide first sees it.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        structure: str | Blocks | None = None,
        *,
        groups: Sequence[Sequence[str]] | None = None,
        along: Sequence[str] | None = None,
        prefix: str = "auto",
        init_loc_fn: Callable[..., Any] = init_to_uniform,
        init_scale: float = 0.1,
    ) -> None:
        if not (structure is None or isinstance(structure, Blocks) or structure in (BLOCKS, COUPLED)):
            raise ValueError(f"Expected structure to be '{BLOCKS}', '{COUPLED}' or a Blocks; got {structure!r}.")
        if groups is not None and (structure is not None or along is not None):
            raise ValueError("Expected groups or else structure and along; got both: leave one out.")
        if along is not None and isinstance(structure, Blocks):
            raise ValueError("Expected along or a Blocks; got both: give along to plate_blocks.")
        self.structure = COUPLED if structure is None else structure
        self.groups, self.along = groups, along
        super().__init__(model, prefix=prefix, init_loc_fn=init_loc_fn, init_scale=init_scale)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        space = self._space
        if self.groups is not None:
            self.blocks = grouped_blocks(space, self.groups)
        elif isinstance(self.structure, Blocks):
            self.blocks = self.structure
        else:
            found = blocks_of_program(self._program, args, kwargs, space, self.along)
            self.blocks = replace(found, coupled=self.structure == COUPLED)
        if self.blocks.size != space.size:
            raise ValueError(
                f"Expected blocks of this model's {space.size} unconstrained coordinates; got blocks of "
                f"{self.blocks.size}: make them for the model and chart that the guide looks at."
            )

    def _get_posterior(self) -> BlockNormal:
        loc = numpyro.param(f"{self.prefix}_loc", self._init_latent)
        scale_tril = numpyro.param(
            f"{self.prefix}_scale_tril",
            self._init_scale * jnp.identity(self.blocks.size, jnp.result_type(self._init_latent)),
            constraint=BlockCholesky(self.blocks),
        )
        return self._normal(loc, scale_tril)

    def _normal(self, loc: Any, scale_tril: Any) -> BlockNormal:
        return BlockNormal(loc, jnp.where(self.blocks.pattern, scale_tril, 0.0), self.blocks.order)

    def get_base_dist(self) -> dist.Distribution:
        """Independent standard normals, one for each place in `blocks.order`."""
        return dist.Normal(jnp.zeros(self.blocks.size), 1).to_event(1)

    def get_transform(self, params: Mapping[str, Any]) -> Transform:
        """From standard normals in `blocks.order` to unconstrained values in NumPyro's order."""
        posterior = self.get_posterior(params)
        ordered = LowerCholeskyAffine(posterior.loc[np.asarray(self.blocks.order)], posterior.scale_tril)
        return ComposeTransform([ordered, PermuteTransform(jnp.asarray(self.blocks.places))])

    def get_posterior(self, params: Mapping[str, Any]) -> BlockNormal:
        """The multivariate normal of an unconstrained vector in NumPyro's order."""
        return self._normal(params[f"{self.prefix}_loc"], params[f"{self.prefix}_scale_tril"])


def params_from(guide: AutoBlockNormal, loc: Any, factor: Any) -> dict[str, Any]:
    """The guide's parameters for a location (size,) and a Cholesky factor (size, size) in `guide.blocks.order`.

    Raises:
        ValueError: A shape is wrong, the factor has an entry outside of the pattern, or its diagonal is not positive.
    """
    size, values = guide.blocks.size, np.asarray(factor)
    if np.shape(loc) != (size,) or values.shape != (size, size):
        raise ValueError(f"Expected shapes ({size},) and ({size}, {size}); got {np.shape(loc)} and {values.shape}.")
    if values[~guide.blocks.pattern].any():
        raise ValueError(
            "Expected a factor that is zero outside of the pattern: bring it into the order of the blocks."
        )
    if not (np.diag(values) > 0).all():
        raise ValueError(f"Expected a factor with a positive diagonal; its least entry is {np.diag(values).min():g}.")
    return {f"{guide.prefix}_loc": loc, f"{guide.prefix}_scale_tril": factor}


def gaussian_from(guide: AutoBlockNormal, params: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Location (size,) and Cholesky factor (size, size) in `guide.blocks.order`: the inverse of `params_from`."""
    posterior = guide.get_posterior(params)
    return np.asarray(posterior.loc), np.asarray(posterior.scale_tril)
