"""The line on which a key of a TOML file stands."""

from __future__ import annotations

import pytest

from zmlx.toml import TomlError, key_lines, parse, read

TEXT = '''\
# [not.a.table]
first = 1 # second = 2

[ table . "quoted.key" ] # comment
list = [
  "a = 1", # ]
  ["inner = 2"],
]
text = """
inside = 1
[inside]
"""
literal = \'\'\'
also = 2\'\'\'
"key with = sign" = { inline = 1, other = [2] }
dotted . deep.er = true
'single' = "\\"]"
[[rows]]
name = 1
[[rows]]
name = 2
'''

EXPECTED = {
    ("first",): 2,
    ("table",): 4,
    ("table", "quoted.key"): 4,
    ("table", "quoted.key", "list"): 5,
    ("table", "quoted.key", "text"): 9,
    ("table", "quoted.key", "literal"): 13,
    ("table", "quoted.key", "key with = sign"): 15,
    ("table", "quoted.key", "dotted"): 16,
    ("table", "quoted.key", "dotted", "deep"): 16,
    ("table", "quoted.key", "dotted", "deep", "er"): 16,
    ("table", "quoted.key", "single"): 17,
    ("rows",): 18,
    ("rows", "name"): 19,
}


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_every_key_has_its_line_and_nothing_else_has_one(newline):
    assert key_lines(TEXT.replace("\n", newline)) == EXPECTED


def test_what_has_no_line_of_its_own_is_at_the_table_above():
    source = parse(TEXT, "some.toml")
    key = ("table", "quoted.key", "key with = sign", "inline")
    assert source.at(*key) == "some.toml:15"
    assert source.at("nowhere") == "some.toml"
    assert str(source.error(key, "is wrong")) == f"some.toml:15: {'.'.join(key)}: is wrong"


def test_errors_are_of_the_class_that_was_asked_for(tmp_path):
    class Wrong(TomlError):
        pass

    missing = tmp_path / "missing.toml"
    with pytest.raises(Wrong, match=r"missing\.toml: cannot be read: No such file"):
        read(missing, wrong=Wrong)
    with pytest.raises(Wrong, match=r"label: is not TOML: .*line 1"):
        parse("a b", "label", Wrong)
    assert isinstance(parse("a = 1", "label", Wrong).error(("a",), ""), Wrong)
