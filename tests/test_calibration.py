"""Calibrating the statistics of one depth must not touch anything else, whatever happens."""
import copy

import pytest
import timm
import torch
from helpers.models import create, images, logits_by_depth

from timm_ddnn import calibrate_bn
from timm_ddnn.utils.errors import InputError
from timm_ddnn.utils.modules import find_norms


def batches(count=3, size=8):
    generator = torch.Generator().manual_seed(7)
    return [(torch.randn(size, 3, 32, 32, generator=generator) * 2 + 1, torch.zeros(size)) for _ in range(count)]


@pytest.mark.parametrize('depth', [20, 14, 8, 12])
def test_only_the_depth_asked_for_changes(small, depth):
    """Fails if the shared stem or stage were calibrated too: then all other depths move."""
    small.add_subnet((2, 2, 1))
    small.train()
    small.layer2[0].bn1.eval()  # a mode that someone froze
    modes = {n: m.training for n, m in small.named_modules()}
    momenta = [norm.momentum for norm in find_norms(small)]
    parameters = [p.clone() for p in small.parameters()]
    x = images(small)
    before = logits_by_depth(copy.deepcopy(small).eval(), x)
    random_state = torch.get_rng_state()
    assert calibrate_bn(small, batches(), depth=depth) == 24
    assert torch.equal(torch.get_rng_state(), random_state)
    assert {n: m.training for n, m in small.named_modules()} == modes
    assert [norm.momentum for norm in find_norms(small)] == momenta
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), parameters, strict=True))
    after = logits_by_depth(copy.deepcopy(small).eval(), x)
    # all statistics of depth 12 are those of the beginning of 14: there is nothing to estimate without moving 14
    changed = [d for d in small.depths if not torch.equal(before[d], after[d])]
    assert changed == ([depth] if depth != 12 else [])
    assert small.trained_depths == (depth,)


def test_statistics_are_those_of_the_data(small):
    """Recomputed by hand: mean over batches of the batch mean and of the unbiased batch variance."""
    data = batches()
    inputs = []
    norm = small.path(14)[2].bn1
    handle = norm.register_forward_hook(lambda module, args, out: inputs.append(args[0]))
    calibrate_bn(small, data, depth=14)
    handle.remove()
    assert len(inputs) == 3
    mean = sum(t.mean(dim=(0, 2, 3)) for t in inputs) / 3
    variance = sum(t.var(dim=(0, 2, 3), correction=1) for t in inputs) / 3
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, variance)
    assert norm.num_batches_tracked == 3


def test_path_shared_by_two_sub_nets_stays():
    """In ddnn_resnet152 the 101 and the 50 share norms: calibrating one leaves the other's logits as they are."""
    model = create('ddnn_resnet152', num_classes=3, channels=(8, 16, 32, 64))
    x = images(model, size=32)
    before = logits_by_depth(model, x)
    calibrate_bn(model, [x], depth=50)
    after = logits_by_depth(model, x)
    assert [d for d in model.depths if not torch.equal(before[d], after[d])] == [50]


def test_sub_nets_that_share_statistics_are_calibrated_together(caplog):
    """From stock weights 101 and 50 have copies of 152's statistics: alone, neither could get those they share."""
    model = timm.create_model('ddnn_resnet152', num_classes=3, channels=(8, 16, 32, 64))
    model.load_state_dict(create('resnet152', num_classes=3, channels=(8, 16, 32, 64)).state_dict())
    model.eval()
    x = images(model, size=32)
    before = logits_by_depth(model, x)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    common = 'subnets.101.layer3.0.bn1.running_mean'
    calibrate_bn(copy.deepcopy(model), [x], depth=50)
    assert 'Depth 50 shares statistics with [101], which are not trained' in caplog.text
    caplog.clear()
    calibrate_bn(model, [x], depth=(101, 50))
    assert not caplog.text
    assert not torch.equal(model.state_dict()[common], state[common])
    after = logits_by_depth(model, x)
    assert [d for d in model.depths if not torch.equal(before[d], after[d])] == [101, 50]
    assert model.trained_depths == (152, 101, 50)
    calibrate_bn(model, [x], depth=50)
    assert not caplog.text, '101 is trained by now'


@pytest.mark.parametrize('loader', [
    [], [torch.zeros(2, 3)], ['images'], [{'image': torch.zeros(2, 3, 8, 8)}], [(), None],
])
def test_bad_loader_leaves_everything_as_it_was(small, loader):
    small.train()
    before = {k: v.clone() for k, v in small.state_dict().items()}
    with pytest.raises(ValueError, match='loader'):
        calibrate_bn(small, loader, depth=14)
    assert all(torch.equal(v, before[k]) for k, v in small.state_dict().items())
    assert all(m.training for m in small.modules())


@pytest.mark.parametrize('value', [float('nan'), float('inf'), 1e38])
def test_images_that_give_no_statistics_leave_everything_as_it_was(small, value):
    """Catches statistics that one broken image makes NaN or infinite, for all images after it."""
    before = {k: v.clone() for k, v in small.state_dict().items()}
    data = batches()
    data[1][0][3, 0, 5, 5] = value
    with pytest.raises(InputError, match='loader must give images whose maps are finite'):
        calibrate_bn(small, data, depth='all')
    assert all(torch.equal(v, before[k]) for k, v in small.state_dict().items())
    assert small.trained_depths == ()


@pytest.mark.parametrize('error', [OSError('disk gone'), KeyboardInterrupt()], ids=['error', 'interrupt'])
def test_error_in_the_middle_restores_statistics_and_modes(small, error):
    """Catches statistics of half the images, in a notebook after Ctrl-C too."""
    def failing():
        yield from batches(2)
        raise error

    before = {k: v.clone() for k, v in small.state_dict().items()}
    momenta = [norm.momentum for norm in find_norms(small)]
    with pytest.raises(type(error)):
        calibrate_bn(small, failing(), depth=14)
    assert small.trained_depths == ()
    assert all(torch.equal(v, before[k]) for k, v in small.state_dict().items())
    assert not any(m.training for m in small.modules())
    assert [norm.momentum for norm in find_norms(small)] == momenta


def test_unknown_depth():
    model = timm.create_model('ddnn_resnet20')
    with pytest.raises(ValueError, match=r'\(20, 14, 8\).*13'):
        calibrate_bn(model, batches(), depth=13)


def test_drop_path_and_dropout_stay_off():
    """Calibration sees the net as it is at evaluation: twice the same data, twice the same statistics."""
    model = create('ddnn_resnet20', drop_path_rate=0.5, drop_rate=0.5)
    calibrate_bn(model, batches(), depth=14)
    first = {k: v.clone() for k, v in model.state_dict().items()}
    calibrate_bn(model, batches(), depth=14)
    assert all(torch.equal(v, first[k]) for k, v in model.state_dict().items())


def test_images_are_taken_in_the_models_precision(small):
    """Catches images in float32 that a model in float64 or bfloat16 cannot take."""
    small.double()
    assert calibrate_bn(small, batches(), depth=14) == 24
    assert {norm.running_mean.dtype for norm in find_norms(small)} == {torch.float64}
