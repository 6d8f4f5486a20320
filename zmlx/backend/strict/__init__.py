"""A strict look at Metal text, with clang: what Apple's compiler would refuse fails here too."""

from zmlx.backend.strict.check import check, check_text
from zmlx.backend.strict.compiler import ClangUnavailable, find, flattened
from zmlx.backend.strict.diagnosis import Diagnosis

__all__ = ["ClangUnavailable", "Diagnosis", "check", "check_text", "find", "flattened"]
