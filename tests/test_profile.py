"""What `timm-ddnn profile` measures, writes and draws."""
import copy
import json
import subprocess
import time
import weakref

import onnx
import pytest
import timm
import torch
from helpers.models import create, images
from helpers.saved_model import failing
from PIL import Image
from torch import nn

from timm_ddnn.deploy import peak_memory, plots, profile_file
from timm_ddnn.deploy import profile as profiling
from timm_ddnn.deploy.choose import read_profile, select_depth
from timm_ddnn.deploy.export import export
from timm_ddnn.deploy.peak_memory import measure_memory
from timm_ddnn.deploy.plots import plot_profile
from timm_ddnn.deploy.profile import profile_model
from timm_ddnn.hub.save import save_model
from timm_ddnn.models.ddnn_resnet import WEIGHTS
from timm_ddnn.models.dynamic_depth import DynamicDepthMixin
from timm_ddnn.utils.errors import InputError
from timm_ddnn_cli.main import main

TAG = 'ddnn_resnet20.ekd_cifar10'


@pytest.fixture
def tiny():
    return create('ddnn_resnet20', channels=(4, 8, 16))


@pytest.fixture
def known_memory(monkeypatch):
    """Memory without the processes that measure it, which take seconds to start; -> what they were asked for."""
    asked = []

    def measure(net, *, batch_sizes, **kwargs):
        asked.append({'parameters': sum(p.numel() for p in net.parameters()), 'batch_sizes': batch_sizes, **kwargs})
        return {batch_size: 10 ** 6 * batch_size + len(asked) for batch_size in batch_sizes}
    monkeypatch.setattr(profiling, 'measure_memory', measure)
    return asked


@pytest.fixture
def calls(monkeypatch):
    """Depth, batch size and threads of every forward of a dynamic model, each of which takes at least depth ms."""
    made = []
    forward = DynamicDepthMixin.forward

    def slow(self, x, depth=None):
        made.append((depth, len(x), torch.get_num_threads()))
        time.sleep(depth / 1000)
        return forward(self, x, depth=depth)
    monkeypatch.setattr(DynamicDepthMixin, 'forward', slow)
    return made


def count_macs(net, size):
    """Multiply-accumulates of a plain net, from the shapes that pass through its layers."""
    macs = []

    def hook(module, inputs, output):
        if isinstance(module, nn.Conv2d):
            kernel = module.kernel_size[0] * module.kernel_size[1]
            macs.append(output[0].numel() * module.in_channels // module.groups * kernel)
        else:
            macs.append(module.in_features * module.out_features)

    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(hook)
    net.eval()(torch.zeros(1, 3, size, size))
    return sum(macs)


# Measurement

def test_every_combination_is_measured(tiny, known_memory):
    """Catches a combination left out or doubled, costs of another depth or batch, and a change of the user's model."""
    before = copy.deepcopy(tiny.train().state_dict())
    profile = profile_model(
        tiny, depths=(20, 8), batch_sizes=(3, 1), threads=(1,), rounds=4, img_size=24, accuracies={20: 90.0, 14: 8.0})
    settings = [(m['depth'], m['batch_size'], m['threads'], m['runtime']) for m in profile['measurements']]
    assert settings == [(depth, batch, 1, 'eager') for batch in (3, 1) for depth in (20, 8)]
    for m in profile['measurements']:
        assert 0 < m['median_ms'] <= m['p90_ms'] and m['runs'] == 4 and m['compile_s'] is None
        assert m['memory_mb'] == m['batch_size'] + (1 if m['depth'] == 20 else 2) / 1e6
    for row, asked in zip(profile['depths'], known_memory, strict=True):
        plain = tiny.extract(row['depth'])
        assert row['macs'] == count_macs(plain, 24)
        assert row['parameters'] == asked['parameters'] == sum(p.numel() for p in plain.parameters())
    assert [row['depth'] for row in profile['depths']] == [20, 8]
    assert [row.get('top1') for row in profile['depths']] == [90.0, None]
    assert profile['input_size'] == [3, 24, 24] and profile['trained_depths'] == []
    assert profile['versions']['torch'] == torch.__version__
    assert tiny.training and all(torch.equal(value, before[name]) for name, value in tiny.state_dict().items())


def test_depths_take_turns_and_latency_is_theirs(tiny, known_memory, calls):
    """Catches depths that are measured one after another, latency in seconds, and that of another depth."""
    threads = torch.get_num_threads()
    profile = profile_model(tiny, batch_sizes=(2,), threads=(1,), rounds=5)
    measured = [depth for depth, batch, _ in calls if batch == 2]
    turns = [20, 14, 8] + [depth for _ in range(5) for depth in (20, 14, 8) for _ in range(3)]
    assert measured == turns
    for m in profile['measurements']:
        assert m['depth'] <= m['median_ms'] < 1000
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize('fails', [False, True])
def test_threads_are_those_asked_for_and_restored(fails, tiny, known_memory, calls, monkeypatch):
    """Catches a number of threads that stays, also after an error, or that is not set."""
    counts = []
    monkeypatch.setattr(torch, 'set_num_threads', counts.append)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: counts[-1] if counts else 7)
    monkeypatch.setattr(profiling.os, 'cpu_count', lambda: 8)
    if fails:
        def forward(self, x, depth=None):
            if len(x) == 2:
                raise torch.OutOfMemoryError('there is no memory\nfor that')
            return torch.zeros(len(x), 10)
        monkeypatch.setattr(DynamicDepthMixin, 'forward', forward)
        with pytest.raises(InputError, match=r'for depth 20, eager, batch of 2, threads: 3: there is no memory$'):
            profile_model(tiny, batch_sizes=(2,), threads=(3, 5), rounds=1)
    else:
        profile_model(tiny, batch_sizes=(2,), threads=(3, 5), rounds=1)
        assert [count for _, batch, count in calls if batch == 2] == [3] * 12 + [5] * 12
        assert [asked['threads'] for asked in known_memory] == [5, 5, 5]
    assert torch.get_num_threads() == 7


def test_a_bug_is_not_taken_for_too_little_memory(tiny, known_memory, monkeypatch):
    """Catches an error of the program that is reported as if the machine were too small."""
    def forward(self, x, depth=None):
        if len(x) == 2:
            raise RuntimeError('planted')
        return torch.zeros(len(x), 10)
    monkeypatch.setattr(DynamicDepthMixin, 'forward', forward)
    with pytest.raises(RuntimeError, match='planted'):
        profile_model(tiny, batch_sizes=(2,), threads=(1,), rounds=1)


def test_onnx_files_are_the_depths(tiny, known_memory, tmp_path):
    """Catches a file of another depth or batch size than its name says, read by ONNX Runtime."""
    onnxruntime = pytest.importorskip('onnxruntime')
    x = images(tiny, batch=3, size=32)
    logits = {depth: tiny(x, depth=depth) for depth in (20, 8)}
    assert not torch.allclose(logits[20], logits[8], atol=1e-2)
    files = profiling._export(tiny.extract(8), tmp_path / '8', (3, 32, 32), (1, 3))
    session = onnxruntime.InferenceSession(files[3])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert torch.allclose(torch.from_numpy(found), logits[8], atol=1e-4)
    assert onnxruntime.InferenceSession(files[1]).get_inputs()[0].shape == [1, 3, 32, 32]


def test_onnx_runtime_is_measured(tiny, known_memory, calls):
    """Catches a runtime whose name stands on latencies of PyTorch, and memory that is measured without its files."""
    pytest.importorskip('onnxruntime')
    profile = profile_model(
        tiny, depths=(8,), runtimes=('onnxruntime',), batch_sizes=(5,), threads=(1,), rounds=2)
    assert not [call for call in calls if call[1] == 5]
    assert [m['runtime'] for m in profile['measurements']] == ['onnxruntime']
    assert all(asked['onnx_files'].keys() == {5} for asked in known_memory)
    assert profile['versions']['onnxruntime']


@pytest.mark.slow
def test_compiled_depths_are_compiled_once(tiny, known_memory):
    """Catches code that is compiled again in a round, or not at all, or whose compilation counts as latency."""
    torch._dynamo.utils.counters.clear()
    profile = profile_model(tiny, runtimes=('compiled',), batch_sizes=(1, 2), threads=(1,), rounds=3)
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == 2 * 3
    for m in profile['measurements']:
        assert m['compile_s'] > m['p90_ms'] / 1000


@pytest.mark.slow
def test_memory_is_that_of_the_net_alone():
    """Catches memory that is that of the libraries or of this process, kilobytes for bytes, and a forgotten batch."""
    net = create('ddnn_resnet20').extract(8)
    ballast = torch.ones(2 ** 27)  # 512 MiB in this process
    peaks = measure_memory(net, runtime='eager', input_size=(3, 64, 64), batch_sizes=(64, 1), threads=1)
    feature_map = 4 * 64 * 16 * 64 * 64
    # Input of a block, output of its first convolution, and that normalized: at least two are there at once. An
    # allocator may keep several times that, but not the 512 MiB of this process.
    assert 2 * feature_map < peaks[64] - peaks[1] < 16 * feature_map
    assert 4 * sum(p.numel() for p in net.parameters()) < peaks[1] < 64e6
    assert ballast.sum() > 0


@pytest.mark.slow
@pytest.mark.parametrize('runtime', ['eager', 'compiled', 'onnxruntime'])
def test_memory_has_the_weights_in_it(runtime, tmp_path):
    """Catches a net without its weights, which of depth 18 and 10 are 45 and 20 MB, or with those of all depths."""
    model = timm.create_model('ddnn_resnet18', num_classes=10)
    peaks, weights = {}, {}
    for depth in (18, 10):
        net = model.extract(depth)
        files = None
        if runtime == 'onnxruntime':
            files = profiling._export(net, tmp_path / str(depth), (3, 64, 64), (1,))
        peaks[depth] = measure_memory(
            net, runtime=runtime, input_size=(3, 64, 64), batch_sizes=(1,), threads=1, onnx_files=files)[1]
        weights[depth] = 4 * sum(p.numel() for p in net.parameters())
        assert peaks[depth] > weights[depth]
    # ONNX Runtime holds the file's weights and its own arrangement of them, three times in all when it was tried
    assert 0.5 < (peaks[18] - peaks[10]) / (weights[18] - weights[10]) < 5


def test_memory_of_onnx_runtime_is_that_of_one_batch_size(monkeypatch):
    """Catches sessions of several batch sizes that are held at once, and count together."""
    held, most = weakref.WeakSet(), []

    class Session:
        def __call__(self, images):
            most.append(len(held))

    def open_file(path, threads):
        session = Session()
        held.add(session)
        return session

    monkeypatch.setattr(peak_memory, 'onnx_function', open_file)
    task = {'threads': torch.get_num_threads(), 'runtime': 'onnxruntime', 'inputs': [[1, 3, 8, 8], [2, 3, 8, 8]]}
    assert len(peak_memory._main(task | {'files': ['1.onnx', '2.onnx']})) == 2
    assert {*most} == {1}


@pytest.mark.parametrize(('status', 'stderr', 'kind', 'message'), [
    (peak_memory._EXIT_NO_MEMORY, '', InputError, 'memory must be larger for cifar_resnet8 with batches of 2 images'),
    (-9, 'Killed', InputError, 'memory must be larger'),
    (1, 'Traceback\nKeyError: planted', RuntimeError, 'status 1:\nTraceback\nKeyError: planted'),
])
def test_a_measuring_process_that_fails_is_told(status, stderr, kind, message, tiny, monkeypatch):
    """Catches too little memory that looks like a bug, and a bug that looks like too little memory."""
    run = subprocess.CompletedProcess([], status, '', stderr)
    monkeypatch.setattr(peak_memory.subprocess, 'run', lambda *args, **kwargs: run)
    with pytest.raises(RuntimeError if kind is RuntimeError else InputError, match=message) as error:
        measure_memory(tiny.extract(8), runtime='eager', input_size=(3, 32, 32), batch_sizes=(1, 2), threads=1)
    assert type(error.value) is kind


@pytest.mark.parametrize(('make', 'expected'), [
    (lambda: torch.empty(10 ** 15), True), (lambda: bytearray(10 ** 15), True), (lambda: torch.zeros(2, -1), False),
])
def test_too_little_memory_is_told_from_other_errors(make, expected):
    """Catches an allocator's error that is not known."""
    with pytest.raises((RuntimeError, MemoryError)) as error:
        make()
    assert peak_memory.is_out_of_memory(error.value) is expected


def test_a_model_built_with_a_class_is_named():
    """Catches a traceback for arguments that another process cannot be told."""
    with pytest.raises(InputError, match=r'numbers, strings and lists of them, got .*SiLU'):
        profile_model(create('ddnn_resnet20', act_layer=nn.SiLU))


def test_a_model_of_grey_images_is_profiled(known_memory):
    """Catches images of three channels for a model of one."""
    profile = profile_model(create('ddnn_resnet20', channels=(4, 8, 16), in_chans=1), img_size=16, rounds=1)
    assert profile['input_size'] == [1, 16, 16] and len(profile['measurements']) == 3


@pytest.mark.parametrize('kwargs, message', [
    ({'depths': (21,)}, r'\(20, 14, 8\)'),
    ({'batch_sizes': (1, 0)}, r'\[1\] in batch_sizes must be an integer from 1'),
    ({'batch_sizes': ()}, 'batch_sizes'), ({'batch_sizes': (1.5,)}, 'batch_sizes'),
    ({'threads': (0,)}, 'threads'),
    ({'threads': (10 ** 6,)}, r'\[0\] in threads must be an integer from 1 to'),
    ({'img_size': 10 ** 6}, 'img_size must be an integer from 1 to 4096'),
    ({'rounds': 0}, 'rounds'),
    ({'runtimes': ('eager', 'tflite')}, 'eager, compiled, onnxruntime'),
    ({'device': 'tpu'}, "got 'tpu'"),
    ({'device': 'cuda:99'}, "got 'cuda:99'"),
    ({'device': 'meta'}, "got 'meta'"),
])
def test_wrong_arguments_are_refused_before_anything_runs(kwargs, message, tiny, known_memory, calls):
    """Catches an argument that is wrong and noticed after minutes, or never."""
    with pytest.raises(ValueError, match=message):
        profile_model(tiny, **kwargs)
    assert not calls and not known_memory


# Command and files

def test_command_writes_what_choose_reads(known_memory, tmp_path, monkeypatch, capsys):
    """Catches files that other programs cannot read, a default path that the next command misses, and mixed output."""
    monkeypatch.chdir(tmp_path)
    main(['profile', 'ddnn_resnet32', '--rounds', '2', '--batch-sizes', '1', '2', '--threads', '1'])
    out = capsys.readouterr().out
    assert 'not trained' in out and 'output/profile: profile.json profile.png' in out
    assert sorted(path.name for path in tmp_path.glob('output/profile/*')) == ['profile.json', 'profile.png']
    with Image.open('output/profile/profile.png') as picture:
        picture.load()
        assert picture.format == 'PNG' and len(picture.convert('RGB').getcolors(2 ** 24)) > 10
    written = json.loads((tmp_path / 'output/profile/profile.json').read_text())
    assert written['model'] == 'ddnn_resnet32'
    assert written == read_profile('output/profile/profile.json')
    assert select_depth(written, latency_ms=1e9).depth == 32
    for m in written['measurements']:
        assert f'{m["median_ms"]:.2f}' in out
    main(['choose', '--latency-ms', '1e9', '--json'])
    assert json.loads(capsys.readouterr().out)['depth'] == 32
    main(['profile', 'ddnn_resnet32', '--rounds', '1', '--depths', '8', '--threads', '1', '--json'])
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / 'output/profile/profile.json').read_text())
    assert [row['depth'] for row in printed['depths']] == [8]


def test_weights_that_come_with_the_library_are_profiled_with_their_accuracy(known_memory, capsys, tmp_path):
    """Catches a tag whose accuracies are known and do not reach the profile."""
    for name, tag in ('ddnn_resnet20', 'ddnn_resnet20.kd_cifar10'), (TAG, TAG):  # the default, and another
        main(['profile', name, '--rounds', '1', '--threads', '1', '--output', str(tmp_path), '--json'])
        profile, kept = json.loads(capsys.readouterr().out), json.loads((WEIGHTS / tag / 'config.json').read_text())
        assert [row['top1'] for row in profile['depths']] == [row['top1'] for row in kept['depths']]
        assert profile['trained_depths'] == [20, 14, 8]


def test_accuracies_of_another_size_of_images_are_left_out(known_memory, caplog):
    """Catches the latency of large images beside the accuracy of small ones."""
    profile = profiling.profile_saved(TAG, img_size=16, rounds=1)
    assert not any('top1' in row for row in profile['depths'])
    assert 'of images [3, 32, 32], not [3, 16, 16]' in caplog.text


@pytest.mark.parametrize('prefix', ['', 'local-dir:'])
def test_accuracy_comes_from_the_saved_model_or_an_evaluation(prefix, tiny, known_memory, tmp_path, capsys):
    """Catches accuracies that are lost, or those of the model where an evaluation is given."""
    config = {'input_size': (3, 32, 32), 'mean': (0.5,) * 3, 'std': (0.5,) * 3}
    rows = [{'depth': depth, 'top1': 50.0 + depth} for depth in tiny.depths]
    (tmp_path / 'model').mkdir()
    save_model(tiny, tmp_path / 'model', data_config=config, class_names=[], rows=rows)
    args = ['profile', f'{prefix}{tmp_path / "model"}', '--rounds', '1', '--threads', '1',
            '--output', str(tmp_path / 'profile'), '--json']
    main(args)
    assert [row['top1'] for row in json.loads(capsys.readouterr().out)['depths']] == [70.0, 64.0, 58.0]
    evaluation = tmp_path / 'evaluation.json'
    evaluation.write_text(json.dumps({'depths': [{'depth': depth, 'top1': depth} for depth in tiny.depths]}))
    main([*args, '--evaluation', str(evaluation)])
    assert [row['top1'] for row in json.loads(capsys.readouterr().out)['depths']] == [20, 14, 8]
    evaluation.write_text(json.dumps({'depths': [{'depth': 20, 'top1': 3}]}))
    with pytest.raises(SystemExit) as error:
        main([*args, '--evaluation', str(evaluation)])
    assert error.value.code == 2 and 'accuracy of depths [14, 8]' in capsys.readouterr().err


@pytest.mark.parametrize('args, message', [
    (['nope'], "got 'nope'"),
    (['local-dir:nowhere'], 'nowhere'),
    (['levit_128'], 'not of LevitDistilled'),
    (['ddnn_resnet20', '--depths', '21'], '(20, 14, 8)'),
    (['ddnn_resnet20', '--batch-sizes', '0'], "got '0'"),
    (['ddnn_resnet20', '--device', 'tpu'], "got 'tpu'"),
    (['ddnn_resnet20', '--evaluation', 'nowhere.json'], 'nowhere.json'),
    (['ddnn_resnet20', '--output', 'file'], 'must be a folder'),
    (['ddnn_resnet20', '--rounds', '1', '--threads', '1'], 'depth 20, eager'),  # which memory_fails lets fail
])
def test_wrong_input_is_one_line_and_leaves_nothing(args, message, monkeypatch, tmp_path, capsys):
    """Catches a traceback, another exit status, and files or folders that stay after an error."""
    def memory_fails(*args, **kwargs):
        raise InputError('memory must be larger for depth 20, eager')
    monkeypatch.setattr(profiling, 'measure_memory', memory_fails)
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'file').touch()
    with pytest.raises(SystemExit) as error:
        main(['profile', *args])
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert error.value.code == 2 and not captured.out
    assert len(lines) == 1 and lines[0].startswith('error: ') and message in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ['file']


# Picture

def points(path, profile, monkeypatch):
    """Draw a profile; -> for each panel its points by label, as (latency, depth), and the names of the depths."""
    figures = []
    save = plots.save_figure
    monkeypatch.setattr(plots, 'save_figure', lambda figure, path: (figures.append(figure), save(figure, path)))
    plot_profile(path, profile)
    with Image.open(path) as picture:
        picture.load()
    depths = [row['depth'] for row in profile['depths']]
    panels = [
        {bars.get_label(): [(x, depths[-round(y)]) for x, y in bars.lines[0].get_xydata()] for bars in axes.containers}
        for axes in figures[0].axes
    ]
    heights = {y for bars in figures[0].axes[0].containers for _, y in bars.lines[0].get_xydata()}
    assert len(heights) == sum(map(len, panels[0].values()))  # none lies on another
    return panels, [label.get_text() for label in figures[0].axes[0].get_yticklabels()]


def test_picture_has_the_latency_of_every_depth(known_memory, tiny, tmp_path, monkeypatch):
    """Catches points of another batch size, depth or runtime, points on each other, and a missing accuracy."""
    accuracies = {20: 92.0, 14: 92.0, 8: 88.0}
    profile = profile_model(tiny, batch_sizes=(1, 4), threads=(1,), rounds=2, accuracies=accuracies)
    profile['measurements'] += [dict(m, threads=2) for m in profile['measurements']]
    panels, names = points(tmp_path / 'a.png', profile, monkeypatch)
    assert names == ['20\n92.00 %', '14\n92.00 %', '8\n88.00 %']
    for panel, batch_size in zip(panels, (1, 4), strict=True):
        assert panel == {
            f'eager, {label}': [
                (m['median_ms'], m['depth']) for m in profile['measurements']
                if (m['batch_size'], m['threads']) == (batch_size, threads)]
            for threads, label in ((1, '1 thread'), (2, '2 threads'))}
    for row in profile['depths']:
        del row['top1']
    assert points(tmp_path / 'b.png', profile, monkeypatch)[1] == ['20', '14', '8']


# A file

@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """Files of all depths and of one, and the model."""
    model = create('ddnn_resnet20', layers=(2, 1, 1), subnets=((1, 1, 1),), channels=(4, 8, 16))
    folder = tmp_path_factory.mktemp('files')
    x, results = images(model), [{'depth': 10, 'top1': 61.5}]
    return model, [
        export(model, depth, folder, format='onnx', images=x, results=results)[0]['file'] for depth in ('all', 8)]


@pytest.mark.slow
def test_memory_of_a_file(exported):
    """Catches depths that the measuring process does not run, or does not understand."""
    several, one = exported[1]
    sizes = dict(input_size=[3, 32, 32], batch_sizes=(1,), threads=1)
    for file, depths in (several, (10, 8)), (several, (8,)), (one, ()):
        assert 0 < peak_memory.measure_memory_file(file, depths, **sizes)[1] < 2 ** 30


def test_profile_of_a_file(exported, tmp_path, capsys, monkeypatch):
    """Catches latency of another depth or a mixture, memory of other depths, and a profile that choose refuses."""
    model, (several, one) = exported
    calls = []
    function = profile_file.onnx_function

    def slow(path, threads):
        compute = function(path, threads)

        def run(images, *depth):
            calls.append((len(images), *depth))
            time.sleep(sum(depth) / 1000)
            return compute(images, *depth)
        return run
    monkeypatch.setattr(profile_file, 'onnx_function', slow)
    monkeypatch.setattr(
        profile_file, 'measure_memory_file', lambda path, depths, **_: {size: sum(depths) * 10 ** 6 for size in (1, 2)})
    main(['profile', '--file', several, '--batch-sizes', '2', '--rounds', '3', '--output', str(tmp_path)])
    assert calls == [(2, depth) for _ in range(5) for depth in (10, 10, 8, 8)]
    printed = capsys.readouterr().out
    assert {'threads', 'switch', 'top-1', 'profile.png'} <= {*printed.split()}  # none is cut off
    profile = read_profile(tmp_path / 'profile.json')
    assert [(m['depth'], m['runs'], m['batch_size']) for m in profile['measurements']] == [(10, 3, 2), (8, 3, 2)]
    for m in profile['measurements']:
        assert m['depth'] < min(m['median_ms'], m['switch_ms']) and m['median_ms'] <= m['p90_ms'] < 1000
        assert (m['memory_mb'], m['memory_all_mb']) == (m['depth'], 18)
    macs = [count_macs(model.extract(depth), 32) for depth in (10, 8)]
    assert [row['macs'] for row in profile['depths']] == macs and profile['depths'][0]['top1'] == 61.5
    assert select_depth(profile, macs=macs[1]).depth == 8
    profile = profile_file.profile_file(one, rounds=2)
    assert [(m['depth'], m['switch_ms']) for m in profile['measurements']] == [(8, None)]
    assert calls[-1] == (1,)


@pytest.mark.parametrize(('args', 'message'), [
    ([], 'either a model or --file must be given, got neither'),
    (['ddnn_resnet20', '--file', '{all}'], 'got both'),
    (['--file', '{all}', '--runtimes', 'eager'], '--runtimes is for a model'),
    (['--file', '{all}', '--depths', '14'], 'depths must be of [10, 8], got [14]'),
    (['--file', '{one}', '--batch-sizes', '2'], 'of one image, got [2]'),
    (['--file', '{t}/none.onnx'], 'there must be an ONNX file'),
    (['--file', '{t}/text.onnx'], 'must be an ONNX file: '),
    (['--file', '{t}/other.onnx'], 'as `timm-ddnn export --format onnx` writes them must be'),
    (['--file', '{t}/larger.onnx'], "must be {'images': [3, 64, 64], 'depth': []} as its metadata say, got"),
    (['--file', '{t}/nested.onnx'], 'depths in metadata of'),
    (['--file', '{t}/twice.onnx'], 'depths[2].depth in metadata of'),
])
def test_wrong_input_of_a_profile_of_a_file(args, message, exported, tmp_path, capsys):
    """Catches tracebacks, options that are passed over, and a file of another producer that is measured."""
    several, one = exported[1]
    (tmp_path / 'text.onnx').write_text('none')
    graph = onnx.load(one)
    del graph.metadata_props[:]
    onnx.save(graph, tmp_path / 'other.onnx')
    for name, key, change in (
        ('larger', 'input_size', lambda value: '[3, 64, 64]'),
        ('nested', 'depths', lambda value: '[' * 100_000),
        ('twice', 'depths', lambda value: json.dumps(json.loads(value) * 2)),
    ):
        graph = onnx.load(several)
        entry, = (entry for entry in graph.metadata_props if entry.key == key)
        entry.value = change(entry.value)
        onnx.save(graph, tmp_path / f'{name}.onnx')
    words = [arg.format(all=several, one=one, t=tmp_path) for arg in args]
    assert message in failing(capsys, 'profile', *words, '--output', tmp_path / 'out')
    assert not (tmp_path / 'out').exists()
