"""The start-up file: chaining, and what it must never do. Numbers are those of the case list."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

from zmlx_autopatch.launch.environment import site_folder

SITE = Path(site_folder())
MARKED = "zmlx: marked by mlx_lm.utils.load\n"
LOAD = "import mlx_lm; print(mlx_lm.load('m')[0])"


def test_a_model_is_patched_and_one_line_says_so(python):
    result = python(LOAD)
    assert (result.code, result.out, result.err) == (0, "['m', 'marked']\n", MARKED)


def test_without_a_model_nothing_is_imported_or_said(python):  # 15, 25
    result = python(
        """
        import sys
        heavy = {"mlx", "mlx_lm", "zmlx", "wrapt", "click", "tomllib", "logging", "inspect",
                 "dataclasses", "json", "importlib.metadata"}
        print(sorted(heavy & set(sys.modules)))
        """
    )
    assert (result.code, result.out, result.err) == (0, "[]\n", "")


def test_the_users_own_file_runs_first_and_is_the_one_that_is_imported(python, tmp_path):  # 1, 6
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "sitecustomize.py").write_text(
        "import sys\nVALUE = 7\nassert 'zmlx_autopatch' not in sys.modules\n"
        "sys.path.append('/added/by/them')\n"
    )
    result = python(
        "import sitecustomize, sys; print(sitecustomize.VALUE, '/added/by/them' in sys.path);"
        + LOAD,
        before=(theirs,),
    )
    assert (result.code, result.err) == (0, MARKED)
    assert result.out == "7 True\n['m', 'marked']\n"


@pytest.mark.parametrize(
    "text",
    [
        "import a_dependency_that_is_missing",
        "raise ValueError('wrong')",
        "def (",
        "raise ImportError('this one is swallowed', name='sitecustomize')",
    ],
)
def test_a_broken_file_of_the_users_looks_broken(python, tmp_path, text):  # 2
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "sitecustomize.py").write_text(text + "\n")
    native = python("print('ran')", before=(theirs,), hook=False)
    assert ("Error in sitecustomize" in native.err) == ("swallowed" not in text)
    result = python(LOAD, before=(theirs,))
    assert (result.code, result.out) == (0, "['m', 'marked']\n")
    assert result.err == native.err + MARKED


def test_system_exit_of_the_users_file_propagates(python, tmp_path):  # 3
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "sitecustomize.py").write_text("raise SystemExit(9)\n")
    result = python(LOAD, before=(theirs,))
    native = python(LOAD, before=(theirs,), hook=False)
    assert (result.code, result.out) == (native.code, native.out)
    assert result.code != 0


def test_a_folder_of_that_name_is_no_file(python, tmp_path):  # 4
    (tmp_path / "theirs" / "sitecustomize").mkdir(parents=True)
    result = python(LOAD, before=(tmp_path / "theirs",))
    assert (result.code, result.err) == (0, MARKED)


def test_warnings_as_errors(python, tmp_path):  # 5
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "sitecustomize.py").write_text("VALUE = 1\n")
    result = python(LOAD, flags=("-W", "error"), before=(theirs,))
    assert (result.code, result.err) == (0, MARKED)


def test_our_folder_stays_on_the_path_for_children(python):
    result = python("import sys; print(sum('sitecustomize' in entry for entry in sys.path))")
    assert result.out == "1\n"


@pytest.mark.parametrize("flag", ["-S", "-I", "-E"])
def test_flags_that_turn_start_up_files_off_are_respected(python, flag):  # 10
    result = python("import sys; print('zmlx_autopatch' in sys.modules)", flags=(flag,))
    assert (result.code, result.out, result.err) == (0, "False\n", "")


@pytest.mark.parametrize("flag", ["-s", *(["-P"] if sys.version_info >= (3, 11) else [])])
def test_flags_that_do_not_turn_them_off(python, flag):  # 10
    assert python(LOAD, flags=(flag,)).err == MARKED


def test_autopatch_off_hooks_nothing(python):
    result = python(LOAD, ZMLX_AUTOPATCH="0")
    assert (result.code, result.out, result.err) == (0, "['m']\n", "")


def test_a_foreign_interpreter_without_zmlx_is_left_alone(python):  # 19
    result = python("print('ran')", PYTHONPATH=str(python.packages.parents[0] / "nothing"))
    assert result.out == "ran\n"
    result = python("print('ran')", PYTHONPATH=str(SITE))
    assert (result.code, result.out, result.err) == (0, "ran\n", "")


def test_a_bootstrap_that_fails_lets_the_interpreter_start_and_spares_the_children(python):  # 20
    result = python(
        """
        import os, subprocess, sys
        print("started", os.environ["ZMLX_AUTOPATCH"])
        sys.stdout.flush()
        subprocess.run([sys.executable, "-c", "print('child')"], check=True)
        """,
        ZMLX_AUTOPATCH="maybe",
    )
    assert (result.code, result.out) == (0, "started 0\nchild\n")
    assert result.err == (
        "zmlx: models stay as they are loaded: ZMLX_AUTOPATCH='maybe': expected 0 or 1\n"
    )


def test_the_file_parses_on_old_pythons():  # 11
    source = (SITE / "sitecustomize.py").read_text()
    ast.parse(source, feature_version=(3, 4))
    assert not re.search(r"\bf[\"']", source)  # no literal that Python 2 lacks
    assert not (SITE / "__init__.py").exists()  # packaging rule


def test_a_package_of_another_version_lets_the_interpreter_start(python, tmp_path):  # 12
    """Version skew: the package on the path may be another one than the start-up file's."""
    other = tmp_path / "other"
    (other / "zmlx_autopatch").mkdir(parents=True)
    (other / "zmlx_autopatch" / "__init__.py").write_text("")  # has no bootstrap
    result = python("print('ran')", before=(other,))
    assert (result.code, result.out) == (0, "ran\n")
    assert "models stay as they are loaded: cannot import name 'bootstrap'" in result.err


def test_stderr_closed(python):  # 53
    result = python(LOAD, close="2>&-")
    assert (result.code, result.out) == (0, "['m', 'marked']\n")


def test_stdout_is_never_written(python):
    result = python("import mlx_lm; mlx_lm.load('m'); mlx_lm.load('broken')")
    assert result.out == ""
    assert "detection broke" in result.err


@pytest.mark.parametrize("close", ["1>&-", "1>&- 2>&-", "0<&- 1>&- 2>&-"])
def test_other_descriptors_closed(python, tmp_path, close):  # 23, 53
    """A stream that is not there must not turn the text to another one, nor fail the load."""
    body = LOAD.split(";")[0] + "; model = mlx_lm.load('m')[0]; open('done', 'w').write(str(model))"
    result = python(body, close=close)
    assert (result.code, result.out) == (0, "")
    assert (tmp_path / "done").read_text() == "['m', 'marked']"


def test_nobody_reads_stderr(python):  # 53
    result = python(
        """
        import os, subprocess, sys
        read, write = os.pipe()
        os.close(read)
        code = "import mlx_lm; print(mlx_lm.load('m')[0])"
        run = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=write)
        print(run.returncode, run.stdout.decode(), end="")
        """,
        PYTHONUNBUFFERED=None,  # which would leave nothing in buffers
    )
    assert result.out == "0 ['m', 'marked']\n"


def test_the_start_loads_only_what_is_ours(python):  # 15
    body = "import sys; print(*sorted(sys.modules))"
    native, hooked = (set(python(body, hook=hook).out.split()) for hook in (False, True))
    ours = {"boundaries", "hook", "record", "speech", "variables"}
    # With an editable installation the folder itself is a namespace package of that name.
    assert "sitecustomize" in hooked
    assert hooked - native - {"sitecustomize"} == {
        *("__future__", "zmlx_autopatch"),
        *(f"zmlx_autopatch.{name}" for name in ours),
    }


def test_no_process_is_started_at_the_start(python, tmp_path):  # 16
    """One that started another would start one more there, and so on."""
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "sitecustomize.py").write_text(
        "import sys\nsys.started = []\n"
        "names = ('subprocess.Popen', 'os.fork', 'os.forkpty', 'os.posix_spawn', 'os.system')\n"
        "sys.addaudithook(lambda name, args: name in names and sys.started.append(name))\n"
    )
    body = "import sys, zmlx_autopatch; print(sys.started, zmlx_autopatch.state()['installed'])"
    assert python(body, before=(theirs,)).out == "[] True\n"


def test_a_package_that_cannot_be_imported_lets_the_interpreter_start(python, tmp_path):  # 20
    broken = tmp_path / "broken"
    (broken / "zmlx_autopatch").mkdir(parents=True)
    (broken / "zmlx_autopatch" / "__init__.py").write_text("from . import gone\n")
    body = """
        import subprocess, sys
        subprocess.run([sys.executable, "-c", "print('child')"], check=True)
        """
    result = python(body, before=(broken,))
    assert (result.code, result.out) == (0, "child\n")
    assert result.err.startswith("zmlx: models stay as they are loaded: cannot import name 'gone'")
    assert len(result.err.splitlines()) == 1  # none from the child
    assert python(body, before=(broken,), ZMLX_LOG="off").err == ""


def test_the_call_takes_no_arguments():  # 12
    """The start-up file and the package may be of two versions."""
    import inspect

    import zmlx_autopatch

    assert not inspect.signature(zmlx_autopatch.bootstrap).parameters


def test_an_emptied_environment_is_not_hooked(python):  # 21
    result = python(
        """
        import subprocess, sys
        code = "import sys; print([m for m in sys.modules if 'zmlx' in m])"
        print(subprocess.run([sys.executable, "-c", code], env={}, capture_output=True, text=True))
        """
    )
    assert "stdout='[]\\n', stderr=''" in result.out


def test_a_deleted_current_folder(python):
    result = python(
        """
        import os, subprocess, sys
        os.mkdir("gone"); os.chdir("gone"); os.rmdir("../gone")
        code = "import zmlx_autopatch; print(zmlx_autopatch.state()['installed'])"
        subprocess.run([sys.executable, "-c", code], check=True)
        """
    )
    assert (result.code, result.out, result.err) == (0, "True\n", "")


def test_spawned_children_are_hooked(python):  # 14
    result = python(
        """
        import multiprocessing, subprocess, sys

        def work(path):
            import mlx_lm
            return list(mlx_lm.load(path)[0])

        if __name__ == "__main__":
            for method in ("spawn", "forkserver"):
                with multiprocessing.get_context(method).Pool(1) as pool:
                    print(method, pool.apply(work, ["m"]))
            code = "import mlx_lm; print(list(mlx_lm.load('m')[0]))"
            run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
            print("subprocess", run.stdout.strip())
        """
    )
    marked = "['m', 'marked']"
    assert result.out == f"spawn {marked}\nforkserver {marked}\nsubprocess {marked}\n"
