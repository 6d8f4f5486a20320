"""Model families: what a model is, from its configuration or from its modules."""

from zmlx.family.detect import detect
from zmlx.family.table import Family, ModelType, Refusal, family_names, model_types

__all__ = ["Family", "ModelType", "Refusal", "detect", "family_names", "model_types"]
