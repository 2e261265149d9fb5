"""What the models of all families share: their sizes, mesh, generation config, and a pass that ends with the head."""

from typing import Any, NoReturn, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxgen.base import Intermediates, rows_axis
from jaxgen.kv_cache import KVCache
from jaxgen.models.family import Config
from jaxgen.models.layers import HostOnly


class LanguageModel(nnx.Module):
    """A pytree of weights in one dtype, with its configuration. A family adds `dtype`, `hidden_states` and `logits`.

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
    def slots_per_block(self) -> int | None:
        """See `base.Model.slots_per_block`."""
        return None

    @property
    def dtype(self) -> jnp.dtype:
        raise NotImplementedError

    def hidden_states(
        self,
        cache: KVCache,
        input_ids: jax.Array,
        attention_mask: jax.Array,
        position_ids: jax.Array | None = None,
        intermediates: tuple[str, ...] = (),
    ) -> tuple[jax.Array, KVCache, Intermediates]:
        """As `extend`, but float [N, T, D] after the final norm in place of logits."""
        raise NotImplementedError

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> float32 [..., V], rounded to the model's dtype as in transformers."""
        raise NotImplementedError

    def extend(
        self,
        cache: KVCache,
        input_ids: jax.Array,
        attention_mask: jax.Array,
        position_ids: jax.Array | None = None,
        intermediates: tuple[str, ...] = (),
        logits_to_keep: int = 1,
    ) -> tuple[jax.Array, KVCache, Intermediates]:
        """See `base.Model.extend`. The head runs only on the columns whose logits are returned."""
        hidden, cache, computed = self.hidden_states(cache, input_ids, attention_mask, position_ids, intermediates)
        last = hidden[:, -logits_to_keep * cache.branches :].reshape(-1, hidden.shape[-1])
        return self.logits(last), cache, computed

    def sharded_by_rows(self, x: jax.Array) -> jax.Array:
        """The same array [N, ...], on a mesh with its rows over the axis "data"."""
        if self.mesh is None:
            return x
        return lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(rows_axis(self.mesh, len(x)))))

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
