"""What users subclass to say what is trained."""

from helios.model.model import BatchPhase, Model
from helios.registry import Registry

__all__ = ["MODEL_REGISTRY", "BatchPhase", "Model", "create_model"]

MODEL_REGISTRY = Registry("model")


def create_model(type_name: str, *args: object, **kwargs: object) -> Model:
    """The registered model of that name."""
    model = MODEL_REGISTRY.create(type_name, *args, **kwargs)
    assert isinstance(model, Model)
    return model
