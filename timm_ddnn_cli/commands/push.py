"""`timm-ddnn push`: publish a trained model on the Hugging Face Hub."""
import argparse
from pathlib import Path
from typing import Any

HELP = 'Publish the output folder of a training run on the Hugging Face Hub, in one commit that replaces weights there.'
EXAMPLES = """  hf auth login                                                    # once
  timm-ddnn push output/ddnn_resnet20-digits me/ddnn_resnet20.digits --dry-run
  timm-ddnn push output/ddnn_resnet20-digits me/ddnn_resnet20.digits --license apache-2.0
  timm-ddnn push output/ddnn_resnet50-cars me/resnet26.cars --depth 26  # a plain net, for timm alone"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument('source', type=Path, help="output folder of a training run, timm's too")
    parser.add_argument('repo_id', help='owner/name of the repository, created if it does not exist')
    parser.add_argument('--depth', type=int, help='publish the plain net of this depth alone')
    parser.add_argument('--license', metavar='NAME', help="the Hub's identifier of the weights' license, such as "
                        "'apache-2.0': without one the card says that there is none")
    parser.add_argument('--private', action='store_true', help='create a private repository')
    parser.add_argument('--revision', help='branch, created if it does not exist')
    parser.add_argument('--dry-run', action='store_true', help='write the files into output/hub/, send nothing')


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Publish, and print what went where."""
    from ..tables import create_table, print_line, print_table, show_status

    with show_status('publishing'):
        from timm_ddnn.hub.publish import push_to_hub

        publication = push_to_hub(
            args.source,
            args.repo_id,
            depth=args.depth,
            license=args.license,
            private=args.private,
            revision=args.revision,
            dry_run=args.dry_run,
        )
    if not args.json:
        table = create_table(('file', 'bytes'), fold=('file',))
        for name, size in publication.files.items():
            table.add_row(name, f'{size:,}')
        print_table(table)
        what = f'commit {publication.commit} of' if publication.commit else 'written, not sent:'
        print_line(f'{what} {publication.url}')
    return publication._asdict()
