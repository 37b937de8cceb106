"""What users subclass to say what is trained."""

from helios.model.model import BatchPhase as BatchPhase
from helios.model.model import Model as Model
