"""Options of EKD that two commands share."""
import argparse
import inspect

import pytest

from timm_ddnn import EKDLoss
from timm_ddnn.models.shared_weights import PRIVATE
from timm_ddnn_cli.commands import train
from timm_ddnn_cli.ekd_options import add_ekd_options, ekd_options


@pytest.mark.parametrize('prefix', ['', 'ekd-'])
def test_options_are_the_arguments_of_the_loss(prefix):
    """Catches a default that is written twice and differs, an argument without an option, and a lost value."""
    parser = argparse.ArgumentParser()
    add_ekd_options(parser, prefix)
    expected = {name: p.default for name, p in inspect.signature(EKDLoss).parameters.items() if name != 'criterion'}
    assert ekd_options(parser.parse_args([]), prefix) == expected | {'weights': {}, 'stages': [*expected['stages']]}
    given = f'--{prefix}temperature 2 --{prefix}alpha 1 --{prefix}beta 0 --{prefix}attention standardized ' \
            f'--{prefix}stages 0 -1 --{prefix}weights 14=0.25 8=0.75'
    assert ekd_options(parser.parse_args(given.split()), prefix) == dict(
        temperature=2, alpha=1, beta=0, attention='standardized', stages=[0, -1], weights={14: 0.25, 8: 0.75})


def test_private_parts_of_the_command_are_those_of_the_models():
    """Catches a part that a model has and the command does not: it starts without the models, and names them again."""
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    assert vars(parser.parse_args(['--private', *PRIVATE]))['private'] == [*PRIVATE]
    assert next(action.choices for action in parser._actions if action.dest == 'private') == PRIVATE
