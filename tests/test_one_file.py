"""One ONNX file for several depths, in float and in int8: what it stores once, what it computes, what it refuses."""
import json
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import pytest
import timm
import torch
from helpers.families import SMALL, small
from helpers.models import create, images, logits_by_depth, narrow, some_at_once
from helpers.saved_model import failing, files, save
from onnx import helper

from timm_ddnn.deploy import formats
from timm_ddnn.deploy.export import ExportMismatchError, describe_net, export
from timm_ddnn.deploy.formats import open_onnx
from timm_ddnn.deploy.int8 import Int8Images, Int8LossError, measure_loss
from timm_ddnn.deploy.onnx_graph import merge_nets, trace_net
from timm_ddnn.deploy.quantize import quantize, quantize_nets
from timm_ddnn.models.load import saved_results
from timm_ddnn.utils.errors import InputError
from timm_ddnn_cli.main import main

ROOT = Path(__file__).resolve().parent.parent
NOT_NESTED = dict(layers=(2, 2, 2), subnets=((2, 1, 2), (1, 2, 1)), channels=(4, 8, 16))
TINY = dict(layers=(2, 1, 1), subnets=((1, 1, 1),), channels=(4, 8, 16))


def walk(graph):
    """All nodes, those in branches too."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField('g'):
                yield from walk(attribute.g)


def run(graph):
    return open_onnx(graph.SerializeToString())


def trace(model, x, fold_norms):
    return {d: trace_net(model.extract(d), x, True, fold_norms) for d in model.depths}


def check_both(model, x):
    """Merge all depths in float and in int8; return the graphs."""
    expected = logits_by_depth(model, x)
    merged = merge_nets(trace(model, x, fold_norms=False))
    compute = run(merged)
    for depth in model.depths:
        torch.testing.assert_close(compute(x, depth), expected[depth], atol=1e-5, rtol=1e-4)
    nets = quantize_nets(trace(model, x, fold_norms=True), x)
    merged_int8 = merge_nets(nets)
    compute = run(merged_int8)
    for depth, net in nets.items():
        logits = compute(x, depth)
        assert torch.equal(logits, run(net)(x, depth))
        assert 0 < (logits - expected[depth]).abs().max() < 0.1 * expected[depth].abs().max()
    return merged, merged_int8


def test_every_convolution_stands_once():
    """Catches weights that are stored for each depth, and a mixture of depths, of which none includes all others.

    Some channels are switched off or turned over by their norm: a division by zero, and signs that are lost.
    """
    model = create('ddnn_resnet20', **NOT_NESTED)
    with torch.no_grad():
        model.layer2[1].bn1.weight[:2] = 0
        model.layer1[0].bn2.weight[1] *= -1
        model.layer3[0].bn2.weight[1] *= -1
    graphs = check_both(model, images(model, 4))
    weights = [p for p in model.parameters() if p.ndim > 1]
    for graph, kind, size in zip(graphs, ('Conv', 'QLinearConv'), (4, 1), strict=True):
        counts = Counter(node.op_type for node in walk(graph.graph))
        assert (counts[kind], counts['If']) == (len(weights) - 1, 3) == (13, 3)
        stored = sum(len(t.raw_data) for t in graph.graph.initializer if len(t.dims) > 1 and 'pick' not in t.name)
        assert stored == size * sum(p.numel() for p in weights)
        # in branches they would be kept twice by onnxruntime
        assert not any(a.g.initializer for n in walk(graph.graph) for a in n.attribute if a.HasField('g'))
    onnx.checker.check_model(graphs[0], full_check=True)


def test_private_weights_are_picked_by_depth():
    """Catches matrices that one depth lends to another, and integers that are taken for those of all depths."""
    model = create('ddnn_resnet20', **NOT_NESTED, private=['classifier', 'conv'])
    x = images(model, 4)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.startswith('subnets.'):
                torch.nn.init.normal_(p, std=0.2)
    compute = run(merge_nets(trace(model, x, fold_norms=False)))
    for depth, logits in logits_by_depth(model, x).items():
        torch.testing.assert_close(compute(x, depth), logits, atol=1e-5, rtol=1e-4)
    with pytest.raises(InputError, match=r"which private 'conv' has not, .* export one depth at a time"):
        quantize_nets(trace(model, x, fold_norms=True), x)
    check_both(create('ddnn_resnet20', **NOT_NESTED, private=['classifier']), x)


@pytest.mark.parametrize('name', some_at_once())  # all slow
def test_every_entrypoint(name):
    """Catches a kind of block, or an operator of it, that a file of several depths cannot hold."""
    model = create(name, **narrow(name))
    check_both(model, images(model, 4))


INT8_FAMILIES = 'regnet', 'regnetz', 'efficientnet', 'mobilenetv3', 'mobilenetv4', 'wide_resnet'


@pytest.mark.slow
@pytest.mark.parametrize('family', list(SMALL))
def test_every_family(family):
    """Catches blocks, stages or maps that are sought where ResNets have them, and int8 where a norm does not fold."""
    model, x = small(family, ((2, 1, 3, 2), (1, 1, 1, 1)) if family == 'swin' else None)
    x = torch.cat([x, x.flip(-1)])
    if family in INT8_FAMILIES:
        check_both(model, x)
        return
    compute = run(merge_nets(trace(model, x, fold_norms=False)))
    for depth, logits in logits_by_depth(model, x).items():
        for size in 1, 3:  # numbers of images that it was not traced with
            torch.testing.assert_close(compute(x[:size], depth), logits[:size], atol=1e-5, rtol=1e-4)
    with pytest.raises(InputError, match='int8 needs batch norms that become part of the convolution before them'):
        quantize({depth: model.extract(depth) for depth in model.depths}, x)


@pytest.fixture(scope='module')
def page():
    """The page that runs a file in the browser, that file, and the model that the page names."""
    text = (ROOT / 'docs/demo.md').read_text()
    tag = re.search(r'timm-ddnn export (\S+) --depth all --format onnx --int8', text)[1]
    file = onnx.load(ROOT / 'docs/demo/ddnn_resnet20-int8.onnx')
    return text, file, timm.create_model(tag, pretrained=True).eval()


def test_the_file_of_the_page_is_what_the_page_says(page):
    """Catches a file of an older exporter or of other weights, and accuracies on fewer images than the page says."""
    text, file, model = page
    about = {entry.key: entry.value for entry in file.metadata_props}
    expected = describe_net(model, 'all', saved_results(model))
    assert about.keys() == {*expected, 'dynamic_batch'}
    for key in expected.keys() - {'library', 'depths'}:
        text_or_json = expected[key] if isinstance(expected[key], str) else json.dumps(expected[key])
        assert about[key] == text_or_json, key
    for row, saved in zip(json.loads(about['depths']), expected['depths'], strict=True):
        saved.pop('top5')
        assert saved.pop('top1') == row['float_top1'] <= row.pop('top1') + 0.5
        assert row == saved | {'float_top1': row['float_top1']}
    *names, last = model.pretrained_cfg['label_names']
    words = ' '.join(text.split())
    assert f'{", ".join(names)} and {last}, at 32 x 32 pixels' in words and 'holds depths 20, 14 and 8 of' in words


@pytest.mark.slow
def test_the_file_of_the_page_is_of_this_exporter(page):
    """Catches a file that was not written anew when the exporter changed."""
    _, file, model = page
    written = quantize({d: model.extract(d).eval() for d in model.depths}, images(model, 4))
    graphs = [file.graph, written.graph]
    # ranges are of other images, and with them the number of scales that are picked
    nodes = [[(node.op_type, node.name) for node in walk(graph) if node.op_type != 'Gather'] for graph in graphs]
    integers = [{t.name: t.raw_data for t in graph.initializer if len(t.dims) == 4} for graph in graphs]
    assert nodes[0] == nodes[1] and integers[0] == integers[1] and len(integers[0]) == 19


def test_channels_last_images_give_no_other_graph():
    """Catches a mean that is gathered element by element, which torch.export makes of such an example."""
    model = create('ddnn_resnet20', **TINY)
    x = images(model, 4).contiguous(memory_format=torch.channels_last)
    kinds = Counter(node.op_type for node in trace_net(model.extract(8), x, True).graph.node)
    assert kinds == dict(Conv=7, Relu=7, Slice=4, Add=3, Pad=2, ReduceMean=1, Reshape=1, Gemm=1)  # as of any example


def int8_images(model, labels_of=None):
    """Images to calibrate on, and batches whose labels are the classes that one depth says."""
    x = torch.randn(48, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        labels = model(x, depth=labels_of).argmax(1)
    return Int8Images(x[:16], list(zip(x.split(20), labels.split(20), strict=True)))


@pytest.mark.slow
@pytest.mark.parametrize('format', formats.FORMATS)
def test_logits_are_at_the_temperature_of_their_depth(format, tmp_path):
    """Catches files whose probabilities are not those of `predict`, and a depth at the temperature of another one."""
    model = create('ddnn_resnet20', **NOT_NESTED)
    temperatures = {14: 1.5, 12: 1.0, 10: 0.25}
    model.saved_results = [{'depth': depth, 'temperature': temperatures[depth]} for depth in (14, 10)]
    x = images(model, 3)
    for row in export(model, 'all', tmp_path, format=format, images=x, dynamic_batch=True):
        check_temperature(model, row, x, temperatures, tolerance=1e-5)


def check_temperature(model, row, x, temperatures, tolerance):
    depth = row['depth']
    logits = formats.FORMATS[row['format']].open(row['file'])(x, depth).detach()
    expected = logits_by_depth(model, x)[depth] / temperatures[depth]
    torch.testing.assert_close(logits, expected, atol=tolerance * float(logits.abs().max()), rtol=0)
    assert describe_net(model, depth)['temperature'] == temperatures[depth]


class Written(NamedTuple):
    """Files in int8, all depths in one and depth 8 in another: their rows of `export`, and what they were made of."""
    model: torch.nn.Module
    arguments: dict
    temperatures: dict
    rows: list
    alone: dict


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    model, temperatures = create('ddnn_resnet20', **TINY), {10: 1.5, 8: 0.25}
    with torch.no_grad():
        model.layer1[1].bn2.weight.mul_(20)  # so that depth 10, which alone has it, says other classes
    model.saved_results = [{'depth': depth, 'temperature': value} for depth, value in temperatures.items()]
    arguments = dict(format='onnx', images=images(model, 3), int8=int8_images(model, 8), max_loss=100)
    folder = tmp_path_factory.mktemp('int8')
    rows = export(model, 'all', folder, **arguments, results=[{'depth': 10, 'top1': 1.0, 'top5': 2.0}])
    return Written(model, arguments, temperatures, rows, *export(model, 8, folder, **arguments))


def test_int8_file_has_its_own_accuracy(written):
    """Catches an accuracy of float weights in an int8 file, or one of another depth, and a wrong temperature."""
    x, rows = written.arguments['images'], written.rows
    assert [row['depth'] for row in rows] == [*written.model.depths] == [10, 8]
    meta = {entry.key: entry.value for entry in onnx.load(rows[0]['file']).metadata_props}
    run_file = open_onnx(rows[0]['file'])
    for row, about in zip(rows, json.loads(meta['depths']), strict=True):
        check_temperature(written.model, row, x, written.temperatures, tolerance=0.1)
        hits = [run_file(x, row['depth']).argmax(1) == y for x, y in written.arguments['int8'].held_out]
        assert row['top1'] == about['top1'] == round(100 * torch.cat(hits).float().mean().item(), 4)
        assert (row['float_top1'] == 100) is (row['depth'] == 8) and row['held_out_images'] == 48
        assert about['float_top1'] == row['float_top1'] and 'top5' not in about
        assert row['allowed'] is None and row['max_difference'] > 0 and row['batch_sizes'] == [1, 3]
    one = written.alone
    assert Path(one['file']).name == 'ddnn_resnet20-8-int8.onnx'
    assert not torch.equal(open_onnx(one['file'])(x, 8), run_file(x, 8))  # ranges are of one depth
    assert one['top1'] >= 90


def test_int8_that_loses_too_much_is_refused():
    """Catches a limit that nobody looks at, and a loss of one depth hidden by the others."""
    batches = [(torch.eye(4)[[0, 1, 2]], torch.tensor([0, 1, 2])), (torch.eye(4)[[3, 3]], torch.tensor([3, 0]))]
    nets = {20: torch.nn.Identity(), 8: torch.nn.Identity()}  # 4 of 5 right

    def run(images, depth):
        return images if depth == 20 else images.roll(len(images) - 2, 0)

    rows = measure_loss(run, nets, batches, max_loss=60)
    assert rows[8] == {'depth': 8, 'top1': 20.0, 'float_top1': 80.0, 'held_out_images': 5}
    assert (rows[20]['top1'], rows[20]['float_top1']) == (80, 80)
    with pytest.raises(Int8LossError, match=r'more than 59.9 .* depth 8 has 20.00 % in place of 80.00 %') as error:
        measure_loss(run, nets, batches, max_loss=59.9)
    assert error.value.exit_status == 1


def test_other_signs_of_a_depth_are_refused():
    """Catches wrong integers where norms have scales of their own."""
    nets = {}
    for depth, sign in (20, 1), (8, -1):
        weight = torch.ones(2, 3, 1, 1)
        weight[1] *= sign
        values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, None, 4, 4]) for name in ('x', 'y')]
        node = helper.make_node('Conv', ['x', 'w'], ['y'], name='layer3.0')
        graph = helper.make_graph(
            [node], 'net', values[:1], values[1:], [onnx.numpy_helper.from_array(weight.numpy(), 'w')])
        nets[depth] = helper.make_model(graph)
    with pytest.raises(InputError, match=r'got others in layer3\.0 at depth 8'):
        quantize_nets(nets, torch.zeros(1, 3, 4, 4))


@pytest.mark.slow
def test_signs_that_differ_by_depth_are_refused_in_int8_alone():
    """Catches a float file that shares what differs by depth: one channel of one depth has another sign."""
    model = create('ddnn_resnet20', **TINY, private=['affine'])
    x = images(model, 4)
    with torch.no_grad():
        model.path_norms(8)[-1].weight[3] *= -1
    compute = run(merge_nets(trace(model, x, fold_norms=False)))
    for depth, logits in logits_by_depth(model, x).items():
        torch.testing.assert_close(compute(x, depth), logits, atol=1e-5, rtol=1e-4)
    with pytest.raises(InputError, match='got others in layer3'):
        quantize_nets(trace(model, x, fold_norms=True), x)


def test_int8_that_mixes_images_of_a_batch_is_refused(written, tmp_path, monkeypatch):
    """Catches a file in int8 that is right one image at a time alone."""
    def open_mixing(file):
        compute = open_onnx(file)

        def mixing(images, depth):
            logits = compute(images, depth)
            return logits + (logits - logits.mean(0))
        return mixing

    monkeypatch.setitem(formats.FORMATS, 'onnx', formats.FORMATS['onnx']._replace(open=open_mixing))
    monkeypatch.setattr('timm_ddnn.deploy.quantize.quantize', lambda *_: onnx.load(written.alone['file']))
    with pytest.raises(ExportMismatchError, match=r'ddnn_resnet20-8-int8.onnx is not written'):
        export(written.model, 8, tmp_path, **written.arguments)
    assert not files(tmp_path)


def test_command_writes_int8(tmp_path, capsys):
    """Catches training images that accuracy is measured on, and options that are not handed on."""
    save(tmp_path / 'model', **TINY)
    args = ['export', tmp_path / 'model', '--depth', 8, '--format', 'onnx', '--int8', '--output', tmp_path / 'out']
    assert 'data must be given for int8' in failing(capsys, *args)
    assert "format must be 'onnx' for int8" in failing(
        capsys, *['torchscript' if arg == 'onnx' else arg for arg in args], '--data', 'digits')
    assert not (tmp_path / 'out').exists()
    more = ['--data', 'digits', '--max-loss', '100', '--held-out', '30', '--images', '3']
    main([*map(str, args), *more])
    assert 'top-1 accuracy on 30 validation images' in capsys.readouterr().out
    assert [path.name for path in files(tmp_path / 'out')] == ['ddnn_resnet20-8-int8.onnx']
    graph = onnx.load(tmp_path / 'out' / 'ddnn_resnet20-8-int8.onnx').graph
    integers = [onnx.numpy_helper.to_array(t) for t in graph.initializer if len(t.dims) == 4]
    assert all(w.dtype == np.int8 and np.abs(w).max() <= 64 for w in integers) and len(integers) == 7
