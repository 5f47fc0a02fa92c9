"""The page of the built site that runs a net, in chromium: `make test-demo`."""
import functools
import http.server
import json
import shutil
import tempfile
import threading
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from PIL import Image
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent.parent
SITE, DEMO = ROOT / 'site', ROOT / 'docs/demo'
MODEL = DEMO / 'ddnn_resnet20-int8.onnx'
DEPTHS = (20, 14, 8)
FLAGS = ['--disable-gpu', '--no-first-run', '--disable-background-networking', '--disable-component-update']


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope='module')
def url():
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=SITE))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()


@pytest.fixture(scope='module')
def context():
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        context = playwright.chromium.launch_persistent_context(
            folder, executable_path=shutil.which('chromium') or shutil.which('google-chrome'), headless=True,
            chromium_sandbox=False, args=FLAGS, viewport={'width': 390, 'height': 844})
        yield context
        context.close()


@pytest.fixture
def page(context, url):
    """The page when it has classified its first sample; no error, and no request to elsewhere, when the test ends."""
    page, faults = context.new_page(), []
    page.on('console', lambda message: message.type == 'error' and faults.append(message.text))
    page.on('pageerror', lambda error: faults.append(str(error)))
    page.on('requestfailed', lambda request: faults.append(request.url))
    page.on('request', lambda request: request.url.startswith((url, 'data:', 'blob:')) or faults.append(request.url))
    page.goto(f'{url}/demo.html')
    wait(page)
    yield page
    page.close()
    assert not faults


def wait(page):
    page.wait_for_selector('body[data-demo=done]', timeout=120_000)


def expected(path):
    """Logits of onnxruntime by depth, from the picture as it is."""
    session = onnxruntime.InferenceSession(MODEL, providers=['CPUExecutionProvider'])
    about = session.get_modelmeta().custom_metadata_map
    mean, std = (np.array(json.loads(about[key])) for key in ('mean', 'std'))
    pixels = np.asarray(Image.open(path).convert('RGB'))
    images = ((pixels / 255 - mean) / std).astype(np.float32).transpose(2, 0, 1)[None]
    logits = {d: session.run(None, {'images': images, 'depth': np.array(d)})[0][0] for d in DEPTHS}
    return logits, json.loads(about['label_names'])


def choose(page, depth):
    page.locator('#demo-depth').fill(str(sorted(DEPTHS).index(depth)))
    wait(page)


@pytest.mark.parametrize('name', sorted(path.stem for path in DEMO.glob('samples/*.png')))
def test_answers_are_those_of_python(name, page):
    """Catches another preparation of the picture, other numbers in the browser, and a depth that is not switched."""
    page.locator(f'#demo-samples input[value={name}]').check(force=True)
    wait(page)
    logits, names = expected(DEMO / 'samples' / f'{name}.png')
    assert np.abs(logits[20] - logits[8]).max() > 0.1
    for depth in DEPTHS:
        row = page.locator(f'#demo-depths tr[data-depth="{depth}"]')
        found = np.array(json.loads(row.get_attribute('data-logits')))
        assert np.abs(found - logits[depth]).max() < 1e-3
        assert row.locator('td').nth(1).inner_text() == names[logits[depth].argmax()]


def test_slider_changes_the_cost(page):
    """Catches a slider that chooses nothing, and bytes and accuracies that are not the file's."""
    times = {}
    for depth in DEPTHS:
        choose(page, depth)
        assert page.locator('#demo-depth-name').inner_text() == str(depth)
        row = page.locator('#demo-depths tr.chosen td').all_inner_texts()
        assert row[0] == str(depth)
        times[depth] = float(row[2])
        answer = page.locator('#demo-classes li').first.inner_text()
        assert answer.startswith(row[1]) and answer.endswith(' %')
    assert times[8] < times[20]
    assert f'{MODEL.stat().st_size:,} bytes' in page.locator('#demo-bytes').inner_text()
    rows = json.loads(onnxruntime.InferenceSession(MODEL).get_modelmeta().custom_metadata_map['depths'])
    for row in rows:
        cells = page.locator(f'#demo-depths tr[data-depth="{row["depth"]}"] td').all_inner_texts()
        assert cells[3:] == [f'{row["macs"] / 1e6:.1f}', f'{row["top1"]:.2f}']


def test_keyboard_and_a_phone(page):
    """Catches a control that only a mouse reaches, and a page that is wider than a phone."""
    for selector in ('html', '#demo-depths'):
        assert page.locator(selector).evaluate('element => element.scrollWidth <= element.clientWidth')
    page.locator('#demo-samples input:checked').focus()
    page.keyboard.press('ArrowRight')
    wait(page)
    assert page.locator('#demo-samples input:checked').get_attribute('value') == 'frog'
    page.locator('#demo-depth').focus()
    page.keyboard.press('Home')
    wait(page)
    assert page.locator('#demo-depth-name').inner_text() == '8'


def test_offline_once_it_is_loaded(context, page):
    """Catches parts that are fetched when they are needed first."""
    context.set_offline(True)
    try:
        page.locator('#demo-samples input[value=truck]').check(force=True)
        wait(page)
        assert page.locator('#demo-depths tr.chosen td').nth(1).inner_text() == 'truck'
        choose(page, 8)
        assert page.locator('#demo-depth-name').inner_text() == '8'
    finally:
        context.set_offline(False)


def test_photographs_of_ones_own(page, tmp_path):
    """Catches a photograph that is not classified, and a file that is none and breaks the page."""
    Image.open(DEMO / 'samples/ship.png').resize((320, 320), Image.Resampling.NEAREST).save(tmp_path / 'ship.png')
    page.set_input_files('#demo-file', tmp_path / 'ship.png')
    page.wait_for_function('document.querySelectorAll("#demo-samples input:checked").length === 0')
    wait(page)
    assert page.locator('#demo-depths tr.chosen td').nth(1).inner_text() == 'ship'
    (tmp_path / 'text.png').write_text('none')
    page.set_input_files('#demo-file', tmp_path / 'text.png')
    page.wait_for_function('document.getElementById("demo-status").textContent.includes("text.png is no picture")')
