"""`distillkit push`: publish a capture on the Hugging Face hub."""

from __future__ import annotations

import json

import click

from distillkit.cli.common import JSON
from distillkit.console import human_bytes, say

__all__ = ["push"]


@click.command(short_help="Push a capture to the Hugging Face hub, with a card.")
@click.argument("dataset")
@click.argument("repo")
@click.option(
    "--private/--public",
    default=True,
    show_default=True,
    help="Who can read the repository. One that exists stays as it is; a public one needs --public.",
)
@click.option("--license", metavar="ID", help="Licence for the card, such as apache-2.0; left open by default.")
@click.option("--verify/--no-verify", default=True, show_default=True, help="Read and check everything first.")
@JSON
def push(dataset: str, repo: str, private: bool, license: str | None, verify: bool, as_json: bool) -> None:
    """Push the captured dataset in the folder DATASET to the hub repository REPO (OWNER/NAME), with a card made from
    its header.

    The token is that of `hf auth login`, or HF_TOKEN. A repository that does not exist is created, and is private
    without --public: token ids can be turned back into the documents. To resume an interrupted push, run it again:
    shards that have arrived are not sent twice. If the repository holds other files, nothing is pushed.

    \b
    Examples:
      distillkit push ./captured me/captured
      distillkit push ./captured my-team/captured --public --license apache-2.0
    """
    from distillkit.hub.pushing import push as push_dataset

    report = push_dataset(dataset, repo, private=private, license=license, verify=verify)
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2))
        return
    files = f"{report.uploaded:,} file{'s' if report.uploaded != 1 else ''}"
    sent = f"{files} sent ({human_bytes(report.uploaded_bytes)})" if report.uploaded else "nothing to send"
    say(f"{sent}, {report.already_there:,} there already; card {report.card}")
    say(f"{'private' if report.private else 'public'}: {report.url}")
    if report.private != private:
        say(f"the repository was {'private' if report.private else 'public'} already; its settings page changes that")
    say(f'read it: distillkit.Dataset.open("hf://datasets/{report.repo}")')
