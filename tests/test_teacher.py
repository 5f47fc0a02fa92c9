"""Another net that teaches in the place of the full-net in training."""
import pytest
import timm
import torch
from helpers.models import create, images
from helpers.tiny_task import CLASSES, OPTIONS, TARGET, make_task, tiny
from timm.models.resnet import BasicBlock
from timm.utils import ModelEmaV3

from timm_ddnn import DynamicDepthCifarResNet, SubNetOutput


@pytest.fixture
def model():
    return tiny()


@pytest.fixture
def x(model):
    return images(model, batch=len(TARGET), size=8)


def test_another_net_teaches_on_demand(model, x):
    """Catches a teacher that is trained, saved, put into another mode, or not let go again."""
    task, teacher, images = make_task(model, **OPTIONS), tiny(seed=1), x
    names, plain = list(task.state_dict()), task(images, TARGET)
    task.set_teacher(teacher)
    assert not any(m.training for m in teacher.modules())
    assert not task.teacher(images).logits.requires_grad
    result = task(images, TARGET)
    with torch.no_grad():
        expected = task.loss_fn(model(images, depth='all'), TARGET, teacher(images, depth='all')[12])
    torch.testing.assert_close(result['loss'].detach(), expected)
    assert result.keys() - plain.keys() == {'kl_12', 'attention_12'}
    result['loss'].backward()
    assert all(p.grad is None for p in teacher.parameters()) and all(p.grad is not None for p in model.parameters())
    assert list(task.state_dict()) == names and not any(m is teacher for m in task.modules())
    task.train()
    assert not teacher.training
    assert task(images, TARGET, depth=model.depths[:1]).keys() == {'loss', 'output', 'ce_12', 'kl_12', 'attention_12'}
    task.set_teacher(None)
    assert task(images, TARGET).keys() == plain.keys()


def test_any_net_teaches_without_attention(model, x):
    """Catches a teacher that is given images of the model's mean and std, not of its own."""
    teacher = timm.create_model('resnet18', num_classes=CLASSES).eval()
    assert teacher.pretrained_cfg['mean'] != tuple(model.pretrained_cfg['mean'])
    task = make_task(model, beta=0)
    task.set_teacher(teacher)
    result = task(x, TARGET)
    (mean, std), (own_mean, own_std) = (
        [torch.tensor(net.pretrained_cfg[name])[:, None, None] for name in ('mean', 'std')] for net in (model, teacher))
    with torch.no_grad():
        logits = teacher((x * std + mean - own_mean) / own_std)
        expected = task.loss_fn(model(x, depth='all'), TARGET, SubNetOutput(logits, []))
    torch.testing.assert_close(result['loss'].detach(), expected)
    assert {name for name in result if name.startswith('kl')} == {'kl_12', 'kl_10', 'kl_8'}


def test_a_teacher_without_the_classes_or_maps_of_the_model_is_refused(model, x):
    """Catches a teacher that is refused too late, in the first step, or leaves the task without the one before."""
    task, teacher = make_task(model), tiny(seed=1)
    task.set_teacher(teacher)
    expected = task(x, TARGET)
    other = create('ddnn_resnet18', num_classes=CLASSES)
    gray = tiny(in_chans=1)
    maps = r'for beta > 0, teacher must be .* the reductions \[1, 1, 2, 4\], got '
    for wrong, message in [
        (tiny(num_classes=3), 'teacher must have 5 classes, got 3'),
        (model.extract(8), maps + r'CifarResNet and beta=0\.1'),
        (other, maps + r'\[2, 4, 8, 16, 32\] and beta=0\.1'),
        (gray, 'teacher must take images of 3 channels, got 1'),
        (ModelEmaV3(model), 'teacher must be a model of timm, got ModelEmaV3'),
    ]:
        with pytest.raises(ValueError, match=message):
            task.set_teacher(wrong)
        assert torch.equal(task(x, TARGET)['kl_12'], expected['kl_12'])
    with pytest.raises(ValueError, match='a teacher needs alpha or beta to be > 0, got 0 for both'):
        make_task(model, alpha=0, beta=0).set_teacher(teacher)


@pytest.mark.parametrize('name', ['resnet18', 'ddnn_resnet18'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_a_teacher_of_lower_precision_and_of_gray_images(name, dtype):
    """Catches images that reach the teacher in another precision than that of its weights, or with three channels."""
    model = tiny(in_chans=1).to(dtype)
    teacher = timm.create_model(name, num_classes=CLASSES, in_chans=1).bfloat16()
    gray = images(model, batch=len(TARGET), size=8).to(dtype)
    task = make_task(model, beta=0)
    task.set_teacher(teacher)
    assert task.teacher.scale is not None
    assert torch.isfinite(task(gray, TARGET)['loss'])


def test_a_model_without_a_configuration_is_taught_by_its_average(x):
    """Catches a teacher that is refused because nothing is known of the images."""
    model = DynamicDepthCifarResNet(BasicBlock, (2, 2, 1), subnets=((1, 1, 1),), num_classes=CLASSES).train()
    task = make_task(model)
    task.set_teacher(ModelEmaV3(model).module)
    assert task.teacher.scale is None
    assert task(x, TARGET)['kl_12'] >= 0
