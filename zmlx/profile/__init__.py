"""Release profiles: what zmlx may replace, from TOML files, with where each value came from."""

from zmlx.profile.resolve import available_profiles, resolve_policy
from zmlx.profile.schema import Policy, ProfileError

__all__ = ["Policy", "ProfileError", "available_profiles", "resolve_policy"]
