"""What mkdocs.yml cannot say: files that lie outside docs/, and the command reference, made by the parsers."""
import contextlib
import io
import os
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = (
    'MODEL_CARD.md', 'CONTRIBUTING.md', 'CHANGELOG.md', 'benchmarks/README.md', 'benchmarks/results/*.png',
    'results/README.md', 'results/PROTOCOL.md', 'results/*.png', 'results/*.csv')

ONNXRUNTIME = ROOT / '.venv/node_modules/onnxruntime-web/dist'  # by `make docs`, as docs/demo/package-lock.json says
ONNXRUNTIME_FILES = ('ort.wasm.bundle.min.mjs', 'ort-wasm-simd-threaded.wasm')


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the repository that the site shows too, under the paths that they have there."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    for name in ONNXRUNTIME_FILES:
        path = f'demo/onnxruntime-web/{name}'
        files.append(File.generated(config, path, abs_src_path=str(ONNXRUNTIME / name)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Append to the command reference the help of every command."""
    if page.file.src_uri != 'commands.md':
        return markdown
    from timm_ddnn_cli.commands import NAMES

    helps = (f'## timm-ddnn {name}\n\n```text\n{get_help(name)}```\n' for name in NAMES)
    return '\n'.join([markdown, *helps])


def get_help(name: str) -> str:
    """Return what `timm-ddnn NAME --help` prints."""
    from timm_ddnn_cli.main import main

    os.environ.update(COLUMNS='100', NO_COLOR='1')
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        main([name, '--help'])
    return text.getvalue()
