#!/usr/bin/env python3
"""Make the best weights of a method in an experiment a pretrained tag that comes with the library.

    # -> timm_ddnn/models/tags/ddnn_resnet20.ekd_cifar10, and ddnn_resnet20.kd_cifar10
    python benchmarks/make_tag.py FOLDER cifar10_resnet20
    python benchmarks/make_tag.py FOLDER cifar10_resnet20 kd_shared_deep

The best are those of the seed with the highest top-1, mean over depths. Of nets with more than 4 million parameters,
convolutions and classifier are kept in float16. The accuracy of every depth is measured anew with what is kept, in
float32 as `timm-ddnn evaluate` measures it, and stands in config.json. What it measures besides goes to
results/weights/TAG/evaluation.json. `model_card.py` makes MODEL_CARD.md of it, and of the profile.json of

    timm-ddnn profile TAG --batch-sizes 1 --threads 1 --output results/weights/TAG

Whether `pretrained=True` takes the tag is decided in the table of `timm_ddnn/models/ddnn_resnet.py`, by hand.
"""
import json
from pathlib import Path

from experiments import RESULTS, ROW, WORK, check, check_weights, data_folder
from matrix import all_runs
from timm.data import resolve_data_config

from results import load_runs, rank_runs, split_name
from timm_ddnn.evaluation.evaluate import evaluate_model
from timm_ddnn.hub.save import save_model
from timm_ddnn.models.ddnn_resnet import WEIGHTS
from timm_ddnn.models.load import load_model
from timm_ddnn.utils.errors import InputError
from timm_ddnn.utils.files import staged_folder, write_json
from timm_ddnn_cli.arguments import ArgumentParser, run

FLOAT16_FROM = 4_000_000  # parameters


def best_run(experiment, method):
    """Find a method's run in an experiment with the highest top-1, mean over depths, and that its weights are there.

    Raises:
        InputError: If there is no such run, or the weights in its folder are not those whose result was kept.
    """
    runs = load_runs(experiment)
    ranked = rank_runs(runs, method)
    if not ranked:
        raise InputError(f'experiment must be one with results of {method} in {RESULTS}, got {experiment!r}')
    best = runs[ranked[0]]
    run = all_runs()[best['run']]
    check(run, RESULTS / f'{run.name}.json')
    if 'weights_sha256' not in best:
        raise InputError(f'{run.name} must have been kept with the SHA-256 of its weights: run it anew')
    check_weights(run.name)
    return run


def check_place(tag, run):
    """Make sure that a tag does not take the place of another method's.

    Raises:
        InputError: If it does.
    """
    evaluation = RESULTS / 'weights' / tag / 'evaluation.json'
    if evaluation.exists():
        names = json.loads(evaluation.read_text(encoding='utf-8'))['run'], run
        there, here = (split_name(name.rpartition('/')[2])[0] for name in names)
        if there != here:
            raise InputError(f'{tag} must be of {there}, as it is now, got {here}: remove {evaluation.parent} first')


def main():
    parser = ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument('folder', type=Path, help='folder of the data sets')
    parser.add_argument('experiment', help='name of a folder in results/')
    parser.add_argument('method', nargs='?', default='ekd', help='method that trained all depths in shared weights')
    args = parser.parse_args()
    best = best_run(args.experiment, args.method)
    tag = f'{best.options["--model"]}.{args.method.partition("_")[0]}_{best.data}'
    check_place(tag, best.name)
    with staged_folder(WEIGHTS / tag) as folder:
        model = load_model(str(WORK / best.name))
        data_config, names = resolve_data_config(model=model), model.pretrained_cfg['label_names']
        if sum(parameter.numel() for parameter in model.parameters()) > FLOAT16_FROM:
            for parameter in model.parameters():
                parameter.data = parameter.data.half() if parameter.ndim > 1 else parameter.data
        save_model(model, folder, data_config=data_config, class_names=names, rows=[])
        result = evaluate_model(str(folder), str(data_folder(best.data, args.folder.resolve())))
        rows = [{key: row[key] for key in ROW} for row in result['depths']]
        save_model(model, folder, data_config=data_config, class_names=names, rows=rows)
    measured = RESULTS / 'weights' / tag
    measured.mkdir(parents=True, exist_ok=True)
    write_json(measured / 'evaluation.json', {**result, 'run': best.name, 'model': tag, 'data': best.data})
    tops = ', '.join(f'{row["top1"]:.2f} ({row["depth"]})' for row in rows)
    print(f'{tag}: {best.name}, top-1 of {result["images"]:,} images {tops}')


if __name__ == '__main__':
    run(main)
