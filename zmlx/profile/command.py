"""`zmlx profile`: the release policy in force, and where each value of it came from."""

from __future__ import annotations

import json

import click
from rich.table import Table
from rich.text import Text

from zmlx.console import wide_console
from zmlx.profile.resolve import available_profiles, resolve_policy
from zmlx.profile.schema import Policy, ProfileError

#: Parts of the data that the table does not show as one row.
_NESTED = ("sources", "options", "family", "notes")


class PolicyError(click.ClickException):
    """There is no such profile, or a file or variable that has a say in it is wrong."""

    exit_code = 2


@click.group()
def profile() -> None:
    """Show the release policy in force."""


@profile.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(name: str | None, as_json: bool) -> None:
    """Print the policy of a profile, by default the one in force here."""
    policy = _policy(name)
    if as_json:
        click.echo(json.dumps(_data(policy), indent=2))
        return
    table = Table("key", "value", "from")
    for key, value in _rows(policy):
        shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        source = policy.sources.get("profile" if key == "name" else key, "")
        table.add_row(key, Text(shown), Text(source))
    console = wide_console()
    console.print(table)
    for note in policy.notes:
        console.print(Text(note))


@profile.command("list")
def list_profiles() -> None:
    """List the profiles that can be chosen here; a star marks the one in force."""
    in_force = _policy(None).name
    table = Table("", "name", "description", "from")
    for name, where in available_profiles().items():
        mark = "*" if name == in_force else ""
        table.add_row(mark, name, Text(_policy(name).description), Text(where))
    wide_console().print(table)


def _policy(name: str | None) -> Policy:
    try:
        return resolve_policy(name)
    except ProfileError as error:
        raise PolicyError(str(error)) from error


def _rows(policy: Policy) -> list[tuple[str, object]]:
    """Return dotted keys and values, those of options and families last."""
    plain = {k: v for k, v in _data(policy).items() if k not in _NESTED}
    return [*plain.items(), *_nested(policy).items()]


def _data(policy: Policy) -> dict[str, object]:
    return {
        "name": policy.name,
        "description": policy.description,
        "extends": list(policy.extends),
        "admits": sorted(policy.admits),
        "custom_primitives": policy.custom_primitives,
        "include": list(policy.include),
        "exclude": list(policy.exclude),
        "options": policy.pattern_options,
        "family": policy.families,
        "sources": dict(policy.sources),
        "notes": list(policy.notes),
    }


def _nested(policy: Policy) -> dict[str, object]:
    """Return the options and family overrides under dotted keys."""
    found: dict[str, object] = {}

    def walk(at: str, value: object) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{at}.{key}", inner)
        else:
            found[at] = value

    walk("options", policy.pattern_options)
    walk("family", policy.families)
    return found
