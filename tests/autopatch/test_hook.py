"""The finder and the boundaries. Numbers are those of the case list."""

from __future__ import annotations

MARKED = "zmlx: marked by mlx_lm.utils.load\n"


def test_every_binding_of_the_loader_is_covered(python):
    result = python(
        """
        import sys
        import mlx_lm, mlx_lm.server
        generate = sys.modules["mlx_lm.generate"]  # 35: the attribute is the function
        assert callable(mlx_lm.generate)
        print(mlx_lm.generate("a"), mlx_lm.convert("b")[0], mlx_lm.server.serve("c")[0])
        print(generate.load("d")[0])
        """
    )
    assert (
        result.out == "answer of ['a', 'marked'] ['b', 'marked'] ['c', 'marked']\n['d', 'marked']\n"
    )
    assert result.err == MARKED * 4


def test_python_m(python, tmp_path):  # 27, 36
    result = python(
        """
        import subprocess, sys
        run = subprocess.run([sys.executable, "-W", "ignore", "-m", "mlx_lm.generate", "a"],
                             capture_output=True, text=True)
        print(run.stdout, run.stderr, end="")
        """
    )
    assert result.out == "answer of ['a', 'marked']\n " + MARKED


def test_a_load_inside_of_a_load_is_patched_once_at_the_outermost(python):  # 38, 40
    result = python("import mlx_lm.utils as u; print(u.sharded_load('m')[0])")
    assert (result.out, result.err) == (
        "['m', 'marked']\n",
        "zmlx: marked by mlx_lm.utils.sharded_load\n",
    )


def test_results_signature_and_metadata_are_those_of_the_loader(python):  # 37
    result = python(
        """
        import inspect, mlx_lm.utils as u
        original = u.load.__wrapped__
        assert inspect.signature(u.load) == inspect.signature(original)
        assert (u.load.__name__, u.load.__doc__, u.load.__module__) == (
            "load", original.__doc__, "mlx_lm.utils")
        assert len(u.load("m", return_config=True)) == 3
        assert len(u.load("m", something_new=1)) == 2
        """
    )
    assert (result.code, result.err) == (0, MARKED * 2)


def test_the_loaders_own_errors_pass_unchanged(python):
    result = python(
        """
        import traceback, mlx_lm
        try:
            mlx_lm.load("missing")
        except FileNotFoundError as error:
            print(error, len(traceback.extract_tb(error.__traceback__)))
        mlx_lm.load("m")  # the guard was released
        """
    )
    message, frames = result.out.rsplit(" ", 1)
    assert message == "no such model: missing"
    assert int(frames) <= 4  # the caller, the loader, what it calls, and one of ours
    assert result.err == MARKED


def test_a_failure_after_the_load_leaves_the_model(python):  # 41
    result = python("import mlx_lm; print(mlx_lm.load('broken')[0])")
    assert (result.code, result.out) == (0, "['broken']\n")
    assert result.err == ("zmlx: the model stays as it was loaded: ValueError: detection broke\n")


def test_strict_raises(python):
    result = python("import mlx_lm; mlx_lm.load('broken')", ZMLX_STRICT="1")
    assert result.code == 1
    assert result.err.endswith("ValueError: detection broke\n")


def test_an_interrupt_propagates(python):  # 41
    result = python(
        """
        import mlx_lm
        try:
            mlx_lm.load("interrupt")
        except KeyboardInterrupt:
            print("interrupted")
        """
    )
    assert (result.code, result.out, result.err) == (0, "interrupted\n", "")


def test_log_levels(python):  # 54
    body = "import mlx_lm; mlx_lm.load('m')"
    assert python(body, ZMLX_LOG="off").err == ""
    assert python(body, ZMLX_LOG="debug").err == MARKED + "  a page\n"
    assert python(body, ZMLX_LOG="loud").err == MARKED


def test_loaders_and_specs_are_restored(python):  # 28
    result = python(
        """
        import importlib.resources, inspect, pickle
        import mlx_lm.utils as u
        print(type(u.__loader__).__name__, u.__spec__.loader is u.__loader__)
        assert "def load_model" in inspect.getsource(u)
        assert importlib.resources.files("mlx_lm").joinpath("utils.py").is_file()
        assert pickle.loads(pickle.dumps(u.Model([1]))) == [1]
        """
    )
    assert (result.code, result.out, result.err) == (0, "SourceFileLoader True\n", "")


def test_reload_wraps_once(python):  # 32
    result = python(
        """
        import importlib, mlx_lm.utils as u
        importlib.reload(u); importlib.reload(u)
        print(u.load("m")[0], type(u.load.__wrapped__).__name__)
        """
    )
    assert (result.out, result.err) == ("['m', 'marked'] function\n", MARKED)


def test_reimport_after_removal(python):
    result = python(
        """
        import sys, mlx_lm
        for name in [n for n in sys.modules if n.startswith("mlx_lm")]:
            del sys.modules[name]
        import mlx_lm
        print(mlx_lm.load("m")[0])
        """
    )
    assert (result.out, result.err) == ("['m', 'marked']\n", MARKED)


def test_an_import_that_fails_fails_as_it_would(python, tmp_path):  # 31
    broken = tmp_path / "broken" / "mlx_lm"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("from . import utils\n")
    (broken / "utils.py").write_text("import a_missing_package\n")
    body = "import mlx_lm"
    ours = python(body, before=(broken.parent,))
    native = python(body, before=(broken.parent,), hook=False)
    assert ours.code == native.code == 1
    assert ours.err.splitlines()[-1] == native.err.splitlines()[-1]
    extra = len(ours.err.splitlines()) - len(native.err.splitlines())
    assert extra <= 6  # at most our own frame


def test_a_failure_of_the_hook_does_not_fail_the_import(python, tmp_path):  # 30
    broken = tmp_path / "broken" / "wrapt"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise RuntimeError('wrapt is broken')\n")
    result = python("import mlx_lm; print(mlx_lm.load('m')[0])", before=(broken.parent,))
    assert (result.code, result.out) == (0, "['m']\n")
    assert result.err == "zmlx: models stay as they are loaded: RuntimeError: wrapt is broken\n"


def test_a_target_that_is_a_folder_is_skipped(python, tmp_path):  # 29
    (tmp_path / "spaces" / "mlx_lm" / "utils").mkdir(parents=True)
    result = python("import mlx_lm.utils; print('ran')", before=(tmp_path / "spaces",))
    assert (result.code, result.out, result.err) == (0, "ran\n", "")


def test_other_finders_are_asked_and_only_for_targets(python):  # 25, 26
    result = python(
        """
        import sys
        asked = []

        class Watching:
            def find_spec(self, name, path=None, target=None):
                asked.append(name)

        sys.meta_path.insert(1, Watching())
        import colorsys, mlx_lm
        print(asked.count("colorsys"), asked.count("mlx_lm.utils"))
        from zmlx_autopatch.hook import Finder
        print(Finder().find_spec("colorsys"))
        """
    )
    assert result.out == "1 1\nNone\n"


def test_no_deadlock_between_two_importing_threads(python):  # 26
    result = python(
        """
        import threading
        def work(name):
            __import__(name)
        threads = [threading.Thread(target=work, args=(name,))
                   for name in ("mlx_lm", "mlx_lm.utils", "mlx_lm.server", "mlx_lm.generate")]
        for t in threads: t.start()
        for t in threads: t.join(20)
        print([t.is_alive() for t in threads].count(True))
        """
    )
    assert result.out == "0\n"


def test_install_by_hand_rebinds_what_is_bound_already(python):  # 33, 34
    result = python(
        """
        import mlx_lm
        from mlx_lm import load as L
        import functools
        partial = functools.partial(L)
        import zmlx_autopatch
        print(zmlx_autopatch.install(), zmlx_autopatch.install())
        import sys
        print(L("a")[0], mlx_lm.load("b")[0], sys.modules["mlx_lm.generate"].load("c")[0])
        print(partial("d")[0])  # cannot be reached, and says nothing
        assert type(L) is not type(L.__wrapped__) is type(mlx_lm.convert)
        zmlx_autopatch.uninstall()
        assert type(L) is type(mlx_lm.convert)
        print(L("e")[0], mlx_lm.load("f")[0], zmlx_autopatch.state()["installed"])
        """,
        hook=False,
    )
    assert result.out == (
        "True True\n['a', 'marked'] ['b', 'marked'] ['c', 'marked']\n['d']\n['e'] ['f'] False\n"
    )
    assert result.err == MARKED * 3


def test_installing_after_the_start_up_file_changes_nothing(python):  # 9
    result = python(
        """
        import sys, zmlx_autopatch
        zmlx_autopatch.install()
        import mlx_lm
        print(mlx_lm.load("m")[0], sum(type(f).__name__ == "Finder" and "zmlx" in type(f).__module__
                                       for f in sys.meta_path))
        """
    )
    assert (result.out, result.err) == ("['m', 'marked'] 1\n", MARKED)


def test_a_loader_that_somebody_else_wrapped(python):  # 57
    result = python(
        """
        import functools, mlx_lm.utils as u
        import zmlx_autopatch
        original = u.load

        @functools.wraps(original)
        def traced(*args, **kwargs):
            print("traced")
            return original(*args, **kwargs)

        u.load = traced
        zmlx_autopatch.install()
        print(u.load("m")[0])
        """,
        hook=False,
    )
    assert (result.out, result.err) == ("traced\n['m', 'marked']\n", MARKED)


def test_two_models(python):  # 45
    result = python("import mlx_lm; print(mlx_lm.load('a')[0], mlx_lm.load('b')[0])")
    assert (result.out, result.err) == ("['a', 'marked'] ['b', 'marked']\n", MARKED * 2)


def test_the_state_shows_a_hook_that_never_fired(python):  # 55, 56
    result = python(
        """
        import json, subprocess, sys
        print(subprocess.run([sys.executable, "-m", "zmlx_autopatch"],
                             capture_output=True, text=True).stdout, end="")
        import mlx_lm, zmlx_autopatch
        mlx_lm.load("m"); mlx_lm.load("broken")
        print(json.dumps(zmlx_autopatch.state()))
        """
    )
    import json

    before, after = map(json.loads, result.out.splitlines())
    assert before == {
        "installed": True,
        "targets": ["mlx_lm.utils"],
        "seen": [],
        "wrapped": [],
        "lacking": {},
        "loads": 0,
        "patched": 0,
        "error": "",
    }
    assert after["seen"] == ["mlx_lm.utils"]
    assert after["wrapped"] == ["mlx_lm.utils.load", "mlx_lm.utils.sharded_load"]
    assert (after["loads"], after["patched"], after["error"]) == (
        2,
        1,
        "ValueError: detection broke",
    )


def test_targets_are_the_modules_of_the_boundaries():
    from zmlx_autopatch.boundaries import BOUNDARIES
    from zmlx_autopatch.hook import TARGETS

    assert set(TARGETS) == {boundary.module for boundary in BOUNDARIES}


def test_a_kill_during_the_load_leaves_nothing_behind(python, tmp_path):
    """The model exists in the killed process alone; the next one loads as ever."""
    result = python(
        """
        import os, signal, subprocess, sys
        code = (
            "import mlx_lm.utils as u, os, signal\\n"
            "u.load_model = lambda path: os.kill(os.getpid(), signal.SIGKILL)\\n"
            "u.load.__wrapped__.__globals__['load_model'] = u.load_model\\n"
            "u.load('m')"
        )
        print(subprocess.run([sys.executable, "-c", code]).returncode)
        import mlx_lm
        print(mlx_lm.load("m")[0])
        """
    )
    assert (result.out, result.err) == ("-9\n['m', 'marked']\n", MARKED)


def test_the_loader_answers_for_the_one_it_stands_for(python):  # 27
    result = python(
        """
        import copy, importlib.util
        spec = importlib.util.find_spec("mlx_lm.utils")
        print(type(spec.loader).__name__, spec.loader.is_package("mlx_lm.utils"))
        assert "def load_model" in spec.loader.get_source("mlx_lm.utils")
        assert spec.loader.get_code("mlx_lm.utils").co_filename == spec.origin
        assert spec.loader.get_resource_reader("mlx_lm.utils").is_resource("utils.py")
        assert not hasattr(spec.loader, "no_such_attribute")
        assert copy.copy(spec.loader).name == "mlx_lm.utils"
        """
    )
    assert (result.code, result.out, result.err) == (0, "Loader False\n", "")


def test_a_target_run_as_a_program(python, tmp_path):  # 27
    package = tmp_path / "program" / "mlx_lm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "utils.py").write_text("print(__name__)\n")
    code = """
        import subprocess, sys
        done = subprocess.run([sys.executable, "-m", "mlx_lm.utils"], capture_output=True)
        print(done.returncode, done.stdout.decode(), done.stderr.decode(), end="")
        """
    assert python(code, before=(package.parent,)).out == "0 __main__\n "


def test_a_wrapped_loader_is_pickled_and_copied_as_a_function_is(python):  # 28
    result = python(
        """
        import copy, pickle, mlx_lm
        assert pickle.loads(pickle.dumps(mlx_lm.load)) is mlx_lm.load
        assert copy.deepcopy(mlx_lm.load) is mlx_lm.load
        """
    )
    assert (result.code, result.err) == (0, "")


def test_a_thread_that_imports_a_target_inside_of_its_package(python, tmp_path):  # 26
    """A finder that takes import locks would wait here for the package, and the package for it."""
    package = tmp_path / "threads" / "mlx_lm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "import importlib, threading\n"
        "load = lambda: importlib.import_module('mlx_lm.utils')\n"
        "thread = threading.Thread(target=load, daemon=True)\n"
        "thread.start()\nthread.join(10)\nstuck = thread.is_alive()\n"
    )
    (package / "utils.py").write_text("def load(path):\n    return [path], None\n")
    result = python(
        "import mlx_lm, sys; print(mlx_lm.stuck, sys.modules['mlx_lm.utils'].load('m')[0])",
        before=(package.parent,),
    )
    assert (result.out, result.err) == ("False ['m', 'marked']\n", MARKED)


def test_two_threads_that_load_at_once_both_get_a_patched_model(python):  # 39
    result = python(
        """
        import threading, mlx_lm.utils as u
        both = threading.Barrier(2, timeout=10)
        inner = u.load_model
        u.load.__wrapped__.__globals__["load_model"] = lambda path: (both.wait(), inner(path))[1]
        models = {}
        threads = [threading.Thread(target=lambda p=p: models.update({p: u.load(p)[0]}))
                   for p in "ab"]
        for t in threads: t.start()
        for t in threads: t.join()
        print(models["a"], models["b"])
        """
    )
    assert (result.out, result.err) == ("['a', 'marked'] ['b', 'marked']\n", MARKED * 2)


def test_what_no_longer_loads_as_the_table_says_is_told(python, tmp_path):  # 38, 55
    """A loader that became a generator must not pass for one that is hooked."""
    package = tmp_path / "changed" / "mlx_lm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "utils.py").write_text("def load(path):\n    yield path\n")
    result = python(
        """
        import mlx_lm.utils, zmlx_autopatch
        print(list(mlx_lm.utils.load("m")), zmlx_autopatch.state()["wrapped"])
        print(zmlx_autopatch.state()["lacking"])
        """,
        before=(package.parent,),
    )
    assert result.out == (
        "['m'] []\n{'mlx_lm.utils.load': 'a generator or coroutine: its call returns no model', "
        "'mlx_lm.utils.sharded_load': 'not there'}\n"
    )


def test_a_result_of_another_shape_is_returned_as_it_is(python, tmp_path):  # 41
    package = tmp_path / "changed" / "mlx_lm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "utils.py").write_text("def load(path):\n    return None\n")
    result = python("import mlx_lm.utils as u; print(u.load('m'))", before=(package.parent,))
    assert result.out == "None\n"
    assert result.err.startswith("zmlx: the model stays as it was loaded: TypeError: 'NoneType'")


def test_a_method_can_be_a_boundary(python, tmp_path):
    """Other loaders keep the model on an object: one entry in the table."""
    (tmp_path / "builders.py").write_text(
        "class Builder:\n    def __init__(self):\n        self.model = ['m']\n"
        "    def build(self, *, fast):\n        return 'engine'\n"
    )
    result = python(
        """
        from zmlx_autopatch import boundaries
        boundaries.BOUNDARIES.append(
            boundaries.Boundary("builders", "Builder.build", lambda result, builder: builder.model))
        import builders, zmlx_autopatch
        zmlx_autopatch.install()
        builder = builders.Builder()
        print(builder.build(fast=True), builder.model)
        zmlx_autopatch.uninstall()
        print(type(builders.Builder.build).__name__)
        """,
        hook=False,
        before=(tmp_path,),
    )
    assert result.out.splitlines()[0] == "engine ['m', 'marked']", result.err
    assert result.err == "zmlx: marked by builders.Builder.build\n"


def test_strict_raises_when_nothing_is_replaced(python):  # 55
    body = """
        import mlx_lm
        try:
            print(mlx_lm.load("plain")[0])
        except RuntimeError as error:
            print(type(error).__name__, error)
        """
    line = "zmlx: plain stays"
    assert python(body).err == line + "\n"
    assert python(body, ZMLX_STRICT="1").out == f"NotPatched {line}\n"


def test_after_uninstall_a_loader_held_elsewhere_patches_nothing(python):
    result = python(
        """
        import mlx_lm, zmlx_autopatch
        held = [mlx_lm.load]
        zmlx_autopatch.uninstall()
        print(held[0]("m")[0])
        """
    )
    assert (result.out, result.err) == ("['m']\n", "")


def test_turned_off_while_it_runs(python):
    result = python(
        """
        import mlx_lm, os
        os.environ["ZMLX_AUTOPATCH"] = "0"
        print(mlx_lm.load("m")[0])
        """
    )
    assert (result.out, result.err) == ("['m']\n", "")
