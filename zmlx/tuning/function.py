"""Functions that take a `threadgroup`, and find out themselves which is the fastest."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import mlx.core as mx

from zmlx.backend import for_kernels
from zmlx.tuning.arrays import arrays, leaves
from zmlx.tuning.choose import choose
from zmlx.tuning.config import (
    AutotuneConfig,
    AutotuneResult,
    TemplateLike,
    Threadgroup,
    configurations,
    named,
    usual,
)
from zmlx.tuning.identity import NoContent, Subject, digest, inputs_text, machine, text_of
from zmlx.tuning.store import Memory, default_store
from zmlx.tuning.threadgroup import TUNED_BACKENDS


class AutotunedFunction:
    """A function whose `threadgroup`, and `template` if asked for, are chosen by its speed.

    The function is called with `threadgroup=(x, y, z)`, and with `template=[(name, value), ...]`
    when there are template candidates. The first call for some shapes, dtypes and other arguments
    times every candidate; results are remembered on disk. A function that refers to something whose
    content cannot be read (an array, an open file) is remembered for as long as it lives. On the
    emulator, on the CPU and, while nothing is remembered, inside `mx.compile`, `mx.grad` and
    `mx.vmap` it runs with the default: the first candidate with 256 threads, else the first.

    Args:
        fn: the function; it returns arrays, or containers of them, lazily.
        threadgroup_candidates: threadgroups to try, each (x, y, z) or x; default 32 to 1,024.
        template_candidates: templates to try, each (name, value) pairs or a mapping; default none.
        warmup: calls of each candidate before it is timed.
        iters: how often each is timed.
        device_aware: whether a result holds for devices of one name only.

    Raises:
        TypeError: `fn` is no function, or a template is none.
        ValueError: there are no candidates, or one is no threadgroup.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        threadgroup_candidates: Iterable[Threadgroup] | None = None,
        template_candidates: Iterable[TemplateLike | None] | None = None,
        warmup: int = 3,
        iters: int = 10,
        *,
        device_aware: bool = True,
    ) -> None:
        if not callable(fn):
            raise TypeError(f"autotune: {fn!r} is not a function")
        choices = configurations(threadgroup_candidates, template_candidates)
        self.fn = fn
        self.choices = {choice.label(): choice for choice in choices}
        self.warmup = warmup
        self.iters = iters
        self.device_aware = device_aware
        self._usual = usual(choices)
        self._has_template = template_candidates is not None
        self._found: dict[Subject, AutotuneResult] = {}
        self._identity: tuple[str, Memory | None] | None = None
        self._lock = threading.Lock()
        functools.update_wrapper(self, fn)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function with the best configuration.

        A `threadgroup` or `template` among the arguments is passed on, and nothing is tuned.

        Raises:
            zmlx.tuning.TuningError: no candidate can run; the text gives every reason.
            zmlx.tuning.NoContent: an argument is neither an array nor a plain value.
        """
        if "threadgroup" in kwargs or "template" in kwargs:
            return self.fn(*args, **kwargs)
        return self._with(self._best(args, kwargs), args, kwargs)

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        """Bind like a function, so that methods can be tuned."""
        return self if instance is None else partial(self, instance)

    def results(self) -> list[AutotuneResult]:
        """Return what this function's calls found or remembered so far."""
        with self._lock:
            return list(self._found.values())

    def clear_cache(self) -> None:
        """Forget what was found for this function, on disk too; the next call searches."""
        with self._lock:
            store, subjects = self._store(), list(self._found)
            self._found.clear()
        content = self._content()[0]
        same = [r.subject for r in store.all() if content and r.subject.content == content]
        store.remove(*subjects, *same)

    def _best(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AutotuneConfig:
        backend = for_kernels(has_reference=False)
        if backend not in TUNED_BACKENDS:
            return self._usual
        subject = self._subject(backend, args, kwargs)
        found = self._found.get(subject)
        if found is None:
            result = choose(
                subject,
                {
                    label: partial(self._with, choice, args, kwargs)
                    for label, choice in self.choices.items()
                },
                inputs=arrays((args, kwargs)),
                default=self._usual.label(),
                store=self._store(),
                warmup=self.warmup,
                rounds=self.iters,
            )
            if result is None:
                return self._usual
            found = named(result, self.choices)
            with self._lock:
                self._found[subject] = found
        return found.best_config

    def _with(self, choice: AutotuneConfig, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        template = {"template": choice.to_list()} if self._has_template else {}
        return self.fn(*args, **kwargs, threadgroup=choice.threadgroup, **template)

    def _subject(self, backend: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Subject:
        given = leaves((args, kwargs))
        kinds = [(at, inputs_text([leaf])) for at, leaf in given if isinstance(leaf, mx.array)]
        plain = [(at, leaf) for at, leaf in given if not isinstance(leaf, mx.array)]
        return Subject(
            machine=machine(backend, any_device=not self.device_aware),
            kernel=getattr(self.fn, "__qualname__", type(self.fn).__qualname__),
            content=self._content()[0],
            inputs=f"{', '.join(text for _, text in kinds)}; {text_of((kinds, plain))}",
            candidates=tuple(self.choices),
        )

    def _content(self) -> tuple[str, Memory | None]:
        """Return the hash of the function, or none and what remembers results in its place."""
        if self._identity is None:
            try:
                self._identity = (digest(self.fn, self._has_template), None)
            except NoContent:
                self._identity = ("", Memory())
        return self._identity

    def _store(self) -> Memory:
        return self._content()[1] or default_store()


def autotune(
    threadgroups: Iterable[Threadgroup] | None = None,
    templates: Iterable[TemplateLike | None] | None = None,
    warmup: int = 3,
    iters: int = 10,
    device_aware: bool = True,
) -> Callable[[Callable[..., Any]], AutotunedFunction]:
    """Return a decorator that makes an `AutotunedFunction`, whose arguments these are.

    Example:
        @autotune(threadgroups=[64, 128, 256])
        def scaled(x, *, threadgroup):
            return kernel(x, grid=(x.size, 1, 1), threadgroup=threadgroup,
                          output_shapes=[x.shape], output_dtypes=[x.dtype])[0]

    Raises:
        TypeError: it stands above a function without brackets.
        ValueError: there are no candidates, or one is no threadgroup.
    """
    if callable(threadgroups):
        raise TypeError("write @autotune() with brackets")
    sizes = None if threadgroups is None else list(threadgroups)
    values = None if templates is None else list(templates)
    return lambda fn: AutotunedFunction(fn, sizes, values, warmup, iters, device_aware=device_aware)
