"""Which profile is in force, what it says, and where each value came from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from zmlx.patch.names import PATTERN_NAMES
from zmlx.profile import ProfileError, available_profiles, resolve, resolve_policy
from zmlx.profile.command import profile
from zmlx.profile.resolve import ALIASES, BUILTIN_NAMES
from zmlx.profile.schema import check

ROOT = Path(__file__).parents[2]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Return a home folder that is also the current one, with no configuration and no variables."""
    for name in ("ZMLX_PROFILE", "XDG_CONFIG_HOME", *ALIASES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def user_file(home: Path, text: str) -> Path:
    file = home / ".config" / "zmlx" / "zmlx.toml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def project_file(home: Path, text: str, name: str = "zmlx.toml") -> Path:
    file = home / "work" / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    return file


DEFINED = "".join(f'[profiles.{name}]\nextends = "stable"\n' for name in "ABCD")


@pytest.mark.parametrize("argument", [None, "A"])
@pytest.mark.parametrize("variable", [None, "", "  ", "B"])
@pytest.mark.parametrize("project", [None, "C"])
@pytest.mark.parametrize("user", [None, "D"])
def test_precedence(home, monkeypatch, argument, variable, project, user):
    chosen = f'profile = "{user}"\n' if user else ""
    own = user_file(home, chosen + DEFINED)
    theirs = project_file(home, f'profile = "{project}"\n' if project else "")
    if variable is not None:
        monkeypatch.setenv("ZMLX_PROFILE", variable)
    asked = (variable or "").strip()
    policy = resolve_policy(argument, start=theirs.parent)
    expected = [
        (argument, "the caller"),
        (asked, "ZMLX_PROFILE"),
        (project, f"{theirs}:1"),
        (user, f"{own}:1"),
        ("stable", "the default"),
    ]
    name, source = next(pair for pair in expected if pair[0])
    assert (policy.name, policy.sources["profile"]) == (name, source)


@pytest.mark.parametrize("name", BUILTIN_NAMES)
def test_builtin_files_name_what_there_is(name):
    check(resolve._builtin(name))


def test_builtin_profiles(home):
    stable, fast, edge = map(resolve_policy, ("stable", "fast", "edge"))
    assert stable.admits == {"exact", "tighter"}
    assert fast.admits == edge.admits == {"exact", "tighter", "tolerant"}
    assert (stable.custom_primitives, fast.custom_primitives) == (False, True)
    assert (stable.extends, fast.extends, edge.extends) == ((), ("stable",), ("fast", "stable"))
    assert fast.sources["admits"].startswith("builtin fast.toml:")


def test_what_is_allowed_and_why(home):
    stable = resolve_policy("stable")
    allowed, why = stable.allows("moe_mlp", "tighter", "qwen")
    assert allowed
    assert why == "profile stable admits tighter replacements (builtin stable.toml:3)"
    allowed, why = stable.allows("moe_mlp", "tolerant", "qwen")
    assert not allowed
    assert why == "profile stable does not admit tolerant replacements (builtin stable.toml:3)"
    assert resolve_policy("fast").allows("moe_mlp", "tolerant", "qwen")[0]


def test_a_chain_merges_key_by_key_and_says_from_where(home):
    file = project_file(
        home,
        """\
[profiles.base]
extends = "fast"
exclude = ["geglu_mlp"]
[profiles.base.options.moe_mlp]
max_tokens = 8
fused_swiglu = true

[profiles.mine]
extends = "base"
options.moe_mlp.max_tokens = 4
""",
    )
    policy = resolve_policy("mine", start=file.parent)
    assert policy.extends == ("base", "fast", "stable")
    of_fast = {"activation_bits": 8}
    assert policy.options("moe_mlp", "llama") == {**of_fast, "max_tokens": 4, "fused_swiglu": True}
    assert policy.options("swiglu_mlp", "llama") == of_fast
    assert policy.options("decode_step", "llama") == {}
    assert policy.sources["options.moe_mlp.max_tokens"] == f"{file}:10"
    assert policy.sources["options.moe_mlp.fused_swiglu"] == f"{file}:6"
    assert policy.sources["exclude"] == f"{file}:3"
    assert policy.sources["admits"] == "builtin fast.toml:4"
    refused = policy.allows("geglu_mlp", "exact", "llama")
    assert refused == (False, f"profile mine excludes geglu_mlp ({file}:3)")


def test_a_profile_that_extends_nothing_extends_stable(home):
    file = project_file(home, '[profiles.mine]\nexclude = ["moe_mlp"]\n')
    policy = resolve_policy("mine", start=file.parent)
    assert policy.extends == ("stable",)
    assert policy.allows("swiglu_mlp", "tighter", "llama")[0]


def test_include_restricts_and_an_empty_one_lifts_the_restriction(home):
    file = project_file(
        home,
        '[profiles.few]\ninclude = ["moe_mlp"]\n[profiles.all]\nextends = "few"\ninclude = []\n',
    )
    few = resolve_policy("few", start=file.parent)
    assert few.allows("moe_mlp", "exact", "qwen")[0]
    refused = few.allows("swiglu_mlp", "exact", "qwen")
    assert refused == (False, f"profile few does not include swiglu_mlp ({file}:2)")
    assert resolve_policy("all", start=file.parent).allows("swiglu_mlp", "exact", "qwen")[0]


def test_a_family_differs_where_the_profile_says_so(home):
    file = project_file(
        home,
        """\
[profiles.mine]
exclude = ["swiglu_mlp"]
options.moe_mlp.max_tokens = 8
[profiles.mine.family.qwen]
include = ["swiglu_mlp"]
options.moe_mlp.max_tokens = 2
[profiles.mine.family.lfm]
exclude = ["moe_mlp"]
[profiles.mine.family.glm]
include = ["moe_mlp"]
""",
    )
    policy = resolve_policy("mine", start=file.parent)
    assert policy.allows("swiglu_mlp", "exact", "qwen")[0]
    assert not policy.allows("swiglu_mlp", "exact", "llama")[0]
    refused = policy.allows("moe_mlp", "exact", "lfm")
    assert refused == (False, f"profile mine excludes moe_mlp for lfm ({file}:8)")
    assert not policy.allows("quantized_linear", "exact", "glm")[0]
    assert not policy.allows("moe_mlp", "tolerant", "glm")[0]
    assert policy.options("moe_mlp", "qwen") == {"max_tokens": 2}
    assert policy.options("moe_mlp", "lfm") == {"max_tokens": 8}
    assert policy.sources["family.qwen.options.moe_mlp.max_tokens"] == f"{file}:6"


@pytest.mark.parametrize("variable", ALIASES)
@pytest.mark.parametrize("value", ["0", "1"])
def test_the_qwen_variables_set_options_of_qwen_alone(home, monkeypatch, variable, value):
    opposite = "true" if value == "0" else "false"
    table = "[profiles.mine.family.qwen.options.moe_mlp]"
    file = project_file(home, f"{table}\n{ALIASES[variable]} = {opposite}\n")
    monkeypatch.setenv(variable, value)
    policy = resolve_policy("mine", start=file.parent)
    assert policy.options("moe_mlp", "qwen") == {ALIASES[variable]: value == "1"}
    assert policy.options("moe_mlp", "llama") == {}
    assert policy.sources[f"family.qwen.options.moe_mlp.{ALIASES[variable]}"] == variable


def test_an_empty_qwen_variable_says_nothing_and_a_wrong_one_is_an_error(home, monkeypatch):
    monkeypatch.setenv("ZMLX_QWEN_FUSED_SWIGLU", "")
    assert resolve_policy().options("moe_mlp", "qwen") == {}
    monkeypatch.setenv("ZMLX_QWEN_FUSED_SWIGLU", "yes")
    with pytest.raises(ProfileError, match="ZMLX_QWEN_FUSED_SWIGLU='yes': expected 0 or 1"):
        resolve_policy()


def test_aliases_are_options_of_the_pattern():
    from zmlx.patch.names import pattern_options

    assert {pattern_options()["moe_mlp"][option] for option in ALIASES.values()} == {bool}


def test_pyproject_defines_and_chooses(home):
    file = project_file(
        home,
        '[project]\nname = "x"\n[tool.zmlx]\nprofile = "mine"\n[tool.zmlx.profiles.mine]\n'
        'admits = ["exact"]\n',
        "pyproject.toml",
    )
    policy = resolve_policy(start=file.parent)
    assert (policy.name, policy.admits) == ("mine", {"exact"})
    assert policy.sources["profile"] == f"{file}:4"
    assert policy.sources["admits"] == f"{file}:6"


def test_zmlx_toml_wins_over_pyproject_beside_it(home):
    project_file(home, '[tool.zmlx]\nprofile = "edge"\n', "pyproject.toml")
    file = project_file(home, 'profile = "fast"\n')
    policy = resolve_policy(start=file.parent)
    assert policy.name == "fast"
    assert policy.notes == (f"{file} wins over [tool.zmlx] of the pyproject.toml beside it",)


def test_the_nearest_folder_decides(home):
    project_file(home, 'profile = "edge"\n')
    inner = home / "work" / "inner"
    deep = inner / "deep"
    deep.mkdir(parents=True)
    (inner / "pyproject.toml").write_text('[tool.zmlx]\nprofile = "fast"\n')
    (deep / "pyproject.toml").write_text('[tool.other]\nname = "zmlx is only mentioned"\n')
    assert resolve_policy(start=deep).name == "fast"
    assert resolve_policy(start=home / "work").name == "edge"


def test_nothing_above_home_is_read(home, monkeypatch):
    (home / "zmlx.toml").write_text('profile = "fast"\n')
    inner = home / "someone" / "work"
    inner.mkdir(parents=True)
    assert resolve_policy(start=inner).name == "fast"
    monkeypatch.setenv("HOME", str(home / "someone"))
    assert resolve_policy(start=inner).name == "stable"


def test_the_root_folder_is_no_endless_search(home):
    assert resolve_policy(start=Path("/")).name == "stable"


def test_a_deleted_current_folder_has_no_project(home, monkeypatch):
    gone = home / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert resolve_policy().name == "stable"


def test_the_user_file_follows_xdg(home, monkeypatch):
    elsewhere = home / "xdg"
    (elsewhere / "zmlx").mkdir(parents=True)
    (elsewhere / "zmlx" / "zmlx.toml").write_text('profile = "fast"\n')
    monkeypatch.setenv("XDG_CONFIG_HOME", str(elsewhere))
    assert resolve_policy().name == "fast"
    # The standard says that a relative one does not count.
    monkeypatch.setenv("XDG_CONFIG_HOME", "xdg")
    assert resolve_policy().name == "stable"


def test_a_project_may_extend_and_override_what_the_user_defines(home):
    user_file(home, '[profiles.base]\nadmits = ["exact"]\n[profiles.both]\nadmits = ["exact"]\n')
    file = project_file(
        home, '[profiles.mine]\nextends = "base"\n[profiles.both]\nadmits = ["tolerant"]\n'
    )
    assert resolve_policy("mine", start=file.parent).admits == {"exact"}
    assert resolve_policy("both", start=file.parent).admits == {"tolerant"}
    assert list(available_profiles(start=file.parent)) == [
        "stable", "fast", "edge", "base", "both", "mine"
    ]  # fmt: skip


PATTERNS = ", ".join(PATTERN_NAMES)

#: content of zmlx.toml -> the message after "FILE"
ERRORS = {
    "unknown top-level key": (
        'profil = "fast"\n',
        ":1: profil: unknown key; allowed: profile, profiles",
    ),
    "profile is no name": ("profile = 3\n", ":1: profile: expected a profile's name, found 3"),
    "profiles is no table": (
        "# a comment\nprofiles = true\n",
        ":2: profiles: expected tables [profiles.NAME], found True",
    ),
    "one profile is no table": ("[profiles]\nx = 1\n", ":2: profiles.x: expected a table"),
    "a builtin name": (
        "[profiles.fast]\n",
        ":1: profiles.fast: fast is builtin; give yours another name and extend it",
    ),
    "unknown key": (
        '\n[profiles.x]\nextend = "fast"\n',
        ":3: profiles.x.extend: unknown key; allowed: description, extends, admits, "
        "custom_primitives, include, exclude, options, family",
    ),
    "unknown contract in a list of several lines": (
        '[profiles.x]\nadmits = [\n  "exact", # = fine\n  "loose",\n]\n',
        ":2: profiles.x.admits: unknown contract 'loose'; allowed: exact, tighter, tolerant",
    ),
    "admits is no list": (
        '[profiles.x]\nadmits = "exact"\n',
        ":2: profiles.x.admits: expected a list of strings, found 'exact'",
    ),
    "a list of other things": (
        "[profiles.x]\ninclude = [1]\n",
        ":2: profiles.x.include: expected a list of strings, found [1]",
    ),
    "extends is a list": (
        '[profiles.x]\nextends = ["fast"]\n',
        ":2: profiles.x.extends: expected a string, found ['fast']",
    ),
    "not a truth value": (
        "[profiles.x]\ncustom_primitives = 1\n",
        ":2: profiles.x.custom_primitives: expected true or false, found 1",
    ),
    "unknown pattern, quoted keys": (
        '["profiles"."my.own"]\n"exclude" = ["moe"]\n',
        f":2: profiles.my.own.exclude: unknown pattern 'moe'; allowed: {PATTERNS}",
    ),
    "contradiction": (
        '[profiles.x]\ninclude = ["moe_mlp"]\nexclude = ["moe_mlp"]\n',
        ":3: profiles.x.exclude: 'moe_mlp' is also in include; keep one of them",
    ),
    "options of an unknown pattern, dotted key": (
        "[profiles]\nx.options.moe.max_tokens = 3\n",
        f":2: profiles.x.options.moe: unknown pattern 'moe'; allowed: {PATTERNS}",
    ),
    "options of a pattern are no table": (
        "[profiles.x]\noptions.moe_mlp = 3\n",
        ":2: profiles.x.options.moe_mlp: expected a table, found 3",
    ),
    "unknown option": (
        "[profiles.x.options.moe_mlp]\nmax_token = 3\n",
        ":2: profiles.x.options.moe_mlp.max_token: unknown key; allowed: max_tokens, "
        "activation_bits, fused_swiglu, router_argpartition_logits, "
        "router_argpartition_logits_topk",
    ),
    "a pattern without options": (
        "[profiles.x.options.linear]\nmax_tokens = 3\n",
        ":2: profiles.x.options.linear.max_tokens: unknown key; allowed: none",
    ),
    "an option of the wrong type": (
        "[profiles.x.options]\nmoe_mlp = { max_tokens = true }\n",
        ":2: profiles.x.options.moe_mlp.max_tokens: expected a whole number, found True",
    ),
    "unknown key of a family": (
        '[profiles.x.family.qwen]\nadmits = ["exact"]\n',
        ":2: profiles.x.family.qwen.admits: unknown key; allowed: include, exclude, options",
    ),
    "a family is no table": (
        "[profiles.x.family]\nqwen = 1\n",
        ":2: profiles.x.family.qwen: expected a table, found 1",
    ),
    "unknown pattern of a family": (
        '[profiles.x.family.qwen]\ninclude = ["moe"]\n',
        f":2: profiles.x.family.qwen.include: unknown pattern 'moe'; allowed: {PATTERNS}",
    ),
    "extends an unknown profile": (
        '[profiles.x]\nextends = "y"\n',
        ":2: profiles.x.extends: unknown profile 'y'; known: stable, fast, edge, x",
    ),
    "extends itself": (
        '[profiles.x]\nextends = "x"\n',
        ":2: profiles.x.extends: profiles extend each other in a circle: x -> x",
    ),
    "a circle": (
        '[profiles.x]\nextends = "y"\n[profiles.y]\nextends = "x"\n',
        ":4: profiles.y.extends: profiles extend each other in a circle: x -> y -> x",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_file_line_key_and_what_is_allowed(home, case):
    text, expected = ERRORS[case]
    file = project_file(home, text)
    with pytest.raises(ProfileError) as raised:
        resolve_policy("x", start=file.parent)
    assert str(raised.value) == f"{file}{expected}"


def test_an_unknown_family_is_an_error(home):
    file = project_file(home, '[profiles.x.family.quen]\nexclude = ["moe_mlp"]\n')
    with pytest.raises(ProfileError) as raised:
        resolve_policy("x", start=file.parent)
    said = f"{file}:1: profiles.x.family.quen: unknown family 'quen'; allowed: llama, mistral, "
    assert str(raised.value).startswith(said)


def test_a_syntax_error_keeps_the_parsers_line(home):
    file = project_file(home, 'profile = "fast"\nprofiles = [\n')
    with pytest.raises(ProfileError, match=r"zmlx\.toml: is not TOML: .*\(at end of document\)"):
        resolve_policy(start=file.parent)
    file.write_text('profile = "fast"\nprofiles ! 3\n')
    with pytest.raises(ProfileError, match=r"zmlx\.toml: is not TOML: .*\(at line 2, column 10\)"):
        resolve_policy(start=file.parent)


def test_bytes_that_are_no_text(home):
    file = project_file(home, "")
    file.write_bytes(b"profile = '\xff'\n")
    with pytest.raises(ProfileError, match=r"zmlx\.toml: is not UTF-8 text"):
        resolve_policy(start=file.parent)


def test_a_broken_user_file_is_an_error_even_if_the_project_decides(home):
    own = user_file(home, "[profiles.x]\nadmits = 3\n")
    file = project_file(home, 'profile = "fast"\n')
    with pytest.raises(ProfileError) as raised:
        resolve_policy(start=file.parent)
    assert str(raised.value).startswith(f"{own}:2: profiles.x.admits: expected a list of strings")


def test_a_broken_pyproject_that_does_not_mention_zmlx_is_not_our_business(home):
    file = project_file(home, "[project\n", "pyproject.toml")
    assert resolve_policy(start=file.parent).name == "stable"
    file.write_text("[project\nname = 'zmlx'\n")
    with pytest.raises(ProfileError, match=r"pyproject\.toml: is not TOML"):
        resolve_policy(start=file.parent)


def test_tool_zmlx_must_be_a_table(home):
    file = project_file(home, "[tool]\nzmlx = 1\n", "pyproject.toml")
    with pytest.raises(ProfileError) as raised:
        resolve_policy(start=file.parent)
    assert str(raised.value) == f"{file}:2: tool.zmlx: expected a table"


@pytest.mark.parametrize(
    ("argument", "variable", "who"), [("x", "", "the caller"), (None, "x", "ZMLX_PROFILE")]
)
def test_an_unknown_profile_lists_the_known_ones(home, monkeypatch, argument, variable, who):
    monkeypatch.setenv("ZMLX_PROFILE", variable)
    with pytest.raises(ProfileError) as raised:
        resolve_policy(argument)
    said = f"profile 'x' (asked for by {who}) does not exist; known: stable, fast, edge"
    assert str(raised.value) == said


def test_a_file_that_chooses_an_unknown_profile_is_named(home):
    file = project_file(home, '\nprofile = "x"\n')
    with pytest.raises(ProfileError, match=rf"asked for by {file}:2\) does not exist"):
        resolve_policy(start=file.parent)


def test_the_documented_example_means_what_it_says(home):
    page = (ROOT / "docs" / "PROFILES.md").read_text()
    file = project_file(home, page.partition("```toml\n")[2].partition("```")[0])
    policy = resolve_policy(start=file.parent)
    assert (policy.name, policy.extends) == ("ours", ("fast", "stable"))
    assert policy.admits == {"exact", "tighter"}
    assert not policy.allows("geglu_mlp", "exact", "llama")[0]
    assert policy.allows("geglu_mlp", "exact", "gemma")[0]
    assert not policy.allows("moe_mlp", "exact", "gemma")[0]
    assert not policy.allows("swiglu_mlp", "exact", "qwen")[0]
    assert policy.options("moe_mlp", "qwen") == {"activation_bits": 8, "max_tokens": 2}
    assert policy.options("moe_mlp", "llama") == {"activation_bits": 8, "max_tokens": 8}


def test_show_prints_each_value_and_its_source(home, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    file = project_file(home, 'profile = "mine"\n[profiles.mine]\noptions.moe_mlp.max_tokens = 4\n')
    monkeypatch.chdir(file.parent)
    shown = CliRunner().invoke(profile, ["show"])
    assert shown.exit_code == 0
    rows = {line.split()[1]: line for line in shown.stdout.splitlines() if line.startswith("│")}
    assert f"{file}:1" in rows["name"]
    assert "builtin stable.toml:3" in rows["admits"]
    assert "exact, tighter" in rows["admits"]
    assert f"{file}:3" in rows["options.moe_mlp.max_tokens"]


def test_show_as_json(home):
    data = json.loads(CliRunner().invoke(profile, ["show", "fast", "--json"]).stdout)
    assert data["name"] == "fast"
    assert data["admits"] == ["exact", "tighter", "tolerant"]
    assert data["sources"]["profile"] == "the caller"
    assert data["sources"]["custom_primitives"] == "builtin fast.toml:5"


def test_list_marks_the_profile_in_force(home, monkeypatch):
    monkeypatch.setenv("ZMLX_PROFILE", "fast")
    listed = CliRunner().invoke(profile, ["list"]).stdout.splitlines()
    starred = [line for line in listed if "│ * │" in line]
    assert len(starred) == 1
    assert "fast" in starred[0]


@pytest.mark.parametrize("command", [["show", "x"], ["show"], ["list"]])
def test_a_wrong_profile_is_one_line_and_exit_code_2(home, monkeypatch, command):
    monkeypatch.setenv("ZMLX_PROFILE", "y")
    result = CliRunner().invoke(profile, command)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert "does not exist; known: stable, fast, edge" in result.stderr


def test_resolving_loads_nothing_heavy(home):
    code = (
        "import sys, zmlx.profile; zmlx.profile.resolve_policy();"
        "heavy = {'mlx', 'numpy', 'rich', 'zmlx.patch', 'zmlx.family'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
