"""A wheel that holds the compiled CPU kernels: a build hook of hatchling, off by default.

`HATCH_BUILD_HOOK_ENABLE_CUSTOM=1 python -m build --wheel` (the variable is hatchling's own)
puts the library, compiled against the mlx of the build's environment, into the package, and gives
the wheel the tags of this Python and platform, and a requirement on the very version of that mlx.

hatchling loads this file by its path, before what it imports of ours has to be there.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hatchling.builders.config import BuilderConfig
from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.requirements import Requirement

#: Where the package looks for a library (`native.BUNDLED`), in the wheel.
TARGET = "zmlx/backend/cpu/lib"
#: Of the project's requirements, those that a build needs.
_BUILT_WITH = ("mlx", "nanobind")


class NativeWheel(BuildHookInterface[BuilderConfig]):
    """Adds the library to the wheel."""

    _folder: TemporaryDirectory[str] | None = None

    def dependencies(self) -> list[str]:
        """Return what an isolated build needs: mlx for the CPU and nanobind, as the project."""
        project = self.metadata.core
        needed = [one for one in project.dependencies if Requirement(one).name in _BUILT_WITH]
        return [*needed, *project.optional_dependencies["cpu"]]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the library; an editable installation compiles on first use instead."""
        if version != "standard":
            return
        sys.path.insert(0, self.root)
        from zmlx.backend.cpu import build, native  # noqa: PLC0415 - they import MLX

        self._folder = TemporaryDirectory(prefix="zmlx-wheel-")
        try:
            library = native.put_into(Path(self._folder.name))
        except build.NativeUnavailable as refusal:
            self.app.abort(str(refusal))
        for file in (library, library.with_name(build.MANIFEST)):
            build_data["force_include"][str(file)] = f"{TARGET}/{file.name}"
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
        build_data["dependencies"].append(f"mlx=={build.mlx_version()}")

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the copy that went into the wheel."""
        if self._folder is not None:
            self._folder.cleanup()
