"""NumPyro's guides for normalising flows that begin at a Gaussian: z = loc + L f(eps), f a flow near the identity.

NumPyro's own AutoIAFNormal and AutoBNAFNormal begin at a random flow of standard normal numbers, wherever the posterior
lies and whatever its units are. Here an affine map follows the flow, so that a Gaussian found before is where the flow
begins, and the family contains every Gaussian: what a flow can gain is then a matter of bending it.

    IAF   y = m(x) + exp(s(x)) x, with m_i and s_i of the coordinates before i alone. The last layer begins at zero: the
          identity is a member, exactly.
    BNAF  y = (1 - g) x + g h(x), with h a network that is monotone in x_i and takes only the coordinates before i
          besides. Its gate g lies strictly between 0 and 1: the identity is approached as g goes to 0, and is
          no member.

References:
    Rezende & Mohamed (2015), Variational inference with normalizing flows, ICML.
    Kingma, Salimans, Jozefowicz, Chen, Sutskever & Welling (2016), Improving variational inference with inverse
    autoregressive flow, NeurIPS.
    De Cao, Titov & Aziz (2019), Block neural autoregressive flow, UAI.
    Kingma & Dhariwal (2018), Glow, NeurIPS, section 3.3 (a last layer that begins at zero).
    Papamakarios, Nalisnick, Rezende, Mohamed & Lakshminarayanan (2021), Normalizing flows for probabilistic modeling
    and inference, JMLR 22(57).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.example_libraries import stax
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.distributions.flows import BlockNeuralAutoregressiveTransform, InverseAutoregressiveTransform
from numpyro.distributions.transforms import ComposeTransform, LowerCholeskyAffine, PermuteTransform, Transform
from numpyro.nn.auto_reg_nn import AutoregressiveNN
from numpyro.nn.block_neural_arn import BlockNeuralAutoregressiveNN

from toolkit.variational.structured_guides import AutoScaled

_LEAST_HIDDEN = 24  # units of a hidden layer: in two dimensions two, NumPyro's own choice, hardly bend anything
_SMALL = 16  # dimensions up to which a block network's step takes about a millisecond at NumPyro's own width
_GATE = -4.0  # of a logit: a flow that begins so moves draws by about a fiftieth of a sd
_STEPS = 400  # of a numerical inverse
# Its error in units of rounding: where it is an inverse, and what is left of one that sums of a network have rounded.
_ENOUGH, _ROUNDED = 256.0, 1_024.0


class AutoFlow(AutoScaled):
    """A flow of standard normal numbers, and an affine map behind it.

    Its parameters are `<prefix>_loc` (size,), `<prefix>_scale_tril` (size, size), a lower triangular factor with a
    positive diagonal, and the networks' own.

    Args:
        model: A NumPyro callable.
        num_flows: Layers of the flow; the coordinates' order is turned round between them.
        **options: Those of `AutoScaled`: the parameters' prefix, the first location and sd.

    Raises:
        ValueError: There is no layer, or the first sd is not positive.
    """

    def __init__(self, model: Callable[..., Any], *, num_flows: int, **options: Any) -> None:
        if num_flows < 1:
            raise ValueError(f"Expected at least one layer; got num_flows={num_flows}.")
        self.num_flows = num_flows
        super().__init__(model, **options)

    @abstractmethod
    def _layer(self, number: int) -> Transform:
        """One layer, with its network's parameters."""

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        if self.latent_dim == 1:
            raise ValueError(
                f"Expected at least 2 unconstrained coordinates for {type(self).__name__}, which bends each by those "
                "before it; got 1: take full_rank or mixture."
            )

    def _get_posterior(self) -> dist.TransformedDistribution:
        turned = jnp.arange(self.latent_dim)[::-1]
        parts: list[Transform] = []
        for number in range(self.num_flows):
            parts += [self._layer(number), PermuteTransform(turned)]
        if self.num_flows % 2:  # an odd number of layers ends in the order in which it began without the last turn
            parts.pop()
        loc = numpyro.param(f"{self.prefix}_loc", self._init_latent)
        scale_tril = numpyro.param(
            f"{self.prefix}_scale_tril",
            self._init_scale * jnp.identity(self.latent_dim, jnp.result_type(self._init_latent)),
            constraint=constraints.softplus_lower_cholesky,
        )
        return dist.TransformedDistribution(self.get_base_dist(), [*parts, LowerCholeskyAffine(loc, scale_tril)])

    def get_base_dist(self) -> dist.Distribution:
        """Independent standard normals, (size,)."""
        return dist.Normal(jnp.zeros(self.latent_dim), 1).to_event(1)

    def get_transform(self, params: Mapping[str, Any]) -> Transform:
        """From standard normal to unconstrained values."""
        posterior = handlers.substitute(self._get_posterior, dict(params))()
        return ComposeTransform(posterior.transforms)


class AutoIAF(AutoFlow):
    """An inverse autoregressive flow that begins at a Gaussian, and may stay there.

    Usage::

        guide = AutoIAF(model)
        svi = SVI(model, guide, ...)

    Args:
        model: A NumPyro callable.
        num_flows: Layers of the flow.
        hidden_dims: Units of each layer's hidden layers, none below the dimension; two layers of as many, and at least
            24, if None.
        **options: Those of `AutoFlow`.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        num_flows: int = 3,
        hidden_dims: Sequence[int] | None = None,
        **options: Any,
    ) -> None:
        self._hidden_dims = hidden_dims
        super().__init__(model, num_flows=num_flows, **options)

    def _layer(self, number: int) -> Transform:
        size = self.latent_dim
        hidden = list(self._hidden_dims or 2 * [max(size, _LEAST_HIDDEN)])
        with jax.ensure_compile_time_eval():  # its masks are constants, and no work of each step
            network = AutoregressiveNN(size, hidden, permutation=jnp.arange(size), nonlinearity=stax.Elu)
        begun = _begun_at(network, number, _masked)
        return InverseAutoregressiveTransform(numpyro.module(f"{self.prefix}_arn__{number}", begun, (size,)))


class AutoBNAF(AutoFlow):
    """A block neural autoregressive flow whose gate begins all but closed, at a Gaussian.

    Its inverse has no closed form; `get_posterior` has one by iteration, so that the density is known at any point.

    Usage::

        guide = AutoBNAF(model)
        svi = SVI(model, guide, ...)

    Args:
        model: A NumPyro callable.
        num_flows: Layers of the flow.
        hidden_factors: Units of each hidden layer for each coordinate; two layers of eight, or of four beyond 16
            dimensions, if None.
        **options: Those of `AutoFlow`.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        num_flows: int = 1,
        hidden_factors: Sequence[int] | None = None,
        **options: Any,
    ) -> None:
        self._hidden_factors = hidden_factors
        super().__init__(model, num_flows=num_flows, **options)

    def _layer(self, number: int) -> Transform:
        size = self.latent_dim
        with jax.ensure_compile_time_eval():  # its masks are constants, and no work of each step
            factors = list(self._hidden_factors or 2 * [8 if size <= _SMALL else 4])
            network = BlockNeuralAutoregressiveNN(size, factors, "gated")
        begun = _begun_at(network, number, _monotone)
        return BlockNeuralAutoregressiveTransform(numpyro.module(f"{self.prefix}_arn__{number}", begun, (size,)))

    def get_posterior(self, params: Mapping[str, Any]) -> dist.TransformedDistribution:
        """The distribution of an unconstrained vector, with a density at any point."""
        posterior = handlers.substitute(self._get_posterior, dict(params))()
        parts = [
            _Invertible(part.bn_arn) if isinstance(part, BlockNeuralAutoregressiveTransform) else part
            for part in posterior.transforms
        ]
        # Validated, a compiled density would be 0 where it is not known, for a value that is NaN.
        base = dist.Normal(jnp.zeros(self.latent_dim), 1, validate_args=False).to_event(1)
        return dist.TransformedDistribution(base, parts, validate_args=False)


def _begun_at(network: tuple[Any, Any], number: int, begin: Callable[[Any, Any], Any]) -> tuple[Any, Any]:
    """A network with first parameters of ours, which are the same whatever the key: the Gaussian is where it begins.

    NumPyro's own are drawn block by block, each by a program that takes time to compile: most of a minute for a BNAF in
    28 dimensions.
    """
    init, apply = network

    def begun(key: jax.Array, shape: tuple[int, ...]) -> tuple[Any, Any]:
        params = jax.eval_shape(lambda key: init(key, shape)[1], key)
        return shape, begin(params, np.random.default_rng(number))

    return begun, apply


def _masked(params: Any, rng: np.random.Generator) -> Any:
    """Weights of a masked network; its last layer's are zero."""

    def dense(layer: Any, scale: float) -> Any:
        weights, biases = (leaf.shape for leaf in layer)
        spread = scale * math.sqrt(2 / sum(weights))  # Glorot & Bengio (2010)
        return jnp.asarray(spread * rng.standard_normal(weights)), jnp.asarray(
            0.01 * scale * rng.standard_normal(biases)
        )

    last = len(params) - 1
    return [dense(layer, float(place < last)) if layer else layer for place, layer in enumerate(params)]


def _monotone(params: Any, rng: np.random.Generator) -> Any:
    """Weights, log lengths and biases of a block network, as NumPyro draws them, and a gate that is all but closed."""

    def dense(layer: Any) -> Any:
        weights, lengths, biases = (leaf.shape for leaf in layer)
        limit = math.sqrt(6 / sum(weights))
        return (
            jnp.asarray(rng.uniform(-limit, limit, weights)),
            jnp.asarray(np.log(rng.uniform(0.05, 1.0, lengths))),
            jnp.asarray(rng.uniform(-1, 1, biases) / math.sqrt(biases[0])),
        )

    _, (network, identity), gate = params
    layers = [dense(layer) if layer else layer for layer in network]
    return [(), [layers, identity], jnp.full(gate.shape, _GATE)]


class _Invertible(BlockNeuralAutoregressiveTransform):
    """The transform with an inverse by iteration; NaN in the rows where that does not settle."""

    def _inverse(self, y: Any) -> Any:
        """The root of a triangular map that rises in each coordinate.

        Newton's step for each coordinate by its own slope, no longer than a length that is halved whenever the error
        changes its sign: a coordinate settles once those before it have (Song, Meng, Liao & Ermon 2021, Accelerating
        feedforward computation via parallel nonlinear equation solving, ICML).
        """
        rounding = jnp.finfo(y.dtype).eps * jnp.maximum(1, jnp.abs(y))

        def wanted(state: tuple[Any, ...]) -> Any:
            number, _, error, _ = state
            return (number < _STEPS + 4 * y.shape[-1]) & (jnp.abs(error) > _ENOUGH * rounding).any()

        def step(state: tuple[Any, ...]) -> tuple[Any, ...]:
            number, x, error, longest = state
            _, slope = self.bn_arn(x)
            x = x + jnp.clip(error * jnp.exp(-slope), -longest, longest)
            left = y - self.bn_arn(x)[0]
            turned = left * error < 0
            return number + 1, x, left, jnp.where(turned, longest / 2, longest * 1.2)

        begin = 0, y, y - self.bn_arn(y)[0], jnp.ones_like(y)
        _, x, error, _ = jax.lax.while_loop(wanted, step, begin)
        return jnp.where((jnp.abs(error) <= _ROUNDED * rounding).all(-1, keepdims=True), x, jnp.nan)
