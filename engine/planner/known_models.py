"""Well-known models, so that planning one needs none of its weights. No torch."""

from dataclasses import dataclass

from engine.dtypes import DType
from engine.formats.int4_sizes import Int4
from engine.model.family import Sizes
from engine.model.registry import known_configs, sizes_for
from engine.shape import ModelShape
from engine.weights.layout import Storing, stored_as
from engine.weights.stored import StoredWeights


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model by its name on the Hugging Face hub."""

    name: str
    sizes: Sizes

    @property
    def shape(self) -> ModelShape:
        """What planning needs besides the weights' bytes."""
        return self.sizes.shape

    def stored(self, dtype: DType = DType.FLOAT16, matrices: Int4 | None = None) -> StoredWeights:
        """Bytes of each unit, as ``overnight import --dtype --weight-format`` would store them."""
        return stored_as(self.sizes, Storing(dtype, matrices))


KNOWN_MODELS = {name: KnownModel(name, sizes_for(config)) for name, config in known_configs().items()}


def known_model(name: str) -> KnownModel | None:
    """By its name on the hub, with or without the organisation; ``None``: not a model whose shape is built in."""
    wanted = name.lower()
    for known in KNOWN_MODELS.values():
        if wanted in (known.name.lower(), known.name.lower().rpartition("/")[2]):
            return known
    return None
