"""What the models of all families share: their sizes, dtype, mesh and generation config."""

from typing import Any, NoReturn, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jaxgen.models.family import Config
from jaxgen.models.layers import HostOnly


class LanguageModel(nnx.Module):
    """A pytree of weights in one dtype, with its configuration.

    Attributes:
        config: the architecture, part of the compile key.
        mesh: the mesh that the model is sharded over; None for one device.
        host: the `transformers.GenerationConfig`; see `generation_config`.
    """

    def __init__(self, config: Config, generation_config: object = None, mesh: Mesh | None = None):
        self.config: Any = config
        self.mesh = mesh
        self.host = HostOnly(generation_config)

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def is_encoder_decoder(self) -> bool:
        return False

    @property
    def has_position_table(self) -> bool:
        """Whether there is no embedding for positions from `max_position_embeddings` on."""
        return False

    @property
    def dtype(self) -> jnp.dtype:
        raise NotImplementedError

    @property
    def generation_config(self) -> Any:
        return self.host.value

    @property
    def generate(self) -> NoReturn:
        """Raises an error with the way out, for users of transformers."""
        raise AttributeError("a model has no method `generate`. Call `jaxgen.generate(model, input_ids, ...)`.")

    def on(self, mesh: Mesh) -> Self:
        """See `base.Model.on`."""
        devices = {device for device in mesh.devices.flat}

        def part(array: jax.Array) -> jax.Array:
            assert isinstance(array.sharding, NamedSharding)
            shards = [shard.data for shard in array.addressable_shards if shard.device in devices]
            sharding = NamedSharding(mesh, array.sharding.spec)
            return jax.make_array_from_single_device_arrays(array.shape, sharding, shards)

        model = nnx.clone(jax.tree.map(part, self), variables=False)
        model.mesh = mesh
        return model

    def __setattr__(self, name: str, value: object) -> None:
        # Not a property setter: Flax would record the name as an attribute, and the model would need new programs.
        if name == "generation_config":
            name, value = "host", HostOnly(value)
        super().__setattr__(name, value)
