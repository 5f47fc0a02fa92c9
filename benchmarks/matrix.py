"""The runs whose results are compared: methods, and variants by which the options of EKD were chosen."""
from functools import cache
from itertools import product
from typing import NamedTuple

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from timm_ddnn.utils.modules import eval_mode
from timm_ddnn_cli.arguments import parse_blocks

LOADER = '--in-memory', '-j', '0'
RECIPE = {'--mixed-precision': 'bf16', '-b': '128', '--lr': '0.4', '--weight-decay': '5e-4', '--warmup-epochs': '2'}
# A short schedule on images of 64 px, of which there are maps of 16, 8, 4 and 2; nothing was tuned
CONVNEXT = {
    '--mixed-precision': 'no', '-b': '64', '--opt': 'adamw', '--lr': '1e-3', '--weight-decay': '0.05', '--epochs': '24',
    '--warmup-epochs': '3', '--img-size': '64'}
CE_ONLY = {'--alpha': '0', '--beta': '0'}


class Run(NamedTuple):
    """A training run. `options` maps flags to their values; `teacher` is a run of the same experiment."""

    name: str
    data: str
    seed: int
    options: dict[str, str]
    teacher: str | None = None
    truncate: bool = False

    def identity(self):
        """What must be the same in all that is kept of a run."""
        return {'run': self.name, 'teacher': self.teacher, 'options': {'--seed': str(self.seed), **self.options}}


def compare(experiment, model, data, recipe, methods, seeds):
    """Make the runs of the methods that are compared.

    Args:
        experiment: Name of the experiment.
        model: Name of the dynamic-depth model.
        data: Name of the data set.
        recipe: Options that all methods have in common.
        methods: Methods, see below.
        seeds: Number of seeds by method.
    """
    taught = 'kd', 'kd_shared', 'kd_shared_weighted', 'truncation'
    runs = []
    for method in methods:
        options = METHODS.get(method, {})
        cut = METHODS['ekd_late'] if method == 'alone_late' else options
        subnets = [parse_blocks(blocks) for blocks in cut.get('--subnets', '').split()]
        net = timm.create_model(model, device='meta', **({'subnets': subnets} if subnets else {}))
        single = {
            depth: {'--subnets': '', '--model-kwargs': f'{net.depth_argument}={",".join(map(str, net.blocks(depth)))}'}
            for depth in net.depths
        }
        if method == 'alone':
            named = {f'alone-{depth}': single[depth] | CE_ONLY for depth in net.depths}
        elif method == 'alone_late':
            named = {f'alone_late-{depth}': single[depth] | CE_ONLY for depth in net.depths[1:]}
        elif method == 'kd':
            named = {f'kd-{depth}': single[depth] | KD for depth in net.depths[1:]}
        elif method == 'kd_deep':
            named = {f'kd_deep-{depth}': single[depth] | KD_DEEP for depth in net.depths}
        else:
            weights = weigh(net.depths, *SUBNET_WEIGHTS[method]) if method in SUBNET_WEIGHTS else {}
            named = {method: options | weights}
        for seed, (name, options) in product(range(seeds.get(method, 1)), named.items()):
            runs.append(Run(
                f'{experiment}/{name}-{seed}',
                data,
                seed,
                {'--model': model, **recipe, **options},
                teacher=f'{experiment}/alone-{net.depths[0]}-{seed}' if method in taught else None,
                truncate=method == 'truncation',
            ))
    return runs


def forward_macs(model, depth, size=(3, 32, 32)):
    """Count the multiply-accumulates of one image at a depth, or at several at once."""
    image = torch.zeros(1, *size, device=next(model.parameters()).device)
    with eval_mode(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image, depth=depth)
    return counter.get_total_flops() // 2


def weigh(depths, middle, shallow):
    """Make the option that weighs the sub-nets: the shallowest has least in common with the others, so most weight."""
    *others, last = depths[1:]
    return {'--weights': ' '.join([*(f'{depth}={middle}' for depth in others), f'{last}={shallow}'])}


# The loss of each method; what is known of their choice is in results/README.md.
KD = {'--alpha': '1', '--temperature': '4'}
KD_SHARED = KD | {'--beta': '0'}
KD_DEEP = KD_SHARED | {'--teacher': 'ddnn_resnet56.ekd_cifar10'}
EKD = {'--alpha': '0.3', '--beta': '0.1', '--attention': 'energy', '--stages': '-1'}
EMA_TEACHER = KD | {
    '--model-ema': None, '--model-ema-decay': '0.99', '--model-ema-warmup': None, '--ema-teacher': None}
METHODS = {
    'joint': CE_ONLY,
    'kd_shared': KD_SHARED,
    'kd_shared_weighted': KD_SHARED,
    'kd_shared_deep': KD_DEEP,
    'kd_shared_deep_private': KD_DEEP | {'--private': 'affine'},
    'ekd': EKD,
    'kl': {'--alpha': EKD['--alpha'], '--beta': '0'},
    'attention': EKD | {'--alpha': '0'},
    'kl_only': {'--subnet-ce': '0', '--alpha': '1', '--temperature': '1', '--beta': '0'},
    'truncation': {},
    'ekd_equal': EKD,
    'ekd_private': EKD | {'--private': 'affine'},
    'ekd_light': EKD,
    'ekd_ema_teacher': EKD | EMA_TEACHER,
    'ekd_late': EKD | {'--subnets': '3,2,1 2,1,1'},
    'joint_weighted': CE_ONLY,
}
# Weights of their sub-nets, see `weigh`; of the other methods all are 1.
WEIGHTED = (
    'kd_shared_weighted', 'kd_shared_deep', 'kd_shared_deep_private', 'ekd', 'kl', 'attention', 'ekd_private',
    'ekd_late', 'joint_weighted')
SUBNET_WEIGHTS = dict.fromkeys(WEIGHTED, ('0.25', '0.75')) | {'ekd_light': ('0.05', '0.15')}

# What options are to be chosen by: (question, variant that is changed, {name: what is changed})
SINGLE = CE_ONLY | {'--subnets': ''}
UNEVEN = weigh((20, 14, 8), *SUBNET_WEIGHTS['ekd'])
HALF_WEIGHTS = weigh((20, 14, 8), '0.5', '0.5')
START = {'warmup_4': {'--warmup-epochs': '4'}, 'clip_1': {'--clip-grad': '1'}}
FEW = {'--train-split': 'few', '--epochs': '60', '--warmup-epochs': '6'}
AVERAGE = KD | {'--average-teacher': '0.998'}
DEEPER = {'--model': 'ddnn_resnet44'}
ABLATIONS = [
    ('Which terms', None, {
        'alone_20': SINGLE,
        'alone_14': SINGLE | {'--model-kwargs': 'layers=2,2,2'},
        'alone_8': SINGLE | {'--model-kwargs': 'layers=1,1,1'},
        'joint': CE_ONLY, 'kl': METHODS['kl'], 'attention': METHODS['attention'], 'ekd': EKD,
        'kl_only': METHODS['kl_only'],
    }),
    ('Learning rate', 'alone_20', {'lr_0.2': {'--lr': '0.2'}}),
    ('Learning rate', 'joint', {'lr_0.2': {'--lr': '0.2'}}),
    ('Learning rate', 'ekd', {'lr_0.2': {'--lr': '0.2'}}),
    ('Start of training', 'alone_20', START),
    ('Start of training', 'joint', START),
    ('Scale and shift', 'joint', {'private': {'--private': 'affine'}}),
    ('Scale and shift', 'ekd', {'private': {'--private': 'affine'}}),
    ('Weight of the sub-nets', 'ekd', {
        'half_weights': HALF_WEIGHTS,
        'half_weights_alpha_1': HALF_WEIGHTS | {'--alpha': '1'},
        'uneven_weights': UNEVEN,
        'uneven_weights_alpha_1': UNEVEN | {'--alpha': '1'},
        'light_weights_soft': weigh((20, 14, 8), '0.1', '0.3') | KD,
        'sampled': {'--sample': None},
    }),
    ('Weight of the sub-nets', 'joint', {'uneven_weights': UNEVEN}),
    ('Weight and temperature of the KL divergence', 'kl', {
        '1': {'--alpha': '1'}, 't_2': {'--temperature': '2'}, 't_4': {'--alpha': '0.1', '--temperature': '4'},
    }),
    ('Weight of the KL divergence', 'ekd', {'alpha_1': {'--alpha': '1'}}),
    ('Weight of the attention', 'ekd', {
        'beta_0.03': {'--beta': '0.03'}, 'beta_0.3': {'--beta': '0.3'}, 'beta_1': {'--beta': '1'},
    }),
    ('Form and stages of the attention', 'ekd', {
        'standardized': {'--attention': 'standardized'},
        'all_stages': {'--stages': '0 1 2'},
        'standardized_all_stages': {'--attention': 'standardized', '--stages': '0 1 2'},
    }),
    ('Linear growth of the terms in the first half', 'ekd', {'ramp': {'--ramp-updates': '460'}}),
    ('Average of the weights as the teacher', 'ekd', {
        'average': AVERAGE,
        'average_kl_only': AVERAGE | {'--subnet-ce': '0'},
        'average_weighted': AVERAGE | weigh((20, 14, 8), '0.25', '0.5'),
        'ema_teacher': EMA_TEACHER,
    }),
    ('5,000 images, 60 epochs', None, {
        'few_alone_20': SINGLE | FEW,
        'few_alone_14': SINGLE | FEW | {'--model-kwargs': 'layers=2,2,2'},
        'few_alone_8': SINGLE | FEW | {'--model-kwargs': 'layers=1,1,1'},
        'few_alone_ema_20': SINGLE | FEW | EMA_TEACHER,
        'few_alone_ema_14': SINGLE | FEW | EMA_TEACHER | {'--model-kwargs': 'layers=2,2,2'},
        'few_alone_ema_8': SINGLE | FEW | EMA_TEACHER | {'--model-kwargs': 'layers=1,1,1'},
        'few_joint': CE_ONLY | FEW,
        'few_ekd': EKD | FEW,
        'few_ekd_ema_teacher': EKD | FEW | EMA_TEACHER,
        'few_kd_shared': KD_SHARED | FEW,
    }),
    ('5,000 images, 60 epochs, a deeper net', None, {
        'few_44_alone_44': SINGLE | FEW | DEEPER,
        'few_44_alone_32': SINGLE | FEW | DEEPER | {'--model-kwargs': 'layers=5,5,5'},
        'few_44_joint': CE_ONLY | FEW | DEEPER,
        'few_44_ekd': EKD | FEW | DEEPER,
    }),
    ('Number of sub-nets and where they are cut', None, {
        'alone_late_14': SINGLE | {'--model-kwargs': 'layers=3,2,1'},
        'alone_late_10': SINGLE | {'--model-kwargs': 'layers=2,1,1'},
    }),
    ('Number of sub-nets and where they are cut', 'ekd', {
        'one_subnet': {'--subnets': '1,1,1'},
        'three_subnets': {'--subnets': '3,3,2 2,2,2 1,1,1'},
        'cut_late': {'--subnets': '3,2,1 2,1,1'},
    }),
]
# More than the others have: runs of an earlier version, the full-net alone in the first updates, had as many
SEEDS = {
    **dict.fromkeys(('few_alone_20', 'few_alone_14', 'few_alone_8', 'few_kd_shared'), 6),
    **dict.fromkeys(('few_44_alone_44', 'few_44_alone_32'), 4),
}
ABLATION_RECIPE = {'--model': 'ddnn_resnet20', **RECIPE, '--epochs': '8'}


def ablations(seeds):
    """Make the runs by which the options were chosen, on images of the training split only.

    Args:
        seeds: Number of seeds of what is not in `SEEDS`.
    """
    variants = {}
    for _, base, changes in ABLATIONS:
        for name, options in changes.items():
            variants[f'{base}_{name}' if base else name] = (variants[base] if base else ABLATION_RECIPE) | options
    return [
        Run(
            f'ablations/{name}-{seed}', 'cifar10_part', seed, options,
            teacher=f'ablations/few_alone_20-{seed}' if name == 'few_kd_shared' else None)
        for seed in range(max(seeds, *SEEDS.values())) for name, options in variants.items()
        if seed < SEEDS.get(name, seeds)
    ]


def equal_cost(model, epochs, common, channels=(), size=(3, 32, 32)):
    """Make the rows of results/PROTOCOL.md, each of the epochs that training every depth alone pays for.

    Args:
        model: Name of the dynamic-depth model.
        epochs: Epochs of a depth alone.
        common: Options that all rows have in common, without rate and decay.
        channels: Channels per stage, the model's if none.
        size: Size of an image, (C, H, W).

    Returns:
        By row its options, and the row that teaches if there is one.
    """
    net = timm.create_model(model, device='meta', **({'channels': channels} if channels else {}))
    full, *subnets = net.depths
    macs, together = {depth: forward_macs(net, depth, size) for depth in net.depths}, forward_macs(net, 'all', size)
    budget = 3 * epochs * sum(macs.values())

    def train(epochs, depth=None):
        kwargs = {'channels': channels, 'layers': () if depth in (None, full) else net.blocks(depth)}
        kwargs = ' '.join(f'{name}={",".join(map(str, value))}' for name, value in kwargs.items() if value)
        return {
            '--model': model, **common, '--epochs': str(int(epochs)), '--warmup-epochs': str(round(int(epochs) / 10)),
            **({'--model-kwargs': kwargs} if kwargs else {}),
            **({} if depth is None else CE_ONLY | {'--subnets': ''}),
        }

    one_by_one = budget / (3 * sum(macs.values()) + len(subnets) * macs[full])  # a frozen teacher runs once
    at_once = train(budget / (3 * together))
    first = 2 * epochs // 5
    then = train((budget - 3 * first * macs[full]) / (3 * together + macs[full]))
    mean = {'--weights': ' '.join(f'{depth}={1 / len(subnets):.3g}' for depth in subnets)} if subnets[1:] else {}
    return {
        **{f'alone_{depth}': (train(epochs, depth), None) for depth in net.depths},
        f'kd_{full}': (train(one_by_one, full), None),
        **{f'kd_{depth}': (train(one_by_one, depth) | KD, f'kd_{full}') for depth in subnets},
        'joint': (at_once | CE_ONLY, None),
        'ekd': (at_once | EKD, None),
        'adn': (at_once | METHODS['kl_only'] | mean, None),
        'ekd_averaged': (train(budget / (3 * together + macs[full])) | METHODS['ekd_ema_teacher'], None),
        # The full-net alone before; its frozen copy then teaches all depths, which start from it
        'full_first': (then | KD_SHARED | {'--full-net-epochs': str(first), '--frozen-teacher': None}, None),
        **{f'private_{kind}': (at_once | EKD | {'--private': kind}, None) for kind in ('affine', 'classifier', 'conv')},
    }


# For SGD, half the rate and twice the decay is half the loss. At two depths the weights of the losses sum to 2 in joint
# and ADN, to 2.3 in EKD, and to 4 in full_first.
RATES = (
    ('0.1', '5e-4'), ('0.05', '1e-3'), ('0.1', '1e-3'), ('0.05', '5e-4'), ('0.1', '2e-3'), ('0.1', '4e-3'),
    ('0.1', '8e-3'))
# Decay of the rows at a rate of 0.1, chosen by results/tuning; a regime that has none here is not judged yet
CHOSEN = {'': {'alone_18': '8e-3', 'alone_10': '4e-3', 'ekd': '4e-3'}}


@cache
def regimes():
    """Make the rows of the regimes of results/PROTOCOL.md, without rate and decay: by prefix, data and rows."""
    common = {'--mixed-precision': 'no', '-b': '128'}
    few = {**common, '-b': '64'}
    half = equal_cost('ddnn_cifar_resnet18', 60, common, channels=(32, 64, 128, 256))
    small = equal_cost('ddnn_resnet20', 15, common)
    return {
        '': ('cifar10_2500', equal_cost('ddnn_cifar_resnet18', 40, few, channels=(16, 32, 64, 128))),  # C
        'cifar100_': ('cifar100_10k', half),  # A.1
        'cifar10_': ('cifar10_10k', half),
        'photos_': ('photos', equal_cost('ddnn_resnet34', 60, few | {'--img-size': '96'}, size=(3, 96, 96))),  # A.2
        'resnet20_cifar100_': ('cifar100', small),  # B
        'resnet20_cifar10_': ('cifar10', small),
    }


def tuning():
    """Make the runs by which options are chosen before a judged run, by seed 0, and 100 and 101: results/tuning."""
    runs = []
    for (prefix, (data, rows)), seed in product(regimes().items(), (0, 100, 101)):
        for row, (options, teacher) in rows.items():
            for lr, decay in RATES:
                rate = {'--lr': lr, '--weight-decay': decay}
                runs.append(Run(
                    f'tuning/{prefix}{row}_lr_{lr}_wd_{decay}-{seed}', f'{data}_tuning', seed, options | rate,
                    teacher=f'tuning/{prefix}{teacher}_lr_{lr}_wd_{decay}-{seed}' if teacher else None))
    return runs


def judged():
    """Make the judged runs of the regimes whose decays are chosen."""
    runs = []
    for prefix, chosen in CHOSEN.items():
        data, rows = regimes()[prefix]
        runs += [
            Run(f'promise_{data}/{row}-{seed}', f'{data}_judged', seed,
                rows[row][0] | {'--lr': '0.1', '--weight-decay': decay})
            for seed in (1, 2, 3, 4, 5) for row, decay in chosen.items()]
    return runs


def gpu():
    """Make runs on CIFAR-100 for a GPU: nets of three depths that fit their data, and the smaller ones of the paper."""
    common = {'--mixed-precision': 'bf16', '-b': '128', '--torchcompile': 'inductor'}
    half = equal_cost('ddnn_cifar_resnet34', 100, common, channels=(32, 64, 128, 256))
    small = equal_cost('ddnn_resnet56', 100, common)
    runs = []
    for seed, (name, rows) in product((1, 2, 3), (('cifar_resnet34', half), ('resnet56', small))):
        wanted = {row for row in rows if row.startswith('alone_')} | {'ekd', 'full_first', 'ekd_averaged'}
        runs += [
            Run(f'cifar100_{name}/{row}-{seed}', 'cifar100_judged', seed,
                rows[row][0] | {'--lr': '0.1', '--weight-decay': '5e-4'})
            for row in rows if row in wanted]
    return runs


def tags():
    """Make the runs that become tags, of a seed that was fixed before."""
    recipe = {'--model': 'ddnn_cifar_resnet18_025', '--mixed-precision': 'no', '-b': '64', '--lr': '0.1', **EKD}
    many = {'--weight-decay': '5e-4', '--epochs': '8', '--warmup-epochs': '1'}
    few = {'--weight-decay': '4e-3', '--epochs': '30', '--warmup-epochs': '3', '--img-size': '64'}
    return [
        Run(f'tags/ekd_{data}-0', f'{data}_judged', 0, recipe | options)
        for data, options in (('cifar100', many), ('cifar10', many), ('photos', few))]


def all_runs():
    several = (
        'alone', 'kd_shared', 'kd_shared_weighted', 'kd_shared_deep', 'kd_shared_deep_private', 'joint', 'ekd',
        'ekd_private', 'ekd_ema_teacher', 'alone_late', 'ekd_late')
    seeds = dict.fromkeys(several, 3)
    small = {**RECIPE, '--epochs': '15', '--warmup-epochs': '3'}
    deep = {**RECIPE, '--epochs': '40', '--warmup-epochs': '5', '-b': '256', '--torchcompile': 'inductor'}
    tiny = {**deep, '--epochs': '20', '--warmup-epochs': '3', '--img-size': '64'}
    main = 'alone', 'kd', 'kd_shared', 'kd_shared_weighted', 'joint', 'ekd', 'ekd_ema_teacher'
    only_shallow = 'alone_late', 'ekd_late', 'kd_deep', 'kd_shared_deep', 'kd_shared_deep_private'
    cut_alike = 'alone', 'kd', *(method for method in METHODS if method not in only_shallow)
    runs = [
        *compare('cifar10_resnet20', 'ddnn_resnet20', 'cifar10', small, (*cut_alike, *only_shallow), seeds),
        *compare('cifar10_resnet56', 'ddnn_resnet56', 'cifar10', deep, cut_alike, seeds),
        *compare('tiny_imagenet_resnet34', 'ddnn_resnet34', 'tiny_imagenet', tiny, main, {}),
        *compare('tiny_imagenet_resnet50', 'ddnn_resnet50', 'tiny_imagenet', tiny | {'--epochs': '15'}, main, {}),
        *compare('photos_convnext_atto', 'ddnn_convnext_atto', 'photos_judged', CONVNEXT, ('alone', 'ekd'), {}),
        *ablations(seeds=3),
        *tuning(),
        *judged(),
        *gpu(),
        *tags(),
    ]
    return {run.name: run for run in runs}
