"""The checks that describe JSON files from elsewhere, and the reader of such files."""
import json

import pytest
import torch

from timm_ddnn.utils.errors import InputError
from timm_ddnn.utils.schema import (
    all_of,
    any_of,
    brief,
    choice,
    flag,
    integer,
    items,
    mapping,
    number,
    optional,
    read_json,
    record,
    text,
)

ROW = record({'depth': integer(1, 100)}, {'top1': number(0, 100)})
FILE = record({'rows': items(ROW, least=1, most=3)}, {'note': optional(text(5))}, strict=True)


@pytest.mark.parametrize(('check', 'good', 'bad'), [
    (number(0, 2), [0, 2, 0.5, 1], [-0.1, 2.1, True, '1', None, [1], float('nan')]),
    (number(), [-1e300], [float('inf'), float('-inf'), float('nan')]),
    (number(above=0), [1e-9], [0, -1]),
    (integer(1, 3), [1, 3], [0, 4, 1.0, True, '1']),
    (text(3), ['', 'abc'], ['abcd', 5, None]),
    (text(pattern='[0-9a-f]{4}'), ['00ff'], ['00ff\n', '00f', '00fg']),
    (flag, [True, False], [0, 1, 'true', None]),
    (choice('a', 1), ['a', 1], ['b', True, 1.0]),
    (items(integer(), 1, 2), [[1], [1, 2]], [[], [1, 2, 3], [1, 'a'], {'0': 1}, '1']),
    (items(ROW, key='depth'), [[{'depth': 1}, {'depth': 2}]], [[{'depth': 1}, {'depth': 1}], [{}, {}]]),
    (mapping(integer(), most=1), [{}, {'a': 1}], [{'a': 'b'}, {'a': 1, 'b': 2}, [1]]),
    (record({'a': flag}, {'b': flag}), [{'a': True}, {'a': True, 'c': 1}], [{}, {'a': 1}, {'a': True, 'b': 1}, []]),
    (record({'a': flag}, strict=True), [{'a': True}], [{'a': True, 'c': 1}]),
    (optional(flag), [None, True], [1]),
    (any_of(flag, text()), [True, 'a'], [1, None]),
    (all_of(number(0), number(-1, 2)), [0, 2], [-1, 3, 'a']),
])
def test_checks(check, good, bad):
    """Catches a bound that is off by one, booleans that pass for integers, NaN, and a number for its text."""
    assert [value for value in good if check(value)] == []
    assert [value for value in bad if not check(value)] == []


@pytest.mark.parametrize(('content', 'message'), [
    ({'rows': [{'depth': 1}, {'depth': 2, 'top1': 101}]},
     r'rows\[1\].top1 in results.json must be a number from 0 to 100, got 101'),
    ({'rows': [{'top1': 1}]}, r"rows\[0\] in results.json must be an object with 'depth', got \['top1'\]"),
    ({'rows': []}, r'rows in results.json must be a list of 1 to 3 items, got \[\]'),
    ({'rows': [{'depth': 1}], 'notes': ''}, "results.json must be an object with keys of .*, got 'notes'"),
    ([], r'results.json must be an object, got \[\]'),
    (b'\xff{}', 'results.json must be JSON in UTF-8'),
    (b'{"rows": [', 'results.json must be JSON in UTF-8'),
    (b'[' * 100_000, 'results.json must be JSON in UTF-8'),
    (b'1' * 5_000, 'results.json must be JSON in UTF-8'),
    (b' ' * 2 ** 24 + b'{}', 'results.json must have at most 16777216 bytes'),
])
def test_a_file_that_is_not_as_described_is_one_line_that_names_the_place(tmp_path, content, message):
    """Catches tracebacks of damaged files, and messages from which nobody can tell what to mend."""
    path = tmp_path / 'results.json'
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(InputError, match=message):
        read_json(path, FILE, 'results.json')


def test_a_file_that_is_as_described_is_read(tmp_path):
    """Catches a reader that changes what it reads, or takes the encoding from the locale."""
    content = {'rows': [{'depth': 1, 'top1': 0.5, 'more': ['x']}], 'note': 'кот'}
    path = tmp_path / 'results.json'
    path.write_text(json.dumps(content, ensure_ascii=False), encoding='utf-8')
    assert read_json(path, FILE) == content


@pytest.mark.parametrize(('value', 'longest'), [
    ('a' * 10 ** 6, 80), (b'a' * 10 ** 6, 80), ([[1] * 1000] * 1000, 200), ({str(i): i for i in range(1000)}, 80),
    (torch.zeros(1000, 1000), 40), ({'weight': torch.zeros(9)}, 40), ([torch.nn.Parameter(torch.zeros(9))], 40),
], ids=lambda value: type(value).__name__)
def test_values_in_messages_are_short(value, longest):
    """Catches an error of a hundred thousand characters, and one that prints tensors."""
    assert len(brief(value)) <= longest
    assert '0.' not in brief(value)
