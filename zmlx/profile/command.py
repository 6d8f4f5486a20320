"""`zmlx profile`: the release policy in force, and where each value of it came from."""

from __future__ import annotations

import json
import sys

import click
from rich.console import Console
from rich.table import Table

from zmlx.profile.resolve import available_profiles, resolve_policy
from zmlx.profile.schema import Policy, ProfileError
from zmlx_autopatch.variables import VariableError


@click.group()
def profile() -> None:
    """Show the release policy in force."""


@profile.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(name: str | None, as_json: bool) -> None:
    """Print the policy of a profile, by default the one in force here."""
    try:
        policy = resolve_policy(name)
    except (ProfileError, VariableError) as error:
        raise click.UsageError(str(error)) from error
    if as_json:
        click.echo(json.dumps(_data(policy), indent=2))
        return
    table = Table("key", "value", "from")
    for key, value in _data(policy).items():
        if key not in ("sources", "options", "family"):
            shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            table.add_row(key, shown, policy.sources.get("profile" if key == "name" else key, ""))
    for key, value in _nested(policy).items():
        table.add_row(key, str(value), policy.sources.get(key, ""))
    Console(file=sys.stdout, soft_wrap=True).print(table)


@profile.command("list")
def list_profiles() -> None:
    """List the profiles that can be chosen here, and where they are defined."""
    try:
        for name, where in available_profiles().items():
            click.echo(f"{name}\t{where}")
    except ProfileError as error:
        raise click.UsageError(str(error)) from error


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
