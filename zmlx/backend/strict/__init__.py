"""A strict look at Metal text, with clang: what Apple's compiler would refuse fails here too."""

from zmlx.backend.strict.check import check, check_text
from zmlx.backend.strict.compiler import ClangUnavailable, find, flattened
from zmlx.backend.strict.diagnosis import Diagnosis
from zmlx.backend.strict.launch import Refused, compiled

__all__ = [
    "ClangUnavailable",
    "Diagnosis",
    "Refused",
    "check",
    "check_text",
    "compiled",
    "find",
    "flattened",
]
