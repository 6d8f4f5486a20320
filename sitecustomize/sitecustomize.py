# Run by the interpreter at its start, because `zmlx run` put this folder on PYTHONPATH.
# First the user's own sitecustomize runs, as if this one were not there; then one call, without
# arguments, installs the hook of whichever zmlx this interpreter can import: one that can import
# none is another environment's and is left alone. (Comparing prefixes instead would misjudge
# interpreters whose own start-up file rewrites them, and environments that see our packages.)
# The file parses on any Python.
import os
import sys


def _run_the_users_own():
    here = os.path.dirname(os.path.abspath(__file__))

    def ours(entry):
        return os.path.normcase(os.path.abspath(entry)) == os.path.normcase(here)

    own = sys.modules.pop("sitecustomize", None)
    before = sys.path[:]
    sys.path[:] = [entry for entry in before if not ours(entry)]
    try:
        import sitecustomize  # noqa: F401 - the next one on the path, if there is one
    except ImportError as error:
        if getattr(error, "name", "sitecustomize") != "sitecustomize":
            _report(error)
    except Exception as error:
        _report(error)
    finally:
        # Back where it was: some programs hand sys.path on to their children as PYTHONPATH.
        for position, entry in enumerate(before):
            if ours(entry) and entry not in sys.path:
                sys.path.insert(position, entry)
        if own is not None:
            sys.modules.setdefault("sitecustomize", own)


def _report(error):
    # What the interpreter itself says of a start-up file that fails.
    if sys.flags.verbose:
        sys.excepthook(*sys.exc_info())
    else:
        _say(
            "Error in sitecustomize; set PYTHONVERBOSE for traceback:\n%s: %s"
            % (error.__class__.__name__, error)
        )


def _say(text):
    if sys.stderr is not None:
        try:
            sys.stderr.write(text + "\n")
        except (OSError, ValueError):  # nobody reads it
            pass


def _install():
    if os.environ.get("ZMLX_AUTOPATCH", "").strip() == "0" or sys.version_info < (3, 10):
        return
    log = os.environ.get("ZMLX_LOG", "").strip()
    try:
        from zmlx_autopatch import bootstrap

        bootstrap()
    except Exception as error:
        missing = error.__class__.__name__ == "ModuleNotFoundError"
        if missing and error.name == "zmlx_autopatch":
            if log == "debug":
                _say("zmlx: not installed for %s: it stays as it is" % sys.executable)
            return
        # A child of this process would fail in the same way.
        os.environ["ZMLX_AUTOPATCH"] = "0"
        if log != "off":
            _say("zmlx: models stay as they are loaded: %s" % error)


_run_the_users_own()
_install()
