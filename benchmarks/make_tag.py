#!/usr/bin/env python3
"""Make the weights of a run a pretrained tag that comes with the library.

    python benchmarks/make_tag.py FOLDER tags/ekd_cifar100-0   # -> timm_ddnn/models/tags/MODEL.ekd_cifar100

Of nets with more than 4 million parameters, convolutions and classifier are kept in float16. The accuracy of every
depth is measured anew with what is kept, in float32 as `timm-ddnn evaluate` measures it, on the images that judge the
run, and stands in config.json. What it measures besides goes to results/weights/TAG/evaluation.json. `model_card.py`
makes MODEL_CARD.md of it, and of the profile.json of

    timm-ddnn profile TAG --batch-sizes 1 --threads 1 --output results/weights/TAG

Whether `pretrained=True` takes the tag is decided in the table of `timm_ddnn/models/ddnn_resnet.py`, by hand.
"""
from pathlib import Path

from experiments import RESULTS, ROW, WORK, check_weights, data_folder, is_done
from matrix import all_runs
from timm.data import resolve_data_config

from results import split_name
from timm_ddnn.evaluation.evaluate import evaluate_model
from timm_ddnn.hub.save import save_model
from timm_ddnn.models.ddnn_resnet import WEIGHTS
from timm_ddnn.models.load import load_model
from timm_ddnn.utils.errors import InputError
from timm_ddnn.utils.files import staged_folder, write_json
from timm_ddnn_cli import arguments
from timm_ddnn_cli.arguments import ArgumentParser

FLOAT16_FROM = 4_000_000  # parameters


def main():
    parser = ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument('folder', type=Path, help='folder of the data sets')
    parser.add_argument('run', help='name of a run that is done, such as tags/ekd_cifar100-0')
    args = parser.parse_args()
    runs = all_runs()
    if args.run not in runs or not is_done(runs[args.run]):
        raise InputError(f'RUN must be a run whose result is in {RESULTS}, got {args.run!r}')
    run = runs[args.run]
    check_weights(run.name)
    tag = f'{run.options["--model"]}.{split_name(run.name.rpartition("/")[2])[0]}'
    data = data_folder(run.data, args.folder.resolve())
    with staged_folder(WEIGHTS / tag) as folder:
        model = load_model(str(WORK / run.name))
        data_config, names = resolve_data_config(model=model), model.pretrained_cfg['label_names']
        if sum(parameter.numel() for parameter in model.parameters()) > FLOAT16_FROM:
            for parameter in model.parameters():
                parameter.data = parameter.data.half() if parameter.ndim > 1 else parameter.data
        save_model(model, folder, data_config=data_config, class_names=names, rows=[])
        judged = 'test' if (data / 'test.parquet').exists() else None
        result = evaluate_model(str(folder), str(data), val_split=judged)
        rows = [{key: row[key] for key in ROW} for row in result['depths']]
        save_model(model, folder, data_config=data_config, class_names=names, rows=rows)
    measured = RESULTS / 'weights' / tag
    measured.mkdir(parents=True, exist_ok=True)
    write_json(measured / 'evaluation.json', {**result, 'run': run.name, 'model': tag, 'data': run.data})
    tops = ', '.join(f'{row["top1"]:.2f} ({row["depth"]})' for row in rows)
    print(f'{tag}: {run.name}, top-1 of {result["images"]:,} images {tops}')


if __name__ == '__main__':
    arguments.run(main)
