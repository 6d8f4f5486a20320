# Run by the interpreter at its start, because `zmlx run` put this folder on PYTHONPATH.
# First the user's own sitecustomize runs, as if this one were not there; then one call, without
# arguments, installs the hook. The file parses on any Python, and imports nothing of its own.
import os
import sys


def _zmlx_chain():
    here = os.path.dirname(os.path.abspath(__file__))

    def ours(entry):
        return os.path.normcase(os.path.normpath(os.path.abspath(entry or "."))) == (
            os.path.normcase(os.path.normpath(here))
        )

    own = sys.modules.pop("sitecustomize", None)
    path = sys.path[:]
    sys.path[:] = [entry for entry in path if not ours(entry)]
    try:
        from importlib.machinery import PathFinder
        from importlib.util import module_from_spec

        spec = PathFinder.find_spec("sitecustomize", sys.path)
        # A folder of that name without a file is a namespace package: nothing to run.
        if spec is not None and spec.origin is not None and spec.loader is not None:
            module = module_from_spec(spec)
            sys.modules["sitecustomize"] = module
            try:
                spec.loader.exec_module(module)
            except ImportError as error:
                if getattr(error, "name", None) != "sitecustomize":
                    _zmlx_report(error)
            except Exception as error:
                _zmlx_report(error)
    finally:
        # What the user's file did to sys.path stays; our entry goes back to where it was.
        for position, entry in enumerate(path):
            if ours(entry) and entry not in sys.path:
                sys.path.insert(min(position, len(sys.path)), entry)
        if own is not None:
            sys.modules.setdefault("sitecustomize", own)


def _zmlx_report(error):
    if sys.stderr is not None:
        sys.stderr.write(
            "Error in sitecustomize; set PYTHONVERBOSE for traceback:\n%s: %s\n"
            % (error.__class__.__name__, error)
        )


try:
    import importlib.machinery

    importlib.machinery.PathFinder.find_spec
except (ImportError, AttributeError):  # an interpreter that zmlx does not support
    pass
else:
    _zmlx_chain()
    if os.environ.get("ZMLX_AUTOPATCH", "1") != "0":
        try:
            from zmlx_autopatch import bootstrap
        except ImportError:
            pass  # another interpreter than the one that zmlx is installed in
        else:
            bootstrap()
