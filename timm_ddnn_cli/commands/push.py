"""`timm-ddnn push`: publish a trained model on the Hugging Face Hub."""
import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from timm_ddnn.hub.publish import push_to_hub

HELP = 'Publish a training output folder on the Hugging Face Hub, in one commit, in the place of weights there.'
EXAMPLES = """  hf auth login                                                    # once
  timm-ddnn push output/ddnn_resnet20-digits me/ddnn_resnet20.digits --dry-run
  timm-ddnn push output/ddnn_resnet20-digits me/ddnn_resnet20.digits
  timm-ddnn push output/ddnn_resnet50-cars me/resnet26.cars --depth 26  # a plain net, for timm alone"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument('source', type=Path, help='output folder of a training run')
    parser.add_argument('repo_id', help='owner/name of the repository, created if there is none')
    parser.add_argument('--depth', type=int, help='publish the plain net of this depth alone')
    parser.add_argument('--private', action='store_true', help='create a private repository')
    parser.add_argument('--revision', help='branch, created if there is none')
    parser.add_argument('--dry-run', action='store_true', help='write the files into output/hub/, send nothing')


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Publish, and print what went where."""
    publication = push_to_hub(
        args.source,
        args.repo_id,
        depth=args.depth,
        private=args.private,
        revision=args.revision,
        dry_run=args.dry_run,
    )
    if not args.json:
        table = Table(caption=f'{sum(publication.files.values()):,} bytes')
        table.add_column('file')
        table.add_column('bytes', justify='right')
        for name, size in publication.files.items():
            table.add_row(name, f'{size:,}')
        console = Console()
        console.print(table)
        what = f'commit {publication.commit} of' if publication.commit else 'written, not sent:'
        console.print(what, publication.url, soft_wrap=True, highlight=False)
    return publication._asdict()
