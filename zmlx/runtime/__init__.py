"""From a loaded model to a patched one: profile, family, plan and replacement in their order."""

from zmlx.runtime.model import patch, patch_loaded, unpatch
from zmlx.runtime.smart import smart_patch

__all__ = ["patch", "patch_loaded", "smart_patch", "unpatch"]
