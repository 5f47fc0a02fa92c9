"""How a model is saved in a folder where others read: weights and configuration always belong together."""
import contextlib
import multiprocessing
import os

import pytest
import timm
from helpers.small_models import make_model, save

from timm_ddnn.hub.save import save_model
from timm_ddnn.weights import download

CONFIG = dict(input_size=(3, 32, 32))


def save_again(folder, value):
    """Save a model whose first bias, and first result, are `value`."""
    model = make_model()
    model.fc.bias.data.fill_(value)
    rows = [{'depth': depth, 'top1': value} for depth in model.depths]
    save_model(model, folder, data_config=CONFIG, class_names=[], rows=rows)


def load(folder):
    """-> what the weights say, what the configuration says"""
    model = timm.create_model(f'local-dir:{folder}', pretrained=True)
    return model.fc.bias[0].item(), model.saved_results[0]['top1']


class Killed(BaseException):
    """What ends the process in tests."""


@pytest.mark.parametrize('moment', range(1, 5))
def test_a_kill_at_any_moment_leaves_a_whole_pair(tmp_path, moment):
    """Catches weights of one save beside the configuration of another, and a save after it that loses both."""
    folder = save(make_model(), tmp_path / 'net')
    save_again(folder, 1)
    for value in (2, 3):  # the second is killed where the first has left the folder
        replaced = []

        def replace(*args, original=os.replace, replaced=replaced):
            replaced.append(args)
            if len(replaced) == moment:
                raise Killed
            original(*args)

        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
            patch.setattr(os, 'replace', replace)
            save_again(folder, value)
        weights, configuration = load(folder)
        assert weights == configuration in range(1, value + 1)
    (folder / '.saving').mkdir(exist_ok=True)  # as a killed process leaves it
    save_again(folder, 4)
    assert load(folder) == (4, 4)
    assert sorted(path.name for path in folder.iterdir()) == ['config.json', 'model.safetensors']


def test_a_reader_finds_whole_pairs_while_others_save(tmp_path):
    """Catches a load that fails, or mixes two saves, because a training run saves at that time."""
    folder = save(make_model(), tmp_path / 'net')
    save_again(folder, 0)
    saver = multiprocessing.get_context('fork').Process(
        target=lambda: [save_again(folder, value) for value in range(1, 25)])
    saver.start()
    found = []
    while saver.is_alive():
        found.append(load(folder))
    assert saver.exitcode == 0
    assert all(weights == configuration for weights, configuration in found)
    assert len(set(found)) > 3


def test_another_model_that_is_saved_meanwhile_is_an_error(tmp_path, monkeypatch):
    """Catches weights of another model under the configuration that was read before."""
    folder = save(make_model(), tmp_path / 'net')
    read = download._read_folder

    def save_between(*args):
        other = make_model(channels=(4, 8, 32))
        save_model(other, folder, data_config=CONFIG, class_names=[], rows=[])
        return read(*args)
    monkeypatch.setattr(download, '_read_folder', save_between)
    with pytest.raises(OSError, match=r'another model was saved in .* while it was read: load it again'):
        load(folder)
