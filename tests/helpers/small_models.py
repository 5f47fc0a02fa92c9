"""Small models whose depths differ, saved as a training run saves them."""
import timm
import torch

from timm_ddnn.hub.save import save_model
from timm_ddnn.utils.costs import count_costs

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def make_model(name='ddnn_resnet20', channels=(4, 8, 16), seed=0, **kwargs):
    torch.manual_seed(seed)
    model = timm.create_model(name, channels=channels, num_classes=10, **kwargs).eval()
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            torch.nn.init.uniform_(tensor, 0.2, 1.0)
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.2)
    model.mark_trained(model.depths)
    return model


def save(model, folder):
    folder.mkdir()
    rows = [dict(row, top1=70.0 + i, top5=90.0 + i) for i, row in enumerate(count_costs(model, (3, 32, 32)))]
    names = [f'class {i}' for i in range(10)]
    save_model(model, folder, data_config=dict(input_size=(3, 32, 32)), class_names=names, rows=rows)
    return folder


def logits(model):
    with torch.inference_mode():
        return {d: model(IMAGES, depth=d) for d in model.depths}
