"""`zmlx run`: what it starts, and how. Numbers are those of the case list."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from zmlx_autopatch.launch import environment
from zmlx_autopatch.launch.resolve import startup_is_disabled

ROOT = Path(__file__).parents[2]
FAKES = Path(__file__).with_name("fakes")


def script(path, text, *, executable=True):
    path.write_text(text)
    if executable:
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_module_is_run_and_patched(zmlx_run):  # 47c
    result = zmlx_run("mlx_lm.generate", "a")
    # The stand-in has no model that real zmlx knows; its line proves that the hook fired.
    assert result.out == "answer of ['a']\n"
    assert "zmlx: " in result.err


def test_python_file_and_its_arguments(zmlx_run, tmp_path):  # 46, 47a, 48
    file = script(tmp_path / "probe.py", PROBE, executable=False)
    native = subprocess.run(
        [sys.executable, str(file), "--profile", "x", "--", "-q"], capture_output=True, text=True
    )
    ours = zmlx_run(str(file), "--profile", "x", "--", "-q")
    assert (ours.code, ours.out) == (native.returncode, native.stdout)


PROBE = """\
import sys
print(sys.argv, sys.path[0], __name__, __spec__)
print(sorted(m for m in sys.modules if m in ("argparse", "click", "mlx", "mlx_lm", "zmlx")))
"""


def test_python_as_given(zmlx_run, tmp_path):  # 47d
    file = script(tmp_path / "probe.py", PROBE, executable=False)
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    native = subprocess.run([sys.executable, str(file), "a"], capture_output=True, text=True)
    ours = zmlx_run("python", str(file), "a", PATH=path)
    assert ours.out == native.stdout


def test_options_stop_at_the_command(zmlx_run):  # 48
    result = zmlx_run("--quiet", "--", "sh", "-c", 'echo "$ZMLX_LOG $1"', "sh", "--strict")
    assert result.out == "off --strict\n"


def test_options_become_variables(zmlx_run):
    result = zmlx_run(
        "--profile", "fast", "--strict", "sh", "-c", "echo $ZMLX_PROFILE $ZMLX_STRICT"
    )
    assert result.out == "fast 1\n"


def test_an_unknown_profile_fails_before_anything_starts(zmlx_run):
    result = zmlx_run("--profile", "nope", "sh", "-c", "echo started")
    assert (result.code, result.out) == (2, "")
    assert "known: stable, fast, edge" in result.err


def test_nested_runs_keep_one_entry_and_the_inner_profile_wins(zmlx_run, tmp_path):  # 24
    inner = (
        f"{sys.executable} -m zmlx run --profile edge sh -c 'echo $ZMLX_PROFILE; echo $PYTHONPATH'"
    )
    result = zmlx_run("--profile", "fast", "sh", "-c", inner)
    profile, path = result.out.splitlines()
    assert profile == "edge"
    entries = path.split(os.pathsep)
    assert sum(entry.endswith("sitecustomize") for entry in entries) == 1


@pytest.mark.parametrize("code", [0, 4, 255])
def test_exit_codes(zmlx_run, code):  # 46
    assert zmlx_run("sh", "-c", f"exit {code}").code == code


def test_death_by_signal(zmlx_run):  # 46
    assert zmlx_run("sh", "-c", "kill -9 $$").code == -signal.SIGKILL


def test_nothing_of_that_name(zmlx_run):  # 47
    result = zmlx_run("no_such_command_at_all", "x")
    assert (result.code, result.out) == (127, "")
    assert result.err.startswith("zmlx run: no_such_command_at_all: not a file")
    assert len(result.err.splitlines()) == 1
    assert zmlx_run("./nothing.py").code == 127


def test_a_file_that_is_not_executable(zmlx_run, tmp_path):  # 49
    file = script(tmp_path / "tool", "print(1)\n", executable=False)
    result = zmlx_run(str(file))
    assert result.code == 126
    assert f"did you mean `zmlx run python {file}`?" in result.err


def test_a_program_on_path(zmlx_run, tmp_path):  # 47e
    tools = tmp_path / "tools"
    tools.mkdir()
    script(tools / "mytool", "#!/bin/sh\necho mytool $1\n")
    result = zmlx_run("mytool", "a", PATH=f"{tools}{os.pathsep}{os.environ['PATH']}")
    assert (result.code, result.out) == (0, "mytool a\n")


def test_a_console_script_beside_the_interpreter_goes_before_the_module(
    monkeypatch, tmp_path
):  # 47b
    from zmlx_autopatch.launch import resolve

    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    monkeypatch.setattr(sys, "executable", str(bin_folder / "python3"))
    tool = script(bin_folder / "mlx_lm.generate", "#!/somewhere/else/python3\nprint('script')\n")
    assert resolve.resolve("mlx_lm.generate", ["a"]) == [sys.executable, str(tool), "a"]
    script(tool, "#!/bin/sh\n'''exec' '/a long/path/python3' \"$0\" \"$@\"\n' '''\n")
    assert resolve.resolve("mlx_lm.generate", [])[0] == sys.executable
    script(tool, "#!/bin/sh\necho a shell script\n")
    assert resolve.resolve("mlx_lm.generate", []) == [str(tool)]


def test_neither_launcher_nor_hook_imports_mlx_lm(zmlx_run):  # 44, facts 2
    """Importing mlx-lm lowers the limit of open files for good."""
    probe = "import resource; print(resource.getrlimit(resource.RLIMIT_NOFILE))"
    native = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True).stdout
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    assert zmlx_run("python", "-c", probe, PATH=path).out == native


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        (["-I", "x.py"], "-I"),
        (["-uS", "x.py"], "-S"),
        (["-W", "ignore", "-E", "x.py"], "-E"),
        (["-WI", "x.py"], None),
        (["-X", "importtime", "x.py", "-I"], None),
        (["-m", "mod", "-S"], None),
        (["-c", "print()", "-E"], None),
        (["-P", "-s", "x.py"], None),
        (["--check-hash-based-pycs", "x.py"], None),
        ([], None),
    ],
)
def test_flags_that_disable_start_up_files_are_noticed(arguments, flag):  # 10
    assert startup_is_disabled(["/usr/bin/python3", *arguments]) == flag
    assert startup_is_disabled(["/usr/bin/tool", *arguments]) is None


def test_one_line_about_such_a_flag(zmlx_run):
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    result = zmlx_run("python", "-I", "-c", "print(1)", PATH=path)
    assert (result.code, result.out) == (0, "1\n")
    assert result.err == (
        "zmlx: python -I runs without start-up files: models stay as they are loaded\n"
    )


def test_ranks_of_mlx_launch_get_our_variables():
    from zmlx_autopatch.launch.command import _with_ranks

    variables = {"PYTHONPATH": "/site", "ZMLX_PROFILE": "fast", "HOME": "/x"}
    assert _with_ranks("mlx.launch", ["-n", "2", "s.py"], variables) == [
        *("--env", "PYTHONPATH=/site", "--env", "ZMLX_PROFILE=fast"),
        *("-n", "2", "s.py"),
    ]
    assert _with_ranks("mlx_lm.server", ["-n"], variables) == ["-n"]


SITE = environment.site_folder()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, SITE),
        ("", SITE),
        ("/a:/b", f"{SITE}:/a:/b"),
        (SITE, SITE),
        (f"{SITE}/", SITE),
        (f"/a:{SITE}:/b", f"{SITE}:/a:/b"),
        (f"{SITE}:{SITE}", SITE),
        ("/a:", f"{SITE}:/a:"),  # an empty entry is the current folder
        (f"/pre{SITE}:/a", f"{SITE}:/pre{SITE}:/a"),  # not the end of another entry
        ("rel", f"{SITE}:rel"),
    ],
)
def test_pythonpath_is_a_list(before, after):  # 17, 18
    assert environment.python_path(before) == after


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, "glibc.malloc.hugetlb=1"),
        ("", "glibc.malloc.hugetlb=1"),
        ("glibc.malloc.check=3", "glibc.malloc.check=3:glibc.malloc.hugetlb=1"),
        ("glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),  # the user has decided
        ("a=1:glibc.malloc.hugetlb=2:b=1", "a=1:glibc.malloc.hugetlb=2:b=1"),
        ("glibc.malloc.hugetlb_x=0", "glibc.malloc.hugetlb_x=0:glibc.malloc.hugetlb=1"),
    ],
)
def test_large_pages_are_asked_for_unless_the_user_has_decided(before, after):
    assert environment.tunables(before) == after


@pytest.mark.parametrize(("switch", "asked"), [(None, True), ("1", True), ("0", False)])
def test_large_pages_are_asked_for_where_glibc_is(monkeypatch, switch, asked):
    given = {} if switch is None else {"ZMLX_AUTOPATCH": switch}
    options = {"profile": None, "quiet": False, "strict": False}
    monkeypatch.setattr(sys, "platform", "linux")
    changed = environment.command_environment(given, **options)
    assert ("GLIBC_TUNABLES" in changed) == asked
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "GLIBC_TUNABLES" not in environment.command_environment(given, **options)


def test_a_missing_start_up_file_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "_SITES", (tmp_path / "_site",))
    with pytest.raises(FileNotFoundError, match="not installed whole"):
        environment.site_folder()


def test_a_termination_signal_reaches_the_command(tmp_path):  # 46: no orphan
    root = environment._PACKAGE.parent
    ready = tmp_path / "ready"
    body = (
        "import os, signal, sys, time\n"
        f"open({str(ready)!r}, 'w').write(str(os.getpid()))\n"
        "time.sleep(30)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "zmlx", "run", sys.executable, "-c", body], cwd=root
    )
    try:
        for _ in range(200):
            if ready.exists() and ready.read_text():
                break
            time.sleep(0.05)
        assert int(ready.read_text()) == process.pid  # it became the command
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == -signal.SIGTERM
    finally:
        process.kill()


PARITY = """\
import os, signal, sys
print(sys.argv, sys.flags, sys.warnoptions, sys.stdin.isatty(), __name__, __file__)
print([entry for entry in sys.path if os.path.basename(entry) != "sitecustomize"])
print(sorted(m for m in sys.modules if not m.startswith(("zmlx_autopatch", "sitecustomize"))))
print(sorted(set(os.environ) - {"PYTHONPATH", "GLIBC_TUNABLES"}), os.getcwd(), os.umask(0))
print([signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)])
print([f for f in map(type, sys.meta_path) if f.__module__ != "zmlx_autopatch.hook"])
print(sys.excepthook, sys.getrecursionlimit(), sys.path_hooks[0])
"""


@pytest.mark.parametrize("flags", [(), ("-O", "-W", "ignore"), ("-u", "-X", "utf8")])
def test_a_program_sees_what_it_sees_without_us(zmlx_run, tmp_path, flags):  # 48, 52
    file = script(tmp_path / "probe.py", PARITY, executable=False)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ZMLX_")}
    # What the launcher of these tests puts on the path.
    environment["PYTHONPATH"] = os.pathsep.join([str(FAKES), str(ROOT)])
    command = [sys.executable, *flags, str(file), "a b", "--strict"]
    native = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=60
    )
    ours = zmlx_run(*command)
    assert (ours.code, ours.err) == (0, native.stderr)
    # The one module of the standard library that ours import.
    assert ours.out.replace("'__future__', ", "") == native.stdout.replace("'__future__', ", "")


def test_names_with_a_dot_are_modules_before_programs_and_others_after(tmp_path, monkeypatch):
    """`zmlx run code` is an editor for most people, and a module of the standard library."""  # 47
    from zmlx_autopatch.launch.resolve import resolve

    for name in ("code", "json.tool"):
        script(tmp_path / name, "#!/bin/sh\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert resolve("code", ["a"]) == [str(tmp_path / "code"), "a"]
    assert resolve("json.tool", ["a"]) == [sys.executable, "-m", "json.tool", "a"]
    monkeypatch.setenv("PATH", "")
    assert resolve("code", ["a"]) == [sys.executable, "-m", "code", "a"]


def test_modules_are_found_without_importing_their_parents(tmp_path, monkeypatch):
    from zmlx_autopatch.launch.resolve import NotFound, resolve

    package = tmp_path / "costly"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (package / "tool.py").write_text("")
    monkeypatch.chdir(tmp_path)
    assert resolve("costly.tool", [])[1:] == ["-m", "costly.tool"]
    for name in ("costly", "costly.none", "costly.tool.more", "no-name.x"):
        with pytest.raises(NotFound):
            resolve(name, [])


def test_an_interrupt_ends_the_command_as_it_would_without_us(tmp_path):  # 51
    """Ctrl-C reaches the program alone; no line of the traceback is ours."""
    # A background job of a shell inherits an ignored SIGINT.
    body = (
        "import os, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "os.kill(os.getpid(), signal.SIGINT)"
    )
    command = [sys.executable, "-c", body]
    reachable = {**os.environ, "PYTHONPATH": str(ROOT)}
    native, ours = (
        subprocess.run([*prefix, *command], capture_output=True, text=True, env=reachable)
        for prefix in ([], [sys.executable, "-m", "zmlx", "run"])
    )
    assert (ours.returncode, ours.stderr) == (native.returncode, native.stderr)
    assert native.returncode == -signal.SIGINT


def test_what_the_system_cannot_start(zmlx_run, tmp_path):  # 49
    file = script(tmp_path / "tool", "no first line\n")
    result = zmlx_run(str(file))
    assert (result.code, result.err) == (126, f"zmlx run: {file}: Exec format error\n")


def test_usage(zmlx_run):
    assert zmlx_run().code == 2
    assert zmlx_run("--no-such-option", "x").code == 2


def test_a_deleted_current_folder(zmlx_run):
    gone = "mkdir gone; cd gone; rmdir ../gone; exec"
    inner = f"{sys.executable} -c 'from zmlx.cli import main; main()' run sh -c 'echo started'"
    result = zmlx_run("sh", "-c", f"{gone} {inner}")
    assert (result.code, result.out.splitlines()[-1:]) == (0, ["started"])
    result = zmlx_run("sh", "-c", f"{gone} {inner.replace('sh -c', 'no.such.thing')}")
    assert result.code == 127


def test_a_checkout_that_is_not_installed_is_pointed_out(monkeypatch, capsys, tmp_path):  # 55
    """`python -m zmlx` works there, and what it starts finds no zmlx: silence would mislead."""
    from zmlx_autopatch.launch import command, resolve

    (tmp_path / "only_here.py").write_text("")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert resolve.is_installed("click")
    assert not resolve.is_installed("only_here")
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    assert resolve.is_installed("only_here")

    monkeypatch.setattr(command, "is_installed", lambda package: False)
    command._warn(["/bin/echo"])
    assert capsys.readouterr().err == (
        "zmlx: zmlx is in the current folder, but not installed: models stay as they are loaded\n"
    )


def test_what_was_written_is_flushed_before_the_command_takes_over(monkeypatch):  # 50
    import io

    from zmlx_autopatch.launch import command

    class Stream(io.StringIO):
        flushed = False

        def flush(self):
            self.flushed = True

    streams = Stream(), Stream()
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    seen = []
    monkeypatch.setattr(os, "execve", lambda *call: seen.append([s.flushed for s in streams]))
    command._become(["/bin/echo"], {})
    assert seen == [[True, True]]
